"""Finding and loading the base model, choosing target layers, and telling one base from another."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_adapter import build
from transformers import AutoConfig, AutoModel

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.find import BUILTIN, find_model
from dynlora_cli.models.fingerprint import fingerprint
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.load import bf16_note, load_base, resolve_dtype
from dynlora_cli.models.targets import find_targets, group_names


def options(name, **more):
    settings = {
        "name_or_path": str(name), "revision": None, "task": "causal-lm", "num_labels": None, "dtype": "auto",
        "load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "attn_implementation": None, "trust_remote_code": False,
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **more})


TOKENIZER = SimpleNamespace(pad_token_id=0)


def load(name, device="cpu", labels=None, **more):
    settings = options(name, **more)
    return load_base(
        settings,
        BaseFiles.find(settings),
        TOKENIZER,
        device=torch.device(device),
        labels=labels,
        seed=0,
    )


def fingerprint_of(folder):
    return fingerprint(folder, read_object(folder / "config.json"))


def context_length(folder):
    return BaseFiles(options(folder), folder, str(folder)).context_length


def leaves(targets):
    return {name.split(".")[-1] for name in targets}


class TestTargets:
    @pytest.mark.parametrize(
        ("kind", "wanted", "count", "expected"),
        [
            ("llama", "all-linear", 21, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
            ("llama", "attention", 12, {"q_proj", "k_proj", "v_proj", "o_proj"}),
            ("llama", "qv", 6, {"q_proj", "v_proj"}),
            ("llama", "down_proj", 3, {"down_proj"}),
            ("llama", ["q_proj", "model.layers.0.mlp.*"], 6, {"q_proj", "gate_proj", "up_proj", "down_proj"}),
            ("llama", "model.layers.[01].*.up_proj", 2, {"up_proj"}),
            ("gpt2", "all-linear", 12, {"c_attn", "c_proj", "c_fc"}),
            ("gpt2", "attention", 6, {"c_attn", "c_proj"}),
            ("gpt2", "qv", 3, {"c_attn"}),
            ("bert", "all-linear", 19, {"query", "key", "value", "dense"}),
            ("bert", "attention", 12, {"query", "key", "value", "dense"}),
            ("bert", "qv", 6, {"query", "value"}),
        ],
    )
    def test_by_structure_name_and_glob(self, kind, wanted, count, expected):
        targets = find_targets(build(kind), wanted, whole=["classifier"] if kind == "bert" else [])
        assert len(targets) == count
        assert leaves(targets) == expected
        assert not {"lm_head", "classifier"} & set(targets)

    def test_all_linear_is_what_peft_takes(self):
        from peft import LoraConfig, get_peft_model

        for kind in ("llama", "gpt2", "bert"):
            ours = set(find_targets(build(kind), "all-linear", whole=["classifier"] if kind == "bert" else []))
            task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
            config = LoraConfig(target_modules="all-linear", task_type=task, fan_in_fan_out=kind == "gpt2")
            assert ours == set(get_peft_model(build(kind), config).targeted_module_names)

    def test_a_pattern_without_match_lists_what_there_is(self):
        with pytest.raises(UsageError, match=r"'q_porj' matches no linear layer.*did you mean 'q_proj'") as caught:
            find_targets(build("llama"), ["v_proj", "q_porj"])
        assert "model.layers.*.self_attn.k_proj (3)" in caught.value.hint

    def test_in_the_models_order(self):
        names = list(find_targets(build("llama"), ["down_proj", "q_proj"]))
        assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]

    def test_shapes_are_inputs_then_outputs(self):
        assert linear_shape(find_targets(build("gpt2"), "c_fc")["transformer.h.0.mlp.c_fc"]) == (32, 128)
        assert linear_shape(find_targets(build("llama"), "k_proj")["model.layers.0.self_attn.k_proj"]) == (32, 16)

    def test_grouping_keeps_what_is_not_a_block_number(self):
        assert group_names(["a.0.q", "a.1.q", "head2.dense"]) == ["a.*.q (2)", "head2.dense"]


class TestFind:
    def test_builtin_is_a_folder_of_the_package(self):
        folder, reference = find_model(options("builtin:tiny"))
        assert folder == BUILTIN["builtin:tiny"]
        assert reference == str(folder)

    def test_unknown_builtin(self):
        with pytest.raises(UsageError, match="did you mean 'builtin:tiny'"):
            find_model(options("builtin:tinny"))

    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
    def test_missing_folder(self, name):
        with pytest.raises(UsageError, match="there is no folder"):
            find_model(options(name))

    def test_folder_without_config(self, tmp_path):
        with pytest.raises(UsageError, match=r"holds no config\.json"):
            find_model(options(tmp_path))

    def test_hub_id_that_cannot_be_had_is_the_machines_fault(self):
        with pytest.raises(MachineError, match="org/no-such-model") as caught:
            find_model(options("org/no-such-model"))
        assert caught.value.exit_code == 3


class TestLoad:
    def test_everything_is_frozen_but_a_new_head(self, tmp_path):
        build("bert").save_pretrained(tmp_path)
        base = load(tmp_path, labels=["a", "b", "c"], task="sequence-classification")
        assert {name for name, p in base.model.named_parameters() if p.requires_grad} == {
            "classifier.weight",
            "classifier.bias",
        }
        assert base.head == "classifier"
        assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
        build("llama").save_pretrained(tmp_path / "lm")
        assert not any(p.requires_grad for p in load(tmp_path / "lm").model.parameters())

    def test_an_encoder_without_head_loads_for_classification_with_one_seed(self, tmp_path):
        build("bert").bert.save_pretrained(tmp_path)
        heads = [
            load(tmp_path, labels=["a", "b"], task="sequence-classification").model.classifier.weight for _ in range(2)
        ]
        assert torch.equal(*heads)

    def test_missing_weights_are_an_error_not_random_numbers(self, tmp_path):
        from safetensors.torch import load_file, save_file

        build("llama").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=r"lack 1 tensors.*up_proj"):
            load(tmp_path)

    def test_truncated_weights(self, tmp_path):
        build("llama").save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(UsageError, match="does not load"):
            load(tmp_path)

    def test_unknown_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
        with pytest.raises(UsageError, match="no-such-thing"):
            load(tmp_path)

    def test_meta_device_holds_no_weights(self, tmp_path):
        build("llama").save_pretrained(tmp_path)
        base = load(tmp_path, device="meta")
        assert {p.device.type for p in base.model.parameters()} == {"meta"}
        assert len(find_targets(base.model, "all-linear")) == 21

    def test_dtypes(self):
        cpu = torch.device("cpu")
        assert resolve_dtype("auto", cpu) == torch.float32
        assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
        with pytest.raises(MachineError, match="float16 does not train on a CPU"):
            resolve_dtype("float16", cpu)

    @pytest.mark.parametrize(
        ("width", "dtype", "has", "told"),
        [(512, "auto", True, 1), (64, "auto", True, 0), (512, "float32", True, 0), (512, "auto", False, 0)],
    )
    def test_a_wide_model_on_a_cpu_with_bf16_products_is_told_of_them(
        self, width, dtype, has, told, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        build("llama").save_pretrained(tmp_path)
        base = load(tmp_path, device="meta")
        base.model.config.hidden_size = width
        found = bf16_note(options(tmp_path, dtype=dtype), base, torch.device("cpu"))
        assert len(found) == told
        assert bf16_note(options(tmp_path, dtype=dtype), base, torch.device("cuda")) == []

    def test_context_of_both_kinds_of_config(self, tmp_path):
        build("llama").save_pretrained(tmp_path / "llama")
        build("gpt2").save_pretrained(tmp_path / "gpt2")
        assert context_length(tmp_path / "llama") == context_length(tmp_path / "gpt2") == 64

    @pytest.mark.parametrize(
        ("kind", "more", "expected"),
        [
            ("bert", {}, 18),
            ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, 18),
            ("roberta", {}, 16),
            ("roberta", {"pad_token_id": 3}, 14),
            ("xlm-roberta", {}, 16),
            ("camembert", {}, 16),
            ("mpnet", {}, 16),
            ("ibert", {}, 16),
            ("longformer", {"attention_window": 4}, 16),
            ("luke", {"entity_vocab_size": 9, "entity_emb_size": 8}, 16),
            ("esm", {"position_embedding_type": "absolute", "mask_token_id": 4}, 16),
            ("esm", {"position_embedding_type": "rotary", "mask_token_id": 4}, 18),
        ],
        ids=str,
    )
    def test_context_of_encoders_that_number_positions_after_padding(self, kind, more, expected, tmp_path):
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        ids = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        config = AutoConfig.for_model(kind, **{**size, **ids, "max_position_embeddings": 18, **more})
        config.save_pretrained(tmp_path)
        assert context_length(tmp_path) == expected
        text = torch.full((1, expected), 7)
        model = AutoModel.from_config(config).eval()
        assert model(input_ids=text, attention_mask=torch.ones_like(text))[0].shape[1] >= expected

    def test_context_of_a_config_that_nobody_knows(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no-such-thing", "max_position_embeddings": 18}')
        assert context_length(tmp_path) == 18


@pytest.mark.slow
class TestFourBit:
    """NF4 on the CPU; the first use imports bitsandbytes."""

    @pytest.fixture
    def base(self, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        return load(tmp_path, load_in_4bit=True)

    def test_weights_are_packed_and_targets_found(self, base):
        from bitsandbytes.nn import Linear4bit

        targets = find_targets(base.model, "all-linear")
        assert len(targets) == 14
        assert all(isinstance(module, Linear4bit) for module in targets.values())
        weight = next(iter(targets.values())).weight
        assert weight.dtype == torch.uint8
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested, "double quantization"

    def test_an_evaluation_in_between_changes_nothing(self, base):
        """bitsandbytes would repack the weights for inference, and training could not go on."""
        ids = torch.randint(0, 64, (4, 16), device=base.model.device)
        first = base.model.train()(ids).logits
        with torch.no_grad():
            between = base.model.eval()(ids).logits
        assert torch.equal(base.model.train()(ids).logits, first)
        torch.testing.assert_close(between, first, atol=1e-3, rtol=1e-3)

    def test_components_train_on_top(self, base):
        targets = find_targets(base.model, "all-linear")
        layers = {}
        for name, module in targets.items():
            parent, _, leaf = name.rpartition(".")
            layers[name] = ComponentLinear(module, scale=1.0)
            setattr(base.model.get_submodule(parent), leaf, layers[name])
        pool = Pool(layers, dict.fromkeys(layers, 4), device=base.model.device)
        optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
        ids = torch.randint(0, 64, (4, 16), device=base.model.device)
        losses = []
        for _ in range(15):
            loss = base.model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert losses[-1] < losses[0] - 0.5


class TestFingerprint:
    def test_same_files_same_print_whatever_the_library_wrote(self, tmp_path):
        build("llama").save_pretrained(tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        config["transformers_version"] = "9.9"
        (tmp_path / "b" / "config.json").write_text(json.dumps(config))
        assert fingerprint_of(tmp_path / "a") == fingerprint_of(tmp_path / "b")

    def test_other_shapes_other_print(self, tmp_path):
        build("llama").save_pretrained(tmp_path / "a")
        build("gpt2").save_pretrained(tmp_path / "b")
        assert fingerprint_of(tmp_path / "a")["sha256"] != fingerprint_of(tmp_path / "b")["sha256"]
