"""Pipelines of diffusers: folders in which a denoiser lies beside what it is used with."""
