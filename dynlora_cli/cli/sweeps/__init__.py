"""`dynlora train --sweep`."""
