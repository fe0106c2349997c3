"""The card of an export, as hubs show it: metadata that they read, and the run's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora_cli.runs.log import RunRecord
from dynlora_cli.runs.report.card import card_of_export
from dynlora_cli.text import MEASURES, size

ADAPTERS = ("peft", "uniform", "vllm", "sglang", "tgi", "lorax", "mlx", "gguf")
PEFT = ADAPTERS[:6]  # those that PEFT loads as well
# Hubs' names of what loads a form; PEFT where there is none here.
LIBRARIES = {"mlx": "mlx", "gguf": "gguf", "ollama": "gguf", "merged-gguf": "gguf", "merged": "transformers"}
_FILES = (".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
    "embedding": "sentence-similarity",
    "reranker": "text-ranking",
}


@dataclass(frozen=True)
class Base:
    """The model that an adapter is for, as others know it.

    Args:
        name: its name on the hub, or only the last part of a folder's.
        on_hub: whether it is one on the hub.
        license: as its own card says; None where nobody says.
    """

    name: str
    on_hub: bool
    license: str | None = None


def card(record: RunRecord, base: Base, repo: str, summary: Mapping[str, Any]) -> str:
    """README.md of an export.

    Args:
        record: of the run; without any key for an adapter of another tool.
        base: of the adapter.
        repo: where it goes, ORG/NAME.
        summary: of the export.
    """
    said, use = _what_it_is(base, summary), _use(base, repo, summary)
    text = card_of_export(record, repo.split("/")[1], said, use, plain=summary["to"] in PEFT)
    return f"---\n{_metadata(record, base, repo, summary['to'])}\n---\n\n{text}"


def _metadata(record: RunRecord, base: Base, repo: str, form: str) -> str:
    from huggingface_hub import ModelCardData

    task = record.info.get("task") or "causal-lm"
    relation = "adapter" if form in ADAPTERS else "finetune"
    known: dict[str, Any] = {"base_model": base.name, "base_model_relation": relation}
    data = ModelCardData(
        library_name=LIBRARIES.get(form, "peft"),
        license=base.license,
        pipeline_tag=PIPELINES.get(task),
        tags=[*(["lora"] if form in ADAPTERS else []), "dynlora", *([form] if form != "peft" else [])],
        datasets=_datasets(record) or None,
        model_name=repo.split("/")[1],
        eval_results=_results(record, task) or None,
        **(known if base.on_hub else {}),
    )
    return data.to_yaml().strip()


def _datasets(record: RunRecord) -> list[str]:
    """Data sets of the hub that it was trained on; files of this machine mean nothing there."""
    recipe = record.info.get("recipe") or {}
    sources = (recipe.get("dataset") or {}).get("train") or []
    paths = [str(source["path"]) for source in sources if isinstance(source, dict) and source.get("path")]
    strange = ("builtin:", "/", ".", "~", "http")
    found = [p for p in paths if not p.startswith(strange) and p.count("/") == 1 and Path(p).suffix not in _FILES]
    return [path for path in dict.fromkeys(found) if not Path(path).exists()]


def _results(record: RunRecord, task: str) -> list[Any]:
    """What was measured on the rows held out, in the form of hubs' model-index."""
    from huggingface_hub import EvalResult

    measured = [(key, label, record.summary.get(f"{key}_after")) for key, label, *_ in MEASURES]
    return [
        EvalResult(
            task_type=PIPELINES.get(task, task),
            dataset_type="held-out",
            dataset_name="rows held out of the training data",
            metric_type=key,
            metric_name=f"held-out {label}",
            metric_value=value,
        )
        for key, label, value in measured
        if isinstance(value, (int, float))
    ]


def _what_it_is(base: Base, summary: Mapping[str, Any]) -> str:
    form = summary["to"]
    parts = []
    if form not in ADAPTERS:
        parts.append(f"These files are the whole model: the base, with that adapter folded in (`--to {form}`).")
    elif form not in ("peft", "uniform", "vllm"):
        parts.append(f"The files have the form that `dynlora export --to {form}` writes.")
    if base.name.startswith("builtin:"):
        parts.append("The base is the small model that comes with dynlora, and is not on the hub.")
    elif not base.on_hub:
        parts.append(f"The base, `{base.name}`, was a folder of its author's machine, and not one of the hub.")
    parts.append(
        f"The base's license is `{base.license}`."
        if base.license
        else "The base's license was not known where this was made: ask its authors before you use or share this."
    )
    return " ".join(parts)


def _use(base: Base, repo: str, summary: Mapping[str, Any]) -> str:
    """How the files are used, and what they are."""
    form, name = summary["to"], base.name
    lines = {
        "vllm": f"hf download {repo} --local-dir adapter\nvllm serve {name} --enable-lora --lora-modules name=adapter "
        f"--max-lora-rank {summary.get('max_lora_rank')}",
        "sglang": f"hf download {repo} --local-dir adapter\npython -m sglang.launch_server --model-path {name} "
        f"--enable-lora --lora-paths name=adapter --max-lora-rank {summary.get('rank')}",
        "tgi": f"text-generation-launcher --model-id {name} --lora-adapters {repo}",
        "mlx": f"hf download {repo} --local-dir adapter\nmlx_lm.generate --model {name} --adapter-path adapter",
        "gguf": f"hf download {repo} adapter.gguf --local-dir .\nllama-server -m BASE.gguf --lora adapter.gguf",
        "merged-gguf": f"llama-server -hf {repo}",
        "ollama": f"hf download {repo} --local-dir model\ncd model && ollama create NAME -f Modelfile",
    }
    code = f"```bash\n{lines[form]}\n```" if form in lines else f"```python\n{_python(form, name, repo, summary)}\n```"
    table = "".join(f"| `{file}` | {size(facts['bytes'])} |\n" for file, facts in summary["files"].items())
    return f"## Use it\n\n{code}\n\n| file | size |\n|---|---:|\n{table}".rstrip()


def _python(form: str, base: str, repo: str, summary: Mapping[str, Any]) -> str:
    kind = summary.get("auto_class") or "AutoModelForCausalLM"
    if form == "merged":
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{repo}")'
    return (
        f'from peft import PeftModel\nfrom transformers import {kind}\n\nbase = {kind}.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")'
    )
