"""The command line of `dynlora generate`: its options, and what can be refused before anything heavy loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynlora_cli.cli.options import Base, PlugInOptions, adapters, plug_ins
from dynlora_cli.cli.reporting import Trust, console, reporting
from dynlora_cli.errors import UsageError
from dynlora_cli.files.strict_json import BadJsonError, loads
from dynlora_cli.text import to_type

if TYPE_CHECKING:
    from dynlora_cli.decoding.sampling import Sampling

NEWEST_BELOW = Path("out")

PromptOrFile = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT|-|FILE.jsonl",
        help="A text; - for stdin, which is one prompt; or a file of rows (prompt, messages, instruction, text).",
        show_default=False,
    ),
]
SpeakingAdapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        autocompletion=adapters,
        help="A run folder or any PEFT LoRA; by default the newest run below ./out. Several answer one below the "
        "other. Repeatable.",
        show_default=False,
    ),
]
LibraryFolder = Annotated[
    Path | None,
    typer.Option("--library", metavar="LIB", help="A library; its router decides who answers.", show_default=False),
]
Uses = Annotated[
    list[str] | None,
    typer.Option(
        metavar="base|NAME|MIX|auto",
        help="Who answers: the base, an adapter, a mix such as A+B or 0.7*A+0.3*B, or whom a router chooses. "
        "Repeatable.",
        show_default=False,
    ),
]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The router of --use auto; calibrated if the library is.",
        show_default=False,
        autocompletion=plug_ins("routers"),
    ),
]
Compare = Annotated[bool, typer.Option("--compare", help="The base and every adapter answer.")]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A system message before each prompt.", show_default=False)
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Variables of the chat template over those of training, such as '{\"enable_thinking\": false}'.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens of an answer at most.")]
DoSample = Annotated[
    bool, typer.Option("--do-sample", help="Draw tokens; without it, and the four below, the likeliest is taken.")
]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", help="Divides the logits; 0: the likeliest token.", show_default=False)
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="X", help="Draw among the tokens with this share of the probability.", show_default=False),
]
TopK = Annotated[int | None, typer.Option(metavar="N", help="Draw among the N likeliest tokens.", show_default=False)]
MinP = Annotated[
    float | None,
    typer.Option(metavar="X", help="Draw among tokens with this share of the likeliest's.", show_default=False),
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="X", help="Above 1: less likely are tokens that were there before.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of the drawing.", show_default=False)]
StopStrings = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="An answer ends before this text. Repeatable.", show_default=False),
]
AsLines = Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON on stdout.")]


def generate(
    context: typer.Context,
    prompt: PromptOrFile = None,
    adapter: SpeakingAdapters = None,
    library: LibraryFolder = None,
    use: Uses = None,
    router: Router = None,
    set_: PlugInOptions = None,
    compare: Compare = False,
    system: System = None,
    chat_template_kwargs: TemplateKwargs = None,
    max_new_tokens: MaxNewTokens = 256,  # noqa: ARG001 - this and the others below by `context`
    do_sample: DoSample = False,  # noqa: ARG001
    temperature: Temperature = None,  # noqa: ARG001
    top_p: TopP = None,  # noqa: ARG001
    top_k: TopK = None,  # noqa: ARG001
    min_p: MinP = None,  # noqa: ARG001
    repetition_penalty: RepetitionPenalty = 1.0,  # noqa: ARG001
    seed: Seed = None,  # noqa: ARG001
    stop_strings: StopStrings = None,  # noqa: ARG001
    base: Base = None,
    trust_remote_code: Trust = False,
    as_json: AsLines = False,
) -> None:
    """Let adapters and their base answer a prompt. stdout holds the answers, and nothing else."""
    out, stdin = sys.stdout, sys.stdin
    with reporting(as_json, lines=True):
        sampling, kwargs = sampling_of(context), kwargs_of(chat_template_kwargs)
        uses, options = uses_of(use or [], router, set_ or [], compare), set_ or []
        folders = folders_of(adapter or [], library, base)
        check_named(folders, library, base, router, options, uses)
        if prompt is None:
            raise UsageError("there is no prompt", 'such as: dynlora generate "Once upon a time"; - reads stdin')
        from dynlora_cli.generation.prompts import read_prompts

        prompts, notes = read_prompts(prompt, stdin)
        from dynlora_cli.cli.views.answers import AnswerLines, AnswerView, ReaderGoneError

        several = compare or len(uses) > 1 or (not uses and len(folders) > 1) or len(prompts) > 1
        view = AnswerLines if as_json else AnswerView
        shown = view(console(), out, prompts, several=several)
        for note in notes:
            shown.note(note)
        from dynlora_cli.commands import generate as command
        from dynlora_cli.generation.opening import Wanted

        wanted = Wanted(folders, library, base, router, options, trust_remote_code)
        try:
            command.run(wanted, command.Asked(prompts, uses, compare, system, sampling, kwargs), shown)
        except ReaderGoneError:
            raise typer.Exit(0) from None
        finally:
            shown.leave()


def kwargs_of(text: str | None) -> dict[str, Any]:
    """The variables of `--chat-template-kwargs`.

    Raises:
        UsageError: it is no JSON object, or names something else.
    """
    option = "--chat-template-kwargs"
    example = f"""such as: {option} '{{"enable_thinking": false}}'"""
    try:
        value = loads(text or "{}")
    except BadJsonError as error:
        raise UsageError(f"{option} is {error.reason}", example) from None
    if not isinstance(value, dict):
        raise UsageError(f"{option} is no JSON object", example)
    from dynlora_cli.config.types import RESERVED_KWARGS, text_for_a_truth  # brings pydantic

    if taken := sorted(RESERVED_KWARGS & set(value)):
        raise UsageError(f"{option}: {taken[0]} is no variable to be set here", "leave it out")
    if said := text_for_a_truth(value):
        raise UsageError(f"{option}: {said}", example)
    return value


def sampling_of(context: typer.Context) -> Sampling:
    """How answers are written, by the options of a command.

    Raises:
        UsageError: they make no sense.
    """
    from dynlora_cli.decoding.sampling import Sampling

    return Sampling.of(**settings_of(context))


def settings_of(context: typer.Context) -> dict[str, Any]:
    """What a person has said of how answers are written, as `Sampling.of` takes it."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    given = {name: context.params[name] for name in names if context.params[name] is not None}
    given |= {"do_sample": True} if context.params["do_sample"] else {}
    return given | ({"stop_strings": tuple(stops)} if (stops := context.params["stop_strings"]) else {})


def uses_of(uses: list[str], router: str | None, options: Sequence[str], compare: bool) -> list[str]:
    """Who answers; naming a router means that it decides.

    Raises:
        UsageError: a router is named, and nobody asks it.
    """
    if not router:
        if options and "auto" not in uses and (uses or compare):
            raise UsageError(f"--set {options[0]} is of a router, and none decides", "leave it out, or add --use auto")
        return uses
    if not uses and not compare:
        return ["auto"]
    if "auto" not in uses:
        raise UsageError(f"--router {router} decides for --use auto alone", "add --use auto, or leave it out")
    return uses


def folders_of(adapters: list[Path], library: Path | None, base: str | None) -> list[Path]:
    """The adapters' folders; the newest run where nothing is named.

    Raises:
        UsageError: nothing is, and there is no run.
    """
    if adapters or library is not None:
        return adapters
    if not NEWEST_BELOW.is_dir():
        if base:
            return []
        raise UsageError("there is no run below ./out", "train one first, or name one with --adapter FOLDER")
    return [] if base else [NEWEST_BELOW]


def check_named(
    folders: Sequence[Path],
    library: Path | None,
    base: str | None,
    router: str | None,
    options: Sequence[str],
    uses: Sequence[str],
) -> None:
    """What the disk alone can answer.

    Raises:
        UsageError: a folder, a library, a router or a name is not there.
    """
    from dynlora_cli.commands import preflight
    from dynlora_cli.config.mix import AUTO, RESERVED, parse_mix

    names = preflight.names(preflight.adapters(folders, base))
    if library is not None:
        from dynlora_cli.library.library import Library

        entries = [entry.name for entry in Library.open(library).entries]
        if not entries:
            raise UsageError(
                f"the library {library} is empty", to_type("library", "add", library, "--adapter", "FOLDER")
            )
        names += entries
    if router is not None:
        from dynlora_cli.config.options import given
        from dynlora_cli.routing.router import needs_of

        needs_of(router)
        given("routers", router, options)
    all_names = [*RESERVED, *names]
    if len(set(all_names)) == len(all_names):  # else they get longer ones, when their adapters are read
        for use in uses:
            if use.strip() != AUTO:
                parse_mix(use, names)
