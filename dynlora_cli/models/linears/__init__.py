"""The kinds of linear layers that a base may have: what each keeps, and how its weight is read."""
