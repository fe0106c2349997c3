"""The queue and its one thread: who shares a batch, who waits how long, and what happens at the end."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeAnswer, FakeEngine, FakeRequest, answer_of

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError
from dynlora_cli.serving import worker as serving_worker
from dynlora_cli.serving.jobs import Event, Failed, Finished, Job, Piece, Prepared
from dynlora_cli.serving.refusals import Refusal
from dynlora_cli.serving.worker import SLICE_TO_JOIN, Worker


class Heard(list[Event]):
    """What was told of a job."""

    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Piece))

    @property
    def last(self) -> Event:
        return self[-1]


def job(prompt: str, model: str = "a", tokens: int = 10) -> tuple[Job, Heard]:
    heard = Heard()
    return Job(model, prompt, Sampling(max_new_tokens=tokens), heard.append, names={model}, raw=True), heard


def work(worker: Worker, *, grace: float = 60.0) -> None:
    """Run until all that was submitted is answered: it is asked to stop at once."""
    worker.run(lambda: True, grace=grace)


@contextmanager
def running(worker: Worker) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=worker.run, args=(ended.is_set,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


def test_a_job_is_told_step_by_step():
    worker = Worker(FakeEngine(), max_queue=5, max_batch=2)
    one, heard = job("p", tokens=3)
    worker.submit([one])
    work(worker)
    assert [type(event) for event in heard] == [Prepared, Piece, Piece, Piece, Finished]
    assert heard.text == heard.last.answer.text == answer_of("a", "p", 3)


def test_jobs_of_one_group_share_a_batch_and_others_do_not():
    engine = FakeEngine(alone=("b",))
    worker = Worker(engine, max_queue=20, max_batch=3)
    jobs = [job(name, model)[0] for name, model in [("1", "a"), ("2", "b"), ("3", "base"), ("4", "a"), ("5", "a")]]
    worker.submit(jobs)
    work(worker)
    assert engine.batches == [["1", "3", "4"], ["2"], ["5"]]


def test_nobody_starves_behind_others_that_are_asked_again_and_again():
    """One long answer alone in its group, while six of the other group are always waiting."""
    engine = FakeEngine(alone=("b",))
    worker = Worker(engine, max_queue=500, max_batch=4)
    long, heard = job("long", "b", 400)
    worker.submit([long])
    shorts: list[Heard] = []

    def ask_again(step: int) -> None:
        open_now = sum(not (its and isinstance(its.last, Finished)) for its in shorts)
        if open_now < 6 and not (heard and isinstance(heard.last, Finished)):
            one, its = job(f"s{len(shorts)}_", "a", 30)
            shorts.append(its)
            worker.submit([one])

    engine.at_step = ask_again
    turns: list[bool] = []
    generate = engine.generate

    def noted(requests: list[FakeRequest], **rest: Any) -> list[FakeAnswer]:
        turns.append("b" in requests[0].mix)
        return generate(requests, **rest)

    engine.generate = noted
    worker.run(lambda: bool(heard) and isinstance(heard.last, Finished), grace=60.0)
    assert heard.text == answer_of("b", "long", 400)
    assert len(shorts) > 40
    assert all(its.text == answer_of("a", f"s{number}_", 30) for number, its in enumerate(shorts))
    own = [number for number, is_own in enumerate(turns) if is_own]
    assert max(later - earlier for earlier, later in itertools.pairwise(own)) <= 3  # six others are two batches


def test_a_newcomer_joins_a_running_batch():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=20, max_batch=3)
    first, heard = job("1", "a", 100)
    second, its = job("2", "base", 5)
    engine.at_step = lambda step: worker.submit([second]) if step == 2 and len(engine.batches) == 1 else None
    worker.submit([first])
    worker.run(lambda: isinstance(heard and heard.last, Finished))
    assert engine.batches[:2] == [["1"], ["2", "1"]]
    assert heard.text == answer_of("a", "1", 100)
    assert its.text == answer_of("base", "2", 5)
    assert len(heard) == 102  # each piece once
    assert SLICE_TO_JOIN < 100


def test_where_reading_takes_long_a_batch_pauses_seldom(monkeypatch: pytest.MonkeyPatch):
    """Newcomers all the time, and prompts that take as long as 50 tokens: no more is spent on reading than on writing."""
    passed = [0.0]
    monkeypatch.setattr(serving_worker, "time", SimpleNamespace(monotonic=lambda: sum(passed)))
    engine = FakeEngine(seconds=0.001, reading=0.05, wait=passed.append)
    worker = Worker(engine, max_queue=500, max_batch=40)
    long, heard = job("long", "a", 400)
    worker.submit([long])
    engine.at_step = lambda step: worker.submit([job("new", "b", 20)[0]]) if step % 15 == 0 else None
    worker.run(lambda: bool(heard) and isinstance(heard.last, Finished), grace=60.0)
    assert heard.text == answer_of("a", "long", 400)
    slices = len(engine.batches) - 1  # the last newcomers are answered behind it
    assert 400 // 51 <= slices <= 400 // 50 + 1


def test_a_short_answer_is_told_before_its_long_neighbour_ends():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=20, max_batch=3)
    (long, _heard), (short, its) = job("1", "a", 60), job("2", "b", 4)
    done_at: list[int] = []
    engine.at_step = lambda step: done_at.append(step) if isinstance(its.last, Finished) and not done_at else None
    worker.submit([long, short])
    work(worker)
    assert done_at == [5]


def test_the_queue_is_bounded_as_a_whole():
    worker = Worker(FakeEngine(), max_queue=3, max_batch=2)
    worker.submit([job("1")[0], job("2")[0]])
    with pytest.raises(Refusal) as full:
        worker.submit([job("3")[0], job("4")[0]])
    assert (full.value.status, full.value.retry_after, worker.waiting) == (429, 2, 2)
    worker.submit([job("3")[0]])


def test_a_cancelled_job_leaves_the_queue_and_its_batch():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=3, max_batch=1)
    jobs, heards = zip(*(job(f"{number}", tokens=50) for number in range(3)), strict=True)
    worker.submit(jobs)
    worker.cancel([jobs[1]])
    assert worker.waiting == 2
    engine.at_step = lambda step: worker.cancel([jobs[0]]) if step == 5 else None
    work(worker)
    assert engine.batches == [["0"], ["2"]]
    assert len(heards[0]) == 5  # it was prepared, and four tokens came before
    assert list(heards[1]) == []
    assert isinstance(heards[2].last, Finished)


def test_wrong_prompts_and_models_harm_nobody_else():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=9, max_batch=9)
    jobs, heards = zip(job("1"), job("too long"), job("2", "nobody"), job("3"), strict=True)
    worker.submit(jobs)
    work(worker)
    assert [getattr(getattr(heard.last, "refusal", None), "status", 200) for heard in heards] == [200, 400, 404, 200]
    assert engine.batches == [["1", "3"]]


def test_what_breaks_a_batch_is_found_by_trying_each_alone():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=9, max_batch=9)
    jobs, heards = zip(job("1"), job("crash"), job("3"), strict=True)
    worker.submit(jobs)
    work(worker)
    assert engine.batches == [["1", "crash", "3"], ["1"], ["crash"], ["3"]]
    assert [isinstance(heard.last, Finished) for heard in heards] == [True, False, True]
    assert (heards[1].last.refusal.status, heards[0].text) == (500, answer_of("a", "1", 10))


def test_an_adapter_goes_when_its_requests_are_answered():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=9, max_batch=1)
    used, heard = job("1", "a", 100)
    other, _ = job("2", "b", 5)
    worker.submit([used, other])
    gone = worker.call(lambda: engine.remove("a"), free_of="a")
    with pytest.raises(Refusal, match="being unloaded"):
        worker.submit([job("3", "a")[0]])
    routed, its = job("4", "auto")
    routed.names = frozenset()
    worker.submit([routed])
    work(worker)
    assert gone.done()
    assert engine.names == ["b"]
    assert heard.text == answer_of("a", "1", 100)
    assert its.last.refusal.status == 503  # the router had chosen it


def test_a_call_is_made_between_two_slices_of_a_long_answer():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=9, max_batch=1)
    long, heard = job("1", "a", 500)
    calls: list[int] = []
    engine.at_step = lambda step: worker.call(lambda: calls.append(len(heard))) if step == 3 and not calls else None
    worker.submit([long])
    worker.run(lambda: isinstance(heard and heard.last, Finished))
    assert calls
    assert calls[0] < 3 * SLICE_TO_JOIN
    assert heard.text == answer_of("a", "1", 500)


def test_a_failed_call_tells_its_caller_alone():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=9, max_batch=1)
    with running(worker):
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 // 0).result(5)
        assert worker.call(lambda: 3).result(5) == 3
    with pytest.raises(Refusal, match="stopping"):
        worker.call(lambda: 3)


def test_at_the_end_what_was_taken_is_answered_and_nothing_new_is_taken():
    engine = FakeEngine(seconds=0.001)
    worker = Worker(engine, max_queue=9, max_batch=1)
    jobs, heards = zip(job("1", tokens=30), job("2", tokens=30), strict=True)
    worker.submit(jobs)
    refused: list[int] = []

    def ask(step: int) -> None:
        if step == 20 and not refused:
            with pytest.raises(Refusal) as no:
                worker.submit([job("3")[0]])
            refused.append(no.value.status)

    engine.at_step = ask
    work(worker)
    assert refused == [503]
    assert all(isinstance(heard.last, Finished) for heard in heards)


def test_at_the_end_nobody_waits_for_ever():
    engine = FakeEngine(seconds=0.001)
    worker = Worker(engine, max_queue=9, max_batch=1)
    jobs, heards = zip(job("1", tokens=100_000), job("2", tokens=30), strict=True)
    worker.submit(jobs)
    call = worker.call(lambda: None, free_of="a")
    work(worker, grace=0.1)
    assert [heard.last.refusal.status for heard in heards if isinstance(heard.last, Failed)] == [503, 503]
    with pytest.raises(Refusal):
        call.result(0)


def test_a_second_ctrl_c_ends_at_once():
    engine = FakeEngine()
    worker = Worker(engine, max_queue=9, max_batch=1)
    one, heard = job("1", tokens=100_000)

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    engine.at_step = stop
    worker.submit([one])
    with pytest.raises(KeyboardInterrupt):
        work(worker)
    assert heard.last.refusal.status == 503


def test_many_threads_at_once():
    """Every job is answered once, whatever threads submit and cancel meanwhile."""
    engine = FakeEngine(alone=("b",))
    worker = Worker(engine, max_queue=1000, max_batch=8)
    jobs, heards = zip(*(job(f"{n}_", "ab"[n % 2], 1 + n % 40) for n in range(200)), strict=True)

    def submit(mine: range) -> None:
        for number in mine:
            worker.submit([jobs[number]])
            if number % 5 == 0:
                worker.cancel([jobs[number]])

    with running(worker):
        threads = [threading.Thread(target=submit, args=(range(start, 200, 8),)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = [n for n in range(200) if n % 5]
        while not all(heards[n] and isinstance(heards[n].last, Finished) for n in wanted):
            threading.Event().wait(0.01)
    for number in wanted:
        kinds = Counter(type(event) for event in heards[number])
        assert kinds[Finished] == kinds[Prepared] == 1
        assert heards[number].text == answer_of("ab"[number % 2], f"{number}_", 1 + number % 40)
    assert (worker.waiting, worker.running) == (0, 0)


def test_a_router_that_cannot_be_opened_any_more_is_no_missing_model():
    class Broken(FakeEngine):
        def use(self, text: str) -> Any:
            raise UsageError("keys/a.npy cannot be read", "copy it again")

    refusals = []
    for model, router in (("auto", "embedding"), ("auto", None), ("a", "embedding")):
        worker = Worker(Broken(router=router), max_queue=5, max_batch=2)
        one, heard = job("p", model)
        worker.submit([one])
        work(worker)
        assert isinstance(heard.last, Failed)
        refusals.append((heard.last.refusal.status, heard.last.refusal.code))
    assert refusals == [(503, "router_unavailable"), (404, "model_not_found"), (404, "model_not_found")]
