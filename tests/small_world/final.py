"""What the final stage gains: simulated studies with the noise that was measured on real LoRAs.

A LoRA's confirmation tells its value, and how much of the value's noise comes from prompts and how much from seeds. A
study draws LoRAs, adds noise as its counts let through, and picks: by the confirmation alone, or by the final stage
between the finalists that the search would choose. Rounds are not simulated: a trial that is dropped early is taken for
worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import optuna_hyperparameter_search as search

STUDIES = 200
TRIALS = 20
JITTER = 0.02  # standard deviation between a LoRA and one that is trained like it


@dataclass(frozen=True)
class Noise:
    """Variances of a value: of one prompt, and of one seed of a prompt."""

    prompt: float
    seed: float

    def deviation(self, prompts: int, seeds: int) -> float:
        return float(np.sqrt(self.prompt / prompts + self.seed / (prompts * seeds)))


def noise_of(images: Sequence[Mapping[str, Any]], standard_error: float) -> Noise:
    """A value's noise from its images: the parts are those of q (analysis of variance), the whole is the value's."""
    by_prompt: dict[str, list[float]] = {}
    for image in images:
        if "q" in image:
            by_prompt.setdefault(image["name"].partition("-")[0], []).append(image["q"])
    groups = [np.array(values) for values in by_prompt.values() if len(values) > 1]
    seeds = float(np.mean([len(values) for values in groups]))
    within = float(np.mean([values.var(ddof=1) for values in groups]))
    between = max(0.0, float(np.var([values.mean() for values in groups], ddof=1)) - within / seeds)
    scale = standard_error**2 / ((between + within / seeds) / len(groups))
    return Noise(scale * between, scale * within)


@dataclass(frozen=True)
class Picked:
    """What one way of choosing got, over all studies."""

    regret: float
    truly_best: float  # share of the studies
    overstated: float


def simulate(
    values: Sequence[float], noises: Sequence[Noise], counts: Mapping[str, tuple[int, int]], seed: int = 1
) -> dict[str, Picked]:
    """By the confirmation alone and with a final stage; `counts`: prompts and seeds of "confirm" and "final"."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float, float]]] = {"confirmation": [], "final stage": []}
    for _ in range(STUDIES):
        chosen = rng.integers(len(values), size=TRIALS)
        true = np.array(values)[chosen] + rng.normal(0, JITTER, TRIALS)
        errors = {stage: np.array([noises[n].deviation(*counts[stage]) for n in chosen]) for stage in counts}
        told = true + rng.normal(0, errors["confirm"])
        ranked = np.argsort(-told)[: search.FINALISTS_AT_MOST]
        close = told[ranked[0]] - told[ranked] <= 2 * np.hypot(errors["confirm"][ranked[0]], errors["confirm"][ranked])
        finalists = [n for place, n in enumerate(ranked) if place < search.FINALISTS_AT_LEAST or close[place]]
        again = true[finalists] + rng.normal(0, errors["final"][finalists])
        for name, pick, value in (
            ("confirmation", ranked[0], told[ranked[0]]),
            ("final stage", finalists[int(again.argmax())], again.max()),
        ):
            found[name].append((true.max() - true[pick], float(pick == true.argmax()), value - true[pick]))
    return {name: Picked(*map(float, np.mean(results, axis=0))) for name, results in found.items()}
