"""Fine-tune, distill into, quantize and publish Hymba models."""

import logging

__version__ = "0.1.0"

# Bitsandbytes, which PEFT imports, logs a warning about an optional kernel where no logging is configured.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())
