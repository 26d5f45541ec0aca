"""A study's confirmation, for pictures from anywhere: the same terms and score as a trial's, and what the judge says.

    confirmation = Confirmation(Path("runs/small_world/middle"))
    confirmation.judged(confirmation.shown(FLAWS["ears missing"](confirmation.jobs, confirmation.world)))

With stage=wide.STAGE the same on many other pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small_world import judge, wide
from small_world.definitions import scores_of
from small_world.flaws import World
from small_world.worlds import WORLDS

import optuna_hyperparameter_search as search

STAGE = "confirm"
Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Judged:
    """What the score and the judge say of one set of pictures."""

    terms: dict[str, float]
    scores: dict[str, float]  # by the name of the definition
    judge: dict[str, float]


class Confirmation:
    """The reference of a study that exists, and its scorer. The folder is named for its world, or it is the demo's."""

    def __init__(self, output_dir: Path, stage: str = STAGE, jobs: Sequence[dict[str, Any]] | None = None) -> None:
        reference = output_dir / "reference"
        self.stage, self.plan = stage, search.read_json(reference / "plan.json")
        self.plan[wide.STAGE] = wide.wide_jobs(self.plan)
        self.plan |= {stage: jobs} if jobs else {}
        self.jobs: Sequence[dict[str, Any]] = self.plan[stage]
        self.scorer = search.ImageScorer(self.plan, "cpu")
        found = search.FolderScorer(self.scorer, reference)
        self.limits, self.anchors, self.embeddings = found.anchors["usable"], found.anchors, found.embeddings
        self.captions = {wide.read_caption(Path(path)) for path in self.plan["images"]}
        training = [Image.open(path).convert("RGB") for path in self.plan["images"]]
        self.data = self.scorer.through_vae(training)
        base = read_pictures(reference / stage, self.jobs)
        self.base = self.images(base)
        self.world = World(
            {job["name"]: picture for job, picture in zip(self.jobs, base, strict=True)},
            training,
            [picture.scene for picture in WORLDS.get(output_dir.name, WORLDS["middle"]).data_set()],
        )

    def shown(self, pictures: Pictures) -> list[Image.Image]:
        """What a LoRA would have rendered: drawings pass the VAE, the base model's own pictures have passed it."""
        base = set(map(id, self.world.base.values()))
        return [picture if id(picture) in base else self.scorer.through_vae([picture])[0] for picture in pictures]

    def images(self, shown: Pictures) -> search.StageImages:
        return search.StageImages(self.scorer, self.stage, shown, self.limits, self.embeddings["data"])

    def of_trial(self, folder: Path) -> Judged:
        return self.judged(read_pictures(folder / "scores" / self.stage, self.jobs))

    def judged(self, shown: Pictures) -> Judged:
        """Of pictures as the VAE shows them, one for every job."""
        raw, anchors = self.raw_values(shown)
        terms = {name: float(value) for name, value in search.terms_of(raw, anchors).items()}
        prompts, training = [job["prompt"] for job in self.jobs], list(map(judge.to_array, self.data))
        told = judge.truth(prompts, list(map(judge.to_array, shown)), training, self.captions)
        return Judged(terms, scores_of(terms), told)

    def raw_values(self, shown: Pictures) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """A trial's raw values, and the anchors between which they become terms."""
        raw = self.images(shown).raw_values(self.base.vectors, self.base.usable, self.anchors["copy"])
        return raw, {**self.anchors, **self.base.anchors()}

    def value(self, shown: Pictures) -> tuple[float, float, list[dict[str, Any]]]:
        """Score, its standard error, and the values of each image."""
        (raw, anchors), weights = self.raw_values(shown), self.plan["weights"]
        error = float(np.std(search.resampled_scores(raw, anchors, weights)))
        return float(search.combine(search.terms_of(raw, anchors), weights)), error, raw["images"]


def read_pictures(folder: Path, jobs: Sequence[dict[str, Any]]) -> list[Image.Image]:
    return [Image.open(folder / f"{job['name']}.png").convert("RGB") for job in jobs]
