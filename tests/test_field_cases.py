"""What people who train LoRAs really have, through `--check`: read as kohya reads it, or refused with the real reason.

Each case is tried with the small trainer, and with sd-scripts itself where SD_SCRIPTS_DIR names it (see
test_real_kohya.py). Numbers are kohya's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import demo_world
import pytest
import tiny_models
import toml
from PIL import Image

import optuna_hyperparameter_search as search

REAL = os.environ.get("SD_SCRIPTS_DIR")
needs_kohya = pytest.mark.skipif(not REAL, reason="with the real sd-scripts (SD_SCRIPTS_DIR=its folder)")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder)
    if REAL:
        tiny_models.write_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    return folder


class Case:
    """A data set and a command line; both change before `check` runs it."""

    def __init__(self, here: Path, world: Path, trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.here, self.world, self.capsys = here, world, capsys
        self.images = here / "images"
        self.images.mkdir()
        self.data: dict[str, Any] = {
            "general": {"caption_extension": ".txt", "enable_bucket": True},
            "datasets": [{"resolution": 512, "batch_size": 2, "subsets": [{"image_dir": str(self.images)}]}],
        }
        self.training: dict[str, Any] = {"mixed_precision": "no", "cache_latents": True, "cache_latents_to_disk": True}
        self.flags: dict[str, object] = {
            "base_model": world / "base_model", "scoring_config": world / "scoring.toml", "output_dir": here / "out",
            "device": "cpu", "sd_scripts": demo_world.SMALL_TRAINER, "n_trials": 2,
        }  # fmt: skip
        if trainer == "sd-scripts":
            self.flags |= {"sd_scripts": REAL, "trainer_python": os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)}
            self.training["tokenizer_cache_dir"] = str(world / "tokenizers")

    @property
    def dataset(self) -> dict[str, Any]:
        return self.data["datasets"][0]

    @property
    def subset(self) -> dict[str, Any]:
        return self.dataset["subsets"][0]

    def picture(self, name: str, size: tuple[int, int] = (512, 512), caption: str | None = "luca, a boy") -> Path:
        file = self.images / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (len(list(self.images.iterdir())) * 9 % 256, 90, 160)).save(file)
        if caption is not None:
            file.with_suffix(".txt").write_bytes(caption.encode())
        return file

    def check(self, *more: str) -> tuple[int, str]:
        """Status, and all that was said."""
        files = {"dataset_config": self.here / "data.toml", "training_config": self.here / "training.toml"}
        if "dataset_config" not in self.flags:
            files["dataset_config"].write_text(toml.dumps(self.data), encoding="utf-8")
        files["training_config"].write_text(toml.dumps(self.training), encoding="utf-8")
        self.capsys.readouterr()
        given = {name: value for name, value in {**files, **self.flags}.items() if value is not None}
        status = search.main(
            [f"--{name.replace('_', '-')}={value}" for name, value in given.items()] + ["--check", *more]
        )
        said = self.capsys.readouterr()
        assert not (self.here / "out").exists()
        return status, said.out + said.err

    def refusals(self, *more: str) -> list[str]:
        status, said = self.check(*more)
        assert status == 2, said
        return [line for line in said.splitlines() if line.startswith("error: ")]

    def ask(self) -> tuple[search.DataSet, dict[str, Any]]:
        """The data set as a search has it, and the trainer's whole answer."""
        path = self.here / "data.toml"
        path.write_text(toml.dumps(self.data), encoding="utf-8")
        config = search.read_data_set_file(path)
        python = str(self.flags.get("trainer_python", sys.executable))
        where = (Path(str(self.flags["sd_scripts"])) / "train_network.py", python, "cpu")
        answer = search.Probe(*where, self.training, self.world / "base_model", config).ask().answer
        return search.DataSetReader(path, config).read(self.training, answer), answer

    def read(self) -> search.DataSet:
        return self.ask()[0]


@pytest.fixture(params=["small trainer", pytest.param("sd-scripts", marks=needs_kohya)])
def case(
    request: pytest.FixtureRequest, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Case]:
    light = demo_world.light_packages() if request.param == "small trainer" else contextlib.nullcontext()
    with light:
        yield Case(tmp_path, world, request.param, capsys)


def row(said: str, name: str) -> str:
    """A row of what the check found."""
    return next(
        line.split(maxsplit=len(name.split()))[-1] for line in said.splitlines() if line.strip().startswith(name)
    )


# --- the subject -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "subject"),
    [
        (
            ("masterpiece, best quality, 1girl, lucachan, smile", "masterpiece, best quality, 1girl, lucachan"),
            "lucachan",
        ),
        (("1girl, solo, lucachan, red hat", "1girl, solo, lucachan, beach"), "lucachan"),
        (("score_9, score_8_up, rating_safe, 1boy, luca \\(disney\\)",) * 2, "luca \\(disney\\)"),
        (
            ("(masterpiece:1.2), (best quality), 2girls, mika", "(masterpiece:1.2), (best quality), 2girls, mika, x"),
            "mika",
        ),
        (("\ufeffluca, a boy", "luca, a girl"), "luca"),
        (("luca, a boy\r\nsecond line\r\n", "luca, a girl\r\n"), "luca"),
        (("luca, a\u2028b", "luca, c"), "luca"),
        (("luca\u2028a boy, b", "luca, c"), "luca"),
        (("1girl, 路飞, 微笑", "1girl, 路飞"), "路飞"),
        (("  luca  ,a boy", "luca,beach"), "luca"),
    ],
)
def test_the_subject_is_never_a_common_tag(case: Case, captions: tuple[str, ...], subject: str) -> None:
    for number, caption in enumerate(captions):
        case.picture(f"{number}.png", caption=caption)
    status, said = case.check()
    assert status == 0 and row(said, "subject").startswith(repr(subject)), said


def test_several_candidates_are_shown_and_the_subject_is_asked_for(case: Case) -> None:
    for name in "ab":
        case.picture(f"{name}.png", caption=f"1boy, luca, portorosso, {name}")
    status, said = case.check()
    assert status == 0 and row(said, "subject").startswith("'luca'; all captions share 'portorosso' too"), said
    assert "--subject" in row(said, "subject")
    _, said = case.check("--subject=portorosso")
    assert row(said, "subject") == "'portorosso'"


def test_a_name_that_one_caption_lacks_is_shown(case: Case) -> None:
    for number in range(5):
        case.picture(f"{number}.png", caption="1boy, luca, portorosso" if number else "1boy, portorosso")
    _, said = case.check()
    assert "'portorosso'; most have 'luca'" in row(said, "subject"), said


def test_class_tokens_that_are_trained_nowhere_are_said(case: Case) -> None:
    """kohya reads them only for pictures without a caption."""
    for name in "ab":
        case.picture(f"{name}.png", caption="1girl, solo, red hair")
    case.subset["class_tokens"] = "luca girl"
    (problem,) = case.refusals()
    assert "class_tokens 'luca girl' stand in no caption" in problem and "only 1girl, solo, red hair" in problem
    case.picture("c.png", caption="1girl, solo, red hair, lucachan")
    for name in "ab":
        case.picture(f"{name}.png", caption="1girl, solo, red hair, lucachan")
    status, said = case.check()
    assert status == 0 and row(said, "subject").startswith("'lucachan'")
    assert "note: class_tokens 'luca girl' are trained nowhere" in said


def test_captions_in_sentences_get_a_helpful_line(case: Case) -> None:
    case.picture("a.png", caption="A photo of Luca standing on a beach.")
    case.picture("b.png", caption="Luca smiles at the camera; behind him is the sea.")
    (problem,) = case.refusals()
    assert "these words stand in all of them: Luca" in problem and "give the subject's name" in problem
    status, said = case.check("--subject=Luca")
    assert status == 0, said


def test_a_name_in_captions_without_spaces_is_found(case: Case) -> None:
    case.picture("a.png", caption="ルカが海で泳いでいる")
    case.picture("b.png", caption="笑っているルカ")
    status, said = case.check("--subject=ルカ")
    assert status == 0 and row(said, "subject") == "'ルカ'", said


def test_a_caption_in_another_encoding_is_refused(case: Case) -> None:
    case.picture("a.png")
    case.picture("b.png").with_suffix(".txt").write_bytes("luca, café".encode("utf-16"))
    assert "b.txt is not UTF-8" in case.refusals()[0]


# --- captions ----------------------------------------------------------------------------------------


def test_wildcards_are_resolved_and_every_line_is_a_caption(case: Case) -> None:
    case.picture("a.png", caption="luca, {red|blue} hat, {smiling|serious}\nluca at {{the}} sea\n\n")
    case.picture("b.png", caption="luca, a boy")
    case.dataset["enable_wildcard"] = True
    first, second = case.read().images
    hat, sea = first.captions
    assert hat in {f"luca, {colour} hat, {mood}" for colour in ("red", "blue") for mood in ("smiling", "serious")}
    assert sea == "luca at {the} sea" and second.captions == ("luca, a boy",)
    assert case.read().images[0].captions == first.captions  # of several alternatives always the same


def test_without_wildcards_braces_stay_and_the_first_line_counts(case: Case) -> None:
    case.picture("a.png", caption="luca, {red|blue} hat\nnot this")
    assert case.read().images[0].captions == ("luca, {red|blue} hat",)


def test_weights_are_stripped_where_kohya_reads_them(case: Case) -> None:
    case.picture("a.png", caption=r"luca \(film\), (curly hair:1.2), [beach], ((sun))")
    case.training["weighted_captions"] = True
    assert case.read().images[0].captions == ("luca (film), curly hair, beach, sun",)
    case.training["weighted_captions"] = False
    assert case.read().images[0].captions == (r"luca \(film\), (curly hair:1.2), [beach], ((sun))",)


def test_captions_carry_prefix_suffix_and_kohyas_separators(case: Case) -> None:
    case.picture("a.png", caption="a boy;smiling ||| beach")
    case.data["general"] |= {"caption_prefix": "luca,", "caption_separator": ";", "keep_tokens_separator": "|||"}
    case.subset["caption_suffix"] = "; film still"
    assert case.read().images[0].captions == ("luca, a boy, smiling, beach, film still",)


# --- pictures and folders ----------------------------------------------------------------------------


def test_two_pictures_of_one_name_are_refused(case: Case) -> None:
    for name, size in (("a.png", (512, 512)), ("a.jpg", (512, 512)), ("b.png", (512, 512)), ("b.webp", (512, 768))):
        case.picture(name, size)
    case.picture("c.png")
    problems = case.refusals()
    assert len(problems) == 2 and all("would share one cache of latents" in problem for problem in problems)
    case.training |= {"cache_latents_to_disk": False}
    assert case.check()[0] == 0


def test_cached_metadata_is_trained_instead_of_the_folder(case: Case) -> None:
    files = [case.picture(f"{name}.png") for name in "abcd"]
    entries = {str(file): {"caption": "luca, old", "resolution": [512, 512]} for file in files[:2]}
    (case.images / "metadata_cache.json").write_text(json.dumps(entries))
    case.subset["cache_info"] = True
    status, said = case.check()
    assert status == 0, said
    assert row(said, "data set").startswith("2 images") and row(said, "steps").startswith("1 an epoch")
    assert "2 .png" in said and "metadata_cache.json" in said
    assert case.read().images[0].captions == ("luca, old",)


def test_metadata_is_not_cached_by_a_check(case: Case) -> None:
    case.picture("a.png")
    case.subset["cache_info"] = True
    assert case.check()[0] == 0 and not (case.images / "metadata_cache.json").exists()


@needs_kohya
@pytest.mark.parametrize("case", ["sd-scripts"], indirect=True)
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_metadata_files_are_trained(case: Case, lines: bool) -> None:
    for name in "abc":
        case.picture(f"{name}.png", caption=None)
    entries = {f"{name}.png": {"caption": f"luca, {name}", "tags": "t1, t2"} for name in "ab"}
    file = case.here / ("meta.jsonl" if lines else "meta.json")
    as_lines = "\n".join(json.dumps({"image_path": name, **entry}) for name, entry in entries.items())
    file.write_text(as_lines if lines else json.dumps(entries))
    case.dataset["subsets"] = [{"image_dir": str(case.images), "metadata_file": str(file)}]
    case.data["general"].pop("caption_extension")
    status, said = case.check()
    assert status == 0 and row(said, "data set").startswith("2 images, 2 captions"), said
    assert case.read().images[0].captions == ("luca, a, t1, t2",)


@needs_kohya
@pytest.mark.parametrize("case", ["sd-scripts"], indirect=True)
def test_masks_are_trained(case: Case) -> None:
    for name in "abcd":
        case.picture(f"{name}.png")
    (case.here / "masks").mkdir()
    for name in "abcd":
        shutil.copy(case.images / f"{name}.png", case.here / "masks")
    case.picture("d.png", (512, 768))
    shutil.copy(case.images / "d.png", case.here / "masks")
    case.subset["conditioning_data_dir"] = str(case.here / "masks")
    case.training["masked_loss"] = True
    status, said = case.check()
    assert status == 0 and row(said, "steps").startswith("3 or 2 or 1 an epoch"), said


@needs_kohya
@pytest.mark.parametrize("case", ["sd-scripts"], indirect=True)
def test_sizes_are_those_that_kohya_reads(case: Case) -> None:
    """It takes WebP files of the extended layout for one pixel smaller, and puts them into other buckets."""
    for number in range(5):
        picture = case.picture(f"w{number}.webp")
        Image.open(picture).convert("RGBA").save(picture, exif=Image.Exif(), lossless=True)
        case.picture(f"p{number}.png")
    case.dataset["bucket_no_upscale"] = True
    status, said = case.check()
    assert status == 0 and row(said, "steps").startswith("6 or 3 or 2 an epoch"), said
    assert {image.latents.name for image in case.read().images if image.path.suffix == ".webp"} == {
        f"w{number}_0511x0511_sd.npz" for number in range(5)
    }


def test_a_picture_that_does_not_fit_is_refused_where_nothing_cuts_it(case: Case) -> None:
    case.picture("a.png")
    case.picture("b.png", (640, 960))
    case.data["general"] |= {"enable_bucket": False, "color_aug": True}
    case.training |= {"cache_latents": False, "cache_latents_to_disk": False}
    (problem,) = case.refusals()
    assert "image too large" in problem and "b.png" in problem and "画像" not in problem


@pytest.mark.parametrize(
    ("folder", "remedy"),
    [
        (r"D:\new\train", "/mnt/d/new/train"),
        ("D:\new\train", "/mnt/d/new/train"),
        ("C:/luca/img", "/mnt/c/luca/img"),
        (r"luca\images", "write / for each backslash"),
        ("no/such/folder", "correct it there"),
    ],
)
def test_a_folder_of_windows_gets_its_remedy(case: Case, folder: str, remedy: str) -> None:
    case.subset["image_dir"] = folder
    (problem,) = case.refusals()
    assert "is no folder" in problem and remedy in problem


def test_a_path_of_windows_on_the_command_line_gets_its_remedy(case: Case) -> None:
    case.flags["base_model"] = r"D:\models\sd.safetensors"
    assert "/mnt/d/models/sd.safetensors" in case.refusals()[0]


def test_a_data_set_in_json_is_read(case: Case) -> None:
    for name in "abcd":
        case.picture(f"{name}.png")
    case.picture("d.png", (512, 768))
    file = case.here / "data.json"
    file.write_text(json.dumps(case.data))
    case.flags["dataset_config"] = file
    status, said = case.check()
    assert status == 0 and row(said, "steps").startswith("3 or 2 or 1 an epoch"), said


def test_whole_numbers_for_a_face_are_refused_as_kohya_refuses_them(case: Case) -> None:
    case.picture("a.png")
    case.subset["face_crop_aug_range"] = [2, 4]
    (problem,) = case.refusals()
    assert "face_crop_aug_range = [2, 4]" in problem and "expected float" in problem


def test_what_lies_beside_the_pictures_is_said_with_its_number(case: Case) -> None:
    for name in "ab":
        case.picture(f"{name}.png")
    for name in ("c.jfif", "d.gif", "e.tif"):
        picture = case.picture(name if name[-4:] != "jfif" else "c.jpg")
        picture.rename(case.images / name)
    case.picture("f.jpg").rename(case.images / "f.Jpg")
    (case.images / "extra").mkdir()
    for number in range(3):
        shutil.copy(case.images / "a.png", case.images / "extra" / f"{number}.png")
    status, said = case.check()
    assert status == 0 and row(said, "data set").startswith("2 images"), said
    for part in ("1 .jfif", "1 .gif", "1 .tif", "1 .Jpg", "not trained: 3 in", "extra"):
        assert part in said, part


def test_captions_that_nobody_reads_are_said(case: Case) -> None:
    for name in "ab":
        case.picture(f"{name}.png", caption="luca, a boy")
    case.data["general"] = {"enable_bucket": True}
    case.subset["class_tokens"] = "luca boy"
    status, said = case.check()
    assert status == 0 and "captions that are not read" in said and "2 .txt" in said, said


def test_a_parent_folder_is_told_which_folder_it_holds(case: Case) -> None:
    for name in "ab":
        case.picture(f"10_luca boy/{name}.png")
    (problem,) = case.refusals()
    assert "has no images" in problem and "10_luca boy" in problem and "num_repeats = 10" in problem


def test_turned_pictures_are_said(case: Case) -> None:
    picture = case.picture("a.jpg", (512, 768))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(picture).save(picture, exif=exif)
    case.picture("b.png")
    status, said = case.check()
    assert status == 0 and "rotated by EXIF in viewers, but trained as stored" in said and "a.jpg, 1 of 2" in said, said


def test_an_unreadable_picture_is_named(case: Case) -> None:
    case.picture("a.png")
    picture = case.picture("b.png")
    picture.write_bytes(picture.read_bytes()[:200])
    (problem,) = case.refusals()
    assert "b.png" in problem and "replace, remove or convert it" in problem


# --- steps, options, trainer -------------------------------------------------------------------------


def test_steps_are_said_once_where_accumulation_changes_nothing(case: Case) -> None:
    case.picture("a.png")
    _, said = case.check()
    assert row(said, "steps").startswith("1 an epoch, 12 to 20 a training"), said


def test_all_that_is_wrong_with_a_training_config_is_said_at_once(case: Case) -> None:
    """As kohya's GUI writes it."""
    case.picture("a.png")
    case.training |= {
        "learning_rate": 1e-4, "unet_lr": 1e-4, "network_dim": 32, "output_dir": "x", "optimizer_args": [],
        "network_args": [], "lr_scheduler_args": [], "wandb_api_key": "", "v2": False, "noise_ofset": 0.1, "sdpa": 2,
        "mixed_precision": "fp8", "train_data_dir": "y",
    }  # fmt: skip
    problems = "\n".join(case.refusals())
    for name in ("noise_ofset", "sdpa", "fp8"):
        assert name in problems, name
    unset = ("optimizer_args", "network_args", "lr_scheduler_args", "v2")
    searched = ("learning_rate", "unet_lr", "network_dim", "output_dir", "train_data_dir")
    assert not any(f"'{name}'" in problems for name in (*unset, *searched))


def test_all_problems_are_said_at_once(case: Case) -> None:
    case.flags |= {"base_model": None, "output_dir": None, "n_trials": 0, "device": "gpu"}
    case.subset["image_dir"] = str(case.here / "nowhere")
    case.data["general"]["shufle_caption"] = True
    case.training["sdpa"] = 2
    problems = "\n".join(case.refusals())
    for part in (
        "--base-model is missing",
        "--output-dir is missing",
        "--n-trials: 0",
        "'gpu'",
        "nowhere",
        "shufle",
        "sdpa",
    ):
        assert part in problems, part


@pytest.mark.parametrize("place", ["sd-scripts", "kohya_ss/sd-scripts", "."])
def test_sd_scripts_is_found_nearby(case: Case, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case.picture("a.png")
    real = Path(str(case.flags.pop("sd_scripts")))
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    here = case.here / "here"
    (here / place).parent.mkdir(parents=True, exist_ok=True)
    if place == ".":
        here.symlink_to(real)
    else:
        (here / place).symlink_to(real)
    monkeypatch.chdir(here)
    status, said = case.check()
    assert status == 0 and str(real.resolve()) in row(said, "sd-scripts"), said


def test_sd_scripts_that_is_nowhere_is_refused_with_the_places(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.picture("a.png")
    del case.flags["sd_scripts"]
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(case.here))
    monkeypatch.chdir(case.here)
    (problem,) = case.refusals()
    assert "--sd-scripts is missing" in problem and str(case.here) in problem and "kohya_ss/sd-scripts" in problem


def test_a_relative_python_is_the_one_in_this_folder(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.picture("a.png")
    (case.here / "python").write_text("#!/bin/sh\nexit 3\n")
    (case.here / "python").chmod(0o755)
    monkeypatch.chdir(case.here)
    case.flags["trainer_python"] = "./python"
    assert f"{case.here}/python is no working Python" in case.refusals()[0]


# --- latents -----------------------------------------------------------------------------------------

Latents = Callable[..., None]


@pytest.fixture
def latents(case: Case) -> Latents:
    """Write the cache that kohya would look for; arrays by name and their width and height in latent pixels."""
    import numpy as np

    def write(arrays: Mapping[str, tuple[int, int]]) -> None:
        for image in case.read().images:
            shapes = {name: np.zeros((4, height, width), np.float32) for name, (width, height) in arrays.items()}
            np.savez(image.latents, **shapes, original_size=[512, 512], crop_ltrb=[0, 0, 512, 512])

    return write


def test_a_picture_newer_than_its_latents_is_warned_of(case: Case, latents: Latents) -> None:
    pictures = [case.picture("a.png"), case.picture("b.png")]
    latents({"latents": (64, 64)})
    for image in case.read().images:
        os.utime(image.latents, (1e9, 1e9))
    os.utime(pictures[0], (1e9 + 86400, 1e9 + 86400))
    os.utime(pictures[1], (1e9 - 86400, 1e9 - 86400))
    status, said = case.check()
    assert (
        status == 0
        and "newer than their cached latents, which are trained: 1 of 2 pictures" in said
        and "if a.png has" in said
    ), said


def test_latents_that_kohya_would_train_at_a_wrong_size_are_refused(case: Case, latents: Latents) -> None:
    case.picture("a.png")
    latents({"latents": (32, 32)})
    status, said = case.check()
    if case.ask()[1]["trusted"]["plain"]:
        assert status == 2 and "256 x 256 instead of 512 x 512" in said, said
    else:
        assert status == 0, said  # kohya makes them anew


@pytest.mark.parametrize("arrays", [{"latents": (64, 64)}, {"latents_64x64": (64, 64), "latents_32x32": (32, 32)}])
def test_good_latents_are_good(case: Case, latents: Latents, arrays: Mapping[str, tuple[int, int]]) -> None:
    case.picture("a.png")
    latents(arrays)
    assert case.check()[0] == 0


def test_one_folder_at_two_sizes_needs_a_trainer_that_keeps_both(case: Case) -> None:
    case.picture("a.png")
    case.data["datasets"].append({**json.loads(json.dumps(case.dataset)), "resolution": 256})
    trusted = case.ask()[1]["trusted"]
    status, said = case.check()
    assert (status == 0) == trusted["sized"], said
    if not trusted["sized"]:
        assert "is trained at 2 sizes" in said and "cache_latents_to_disk = false" in said


def test_a_folder_that_cannot_be_written_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.picture("a.png")
    allowed, refused = os.access, (case.images, os.W_OK)
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != refused and allowed(path, mode))
    (problem,) = case.refusals()
    assert "can't be written" in problem and "cache_latents_to_disk = false" in problem
    case.training["cache_latents_to_disk"] = False
    assert case.check()[0] == 0
