"""Runs recipes/walkthrough.ipynb from top to bottom in an empty folder, and keeps what its cells show.

    python scripts/make_walkthrough.py     after a change of its cells, or of what results look like

Needs the extra `notebook`: ipykernel and nbclient.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "recipes" / "walkthrough.ipynb"
SECONDS = 600


class ThisPython(AsyncKernelManager):
    """Starts this interpreter as the kernel, whatever is installed under which name."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How it is started."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def executed(folder: Path, notebook: Any = None) -> Any:
    """The notebook with the outputs of all of its cells.

    Args:
        folder: an empty one, where the cells write.
        notebook: another one than the walkthrough.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4) if notebook is None else notebook
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisPython,
        timeout=SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return notebook


def without_chance(notebook: Any) -> None:
    """Leave out what differs each time: progress bars of libraries, on stderr, and names of this machine's Python."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main() -> None:
    """Run it, and write it back."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    without_chance(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
