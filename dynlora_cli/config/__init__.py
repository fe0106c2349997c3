"""The recipe: read, checked and explained without torch."""
