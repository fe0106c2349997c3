"""Optional packages that are there and cannot be imported: one clear line, in doctor and in whatever uses them."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora

from dynlora_cli.cli.faults import as_ours, translated
from dynlora_cli.errors import MachineError
from dynlora_cli.extras import EXTRAS, NEVER_IMPORTED, broken, try_imports

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted({module for _, modules in EXTRAS.values() for module in modules} - NEVER_IMPORTED)
# How packages break, each with what is said of it.
FAULTS = [
    (
        "raise ImportError('libfoo.so.3: cannot open shared object file\\nmore')",
        "ImportError: libfoo.so.3: cannot open",
    ),
    ("import no_such_module_of_its_own", "No module named 'no_such_module_of_its_own'"),
    ("raise RuntimeError('numpy.core.multiarray failed')", "RuntimeError: numpy.core.multiarray failed"),
    ("raise SystemExit('it wants a licence')", "SystemExit: it wants a licence"),
    ("print('noise'); 1 / 0", "ZeroDivisionError: division by zero"),
    ("import os; os.abort()", "the process ended with"),
    ("this is no Python", "SyntaxError"),
]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """A broken package for each module that an extra brings, in `tmp_path`/broken, and what is wrong with it."""
    said = {}
    for index, module in enumerate(MODULES):
        code, said[module] = FAULTS[index % len(FAULTS)]
        (tmp_path / "broken" / module).mkdir(parents=True)
        (tmp_path / "broken" / module / "__init__.py").write_text(f"{code}\n", encoding="utf-8")
    return said


def test_every_extra_is_known():
    written = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = written.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert set(re.findall(r"^(\w+) = \[", section, re.M)) - {"dev"} == set(EXTRAS)


def test_nothing_is_imported_from_the_folder_it_is_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("json", "wandb_stand_in"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    ((name, fault),) = try_imports(["wandb_stand_in"])
    assert (name, "No module named" in fault) == ("wandb_stand_in", True)
    assert not (tmp_path / "ran").exists()


def test_doctor_says_of_each_what_is_wrong(
    stand_ins: dict[str, str], tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr("dynlora_cli.commands.doctor._missing", lambda extra: set())
    answer = dynlora("doctor", "--json")
    assert answer.code == 3
    found = {finding["name"]: finding for finding in answer.json["findings"] if finding["part"] == "optional"}
    assert set(found) == set(EXTRAS)
    for extra, (_, modules) in EXTRAS.items():
        module = next(module for module in modules if module in stand_ins)
        assert found[extra]["fault"].startswith(f"{module} cannot be imported: ")
        assert stand_ins[module] in found[extra]["fault"]
        assert "&& pip install" in found[extra]["hint"]
        assert f"fault: {extra}: {module} cannot be imported" in answer.err
    assert "Traceback" not in answer.err
    assert answer.out.count("\n") == 1


def test_what_hangs_or_ends_the_process_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, code in {"one": "import os; os._exit(7)", "two": "", "three": "raise ValueError"}.items():
        (tmp_path / f"{name}_stand_in.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = dict(try_imports(["one_stand_in", "two_stand_in", "three_stand_in"]))
    assert found == {"one_stand_in": "the process ended with 7", "three_stand_in": "ValueError: "}


def uses_gguf() -> None:
    from dynlora_cli.export.gguf.file import _package

    _package()


def uses_bm25s() -> None:
    from dynlora_cli.retrieval.lexical import Lexical

    Lexical(["a text"])


def uses_sklearn() -> None:
    import numpy as np

    from dynlora_cli.retrieval.certainty import _fitted

    _fitted(np.zeros((2, 1)), np.array([True, False]), np.zeros((1, 1)))


@pytest.mark.parametrize(("module", "use"), [("gguf", uses_gguf), ("bm25s", uses_bm25s), ("sklearn", uses_sklearn)])
def test_who_uses_it_says_the_same(
    module: str, use, stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken" / module / "__init__.py").write_text("raise OSError('GLIBCXX_3.4.32 not found')\n")
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    with (
        pytest.raises(MachineError, match=f"the package {module} is installed, but cannot be imported: OSError: GLIB"),
        translated(),
    ):
        use()


def test_training_with_a_broken_tracker(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "wandb.py").write_text("raise SystemExit('protobuf is too new')\n")
    monkeypatch.syspath_prepend(tmp_path / "alone")
    Path("r.yaml").write_text(
        "model: builtin:tiny\ndataset: builtin:stdlib-docs\ntrain: {report_to: wandb, max_steps: 1}"
    )
    answer = dynlora("train", "r.yaml", "--json")
    assert answer.code == 3
    assert (
        answer.json["error"]
        == "the package wandb is installed, but cannot be imported: SystemExit: protobuf is too new"
    )
    assert answer.json["hint"] == 'pip install --force-reinstall --no-deps wandb && pip install "dynlora[wandb]"'
    assert "Traceback" not in answer.err


def test_an_error_behind_the_import_is_none_of_these():
    with pytest.raises(ImportError) as caught:
        raise ImportError("of somebody else")
    assert broken(caught.value) is None
    assert as_ours(caught.value) is None


def test_what_bitsandbytes_says_to_itself_is_not_shown(
    dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    functional, logger = pytest.importorskip("bitsandbytes.functional"), logging.getLogger("bitsandbytes.backends")
    right = functional.quantize_4bit

    def talkative(*given: Any, **how: Any) -> Any:
        logger.warning("no package kernels")
        return right(*given, **how)

    monkeypatch.setattr(functional, "quantize_4bit", talkative)
    assert dynlora("doctor").code == 0
    assert "no package kernels" not in caplog.text
    logger.warning("as before")
    assert "as before" in caplog.text
