"""What a base with an adapter answers to questions, and how likely it finds the right answers: stock transformers and PEFT.

Dimensions, as suffixes of names:
    B  lines of a batch      T  positions      V  vocabulary
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from documents_sets import SHARED, Question, contains, exact, overlap
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from dynlora_cli.documents.requests import invented

MODEL = Path(os.environ.get("DYNLORA_REAL_MODELS", Path.home() / ".cache/dynlora-models")) / "SmolLM2-135M-Instruct"
ANSWER = 24  # tokens that are written
GENERAL, GENERAL_TOKENS = 8, 256  # pieces of wikitext2, and tokens of each
MARK = "\x00"
Numbers = dict[str, float]


class Judge:
    """The base, in bf16; every answer is greedy."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.ends = {self.tokenizer.eos_token_id, end}
        turn = [{"role": "user", "content": MARK}]
        written = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        self.before, self.after = written.split(MARK)

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[None]:
        """The adapter of a folder on the base, for a while; None: the base alone."""
        if folder is None:
            yield
            return
        with_adapter = PeftModel.from_pretrained(self.model, folder).eval()
        try:
            yield
        finally:
            self.model = with_adapter.unload()

    def measure(self, questions: Sequence[Question], text: str, *, in_prompt: bool = False) -> Numbers:
        """Sums over the questions about a text, which stands in the prompt or does not.

        Returns:
            questions, exact, contains, f1; made_up: answers with a number that text and question do not have; loss in
            nats of the first answers, and their tokens.
        """
        begun = Begun(self, self.before + (f"{text}\n\n" if in_prompt else ""))
        prompts = [begun.ids(question.prompt + self.after) for question in questions]
        said = begun.write(prompts)
        answers = [begun.ids(question.answers[0]) for question in questions]
        loss, tokens = begun.loss(prompts, answers)
        pairs = [(answer, question.answers) for answer, question in zip(said, questions, strict=True)]
        return {
            "questions": len(questions),
            "exact": sum(exact(*pair) for pair in pairs),
            "contains": sum(contains(*pair) for pair in pairs),
            "f1": sum(overlap(*pair) for pair in pairs),
            "made_up": sum(bool(invented(answer, text, q.prompt)) for answer, q in zip(said, questions, strict=True)),
            "loss": loss,
            "tokens": tokens,
        }

    @torch.no_grad()
    def general(self) -> float:
        """Nats per token on pieces of wikitext2's test part: what is forgotten shows there."""
        text = (SHARED / "data" / "wikitext2" / "test.txt").read_text(encoding="utf-8")[: GENERAL * 2000]
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0, : GENERAL * GENERAL_TOKENS]
        ids_BT = ids.reshape(GENERAL, GENERAL_TOKENS)
        logits_BTV = self.model(input_ids=ids_BT).logits[:, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()))


class Begun:
    """The beginning that several prompts share, read once."""

    @torch.no_grad()
    def __init__(self, judge: Judge, text: str) -> None:
        self.judge, self.model = judge, judge.model
        first = self.ids(text)
        self.length = len(first)
        self.cache = self.model(input_ids=torch.tensor([first]), use_cache=True, logits_to_keep=1).past_key_values

    def ids(self, text: str) -> list[int]:
        return self.judge.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def write(self, prompts: Sequence[list[int]]) -> list[str]:
        """The answer to each prompt."""
        lines = range(len(prompts))
        ids_BT, seen_BT = padded(prompts, self.length, left=True)
        cache, wrote, open_ = self._copies(len(prompts)), [[] for _ in lines], set(lines)
        place_BT = (seen_BT.cumsum(-1) - 1)[:, self.length :]
        for _ in range(ANSWER):
            next_B = self._logits(ids_BT, seen_BT, place_BT, cache, logits_to_keep=1).logits[:, -1].argmax(-1)
            open_ = {line for line in open_ if int(next_B[line]) not in self.judge.ends}
            for line in open_:
                wrote[line].append(int(next_B[line]))
            if not open_:
                break
            ids_BT, place_BT = next_B[:, None], place_BT[:, -1:] + 1
            seen_BT = torch.cat([seen_BT, torch.ones_like(ids_BT)], 1)
        return [self.judge.tokenizer.decode(line).strip() for line in wrote]

    @torch.no_grad()
    def loss(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[float, int]:
        """Nats of all answers together, and how many tokens these are."""
        lines = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids_BT, seen_BT = padded(lines, self.length, left=False)
        place_BT = (seen_BT.cumsum(-1) - 1)[:, self.length :]
        logits_BTV = self._logits(ids_BT, seen_BT, place_BT, self._copies(len(lines))).logits.float()
        total, tokens = 0.0, 0
        for line, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            total += float(
                torch.nn.functional.cross_entropy(logits_BTV[line, at], torch.tensor(answer), reduction="sum")
            )
            tokens += len(answer)
        return total, tokens

    def _logits(self, ids_BT: Tensor, seen_BT: Tensor, place_BT: Tensor, cache: Any, **more: Any) -> Any:
        return self.model(
            input_ids=ids_BT, attention_mask=seen_BT, position_ids=place_BT, past_key_values=cache, **more
        )

    def _copies(self, many: int) -> Any:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(many)
        return cache


def padded(lines: Sequence[list[int]], before: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, T], and 1 where there is a token [B, before + T], `before` of which are there for all."""
    width = max(map(len, lines))
    ids_BT = torch.zeros(len(lines), width, dtype=torch.long)
    seen_BT = torch.zeros(len(lines), before + width, dtype=torch.long)
    seen_BT[:, :before] = 1
    for number, line in enumerate(lines):
        at = slice(width - len(line), width) if left else slice(0, len(line))
        ids_BT[number, at] = torch.tensor(line)
        seen_BT[number, before:][at] = 1
    return ids_BT, seen_BT
