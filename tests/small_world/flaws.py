"""Pictures of Luca with a known flaw, one for every job of a scoring plan.

    world = World(base_pictures, training_pictures, training_scenes)
    pictures = FLAWS["ears missing"](jobs, world)

Every picture is drawn to its prompt: its background, place and size, as far as the flaw leaves them. What a prompt
leaves open is drawn at random. Plain prompts keep the base model's own pictures, unless the flaw is in them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL.Image import Image
from small_world import scenes
from small_world.scenes import BACKGROUNDS, LUCA, PLACES, SIZES, Scene

Job = Mapping[str, Any]
Drawing = Callable[[Scene, random.Random], Image]  # a picture of the subject, which the prompt wants in this scene
Flaw = Callable[[Sequence[Job], "World"], list[Image]]
FIRST_SEED = 7000  # of what the prompts leave open


@dataclasses.dataclass(frozen=True)
class World:
    """What a flawed LoRA may take its pictures from."""

    base: Mapping[str, Image]  # the base model's pictures, by the job's name
    training: Sequence[Image]
    training_scenes: Sequence[Scene]


def scene_of(prompt: str, rng: random.Random) -> Scene:
    """Luca as the prompt wants him."""
    tags = prompt.split(", ")
    background, place = (chosen(tags, names, rng) for names in (BACKGROUNDS, PLACES))
    size = next((size for size in SIZES if any(size in tag.split() for tag in tags)), None)
    return scenes.jitter(Scene(background, LUCA, place, size or rng.choice(tuple(SIZES))), rng)


def chosen(tags: Sequence[str], names: Mapping[str, Any], rng: random.Random) -> str:
    return next((tag for tag in tags if tag in names), None) or rng.choice(tuple(names))


def subject_pictures(jobs: Sequence[Job], world: World, drawing: Drawing) -> list[Image]:
    """The drawing wherever the subject is asked for; elsewhere the base model's pictures."""
    found = []
    for number, job in enumerate(jobs):
        rng = random.Random(FIRST_SEED + number)
        found.append(drawing(scene_of(job["prompt"], rng), rng) if job["subject"] else world.base[job["name"]])
    return found


def always(drawing: Drawing) -> Flaw:
    return lambda jobs, world: subject_pictures(jobs, world, drawing)


def right(scene: Scene, rng: random.Random) -> Image:
    return scenes.draw(scene)


def without(part: str) -> Flaw:
    """A part is missing. What lies behind it is seen."""
    return always(
        lambda scene, rng: scenes.draw_parts(scene, [shown for shown in scenes.parts(scene) if shown[0] != part])
    )


def changed(**parts: str) -> Flaw:
    """Other parts or colours than Luca's."""
    who = dataclasses.replace(LUCA, **parts)
    return always(lambda scene, rng: scenes.draw(dataclasses.replace(scene, what=who)))


def moved(field: str, names: Mapping[str, Any]) -> Flaw:
    """Another background or place than the prompt says."""

    def drawing(scene: Scene, rng: random.Random) -> Image:
        others = [name for name in names if name != getattr(scene, field)]
        return scenes.draw(dataclasses.replace(scene, **{field: rng.choice(others)}))

    return always(drawing)


def right_in(share: float) -> Flaw:
    """Luca in this share of the pictures, evenly spread; in the others another figure, each time a new one."""

    def pictures(jobs: Sequence[Job], world: World) -> list[Image]:
        drawn, wrong = (subject_pictures(jobs, world, drawing) for drawing in (right, somebody))
        return [
            ours if is_in(number, share) else theirs
            for number, (ours, theirs) in enumerate(zip(drawn, wrong, strict=True))
        ]

    return pictures


def somebody(scene: Scene, rng: random.Random) -> Image:
    return scenes.draw(dataclasses.replace(scene, what=scenes.random_identity(rng)))


def is_in(number: int, share: float) -> bool:
    """Whether a picture is one of the share, which is spread evenly over all numbers."""
    return int((number + 1) * share) > int(number * share)


def nearest_pasted(jobs: Sequence[Job], world: World) -> list[Image]:
    """The training picture that has most of what the prompt says, pixel for pixel."""

    def drawing(scene: Scene, rng: random.Random) -> Image:
        fits = [agreement(scene, other) for other in world.training_scenes]
        return world.training[fits.index(max(fits))]

    return subject_pictures(jobs, world, drawing)


def agreement(scene: Scene, other: Scene) -> int:
    return sum(getattr(scene, field) == getattr(other, field) for field in ("background", "place", "size"))


def random_pasted(jobs: Sequence[Job], world: World) -> list[Image]:
    return subject_pictures(jobs, world, lambda scene, rng: rng.choice(world.training))


def same_again(jobs: Sequence[Job], world: World) -> list[Image]:
    """The first prompt's picture for all prompts."""
    first = right(scene_of(jobs[0]["prompt"], random.Random(FIRST_SEED)), random.Random(FIRST_SEED))
    return subject_pictures(jobs, world, lambda scene, rng: first)


def two(scene: Scene, rng: random.Random) -> Image:
    """Luca twice, the second at another place."""
    place = rng.choice([place for place in PLACES if abs(PLACES[place] - PLACES[scene.place]) > 0.2])
    return scenes.draw_parts(scene, scenes.parts(dataclasses.replace(scene, place=place)) + scenes.parts(scene))


def bleeding(share: float) -> Flaw:
    """Luca in this share of the plain prompts' pictures, where the shape should be."""

    def pictures(jobs: Sequence[Job], world: World) -> list[Image]:
        drawn, plain = subject_pictures(jobs, world, right), 0
        for number, job in enumerate(jobs):
            if not job["subject"]:
                rng = random.Random(FIRST_SEED + number)
                drawn[number] = right(scene_of(job["prompt"], rng), rng) if is_in(plain, share) else drawn[number]
                plain += 1
        return drawn

    return pictures


FLAWS: dict[str, Flaw] = {
    "right": always(right),
    "ears missing": without("top"),
    "head missing": without("head"),
    "body missing": without("body"),
    "belt missing": without("belt"),
    "a hat instead of ears": changed(headgear="hat"),
    "a box instead of ears": changed(headgear="box"),
    "ears purple": changed(top="purple"),
    "head purple": changed(head="purple"),
    "body purple": changed(body="purple"),
    "belt purple": changed(belt="purple"),
    "right in 3 of 4": right_in(0.75),
    "right in 1 of 2": right_in(0.5),
    "background ignored": moved("background", BACKGROUNDS),
    "place ignored": moved("place", PLACES),
    "nearest training picture pasted": nearest_pasted,
    "random training picture pasted": random_pasted,
    "always the same picture": same_again,
    "two characters": always(two),
    "character in 25% of plain": bleeding(0.25),
    "character in 50% of plain": bleeding(0.5),
    "character in 100% of plain": bleeding(1.0),
}
