"""A chat as data: what a typed line means, what each speaker is asked, what is saved; and a talk with real runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_helpers import Run, foreign
from pico import pico_model

from dynlora_cli.commands.chat import Start, converse, run
from dynlora_cli.config.mix import parse_mix
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.conversation import Conversation, Turn, turns_to_skip
from dynlora_cli.generation.engine import Engine, Wanted
from dynlora_cli.generation.session import COMMANDS, Ask, End, Save, Session, Tell, mix_of_weights, read
from dynlora_cli.tasks import task as tasks

from recipe_helpers import load

# -- what a line means -----------------------------------------------------------------------------------------------


class Names:
    """Stands in for an engine."""

    names = ("poet", "clerk")

    def use(self, text: str) -> Any:
        return SimpleNamespace(mix=None if text == "auto" else parse_mix(text, self.names))


WHO = Names()
TALKED = Session("poet", conversation=Conversation((Turn("one?", {"poet": "1"}, "poet"),)))


def after(line: str, session: Session = TALKED) -> Session:
    return read(session, line, WHO)[0]


def effect(line: str, session: Session = TALKED) -> Any:
    return read(session, line, WHO)[1]


def test_text_is_a_question_and_two_slashes_are_one():
    assert effect("Good morning -> ") == Ask("Good morning -> ")
    assert effect(" //etc/hosts?") == Ask("/etc/hosts?")
    assert effect("   ") is None
    assert after("Good morning") == TALKED


@pytest.mark.parametrize(
    ("line", "speaker"),
    [
        ("/adapter clerk", "clerk"),
        ("/base", "base"),
        ("/weights clerk=0.7,poet=0.3", "0.7*clerk+0.3*poet"),
        ("/weights 0.7*clerk - 0.3*poet", "0.7*clerk - 0.3*poet"),
        ("/weights clerk=-2", "-2*clerk"),
        ("/WEIGHTS poet+clerk", "poet+clerk"),
        ("/auto", "auto"),
        ("/compare clerk", "poet"),
    ],
)
def test_who_answers_next(line: str, speaker: str):
    try:
        session, told = read(TALKED, line, WHO)
    except UsageError:
        assert line == "/compare clerk"
        return
    assert session == replace(TALKED, speaker=speaker)
    assert told == Tell(f"{speaker} answers")


def test_comparing_and_back():
    session = after("/compare")
    assert session.speakers == ("base", "poet", "clerk")
    assert session.speaker == "poet"
    named = after("/compare base, 0.5*poet", session)
    assert (named.speakers, named.speaker) == (("base", "0.5*poet"), "0.5*poet")
    assert after("/compare off", named).speakers == ("0.5*poet",)
    assert after("/base", session).speakers == ("base",)


def test_settings():
    session = after("/set temperature=0.7, top_k=5 seed=3")
    assert session.settings == {"temperature": 0.7, "top_k": 5, "seed": 3}
    assert session.sampling.do_sample
    assert effect("/set", session) == Tell("tokens are drawn: temperature 0.7, top_k 5, seed 3, at most 256 tokens")
    greedy = after("/set temperature=default top_k=default", session)
    assert (greedy.settings, greedy.sampling.do_sample) == ({"seed": 3}, False)
    assert after(r"/set stop_strings=\n\n").sampling.stop_strings == ("\n\n",)
    # Once more with the same seed draws something else, and a new question begins at the seed again.
    again = after("/retry", session)
    assert again.sampling.seed == 4
    assert after("next", again).sampling.seed == 3


def test_retry_undo_clear_and_system():
    session, asked = read(TALKED, "/retry", WHO)
    assert asked == Ask("one?")
    assert session.conversation.turns == ()
    assert after("/undo").conversation.turns == ()
    assert "one?" in effect("/undo").text
    told = after("/system be brief")
    assert told.conversation.system == "be brief"
    assert after("/clear", told) == replace(told, conversation=Conversation(system="be brief"))
    assert after("/system -", told).conversation.system is None
    assert effect("/system", told) == Tell("the system message: be brief")


def test_saving_and_leaving():
    assert effect("/save my talk.jsonl") == Save(Path("my talk.jsonl"), "new")
    assert effect("/save a.jsonl append") == Save(Path("a.jsonl"), "append")
    assert effect("/save a.jsonl overwrite") == Save(Path("a.jsonl"), "overwrite")
    assert effect("/quit") == effect("/exit") == End()


def test_help_names_every_command():
    shown = [row[0].split()[0] for row in effect("/help").rows]
    assert shown[: len(COMMANDS)] == list(COMMANDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adaptor poet", "there is no command /adaptor; did you mean '/adapter'?"),
        ("/etc/hosts", "there is no command /etc/hosts"),
        ("/", "there is no command /"),
        ("/adapter poem", "there is no adapter 'poem'; did you mean 'poet'?"),
        ("/weights poem=1", "there is no adapter 'poem'"),
        ("/weights poet=1,clerk", "'clerk' is not NAME=WEIGHT"),
        ("/weights poet=nan", "nan is no weight"),
        ("/compare poet", "poet is all that is named"),
        ("/set temprature=1", "there is no such setting; did you mean 'temperature'?"),
        ("/set temperature", "a value is missing"),
        ("/set top_k=many", "it takes a whole number"),
        ("/set top_p=2", "top_p is 2.0"),
        ("/set do_sample=false temperature=1", "temperature is for drawn tokens"),
        ("/save", "a file is missing"),
        ("/save talk.txt", "it must end in .jsonl"),
        ("/save ~nobody-of-that-name/talk.jsonl", "this machine has no such user"),
        ("/quit now", "/quit takes nothing behind it"),
    ],
)
def test_what_cannot_be_done_is_said(line: str, message: str):
    with pytest.raises(UsageError) as caught:
        read(TALKED, line, WHO)
    assert message in caught.value.message


@pytest.mark.parametrize("line", ["/retry", "/undo", "/save a.jsonl"])
def test_nothing_was_said_yet(line: str):
    with pytest.raises(UsageError, match="nothing was said yet"):
        read(Session("poet"), line, WHO)


def test_weights_in_words():
    assert mix_of_weights("a=0.7, b = 0.3") == "0.7*a+0.3*b"
    assert mix_of_weights("a=-1,b=+2") == "-a+2*b"
    assert mix_of_weights("a+b") == "a+b"


# -- the conversation ------------------------------------------------------------------------------------------------

TALK = Conversation(
    (Turn("one?", {"poet": "1"}, "poet"), Turn("two?", {"base": "ii", "poet": "2"}, "poet")), system="be brief"
)


def test_each_speaker_sees_its_own_answers_and_else_those_that_count():
    assert [message["content"] for message in TALK.messages("base", "three?")] == [
        "be brief", "one?", "1", "two?", "ii", "three?",
    ]  # fmt: skip
    assert [message["content"] for message in TALK.messages("clerk", "three?", skip=1)] == [
        "be brief", "two?", "2", "three?",
    ]  # fmt: skip


def test_rows_of_a_file():
    (row,) = TALK.rows(chat=True)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][-1]["content"] == "2"
    assert TALK.rows(chat=False)[1] == {"prompt": "two?", "completion": "2"}
    assert Conversation().rows(chat=True) == []


@pytest.mark.parametrize(("most", "skipped"), [(None, 0), (30, 0), (29, 1), (20, 1), (10, 2), (1, 2)])
def test_the_oldest_turns_go_first_and_no_more_than_must(most: int | None, skipped: int):
    assert turns_to_skip(lambda skip: 30 - 10 * skip, TALK.turns, most) == skipped


# -- with runs -------------------------------------------------------------------------------------------------------


class Typed:
    """A screen on which lines are typed that were written before; keeps what it is shown."""

    def __init__(self, *lines: str, forgiving: bool = True, on_piece: Callable[[], None] = lambda: None) -> None:
        self.lines, self.forgiving, self.on_piece = list(lines), forgiving, on_piece
        self.notes: list[str] = []
        self.told: list[str] = []
        self.problems: list[str] = []
        self.asked: list[Any] = []
        self.answers: list[dict[str, str]] = []
        self.reasons: list[str] = []

    def loading(self) -> Any:
        return nullcontext()

    def open(self, base: str, names: Sequence[str]) -> None:
        self.names = list(names)

    def read(self, session: Session) -> str | None:
        self.session = session
        return self.lines.pop(0) if self.lines else None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tell(self, told: Tell) -> None:
        self.told.append(told.text)

    def problem(self, error: UsageError) -> None:
        self.problems.append(error.message)

    def begin(self, question: str, speakers: Sequence[str], requests: Sequence[Any]) -> None:
        self.speakers = list(speakers)
        self.asked.append(list(requests))
        self.answers.append(dict.fromkeys(speakers, ""))

    def piece(self, number: int, text: str) -> None:
        self.answers[-1][self.speakers[number]] += text
        self.on_piece()

    def done(self, number: int, answer: Any) -> None:
        self.reasons.append(answer.finish_reason)

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def engine(chat_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A run on conversations, and a stock LoRA on the same base."""
    made = tmp_path_factory.mktemp("plain")
    plain = foreign(pico_model(made), made / "plain", target_modules=["q_proj", "down_proj"])
    base = str(chat_run.recipe.parent / "pico")
    with Engine.open(Wanted([chat_run.folder, plain], base=base)) as opened:
        yield opened


def talk(engine: Engine, *lines: str, speaker: str = "out", tokens: int = 8, **screen: Any) -> Typed:
    typed = Typed(*lines, **screen)
    converse(engine, Session(speaker, settings={"max_new_tokens": tokens}), typed)
    return typed


def told(engine: Engine, request: Any) -> str:
    return request.voice.tokenizer.decode(request.ids)


def test_the_conversation_is_kept(engine: Engine):
    typed = talk(engine, "sort 3", "sort 4", "/undo", "sort 5")
    first, second, third = (told(engine, requests[0]) for requests in typed.asked)
    answers = [next(iter(answer.values())).strip() for answer in typed.answers]
    assert "sort 3" in first
    assert second.index("sort 3") < second.index(answers[0]) < second.index("sort 4")
    assert "sort 4" not in third
    assert "sort 3" in third
    assert [turn.question for turn in typed.session.conversation.turns] == ["sort 3", "sort 5"]


def test_each_speaker_answers_as_it_does_alone(engine: Engine):
    side_by_side = talk(engine, "/compare base, out, plain, 0.5*out+plain", "sort 3").answers[0]
    assert list(side_by_side) == ["base", "out", "plain", "0.5*out+plain"]
    assert len(set(side_by_side.values())) > 1
    for speaker, text in side_by_side.items():
        alone = talk(engine, "sort 3", speaker=speaker).answers[0]
        assert alone == {speaker: text}


def test_what_is_set_is_used(engine: Engine):
    drawn = "/set temperature=3 seed=1 max_new_tokens=12"
    one, two = (talk(engine, drawn, "sort 3", "/retry", "/undo", "sort 3") for _ in range(2))
    assert one.answers == two.answers
    assert one.answers[0] == one.answers[2] != one.answers[1]
    assert len(one.asked[0]) == 1


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(engine: Engine):
    pressed, handler = iter([signal.SIGINT]), signal.getsignal(signal.SIGINT)
    press = lambda: os.kill(os.getpid(), next(pressed, 0))  # noqa: E731
    typed = talk(engine, "/set temperature=5 seed=0", "sort 3", "sort 4", tokens=40, on_piece=press)
    assert typed.reasons[0] == "cancelled"
    assert len(typed.session.conversation.turns) == 2
    kept = typed.session.conversation.turns[0].answer()
    assert kept == typed.answers[0]["out"].strip()
    assert 0 < len(kept) < 40
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_ends_a_script(engine: Engine):
    with pytest.raises(KeyboardInterrupt):
        talk(engine, "sort 3", "sort 4", forgiving=False, on_piece=lambda: os.kill(os.getpid(), signal.SIGINT))


def test_ctrl_c_while_a_router_thinks(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    request, pressed = Engine.request, iter([1, 2])

    def slow(self: Engine, *arguments: Any, **options: Any) -> Any:
        for _ in range(next(pressed, 0)):
            os.kill(os.getpid(), signal.SIGINT)
        return request(self, *arguments, **options)

    monkeypatch.setattr(Engine, "request", slow)
    typed = talk(engine, "sort 3", "sort 4", "sort 5")
    assert [turn.question for turn in typed.session.conversation.turns] == ["sort 3", "sort 5"]
    assert typed.reasons == ["cancelled", "length"]


def test_a_long_conversation_loses_its_oldest_turns_and_that_is_said(engine: Engine):
    assert engine.context == 128
    lines = [f"question number {number} of some length" for number in range(6)]
    typed = talk(engine, *lines, tokens=16)
    assert not typed.problems
    left_out = [note for note in typed.notes if "left out" in note]
    assert left_out[0].startswith("the conversation is longer than the model's context of 128 tokens: the first ")
    last = typed.asked[-1][0]
    assert len(last.ids) <= 128 - 16
    assert lines[-1] in told(engine, last)
    assert lines[0] not in told(engine, last)
    assert len(typed.session.conversation.turns) == 6  # nothing is forgotten, it is only not sent


def test_a_question_that_never_fits_is_refused_and_the_talk_goes_on(engine: Engine):
    typed = talk(engine, "sort 3", "x" * 200, "sort 4")
    assert len(typed.problems) == 1
    assert "no room is left for an answer" in typed.problems[0]
    assert [turn.question for turn in typed.session.conversation.turns] == ["sort 3", "sort 4"]


def test_a_retry_that_fails_leaves_the_conversation(engine: Engine):
    typed = talk(engine, "sort 3", "/set top_k=0", "/system " + "y" * 300, "/retry")
    assert "no room is left" in typed.problems[0]
    assert len(typed.session.conversation.turns) == 1


def test_a_script_ends_at_its_first_mistake(engine: Engine):
    with pytest.raises(UsageError, match="did you mean '/retry'"):
        talk(engine, "/rety", "sort 3", forgiving=False)


def test_a_saved_talk_is_read_by_training(engine: Engine, tmp_path: Path):
    path = tmp_path / "talks" / "talk.jsonl"
    lines = ["/system be brief", "sort 3", "sort 4", f"/save {path}", f"/save {path}", "/clear", "sort 5"]
    typed = talk(engine, *lines, f"/save {path} append")
    assert typed.told[-1] == f"1 turn added to {path}"
    assert typed.problems == [f"/save: {path} is there already"]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [5, 3]
    recipe = load(json.dumps({"model": "builtin:tiny", "dataset": {"train": [str(path)], "val_size": 0}}))
    data = load_data(recipe.dataset, engine.voice({"out": 1.0}).tokenizer, task=tasks.of(recipe.model), seed=0)
    assert len(data.train) == 2
    assert data.forms == {"Turns"}
    typed = talk(engine, "sort 9", f"/save {path} overwrite", "/save a\0.jsonl")
    assert "cannot be written" in typed.problems[0]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_a_run_on_bare_text_is_asked_line_by_line(runs: Callable[[str], Run], tmp_path: Path):
    path = tmp_path / "bare.jsonl"
    typed = Typed("sort: b a -> ", "count: c -> ", f"/save {path}")
    run(Wanted([runs("llama").folder]), Start(settings={"max_new_tokens": 4}), typed)
    said = [note for note in typed.notes if "bare text" in note]
    assert said == ["out is asked in bare text: each line is a prompt of its own, without the lines before it"]
    assert "sort" not in told(None, typed.asked[1][0])  # type: ignore[arg-type]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["sort: b a -> ", "count: c -> "]


def test_the_start_says_who_answers(chat_run: Run):
    typed = Typed("sort 3")
    run(Wanted([chat_run.folder]), Start("0.5*out", system="be brief", settings={"max_new_tokens": 3}), typed)
    assert typed.session.speaker == "0.5*out"
    assert "be brief" in told(None, typed.asked[0][0])  # type: ignore[arg-type]
    typed = Typed()
    run(Wanted([chat_run.folder]), Start(compare=True), typed)
    assert typed.session.speakers == ("base", "out")
    with pytest.raises(UsageError, match="no adapter 'nobody'"):
        run(Wanted([chat_run.folder]), Start("nobody"), Typed())
