"""The real llama.cpp reads our GGUF files: the same tokens of a text, the same probabilities, the same greedy text.

It comes with npm's node-llama-cpp; scripts/llama_cpp/check fetches it. Without npm these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from cli_helpers import runner
from peft import PeftModel
from tiny_gguf import (
    CONFIGS,
    PRE_TOKENIZERS,
    add,
    config_of,
    export_base,
    export_merged,
    make,
    random_layers,
    trained_tokenizer,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynlora_cli.adapters.adapter import PREFIX
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import lora_config
from dynlora_cli.adapters.write import write_adapter as write_peft
from dynlora_cli.export.gguf.file import read_model, write_adapter
from dynlora_cli.export.gguf.vocabulary import load_tokenizer
from dynlora_cli.export.ollama_templates import match_template

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
BUILTIN = REPOSITORY / "dynlora_cli" / "assets" / "builtin_tiny"
NEW_TOKENS = 40
PROMPTS = ["Once upon a time, there was a", "Return the number of", 'The old man said:\n"Come']
TEXTS = [
    *PROMPTS, "", " ", "\n", "  two spaces", "trailing  ", "a\n\n\nb\t\tc\r\n 12345 3.14e-7", "'s I'll we've DON'T",
    "def f(x: int) -> str:\n    return  f'{x!r}'  # don't\n", "Ünïcödé naïve café e\u0301 — “quotes” … ½",
    "日本語のテキスト 한국어 русский العربية नमस्ते दुनिया ภาษาไทย", "🙂👩‍👩‍👧 \u00a0\u200b\u3000x", "<s>hello</s> hi<unk>", "<|user|>Hi <|assistant|>",
    "<|im_start|>user\nHi<|im_end|>\n", "0x1F <0x0A> <0x0a>", "____ ▁▁ aaaaaaaaaa !!!??",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Words, spaces of all kinds, special tokens and characters of all planes, in any order."""
    random = Random(0)
    parts = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2028",
        "hello",
        "World",
        "don't",
        "I'LL",
        "12345",
        "3.14",
    ]
    parts += ["__init__", "foo(bar)", "!!!", "...", "—", "“q”", "<s>", "</s>", "<|user|>", "<|im_end|>"]
    blocks = [(32, 0x250), (0x250, 0x3000), (0x3000, 0xD7FF), (0x1F300, 0x1FAFF)]

    def part() -> str:
        return random.choice(parts) if random.random() < 0.7 else chr(random.randint(*random.choice(blocks)))

    return ["".join(part() for _ in range(random.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[..., dict[str, Any]]:
    """A call of llama.cpp, see scripts/llama_cpp/client.mjs for what it takes and gives."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("no npm in PATH, through which llama.cpp would be fetched")
    folder = Path(os.environ.get("DYNLORA_NODE", REPOSITORY / ".node")).resolve()
    environment = os.environ | {"DYNLORA_NODE": str(folder)}
    scripts = REPOSITORY / "scripts" / "llama_cpp"
    done = subprocess.run([scripts / "check", "install"], env=environment, capture_output=True, text=True)
    if done.returncode or not (folder / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(f"llama.cpp could not be fetched: {done.stderr[-300:]}")

    def call(**request: Any) -> dict[str, Any]:
        text = json.dumps(request, default=str)
        command = ["node", str(scripts / "client.mjs")]
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model: PreTrainedModel, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    """The most probable new tokens by transformers; the end of a text is a token like others."""
    ids, cache, new = torch.tensor([prompt]), None, []
    with torch.no_grad():
        while len(new) < count:
            out = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            new.append(int(ids))
    return new


def check(
    answer: dict[str, Any], model: PreTrainedModel, prompts: list[list[int]], tolerance: float, count: int = NEW_TOKENS
) -> None:
    """llama.cpp's continuations are ours, token by token, and so are its probabilities of the first new token."""
    for prompt, generated in zip(prompts, answer["generated"], strict=True):
        with torch.no_grad():
            probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for token, theirs in generated["top"]:
            assert theirs == pytest.approx(float(probabilities[token]), abs=tolerance)
        assert generated["ids"] == greedy(model, prompt, count)


@pytest.fixture(params=["builtin", pytest.param("stories260K", marks=pytest.mark.shared)])
def real(request: pytest.FixtureRequest) -> Path:
    return BUILTIN if request.param == "builtin" else request.getfixturevalue("shared") / "models" / "stories260K"


def test_base_with_adapter_and_merged_model_say_what_peft_says(real, tmp_path, llama_cpp):
    base = load(real)
    layers = random_layers(base, strength=0.02)
    assert len({a_CI.shape[0] for a_CI, _ in layers.values()}) == 5, "mixed ranks"
    write_adapter(tmp_path / "adapter.gguf", config_of(real), layers)
    export_base(real, tmp_path / "base.gguf")
    ranks = {name: a_CI.shape[0] for name, (a_CI, _) in layers.items()}
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": factor
        for name, factors in layers.items()
        for letter, factor in zip("AB", factors, strict=True)
    }
    (tmp_path / "peft").mkdir()
    config = lora_config(ranks, base_model=str(real), revision=None, task="causal-lm")
    write_peft(tmp_path / "peft", config, tensors)
    adapted = PeftModel.from_pretrained(load(real), tmp_path / "peft").eval()
    merged = load(real)
    add(merged, layers)
    export_merged(real, tmp_path / "merged.gguf", merged)

    tokenizer = load_tokenizer(real)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    asked = {"generate": prompts, "max_tokens": NEW_TOKENS, "past_end": True, "top": 5}
    plain = llama_cpp(model=tmp_path / "base.gguf", **asked)
    check(plain, base, prompts, 1e-5)
    with_adapter = llama_cpp(model=tmp_path / "base.gguf", adapter=str(tmp_path / "adapter.gguf"), **asked)
    check(with_adapter, adapted, prompts, 1e-5)
    check(llama_cpp(model=tmp_path / "merged.gguf", **asked), adapted, prompts, 1e-5)
    for one, other in zip(plain["generated"], with_adapter["generated"], strict=True):
        assert one["ids"] != other["ids"], "the adapter changes the text"


def test_a_trained_run_exported_by_the_command_line(real, tmp_path, llama_cpp, capfd):
    """train, then `dynlora export`: the adapter on its base, and the merged model, say what stock PEFT says."""
    rows = [
        {"prompt": f"{word} {i}: ", "completion": f"{word} " * 4} for i, word in enumerate(["sun", "moon", "star"] * 8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train.max_steps": 12, "train.micro_batch_size": 4, "train.learning_rate": 0.01, "rank.init": 4}
    settings |= {"rank.budget": 0.3, "dataset.val_size": 0.2, "output_dir": str(tmp_path / "run")}
    recipe = {"model": str(real), "dataset": str(tmp_path / "rows.jsonl")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    dynlora = runner(capfd)
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert dynlora("train", tmp_path / "recipe.yaml", *options).code == 0
    for form, more in (("gguf", []), ("merged-gguf", ["--outtype", "f32"])):
        answer = dynlora("export", "--adapter", tmp_path / "run", "--to", form, "--out", tmp_path / form, *more)
        assert answer.code == 0, answer.err
    export_base(real, tmp_path / "base.gguf")
    adapted = PeftModel.from_pretrained(load(real), tmp_path / "run").eval()
    ranks = read_adapter(tmp_path / "run").all_ranks
    assert 0 in ranks.values()
    assert len(set(ranks.values())) > 2
    tokenizer = load_tokenizer(real)
    prompts = [tokenizer(text)["input_ids"] for text in [*PROMPTS, rows[0]["prompt"]]]
    asked = {"generate": prompts, "max_tokens": NEW_TOKENS, "past_end": True, "top": 5}
    check(
        llama_cpp(model=tmp_path / "base.gguf", adapter=str(tmp_path / "gguf" / "adapter.gguf"), **asked),
        adapted,
        prompts,
        1e-4,
    )
    # the built-in model is stored in bf16; merged in f32 it is base + adapter to the last digits
    check(llama_cpp(model=tmp_path / "merged-gguf" / "model.gguf", **asked), adapted, prompts, 1e-4)


def test_new_tokens_of_a_run_are_tokens_of_the_merged_file(tmp_path, llama_cpp, capfd):
    """Their rows lie behind the base's table; one is hidden in answers, as an end-of-text token is."""
    rows = [{"prompt": f"<|say|>{word} {i}: ", "completion": f"{word}<|end|>"} for i, word in enumerate(["sun"] * 24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = ["<|say|>", {"content": "<|end|>", "special": True}]
    recipe = {
        "model": str(BUILTIN),
        "dataset": {"train": [str(tmp_path / "rows.jsonl")], "chat": False},
        "adapter": {"new_tokens": new},
        "rank": {"budget": 2},
        "train": {"max_steps": 12, "micro_batch_size": 4, "learning_rate": 0.01},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    dynlora = runner(capfd)
    assert dynlora("train", tmp_path / "recipe.yaml").code == 0
    for target in ("merged", "merged-gguf"):
        answer = dynlora(
            "export", "--adapter", tmp_path / "run", "--to", target, "--out", tmp_path / target,
            *(["--outtype", "f32"] if "gguf" in target else []),
        )  # fmt: skip
        assert answer.code == 0, answer.err
    tokenizer, merged = load_tokenizer(tmp_path / "merged"), load(tmp_path / "merged")
    texts = ["<|say|>moon 3: ", "a<|end|>b", "<|say|><|end|> <|say|>"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert {4096, 4097} <= {token for prompt in prompts for token in prompt}
    asked = {"tokenize": texts, "generate": prompts, "max_tokens": NEW_TOKENS, "past_end": True, "top": 5}
    answer = llama_cpp(model=tmp_path / "merged-gguf" / "model.gguf", **asked)
    assert answer["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    check(answer, merged, prompts, 2e-2)  # the merged folder is in bf16, as the base


def test_the_same_tokens_of_every_text(real, tmp_path, llama_cpp):
    tokenizer = load_tokenizer(real)
    export_base(real, tmp_path / "base.gguf", "f16")
    texts = TEXTS + random_texts(500)
    answer = llama_cpp(model=tmp_path / "base.gguf", tokenize=texts)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert dict(zip(texts, answer["tokens"], strict=True)) == dict(zip(texts, expected, strict=True))
    assert (answer["add_bos"], answer["bos"], answer["eos"]) == (True, 1, 2)


def test_the_prompt_of_ollamas_template_has_the_tokens_of_the_chat_template(tmp_path, llama_cpp):
    tokenizer = load_tokenizer(BUILTIN)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is x?\n\nAnd y?"}]
    prompt = match_template(tokenizer).family.render(messages, tokenizer.eos_token)
    export_base(BUILTIN, tmp_path / "base.gguf", "f16")
    answer = llama_cpp(model=tmp_path / "base.gguf", tokenize=[prompt])
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answer["add_bos"]
    assert [answer["bos"], *answer["tokens"][0]] == expected


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer(name, tmp_path, llama_cpp):
    folder = make(tmp_path / "model", "llama", vocab_size=400)
    tokenizer = trained_tokenizer(name)
    tokenizer.save_pretrained(folder)
    export_base(folder, tmp_path / "base.gguf")
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS + random_texts(500)]  # Qwen's does that
    answer = llama_cpp(model=tmp_path / "base.gguf", tokenize=texts)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert dict(zip(texts, answer["tokens"], strict=True)) == dict(zip(texts, expected, strict=True))
    assert answer["add_bos"] is False


@pytest.mark.shared
def test_gemmas_way_with_spaces(shared, tmp_path, llama_cpp):
    """No space before a text, each space a piece of its own kind, bytes for what is no token; the words are Llama's."""
    folder, space = make(tmp_path / "model", "gemma3", vocab_size=520), {"String": " "}
    words = json.loads((shared / "models" / "stories260K" / "tokenizer.json").read_text())
    words |= {"normalizer": {"type": "Replace", "pattern": space, "content": "▁"}, "decoder": None}
    words["pre_tokenizer"] = {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    tokenizer, texts = load_tokenizer(folder), TEXTS + random_texts(500)
    export_base(folder, tmp_path / "base.gguf", "f16")
    answer = llama_cpp(model=tmp_path / "base.gguf", tokenize=texts)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert dict(zip(texts, answer["tokens"], strict=True)) == dict(zip(texts, expected, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture(kind, tmp_path, llama_cpp):
    folder = make(tmp_path / "model", kind)
    base = load(folder)
    layers = random_layers(base)
    if not base.config.tie_word_embeddings:
        layers["lm_head"] = torch.linspace(-0.2, 0.2, 64)[None], torch.linspace(1, -1, 352)[:, None]
    adapted = load(folder)
    add(adapted, layers)
    export_base(folder, tmp_path / "base.gguf")
    write_adapter(tmp_path / "adapter.gguf", config_of(folder), layers)
    tolerance = {"gpt2": 5e-4, "gemma3": 2e-3}.get(kind, 1e-5)  # llama.cpp looks gelu up in a table of f16
    prompts = [[0, *range(20, 50)], [0, 77, 300, 8], [0, *range(200, 260)]]
    asked = {"generate": prompts, "max_tokens": NEW_TOKENS, "past_end": True, "top": 5}
    if kind == "phi3-long":  # of 256 tokens and of more; llama.cpp goes by the room that there is
        long = [[0, *range(20, 290)]]
        more = llama_cpp(model=tmp_path / "base.gguf", **asked | {"generate": long, "max_tokens": 20})
        check(more, base, long, tolerance, 20)
        asked["context"] = 256
    plain = llama_cpp(model=tmp_path / "base.gguf", **asked)
    check(plain, base, prompts, tolerance)
    with_adapter = llama_cpp(model=tmp_path / "base.gguf", adapter=str(tmp_path / "adapter.gguf"), **asked)
    check(with_adapter, adapted, prompts, tolerance)
    assert plain["generated"] != with_adapter["generated"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smaller_kinds_are_read_too(kind, tmp_path, llama_cpp):
    base = load(BUILTIN)
    export_base(BUILTIN, tmp_path / "base.gguf", kind)
    prompts = [load_tokenizer(BUILTIN)(text)["input_ids"] for text in PROMPTS]
    answer = llama_cpp(model=tmp_path / "base.gguf", generate=prompts, max_tokens=1, top=5)
    check_top = {"f16": 1e-3, "q8_0": 3e-2}[kind]
    for prompt, generated in zip(prompts, answer["generated"], strict=True):
        with torch.no_grad():
            probabilities = base(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        assert generated["ids"] == [int(probabilities.argmax())]
        for token, theirs in generated["top"]:
            assert theirs == pytest.approx(float(probabilities[token]), abs=check_top)


@pytest.mark.parametrize("kind", ["q4_k_m", "q4_0"])
def test_llama_cpps_own_quantizer(kind, tmp_path, llama_cpp, capfd, monkeypatch):
    """The command's KL is of the numbers in the file; the real llama.cpp rounds activations on top of that."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder = make(tmp_path / "model", "llama", **sizes, head_dim=32)
    with torch.no_grad():
        model = load(folder)
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
        model.save_pretrained(folder)
    layers = random_layers(model, strength=0.02)
    (tmp_path / "peft").mkdir()
    ranks = {name: a_CI.shape[0] for name, (a_CI, _) in layers.items()}
    tensors = {f"{PREFIX}{n}.lora_{x}.weight": f for n, fs in layers.items() for x, f in zip("AB", fs, strict=True)}
    write_peft(tmp_path / "peft", lora_config(ranks, base_model=str(folder), revision=None, task="causal-lm"), tensors)
    monkeypatch.setenv("DYNLORA_NODE", os.environ.get("DYNLORA_NODE", str(REPOSITORY / ".node")))
    monkeypatch.setenv("PATH", f"{REPOSITORY / 'scripts' / 'llama_cpp'}{os.pathsep}{os.environ['PATH']}")
    answer = runner(capfd)(
        "export",
        "--adapter",
        tmp_path / "peft",
        "--to",
        "merged-gguf",
        "--outtype",
        kind,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert answer.code == 0, answer.err
    assert answer.json["types"]["Q4_K" if kind == "q4_k_m" else "Q4_0"] > 7
    assert 1e-5 < answer.json["check"]["kl"] < 0.5
    again = load(folder)
    read = read_model(tmp_path / "out" / "model.gguf", config_of(folder))
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(read(name))
    prompts = [[0, *range(20, 50)], [0, 77, 300, 8]]
    found = llama_cpp(model=tmp_path / "out" / "model.gguf", generate=prompts, max_tokens=1, top=5)
    for prompt, generated in zip(prompts, found["generated"], strict=True):
        with torch.no_grad():
            probabilities = again(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for token, theirs in generated["top"]:
            assert theirs == pytest.approx(float(probabilities[token]), rel=0.1)
