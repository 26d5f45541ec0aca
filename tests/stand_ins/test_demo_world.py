"""The demo's inputs: the same every time, made once, found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import demo_world
import pytest
import toml
from PIL import Image

MAKERS = {
    "small": demo_world.make_demo_world,
    "small SDXL": partial(demo_world.make_demo_world, family="SDXL"),
    "tiny": demo_world.make_tiny_world,
    "tiny SDXL": partial(demo_world.make_tiny_world, family="SDXL"),
}


@pytest.fixture(scope="module", params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def world(maker: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    maker(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_picture_has_a_caption_that_begins_with_the_subject(world: Path) -> None:
    pictures = sorted((world / "images").glob("*.png"))
    assert 10 <= len(pictures) <= 20
    captions = [picture.with_suffix(".txt").read_text(encoding="utf-8") for picture in pictures]
    assert all(caption.startswith(f"{demo_world.SUBJECT}, ") for caption in captions)
    assert len(set(captions)) == len(captions)


def test_pictures_are_of_the_size_that_is_trained_and_rendered(world: Path) -> None:
    sizes = {Image.open(picture).size for picture in (world / "images").glob("*.png")}
    resolutions = {
        toml.loads((world / "dataset.toml").read_text())["datasets"][0]["resolution"],
        toml.loads((world / "scoring.toml").read_text())["images"]["resolution"],
    }
    assert sizes == {(side, side) for side in resolutions}


def test_made_twice_is_made_alike(world: Path, maker: Callable[[Path], None], tmp_path: Path) -> None:
    maker(tmp_path / "other")
    ours, other = contents(world), contents(tmp_path / "other")
    assert ours.keys() == other.keys()
    differ = {
        name
        for name in ours
        if ours[name].replace(str(world).encode(), b"") != other[name].replace(str(tmp_path / "other").encode(), b"")
    }
    assert not differ


def test_a_whole_world_is_left_as_it_is(world: Path, maker: Callable[[Path], None]) -> None:
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    maker(world)
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before


def test_a_world_that_was_moved_gets_its_new_paths(tmp_path: Path) -> None:
    demo_world.make_demo_world(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    demo_world.make_demo_world(tmp_path / "new")
    data_set = toml.loads((tmp_path / "new" / "dataset.toml").read_text())
    assert data_set["datasets"][0]["subsets"][0]["image_dir"] == str(tmp_path / "new" / "images")


def test_a_world_of_another_family_is_made_anew(tmp_path: Path) -> None:
    for family, pipeline in (("SD1.x", "StableDiffusionPipeline"), ("SDXL", "StableDiffusionXLPipeline")):
        demo_world.make_demo_world(tmp_path, family)
        index = json.loads((tmp_path / "base_model" / "model_index.json").read_text(encoding="utf-8"))
        assert index["_class_name"] == pipeline
