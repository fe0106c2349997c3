"""What is made with the model before the first step: by a task, or by an objective that refers to it."""
