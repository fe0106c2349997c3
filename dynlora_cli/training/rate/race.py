"""`train.learning_rate: auto`: a guess, and short trials that check it or race around it; the best becomes the run.

A trial is the beginning of the run at one rate: its own first steps, on its own batches, with its own warm-up. So the
best trial is not thrown away: its steps are the run's, and what comes out is what a recipe with that number in it would
have given, bit for bit. All trials see the same rows in the same order, and are judged by their mean training loss over
the last three quarters of their steps. What the others take is at most a tenth of the run's steps (`SHARE`).

Rates can be told apart by trials of three times the warm-up at least: within it, a rate that is too high for the run is
the fastest (scripts/bench/NOTES.md). Where those fit, guess, half and twice race, and long runs go on, a factor of 2 at
a time, until the best has a worse neighbour on both sides. Elsewhere the guess (prior.py) is only checked: where it
ends above the loss before training, by more than `HARMLESS`, half of it is tried, whatever that costs, and so on.

A rate that leaves the loss no lower than it was is no candidate: of broken models one may well look better than the
next. Where no rate is one, for the model learns nothing in so few steps, the guess is taken, or where that does harm
the highest rate that does none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from dynlora_cli.errors import Interrupted, MeasureError
from dynlora_cli.pruning.control import NoControl
from dynlora_cli.text import counted
from dynlora_cli.training.held_out import first_evaluation
from dynlora_cli.training.lr_schedule import warmup_steps
from dynlora_cli.training.metrics import Window
from dynlora_cli.training.rate.prior import prior
from dynlora_cli.training.rate.standing import Standing, told_later
from dynlora_cli.training.run import Progress, Run
from dynlora_cli.training.step import advance

SHARE = 0.1  # of the run's steps: what trials may cost beside those that become the run
SHORTEST, CHECKED, LONGEST = 6, 12, 24  # steps of a trial; of one that checks a guess at most
WARMUPS = 3  # a trial that is compared is at least so many times as long as the warm-up
LOWEST = 1e-7
JUDGED = 0.75
FORWARD = 1 / 3  # what a step costs that is only measured
HARMLESS = 0.01  # a trial does no harm if it ends at most this share above the untrained model's loss


@dataclass(frozen=True)
class Terms:
    """What a race may cost.

    Attributes:
        steps: of a trial; 0: there is no race.
        spare: steps that may be thrown away in all.
        kept: the best trial becomes the run; else all are thrown away.
        compares: rates race; else a guess is only checked.
    """

    steps: int
    spare: int
    kept: bool
    compares: bool = True

    @property
    def judged(self) -> int:
        """Steps at the end of a trial that it is judged by: with the last third alone, one odd batch decides."""
        return max(1, int(JUDGED * self.steps))

    def thrown_away(self, trials: int) -> float:
        """Steps beside the run's own, after so many trials."""
        return (trials - self.kept) * self.steps + self.judged * FORWARD


@dataclass
class Trial:
    """The beginning of the run at one rate.

    Attributes:
        loss: mean over the steps that count, in nats per target; infinite where it diverged.
        progress, window, told, standing: of the run after its last step, where the trial may become the run.
    """

    rate: float
    loss: float
    progress: Progress
    window: Window
    told: list[Callable[[float], None]] = field(default_factory=list)
    standing: Standing | None = None


def settle_rate(run: Run, interrupted: Callable[[], bool] = lambda: False) -> Window:
    """Find the rate of a run that has none, and go on to where its trial ended.

    Returns:
        What happened since the last line of metrics.

    Raises:
        MeasureError: every rate down to the lowest one diverges.
        Interrupted: Ctrl-C; there is nothing to save yet.
    """
    guess, terms = prior(run), _terms(run)
    if not terms.steps:
        run.progress.learning_rate, run.progress.rate_from = guess, "prior"
        run.note(f"learning rate {guess:.1e}: a guess from model, components and steps; {_unchecked(run)}")
        return Window()
    began = time.perf_counter()
    race = Race(run, guess, terms, interrupted)
    best = race.run_all()
    cost = time.perf_counter() - began - best.progress.seconds
    run.progress = replace(
        best.progress,
        learning_rate=best.rate,
        rate_from=f"race of {len(race.losses)}" if len(race.losses) > 1 else "prior",
        rates_tried=[(rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(race.losses.items())],
        rate_seconds=cost,
        seconds=best.progress.seconds + cost,
    )
    race.tell(best.rate)
    for tell in best.told:
        tell(cost)
    return best.window


def _terms(run: Run) -> Terms:
    """How long trials may be so that three of them fit, two beside the one that becomes the run."""
    spare = int(SHARE * run.total_steps)
    alone, with_winner = (min(LONGEST, int(spare / (trials + JUDGED * FORWARD))) for trials in (3, 2))
    quiet = min(with_winner, _quiet_steps(run))
    steps = quiet if quiet >= max(SHORTEST, alone) else alone
    if steps >= max(SHORTEST, WARMUPS * warmup_steps(run.total_steps, run.recipe.train)):
        return Terms(steps, spare, kept=steps == quiet)
    checked = Terms(min(CHECKED, _quiet_steps(run)), spare, kept=True, compares=False)
    fits = checked.steps >= SHORTEST and checked.thrown_away(1) <= spare
    return checked if fits else replace(checked, steps=0)


def _unchecked(run: Run) -> str:
    """Why the first steps of the run do not check the guess."""
    if Terms(SHORTEST, 0, kept=True).thrown_away(1) > int(SHARE * run.total_steps):
        return f"{counted(run.total_steps, 'step')} are too few to check it"
    if not run.trained.layers:
        return "nothing checks it, since the state of a whole model is too large to keep"
    return "nothing checks it, since pruning, a save or an evaluation comes in the first steps"


def _quiet_steps(run: Run) -> int:
    """First steps of the run in which nothing is looked at, saved or pruned; none where its state is too large."""
    if not run.trained.layers:
        return 0
    schedule, saves = run.control.schedule, run.recipe.train.save_steps or run.total_steps
    return min(
        schedule.begin if schedule.steps else run.total_steps,
        min(saves, first_evaluation(run), run.total_steps) - 1,
    )


class Race:
    """Trials one after the other, each from the same beginning.

    Args:
        run: before its first step.
        guess: the rate of the first trial.
        terms: what the race may cost.
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(self, run: Run, guess: float, terms: Terms, interrupted: Callable[[], bool]) -> None:
        self.run, self.guess, self.terms, self.interrupted = run, guess, terms, interrupted
        self.losses: dict[float, float] = {}
        self.best: Trial | None = None
        self.start = Standing.beginning(run)
        self.progress = run.progress
        if terms.compares:
            run.note(
                f"looking for a learning rate around {guess:.1e}: trials of {counted(terms.steps, 'step')}, at most "
                f"{terms.spare} of them beside the run's own {run.total_steps}"
            )
        self.untrained = _untrained(run, terms)

    def run_all(self) -> Trial:
        """Try rates until the best has a worse neighbour on both sides, or the steps are used up."""
        best = self.guess
        while LOWEST <= best <= 1:
            rates = (best, 2 * best, best / 2) if self.terms.compares else (best,)
            around = [self._tried(rate) for rate in rates if rate <= 1]
            here, lowest = around[0], min(around)
            if math.inf > here <= lowest:
                break
            if lowest == math.inf and self.losses[best] <= (1 + HARMLESS) * self.untrained:
                break  # lower rates would do even less
            if lowest < math.inf and not self._affordable():
                break
            best = best / 2 if lowest == math.inf or around[-1] == lowest else 2 * best
        if not any(map(math.isfinite, self.losses.values())):
            raise MeasureError(
                f"the loss is not finite at any learning rate down to {min(self.losses):.0e}",
                "look at the rows and the model",
            )
        return self._winner()

    def _affordable(self) -> bool:
        return self.terms.thrown_away(len(self.losses) + 1) <= self.terms.spare

    def _tried(self, rate: float) -> float:
        """The loss of a trial at this rate; infinite where it ends no lower than the untrained model."""
        if rate not in self.losses:
            if self.best and self.best.loss < self.untrained and not self._affordable():
                return math.inf
            trial = self._trial(rate)
            self.losses[rate] = trial.loss
            if rate == choose(self.losses, self.untrained, self.guess):  # never again one that was dropped
                self.best = trial
                if self.terms.kept:
                    trial.standing = Standing.now(self.run)
            self.start.put_back(self.run)
        return self.losses[rate] if self.losses[rate] < self.untrained else math.inf

    def _trial(self, rate: float) -> Trial:
        run, losses = self.run, []
        run.progress = replace(self.progress, learning_rate=rate)
        trial = Trial(rate, math.inf, run.progress, Window())
        with told_later(run) as trial.told, nullcontext() if self.terms.kept else _unpruned(run):
            for _ in range(self.terms.steps):
                try:
                    record = advance(run, trial.window, self.interrupted)
                except MeasureError:
                    return trial
                if record["stop"]:
                    raise Interrupted(
                        "interrupted while looking for a learning rate; no step of the run is saved",
                        "start again with --overwrite; a number in train.learning_rate skips the search",
                    )
                losses.append(record["loss"])
        judged = losses[-self.terms.judged :]
        trial.loss = sum(judged) / len(judged)
        return trial

    def _winner(self) -> Trial:
        """The run at the end of the chosen trial, or at its beginning where trials are not kept."""
        assert self.best is not None
        if not self.terms.kept:
            return Trial(self.best.rate, self.best.loss, self.progress, Window())
        assert self.best.standing is not None
        self.best.standing.put_back(self.run)
        return self.best

    def tell(self, rate: float) -> None:
        """Leave a note of what was found."""
        if self.losses.keys() == {self.guess}:
            took = (
                "lower the loss" if self.losses[rate] < self.untrained else "do no harm, and do not lower the loss yet"
            )
            steps = f"its first {self.terms.steps} steps {took}"
            self.run.note(f"learning rate {rate:.1e}: a guess from model, components and steps; {steps}")
            return
        text = f"learning rate {rate:.1e}, by a race of {len(self.losses)}: "
        tried = ((f"{loss:.3f}" if loss < math.inf else "diverged", rate) for rate, loss in sorted(self.losses.items()))
        text += ", ".join(f"{loss} at {rate:.1e}" for loss, rate in tried)
        if min(self.losses.values()) >= self.untrained:
            text += f"; none ended below the {self.untrained:.3f} of no training, so a number may do better"
        self.run.note(text)


@contextmanager
def _unpruned(run: Run) -> Iterator[None]:
    """No component goes inside the block, and none is scored: what a trial does to them could not be put back."""
    control, run.control = run.control, NoControl()
    try:
        yield
    finally:
        run.control = control


def choose(losses: dict[float, float], untrained: float, guess: float) -> float:
    """The rate with the lowest loss; where none is below that of the untrained model, the guess or a lower one."""
    best = min(losses, key=lambda rate: (losses[rate], rate))
    if losses[best] < untrained:
        return best
    harmless = [rate for rate, loss in losses.items() if loss <= (1 + HARMLESS) * untrained]
    if harmless:
        return guess if guess in harmless else max(harmless)
    return min((rate for rate, loss in losses.items() if math.isfinite(loss)), default=min(losses))


@torch.no_grad()
def _untrained(run: Run, terms: Terms) -> float:
    """The mean loss of the model as it is, on the steps that trials are judged by."""
    losses = []
    with torch.random.fork_rng([run.accelerator.device] if run.accelerator.device.type == "cuda" else []):
        for number in range(terms.steps - terms.judged, terms.steps):
            micro_batches = run.batches.step(*divmod(number, run.batches.steps_per_epoch))
            sums = []
            for batch in micro_batches:
                batch = batch.to(run.accelerator.device)
                run.trained.see(batch)
                with run.accelerator.autocast():
                    sums.append(run.objective.loss(run.model, batch).item())
            loss, supervised = run.total(sum(sums), sum(batch.supervised for batch in micro_batches))
            losses.append(loss / supervised)
    run.objective.take(run.total)  # what is found on rows of trials is none of the run's
    return sum(losses) / len(losses)
