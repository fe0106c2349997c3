"""X-LoRA against stock PEFT with equal tensors, in both directions; and its two caches when text is written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Dynlora
from safetensors.torch import load_file, save_file
from tiny_run import NAMES, make_library, model_folder, train
from tiny_run import router_recipe as recipe_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.adapters.xlora import PREFIX, write_xlora
from dynlora_cli.config.options import options, section
from dynlora_cli.errors import UsageError

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 27).view(2, 12)
VARIED = {
    "default": {},
    "layerwise": {"layerwise_scalings": True},
    "deep": {"xlora_depth": 3, "xlora_size": 16, "layerwise_scalings": True},
    "sharp": {"softmax_temperature": 0.2, "global_scaling_weight": 0.7},
    "two passes": {"scaling_pass_value": 0.5, "top_k_lora": 2, "layerwise_scalings": True},
    "best two": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "scaling_pass_value": 0.3},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xlora")
    make_library(folder)
    train(recipe_of(folder, "x-lora"))
    return folder


@pytest.fixture
def routed(library: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, far from the library."""
    return Path(shutil.copytree(library / "router", tmp_path / "moved"))


def base(library: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_folder(library)).eval()
    model.config.use_cache = False  # or PEFT refuses it
    return model


@contextmanager
def ours(library: Path, folder: Path) -> Iterator[Any]:
    model = base(library)
    with attached(model, read_adapter(folder, routed=True)), torch.no_grad():
        yield model


def by_peft(library: Path, folder: Path, **options: Any) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base(library), folder, **options).eval()(input_ids=IDS).logits


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [name if name in ("default", "layerwise") else pytest.param(name, marks=pytest.mark.slow) for name in VARIED],
)
def test_stock_peft_computes_the_same_from_our_files(library: Path, tmp_path: Path, name: str) -> None:
    values = section(options("variants", "x-lora")).model_validate(VARIED[name]).model_dump()
    members = {name: read_adapter(library / name) for name in NAMES}
    layers = {layer for member in members.values() for layer in member.layers}
    outputs = len(NAMES) * (len(layers) if values["layerwise_scalings"] else 1)
    widths = [32, *[values["xlora_size"]] * (values["xlora_depth"] - 1), outputs]
    generator, tensors = torch.Generator().manual_seed(0), {}
    for at, (d_in, d_out) in enumerate(pairwise(widths)):
        tensors[f"layers.{3 * at}.weight"] = torch.randn(d_out, d_in, generator=generator)
        tensors[f"layers.{3 * at}.bias"] = torch.randn(d_out, generator=generator)
    folder = tmp_path / "router"
    folder.mkdir()
    write_xlora(folder, folder, values, members, tensors, 32)
    with ours(library, folder) as model:
        logits = model(input_ids=IDS).logits
    near(logits, by_peft(library, folder))
    assert not torch.allclose(logits, base(library)(input_ids=IDS).logits, atol=1e-2)


def test_peft_loads_the_folder_of_a_run_as_it_is(library: Path) -> None:
    with ours(library, library / "router") as model:
        near(model(input_ids=IDS).logits, by_peft(library, library / "router"))


@pytest.mark.slow
def test_a_folder_that_was_moved_is_read_from_inside_itself(library: Path, routed: Path) -> None:
    with ours(library, library / "router") as there, ours(library, routed) as here:
        assert torch.equal(there(input_ids=IDS).logits, here(input_ids=IDS).logits)
    config = peft.XLoraConfig.from_pretrained(routed)
    config.adapters = {str(at): str(routed / "adapters" / name) for at, name in enumerate(NAMES)}
    with ours(library, routed) as model:
        near(model(input_ids=IDS).logits, by_peft(library, routed, config=config))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("saved", ["all", "default"])
def test_what_peft_saved_is_read_once_its_adapters_are_in_the_folder(
    library: Path, tmp_path: Path, saved: str, depth: int
) -> None:
    adapters = {str(at): str(library / name) for at, name in enumerate(NAMES)}
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters=adapters,
        layerwise_scalings=True,
        xlora_depth=depth,
        xlora_size=8,
        xlora_dropout_p=0.0,  # then the layers are 0, 2 and 4, and the adapters 0, 1 and 2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(library), config).eval()
    with torch.no_grad():
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
        truth = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path, selected_adapters=None if saved == "all" else ["default"])
    with pytest.raises(UsageError, match="nothing outside the folder is read") as caught:
        read_adapter(tmp_path, routed=True)
    assert str(tmp_path / "adapters" / "ones") in str(caught.value.hint)
    for name in NAMES:
        shutil.copytree(library / name, tmp_path / "adapters" / name, ignore=shutil.ignore_patterns("checkpoints"))
    if saved == "default":
        with pytest.raises(UsageError, match="lacks the classifier"):
            read_adapter(tmp_path, routed=True)
        classifier = model.base_model.internal_xlora_classifier.state_dict()
        named = {PREFIX + name: value for name, value in classifier.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path, routed=True)
    assert isinstance(adapter, RoutedAdapter)
    assert list(adapter.members) == list(NAMES)
    with ours(library, tmp_path) as model:
        near(model(input_ids=IDS).logits, truth)


def test_written_with_caches_or_without_the_text_is_the_same(library: Path) -> None:
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    prompt["attention_mask"][0, :5] = 0  # padded on the left
    with ours(library, library / "router") as model:
        for how in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}):
            texts = [
                model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cached, **how)
                for cached in (True, False)
            ]
            assert torch.equal(*texts)


def test_the_first_pass_leaves_the_second_its_cache(library: Path) -> None:
    with ours(library, library / "router") as model:
        whole, cache, parts = model(input_ids=IDS).logits, DynamicCache(config=model.config), []
        for part in IDS.split([7, 1, 4], 1):
            parts.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == IDS.shape[1]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        cache.crop(5 - IDS.shape[1])
        again = model(input_ids=IDS[:, 5:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(again, whole[:, 5:], rtol=1e-4, atol=1e-5)


def test_a_cache_of_another_pass_is_refused(library: Path) -> None:
    plain = base(library)
    cache = plain(input_ids=IDS, use_cache=True).past_key_values
    with ours(library, library / "router") as model, pytest.raises(UsageError, match="a cache for each of its two"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": {"one": "x/ones", "two": "x/twos", "three": "x/threes"}}, "must be .0., .1. and so on"),
        ({"adapters": {"0": "x/ones", "1": "y/ones", "2": "x/twos"}}, "two adapters have the same name"),
        ({"adapters": {"0": "../..", "1": "x/ones"}}, "is no name"),
        ({"top_k_lora": 0}, "top_k_lora"),
        ({"xlora_depth": 2}, "is of another router"),
    ],
)
def test_what_others_wrote_is_checked(library: Path, routed: Path, change: dict[str, Any], words: str) -> None:

    config = json.loads((routed / "adapter_config.json").read_text())
    (routed / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=words), ours(library, routed):
        pass


def test_the_classifier_is_all_that_trained(library: Path) -> None:
    assert load_file(library / "router/adapter_model.safetensors").keys() == {
        f"{PREFIX}layers.0.{name}" for name in ("weight", "bias")
    }


@pytest.mark.slow
def test_generate_writes_what_two_passes_without_a_cache_write(library: Path, dynlora: Dynlora) -> None:
    folder = library / "router"
    answer = dynlora("generate", "ones 3: ", "--adapter", folder, "--max-new-tokens", 12, "--json")
    assert answer.code == 0, answer.err
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ones 3: ", return_tensors="pt").input_ids
    with ours(library, folder) as model:
        written = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)[0, ids.shape[1] :]
    assert answer.json["text"] == tokenizer.decode(written, skip_special_tokens=True)
