"""What training takes of memory, known before any weights are loaded."""
