"""What is asked about a text: prompts by which a model writes requests of several kinds, and how they are read.

The model goes on with a list of examples, each a piece of text and a request about it. So models ask that are too small
to follow an instruction, and by the first word of the request they ask in different ways. That several kinds of
requests teach a text better than one is from the self-study of Cartridges [Eyuboglu et al. 2025, arXiv 2506.06266].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

LONGEST, SHORTEST = 300, 10  # characters of a request
LEAST_WORDS = 6  # of a sentence that is asked about, or cut in two
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Chinese and Japanese, whose characters count as words
_PIECE = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
WIDE = 4  # sentences that a request to explain or list is about; others are about two

_EXAMPLES = (
    ("Eiffel Tower: It was finished in 1889. It is 330 metres tall.", "How tall is the Eiffel Tower?"),
    ("Eiffel Tower: It was finished in 1889. It is 330 metres tall.", "When was the Eiffel Tower finished?"),
    ("Marie Curie: She discovered polonium together with her husband Pierre.", "What did Marie Curie discover?"),
    (
        "Honey bees: Most of them die after they sting, since the sting stays in the skin.",
        "Why do most honey bees die?",
    ),
    ("Museum of Arvik: Gerda Holm leads it since 2014. It is closed on Mondays.", "Who leads the museum of Arvik?"),
    (
        "Pumps: The red lamp tells that the filter is full. Clean it with water, and press the key for two seconds.",
        "Explain what to do when the red lamp of the pump is on.",
    ),
    ("Saint Olaf Street: There are a bakery, two cafes and a school.", "List what there is in Saint Olaf Street."),
)
HEAD = "".join(f"Text: {text}\nRequest: {request}\n\n" for text, request in _EXAMPLES)
STOP = "\n"


class Way(NamedTuple):
    """A way to ask: the kind of request, and the word that it begins with; empty: as the model likes."""

    kind: str
    begin: str


WAYS = (
    Way("facts", "What"),
    Way("facts", "Who"),
    Way("facts", "When"),
    Way("facts", "How many"),
    Way("facts", ""),
    Way("facts", "Where"),
    Way("facts", "Which"),
    Way("reasons", "Why"),
    Way("summary", "Explain"),
    Way("reasons", "How"),
    Way("structure", "List"),
    Way("summary", "Describe"),
)
_NO_QUESTION = ("summary", "structure")
_WORD = re.compile(r"\w+", re.UNICODE)
_NUMBER = re.compile(r"\d+(?:[,.]\d{3}(?!\d))*")  # 1,500 and 1.500 are one number, and so is 1500
_LAST_NUMBER = re.compile(r"\d(?:[,.]?\d)*,?$")
_NUMBERED = re.compile(r"^\s*\d+[.)]\s", re.M)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n\s*\n|\n(?=\s*(?:[-*#\d]))")
# Of the text itself, which whoever asks later has not before them.
_ABOUT_THE_TEXT = re.compile(r"\b(?:the|this)\s+(?:text|passage|document|article|paragraph|sentence)\b|\babove\b", re.I)


def prompt(title: str, part: str, way: Way) -> str:
    """What the model goes on with."""
    named = f"{title}: {part}" if title else part
    return f"{HEAD}Text: {named}\nRequest:{' ' if way.begin else ''}{way.begin}"


def tries(text: str) -> list[tuple[Way, str]]:
    """All ways to ask about all parts of a text: first each part in one way, neighbours in different ones, and so on.

    A part is a sentence with the one before it; of requests to explain or to list it is some more of them.
    """
    found = sentences(text) or [" ".join(text.split())]
    tried: list[tuple[Way, str]] = []
    for turn in range(len(WAYS)):
        for number in range(len(found)):
            way = WAYS[(number + turn) % len(WAYS)]
            size = WIDE if way.kind in _NO_QUESTION else 2
            tried.append((way, " ".join(found[max(0, number + 1 - size) : number + 1])))
    return tried


def read_request(answer: str, way: Way, title: str, text: str) -> str:
    """The request in what a model has written, or empty where it is none, or not about the text.

    Args:
        answer: the model's.
        way: that it was asked in.
        title, text: what it is to be about: names and numbers in it must be there.
    """
    line = f"{way.begin}{answer.split(STOP)[0]}" if way.begin else answer.split(STOP)[0]
    line = " ".join(line.split())
    if way.kind not in _NO_QUESTION:
        line = line[: line.find("?") + 1]
    elif not line.endswith((".", "?", "!")):
        return ""
    if not SHORTEST <= len(line) <= LONGEST or _ABOUT_THE_TEXT.search(line):
        return ""
    known = {word.lower() for word in _WORD.findall(f"{title} {text}")}
    words = _WORD.findall(line)
    names = [word for word in words[1:] if word[:1].isupper() or word[:1].isdigit()]
    if any(name.lower() not in known and _stem(name) not in map(_stem, known) for name in names):
        return ""
    return line if any(len(word) > 3 and word.lower() in known for word in words[1:]) else ""


def invented(answer: str, *known: str) -> list[str]:
    """Numbers in an answer that are nowhere in what it is taken from: small models make them up.

    Args:
        answer: as a model wrote it; the numbers of the points of a list are not meant.
        known: the text, its title and the request.
    """
    there = {number for text in known for number in _numbers(text)}
    text = _NUMBERED.sub("", answer)
    last = _LAST_NUMBER.search(text)
    if last and any(number.startswith(_joined(last.group())) for number in there):
        text = text[: last.start()]  # there may have been no room for the rest of it
    return [number for number in _numbers(text) if number not in there]


def _numbers(text: str) -> list[str]:
    return list(map(_joined, _NUMBER.findall(text)))


def _joined(number: str) -> str:
    """Without what separates thousands."""
    return number.replace(",", "").replace(".", "")


def _stem(word: str) -> str:
    """A word without the ending of its genitive or plural."""
    return word.lower().removesuffix("s")


def same(text: str) -> str:
    """What two requests have in common that are one."""
    return " ".join(_WORD.findall(text.lower()))


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line; no headings, and nothing of a few words."""
    found = (" ".join(part.split()) for part in _SENTENCE_END.split(text))
    return [part for part in found if len(_PIECE.findall(part)) >= LEAST_WORDS and not part.startswith("#")]


# -- models that cannot be asked -------------------------------------------------------------------------------------


def beginnings(text: str) -> Iterator[tuple[str, str]]:
    """Beginnings of the sentences of a text, each with how it goes on.

    A sentence is cut once a third of the way and once two thirds. What follows is its rest, with the space before it.
    """
    for sentence in sentences(text):
        ends = [match.end() for match in _PIECE.finditer(sentence)]
        for share in (1 / 3, 2 / 3):
            at = ends[max(1, round(len(ends) * share)) - 1]
            yield sentence[:at], sentence[at:]
