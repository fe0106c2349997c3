"""The command line of `dynlora serve`: its options, and what can be refused before anything heavy loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dynlora_cli.cli.options import PlugInOptions, adapters, plug_ins
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting
from dynlora_cli.errors import MachineError, UsageError

PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
PROXY_PACKAGES = {"httpx2": "httpx2"}
INSTALL = 'pip install "dynlora[serve]"'
KEY_VARIABLE, UPSTREAM_KEY_VARIABLE = "DYNLORA_API_KEY", "DYNLORA_UPSTREAM_API_KEY"
NOT_OF_A_PROXY = {"model", "adapter", "allow_loading", "max_batch", "max_queue", "trust_remote_code"}

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
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder or any PEFT LoRA. Repeatable.",
        show_default=False,
        autocompletion=adapters,
    ),
]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        autocompletion=plug_ins("routers"),
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
Timeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0.1, help="That a request may take; with --upstream, that it may be silent."),
]
UpstreamUrl = Annotated[
    str | None,
    typer.Option(
        "--upstream",
        metavar="URL",
        help="Answer by this server (vLLM, SGLang, llama-server): only `auto` is decided here. Takes --library.",
        show_default=False,
    ),
]
Kind = Annotated[
    str, typer.Option("--upstream-kind", metavar="KIND", help="vllm, sglang, llama-server, or auto: as it says itself.")
]
UpstreamKey = Annotated[
    str | None,
    typer.Option(
        "--upstream-api-key",
        metavar="KEY",
        envvar=UPSTREAM_KEY_VARIABLE,
        help="That the upstream asks for. Clients get in with it only where they must send --api-key; "
        "else each needs the upstream's key itself.",
        show_default=False,
    ),
]


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
    upstream: UpstreamUrl = None,
    upstream_kind: Kind = "auto",  # noqa: ARG001 - read in _route
    upstream_api_key: UpstreamKey = None,  # noqa: ARG001
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Answer as OpenAI's API does: a base, its adapters, blends, a router; or route before a larger server."""
    with reporting(as_json) as result:
        _require(PACKAGES if upstream is None else PACKAGES | PROXY_PACKAGES)
        keys = _keys(api_key)
        _refuse_open_door(host, keys)
        view = console()
        for name, variable in (("api_key", KEY_VARIABLE), ("upstream_api_key", UPSTREAM_KEY_VARIABLE)):
            if _typed(context, name):
                option = f"--{name.replace('_', '-')}"
                view.warning(f"{option} can be read by everybody on this machine (ps); set {variable} instead")
        if upstream is not None:
            result.update(_route(context, keys, view.line))
            return
        _check_no_proxy(context)
        _check_named(model, library, adapter or [], router, allow_loading)
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


def _route(context: typer.Context, keys: tuple[str, ...], tell: Callable[[str], None]) -> dict[str, Any]:
    """The proxy, by what stands on the command line.

    Raises:
        DynloraError: with the exit code that fits.
    """
    given = context.params
    _check_proxy(context, given["library"], given["upstream_kind"])
    from dynlora_cli.commands import serve_proxy

    wanted = serve_proxy.Wanted(
        given["upstream"],
        given["library"],
        router=given["router"],
        options=given["options"] or [],
        kind=given["upstream_kind"],
        upstream_key=next(iter(_keys(given["upstream_api_key"])), None),
        host=given["host"],
        port=given["port"],
        keys=keys,
        timeout=given["timeout"],
    )
    return serve_proxy.run(wanted, tell)


def _typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_proxy(context: typer.Context, library: Path | None, kind: str) -> None:
    """Check what goes with --upstream.

    Raises:
        UsageError: something does not, or there is no library.
    """
    from dynlora_cli.cli.values import choice
    from dynlora_cli.library.library import Library

    for parameter in context.command.params:
        if parameter.name in NOT_OF_A_PROXY and _typed(context, parameter.name):
            raise UsageError(
                f"{parameter.opts[0]} and --upstream do not go together: the upstream has the model",
                f"leave out {parameter.opts[0]}",
            )
    choice(kind, ("auto", "vllm", "sglang", "llama-server"), "--upstream-kind")
    if library is None:
        raise UsageError("--upstream routes by a library's keys, and none is named", "name it: --library LIB")
    Library.open(library)


def _check_no_proxy(context: typer.Context) -> None:
    """Refuse what is of a proxy alone.

    Raises:
        UsageError: it stands there without --upstream.
    """
    for name in ("upstream_kind", "upstream_api_key"):
        if _typed(context, name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is of an upstream, and none is named", "name it: --upstream URL")


def _require(packages: Mapping[str, str]) -> None:
    """Check that the packages of the extra are there.

    Raises:
        MachineError: one is not.
    """
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
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
