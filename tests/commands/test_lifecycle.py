"""The whole life of an adapter by the shell script that shows it, on the built-in model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from numeric import same_loss

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_train_prune_merge_eval_export_in_one_script(tmp_path: Path, warm: Path):
    out = tmp_path / "life"
    environment = os.environ | {"STEPS": "40", "OMP_NUM_THREADS": "1"}
    environment["BASH_FUNC_dynlora%%"] = f'() {{ {shlex.quote(str(warm))} "$@"; }}'  # bash takes it for the command
    command = ["bash", "scripts/lifecycle", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert all(answer["ok"] for answer in told.values())
    ranks = told["train"]["ranks"].values()
    assert 0 in ranks
    assert len(set(ranks)) > 2, "mixed ranks"
    assert told["prune"]["parameters"] <= 0.6 * told["train"]["parameters"]
    assert told["auto"]["loss_after"] <= 1.01 * told["auto"]["loss_before"]
    assert told["merge"]["check"]["kl"] < 1e-3
    assert told["eval"]["adapters"][0]["loss"] == same_loss(told["train"]["loss_after"])
    assert len([name for name in told if name.startswith("export-")]) == 8
