"""A stage of many pictures, which no study chooses by: what is true of a LoRA, as far as pictures can tell.

    python tests/small_world/wide.py OUTPUT_DIR/trial_0003     renders OUTPUT_DIR/trial_0003/scores/wide/*.png

With a reference's folder, the base model renders them.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from small_world import scenes

import optuna_hyperparameter_search as search

STAGE = "wide"
COUNTS = {"prompts": 24, "seeds": 6, "plain_prompts": 54}  # 198 pictures
SEEDS = 6
FIRST_SEED = 8001
SHARES = {"caption": 0.25, "elsewhere": 0.5, "short": 0.25}  # of a plan's subject prompts, as PromptChooser deals them
Jobs = Sequence[Mapping[str, Any]]


def every_prompt(captions: Sequence[str], subject: str) -> dict[str, list[str]]:
    """All prompts of the small world that a plan may have, by their kind."""
    known = {caption.removeprefix(f"{subject}, ") for caption in captions}
    spots = list(itertools.product(scenes.BACKGROUNDS, scenes.PLACES))
    full = [f"a {size} figure, {place}, {background}" for background, place in spots for size in scenes.SIZES]
    shapes = itertools.product(scenes.BACKGROUNDS, scenes.SHAPES, scenes.COLOURS, scenes.PLACES, scenes.SIZES)
    plain = [scenes.Scene(where, (shape, colour), place, size) for where, shape, colour, place, size in shapes]
    return {
        "caption": list(dict.fromkeys(captions)),
        "elsewhere": [f"{subject}, {text}" for text in full if text not in known],
        "short": [f"{subject}, {place}, {background}" for background, place in spots],
        "plain": [", ".join(scenes.tags(scene)) for scene in plain if scenes.is_held_out(scene)][::2],
    }


def jobs_of(prompts: Mapping[str, Sequence[str]], like: Mapping[str, Any], subject: str) -> list[dict[str, Any]]:
    """A job for each prompt and seed, no seed twice; plain prompts have one. "kind" says which of the prompts it is."""
    jobs: list[dict[str, Any]] = []
    for kind, texts in prompts.items():
        for number, text in enumerate(texts):
            for _ in range(SEEDS if kind != "plain" else 1):
                words = {"prompt": text, "text": text.removeprefix(f"{subject}, "), "subject": kind != "plain"}
                own = FIRST_SEED + len(jobs)
                place = {"name": f"{kind}{number:02d}-{own}", "seed": own, "kind": kind}
                jobs.append({**like, **words, **place, "caption": kind == "caption"})
    return jobs


def draw(jobs: Jobs, counts: Mapping[str, int], rng: random.Random) -> list[int]:
    """Numbers of the jobs that a plan of these counts might have, its subject prompts first."""
    by_prompt: dict[str, dict[str, list[int]]] = {}
    for number, job in enumerate(jobs):
        by_prompt.setdefault(job["kind"], {}).setdefault(job["prompt"], []).append(number)
    chosen: list[int] = []
    for kind, share in SHARES.items():
        for numbers in rng.sample(list(by_prompt[kind].values()), round(counts["prompts"] * share)):
            chosen += rng.sample(numbers, counts["seeds"])
    plain = rng.sample(list(by_prompt["plain"].values()), counts["plain_prompts"])
    return chosen + [numbers[0] for numbers in plain]


def pool_jobs(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All prompts of a study's world, all seeds."""
    captions = [read_caption(Path(path)) for path in plan["images"]]
    return jobs_of(every_prompt(captions, plan["subject"]), plan["confirm"][0], plan["subject"])


def read_caption(picture: Path) -> str:
    return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()


def wide_jobs(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same for every trial of a study."""
    jobs = pool_jobs(plan)
    return [jobs[number] for number in draw(jobs, COUNTS, random.Random(2))]


def render(scorer: search.ImageScorer, jobs: Jobs, folder: Path) -> None:
    """Make what is not there."""
    missing = [job for job in jobs if not (folder / f"{job['name']}.png").is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for job, picture in zip(missing, scorer.render(missing) if missing else (), strict=True):
        picture.save(folder / f"{job['name']}.png")


def main(folder: Path) -> None:
    plan = search.read_json(folder.parent / "reference" / "plan.json")
    scorer, jobs = search.ImageScorer(plan, "cpu"), wide_jobs(plan)
    if folder.name == "reference":
        return render(scorer, jobs, folder / STAGE)
    with scorer.lora(folder / search.read_json(folder / "metrics.json")["checkpoint"]):
        render(scorer, jobs, folder / "scores" / STAGE)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
