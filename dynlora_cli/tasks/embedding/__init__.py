"""Texts as vectors: how they are pooled, what lowers their loss, how well they rank, and the files that say so."""
