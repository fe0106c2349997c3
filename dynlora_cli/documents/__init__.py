"""Rows about a document, written by a model that has the document before it."""
