"""Pretrain `builtin:tiny`: a 3.1 M parameter Llama and its tokenizer, from plain text, on a CPU or a GPU.

    python scripts/pretrain_tiny.py --data ../shared/data --out dynlora_cli/assets/builtin_tiny --steps 2400

What it does, top to bottom: read the corpus, train a byte-level BPE (GPT-2's pre-tokenizer, so that llama.cpp knows it),
pack tokens into rows, train with Muon on the hidden matrices and AdamW on the rest, write bf16 safetensors and the
folder's README. Every fifth document is shown as a conversation (its opening as the user, the rest as the assistant), so
that the chat template's role tokens and the end-of-turn token are trained too. About 1 % of the documents are held out.

Dimensions: B rows per step, T tokens per row.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# (file, licence). Shakespeare's plays are left out: they are a benchmark's text.
CORPUS = [
    ("text_mix/c4_demo.txt", "ODC-By"),
    ("text_mix/genesis.txt", "public domain"),
    ("text_mix/inaugural.txt", "public domain"),
    ("text_mix/masc_tagged.txt", "MASC, free for any use"),
    ("text_mix/sherlock.txt", "public domain"),
    ("text_mix/state_union.txt", "public domain"),
    ("text_mix/wiki_demo.txt", "CC BY-SA"),
    ("tinystories_sample/tinystories.txt", "CDLA-Sharing-1.0"),
    ("wikitext2/valid.txt", "CC BY-SA 3.0"),
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def documents(data: Path) -> list[str]:
    """Paragraphs of every corpus file, joined to about 600 characters so that documents have an end to learn."""
    docs: list[str] = []
    for name, _ in CORPUS:
        text = (data / name).read_text(encoding="utf-8-sig")
        if name.startswith("wikitext2"):
            text = text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
            text = "\n".join(line for line in text.splitlines() if "<unk>" not in line)
        blank_lines = len(re.findall(r"\n\s*\n", text))
        paragraphs = re.split(r"\n\s*\n" if blank_lines > 200 else r"\n", text)
        buffer = ""
        for paragraph in paragraphs:
            buffer = (buffer + "\n" + paragraph.strip()).strip()
            if len(buffer) >= 600:
                docs.append(buffer)
                buffer = ""
        if buffer:
            docs.append(buffer)
    return docs


def train_tokenizer(docs: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(docs, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(docs: list[str], tokenizer: PreTrainedTokenizerFast, row_length: int) -> torch.Tensor:
    """Documents to one stream of tokens, cut into rows of `row_length` + 1."""
    texts = []
    for index, doc in enumerate(docs):
        opening, _, rest = doc.partition("\n" if "\n" in doc[:300] else ". ")
        if index % 5 == 0 and rest:
            turns = [{"role": "user", "content": opening}, {"role": "assistant", "content": rest}]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
        else:
            texts.append("<s>" + doc + "</s>")
    stream = [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids]
    rows = len(stream) // (row_length + 1)
    return torch.tensor(stream[: rows * (row_length + 1)]).view(rows, row_length + 1)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(loss_of(model, part).item() * len(part) for part in rows.split(16)) / len(rows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # made readable by its owner only
    tokenizer.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    corpus = "\n".join(f"- `{name}` ({licence})" for name, licence in CORPUS)
    (out / "README.md").write_text(f"""# builtin:tiny

A Llama with {record["parameters"]:,} parameters (hidden 192, 6 layers, 6 heads, 2 key/value heads, vocabulary {record["vocabulary"]},
context 512, tied embeddings), stored in bf16. Made for dynlora's quickstart and tests: small, real, and of no other use.

Pretrained by `scripts/pretrain_tiny.py` from random weights: {record["tokens_seen"]:,} tokens seen ({record["epochs"]:.1f} passes over
{record["corpus_tokens"]:,}), {record["steps"]} steps of {record["tokens_per_step"]} tokens on {record["device"]}, {record["minutes"]:.0f} minutes.
Training loss at the end {record["train_loss"]:.3f}, held-out loss {record["held_out_loss"]:.3f} nats/token
({record["held_out_bits_per_byte"]:.3f} bits/byte) on 1 % of the documents. The full record is in `pretraining.json`.

Corpus (English):

{corpus}

Every fifth document is written as a conversation with the chat template, so the role tokens and `</s>` are trained.

Licence of the weights and the tokenizer: Apache-2.0, as the project. The corpus keeps its own licences, named above.
""")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    )


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> float:
    """Train for `args.steps`; returns the training loss, averaged over the last 50 steps or so."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    other = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=args.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    started, order, running = time.time(), [], math.log(model.config.vocab_size)
    for step in range(args.steps):
        # Warm-up over 2 %, constant, linear decay to zero over the last 40 %.
        shape = min(1.0, (step + 1) / (0.02 * args.steps), (args.steps - step) / (0.4 * args.steps))
        if len(order) < args.rows:
            order = torch.randperm(len(rows)).tolist()
        batch = rows[[order.pop() for _ in range(args.rows)]].to(held_out.device)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * shape
            optimizer.step()
            optimizer.zero_grad()
        running = 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == args.steps - 1:
            speed = (step + 1) * args.rows * args.row_length / (time.time() - started)
            print(f"step {step:5d}  loss {running:.4f}  {speed:,.0f} tokens/s", flush=True)
        if step % 400 == 399:
            print(f"step {step:5d}  held-out {held_out_loss(model, held_out):.4f}", flush=True)
    return running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step (B)")
    parser.add_argument("--row-length", type=int, default=256, help="tokens of a row (T)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    docs = documents(args.data)
    random.shuffle(docs)
    split = len(docs) // 100
    tokenizer = train_tokenizer(docs[split:], vocab_size=4096)
    held_out = encode(docs[:split], tokenizer, args.row_length).to(device)
    rows = encode(docs[split:], tokenizer, args.row_length)
    model = make_model(tokenizer).to(device)

    started = time.time()
    train_loss = pretrain(model, rows, held_out, args)
    final = held_out_loss(model, held_out)
    held_out_bytes = len(tokenizer.decode(held_out.flatten().tolist(), skip_special_tokens=True).encode())
    record = {
        "corpus": [{"file": name, "licence": licence} for name, licence in CORPUS],
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "documents": len(docs),
        "corpus_tokens": rows.numel(),
        "tokens_seen": args.steps * args.rows * args.row_length,
        "epochs": args.steps * args.rows / len(rows),
        "steps": args.steps,
        "tokens_per_step": args.rows * args.row_length,
        "learning_rate": args.learning_rate,
        "optimizer": "Muon (hidden matrices) + AdamW",
        "train_loss": train_loss,
        "held_out_loss": final,
        "held_out_bits_per_byte": final * held_out[:, 1:].numel() / held_out_bytes / math.log(2),
        "device": f"{device.type}, {torch.get_num_threads()} thread(s)",
        "minutes": (time.time() - started) / 60,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    save(model, tokenizer, args.out, record)
    print(f"held-out {final:.4f}; saved to {args.out}", flush=True)


if __name__ == "__main__":
    main()
