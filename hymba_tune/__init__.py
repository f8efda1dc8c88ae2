"""Fine-tune, distil into, quantise and publish Hymba models."""

__version__ = "0.1.0"
