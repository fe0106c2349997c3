"""What a process can do once at a time, since libraries below us keep settings of the whole process meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

# Training, and whatever else draws from torch's one source of random numbers or loads a model.
one_at_a_time = RLock()
_making = RLock()


@contextmanager
def making_a_model() -> Iterator[None]:
    """A model is made inside the block, or must not be by another thread.

    While transformers makes one, torch's default dtype is that model's, and accelerate may register every parameter on
    no device. Answers that another thread writes meanwhile wait. They do not wait for training, which takes long.
    """
    with _making:
        yield
