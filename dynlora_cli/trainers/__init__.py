"""Components inside the trainers of others: transformers, TRL, sentence-transformers."""
