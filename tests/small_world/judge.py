"""What a picture of the small world shows, told by someone who knows how its scenes are drawn, and not by embeddings.

Pictures are arrays (32, 32, 3) of 0..255. The judge is no part of scoring: it says whether scoring is right.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from small_world import scenes
from small_world.scenes import BACKGROUNDS, COLOURS, FIGURE_SIZES, LUCA, PLACES, SHAPES, SIZES, Scene

OFFSETS = tuple(itertools.product((-1 / 32, 0.0, 1 / 32), repeat=2))  # where jitter() may move a thing: 1 pixel


@dataclass(frozen=True)
class Seen:
    """What a picture shows."""

    background: str
    place: str
    shape: str = ""
    colour: str = ""
    character: float = 0.0  # share of Luca that is there, 0..1: the mean over ears, head, body and belt


def to_array(picture: Any) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


def background_of(picture: np.ndarray) -> str:
    """The background whose colours the half of the pixels that fits best comes nearest to."""

    def distance(name: str) -> float:
        far = np.linalg.norm(picture - empty_scene(name), axis=2)
        return float(np.sort(far, axis=None)[: far.size // 2].mean() + np.median(far))

    return min(BACKGROUNDS, key=distance)


@functools.cache
def empty_scene(background: str) -> np.ndarray:
    return to_array(scenes.draw(Scene(background, None, "in the middle", "small")))


@functools.cache
def shape_scenes(background: str) -> tuple[list[Scene], np.ndarray]:
    """Every plain shape on a background, and its pictures (n, 32, 32, 3)."""
    every = [
        Scene(background, (shape, colour), place, size, dx, dy)
        for shape, colour, place, size, (dx, dy) in itertools.product(SHAPES, COLOURS, PLACES, SIZES, OFFSETS)
    ]
    return every, np.stack([to_array(scenes.draw(scene)) for scene in every])


def see_shape(picture: np.ndarray) -> Seen:
    """The plain shape whose drawing is nearest to the picture."""
    every, drawn = shape_scenes(background_of(picture))
    scene = every[int(((drawn - picture) ** 2).mean(axis=(1, 2, 3)).argmin())]
    shape, colour = scene.what
    return Seen(scene.background, scene.place, shape, colour)


@functools.cache
def luca_masks() -> list[tuple[str, list[tuple[np.ndarray, str]]]]:
    """For every place, size and offset: the place, and of each part its pixels (32, 32) and the name of its colour.

    Found by drawing: what changes when the part's colour does is the part, as far as nothing hides it.
    """
    masks = []
    for place, size, (dx, dy) in itertools.product(PLACES, FIGURE_SIZES, OFFSETS):
        found = []
        for part in ("top", "head", "body", "belt"):
            shown = [
                to_array(scenes.draw(Scene("on grass", recoloured(part, colour), place, size, dx, dy)))
                for colour in ("red", "blue")
            ]
            change = np.abs(shown[0] - shown[1]).sum(axis=2)
            found.append((change > 0.9 * change.max(), getattr(LUCA, part)))
        masks.append((place, found))
    return masks


def recoloured(part: str, colour: str) -> scenes.Identity:
    return scenes.Identity(**{**vars(LUCA), part: colour})


def colours_of(picture: np.ndarray, background: str) -> np.ndarray:
    """Which of COLOURS each pixel comes nearest to (32, 32), by name; "" where the empty background is nearer."""
    names = ["", *COLOURS]
    wanted = [empty_scene(background), *(np.array(colour, dtype=np.float32) for colour in COLOURS.values())]
    far = np.stack([np.linalg.norm(picture - colour, axis=2) for colour in wanted])
    return np.array(names)[far.argmin(axis=0)]


def see_luca(picture: np.ndarray) -> Seen:
    """The background, and Luca where most of him is: of each part, the share of its pixels that have its colour."""
    background = background_of(picture)
    colours = colours_of(picture, background)
    character, place = max(
        (float(np.mean([(colours[mask] == colour).mean() for mask, colour in parts])), place)
        for place, parts in luca_masks()
    )
    return Seen(background, place, character=character)


def said(prompt: str, names: dict[str, Any]) -> str | None:
    """Which of the names a prompt has as one of its tags."""
    return next((tag for tag in prompt.split(", ") if tag in names), None)


def obedience(prompt: str, seen: Seen) -> float:
    """Which share of what the prompt says of background and place is so."""
    asked = [(said(prompt, BACKGROUNDS), seen.background), (said(prompt, PLACES), seen.place)]
    right = [word == found for word, found in asked if word is not None]
    return sum(right) / len(right) if right else 1.0


def shape_is_right(prompt: str, seen: Seen) -> bool:
    """Whether the picture shows the prompt's shape in its colour, where it shall be, and the right background."""
    return f"{seen.colour} {seen.shape}" in prompt and obedience(prompt, seen) == 1.0


COPY_DB = 25.0  # peak signal-to-noise ratio; a picture this near to a training picture is the same picture


def is_copy(picture: np.ndarray, training: Sequence[np.ndarray]) -> bool:
    """Whether a training picture shows the same pixel for pixel, as far as the autoencoder keeps them."""
    errors = [np.square(picture - other).mean() for other in training]
    return bool(errors and 10 * np.log10(255**2 / max(min(errors), 1e-9)) >= COPY_DB)


def look_at(
    prompt: str, picture: np.ndarray, training: Sequence[np.ndarray] = (), captions: Collection[str] = ()
) -> dict[str, float]:
    """What is true of one picture, 0..1: "plain" of those that do not name Luca, the rest of those that ask for him.

    character, text (obedience), and copies where the prompt is no caption of a training picture: there the training
    picture is the right answer.
    """
    if "luca" not in prompt:
        return {"plain": float(shape_is_right(prompt, see_shape(picture)))}
    seen = see_luca(picture)
    found = {"character": seen.character, "text": obedience(prompt, seen)}
    return found if prompt in captions else {**found, "copies": float(is_copy(picture, training))}


def truth(
    prompts: Sequence[str],
    pictures: Sequence[np.ndarray],
    training: Sequence[np.ndarray] = (),
    captions: Collection[str] = (),
) -> dict[str, float]:
    """The judge's terms, 0..1, over prompts of one trial; those that name Luca ask for him.

    Means of what is true of the pictures. overall is the mean of character x obedience, times plain, times 1 - copies.
    """
    return overall([look_at(p, picture, training, captions) for p, picture in zip(prompts, pictures, strict=True)])


def overall(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what is true of a trial's pictures, and how good the LoRA is by all of it."""

    def mean(name: str, absent: float = math.nan) -> float:
        values = [one[name] for one in found if name in one]
        return float(np.mean(values)) if values else absent

    means = {name: mean(name) for name in ("character", "text", "plain")} | {"copies": mean("copies", 0.0)}
    there = float(np.mean([one["character"] * one["text"] for one in found if "text" in one]))
    return {**means, "overall": there * means["plain"] * (1 - means["copies"])}
