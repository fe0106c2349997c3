"""Any LoRA in PEFT's layout: read, attached and folded into its base, against what stock PEFT computes."""

from __future__ import annotations

import json
import shutil
import weakref

import peft_adapters
import pytest
import torch
from numeric import assert_close_to_truth
from peft_adapters import KINDS, SAME_LOGITS, TERMS, ids, make, peft_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Model

from dynlora_cli.adapters.attach import attached, detached
from dynlora_cli.adapters.base import find_base
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.commands.merge import into_base
from dynlora_cli.errors import UsageError
from dynlora_cli.merging.fold import plan_merge, write_merged
from dynlora_cli.models import weights
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.streamed import read_by, reader, streamed, unreadable
from dynlora_cli.models.weights import Weights


def merge(adapter, folder):
    place = find_base(adapter)
    folder.mkdir()
    plan = plan_merge(adapter, place)
    write_merged(plan, adapter, place, folder)
    return plan, place


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_computes_what_peft_computes(kind, tmp_path):
    base, folder = make(kind, tmp_path)
    expected = peft_logits(base, folder)
    merge(read_adapter(folder), tmp_path / "merged")
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert_close_to_truth(model.eval()(ids()).logits, expected, terms=TERMS)
    if kind not in ("tied", "embedding", "scaled-embedding"):  # PEFT's own merge loses one half of a tied pair
        assert_close_to_truth(peft_logits(base, folder, merged=True), expected, terms=TERMS, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_row_by_row_is_what_is_made_whole(kind, tmp_path, monkeypatch):
    """Tensors here are smaller than what is made at once, so that is made smaller: two rows or so."""
    _, folder = make(kind, tmp_path)
    monkeypatch.setattr(weights, "_CHUNK", 300)
    plan, _ = merge(read_adapter(folder), tmp_path / "merged")
    written = Weights(tmp_path / "merged")
    assert set(written.entries) == set(plan.tensor_names())
    for name in plan.tensor_names():
        whole = plan.read(name).to(written.entries[name].dtype)
        # Both in fp32, by products of other shapes: what was meant to be the same number may differ in its last bits.
        assert_close_to_truth(written.read(name), whole.double(), terms=2 * 48)
        if written.entries[name].shape[0] > 4:
            torch.testing.assert_close(written.read(name, rows=(2, 4)), written.read(name)[2:4], atol=0, rtol=0)


def test_a_piece_that_cannot_be_written_ends_the_writing(tmp_path, monkeypatch):
    _, folder = make("lora", tmp_path)
    monkeypatch.setattr(weights, "_CHUNK", 300)
    threads, real, calls = torch.get_num_threads(), weights._write, []

    def full(*given):
        calls.append(given)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr(weights, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        merge(read_adapter(folder), tmp_path / "merged")
    # Workers may take pieces out of order by their number; what was queued then may still be written, and no more.
    assert len(calls) <= 40 + weights._WORKERS + weights._AHEAD + 1
    assert torch.get_num_threads() == threads


def test_tensors_made_whole_are_in_memory_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 300)
    alive, most = [], [0]

    def make():
        made = torch.ones(50, 50)
        alive.append(weakref.ref(made.untyped_storage()))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return made

    save_file({f"{name}.weight": torch.zeros(50, 50) for name in "abcd"}, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    old = Weights(tmp_path)
    changed = {name: weights.New(torch.float32, (50, 50), make) for name in old.entries}
    weights.write_like(old, tmp_path / "out", changed, {})
    assert most == [1]
    assert all((tensor == 1).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_attached_adapter_computes_what_peft_computes_and_leaves_no_trace(kind, tmp_path):
    base, folder = make(kind, tmp_path)
    expected = peft_logits(base, folder)
    model = peft_adapters.load(base, kind == "classifier")
    adapter = read_adapter(folder)
    with torch.no_grad():
        before = model(ids()).logits
        with attached(model, adapter) as pool:
            found = model(ids()).logits
            again = detached(adapter, pool)
        assert_close_to_truth(found, expected, terms=TERMS)
        assert torch.equal(model(ids()).logits, before)
    assert (before - expected).abs().max() > 0.05, "the adapter does something"
    assert again.ranks == adapter.ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_models_compute_the_same_without_holding_weights(kind, tmp_path):
    base, folder = make(kind, tmp_path)
    adapter = read_adapter(folder)
    place = find_base(adapter)
    weights = Weights(place.folder)
    expected = peft_logits(base, folder)
    model = streamed(place)
    assert not any(p.device.type != "meta" for p in model.parameters())
    layout = Layout(weights, model)
    assert not unreadable(layout, adapter.whole)
    read = reader(layout, adapter.whole)
    read_by(model, read)
    with torch.no_grad(), attached(model, adapter, device=torch.device("cpu"), read=read, whole=False):
        assert_close_to_truth(model(ids()).logits, expected, terms=TERMS)
    assert not any(p.device.type != "meta" for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_again_is_read_by_peft_with_the_same_result(kind, tmp_path):
    base, folder = make(kind, tmp_path)
    expected = peft_logits(base, folder)
    (tmp_path / "again").mkdir()
    save(read_adapter(folder), tmp_path / "again")
    assert_close_to_truth(peft_logits(base, tmp_path / "again"), expected, terms=TERMS, dtype=torch.float32)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    if "hira" in kind:  # which has no scale
        assert "lora_alpha" not in config
    else:
        assert config["r"] == config["lora_alpha"]
        assert config["rank_pattern"] == config["alpha_pattern"]


def test_shards_and_types_stay_as_they_were(tmp_path):
    base, folder = make("lora", tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    merge(read_adapter(folder), tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    before, after = Weights(base), Weights(tmp_path / "merged")
    assert {n: (e.file.name, e.dtype, e.shape) for n, e in before.entries.items()} == {
        n: (e.file.name, e.dtype, e.shape) for n, e in after.entries.items()
    }
    changed = {name for name in before.entries if not torch.equal(before.read(name), after.read(name))}
    assert changed == {f"{name}.weight" for name in read_adapter(folder).layers}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_close_to_truth(model(ids()).logits, peft_logits(base, folder), terms=TERMS)


def test_one_shard_with_an_index(tmp_path, dynlora):
    base, adapter = make("lora", tmp_path)
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(base / name), name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    answer = dynlora("merge", "--adapter", adapter, "--out", tmp_path / "merged")
    assert answer.code == 0, answer.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close_to_truth(merged(ids()).logits, peft_logits(base, adapter), terms=TERMS)


def test_experts_kept_together_in_memory_and_apart_on_disk(tmp_path):
    """Mixtral: its attention is merged; the check reads the experts of one block at a time."""
    base, folder = make("experts", tmp_path)
    adapter = read_adapter(folder)
    place = find_base(adapter)
    assert not unreadable(Layout(Weights(place.folder), streamed(place)), {})
    summary = into_base(adapter, tmp_path / "merged")
    assert summary["check"]["max_logit_difference"] < SAME_LOGITS
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_close_to_truth(model(ids()).logits, peft_logits(base, folder), terms=TERMS)


@pytest.mark.parametrize("kind", ["conv1d", "tied-conv1d"])
def test_a_checkpoint_without_the_prefix_of_its_model(kind, tmp_path):
    """As GPT-2 on the hub: `h.0.attn.c_attn.weight`, with no `transformer.` before it, and no head."""
    base, folder = make(kind, tmp_path)
    expected = peft_logits(base, folder)
    GPT2Model.from_pretrained(base).save_pretrained(tmp_path / "bare")
    shutil.rmtree(base)
    (tmp_path / "bare").rename(base)
    assert "wte.weight" in Weights(base).entries
    into_base(read_adapter(folder), tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert_close_to_truth(model.eval()(ids()).logits, expected, terms=TERMS)


def test_another_revision_is_refused(tmp_path):
    """Snapshots of a hub model are folders that are named by their commit."""
    base, folder = make("lora", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"revision": "a" * 40}))
    for commit in ("a", "b"):
        shutil.copytree(base, tmp_path / "snapshots" / (commit * 40))
    assert find_base(read_adapter(folder), str(tmp_path / "snapshots" / ("a" * 40))).chosen
    with pytest.raises(UsageError, match="revision"):
        find_base(read_adapter(folder), str(tmp_path / "snapshots" / ("b" * 40)))
