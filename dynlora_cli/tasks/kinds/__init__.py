"""What a model is for: one file per task, named as in the recipe (`model.task`)."""
