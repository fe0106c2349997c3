"""Wrong adapters: one clear message, the right exit code, nothing written, no pickle opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora, contents
from numeric import assert_close_to_truth, in_double, rounding
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft_adapters import SAME_LOGITS, TERMS, base_model, ids, load, make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from dynlora_cli.adapters.find import find_adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.evaluation.agreement import agreement


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make("lora", tmp_path)[1]


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    """A pickle that would leave a mark if it were opened."""
    (folder / "adapter_model.safetensors").unlink()

    class Mark:
        def __reduce__(self):
            return os.mkdir, (str(folder / "opened"),)

    torch.save(Mark(), folder / "adapter_model.bin")


def first(tensors: dict) -> str:
    return next(iter(tensors))


DAMAGES = {
    "cut off": (cut_off, 2, "damaged or cut off"),
    "pickle": (pickle_only, 2, "is a pickle"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), 2, "no adapter_model.safetensors"),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), 2, "is damaged"),
    "NaN": (lambda f: rewrite(f, lambda t: t[first(t)].view(-1)[:1].fill_(float("nan"))), 4, "NaN"),
    "other rank": (lambda f: edit(f, r=5), 2, "rank 4 in adapter_model.safetensors and 5"),
    "half a layer": (lambda f: rewrite(f, lambda t: t.pop(first(t))), 2, "lacks its lora_A"),
    "strange tensor": (lambda f: rewrite(f, lambda t: t.update({"x.lora_E": torch.ones(2)})), 2, "not understood"),
    "another method": (lambda f: edit(f, peft_type="LOHA"), 2, "peft_type is LOHA"),
    "aLoRA": (lambda f: edit(f, alora_invocation_tokens=[1, 2]), 2, "alora_invocation_tokens"),
    "bias": (lambda f: edit(f, bias="some"), 2, "bias"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), 2, "changed the base model's weights"),
    "bad pattern": (lambda f: edit(f, rank_pattern={"(": 3}), 2, "no regular expression"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter(name: str, adapter: Path, dynlora: Dynlora, tmp_path: Path):
    damage, code, message = DAMAGES[name]
    damage(adapter)
    before = contents(tmp_path)
    for command in (["merge"], ["prune", "--budget", "0.5"], ["export", "--to", "peft"]):
        answer = dynlora(*command, "--adapter", adapter, "--out", tmp_path / "new", "--json")
        assert answer.code == code, answer.err
        assert message in " ".join(answer.err.split())
        assert "Traceback" not in answer.err
        assert answer.json["ok"] is False
    assert dynlora("inspect", "--adapter", adapter).code == code
    assert contents(tmp_path) == before, "nothing was written, and no pickle was opened"
    assert not (adapter / "opened").exists()


def test_a_folder_without_an_adapter(dynlora: Dynlora, tmp_path: Path):
    base = base_model("llama", tmp_path)
    for folder, message in (
        (tmp_path / "none", "does not exist"),
        (base, "holds a model, not an adapter"),
        (base / "config.json", "is a file"),
    ):
        answer = dynlora("merge", "--adapter", folder)
        assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in dynlora("merge", "--adapter", tmp_path / "empty").err


def test_adalora_is_named_and_refused(tmp_path: Path):
    model = get_peft_model(
        load(base_model("llama", tmp_path)), AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4)
    )
    model.save_pretrained(tmp_path / "ada")
    with pytest.raises(UsageError, match="ADALORA"):
        read_adapter(tmp_path / "ada")


def test_the_base_is_missing_or_another(adapter: Path, dynlora: Dynlora, tmp_path: Path):
    base = tmp_path / "base-llama"
    other = base_model("gpt2", tmp_path)
    answer = dynlora("merge", "--adapter", adapter, "--base", other)
    assert (answer.code, "has no layer model.layers.0" in " ".join(answer.err.split())) == (2, True), answer.err
    shutil.move(base, tmp_path / "moved")
    answer = dynlora("merge", "--adapter", adapter)
    assert (answer.code, "--base FOLDER" in answer.err) == (3, True), answer.err
    assert dynlora("merge", "--adapter", adapter, "--base", tmp_path / "moved").code == 0
    shutil.rmtree(adapter / "merged")
    shard = tmp_path / "moved" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    answer = dynlora("merge", "--adapter", adapter, "--base", tmp_path / "moved")
    assert (answer.code, "cut off" in answer.err) == (2, True), answer.err
    shard.rename(shard.with_name("pytorch_model.bin"))
    answer = dynlora("merge", "--adapter", adapter, "--base", tmp_path / "moved")
    assert (answer.code, "pickle" in answer.err) == (2, True), answer.err
    assert not (adapter / "merged").exists()
    assert not list(adapter.glob(".merged*"))


def test_a_base_of_other_shapes(adapter: Path, tmp_path: Path, dynlora: Dynlora):
    path = tmp_path / "base-llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 56}))
    answer = dynlora("merge", "--adapter", adapter)
    assert (answer.code, "56" in answer.err) == (2, True), answer.err


def test_the_newest_run_below_a_folder_is_found_and_named(tmp_path: Path, adapter: Path, dynlora: Dynlora):
    for name, age in (("old", 100), ("new", 0)):
        run = tmp_path / "out" / name
        shutil.copytree(adapter, run)
        (run / "dynlora.json").write_text(json.dumps({"name": name}))
        stamp = (run / "dynlora.json").stat().st_mtime - age
        os.utime(run / "dynlora.json", (stamp, stamp))
    # what lies inside a run is not a run
    shutil.copytree(adapter, tmp_path / "out" / "old" / "checkpoints" / "step-9")
    folder, note = find_adapter(tmp_path / "out")
    assert folder == tmp_path / "out" / "new"
    assert note is not None
    assert str(folder) in note
    assert str(folder) in dynlora("inspect", "--adapter", tmp_path / "out").err


@pytest.mark.parametrize("below", ["checkpoints", "checkpoints/run", "a/checkpoints/checkpoint-500"])
def test_any_folder_may_be_called_checkpoints(below: str, tmp_path: Path, adapter: Path):
    shutil.copytree(adapter, tmp_path / "data" / below / "it")
    for start in ("data", "data/" + below.split("/")[0]):
        assert find_adapter(tmp_path / start)[0] == tmp_path / "data" / below / "it"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_reward_model_has_one_output(tmp_path: Path, dynlora: Dynlora):
    base = base_model("bert", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "reward")
    answer = dynlora("merge", "--adapter", tmp_path / "reward", "--json")
    assert answer.code == 0, answer.err
    assert 0 <= answer.json["check"]["kl"] < rounding(torch.float32, 64)
    with torch.no_grad():
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward" / "merged")
        assert_close_to_truth(merged(ids()).logits, in_double(model).eval()(ids()).logits, terms=TERMS)
    one, other = ([torch.full((1, 1), value)] for value in (0.0, 5.0))
    assert agreement(one, other, [ids()[:1, :3]]).kl > 1, "a single logit can differ"


def test_an_unfinished_run_gives_its_best_and_then_its_last_checkpoint(tmp_path: Path, adapter: Path):
    run = tmp_path / "run"
    for step in (3, 7):
        shutil.copytree(adapter, run / "checkpoints" / f"step-{step}")
    (run / "checkpoints" / "last").write_text("step-7\n")
    assert find_adapter(run)[0].name == "step-7"
    (run / "checkpoints" / "best").write_text("step-3\n")
    folder, note = find_adapter(run)
    assert folder.name == "step-3"
    assert note is not None
    assert "best checkpoint" in note


def test_not_finite_numbers_are_a_failed_measurement(adapter: Path):
    rewrite(adapter, lambda tensors: tensors[first(tensors)].view(-1)[:1].fill_(float("inf")))
    with pytest.raises(MeasureError):
        read_adapter(adapter)


def test_a_vera_takes_its_shapes_from_the_base(tmp_path: Path, dynlora: Dynlora):
    base, vera = make("vera", tmp_path)
    base.rename(tmp_path / "moved")
    answer = dynlora("inspect", "--adapter", vera)
    assert (answer.code, str(base) in "".join(answer.err.split())) == (2, True), answer.err
    answer = dynlora("merge", "--adapter", vera, "--base", tmp_path / "moved", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["check"]["max_logit_difference"] < SAME_LOGITS
    answer = dynlora("merge", "--adapter", vera, "--base", base_model("gpt2", tmp_path), "--out", tmp_path / "x")
    assert (answer.code, "this is another base model" in " ".join(answer.err.split())) == (2, True), answer.err


KIND_DAMAGES = [
    ("vera", lambda t: t.pop("base_model.vera_A"), "save_projection=True"),
    ("vera", lambda t: t.pop(next(k for k in t if k.endswith("lambda_b"))), "lacks its vera_lambda_b"),
    ("vera", lambda t: t.update({k: t[k][:-1] for k in list(t) if k.endswith("lambda_d")}), "does not fit vera_A"),
    ("vera", lambda t: [t[k].zero_() for k in t if k.endswith("lambda_d")], "zeros only"),
    ("hira", lambda t: t.pop(next(k for k in t if k.endswith("hira_B"))), "lacks its hira_A or hira_B"),
    ("hira", lambda t: t.update({k: t[k][:, 1:] for k in list(t) if k.endswith("hira_B")}), "has factors"),
    ("hira", lambda t: t.update({"x.hira_embedding_A": torch.ones(2)}), "not understood"),
]


@pytest.mark.parametrize(("kind", "change", "message"), KIND_DAMAGES)
def test_a_damaged_vera_or_hira(kind: str, change, message: str, tmp_path: Path, dynlora: Dynlora):
    _, folder = make(kind, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    answer = dynlora("inspect", "--adapter", folder)
    assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
