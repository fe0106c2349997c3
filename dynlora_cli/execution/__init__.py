"""How the same mathematics runs: blocks, checkpointing, compilation, CUDA graphs, several processes, signals."""
