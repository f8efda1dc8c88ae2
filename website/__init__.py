"""What the documentation site has besides the pages of `docs/`: its reference, and links that lead out of `docs/`."""
