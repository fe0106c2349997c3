"""A Modelfile has a template only where it gives the tokenizer's own prompts; Go's rules are played by Python here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from data_helpers import BARE, CHATML, LLAMA3, MISTRAL, ROLE_TOKENS, byte_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dynlora_cli.data.chat.template import Writing
from dynlora_cli.export.gguf.vocabulary import load_tokenizer
from dynlora_cli.export.ollama_templates import FAMILIES, match_template, modelfile

BUILTIN = Path(__file__).parents[2] / "dynlora_cli" / "assets" / "builtin_tiny"
BOS = "{{ bos_token }}"
REAL_LLAMA3 = LLAMA3.replace("head|", "start_header_id|").replace("tail|", "end_header_id|").replace("eot|", "eot_id|")
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are \"Q\".<|im_end|>\n{% endif %}" + CHATML
)  # fmt: skip
ZEPHYR = (
    BOS + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be {brief}."},
    {"role": "user", "content": "What is <b>?\n\nTell me."},
    {"role": "assistant", "content": "A \"tag\"."},
    {"role": "user", "content": "And 5 > 3?"},
]  # fmt: skip


def tokenizer_with(template: str | None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template)
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def parsed(text: str) -> dict[str, str]:
    """Instructions of a Modelfile; stops joined by spaces."""
    found: dict[str, str] = {}
    for name, quoted, plain in re.findall(r'^([A-Z]+(?: stop)?) (?:"""(.*?)"""|"?([^"\n]*)"?)$', text, re.M | re.S):
        found[name] = " ".join(filter(None, [found.get(name), quoted or plain]))
    return found


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of the few things our templates use: range, if eq, else if, .Content."""
    before, turns, behind = re.fullmatch(
        r"(.*){{ range .Messages }}(.*){{ end }}{{ end }}(.*)", template, re.S
    ).groups()
    around = dict(re.findall(r'{{ (?:else )?if eq .Role "(\w+)" }}(.*?)(?={{ else if|\Z)', turns, re.S))
    said = (around.get(m["role"], "").replace("{{ .Content }}", m["content"]) for m in messages)
    return before + "".join(said) + behind


@pytest.mark.parametrize(
    ("template", "name", "adds_bos"),
    [
        (CHATML, "ChatML", False),
        (BOS + CHATML, "ChatML", True),
        (REAL_LLAMA3, "Llama 3", True),
        (REAL_LLAMA3, "Llama 3", False),
        (ZEPHYR, "Zephyr", True),
        (ROLE_TOKENS, "role tokens", True),
        (MISTRAL, "Mistral", True),
        (MISTRAL.replace("} [/INST]{% else %} {", "} [/INST]{% else %}{"), "Mixtral", True),
        (MISTRAL.replace("} [/INST]", "}[/INST]"), "Mistral 0.3", True),
    ],
)
def test_the_template_gives_the_tokenizers_prompts(template, name, adds_bos):
    tokenizer = tokenizer_with(template, adds_bos=adds_bos)
    assert match_template(tokenizer).family.name == name
    messages = CONVERSATION[1:] if "INST" in template else CONVERSATION
    text, notes = modelfile("m.gguf", tokenizer, {})
    prompt = go(parsed(text)["TEMPLATE"], messages)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ("<s>" if adds_bos else "") + prompt == expected, "Ollama adds bos where the tokenizer does"
    assert any("system messages" in note for note in notes) == ("INST" in template)


def test_the_built_in_model():
    text, notes = modelfile("tiny.gguf", load_tokenizer(BUILTIN), {"eos_token_id": 2})
    found = parsed(text)
    assert (found["FROM"], found["PARAMETER stop"], notes) == ("./tiny.gguf", "</s>", [])
    assert go(found["TEMPLATE"], CONVERSATION[:2]) == (
        "<|system|>Be {brief}.</s><|user|>What is <b>?\n\nTell me.</s><|assistant|>"
    )


def test_a_system_message_that_the_template_puts_in_becomes_ollamas():
    tokenizer = tokenizer_with(QWEN, adds_bos=False)
    found = parsed(modelfile("m.gguf", tokenizer, {})[0])
    assert found["SYSTEM"] == 'You are "Q".'
    given = [{"role": "system", "content": found["SYSTEM"]}, CONVERSATION[1]]
    expected = tokenizer.apply_chat_template([CONVERSATION[1]], tokenize=False, add_generation_prompt=True)
    assert go(found["TEMPLATE"], given) == expected


def test_stops_are_the_tokens_that_really_end_an_answer():
    tokenizer = tokenizer_with(CHATML, adds_bos=False)
    ids = tokenizer.convert_tokens_to_ids(["</s>", "<|eot|>"])
    assert (
        parsed(modelfile("m.gguf", tokenizer, {"eos_token_id": ids})[0])["PARAMETER stop"] == "</s> <|eot|> <|im_end|>"
    )
    assert parsed(modelfile("m.gguf", tokenizer, {})[0])["PARAMETER stop"] == "</s> <|im_end|>"
    unknown = tokenizer_with(REAL_LLAMA3)  # whose <|eot_id|> is no token of this tokenizer
    assert parsed(modelfile("m.gguf", unknown, {})[0])["PARAMETER stop"] == "</s>"


def test_a_template_of_no_family_gives_no_template_and_says_so():
    text, notes = modelfile("m.gguf", tokenizer_with(BARE), {})
    assert "TEMPLATE" not in parsed(text)
    assert "none of ChatML, Llama 3" in notes[0]


def test_a_conversation_without_the_bos_that_ollama_adds_gives_no_template():
    text, notes = modelfile("m.gguf", tokenizer_with(CHATML, adds_bos=True), {})
    assert "TEMPLATE" not in parsed(text)
    assert "is ChatML and puts no bos token" in notes[0]


def test_what_go_cannot_do_is_noted():
    stripping = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    _, notes = modelfile("m.gguf", tokenizer_with(stripping, adds_bos=False), {})
    assert ["strips spaces" in note for note in notes] == [True]
    thinking = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>\n\n')[-1] }}")
    _, notes = modelfile("m.gguf", tokenizer_with(thinking, adds_bos=False), {})
    assert ["thinking" in note for note in notes] == [True]


def test_tools_that_ollamas_template_does_not_write_are_noted():
    calling = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    _, notes = modelfile("m.gguf", tokenizer_with(calling, adds_bos=False), {})
    assert ["Ollama refuses requests with tools" in note for note in notes] == [True]


def test_a_model_without_a_chat_template_continues_the_prompt():
    text, notes = modelfile("m.gguf", tokenizer_with(None), {})
    assert (parsed(text)["TEMPLATE"], notes) == ("{{ .Prompt }}", [])


GO = """package main
import ("os"; "text/template")
type Message struct { Role, Content string }
func main() {
    messages := []*Message{%s}
    for _, text := range []string{%s} {
        t := template.Must(template.New("").Option("missingkey=zero").Parse(text + "\\x00"))
        if err := t.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="no go in PATH; what Python makes of Go's templates is tested above")
def test_go_itself_renders_as_every_family(tmp_path):
    messages = ", ".join(f"{{`{m['role']}`, `{m['content']}`}}" for m in CONVERSATION)
    (tmp_path / "main.go").write_text(GO % (messages, ", ".join(f"`{f.go('</s>', '<s>')}`" for f in FAMILIES)))
    done = subprocess.run(["go", "run", str(tmp_path / "main.go")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for family, prompt in zip(FAMILIES, done.stdout.split("\0"), strict=False):
        known = [message for message in CONVERSATION if message["role"] in family.around]
        assert prompt == "<s>" + family.render(known, "</s>")


def test_what_learned_bare_text_is_asked_with_bare_text():
    text, notes = modelfile("m.gguf", tokenizer_with(CHATML, adds_bos=False), {}, Writing(turned={"completion": False}))
    assert parsed(text)["TEMPLATE"] == "{{ .Prompt }}"
    assert any("bare prompt" in note for note in notes)
    text, _ = modelfile("m.gguf", tokenizer_with(CHATML, adds_bos=False), {}, Writing(turned={"completion": True}))
    assert "<|im_start|>" in parsed(text)["TEMPLATE"]


def test_a_date_in_the_template_is_that_of_training():
    dated = "{% if messages[0].role != 'system' %}<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n{% endif %}"
    tokenizer = tokenizer_with(dated + CHATML, adds_bos=False)
    text, notes = modelfile("m.gguf", tokenizer, {}, Writing("2026-01-02T03:04:05+0000"))
    assert parsed(text)["SYSTEM"] == "Today: 02 Jan 2026"
    assert any("SYSTEM says 2026-01-02" in note for note in notes)
