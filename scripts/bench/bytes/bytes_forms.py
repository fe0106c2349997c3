"""The number formats of by_bytes.py: what each makes of an adapter, and the bytes that it takes.

float32, bf16 and fp8 are the file adapter_model.safetensors; the others both files of `dynlora export --to packed`. All go
through the product's own code, for LoRA as for dynlora, but for nf4, which is a baseline.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.packed.archive import in_svd_form, pack, write
from dynlora_cli.adapters.write import bytes_of, files_of
from dynlora_cli.rounding.bits import WORTH, costs, share_out, within

FLOATS = ("float32", "bf16", "fp8")
ALIKE = {"int4": 4, "int3": 3, "int2": 2}  # the same bits for all components
# As many bytes as so many bits for all; shared out as the product does, and by squared error alone.
MIXED = {"mixed4": (4.0, WORTH), "mixed3": (3.0, WORTH), "mixed2.5": (2.5, WORTH), "energy3": (3.0, 0.0)}
FORMS = (*FLOATS, "nf4", *ALIKE, *MIXED)
# The 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E), and numbers that share an absolute largest one.
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
GROUP = 64


def through(adapter: Adapter, form: str) -> tuple[Adapter, int]:
    """The adapter as it comes back from a format, and the bytes of its files."""
    if form in FLOATS:
        return adapter.rounded(form), bytes_of(adapter, form)
    turned = in_svd_form(adapter)
    if form == "nf4":
        return _nf4(turned), _packed(turned, dict.fromkeys(turned.layers, 4))[1]
    if form in ALIKE:
        return _packed(turned, dict.fromkeys(turned.layers, ALIKE[form]))
    bits, worth = MIXED[form]
    sizes = {name: costs(f.a_CI, f.b_OC, worth) for name, f in turned.layers.items()}
    return _packed(turned, share_out(sizes, int(sum(within(cost, bits) for cost in sizes.values()))))


def _packed(turned: Adapter, bits: dict[str, int | list[int]]) -> tuple[Adapter, int]:
    of = {name: [k] * turned.ranks[name] if isinstance(k, int) else k for name, k in bits.items()}
    found, data = pack(turned, of)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), found, of, data, files_of(found))
        return found, sum(file.stat().st_size for file in Path(folder).iterdir())


def _nf4(adapter: Adapter) -> Adapter:
    layers = {n: replace(f, a_CI=_nf4_of(f.a_CI), b_OC=_nf4_of(f.b_OC.T).T) for n, f in adapter.layers.items()}
    return adapter.with_layers(layers)


def _nf4_of(x_VN: Tensor) -> Tensor:
    vectors, numbers = x_VN.shape
    x = torch.nn.functional.pad(x_VN, (0, -numbers % GROUP)).view(vectors, -1, GROUP)
    top = x.abs().amax(2, keepdim=True).clamp(min=1e-30)
    nearest = (x[..., None] / top[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * top).view(vectors, -1)[:, :numbers]
