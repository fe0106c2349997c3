"""Conversations as a chat template writes them, and which part of the text the assistant wrote."""
