"""Which components live: when, how many, and by which score."""
