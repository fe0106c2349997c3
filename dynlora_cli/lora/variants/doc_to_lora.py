"""Doc-to-LoRA: a network reads a document by what goes on in the frozen base, and writes an adapter at once.

What it does
    The base reads the row's `context` (the format grounded). From the inputs of each block a Perceiver makes one vector
    for each module and rank, and linear layers make the factors of a LoRA of it. That network trains; the base does
    not. Long contexts are cut into chunks, whose components stand side by side. `dynlora adapt --hypernet --document`
    then writes a document's adapter in one pass, as a plain LoRA.

When to use it
    Where many documents come up that an adapter is wanted of at once, and there is time to train on very many others of
    their kind first. For a few documents, `dynlora adapt --document` without a hypernetwork is simpler and surer.

Reference
    Charakorn et al. 2026, Doc-to-LoRA (arXiv 2602.15902). There latent vectors have 512 numbers, 16 heads of 128 with 4
    for keys and 9 blocks, and rank 8 is written for down_proj alone. The scale is s·r^1.5, which is theirs at s = 2.
"""

from __future__ import annotations

has_components = False
hypernet = True
takes = ("alpha",)
OPTIONS = {
    "latent_size": {
        "type": "int", "default": 128, "at_least": 8, "at_most": 65536, "help": "Numbers of a latent vector."
    },
    "latents": {
        "type": "int", "default": 8, "at_least": 1, "at_most": 65536, "help": "Latent vectors that read a document."
    },
    "blocks": {"type": "int", "default": 2, "at_least": 1, "at_most": 1024, "help": "How often they look at it."},
    "heads": {
        "type": "int", "default": 4, "at_least": 1, "at_most": 1024, "help": "Attention heads; a multiple of kv_heads."
    },
    "kv_heads": {
        "type": "int", "default": 2, "at_least": 1, "at_most": 1024, "help": "Attention heads of keys and values."
    },
    "head_size": {
        "type": "int", "default": 32, "at_least": 1, "at_most": 4096, "help": "Numbers of an attention head."
    },
    "mlps": {
        "type": "int", "default": 1, "at_least": 0, "at_most": 1024,
        "help": "Residual MLPs of each block before the factors.",
    },
    "chunk": {"type": "int", "default": 512, "at_least": 1, "help": "Tokens of a document that are read at once."},
    "l1": {"type": "float", "default": 0.0, "at_least": 0, "help": "Weight in the loss of how large the factors are."},
}  # fmt: skip
