"""Which models can be sharded, and what of them; what two processes then do is in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from tiny_run import make_recipe
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dynlora_cli.errors import UsageError
from dynlora_cli.execution.blocks import blocks
from dynlora_cli.execution.mode import plan
from dynlora_cli.execution.modes import shard
from dynlora_cli.models import load as loading
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.setup import read_base, read_data

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def refuse(model: nn.Module) -> None:
    shard._refuse_unsuitable(model, list(blocks(model)))


def test_blocks_that_are_skipped_or_share_their_weights_are_refused() -> None:
    fine = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24))
    refuse(fine)
    skips = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, layerdrop=0.1))
    with pytest.raises(UsageError, match="OPTForCausalLM skips blocks at random"):
        refuse(skips)
    first, second = fine.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(UsageError, match="no blocks with weights of their own"):
        refuse(fine)


def test_a_base_that_waits_on_the_host_has_the_type_of_the_device_it_is_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        loading, "resolve_dtype", lambda _, device: torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    recipe = make_recipe(tmp_path, "train.shard_base=true")
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("cuda"), plan(recipe.train))
    assert base.model.device.type == "cpu"
    assert base.dtype == base.model.dtype == torch.bfloat16


def test_what_trains_or_is_of_another_type_stays_whole() -> None:
    def parameter(*shape: int, trains: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=trains)

    assert not shard._stays_whole(parameter(4, 4), torch.bfloat16)
    assert shard._stays_whole(parameter(4, 4, trains=True), torch.bfloat16)
    assert shard._stays_whole(parameter(), torch.bfloat16)
    assert shard._stays_whole(parameter(4, dtype=torch.float32), torch.bfloat16)
