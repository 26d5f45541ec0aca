"""What the demo and the tests work on: a tiny Stable Diffusion, tiny encoders, a drawn data set, and settings.

    make_demo_world(Path("runs/demo/inputs"))

Everything is made on the spot from fixed seeds: no network, no downloads, a few seconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import toml
from PIL import Image, ImageDraw

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIZE = 64  # pixels, of the pictures and of all that is trained and rendered
DRAWN_SIZE = 4 * SIZE  # drawn large and scaled down, for smooth edges
SUBJECT = "luca"
DONE = "complete"  # a file that says what of this version is whole, and where its paths lead
VERSION = "1"


@dataclass(frozen=True)
class Scene:
    """One picture: its caption after the character's name, and how to draw it."""

    caption: str
    sky: str
    ground: str
    props: str  # name of a function that draws what else is there
    x: float  # the character's middle, 0 left to 1 right
    height: float  # the character's, as a share of the picture's
    arms: float  # degrees from hanging down


SCENES = (
    Scene("a boy with brown hair, striped shirt, standing on grass", "#9fd3ff", "#58a845", "sun", 0.50, 0.72, 15),
    Scene("a boy with brown hair, striped shirt, waving, beach", "#bfe6ff", "#ecd9a0", "waves", 0.35, 0.66, 140),
    Scene("a boy with brown hair, striped shirt, standing in snow", "#dfe9f2", "#f7fafc", "trees", 0.62, 0.64, 25),
    Scene("a boy with brown hair, striped shirt, city street, night", "#1d2447", "#4b4b57", "houses", 0.42, 0.70, 10),
    Scene("a boy with brown hair, striped shirt, in a room", "#e9c9a8", "#9a6a44", "window", 0.55, 0.80, 20),
    Scene("a boy with brown hair, striped shirt, arms out, desert", "#ffd9a0", "#d9a860", "sun", 0.50, 0.60, 90),
    Scene("a boy with brown hair, striped shirt, forest, cheering", "#a9cfa0", "#3f6b35", "trees", 0.45, 0.68, 160),
    Scene("a boy with brown hair, striped shirt, close-up, blue sky", "#6fb6f5", "#58a845", "sun", 0.50, 1.35, 15),
    Scene("a boy with brown hair, striped shirt, by the sea, sunset", "#ff9d6b", "#31608f", "waves", 0.68, 0.62, 30),
    Scene("a boy with brown hair, striped shirt, village, walking", "#cfe8ff", "#b9a68c", "houses", 0.30, 0.62, 35),
)  # fmt: skip


def make_demo_world(folder: Path) -> None:
    """Make the demo's inputs in `folder`; what an earlier call made whole is left as it is.

    base_model/ (Stable Diffusion 1.x, random weights), dinov2/, clip/, images/ (pictures and captions),
    dataset.toml, training.toml, scoring.toml. Paths in them are absolute.
    """
    folder = folder.expanduser().resolve()
    mark, whole = folder / DONE, f"version {VERSION} in {folder}"
    if mark.is_file() and mark.read_text(encoding="utf-8") == whole:
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw_images(folder / "images")
    tiny_models.make_tiny_pipeline(folder / "base_model")
    tiny_models.make_tiny_dinov2(folder / "dinov2")
    tiny_models.make_tiny_clip(folder / "clip")
    write_settings(folder)
    mark.write_text(whole, encoding="utf-8")


def write_settings(folder: Path) -> None:
    """The three TOML files: configs/'s own, with smaller numbers and no graphics card."""
    dataset = {
        "general": {"caption_extension": ".txt", "shuffle_caption": True, "keep_tokens": 1},
        "datasets": [
            {
                "resolution": SIZE,
                "batch_size": 2,
                "subsets": [{"image_dir": str(folder / "images"), "num_repeats": 2}],
            }
        ],
    }
    training = toml.loads((CONFIGS / "training.toml").read_text(encoding="utf-8"))
    training |= {"mixed_precision": "no", "save_every_n_epochs": 5}
    scoring = toml.loads((CONFIGS / "scoring.toml").read_text(encoding="utf-8"))
    scoring["images"] |= {"resolution": SIZE, "steps": 4, "guidance_scale": 3.0}
    scoring["screen"] |= {"prompts": 4, "seeds": 2, "plain_prompts": 2}
    scoring["confirm"] |= {"prompts": 4, "seeds": 3, "plain_prompts": 4}
    scoring["encoders"] |= {name: str(folder / name) for name in ("dinov2", "clip")}
    scoring["encoders"]["pipeline_config"] = str(folder / "base_model")
    for name, settings in (("dataset", dataset), ("training", training), ("scoring", scoring)):
        (folder / f"{name}.toml").write_text(toml.dumps(settings), encoding="utf-8")


def draw_images(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(SCENES, 1):
        picture = draw_scene(scene, random.Random(number)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        picture.save(folder / f"{SUBJECT}_{number:02d}.png")
        (folder / f"{SUBJECT}_{number:02d}.txt").write_text(f"{SUBJECT}, {scene.caption}\n", encoding="utf-8")


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    side = DRAWN_SIZE
    picture = Image.new("RGB", (side, side), scene.sky)
    pen = ImageDraw.Draw(picture)
    horizon = int(side * 0.62)
    pen.rectangle((0, horizon, side, side), fill=scene.ground)
    PROPS[scene.props](pen, rng, horizon)
    draw_character(pen, scene)
    return picture


def draw_sun(pen: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    x, y = rng.randrange(20, 60), rng.randrange(20, 50)
    pen.ellipse((x, y, x + 44, y + 44), fill="#ffe066")


def draw_waves(pen: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for y in range(horizon - 26, horizon, 9):
        pen.line((0, y, DRAWN_SIZE, y + rng.randrange(-3, 4)), fill="#4f9fd8", width=6)


def draw_trees(pen: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for x in range(10, DRAWN_SIZE, 58):
        top = horizon - rng.randrange(70, 120)
        pen.rectangle((x + 16, horizon - 20, x + 24, horizon + 8), fill="#6b4a2b")
        pen.polygon(((x, horizon - 12), (x + 20, top), (x + 40, horizon - 12)), fill="#2f6d3c")


def draw_houses(pen: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for x in range(0, DRAWN_SIZE, 52):
        top = horizon - rng.randrange(50, 130)
        pen.rectangle((x, top, x + 44, horizon), fill=rng.choice(("#8c5a4b", "#6f7f95", "#a08a6a")))
        for y in range(top + 10, horizon - 14, 24):
            pen.rectangle((x + 10, y, x + 18, y + 10), fill="#ffe9a0")
            pen.rectangle((x + 27, y, x + 35, y + 10), fill="#ffe9a0")


def draw_window(pen: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    x = rng.randrange(15, 40)
    pen.rectangle((x, 25, x + 70, 105), fill="#a8d8ff", outline="#fff7e8", width=6)
    pen.line((x + 35, 25, x + 35, 105), fill="#fff7e8", width=5)


PROPS: dict[str, Callable[[ImageDraw.ImageDraw, random.Random, int], None]] = {
    "sun": draw_sun, "waves": draw_waves, "trees": draw_trees, "houses": draw_houses, "window": draw_window,
}  # fmt: skip


def draw_character(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Luca: brown hair, a red and white striped shirt, blue trousers; always the same but for size, place and arms."""
    tall = scene.height * DRAWN_SIZE
    middle, top = scene.x * DRAWN_SIZE, DRAWN_SIZE * 0.95 - min(tall, DRAWN_SIZE * 0.85)
    head, width = tall * 0.15, tall * 0.13  # radius; half of the body's width
    shoulder, hip, foot = top + 2 * head, top + tall * 0.66, top + tall
    reach, angle = tall * 0.3, math.radians(scene.arms)
    for side in (-1, 1):
        leg = middle + side * width * 0.55
        pen.rectangle((leg - width * 0.4, hip, leg + width * 0.4, foot), fill="#2b4c9b")
        start = (middle + side * width * 0.8, shoulder + width * 0.4)
        hand = (start[0] + side * reach * math.sin(angle), start[1] + reach * math.cos(angle))
        pen.line((*start, *hand), fill="#f0c39b", width=max(2, int(width * 0.5)))
    stripes = 6
    for number in range(stripes):
        y = shoulder + (hip - shoulder) * number / stripes
        colour = "#d83a3a" if number % 2 == 0 else "#f6f1ea"
        pen.rectangle((middle - width, y, middle + width, y + (hip - shoulder) / stripes), fill=colour)
    pen.ellipse((middle - head, top, middle + head, top + 2 * head), fill="#f0c39b")
    pen.pieslice(
        (middle - head * 1.1, top - head * 0.15, middle + head * 1.1, top + head * 1.9), 180, 360, fill="#5a3418"
    )
    for side in (-1, 1):
        x, y, dot = middle + side * head * 0.4, top + head * 1.2, head * 0.12
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill="#202020")
    pen.arc(
        (middle - head * 0.4, top + head * 1.2, middle + head * 0.4, top + head * 1.7), 20, 160, fill="#a8452f", width=3
    )
