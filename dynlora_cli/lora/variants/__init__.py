"""How a layer uses its components: one file per variant, named as in the recipe (`adapter.variant`)."""
