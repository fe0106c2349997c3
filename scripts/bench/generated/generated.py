"""Adapters that are made from a document or a description, without rows of a task: what are they worth?

    python scripts/bench/generated/generated.py documents          # context distillation: documents.py
    python scripts/bench/generated/generated.py settings           # of context distillation: documents_settings.py
    python scripts/bench/generated/generated.py text all           # hypernetworks on text tasks: text.py, with its options
    python scripts/bench/generated/generated.py needles            # doc-to-lora on needles: needles.py, likewise
    python scripts/bench/generated/generated.py table              # generated.md and the parts' pages, from their lines

What is there is not run again, so that every part can be stopped and started at will. `documents` needs
SmolLM2-135M-Instruct as a folder in DYNLORA_REAL_MODELS (~/.cache/dynlora-models); data lie in DYNLORA_SHARED (../shared).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
PARTS = ("text", "needles")  # files beside this one that have a `main` of their own


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in PARTS:
        return int(importlib.import_module(arguments[0]).main(arguments[1:]) or 0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["documents", "settings", *PARTS, "table"])
    parser.add_argument("--sets", default="xquad,covidqa,pubmedqa", help="of documents, with commas")
    parser.add_argument("--documents", type=int, default=10, help="of each set")
    parser.add_argument("--parts", default="alone,text,added,joint,chunks", help="of documents.py; empty: base alone")
    parser.add_argument("--seeds", default="0", help="with commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of `dynlora adapt`")
    parser.add_argument("--ways", default="", help="of settings, with ; between them; empty: all")
    parser.add_argument("--passages", default="0,1", help="numbers, of settings")
    parser.add_argument("--work", type=Path, default=Path("out/documents"), help="where adapters lie")
    options = parser.parse_args(arguments)
    if options.what == "documents":
        run_documents(options)
    if options.what == "settings":
        import documents_settings

        ways = options.ways.split(";") if options.ways else list(documents_settings.WAYS)
        documents_settings.run(options.work.resolve(), ways, [int(number) for number in options.passages.split(",")])
    write_page()
    return 0


def run_documents(options: argparse.Namespace) -> None:
    """The parts that are asked for, seed by seed."""
    import documents

    bench, parts = documents.Bench(options.work.resolve(), options.set), options.parts.split(",")
    for seed in map(int, options.seeds.split(",")):
        for set_ in options.sets.split(","):
            documents.without_adapters(bench, set_, options.documents)
            if "alone" in parts:
                documents.one_by_one(bench, set_, options.documents, seed)
            if "text" in parts:
                documents.on_the_text(bench, set_, options.documents, seed)
            if {"added", "joint"} & set(parts):
                documents.together(bench, set_, options.documents, seed, joint="joint" in parts)
            if "chunks" in parts:
                documents.by_chunks(bench, set_, options.documents, seed)


def write_page() -> None:
    import documents_tables

    documents_tables.write(HERE)


if __name__ == "__main__":
    sys.exit(main())
