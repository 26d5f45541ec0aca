"""Trains about 400 LoRAs in the small world, on which tests/benchmark_search.py runs whole searches in minutes.

    python tests/search_table/make_table.py --output-dir runs/small_world              go on, until all is trained
    python tests/search_table/make_table.py --output-dir runs/small_world --hours 0    only write the table

Needs `pip install scipy lion-pytorch`. 4.5 hours of one core. Each training is a folder in
OUTPUT_DIR/middle/table/; what is there is not trained again. trainings.csv and pictures.npz, beside this file, hold
what is trained so far. The groups take turns, so that a part of the table is a smaller table.

    v21     180 settings of V2.1: scrambled Sobol points that pass the safety constraints, 30% with a low, 40% with a
            middle and 30% with a high alpha, as the search deals them
    v1      120 settings of V1's space: scrambled Sobol points
    again   12 of v21's settings, each with four more training seeds
    new     50 settings that no model learns from: 30 as the search itself would begin, 20 random ones of V1

Every second epoch is a checkpoint. Each checkpoint draws the same 12 prompts with the same 4 seeds, and 8 plain
prompts.

Two things differ from the settings, in all groups alike. A CPU has no AdamW8bit: AdamW takes its place. And an epoch of
16 batches is a third of that of 410 pictures at batch 8, for which the space was made: warm-ups are shortened likewise,
else half of them would be longer than the training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import toml
from optuna.distributions import CategoricalDistribution, IntDistribution

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "small_trainer"))

from benchmark_sampler import band, suggest_v1
from small_world import benchmark, judge, wide
from small_world.confirmation import Confirmation

import optuna_hyperparameter_search as search

HERE = Path(__file__).resolve().parent
STAGE = "table"
COUNTS = {"prompts": 12, "seeds": 4, "plain_prompts": 8}  # 56 pictures
BANDS = {"low": 54, "mid": 72, "high": 54}
V1_SETTINGS, AGAIN_SETTINGS, MORE_SEEDS, NEW_V21, NEW_V1 = 120, 12, 4, 30, 20
SAVE_EVERY = 2  # epochs
MOST_CHECKPOINTS = 10  # of 20 epochs
BATCHES, THEIR_BATCHES = 16, 52  # of an epoch: here, and of 410 pictures at batch 8
SCORED = ("q", "m", "nearest", "plain", "usable")  # the score's values of a picture
JUDGED = ("character", "text", "copies", "plain")  # and the judge's
TRAININGS, PICTURES = HERE / "trainings.csv", HERE / "pictures.npz"
Params = dict[str, Any]


@dataclass(frozen=True)
class Training:
    name: str  # group-number
    params: Params
    seed: int


# --- which trainings ---


class SobolSampler(optuna.samplers.BaseSampler):
    """A scrambled Sobol point a trial, a coordinate a parameter. (Optuna's own leaves categories to chance.)"""

    def __init__(self, seed: int) -> None:
        from scipy.stats import qmc

        self._points, self._names = qmc.Sobol(len(search.SEARCH_SPACE) + 1, seed=seed).random(1 << 14), []

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Params:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        if param_name not in self._names:
            self._names.append(param_name)
        return at_share(param_distribution, self._points[trial.number, self._names.index(param_name)])


def at_share(distribution: Any, share: float) -> Any:
    """The value below which this share of a distribution lies."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        return float(low * (high / low) ** share)
    if step is None:
        return float(low + share * (high - low))
    value = low + step * int(share * (round((high - low) / step) + 1))
    return int(value) if isinstance(distribution, IntDistribution) else round(value, 10)


def proposals(
    sampler: optuna.samplers.BaseSampler, suggest: Callable[[optuna.Trial], Params] = search.suggest_hyperparameters
) -> Iterator[Params]:
    study = optuna.create_study(sampler=sampler)
    while True:
        yield suggest(study.ask())


def updates(params: Params) -> int:
    """Of the whole training, in the table."""
    return params["max_train_epochs"] * math.ceil(BATCHES / params["gradient_accumulation_steps"])


def warm_up(params: Params) -> int:
    """Updates, in the table."""
    return round(params["lr_warmup_steps"] * BATCHES / THEIR_BATCHES)


def ends_warm_up(params: Params) -> bool:
    """What the search prefers to propose."""
    return warm_up(params) < updates(params)


def all_trainings() -> list[Training]:
    """Every training of the table; the groups take turns in proportion to their sizes."""
    feasible = (
        params
        for params in proposals(SobolSampler(1))
        if search.check_safety_constraints(params)[0] and ends_warm_up(params)
    )
    left, v21 = dict(BANDS), []
    while any(left.values()):
        params = next(feasible)
        if left[kind := band(params["network_alpha_ratio"])]:
            left[kind] -= 1
            v21.append(params)
    begun = search.FeasibleTPESampler(2, prefers=ends_warm_up)
    v1, new_v1 = proposals(SobolSampler(3), suggest_v1), proposals(optuna.samplers.RandomSampler(seed=4), suggest_v1)
    new = [*take(proposals(begun), NEW_V21), *take(new_v1, NEW_V1)]
    random.Random(5).shuffle(new)
    groups = {
        "v21": v21, "v1": take(v1, V1_SETTINGS), "new": new,
        "again": [params for params in v21[:AGAIN_SETTINGS] for _ in range(MORE_SEEDS)],
    }  # fmt: skip
    placed = [
        ((number + 0.5) / len(some), Training(f"{group}-{number:03d}", params, 1000 * place + number))
        for place, (group, some) in enumerate(groups.items(), 1)
        for number, params in enumerate(some)
    ]
    return [training for _, training in sorted(placed, key=lambda one: one[0])]


def take(every: Iterator[Params], count: int) -> list[Params]:
    return [next(every) for _ in range(count)]


# --- one training ---


class TableMaker:
    """Trains and scores in a study's folder, which has the reference."""

    def __init__(self, output_dir: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.output_dir, self.folder = output_dir, output_dir / STAGE
        self.folder.mkdir(exist_ok=True)
        self.jobs = table_jobs(search.read_json(output_dir / "reference" / "plan.json"))
        reference = output_dir / "reference" / STAGE
        if not all((reference / f"{job['name']}.png").is_file() for job in self.jobs):
            scorer = search.ImageScorer(search.read_json(output_dir / "reference" / "plan.json"), "cpu")
            wide.render(scorer, self.jobs, reference)
        self.confirmation = Confirmation(output_dir, STAGE, self.jobs)
        self.confirmation.scorer.batch_size = len(self.jobs)
        self.training = list(map(judge.to_array, self.confirmation.data))

    def make(self, training: Training) -> np.ndarray:
        """Train, score and keep the values, in a process of its own so that nothing else stays of it."""
        if self.values_of(training.name) is None:
            alone = multiprocessing.get_context("fork").Process(target=self._make, args=(training,))
            alone.start()
            alone.join()
        values = self.values_of(training.name)
        assert values is not None, f"see {self.folder / training.name / 'log.txt'}"
        return values

    def _make(self, training: Training) -> None:
        folder = self.folder / training.name
        folder.mkdir(exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            started = time.monotonic()
            self._train(training, folder)
            trained = time.monotonic()
            epochs = training.params["max_train_epochs"]
            checkpoints = search.saved_checkpoints(folder, epochs)
            values = list(map(self._score, checkpoints.values()))
        seconds = {"training": trained - started, "scoring": time.monotonic() - trained}
        found = {"params": training.params, "seed": training.seed, "seconds": seconds}
        search.write_json(folder / "params.json", {**found, "epochs": list(checkpoints)})
        search.write_atomically(folder / "values.npy", functools.partial(np.save, arr=np.stack(values)))
        for checkpoint in checkpoints.values():
            checkpoint.unlink()

    def _train(self, training: Training, folder: Path) -> None:
        import train_network

        config = toml.loads((self.output_dir / "trial_0000" / "config.toml").read_text(encoding="utf-8"))
        config |= {name: value for name, value in training.params.items() if name != "network_alpha_ratio"}
        config |= {"output_dir": str(folder), "seed": training.seed, "save_every_n_epochs": SAVE_EVERY}
        config["optimizer_type"] = config["optimizer_type"].replace("8bit", "")
        config["lr_warmup_steps"] = warm_up(training.params)
        del config["logging_dir"]
        (folder / "config.toml").write_text(toml.dumps(config), encoding="utf-8")
        train_network.main(["--config_file", str(folder / "config.toml")])

    def _score(self, path: Path) -> np.ndarray:
        """Values of each picture, shape (pictures, SCORED and JUDGED); NaN where it has none, or all broke."""
        empty = np.full((len(self.jobs), len(SCORED) + len(JUDGED)), np.nan)
        with contextlib.suppress(search.Diverged):
            search.check_lora(path, may_be_zero=True)
            confirmation, scorer = self.confirmation, self.confirmation.scorer
            with scorer.lora(path):
                scorer.pipeline.fuse_lora()  # half the time; a pixel differs by a 255th at most
                shown = scorer.render(self.jobs)
                scorer.pipeline.unfuse_lora()
            raw, _ = confirmation.raw_values(shown)
            told = [
                judge.look_at(job["prompt"], judge.to_array(picture), self.training, confirmation.captions)
                for job, picture in zip(self.jobs, shown, strict=True)
            ]
            for row, (values, seen) in enumerate(zip(raw["images"], told, strict=True)):
                empty[row] = [*(values.get(name, np.nan) for name in SCORED), *(seen.get(n, np.nan) for n in JUDGED)]
        return empty

    def values_of(self, name: str) -> np.ndarray | None:
        """What _score() found of each checkpoint, padded with NaN; None before. The nearest is above the copy limit."""
        file = self.folder / name / "values.npy"
        if not file.is_file():
            return None
        found = np.load(file)
        found[..., SCORED.index("nearest")] -= self.confirmation.anchors["copy"]  # a 16-bit float is precise near 0
        return np.pad(found, ((0, MOST_CHECKPOINTS - len(found)), (0, 0), (0, 0)), constant_values=np.nan)


def table_jobs(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All prompts have the same seeds, as in a plan of the time when the table was begun."""
    by_prompt: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for job in wide.pool_jobs(plan):
        by_prompt.setdefault(job["kind"], {}).setdefault(job["prompt"], []).append(job)
    rng, chosen = random.Random(3), []
    seeds = rng.sample(range(wide.SEEDS), COUNTS["seeds"])
    for kind, share in wide.SHARES.items():
        for jobs in rng.sample(list(by_prompt[kind].values()), round(COUNTS["prompts"] * share)):
            chosen += [{**jobs[seed], "seed": wide.FIRST_SEED + seed} for seed in seeds]
    plain = rng.sample(list(by_prompt["plain"].values()), COUNTS["plain_prompts"])
    return chosen + [{**jobs[0], "seed": wide.FIRST_SEED} for jobs in plain]


# --- the table ---


def write_table(maker: TableMaker, trainings: Sequence[Training]) -> int:
    """What is trained: a line each in trainings.csv, its pictures' values in pictures.npz; how many there are."""
    base, anchors = maker.confirmation.base, maker.confirmation.anchors
    raw = base.raw_values(base.vectors, base.usable, anchors["copy"])
    rows, values = [], []
    for training in trainings:
        found = maker.values_of(training.name)
        if found is None:
            continue
        values.append(found)
        about = search.read_json(maker.folder / training.name / "params.json")
        seconds = {name: round(spent, 1) for name, spent in about["seconds"].items()}
        epochs = " ".join(map(str, about["epochs"]))
        settings = {**params_of(training.params), "updates": updates(training.params)}
        rows.append({"name": training.name, "seed": training.seed, **settings, "epochs": epochs, **seconds})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with TRAININGS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    arrays = {
        "values": np.array(values, dtype=np.float16),
        "base": np.array([[image.get(name, np.nan) for name in SCORED] for image in raw["images"]], dtype=np.float16),
        "prompts": np.array([job["prompt"] for job in maker.jobs]),
        "subject": np.array([job["subject"] for job in maker.jobs]),
        "caption": np.array([job["caption"] for job in maker.jobs]),
        "crossed": np.array([base.anchors()[name] for name in ("m_crossed", "plain_crossed")]),
    }
    search.write_atomically(PICTURES, lambda file: np.savez_compressed(file, **arrays))
    return len(rows)


def params_of(params: Mapping[str, Any]) -> Params:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in params.items()}


def preload() -> None:
    """Import what a training needs, so that processes that are forked have it."""
    import diffusers.optimization  # noqa: F401
    import lion_pytorch  # noqa: F401
    import peft  # noqa: F401
    import train_network  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/small_world"))
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no training after these")
    args = parser.parse_args()
    started, output_dir = time.monotonic(), args.output_dir.resolve() / "middle"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    benchmark.make_study(output_dir)
    trainings, maker = all_trainings(), TableMaker(output_dir)
    missing = [one for one in trainings if maker.values_of(one.name) is None]
    preload()

    def make(training: Training) -> None:
        if time.monotonic() - started < 3600 * args.hours:
            maker.make(training)
            print(f"{training.name} after {(time.monotonic() - started) / 60:.0f} min", flush=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # each waits for its training's process
        list(pool.map(make, missing))
    print(f"{write_table(maker, trainings)} of {len(trainings)} trainings are in the table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
