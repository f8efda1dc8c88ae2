"""What a release needs: checks of its distributions, its notes, and the project's address. Not installed."""
