"""Rows as columns: in memory or on disk, chosen from and put in order without an object for each."""
