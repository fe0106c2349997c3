"""Context distillation: the teacher reads the context, the student does not, and the loss is the formula."""

from __future__ import annotations

import json

import pytest
import torch
from test_checkpoint import assert_same_run, interrupt
from tiny_run import MARK, assembled, grounded_recipe, in_double, make_recipe, train
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import UsageError
from dynlora_cli.kernels.linear_cross_entropy import ending
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.before import lessons, references
from dynlora_cli.training.before.references import remember_references
from dynlora_cli.training.loop import fit
from dynlora_cli.training.step import backward


def rows_of(recipe):
    with open(recipe.dataset.train[0].path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def teacher_logits(recipe, row, *, turns):
    """What stock transformers say of a row's answer, with the context before the prompt: [n, V], and the answer."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    asked = f"{row['context']}\n\n{row['prompt']}"
    if turns:
        tokenizer.chat_template = recipe.dataset.chat_template
        question = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        before, said = tokenizer(text, add_special_tokens=False)["input_ids"], row["completion"] + "<|im_end|>"
        answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    else:
        before = tokenizer(asked)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *answer]])).logits[0]
    return logits[len(before) - 1 : -1], answer


@pytest.mark.parametrize("turns", [False, True])
def test_the_teacher_says_what_the_base_says_with_the_context_before_the_prompt(tmp_path, turns):
    """Though the components of the run do something already."""
    recipe = grounded_recipe(tmp_path, turns=turns)
    run, rows = assembled(recipe), rows_of(recipe)
    remember_references(run)
    for example in run.data.train:
        logits_nV, answer = teacher_logits(recipe, rows[example.row], turns=turns)
        targets = [label for label in example.labels[1:] if label != -100]
        assert targets[: len(answer)] == answer
        value_nM, _ = logits_nV.softmax(-1).topk(64)
        told = run.objective.told[example.row]
        assert told.token_nM.dtype == torch.int32
        torch.testing.assert_close(told.probability_nM[: len(answer)].float(), value_nM, atol=1e-6, rtol=1e-3)
        again = logits_nV.softmax(-1).gather(1, told.token_nM[: len(answer)].long())
        torch.testing.assert_close(again, value_nM, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("turns", [False, True])
def test_the_student_never_reads_the_context(tmp_path, turns):
    run = assembled(grounded_recipe(tmp_path, turns=turns))
    decode = run.base.tokenizer.decode
    batches = [
        *(run.batches.step(0, at)[0] for at in range(run.batches.steps_per_epoch)),
        run.val_batches.step(0, 0)[0],
    ]
    for batch in batches:
        assert all(MARK not in decode(line) for line in batch.inputs["input_ids"])
    for example in (*run.data.train, *run.data.val):
        assert decode(example.context_ids).startswith(MARK)
        assert MARK in decode(example.teacher_ids)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("own", [0.0, 0.3])
@pytest.mark.parametrize("turns", [False, True])
def test_the_loss_and_its_gradient_are_the_formula(tmp_path, own, fused, turns, monkeypatch):
    """-Σ p log q in plain torch and fp64, on the logits of the whole model."""
    run = in_double(grounded_recipe(tmp_path, f"train.answer_share={own}", turns=turns))
    monkeypatch.setattr(ending(run.model), "fused", fused)
    remember_references(run)
    batch = run.batches.step(0, 0)[0]
    run.objective.loss(run.model, batch)  # the first pass finds out whether the head can be left out
    run.trained.zero_grad(run.optimizer)
    loss = run.objective.loss(run.model, batch)
    loss.backward()
    found = run.trained.values.grad.clone()
    run.trained.zero_grad(run.optimizer)
    log_NV = run.model(**batch.inputs).logits[batch.labels != -100].log_softmax(-1)
    told = [run.objective.told[row] for row in batch.rows]
    p_NM, token_NM = (torch.cat(part) for part in zip(*((t.probability_nM, t.token_nM) for t in told), strict=True))
    taught = -(p_NM.double() * log_NV.gather(1, token_NM.long())).sum()
    truth = own * F.nll_loss(log_NV, batch.labels[batch.labels != -100], reduction="sum") + (1 - own) * taught
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)  # the logits of a chunk are made fp32
    exact = run.trained.values.grad
    assert (found - exact).norm() < 1e-5 * exact.norm()


def kl_to_teacher(run):
    """Mean over the targets of all training rows: the cross-entropy to what was told, less what it cannot go below."""
    total = targets = 0.0
    for at in range(run.batches.steps_per_epoch):
        for batch in run.batches.step(0, at):
            p_NM = torch.cat([run.objective.told[row].probability_nM for row in batch.rows]).double()
            with torch.no_grad():
                total += run.objective.loss(run.model, batch).item() + torch.special.xlogy(p_NM, p_NM).sum().item()
            targets += batch.supervised
    return total / targets


def test_training_brings_the_student_to_the_teacher(tmp_path):
    run = assembled(grounded_recipe(tmp_path, "train.max_steps=40", "rank.init=4", "rank.budget=4"), fill=False)
    remember_references(run)
    before = kl_to_teacher(run)
    fit(run)
    assert kl_to_teacher(run) < 0.5 * before


def test_what_is_held_out_is_measured_by_the_answer_alone(tmp_path):
    run = assembled(grounded_recipe(tmp_path))
    batch = run.val_batches.step(0, 0)[0]
    assert batch.judge is None
    log_NV = run.model(**batch.inputs).logits[batch.labels != -100].log_softmax(-1)
    plain = F.nll_loss(log_NV, batch.labels[batch.labels != -100], reduction="sum")
    assert summed_loss(run.model, batch).item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_told_alike_in_whichever_batch_they_stand(tmp_path, packing):
    """The loss of all rows, packed or not, and as one batch or several."""
    run = assembled(grounded_recipe(tmp_path))
    remember_references(run)
    data = run.recipe.dataset.model_copy(update={"packing": packing})
    recipe = run.recipe.model_copy(update={"dataset": data})
    batches = make_batches(recipe, list(reversed(run.data.train)), run.base, shuffle=packing)
    found = [b for at in range(batches.steps_per_epoch) for b in batches.step(0, at)]
    with torch.no_grad():
        loss = sum(run.objective.loss(run.model, batch).item() for batch in found)
        other = sum(
            run.objective.loss(run.model, batch).item()
            for at in range(run.batches.steps_per_epoch)
            for batch in run.batches.step(0, at)
        )
    assert loss == pytest.approx(other, rel=1e-4)


def test_an_empty_share_of_a_step_has_no_loss(tmp_path):
    """As another process has it, when the rows of a step do not come out even."""
    run = assembled(grounded_recipe(tmp_path))
    remember_references(run)
    batch = run.batches._without_targets([((0,), 0)])
    assert backward(run, batch, 4).item() == 0
    assert not run.trained.values.grad.any()


@pytest.mark.parametrize("settings", [["adapter.dropout=0.1"], ["dataset.packing=true"]], ids=["dropout", "packed"])
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, settings, monkeypatch):
    train(grounded_recipe(tmp_path, *settings, out="straight"))
    recipe = grounded_recipe(tmp_path, *settings, out="stopped")
    interrupt(recipe, 5)
    monkeypatch.setattr(references, "own_lessons", lambda *_: pytest.fail("the teacher is asked once"))
    train(recipe, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_run_does_not_go_on_with_other_contexts(tmp_path):
    recipe = grounded_recipe(tmp_path)
    interrupt(recipe, 5)
    rows = rows_of(recipe)
    rows[0]["context"] += " too"
    path = tmp_path / "grounded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UsageError, match="have changed since"):
        train(recipe, resume=True)


def test_accumulated_rows_count_as_rows_of_one_batch(tmp_path):
    found = []
    for size, steps in ((4, 1), (1, 4)):
        more = f"train.micro_batch_size={size}", f"train.gradient_accumulation_steps={steps}"
        found.append(train(grounded_recipe(tmp_path, *more, out=f"by{size}"))[0])
    assert found[0]["loss_after"] == pytest.approx(found[1]["loss_after"], rel=1e-4)


def test_only_rows_that_come_up_are_read(tmp_path):
    run = assembled(grounded_recipe(tmp_path, "train.max_steps=2"))
    remember_references(run)
    assert len(run.objective.told) == 8 < len(run.data.train)


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_all_processes_together_read_all_rows_in_as_many_batches(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(lessons, "TOKENS", tokens)
    run = assembled(grounded_recipe(tmp_path))
    monkeypatch.setattr(type(run.accelerator), "num_processes", 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(type(run.accelerator), "process_index", process)
        shares.append(list(lessons.own_lessons(run, run.objective.lessons(run.data.train))))
    assert len({len(share) for share in shares}) == 1
    assert {row for share in shares for batch in share for row in batch.rows} == {row.row for row in run.data.train}
    sizes = [batch.inputs["input_ids"].numel() for share in shares for batch in share if len(batch.rows) > 1]
    assert all(size <= tokens for size in sizes)


def test_a_lesson_has_the_targets_of_its_row(tmp_path):
    run = assembled(grounded_recipe(tmp_path))
    for example, lesson in zip(run.data.train, run.objective.lessons(run.data.train), strict=True):
        assert type(lesson) is OneText
        assert [x for x in lesson.labels[1:] if x != -100] == [x for x in example.labels[1:] if x != -100]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_read_once_says_the_same_as_read_each_time(tmp_path, kind, training, monkeypatch):
    """With adapters that do something, and in training mode, as a run is by then."""
    path = tmp_path / "long.jsonl"
    rows = [
        {
            "context": MARK + f" {'cat dog '[4 * (n % 2) :]}the mat " * 4,
            "prompt": "what is " + "it " * (1 + n % 3) + str(n),
            "completion": "fox" * (1 + n % 4),
        }
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where = (f"dataset.train=[{path}]", "train.objective=context-distillation", "adapter.dropout=0.5")
    run = assembled(make_recipe(tmp_path, *where, kind=kind))
    run.model.train(training)
    sizes = []
    run.model.register_forward_hook(lambda *args: sizes.append(args[2]["input_ids"].numel()), with_kwargs=True)
    found = []
    for share in (True, False):
        monkeypatch.setattr(lessons.prefix, "can_share", lambda _, share=share: share)
        run.objective = type(run.objective)(run.recipe.train)
        sizes.clear()
        remember_references(run)
        found.append((run.objective.told, sum(sizes)))
    (shared, few), (alone, many) = found
    assert few < 0.6 * many
    for example in run.data.train:
        one, other = shared[example.row], alone[example.row]
        torch.testing.assert_close(one.probability_nM.float(), other.probability_nM.float(), atol=1e-6, rtol=2e-3)
        assert run.model.training is training


def test_a_model_that_keeps_something_else_of_a_beginning_reads_it_each_time(tmp_path, monkeypatch):
    run = assembled(grounded_recipe(tmp_path, turns=True))
    texts = run.objective.lessons(run.data.train)
    monkeypatch.setattr(lessons.prefix, "LEAST", 8)
    assert lessons._shares(run, texts)
    rightly = lessons.prefix.read
    monkeypatch.setattr(lessons.prefix, "read", lambda model, begin, rows: rightly(model, begin[::-1], rows))
    assert not lessons._shares(run, texts)

    def refuses(*_):
        raise TypeError("got an unexpected keyword argument 'logits_to_keep'")

    monkeypatch.setattr(lessons.prefix, "read", refuses)
    assert not lessons._shares(run, texts)
    assert all("past_key_values" not in batch.inputs for batch in lessons.own_lessons(run, texts))
