"""A kind of adapter that dynlora does not know is one new file, and a variant that is saved so another."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from cli_helpers import Answer
from numeric import assert_close_to_truth, in_double
from safetensors.torch import load_file
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM
from tutorials import code_of

from dynlora_cli.adapters.read import read_adapter


@pytest.fixture
def loha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained run of the tutorial's variant."""
    for path, code in code_of("kinds").items():
        package = importlib.import_module(path.rpartition("/")[0].replace("/", "."))
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / Path(path).name).write_text(code, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    before = set(sys.modules)
    recipe = make_recipe(tmp_path, "adapter.variant=loha")
    summary, _ = train(recipe)
    assert summary["peft_check"]["checked"]
    yield Path(recipe.output_dir)
    for name in set(sys.modules) - before:
        if name.endswith(".loha"):
            del sys.modules[name]


def test_stock_peft_computes_what_dynlora_reads(loha: Path, dynlora: Callable[..., Answer]):
    assert {name.rpartition(".")[2] for name in load_file(loha / "adapter_model.safetensors")} == {
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    }  # fmt: skip
    base = loha.parent / "llama"
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        theirs = in_double(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), loha))(ids).logits
        answer = dynlora("merge", "--adapter", loha, "--json")
        assert answer.code == 0, answer.err
        ours = AutoModelForCausalLM.from_pretrained(loha / "merged")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (plain - ours).abs().max() > 1e-3
    assert_close_to_truth(ours, theirs.double(), terms=2 * (2 * (32 + 64)) + 24)  # as in test_peft_oracle.py


def test_every_command_takes_it(loha: Path, dynlora: Callable[..., Answer]):
    small = loha.parent / "small"
    for command in (
        ("prune", "--adapter", loha, "--budget", "0.5", "--out", small, "--json"),
        ("eval", "--adapter", loha, "--generate", 0, "--json"),
        ("export", "--adapter", loha, "--to", "peft", "--out", loha.parent / "peft", "--json"),
        ("inspect", "--adapter", loha, "--json"),
    ):
        answer = dynlora(*command)
        assert answer.code == 0, answer.err
    assert read_adapter(small).parameters < read_adapter(loha).parameters
