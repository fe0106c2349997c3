"""`dynlora doctor`: what is installed and what the machine has, against what dynlora needs.

Versions are compared by their records before anything is imported, so a package that breaks another one's import is
named here, with the command that mends it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from dynlora_cli import __version__
from dynlora_cli.execution.cores import usable_cores
from dynlora_cli.extras import EXTRAS, first_line, install, repair, try_imports

if TYPE_CHECKING:
    import torch

LEAST_DISK = 2 << 30  # bytes, enough for a small model, its cache and a few checkpoints
# What decides how the libraries below us behave, and is easily forgotten in a shell's profile.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: packages | optional | machine | settings.
        name, found: what was looked at, and what is there.
        fault: why a run would fail; None: nothing is wrong.
        hint: the command that mends it, or that adds something optional.
    """

    part: str
    name: str
    found: str
    fault: str | None = None
    hint: str | None = None


def run() -> dict[str, Any]:
    """Look at everything; the findings, and whether none of them is a fault."""
    found = [*_packages()]
    broken = {finding.name for finding in found if finding.fault}
    found += _optional()
    if "torch" not in broken:
        found += _devices(with_bitsandbytes="bitsandbytes" not in broken)
    found += [*_disks(), *_settings()]
    return {"ok": not any(finding.fault for finding in found), "findings": [asdict(finding) for finding in found]}


# -- packages --------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    yield Finding("packages", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("packages", "dynlora", f"{__version__}, in {Path(__file__).parents[1]}")
    for requirement in _requirements():
        if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            yield _compared(requirement)


def _requirements(extra: str | None = None) -> list[Requirement]:
    """What dynlora's own record asks for; of an extra, only what that adds."""
    try:
        texts = metadata.requires("dynlora") or []
    except metadata.PackageNotFoundError:
        return []  # run from its source: there is no record to compare with
    requirements = [Requirement(text) for text in texts]
    if extra is None:
        return [requirement for requirement in requirements if "extra" not in str(requirement.marker)]
    return [r for r in requirements if "extra" in str(r.marker) and r.marker and r.marker.evaluate({"extra": extra})]


def _compared(requirement: Requirement) -> Finding:
    """A package against the versions that it may have."""
    version = _version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return Finding("packages", requirement.name, "missing", f"{wanted} is needed", f'pip install "{wanted}"')
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", requirement.name, version, f"{wanted} is needed", f'pip install "{wanted}"')
    return Finding("packages", requirement.name, version)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _optional() -> Iterator[Finding]:
    """The extras: what is installed of each, and whether that can be imported."""
    missing = {extra: _missing(extra) for extra in EXTRAS}
    there = dict.fromkeys(
        module for extra, (_, modules) in EXTRAS.items() for module in modules if module not in missing[extra]
    )
    faults = dict(try_imports(list(there)))
    for extra, (purpose, modules) in EXTRAS.items():
        absent = [module for module in modules if module in missing[extra]]
        broken = next((module for module in modules if module in faults and module not in absent), None)
        old = next(
            (found for r in _requirements(extra) if (found := _compared(r)).fault and found.found != "missing"), None
        )
        if broken:
            fault = f"{broken} cannot be imported: {first_line(faults[broken])}"
            yield Finding("optional", extra, f"broken; for {purpose}", fault, repair(broken))
        elif old:
            fault = f"{old.name} {old.found} is installed, and {old.fault}"
            yield Finding("optional", extra, f"of another version; for {purpose}", fault, install(extra))
        elif absent:
            some = f", {' and '.join(absent)}" if len(absent) < len(modules) else ""
            yield Finding("optional", extra, f"not installed{some}; for {purpose}", hint=install(extra))
        else:
            yield Finding("optional", extra, f"installed; for {purpose}")


def _missing(extra: str) -> set[str]:
    """Modules of an extra that are nowhere to be found."""
    return {module for module in EXTRAS[extra][1] if importlib.util.find_spec(module) is None}


# -- the machine -----------------------------------------------------------------------------------------------------


def _devices(*, with_bitsandbytes: bool) -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        yield Finding(
            "machine", "torch", "cannot be imported", _first_line(error), "pip install --force-reinstall torch"
        )
        return
    yield _cpu()
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        yield _gpu(index)
    if len(devices) == 1 and _driver_sees_gpu():
        yield Finding(
            "machine",
            "gpu",
            f"torch {torch.__version__} does not see it",
            "there is a GPU, and this build of torch cannot use it, or CUDA_VISIBLE_DEVICES hides it",
            "install the build of torch for your CUDA version, as its site's front page says",
        )
    elif len(devices) == 1:
        yield Finding("machine", "gpu", "none; runs go to the CPU")
    if with_bitsandbytes:
        yield from (_four_bits(device) for device in devices)


def _cpu() -> Finding:
    from dynlora_cli.text import size

    there, usable = os.cpu_count(), usable_cores()
    cores = f"{there} cores" if usable == there else f"{usable} usable of {there} cores"
    try:
        import psutil
    except (ImportError, OSError) as error:
        hint = "pip install --force-reinstall psutil"
        return Finding("machine", "cpu", f"{cores}, memory unknown", f"no psutil: {_first_line(error)}", hint)
    memory = psutil.virtual_memory()
    return Finding("machine", "cpu", f"{cores}, {size(memory.available)} of {size(memory.total)} free")


def _gpu(index: int) -> Finding:
    """A GPU, after a product of two matrices on it."""
    import torch

    from dynlora_cli.text import size

    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(64, 64, device=f"cuda:{index}").mm(torch.ones(64, 64, device=f"cuda:{index}")).sum().item()
        with torch.cuda.device(index):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # as model.dtype auto asks
    except RuntimeError as error:
        hint = "the driver may be too old for this build of torch, or the GPU in a bad state: nvidia-smi tells"
        return Finding("machine", f"cuda:{index}", "does not compute", _first_line(error), hint)
    bf16 = "bf16" if has_bf16 else "no bf16: model.dtype auto is fp32 here"
    found = f"{properties.name}, {size(free)} of {size(total)} free, {bf16}"
    return Finding("machine", f"cuda:{index}", found)


def _driver_sees_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def _four_bits(device: torch.device) -> Finding:
    """Whether a base in 4 bits works: a matrix there and back."""
    import torch

    name, hint = f"4 bits on {device}", "pip install --force-reinstall bitsandbytes"
    theirs = logging.getLogger("bitsandbytes")  # asks for a package that is not needed
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        matrix = torch.ones(64, 64, device=device)
        exact = torch.equal(dequantize_4bit(*quantize_4bit(matrix, quant_type="nf4")), matrix)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # as its native library is missing or wrong
        return Finding("machine", name, "fails", _first_line(error), hint)
    finally:
        theirs.setLevel(level)
    if not exact:
        return Finding("machine", name, "wrong numbers", "a matrix of ones did not come back", hint)
    return Finding("machine", name, "works")


def _disks() -> Iterator[Finding]:
    yield _disk("current folder", Path.cwd())
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except (ImportError, OSError) as error:
        hint = "pip install --force-reinstall huggingface_hub"
        yield Finding("machine", "models' cache", "huggingface_hub cannot be imported", _first_line(error), hint)
    else:
        yield _disk("models' cache", Path(HF_HUB_CACHE))


def _disk(name: str, path: Path) -> Finding:
    """A folder, or where it will be, and the space that it has."""
    from dynlora_cli.text import size

    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    fault = f"less than {size(LEAST_DISK)} free" if free < LEAST_DISK else None
    if not os.access(there, os.W_OK):
        fault = "cannot be written to"
    hint = "free some space, or use another folder" if fault else None
    return Finding("machine", name, f"{path}, {size(free)} free", fault, hint)


def _settings() -> Iterator[Finding]:
    for name in VARIABLES:
        if name in os.environ:
            yield Finding("settings", name, os.environ[name])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
