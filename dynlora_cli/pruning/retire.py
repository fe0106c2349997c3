"""Retiring an update: taking out of an adapter what one run put into it.

Every component knows the run that it began in, its birth. What is left stays number for number as it is. Whether it is
also what there was before that run, is a question of history:

    exact        the update was the last one, and its run held the earlier components as they were: what is left is
                 the earlier adapter, less what the common budget has removed of it meanwhile
    not exact    later updates were trained on top of it, or its own run trained the earlier components further, or
                 all components were pruned or healed afterwards. Then what it did to them stays

    retire       the adapter without an update
    reasons      why it is not what there was before
    compare      the components that are those of the earlier adapter, number for number

Dimensions: C components of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dynlora_cli.adapters.adapter import PLAIN, Adapter, Factors
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import RECORD, read_record
from dynlora_cli.runs.record import Birth, Retired
from dynlora_cli.text import counted

SHORTEST_ID = 4  # characters of a run's id that may stand for it
HELD = ("freeze", None)  # what a run may have done to the components that it began with, so that they stayed
TRAINED = {"tune": "trained the earlier components further", "magnitudes": "trained the earlier components' magnitudes"}
PRUNED, HEALED = "pruned", "healed"
OF_THE_BASE = ("task", "variant", "base_model", "scale", "tokenizer_sha256", "chat_template_sha256")
OF_THE_FORM = ("labels", "turned", "date")
ALTERED = {
    PRUNED: "`dynlora prune --budget` turned the components into another basis since",
    HEALED: "healing trained all components again since",
}


@dataclass(frozen=True)
class Retirement:
    """What goes and what stays.

    Attributes:
        gone: the births whose components go, oldest first.
        births: those that stay.
        left: the adapter that stays. Its record is that of the last run that stays, as far as that is known.
        why: the reasons why it is not what there was before; empty where it is.
    """

    gone: list[Birth]
    births: list[Birth]
    left: Adapter
    why: list[str]

    @property
    def exact(self) -> bool:
        return not self.why


def retire(adapter: Adapter, wanted: Sequence[str]) -> Retirement:
    """Take the components of one update, or of several, out of an adapter.

    Args:
        adapter: with the births of its components.
        wanted: of each update its run's name, the run's id or a beginning of it, or its folder.

    Raises:
        UsageError: there is no such update or more than one, nothing would be left, or nothing can be taken out.
    """
    births, gone = adapter.births, {index for text in wanted for index in find(adapter, text)}
    if adapter.form != PLAIN:
        raise UsageError(
            f"{adapter.folder} is a {adapter.kind}, whose components are not added one by one",
            "nothing can be taken out of it; train without that update",
        )
    layers = {name: _without(factors, adapter.born(name), gone) for name, factors in adapter.layers.items()}
    left = adapter.with_layers(layers)
    names = " and ".join(births[index]["name"] for index in sorted(gone))
    if not left.layers:
        raise UsageError(
            f"nothing would be left of {adapter.folder}: all its components began in {names}",
            "the base model is what is left: use it without an adapter",
        )
    if left.components == adapter.components:
        raise UsageError(f"{adapter.folder} has no component left that began in {names}", "there is nothing to retire")
    left = replace(left, record=_record_of(adapter, gone), note=None)
    record = adapter.record
    altered, earlier = record.get("altered") or (), record.get("altered_births") or 0
    why = reasons(births, gone, record.get("retired") or (), altered, earlier, has_head=bool(adapter.whole))
    went = [births[index] for index in sorted(gone)]
    why += [text for birth in left.record["births"] if (text := _replayed(birth, adapter, went))]
    return Retirement(went, left.record["births"], left, why)


def find(adapter: Adapter, wanted: str) -> list[int]:
    """The births that a text names: by name, by run id or its beginning, by folder. All of them are of one run.

    Raises:
        UsageError: none, or of several runs.
    """
    births, folder = adapter.births, Path(wanted).expanduser()
    there = read_record(folder).get("run_id") if wanted and (folder / RECORD).is_file() else None
    ways = (
        lambda birth: wanted in (birth["name"], birth["run"]),
        lambda birth: birth["run"] == there or folder.resolve() == Path(birth["folder"]).resolve(),
        lambda birth: len(wanted) >= SHORTEST_ID and birth["run"].startswith(wanted),
    )
    found = next((hits for way in ways if (hits := [i for i, birth in enumerate(births) if way(birth)])), [])
    runs = {births[index]["run"] for index in found}
    if len(runs) == 1:
        return found
    problem = "several updates are called so" if runs else "no such update"
    known = "; ".join(dict.fromkeys(_described(birth) for birth in births))
    raise UsageError(f"--born {wanted}: {problem} in {adapter.folder}", f"name one by its run's id: {known}")


def _described(birth: Birth) -> str:
    date = f", {birth['date'][:10]}" if birth["date"] else ""
    return f"{birth['name']} (run {birth['run']}{date})"


def _without(factors: Factors, counts: tuple[int, ...], gone: Collection[int]) -> Factors:
    """The layer, with so many components of each birth, without those of some; the others are the same numbers."""
    stays_C = torch.tensor([i not in gone for i, count in enumerate(counts) for _ in range(count)], dtype=torch.bool)
    born = tuple(count for index, count in enumerate(counts) if index not in gone)
    return replace(replace(factors, born=counts).keep(stays_C), born=born)


def _record_of(adapter: Adapter, gone: Collection[int]) -> dict[str, Any]:
    """The record of what is left: how to read its rows, and by what recipe to heal it.

    That is the adapter's own, as long as its last run stays. Else it is that of the last run that does stay, if its
    folder still holds it; else no more than what is said of the base.
    """
    births, record = adapter.births, adapter.record
    stay = _staying(births, gone)
    before: list[Retired] = record.get("retired") or []
    altered = [*(record.get("altered") or ())]
    first = sum(index not in gone for index in range(record.get("altered_births") or 0))
    if stay[-1]["run"] != births[-1]["run"]:
        record = recorded(stay[-1]) or _without_rows(record)
        before = [*(record.get("retired") or ()), *before]
        altered = [*(record.get("altered") or ()), *altered]
        first = max(first, min(record.get("altered_births") or 0, len(stay)))
    history: dict[str, Any] = {"retired": _history(births, gone, before), "altered": list(dict.fromkeys(altered))}
    if first or "altered_births" in record:
        history["altered_births"] = first
    return {**record, "births": stay, **history}


def altered_births(adapter: Adapter) -> int:
    """How many of its births a run that goes on from an adapter finds altered, see `Record.altered_births`."""
    record = adapter.record
    trained = any(each["old"] not in HELD for each in record.get("retired") or ())
    return len(adapter.births) if trained or record.get("altered") else record.get("altered_births") or 0


def _staying(births: Sequence[Birth], gone: Collection[int]) -> list[Birth]:
    """The births that are left, each with how many of those that it began with are."""
    stay = []
    for index, birth in enumerate(births):
        if index not in gone and "runs_before" in birth:
            birth = {**birth, "runs_before": sum(i not in gone for i in range(_chain_start(births, index), index))}
        if index not in gone:
            stay.append(birth)
    return stay


def recorded(birth: Birth) -> dict[str, Any] | None:
    """The record of the run that a birth names; None where its folder is gone, or holds another run."""
    folder = Path(birth["folder"])
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    return record if record.get("run_id") == birth["run"] else None


def folder_of(birth: Birth, adapter: Adapter) -> Path | None:
    """The folder of the run that a birth names, if it still holds that run.

    The last birth of an adapter is said to lie where the adapter does. Of one that several were merged into, where that
    run really lies is on record.
    """
    on_record = [each for each in adapter.record.get("births") or [] if each["run"] == birth["run"]]
    return next((Path(each["folder"]) for each in [birth, *on_record] if recorded(each) is not None), None)


def _replayed(birth: Birth, adapter: Adapter, gone: Sequence[Birth]) -> str | None:
    """A sentence where a run that stays has trained on rows of those that go; None where it has not, or has gone."""
    folder = folder_of(birth, adapter)
    replay = (read_record(folder).get("data") or {}).get("replay") if folder else None
    runs = replay.get("runs") if isinstance(replay, dict) else None
    seen = [run.get("run") for run in runs or [] if isinstance(run, dict)]
    names = " and ".join(each["name"] for each in gone if each["run"] in seen)
    return f"{birth['name']} replayed rows of {names}" if names else None


def _without_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the base and of how it is asked, and nothing of the rows that were trained on."""
    kept = {key: record[key] for key in OF_THE_BASE if key in record}
    data = {key: value for key, value in (record.get("data") or {}).items() if key in OF_THE_FORM}
    return kept | ({"data": data} if data else {})


def reasons(
    births: Sequence[Birth],
    gone: Collection[int],
    before: Sequence[Retired] = (),
    altered: Sequence[str] = (),
    altered_births: int = 0,
    *,
    has_head: bool = False,
) -> list[str]:
    """Why what is left is not what there was before; empty where it is.

    Args:
        births: of the adapter, oldest first. One whose `old` is None began anew, with none of those before it.
        gone: indices of those that go.
        before: updates that were taken out of it earlier.
        altered: what was done to all components since the last run: keys of ALTERED.
        altered_births: the first so many were altered before the later ones began.
        has_head: tensors of the base's own, such as a classifier's head, were trained along.
    """
    found = []
    for index in sorted(gone):
        found += _of_one(births, index, gone)
    for each in before:
        if each["old"] not in HELD and any(index not in gone for index in range(each["began_with"])):
            found.append(f"{each['name']}, retired before, {TRAINED[str(each['old'])]}")
    found += [text for key, text in ALTERED.items() if key in altered]
    altered_births = min(altered_births, len(births))
    if any(index < altered_births for index in gone) and any(index not in gone for index in range(altered_births)):
        last = births[altered_births - 1]["name"]
        found.append(f"what began up to {last} was pruned, healed, or left by another update before later runs began")
    if has_head:
        found.append("the head beside the components was trained along, and stays")
    return found


def _of_one(births: Sequence[Birth], index: int, gone: Collection[int]) -> list[str]:
    """What an update left behind in those that stay: its run trained earlier ones, or later ones learned beside it."""
    name, old = births[index]["name"], births[index]["old"]
    found = []
    if old not in HELD and any(i not in gone for i in range(_chain_start(births, index), index)):
        found.append(f"{name} {TRAINED[str(old)]}")
    later = [i for i in range(index + 1, len(births)) if i not in gone and _chain_start(births, i) <= index]
    if later:
        names = " and ".join(births[i]["name"] for i in later)
        found.append(f"{names} {'was' if len(later) == 1 else 'were'} trained on top of {name}")
    return found


def _chain_start(births: Sequence[Birth], index: int) -> int:
    """The first birth of the chain of runs, each going on from the one before, that a birth stands in."""
    if "runs_before" in births[index]:
        return max(0, index - births[index]["runs_before"])
    return max((i for i in range(index + 1) if births[i]["old"] is None), default=0)


def _history(births: Sequence[Birth], gone: Collection[int], before: Sequence[Retired]) -> list[Retired]:
    """All that was ever taken out, each with how many of the births that are left its run began with."""

    def left(first: int) -> int:
        return sum(index not in gone for index in range(first))

    earlier: list[Retired] = [{**each, "began_with": left(each["began_with"])} for each in before]
    return [*earlier, *(Retired(**births[index], began_with=left(index)) for index in sorted(gone))]


@dataclass(frozen=True)
class Comparison:
    """What is left beside the adapter that there was before.

    Attributes:
        folder: of the earlier adapter.
        components: of the earlier adapter.
        left: components that are left.
        same: of these, the ones that are in the earlier adapter number for number.
    """

    folder: str
    components: int
    left: int
    same: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(left: Adapter, earlier: Adapter) -> Comparison:
    """Count the components that are number for number those of the earlier adapter, in its order."""
    pairs = [(factors, earlier.layers[name]) for name, factors in left.layers.items() if name in earlier.layers]
    return Comparison(str(earlier.folder), earlier.components, left.components, sum(_shared(*pair) for pair in pairs))


def _shared(left: Factors, earlier: Factors) -> int:
    """Components of a layer that are also in the earlier one, bit for bit; its order is kept."""
    if left.cost != earlier.cost or left.a_CI.shape[1] != earlier.a_CI.shape[1]:
        return 0
    ours, theirs = (torch.cat([factors.a_CI, factors.b_OC.T], 1) for factors in (left, earlier))
    found = at = 0
    for row in ours:
        same = (theirs[at:] == row).all(1).nonzero()
        if len(same):
            found, at = found + 1, at + int(same[0]) + 1
    return found


def in_words(retirement: Retirement, comparison: Comparison | None) -> str:
    """One sentence on whether what is left is what there was before."""
    gone = " and ".join(birth["name"] for birth in retirement.gone)
    if retirement.why:
        return f"not exact: {'; '.join(retirement.why)}. What {gone} did to the others is still in them."
    before = retirement.births[-1]["name"]
    text = f"exact: the components beside {gone} were held as they were, so what is left is {before}"
    if comparison is None:
        return f"{text}, less what the budget has removed of it since (nothing is there to compare it with)."
    less = comparison.components - comparison.left
    since = f", less {counted(less, 'component')} that the budget has removed since" if less else ""
    return f"{text}, number for number as in {comparison.folder}{since}."
