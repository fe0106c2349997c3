"""Tokens that a model writes, one after the other."""
