"""How a layer with several adapters computes: which request wants which mix, and the fastest way to it."""
