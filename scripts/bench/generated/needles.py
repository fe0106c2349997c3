"""Does doc-to-lora learn to carry a fact? Needles of stories' vocabulary in filler of real stories.

    python scripts/bench/generated/needles.py run --set one --seed 0    some 10 to 20 minutes on a core
    python scripts/bench/generated/needles.py table                     needles.md, from needles.jsonl

A document has 0 to 4 sentences of tinystories and one fact, or two: "The name of the dog is Tom." It is asked for one of
them: "The name of the dog is". The network trains on answers alone (`train.answer_share: 1`), since stories3M does not
answer with the document in its prompt either. Rows come in the order of their length (`dataset.shuffle: false`), so that
the network first learns what a name does, and then where it stands.

Exact match is of the whole answer by greedy decoding, over documents that were kept back, of sentences kept back:

    base           the question alone                      seen     names that answered other documents in training
    in context     the document before the question        new      names that never did
    doc-to-lora    the question, with what was written from the document
    wrong          the same, written from another document
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.hypernets.documents import CHUNK, Documents, reader_of, tokens_of
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.hypernets.layer import place_layers

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("DYNLORA_SHARED", HERE.parents[3] / "shared"))
MODEL, STORIES = SHARED / "models" / "stories3M", SHARED / "data" / "tinystories_sample" / "tinystories.txt"
RESULTS = HERE / "needles.jsonl"
SETS = {"one": 1, "two": 2}  # facts of a document
ANIMALS = re.findall(
    r"\w+",
    """
    dog cat bird rabbit bear fish horse frog mouse duck
    """,
)
NAMES = re.findall(  # each is one token of stories3M
    r"\w+",
    """
    Tom Lily Ben Max Sam Mia Anna Tim Sue Jack Lucy Bob Sara Emma Leo Jane Amy Joe Billy Molly Daisy Spot
    Bella Buddy Rex Kitty Mary John Peter Jill Ella Jim Fred Polly Mark Rose Fluffy Mimi Benny Jen Andy Bobby
    Jimmy Sally Timmy Tommy Johnny Teddy Pete Jenny Lisa Remy Ellie Freddy
    """,
)
KEPT_BACK = 12  # names
MOST_FILLER, STEPS, ROWS, HELD_OUT = 4, 1200, 16, 120
SENTENCE = re.compile(r"^[A-Z][a-z ,']{14,60}\.$")
WORDS = {"One", "The", "She", "He", "They", "It", "But", "Then", "Her", "His", "There"}
Row = dict[str, str]


def sentences() -> list[str]:
    """Short sentences of the stories without a name in them, in an order of their own."""
    text = STORIES.read_text(encoding="utf-8").replace("\n", " ")
    found = {part for part in re.split(r"(?<=\.) ", text) if SENTENCE.match(part) and part.split()[0] in WORDS}
    return random.Random("sentences").sample(sorted(found), len(found))


def document(chance: random.Random, facts: int, filler: int, names: Sequence[str], lines: Sequence[str]) -> list[Row]:
    """A document as rows, one for each of its facts."""
    parts = chance.sample(lines, filler)
    pairs = list(zip(chance.sample(ANIMALS, facts), chance.sample(names, facts), strict=True))
    for animal, name in pairs:
        parts.insert(chance.randrange(len(parts) + 1), f"The name of the {animal} is {name}.")
    asked = [(f"The name of the {animal} is", f" {name}.") for animal, name in pairs]
    return [{"context": " ".join(parts), "prompt": prompt, "completion": answer} for prompt, answer in asked]


def make_sets(facts: int, seed: int) -> dict[str, list[Row]]:
    """Rows to train on, shortest filler first, and two sets of documents that are kept back."""
    lines, names = sentences(), random.Random("names").sample(NAMES, len(NAMES))
    new, seen, cut = names[:KEPT_BACK], names[KEPT_BACK:], len(lines) // 5
    chance, rows = random.Random(f"{facts} {seed}"), list[Row]()
    for number in range(STEPS * ROWS):
        grown = max(0.0, number / (STEPS * ROWS) - 0.25) / 0.45  # from a quarter of the rows on; all after 70 %
        filler = chance.randint(0, int(min(1.0, grown) * MOST_FILLER))
        rows.append(chance.choice(document(chance, facts, filler, seen, lines[cut:])))
    sets = {"train": rows}
    for name, of in (("seen", seen), ("new", new)):
        chance = random.Random(f"{name} {facts}")
        documents = [document(chance, facts, chance.randint(0, MOST_FILLER), of, lines[:cut]) for _ in range(HELD_OUT)]
        sets[name] = [chance.choice(rows) for rows in documents]
    return sets


def copy_model(folder: Path) -> None:
    """stories3M with `<s>` as its end, which separates stories in its training; its own `</s>` it has never seen."""
    shutil.copytree(MODEL, folder)
    for name, end in (("tokenizer_config.json", "<s>"), ("config.json", 1), ("generation_config.json", 1)):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        key = "eos_token" if isinstance(end, str) else "eos_token_id"
        (folder / name).write_text(json.dumps({**settings, key: end}), encoding="utf-8")


def train(folder: Path, rows: Sequence[Row], seed: int) -> float:
    """`dynlora train` on these rows; seconds that it took."""
    copy_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": "model",
        "dataset": {"train": ["rows.jsonl"], "shuffle": False, "val_size": 0},
        "adapter": {"variant": "doc-to-lora", "target_modules": ["down_proj"], "latent_size": 64},
        "rank": {"init": 8, "budget": 8},
        "train": {
            "objective": "context-distillation",
            "answer_share": 1,
            "learning_rate": 3e-4,
            "max_steps": STEPS,
            "micro_batch_size": ROWS,
        },
        "seed": seed,
        "output_dir": "out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dynlora_cli", "train", "recipe.yaml"], cwd=folder, check=True)
    return time.perf_counter() - started


@torch.no_grad()
def measure(folder: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Exact match of each way to answer, and the seconds that writing one adapter takes."""
    torch.set_num_threads(1)
    network = read_hypernet(folder / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    layers = place_layers(model, [place.name for place in network.net.places])
    places, chunk = network.net.places, network.form.options[CHUNK]
    reader = reader_of(model, tokenizer, places, chunk, model.config.max_position_embeddings)
    documents = Documents(reader, tokenizer)
    right, asked = dict.fromkeys(("base", "in context", "doc-to-lora", "wrong"), 0), 0
    others = [*rows[1:], rows[0]]
    seconds = 0.0
    for row, other in zip(rows, others, strict=True):
        if row["completion"] == other["completion"]:
            continue
        asked += 1
        right["base"] += answers(model, tokenizer, row["prompt"], row["completion"])
        right["in context"] += answers(model, tokenizer, f"{row['context']} {row['prompt']}", row["completion"])
        for what, source in (("doc-to-lora", row), ("wrong", other)):
            started = time.perf_counter()
            written = network.net(documents.of([documents.of_text(source["context"])]))
            seconds += time.perf_counter() - started
            for name, layer in layers.items():
                layer.hold(written[name])
            right[what] += answers(model, tokenizer, row["prompt"], row["completion"])
        for layer in layers.values():
            layer.hold(None)
    return {
        **{what: count / asked for what, count in right.items()},
        "documents": asked,
        "seconds": seconds / asked / 2,
    }


def answers(model: Any, tokenizer: Any, prompt: str, answer: str) -> bool:
    """Whether greedy decoding gives the answer: each of its tokens is the likeliest after those before it."""
    start, ids = (
        len(tokens_of(tokenizer, prompt)) + 1,
        [tokenizer.bos_token_id, *tokens_of(tokenizer, prompt + answer)],
    )
    likeliest = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    return likeliest[start - 1 : -1] == ids[start:]


def run(set_: str, seed: int) -> Iterator[dict[str, Any]]:
    sets = make_sets(SETS[set_], seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = train(folder, sets["train"], seed)
        network = read_hypernet(folder / "out")
        common = {"set": set_, "seed": seed, "steps": STEPS, "train_seconds": round(seconds)}
        common |= {"parameters": network.form.parameters}
        for part in ("seen", "new"):
            yield {**common, "names": part, **measure(folder, sets[part])}


def lines() -> list[dict[str, Any]]:
    """What was measured."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.is_file() else []


def write_page() -> None:
    """needles.md"""
    intro = __doc__.split("\n\n", 2)[2]
    RESULTS.with_suffix(".md").write_text(f"# Needles for doc-to-lora\n\n{intro}\n{table(lines())}\n", encoding="utf-8")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown: means over seeds."""
    ways = ("base", "in context", "doc-to-lora", "wrong")
    out = [
        "| Facts | Names | Seeds | Base | In context | doc-to-lora | Another document's |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for set_ in SETS:
        for names in ("seen", "new"):
            found = [line for line in lines if (line["set"], line["names"]) == (set_, names)]
            if found:
                cells = [f"{100 * sum(line[way] for line in found) / len(found):.0f} %" for way in ways]
                out.append(f"| {SETS[set_]} | {names} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Needles for doc-to-lora.")
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--set", choices=list(SETS), default="one")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.what == "run" and not any((line["set"], line["seed"]) == (given.set, given.seed) for line in lines()):
        for line in run(given.set, given.seed):
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    write_page()


if __name__ == "__main__":
    main()
