"""Models by family: NAMES, from transformers' model_type to llama.cpp's architecture, and `describe(config, kind)`."""
