"""Numbers: the loss of held-out rows, generated answers, benchmarks, and whether two models agree."""
