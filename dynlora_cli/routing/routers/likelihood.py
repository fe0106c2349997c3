"""The adapter under which the prompt is most likely; the base, where none makes it likelier.

What it does
    Computes the loss of the prompt under the base and under each adapter, all of them in one batch, and takes the
    lowest. All read the same tokens, so losses per token may be compared. Without a calibration the base answers unless
    an adapter saves more than `margin` nats per token of the prompt. That is a guess: it says that the prompt is of a
    kind the adapter has learned, not that its answer will be better. An adapter that was trained on answers alone has
    learned little of prompts.

When to use it
    Adapters without keys, or with keys that do not tell them apart. It costs a pass over the prompt for each adapter.

Reference
    Bayes' rule with equal priors. As a baseline for routers it is old; no paper is followed.
"""

# Dimensions: P pairs of a request and what it is read under.

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dynlora_cli.config.mix import BASE
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.library.activation import Decision
from dynlora_cli.models.load import precision_of
from dynlora_cli.routing.router import Asked, Context
from dynlora_cli.tasks.scores import RowSums

UNIT = "request"
NEEDS = ("factors", "base")
OPTIONS = {
    "margin": {
        "type": "float",
        "default": 0.0,
        "at_least": 0,
        "help": "Nats per token of the prompt that an adapter must save; without a calibration only.",
    },
    "longest": {
        "type": "int",
        "default": None,
        "at_least": 2,
        "help": "Tokens of a prompt that are read, its last ones; null: all that the model's context holds.",
    },
    "batch_tokens": {"type": "int", "default": 8192, "at_least": 1, "help": "Tokens of a batch at most."},
}

# Of a batch, 1 GiB in fp32: a model that caps its logits, and any in its first pass, makes all of them.
LOGITS = 1 << 28


@dataclass(frozen=True)
class Pair:
    """A request to be read under an adapter, or under the base.

    Attributes:
        request: its number.
        name: of the adapter, or BASE.
        ids: the prompt.
    """

    request: int
    name: str
    ids: tuple[int, ...]


class Likelihood:
    """Reads prompts under everything that could answer them."""

    def __init__(self, context: Context) -> None:
        assert context.bank is not None
        assert context.base is not None
        self.bank, self.base, self.options = context.bank, context.base, context.options
        # Beyond its context a model with learned positions has no number for a token.
        limits = (context.options.longest, context.base.files.context_length)
        words = int(getattr(context.base.model.config.get_text_config(), "vocab_size", 0))
        self.batch_tokens = min(context.options.batch_tokens, LOGITS // max(words, 1))
        self.longest = min((limit for limit in limits if limit), default=None)
        # Under a calibration the base is not among the choices: the threshold has decided on that.
        self.names = [*([] if context.must_choose else [BASE]), *context.names]
        self.notes = []
        if not context.must_choose:
            at_least = f"{context.options.margin:g} nats per token" if context.options.margin else "anything"
            self.notes = [
                f"no calibration: an adapter answers where it saves {at_least} on the prompt, which is a guess"
            ]

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """A decision for each request."""
        prompts = [self._prompt(request) for request in requests]
        losses: list[dict[str, float]] = [{} for _ in prompts]
        pairs = [Pair(n, name, ids) for n, ids in enumerate(prompts) if len(ids) > 1 for name in self.names]
        for batch in self._batches(pairs):
            for pair, loss in zip(batch, self._losses(batch), strict=True):
                losses[pair.request][pair.name] = loss
        return [self._decide(of, len(ids) - 1) for of, ids in zip(losses, prompts, strict=True)]

    def _prompt(self, request: Asked) -> tuple[int, ...]:
        """What is read of a request: its tokens, or those of its text where nobody has made any."""
        ids = request.ids or tuple(self.base.tokenizer(request.text)["input_ids"])
        return ids[-self.longest :] if self.longest else ids

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """Pairs that share a pass: of like length, within memory; an adapter that goes alone with its own pairs."""
        alone = self.bank.alone
        batch: list[Pair] = []
        for pair in sorted(
            pairs, key=lambda pair: (pair.name if pair.name in alone else "", len(pair.ids), pair.request)
        ):
            full = (len(batch) + 1) * len(pair.ids) > self.batch_tokens
            apart = batch and batch[-1].name != pair.name and not {batch[-1].name, pair.name}.isdisjoint(alone)
            if batch and (full or apart):
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch

    def _losses(self, pairs: Sequence[Pair]) -> list[float]:
        """Nats per token that is to be guessed, of each pair."""
        examples = [OneText(array("i", pair.ids), array("i", pair.ids), n) for n, pair in enumerate(pairs)]
        longest, pad = max(len(pair.ids) for pair in pairs), self.base.tokenizer.pad_token_id
        pad_id = 0 if pad is None else int(pad)  # any will do, since padding is masked
        made = Batches.in_order(examples, micro_batch_size=len(pairs), max_length=longest, pad_id=pad_id)
        batches = [batch.to(self.base.model.device) for batch in made.step(0, 0)]
        with self.bank.active([{} if pair.name == BASE else {pair.name: 1.0} for pair in pairs]):
            sums: RowSums = row_sums(self.base.model, batches, autocast=precision_of(self.base))
        for pair, loss in zip(pairs, sums.loss_R, strict=True):
            if not np.isfinite(loss):
                raise MeasureError(f"the loss of a prompt under {pair.name} is {loss}", "look at its weights")
        return [float(loss) / int(targets) for loss, targets in zip(sums.loss_R, sums.targets_R, strict=True)]

    def _decide(self, losses: dict[str, float], tokens: int) -> Decision:
        if not losses:
            return Decision((), {}, "base: there is no request to go by")
        order = sorted(losses, key=lambda name: losses[name])  # stable, and the base is the first of equal ones
        best = order[0]
        if BASE in losses and losses[BASE] - losses[best] <= self.options.margin:
            best = BASE
        other = next((name for name in [BASE, *order] if name in losses and name != best), None)
        beside = f", {losses[other]:.3f} under {other}" if other else ""
        said = f"the prompt costs {losses[best]:.3f} nats per token{beside} ({tokens} tokens)"
        confidence = {name: -losses[name] for name in order}
        return Decision(() if best == BASE else (best,), confidence, f"{best}: {said}")


def make(context: Context) -> Likelihood:
    """Of base and adapters in memory.

    Raises:
        UsageError: the base does not read prompts as a language model does.
    """
    assert context.base is not None
    config = context.base.model.config
    if config.is_encoder_decoder or context.base.head is not None:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a classifier"
        raise UsageError(
            f"the router likelihood is of causal language models, and this base is {kind}",
            "choose one that goes by keys, such as embedding",
        )
    return Likelihood(context)
