"""Training on TRL's trainers, in run directories that can be resumed."""
