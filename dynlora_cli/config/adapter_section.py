"""The section `adapter` of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, create_model

from dynlora_cli.config.dtypes import SavedDtype
from dynlora_cli.config.types import HomePath, NotForeign, OneAlone, PlugIn, Positive, Section, Text
from dynlora_cli.text import show

LIBRARY_ROWS = "builtin:library"  # a source of rows: those that the adapters of `library` were trained on


# `from` is a word of Python, so no class body can have it as a field.
_AdapterFrom = create_model(
    "_AdapterFrom",
    __base__=Section,
    **{"from": (HomePath | None, Field(default=None, description="An adapter to go on from: its folder; null: none."))},  # type: ignore[call-overload]
)


def _no_space(value: str) -> str:
    """Refuses a token that nobody could see."""
    if not value.strip():
        raise ValueError(f"got {show(value)}, which is white space alone, and nobody could see it")
    return value


TokenText = Annotated[Text, AfterValidator(_no_space)]


class NewToken(Section):
    """A token that the tokenizer gets."""

    content: TokenText
    """Its text, such as `<|step|>`."""
    special: bool = False
    """Answers are shown without it, as without an end-of-text token; false: it stays in them."""


def _each_once(wanted: list[NewToken]) -> list[NewToken]:
    texts = [one.content for one in wanted]
    if twice := [text for text in dict.fromkeys(texts) if texts.count(text) > 1]:
        raise ValueError(f"{show(twice[0])} is there twice; name each token once")
    return wanted


class Adapter(_AdapterFrom):
    """Where the components sit and how they act."""

    old: Literal["tune", "freeze", "magnitudes"] = "tune"
    """What the components of `from` do: train on, stay as they are, or train their size alone. One budget for all."""

    variant: Annotated[str, PlugIn("variants")] = "lora"
    """How a layer uses its components: a file name in dynlora_cli/lora/variants."""
    target_modules: (
        Annotated[Text, AfterValidator(NotForeign("target_modules"))] | Annotated[list[Text], Field(min_length=1)]
    ) = "all-linear"
    """all-linear (every linear layer but the output head), attention, qv, experts, or module names and globs."""
    scaling: Literal["lora", "rslora"] = "lora"
    """lora: alpha / r; rslora: alpha / sqrt(r); r is the budget's average rank, constant for the run."""
    alpha: Positive | Literal["auto"] = "auto"
    """Numerator of the scale; auto: so that the scale is 2, which for lora is the customary alpha = 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    freeze_a: bool = False
    """Train B alone (LoRA-FA): layers keep no inputs for the backward pass, which saves memory."""
    penalty: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of the variant's own penalty (adalora: orthogonality, sora: threshold, ard: L1); others have none."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.0
    """With `from`: weight of O-LoRA's penalty, Σ |cos| between old and new rows of A; 0.5 is a strong one."""
    init_weights: Literal["default", "orthogonal", "eva", "pissa", "loftq", "inflora"] = "default"
    """Start of A and B; default: B = 0, A kaiming_uniform(a=sqrt 5), as PEFT; the others: dynlora_cli/lora/init.py."""

    save_dtype: SavedDtype = "float32"
    """Number format of the factors in the finished adapter: float32, bf16 or fp8 (e4m3); training is in float32."""

    new_tokens: Annotated[list[NewToken], AfterValidator(_each_once)] = []  # noqa: RUF012 - pydantic copies it
    """Texts that become one token each, whose rows of the input and output tables train as well, beside the budget."""
    new_tokens_init: Literal["mean", "text"] = "mean"
    """First values of their rows: the mean of all old rows, or of the old tokens that the text had."""

    library: Annotated[list[HomePath], Field(min_length=1), OneAlone()] | None = None
    """Adapters that a router learns to choose from: their folders; a library folder stands for all that is in it."""

    @property
    def origin(self) -> str | None:
        """The key `from`."""
        return getattr(self, "from")

    @property
    def names_experts(self) -> bool:
        """Whether every expert of a mixture gets components of its own."""
        wanted = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        return any(re.search(r"(^|\W)experts(\W|$)", pattern) for pattern in wanted)
