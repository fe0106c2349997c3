"""`dynlora merge --into adapter` of adapters for diffusion pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from pipelines import as_kohya, kohya_file, largest_difference, outputs, pipeline, save_lora, with_lora
from safetensors.torch import load_file

from dynlora_cli.adapters.read import read_adapter

if TYPE_CHECKING:
    from cli_helpers import Dynlora

CLOSE = 1e-4
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA of diffusers' form and one of kohya's, on one pipeline, with other scales."""
    folder = tmp_path_factory.mktemp("two")
    first = save_lora("sd", folder / "first", alpha=2, ranks={"to_q": 2})
    other = save_lora("sd", folder / "other", rank=3, seed=5)
    return first, as_kohya(other, folder / "second.safetensors", PREFIXES, alpha=6)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_weighted_sum_is_what_diffusers_computes(two: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    """Against both in one pipeline at these weights, of which no loader of ours knows."""
    done = dynlora(
        "merge", "--adapter", two[0], "--adapter", two[1], "--weights", "0.7,-0.4", "--out", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["peft_check"]["problem"] is None
    pipe = pipeline("sd")
    for name, file in zip("ab", two, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    found = with_lora("sd", tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert largest_difference(found, outputs(pipe)) < CLOSE


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_other_methods_keep_convolutions(method: str, two: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    done = dynlora(
        "merge",
        "--adapter",
        two[1],
        "--adapter",
        two[0],
        "--method",
        method,
        "--budget",
        "0.5",
        "--out",
        tmp_path / "o",
    )
    assert done.code == 0, done.err
    file = tmp_path / "o" / "second.safetensors"  # in the form of the first
    kept = [tensor for name, tensor in load_file(file).items() if "resnets" in name and "conv1.lora_down" in name]
    assert kept
    assert all(tensor.shape[2:] == (3, 3) for tensor in kept)
    assert with_lora("sd", file)


def test_adapters_of_different_pipelines_are_not_merged(two: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    xl = save_lora("sdxl", tmp_path / "xl")
    flux = save_lora("dit", tmp_path / "flux")
    told = {}
    for name, other in (("xl", xl), ("flux", flux)):
        done = dynlora("merge", "--adapter", two[0], "--adapter", other, "--out", tmp_path / "out")
        assert done.code == 2
        told[name] = " ".join(done.err.split())
    assert "different shapes" in told["xl"]
    assert "different pipelines: one has a unet, the other a transformer" in told["flux"]
    assert not (tmp_path / "out").exists()


def test_what_kohyas_files_say_of_their_base_is_looked_at(two: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    files = [
        kohya_file(tmp_path / f"{base}.safetensors", load_file(two[1]), {"ss_base_model_version": base})
        for base in ("sd_v1", "sd_v2")
    ]
    done = dynlora("merge", "--adapter", files[0], "--adapter", files[1], "--out", tmp_path / "out")
    assert done.code == 2
    assert "'sd_v1' and 'sd_v2'" in " ".join(done.err.split())


def test_half_precision_stays(two: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    halves = []
    for place in ("a", "b"):
        halves.append(
            kohya_file(tmp_path / f"{place}.safetensors", {n: t.half() for n, t in load_file(two[1]).items()})
        )
    done = dynlora("merge", "--adapter", halves[0], "--adapter", halves[1], "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "written in fp16" in done.err
    stored = load_file(tmp_path / "out" / "a.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith("alpha")} == {torch.float16}
    one, both = (read_adapter(path, images=True) for path in (halves[0], tmp_path / "out"))
    name = "unet.mid_block.resnets.0.conv1"
    twice = 2 * one.layers[name].delta_OI()
    assert (both.layers[name].delta_OI() - twice).abs().max() < 2e-3 * twice.abs().max()
