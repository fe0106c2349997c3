"""Several runs by one command: `dynlora train --sweep`, and `dynlora train A.yaml B.yaml`."""
