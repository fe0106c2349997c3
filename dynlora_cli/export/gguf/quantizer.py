"""llama.cpp's own quantizer, where it is on this machine: the program llama-quantize, or the package llama_cpp.

It runs as a process of its own, so that a fault in it ends that process and not ours.

Reference: llama.cpp, tools/quantize/README.md; include/llama.h, llama_model_quantize.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dynlora_cli.errors import DynloraError, MachineError
from dynlora_cli.export.gguf.outtypes import QUANTIZED

PROGRAM = "llama-quantize"
PACKAGE = "llama_cpp"
# What the other process does with the package; nothing is imported from the folder it is started in.
_CALL = """
import sys
sys.path = [folder for folder in sys.path if folder]
import ctypes, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A quantizer that is here.

    Args:
        name: for people, and for export.json.
        program: path of llama-quantize; None: the package is called.
    """

    name: str
    program: str | None

    def run(self, source: Path, target: Path, outtype: str) -> None:
        """Make a smaller GGUF file of one in f16.

        Raises:
            DynloraError: it failed; the message ends with what it said.
        """
        if self.program:
            command = [self.program, str(source), str(target), outtype.upper()]
        else:
            command = [sys.executable, "-c", _CALL, str(source), str(target), str(QUANTIZED[outtype].number)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not target.is_file():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise DynloraError(
                f"{self.name} made no {outtype} of the model (exit code {done.returncode}): {' / '.join(said[-3:])}",
                "write --outtype q8_0, which needs no quantizer, or try another version of llama.cpp",
            )


def find_quantizer(outtype: str) -> Quantizer:
    """The quantizer of this machine; nothing of it is loaded.

    Raises:
        MachineError: there is none.
    """
    if program := shutil.which(PROGRAM):
        return Quantizer(PROGRAM, program)
    if importlib.util.find_spec(PACKAGE) is not None:
        return Quantizer("llama-cpp-python", None)
    raise MachineError(
        f"--outtype {outtype} is made by llama.cpp's own quantizer, and neither {PROGRAM} in PATH nor the Python "
        "package llama-cpp-python is here",
        "install one: `brew install llama.cpp`, a release of https://github.com/ggml-org/llama.cpp with its folder in "
        "PATH, or `pip install llama-cpp-python`; f32, f16 and q8_0 need neither",
    )
