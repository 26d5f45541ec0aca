"""Definitions of the score that compete: other weights for the same terms."""

from __future__ import annotations

from collections.abc import Mapping

import optuna_hyperparameter_search as search

SECOND = {"fidelity": 0.5, "text": 0.3, "preservation": 0.1, "variety": 0.1, "usable": 2.0}
THIRD = {"fidelity": 0.5, "text": 0.5, "preservation": 0.5, "originality": 0.5, "usable": 2.0}
DEFINITIONS: dict[str, Mapping[str, float]] = {
    "2": SECOND,
    "3": THIRD,
    "lenient": {**THIRD, "text": 0.3, "preservation": 0.3},
    "strict": {**THIRD, "text": 0.8, "preservation": 0.8},
}


def scores_of(terms: Mapping[str, float]) -> dict[str, float]:
    """By definition."""
    return {name: float(search.combine(terms, weights)) for name, weights in DEFINITIONS.items()}
