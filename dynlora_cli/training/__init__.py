"""From a recipe and a model to a trained adapter: the run, its loop, its optimizer and its checkpoints."""
