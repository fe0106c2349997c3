"""How other tools choose the rank that each layer keeps, by its singular values alone: their formulas, in code of our own.

A rule gets the singular values of every layer's update (largest first) with its shape, and answers with ranks. What is
cut is then the same for all: the singular vectors beyond that rank.

    energy             the fewest values with this share of the squared sum. PEFT's `convert_to_lora(rank=0.9)`, read
                       from its source; loraspectra's `--energy`; kohya's sv_fro, whose parameter is the root of the
                       share; what Gradience calls k@90%. One formula under four names
    kohya_ratio        values above the largest / parameter (sv_ratio), from resize_lora.py's source
    kohya_cumulative   the fewest values with this share of the plain sum (sv_cumulative), from the same
    mp                 values above the Marchenko-Pastur edge. loraspectra (`--policy mp`) says no more than that in its
                       release notes and posts, and its source could not be had: noise level from the median value, edge
                       (√long + √rank), as for a factor of that shape whose numbers are noise
    global_energy      loraspectra 1.0, "global budget rank allocator", of which the text is only that name: the
                       largest σ² per parameter over all layers. At least one stays in each
    gradience_layer    k@90% of each layer, rounded up to 1, 2, 4, 8, 16, 32, 64 (suggest_per_layer_ranks, source read)
    gradience_median   one rank for all: the median of k@90% over layers, rounded up so; its tool trains anew at that
    gradience_p90      the same with the 90th percentile
    effective          ceil(exp(entropy of σ / Σσ)): Gradience's entropy_effective
    stable             ceil(Σσ² / σ1²): Gradience's stable_rank_ceil
    hard_threshold     values above ω(β)·median, ω of Gavish and Donoho: Gradience's optimal_hard_threshold
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a layer's update, largest first, and its inputs and outputs."""

    values: list[float]
    d_in: int
    d_out: int

    @property
    def cost(self) -> int:
        return self.d_in + self.d_out


Spectra = Mapping[str, Spectrum]
Ranks = dict[str, int]


def _fewest(parts: list[float], share: float) -> int:
    """How many of these parts, from the first, hold this share of their sum."""
    total, running = sum(parts), 0.0
    for index, part in enumerate(parts):
        running += part
        if running >= share * total:
            return index + 1
    return len(parts)


def _rounded_up(rank: float, most: int) -> int:
    return min(next((step for step in STEPS if step >= rank), STEPS[-1]), most)


def energy_rank(spectrum: Spectrum, share: float) -> int:
    return _fewest([value**2 for value in spectrum.values], share)


def energy(spectra: Spectra, share: float) -> Ranks:
    return {name: energy_rank(spectrum, share) for name, spectrum in spectra.items()}


def kohya_ratio(spectra: Spectra, parameter: float) -> Ranks:
    """Between one and all but one, as resize_lora.py has it."""
    return {
        name: max(1, min(sum(v > s.values[0] / parameter for v in s.values), len(s.values) - 1))
        for name, s in spectra.items()
    }


def kohya_cumulative(spectra: Spectra, share: float) -> Ranks:
    return {name: max(1, min(_fewest(s.values, share), len(s.values) - 1)) for name, s in spectra.items()}


def mp(spectra: Spectra, parameter: None = None) -> Ranks:  # noqa: ARG001
    ranks = {}
    for name, spectrum in spectra.items():
        long, rank = max(spectrum.d_in, spectrum.d_out), len(spectrum.values)
        noise = median(spectrum.values) / math.sqrt(long)  # all values of such noise are near √long times its level
        edge = noise * (math.sqrt(long) + math.sqrt(rank))
        ranks[name] = max(1, sum(value > edge for value in spectrum.values))
    return ranks


def global_energy(spectra: Spectra, parameters: float) -> Ranks:
    ranks = dict.fromkeys(spectra, 1)
    left = parameters - sum(spectrum.cost for spectrum in spectra.values())
    others = [(value**2 / spectrum.cost, name) for name, spectrum in spectra.items() for value in spectrum.values[1:]]
    for _, name in sorted(others, reverse=True):
        if spectra[name].cost > left:
            break
        ranks[name] += 1
        left -= spectra[name].cost
    return ranks


def gradience_layer(spectra: Spectra, share: float) -> Ranks:
    return {name: _rounded_up(energy_rank(s, share), len(s.values)) for name, s in spectra.items()}


def _one_for_all(spectra: Spectra, share: float, percentile: float) -> Ranks:
    ranks = sorted(energy(spectra, share).values())
    at = percentile * (len(ranks) - 1)
    low, high = ranks[math.floor(at)], ranks[math.ceil(at)]
    return {
        name: _rounded_up(low + (high - low) * (at % 1), len(spectrum.values)) for name, spectrum in spectra.items()
    }


def gradience_median(spectra: Spectra, share: float) -> Ranks:
    return _one_for_all(spectra, share, 0.5)


def gradience_p90(spectra: Spectra, share: float) -> Ranks:
    return _one_for_all(spectra, share, 0.9)


def effective(spectra: Spectra, parameter: None = None) -> Ranks:  # noqa: ARG001
    ranks = {}
    for name, spectrum in spectra.items():
        total = sum(spectrum.values)
        shares = [value / total for value in spectrum.values if value > 0]
        entropy = -sum(share * math.log(share) for share in shares)
        ranks[name] = min(math.ceil(math.exp(entropy)), len(spectrum.values))
    return ranks


def stable(spectra: Spectra, parameter: None = None) -> Ranks:  # noqa: ARG001
    return {
        name: min(math.ceil(sum(v**2 for v in s.values) / s.values[0] ** 2 - 1e-9), len(s.values))
        for name, s in spectra.items()
    }


def hard_threshold(spectra: Spectra, parameter: None = None) -> Ranks:  # noqa: ARG001
    ranks = {}
    for name, spectrum in spectra.items():
        beta = min(spectrum.d_in, spectrum.d_out) / max(spectrum.d_in, spectrum.d_out)
        limit = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * median(spectrum.values)
        ranks[name] = max(1, sum(value > limit for value in spectrum.values))
    return ranks
