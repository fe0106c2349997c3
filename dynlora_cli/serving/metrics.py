"""What a server counts, as Prometheus reads it.

Labels come from outside, and each new value costs memory for ever: a model's name is a label only where the server
knows it, and of these MOST_LABELS at most; the others are counted as `other`, a blend of adapters as `blend`.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dynlora_cli.serving.jobs import Tally

MOST_LABELS = 200
BLEND, OTHER = "blend", "other"
GONE = 499  # the client hung up; nginx's number, since HTTP has none
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
__all__ = ["CONTENT_TYPE_LATEST", "GONE", "Metrics"]


class Metrics(Tally):
    """The counters of one server.

    Args:
        known: the names that a client may ask for, as they are now.
        waiting, running: how many requests wait, and how many are being answered.
        tell: takes a line about a fault, for whoever runs the server.
    """

    def __init__(
        self,
        known: Callable[[], list[str]],
        waiting: Callable[[], int],
        running: Callable[[], int],
        tell: Callable[[str], None],
    ) -> None:
        self._known, self._tell = known, tell
        self._labels: set[str] = set()
        self.answered = 0
        self.registry = of = CollectorRegistry()  # its own: two servers in one process count apart
        by = ["model"]
        self._requests = Counter("dynlora_requests", "Requests.", ["model", "status"], registry=of)
        self._prompt = Counter("dynlora_prompt_tokens", "Tokens of prompts.", by, registry=of)
        self._written = Counter("dynlora_generated_tokens", "Tokens of answers.", by, registry=of)
        first, whole = "From a request to its first text.", "From a request to the end of its answer."
        self._first = Histogram("dynlora_time_to_first_token_seconds", first, by, buckets=SECONDS, registry=of)
        self._whole = Histogram("dynlora_request_seconds", whole, by, buckets=SECONDS, registry=of)
        self._batch = Histogram("dynlora_batch_size", "Answers that are written at once.", buckets=ROWS, registry=of)
        self._faults = Counter("dynlora_faults", "Batches that failed by a fault of the server.", registry=of)
        Gauge("dynlora_queue_length", "Answers that wait.", registry=of).set_function(waiting)
        Gauge("dynlora_running", "Answers that are being written.", registry=of).set_function(running)

    def label(self, model: str, *, is_model: bool = False) -> str:
        """The model's name, or what stands for it.

        Args:
            model: as a client names it.
            is_model: whether the engine knows it: what is not a name of its own is a blend then.
        """
        if model not in self._labels:
            if model not in self._known():
                return BLEND if is_model else OTHER
            if len(self._labels) >= MOST_LABELS:
                return OTHER
            self._labels.add(model)
        return model

    def batch(self, size: int) -> None:
        self._batch.observe(size)

    def fault(self, error: Exception) -> None:
        self._faults.inc()
        self._tell(f"a request has failed: {type(error).__name__}: {error}")

    def first_text(self, model: str, seconds: float) -> None:
        """The first text of an answer has come."""
        self._first.labels(model).observe(seconds)

    def tokens(self, model: str, prompt: int, written: int) -> None:
        """What a request has cost."""
        self._prompt.labels(model).inc(prompt)
        self._written.labels(model).inc(written)

    def ended(self, model: str, status: int, seconds: float) -> None:
        """A request is over, in whatever way."""
        self.answered += status == 200
        self._requests.labels(model, str(status)).inc()
        self._whole.labels(model).observe(seconds)

    def page(self) -> bytes:
        """All of it, in Prometheus' text form."""
        return generate_latest(self.registry)
