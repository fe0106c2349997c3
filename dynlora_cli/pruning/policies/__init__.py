"""Which components to keep: one file per pruning policy, named as in the recipe (`pruning.policy`)."""
