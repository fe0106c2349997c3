"""The servers that the proxy stands before: what each of them is asked at the start, and how it is told an adapter.

vllm          `model` is the adapter's name. /v1/models lists adapters with `parent`.
sglang        `model` is BASE:ADAPTER, split at the first colon. /v1/models of newer versions lists adapters as vLLM
              does; older ones say them in /get_server_info.
llama-server  `lora: [{id, scale}]` in the request. /lora-adapters lists ids and the paths of their files; every id is
              said in every request, since an empty list means those that are on by default, which may be all.

Each says in /v1/models who it is: `owned_by`. What they answer was read in their source (vLLM
entrypoints/openai/serving_models.py, SGLang entrypoints/http_server.py and openai/serving_base.py, llama.cpp
tools/server), of llama-server also tried.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dynlora_cli.errors import DynloraError, UsageError

Kind = Literal["vllm", "sglang", "llama-server"]
KINDS: tuple[Kind, ...] = ("vllm", "sglang", "llama-server")
UNTOLD = "auto"  # in place of a kind: the server itself says it
OWNERS: dict[str, Kind] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama-server"}

# Asks the upstream for a path: the JSON of its answer, or None where it has no such path.
Get = Callable[[str], Awaitable[Any]]


class CannotError(ValueError):
    """The upstream cannot do what was decided; the message says why."""


@dataclass(frozen=True)
class Upstream:
    """A server as it answered.

    Attributes:
        kind: of KINDS.
        base: how it calls its base model.
        has: those of the wanted adapters that it has, with its own name or number of each.
        ids: llama-server alone: the numbers of all its adapters.
        notes: for people.
    """

    kind: Kind
    base: str
    has: Mapping[str, str | int]
    ids: Sequence[int] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def own_keys(self) -> tuple[str, ...]:
        """Keys of a request by which a client chooses adapters itself; they do not go with `auto`."""
        return {"vllm": (), "sglang": ("lora_path",), "llama-server": ("lora",)}[self.kind]

    @property
    def unless_given(self) -> dict[str, Any]:
        """What a request says where its client does not say otherwise.

        llama-server keeps prompts that it has read for later requests, and forgets with which adapter it read them: an
        answer may rest on another adapter's prompt (llama.cpp issue 26207; seen in build 11434).
        """
        return {"cache_prompt": False} if self.kind == "llama-server" else {}

    def values(self, mix: Mapping[str, float]) -> dict[str, Any]:
        """What a request must say so that it is answered by a mix; {} is the base.

        Args:
            mix: weights of adapters in `has`.

        Raises:
            CannotError: vLLM and SGLang take one adapter a request, as it was trained.
        """
        if self.kind == "llama-server":
            scales = {self.has[name]: weight for name, weight in mix.items()}
            return {"model": self.base, "lora": [{"id": each, "scale": scales.get(each, 0.0)} for each in self.ids]}
        if not mix:
            return {"model": self.base}
        if len(mix) > 1 or set(mix.values()) != {1.0}:
            raise CannotError(f"{self.kind} answers a request with one adapter, as it was trained")
        (name,) = mix
        return {"model": f"{self.base}:{self.has[name]}" if self.kind == "sglang" else str(self.has[name])}


async def ask(get: Get, wanted: Sequence[str], kind: str = UNTOLD) -> Upstream:
    """Ask a server what it is, and which adapters it has.

    Args:
        get: asks it.
        wanted: names of the library's adapters.
        kind: of KINDS, or `auto`: as it says itself.

    Raises:
        UsageError: it does not say what it is, or adapters cannot be told apart there.
        DynloraError: its answer is not what such a server answers.
    """
    cards = _cards(await get("/v1/models"))
    owner = str(cards[0].get("owned_by", "")) if cards else ""
    found = kind if kind != UNTOLD else OWNERS.get(owner.lower())
    if not cards:
        raise DynloraError("the upstream's /v1/models lists no model", "look at what it says itself")
    if found is None and owner == "dynlora":
        raise UsageError(
            "the upstream is `dynlora serve`, which has a router itself",
            "ask it for the model auto; to try the proxy before it all the same: --upstream-kind vllm",
        )
    if found is None:
        raise UsageError(
            f"the upstream's models are owned by {owner!r}, by which nobody can tell what it is",
            f"say so: --upstream-kind {'|'.join(KINDS)}",
        )
    return await {"vllm": _vllm, "sglang": _sglang, "llama-server": _llama_server}[found](get, cards, wanted)


def _cards(answer: Any) -> list[dict[str, Any]]:
    data = answer.get("data") if isinstance(answer, dict) else None
    return [card for card in data if isinstance(card, dict) and "id" in card] if isinstance(data, list) else []


def _base(cards: Sequence[Mapping[str, Any]]) -> str:
    return str(next((card["id"] for card in cards if not card.get("parent")), cards[0]["id"]))


async def _vllm(get: Get, cards: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Upstream:  # noqa: ARG001
    listed = {str(card["id"]) for card in cards if card.get("parent")}
    return Upstream("vllm", _base(cards), {name: name for name in wanted if name in listed})


async def _sglang(get: Get, cards: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Upstream:
    base = _base(cards)
    if ":" in base:
        raise UsageError(
            f"SGLang reads `model` as BASE:ADAPTER, and its base is called {base!r}",
            "start it with a --served-model-name without a colon",
        )
    listed = {str(card["id"]) for card in cards if card.get("parent")}
    if not listed:
        listed = set(_lora_names(await get("/get_server_info")))
    return Upstream("sglang", base, {name: name for name in wanted if name in listed})


def _lora_names(info: Any) -> Iterable[str]:
    """Names of adapters in SGLang's server arguments, in the forms that its versions have had."""
    paths = info.get("lora_paths") if isinstance(info, dict) else None
    if isinstance(paths, dict):
        yield from paths
    for path in paths if isinstance(paths, list) else ():
        if isinstance(path, str):
            yield path.partition("=")[0]
        elif isinstance(path, dict) and isinstance(path.get("lora_name"), str):
            yield path["lora_name"]


async def _llama_server(get: Get, cards: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Upstream:
    listed = await get("/lora-adapters")
    if not isinstance(listed, list) or not all(isinstance(each, dict) and "id" in each for each in listed):
        raise DynloraError("the upstream does not answer /lora-adapters as llama-server does", "is it one?")
    found: dict[str, list[int]] = {}
    for each in listed:
        for name in _names_of(str(each.get("path", "")), wanted):
            found.setdefault(name, []).append(int(each["id"]))
    if twice := next((name for name, numbers in found.items() if len(numbers) > 1), None):
        raise UsageError(
            f"llama-server has more than one adapter that may be {twice}",
            f"let one file alone be called {twice}.gguf, or lie in a folder {twice}",
        )
    notes = [
        "llama-server mixes up the prompts that it keeps of different adapters (llama.cpp issue 26207), so requests go "
        "out with cache_prompt: false; it is safe to set it true in a request where llama-server has --cache-ram 0"
    ]
    if any(each.get("scale") for each in listed):
        notes.append(
            "llama-server applies all its adapters at once to a request that names none, whatever "
            "--lora-init-without-apply says; to have the base there: curl -X POST URL/lora-adapters -d '[]'"
        )
    has = {name: numbers[0] for name, numbers in found.items()}
    return Upstream("llama-server", _base(cards), has, [int(each["id"]) for each in listed], notes)


def _names_of(path: str, wanted: Sequence[str]) -> list[str]:
    """The adapter whose file this is: by the name of the file, else of its folder (`dynlora export --out NAME`)."""
    *folders, file = re.split(r"[/\\]", path)
    for name in (file.removesuffix(".gguf"), folders[-1] if folders else ""):
        if name in wanted:
            return [name]
    return []
