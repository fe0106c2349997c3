"""Passages of a corpus in the prompts of rows: `dataset.retrieve`.

    held out    the first `top_k` passages that the retriever finds, the best first, as when the model is used
    training    RAFT (Zhang et al. 2024, arXiv 2403.10131): the row's right passage (oracle) among distractors, which
                are the best others that the retriever finds; in a share of 1 - oracle_share of the rows the right one
                is left out for one more distractor, so that the model also learns to answer without it

Which rows go without, and the order of passages in training, are decided by a hash of the seed and the prompt. The
split of rows is made before, on the prompts alone. A row that would be too long has its passages cut, all to one
length, before anything of its question or its answer is.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.chat.template import on_date
from dynlora_cli.data.corpus import Corpus, Passage, read_corpus, written_with
from dynlora_cli.data.examples import Draft, Located
from dynlora_cli.data.forms import Form, Pair, Turns
from dynlora_cli.data.read import Reader, fit
from dynlora_cli.data.rows.kept import Kept, KeptList, KeptRows, listed
from dynlora_cli.errors import DataError, MachineError, UsageError
from dynlora_cli.retrieval.certainty import certainty
from dynlora_cli.retrieval.lexical import Lexical, best
from dynlora_cli.text import counted, percent

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Retrieve
    from dynlora_cli.retrieval.encoders import Encoder

CHUNK = 1024  # rows tokenised in one call
LEAST = 8  # tokens of a passage, below which none is shown
TRIES = 4  # tokens do not add up exactly where texts are joined
TRAIN = "train"

Scores = Iterator[NDArray[np.float32]]


@dataclass
class Found:
    """A row and what the retriever found for it.

    Args:
        row: without passages.
        located: the same before tokens were made of it.
        order: numbers of passages, the best first, as many as can be needed.
        scores: of the first and the second.
        right: the passage that the row names.
    """

    row: Kept
    located: Located
    order: list[int]
    scores: tuple[float, float]
    right: int | None


@dataclass
class Report:
    """What was done, for notes and for the record."""

    left_out: int = 0
    guessed: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    without: dict[str, int] = field(default_factory=dict)


def put_passages(
    reader: Reader, seed: int, parts: dict[str, KeptRows], lost: dict[str, int], *, told: bool
) -> dict[str, Any] | None:
    """Put passages into the prompts of all parts of a run's rows, if its recipe asks for any.

    Args:
        reader: that read the rows.
        seed: of the choices by hash.
        parts: train, val and sizing; changed in place.
        lost: rows of train (with sizing) and val that were dropped; those that now are, too, are added.
        told: training rows are shown their right passage, whatever the retriever finds.

    Returns:
        What was looked for and found, for the record.
    """
    if reader.dataset.retrieve is None:
        return None
    retrieval = Retrieval(reader.dataset.retrieve, seed, reader.notes)
    rows = {part: listed(kept) for part, kept in parts.items()}
    written, dropped = retrieval.put(reader, rows, told=(TRAIN,) if told else ())
    parts.update({part: KeptList(kept) for part, kept in written.items()})
    for part, count in dropped.items():
        lost["val" if part == "val" else TRAIN] += count
    return retrieval.summary


class Retrieval:
    """A corpus, its retriever, and how passages stand in a prompt.

    Args:
        options: the recipe's section `dataset.retrieve`.
        seed: of the choices by hash.
        notes: what was found out is added here.
    """

    def __init__(self, options: Retrieve, seed: int, notes: list[str]) -> None:
        self.options, self.seed, self.notes = options, seed, notes
        self.corpus: Corpus = read_corpus(options.corpus, notes)
        self.distractors = options.top_k - 1 if options.distractors is None else options.distractors
        self.report = Report()
        self.summary: dict[str, Any] = {}

    def put(
        self, reader: Reader, parts: Mapping[str, Sequence[Kept]], told: Collection[str]
    ) -> tuple[dict[str, list[Kept]], dict[str, int]]:
        """Rows with passages in their prompts, by part, and how many of each part were dropped for it.

        Args:
            reader: that read the rows, with each row's `located`.
            parts: rows of the parts of a run (train, val, sizing), in order.
            told: names of the parts in which the right passage is shown whatever the retriever finds.
        """
        asked = {part: [row for row in rows if row.located and question(row.located)] for part, rows in parts.items()}
        self._refuse_unasked(parts, asked, learns=bool(told))
        found = {part: self._find(rows) for part, rows in asked.items()}
        self._note(found)
        sure = self._confidence(found)
        written, dropped = {}, {}
        with on_date(reader.writing.moment):
            for part, rows in found.items():
                shown = [self._raft(row) if part in told else row.order[: self.options.top_k] for row in rows]
                again = {id(row.row): new for row, new in self._write(reader, part, rows, shown, sure[part])}
                kept = [again.get(id(row), row) for row in parts[part]]
                written[part] = [row for row in kept if isinstance(row, Kept)]
                lost = [reason for reason in kept if not isinstance(reason, Kept)]
                reader.lost[part == "val"].update(lost)
                dropped[part] = len(lost)
        self._note_room()
        return written, dropped

    def _refuse_unasked(
        self, parts: Mapping[str, Sequence[Kept]], asked: Mapping[str, list[Kept]], *, learns: bool
    ) -> None:
        """Name rows without a prompt, which stay as they are.

        Raises:
            DataError: no row has one, and some of them are to be learned.
        """
        rows, with_prompt = (sum(map(len, each.values())) for each in (parts, asked))
        if learns and rows and not with_prompt:
            raise DataError(
                "dataset.retrieve looks for passages by the prompts of rows, and no row has one",
                "use rows of prompt and completion, of instructions, or conversations with a user",
            )
        if with_prompt < rows:
            self.notes.append(f"{counted(rows - with_prompt, 'row')} without a prompt, so without passages")

    # -- finding ------------------------------------------------------------------------------------------------------

    def _find(self, rows: Sequence[Kept]) -> list[Found]:
        if not rows:
            return []
        located = [row.located for row in rows if row.located is not None]
        needed = max(self.options.top_k, self.distractors + 2, 2)
        found = []
        for row, place, scores_N in zip(rows, located, self._scores([question(each) for each in located]), strict=True):
            order = best(scores_N, needed).tolist()
            first, second = (float(scores_N[number]) for number in (order * 2)[:2])
            found.append(Found(row, place, order, (first, second), self._named(place)))
        return found

    def _scores(self, questions: list[str]) -> Scores:
        """How well each passage fits, question by question. [N] each"""
        texts = [passage.indexed for passage in self.corpus.passages]
        if self.options.retriever == "bm25":
            index = Lexical(texts)
            yield from (index.scores(text) for text in questions)
            return
        encoder = _encoder(self.options.encoder)
        vectors_ND = encoder.encode(texts)
        yield from (vectors_ND @ query_D for query_D in encoder.encode(questions))

    def _named(self, located: Located) -> int | None:
        if located.passage is None:
            return None
        number = self.corpus.numbers.get(located.passage)
        if number is None:
            raise DataError(
                f"{located.place}: names the passage {located.passage!r}, which {self.options.corpus} does not have",
                "passage_id holds the `id` of a row of the corpus; name its column with `columns: {passage_id: NAME}`",
            )
        return number

    def _raft(self, found: Found) -> list[int]:
        """The passages of a row to train on, in the order in which they are shown."""
        right = found.order[0] if found.right is None else found.right
        others = [number for number in found.order if number != right]
        key = f"{self.seed} {found.row.prompt.hex()}"
        if _fraction(f"oracle {key}") < self.options.oracle_share:
            shown = [right, *others[: self.distractors]]
        else:
            shown = others[: self.distractors + 1]
            self.report.left_out += 1
        self.report.guessed += found.right is None
        random.Random(f"order {key}").shuffle(shown)
        return shown

    def _confidence(self, found: Mapping[str, list[Found]]) -> dict[str, list[float]]:
        """Of each row: its own, or the probability that the retriever's first passage is the right one.

        The latter is learned on the training rows that name their passage, each judged by what was learned on others
        (retrieval/certainty.py); it is 1 where no row names one.
        """
        rows = [(part, row) for part, own in found.items() for row in own]
        first = [None if row.right is None or part != TRAIN else row.order[0] == row.right for part, row in rows]
        sure = np.ones(len(rows))
        if any(right is not None for right in first) and any(row.located.confidence is None for _, row in rows):
            scores_Q2 = np.array([row.scores for _, row in rows], dtype=np.float64)
            sure = certainty(scores_Q2, first, [question(row.located) for _, row in rows])
        given: dict[str, list[float]] = {part: [] for part in found}
        for (part, row), probability in zip(rows, sure.tolist(), strict=True):
            own = row.located.confidence
            given[part].append(probability if own is None else own)
        return given

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(
        self, reader: Reader, part: str, rows: list[Found], shown: list[list[int]], sure: list[float]
    ) -> Iterator[tuple[Found, Kept | str]]:
        """Each row with its passages, or why it is dropped."""
        items = zip(rows, shown, sure, strict=True)
        for _, same in itertools.groupby(items, lambda item: type(item[0].located.form)):
            while batch := list(itertools.islice(same, CHUNK)):
                drafts = self._drafts(reader, part, [(row.located, numbers) for row, numbers, _ in batch])
                for (row, _, confidence), draft in zip(batch, drafts, strict=True):
                    draft.confidence = confidence
                    again = fit(reader, row.located.place, draft, row.row.example.row)
                    yield row, _in_place_of(row.row, again) if isinstance(again, Kept) else again

    def _drafts(self, reader: Reader, part: str, rows: list[tuple[Located, list[int]]]) -> Iterator[Draft]:
        chosen = [[self.corpus.passages[number] for number in numbers] for _, numbers in rows]
        full = [self._with(located, passages) for (located, _), passages in zip(rows, chosen, strict=True)]
        for (located, _), passages, draft in zip(rows, chosen, reader.encoder.encode(full), strict=True):
            yield self._shortened(reader, part, located, passages, draft)

    def _shortened(self, reader: Reader, part: str, located: Located, passages: list[Passage], draft: Draft) -> Draft:
        """The draft, its passages cut to what `max_length` leaves for them."""
        over = _excess(reader, self._with(located, passages), draft)
        if over <= 0 or not passages:
            return draft
        texts = [passage.text for passage in passages]
        lengths = [len(ids) for ids in reader.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        room = sum(lengths) - over
        for _ in range(TRIES):
            most = _cap(lengths, room)
            if most < LEAST:
                break
            shorter = self._with(located, [replace(p, text=_first(reader, p.text, most)) for p in passages])
            (draft,) = reader.encoder.encode([shorter])
            over = _excess(reader, shorter, draft)
            if over <= 0:
                self.report.cut[part] = self.report.cut.get(part, 0) + 1
                return draft
            room -= over
        self.report.without[part] = self.report.without.get(part, 0) + 1
        return reader.encoder.encode([located])[0]

    def _with(self, located: Located, passages: Sequence[Passage]) -> Located:
        """The row with passages in its prompt, or in the last turn of its user."""
        form = located.form
        if not passages:
            return located
        written = written_with(self.options.layout, question(located), passages)
        if isinstance(form, Pair):
            return replace(located, form=replace(form, prompt=written))
        assert isinstance(form, Turns)
        messages = list(form.messages)
        last = _last_of_user(form)
        messages[last] = {**messages[last], "content": written}
        return replace(located, form=replace(form, messages=messages))

    # -- telling ------------------------------------------------------------------------------------------------------

    def _note(self, found: Mapping[str, list[Found]]) -> None:
        """How good the retriever is, where rows name their passages."""
        options, rows = self.options, [row for own in found.values() for row in own]
        known = [row for row in rows if row.right is not None]
        first = sum(row.order[0] == row.right for row in known)
        among = sum(row.right in row.order[: options.top_k] for row in known)
        self.summary = {
            "corpus": options.corpus,
            "corpus_sha256": self.corpus.sha256,
            "passages": len(self.corpus.passages),
            "retriever": options.retriever,
            "encoder": options.encoder if options.retriever == "dense" else None,
            "top_k": options.top_k,
            "rows": len(rows),
            "rows_that_name_their_passage": len(known),
            "first_is_right": first / len(known) if known else None,
            "right_among_top_k": among / len(known) if known else None,
        }
        text = f"dataset.retrieve: {counted(len(self.corpus.passages), 'passage')}, found by {options.retriever}"
        if known:
            text += f": the right one is first for {percent(first / len(known))} of {counted(len(known), 'row')}, "
            text += f"and among the first {options.top_k} for {percent(among / len(known))}"
        self.notes.append(text)

    def _note_room(self) -> None:
        report, options = self.report, self.options
        if report.guessed:
            self.notes.append(
                f"{counted(report.guessed, 'training row')} without a passage_id: the first passage that is found "
                "counts as the right one there"
            )
        for part, count in report.cut.items():
            self.notes.append(f"{part}: the passages of {counted(count, 'row')} were cut to fit dataset.max_length")
        for part, count in report.without.items():
            self.notes.append(f"{part}: {counted(count, 'row')} without passages, for which there was no room")
        self.summary |= {
            "oracle_share": options.oracle_share,
            "right_left_out": report.left_out,
            "cut": dict(report.cut),
            "without_passages": dict(report.without),
        }


def _encoder(name: str) -> Encoder:
    from dynlora_cli.retrieval.encoders import model_encoder

    try:
        return model_encoder(name)
    except (UsageError, MachineError) as error:  # which speak of the command line
        message = error.message.replace("--encoder", "dataset.retrieve.encoder")
        raise type(error)(message, error.hint) from None


def question(located: Located) -> str:
    """What is asked: the prompt, or the last turn of the user; empty where nothing is."""
    form: Form = located.form
    if isinstance(form, Pair):
        return form.prompt
    if isinstance(form, Turns) and any(message["role"] == "user" for message in form.messages):
        content = form.messages[_last_of_user(form)]["content"]
        return content if isinstance(content, str) else ""
    return ""


def _last_of_user(form: Turns) -> int:
    return max(number for number, message in enumerate(form.messages) if message["role"] == "user")


def _in_place_of(row: Kept, again: Kept) -> Kept:
    """The row as it is written now, which stays the row that it was."""
    return replace(row, example=again.example, truncated=again.truncated, cut_answer=again.cut_answer, located=None)


def _fraction(text: str) -> float:
    """A number from 0 to 1 (1 excluded) by the hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _excess(reader: Reader, located: Located, draft: Draft) -> int:
    """Tokens of the prompt's text that are too many."""
    if draft.cut and isinstance(located.form, Pair):  # an encoder's text, which has been cut already
        return len(reader.tokenizer(located.form.prompt, verbose=False)["input_ids"]) - reader.max_length
    return len(draft.ids) - reader.max_length


def _cap(lengths: Sequence[int], room: int) -> int:
    """The largest length to which all can be cut so that together they take no more than `room`; below 0: none."""
    low, high = -1, max(lengths, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(length, middle) for length in lengths) <= room and middle >= 0:
            low = middle
        else:
            high = middle - 1
    return low


def _first(reader: Reader, text: str, tokens: int) -> str:
    """The beginning of a text, of at most so many tokens and of whole words."""
    coded = reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(coded) <= tokens:
        return text
    start = str(reader.tokenizer.decode(coded[:tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    end = text[: len(start.rstrip("\ufffd"))]
    return end.rsplit(None, 1)[0] if " " in end.strip() else end
