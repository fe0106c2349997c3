"""How a row of data becomes an example: one file per format, named as in the recipe (`dataset.train[].format`)."""
