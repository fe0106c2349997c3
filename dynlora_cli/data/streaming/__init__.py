"""Rows that are read while the run trains (`dataset.streaming`), a block at a time."""
