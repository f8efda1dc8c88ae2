"""Distilling a larger teacher into Hymba, also when the tokenizers differ."""
