"""What a model is trained for, and the loss that says how well it does."""
