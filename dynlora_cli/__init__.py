"""dynlora: fine-tuning with LoRA as a sum of rank-1 components."""

__version__ = "0.1.0"
