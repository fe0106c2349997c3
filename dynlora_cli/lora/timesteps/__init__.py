"""Rank by timestep: how many components a denoiser uses at so much noise, and the layers that heed it."""
