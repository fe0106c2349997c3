"""What a model is trained to do: one file per task, named as in the recipe (`model.task`). See tasks/task.py."""
