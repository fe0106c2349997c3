"""The model card `README.md`: what the adapter is, what it reached, how to load it and how it was made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dynlora_cli import plugins
from dynlora_cli.errors import without_secrets
from dynlora_cli.runs.documents import COLUMNS, documents, made_from
from dynlora_cli.runs.layer_grid import layer_grid
from dynlora_cli.runs.lineage import day, lineage
from dynlora_cli.runs.log import RunRecord
from dynlora_cli.runs.report.samples import prior_text
from dynlora_cli.text import MEASURES, count, counted, duration, number, rate, size

TOKENS_SHOWN = 16
_PLAIN_LORA = " The files are a plain PEFT LoRA whose scale is exactly 1."


def model_card(record: RunRecord) -> str:
    """The card of one run as Markdown; what the record lacks is left out."""
    name = record.info.get("name") or record.folder.resolve().name
    parts = [part(record) for part in PARTS]
    body = "\n\n".join(part for part in (f"# {_plain(name)}", *parts) if part)
    # The card goes where others see it: tokens in addresses do not, and one name is no more than one name.
    return without_secrets(f"{_front_matter(record)}\n{body}\n")


def card_of_export(record: RunRecord, name: str, said: str, use: str, *, plain: bool = True) -> str:
    """The card of files that were made of a run, without metadata.

    Args:
        record: of the run; what it lacks is left out.
        name: of the files, as a heading.
        said: what is to be said of them after what the run was.
        use: the section that says how they are used.
        plain: whether they are an adapter as PEFT reads it.
    """
    what = _what_it_is(record) if record.info else f"A LoRA adapter, exported by dynlora.{_PLAIN_LORA}"
    what = what if plain else what.removesuffix(_PLAIN_LORA)
    numbers = _numbers(record).replace(" `report.html` has the pictures.", "")
    parts = [what, said, numbers, _documents(record), _forgetting(record), _lineage(record), use, _training(record)]
    return without_secrets("\n\n".join(part for part in (f"# {_plain(name)}", *parts) if part) + "\n")


def _base(record: RunRecord) -> str:
    return (record.info.get("base_model") or {}).get("name_or_path") or record.summary.get("model") or "unknown"


def _is_full(record: RunRecord) -> bool:
    """Whether all weights were trained, so that the folder holds a model and no adapter."""
    return (record.info.get("variant") or record.summary.get("variant")) == "full"


def _routes(record: RunRecord) -> list[dict[str, Any]]:
    """The adapters that a router was trained over; none of any other run."""
    found = record.info.get("library")
    return [member for member in found if isinstance(member, dict)] if isinstance(found, list) else []


def _writes_adapters(record: RunRecord) -> str:
    """What adapters are written from, description or document, where the run trained a network for that; else ""."""
    variant = str(record.info.get("variant") or "")
    known = variant in plugins.names("hypernets")
    return str(plugins.declared("hypernets", variant, "READS", "")) if known else ""


def _front_matter(record: RunRecord) -> str:
    """Metadata in the form that model hubs read."""
    recipe = record.info.get("recipe") or {}
    sources = (recipe.get("dataset") or {}).get("train") or []
    paths = dict.fromkeys(str(source["path"]) for source in sources if source.get("path"))
    # Hubs link these names; files of this machine mean nothing there.
    datasets = [path for path in paths if not path.startswith("builtin:") and not Path(path).exists()]
    library, tags = ("transformers", ["dynlora"]) if _is_full(record) else ("peft", ["lora", "dynlora"])
    if theirs := plugins.declared("tasks", record.info.get("task") or "causal-lm", "LOADS_WITH"):
        kind = {"SentenceTransformer": "sentence-similarity", "CrossEncoder": "text-ranking"}[theirs]
        library, tags = "sentence-transformers", ["sentence-transformers", kind, *tags]
    if record.info.get("file"):
        library, tags = "diffusers", ["lora", "text-to-image", "dynlora"]
    if _routes(record):
        library, tags = "peft" if record.info.get("variant") == "x-lora" else "dynlora", ["lora", "router", "dynlora"]
    if _writes_adapters(record):
        library, tags = "dynlora", ["lora", "hypernetwork", "dynlora"]
    meta: dict[str, Any] = {"base_model": _base(record), "library_name": library, "tags": tags}
    if datasets:
        meta["datasets"] = datasets
    return "---\n" + yaml.safe_dump(meta, sort_keys=False, allow_unicode=True) + "---\n"


def _what_it_is(record: RunRecord) -> str:
    summary, task = record.summary, record.info.get("task") or "causal-lm"
    if _is_full(record):
        how = "with all weights fine-tuned by dynlora: the baseline for its adapters."
        return f"{_code(_base(record))} ({_plain(task)}) {how}"
    if members := _routes(record):
        names = ", ".join(_plain(str(member.get("name"))) for member in members)
        return (
            f"A router ({_plain(str(record.info.get('variant')))}) over {counted(len(members), 'adapter')} for "
            f"{_code(_base(record))} ({_plain(task)}), trained with dynlora: at each token, in each layer, it weighs "
            f"{names}. The adapters are in `adapters/`, as plain PEFT files, and stayed as they were."
        )
    if reads := _writes_adapters(record):
        return (
            f"A hypernetwork ({_plain(str(record.info.get('variant')))}), trained with dynlora: it writes LoRA "
            f"adapters for {_code(_base(record))} ({_plain(task)}), each from a {reads}. It belongs to this very base."
        )
    if written := record.info.get("written"):
        what = f"the description {_code(str(written['description']))}" if "description" in written else "a document"
        return (
            f"A LoRA adapter for {_code(_base(record))} ({_plain(task)}), written by a hypernetwork of dynlora "
            f"({_plain(str(written.get('method')))}) from {what}. It was not trained itself.{_PLAIN_LORA}"
        )
    if record.info.get("file"):
        how = (
            "of which pruning left the strongest" if record.info.get("prune") else "put together from several adapters"
        )
        return (
            "A LoRA adapter for a diffusion pipeline, written by dynlora. Its update is a sum of rank-1 components, "
            f"{how}. Every layer has the rank that this left it."
        )
    made = "pruned" if record.info.get("prune") and not record.info.get("recipe") else "fine-tuned"
    text = f"A LoRA adapter for {_code(_base(record))} ({_plain(task)}), {made} with dynlora: "
    text += "the update is a sum of rank-1 components in one pool"
    first, last = summary.get("components_start"), summary.get("components")
    if first is not None and last is not None and last < first:
        when = "after training" if record.info.get("prune") else "while training under one budget"
        text += f", pruned {when}, from {count(first)} to {count(last)} of them"
        text += ". Every layer has the rank that this left it; layers that kept no component are not adapted"
    text += "."
    return text + _PLAIN_LORA


def _numbers(record: RunRecord) -> str:
    """Before and after, as a table."""
    summary = record.summary
    rows = [
        (f"held-out {label}", show(summary.get(f"{key}_before")), show(summary[f"{key}_after"]))
        for key, label, show, _ in MEASURES
        if summary.get(f"{key}_after") is not None
    ]
    rows += [
        (key, count(summary.get(f"{key}_start")), count(summary[key]))
        for key in ("parameters", "components")
        if summary.get(key) is not None
    ]
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in rows)
    return f"## Results\n\n| | before | after |\n|---|---:|---:|\n{table}\n\n{_cost(summary)}".rstrip()


def _forgetting(record: RunRecord) -> str:
    """What became of rows of other kinds, as a table."""
    also = record.summary.get("also") or {}
    rows = "".join(
        f"| {_plain(name)} | {count(one['rows'])} | {number(one['before'])} | {number(one['after'])} "
        f"| {one['forgetting']:+.4f} |\n"
        for name, one in also.items()
    )
    head = "| rows of | rows | loss before | after | forgetting |\n|---|---:|---:|---:|---:|\n"
    lead = f"Losses on rows of other kinds, in {record.loss_in}. Above 0 is worse than before this run."
    return f"## Forgetting\n\n{lead}\n\n{head}{rows}".rstrip() if also else ""


def _documents(record: RunRecord) -> str:
    """What it was made from, as a table."""
    rows = "".join(f"| {' | '.join(map(_plain, row))} |\n" for row in documents(record.info))
    head = f"| {' | '.join(COLUMNS)} |\n|---|---:|---:|---|\n"
    return f"## What it was made from\n\n{head}{rows}\n{_plain(made_from(record.info))}" if rows else ""


def _cost(summary: dict[str, Any]) -> str:
    parts = [counted(summary["steps"], "step")] if summary.get("steps") else []
    if summary.get("seconds") is not None:
        parts.append(
            f"{duration(summary['seconds'])} of {'pruning' if summary.get('command') == 'prune' else 'training'}"
        )
    if summary.get("learning_rate") is not None:
        origin = summary.get("learning_rate_from") or "recipe"
        found = "" if origin == "recipe" else f" ({_plain(origin)})"
        parts.append(f"learning rate {rate(summary['learning_rate'])}{found}")
    if summary.get("budget_bytes"):
        parts.append(f"a budget of {count(summary['budget_bytes'])} bytes")
    elif summary.get("budget_parameters"):
        parts.append(f"a budget of {count(summary['budget_parameters'])} parameters")
    if summary.get("adapter_bytes"):
        kind = f", factors in {_plain(summary['save_dtype'])}" if summary.get("save_dtype") else ""
        parts.append(f"{size(summary['adapter_bytes'])} on disk{kind}")
    return f"{', '.join(parts)}. `report.html` has the pictures." if parts else ""


def _rank_table(record: RunRecord) -> str:
    history = record.rank_history()
    if not history or record.info.get("file"):  # a UNet has more kinds of modules than a page is wide
        return ""
    ranks = history[-1][1]
    blocks, modules, cells = layer_grid(record.layers)
    grid = [["block", *(module.removesuffix("_proj") for module in modules)]]
    for block in blocks:
        names = [cells.get((block, module)) for module in modules]
        grid.append([block, *("" if name is None else str(ranks.get(name) or ".") for name in names)])
    widths = [max(len(row[column]) for row in grid) for column in range(len(modules) + 1)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    return "## Ranks\n\nComponents per layer; a dot is a layer that kept none.\n\n" + _fenced("\n".join(lines), "text")


def _loading(record: RunRecord) -> str:
    info, base = record.info, _base(record)
    if file := info.get("file"):
        return _by_diffusers(str(file))
    own_class = (info.get("base_model") or {}).get("auto_class")
    auto_class = own_class or plugins.declared("tasks", info.get("task") or "causal-lm", "AUTO_MODEL")
    if theirs := plugins.declared("tasks", info.get("task") or "causal-lm", "LOADS_WITH"):
        return _by_sentence_transformers(theirs, full=_is_full(record))
    if _is_full(record):
        code = f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained(".")  # this folder'
        return f"## Load it\n\n{_fenced(code, 'python')}"
    if _routes(record) and info.get("variant") != "x-lora":
        command = "dynlora eval --adapter .       # this folder; generate, chat and serve take it, too"
        return f"## Use it\n\n{_fenced(command, 'bash')}\n\nNo other tool knows this router. Its adapters are PEFT's."
    if reads := _writes_adapters(record):
        source = "--document FILE" if reads == "document" else '--description "what the task is"'
        command = f"dynlora adapt --hypernet . {source} --out FOLDER       # this folder\ndynlora eval --adapter ."
        return f"## Use it\n\n{_fenced(command, 'bash')}\n\nWhat it writes is a plain PEFT LoRA, which any tool loads."
    revision = (info.get("base_model") or {}).get("revision")
    labels = ((info.get("recipe") or {}).get("model") or {}).get("num_labels")
    options = f", revision={revision!r}" if revision else ""
    options += f", num_labels={labels}" if labels else ""
    # the built-in model is a folder of the installed package, so its place is asked for and not written down
    builtin = base.startswith("builtin:")
    place = 'PeftConfig.from_pretrained(".").base_model_name_or_path' if builtin else repr(base)
    code = f"""from peft import {"PeftConfig, " if builtin else ""}PeftModel
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
base = {auto_class}.from_pretrained({place}{options}){_room(info)}
model = PeftModel.from_pretrained(base, ".")"""
    return f"## Load it\n\n{_fenced(code, 'python')}" + _new_tokens(info) + _asking(info) + _elsewhere(record)


def _by_diffusers(file: str) -> str:
    """How the file of an adapter for a pipeline is loaded."""
    code = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PIPELINE")  # the one that the adapter was trained for
pipe.load_lora_weights(".", weight_name={file!r})     # this folder"""
    return f"## Load it\n\n{_fenced(code, 'python')}\n\nWith diffusers 0.35 or newer, and `peft`."


def _by_sentence_transformers(name: str, *, full: bool) -> str:
    """How a folder is loaded by the class of sentence-transformers with this name, which applies the adapter, too."""
    uses = {
        "SentenceTransformer": """questions = model.encode_query(["a question"])
passages = model.encode_document(["a passage", "another one"])
print(model.similarity(questions, passages))""",
        "CrossEncoder": 'print(model.predict([("a question", "a passage"), ("a question", "another one")]))',
    }
    code = f'from sentence_transformers import {name}\n\nmodel = {name}(".")  # this folder\n{uses[name]}'
    needs = "" if full else " It needs `peft`, and the base where this folder's `adapter_config.json` says."
    return f"## Load it\n\n{_fenced(code, 'python')}\n\nWith sentence-transformers 6 or newer.{needs}"


def _room(info: dict[str, Any]) -> str:
    """The line that enlarges the base's tables, where the adapter has rows for more tokens than they have."""
    tokens = info.get("tokens")
    rows, own = (tokens.get("table_rows"), tokens.get("base_rows")) if isinstance(tokens, dict) else (None, None)
    if not isinstance(rows, int) or not isinstance(own, int) or rows <= own:
        return ""
    return (
        f"\nbase.resize_token_embeddings({rows}, mean_resizing=False)  # of {own}: the adapter has rows for the others"
    )


def _new_tokens(info: dict[str, Any]) -> str:
    """What the tokens of the adapter are, and who reads them."""
    tokens = info.get("tokens")
    new = tokens.get("new") if isinstance(tokens, dict) else None
    texts = [str(token["text"]) for token in new or () if isinstance(token, dict) and "text" in token]
    if not texts:
        return ""
    shown = ", ".join(_code(text) for text in texts[:TOKENS_SHOWN])
    more = f" and {len(texts) - TOKENS_SHOWN} more" if len(texts) > TOKENS_SHOWN else ""
    return (
        f"\n\nIt has rows of its own for {counted(len(texts), 'token')}: {shown}{more}. The tokenizer in this folder "
        "knows them. PEFT reads the rows (`trainable_token_indices`). Servers of LoRA adapters and llama.cpp do not: "
        "for them, `dynlora merge` writes a model that has the tokens."
    )


def _elsewhere(record: RunRecord) -> str:
    """What programs that know one rank make of layers with several, and what to do."""
    history = record.rank_history()
    if record.info.get("tokens"):
        return ""  # none of them takes it
    if not history or len({rank for rank in history[-1][1].values() if rank}) < 2:
        return ""
    return (
        "\n\nThe layers' ranks differ. llama.cpp's `convert_lora_to_gguf.py` writes one alpha for all of them, and "
        "llama.cpp then scales each layer wrongly: convert what `dynlora export --to uniform` writes, or use "
        "`--to gguf`. SGLang, TGI and LoRAX stack layers: `--to sglang`, `--to tgi`, `--to lorax`. "
        "vLLM reads this folder as it is."
    )


def _asking(info: dict[str, Any]) -> str:
    """In which form the model learned to be asked, where it knows two."""
    turned = (info.get("data") or {}).get("turned")
    separator = ((info.get("recipe") or {}).get("dataset") or {}).get("separator")
    if separator and not (isinstance(turned, dict) and any(turned.values())):
        return f"\n\nAsk it with bare text, and {_code(json.dumps(separator))} behind each prompt: so it was trained."
    if not isinstance(turned, dict) or not turned:
        return ""
    if any(turned.values()):
        return "\n\nAsk it by turns, through the chat template of this folder's tokenizer: so it was trained."
    return "\n\nAsk it with bare text, without the tokenizer's chat template: so it was trained."


def _lineage(record: RunRecord) -> str:
    """The runs that its components began in, where there are several."""
    runs = lineage(record.info)
    lines = [
        f"| {_plain(run['name'])} | {_plain(day(run['date']))} | {_plain(run['did'])} | {count(run['components'])} |"
        for run in runs
    ]
    head = ["| run | date | what it did | components left |", "| --- | --- | --- | ---: |"]
    return "\n".join(["## Where its components come from", "", *head, *lines]) if runs else ""


def _training(record: RunRecord) -> str:
    recipe = record.info.get("recipe_yaml")
    if not recipe and record.info.get("recipe"):
        recipe = yaml.safe_dump(record.info["recipe"], sort_keys=False, allow_unicode=True)
    versions = record.info.get("versions") or {}
    prior = prior_text(record)
    made_with = ", ".join(_plain(f"{name} {version}") for name, version in versions.items())
    parts = [
        _plain(prior),
        _fenced(recipe.rstrip(), "yaml") if recipe else "",
        f"Made with {made_with}." if made_with else "",
    ]
    return "\n\n".join(["## How it was trained", *filter(None, parts)]) if any(parts) else ""


def _plain(text: object) -> str:
    """A text on one line in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#&~!])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """A text on one line as code, between more backticks than it holds in a row."""
    text = " ".join(text.split())
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


PARTS = (_what_it_is, _numbers, _documents, _forgetting, _lineage, _rank_table, _loading, _training)
