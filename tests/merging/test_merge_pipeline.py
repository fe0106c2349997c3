"""`dynlora merge` of adapters into a pipeline of diffusers, against what diffusers makes of pipeline and adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipelines
import pytest
import torch
from cli_helpers import contents
from pipelines import as_kohya, diffusers, largest_difference, outputs, pipeline, save_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dynlora_cli.models import weights

if TYPE_CHECKING:
    from cli_helpers import Dynlora

CLOSE = 1e-4
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
ONE_ENCODER = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
SINGLE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A pipeline's folder, and the file of a LoRA on it, whose scales and ranks differ between layers."""
    found: dict[str, tuple[Path, Path]] = {}
    root = tmp_path_factory.mktemp("pipelines")

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in found:
            pipeline(kind).save_pretrained(root / kind)
            own = {"ranks": {"to_q": 2, "conv1": 3}, "alphas": {"to_k": 1, "fc1": 7}}
            found[kind] = root / kind, save_lora(kind, root / f"lora-{kind}", alpha=6, **own)
        return found[kind]

    return of


@pytest.fixture
def base(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of the small Stable Diffusion, to be changed."""
    return Path(shutil.copytree(made("sd")[0], tmp_path / "base"))


def loaded(folder: Path, **how: Any) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, named in index.items() if named == [None, None]}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **absent, **how)


def fused(base: Path, *files: Path, scales: tuple[float, ...] = (1.0,)) -> Any:
    """The pipeline with the adapters in its weights, as diffusers puts them there."""
    pipe = loaded(base)
    names = [f"adapter{number}" for number in range(len(files))]
    with warnings.catch_warnings(action="ignore"):  # of PEFT, which warns of the second adapter
        for name, file in zip(names, files, strict=True):
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, list(scales))
    parts = [part for part in ("unet", "transformer", "text_encoder", "text_encoder_2") if getattr(pipe, part, None)]
    pipe.fuse_lora(components=parts, adapter_names=names)
    pipe.unload_lora_weights()
    return pipe


def merge(dynlora: Dynlora, base: Path, out: Path, *files: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    adapters = [word for file in files for word in ("--adapter", file)]
    done = dynlora("merge", *adapters, "--into", "base", "--base", base, "--out", out, *more, "--json")
    assert done.code == 0, done.err
    return done.json


def refused(dynlora: Dynlora, *words: object, code: int = 2) -> str:
    done = dynlora("merge", *words)
    assert done.code == code, done.err
    return " ".join(done.err.split())


@pytest.mark.parametrize("kind", pipelines.PIPELINES)
def test_the_merged_pipeline_computes_what_diffusers_fuses(
    kind: str, made: Callable[[str], tuple[Path, Path]], tmp_path: Path, dynlora: Dynlora
):
    base, file = made(kind)
    before = contents(base)
    summary = merge(dynlora, base, tmp_path / "out", file)
    assert set(summary["layers"]) == set(pipelines.TARGETS[kind])
    found, expected = outputs(loaded(tmp_path / "out")), outputs(fused(base, file))
    assert largest_difference(found, outputs(loaded(base))) > 0.1
    assert largest_difference(found, expected) < CLOSE
    assert contents(base) == before
    after = contents(tmp_path / "out")
    assert after.keys() == {*before, "merge.json"}
    assert {name for name in before if before[name] != after[name]} == {
        f"{part}/{'' if part.startswith('text') else 'diffusion_pytorch_'}model.safetensors"
        for part in summary["layers"]
    }


@pytest.mark.parametrize(("kind", "prefixes"), [("sd", ONE_ENCODER), ("sdxl", PREFIXES)])
def test_a_file_of_kohyas_goes_in(
    kind: str, prefixes: dict[str, str], made: Callable[[str], tuple[Path, Path]], tmp_path: Path, dynlora: Dynlora
):
    base, file = made(kind)
    theirs = as_kohya(file, tmp_path / "style.safetensors", prefixes, alpha=2)
    merge(dynlora, base, tmp_path / "out", theirs)
    assert largest_difference(outputs(loaded(tmp_path / "out")), outputs(fused(base, theirs))) < CLOSE


def test_several_go_in_at_their_weights(made: Callable[[str], tuple[Path, Path]], tmp_path: Path, dynlora: Dynlora):
    base, first = made("sd")
    other = save_lora("sd", tmp_path / "other", rank=3, seed=5)
    second = as_kohya(other, tmp_path / "second.safetensors", ONE_ENCODER, alpha=6)
    summary = merge(dynlora, base, tmp_path / "out", first, second, more=("--weights", "0.7,-0.4"))
    assert summary["weights"] == [0.7, -0.4]
    expected = fused(base, first, second, scales=(0.7, -0.4))
    assert largest_difference(outputs(loaded(tmp_path / "out")), outputs(expected)) < CLOSE


def test_one_goes_in_at_its_weight(made: Callable[[str], tuple[Path, Path]], tmp_path: Path, dynlora: Dynlora):
    base, file = made("sd")
    merge(dynlora, base, tmp_path / "out", file, more=("--weights", "0.5"))
    assert largest_difference(outputs(loaded(tmp_path / "out")), outputs(fused(base, file, scales=(0.5,)))) < CLOSE
    assert "has 2 numbers for one adapter" in refused(
        dynlora, "--adapter", file, "--base", base, "--out", tmp_path / "two", "--weights", "1,2"
    )


def test_shards_and_variants_stay_as_they_are(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    """One folder with fp32 and with fp16 in shards: both are merged, in small pieces, each in its own format."""
    base, file = tmp_path / "base", made("sd")[1]
    pipeline("sd").to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
    pipeline("sd").save_pretrained(base, max_shard_size="100KB")
    for half in (tmp_path / "half").glob("*/*fp16*"):
        shutil.copyfile(half, base / half.relative_to(tmp_path / "half"))
    shards = sorted(path.name for path in (base / "unet").glob("*.safetensors"))
    assert len(shards) > 4
    monkeypatch.setattr(weights, "_CHUNK", 300)
    summary = merge(dynlora, base, tmp_path / "out", file)
    assert {"float16"} in map(set, summary["dtypes"].values())
    assert 0 < summary["rounding"] < 0.01
    assert shards == sorted(path.name for path in (tmp_path / "out" / "unet").glob("*.safetensors"))
    expected = outputs(fused(made("sd")[0], file))
    assert largest_difference(outputs(loaded(tmp_path / "out")), expected) < CLOSE
    half = loaded(tmp_path / "out", variant="fp16")
    assert largest_difference(outputs(half.to(torch.float32)), expected) < 0.05
    for name in shards:
        with safe_open(base / "unet" / name, "pt") as before, safe_open(tmp_path / "out" / "unet" / name, "pt") as now:
            assert set(before.keys()) == set(now.keys())


def test_what_holds_other_weights_is_left_out(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    """Pickles beside safetensors, a whole checkpoint, other tools' files: they hold what the pipeline was before."""
    for name in (
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "text_encoder/a.bin",
    ):
        (base / name).write_bytes(b"weights as they were")
    (base / "onnx").mkdir()
    (base / "README.md").write_text("mine")
    (base / "scheduler" / "more").mkdir()
    (base / "scheduler" / "more" / "note.bin").write_text("of a part that stays as it is")
    summary = merge(dynlora, base, tmp_path / "out", made("sd")[1])
    assert summary["left_out"] == [
        "onnx", "text_encoder/a.bin", "unet/diffusion_pytorch_model.bin", "unet/model.onnx", "v1-5-pruned.safetensors",
    ]  # fmt: skip
    assert {"README.md", "scheduler/more/note.bin"} <= contents(tmp_path / "out").keys()
    assert not list((tmp_path / "out" / "unet").glob("*.bin"))


def test_an_encoder_without_the_level_that_transformers_took_away(
    base: Path, made: Any, tmp_path: Path, dynlora: Dynlora
):
    """Of the names in the files, both kinds are found."""
    file = base / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    level = "text_model."
    other = {
        name.removeprefix(level) if name.startswith(level) else level + name: tensor for name, tensor in tensors.items()
    }
    save_file(other, file, {"format": "pt"})
    merge(dynlora, base, tmp_path / "out", made("sd")[1])
    merge(dynlora, made("sd")[0], tmp_path / "plain", made("sd")[1])
    now, plain = (load_file(tmp_path / name / "text_encoder" / "model.safetensors") for name in ("out", "plain"))
    assert now.keys() == other.keys()
    assert all(
        tensor.equal(now[name.removeprefix(level) if name.startswith(level) else level + name])
        for name, tensor in plain.items()
    )


def test_a_whole_pipeline_draws_the_same_picture(made: Any, tmp_path: Path, dynlora: Dynlora):
    """With a VAE and a tokenizer, from a text to pixels."""
    from transformers import CLIPTokenizer

    words = {
        word: number
        for number, word in enumerate(["<|startoftext|>", "<|endoftext|>", *"abcdef", *(f"{c}</w>" for c in "abcdef")])
    }
    pipe = pipeline("sd")
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe.register_modules(vae=vae, tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=8))
    pipe.save_pretrained(tmp_path / "whole")
    merge(dynlora, tmp_path / "whole", tmp_path / "out", made("sd")[1])

    def picture(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "pt"}
        return pipe("a bad cab", generator=torch.Generator().manual_seed(0), **how).images

    expected = picture(fused(tmp_path / "whole", made("sd")[1]))
    assert (picture(loaded(tmp_path / "whole")) - expected).abs().max() > 0.01
    assert (picture(loaded(tmp_path / "out")) - expected).abs().max() < CLOSE
    assert {"vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"} <= contents(
        tmp_path / "out"
    ).keys()


def test_a_layer_whose_kernel_is_one_is_linear(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    """An adapter of a linear layer goes into a 1 x 1 convolution, which is the same."""
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(16, 2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    merge(dynlora, base, tmp_path / "out", tmp_path / "pytorch_lora_weights.safetensors")
    before, after = (
        load_file(folder / SINGLE)["mid_block.attentions.0.proj_in.weight"] for folder in (base, tmp_path / "out")
    )
    delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    assert before.ndim == 4
    assert torch.allclose(after - before, delta[:, :, None, None], atol=1e-5)


def test_another_pipelines_adapter_is_refused_before_anything_is_written(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, dynlora: Dynlora
):
    out = tmp_path / "out"
    told = {
        kind: refused(dynlora, "--adapter", made(kind)[1], "--base", made("sd")[0], "--out", out)
        for kind in ("sdxl", "dit")
    }
    assert "has no layer" in told["sdxl"]
    assert "more of" in told["sdxl"]
    assert "adapts transformer, and the pipeline in" in told["dit"]
    assert "has no such part: it has scheduler, text_encoder, unet" in told["dit"]
    wrong = {name: tensor for name, tensor in load_file(made("sd")[1]).items() if "conv_in" not in name}
    key = "unet.mid_block.resnets.0.conv1.lora_A.weight"
    wrong[key] = torch.zeros(wrong[key].shape[0], 16, 1, 1)
    save_file(wrong, tmp_path / "wrong.safetensors")
    shapes = refused(dynlora, "--adapter", tmp_path / "wrong.safetensors", "--base", made("sd")[0], "--out", out)
    assert "mid_block.resnets.0.conv1.weight is 16 x 16 x 3 x 3" in shapes
    assert "16 x 16 x 1 x 1 in the adapter" in shapes
    assert not out.exists()


def test_what_is_no_pipeline_is_refused(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    file, out = made("sd")[1], tmp_path / "out"

    def told(name: object) -> str:
        return refused(dynlora, "--adapter", file, "--base", name, "--out", out)

    for name in ("sd15.safetensors", "sd15.ckpt"):
        (tmp_path / name).write_bytes(b"")
        assert "is a whole pipeline in one file" in told(tmp_path / name)
    assert "from_single_file" in told(tmp_path / "sd15.ckpt")
    assert "does not exist" in told("stabilityai/sdxl")
    assert "hf download" in told("stabilityai/sdxl")
    assert "holds no model_index.json" in told(base / "unet")
    assert f"name the folder of all its parts: {base}" in told(base / "unet")
    lonely = shutil.copytree(base / "unet", tmp_path / "lonely")
    assert "it seems to be one model" in told(lonely)
    assert "does not say which pipeline it is for" in refused(dynlora, "--adapter", file, "--out", out)
    assert not out.exists()


def test_a_pipeline_that_is_not_whole_is_refused(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    file, out = made("sd")[1], tmp_path / "out"

    def told(code: int = 2) -> str:
        return refused(dynlora, "--adapter", file, "--base", base, "--out", out, code=code)

    weights = base / SINGLE
    weights.rename(weights.with_suffix(".bin"))
    assert "is a pickle, which can run any code when it is opened; it was not" in told()
    weights.with_suffix(".bin").unlink()
    assert "unet holds no weights" in told()
    weights.write_bytes((made("sd")[0] / SINGLE).read_bytes()[:-10])
    assert "cut off" in told()
    index = weights.parent / "diffusion_pytorch_model.safetensors.index.json"
    weights.unlink()
    for name, code, words in (("lost-1-of-2.safetensors", 3, "lacks lost-1"), ("../../x", 2, "outside its folder")):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        assert words in told(code)
    shutil.rmtree(base / "unet")
    assert "lacks the folder unet, which its model_index.json names" in told()
    assert not out.exists()


def test_quantized_numbers_are_not_added_to(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    tensors = load_file(base / SINGLE)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, base / SINGLE)
    told = refused(dynlora, "--adapter", made("sd")[1], "--base", base, "--out", tmp_path / "out")
    assert "float8_e4m3fn, and adding to it would round it once more" in told


def test_what_does_not_fit_half_precision_is_not_kept(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    tensors = {name: tensor.half() for name, tensor in load_file(base / SINGLE).items()}
    tensors["conv_in.weight"][0, 0, 0, 0] = 65504
    save_file(tensors, base / SINGLE)
    name = "unet.conv_in"
    large = {f"{name}.lora_A.weight": torch.ones(1, 4, 3, 3), f"{name}.lora_B.weight": 100 * torch.ones(8, 1, 1, 1)}
    save_file(large, tmp_path / "pytorch_lora_weights.safetensors")
    told = refused(
        dynlora, "--adapter", tmp_path / "pytorch_lora_weights.safetensors", "--base", base, "--out", tmp_path / "out",
        code=4,
    )  # fmt: skip
    assert "conv_in.weight becomes too large for float16" in told
    assert not (tmp_path / "out").exists()


def test_links_out_of_the_pipeline_are_not_followed(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    """A file of this machine would be copied to where others read it; weights may be links, as people save room so."""
    (tmp_path / "secret.json").write_text("{}")
    link = base / "scheduler" / "notes.json"
    link.symlink_to(tmp_path / "secret.json")
    words = ("--adapter", made("sd")[1], "--base", base, "--out", tmp_path / "out")
    assert "is a link out of its folder" in refused(dynlora, *words)
    link.unlink()
    (base / SINGLE).rename(tmp_path / "elsewhere.safetensors")
    (base / SINGLE).symlink_to(tmp_path / "elsewhere.safetensors")
    merge(dynlora, base, tmp_path / "out", made("sd")[1])
    assert not (tmp_path / "out" / SINGLE).is_symlink()


def test_where_the_result_may_go(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    file = made("sd")[1]
    words = ("--adapter", file, "--base", base)
    assert "name one with --out" in refused(dynlora, *words)
    assert "lies in the pipeline that is read" in refused(dynlora, *words, "--out", base / "merged")
    assert "is not empty" in refused(dynlora, *words, "--out", base)
    assert "holds no dynlora.json of it" in refused(dynlora, *words, "--out", base, "--overwrite")
    merge(dynlora, base, tmp_path / "out", file)
    assert "is not empty" in refused(dynlora, *words, "--out", tmp_path / "out")
    merge(dynlora, base, tmp_path / "out", file, more=("--overwrite",))
    assert "would replace" in refused(
        dynlora, "--adapter", file, "--base", tmp_path / "out", "--out", tmp_path / "out", "--overwrite"
    )
    assert "--dtype is for language models" in refused(dynlora, *words, "--out", tmp_path / "x", "--dtype", "float16")
    assert not (tmp_path / "x").exists()
    assert not (base / "merged").exists()


def test_a_merged_pipeline_takes_another_adapter(base: Path, made: Any, tmp_path: Path, dynlora: Dynlora):
    """What merge writes is a pipeline like any other."""
    other = save_lora("sd", tmp_path / "other", rank=3, seed=5)
    merge(dynlora, base, tmp_path / "one", made("sd")[1])
    merge(dynlora, tmp_path / "one", tmp_path / "two", other)
    expected = fused(base, made("sd")[1], other, scales=(1.0, 1.0))
    assert largest_difference(outputs(loaded(tmp_path / "two")), outputs(expected)) < CLOSE


def test_other_commands_refuse_the_adapter_and_not_its_base(made: Any, tmp_path: Path, dynlora: Dynlora):
    base, file = made("sd")
    done = dynlora("eval", "--adapter", file, "--base", base, "--data", tmp_path / "rows.jsonl")
    assert done.code == 2
    assert "is an adapter for a diffusion pipeline, which this does not take" in " ".join(done.err.split())
