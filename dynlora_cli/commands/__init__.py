"""One file per command of the command line; each returns its summary as data and prints nothing."""
