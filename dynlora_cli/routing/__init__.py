"""Which adapter answers a request, or a token."""
