"""`dataset: builtin:library`: the rows that the adapters of `adapter.library` were trained on, read again.

Each adapter's rows stand beside each other, in the order of the adapters, and what its run held out stays held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.data.earlier import earlier_data, run_folder
from dynlora_cli.data.load import Data
from dynlora_cli.data.mix import Span
from dynlora_cli.data.rows.kept import PromptsOf
from dynlora_cli.data.rows.sequences import joined, renumbered
from dynlora_cli.errors import UsageError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.data.rows.fitting import TaskOfRows

NAME_THEM = "name the rows of each adapter instead: one source under dataset.train for each, in their order"


def own_rows(
    members: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskOfRows,
    *,
    table: int | None = None,
    context: int | None = None,
) -> Data:
    """The rows of all adapters.

    Args:
        members: folders of the adapters, by name.
        tokenizer, task, table, context: as of `earlier_data`.

    Raises:
        UsageError: nobody knows the rows of one, or they are not what they were.
    """
    runs = {}
    for name, folder in members.items():
        try:
            runs[name] = earlier_data(run_folder(folder), tokenizer, task, table=table, context=context)
        except UsageError as error:
            raise UsageError(f"dataset: builtin:library: {name}: {error.message}", NAME_THEM) from error
    free, digest = 0, hashlib.sha256()
    first = next(iter(runs.values()))
    data = Data(
        [],
        [],
        None,
        [],
        {},
        "",
        forms=set(),
        writing=first.writing,
        prompts={"train": PromptsOf(), "val": PromptsOf()},
    )
    for name, run in runs.items():
        if run.stream:
            text = f"dataset: builtin:library: {name} read its rows while it trained (dataset.streaming)"
            raise UsageError(text, NAME_THEM)
        if run.labels is not None:
            raise UsageError(f"dataset: builtin:library: {name} was trained on classes, not on texts", NAME_THEM)
        train, free = renumbered(run.train, free), free + len(run.train)
        val, free = renumbered(run.val, free), free + len(run.val)
        data.train, data.val = joined(data.train, train), joined(data.val, val)
        data.forms |= run.forms
        data.spans.append(Span(name, len(run.train), len(run.train)))
        for part, counts in run.counts.items():
            total = data.counts.setdefault(part, dict.fromkeys(counts, 0))
            for key, number in counts.items():
                total[key] += number
        for part, prompts in data.prompts.items():
            data.prompts[part] = prompts + run.prompts.get(part, PromptsOf())
        digest.update(f"{name} {run.sha256}\n".encode())
    data.sha256 = digest.hexdigest()
    shown = ", ".join(f"{counted(span.rows, 'row')} of {span.name}" for span in data.spans)
    data.notes.append(f"the rows that the adapters were trained on: {shown}; {len(data.val)} held out as they did")
    return data
