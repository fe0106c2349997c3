"""What the model answers while it trains: a few held-out prompts, now and then (`eval.samples`).

    choose   the prompts, the same ones at each evaluation
    show     the most likely answers to them, as an event

Answers are short and greedy. They draw no random numbers and change nothing, so a run learns the same without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dynlora_cli import plugins
from dynlora_cli.data.encode import decode
from dynlora_cli.data.examples import Example, OneText
from dynlora_cli.evaluation.generation import MARGIN, Prompt, find_prompts, generate
from dynlora_cli.evaluation.requests import RequestTexts
from dynlora_cli.hypernets.conditions import texts_of
from dynlora_cli.hypernets.generated import Generated
from dynlora_cli.runs import events
from dynlora_cli.tasks.loss import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.execution.mode import Modes
    from dynlora_cli.training.run import Run

MOST_TOKENS = 64  # of an answer
OPENING = 32  # tokens of a text without a prompt that are given, for the model to go on with
LOOKS = 8  # while training, where nothing is measured and `eval.steps` does not say
KEPT = 300  # characters of a prompt's end, and of an answer's beginning, that the log keeps


def choose(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    modes: Modes,
    notes: list[str],
    trained: Sequence[Example] = (),
) -> Sequence[Prompt | Example]:
    """The first held-out prompts; of plain texts their openings; of a model that draws, rows with other texts each.

    Args:
        recipe: of the run.
        tokenizer: of its model.
        held_out: its rows to measure on.
        modes: how its steps are run; some leave no model that could answer between them.
        notes: gets why there are none, where somebody asked for them or would expect them.
        trained: rows to train on, which a model that draws is asked by where none are held out.
    """
    count, asked = recipe.eval.samples, "samples" in recipe.eval.model_fields_set
    if not count:
        return []
    if plugins.declared("tasks", recipe.model.task, "DRAWS"):
        rows = {tuple(example.input_ids): example for example in reversed(held_out or trained)}
        return list(reversed(rows.values()))[:count]
    if does := plugins.declared("tasks", recipe.model.task, "SILENT"):
        return _none(f"a model for {recipe.model.task} writes no text: {does}", notes, tell=asked)
    if not held_out:
        return _none("no rows are held out", notes, tell=asked)
    if reasons := modes.no_answers:
        return _none("; ".join(reasons), notes, tell=True)
    apart = texts_of if plugins.declared("variants", recipe.adapter.variant, "hypernet") else None
    prompts = find_prompts(held_out, tokenizer, count, apart) or _openings(held_out, tokenizer, count)
    if not prompts:
        return _none("no held-out row has a prompt, or is long enough to be gone on with", notes, tell=asked)
    return [replace(prompt, longest=min(prompt.longest, MOST_TOKENS - MARGIN)) for prompt in prompts]


def _none(why: str, notes: list[str], *, tell: bool) -> list[Prompt]:
    if tell:
        notes.append(f"no answers are shown while training (eval.samples): {why}")
    return []


def _openings(held_out: Sequence[Example], tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """The first texts cut in two: an opening, and what really comes next."""
    prompts: dict[tuple[int, ...], Prompt] = {}
    for example in held_out:
        if not isinstance(example, OneText) or len(example.input_ids) < OPENING // 2:
            continue
        end = min(OPENING, len(example.input_ids) // 2)
        ids, rest = tuple(example.input_ids[:end]), list(example.input_ids[end : end + MOST_TOKENS])
        opening = Prompt(ids, decode(tokenizer, ids), [_text(tokenizer, rest)], longest=MOST_TOKENS, example=example)
        prompts.setdefault(ids, opening)
        if len(prompts) == count:
            break
    return list(prompts.values())


def shows_alone(run: Run) -> bool:
    """Whether answers are due where nothing is measured: a model that draws can be asked by rows that it trains on."""
    step, total = run.progress.step, run.total_steps
    if run.val_batches is not None or not run.samples:
        return False
    every = run.recipe.eval.steps
    return step in (0, total) or (step % every == 0 if every else step * LOOKS // total > (step - 1) * LOOKS // total)


def show(run: Run) -> None:
    """Answer the run's prompts and tell of it; the first process alone.

    A model that cannot generate does not end the run: that is said, and no answers are shown from then on.
    """
    if not run.samples or not run.accelerator.is_main_process:
        return
    draws = plugins.declared("tasks", run.recipe.model.task, "DRAWS")
    try:
        with evaluating(run.model), run.accelerator.autocast():
            if draws:
                folder, step = Path(run.recipe.output_dir), run.progress.step
                run.emit(events.samples(step, run.task.draw(run.model, run.samples, step, folder, run.recipe.seed)))
                return
            answers = _answers(run)
    except Exception as error:  # whatever the code of a model raises that was never asked to generate
        run.note(f"no answers are shown while training (eval.samples): {type(error).__name__}: {error}")
        run.samples = []
        return
    prompts = cast("Sequence[Prompt]", run.samples)
    pairs, texts = zip(prompts, answers, strict=True), RequestTexts(run.base.tokenizer)
    run.emit(events.samples(run.progress.step, [_sample(prompt, answer, texts) for prompt, answer in pairs]))


def _answers(run: Run) -> list[str]:
    """The answers to the run's prompts, all at once; where each row has an adapter of its own, those that share one."""
    model, tokenizer, context = run.model, run.base.tokenizer, run.base.files.context_length
    prompts = cast("Sequence[Prompt]", run.samples)
    if not isinstance(run.trained, Generated):
        return generate(model, tokenizer, prompts, batch_size=len(prompts), context=context)
    return run.trained.answers(model, tokenizer, prompts, batch_size=len(prompts), context=context)


def _sample(prompt: Prompt, answer: str, texts: RequestTexts) -> dict[str, Any]:
    question = texts.in_prompt(prompt.text)
    return {
        "prompt": question if len(question) <= KEPT else f"…{question[1 - KEPT :]}",
        "expected": _cut(prompt.references[0]),
        "answer": _cut(answer),
        "right": answer in prompt.references,
    }


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def _cut(text: str) -> str:
    return text if len(text) <= KEPT else f"{text[: KEPT - 1]}…"
