"""What is learned from the rows: one file per objective, named as in the recipe (`train.objective`)."""
