"""The learning rate of a run whose recipe leaves it open: a guess before training, and short trials around it."""
