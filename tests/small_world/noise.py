"""How far one LoRA's value moves when only the prompts and seeds are others.

A pool holds pictures of every prompt that the small world has: all captions, all combinations of background, place and
size that the data set does not show, all short prompts, half of the shapes held out; six seeds each. The base
model and a LoRA render them once. A draw chooses prompts and seeds as a scoring plan does. It is scored as a
confirmation of its own, with the base model's anchors on the same prompts and seeds. No picture comes twice in a draw,
because another plan would have chosen from the same prompts. Large draws overlap, so their deviation is a little too
small.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small_world import wide
from small_world.confirmation import STAGE, Confirmation, read_pictures
from small_world.definitions import DEFINITIONS, PRESENT, scores_of

import optuna_hyperparameter_search as search

DRAWS = 300


class Remembered:
    """Answers as an ImageScorer does, from what the encoders said of some pictures and texts once."""

    def __init__(self, scorer: search.ImageScorer, pictures: Sequence[Image.Image], texts: Sequence[str]) -> None:
        self.plan: dict[str, Any] = {}
        self._pictures = {id(picture): number for number, picture in enumerate(pictures)}
        self._texts = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        self._vectors = scorer.embed_images(pictures)
        self._for_text = scorer.embed_images_for_text(pictures)
        self._text_vectors = scorer.embed_texts(list(self._texts))

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self._vectors[[self._pictures[id(image)] for image in images]]

    def embed_images_for_text(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self._for_text[[self._pictures[id(image)] for image in images]]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._text_vectors[[self._texts[text] for text in texts]]


class Pool:
    """The pool's pictures by the base model and by a LoRA, and the scores of draws from them."""

    def __init__(self, confirmation: Confirmation, lora: Path, folder: Path) -> None:
        scorer = confirmation.scorer
        self.confirmation, self.jobs = confirmation, wide.pool_jobs(confirmation.plan)
        wide.render(scorer, self.jobs, folder / "base")
        with scorer.lora(lora):
            wide.render(scorer, self.jobs, folder / "lora")
        self.base, self.pictures = (read_pictures(folder / name, self.jobs) for name in ("base", "lora"))
        self.remembered = Remembered(scorer, self.base + self.pictures, [job["text"] for job in self.jobs])

    def raw_and_anchors(self, numbers: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A draw's raw values, and the base model's anchors on the same draw."""
        self.remembered.plan = {STAGE: [self.jobs[number] for number in numbers]}
        base, images = (
            search.StageImages(
                self.remembered, STAGE, [some[number] for number in numbers], self.confirmation.limits,
                self.confirmation.embeddings["data"],
            )
            for some in (self.base, self.pictures)
        )  # fmt: skip
        raw = images.raw_values(base.vectors, base.usable, self.confirmation.anchors["copy"])
        return raw, {**self.confirmation.anchors, **base.anchors()}

    def spread(self, counts: Mapping[str, int], draws: int = DRAWS) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of the score over draws of these counts, by definition."""
        rng = random.Random(1)
        drawn = (self.raw_and_anchors(wide.draw(self.jobs, counts, rng)) for _ in range(draws))
        found = [scores_of(search.terms_of(*each)) for each in drawn]
        return {name: mean_and_deviation([scores[name] for scores in found]) for name in found[0]}

    def standard_errors(self, counts: Mapping[str, int], draws: int = DRAWS // 2) -> list[float]:
        """What the report would say of each draw, by the present definition."""
        rng = random.Random(1)
        drawn = [self.raw_and_anchors(wide.draw(self.jobs, counts, rng)) for _ in range(draws)]
        return [float(np.std(search.resampled_scores(*each, DEFINITIONS[PRESENT]))) for each in drawn]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1))
