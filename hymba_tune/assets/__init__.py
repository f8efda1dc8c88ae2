"""What the package carries: the model `hymba-nano`, the demo data, and the builders that made them."""
