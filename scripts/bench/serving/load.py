"""What do mixed batches give a server? Throughput and latency at 1, 8 and 64 clients, against one request at a time.

    python scripts/bench/serving/load.py                  # 3 rounds, appended to load.jsonl, then load.md
    python scripts/bench/serving/load.py --rounds 1 --clients 8
    python scripts/bench/serving/load.py --table          # only write load.md again

Eight LoRA adapters of different ranks and layers, with random numbers in them, on stories3M: what they say does not
matter here, and what they cost does. Each client asks for one adapter after the other, streamed, TOKENS tokens at a time, as
soon as its last answer is complete. Two servers of the same command run, one with `--max-batch 1`; they take turns in a
round, and ratios are of the same round. Needs DYNLORA_SHARED. Servers and clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_suffix(".jsonl")
SHARED = Path(os.environ.get("DYNLORA_SHARED", Path(__file__).parents[4] / "shared"))
RANKS = (2, 4, 4, 8, 8, 8, 16, 16)
ALL, FEW = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
TOKENS = 64
REQUESTS = {1: 8, 8: 32, 64: 128}  # of all clients together
BATCHES = {"mixed": 16, "one": 1}


@dataclass(frozen=True)
class Timed:
    """One answer: seconds to its first text and to its end."""

    first: float
    whole: float


def make_adapters(base: Path, folder: Path) -> list[Path]:
    """Adapters of different ranks, every second of them on two kinds of layers alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = []
    for number, rank in enumerate(RANKS):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=FEW if number % 2 else ALL, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        made.append(folder / f"adapter{number}")
        model.save_pretrained(made[-1])
    return made


@contextmanager
def server(base: Path, adapters: Sequence[Path], max_batch: int) -> Iterator[int]:
    """The port of a server that runs."""
    command = [sys.executable, "-m", "dynlora_cli", "serve", "--model", str(base), "--port", "0"]
    command += ["--max-batch", str(max_batch), *(word for folder in adapters for word in ("--adapter", str(folder)))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"answers at http://[^:]+:(\d+)/", line):
                yield int(found[1])
                break
        else:
            raise SystemExit(f"the server has not started: {' '.join(command)}")
    finally:
        process.kill()
        process.wait()


async def ask(port: int, number: int) -> Timed:
    """One streamed request, read without a client library: that would take a core of its own."""
    prompt = f"Once upon a time, there was a little {('cat', 'dog', 'bird', 'fish')[number % 4]} number {number}."
    asked = {"model": f"adapter{number % len(RANKS)}", "prompt": prompt, "max_tokens": TOKENS, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    began, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"the server says {status.decode()}")
        async for line in reader:
            if not first and line.startswith(b"data: {"):
                first = time.perf_counter() - began
    finally:
        writer.close()
    return Timed(first, time.perf_counter() - began)


async def load(port: int, clients: int) -> tuple[float, list[Timed]]:
    """Seconds for all requests, and those of each."""
    numbers, answers = iter(range(REQUESTS[clients])), []

    async def client() -> None:
        for number in numbers:
            answers.append(await ask(port, number))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, answers


def measure(rounds: int, clients: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A record of each round, way and number of clients."""
    base = SHARED / "models" / "stories3M"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        adapters = make_adapters(base, Path(folder))
        ports = {way: stack.enter_context(server(base, adapters, size)) for way, size in BATCHES.items()}
        for port in ports.values():
            asyncio.run(load(port, 1))  # the first answers pay for what is made once
        for turn in range(rounds):
            for count in clients:
                for way in sorted(ports, reverse=bool(turn % 2)):
                    seconds, answers = asyncio.run(load(ports[way], count))
                    yield {
                        "round": turn,
                        "clients": count,
                        "way": way,
                        "tokens_per_second": TOKENS * len(answers) / seconds,
                        "first": sorted(answer.first for answer in answers),
                        "whole": sorted(answer.whole for answer in answers),
                    }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def late(values: Sequence[float]) -> float:
    """The 95th percentile of sorted values."""
    return values[min(len(values) - 1, int(0.95 * len(values)))]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The last run's numbers as load.md shows them."""
    last = max(record["run"] for record in records)
    records = [record for record in records if record["run"] == last]
    lines = [
        "# Serving: mixed batches against one request at a time",
        "",
        f"Eight adapters of ranks {', '.join(map(str, RANKS))} on stories3M, {TOKENS} tokens an answer, "
        f"{records[0]['machine']}. Medians of {1 + max(record['round'] for record in records)} rounds; in brackets the "
        "smallest and the largest of them. Made by `scripts/bench/serving/load.py`.",
        "",
        "| clients | way | tokens/s | first text, median | 95 % | whole answer, median | 95 % | tokens/s, ratio |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for clients in sorted({record["clients"] for record in records}):
        for way in ("one", "mixed"):
            mine = [record for record in records if (record["clients"], record["way"]) == (clients, way)]
            cells = [f"{median([record['tokens_per_second'] for record in mine]):.0f}"]
            for key in ("first", "whole"):
                cells += [f"{median([of(record[key]) for record in mine]):.2f} s" for of in (median, late)]
            cells.append(ratio(records, clients) if way == "mixed" else "1")
            name = "one at a time" if way == "one" else f"up to {BATCHES['mixed']} in a batch"
            lines.append(f"| {clients} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ratio(records: Sequence[dict[str, Any]], clients: int) -> str:
    """Throughput of mixed batches over one at a time, within each round."""
    speed = {(r["round"], r["way"]): r["tokens_per_second"] for r in records if r["clients"] == clients}
    ratios = [speed[turn, "mixed"] / speed[turn, "one"] for turn, way in speed if way == "one"]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        run, machine = time.strftime("%Y-%m-%d %H:%M"), f"{os.cpu_count()} cores, {platform.machine()}"
        with RESULTS.open("a", encoding="utf-8") as file:
            for record in measure(given.rounds, [int(count) for count in given.clients.split(",")]):
                file.write(json.dumps({"run": run, "machine": machine, **record}) + "\n")
                file.flush()
                print({key: record[key] for key in ("round", "clients", "way", "tokens_per_second")}, flush=True)
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    RESULTS.with_suffix(".md").write_text(table([json.loads(line) for line in lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
