"""Which adapter answers a request, or a token: one file per router, named as in `--router`."""
