"""The ways to run a model that a recipe can ask for."""
