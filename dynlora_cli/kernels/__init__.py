"""Autograd functions of our own, which compute what PyTorch does with less memory traffic."""
