"""A run for people: the HTML page, its charts, and the model card."""
