"""How several adapters become one: one file per method, named as in `dynlora merge --method`."""
