"""Answers that are compared or judged: examples of them, and how their rows become tokens."""
