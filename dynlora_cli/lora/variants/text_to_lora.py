"""Text-to-LoRA: a network writes the whole adapter, every number of A and B, of a description of its task.

What it does
    A description's vector, the depth of a layer and its kind go through a small network; a linear head writes the
    layer's A and B. Head L writes all of them at once, M writes A and B one after the other, S component by component:
    each is smaller than the one before. An untrained network writes a plain LoRA, A random and B zero. It trains on
    the tasks' rows end to end, or on adapters of them that exist (`train.objective: reconstruction`).

When to use it
    To put many adapters into one file, or to make one for a task that is only described. Its own size counts: L has
    512·r·(d_in + d_out) numbers for each kind of layer, as many as adapters for hundreds of tasks.

Reference
    Charakorn et al. 2025, Text-to-LoRA (arXiv 2506.06105); code SakanaAI/text-to-lora, with whose sizes it is equal.
"""

from __future__ import annotations

has_components = False
hypernet = True
writes_budget = True
takes = ("alpha", "dropout")
RATE = 0.1  # what a head writes moves by its 512 inputs at once: 3e-4 was best where lora takes 4e-3, 1e-3 diverged
OPTIONS = {
    "text_encoder": {
        "type": "str", "default": "base", "help": "Makes vectors: base (its own states), minilm, a folder, a hub id."
    },
    "head": {"type": "choice", "choices": ["L", "M", "S"], "default": "L", "help": "How much is written at once."},
    "latent_size": {
        "type": "int", "default": 128, "at_least": 16, "at_most": 65536, "help": "Width of the network's blocks."
    },
    "hidden_size": {
        "type": "int", "default": 512, "at_least": 1, "at_most": 65536,
        "help": "Width inside its blocks, and of its heads.",
    },
    "ab_offset": {
        "type": "choice", "choices": ["fixed", "learned"], "default": "fixed",
        "help": "The plain LoRA below what is written stays as it is drawn, or trains: all tasks share it.",
    },
    "written_penalty": {
        "type": "float", "default": 0.001, "at_least": 0, "help": "Weight of the mean squares of A and B, end to end."
    },
}  # fmt: skip
