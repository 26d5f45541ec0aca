"""Worlds that a claim about the score has to hold in: other base models, and another data set.

    make_world("keen", Path("runs/keen/inputs"))

`dull` and `keen` have the middle world's base model, which a LoRA's step changes a third and three times as much.
`biased` has a data set as people really have them: most of its pictures on one background that no caption names,
pictures that are nearly alike, a bystander here and there, and a bag that is never mentioned. `xl` has the small SDXL.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import demo_world
from PIL.Image import Image
from small_world import scenes
from small_world.scenes import LUCA, Part, Scene

PICTURES = 16
USUAL = "by the sea"  # the background of three quarters of the biased pictures
BAG = "purple"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One of a data set."""

    scene: Scene
    image: Image
    tags: Sequence[str]  # of its caption, without the subject


@dataclasses.dataclass(frozen=True)
class World:
    data_set: Callable[[], list[Picture]]
    sensitivity: float = 1.0  # times the middle world's
    family: str = "SD1.x"


def even_pictures() -> list[Picture]:
    """The demo's: backgrounds, places and sizes in equal shares, all of them in the captions."""
    return [Picture(scene, scenes.draw(scene), scenes.tags(scene)) for scene in demo_world.luca_scenes(PICTURES)]


def biased_pictures() -> list[Picture]:
    """Twelve by the sea, of which the last two are nearly like two others; four elsewhere."""
    rng = random.Random(5)
    places, sizes = tuple(scenes.PLACES), tuple(scenes.SIZES)
    others = [background for background in scenes.BACKGROUNDS if background != USUAL]
    backgrounds = [USUAL] * 10 + others[:4]
    found = [
        scenes.jitter(Scene(background, LUCA, places[number % 3], sizes[number // 3 % 2]), rng)
        for number, background in enumerate(backgrounds)
    ]
    found += [dataclasses.replace(scene, dx=scene.dx + 0.2 / scenes.SIDE) for scene in (found[8], found[7])]
    return [biased_picture(number, scene, rng) for number, scene in enumerate(found)]


def biased_picture(number: int, scene: Scene, rng: random.Random) -> Picture:
    """A bag in every second picture, a bystander in every fourth; neither they nor the usual background is named."""
    shown = scenes.parts(scene)
    if number % 2 == 0:
        shown = [*shown, bag(scene)]
    if number % 4 == 1:
        place = next(place for place in scenes.PLACES if place != scene.place)
        shown = scenes.parts(Scene(scene.background, scenes.random_identity(rng), place, "small")) + shown
    tags = [tag for tag in scenes.tags(scene) if tag != USUAL]
    return Picture(scene, scenes.draw_parts(scene, shown), tags)


def bag(scene: Scene) -> Part:
    """A square at the figure's right foot."""
    height = scenes.FIGURE_SIZES[scene.size]
    middle, foot = scenes.PLACES[scene.place] + scene.dx + height * 0.25, scenes.FOOT + scene.dy
    box = scenes.around(middle, height * 0.08, foot - height * 0.2, foot)
    return "bag", "square", box, scenes.COLOURS[BAG]


WORLDS: Mapping[str, World] = {
    "middle": World(even_pictures),
    "dull": World(even_pictures, 1 / 3),
    "keen": World(even_pictures, 3.0),
    "biased": World(biased_pictures),
    "xl": World(even_pictures, family="SDXL"),
}


def make_world(name: str, folder: Path) -> None:
    """The demo's inputs with the world's data set and base model; what is there is left as it is."""
    mark = folder / "world"
    if mark.is_file() and mark.read_text(encoding="utf-8") == name:
        return
    world = WORLDS[name]
    demo_world.make_demo_world(folder, world.family)
    write_pictures(world.data_set(), folder / "images")
    if world.sensitivity != 1.0:
        change_sensitivity(folder / "base_model", world.sensitivity)
    mark.write_text(name, encoding="utf-8")


def write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    for number, picture in enumerate(pictures, 1):
        picture.image.save(folder / f"{demo_world.SUBJECT}_{number:02d}.png")
        caption = ", ".join([demo_world.SUBJECT, *picture.tags])
        (folder / f"{demo_world.SUBJECT}_{number:02d}.txt").write_text(f"{caption}\n", encoding="utf-8")


def change_sensitivity(base_model: Path, factor: float) -> None:
    """Make a LoRA's step change the model `factor` times as much as it did. The model draws the same as before."""
    import torch
    from diffusers import UNet2DConditionModel
    from small_world.make_weights import make_sensitive, name_text_encoder_as_published
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(base_model / "unet", torch_dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(base_model / "text_encoder", torch_dtype=torch.float32)
    make_sensitive(unet, encoder, {"unet": factor, "text encoder": factor})
    unet.save_pretrained(base_model / "unet")
    encoder.save_pretrained(base_model / "text_encoder")
    name_text_encoder_as_published(base_model / "text_encoder" / "model.safetensors")
