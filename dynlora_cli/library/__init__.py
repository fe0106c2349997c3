"""A library: adapters of one base in a folder, with the keys by which a request finds the one that helps."""
