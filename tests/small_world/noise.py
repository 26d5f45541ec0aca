"""How far one LoRA's value moves when only the prompts and seeds are others.

A pool holds pictures of every prompt that the small world has: all captions, all combinations of background, place and
size that the data set does not show, all short prompts, half of the shapes held out; POOL_SEEDS seeds each. The base
model and a LoRA render them once. A draw chooses prompts and seeds as a scoring plan does. It is scored as a
confirmation of its own, with the base model's anchors on the same prompts and seeds. No picture comes twice in a draw,
because another plan would have chosen from the same prompts. Large draws overlap, so their deviation is a little too
small.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small_world import scenes
from small_world.confirmation import STAGE, Confirmation
from small_world.definitions import scores_of

import optuna_hyperparameter_search as search

POOL_SEEDS = 6
FIRST_POOL_SEED = 8001
DRAWS = 300
SHARES = {"caption": 0.25, "elsewhere": 0.5, "short": 0.25}  # of a plan's subject prompts, as PromptChooser deals them


def pool_prompts(captions: Sequence[str], subject: str) -> dict[str, list[str]]:
    """Every prompt, by its kind."""
    known = {caption.removeprefix(f"{subject}, ") for caption in captions}
    spots = list(itertools.product(scenes.BACKGROUNDS, scenes.PLACES))
    full = [f"a {size} figure, {place}, {background}" for background, place in spots for size in scenes.SIZES]
    shapes = itertools.product(scenes.BACKGROUNDS, scenes.SHAPES, scenes.COLOURS, scenes.PLACES, scenes.SIZES)
    plain = [scenes.Scene(where, (shape, colour), place, size) for where, shape, colour, place, size in shapes]
    return {
        "caption": list(captions),
        "elsewhere": [f"{subject}, {text}" for text in full if text not in known],
        "short": [f"{subject}, {place}, {background}" for background, place in spots],
        "plain": [", ".join(scenes.tags(scene)) for scene in plain if scenes.is_held_out(scene)][::2],
    }


def pool_jobs(prompts: Mapping[str, Sequence[str]], like: Mapping[str, Any], subject: str) -> list[dict[str, Any]]:
    """A job for each prompt and seed, plain prompts with one seed; "kind" says which of the prompts it is."""
    jobs = []
    for kind, texts in prompts.items():
        for number, text in enumerate(texts):
            for seed in range(POOL_SEEDS if kind != "plain" else 1):
                words = {"prompt": text, "text": text.removeprefix(f"{subject}, "), "subject": kind != "plain"}
                place = {"name": f"{kind}{number:02d}-s{seed}", "seed": FIRST_POOL_SEED + seed, "kind": kind}
                jobs.append({**like, **words, **place, "caption": kind == "caption"})
    return jobs


def rendered(scorer: search.ImageScorer, jobs: Sequence[Mapping[str, Any]], folder: Path) -> list[Image.Image]:
    """The jobs' pictures from a folder, or made and kept there."""
    files = [folder / f"{job['name']}.png" for job in jobs]
    if not all(file.is_file() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        for file, picture in zip(files, scorer.render(jobs), strict=True):
            picture.save(file)
    return [Image.open(file).convert("RGB") for file in files]


def draw(jobs: Sequence[Mapping[str, Any]], counts: Mapping[str, int], rng: random.Random) -> list[int]:
    """Numbers of the jobs that a plan of these counts might have, its subject prompts first."""
    by_prompt: dict[str, dict[str, list[int]]] = {}
    for number, job in enumerate(jobs):
        by_prompt.setdefault(job["kind"], {}).setdefault(job["prompt"], []).append(number)
    seeds = rng.sample(range(POOL_SEEDS), counts["seeds"])
    chosen: list[int] = []
    for kind, share in SHARES.items():
        for numbers in rng.sample(list(by_prompt[kind].values()), round(counts["prompts"] * share)):
            chosen += [numbers[seed] for seed in seeds]
    plain = rng.sample(list(by_prompt["plain"].values()), counts["plain_prompts"])
    return chosen + [numbers[0] for numbers in plain]


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
        plan, scorer = confirmation.plan, confirmation.scorer
        prompts = pool_prompts(sorted(confirmation.captions), plan["subject"])
        self.confirmation = confirmation
        self.jobs = pool_jobs(prompts, confirmation.jobs[0], plan["subject"])
        self.base = rendered(scorer, self.jobs, folder / "base")
        with scorer.lora(lora):
            self.pictures = rendered(scorer, self.jobs, folder / "lora")
        self.remembered = Remembered(scorer, self.base + self.pictures, [job["text"] for job in self.jobs])
        self.features, self.base_features = map(confirmation.candidates.features, (self.pictures, self.base))

    def scores(self, numbers: Sequence[int]) -> dict[str, float]:
        """A draw's scores by definition, with the base model's anchors on the same draw."""
        jobs = [self.jobs[number] for number in numbers]
        self.remembered.plan = {STAGE: jobs}
        base, images = (
            search.StageImages(
                self.remembered, STAGE, [some[number] for number in numbers], self.confirmation.limits,
                self.confirmation.embeddings["data"],
            )
            for some in (self.base, self.pictures)
        )  # fmt: skip
        raw = images.raw_values(base.vectors, base.usable, self.confirmation.anchors["copy"])
        terms = search.terms_of(raw, {**self.confirmation.anchors, **base.anchors()})
        about = [number for number in numbers if self.jobs[number]["subject"]]
        seen, zero = (
            {name: found[about] for name, found in features.items()} for features in (self.features, self.base_features)
        )
        return scores_of({**terms, **self.confirmation.candidates.terms(seen, zero)})

    def spread(self, counts: Mapping[str, int], draws: int = DRAWS) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of the score over draws of these counts, by definition."""
        rng = random.Random(1)
        found = [self.scores(draw(self.jobs, counts, rng)) for _ in range(draws)]
        return {name: mean_and_deviation([scores[name] for scores in found]) for name in found[0]}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1))
