"""scripts/bench/images/resize.py: the rules, and that both sides have the same size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "bench" / "images"), str(ROOT / "tests" / "images")]

import resize  # noqa: E402 - it is a script, and no package
from tiny_pipeline import pixel_pipeline  # noqa: E402

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "number", "kept"),
    [
        ("fixed", 3, 3),
        ("fixed", 9, 4),
        ("sv_ratio", 3, 2),  # above 8 / 3
        ("sv_ratio", 100, 4),
        ("sv_fro", 0.95, 2),  # 64 + 16 of 85 are 0.97²
        ("sv_fro", 0.999, 4),
        ("sv_cumulative", 0.8, 2),  # 12 of 15
        ("sv_cumulative", 0.81, 3),
        ("sv_cumulative", 0.01, 1),
    ],
)
def test_the_rules(rule: str, number: float, kept: int):
    assert resize.RULES[rule][0](VALUES, number) == kept


def test_one_threshold_is_measured_at_the_size_of_each_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = pixel_pipeline(tmp_path)
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            d_out, d_in = module.weight.shape
            scale = 0.5 ** torch.arange(6.0)
            tensors[f"unet.{name}.lora_A.weight"] = scale[:, None] * torch.randn(6, d_in)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(d_out, 6)
    save_file(tensors, tmp_path / "a.safetensors")
    lines = tmp_path / "lines.jsonl"
    resize.main([str(tmp_path / "a.safetensors"), "--pipeline", str(folder), "--budgets", "0.5", "--out", str(lines)])
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["rule"] for line in found] == list(resize.RULES)
    for line in found:
        ours, theirs = line["ours"], line["theirs"]
        assert ours["parameters"] <= theirs["parameters"] <= 0.5 * line["parameters"]
        assert ours["parameters"] > 0.9 * theirs["parameters"]
        assert 0 < theirs["update"] < 0.5
        assert ours["update"] < theirs["update"] + 0.02
        assert 0 < theirs["output"] < 1
    assert "| 0.5 | sv_fro |" in capsys.readouterr().out
