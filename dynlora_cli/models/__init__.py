"""The frozen base model: finding it, loading it, and asking about its layers."""
