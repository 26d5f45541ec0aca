"""Reads the table of trained LoRAs, and draws scoring plans from its pictures.

    table = Table.read()
    draw = Draw.of(table, seed=0)
    table.scores(draw.confirm.times())        (trainings, checkpoints)

A plan says how often it takes each picture of the table. Prompts, and seeds of each prompt, are drawn with replacement,
since the table has no others. The score of all pictures, each once, is a checkpoint's true value.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import toml
from search_table.make_table import BATCHES, PICTURES, SCORED, TRAININGS, updates, warm_up

import optuna_hyperparameter_search as search

HERE = Path(__file__).resolve().parent
CONFIG = toml.loads((HERE.parents[1] / "configs" / "scoring.toml").read_text(encoding="utf-8"))
WEIGHTS: Mapping[str, float] = CONFIG["weights"]
AVERAGED = ("q", "m", "copies", "plain", "usable")
NO_SPREAD = {"spread": 1.0, "data_spread": 1.0}  # variety has no weight, and is not drawn
NEW = "new"  # the group that no model learns from
FEATURES = ("dose", "text dose", "ratio", "dim", "accumulation", "updates", "warm-up", "rate now", "share", "Lion")
Params = dict[str, Any]


# --- settings ---


def read_params(row: Mapping[str, str]) -> Params:
    """The settings of a line of trainings.csv."""
    whole = {"network_dim", "network_alpha", "max_train_epochs", "gradient_accumulation_steps", "lr_warmup_steps"}
    whole |= {"lr_scheduler_num_cycles"}
    words = {"optimizer_type", "lr_scheduler"}
    names = {"learning_rate", "text_encoder_lr", "network_alpha_ratio"} | whole | words
    kinds = {name: int if name in whole else str if name in words else float for name in names}
    return {name: kinds[name](row[name]) for name in row if name in names and row[name]}


def learning_rate_shape(params: Mapping[str, Any]) -> np.ndarray:
    """Share of the learning rate that each update of the training has, as diffusers' schedules say."""
    count, warm = updates(params), warm_up(params)
    step = np.arange(count)
    progress = np.clip((step - warm) / max(1, count - warm), 0, 1)
    cycles = params.get("lr_scheduler_num_cycles", 1) if params["lr_scheduler"] == "cosine_with_restarts" else 1
    falling = (
        1 - progress if params["lr_scheduler"] == "polynomial" else 0.5 + 0.5 * np.cos(np.pi * (cycles * progress % 1))
    )
    return np.where(step < warm, step / max(1, warm), falling)


def features_of(params: Mapping[str, Any], epochs: Sequence[int]) -> np.ndarray:
    """What a model knows of each checkpoint, shape (epochs, FEATURES).

    A dose is ratio x root of dim x the sum of learning rates: alpha / root of dim, as rsLoRA scales (arXiv 2312.03732).
    """
    shape = learning_rate_shape(params)
    accumulation, ratio = params["gradient_accumulation_steps"], params["network_alpha_ratio"]
    done = np.array([min(len(shape), epoch * math.ceil(BATCHES / accumulation)) for epoch in epochs])
    spent = ratio * math.sqrt(params["network_dim"]) * np.maximum(np.cumsum(shape)[done - 1], 0.5)
    columns = {
        "dose": np.log(params["learning_rate"] * spent), "text dose": np.log(params["text_encoder_lr"] * spent),
        "ratio": np.log(ratio), "dim": np.log(params["network_dim"]), "accumulation": np.log(accumulation),
        "updates": np.log(done), "warm-up": warm_up(params) / len(shape), "rate now": shape[done - 1],
        "share": np.array(epochs) / params["max_train_epochs"], "Lion": float(params["optimizer_type"] == "Lion"),
    }  # fmt: skip
    return np.stack([np.broadcast_to(columns[name], len(done)) for name in FEATURES], axis=1)


def saved_epochs(params: Mapping[str, Any]) -> list[int]:
    """The epochs of a training's checkpoints: every second, and the last."""
    last = params["max_train_epochs"]
    return sorted({*range(2, last + 1, 2), last})


# --- plans ---


@dataclass(frozen=True)
class Plan:
    """A stage's draw: how often each of its prompts takes each picture of the table."""

    prompts: np.ndarray  # (prompts with the subject, pictures); each has seeds of its own
    plain: np.ndarray  # (plain prompts, pictures)

    @classmethod
    def drawn(cls, table: Table, counts: Mapping[str, int], rng: np.random.Generator, rounds: int = 1) -> list[Plan]:
        """What was drawn after one round, after two, ..., on the same prompts with other seeds."""
        prompts, seeds, plain = table.shape
        every = np.eye(prompts * seeds + plain)
        about = rng.integers(prompts, size=(counts["prompts"], 1))
        about = about * seeds + rng.integers(seeds, size=(counts["prompts"], rounds * counts["seeds"]))
        others = every[prompts * seeds + rng.integers(plain, size=counts["plain_prompts"])]
        numbers = range(1, rounds + 1)
        return [cls(every[about[:, : count * counts["seeds"]]].sum(axis=1), count * others) for count in numbers]

    def times(self) -> np.ndarray:
        """How often each picture of the table is taken, shape (pictures,)."""
        return self.prompts.sum(axis=0) + self.plain.sum(axis=0)

    def size(self) -> int:
        return int(self.times().sum())

    def resampled(self) -> np.ndarray:
        """The same with its prompts drawn anew, as search.resampled_scores does; shape (RESAMPLES, pictures)."""
        rng = np.random.default_rng(0)
        kinds = (self.prompts, self.plain)
        draws = [rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=search.RESAMPLES) @ x for x in kinds]
        return draws[0] + draws[1]


@dataclass(frozen=True)
class Draw:
    """What all trials of a study are scored on."""

    screen: Plan
    confirm: Plan
    rounds: list[Plan]  # of the final stage: after one, two and three of them

    @classmethod
    def of(cls, table: Table, seed: int) -> Draw:
        rng = np.random.default_rng((seed, 1))
        [screen], [confirm] = (Plan.drawn(table, CONFIG[stage], rng) for stage in ("screen", "confirm"))
        return cls(screen, confirm, Plan.drawn(table, CONFIG["final"], rng, len(search.FINAL_ROUNDS)))


# --- the table ---


@dataclass(frozen=True)
class Table:
    """Trainings and their pictures' values: `values` (AVERAGED, trainings, checkpoints, pictures), `base` without the
    two in the middle, `judged` what the judge says of each checkpoint by all pictures."""

    names: list[str]
    params: list[Params]
    epochs: list[list[int]]
    seconds: np.ndarray  # of training and of scoring
    values: np.ndarray
    base: np.ndarray
    shape: tuple[int, int, int]  # subject prompts, seeds, plain prompts
    crossed: Mapping[str, float]
    judged: np.ndarray
    counted: np.ndarray  # pictures that may be copies: those of the subject whose prompt is no caption

    @classmethod
    def read(cls, folder: Path = HERE) -> Table:
        with (folder / TRAININGS.name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with np.load(folder / PICTURES.name) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        about, values = found["subject"], found["values"].astype(float)
        prompts, plain = len(set(found["prompts"][about])), int((~about).sum())
        counted = about & ~found["caption"]
        crossed = dict(zip(("m_crossed", "plain_crossed"), map(float, found["crossed"]), strict=True))
        return cls(
            [row["name"] for row in rows],
            [read_params(row) for row in rows],
            [list(map(int, row["epochs"].split())) for row in rows],
            np.array([[float(row["training"]), float(row["scoring"])] for row in rows]),
            averaged(values, counted),
            found["base"].astype(float).T,
            (prompts, int(about.sum()) // prompts, plain),
            crossed,
            judged_overall(values[..., len(SCORED) :]),
            counted,
        )

    def with_training(self, name: str, params: Params, values: np.ndarray) -> Table:
        """One more training; `values` as TableMaker.values_of() gives them."""
        return dataclasses.replace(
            self,
            names=[*self.names, name],
            params=[*self.params, params],
            epochs=[*self.epochs, saved_epochs(params)],
            seconds=np.vstack([self.seconds, np.full(2, np.nan)]),
            values=np.concatenate([self.values, averaged(values[None], self.counted)], axis=1),
            judged=np.concatenate([self.judged, judged_overall(values[None, ..., len(SCORED) :])]),
        )

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(self.values)
        return np.where(known, self.values, 0.0), known.astype(float)

    def groups(self) -> np.ndarray:
        return np.array([name.partition("-")[0] for name in self.names])

    def anchors(self, times: np.ndarray) -> dict[str, float]:
        """The base model's own, on this plan."""
        q, m = (self.base[SCORED.index(name)] for name in ("q", "m"))
        means = {name: float(np.nansum(x * times) / times[np.isfinite(x)].sum()) for name, x in (("q", q), ("m", m))}
        return {**means, **self.crossed, **NO_SPREAD}

    @functools.cached_property
    def there(self) -> np.ndarray:
        """Which checkpoints each training has, shape (trainings, checkpoints)."""
        return np.arange(self.values.shape[2]) < np.array([len(epochs) for epochs in self.epochs])[:, None]

    def terms(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """Of all checkpoints, shape (trainings, checkpoints); meaningless beyond a training's last one (`there`)."""
        summed, known = self._known
        with np.errstate(invalid="ignore"):
            means = (summed @ times) / (known @ times)
        return self._terms(means, times)

    def scores(self, times: np.ndarray) -> np.ndarray:
        """Of all checkpoints, shape (trainings, checkpoints); NaN where a training has no more of them."""
        return np.where(self.there, search.combine(self.terms(times), WEIGHTS), np.nan)

    def resampled(self, training: int, checkpoint: int, plan: Plan, many: np.ndarray) -> np.ndarray:
        """Scores of one checkpoint over plan.resampled(), between the anchors of the plan itself."""
        summed, known = (array[:, training, checkpoint] for array in self._known)
        with np.errstate(invalid="ignore"):
            means = (summed @ many.T) / (known @ many.T)
        scores, n = search.combine(self._terms(means, plan.times()), WEIGHTS), max(2, len(plan.prompts))
        return scores.mean() + (scores - scores.mean()) * math.sqrt(n / (n - 1))

    def _terms(self, means: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
        raw = {**dict(zip(AVERAGED, means, strict=True)), "spread": 0.0}
        return search.terms_of(raw, self.anchors(times))

    @functools.cached_property
    def true(self) -> np.ndarray:
        """The score over all pictures, shape (trainings, checkpoints)."""
        return self.scores(np.ones(self.values.shape[-1]))

    def features(self) -> list[np.ndarray]:
        return [features_of(params, epochs) for params, epochs in zip(self.params, self.epochs, strict=True)]

    def settings(self) -> np.ndarray:
        """A number for each training, the same for the same settings."""
        known: dict[str, int] = {}
        return np.array([known.setdefault(str(sorted(params.items())), len(known)) for params in self.params])

    @functools.cached_property
    def deviations(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What a training seed does to a curve: (shares, score minus the mean) of each repeated training."""
        found, settings = [], self.settings()
        for setting in np.unique(settings):
            same = np.flatnonzero(settings == setting)
            if len(same) > 1:
                shares = np.array(self.epochs[same[0]]) / self.epochs[same[0]][-1]
                curves = self.true[same, : len(shares)]
                found += [
                    (shares, one) for one in (curves - curves.mean(axis=0)) * math.sqrt(len(same) / (len(same) - 1))
                ]
        return found or [(np.ones(1), np.zeros(1))]

    def seed_noise(self) -> tuple[float, float]:
        """Standard deviations between trainings of the same settings: what a whole curve shares, and what is left."""
        curves = [curve for _, curve in self.deviations]
        left = np.concatenate([curve - curve.mean() for curve in curves])
        return root_mean_square([curve.mean() for curve in curves]), root_mean_square(left)


def averaged(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The pictures' AVERAGED values, which come first, from (..., pictures, SCORED and JUDGED)."""
    q, m, nearest, plain, usable = np.moveaxis(values[..., : len(SCORED)], -1, 0)
    copies = np.where(counted & np.isfinite(nearest), nearest > 0, np.nan)  # above the copy limit
    return np.stack([q, m, copies, plain, usable])


def root_mean_square(values: Sequence[float] | np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def judged_overall(judged: np.ndarray) -> np.ndarray:
    """The judge's overall, as small_world.judge.overall() has it; from (..., pictures, JUDGED)."""
    character, text, copies, plain = np.moveaxis(judged, -1, 0)
    means = []
    for some in (character * text, plain, copies):
        known = np.isfinite(some)
        means.append(np.where(known, some, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1))
    return means[0] * means[1] * (1 - means[2])
