"""Definitions of the score that compete: other weights for the same terms, or fidelity as a cosine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna_hyperparameter_search as search

PRESENT = str(search.SCORE_DEFINITION[1])  # among DEFINITIONS
EQUAL = {"fidelity": 0.5, "text": 0.5, "preservation": 0.5, "originality": 0.5, "usable": 2.0}
DEFINITIONS: dict[str, Mapping[str, float]] = {
    "3": EQUAL,
    "4": {**EQUAL, "text": 0.8, "preservation": 0.8},
    "lenient": EQUAL,
    "strict": {**EQUAL, "text": 1.0, "preservation": 1.0},
}


def scores_of(terms: Mapping[str, Any]) -> dict[str, Any]:
    """By definition; of numbers or arrays. Definition 3 took fidelity as a cosine."""
    cosine = {**terms, "fidelity": 1 - (1 - terms["fidelity"]) ** 2}
    return {name: search.combine(cosine if name == "3" else terms, weights) for name, weights in DEFINITIONS.items()}
