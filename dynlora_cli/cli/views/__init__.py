"""What the terminal shows. rich is imported here alone."""
