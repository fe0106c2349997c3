"""Few bits a number: what comes back is what was measured, larger components get more bits, hostile archives are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cli_helpers import Dynlora
from pico import pico_recipe
from safetensors.torch import load_file, save_file

from dynlora_cli.adapters.packed.archive import in_svd_form
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.api import train
from dynlora_cli.errors import UsageError
from dynlora_cli.rounding.bits import costs, equal_lengths, share_out, within
from dynlora_cli.rounding.codes import GROUP, bytes_of, packed, quantized, restored, unpacked

CONFIG, WEIGHTS = "adapter_packed.json", "adapter_packed.safetensors"
# The least mean squared error of 2ᵏ levels for numbers of a normal distribution (Max 1960, table I).
BEST_FOR_NORMAL = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numbers", [1, 63, 64, 200])
def test_codes_come_back_from_their_bytes(bits, numbers):
    x_VN = torch.randn(3, numbers, generator=torch.Generator().manual_seed(bits))
    q_VN, c_VG = quantized(x_VN, bits)
    data = packed(q_VN, bits)
    assert len(data) + c_VG.numel() == 3 * bytes_of(numbers, bits)
    again = unpacked(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(3, -1), numbers, bits)
    assert torch.equal(again, q_VN)
    assert restored(q_VN, c_VG, bits).shape == x_VN.shape


@pytest.mark.parametrize("bits", BEST_FOR_NORMAL)
def test_the_error_is_near_the_least_that_so_many_levels_can_have(bits):
    x_VN = torch.randn(64, 32 * GROUP, generator=torch.Generator().manual_seed(0))
    error = (restored(*quantized(x_VN, bits), bits) - x_VN).square().mean().item()
    assert 0.7 * BEST_FOR_NORMAL[bits] < error < 1.05 * BEST_FOR_NORMAL[bits]  # steps that follow each group save some


def test_zeros_stay_and_every_byte_is_a_step():
    q_VN, c_VG = quantized(torch.zeros(1, 70), 3)
    assert not restored(q_VN, c_VG, 3).any()
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    assert restored(torch.full((256, 1), 7, dtype=torch.uint8), every, 3).isfinite().all()


def test_bits_follow_the_energy_and_what_is_worth_nothing_goes():
    generator = torch.Generator().manual_seed(0)
    sizes_C = torch.tensor([16.0, 4.0, 1.0, 1e-4])
    a_CI = torch.linalg.qr(torch.randn(256, 4, generator=generator))[0].T * sizes_C[:, None]
    b_OC = torch.linalg.qr(torch.randn(256, 4, generator=generator))[0]
    pair = equal_lengths(a_CI, b_OC)
    cost = costs(*pair, worth=0.0)
    bits = share_out({"x": cost}, int(cost.bytes_B[3]) * 3)["x"]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] >= bits[2] + 3, "a factor of 16 in size is worth four bits"
    assert bits[3] == 0
    assert sum(cost.bytes_B[k] for k in bits) <= int(cost.bytes_B[3]) * 3
    alike = cost.errors_CB[torch.arange(4), torch.tensor([2, 2, 2, 2])].sum()
    same_size = share_out({"x": cost}, int(cost.bytes_B[2]) * 4)["x"]
    assert cost.errors_CB[torch.arange(4), torch.tensor(same_size)].sum() < 0.5 * alike


def test_by_default_it_is_the_relative_error_that_counts():
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, size in (("large", 256.0), ("small", 1.0)):
        a, b = (size**0.5 * torch.randn(*shape, generator=generator) for shape in ((8, 256), (256, 8)))
        layers[name] = costs(*equal_lengths(a, b))
    alike = sum(within(cost, 3) for cost in layers.values())
    bits = share_out(layers, int(alike))
    assert sum(layers[name].bytes_B[k] for name, of in bits.items() for k in of) <= alike
    assert 3 <= min(bits["large"]) <= max(bits["large"]) <= 4
    assert 2 <= min(bits["small"]) <= max(bits["small"]) <= 3


def test_too_few_bits_say_so():
    cost = costs(torch.ones(1, 64), torch.ones(64, 1))
    with pytest.raises(UsageError, match="leave nothing"):
        share_out({"x": cost}, 3)


# -- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    train(pico_recipe(folder, rank={"init": 8, "budget": 4}))
    return folder / "out"


@pytest.fixture
def archive(run, tmp_path, dynlora: Dynlora):
    answer = dynlora(
        "export", "--adapter", run, "--to", "packed", "--set", "bits=3", "--out", tmp_path / "small", "--json"
    )
    assert answer.code == 0, answer.err
    return tmp_path / "small", answer.json


def test_an_archive_unpacks_to_a_plain_lora_exactly(archive, run, tmp_path, dynlora):
    small, made = archive
    answer = dynlora("export", "--adapter", small, "--to", "peft", "--out", tmp_path / "plain", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["max_logit_difference"] == 0
    assert answer.json["peft_check"] == {"checked": True, "peft": "0.21.2", "problem": None} | answer.json["peft_check"]
    before, after = read_adapter(small), read_adapter(tmp_path / "plain")
    assert before.ranks == after.ranks
    for name, factors in before.layers.items():
        assert torch.equal(factors.a_CI, after.layers[name].a_CI)
        assert torch.equal(factors.b_OC, after.layers[name].b_OC)
    turned = in_svd_form(read_adapter(run))
    assert made["files"][WEIGHTS]["bytes"] < (3 / 8 + 2 / GROUP) * turned.parameters + 300
    assert 0.05 < made["rounding"] < 0.35
    assert sum(made["components_by_bits"].values()) == turned.components
    assert made["check"]["kl"] < 0.01


@pytest.mark.slow
def test_commands_read_an_archive(archive, run, tmp_path, dynlora):
    small, _ = archive
    rows = run.parent / "rows.jsonl"
    losses = [
        dynlora("eval", "--adapter", each, "--data", rows, "--json").json["adapters"][0]["loss"]
        for each in (run, small)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0] != losses[1]
    assert dynlora("inspect", "--adapter", small).code == 0


def damaged(folder, change=None, tensors=None):
    if change:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))
    if tensors:
        found = load_file(folder / WEIGHTS)
        tensors(found)
        save_file(found, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"change": lambda c: c.update(version=2)}, "version"),
        ({"change": lambda c: c.update(more=1)}, "more"),
        ({"change": lambda c: c.update(layers=[])}, "layers"),
        ({"change": lambda c: c["layers"][0].__setitem__(1, 1 << 40)}, "layers"),
        ({"change": lambda c: c["layers"][0].__setitem__(1, 1 << 23)}, "codes must be"),
        ({"change": lambda c: c["layers"][0].__setitem__(3, "390")}, "layers"),
        ({"change": lambda c: c["layers"][0].__setitem__(0, "a\x1b[2Jb")}, "control characters"),
        ({"change": lambda c: c["layers"].append(c["layers"][0])}, "twice"),
        ({"change": lambda c: c["adapter_config"].update(peft_type="LOHA")}, "LOHA"),
        ({"change": lambda c: c["adapter_config"].update(r=7, rank_pattern={})}, "rank"),
        ({"tensors": lambda t: t.pop("steps")}, "steps must be"),
        ({"tensors": lambda t: t.update(codes=t["codes"][:-1].clone())}, "codes must be"),
        ({"tensors": lambda t: t.update(codes=t["codes"].float())}, "codes must be"),
        (
            {
                "tensors": lambda t: t.update(
                    {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(1, 1)}
                )
            },
            "packed as well",
        ),
    ],
)
def test_a_hostile_archive_is_refused(archive, how, words):
    small, _ = archive
    damaged(small, **how)
    with pytest.raises(UsageError, match=words):
        read_adapter(small)


def test_an_archive_of_one_file_says_which_is_missing(archive):
    small, _ = archive
    (small / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"holds adapter_packed\.json but no adapter_packed\.safetensors"):
        read_adapter(small)


def test_what_is_no_lora_of_linear_layers_is_refused(run, tmp_path, dynlora):
    train(run.parent / "recipe.yaml", set={"adapter.variant": "dora"}, output_dir=tmp_path / "dora")
    answer = dynlora("export", "--adapter", tmp_path / "dora", "--to", "packed", "--out", tmp_path / "x")
    assert answer.code == 2
    assert "DoRA, which a packed archive does not read" in answer.err
    answer = dynlora("export", "--adapter", run, "--to", "packed", "--set", "bits=9", "--out", tmp_path / "x")
    assert answer.code == 2
    zero = read_adapter(run)
    (tmp_path / "zero").mkdir()
    save(zero.with_layers({n: replace(f, b_OC=0 * f.b_OC) for n, f in zero.layers.items()}), tmp_path / "zero")
    answer = dynlora("export", "--adapter", tmp_path / "zero", "--to", "packed", "--out", tmp_path / "x")
    assert answer.code == 2
    assert "every component is zero" in answer.err


def test_a_run_goes_on_from_an_archive(archive, run, tmp_path, dynlora):
    small, _ = archive
    on = ("--set", f"adapter.from={small}", "--output-dir", tmp_path / "on")
    answer = dynlora("train", run.parent / "recipe.yaml", *on)
    assert answer.code == 0, answer.err
