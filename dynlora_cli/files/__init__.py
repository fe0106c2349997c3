"""Files: reading what somebody else made as if it were hostile; writing so that no half-written file is seen."""
