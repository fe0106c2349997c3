"""A base with its adapters in memory, which answers requests."""
