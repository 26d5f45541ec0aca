"""Definitions of a score that compete: the present one (3), the one before, and others with other fidelity terms.

A fidelity sees pictures once (features, an array whose first axis is the pictures) and gives a term in [0, 1] for any
selection of them: 0 is what the base model reaches on the same prompts and seeds, 1 what the data set reaches itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from small_world.patch_reader import PatchReader

import optuna_hyperparameter_search as search

REFERENCES = 32  # pictures of the data set that patches are taken from, at most
PARTS = 12  # groups of patches that look alike
BORDER_PERCENTILE = 95
SHRINKAGE = 0.01  # of the border's covariance towards a round one
LEAST = 0.05  # from 0 to 1 of a term; less would magnify noise


Tokens = Callable[[Sequence[Image.Image]], np.ndarray]  # unit vectors (n, patches, d) of pictures
Foreground = Callable[[np.ndarray], np.ndarray]  # which of such patches show the subject, (n, patches)


class Fidelity(Protocol):
    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray: ...

    def term(self, features: np.ndarray, base: np.ndarray) -> float: ...


class WholeImage:
    """The present term: DINOv2's class token, q(X) between q(base) and 1."""

    def __init__(self, scorer: Any, data: Sequence[Image.Image]) -> None:
        self.scorer = scorer
        self.data = self.features(data)

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return self.scorer.embed_images(pictures)

    def term(self, features: np.ndarray, base: np.ndarray) -> float:
        zero = search.subject_similarity(base, self.data).mean()
        return scaled(search.subject_similarity(features, self.data).mean(), zero, 1.0)


class Patches:
    """Patch tokens: how well each foreground patch of the data set is found again somewhere in a picture.

    features(pictures) is (n, parts): the mean, over the patches of a part, of the cosine with the picture's best patch.
    Parts are groups of the foreground's patches (spherical k-means).
    """

    def __init__(self, tokens: Tokens, data: Sequence[Image.Image], parts: int, foreground: Foreground) -> None:
        self.tokens = tokens
        found = tokens(search._evenly(data, REFERENCES))
        self.foreground = foreground(found)
        self.patches, self.owner = found[self.foreground], np.nonzero(self.foreground)[0]
        self.part = k_means(self.patches, parts)
        self.one = self.reached_by_data(found)

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        best = np.stack([(self.patches @ tokens.T).max(axis=1) for tokens in self.tokens(pictures)])
        parts = range(self.part.max() + 1)
        return np.stack([best[:, self.part == part].mean(axis=1) for part in parts], axis=1)

    def reached_by_data(self, found: np.ndarray) -> np.ndarray:
        """(parts,): what the data set's pictures reach, each against the patches of all others."""
        best = np.stack([(self.patches @ tokens.T).max(axis=1) for tokens in found])
        others = np.arange(len(found))[:, None] != self.owner
        parts = (self.part == part for part in range(self.part.max() + 1))
        return np.array([best[:, part][others[:, part]].mean() for part in parts])

    def term(self, features: np.ndarray, base: np.ndarray) -> float:
        """The parts' geometric mean. A part counts as much as data set and base model differ in it."""
        zero = base.mean(axis=0)
        room = np.maximum(self.one - zero, 0.0)
        found = np.clip((features.mean(axis=0) - zero) / np.maximum(room, LEAST), search.TERM_FLOOR, 1.0)
        return float(np.exp((room * np.log(found)).sum() / max(room.sum(), 1e-9)))


def first_component(tokens: np.ndarray) -> np.ndarray:
    """Which patches (n, patches) show the subject: the side of the first principal component away from the border."""
    flat = tokens.reshape(-1, tokens.shape[2])
    centred = flat - flat.mean(axis=0)
    first = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    along = (centred @ first).reshape(tokens.shape[:2])
    border = border_of(tokens)
    return along < 0 if along[:, border].mean() > along[:, ~border].mean() else along > 0


def unlike_border(tokens: np.ndarray) -> np.ndarray:
    """Which patches (n, patches) show the subject: those further from the border's patches than 95% of these are.

    Further along Fisher's linear discriminant of border and inner patches, with the border's covariance: what stands
    at the border varies as backgrounds do.
    """
    border = border_of(tokens)
    outer, inner = (tokens[:, some].reshape(-1, tokens.shape[2]) for some in (border, ~border))
    spread = np.cov(outer.T)
    spread += SHRINKAGE * np.trace(spread) / len(spread) * np.eye(len(spread))
    along = tokens @ np.linalg.solve(spread, inner.mean(axis=0) - outer.mean(axis=0))
    return along > np.percentile(along[:, border], BORDER_PERCENTILE)


def border_of(tokens: np.ndarray) -> np.ndarray:
    """Which patches touch the left, upper or right edge; the subject often leaves by the lower one."""
    side = round(tokens.shape[1] ** 0.5)
    edge = np.zeros((side, side), dtype=bool)
    edge[0] = edge[:, 0] = edge[:, -1] = True
    return edge.ravel()


def k_means(vectors: np.ndarray, count: int, rounds: int = 30) -> np.ndarray:
    """The group (n,) of each unit vector: spherical k-means, which starts from vectors far from each other."""
    centres = [vectors.mean(axis=0)]
    for _ in range(count):
        nearest = np.max([vectors @ centre for centre in centres], axis=0)
        centres.append(vectors[nearest.argmin()])
    found = np.stack(centres[1:])
    group = (vectors @ found.T).argmax(axis=1)
    for _ in range(rounds):
        found = np.stack([vectors[group == g].mean(axis=0) if (group == g).any() else found[g] for g in range(count)])
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        group = (vectors @ found.T).argmax(axis=1)
    return np.unique(group, return_inverse=True)[1]


def scaled(value: float, zero: float, one: float) -> float:
    return float(np.clip((value - zero) / max(one - zero, LEAST), 0.0, 1.0))


SECOND = {"fidelity": 0.5, "text": 0.3, "preservation": 0.1, "variety": 0.1, "usable": 2.0}
THIRD = {"fidelity": 0.5, "text": 0.3, "preservation": 0.3, "originality": 0.5, "usable": 2.0}
STRICT = {**THIRD, "text": 0.6, "preservation": 0.6}  # both terms hardly move with prompts and seeds


@dataclass(frozen=True)
class Definition:
    """Fidelities, of which the geometric mean is taken, and the weights of all terms."""

    fidelities: tuple[str, ...]
    weights: Mapping[str, float]

    def score(self, terms: Mapping[str, float], fidelity: Mapping[str, float]) -> float:
        found = [max(fidelity[name], search.TERM_FLOOR) for name in self.fidelities]
        return search.combine({**terms, "fidelity": math.prod(found) ** (1 / len(found))}, self.weights)


DEFINITIONS = {
    "2": Definition(("whole",), SECOND),
    "3": Definition(("whole",), THIRD),
    "component": Definition(("component",), THIRD),
    "patches": Definition(("patches",), THIRD),
    "parts": Definition(("parts",), THIRD),
    "both": Definition(("whole", "parts"), THIRD),
    "3, s": Definition(("whole",), STRICT),
    "parts, s": Definition(("parts",), STRICT),
    "both, s": Definition(("whole", "parts"), STRICT),
    "three, s": Definition(("whole", "patches", "parts"), STRICT),
}


class Candidates:
    """All fidelities, for one data set."""

    def __init__(self, scorer: Any, data: Sequence[Image.Image]) -> None:
        whole, tokens = WholeImage(scorer, data), PatchReader(scorer.dinov2).tokens
        self.fidelities: dict[str, Fidelity] = {
            "whole": whole,
            "component": Patches(tokens, data, 1, first_component),
            "patches": Patches(tokens, data, 1, unlike_border),
            "parts": Patches(tokens, data, PARTS, unlike_border),
        }

    def features(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        return {name: fidelity.features(pictures) for name, fidelity in self.fidelities.items()}

    def terms(self, seen: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Every fidelity by its name, of features of the subject's pictures."""
        return {name: one.term(seen[name], base[name]) for name, one in self.fidelities.items()}


def scores_of(terms: Mapping[str, float]) -> dict[str, float]:
    """By definition; `terms` has the present ones and those of Candidates."""
    return {name: definition.score(terms, terms) for name, definition in DEFINITIONS.items()}
