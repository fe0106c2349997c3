"""What trained routers share: their numbers, the layers of the adapters that they weigh, and how they train."""
