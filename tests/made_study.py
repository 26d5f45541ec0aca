"""A study with all its folders, made without training or drawing: for tests and benchmarks of what reads one.

    python tests/made_study.py runs/made --trials 20 --picture-size 512

The search itself makes it, all its files and attributes: only the trainer, the models that draw and embed, and the
clock are stand-ins. They follow a made formula of the parameters: a LoRA learns the subject with every epoch, and
forgets the prompt, and what has nothing to do with the subject, when it goes on for too long. The same arguments make
the same study, but for the process id and the host.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import demo_world
import numpy as np
import optuna
import toml
from optuna.trial import TrialState
from PIL import Image, ImageDraw

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import optuna_hyperparameter_search as search  # noqa: E402

SMALL_WORLD = TESTS / "small_world"
ATTEMPTS = {  # of a trial that ends like this, where it takes more than one
    "crashed": ("crashed", "crashed"),
    "out of memory": ("out of memory", "out of memory"),
    "hung": ("hung", "hung"),
    "continued": ("running", "scored"),  # its program was killed
}
STOPPED = "stopped early"
ENDS = ("scored", "diverged", "rejected", STOPPED, *ATTEMPTS, "interrupted", "running", "waiting")
DATA_PICTURES = 20
BATCHES_PER_EPOCH = 40  # 20 pictures, 8 repeats, batches of 4
BATCH_SECONDS = 0.55
PICTURE_SECONDS = 0.9
STARTED = datetime.datetime(2026, 1, 9, 22, 0)
SAFE: search.Params = {
    "learning_rate": 9e-5, "text_encoder_lr": 5e-5, "network_dim": 128, "network_alpha_ratio": 0.5,
    "optimizer_type": "AdamW", "max_train_epochs": 16, "lr_scheduler": "cosine", "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 100,
}  # fmt: skip
UNSAFE = {**SAFE, "network_alpha_ratio": 0.9, "optimizer_type": "AdamW8bit"}


def make_study(
    output_dir: Path,
    *,
    trials: int = 20,
    picture_size: int = 64,
    checkpoints: int = 8,
    prompts: int = 8,
    plain_prompts: int = 4,
    confirm_prompts: int = 16,
    confirm_plain: int = 10,
    ends: Mapping[int, str] | None = None,
    storage: str | None = None,
    study_name: str = "made",
    subject: str = "luca",
    seed: int = 0,
    distinct_pictures: bool = False,
    keep_checkpoints: str = "best",
) -> optuna.Study:
    """A study of `trials` trials in the new or empty folder `output_dir`, as the search leaves it.

    Args:
        picture_size: pixels, a multiple of 8 from 32 on.
        checkpoints: of a training of 16 epochs; one of 12 or 20 has fewer or more.
        prompts, confirm_prompts: with the subject, two and three seeds each.
        ends: how trials end, by their numbers, one of ENDS; the others are scored. A trial that waits is none before
            the last ones.
        distinct_pictures: no two alike. Otherwise LoRAs that are about as good draw the same picture, which saves most
            of the time at 512 pixels.
        keep_checkpoints: "best" or "all", as the search's own option.
    """
    ends = dict(ends or {})
    _refuse_senseless(output_dir, trials, picture_size, ends)
    output_dir = output_dir.resolve()
    settings = write_inputs(
        output_dir, study_name, storage, seed, trials, picture_size, subject, max(1, 16 // checkpoints),
        {
            "screen": {"prompts": prompts, "seeds": 2, "plain_prompts": plain_prompts},
            "confirm": {"prompts": confirm_prompts, "seeds": 3, "plain_prompts": confirm_plain},
            "final": {"prompts": 8, "seeds": 2, "plain_prompts": 2},
        },
    )  # fmt: skip
    settings = dataclasses.replace(settings, keep_checkpoints=keep_checkpoints)
    all_ends = [ends.get(number, "scored") for number in range(trials)]
    with (
        quiet(Artist(picture_size, distinct=distinct_pictures)),
        search.holding(output_dir),
        mock.patch.object(search.screen, "log_file", output_dir / search.LOG_NAME),
    ):
        run_search(settings, all_ends)
    made = search.load_study(settings.storage, study_name)
    assert made is not None
    return made


def _refuse_senseless(output_dir: Path, trials: int, picture_size: int, ends: Mapping[int, str]) -> None:
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty; give a new folder")
    if picture_size < 32 or picture_size % 8:
        raise ValueError(f"picture_size = {picture_size} must be a multiple of 8 from 32 on")
    unknown = [f"{number}: {end!r}" for number, end in ends.items() if end not in ENDS or not 0 <= number < trials]
    if unknown:
        raise ValueError(f"ends: {', '.join(unknown)} is none of {', '.join(ENDS)} or no trial's number")
    first_waiting = min((number for number, end in ends.items() if end == "waiting"), default=trials)
    if any(ends.get(number) != "waiting" for number in range(first_waiting, trials)):
        raise ValueError("ends: only the last trials can wait")


# --- what the search is given ---


def write_inputs(
    output_dir: Path, study_name: str, storage: str | None, seed: int, trials: int, picture_size: int, subject: str,
    save_every: int, counts: Mapping[str, Any],
) -> search.Settings:  # fmt: skip
    """Data set and the three TOML files in OUTPUT_DIR/inputs; the models are the small world's."""
    inputs = output_dir / "inputs"
    draw_data_set(inputs / "images", picture_size, subject)
    subset = {"image_dir": str(inputs / "images"), "num_repeats": 8}
    data_set = {
        "general": {"caption_extension": ".txt", "shuffle_caption": True, "keep_tokens": 1},
        "datasets": [{"resolution": picture_size, "batch_size": 4, "subsets": [subset]}],
    }
    training = toml.loads((TESTS.parent / "configs" / "training.toml").read_text(encoding="utf-8"))
    training |= {"save_every_n_epochs": save_every, "mixed_precision": "no"}  # "no": a CPU can go on with the study
    scoring = toml.loads((TESTS.parent / "configs" / "scoring.toml").read_text(encoding="utf-8"))
    scoring["images"]["resolution"] = picture_size
    scoring["encoders"] = {name: str(SMALL_WORLD / name) for name in ("dinov2", "clip")}
    scoring["encoders"]["pipeline_config"] = str(SMALL_WORLD / "base_model")
    for stage, table in counts.items():
        scoring[stage] |= table
    add_prompts(scoring["prompts"], counts)
    for name, table in {"dataset": data_set, "training": training, "scoring": scoring}.items():
        search.write_toml(inputs / f"{name}.toml", table)
    return search.Settings(
        dataset_config=inputs / "dataset.toml", base_model=SMALL_WORLD / "base_model", output_dir=output_dir,
        study_name=study_name, n_trials=trials, device="cuda", sd_scripts=TESTS / "small_trainer",
        trainer_python=sys.executable, training_config=inputs / "training.toml",
        scoring_config=inputs / "scoring.toml", eval_prompts=None, subject=subject,
        storage=storage or search.default_storage(output_dir), seed=seed, enqueue=(), timeout_hours=None,
    )  # fmt: skip


def add_prompts(templates: dict[str, list[str]], counts: Mapping[str, Any]) -> None:
    """As many templates as the counts need."""
    about, plain = (sum(stage[name] for stage in counts.values()) for name in ("prompts", "plain_prompts"))
    for name, text, needed in (("elsewhere", "{subject} in street number", about), ("plain", "house number", plain)):
        templates[name] += [f"{text} {number}" for number in range(len(templates[name]), needed)]


def draw_data_set(folder: Path, size: int, subject: str) -> None:
    folder.mkdir(parents=True)
    places = ("on a beach", "in a park", "in a kitchen", "in front of a wall", "by a lake")
    moods = ("smiling", "laughing", "looking at the viewer", "standing")
    artist = Artist(size)
    for number in range(DATA_PICTURES):
        place, mood = places[number % len(places)], moods[number // len(places)]
        look = Look(name=f"data {number}", place=place, subject=1.0)
        (folder / f"{subject}_{number + 1:02d}.png").write_bytes(artist.png(look))
        caption = f"{subject}, a boy with curly brown hair, {place}, {mood}\n"
        (folder / f"{subject}_{number + 1:02d}.txt").write_text(caption, encoding="utf-8")


def read_inputs(settings: search.Settings) -> search.Inputs:
    """What the search's own checks read, with a trainer and a card that are not there."""
    options = search.read_training_options(settings.training_config)
    scoring = search.ScoringSettings.read(settings.scoring_config)
    data_set = demo_world.read_data_set(settings.dataset_config, options)
    base_model = search.BaseModel.inspect(settings.base_model)
    plan = search.make_plan(settings, data_set, scoring, options)
    answer = {"torch": "2.6.0+cu124", "bitsandbytes": True, "packages": ["", 0], "key": ""}
    trainer = search.TrainerFacts("v0.10.0 (made)", "NVIDIA GeForce RTX 4080", answer)
    return search.Inputs(settings, options, data_set, base_model, plan, trainer, [], None)


# --- the run ---


def run_search(settings: search.Settings, ends: Sequence[str]) -> None:
    """What the search's own run_search does under its lock, with stand-ins for trainer and scoring process."""
    clock = Clock()
    inputs = read_inputs(settings)
    study = search.open_study(inputs)
    do_not_wait_for_the_disk(study)
    trainer, scorer = MadeTrainer(clock, settings.device), MadeScoring(clock, settings.device)
    reference = search.Reference(inputs)
    reference.write_inputs()
    inputs = reference.train_first_step(trainer)
    study.sampler = inputs.sampler()
    reference.make_anchors(study, scorer)
    objective = search.LoraObjective(settings, inputs.options, trainer, scorer)
    study.pruner = optuna.pruners.ThresholdPruner(lower=1.1)  # stops all that is screened half-way
    ours = search.Study(study, settings, objective, time.monotonic())
    times = run_trials(ours, trainer, ends)
    ours.delete_spare_checkpoints()
    if sum(map(search.is_trained, study.get_trials())) >= settings.n_trials:
        ours.decide(scorer)
    search.show_results(study, settings.output_dir)
    set_times(study, times)
    engine_of(study).dispose()


@dataclass
class Clock:
    """The study's own time: a night passes in seconds."""

    now: datetime.datetime = STARTED

    def spend(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)


class LeftRunning(BaseException):
    """The program went away in the middle of a training."""


Times = dict[int, tuple[datetime.datetime, datetime.datetime | None]]


def run_trials(ours: search.Study, trainer: MadeTrainer, ends: Sequence[str]) -> Times:
    """What Study.run does, but that every trial ends as it shall; when each began and was over."""
    times: Times = {}
    every = ours.objective.options["save_every_n_epochs"]
    early = search.EarlyStopping(
        {"at_percent": 50, "whole_trials": 0, "keep_percent": 50}, every, ours.objective.scorer
    )
    for number, end in enumerate(ends):
        if end in ("rejected", "waiting"):
            table = {**(UNSAFE if end == "rejected" else SAFE), "learning_rate": 6e-5 + 1e-7 * number}
            ours.enqueue([table])
        if end == "waiting":
            continue
        began = trainer.clock.now
        trial = ours.study.ask()
        assert trial.number == number, "a trial that waits was taken before its turn"
        ours.claim(trial)
        # What is stopped is decided here, and not by the pruner.
        ours.objective = dataclasses.replace(ours.objective, early_stopping=early if end == STOPPED else None)
        for attempt, trainer.end in enumerate(ATTEMPTS.get(end, (end,))):
            if attempt > 0:
                assert ours.resume(trial)
            ours.idle_since = time.monotonic() - 12
            with contextlib.suppress(LeftRunning, KeyboardInterrupt):
                ours.run_trial(trial)
        if end == "interrupted":
            trial.set_user_attr("ended", "interrupted")
        trainer.clock.spend(2)
        times[number] = (began, None if end in ("running", "interrupted") else trainer.clock.now)
    return times


@contextlib.contextmanager
def quiet(artist: Artist) -> Iterator[None]:
    """Nothing on the screen, no waiting for the disk, and a made ImageScorer in the search's scoring."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(os, "fsync"),
        mock.patch.object(search, "ImageScorer", functools.partial(MadeImageScorer, artist)),
        optuna_without_words(),
    ):
        yield


@contextlib.contextmanager
def optuna_without_words() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def engine_of(study: optuna.Study) -> Any:
    """The SQLAlchemy engine behind a study."""
    return getattr(study._storage, "_backend", study._storage).engine


def do_not_wait_for_the_disk(study: optuna.Study) -> None:
    from sqlalchemy import event

    engine = engine_of(study)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
        engine.dispose()


def set_times(study: optuna.Study, times: Times) -> None:
    """Optuna takes the times of trials from the computer's clock alone."""
    from sqlalchemy import text

    change = text("UPDATE trials SET datetime_start = :began, datetime_complete = :over WHERE trial_id = :id")
    ids = {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}
    with engine_of(study).begin() as connection:
        for number, (began, over) in times.items():
            connection.execute(change, {"began": str(began), "over": over and str(over), "id": ids[number]})


# --- the made trainer ---


class MadeTrainer:
    """Leaves what train_network.py leaves, in its output's format, and takes no time for it."""

    def __init__(self, clock: Clock, device: str) -> None:
        self.clock = clock
        self.device = device
        self.end = "scored"  # how the next training ends

    def __call__(
        self,
        config: Path,
        usual_step: float | None = None,
        pause: search.Pause | None = None,
    ) -> tuple[float, float]:
        output = TrainerOutput(toml.loads(config.read_text(encoding="utf-8")), self.end, self.clock.now)
        progress = self._write(config.parent, output)
        self.clock.spend(output.seconds)
        if pause:
            pause.work(output.seconds)
        if self.end == "running":
            raise LeftRunning
        if self.end == "interrupted":
            raise KeyboardInterrupt
        if self.end == "hung":
            self.clock.spend(1800)
            raise search.Hung(
                f"the trainer made no step after step {progress.step} for 30 minutes and was stopped (--stall-minutes)"
            )
        progress.check(config.parent, self.device, 30, usual_step)
        progress.judge_end(config.parent, output.status)
        return output.seconds, output.batches * output.batch_seconds

    def _write(self, folder: Path, output: TrainerOutput) -> search.TrainingProgress:
        text = output.text()
        (folder / "training.log").write_text(text, encoding="utf-8", newline="")
        for path, epoch in output.saved.items():
            write_lora(path, output.config, epoch, finite=self.end != "diverged" or epoch < output.last_epoch)
        progress = search.TrainingProgress()
        progress.read(text)
        progress.finish()
        return progress


LAST_WORDS = {
    "crashed": "RuntimeError: Error(s) in loading state_dict: size mismatch for weight at 0x7f3a2c",
    "out of memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 320.00 MiB. GPU 0 has a total "
    "capacity of 15.99 GiB of which 112.31 MiB is free.",
}
WIDTH = 232  # of rich's lines where the output is no terminal, as kohya's wrapper sets it


@dataclass
class TrainerOutput:
    """What kohya prints in one training: lines, and tqdm's bars that end with CR."""

    config: dict[str, Any]
    end: str
    began: datetime.datetime
    saved: dict[Path, int] = field(default_factory=dict)  # LoRA files and their epochs

    def __post_init__(self) -> None:
        self.batches = self.config.get("gradient_accumulation_steps", 1)
        self.per_epoch = math.ceil(BATCHES_PER_EPOCH / self.batches)
        self.last_epoch = self.config.get("max_train_epochs", 1)
        self.steps = self.config.get("max_train_steps", self.last_epoch * self.per_epoch)
        self.rng = np.random.default_rng(zlib.crc32(json.dumps(self.config["output_dir"][-10:]).encode()))
        dim = self.config["network_dim"]
        self.batch_seconds = round(BATCH_SECONDS * (1 + dim / 1000) * float(self.rng.uniform(0.97, 1.03)), 4)
        self.stop = self.steps if self.end in ("scored", "diverged") else int(self.steps * self.rng.uniform(0.1, 0.9))
        if self.end == STOPPED:
            self.stop = self.steps // 2
        self.status = 1 if self.end in LAST_WORDS else 0

    @property
    def seconds(self) -> float:
        return 18 + self.stop * self.batches * self.batch_seconds

    def text(self) -> str:
        parts = [self._head(), self._bar(0), "\n"]
        for step in range(1, self.stop + 1):
            if (step - 1) % self.per_epoch == 0:
                epoch = 1 + (step - 1) // self.per_epoch
                parts.append(f"epoch {epoch}/{self.last_epoch}\n\n")
                parts.append(self._info(step, f"epoch is incremented. current_epoch: {epoch - 1}, epoch: {epoch}"))
            parts += ["\r", self._bar(step)]
            if step % self.per_epoch == 0 or step == self.steps:
                parts += ["\n", self._save(step)]
        return "".join([*parts, self._tail()])

    def _info(self, step: int, message: str, source: str = "train_network.py:391") -> str:
        now = self.began + datetime.timedelta(seconds=18 + step * self.batches * self.batch_seconds)
        return f"{now:%Y-%m-%d %H:%M:%S} INFO     {message}".ljust(WIDTH) + f"{source}\n"

    def _head(self) -> str:
        config = self.config
        return (
            self._info(-18, f"Loading settings from {config['output_dir']}/config.toml...", "train_util.py:4621")
            + self._info(-18, f"found directory contains {DATA_PICTURES} image files", "train_util.py:1990")
            + "accelerator device: cuda\n"
            + self._info(-9, f"load StableDiffusion checkpoint: {config['pretrained_model_name_or_path']}")
            + self._info(-5, "caching latents with caching strategy.", "train_util.py:1104")
            + "import network module: networks.lora\n"
            + self._info(-2, f"create LoRA network. base dim (rank): {config['network_dim']}", "lora.py:935")
            + f"use {config['optimizer_type']} optimizer | {{}}\n"
            + "running training / 学習開始\n"
            + f"  num train images * repeats / 学習画像の数×繰り返し回数: {4 * BATCHES_PER_EPOCH}\n"
            + f"  num batches per epoch / 1epochのバッチ数: {BATCHES_PER_EPOCH}\n"
            + f"  num epochs / epoch数: {self.last_epoch}\n"
            + f"  gradient accumulation steps / 勾配を合計するステップ数 = {self.batches}\n"
            + f"  total optimization steps / 学習ステップ数: {self.steps}\n\n"
        )

    def _bar(self, step: int) -> str:
        each = self.batches * self.batch_seconds
        spent, left = (f"{int(s) // 60:02d}:{int(s) % 60:02d}" for s in (step * each, (self.steps - step) * each))
        share = step / self.steps
        bar = ("█" * int(10 * share) + " " * 10)[:10]
        if not step:
            return f"\rsteps:   0%|{bar}| 0/{self.steps} [00:00<?, ?it/s]"
        speed = f"{each:5.2f}s/it" if each > 1 else f"{1 / each:5.2f}it/s"
        loss = self._loss(share)
        return f"steps: {int(100 * share):3d}%|{bar}| {step}/{self.steps} [{spent}<{left}, {speed}, avr_loss={loss}]"

    def _loss(self, share: float) -> str:
        if self.end == "diverged" and share > 0.6:
            return "nan"
        strength = self.config["learning_rate"] / 9e-5
        return f"{0.075 + 0.06 * math.exp(-4 * strength * share) + 0.004 * self.rng.normal():.3g}"

    def _save(self, step: int) -> str:
        epoch = math.ceil(step / self.per_epoch)
        folder = Path(self.config["output_dir"])
        path = folder / f"{search.LORA_NAME}-{epoch:06d}.safetensors"
        if step == self.steps:
            path = folder / f"{search.LORA_NAME}.safetensors"
        elif epoch % self.config["save_every_n_epochs"]:
            return ""
        self.saved[path] = epoch
        return f"\nsaving checkpoint: {path}\n"

    def _tail(self) -> str:
        if self.end in LAST_WORDS:
            trace = f'Traceback (most recent call last):\n  File "{TESTS}/train_network.py", line 1504, in <module>\n'
            return f"\n{trace}    trainer.train(args)\n{LAST_WORDS[self.end]}\n"
        if self.stop < self.steps:
            return ""
        return self._info(self.steps, "model saved.", "train_network.py:1442") + f"\r{self._bar(self.steps)}\n"


def write_lora(path: Path, config: Mapping[str, Any], epoch: int, *, finite: bool = True) -> None:
    """A LoRA of two layers under kohya's names, with all of kohya's metadata, of which some tell the truth."""
    dim, rng = config["network_dim"], np.random.default_rng(epoch)
    tensors: dict[str, np.ndarray] = {}
    for layer in (
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    ):
        tensors[f"{layer}.alpha"] = np.array(config["network_alpha"], np.float16)
        tensors[f"{layer}.lora_down.weight"] = rng.normal(0, 0.1, (dim, 16)).astype(np.float16)
        tensors[f"{layer}.lora_up.weight"] = rng.normal(0, 0.01, (16, dim)).astype(np.float16)
        if not finite:
            tensors[f"{layer}.lora_up.weight"][0, 0] = np.nan
    names = (TESTS / "kohya" / "lora_metadata_names.txt").read_text(encoding="utf-8").split()
    known = {
        "ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": config["network_alpha"],
        "ss_learning_rate": config["learning_rate"], "ss_epoch": epoch, "ss_output_name": search.LORA_NAME,
        "ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora",
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {name: str(known.get(name, "None")) for name in names}}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# --- the made scoring: the search's own, with pictures and embeddings from a formula ---


class MadeScoring:
    """The scoring process, in this one."""

    def __init__(self, clock: Clock, device: str) -> None:
        self.clock = clock
        self.device = device

    def __call__(self, folder: Path) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            search.score_folder(folder, self.device, by_search=True)
        stages = re.findall(r"(?m)^  epoch +\d+ +(score|is score)", printed.getvalue()) or ["score", "is score"]
        plan = search.read_json(folder.parent / "reference" / "plan.json")
        pictures = sum(len(plan["screen" if stage == "score" else "confirm"]) for stage in stages)
        seconds = round(12 + PICTURE_SECONDS * pictures, 1)
        self.clock.spend(seconds)
        said = re.sub(r"scoring took \d+ s", f"scoring took {seconds:.0f} s", printed.getvalue())
        (folder / "scoring.log").write_text(said, encoding="utf-8")
        for line in said.splitlines():
            search.say(line)
        if metrics := search.read_json(folder / "metrics.json"):
            search.write_json(folder / "metrics.json", {**metrics, "scoring_seconds": seconds})


@dataclass(frozen=True)
class Look:
    """What a picture shows, and how well: all that its pixels and its embeddings are made from."""

    name: str  # of prompt and seed
    place: str  # what the prompt asks for; decides the background
    text: str = ""  # the prompt without the subject, which CLIP reads
    maker: str = ""  # of the LoRA: trial and epoch; "" for the base model
    about: bool = True  # the prompt names the subject
    subject: float = 0.0  # 0 the base model's figure, 1 the data set's
    excess: float = 0.0  # beyond what the training should have been
    lost: float = 0.0  # share of the prompt that it does not follow
    is_black: bool = False


@dataclass(frozen=True)
class MadePicture:
    """As much of a PIL image as scoring uses."""

    look: Look
    thumbnail: Image.Image
    png: bytes

    def save(self, file: io.BytesIO, **options: Any) -> None:
        file.write(self.png)

    def convert(self, mode: str) -> Image.Image:
        return self.thumbnail


BEST_RATE = 8.2e-5  # of the formula, as the next two
BEST_RATIO = 0.55
REACH_OF_DIM = {64: 0.88, 128: 1.0, 256: 0.96}
SPEED_OF_SCHEDULER = {"cosine": 1.0, "cosine_with_restarts": 1.08, "polynomial": 0.94}


@dataclass(frozen=True)
class Learnt:
    """What a LoRA can draw, by formula; a base model has learnt nothing."""

    maker: str = ""  # trial and checkpoint
    subject: float = 0.0  # 0 the base model's figure, 1 the data set's
    excess: float = 0.0  # beyond what the training should have been
    lost: float = 0.0  # share of the prompt that is no longer followed
    broken: float = 0.0  # share of pictures that are black, or nothing


def learn(path: Path) -> Learnt:
    """What the LoRA in a trial's folder has learnt: the subject up to a limit, and then too much."""
    config = toml.loads((path.parent / "config.toml").read_text(encoding="utf-8"))
    if "max_train_epochs" not in config:  # the first step
        return Learnt()
    number = path.stem.rpartition("-")[2]
    epoch = int(number) if number.isdecimal() else config["max_train_epochs"]
    ratio, rate = config["network_alpha"] / config["network_dim"], math.log(config["learning_rate"] / BEST_RATE)
    dose = epoch / 9.5 * math.exp(1.2 * rate) * (0.6 + 0.7 * ratio) * config["gradient_accumulation_steps"] ** -0.3
    dose *= SPEED_OF_SCHEDULER[config["lr_scheduler"]]
    luck = np.random.default_rng(zlib.crc32(path.parent.name.encode())).normal(1, 0.03)
    reach = 0.5 * luck * REACH_OF_DIM[config["network_dim"]]
    reach *= math.exp(-((rate / 0.5) ** 2) - ((ratio - BEST_RATIO) / 0.6) ** 2)
    excess = max(0.0, dose - 0.85)
    return Learnt(
        maker=f"{path.parent.name} {path.stem}",
        subject=reach * (1 - math.exp(-2.2 * dose)) + 0.05 * min(excess, 1),
        excess=excess,
        lost=min(0.9, 0.1 * dose * (config["text_encoder_lr"] / 5e-5) ** 1.5 + 0.3 * excess),
        broken=0.25 * max(0.0, excess - 0.9) + (0.12 if rate > 0.25 and ratio > 0.6 else 0.0),
    )


class MadeImageScorer:
    """search.ImageScorer without models: the search makes all of metrics.json from what this draws and embeds."""

    def __init__(self, artist: Artist, plan: Mapping[str, Any], device: str, needed_bytes: float = 0.0) -> None:
        self.artist = artist
        self.plan = plan
        self.device = device
        self.learnt = Learnt()

    @contextlib.contextmanager
    def lora(self, path: Path, strength: float = 1.0) -> Iterator[None]:
        learnt = learn(path)
        self.learnt = dataclasses.replace(
            learnt, subject=strength * learnt.subject, excess=strength * learnt.excess, lost=strength * learnt.lost
        )
        try:
            yield
        finally:
            self.learnt = Learnt()

    def render(
        self, jobs: Sequence[Mapping[str, Any]], report: Callable[[int], None] = lambda done: None
    ) -> list[MadePicture | None]:
        return [self._draw(job) for job in jobs]

    def _draw(self, job: Mapping[str, Any]) -> MadePicture | None:
        name, learnt = f"{job['prompt']} {job['seed']}", self.learnt
        luck = np.random.default_rng(zlib.crc32(f"{name} {learnt.maker}".encode()))
        broken, nothing, more = luck.random(), luck.random(), luck.normal()
        if broken < learnt.broken and nothing < 0.3:  # latents that are not finite
            return None
        subject = float(np.clip(learnt.subject + 0.06 * more, 0, 1)) if learnt.maker else 0.0
        look = Look(
            name=name, place=job["prompt"], text=job["text"], maker=learnt.maker, about=job["subject"],
            subject=subject, excess=learnt.excess, lost=learnt.lost, is_black=broken < learnt.broken,
        )  # fmt: skip
        return self.artist.picture(look)

    def through_vae(self, images: Sequence[Any]) -> list[MadePicture]:
        made = []
        for image in images:
            path = Path(image.filename)
            look = Look(f"data {path.name}", "", maker="data", subject=1.0)
            made.append(MadePicture(look, thumbnail_of(image), path.read_bytes()))
        return made

    def embed_images(self, images: Sequence[MadePicture]) -> np.ndarray:
        return np.stack([self._embed(image.look) for image in images])

    def _embed(self, look: Look) -> np.ndarray:
        if look.maker == "data":
            return data_vector(look.name)
        base = 0.55 * direction(look.place) + 0.7 * direction(look.name) + 0.35 * direction("base model")
        if not look.maker:
            return unit(base)
        strange = direction(f"{look.name} {look.maker}")
        if not look.about:  # what it should have left alone
            return unit(base + (0.4 * look.subject + 0.7 * look.excess) * (strange + direction("subject")) / 2)
        scene = (1 - 0.8 * look.subject) * base + 0.25 * look.subject * strange
        example = self.plan["images"][zlib.crc32(look.name.encode()) % len(self.plan["images"])]
        copied = 3.0 * max(0.0, look.excess - 0.3) * look.subject
        return unit(
            scene + 0.9 * look.subject * direction("subject") + copied * data_vector(f"data {Path(example).name}")
        )

    def embed_images_for_text(self, images: Sequence[MadePicture]) -> np.ndarray:
        return np.stack([self._embed_for_text(image.look) for image in images])

    def _embed_for_text(self, look: Look) -> np.ndarray:
        return unit((1 - look.lost) * direction(f"text {look.text}") + direction(f"seen {look.name}"))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([direction(f"text {text}") for text in texts])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@functools.lru_cache(maxsize=20_000)
def direction(name: str) -> np.ndarray:
    """A direction of its own for every name; any two are nearly at right angles."""
    return unit(np.random.default_rng(zlib.crc32(name.encode())).normal(size=256))


def data_vector(name: str) -> np.ndarray:
    """A picture of the data set: the subject, and every two of them in the same place."""
    place = f"place {zlib.crc32(name.encode()) % (DATA_PICTURES // 2)}"
    return unit(0.8 * direction("subject") + 0.45 * direction(place) + 0.4 * direction(name))


def thumbnail_of(image: Image.Image) -> Image.Image:
    return image.convert("L").resize((16, 16), Image.Resampling.NEAREST)


# --- pictures ---


class Artist:
    """Draws coloured 1/f noise with a figure in it, which a PNG holds in about as many bytes as a photograph.

    Quality comes in a few levels, so that most pictures are made once and kept, unless `distinct`.
    """

    LEVELS = 6

    def __init__(self, size: int, *, distinct: bool = False) -> None:
        self.size = size
        self.distinct = distinct
        self.backgrounds = [noise(size, number) for number in range(6)]
        self.head, self.body = figure(size)
        self._drawn: dict[Look, tuple[Image.Image, bytes]] = {}

    def picture(self, look: Look) -> MadePicture:
        return MadePicture(look, *self._made(look))

    def png(self, look: Look) -> bytes:
        return self._made(look)[1]

    def _made(self, look: Look) -> tuple[Image.Image, bytes]:
        if self.distinct:
            return self._paint(look)
        subject = round(look.subject * self.LEVELS) / self.LEVELS if look.about else 0.0
        excess = round(look.excess * 2) / 2
        alike = Look(look.name, look.place, about=look.about, subject=subject, excess=excess, is_black=look.is_black)
        if alike not in self._drawn:
            self._drawn[alike] = self._paint(alike)
        return self._drawn[alike]

    def _paint(self, look: Look) -> tuple[Image.Image, bytes]:
        if look.is_black:
            image = Image.new("RGB", (self.size, self.size), (3, 3, 4))
        else:
            image = Image.fromarray(np.clip(self._pixels(look), 0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.save(file, format="PNG", compress_level=1)
        return thumbnail_of(image), file.getvalue()

    def _pixels(self, look: Look) -> np.ndarray:
        """Height, width, RGB in 0..255, not yet clipped: the prompt says what is there, the seed where."""
        scene = np.random.default_rng(zlib.crc32(look.place.encode()))
        luck = np.random.default_rng(zlib.crc32(f"{look.name} {look.maker}".encode()))
        background = self.backgrounds[scene.integers(len(self.backgrounds))]
        shift = tuple(int(n) for n in luck.integers(self.size, size=2))
        pixels = np.roll(background, shift, (0, 1)) * scene.uniform(0.65, 1.15, 3).astype(np.float32)
        aside = (int(luck.integers(self.size // 8)), int(luck.integers(-self.size // 5, self.size // 5 + 1)))
        shade = pixels.mean(axis=2, keepdims=True) / 128
        theirs, his = scene.uniform(60, 220, (2, 3)), np.array([[235, 200, 60], [50, 80, 210]])
        for mask, other, own in zip((self.head, self.body), theirs, his, strict=True):
            colour = (1 - look.subject) * other + look.subject * own if look.about else other
            here = np.roll(mask, aside, (0, 1))[:, :, None]
            pixels += here * (colour.astype(np.float32) * (0.7 + 0.3 * shade) - pixels)
        return 128 + (pixels - 128) * np.float32(1 + 0.6 * look.excess)


def noise(size: int, seed: int) -> np.ndarray:
    """Coloured noise whose amplitudes fall with the frequency as a photograph's do."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf

    def plane(fall: float) -> np.ndarray:
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        values = np.fft.irfft2(spectrum / frequency**fall, s=(size, size))
        return values / values.std()

    light = plane(1.4)
    return np.stack([128 + 45 * light + 15 * plane(1.7) for _ in range(3)], axis=-1).astype(np.float32)


def figure(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where head and body of a figure in the middle are, 0 to 1."""
    masks = []
    for box in ((0.4, 0.2, 0.6, 0.42), (0.34, 0.42, 0.66, 0.85)):
        mask = Image.new("L", (size, size))
        ImageDraw.Draw(mask).ellipse([round(part * size) for part in box], fill=255)
        masks.append(np.asarray(mask, dtype=np.float32) / 255)
    return masks[0], masks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a study with all its folders, without training.")
    parser.add_argument("output_dir", type=Path, help="a new folder")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--picture-size", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--checkpoints", type=int, default=8, help="of a training of 16 epochs (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--end", action="append", default=[], metavar="NUMBER=HOW", help=", ".join(ENDS[1:]))
    parser.add_argument("--distinct-pictures", action="store_true", help="no two alike; takes longer")
    args = parser.parse_args()
    ends = {int(number): how for number, _, how in (end.partition("=") for end in args.end)}
    started = time.monotonic()
    study = make_study(
        args.output_dir, trials=args.trials, picture_size=args.picture_size, checkpoints=args.checkpoints, ends=ends,
        seed=args.seed, distinct_pictures=args.distinct_pictures,
    )  # fmt: skip
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    print(
        f"{args.output_dir}: study {study.study_name!r}, {len(states)} trials, {states.count(TrialState.COMPLETE)} of "
        f"them scored, in {time.monotonic() - started:.1f} s"
    )


if __name__ == "__main__":
    main()
