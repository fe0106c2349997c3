"""The command line of `dynlora serve`: its options, and what can be refused before anything heavy loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import PlugInOptions
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting
from dynlora_cli.errors import MachineError, UsageError

PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
INSTALL = 'pip install "dynlora[serve]"'
KEY_VARIABLE = "DYNLORA_API_KEY"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--base",
        metavar="FOLDER|NAME",
        help="The base model: alone, or in place of the one on record of adapters and library.",
        show_default=False,
    ),
]
LibraryFolder = Annotated[
    Path | None,
    typer.Option("--library", metavar="LIB", help="All adapters of a library, and `auto`.", show_default=False),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="FOLDER", help="A run folder or any PEFT LoRA. Repeatable.", show_default=False),
]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What decides on `auto`. By default calibrated where the library is, else embedding.",
        show_default=False,
    ),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Where it answers; another than this machine needs a key.")]
Port = Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar=KEY_VARIABLE,
        help="Who asks must send it. On the command line others on this machine can see it (ps): prefer the variable.",
        show_default=False,
    ),
]
AllowLoading = Annotated[
    bool,
    typer.Option("--allow-loading", help="Clients may load and unload adapters, of the library's folder alone."),
]
MaxBatch = Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="Answers that are written at once.")]
MaxQueue = Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Answers that may wait.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="That a request may take.")]


def serve(
    context: typer.Context,
    model: Model = None,
    library: LibraryFolder = None,
    adapter: Adapters = None,
    router: Router = None,
    options: PlugInOptions = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    allow_loading: AllowLoading = False,
    max_batch: MaxBatch = 16,
    max_queue: MaxQueue = 128,
    timeout: Timeout = 300.0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Answer as OpenAI's API does: a base, its adapters, blends, a router. For evaluation and small loads."""
    with reporting(as_json) as result:
        _require()
        keys = _keys(api_key)
        _refuse_open_door(host, keys)
        _check_named(model, library, adapter or [], router, allow_loading)
        view = console()
        if keys and (source := context.get_parameter_source("api_key")) and source.name == "COMMANDLINE":
            view.warning(f"--api-key can be read by everybody on this machine (ps); set {KEY_VARIABLE} instead")
        from dynlora_cli.commands import serve as command
        from dynlora_cli.generation.engine import Wanted

        engine = Wanted(
            adapters=adapter or [],
            library=library,
            base=model,
            router=router,
            options=options or [],
            trust_remote_code=trust_remote_code,
        )
        wanted = command.Wanted(
            engine,
            host=host,
            port=port,
            keys=keys,
            allow_loading=allow_loading,
            max_batch=max_batch,
            max_queue=max_queue,
            timeout=timeout,
        )
        result.update(command.run(wanted, view.line))


def _require() -> None:
    """Check that the packages of the extra are there.

    Raises:
        MachineError: one is not.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MachineError(f"dynlora serve needs {', '.join(missing)}", INSTALL)


def _keys(api_key: str | None) -> tuple[str, ...]:
    """The key, if there is one.

    Raises:
        UsageError: it cannot be sent in a header.
    """
    if api_key is None:
        return ()
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise UsageError(
            "the API key is empty, or holds blanks or letters that a header cannot carry",
            "python -c 'import secrets; print(secrets.token_urlsafe())' makes one",
        )
    return (api_key,)


def _refuse_open_door(host: str, keys: Sequence[str]) -> None:
    """Check that nobody else can ask without a key.

    Raises:
        UsageError: the address can be reached from other machines, and there is no key.
    """
    from dynlora_cli.serving.hosts import is_loopback

    if not keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, and there is no API key",
            f"set {KEY_VARIABLE}, or leave --host out",
        )


def _check_named(
    model: str | None, library: Path | None, adapters: Sequence[Path], router: str | None, allow_loading: bool
) -> None:
    """Check that what is named is there.

    Raises:
        UsageError: it is not, or nothing is named.
    """
    if not (model or library or adapters):
        raise UsageError("nothing to serve is named", "name --library LIB, --adapter FOLDER or --model FOLDER")
    if allow_loading and library is None:
        raise UsageError("--allow-loading is of a library's adapters, and there is none", "name one with --library")
    if router and library is None and not adapters:
        raise UsageError("--router chooses among adapters, and there are none", "name --library or --adapter")
    from dynlora_cli.commands import preflight
    from dynlora_cli.library.library import Library

    if library is not None:
        Library.open(library)
    preflight.adapters(adapters, model)
