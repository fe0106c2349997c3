"""An adapter that doc-to-lora writes from a document: stock PEFT computes what the network itself does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypernet_runs import document_recipe, hypernet_recipe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import model_folder, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import adapt_by_hypernet as command
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.hypernets.writing import open_writer
from dynlora_cli.models.tokenizer import load_tokenizer
from dynlora_cli.runs.folder import read_record

IDS = torch.arange(5, 45).view(2, 20)
SHORT, LONG = "the cat sat", "the cat sat on the mat and the dog on the fox, " * 3
RANK, MOST = 4, 6  # of `document_recipe`


@dataclass
class Text:
    """A document that was read."""

    texts: tuple[str, ...]
    name: str = "guide.md"
    sha256: str = "0" * 64

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a hypernetwork whose every number has moved; not to be changed."""
    folder = tmp_path_factory.mktemp("hypernet")
    train(document_recipe(folder, "train.learning_rate=2e-2"))
    return folder / "out"


def adapt(hypernet: Path, out: Path, *texts: str, **options: object) -> dict:
    documents = [Text((text,)) for text in texts]
    return command.run(command.Request(hypernet, out, documents=documents, **options))  # type: ignore[arg-type]


def updates(hypernet: Path, text: str) -> dict[str, torch.Tensor]:
    """BA of each layer as the network writes it, in fp64."""
    read = read_hypernet(hypernet)
    conditions = open_writer(read).conditions
    activations = conditions.of([conditions.of_text(text)])  # type: ignore[attr-defined]
    with torch.no_grad():
        written = read.net.double()(activations._replace(inputs_NLTD=activations.inputs_NLTD.double()))
    return {name: (w.b @ w.a)[0] for name, w in written.items()}


def peft_logits(folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model = PeftModel.from_pretrained(base, str(folder)).double().eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("text", [SHORT, LONG])
def test_stock_peft_gives_the_networks_own_logits(trained: Path, tmp_path: Path, text: str):
    summary = adapt(trained, tmp_path / "a", text, budget=parse_budget("1000k"))
    model = AutoModelForCausalLM.from_pretrained(read_adapter(tmp_path / "a").base_name).double()
    with torch.no_grad():
        base = model(IDS).logits
        for name, update in updates(trained, text).items():
            model.get_submodule(name).weight += update
        want = model(IDS).logits
    torch.testing.assert_close(peft_logits(tmp_path / "a"), want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert (base - want).abs().max() > 1e-2 * want.abs().max(), "the adapter does something"
    assert summary["peft_check"]["problem"] is None
    assert set(summary["ranks"].values()) == {(summary["chunks"] + 1) * RANK}


def test_a_long_document_is_cut_into_chunks_that_each_have_components(trained: Path, tmp_path: Path):
    tokens = len(load_tokenizer(trained)(LONG, add_special_tokens=False).input_ids)
    long, short = (adapt(trained, tmp_path / out, text) for out, text in (("long", LONG), ("short", SHORT)))
    assert long["chunks"] == -(-tokens // MOST) > short["chunks"]
    per_chunk = read_hypernet(trained).form.budget
    for summary in (long, short):
        allowed = per_chunk * (summary["chunks"] + 1)
        assert summary["parameters"] <= allowed < summary["parameters_start"]
    assert adapt(trained, tmp_path / "small", LONG, budget=parse_budget(1))["parameters"] < short["parameters"]


def test_documents_get_adapters_of_their_own_and_the_same_one_the_same_bytes(trained: Path, tmp_path: Path):
    for out, text in (("a", LONG), ("again", LONG), ("b", SHORT)):
        adapt(trained, tmp_path / out, text)
    a, again, b = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("a", "again", "b"))
    assert a == again
    assert a != b


def test_several_documents_are_read_one_after_the_other_and_on_record(trained: Path, tmp_path: Path):
    adapt(trained, tmp_path / "two", SHORT, LONG)
    adapt(trained, tmp_path / "one", f"{SHORT}\n\n{LONG}")
    two, one = (read_adapter(tmp_path / name).layers for name in ("two", "one"))
    assert all(torch.equal(two[name].b_OC, one[name].b_OC) for name in two)
    written = read_record(tmp_path / "two")["written"]
    assert [each["characters"] for each in written["documents"]] == [len(SHORT), len(LONG)]
    assert written["documents"][0] == {"name": "guide.md", "sha256": "0" * 64, "characters": len(SHORT)}
    assert written["method"] == "doc-to-lora"


def test_another_base_is_refused(trained: Path, tmp_path: Path):
    other = Path(shutil.copytree(model_folder(tmp_path), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="its numbers differ"):
        adapt(trained, tmp_path / "a", SHORT, base_name=str(other))
    assert not (tmp_path / "a").exists()


def test_what_it_cannot_be_written_from_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="writes adapters from documents"):
        command.run(command.Request(trained, tmp_path / "a", description="Say it."))
    with pytest.raises(DataError, match="no text to read"):
        adapt(trained, tmp_path / "a", "")
    train(hypernet_recipe(tmp_path, "train.max_steps=2", out="described"))
    with pytest.raises(UsageError, match="writes adapters from descriptions"):
        adapt(tmp_path / "described", tmp_path / "a", SHORT)
    shutil.copytree(trained, tmp_path / "strange")
    path = tmp_path / "strange" / "hypernet.json"
    path.write_text(path.read_text().replace("layers.1.", "layers.7."))
    with pytest.raises(UsageError, match="no such block"):
        adapt(tmp_path / "strange", tmp_path / "a", SHORT)


def test_a_damaged_network_is_refused_or_read_by_what_its_keys_stand_for(trained: Path, tmp_path: Path):
    folder = Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints")))
    form = json.loads((folder / "hypernet.json").read_text())
    encoder = {"name": "base", "fingerprint": "x"}
    (folder / "hypernet.json").write_text(json.dumps(form | {"encoder": encoder}))
    with pytest.raises(UsageError, match="encoder: doc-to-lora reads a document"):
        adapt(folder, tmp_path / "a", SHORT)
    form["options"].pop("chunk")
    (folder / "hypernet.json").write_text(json.dumps(form))
    assert adapt(folder, tmp_path / "a", LONG)["chunks"] == 1, "the 512 tokens that the key has where nobody says more"
