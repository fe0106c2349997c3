"""Files that other tools read: one file per target, named as in `dynlora export --to`."""
