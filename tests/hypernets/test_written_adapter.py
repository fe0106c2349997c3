"""An adapter that a hypernetwork writes: stock PEFT computes what the network itself does, and nothing else is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from hypernet_runs import hypernet_recipe, texts_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import model_folder, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.find import find_origin
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import adapt_by_hypernet as command
from dynlora_cli.config.budget import Budget, parse_budget
from dynlora_cli.errors import DynloraError, MeasureError, UsageError
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.hypernets.layer import place_layers
from dynlora_cli.hypernets.writing import open_writer
from dynlora_cli.runs.folder import read_record

ALL = Budget("parameters", 1e9)
IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a hypernetwork whose every number has moved; not to be changed."""
    folder = tmp_path_factory.mktemp("hypernet")
    train(hypernet_recipe(folder, "train.learning_rate=3e-2"))
    return folder / "out"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def adapt(hypernet: Path, out: Path, description: str = texts_of("ones")[0], **options: object) -> dict:
    return command.run(command.Request(hypernet, out, description, **options))  # type: ignore[arg-type]


def own_logits(hypernet: Path, description: str) -> torch.Tensor:
    """Those of the base with the network before it, in fp64."""
    read = read_hypernet(hypernet)
    model = AutoModelForCausalLM.from_pretrained(read.form.base.reference).double()
    layers = place_layers(model, [layer.name for layer in read.form.layers])
    condition = open_writer(read).conditions.of([description])
    with torch.no_grad():
        for name, written in read.net.double()(condition.double()).items():
            layers[name].hold(written)
        return model(IDS).logits


def peft_logits(folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model = PeftModel.from_pretrained(base, str(folder)).double().eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("text", [texts_of("ones")[0], "A task that nobody trained on."])
def test_stock_peft_gives_the_networks_own_logits(trained: Path, tmp_path: Path, text: str):
    summary = adapt(trained, tmp_path / "a", text, budget=ALL)
    want = own_logits(trained, text)
    torch.testing.assert_close(peft_logits(tmp_path / "a"), want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert summary["parameters"] == summary["parameters_start"]
    assert summary["peft_check"]["problem"] is None
    base = AutoModelForCausalLM.from_pretrained(read_adapter(tmp_path / "a").base_name).double()
    assert (base(IDS).logits - want).abs().max() > 1e-2 * want.abs().max(), "the adapter does something"


def test_texts_get_adapters_of_their_own_and_the_same_text_the_same_bytes(trained: Path, tmp_path: Path):
    for out, word in (("a", "ones"), ("again", "ones"), ("b", "twos")):
        adapt(trained, tmp_path / out, texts_of(word)[0])
    a, again, b = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("a", "again", "b"))
    assert a == again
    assert a != b


def test_the_budget_leaves_the_largest_components(trained: Path, tmp_path: Path):
    whole = adapt(trained, tmp_path / "whole", budget=ALL)
    default = adapt(trained, tmp_path / "default")
    limit = read_hypernet(trained).form.budget
    assert default["parameters"] <= limit < whole["parameters"]
    small = adapt(trained, tmp_path / "small", budget=parse_budget(1))
    assert small["parameters"] <= limit / 2
    full, kept = read_adapter(tmp_path / "whole").layers, read_adapter(tmp_path / "small").layers
    values = torch.cat([factors.singular_values_C() for factors in full.values()]).sort(descending=True).values
    there = torch.cat([factors.singular_values_C() for factors in kept.values()]).sort(descending=True).values
    torch.testing.assert_close(there[:3], values[:3], rtol=1e-4, atol=0)
    few = adapt(trained, tmp_path / "few", budget=parse_budget("9kB"))
    assert few["adapter_bytes"] <= 9000


def test_where_it_comes_from_is_on_record(trained: Path, tmp_path: Path):
    adapt(trained, tmp_path / "a", "  Say it. ")
    written = read_record(tmp_path / "a")["written"]
    assert written["description"] == "Say it."
    assert written["sha256"] == sha256_of(trained / "hypernet.json")
    assert Path(written["hypernet"]) == trained.resolve()
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert "Say it." in (tmp_path / "a" / "README.md").read_text()
    assert read_adapter(tmp_path / "a").name == "a"


def test_the_folder_of_a_network_says_what_it_is(trained: Path, dynlora: Dynlora, tmp_path: Path):
    answer = dynlora("inspect", "--adapter", trained, "--json")
    (found,) = answer.json["adapters"]
    assert (found["method"], found["reads"], found["encoder"]) == ("text-gated", "description", "base")
    assert found["written_parameters"] == 2 * found["budget_parameters"]
    assert "writes from   a description, read by base" in dynlora("inspect", "--adapter", trained).err
    card = (trained / "README.md").read_text()
    assert "it writes LoRA adapters for" in card
    assert "dynlora adapt --hypernet ." in card


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "--out", "x"),
        ("export", "--to", "peft", "--out", "x"),
        ("generate", "hi"),
        ("prune", "--budget", "1", "--out", "x"),
    ],
)
def test_commands_that_need_an_adapter_say_how_to_get_one(trained: Path, dynlora: Dynlora, command: tuple[str, ...]):
    answer = dynlora(*command, "--adapter", trained)
    assert answer.code == 2
    said = " ".join(answer.err.split())
    assert "holds a network that writes adapters, not an adapter" in said
    assert f"dynlora adapt --hypernet {trained} --description TEXT --out FOLDER" in said


def test_a_run_cannot_go_on_from_it(trained: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="not an adapter"):
        find_origin(trained, tmp_path)


def test_another_base_is_refused(copy: Path, tmp_path: Path):
    other = Path(shutil.copytree(model_folder(tmp_path), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="its numbers differ") as found:
        adapt(copy, tmp_path / "a", base_name=str(other))
    assert found.value.exit_code == 2
    assert not (tmp_path / "a").exists()


def test_another_encoder_is_refused(copy: Path, tmp_path: Path):
    change_json(copy, lambda form: form["encoder"].update(fingerprint="0" * 64))
    with pytest.raises(UsageError, match="the encoder base is not the one"):
        adapt(copy, tmp_path / "a")


def change_json(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "hypernet.json"
    form = json.loads(path.read_text())
    change(form)
    path.write_text(json.dumps(form))


def cut_off(folder: Path) -> None:
    path = folder / "hypernet.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    change_json(folder, lambda form: form.update(sha256=sha256_of(path)))


def with_nan(folder: Path) -> None:
    path = folder / "hypernet.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    change_json(folder, lambda form: form.update(sha256=sha256_of(path)))


def with_huge_numbers(folder: Path) -> None:
    path = folder / "hypernet.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path)
    change_json(folder, lambda form: form.update(sha256=sha256_of(path)))


def with_whole_numbers(folder: Path) -> None:
    path = folder / "hypernet.safetensors"
    save_file({name: tensor.long() for name, tensor in load_file(path).items()}, path)
    change_json(folder, lambda form: form.update(sha256=sha256_of(path)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "hypernet.json").unlink(), "holds no hypernetwork"),
        (lambda folder: (folder / "hypernet.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "hypernet.safetensors").unlink(), "hypernet.safetensors is missing"),
        (lambda folder: (folder / "hypernet.safetensors").write_bytes(b"x"), "is not the file that hypernet.json"),
        (cut_off, "is damaged or cut off"),
        (with_nan, "holds NaN or infinity"),
        (with_whole_numbers, "holds torch.int64"),
        (lambda folder: change_json(folder, lambda form: form["layers"].append(form["layers"][0])), "is there twice"),
        (lambda folder: change_json(folder, lambda form: form.update(parameters=-1)), "parameters: -1, and there are"),
        (lambda folder: change_json(folder, lambda form: form["base"].update(reference="\ud800")), "is damaged"),
        (lambda folder: change_json(folder, lambda form: form.pop("base")), "base"),
        (lambda folder: change_json(folder, lambda form: form.update(method="nonsense")), "no hypernetwork is called"),
        (lambda folder: change_json(folder, lambda form: form["options"].update(latent_size=1)), "options.latent_size"),
        (lambda folder: change_json(folder, lambda form: form["options"].update(more=1)), "options.more"),
        (lambda folder: change_json(folder, lambda form: form["layers"][0].update(rank=5)), "of another network"),
        (lambda folder: change_json(folder, lambda form: form["layers"].pop()), "of another network"),
        (lambda folder: change_json(folder, lambda form: form["layers"][0].update(rank=10**9)), "layers.0.rank"),
        (lambda folder: change_json(folder, lambda form: form.update(extra=1)), "extra"),
        (lambda folder: change_json(folder, lambda form: form.update(schema_version=True)), "schema_version"),
        (lambda folder: change_json(folder, lambda form: form.update(encoder=None)), "encoder: text-gated reads a"),
        (lambda folder: change_json(folder, lambda form: form.update(scale=float("inf"))), "scale"),
        (lambda folder: change_json(folder, lambda form: form.update(scale=1e30)), "scale: input should be less than"),
        (lambda folder: change_json(folder, lambda form: form.update(scale=0.0)), "scale: input should be greater"),
        (with_huge_numbers, "writes NaN or infinity"),
        (lambda folder: change_json(folder, lambda form: form["base"].update(fingerprint={"a": float("nan")})), "base"),
        (lambda folder: change_json(folder, lambda form: form["base"].update(fingerprint={})), "any base would fit"),
        (lambda folder: change_json(folder, lambda form: form["options"].update(hidden_size=10**12)), "hidden_size"),
    ],
)
def test_a_damaged_network_is_refused(copy: Path, tmp_path: Path, damage: Callable[[Path], object], words: str):
    damage(copy)
    with pytest.raises(DynloraError) as found:
        adapt(copy, tmp_path / "a")
    assert words in found.value.message
    assert found.value.exit_code == (4 if isinstance(found.value, MeasureError) else 2)
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_written_from_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--description says nothing"):
        adapt(trained, tmp_path / "a", " \n")
    with pytest.raises(UsageError, match="measures rows while it prunes"):
        adapt(trained, tmp_path / "a", budget=parse_budget("auto"))
    with pytest.raises(UsageError, match="allows"):
        adapt(trained, tmp_path / "a", budget=Budget("parameters", 10))
    adapt(trained, tmp_path / "a")
    with pytest.raises(UsageError, match="is not empty"):
        adapt(trained, tmp_path / "a")
    adapt(trained, tmp_path / "a", "Something else.", overwrite=True)


def test_a_network_that_has_learned_nothing_writes_nothing(tmp_path: Path):
    train(hypernet_recipe(tmp_path, "train.max_steps=1", "train.warmup_steps=0", "train.learning_rate=1e-6"))
    folder = tmp_path / "out"
    tensors = load_file(folder / "hypernet.safetensors")
    save_file(
        {name: t.zero_() if "b_OC" in name else t for name, t in tensors.items()}, folder / "hypernet.safetensors"
    )
    change_json(folder, lambda form: form.update(sha256=sha256_of(folder / "hypernet.safetensors")))
    with pytest.raises(UsageError, match="it has not been trained"):
        adapt(folder, tmp_path / "a")
