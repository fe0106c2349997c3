"""Options that a plug-in brings along. Its file declares them as a literal, which is read without importing the file:

    OPTIONS = {
        "strength": {"type": "float", "default": 0.5, "above": 0, "help": "How strong."},
        "shape": {"type": "choice", "choices": ["flat", "round"], "default": "flat", "help": "How it looks."},
    }

type                               int, float, bool, str or choice
default                            what holds where nothing is given; with None, `null` may be given too
help                               a sentence about it
above, at_least, below, at_most    bounds of a number
choices                            of a choice

For plug-ins that a recipe chooses they become keys of the recipe (config/plug_in_keys.py). For those that are chosen on
the command line they are given as `--set KEY=VALUE`, and `given` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from dynlora_cli import plugins
from dynlora_cli.config import strict_yaml
from dynlora_cli.config.schema import allowed
from dynlora_cli.config.types import Section, whole
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import first_fault
from dynlora_cli.text import did_you_mean, show

TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
BOUNDS = {"above": "gt", "at_least": "ge", "below": "lt", "at_most": "le"}


class Option(BaseModel):
    """One option, as a plug-in declares it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["int", "float", "bool", "str", "choice"]
    default: bool | int | float | str | None  # smart mode keeps each as it is
    help: str
    above: int | float | None = None
    at_least: int | float | None = None
    below: int | float | None = None
    at_most: int | float | None = None
    choices: tuple[str, ...] = ()

    @property
    def annotation(self) -> Any:
        """The option as the type of a pydantic field."""
        kind = Literal[self.choices] if self.type == "choice" else TYPES[self.type]
        bounds = {BOUNDS[name]: getattr(self, name) for name in BOUNDS if getattr(self, name) is not None}
        if bounds:
            kind = Annotated[kind, Field(**bounds)]
        if self.type == "int":
            kind = Annotated[kind, BeforeValidator(whole)]
        return kind if self.default is not None else kind | None


@cache
def _reader() -> TypeAdapter[dict[str, Option]]:
    return TypeAdapter(dict[str, Option])


def options(kind: str, name: str) -> dict[str, Option]:
    """The options that a plug-in declares; most declare none.

    Raises:
        UsageError: its declaration is wrong; the message is for whoever wrote the plug-in.
    """
    declared = plugins.declared(kind, name, "OPTIONS")
    if not declared:
        return {}
    try:
        found = _reader().validate_python(declared)
        for key, option in found.items():
            _check(key, option)
    except ValidationError as error:
        raise misdeclared(kind, name, "OPTIONS", first_fault(error)) from None
    except ValueError as error:
        raise misdeclared(kind, name, "OPTIONS", str(error)) from None
    return found


@cache  # every look at a recipe asks again
def _check(key: str, option: Option) -> None:
    """Raises ValueError for what no recipe could hold, and for a default that the option itself would refuse."""
    if not key.isidentifier() or key.startswith("_"):
        raise ValueError(f"{key!r} cannot be a key: write letters, digits and `_`")
    if (option.type == "choice") != bool(option.choices):
        raise ValueError(f"{key}: `choices` go with the type choice, and it needs some")
    try:
        section({key: option}).model_validate({key: option.default})
    except ValidationError as error:
        raise ValueError(f"the default of {first_fault(error)}") from None


def misdeclared(kind: str, name: str, constant: str, fault: str) -> UsageError:
    """What a literal in a plug-in's file is answered by that cannot be used."""
    return UsageError(
        f"{plugins.WORDS[kind]} {name}: {constant} in its file cannot be used: {fault}", "mend the plug-in"
    )


def section(found: Mapping[str, Option], base: type[Section] = Section) -> type[Section]:
    """A section of a recipe with these keys, besides those that it has already.

    Raises:
        ValueError: it has one of them already.
    """
    return _section(tuple(found.items()), base)


@cache
def _section(found: tuple[tuple[str, Option], ...], base: type[Section]) -> type[Section]:
    fields: dict[str, Any] = {}
    for key, option in found:
        if key in base.model_fields or hasattr(base, key):
            raise ValueError(f"`{key}` means something else already; take another name")
        fields[key] = (option.annotation, Field(default=option.default, description=option.help))
    if not fields:
        return base
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **fields)


def given(kind: str, name: str, texts: Sequence[str]) -> Section:
    """The options of a plug-in that the command line chooses, as attributes.

    Args:
        kind, name: of the plug-in.
        texts: `KEY=VALUE`, as `--set` was given them; values are YAML.

    Raises:
        UsageError: the plug-in has no such option, or a value is none that it takes.
    """
    found, values = options(kind, name), {}
    form = section(found)
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {text}: must be written KEY=VALUE")
        if key not in found:
            takes = f"it takes: {', '.join(found)}" if found else "it takes none"
            raise UsageError(
                f"--set {text}: {plugins.WORDS[kind]} {name} has no option {key!r}{did_you_mean(key, found)}", takes
            )
        if key in values:
            raise UsageError(f"--set {text}: {key} is set twice", "say it once")
        node, problems = strict_yaml.parse(value, f"--set {text}", numbered=False)
        if node is None or problems:
            raise UsageError("\n".join(str(problem) for problem in problems))
        values[key] = node.plain()
        try:
            form.model_validate({key: values[key]})
        except ValidationError:
            schema = form.model_json_schema()
            must = allowed(schema["properties"][key], schema)
            raise UsageError(f"--set {text}: got {show(values[key])}, must be {must}") from None
    return form.model_validate(values)
