"""A rank by timestep in an adapter's files: written, read, and cut to one timestep."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timed_denoiser import T, by_hand, fill, timed

from dynlora_cli import plugins
from dynlora_cli.adapters.images.by_timestep import at_step, bands
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save, write_pool
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.nested import from_the_end
from dynlora_cli.lora.timesteps.layer import schedule_of
from dynlora_cli.pruning.posthoc import Order


def written(folder, **changes):
    model, pool = timed(dtype=torch.float32, **changes)
    fill(pool)
    folder.mkdir()
    write_pool(pool, folder, kind="t-lora", model_type="denoiser", base_model="", revision=None, task=None, whole={})
    return model, pool


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_it_is_read_as_it_was_written(tmp_path, start):
    _, pool = written(tmp_path / "a", start=start, min_rank=2, power=1.5, schedule="rising")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.form == "t-lora"
    assert adapter.kind == "T-LoRA"
    assert adapter.schedule == schedule_of(pool)
    assert adapter.ranks == {"first": 4 * pool.layers["first"].terms, "second": 3 * pool.layers["second"].terms}
    save(adapter, tmp_path / "a")
    again = read_adapter(tmp_path / "a")
    assert again.schedule == adapter.schedule
    assert all(torch.equal(again.layers[n].b_OC, f.b_OC) for n, f in adapter.layers.items())


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_at_a_timestep_it_is_the_lora_that_the_model_computes_with(tmp_path, start):
    model, pool = written(tmp_path / "a", start=start)
    adapter = read_adapter(tmp_path / "a")
    x = torch.randn(5, 10)
    for t in T.tolist():
        plain = at_step(adapter, t)
        assert plain.form == "lora"
        assert plain.schedule is None
        h = x
        for name, layer in pool.layers.items():
            h = layer.base(h) + h @ plain.layers[name].delta_OI().T
            h = torch.tanh(h) if name == "first" else h
        wanted = by_hand(model.double(), pool, x.double(), torch.full((5,), t))
        torch.testing.assert_close(h.double(), wanted, rtol=1e-4, atol=1e-5)
        model.float()
    assert at_step(plain, 17) is plain


def test_bands_are_equal_parts_of_the_timesteps(tmp_path):
    written(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    found = bands(adapter, 4)
    assert [(begin, end) for begin, end, _ in found] == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert [each.ranks["first"] for _, _, each in found] == [
        adapter.schedule.rank_at(t, 4) for t in (125, 375, 625, 875)
    ]


@pytest.mark.parametrize("policy", ["magnitude", "prefix", "random"])
@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_pruning_cuts_whole_components_from_the_end(tmp_path, start, policy):
    written(tmp_path / "a", start=start)
    adapter = read_adapter(tmp_path / "a")
    order = Order.by_policy(adapter, plugins.load("policies", policy), None, None)
    terms, seen = adapter.schedule.terms, set()
    for budget in range(order.least, adapter.parameters, 7):
        smaller = order.cut(order.keep(budget)[0])
        assert smaller.parameters <= budget
        assert smaller.schedule == adapter.schedule
        for name, factors in smaller.layers.items():
            assert factors.rank % terms == 0
            assert torch.equal(factors.a_CI, adapter.layers[name].a_CI[: factors.rank])
            assert torch.equal(factors.b_OC, adapter.layers[name].b_OC[:, : factors.rank])
        seen.add(smaller.components)
    assert len(seen) > 4


def test_a_component_is_worth_what_it_has_become_since_the_start(tmp_path):
    _, pool = written(tmp_path / "a", start="orthogonal")
    adapter = read_adapter(tmp_path / "a")
    order = Order.by_policy(adapter, plugins.load("policies", "magnitude"), None, None)
    by_cost = plugins.load("policies", "magnitude").scores(pool, None, None)
    wanted = torch.cat([from_the_end(part) for part in by_cost.split([4, 3])]).repeat_interleave(2)
    assert order.scores_K.argsort(stable=True).tolist() == wanted.argsort(stable=True).tolist()
    with pytest.raises(UsageError, match="so it is cut from the end"):
        Order.by_policy(adapter, plugins.load("policies", "fisher"), None, None)


def test_what_cannot_be_is_refused(tmp_path):
    written(tmp_path / "a", start="orthogonal", min_rank=0)
    adapter = read_adapter(tmp_path / "a")
    with pytest.raises(UsageError, match="there is no timestep 1001"):
        at_step(adapter, 1001)
    with pytest.raises(UsageError, match="uses no component at timestep 1000"):
        at_step(adapter, 1000)
    file = tmp_path / "a" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, tensor in tensors.items():  # as a tool does that cuts without knowing
        tensors[name] = (tensor[:-1] if "lora_A" in name else tensor[:, :-1]).contiguous()
    save_file(tensors, file, metadata=metadata)
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    config = config.replace('"r": 8', '"r": 7').replace('"lora_alpha": 8', '"lora_alpha": 7').replace(": 6", ": 5")
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    with pytest.raises(UsageError, match="its components are 2 products each"):
        read_adapter(tmp_path / "a")
