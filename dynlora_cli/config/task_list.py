"""The shorthand `tasks`: what each task is, in words, beside its rows.

    tasks:
      - description: Answer arithmetic problems.
        dataset: arithmetic.jsonl
      - descriptions: [Say it as Shakespeare would., Write old English.]
        dataset: {path: plays.jsonl, format: text}

It is written out as sources of `dataset.train` that have `descriptions`, in the order of the tasks, before anything is
checked. So a task's `dataset` may be whatever such a source may: a path, a section, or a list of these.
"""

from __future__ import annotations

from typing import Any

from dynlora_cli.config.strict_yaml import Node, Problem
from dynlora_cli.text import did_you_mean, show

TASKS = "tasks"
ONE, SEVERAL, ROWS = "description", "descriptions", "dataset"


def schema(source: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of the key.

    Args:
        source: that of a source of rows.
    """
    text = {"type": "string", "minLength": 1}
    rows = {"anyOf": [source, text, {"type": "array", "minItems": 1, "items": {"anyOf": [source, text]}}]}
    several = {"anyOf": [{"type": "array", "minItems": 1, "items": text}, text]}
    keys = {
        ONE: {**text, "default": None, "description": "What the task is, in words."},
        SEVERAL: {**several, "default": None, "description": "The same in several wordings, or a file of them."},
        ROWS: {**rows, "default": None, "description": "Its rows: a path, or an item of dataset.train, or several."},
    }
    task = {"type": "object", "additionalProperties": False, "properties": keys, "required": [ROWS]}
    said = (
        "Tasks in place of `dataset.train`: what each is, in words, beside its rows; for variants that write adapters."
    )
    return {"type": "array", "minItems": 1, "items": task, "default": None, "description": said}


def write_out(root: Node) -> list[Problem]:
    """Put the sources of `tasks` into `dataset.train`, in place, and take `tasks` out; what is wrong with it."""
    assert isinstance(root.value, dict)
    given = root.value.pop(TASKS, None)
    if given is None:
        return []
    if not isinstance(given.value, list) or not given.value:
        must = "must be a list, each with a `description` (or `descriptions`) and a `dataset`"
        dataset = root.value.setdefault(ROWS, Node({}, given.place))
        if isinstance(dataset.value, dict):
            dataset.value.setdefault("train", Node([_stand_in(given)], given.place))
        return [Problem(given.place, f"{TASKS}: got {show(given.plain())}, {must}")]
    sources, problems = list[Node](), list[Problem]()
    for at, task in enumerate(given.value):
        faults = _faults(task, f"{TASKS}.{at}")
        problems += faults
        sources += [_stand_in(task)] if faults else _sources(task)
    dataset = root.value.setdefault(ROWS, Node({}, given.place))
    if dataset.value is None:
        dataset.value = {}
    if not isinstance(dataset.value, dict) or "train" in dataset.value:
        text = f"{TASKS}: they bring the rows to train on, and so does `{ROWS}`; write its other sources as tasks"
        return [*problems, Problem(given.place, text)]
    dataset.value["train"] = Node(list(sources), given.place)
    return problems


def _faults(task: Node, name: str) -> list[Problem]:
    """What is wrong with the form of one task."""
    if not isinstance(task.value, dict):
        text = f"{name}: got {show(task.plain())}, must be a section with `{ONE}` and `{ROWS}`"
        return [Problem(task.place, text)]
    known, found = (ONE, SEVERAL, ROWS), list[Problem]()
    for key, node in task.value.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"; what else a source may say stands in its `{ROWS}`"
            found.append(Problem(node.place, f"{name}.{key}: unknown key{hint}"))
    if not found and (ROWS not in task.value or task.value[ROWS].value == []):
        found.append(Problem(task.place, f"{name}.{ROWS}: missing; the rows of the task"))
    if (ONE in task.value) == (SEVERAL in task.value):
        both = "both are given; leave one out" if ONE in task.value else "missing; what the task is, in words"
        found.append(Problem(task.place, f"{name}.{ONE}: {both}"))
    one = task.value.get(ONE)
    if one is not None and (not isinstance(one.value, str) or not one.value.strip()):
        found.append(Problem(one.place, f"{name}.{ONE}: got {show(one.plain())}, must be a text"))
    return found


def _stand_in(task: Node) -> Node:
    """A source for a task whose form is wrong, so that the rest of the recipe can be checked."""
    parts = {"path": Node("?", task.place), SEVERAL: Node([Node("?", task.place)], task.place)}
    return Node(parts, task.place)


def _sources(task: Node) -> list[Node]:
    """The sources of a task, each with its descriptions."""
    assert isinstance(task.value, dict)
    rows, one = task.value[ROWS], task.value.get(ONE)
    texts = task.value[SEVERAL] if one is None else Node([Node(one.value, one.place)], one.place)
    found = []
    for source in rows.value if isinstance(rows.value, list) else [rows]:
        own = source.value if isinstance(source.value, dict) else {"path": Node(source.value, source.place)}
        # A source that says itself what it is about keeps that.
        found.append(Node({SEVERAL: Node(texts.value, texts.place), **own}, source.place))
    return found
