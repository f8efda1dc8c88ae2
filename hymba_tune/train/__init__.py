"""Training: supervised fine-tuning on TRL's trainer, in run directories that can be gone on with."""
