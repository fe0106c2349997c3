"""Answers that a model writes itself, and how near they come to the right ones.

    find_prompts   prompts with all their references, out of examples
    generate       greedy answers, several prompts at once
    metrics        exact match, BLEU, chrF and ROUGE-L, by sacrebleu and rouge-score

Prompts and references are taken from the very token ids that the loss is measured on, so template, truncation and
special tokens are those of training.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.encode import decode
from dynlora_cli.data.examples import Example
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Row, own_ends, write
from dynlora_cli.errors import MeasureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("sacrebleu", "rouge_score")
INSTALL = 'pip install "dynlora[eval]"'
METRICS = ("exact_match", "bleu", "chrf", "rouge_l")
ROUGE_SEES = re.compile("[a-z0-9]")  # as rouge_score's own tokenizer
MARGIN = 16  # tokens that an answer may be longer than the longest reference


@dataclass
class Prompt:
    """What to answer, and every answer that counts as right.

    Attributes:
        ids: everything before the answer: for a conversation all earlier turns and the opening of the last one.
        text: the same as text, special tokens included, but for one that opens every row.
        references: texts without special tokens and without white space around them, each once.
        end_ids: special tokens with which the answers end.
        longest: tokens of the longest reference.
        example: the first row that it was taken from; None where it is of no row.
    """

    ids: tuple[int, ...]
    text: str
    references: list[str] = field(default_factory=list)
    end_ids: set[int] = field(default_factory=set)
    longest: int = 0
    example: Example | None = None


def missing_packages() -> list[str]:
    """Packages of the `eval` extra that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def find_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    apart: Callable[[Example], Hashable] | None = None,
) -> list[Prompt]:
    """The first `count` different prompts in the order of the examples, with the references of all of them.

    The answer is an example's last run of supervised tokens. An example that is supervised from its first token on has
    no prompt, and is left out.

    Args:
        examples: rows.
        tokenizer: of the model.
        count: how many.
        apart: equal prompts of rows in which this differs are different prompts; None: they are one.
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    prompts: dict[Hashable, Prompt] = {}
    for example in examples:
        question, answer = example.last_answer()
        ids = tuple(question)
        key = ids, apart(example) if apart else None
        if not ids or not example.is_right or (key not in prompts and len(prompts) == count):
            continue
        prompt = prompts.setdefault(key, Prompt(ids, _shown(tokenizer, ids), example=example))
        text = _text(tokenizer, answer)
        if text not in prompt.references:
            prompt.references.append(text)
        prompt.end_ids |= special & {answer[-1]}
        prompt.longest = max(prompt.longest, len(answer))
    return list(prompts.values())


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return decode(tokenizer, ids[1:] if ids[0] == tokenizer.bos_token_id else ids)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    context: int | None,
) -> list[str]:
    """The most likely answer to each prompt, token by token; the same whatever prompts share a batch.

    Args:
        model: in evaluation mode.
        tokenizer: with a pad token.
        prompts: in any order.
        batch_size: prompts answered at once, padded on the left, an encoder's on the right.
        context: tokens that prompt and answer may have together (of an encoder-decoder: each); None where nobody knows.

    Returns:
        Texts without special tokens and without white space around them, in the order of the prompts.

    Raises:
        MeasureError: the model's logits are NaN.
    """
    longest = max((prompt.longest for prompt in prompts), default=0) + MARGIN
    ends = {int(end) for prompt in prompts for end in prompt.end_ids} | own_ends(model, tokenizer)
    answers = [""] * len(prompts)
    sampling = Sampling(max_new_tokens=longest)
    for numbers in _batches(prompts, longest, batch_size, None if model.config.is_encoder_decoder else context):
        rows = [Row(tokenizer, prompts[number].ids, sampling, ends) for number in numbers]
        written = write(model, rows, pad_id=int(tokenizer.pad_token_id), context=context)
        for number, answer in zip(numbers, written, strict=True):
            if answer.finish_reason == "failed":
                raise MeasureError("the model's logits are NaN", "look at its weights and its dtype")
            answers[number] = _text(tokenizer, answer.ids)
    return answers


def _batches(prompts: Sequence[Prompt], longest: int, batch_size: int, context: int | None) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together.

    Prompts with equally little room left are answered together, so that no answer is cut because of another prompt.
    """

    def room(number: int) -> int:
        return longest if context is None else min(longest, context - len(prompts[number].ids))

    order = sorted(range(len(prompts)), key=lambda number: (room(number), len(prompts[number].ids)))
    for _, group in itertools.groupby(order, room):
        numbers = list(group)
        for at in range(0, len(numbers), batch_size):
            yield numbers[at : at + batch_size]


def unseen_by_rouge(prompts: Sequence[Prompt]) -> int:
    """References without a Latin letter or a digit, of which ROUGE-L sees nothing."""
    return sum(not ROUGE_SEES.search(text.lower()) for prompt in prompts for text in prompt.references)


def metrics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """How near answers come to their references.

    Args:
        answers: one for each prompt.
        references: one or more for each prompt.

    Returns:
        exact_match: share of answers that are one of their references, 0 to 1.
        bleu, chrf: of the corpus, 0 to 100, sacrebleu's defaults (Post 2018; Popović 2015).
        rouge_l: F-measure of the longest common subsequence with the nearest reference, mean, 0 to 1, words stemmed
            (Lin 2004); it sees Latin letters and digits only.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(len(texts) for texts in references)
    # sacrebleu wants one list for each reference's number; None where a prompt has fewer.
    by_number: Any = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(answers, references, strict=True))
    rouge = [scorer.score_multi(list(texts), answer)["rougeL"].fmeasure for answer, texts in pairs]
    return {
        "exact_match": sum(answer in texts for answer, texts in pairs) / len(pairs),
        "bleu": sacrebleu.corpus_bleu(list(answers), by_number).score,
        "chrf": sacrebleu.corpus_chrf(list(answers), by_number).score,
        "rouge_l": float(sum(rouge) / len(rouge)),
    }
