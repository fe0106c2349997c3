"""Hypernetworks: networks that write an adapter from a text, or from a document, in one pass."""
