"""How the components of the start are shared out among the layers before training.

share_out      how many each layer gets, from what each further component of a layer is worth
in_proportion  that worth, where nothing is known but a weight of each layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def share_out(worth: Mapping[str, Sequence[float]], costs: Mapping[str, int], parameters: int) -> dict[str, int]:
    """Give components to the layers, the most valuable first, as long as the numbers suffice.

    Args:
        worth: of the first, second, ... component of every layer, falling or equal. A layer gets no more than it lists.
        costs: numbers of one component of each layer.
        parameters: numbers that all components may have together; enough for one component in every layer.

    Returns:
        Components of each layer, at least 1.
    """
    counts = dict.fromkeys(worth, 1)
    left = parameters - sum(costs.values())
    order = [(-value, place, name) for name, row in worth.items() for place, value in enumerate(row) if place]
    for _, _, name in sorted(order, key=lambda item: item[:2]):  # of equal worth: first the layer that has fewer
        if costs[name] <= left:
            counts[name] += 1
            left -= costs[name]
    return counts


def in_proportion(weights: Mapping[str, float], most: Mapping[str, int]) -> dict[str, list[float]]:
    """A worth for `share_out` that gives layers components in proportion to their weights (Sainte-Laguë's divisors).

    Args:
        weights: of each layer, not negative.
        most: components that each layer may have.
    """
    return {name: [weight / (place + 0.5) for place in range(most[name])] for name, weight in weights.items()}
