"""Text-gated LoRA: components that all tasks share, with gates that a small network writes from a task's description.

What it does
    In every layer ΔW = s B diag(z) A. A and B train on all tasks together; z is 1 plus what a network makes of the
    description's vector, the layer's depth and its name. `dynlora adapt --hypernet` writes a description's adapter as a
    plain LoRA: z goes into B, and `rank.budget` keeps the largest components.

When to use it
    For many small tasks on one base, where a new description should give an adapter at once.

Reference
    Abdalla et al. 2025, Zhyper (arXiv 2510.19733), with z diagonal; the network is the trunk of Text-to-LoRA
    (arXiv 2506.06105). Its heads begin at 0 here, so that all descriptions begin with the same LoRA.
"""

from __future__ import annotations

has_components = False
hypernet = True
takes = ("alpha", "dropout")
OPTIONS = {
    "text_encoder": {
        "type": "str", "default": "base", "help": "Makes vectors: base (its own states), minilm, a folder, a hub id."
    },
    "latent_size": {
        "type": "int", "default": 128, "at_least": 16, "at_most": 65536, "help": "Width of the network's blocks."
    },
    "hidden_size": {
        "type": "int", "default": 512, "at_least": 1, "at_most": 65536,
        "help": "Width inside its blocks, and of its heads.",
    },
}  # fmt: skip
