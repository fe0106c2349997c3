"""Exports on a model hub: which files are sent, the card beside them, and the sending."""
