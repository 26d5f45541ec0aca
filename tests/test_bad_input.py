"""What a hostile or hurried person gives: refused in one line a problem, with a remedy, and nothing is made.

Every row begins with good inputs, breaks one thing, and goes through the real command line. A second table holds what
only looks odd, such as names with quotes and line breaks, and must work.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sqlite3
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import alembic.command
import demo_world
import optuna
import pytest
import toml
from conftest import REPOSITORY
from optuna.storages._rdb.storage import _VersionManager
from PIL import Image
from test_inputs import OTHER_MODELS, SD1, write_safetensors

import optuna_hyperparameter_search as search

SMALL_TRAINER = REPOSITORY / "tests" / "small_trainer"
ESCAPE = "\x1b[31m"
PASSWORD = "s3cr3t"
STORAGE = f"postgresql://me:{PASSWORD}@127.0.0.1:1/x"
BINARY = bytes(range(256)) * 4
INDEX, PROCESSOR, UNET = "model_index.json", "preprocessor_config.json", "unet/diffusion_pytorch_model.safetensors"
PLAN, ANSWER = "reference/plan.json", "reference/kohya_answer.json"
REMEDY = re.compile(r"; |\bmust be\b|\bneeds\b")
Flags = dict[str, object]  # of a command line that is good otherwise
Arguments = list[str]  # a whole command line

FILES = ("dataset_config", "training_config", "scoring_config", "enqueue", "eval_prompts")  # that a flag names


class Accepted(BaseException):
    """Nothing was refused, and the trainer was about to be started with this config."""


# ------------------------------------------------------------------------------------------------------
# Good inputs, and ways to spoil them
# ------------------------------------------------------------------------------------------------------


class Desk:
    """One person's folder. Its methods write a spoilt copy of a good input and return the flags that name it."""

    def __init__(self, here: Path, world: Path) -> None:
        self.here, self.world = here, world
        self.out = here / "out"

    def file(self, name: str, content: str | bytes = b"", mode: int = 0o644) -> Path:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return path

    def folder(self, name: str, mode: int = 0o755) -> Path:
        (self.here / name).mkdir(mode)
        return self.here / name

    def good(self, name: str) -> dict[str, Any]:
        return toml.loads((self.world / f"{name}.toml").read_text(encoding="utf-8"))

    def _replaced(self, name: str, old: str, new: str) -> Flags:
        text = (self.world / f"{name}.toml").read_text(encoding="utf-8")
        assert old in text
        return {f"{name}_config": self.file(f"{name}.toml", text.replace(old, new))}

    def data(self, table: str, **keys: object) -> Flags:
        content = self.good("dataset")
        dataset = content["datasets"][0]
        {"general": content["general"], "dataset": dataset, "subset": dataset["subsets"][0]}[table].update(keys)
        return {"dataset_config": self.file("data.toml", toml.dumps(content))}

    def data_text(self, old: str, new: str) -> Flags:
        return self._replaced("dataset", old, new)

    def training(self, text: str) -> Flags:
        """The good options with these lines instead or besides."""
        kept = {key: value for key, value in self.good("training").items() if key not in toml.loads(text)}
        return {"training_config": self.file("training.toml", toml.dumps(kept) + text)}

    def scoring(self, table: str, **keys: object) -> Flags:
        content = self.good("scoring")
        content[table].update(keys)
        return {"scoring_config": self.file("scoring.toml", toml.dumps(content))}

    def scoring_text(self, old: str, new: str) -> Flags:
        return self._replaced("scoring", old, new)

    def enqueue(self, text: str) -> Flags:
        return {"enqueue": self.file("first.toml", text)}

    def prompts(self, text: str) -> Flags:
        return {"eval_prompts": self.file("prompts.txt", text)}

    def pictures(self, spoil: Callable[[Path], object], name: str = "pictures") -> Flags:
        """A copy of the pictures, spoilt."""
        folder = self.here / name
        shutil.copytree(self.world / "images", folder)
        spoil(folder)
        return self.data_text(f'"{self.world / "images"}"', json.dumps(str(folder), ensure_ascii=False))

    def picture(self, content: bytes) -> Flags:
        """One picture with other content."""
        return self.pictures(lambda folder: (folder / "luca_03.png").write_bytes(content))

    def caption(self, content: bytes) -> Flags:
        """One caption with other content."""
        return self.pictures(lambda folder: (folder / "luca_03.txt").write_bytes(content))

    def model(self, spoil: Callable[[Path], object], name: str = "model") -> Flags:
        """A copy of the base model's folder, spoilt."""
        shutil.copytree(self.world / "base_model", self.here / name)
        spoil(self.here / name)
        return {"base_model": self.here / name}

    def family(self, kind: str) -> Flags:
        return {"base_model": write_safetensors(self.here / "model.safetensors", OTHER_MODELS[kind][1])}

    def single_file(self, without: str) -> Flags:
        kept = {name: shape for name, shape in SD1.items() if not name.startswith(without)}
        return {"base_model": write_safetensors(self.here / "model.safetensors", kept)}

    def linked_model(self) -> Flags:
        """As the hub's client keeps it: a link to a blob, whose name is a hash alone."""
        link = self.here / "model.safetensors"
        link.symlink_to(write_safetensors(self.here / "blobs" / "6ce0161689b3853acaa0", SD1))
        return {"base_model": link}

    def weights(self, content: bytes, name: str = "model.safetensors") -> Flags:
        return {"base_model": self.file(name, content)}

    def header(self, text: str) -> Flags:
        """Weights that are a header alone."""
        return self.weights(struct.pack("<Q", len(text)) + text.encode())

    def encoder(self, spoil: Callable[[Path], object]) -> Flags:
        shutil.copytree(self.world / "clip", self.here / "clip")
        spoil(self.here / "clip")
        return self.scoring("encoders", clip=str(self.here / "clip"))

    def trainer(self, script: str) -> Flags:
        return {"sd_scripts": self.file("sd/train_network.py", script).parent}

    def python(self, script: str) -> Flags:
        return {"trainer_python": self.file("python", script, 0o755)}

    def in_output(self, name: str, content: str = "", **flags: object) -> Flags:
        """An output folder that holds a file."""
        self.file(f"out/{name}", content)
        return flags

    def database(self, table: str) -> Flags:
        """An output folder that holds another program's database."""
        database = sqlite3.connect(self.folder("out") / search.DATABASE_NAME)
        database.execute(f"CREATE TABLE {table} (id INTEGER)")
        database.close()
        return {}

    def study(self, objective: Callable[[optuna.Trial], Any], n_trials: int = 2, **how: Any) -> Flags:
        """An output folder whose database holds a study of that name by another script."""
        self.out.mkdir()
        storage = search.default_storage(self.out)
        study = optuna.create_study(study_name=search.DEFAULT_STUDY_NAME, storage=storage, **how)
        study.optimize(objective, n_trials)
        return {}

    def old_study(self) -> Flags:
        """A database as Optuna 2.10 made it, by Optuna's own migrations."""
        self.out.mkdir()
        where: Any = SimpleNamespace(url=search.default_storage(self.out))
        alembic.command.upgrade(_VersionManager._create_alembic_config(where), "v2.6.0.a")
        with sqlite3.connect(self.out / search.DATABASE_NAME) as database:
            database.execute("INSERT INTO version_info VALUES (1, 12, '2.10.1')")
            database.execute("INSERT INTO studies VALUES (1, ?)", (search.DEFAULT_STUDY_NAME,))
        return {}

    def cut_database(self) -> Flags:
        self.study(lambda trial: trial.suggest_float("x", 0, 1))
        cut(self.out / search.DATABASE_NAME, 20_000)
        return {}

    def score(self, name: str, plan: str | None = None, *more: str) -> Arguments:
        if plan is not None:
            self.file(PLAN, plan)
        return [f"--score={self.here / name}", *more]

    def report(self, *more: str) -> Arguments:
        return ["--report", f"--output-dir={self.out}", *more]

    def demo(self, *more: str) -> Arguments:
        return ["--demo", f"--output-dir={self.out}", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder)
    return folder


@pytest.fixture
def desk(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """An empty folder, in which the program runs; without hub, and without ever starting a training."""
    import huggingface_hub

    def accept(_trainer: search.KohyaTrainer, config: Path, **_options: Any) -> None:
        raise Accepted(str(config))

    monkeypatch.setattr(search.KohyaTrainer, "__call__", accept)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    here = tmp_path / "desk"
    here.mkdir()
    monkeypatch.chdir(here)
    with demo_world.light_packages():
        yield Desk(here, world)


def command_line(desk: Desk, changes: Mapping[str, object]) -> Arguments:
    flags: dict[str, object] = {
        "dataset_config": desk.world / "dataset.toml",
        "base_model": desk.world / "base_model",
        "output_dir": desk.out,
        "sd_scripts": SMALL_TRAINER,
        "training_config": desk.world / "training.toml",
        "scoring_config": desk.world / "scoring.toml",
        "device": "cpu",
        "n_trials": 2,
        **changes,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below these, with size and time of its last change."""
    found = {}
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            about = path.lstat()
            found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found


def unprintable(text: str) -> list[str]:
    """Characters that move a terminal's cursor, colour it, or worse."""
    return [letter for letter in text if (ord(letter) < 32 or 127 <= ord(letter) < 160) and letter != "\n"]


def run(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, output and errors of a command line; whatever else escapes would be a traceback."""
    capsys.readouterr()
    try:
        status = search.main(arguments)
    except SystemExit as error:  # argparse's
        status = int(error.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


# ------------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


ODD_DDS = struct.pack("<4s4I", b"DDS ", 124, 0, 8, 8) + bytes(108)  # Pillow knows it by its content
SHAPELESS = '{"model.diffusion_model.input_blocks.0.0.weight": {"data_offsets": [0, 0], "shape": {}}}'
STRANGE_PIPELINE = '{"_class_name": "\\u001b[31mStable\\nDiffusion"}'
HELP_OF_ANOTHER = "print('usage: other [--help] [--lr LR]\\n\\n  --lr LR  learning rate')"


def cut(path: Path, keep: int) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


def delete(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def name_variants(folder: Path) -> None:
    for weights in folder.glob("*/*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))


def not_utf8(folder: Path) -> None:
    """Rename a picture and its caption to what another system's names may look like."""
    for suffix in (".png", ".txt"):
        (folder / f"luca_03{suffix}").rename(os.fsdecode(os.fsencode(folder) + b"/luca_\xff" + suffix.encode()))


def circle(path: Path) -> Path:
    path.symlink_to(path)
    return path


# ------------------------------------------------------------------------------------------------------
# What must be refused
# ------------------------------------------------------------------------------------------------------


def row(name: str, *values: object) -> Any:
    root = pytest.mark.skipif(os.geteuid() == 0, reason="of what a user may not read or write (root may do all)")
    return pytest.param(*values, id=name, marks=[root] if "no rights" in name else [])


def bad(name: str, says: str, spoil: Callable[[Desk], Flags | Arguments]) -> Any:
    """What is spoilt, and what a line of the answer must say."""
    return row(name, spoil, says)


def files() -> Iterator[Any]:
    """The same mistakes with each of the files that are given by a flag."""
    says_if_empty = {
        "dataset_config": "has no [[datasets]]",
        "scoring_config": "",  # an empty one is good, too
        "enqueue": "has no parameters",
        "eval_prompts": "has 0 prompts with 'luca'",
        "training_config": "",  # an empty one is good: kohya's defaults
    }
    for flag, says in says_if_empty.items():
        shown = f"--{flag.replace('_', '-')}: "

        def holds(content: str | bytes, flag: str = flag) -> Callable[[Desk], Flags]:
            return lambda d: {flag: d.file("given", content)}

        def named(name: str, flag: str = flag) -> Callable[[Desk], Flags]:
            return lambda d: {flag: d.file("given").parent / name}

        if says:
            yield bad(f"{flag} empty", says, holds(""))
        yield bad(f"{flag} binary", shown, holds(BINARY))
        yield bad(f"{flag} a folder", f"{shown}can't read", named("."))
        yield bad(f"{flag} missing", shown, named("nowhere"))
        yield bad(f"{flag} below a file", f"{shown}can't read", named("given/file.toml"))
        yield bad(f"{flag} with ESC", shown, named(ESCAPE))
        yield bad(f"{flag} with newline", shown, named("a\nb"))
        yield bad(f"{flag} too long a name", shown, named("x" * 300))
        yield bad(f"{flag} of nobody's home", "~nobody-here", lambda d, flag=flag: {flag: "~nobody-here/file"})
        if flag != "eval_prompts":
            yield bad(f"{flag} no TOML", "is not valid TOML", holds("[x\na = 1"))
            yield bad(f"{flag} UTF-16", "is not text in UTF-8", holds("a = 1".encode("utf-16")))


DATA_SET = [
    bad("resolution a text", "resolution = '512'", lambda d: d.data("dataset", resolution="512")),
    bad("resolution 0", "resolution", lambda d: d.data("dataset", resolution=0)),
    bad("batch_size a text", "batch_size = '2'", lambda d: d.data("dataset", batch_size="2")),
    bad("batch_size -1", "batch_size = -1 in", lambda d: d.data("dataset", batch_size=-1)),
    bad("batch_size 0", "batch_size = 0 in", lambda d: d.data("dataset", batch_size=0)),
    bad("batch_size 0 in [general]", "batch_size = 0 in", lambda d: d.data("general", batch_size=0)),
    bad("num_repeats 1.5", "num_repeats = 1.5", lambda d: d.data("subset", num_repeats=1.5)),
    bad("image_dir a number", "image_dir = 3", lambda d: d.data("subset", image_dir=3)),
    bad("image_dir empty", "is no folder", lambda d: d.data("subset", image_dir="")),
    bad("image_dir a file", "is no folder", lambda d: d.data("subset", image_dir=str(d.file("file")))),
    bad("image_dir missing", "is no folder", lambda d: d.data("subset", image_dir="no/such")),
    bad("image_dir too long", "is no folder", lambda d: d.data("subset", image_dir="x" * 300)),
    bad("image_dir of nobody's home", "is no folder", lambda d: d.data("subset", image_dir="~nobody-here/x")),
    bad("image_dir with NUL", "is no folder", lambda d: d.data_text('image_dir = "', 'image_dir = "\\u0000')),
    bad("image_dir a list", "image_dir", lambda d: d.data("subset", metadata_file="x", image_dir=["a"])),
    bad("datasets a number", "[[datasets]]", lambda d: {"dataset_config": d.file("d.toml", "datasets = 3")}),
    bad("general a number", "[general]", lambda d: {"dataset_config": d.file("d.toml", "general = 3")}),
    bad("data set key", "'colour'", lambda d: d.data("general", colour=1)),
    bad("data set key like no other", "'zzz'", lambda d: d.data("general", zzz=1)),
    bad("data set key with ESC", "unknown key", lambda d: d.data_text("[general]", f'[general]\n"{ESCAPE}" = 1')),
    bad("data set key with newline", "unknown key", lambda d: d.data_text("[general]", '[general]\n"a\\nb" = 1')),
    bad("no captions", "10 of 10 images", lambda d: d.pictures(lambda f: delete(f, "*.txt"))),
    bad("one caption missing", "luca_03.png", lambda d: d.pictures(lambda f: delete(f, "luca_03.txt"))),
    bad("caption empty", "luca_03.txt is empty", lambda d: d.caption(b"")),
    bad("caption not UTF-8", "luca_03.txt is not UTF-8", lambda d: d.caption(b"luca, caf\xe9")),
    bad("caption without the subject", "--subject", lambda d: d.caption(b"  \n")),
    bad("caption_extension empty", "caption_extension", lambda d: d.data("general", caption_extension="")),
    bad("no pictures", "has no images", lambda d: d.pictures(lambda f: delete(f, "*"))),
    bad("picture corrupt", "luca_03.png", lambda d: d.picture(BINARY)),
    bad("picture empty", "luca_03.png", lambda d: d.picture(b"")),
    bad("picture truncated", "luca_03.png", lambda d: d.pictures(lambda f: cut(f / "luca_03.png", 150))),
    bad("picture of 60000 x 60000", "luca_03.png", lambda d: d.picture(png(60_000, 60_000))),
    bad("picture of another kind", "luca_03.png", lambda d: d.picture(ODD_DDS)),
    bad("picture a folder", "x.png", lambda d: d.pictures(lambda f: (f / "x.png").mkdir())),
    bad("picture a broken link", "x.png", lambda d: d.pictures(lambda f: (f / "x.png").symlink_to("nowhere"))),
    bad("picture a pipe", "x.png", lambda d: d.pictures(lambda f: os.mkfifo(f / "x.png"))),
    bad("picture with ESC", "can't use", lambda d: d.pictures(lambda f: (f / f"{ESCAPE}.png").touch())),
    bad("picture with newline", "can't use", lambda d: d.pictures(lambda f: (f / "a\nb.png").touch())),
    bad("picture not UTF-8", "--dataset-config", lambda d: d.pictures(not_utf8)),
    bad("pictures, no rights", "pictures", lambda d: d.pictures(lambda f: f.chmod(0))),
]

TRAINING = [
    bad("beating key", "'network_weights'", lambda d: d.training('network_weights = "a.safetensors"')),
    bad("beating key in a table", "'lr_scheduler_type'", lambda d: d.training('[rate]\nlr_scheduler_type = "x"')),
    bad("secret key", "'wandb_api_key'", lambda d: d.training(f'wandb_api_key = "{PASSWORD}"')),
    bad("pickle", "is a pickle", lambda d: d.training('sample_prompts = "lora.pt"')),
    bad("training key", "'noise_ofset'", lambda d: d.training("noise_ofset = 0.1")),
    bad("training key like no other", "'zzz'", lambda d: d.training("zzz = 1")),
    bad("training key with ESC", "is no option", lambda d: d.training(f'"{ESCAPE}" = 1')),
    bad("seed a fraction", "seed = 1.5", lambda d: d.training("seed = 1.5")),
    bad("seed a date", "seed = ", lambda d: d.training("seed = 2024-01-01")),
    bad("clip_skip a text", "clip_skip = '2'", lambda d: d.training('clip_skip = "2"')),
    bad("save_every_n_epochs 0", "save_every_n_epochs = 0", lambda d: d.training("save_every_n_epochs = 0")),
    bad("switch 2", "must be true or false", lambda d: d.training("sdpa = 2")),
    bad("precision a number", "mixed_precision = 16", lambda d: d.training("mixed_precision = 16")),
    bad("training resolution a number", "resolution", lambda d: d.training("resolution = 64")),
    bad("training option nan", "max_grad_norm", lambda d: d.training("max_grad_norm = nan")),
    bad("training option a date", "metadata_title", lambda d: d.training("metadata_title = 2024-01-01")),
    bad("caption_prefix a number", "caption_prefix", lambda d: d.training("caption_prefix = 5")),
    bad("module of another kind", "network_module", lambda d: d.training('network_module = "networks.oft"')),
]

SCORING = [
    bad("scoring key", "did you mean 'steps'?", lambda d: d.scoring("images", step=1)),
    bad("scoring key like no other", "'zzz' in [images]", lambda d: d.scoring("images", zzz=1)),
    bad("scoring table", "[zzz]", lambda d: d.scoring_text("[images]", "[zzz]\na = 1\n[images]")),
    bad("scoring table a number", "[images]", lambda d: {"scoring_config": d.file("s.toml", "images = 3")}),
    bad("steps a text", "steps in [images]", lambda d: d.scoring("images", steps="25")),
    bad("steps negative", "steps in [images]", lambda d: d.scoring("images", steps=-4)),
    bad("guidance negative", "guidance_scale in [images]", lambda d: d.scoring("images", guidance_scale=-1.0)),
    bad("scoring resolution 500", "resolution in [images]", lambda d: d.scoring("images", resolution=500)),
    bad("weight a switch", "text in [weights]", lambda d: d.scoring("weights", text=True)),
    bad("weight nan", "text in [weights]", lambda d: d.scoring_text("text = 0.8", "text = nan")),
    bad("weight of 400 digits", "text in [weights]", lambda d: d.scoring_text("text = 0.8", f"text = {10**400}")),
    bad("stop at 55%", "at_percent in [stop_early]", lambda d: d.scoring("stop_early", at_percent=55)),
    bad("stop at the end", "at_percent in [stop_early]", lambda d: d.scoring("stop_early", at_percent=100)),
    bad("keep 101%", "keep_percent in [stop_early]", lambda d: d.scoring("stop_early", keep_percent=101.0)),
    bad("no whole trials", "whole_trials in [stop_early]", lambda d: d.scoring("stop_early", whole_trials=-1)),
    bad("no prompts", "elsewhere in [prompts]", lambda d: d.scoring("prompts", elsewhere=[])),
    bad("prompts a text", "style in [prompts]", lambda d: d.scoring("prompts", style="{subject}, oil")),
    bad("prompts 0", "prompts in [screen]", lambda d: d.scoring("screen", prompts=0)),
    bad("more prompts than there are", "templates", lambda d: d.scoring("screen", prompts=10**9)),
    bad("prompt without subject", "{subject}", lambda d: d.scoring("prompts", style=["a cat", "a dog"])),
    bad("encoder missing", "dinov2 =", lambda d: d.scoring("encoders", dinov2="no/such/folder")),
    bad("encoder empty", "dinov2 =", lambda d: d.scoring("encoders", dinov2="")),
    bad("encoder too long a name", "dinov2 =", lambda d: d.scoring("encoders", dinov2="x" * 300)),
    bad("encoder a file", "dinov2 =", lambda d: d.scoring("encoders", dinov2=str(d.file("file")))),
    bad("encoder not on the hub", "dinov2 =", lambda d: d.scoring("encoders", dinov2="nobody/nothing")),
    bad("encoder without weights", "model.safetensors", lambda d: d.encoder(lambda f: delete(f, "*.safetensors"))),
    bad("encoders swapped", "dinov2 =", lambda d: d.scoring("encoders", dinov2=d.good("scoring")["encoders"]["clip"])),
    bad("encoder with torn weights", "clip =", lambda d: d.encoder(lambda f: cut(f / "model.safetensors", 1000))),
    bad("encoder without processor", PROCESSOR, lambda d: d.encoder(lambda f: delete(f, PROCESSOR))),
]

ENQUEUE = [
    bad("enqueued nan", "learning_rate = nan", lambda d: d.enqueue("learning_rate = nan")),
    bad("enqueued inf", "text_encoder_lr = inf", lambda d: d.enqueue("text_encoder_lr = inf")),
    bad("enqueued -inf", "learning_rate = -inf", lambda d: d.enqueue("learning_rate = -inf")),
    bad("enqueued too much", "learning_rate = 0.01", lambda d: d.enqueue("learning_rate = 1e-2")),
    bad("enqueued 400 digits", "lr_warmup_steps", lambda d: d.enqueue(f"lr_warmup_steps = {10**400}")),
    bad("enqueued dim 96", "network_dim = 96", lambda d: d.enqueue("network_dim = 96")),
    bad("enqueued dim a text", "network_dim = '64'", lambda d: d.enqueue('network_dim = "64"')),
    bad("enqueued dim a list", "network_dim = [64]", lambda d: d.enqueue("network_dim = [64]")),
    bad("enqueued Lion", "optimizer_type = 'Lion'", lambda d: d.enqueue('optimizer_type = "Lion"')),
    bad("enqueued 8 bits on a CPU", "bitsandbytes", lambda d: d.enqueue('optimizer_type = "AdamW8bit"')),
    bad("enqueued name", "'learnig_rate'", lambda d: d.enqueue("learnig_rate = 1e-4")),
    bad("enqueued name like no other", "'zzz'", lambda d: d.enqueue("zzz = 1")),
    bad("enqueued name with ESC", "unknown parameter", lambda d: d.enqueue(f'"{ESCAPE}" = 1')),
    bad("trial a number", "has no parameters", lambda d: d.enqueue("trial = 3")),
    bad("trials numbers", "has no parameters", lambda d: d.enqueue("trial = [1, 2]")),
    bad("outside [[trial]]", "outside of its", lambda d: d.enqueue("network_dim = 64\n[[trial]]\nlr_warmup_steps=50")),
]  # fmt: skip

PROMPTS = [
    bad("prompts all comments", "0 prompts with 'luca'", lambda d: d.prompts("# nothing\n\n  # at all\n")),
    bad(
        "prompts in TOML",
        "one prompt a line",
        lambda d: {"eval_prompts": d.file("p.TOML", "[prompt]")},
    ),
    bad("prompts in JSON", "one prompt a line", lambda d: {"eval_prompts": d.file("p.json", "[]")}),
    bad("prompts too few", "3 prompts with 'luca'", lambda d: d.prompts("luca, a\nluca, b\nluca, c\nx\n")),
    bad("prompt option", "'--q 3'", lambda d: d.prompts("luca, a --q 3\n")),
    bad("prompt option with ESC", "is not understood", lambda d: d.prompts(f"luca, a --{ESCAPE}\n")),
    bad("prompt option 0", "'--w 0'", lambda d: d.prompts("luca, a --w 0\n")),
    bad("prompt option alone", "no prompt before", lambda d: d.prompts("--w 64\n")),
]

VALUES = [
    bad("n-trials 0", "--n-trials: 0", lambda d: {"n_trials": 0}),
    bad("n-trials -1", "--n-trials: -1", lambda d: {"n_trials": -1}),
    bad("n-trials abc", "--n-trials: invalid int", lambda d: {"n_trials": "abc"}),
    bad("n-trials 1.5", "--n-trials: invalid int", lambda d: {"n_trials": 1.5}),
    bad("n-trials ESC", "--n-trials: invalid int", lambda d: {"n_trials": ESCAPE}),
    bad("n-trials 10**9", "TB are needed", lambda d: {"n_trials": 10**9}),
    bad("n-trials 10**400", "--n-trials", lambda d: {"n_trials": 10**400}),
    bad("timeout nan", "--timeout: nan", lambda d: {"timeout": "nan"}),
    bad("timeout -1", "--timeout: -1", lambda d: {"timeout": -1}),
    bad("timeout inf", "--timeout: inf", lambda d: {"timeout": "inf"}),
    bad("stall-minutes 0", "--stall-minutes: 0", lambda d: {"stall_minutes": 0}),
    bad("stall-minutes nan", "--stall-minutes: nan", lambda d: {"stall_minutes": "nan"}),
    bad("seed -1", "--seed: -1", lambda d: {"seed": -1}),
    bad("seed 2**40", "--seed: 1099511627776", lambda d: {"seed": 2**40}),
    bad("device gpu", "--device: 'gpu'", lambda d: {"device": "gpu"}),
    bad("device cuda:x", "--device: 'cuda:x'", lambda d: {"device": "cuda:x"}),
    bad("device not there", "sees no cuda:99", lambda d: {"device": "cuda:99"}),
    bad("keep-checkpoints some", "--keep-checkpoints", lambda d: {"keep_checkpoints": "some"}),
    bad("flag", "--n-trails", lambda d: {"n_trails": 3}),
    bad("flag with ESC", "unrecognized", lambda d: {ESCAPE: 3}),
    bad("flag with newline", "unrecognized", lambda d: {"a\nb": 3}),
    bad("flags in two modes", "not allowed with", lambda d: ["--check", "--report"]),
    bad("study-name empty", " is empty", lambda d: {"study_name": ""}),
    bad("study-name all newlines", " is empty", lambda d: {"study_name": "\n\n"}),
    bad("study-name not UTF-8", "--study-name", lambda d: {"study_name": os.fsdecode(b"\xff")}),
    bad("subject nobody", "--subject: 'nobody'", lambda d: {"subject": "nobody"}),
    bad("subject ESC", "--subject", lambda d: {"subject": ESCAPE}),
]

MODELS = [
    *(
        bad(f"model {kind}", OTHER_MODELS[kind][0], lambda d, kind=kind: d.family(kind))
        for kind in ("SD2", "SD3", "FLUX", "inpainting", "LoRA", "something else")
    ),
    bad("model a pickle", "may be a pickle", lambda d: d.weights(b"\x80\x04K\x01.", "m.ckpt")),
    bad("model a renamed pickle", "m.safetensors", lambda d: d.weights(b"\x80\x04K\x01." * 9, "m.safetensors")),
    bad("model an empty file", "m.safetensors", lambda d: d.weights(b"", "m.safetensors")),
    bad("model a text", "m.safetensors", lambda d: d.weights(b"my model\n" * 99, "m.safetensors")),
    bad("model truncated", "torn", lambda d: {"base_model": cut(write_safetensors(d.here / "m.safetensors", SD1), -1)}),
    bad("model with truncated UNet", "torn", lambda d: d.model(lambda f: cut(f / UNET, -1))),
    bad("model missing", "does not exist", lambda d: {"base_model": d.here / "nowhere"}),
    bad("model without name", "--base-model", lambda d: {"base_model": ""}),
    bad("model too long a name", "--base-model", lambda d: {"base_model": d.here / ("x" * 300)}),
    bad("model of nobody's home", "~nobody-here", lambda d: {"base_model": "~nobody-here/model"}),
    bad("model in a circle of links", "--base-model", lambda d: {"base_model": circle(d.here / "model")}),
    bad("model a folder", f"without {INDEX}", lambda d: {"base_model": d.folder("empty")}),
    bad("model index a list", "--base-model", lambda d: d.model(lambda f: (f / INDEX).write_text("[1]"))),
    bad("model index with ESC", "--base-model", lambda d: d.model(lambda f: (f / INDEX).write_text(STRANGE_PIPELINE))),
    bad("model without VAE", "no VAE", lambda d: d.single_file("first_stage_model.")),
    bad("model without text encoder", "no text encoder", lambda d: d.single_file("cond_stage_model.")),
    bad("model without scheduler", "no whole scheduler/", lambda d: d.model(lambda f: shutil.rmtree(f / "scheduler"))),
    bad("model in variants only", "rename model.fp16", lambda d: d.model(name_variants)),
    bad("model linked from the hub's cache", "/model.safetensors MODEL.safetensors", lambda d: d.linked_model()),
    bad("model with ESC", "may be a pickle", lambda d: d.weights(b"", f"{ESCAPE}.ckpt")),
    bad("model with newline", "may be a pickle", lambda d: d.weights(b"", "a\nb.ckpt")),
    bad("header nested", "model.safetensors", lambda d: d.header("[" * 99_999)),
    bad("header infinite", "model.safetensors", lambda d: d.header('{"a": {"data_offsets": [0, 1e999], "shape": []}}')),
    bad("header without shape", "model.safetensors", lambda d: d.header(SHAPELESS)),
]  # fmt: skip

TRAINERS = [
    bad("sd-scripts missing", "no train_network.py", lambda d: {"sd_scripts": d.here / "nowhere"}),
    bad("sd-scripts an empty folder", "no train_network.py", lambda d: {"sd_scripts": d.folder("sd")}),
    bad("sd-scripts a file", "no train_network.py", lambda d: {"sd_scripts": d.file("sd", "hello")}),
    bad("sd-scripts too long a name", "--sd-scripts", lambda d: {"sd_scripts": d.here / ("x" * 300)}),
    bad("sd-scripts something else", "does not answer", lambda d: d.trainer(HELP_OF_ANOTHER)),
    bad("sd-scripts broken", "ImportError: no", lambda d: d.trainer("raise ImportError('no')")),
    bad("sd-scripts no Python", "does not answer", lambda d: d.trainer("\x00\x01\x1b[31m")),
    bad("sd-scripts with ESC", "does not answer", lambda d: d.trainer("print('\\x1b[31mred\\x07')")),
    bad("python missing", "can't run", lambda d: {"trainer_python": d.here / "nowhere"}),
    bad("python a text", "can't run", lambda d: {"trainer_python": d.file("python", "hello")}),
    bad("python a folder", "can't run", lambda d: {"trainer_python": d.folder("venv")}),
    bad("python /bin/true", "/bin/true is no working Python", lambda d: {"trainer_python": "/bin/true"}),
    bad("python without #!", "--trainer-python", lambda d: d.python("hello\n")),
    bad("python of garbage", "no working Python", lambda d: d.python("#!/bin/sh\nprintf '\\001\\377\\n\\002'\n")),
    bad("python with ESC", "no working Python", lambda d: d.python("#!/bin/sh\nprintf '\\033[31mred\\007\\n'\n")),
    bad("python without answer", "no working Python", lambda d: d.python("#!/bin/sh\necho 'facts:{}'\n")),
    bad("python with half an answer", "no working Python", lambda d: d.python("#!/bin/sh\necho 'facts:{1}'\n")),
    bad("python of nobody's home", "~nobody-here", lambda d: {"trainer_python": "~nobody-here/python"}),
]  # fmt: skip

PLACES = [
    bad("output a file", "is no folder", lambda d: {"output_dir": d.file("mine", "mine")}),
    bad("output below a file", "is no folder", lambda d: {"output_dir": d.file("mine", "mine") / "out"}),
    bad("output without name", "--output-dir", lambda d: {"output_dir": ""}),
    bad("output too long a name", "--output-dir", lambda d: {"output_dir": d.here / ("x" * 300)}),
    bad("output of nobody's home", "~nobody-here", lambda d: {"output_dir": "~nobody-here/out"}),
    bad("output not UTF-8", "--output-dir", lambda d: {"output_dir": os.fsdecode(bytes(d.here) + b"/\xff")}),
    bad("output in a circle of links", "--output-dir", lambda d: {"output_dir": circle(d.here / "out")}),
    bad("output, no rights", "not for this user", lambda d: {"output_dir": d.folder("mine", 0o555) / "out"}),
    bad(
        "output holds pictures", "holds the data set's pictures",
        lambda d: d.pictures(str) | {"output_dir": d.here / "pictures"},
    ),
    bad("output of another study", "holds study 'other'", lambda d: d.in_output(PLAN, '{"study": "other"}')),
    bad("output of study ESC", "holds study", lambda d: d.in_output(PLAN, '{"study": "\\u001b[31m"}')),
    bad("output with odd plan", "--seed: -1", lambda d: d.in_output(PLAN, "[1]", seed=-1)),
    bad("output with odd answer", "--seed: -1", lambda d: d.in_output(ANSWER, "[1]", seed=-1)),
    bad("output with odd trial", "--seed: -1", lambda d: d.in_output("trial_²/x", seed=-1)),
    bad("output with unknown trial", "trial_0007", lambda d: d.in_output("trial_0007/x")),
    bad("output's reference a file", "reference", lambda d: d.in_output("reference")),
    bad("output's log a folder", "search.log", lambda d: d.in_output("search.log/x")),
    bad("database a text", "not a database", lambda d: d.in_output(search.DATABASE_NAME, "my notes\n" * 99)),
    bad("database a folder", "can't open", lambda d: d.in_output(f"{search.DATABASE_NAME}/x")),
    bad("database of another program", "of another program", lambda d: d.database("songs")),
    bad("database of other studies", "of another program", lambda d: d.database("studies")),
    bad("database cut short", "malformed", lambda d: d.cut_database()),
    bad("storage foo", "foo is no address of a database", lambda d: {"storage": "foo"}),
    bad("storage a journal", "study.log is no address of a database", lambda d: {"storage": "study.log"}),
    bad("storage a journal's address", "no journal file", lambda d: {"storage": f"journal:///{d.here}/study.log"}),
    bad("storage gRPC", "no gRPC", lambda d: {"storage": "grpc://127.0.0.1:13000"}),
    bad("storage of another kind", "postgresql+psycopg://", lambda d: {"storage": "redis://127.0.0.1/x"}),
    bad("storage without driver", "pip install its driver", lambda d: {"storage": "mssql+pymssql://me@h/x"}),
    bad("storage read-only", "give sqlite:///FILE", lambda d: {"storage": f"sqlite:///{d.here}/x.db?mode=ro"}),
    bad("storage file:", "give sqlite:///FILE", lambda d: {"storage": f"sqlite:///file:{d.here}/x.db?uri=true"}),
    bad("storage too long a name", "can't open", lambda d: {"storage": f"sqlite:///{d.here}/{'x' * 300}.db"}),
    bad("storage below too long a name", "no folder", lambda d: {"storage": f"sqlite:////{'x' * 300}/x.db"}),
    bad("storage, no rights at all", "not for this", lambda d: {"storage": f"sqlite:///{d.file('x.db', '', 0o444)}"}),
    bad("storage, no rights", "not for this user", lambda d: {"storage": f"sqlite:///{d.folder('mine', 0o555)}/x.db"}),
    bad("study minimized", "not this program's", lambda d: d.study(lambda t: t.number, directions=["minimize"])),
    bad("study of two scores", "not this program's", lambda d: d.study(lambda _: (0, 1), directions=["maximize"] * 2)),
    bad("study of other parameters", "--study-name", lambda d: d.study(lambda t: t.suggest_int("x", 0, 9))),
    bad("study of others, empty", "not this program's", lambda d: d.study(lambda _: 0, 0, directions=["minimize"])),
    bad("study of an old Optuna", "; optuna storage upgrade --storage sqlite:///", lambda d: d.old_study()),
    bad("storage without file", "keeps nothing", lambda d: {"storage": "sqlite:///"}),
    bad("storage in memory", "keeps nothing", lambda d: {"storage": "sqlite:///:memory:"}),
    bad("storage nowhere", "there is no folder", lambda d: {"storage": "sqlite:////no/such/folder/x.db"}),
    bad("storage a folder", "can't open", lambda d: {"storage": f"sqlite:///{d.here}"}),
    bad("storage with ESC", "--storage", lambda d: {"storage": f"foo{ESCAPE}"}),
    bad("storage with newline", "--storage", lambda d: {"storage": "foo\nbar"}),
    bad("storage with braces", "--storage", lambda d: {"storage": "foo{0}://bar"}),
    bad("password", "//***@127.0.0.1/x", lambda d: {"storage": STORAGE}),
    bad("password with signs", "percent-enc", lambda d: {"storage": f"postgresql://me:a@:/{PASSWORD}@127.0.0.1:1/x"}),
    bad("password, one slash", "--storage", lambda d: {"storage": STORAGE.replace("://", ":/")}),
    bad("password, no kind", "--storage", lambda d: {"storage": STORAGE.partition("//")[2]}),
    bad("password of a cipher", "--storage", lambda d: {"storage": f"sqlite+pysqlcipher://:{PASSWORD}@/x.db"}),
    bad("password in a wrong flag", "unrecognized", lambda d: {"storag": STORAGE}),
]  # fmt: skip

OTHER_MODES = [
    bad("score no trial", "is no trial's folder", lambda d: d.score(".")),
    bad("score missing", "is no trial's folder", lambda d: d.score("nowhere")),
    bad("score a file", "is no trial's folder", lambda d: d.score(d.file("file").name)),
    bad("score without config", "trial_0000", lambda d: d.score("trial_0000", "{}")),
    bad("score by an empty plan", "plan.json", lambda d: d.score("reference", "{}")),
    bad("score on gpu", "--device", lambda d: d.score(".", None, "--device=gpu")),
    bad("report missing", "no study", lambda d: d.report()),
    bad("report nothing", "no study", lambda d: (d.in_output("x"), d.report())[1]),
    bad("report a file", "no study", lambda d: (d.file("out"), d.report())[1]),
    bad("report an odd plan", "no study", lambda d: (d.in_output(PLAN, "[1]"), d.report())[1]),
    bad("report without folder", "--output-dir is missing", lambda d: ["--report"]),
    bad("report with password", "***@127.0.0.1", lambda d: d.report(f"--storage={STORAGE}")),
    bad(
        "report of others", "not this program's", lambda d: (d.study(lambda t: t.suggest_int("x", 0, 9)), d.report())[1]
    ),
    bad("demo with a model", "--base-model", lambda d: d.demo("--base-model=x")),
    bad("demo -1", "--n-trials: -1", lambda d: d.demo("--n-trials=-1")),
    bad("demo 0", "--n-trials: 0", lambda d: d.demo("--n-trials=0")),
    bad("demo in a file", "is no folder", lambda d: (d.file("out"), d.demo())[1]),
]

BAD = [
    *files(), *DATA_SET, *TRAINING, *SCORING, *ENQUEUE, *PROMPTS, *VALUES, *MODELS, *TRAINERS, *PLACES, *OTHER_MODES,
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), BAD)
def test_refuses(
    spoil: Callable[[Desk], Flags | Arguments], says: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a problem, each with a remedy, one of them naming the culprit; nothing is made, and nothing takes long."""
    changes = spoil(desk)
    arguments = changes if isinstance(changes, list) else command_line(desk, changes)
    before, memory = listing(desk.here, desk.world), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    status, out, err = run(arguments, capsys)
    lines = err.splitlines()
    assert status == 2, err
    assert lines and all(line.startswith("error: ") for line in lines), err
    assert any(says in line for line in lines), err
    assert all(REMEDY.search(line) for line in lines), err
    assert "Traceback" not in out + err
    assert unprintable(out + err) == []
    assert PASSWORD not in out + err
    assert listing(desk.here, desk.world) == before
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB


def test_of_a_database_that_can_not_be_read_only_that_is_said(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Not that its trials' folders are unknown, and what to do with them."""
    desk.file("out/trial_0007/config.toml")
    for storage in (f"sqlite:///{desk.file('text.db', 'my notes' * 99)}", STORAGE):
        status, _, err = run([*command_line(desk, {"storage": storage}), "--check"], capsys)
        (line,) = err.splitlines()
        assert status == 2 and "can't open" in line and "trial_0007" not in line


SECRET = "Sekr3tXyzw"
BEFORE, AFTER = "postgresql+psycopg://me:", "@127.0.0.1:1/runs"
PASSWORDS = {  # as somebody writes them into an address
    "plain": SECRET, "an @ within": "Sekr@3tXyzw", "an @ before": f"a@{SECRET}", "a colon": f"a@b:{SECRET}",
    "a space": "Sekr 3tXyzw", "a space at the end": f"{SECRET} ", "slashes": "/Sekr/3tXyzw", "a hash": "Sekr#3tXyzw",
    "a question mark": "?Sekr?3tXyzw", "quotes": "'Sekr\"3tXyzw'", "a newline": "Sekr\n3tXyzw",
    "a comma": "Sekr,3tXyzw;",
    "percents": "Sekr%403tXyzw%", "brackets": "[Sekr]3tXyzw", "braces": "{Sekr}3tXyzw", "a backslash": "\\Sekr3tXyzw",
    "an umlaut": "S\u00e4kr3tXyzw", "an ampersand": "Sekr&3tXyzw=1", "an ESC": "Sekr\x1b3tXyzw",
}  # fmt: skip
ADDRESSES = {
    **{what: BEFORE + password + AFTER for what, password in PASSWORDS.items()},
    "no host": f"{BEFORE}{SECRET}", "no host, a slash": f"{BEFORE}{SECRET}/runs",
    "no user": f"postgresql://{SECRET}@h/x",
    "one slash": f"postgresql:/me:{SECRET}@h/x", "no slash": f"postgresql:me:{SECRET}@h/x",
    "no kind": f"me:{SECRET}@h/x",
    "no colon": f"postgresql//me:{SECRET}@h/x", "another kind": f"postgres://me:{SECRET}@h/x",
    "a space before": f" {BEFORE}{SECRET}{AFTER}", "quotes around": f"'{BEFORE}{SECRET}{AFTER}'",
    "a port that is none": f"postgresql://h:{SECRET}/x", "a file": f"sqlite:///me:{SECRET}@h/x",
    "a file's folder": f"sqlite:////nowhere/me:{SECRET}@h/x.db", "a cipher": f"sqlite+pysqlcipher://:{SECRET}@/x.db",
    **{f"?{key}=": f"postgresql+psycopg://me@127.0.0.1:1/x?{key}={SECRET}&user=me"
       for key in ("password", "pwd", "passwd", "sslpassword", "PASSWORD", "options")},
}  # fmt: skip


def pieces(password: str, length: int = 4) -> list[str]:
    return [password[start : start + length] for start in range(len(password) - length + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ADDRESSES)
def test_no_part_of_a_password_is_shown(what: str, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """However the address is written; nor by mistyped flags, where a shell has cut it at a space."""
    good_inputs = command_line(desk, {})
    given = ([f"--storage={ADDRESSES[what]}"], ["--storage", ADDRESSES[what]], [f"--storag={ADDRESSES[what]}"],
             ["--storag", ADDRESSES[what]], f"--storage {ADDRESSES[what]}".split())  # fmt: skip
    for storage in given:
        for arguments in ([*good_inputs, *storage, "--check"], [*good_inputs, *storage], desk.report(*storage)):
            status, out, err = run(arguments, capsys)
            assert status == 2 and err.startswith("error: ") and "Traceback" not in err
            assert not [piece for piece in pieces(SECRET) if piece in out + err], err
    assert not desk.out.exists()


@pytest.mark.parametrize("what", ADDRESSES)
def test_the_command_that_is_kept_holds_no_part_of_a_password(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(search, "run", lambda args: kept.append(args.command))
    for storage in ([f"--storage={ADDRESSES[what]}"], ["--storage", ADDRESSES[what]]):
        assert search.main(["--check", *storage, *storage, "--seed", "7"]) == 0
    assert all(command.endswith("--seed 7") and command.count("--storage") == 2 for command in kept)
    assert not [piece for piece in pieces(SECRET) if piece in str(kept)]


def test_nothing_that_is_written_holds_a_part_of_the_password(
    desk: Desk, capsys: pytest.CaptureFixture[str], postgresql: Callable[[], str]
) -> None:
    url = postgresql()
    user, _, rest = url.partition(f":{PASSWORD}@")
    for storage in (url, f"{user}@{rest}?password={PASSWORD}"):
        for given in ([f"--storage={storage}"], ["--storage", storage]):
            with pytest.raises(Accepted):
                run([*command_line(desk, {}), *given], capsys)
            shown = capsys.readouterr()
            study = optuna.load_study(study_name=search.DEFAULT_STUDY_NAME, storage=url)
            written = "".join(f.read_text(errors="replace") for f in desk.out.rglob("*") if f.is_file())
            everything = shown.out + shown.err + written + str(study.user_attrs) + str(study._storage.get_all_studies())
            assert "--storage" in study.user_attrs["command"] and (desk.out / "search.log").is_file()
            assert not [piece for piece in pieces(PASSWORD) if piece in everything]


# ------------------------------------------------------------------------------------------------------
# What only looks odd and must work
# ------------------------------------------------------------------------------------------------------

NAMES = {
    "spaces": "my  pictures of luca",
    "Unicode": "bücher 漢字 😀",
    "quotes": 'luca\'s "best"',
    "hash": "luca #1 # best",
    "percent": "100%41 %s",
    "question mark": "who?is=luca",
    "shell": "$HOME; `ls` & *",
    "brackets": "[1]",
    "braces": "{2}",
    "dashes": "--help",
    "backslash": "back\\slash\\x41",
    "no-break space": "luca\u00a0best",
    "newline": "luca\nbest",
    "ESC": f"luca{ESCAPE}best",
}


def good(name: str, change: Callable[[Desk], Flags]) -> Any:
    return row(name, change)


def odd_folders() -> Iterator[Any]:
    for what, name in NAMES.items():
        yield good(f"pictures in {what}", lambda d, name=name: d.pictures(str, name))
        yield good(f"model in {what}", lambda d, name=name: d.model(str, name))
        yield good(f"output in {what}", lambda d, name=name: {"output_dir": d.here / name})


def rename_some(folder: Path) -> None:
    for number, name in enumerate(list(NAMES.values())[-8:], start=1):
        for suffix in (".png", ".txt"):
            (folder / f"luca_{number:02}{suffix}").rename(folder / f"{name}{suffix}")


def shrink(folder: Path) -> None:
    for picture in folder.glob("*.png"):
        Image.new("RGB", (1, 1)).save(picture)


def name_all(folder: Path, subject: str) -> None:
    for caption in folder.glob("*.txt"):
        caption.write_text(f"{subject}, a boy", encoding="utf-8")


def odd_files(desk: Desk) -> Flags:
    """Every file that a flag names, under an odd name."""
    flags: Flags = {}
    for name in ("training", "scoring", "dataset"):
        content = (desk.world / f"{name}.toml").read_bytes()
        flags[f"{name}_config"] = desk.file(f"{name} #1 'ü {ESCAPE}\n?.toml", content)
    flags["enqueue"] = desk.file("my [first] ü.toml", "network_dim = 64")
    flags["eval_prompts"] = desk.file("my % prompts", "".join(f"luca, {place}\n" for place in "abcdef"))
    return flags


def odd_trainer(desk: Desk) -> Flags:
    script = f"import runpy\nrunpy.run_path({str(SMALL_TRAINER / 'train_network.py')!r}, run_name='__main__')\n"
    python = desk.file("my venv's ü/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', 0o755)
    return {"sd_scripts": desk.file("sd #1 'ü'/train_network.py", script).parent, "trainer_python": python}


def inline_general(desk: Desk) -> Flags:
    flags = desk.data_text("[general]", "[[datasets_]]")  # the table itself goes
    text = Path(str(flags["dataset_config"])).read_text(encoding="utf-8").partition("[[datasets_]]")[0]
    return {"dataset_config": desk.file("data.toml", f'general = {{ caption_extension = ".txt" }}\n{text}')}


GOOD = [
    *odd_folders(),
    good("odd names of pictures", lambda d: d.pictures(rename_some)),
    good("odd names of files", odd_files),
    good("odd names of the trainer", odd_trainer),
    good("odd name of the database", lambda d: {"storage": f"sqlite:///{d.folder('my studies #1')}/s 1.db"}),
    good("pictures of one pixel", lambda d: d.pictures(shrink)),
    good("caption of nothing", lambda d: {"subject": "luca"} | d.caption(b"\n")),
    good("caption with ESC", lambda d: d.caption(f"luca, {ESCAPE}".encode())),
    good("caption with BOM", lambda d: d.caption("\r\n".encode("utf-8-sig")) | {"subject": "luca"}),
    good("subject with ESC", lambda d: d.pictures(lambda f: name_all(f, f"lu{ESCAPE}ca"))),
    good("general on one line", inline_general),
    good("attributes on one line", lambda d: d.data_text("num_", "custom_attributes = { a = 1 }\nnum_")),
    good("no training options", lambda d: {"training_config": d.file("empty.toml")}),
    good("long training option", lambda d: d.training(f'training_comment = "and/or {"x" * 300}"')),
    good("study-name with slashes", lambda d: {"study_name": "a/../b\\c"}),
    good("study-name with quotes", lambda d: {"study_name": "luca's \"best\"; DROP TABLE studies;"}),
    good("study-name with newline", lambda d: {"study_name": f"a\nb{ESCAPE}"}),
    good("study-name long", lambda d: {"study_name": "漢字 😀" * 99}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", GOOD)
def test_accepts(change: Callable[[Desk], Flags], desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """--check is content and makes nothing; a search would train what was meant, and fills its own folder alone."""
    flags = change(desk)
    output = Path(str(flags.get("output_dir", desk.out)))
    database = Path(str(flags.get("storage", output / search.DATABASE_NAME)).removeprefix("sqlite:///"))
    arguments = command_line(desk, flags)
    before = listing(desk.here, desk.world)
    status, out, err = run([*arguments, "--check"], capsys)
    assert (status, err) == (0, "")
    assert unprintable(out) == []
    assert all(line.startswith(("Checking the inputs", "  ")) for line in out.splitlines()), out
    assert listing(desk.here, desk.world) == before

    with pytest.raises(Accepted) as caught:
        run(arguments, capsys)
    shown = capsys.readouterr()
    assert shown.err == "" and unprintable(shown.out) == []
    config = toml.loads(Path(str(caught.value)).read_text(encoding="utf-8"))
    data_set = toml.loads(Path(config["dataset_config"]).read_text(encoding="utf-8"))
    assert config["pretrained_model_name_or_path"] == str(flags.get("base_model", desk.world / "base_model"))
    assert len(list(Path(data_set["datasets"][0]["subsets"][0]["image_dir"]).glob("*.png"))) == 10
    made = [Path(path) for path in listing(desk.here, desk.world).keys() - before.keys()]
    assert database in made
    assert [path for path in made if path not in (database, output) and output not in path.parents] == []
