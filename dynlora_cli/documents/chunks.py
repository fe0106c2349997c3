"""A text cut into chunks that fit into a prompt: at the ends of paragraphs, else of sentences, else of words."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dynlora_cli.documents.document import Document

CHUNK = 512  # tokens
EVEN = (1.1, 1.25, 1.5)  # of the mean length: the first of these with which no further chunk is needed
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
_WORD = re.compile(r"\s+")
Span = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """A part of a document.

    Attributes:
        document: its number among the documents.
        number: of the chunk in its document, from 1.
        text: as it stands there.
        tokens: how many it has, without a chat template.
        title: of the document; empty where it has none.
    """

    document: int
    number: int
    text: str
    tokens: int
    title: str = ""


def cut_all(documents: Sequence[Document], count: Callable[[str], int], most: int) -> list[Chunk]:
    """All documents in chunks, in order.

    Args:
        documents: in order.
        count: tokens of a text.
        most: tokens that a chunk may have.
    """
    chunks = []
    for index, document in enumerate(documents):
        pieces = [piece for text in document.texts for piece in cut(text, count, most)]
        chunks += [Chunk(index, number, piece, count(piece), document.title) for number, piece in enumerate(pieces, 1)]
    return chunks


def cut(text: str, count: Callable[[str], int], most: int) -> list[str]:
    """A text in chunks of about the same length, none of more than `most` tokens, without the spaces at their ends."""
    spans = list(_units(text, (0, len(text)), count, most))
    chunks = _packed(text, spans, count, most)
    if len(chunks) > 1:
        mean = sum(map(count, chunks)) / len(chunks)
        for share in EVEN:
            even = _packed(text, spans, count, min(most, int(mean * share)))
            if len(even) == len(chunks):
                return even
    return chunks


def _packed(text: str, spans: Sequence[Span], count: Callable[[str], int], most: int) -> list[str]:
    """Units that follow each other in one chunk, as long as they fit; one that does not fit stands alone."""
    chunks: list[str] = []
    at = 0
    while at < len(spans):
        end = _fitting(text, spans, at, count, most)
        chunks.append(text[spans[at][0] : spans[end - 1][1]])
        at = end
    return chunks


def _fitting(text: str, spans: Sequence[Span], at: int, count: Callable[[str], int], most: int) -> int:
    """Up to which unit those from `at` on fit into one chunk, and at least one; a chunk may be of hundreds of words."""

    def tokens(end: int) -> int:
        return count(text[spans[at][0] : spans[end - 1][1]])

    high = at + 1
    while high < len(spans) and tokens(high) <= most:
        high = min(len(spans), 2 * high - at)
    return max(at + 1, bisect_right(range(len(spans) + 1), most, at + 1, high + 1, key=tokens) - 1)


def _units(text: str, span: Span, count: Callable[[str], int], most: int, depth: int = 0) -> Iterator[Span]:
    """What is not to be cut: paragraphs that fit, sentences of those that do not, words of those, then characters."""
    if depth and count(text[slice(*span)]) <= most:
        yield span
    elif depth < 3:
        for part in _split(text, span, (_PARAGRAPH, _SENTENCE, _WORD)[depth]):
            yield from _units(text, part, count, most, depth + 1)
    elif span[1] - span[0] > 1:
        middle = (span[0] + span[1]) // 2
        yield from _units(text, (span[0], middle), count, most, depth)
        yield from _units(text, (middle, span[1]), count, most, depth)
    else:
        yield span


def _split(text: str, span: Span, border: re.Pattern[str]) -> Iterator[Span]:
    """The parts of a span between borders, without the spaces at their ends."""
    start, end = span
    for match in border.finditer(text, start, end):
        yield from _stripped(text, start, match.start())
        start = match.end()
    yield from _stripped(text, start, end)


def _stripped(text: str, start: int, end: int) -> Iterator[Span]:
    part = text[start:end]
    if part.strip():
        yield start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
