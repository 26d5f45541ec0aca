"""What the demo and the tests work on: a Stable Diffusion, encoders, a drawn data set, and settings.

    make_demo_world(Path("runs/demo/inputs"))    the demo's: the small world's trained models, pictures of 32 pixels
    make_tiny_world(Path("world"))               the tests': tiny models of random weights, pictures of 64 pixels

Both make an SDXL with family="SDXL".

Everything is there in a few seconds, the same every time: no network, no downloads.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiny_models
import toml
from PIL import Image
from small_world import scenes

if TYPE_CHECKING:
    from optuna_hyperparameter_search import DataSet

SMALL_TRAINER = Path(__file__).resolve().parent / "small_trainer"
LIGHT_PACKAGES = Path(__file__).resolve().parent / "light_packages"
SMALL_WORLD = Path(__file__).resolve().parent / "small_world"
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SUBJECT = "luca"
TINY_PIPELINES = {"SD1.x": tiny_models.make_tiny_pipeline, "SDXL": tiny_models.make_tiny_xl_pipeline}
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a UNet, or an autoencoder
MODELS = ("base_model", "clip", "dinov2")
DONE = "complete"  # a file that says what of this version is whole, and where its paths lead
VERSION = "3"


def make_demo_world(folder: Path, family: str = "SD1.x") -> None:
    """The small world, in which a LoRA learns its character in half a minute on the CPU. The family is SD1.x or SDXL.

    base_model/, dinov2/, clip/, images/ (16 pictures and captions), dataset.toml, training.toml, scoring.toml. Paths in
    them are absolute. What an earlier call made whole is left as it is.
    """

    def make(folder: Path) -> None:
        for name in MODELS:
            shutil.copytree(SMALL_WORLD / name, folder / name, dirs_exist_ok=True)
        if family == "SDXL":
            put_xl_together(SMALL_WORLD, folder / "base_model")
        draw_images(folder / "images", 16, scenes.SIDE)
        dataset = {"resolution": scenes.SIDE, "batch_size": 2, "num_repeats": 2}
        images = {"resolution": scenes.SIDE, "steps": 8, "guidance_scale": 4.0, "batch_size": 16}
        counts = {
            "screen": {"prompts": 4, "seeds": 2, "plain_prompts": 2},
            "confirm": {"prompts": 8, "seeds": 3, "plain_prompts": 4},
            "final": {"prompts": 8, "seeds": 2, "plain_prompts": 2},
        }
        write_settings(folder, dataset, images, counts, {"prompts": make_prompts()}, family)

    _once(folder, family, make)


def make_tiny_world(folder: Path, family: str = "SD1.x") -> None:
    """The same files with random weights: quicker, and pictures of noise. The family is SD1.x or SDXL."""

    def make(folder: Path) -> None:
        TINY_PIPELINES[family](folder / "base_model")
        tiny_models.make_tiny_dinov2(folder / "dinov2")
        tiny_models.make_tiny_clip(folder / "clip")
        draw_images(folder / "images", 10, 64)
        images = {"resolution": 64, "steps": 4, "guidance_scale": 3.0}
        counts = {
            "screen": {"prompts": 4, "seeds": 2, "plain_prompts": 2},
            "confirm": {"prompts": 4, "seeds": 3, "plain_prompts": 4},
            "final": {"prompts": 4, "seeds": 2, "plain_prompts": 2},
        }
        write_settings(folder, {"resolution": 64, "batch_size": 2, "num_repeats": 2}, images, counts, {}, family)

    _once(folder, family, make)


def put_xl_together(small_world: Path, model: Path) -> None:
    """Write the small world's SDXL: its own layers of the UNet, and what it shares with base_model/ and CLIP."""
    from safetensors.numpy import load_file, save_file

    base, clip = small_world / "base_model", small_world / "clip"
    shutil.copytree(base, model, dirs_exist_ok=True)
    shutil.copytree(small_world / "xl_model", model, dirs_exist_ok=True)
    weights = {**load_file(base / "unet" / WEIGHTS), **load_file(small_world / "xl_model" / "unet" / WEIGHTS)}
    save_file(weights, model / "unet" / WEIGHTS, {"format": "pt"})
    shutil.copytree(base / "tokenizer", model / "tokenizer_2", dirs_exist_ok=True)
    text = json.loads((clip / "config.json").read_text(encoding="utf-8"))["text_config"]
    parts = {"text_model", "text_projection"}
    weights = {name: one for name, one in load_file(clip / "model.safetensors").items() if name.split(".")[0] in parts}
    (model / "text_encoder_2").mkdir(exist_ok=True)
    save_file(weights, model / "text_encoder_2" / "model.safetensors", {"format": "pt"})
    vae = json.loads((base / "vae" / "config.json").read_text(encoding="utf-8"))
    latents = load_file(base / "vae" / WEIGHTS)
    scale_latents(latents, vae["scaling_factor"] / tiny_models.XL_SCALING)
    save_file(latents, model / "vae" / WEIGHTS, {"format": "pt"})
    for part, config in (
        ("text_encoder_2/config", {**text, "architectures": ["CLIPTextModelWithProjection"]}),
        ("vae/config", {**vae, "scaling_factor": tiny_models.XL_SCALING}),
        ("scheduler/scheduler_config", {"_class_name": "EulerDiscreteScheduler", **tiny_models.XL_SCHEDULER}),
    ):
        (model / f"{part}.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tiny_models.write_xl_index(model)


def scale_latents(vae: dict[str, Any], factor: float) -> None:
    """Multiply an autoencoder's latents, in its two outermost layers: kohya knows only SDXL's own scale of them."""
    half = len(vae["quant_conv.bias"]) // 2  # mean, then logarithm of the variance
    vae["quant_conv.weight"][:half] *= factor
    vae["quant_conv.bias"][:half] *= factor
    vae["quant_conv.bias"][half:] += 2 * math.log(factor)
    vae["post_quant_conv.weight"] /= factor


@contextmanager
def light_packages() -> Iterator[None]:
    """Trainers that are only asked start without PyTorch: in a fifth of a second. None can train."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(LIGHT_PACKAGES), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({"PYTHONPATH": before} if before is not None else {})


def read_data_set(path: Path, options: Mapping[str, Any], sd_scripts: Path = SMALL_TRAINER) -> DataSet:
    """As the search reads it, with what a trainer answers."""
    import optuna_hyperparameter_search as search

    config = search.read_data_set_file(path)
    with light_packages():
        trainer = search.Probe(
            sd_scripts / "train_network.py", sys.executable, "cpu", options, Path("/no/model"), config
        ).ask()
    return search.DataSetReader(path, config).read(options, trainer.answer)


def _once(folder: Path, family: str, make: Callable[[Path], None]) -> None:
    folder = folder.expanduser().resolve()
    mark, whole = folder / DONE, f"version {VERSION} of {family} in {folder}"
    if mark.is_file() and mark.read_text(encoding="utf-8") == whole:
        return
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    mark.write_text(whole, encoding="utf-8")


def write_settings(
    folder: Path,
    dataset: dict[str, Any],
    images: dict[str, Any],
    counts: dict[str, Any],
    more: dict[str, Any],
    family: str = "SD1.x",
) -> None:
    """The three TOML files: configs/'s own, with smaller numbers and no graphics card."""
    subset = {"image_dir": str(folder / "images"), "num_repeats": dataset.pop("num_repeats")}
    data = {
        "general": {"caption_extension": ".txt", "shuffle_caption": True, "keep_tokens": 1},
        "datasets": [{**dataset, "subsets": [subset]}],
    }
    training = toml.loads((CONFIGS / "training.toml").read_text(encoding="utf-8"))
    training |= {"mixed_precision": "no", "save_every_n_epochs": 5}
    if family == "SDXL":
        del training["clip_skip"]  # which SDXL ignores
    scoring = toml.loads((CONFIGS / "scoring.toml").read_text(encoding="utf-8"))
    for name, table in {"images": images, **counts, **more}.items():
        scoring[name] |= table
    scoring["encoders"] |= {name: str(folder / name) for name in ("dinov2", "clip")}
    scoring["encoders"]["pipeline_config"] = str(folder / "base_model")
    for name, settings in (("dataset", data), ("training", training), ("scoring", scoring)):
        (folder / f"{name}.toml").write_text(toml.dumps(settings), encoding="utf-8")


def luca_scenes(count: int) -> list[scenes.Scene]:
    """Pictures of Luca, no two with the same background and place."""
    backgrounds, places, sizes = tuple(scenes.BACKGROUNDS), tuple(scenes.PLACES), tuple(scenes.SIZES)
    rng = random.Random(1)
    drawn = []
    for number in range(count):
        turn = number + number // 6  # a background comes again in the next place
        where = backgrounds[number % 6], scenes.LUCA, places[turn % 3], sizes[(turn + number // 12) % 2]
        drawn.append(scenes.jitter(scenes.Scene(*where), rng))
    return drawn


def draw_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(luca_scenes(count), 1):
        picture = scenes.draw(scene).resize((side, side), Image.Resampling.NEAREST)
        picture.save(folder / f"{SUBJECT}_{number:02d}.png")
        caption = ", ".join([SUBJECT, *scenes.tags(scene)])
        (folder / f"{SUBJECT}_{number:02d}.txt").write_text(f"{caption}\n", encoding="utf-8")


def make_prompts() -> dict[str, list[str]]:
    """What scoring asks for: Luca as the data set never shows him, and shapes as the base model has never seen them."""
    rng = random.Random(2)
    shown = {(scene.background, scene.place, scene.size) for scene in luca_scenes(16)}
    others = [
        f"{{subject}}, a {size} figure, {place}, {background}"
        for background in scenes.BACKGROUNDS
        for place in scenes.PLACES
        for size in scenes.SIZES
        if (background, place, size) not in shown
    ]
    short = [f"{{subject}}, {place}, {background}" for background in scenes.BACKGROUNDS for place in scenes.PLACES]
    plain = [
        ", ".join(scenes.tags(scene))
        for scene in (scenes.random_scene(rng) for _ in range(400))
        if scenes.is_held_out(scene)
    ]
    return {
        "elsewhere": rng.sample(others, 16),
        "style": rng.sample(short, 8),
        "plain": list(dict.fromkeys(plain))[:12],
    }
