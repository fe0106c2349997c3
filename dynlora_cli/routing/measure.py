"""What a router is worth on rows: decisions by their requests alone, and the loss of each row with what was decided.

Each row is measured in batches that are the same for the base, every adapter and what was chosen. So a row that the
base answers has the base's loss to the bit, and one that an adapter answers has that adapter's.

Dimensions: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.config.mix import BASE
from dynlora_cli.data.examples import Example
from dynlora_cli.evaluation.rows import MICRO_BATCH
from dynlora_cli.library.activation import Decision
from dynlora_cli.library.library import Library
from dynlora_cli.library.losses import Floats, RowLosses
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way
from dynlora_cli.models.load import Base
from dynlora_cli.retrieval.encoders import Encoder
from dynlora_cli.routing.router import FACTORS, Asked, Context, RequestRouter, TokenRouter, needs_of, open_router
from dynlora_cli.routing.shares import Shares
from dynlora_cli.text import counted


@dataclass(frozen=True)
class AskedRows:
    """Rows that are measured together.

    Attributes:
        source: in words.
        origin: the adapter that they belong to, `unrelated`, or None where nobody says.
        examples: the rows.
        texts: of their requests.
        micro_batch_size: rows of a forward pass.
    """

    source: str
    origin: str | None
    examples: Sequence[Example]
    texts: list[str]
    micro_batch_size: int = MICRO_BATCH

    @property
    def asked(self) -> list[Asked]:
        """The requests: an empty one where all of a text is to be written."""
        prompts = [
            tuple(example.last_answer()[0]) if text else ()
            for example, text in zip(self.examples, self.texts, strict=True)
        ]
        return [Asked(text, ids) for text, ids in zip(self.texts, prompts, strict=True)]


@dataclass
class Outcome:
    """Rows, what was decided on them, and the loss of each row with everything that was measured.

    Attributes:
        rows: these.
        targets_R: of each row.
        decisions: one for each row.
        losses: [R] by `base` and by adapter.
        routed_R: the loss with what was decided.
        shares: of rows that were decided by token.
    """

    rows: AskedRows
    targets_R: np.ndarray
    decisions: list[Decision]
    losses: dict[str, Floats] = field(default_factory=dict)
    routed_R: Floats = field(default_factory=lambda: np.zeros(0))
    shares: Shares | None = None

    def active(self, row: int) -> dict[str, float]:
        """What spoke on a row: 1 for what was chosen, or the average weights of tokens."""
        decision = self.decisions[row]
        if decision.by_token:
            assert self.shares is not None
            return self.shares.of(row)
        return dict.fromkeys(decision.chosen, 1.0) or {BASE: 1.0}


@dataclass(frozen=True)
class Setting:
    """A router, and what it chooses among.

    Attributes:
        router: its name.
        base: in memory, without an adapter.
        names: of all adapters that are measured.
        read: gives an adapter by its name.
        library, encoder: where there is a library.
        options: of the router; None: its defaults.
    """

    router: str
    base: Base
    names: Sequence[str]
    read: Callable[[str], Adapter]
    library: Library | None = None
    encoder: Encoder | None = None
    options: Any = None

    @contextmanager
    def opened(self) -> Iterator[tuple[RequestRouter | TokenRouter, Bank | None]]:
        """The router, and the bank where it needs one; the base is as it was afterwards."""
        context = Context(
            self.library, base=self.base, encoder=self.encoder, options=self.options, names=tuple(self.names)
        )
        if FACTORS not in needs_of(self.router, self.library):
            yield open_router(self.router, context), None
            return
        adapters = {name: self.read(name) for name in self.names}
        with Bank(self.base.model, adapters) as bank:
            yield open_router(self.router, replace(context, adapters=adapters, bank=bank)), bank

    @contextmanager
    def speaking(self, decision: Decision) -> Iterator[None]:
        """The base computes as a decision says inside the block."""
        if decision.by_token:
            with self.opened() as (router, bank):
                assert bank is not None
                assert isinstance(router, TokenRouter)
                with bank.routed(router):
                    yield
        elif decision.chosen:
            with attached(self.base.model, self.blend(decision.mix)):
                yield
        else:
            yield

    def blend(self, mix: Mapping[str, float]) -> Adapter:
        """A mix as one adapter, exactly: its components side by side."""
        if list(mix.values()) == [1.0]:
            return self.read(next(iter(mix)))
        way = Way(method="exact", weights=list(mix.values()))
        return combine([self.read(name) for name in mix], way).adapter


def measure(
    setting: Setting, sets: Sequence[AskedRows], tell: Callable[[str], None]
) -> tuple[list[Outcome], list[str]]:
    """Decide on rows, and measure base, every adapter and what was decided.

    Args:
        setting: the router with base and adapters.
        sets: the rows.
        tell: takes a line for each set that begins.

    Returns:
        What came of each set, and what the router has to say.

    Raises:
        UsageError: the router cannot be opened, or what it decides on cannot be computed.
        MeasureError: a loss is not finite.
    """
    measures = [RowLosses(setting.base, rows.examples, rows.micro_batch_size) for rows in sets]
    with setting.opened() as (router, bank):
        outcomes = [_decided(router, bank, rows, each) for rows, each in zip(sets, measures, strict=True)]
    for outcome, each in zip(outcomes, measures, strict=True):
        tell(f"{counted(len(outcome.rows.examples), 'row')}: {outcome.rows.source}")
        outcome.losses[BASE] = each.of(None, BASE)
        for name in setting.names:
            outcome.losses[name] = each.of(setting.read(name), name)
        outcome.routed_R = _chosen(setting, each, outcome)
    return outcomes, list(router.notes)


def _decided(router: RequestRouter | TokenRouter, bank: Bank | None, rows: AskedRows, each: RowLosses) -> Outcome:
    """Decisions on rows; where they are by token, the losses of these rows too, since the bank is on the base now."""
    outcome = Outcome(rows, each.targets_R, router.decide(rows.asked))
    by_token_R = np.array([decision.by_token for decision in outcome.decisions])
    if by_token_R.any():
        assert bank is not None
        assert isinstance(router, TokenRouter)
        outcome.shares = Shares(router, bank.names, len(rows.examples))
        routed = bank.routed(outcome.shares)
        outcome.routed_R = each.under(routed, "what was routed", by_token_R, outcome.shares.watch)
    return outcome


def _chosen(setting: Setting, each: RowLosses, outcome: Outcome) -> Floats:
    """The loss of each row with what was chosen for it."""
    loss_R = outcome.losses[BASE].copy()
    kinds = [None if decision.by_token else tuple(sorted(decision.mix.items())) for decision in outcome.decisions]
    for mix in dict.fromkeys(kinds):
        mine_R = np.array([kind == mix for kind in kinds])
        if mix is None:
            loss_R[mine_R] = outcome.routed_R[mine_R]
        elif len(mix) == 1 and mix[0][1] == 1:
            loss_R[mine_R] = outcome.losses[mix[0][0]][mine_R]
        elif mix:
            name = " + ".join(name for name, _ in mix)
            loss_R[mine_R] = each.of(setting.blend(dict(mix)), name, mine_R)[mine_R]
    return loss_R
