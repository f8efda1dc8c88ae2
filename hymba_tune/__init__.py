"""Fine-tune, distill into, quantize and publish Hymba models."""

import logging

__version__ = "0.1.0"

# Bitsandbytes, which PEFT imports, warns of a kernel it could do without, to whoever has not said where warnings go.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())
