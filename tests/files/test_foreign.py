"""What others made is read and not obeyed: code, paths, links, patterns, numbers and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora
from tiny_run import make_recipe, train, write_rows

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.patterns import PatternMap
from dynlora_cli.models.find import find_model
from dynlora_cli.models.weights import Weights
from dynlora_cli.runs.report.write import write_card, write_report


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `out`, its base `llama` and its rows `llama.jsonl`."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_recipe(folder, "train.max_steps=2"))
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged; its adapter names the base in it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "out/adapter_config.json", base_model_name_or_path=str(tmp_path / "llama"))
    return tmp_path


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_code(place: Path) -> Path:
    """Its base is made of code that leaves a file `ran`, and its adapter says that this is fine."""
    base, out = place / "llama", place / "out"
    (base / "own.py").write_text(
        f"open({str(place / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    edit(
        base / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    record = json.loads((out / "dynlora.json").read_text())
    record["recipe"]["model"]["trust_remote_code"] = True
    record["base_model"]["fingerprint"] = {}
    (out / "dynlora.json").write_text(json.dumps(record))
    return place


COMMANDS: list[list[str]] = [
    ["merge", "--out", "made"],
    ["export", "--to", "peft", "--out", "made"],
    ["eval"],
    ["prune", "--budget", "0.5", "--policy", "activation", "--out", "made"],
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_adapter_does_not_switch_on_code(
    command: list[str], with_code: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(with_code)
    answer = dynlora(*command, "--adapter", "out")
    assert answer.code == 2
    assert not (with_code / "ran").exists()
    assert "--trust-remote-code" in answer.err
    assert "the run was trained with it" in answer.err
    trusting = dynlora(*command, "--adapter", "out", "--trust-remote-code")
    assert trusting.code == 0, trusting.err
    assert (with_code / "ran").exists()


def test_the_recipe_of_the_person_trusts_its_own_base_alone(with_code: Path, dynlora: Dynlora):
    def recipe(base: str) -> Path:
        settings = {
            "model": {"name_or_path": str(with_code / base), "trust_remote_code": True},
            "dataset": {"train": [{"path": str(with_code / "llama.jsonl")}], "val_size": 0.2, "max_length": 96},
        }
        path = with_code / "recipe.yaml"
        path.write_text(json.dumps(settings))
        return path

    shutil.copytree(with_code / "llama", with_code / "other")
    assert dynlora("eval", recipe("other"), "--adapter", with_code / "out").code == 2
    assert not (with_code / "ran").exists()
    answer = dynlora("eval", recipe("llama"), "--adapter", with_code / "out")
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_code_beside_an_adapter_never_runs(with_code: Path, dynlora: Dynlora):
    out = with_code / "out"
    (out / "tok.py").write_text(f"open({str(with_code / 'ran_too')!r}, 'w').close()\nclass Tok: pass\n")
    edit(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Tok", None]}, tokenizer_class="Tok")
    assert dynlora("eval", "--adapter", out).code == 2
    answer = dynlora("eval", "--adapter", out, "--trust-remote-code")
    assert answer.code == 0, answer.err
    assert not (with_code / "ran_too").exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "adapter_model.safetensors", "dynlora.json"]
)
def test_a_link_out_of_an_adapter_is_not_followed(name: str, place: Path, dynlora: Dynlora):
    secret = place / "secret"
    file = place / "out" / name
    secret.write_bytes(file.read_bytes() if file.exists() else b"secret")
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    answer = dynlora("merge", "--adapter", place / "out", "--out", place / "made")
    assert answer.code == 2
    assert "link" in answer.err
    assert not (place / "made").exists()


def test_links_of_the_hubs_cache_are_followed(place: Path, dynlora: Dynlora):
    blobs, snapshot = place / "models--a--b/blobs", place / "models--a--b/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (place / "llama").iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    answer = dynlora("merge", "--adapter", place / "out", "--base", snapshot, "--out", place / "made")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors"])
def test_an_index_names_no_file_outside(name: str, place: Path):
    (place / "llama/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match="outside its folder"):
        find_model(Model(name_or_path=str(place / "llama")))
    (place / "llama/model.safetensors").unlink()
    with pytest.raises(UsageError, match="outside its folder"):
        Weights(place / "llama")


def test_a_pipe_is_no_file(place: Path):
    (place / "out/tokenizer.json").unlink()
    os.mkfifo(place / "out/tokenizer.json")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        read_adapter(place / "out")


def test_a_base_with_an_adapter_in_it_is_no_base(place: Path):
    shutil.copyfile(place / "out/adapter_config.json", place / "llama/adapter_config.json")
    with pytest.raises(UsageError, match="in its place"):
        find_model(Model(name_or_path=str(place / "llama")))


def test_the_best_checkpoint_lies_in_the_run(place: Path):
    run = place / "unfinished"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/best").write_text("../../out\n")
    with pytest.raises(UsageError, match="holds no adapter"):
        read_adapter(run)


@pytest.mark.parametrize(
    "name", ["https://me:TOPSECRET@host/m", "file:///etc/m?token=TOPSECRET", "//share/m#key=TOPSECRET"]
)
def test_a_token_is_not_told_again(name: str, place: Path, dynlora: Dynlora):
    edit(place / "out/adapter_config.json", base_model_name_or_path=name)
    answer = dynlora("merge", "--adapter", place / "out", "--json")
    assert answer.code in (2, 3)
    assert "TOPSECRET" not in answer.out + answer.err


# -- patterns ----------------------------------------------------------------------------------------------------------

PATTERNS = [
    {r".*\.(q|v)_proj": 4, r"k_proj": 5},
    {r"layers\.[01]\..*proj": 4, "model.layers.1.mlp.up_proj": 5},
    {r"^model\.layers\.0\.self_attn\.q_proj": 4, r"self_attn.k_proj|mlp\.up_proj": 5, "up_proj": 6},
    {r"model\.layers\.0\.self_attn\.q_proj|model\.layers\.1\.mlp\.up_proj": 4, "roj": 5, "": 6},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_match_as_in_peft(patterns: dict[str, int]):
    from peft.utils.other import get_pattern_key

    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.big_up_proj")
    names = [f"model.layers.{layer}.{leaf}" for layer in range(12) for leaf in leaves] + [
        "q_proj",
        "up_proj",
        "lm_head",
    ]
    ours = PatternMap(patterns, "test")
    for name in names:
        assert ours.first(name, None) == patterns.get(get_pattern_key(patterns.keys(), name)), name


@pytest.mark.parametrize("pattern", [r"(([a-z0-9_]+)+\.?)+!", r"(a|a?)+(.*)*!", r"((.*\.)*)*$x"])
def test_a_pattern_without_end_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dynlora_cli.files.patterns.PATTERN_SECONDS", 0.2)
    ours, began = PatternMap({pattern: 3}, "adapter_config.json"), time.monotonic()
    with pytest.raises(UsageError, match="takes too long"):
        ours.first("model.layers.3.self_attn." + "a.b" * 30, None)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pattern", ["(", "(" * 5000, "a{99999999999999999999}", "[a-", "a" * 20_000 + "."])
def test_no_regular_expression(pattern: str):
    with pytest.raises(UsageError, match="no regular expression"):
        PatternMap({pattern: 3}, "adapter_config.json")


# -- numbers and damage ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('"lora_alpha": "16"', "lora_alpha"), ('"lora_alpha": NaN', "lora_alpha"), ('"lora_alpha": 1e400', "lora_alpha"),
        ('"lora_alpha": true', "lora_alpha"), ('"r": -1', "r"), ('"r": 4.5', "r"), ('"r": 1' + "0" * 400, "r"),
        ('"r": 1' + "0" * 5000, "digits"), ('"rank_pattern": {"a": null}', "rank_pattern"), ('"rank_pattern": [1]', "rank_pattern"),
        ('"alpha_pattern": {"a": -1e999}', "alpha_pattern"), ('"target_parameters": 3', "target_parameters"),
        ('"base_model_name_or_path": {}', "base_model_name_or_path"), ('"x": ' + "[" * 300 + "]" * 300, "too deep"),
        ('"x": ' + "[" * 100_000 + "]" * 100_000, "too deep"), ('"x"', "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_told_in_one_message(text: str, key: str, place: Path, dynlora: Dynlora):
    config = (place / "out/adapter_config.json").read_text().rstrip().removesuffix("}")
    (place / "out/adapter_config.json").write_text(f"{config}, {text}}}")
    for command in (["inspect"], ["merge", "--out", place / "made"]):
        answer = dynlora(*command, "--adapter", place / "out")
        assert answer.code == 2
        assert "adapter_config.json" in answer.err
        assert key in answer.err
        assert "Traceback" not in answer.err


HEADERS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "null": lambda header, key: header.update({key: None}),
    "no shape": lambda header, key: header[key].pop("shape"),
    "one offset": lambda header, key: header[key].update(data_offsets=[0]),
    "no offsets": lambda header, key: header[key].pop("data_offsets"),
    "text offsets": lambda header, key: header[key].update(data_offsets=["0", "8"]),
    "backwards": lambda header, key: header[key].update(data_offsets=header[key]["data_offsets"][::-1]),
    "overlap": lambda header, key: header[key].update(data_offsets=[0, 8]),
    "negative": lambda header, key: header[key].update(shape=[-1, 4]),
    "huge": lambda header, key: header[key].update(shape=[2**62, 2**62]),
    "list": lambda header, key: header.update({key: []}),
    "dtype": lambda header, key: header[key].update(dtype=7),
    "no such dtype": lambda header, key: header[key].update(dtype="F99"),
    "metadata": lambda header, key: header.update({"__metadata__": {"a": {}}}),
}


def with_header(file: Path, change: Callable[[dict[str, Any], str], Any]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header, sorted(name for name in header if name != "__metadata__")[3])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.slow
@pytest.mark.parametrize("change", HEADERS)
@pytest.mark.parametrize("where", ["llama/model.safetensors", "out/adapter_model.safetensors"])
def test_a_damaged_header_is_told_in_one_message(change: str, where: str, place: Path, dynlora: Dynlora):
    with_header(place / where, HEADERS[change])
    answer = dynlora("merge", "--adapter", place / "out", "--out", place / "made")
    assert answer.code == 2
    assert Path(where).name in answer.err
    assert not (place / "made").exists()


@pytest.mark.parametrize(
    "text", [b"", b"\xff" * 9, b"\xff" * 40, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**63) + b"{}"]
)
def test_no_safetensors_file(text: bytes, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(text)
    with pytest.raises(UsageError, match="no safetensors file"):
        Weights(tmp_path)


def test_a_record_of_others_is_checked(place: Path, dynlora: Dynlora):
    record = json.loads((place / "out/dynlora.json").read_text())
    for key, value in (
        ("name", 3), ("task", "chess"), ("layers", {"a": 1}), ("layers", {"a": {"rank": 1, "d_in": -1, "d_out": 2}}),
        ("recipe", {"model": {"name_or_path": 3}}), ("recipe", []), ("data", {"labels": 3}), ("base_model", "x"),
        ("seeds", {"seed": "one"}), ("seeds", {"seed": 10**300}),
    ):  # fmt: skip
        (place / "out/dynlora.json").write_text(json.dumps(record | {key: value}))
        answer = dynlora("eval", "--adapter", place / "out")
        assert answer.code == 2, (key, value, answer.err)
        assert "dynlora.json" in answer.err


def test_a_file_of_json_is_an_object(tmp_path: Path):
    for text in ("", "3", "[]", '{"a"', '{"a": "\\ud800"}', '{"a": ["\\uDfff"]}', "\x00"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UsageError, match="is damaged"):
            read_object(tmp_path / "a.json")
    with pytest.raises(UsageError, match="no file of JSON"):
        read_object(tmp_path)
    (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude00"}')  # two halves make a character
    assert read_object(tmp_path / "a.json") == {"a": "\U0001f600"}


@pytest.mark.slow
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "1" + "0" * 400, "1" + "0" * 5000, "1e999", "-0x" + "f" * 300])
@pytest.mark.parametrize(
    "key", ["seed", "train.max_steps", "train.learning_rate", "rank.budget", "eval.steps", "adapter.alpha"]
)
def test_a_huge_number_is_told_with_its_line(number: str, key: str, tmp_path: Path, dynlora: Dynlora):
    section, _, leaf = key.rpartition(".")
    line = f"{section}: {{{leaf}: {number}}}" if section else f"{leaf}: {number}"
    recipe = tmp_path / "recipe.yaml"
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe.write_text(f"model: builtin:tiny\ndataset: {rows}\n{line}\n")
    answer = dynlora("train", recipe, "--dry-run")
    assert answer.code == 2
    assert f"{recipe}:3: {key}" in answer.err
    recipe.write_text(f"model: builtin:tiny\ndataset: {rows}\n")
    answer = dynlora("train", recipe, "--dry-run", "--set", f"{key}={number}")
    assert answer.code == 2
    assert key in answer.err


# -- what is shown -----------------------------------------------------------------------------------------------------

MARKUP = "<script>alert(1)</script>\"'`x` | [a](javascript:b) \n# H ``` https://u:TOPSECRET@h/?token=TOPSECRET"


def test_report_and_card_show_texts_of_others_as_texts(place: Path):
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(part) for key, part in value.items()}
        if isinstance(value, list):
            return [poisoned(part) for part in value]
        return value + MARKUP if isinstance(value, str) else value

    run = place / "out"
    was = json.loads((run / "dynlora.json").read_text())
    record = poisoned(was) | {"task": was["task"]}  # another task is refused
    record["layers"] = {name + MARKUP: layer for name, layer in record["layers"].items()}
    (run / "dynlora.json").write_text(json.dumps(record))
    for name in ("metrics.jsonl", "rank_events.jsonl"):
        lines = [json.dumps(poisoned(json.loads(line))) for line in (run / name).read_text().splitlines()]
        (run / name).write_text("".join(f"{line}\n" for line in lines))
    page = write_report(run).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    card = write_card(run).read_text()
    assert "TOPSECRET" not in page + card
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert "\\<script\\>" in heading
    # Outside of blocks of code no text of others begins a line or a tag.
    blocks = card.split("\n---\n", 1)[1].split("````")
    assert not [line for block in blocks[::2] for line in block.splitlines() if line.startswith("# H")]
