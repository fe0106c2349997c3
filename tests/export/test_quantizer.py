"""Small number formats of a GGUF model: made by llama.cpp's own quantizer or refused. The real one: test_llama_cpp.py."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cli_helpers import Dynlora
from peft import LoraConfig, get_peft_model
from pico import pico_model
from transformers import AutoModelForCausalLM

from dynlora_cli.export.gguf import quantizer
from dynlora_cli.export.gguf.outtypes import MAX_KL, NAMES, QUANTIZED


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizer")
    model = AutoModelForCausalLM.from_pretrained(pico_model(folder))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter"


def program(folder: Path, text: str) -> Path:
    """A llama-quantize that does as told."""
    path = folder / "bin" / "llama-quantize"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path.parent


def nothing_here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(quantizer, "PACKAGE", "no_such_package")


@pytest.mark.parametrize("to", ["merged-gguf", "ollama"])
def test_without_a_quantizer_the_message_says_what_to_install(to, adapter, tmp_path, monkeypatch, dynlora: Dynlora):
    nothing_here(monkeypatch, tmp_path)
    answer = dynlora("export", "--adapter", adapter, "--to", to, "--outtype", "q4_k_m", "--out", tmp_path / "out")
    assert answer.code == 3
    assert "llama.cpp's own quantizer" in answer.err
    assert "pip install llama-cpp-python" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_format_that_nobody_has_and_one_that_the_form_cannot_take(adapter, tmp_path, dynlora: Dynlora):
    common = ("export", "--adapter", adapter, "--out", tmp_path / "out")
    answer = dynlora(*common, "--to", "merged-gguf", "--outtype", "q4_k")
    assert answer.code == 2
    assert "q4_k_m" in answer.err
    answer = dynlora(*common, "--to", "peft", "--outtype", "q8_0")
    assert answer.code == 2
    assert "--to peft writes no GGUF model" in answer.err


def test_a_quantizer_that_fails_is_quoted_and_nothing_is_kept(adapter, tmp_path, monkeypatch, dynlora: Dynlora):
    nothing_here(monkeypatch, program(tmp_path, 'echo "no room left" >&2; exit 7'))
    answer = dynlora(
        "export", "--adapter", adapter, "--to", "merged-gguf", "--outtype", "Q4_0", "--out", tmp_path / "out", "--json"
    )
    assert answer.code == 1
    assert "no room left" in json.dumps(answer.json)
    assert "exit code 7" in json.dumps(answer.json)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_a_file_that_is_not_smaller_than_agreed_is_measured(adapter, tmp_path, monkeypatch, dynlora: Dynlora):
    """A program that only copies: read back, it is f16, and the numbers are those of the file that is there."""
    nothing_here(monkeypatch, program(tmp_path, '/bin/cp "$1" "$2"'))
    answer = dynlora(
        "export", "--adapter", adapter, "--to", "merged-gguf", "--outtype", "q6_k", "--out", tmp_path / "out", "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["quantizer"] == "llama-quantize"
    assert set(answer.json["types"]) == {"F16", "F32"}
    assert answer.json["check"]["kl"] < 1e-3
    assert any("do not divide" in note for note in answer.json["notes"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.gguf"]


def test_every_format_has_a_limit_and_fewer_bits_a_wider_one():
    assert set(MAX_KL) == set(NAMES)
    by_bits = [MAX_KL[name] for name in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")]
    assert by_bits == sorted(by_bits)
    assert len({form.number for form in QUANTIZED.values()}) == len(QUANTIZED)
