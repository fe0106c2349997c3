"""Pictures and captions: what a denoiser learns from them, and pictures that it draws."""
