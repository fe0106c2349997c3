"""A base with adapters in memory: who speaks, in which form, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import ROLE_TOKENS
from eval_helpers import Run, by_peft, foreign
from library_helpers import Made
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.engine import Engine, Wanted
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way

SHORT = Sampling(max_new_tokens=12)
PROMPT = "sort: b a -> "


@pytest.fixture(scope="module")
def places(runs: Callable[[str], Run], chat_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on bare prompts and stock PEFT adapters of its base; a run on conversations, of another base."""
    folder = tmp_path_factory.mktemp("foreign")
    base, chat_base = runs("llama").recipe.parent / "llama", chat_run.recipe.parent / "pico"
    foreign(base, folder / "plain", target_modules=["q_proj", "down_proj"])
    foreign(base, folder / "other", target_modules=["v_proj", "up_proj"])
    foreign(base, folder / "dora", target_modules=["q_proj"], use_dora=True)
    foreign(chat_base, folder / "chatty", target_modules=["q_proj", "down_proj"])
    return {
        "bare": runs("llama").folder,
        "base": base,
        "chat": chat_run.folder,
        "chat_base": chat_base,
        **{name: folder / name for name in ("plain", "other", "dora", "chatty")},
    }


@pytest.fixture(scope="module")
def engine(places: dict[str, Path]) -> Iterator[Engine]:
    with Engine.open(Wanted(adapters=[places[name] for name in ("bare", "plain", "other", "dora")])) as engine:
        yield engine


@pytest.fixture(scope="module")
def talker(places: dict[str, Path]) -> Iterator[Engine]:
    with Engine.open(Wanted(adapters=[places["chat"], places["chatty"]])) as engine:
        yield engine


def greedy(model: Any, folder: Path, prompt: str, count: int = 12) -> str:
    """What stock transformers writes after a bare prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def asked(engine: Engine, *uses: str, prompt: str = PROMPT, sampling: Sampling = SHORT) -> list[str]:
    return [
        answer.text for answer in engine.generate([engine.request(engine.use(use), prompt, sampling) for use in uses])
    ]


# -- who speaks ------------------------------------------------------------------------------------------------------


def test_base_and_stock_adapters_answer_as_stock_peft_does(engine: Engine, places: dict[str, Path]):
    models = {"base": AutoModelForCausalLM.from_pretrained(places["base"]).eval()}
    models |= {name: by_peft(places["base"], places[name]) for name in ("plain", "dora")}
    expected = [greedy(model, places["base"], PROMPT) for model in models.values()]
    assert asked(engine, *models) == expected
    assert len(set(expected)) == 3, "the adapters matter"


def test_a_batch_of_many_is_each_alone(engine: Engine):
    uses = ["base", "out", "plain", "dora", "0.5*out+plain", "plain - 2*other", "out+plain+other"]
    prompts = [PROMPT, "count all the words in this line -> ", "x"]
    requests = [engine.request(engine.use(use), prompt, SHORT) for use in uses for prompt in prompts]
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone
    assert len({answer.text for answer in alone}) > len(uses)


def test_a_blend_is_what_merging_gives(engine: Engine, places: dict[str, Path]):
    parts = [read_adapter(places[name]) for name in ("bare", "plain")]
    blend = combine(parts, Way(method="exact", weights=[0.4, -2.0])).adapter
    model = AutoModelForCausalLM.from_pretrained(places["base"]).eval()
    with attached(model, blend):
        expected = greedy(model, places["base"], PROMPT)
    assert asked(engine, "0.4*out - 2*plain") == [expected]
    assert expected not in asked(engine, "base", "out", "plain")


def test_the_base_is_as_it_was_when_all_is_closed(places: dict[str, Path]):
    with Engine.open(Wanted(adapters=[places["bare"], places["dora"]])) as engine:
        model = engine._opened.base.model
        asked(engine, "out", "dora")
    plain = AutoModelForCausalLM.from_pretrained(places["base"]).eval()
    assert greedy(model, places["base"], PROMPT) == greedy(plain, places["base"], PROMPT)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("dora+plain", "dora cannot be blended: it is a DoRA"),
        ("0.5*dora", "dora cannot be blended"),
        ("plane", "did you mean 'plain'?"),
    ],
)
def test_what_cannot_speak(use: str, words: str, engine: Engine):
    with pytest.raises(UsageError) as refused:
        engine.use(use)
    assert words in refused.value.message


def test_adapters_come_and_go(places: dict[str, Path]):
    with Engine.open(Wanted(adapters=[places["bare"]])) as engine:
        before, first = engine.names, asked(engine, "out")
        engine.add("late", places["plain"])
        assert (before, engine.names) == (["out"], ["out", "late"]), "another list, for other threads"
        both = asked(engine, "out", "late")
        assert both[0] == first[0] != both[1]
        with pytest.raises(UsageError, match="adapter 'late' already"):
            engine.add("late", places["other"])
        with pytest.raises(UsageError, match="no adapter can be called 'auto'"):
            engine.add("auto", places["other"])
        with pytest.raises(UsageError, match="another model by its fingerprint"):
            engine.add("chat", places["chat"])
        engine.remove("late")
        assert engine.names == ["out"]
        with pytest.raises(UsageError, match="no adapter 'late'"):
            engine.use("late")
        with pytest.raises(UsageError, match="no adapter 'late'"):
            engine.remove("late")
        assert asked(engine, "out") == first


def test_names(places: dict[str, Path], tmp_path: Path):
    """Two runs have one name, and an adapter has one that means something else."""
    one = shutil.copytree(places["bare"], tmp_path / "a" / "out")
    two = shutil.copytree(places["plain"], tmp_path / "b" / "out")
    three = shutil.copytree(places["other"], tmp_path / "c" / "base")
    with Engine.open(Wanted(adapters=[one, two, three])) as engine:
        assert engine.names == ["a/out", "b/out", "c/base"]
        assert engine.use("a/out+c/base").mix == {"a/out": 1.0, "c/base": 1.0}
    again = shutil.copytree(places["plain"], tmp_path / "d" / "a" / "out")
    with Engine.open(Wanted(adapters=[one, again])) as engine:  # nothing short tells them apart
        assert engine.names == [str(one.resolve()), str(again.resolve())]


# -- in which form ---------------------------------------------------------------------------------------------------


def test_a_run_on_bare_prompts_is_asked_as_it_learned(engine: Engine, places: dict[str, Path]):
    tokenizer = AutoTokenizer.from_pretrained(places["base"])
    request = engine.request(engine.use("out"), PROMPT, SHORT)
    assert list(request.ids) == tokenizer(PROMPT).input_ids
    assert request.ends == {tokenizer.eos_token_id}
    assert not any(note.startswith("out ") for note in engine.notes)


def test_a_separator_of_training_stands_behind_the_prompt(places: dict[str, Path], tmp_path: Path):
    run = shutil.copytree(places["bare"], tmp_path / "run")
    record = json.loads((run / "dynlora.json").read_text())
    record["recipe"]["dataset"]["separator"] = "\n## "
    (run / "dynlora.json").write_text(json.dumps(record))
    with Engine.open(Wanted(adapters=[run])) as engine:
        use = engine.use("out")
        ids = engine.request(use, "sort", SHORT).ids
        assert ids == engine.request(use, "sort\n## ", SHORT, raw=True).ids
        spaced = engine.request(use, "sort ", SHORT)
        assert spaced.ids == engine.request(use, "sort ", SHORT, raw=True).ids


def test_rows_of_alpaca_are_asked_in_its_words(places: dict[str, Path], tmp_path: Path):
    run = shutil.copytree(places["bare"], tmp_path / "run")
    record = json.loads((run / "dynlora.json").read_text())
    record["recipe"]["dataset"]["train"][0]["format"] = "alpaca"
    (run / "dynlora.json").write_text(json.dumps(record))
    with Engine.open(Wanted(adapters=[run])) as engine:
        use = engine.use("out")
        request, tokenizer = engine.request(use, "sort", SHORT), engine.voice(use.mix or {}).tokenizer
        assert tokenizer.decode(request.ids).endswith("### Instruction:\nsort\n\n### Response:\n")


def test_a_run_on_conversations_gets_turns(talker: Engine, places: dict[str, Path]):
    use = talker.use("out")
    tokenizer = AutoTokenizer.from_pretrained(places["chat"])
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort 3"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(talker.request(use, "sort 3", SHORT, system="be brief").ids) == expected
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort 3"}]
    assert list(talker.request(use, messages, SHORT).ids) == expected
    parts = [
        messages[0],
        {"role": "user", "content": [{"type": "text", "text": "sort "}, {"type": "text", "text": "3"}]},
    ]
    assert list(talker.request(use, parts, SHORT).ids) == expected
    assert talker.voice({"out": 1.0}).chat


def test_raw_text_stays_as_it_is(talker: Engine, places: dict[str, Path]):
    tokenizer = AutoTokenizer.from_pretrained(places["chat"])
    request = talker.request(talker.use("out"), "sort 3", SHORT, raw=True)
    assert list(request.ids) == tokenizer("sort 3").input_ids
    with pytest.raises(UsageError, match="takes no system message"):
        talker.request(talker.use("out"), "sort 3", SHORT, raw=True, system="be brief")


def test_other_tools_adapters_go_by_the_bases_template_and_that_is_said(talker: Engine):
    one, two = (talker.request(talker.use(use), "sort 3", SHORT) for use in ("out", "chatty"))
    assert one.ids == two.ids
    assert "chatty does not say how it was trained to be asked; it is asked through the tokenizer's chat template" in (
        talker.notes
    )
    assert len(talker.notes) == len(set(talker.notes))


def test_a_run_on_bare_text_of_a_chat_model(places: dict[str, Path], tmp_path: Path):
    run = shutil.copytree(places["chat"], tmp_path / "run")
    record = json.loads((run / "dynlora.json").read_text())
    record["data"]["turned"] = {"completion": False}
    (run / "dynlora.json").write_text(json.dumps(record))
    with Engine.open(Wanted(adapters=[run, places["chatty"]])) as engine:
        tokenizer = AutoTokenizer.from_pretrained(run)
        assert list(engine.request(engine.use("out"), "sort 3", SHORT).ids) == tokenizer("sort 3").input_ids
        with pytest.raises(UsageError, match="asked in bare text, and takes no conversation"):
            engine.request(engine.use("out"), [{"role": "user", "content": "a"}] * 3, SHORT)
        blend = engine.request(engine.use("out+chatty"), "sort 3", SHORT)
        assert blend.ids == engine.request(engine.use("base"), "sort 3", SHORT).ids
        assert any(note.startswith("out+chatty: these adapters are asked in different ways") for note in engine.notes)


def test_the_date_is_that_of_training(places: dict[str, Path], tmp_path: Path):
    run = shutil.copytree(places["chat"], tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + ROLE_TOKENS
    tokenizer.save_pretrained(run)
    record = json.loads((run / "dynlora.json").read_text())
    record["data"]["date"] = "2024-02-29T12:00:00+0000"
    (run / "dynlora.json").write_text(json.dumps(record))
    with Engine.open(Wanted(adapters=[run])) as engine:
        request = engine.request(engine.use("out"), "sort 3", SHORT)
        assert tokenizer.decode(request.ids).startswith("2024-02-29")
        assert any("another than in training" in note for note in engine.notes)


def test_variables_of_the_template_and_the_system_message_are_those_of_training(
    places: dict[str, Path], tmp_path: Path
):
    run = shutil.copytree(places["chat"], tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = "{{ mode }}|{{ thinking is defined }}|" + ROLE_TOKENS
    tokenizer.save_pretrained(run)
    record = json.loads((run / "dynlora.json").read_text())
    record["data"] |= {"template_kwargs": {"mode": "x", "tokenize": True}, "system": "y"}
    (run / "dynlora.json").write_text(json.dumps(record))
    with Engine.open(Wanted(adapters=[run])) as engine:
        use = engine.use("out")

        def text(content: Any, **more: Any) -> str:
            return str(tokenizer.decode(engine.request(use, content, SHORT, **more).ids))

        assert text("sort 3").startswith("x|False|<s><|system|>y</s><|user|>sort 3")
        assert text("sort 3", system="z").startswith("x|False|<s><|system|>z</s><|user|>")
        assert text("sort 3", kwargs={"mode": "w"}).startswith("w|")
        assert text("sort 3", kwargs={"thinking": "auto"}).startswith("x|False|")  # as if it were not said
        text("sort 3", kwargs={"mod": 1})
        assert any("never reads 'mod' of chat_template_kwargs; did you mean 'mode'?" in note for note in engine.notes)
        with pytest.raises(UsageError, match="in bare text, for which chat_template_kwargs say nothing"):
            engine.request(use, "sort 3", SHORT, kwargs={"mode": "w"}, raw=True)


def test_a_turn_ends_where_the_template_ends_it(places: dict[str, Path], tmp_path: Path):
    run = shutil.copytree(places["chat"], tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = ROLE_TOKENS.replace("{{ eos_token }}", "[/INST]")
    tokenizer.save_pretrained(run)
    with Engine.open(Wanted(adapters=[run])) as engine:
        ends = engine.request(engine.use("out"), "sort 3", SHORT).ends
        assert ends == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("[/INST]")}


@pytest.mark.parametrize("content", ["", " ", [{"role": "user", "content": ""}]])
def test_an_empty_prompt(content: Any, talker: Engine):
    with pytest.raises(UsageError, match="the prompt is empty"):
        talker.request(talker.use("out"), content, SHORT)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "the prompt is empty"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "is no text|only text is read",
        ),
        ([{"content": "x"}], "has no role"),
        ("half \ud83d", "half a character"),
        ("word " * 200, "tokens, and the model's context 128"),
        ("word " * 2000, "the prompt has 10,000 characters, and the model's context 128 tokens"),
    ],
)
def test_what_is_no_prompt(content: Any, words: str, talker: Engine):
    with pytest.raises(UsageError, match=words):
        talker.request(talker.use("out"), content, SHORT)


# -- a router decides ------------------------------------------------------------------------------------------------


def test_a_library_and_its_router(made: Made):
    with Engine.open(Wanted(library=made.root, adapters=[made.other])) as engine:
        assert engine.names == ["other", "first"]
        assert engine.router == "embedding"
        use = engine.use("auto")
        assert use.auto
        request = engine.request(use, "0: count -> ", SHORT)
        assert request.router == "embedding"
        assert request.decision is not None
        assert request.mix == request.decision.mix
        assert any("is not calibrated" in note for note in engine.notes)
        (answer,) = engine.generate([request])
        assert answer.text == asked(engine, "+".join(request.mix) or "base", prompt="0: count -> ")[0]
        assert answer.decision == request.decision


def test_a_router_with_options(places: dict[str, Path]):
    adapters = [places["bare"], places["plain"]]
    with Engine.open(Wanted(adapters=adapters, router="fixed", options=["mix=0.5*out+plain"])) as engine:
        request = engine.request(engine.use("auto"), PROMPT, SHORT)
        assert request.mix == {"out": 0.5, "plain": 1.0}
        assert engine.generate([request])[0].text == asked(engine, "0.5*out+plain")[0]


def test_a_router_by_token_shares_the_engine_with_others(places: dict[str, Path]):
    adapters = [places["bare"], places["plain"]]
    with Engine.open(Wanted(adapters=adapters, router="arrow")) as engine:
        auto = engine.request(engine.use("auto"), PROMPT, SHORT)
        assert auto.by_token
        others = [engine.request(engine.use(use), PROMPT, SHORT) for use in ("base", "out")]
        together = engine.generate([auto, *others])
        assert together == [engine.generate([request])[0] for request in (auto, *others)]
        assert together[0].text not in {together[1].text}


def test_no_router_without_adapters(places: dict[str, Path]):
    with Engine.open(Wanted(base=str(places["base"]))) as engine:
        assert (engine.names, engine.router) == ([], None)
        with pytest.raises(UsageError, match="no adapter to choose"):
            engine.use("auto")
        model = AutoModelForCausalLM.from_pretrained(places["base"]).eval()
        assert asked(engine, "base") == [greedy(model, places["base"], PROMPT)]


# -- paused ----------------------------------------------------------------------------------------------------------


def test_paused_requests_go_on_in_other_company(engine: Engine):
    requests = [engine.request(engine.use(use), PROMPT, SHORT) for use in ("base", "out", "dora", "0.5*out+plain")]
    whole = engine.generate(requests)
    ended, steps = {}, [0]

    def paused() -> bool:
        steps[0] += 1
        return steps[0] % 3 == 0

    waiting = dict(enumerate(requests))
    while waiting:
        numbers = sorted(waiting, reverse=len(ended) % 2 == 0)
        for number, answer in zip(numbers, engine.generate([waiting[n] for n in numbers], paused=paused), strict=True):
            if answer.finish_reason == "paused":
                waiting[number] = replace(waiting[number], state=answer.state)
            else:
                ended[number] = answer
                del waiting[number]
    assert [ended[number] for number in range(4)] == whole
