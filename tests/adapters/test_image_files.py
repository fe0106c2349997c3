"""Files of adapters for diffusion pipelines, as diffusers and kohya's scripts write them: read, and written again."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pipelines
import pytest
import torch
from pipelines import as_kohya, kohya_file, largest_difference, outputs, pipeline, save_lora, with_lora, with_sum
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dynlora_cli.adapters.images import write
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import UsageError

if TYPE_CHECKING:
    from cli_helpers import Dynlora

CLOSE = 1e-4
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
ONE_ENCODER = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A LoRA on a pipeline, saved by diffusers; its scales and ranks differ between layers."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            own = {"ranks": {"to_q": 2, "conv1": 3}, "alphas": {"to_k": 1, "fc1": 7}}
            made[kind] = save_lora(kind, tmp_path_factory.mktemp(kind), alpha=6, **own)
        return made[kind]

    return save


@pytest.mark.parametrize("kind", pipelines.PIPELINES)
def test_a_pipeline_computes_what_we_read(kind: str, saved: Callable[..., Path]):
    """ΔW of what was read, added to the weights, against diffusers' own loader."""
    adapter = read_adapter(saved(kind).parent, images=True)
    found = with_sum(kind, adapter.layers)
    assert largest_difference(outputs(pipeline(kind)), found) > 0.1
    assert largest_difference(with_lora(kind, saved(kind)), found) < CLOSE


@pytest.mark.parametrize("kind", pipelines.PIPELINES)
def test_diffusers_loads_what_we_write(kind: str, saved: Callable[..., Path], tmp_path: Path):
    """Ranks and scales differ, and one layer's name is the end of others'."""
    adapter = read_image(saved(kind))
    file = write.save(adapter, tmp_path, "float32")
    assert file.name == "pytorch_lora_weights.safetensors"
    assert file.stat().st_size == write.bytes_of(adapter, "float32")
    assert largest_difference(with_lora(kind, file), with_lora(kind, saved(kind))) < CLOSE


def test_a_convolution_is_read_as_components(saved: Callable[..., Path]):
    factors = read_image(saved("sd")).layers["unet.down_blocks.0.resnets.0.conv2"]
    assert (factors.kernel, factors.rank, tuple(factors.a_CI.shape)) == ((3, 3), 4, (4, 8 * 9))
    stored = load_file(saved("sd"))["unet.down_blocks.0.resnets.0.conv2.lora_A.weight"]
    assert factors.a_CI.reshape(stored.shape).equal(stored)


@pytest.mark.parametrize(("kind", "prefixes"), [("sd", ONE_ENCODER), ("sdxl", PREFIXES)])
def test_a_file_of_kohyas_goes_through(kind: str, prefixes: dict[str, str], saved: Callable[..., Path], tmp_path: Path):
    """Read, written and loaded by diffusers, with an alpha that is not the rank."""
    theirs = as_kohya(saved(kind), tmp_path / "style.safetensors", prefixes, alpha=2)
    adapter = read_adapter(theirs, images=True)
    assert adapter.file_form == "kohya"
    assert adapter.layers["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"].scale == 2 / 2
    assert adapter.layers["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"].scale == 2 / 4
    expected = with_lora(kind, theirs)
    assert largest_difference(with_sum(kind, adapter.layers), expected) < CLOSE
    (tmp_path / "out").mkdir()
    ours = write.save(adapter, tmp_path / "out", "float32")
    assert ours.name == theirs.name
    assert load_file(ours).keys() == load_file(theirs).keys()
    assert ours.stat().st_size == write.bytes_of(adapter, "float32")
    assert largest_difference(with_lora(kind, ours), expected) < CLOSE
    with safe_open(ours, "pt") as file:
        said = file.metadata()
    assert (said["ss_network_dim"], said["ss_output_name"]) == ("Dynamic", "mine")


def test_old_names_of_diffusers(saved: Callable[..., Path], tmp_path: Path):
    """As diffusers saved attention processors before it had PEFT."""
    adapter = read_image(saved("sd"))
    of_attention = {n: f for n, f in adapter.layers.items() if n.endswith((".to_q", ".to_out.0")) and "unet" in n}
    old = {}
    for name, factors in of_attention.items():
        block, _, which = name.removesuffix(".0").rpartition(".")
        old[f"{block}.processor.{which}_lora.down.weight"] = factors.a_CI
        old[f"{block}.processor.{which}_lora.up.weight"] = factors.b_OC
    encoder = {n: f for n, f in adapter.layers.items() if n.startswith("text_encoder") and "mlp" in n}
    for name, factors in encoder.items():
        old[f"{name}.lora_linear_layer.down.weight"] = factors.a_CI
        old[f"{name}.lora_linear_layer.up.weight"] = factors.b_OC
    file = tmp_path / "old.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, file)
    found = read_image(file)
    assert found.layers.keys() == {*of_attention, *encoder}
    assert all(factors.b_OC.equal(adapter.layers[name].b_OC) for name, factors in found.layers.items())


def test_prune_writes_the_same_form(saved: Callable[..., Path], tmp_path: Path, dynlora: Dynlora):
    """In half precision, as most files are; the pipeline gives what the pruned components give."""
    half = {name: tensor.half() for name, tensor in load_file(saved("sd")).items()}
    with safe_open(saved("sd"), "pt") as opened:
        save_file(half, tmp_path / "pytorch_lora_weights.safetensors", metadata=opened.metadata())
    done = dynlora("prune", "--adapter", tmp_path, "--budget", "0.4", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert summary["save_dtype"] == "fp16"
    assert file.stat().st_size == summary["adapter_bytes"]
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    pruned = read_adapter(tmp_path / "out", images=True)
    assert pruned.parameters == summary["parameters"] <= 0.4 * read_image(saved("sd")).parameters
    assert summary["energy_kept"] > 0.5
    assert len(set(pruned.ranks.values())) > 1
    assert largest_difference(with_lora("sd", file), with_sum("sd", pruned.layers)) < CLOSE
    shown = dynlora("inspect", "--adapter", file, "--json")
    assert json.loads(shown.out)["adapters"][0]["parameters"] == pruned.parameters


def test_kohyas_form_keeps_its_scale_where_ranks_differ(saved: Callable[..., Path], tmp_path: Path, dynlora: Dynlora):
    """diffusers 0.42 finds no alpha of attention layers where alphas differ; so they do not, in any number format."""
    theirs = as_kohya(saved("sd"), tmp_path / "my style.safetensors", ONE_ENCODER, alpha=3)
    half = tmp_path / "out"
    done = dynlora("prune", "--adapter", theirs, "--budget", "0.4", "--out", half, "--dtype", "fp16")
    assert done.code == 0, done.err
    file = half / theirs.name
    pruned = read_adapter(half, images=True)
    assert len(set(pruned.ranks.values())) > 1
    assert largest_difference(with_lora("sd", file), with_sum("sd", pruned.layers)) < CLOSE
    assert "load_lora_weights(\".\", weight_name='my style.safetensors')" in (half / "README.md").read_text()


def test_the_same_adapter_makes_the_same_bytes(tmp_path: Path):
    """safetensors writes the texts of a header in any order."""
    said = {f"ss_{letter}": 'é "quoted"\n\t\x01/' for letter in "abcdefgh"}
    kohya_file(tmp_path / "a.safetensors", PLAIN, said)
    adapter = read_image(tmp_path / "a.safetensors")
    written = set()
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        file = write.save(adapter, tmp_path / str(number), "float32")
        written.add(file.read_bytes())
        with safe_open(file, "pt") as opened:
            assert {key: opened.metadata()[key] for key in said} == said
    assert len(written) == 1
    assert read_image(file).layers[OURS].b_OC.equal(adapter.layers[OURS].b_OC)


# -- refusals --------------------------------------------------------------------------------------------------------

DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PLAIN = {f"{NAME}.lora_down.weight": DOWN, f"{NAME}.lora_up.weight": UP, f"{NAME}.alpha": torch.tensor(2.0)}
OURS = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_the_plain_file_is_read(tmp_path: Path):
    """What the refusals below begin with is right."""
    assert read_image(kohya_file(tmp_path / "a.safetensors", PLAIN)).ranks == {OURS: 2}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({f"{NAME}.dora_scale": torch.ones(8, 1)}, "DoRA"),
        ({f"{NAME}.hada_w1_a": DOWN}, "LoHa"),
        ({f"{NAME}.lokr_w1": DOWN}, "LoKr"),
        ({f"{NAME}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "LyCORIS"),
        ({f"{NAME}.diff": DOWN}, "whole tensor"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": DOWN}, "FLUX"),
        ({f"{OURS}.lora_A.weight": DOWN}, "not understood"),
        ({"lora_unet_../../x.lora_down.weight": DOWN}, "not understood"),
        ({"bundle_emb.sks.string_to_param.*": DOWN}, "embedding"),
        ({f"{NAME}.alpha": torch.tensor(0.0)}, "alpha of 0"),
        ({f"{NAME}.alpha": torch.tensor(-1.0)}, "alpha of -1"),
        ({f"{NAME}.alpha": torch.ones(2)}, "more than one number"),
        ({f"{NAME}.lora_up.weight": torch.ones(8, 3)}, "do not go together"),
        ({f"{NAME}.lora_down.weight": torch.ones(2, 8, 3, 3)}, None),
        ({f"{NAME}.lora_down.weight": torch.ones(2, 8, 3)}, "neither of a linear layer"),
        (
            {f"{NAME}.lora_down.weight": torch.ones(2, 8, 3, 3), f"{NAME}.lora_up.weight": torch.ones(8, 2, 3, 3)},
            "no convolution of 1 x 1",
        ),
        ({f"{NAME}.lora_down.weight": torch.ones(2, 8, dtype=torch.int8)}, "holds int8"),
        ({f"{NAME}.alpha": torch.tensor(1e30)}, "alpha of 1e+30"),
        ({"model.diffusion_model.input_blocks.0.0.weight": DOWN}, "not understood"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": DOWN}, "mixes names"),
    ],
)
def test_what_is_not_understood_is_refused(
    more: dict[str, torch.Tensor], said: str | None, tmp_path: Path, dynlora: Dynlora
):
    file = kohya_file(tmp_path / "a.safetensors", PLAIN | more)
    done = dynlora("inspect", "--adapter", file)
    if said is None:
        assert done.code == 0, done.err
    else:
        assert done.code == 2, done.err
        assert said in " ".join(done.err.split())
        assert "Traceback" not in done.err


META = "lora_adapter_metadata"
FACTORS = {f"{OURS}.lora_A.weight": DOWN, f"{OURS}.lora_B.weight": UP}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("{", "damaged"),
        ("[1]", "no object"),
        ('{"unet.r": 5, "unet.lora_alpha": 5}', "metadata says 5"),
        ('{"unet.r": 2, "unet.lora_alpha": 0}', "alpha of 0"),
        ('{"unet.r": 2, "unet.lora_alpha": NaN}', "finite"),
        ('{"unet.r": 2, "unet.use_dora": true}', "use_dora"),
        ('{"unet.r": 2, "unet.init_lora_weights": "pissa"}', "changed the base's weights"),
        ('{"unet.r": 2, "unet.rank_pattern": {"((": 3}}', "no regular expression"),
        ('{"text_encoder.r": 2}', "says nothing of unet"),
    ],
)
def test_metadata_that_cannot_be_carried_out_is_refused(metadata: str, said: str, tmp_path: Path):
    file = kohya_file(tmp_path / "a.safetensors", FACTORS, {META: metadata})
    with pytest.raises(UsageError, match=said):
        read_image(file)


def test_scales_of_metadata(tmp_path: Path):
    """By PEFT's rules: its defaults where nothing is said, and the root of the rank for rsLoRA."""
    for said, scale in (
        ({"unet.r": 2}, 8 / 2),
        ({"unet.r": 2, "unet.lora_alpha": 3, "unet.use_rslora": True}, 3 / 2**0.5),
        ({"unet.r": 9, "unet.rank_pattern": {"attn1.to_q": 2}, "unet.alpha_pattern": {"to_q": 5}}, 5 / 2),
    ):
        file = kohya_file(tmp_path / "a.safetensors", FACTORS, {META: json.dumps(said)})
        assert read_image(file).layers[OURS].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.safetensors", b"", "empty or cut off"),
        ("noise.safetensors", bytes(range(256)), "does not begin as such a file does"),
        ("list.safetensors", struct.pack("<Q", 2) + b"[]", "no table of tensors"),
        ("none.safetensors", struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        ("deep.safetensors", struct.pack("<Q", 4000) + b'{"a":' * 800, "deep"),
        ("model.ckpt", b"\x80\x04.", "is a pickle"),
        ("model.pt", b"", "is a pickle"),
    ],
)
def test_damaged_files_and_pickles(name: str, content: bytes, said: str, tmp_path: Path, dynlora: Dynlora):
    (tmp_path / name).write_bytes(content)
    done = dynlora("inspect", "--adapter", tmp_path / name)
    assert done.code == 2
    assert said in " ".join(done.err.split())


def test_a_file_that_is_cut_off(tmp_path: Path, dynlora: Dynlora):
    file = kohya_file(tmp_path / "a.safetensors", PLAIN)
    file.write_bytes(file.read_bytes()[:-3])
    done = dynlora("inspect", "--adapter", file)
    assert done.code == 2
    assert "damaged or cut off" in done.err


def test_which_file_of_a_folder(tmp_path: Path, dynlora: Dynlora):
    """Damaged ones beside it do not matter; a second adapter does; no link out of the folder is followed."""
    folder = tmp_path / "loras"
    one = kohya_file(folder / "b.safetensors", PLAIN)
    (folder / "a.safetensors").write_bytes(b"junk")
    assert dynlora("inspect", "--adapter", folder).code == 0
    kohya_file(folder / "c.safetensors", PLAIN)
    done = dynlora("inspect", "--adapter", folder)
    assert done.code == 2
    assert f"name one of the files: {one}" in " ".join(done.err.split())
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "pytorch_lora_weights.safetensors").symlink_to(one)
    assert "is a link out of its folder" in dynlora("inspect", "--adapter", linked).err
    assert dynlora("inspect", "--adapter", linked / "pytorch_lora_weights.safetensors").code == 0  # named by a person


@pytest.mark.parametrize(
    "command",
    [
        ["eval"],
        ["serve"],
        ["prune", "--budget", "auto", "--out", "o"],
        ["prune", "--budget", "0.5", "--policy", "fisher", "--out", "o"],
        ["prune", "--budget", "0.5", "--heal", "5", "--out", "o"],
        ["prune", "--born", "x", "--out", "o"],
        ["prune", "--budget", "0.5", "--dtype", "fp8", "--out", "o"],
        ["export", "--to", "vllm", "--out", "o"],
    ],
)
def test_what_needs_more_than_the_file_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynlora: Dynlora
):
    monkeypatch.chdir(tmp_path)
    file = kohya_file(tmp_path / "a.safetensors", PLAIN)
    done = dynlora(*command, "--adapter", file)
    assert done.code == 2, done.err
    assert "pipeline" in done.err or "form" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "o").exists()
