"""LoRA files of diffusion pipelines: one .safetensors file, as diffusers or as kohya's scripts write it."""
