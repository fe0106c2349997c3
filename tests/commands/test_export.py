"""`dynlora export`: every form read back as its consumer does, and what a consumer cannot read is refused with advice."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora, contents
from gguf import GGUFReader
from numeric import assert_close_to_truth, rounding
from peft_adapters import SAME_LOGITS, TERMS, ids, make, peft_logits
from safetensors.torch import load_file
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.commands import export
from dynlora_cli.errors import UsageError
from dynlora_cli.export import exporter as exporter_module
from dynlora_cli.export.stacked import sgmv_rank

OF_LIBRARY = {"vllm-library"}  # see test_export_library.py
OF_PIPELINES = {"diffusers", "kohya"}  # see tests/export/test_export_images.py
FORMS = sorted(set(plugins.names("exporters")) - OF_LIBRARY - OF_PIPELINES)
GGUF = ("gguf", "merged-gguf", "ollama")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose layers have several ranks, some of them 0."""
    recipe = make_recipe(tmp_path_factory.mktemp("mixed"), "rank.budget=0.2", "train.learning_rate=2e-2")
    summary, _ = train(recipe)
    assert 0 in summary["ranks"].values()
    assert len(set(summary["ranks"].values())) > 2
    return Path(recipe.output_dir)


def test_all_forms_of_the_design_are_there():
    assert set(FORMS) == {
        "peft",
        "uniform",
        "vllm",
        "sglang",
        "tgi",
        "lorax",
        "gguf",
        "ollama",
        "merged",
        "mlx",
        "merged-gguf",
        "packed",
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_rank_run_in_every_form(form: str, mixed: Path, tmp_path: Path, dynlora: Dynlora):
    before = contents(mixed)
    out = tmp_path / "out"
    answer = dynlora("export", "--adapter", mixed, "--to", form, "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert contents(mixed) == before
    record = json.loads((out / "export.json").read_text())
    assert record == answer.json
    rounded = {"merged-gguf": 0.05, "ollama": 0.05, "packed": 2.0}  # 4 bits of an update that is large here
    assert record["max_logit_difference"] < rounded.get(form, SAME_LOGITS)
    assert record["ranks"] == read_adapter(mixed).ranks
    files = contents(out)
    files.pop("export.json")
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == {
        name: file["sha256"] for name, file in record["files"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["peft", "uniform", "vllm", "sglang", "tgi", "lorax"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns"])
def test_stock_peft_computes_the_same_with_every_adapter_form(kind: str, form: str, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make(kind, tmp_path)
    answer = dynlora("export", "--adapter", adapter, "--to", form, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    expected = peft_logits(base, adapter)
    assert_close_to_truth(peft_logits(base, tmp_path / "out"), expected, terms=TERMS, dtype=torch.float32)


def test_lorax_gets_one_rank_and_no_holes(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("export", "--adapter", mixed, "--to", "lorax", "--out", tmp_path / "out", "--json")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shapes: dict[str, set[tuple[int, ...]]] = {}
    blocks: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        shapes.setdefault(kind, set()).add(tuple(tensor.shape))
        blocks.setdefault(kind, set()).add(re.findall(r"\.(\d+)\.", name)[0])
    assert all(len(found) == 1 for found in shapes.values()), "LoRAX stacks a type over all blocks"
    assert all(found == {"0", "1"} for found in blocks.values()), "and drops a type that a block lacks"
    assert answer.json["filled_layers"] > 0


def test_vllm_is_compact_and_names_the_rank_to_serve_with(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("export", "--adapter", mixed, "--to", "vllm", "--out", tmp_path / "out", "--json")
    assert "--max-lora-rank 8" in answer.err
    assert answer.json["max_lora_rank"] == 8
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(read_adapter(mixed).ranks.values())
    assert read_adapter(tmp_path / "out").ranks == read_adapter(mixed).ranks


def test_gguf_is_padded_to_one_rank_with_alpha_equal(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    dynlora("export", "--adapter", mixed, "--to", "gguf", "--out", tmp_path / "out")
    reader = GGUFReader(tmp_path / "out" / "adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    ranks = {int(t.shape[1 if t.name.endswith("lora_a") else 0]) for t in reader.tensors}
    assert ranks == {int(alpha)} == {max(read_adapter(mixed).ranks.values())}


def test_q8_is_smaller_and_close(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    half = dynlora("export", "--adapter", mixed, "--to", "merged-gguf", "--out", tmp_path / "h", "--json").json
    byte = dynlora(
        "export", "--adapter", mixed, "--to", "merged-gguf", "--outtype", "q8_0", "--out", tmp_path / "q", "--json"
    ).json
    assert byte["files"]["model.gguf"]["bytes"] < half["files"]["model.gguf"]["bytes"]
    assert half["check"]["kl"] < byte["check"]["kl"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "embedding", "whole-head", "conv1d", "classifier", "dora", "hira", "vera"])
def test_merged_takes_every_kind(kind: str, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make(kind, tmp_path)
    answer = dynlora("export", "--adapter", adapter, "--to", "merged", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["max_logit_difference"] < SAME_LOGITS
    if kind == "tied":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            assert_close_to_truth(model(ids()).logits, peft_logits(base, adapter), terms=TERMS)


REFUSED = [
    ("dora", "vllm", "is a DoRA"),
    ("dora", "uniform", "is a DoRA"),
    ("hira", "vllm", "is a HiRA"),
    ("hira", "uniform", "is a HiRA"),
    ("hira", "lorax", "is a HiRA"),
    ("hira", "gguf", "is a HiRA"),
    ("embedding", "gguf", "embedding"),
    ("whole-head", "vllm", "whole tensors"),
    ("classifier", "lorax", "whole tensors"),
    ("classifier", "merged-gguf", "bert"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form", "message"), REFUSED)
def test_what_a_consumer_cannot_read_is_refused_with_advice(kind, form, message, tmp_path: Path, dynlora: Dynlora):
    _, adapter = make(kind, tmp_path)
    before = contents(tmp_path)
    answer = dynlora("export", "--adapter", adapter, "--to", form, "--out", tmp_path / "out", "--json")
    assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
    assert "hint:" in answer.err
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "hira", "conv1d-hira", "vera"])
def test_for_peft_it_stays_what_it_is_or_becomes_the_same_lora(kind: str, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make(kind, tmp_path)
    assert dynlora("export", "--adapter", adapter, "--to", "peft", "--out", tmp_path / "out").code == 0
    expected = peft_logits(base, adapter)
    assert_close_to_truth(peft_logits(base, tmp_path / "out"), expected, terms=TERMS, dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_without_the_base_on_this_machine(form: str, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make("patterns", tmp_path)
    shutil.rmtree(base)
    answer = dynlora("export", "--adapter", adapter, "--to", form, "--out", tmp_path / "out", "--json")
    if form in ("peft", "uniform", "vllm", "packed"):
        assert answer.code == 0, answer.err
        assert "logits are not" in answer.err
        assert answer.json["max_logit_difference"] is None
        assert answer.json["max_weight_difference"] < rounding(torch.float32, 16)
    else:
        assert (answer.code, "--base FOLDER" in answer.err) == (3, True), answer.err
        assert not (tmp_path / "out").exists()


def test_an_export_that_computes_something_else_is_withdrawn(
    mixed: Path, tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    exporter = plugins.load("exporters", "uniform")
    right = exporter.read_back

    def wrong(job, folder):
        found = right(job, folder)
        name = next(iter(found.layers))
        found.layers[name].b_OC.mul_(40.0)
        return found

    monkeypatch.setattr(exporter, "read_back", wrong)
    answer = dynlora("export", "--adapter", mixed, "--to", "uniform", "--out", tmp_path / "out", "--json")
    assert (answer.code, "nothing was kept" in answer.json["error"]) == (4, True), answer.err
    assert not list(tmp_path.iterdir())


def test_no_space_left(mixed: Path, tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export.whole, "write_json", full)
    answer = dynlora("export", "--adapter", mixed, "--to", "merged", "--out", tmp_path / "out")
    assert (answer.code, "no space left" in answer.err) == (3, True), answer.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_no_space_left_for_a_gguf(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    """numpy tells of a full disk without an error number, so a real one is needed: no file may grow beyond 30 kB."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
        "from dynlora_cli.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "export", "--adapter", mixed, "--to", "merged-gguf", "--out", tmp_path / "g"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "no space left" in done.stderr) == (3, True), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where no folder can be made")
def test_a_place_where_no_folder_can_be_made(mixed: Path, dynlora: Dynlora):
    answer = dynlora("export", "--adapter", mixed, "--to", "peft", "--out", "/proc/dynlora")
    assert (answer.code, "/proc" in answer.err, "Traceback" in answer.err) == (2, True, False), answer.err


def test_wrong_words(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    for options, message in ((["--to", "gguff"], "did you mean 'gguf'"), (["--to", "gguf", "--outtype", "q4"], "q8_0")):
        answer = dynlora("export", "--adapter", mixed, *options, "--out", tmp_path / "out")
        assert (answer.code, message in answer.err) == (2, True), answer.err


def test_gguf_is_an_extra(mixed: Path, tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    answer = dynlora("export", "--adapter", mixed, "--to", "gguf", "--out", tmp_path / "out")
    assert (answer.code, 'pip install "dynlora[gguf]"' in answer.err) == (3, True), answer.err
    assert not (tmp_path / "out").exists()


def test_sglang_finds_what_it_joins(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    """q, k and v together and of one rank, gate and up likewise, also where pruning left one of a kind in no block."""
    whole = read_adapter(mixed)
    some = {name: factors for name, factors in whole.layers.items() if not name.endswith(("v_proj", "up_proj"))}
    save(whole.with_layers(some), tmp_path)
    answer = dynlora("export", "--adapter", tmp_path, "--to", "sglang", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    ranks = read_adapter(tmp_path / "out").ranks
    assert len(set(ranks.values())) == 1
    for name in ranks:
        parent, _, leaf = name.rpartition(".")
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert leaf not in group or all(f"{parent}.{other}" in ranks for other in group)
    assert f"--max-lora-rank {max(ranks.values())}" in answer.err


def test_max_kl_of_0_is_0(mixed: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("export", "--adapter", mixed, "--to", "merged-gguf", "--max-kl", "0", "--out", tmp_path / "out")
    assert (answer.code, "more than 0" in " ".join(answer.err.split())) == (4, True), answer.err


@pytest.mark.parametrize("form", ["tgi", "lorax"])
def test_tgi_and_lorax_get_a_rank_that_they_do_not_fill_up(form: str, tmp_path: Path, dynlora: Dynlora):
    """They divide alpha by the rank in the config for the first module type, and by the filled-up one after it."""
    _, adapter = make("lora", tmp_path)
    assert set(read_adapter(adapter).ranks.values()) == {4}
    assert dynlora("export", "--adapter", adapter, "--to", form, "--out", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert [sgmv_rank(rank) for rank in (1, 8, 9, 16, 17, 40)] == [8, 8, 16, 16, 32, 48]


@pytest.mark.parametrize(
    ("form", "names", "said"),
    [
        ("tgi", ["lm_head"], "lm_head"),
        ("tgi", ["model.language_model.layers.0.self_attn.q_proj"], "would leave out without a word"),
        ("tgi", ["model.layers.0.mlp.gate_up_proj"], "mlp.gate_up_proj"),
        ("tgi", ["model.layers.0.self_attn.o_proj"], ""),
        ("sglang", ["transformer.h.0.attn.c_proj"], "leave out transformer.h.0.attn.c_proj"),
        ("sglang", ["model.layers.0.self_attn.q_proj"], "v_proj, which the base does not have"),
        ("sglang", ["vision.layers.0.o_proj", "text.layers.0.o_proj"], "in the place of"),
        ("sglang", ["model.layers.0.self_attn.o_proj", "lm_head", "model.layers.0.experts.0.o_proj"], ""),
    ],
)
def test_layers_that_a_server_would_not_find(form: str, names: list[str], said: str, tmp_path: Path):
    """Names as TGI's build_layer_weight_lookup and SGLang's LoRAAdapter look for them, on a base of these layers."""
    layers = {name: Factors(torch.ones(2, 3), torch.ones(4, 2)) for name in names}
    adapter = read_adapter(make("lora", tmp_path)[1]).with_layers(layers)
    shapes = dict.fromkeys([*names, "model.layers.0.self_attn.o_proj"], (3, 4))
    job = exporter_module.Job(adapter, None, None, None, shapes, merged=lambda: pytest.fail("not asked for"))
    (tmp_path / "out").mkdir()
    exporter = plugins.load("exporters", form)
    if not said:
        exporter.write(job, tmp_path / "out")
        assert set(names) <= set(exporter.read_back(job, tmp_path / "out").layers)
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        exporter.write(job, tmp_path / "out")
