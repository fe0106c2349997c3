"""Number formats of a GGUF model: which we write ourselves, which llama.cpp's own quantizer does, and how far each is.

The limits are a few times what each format costs a model of 0.1 to 8 B parameters, so that only a fault is stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

OWN = {"f32": 0, "f16": 1, "q8_0": 7}  # written here; by `general.file_type`, what most of the matrices are
SUPER_BLOCK = 256  # the k formats take so many numbers of a row together


@dataclass(frozen=True, slots=True)
class Format:
    """A format that llama.cpp's quantizer writes.

    Args:
        number: in llama.cpp's enum llama_ftype.
        max_kl: nats per token by which the export may differ, where nobody says otherwise.
        block: numbers of a row that are stored together.
    """

    number: int
    max_kl: float
    block: int = SUPER_BLOCK


# Those that need no importance matrix.
QUANTIZED = {
    "q6_k": Format(18, 0.1),
    "q5_k_m": Format(17, 0.2),
    "q5_k_s": Format(16, 0.2),
    "q5_1": Format(9, 0.2, 32),
    "q5_0": Format(8, 0.2, 32),
    "q4_k_m": Format(15, 0.5),
    "q4_k_s": Format(14, 0.5),
    "iq4_nl": Format(25, 0.5, 32),
    "iq4_xs": Format(30, 0.5),
    "q4_1": Format(3, 0.5, 32),
    "q4_0": Format(2, 0.5, 32),
    "q3_k_l": Format(13, 1.0),
    "q3_k_m": Format(12, 1.0),
    "q3_k_s": Format(11, 1.0),
    "q2_k": Format(10, 2.0),
}
MAX_KL = {"f32": 0.01, "f16": 0.01, "q8_0": 0.1} | {name: form.max_kl for name, form in QUANTIZED.items()}
NAMES = (*OWN, *QUANTIZED)
DEFAULT = "f16"
