"""LoRA as a sum of rank-1 components: the layer, the pool that holds all of them, and surgery on both."""
