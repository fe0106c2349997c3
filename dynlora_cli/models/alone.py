"""What a process can do once at a time, since libraries below us keep settings of the whole process meanwhile."""

from __future__ import annotations

from threading import RLock

# Training, and whatever else draws from torch's one source of random numbers or loads a model.
one_at_a_time = RLock()
