"""What training lowers: one file per objective, named as in the recipe (`train.objective`). See tasks/objective.py."""
