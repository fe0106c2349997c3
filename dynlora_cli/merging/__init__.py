"""Adapters into a base, and several adapters into one."""
