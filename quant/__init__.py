"""Quantising Hymba with bitsandbytes."""
