"""Whether searches that really train fare as the table says.

    python tests/search_table/validate.py --output-dir runs/small_world     3 ways to search x 2 seeds x 20 trainings

About an hour of two cores, after make_table.py; what was trained is not trained again. Each study is one of
tests/benchmark_search.py, on prompts and seeds that no other study there has, but its trainings are real. Printed is
how many of its values, trial by trial, lie in the band that holds 80% of the studies on the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmark_search
from search_table.landscape import Curve, Landscape
from search_table.make_table import TableMaker, Training, preload
from search_table.studies import COURSE, Scores, course_of, run_study
from search_table.table import Table, saved_epochs

import optuna_hyperparameter_search as search

WAYS = ("V1 TPE", "guide, rejected replaced", "ours, stopping")
FIRST_SEED, SEEDS = 10_000, 2
BAND = (10, 90)  # percentiles
TRUE = COURSE.index("true")


class RealScores(Scores):
    """Trains each setting, and adds its pictures to the study's own copy of the table."""

    def __init__(self, landscape: Landscape, seed: int, maker: TableMaker, name: str) -> None:
        self._maker, self._name = maker, name
        super().__init__(landscape, seed)

    def train(self, params: Mapping[str, Any], number: int) -> Curve:
        training = Training(f"{self._name}-{number:03d}", dict(params), 1000 * self.seed + number)
        values = self._maker.make(training)
        folder = self._maker.folder / training.name
        assert search.read_json(folder / "params.json")["params"] == params, f"{folder} is of another study"
        table = self.landscape.table.with_training(training.name, dict(params), values)
        self.landscape = dataclasses.replace(self.landscape, table=table)
        self.screened, self.confirmed = map(self._all, (self.draw.screen, self.draw.confirm))
        columns = np.arange(len(saved_epochs(params)))
        true, judged = table.true[-1, columns], table.judged[-1, columns]
        return Curve(saved_epochs(params), len(table.names) - 1, columns, true, judged, np.zeros(len(columns)))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A landscape that is its table alone."""

    table: Table


def real_course(maker: TableMaker, way: str, seed: int, trials: int) -> np.ndarray:
    """True values of the LoRAs that a study would hand over after each trial."""
    name = f"real-{list(benchmark_search.SEARCHES).index(way)}-{seed}"
    scores = RealScores(Trained(Table.read()), seed, maker, name)
    return course_of(run_study(benchmark_search.SEARCHES[way], scores, trials), scores)[TRUE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/small_world"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--studies", type=int, default=200, help="on the table, for the band")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    maker = TableMaker(args.output_dir.resolve() / "middle")
    preload()
    pairs = [(way, FIRST_SEED + number) for way in WAYS for number in range(SEEDS)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # each waits for its training's process
        real = dict(zip(pairs, pool.map(lambda pair: real_course(maker, *pair, args.trials), pairs), strict=True))
    args.seeds, args.processes, searches = args.studies, len(os.sched_getaffinity(0)), benchmark_search.SEARCHES
    found = benchmark_search.compare(Table.read(), {way: searches[way] for way in WAYS}, args)
    for title, courses in found.items():
        for (way, seed), values in real.items():
            low, high = np.percentile(courses[way][:, TRUE, : args.trials], BAND, axis=0)
            inside = np.mean((values >= low) & (values <= high))
            print(f"{title}  {way:26} seed {seed}: {inside:4.0%} in the band; after {args.trials} trials "
                  f"{values[-1]:.3f}, band {low[-1]:.3f} to {high[-1]:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
