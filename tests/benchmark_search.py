"""Whole searches in minutes, on the table of trained LoRAs in tests/search_table/.

    python tests/benchmark_search.py [--seeds 200]      how soon each way to search finds a good LoRA
    python tests/benchmark_search.py gates              what the regressor knows of settings that it has not seen
    python tests/benchmark_search.py stopping           rules of early stopping, on the same proposals
    python tests/benchmark_search.py samplers           other samplers of the same space
    python tests/benchmark_search.py earlier            what settings of an earlier search gain, and cost
    python tests/benchmark_search.py weights            how well other weights of the score agree with the judge

Needs `pip install scipy scikit-learn lion-pytorch`, and matplotlib for the figure, tests/search_table/curves.png.

All searches of one seed share their prompts and seeds, and score a training as the program does: each checkpoint is
screened, the best is confirmed, and the confirmation is what the sampler is told. What counts is the true value of the
LoRA that a search would hand over: its score over all pictures of the table. Hours are modelled, for a consumer card.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark_sampler import plain_tpe, suggest_v1
from search_table import landscape as models
from search_table.landscape import Landscape, NearestTraining, Regression
from search_table.samplers import SAMPLERS, FeasibleRandomSampler, first_sampler
from search_table.studies import (
    COURSE,
    EPOCH_SECONDS,
    OUR_RULE,
    PICTURE_SECONDS,
    TRIALS,
    PatientPruner,
    Rule,
    Scores,
    Search,
    Tried,
    course_of,
    keep_rule,
    run_study,
    try_training,
)  # fmt: skip
from search_table.table import HERE, Params, Table
from small_world.definitions import scores_of

import optuna_hyperparameter_search as search

SHOWN = (5, 10, 20)  # trials
FIGURE = HERE / "curves.png"
HOURS, TRUE, JUDGED, TRIED = range(len(COURSE))
SEARCHES: dict[str, Search] = {
    "V1 random": Search(lambda seed: optuna.samplers.RandomSampler(seed=seed), suggest_v1),
    "V1 TPE": Search(plain_tpe, suggest_v1),
    "guide, rejected count": Search(plain_tpe, rejected="counts"),
    "guide, rejected replaced": Search(plain_tpe, rejected="replaced"),
    "V2.1 random feasible": Search(FeasibleRandomSampler),
    "ours": Search(first_sampler),
    "ours, stopping": Search(first_sampler, rule=OUR_RULE),
}
WITH_FINAL = {"ours": "ours, final stage", "ours, stopping": "ours, both"}
GAINS = {  # of one way to search over another
    "space": ("V1 TPE", "guide, rejected replaced"),
    "sampler": ("guide, rejected replaced", "ours"),
    "stopping": ("ours", "ours, stopping"),
    "picking": ("ours, stopping", "ours, both"),
    "all": ("V1 TPE", "ours, both"),
}
LATE = tuple(range(50, 100, 10))  # percent of the epochs
RULES = [
    *(keep_rule(kept, at, whole) for kept in (67, 50, 33) for at in (40, 50, 60) for whole in (4, 5, 6, 8)),
    *(
        Rule(f"Wilcoxon, p {p}, at {at}%", functools.partial(optuna.pruners.WilcoxonPruner, p_threshold=p), (at,))
        for p in (0.05, 0.1) for at in (50, 60)
    ),
    *(
        Rule(f"patience {wait}0%{', confirmed' * kept}", functools.partial(PatientPruner, wait), LATE, kept)
        for wait in (2, 3) for kept in (False, True)
    ),
]  # fmt: skip
Courses = dict[str, np.ndarray]  # by way to search: (seeds, COURSE, trials)


# --- many studies ---


def courses_of_seed(searches: Mapping[str, Search], landscape: Landscape, seed: int) -> Courses:
    scores, found = Scores(landscape, seed), {}
    for name, how in searches.items():
        every = run_study(how, scores)
        found[name] = course_of(every, scores)
        if name in WITH_FINAL:
            found[WITH_FINAL[name]] = course_of(every, scores, final=True)
    return found


def stopped_of_seed(final: bool, landscape: Landscape, seed: int) -> np.ndarray:
    """For each rule: share of hours saved, regret, share of trials stopped. All have the proposals of ours."""
    scores = Scores(landscape, seed)
    whole = [tried for tried in run_study(SEARCHES["ours"], scores) if tried]
    course, found = course_of(whole, scores, final=final)[:, -1], []
    for rule in RULES:
        study = optuna.create_study(pruner=rule.pruner(), direction="maximize")
        every = [try_training(ask_again(study, tried), tried.curve, scores, rule) for tried in whole]
        stopped = course_of(every, scores, final=final)[:, -1]
        ended = np.mean([one.seen < len(one.curve.epochs) for one in every])
        found.append([1 - stopped[HOURS] / course[HOURS], course[TRUE] - stopped[TRUE], ended])
    return np.array(found)


def earlier_of_seed(landscape: Landscape, seed: int) -> Courses:
    """Ours with three settings enqueued: the best or the worst of an earlier search on other prompts and seeds."""
    settings: list[Params] = []

    def suggest(trial: optuna.Trial) -> Params:
        params = search.suggest_hyperparameters(trial)
        settings.append(trial.params)
        return params

    earlier = run_study(Search(first_sampler, suggest), Scores(landscape, seed + 10_000))
    places = sorted(range(TRIALS), key=lambda number: -earlier[number].value)  # type: ignore[union-attr]
    first = {"ours": [], "three best first": places[:3], "three worst first": places[-3:]}
    scores, found = Scores(landscape, seed), {}
    for name, numbers in first.items():
        how = Search(first_sampler, first=[settings[number] for number in numbers])
        found[name] = course_of(run_study(how, scores), scores)
    return found


def ask_again(study: optuna.Study, tried: Tried) -> optuna.Trial:
    """A trial of as many epochs, which early stopping asks it for."""
    study.enqueue_trial({"max_train_epochs": tried.curve.epochs[-1]})
    trial = study.ask()
    trial.suggest_int("max_train_epochs", 1, 100)
    return trial


def of_each_seed(work: Callable[[int], Any], args: argparse.Namespace) -> list[Any]:
    """In processes that share what is read and learnt already."""
    global call

    def call(seed: int) -> Any:
        return work(seed)

    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        return pool.map(call, range(args.seeds), chunksize=1)


# --- what is printed ---


def interval(values: np.ndarray, of: Callable[..., Any] = np.mean) -> tuple[float, float]:
    """95%, by drawing the seeds anew."""
    drawn = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    low, high = np.percentile(of(values[drawn], axis=1), (2.5, 97.5), method="nearest")
    return float(low), float(high)


def with_interval(values: np.ndarray, digits: int = 3) -> str:
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(values.mean(), *interval(values), d=digits)


def hours_to(target: float, course: np.ndarray) -> np.ndarray:
    """Of each seed, after which the LoRA handed over is that good for the first time; infinite if never."""
    reached = course[:, TRUE] >= target
    first = np.take_along_axis(course[:, HOURS], reached.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(reached.any(axis=1), first, np.inf)


def print_courses(courses: Courses) -> None:
    unit, target = courses["V1 TPE"][:, HOURS, -1].mean(), np.median(courses["V1 TPE"][:, TRUE, -1])
    print(f"V1 TPE takes {unit:.1f} hours for {TRIALS} trials, which are 1 below. Its median pick has {target:.3f}.")
    shown = "value after " + ", ".join(map(str, SHOWN))
    print(f"{'':26}{shown:>23}  judge  tried  hours {'hours to the median pick':>26}  never  half are there after")
    for name, course in courses.items():
        values = "  ".join(f"{course[:, TRUE, count - 1].mean():.3f}" for count in SHOWN)
        hours = hours_to(target, course) / unit
        said = "{:.2f} ({:.2f} to {:.2f})".format(np.median(hours), *interval(hours, np.median))
        means = "  ".join(f"{course[:, number, -1].mean():.3f}" for number in (JUDGED, TRIED))
        there = np.flatnonzero(np.median(course[:, TRUE], axis=0) >= target)
        half = f"{course[:, HOURS, there[0]].mean() / unit:.2f}" if len(there) else "never"
        print(f"{name:<26}{values:>23}  {means}  {course[:, HOURS, -1].mean() / unit:5.2f} {said:>26}", end="")
        print(f"  {np.mean(np.isinf(hours)):5.0%}  {half}")


def print_gains(courses: Courses) -> None:
    unit = courses["V1 TPE"][:, HOURS, -1].mean()
    for name, (one, other) in GAINS.items():
        if one in courses and other in courses:
            more = (courses[other] - courses[one])[:, :, -1]
            print(f"{name:<10} value {with_interval(more[:, TRUE])}, hours {with_interval(more[:, HOURS] / unit, 2)}")


def print_gates(table: Table) -> None:
    (shared, rest), groups, noise = table.seed_noise(), table.groups(), models.best_noise(table)
    print(f"{len(table.names)} trainings:", ", ".join(f"{(groups == name).sum()} {name}" for name in np.unique(groups)))
    seconds = table.seconds.sum(axis=0) / (sum(epochs[-1] for epochs in table.epochs), sum(map(len, table.epochs)))
    pictures = table.values.shape[-1]
    print(f"seconds, here: {seconds[0]:.2f} an epoch, {seconds[1] / pictures:.3f} a picture", end="; ")
    print(f"hours are modelled by {EPOCH_SECONDS:.0f} and {PICTURE_SECONDS}")
    print(f"between training seeds: best checkpoint {noise:.3f}, whole curve {shared:.3f}, besides that {rest:.3f}")
    for stage, (all_of_it, alone) in models.draw_noise(table).items():
        print(f"noise of {stage}: {all_of_it:.3f}, of which trials of a study do not share {alone:.3f}")
    errors = models.validated(table)
    print("cross-validated error of a checkpoint:", ", ".join(f"{name} {error:.3f}" for name, error in errors.items()))
    model = models.fitted(table, min(errors, key=errors.__getitem__))
    for name, several in models.gates_of_all(table, model).items():
        rank, error, top, checkpoint = np.mean([dataclasses.astuple(one) for one in several], axis=0)
        print(f"{name:<17} rank correlation {rank:.2f}; error {error:.3f}, {error / noise:.2f} x noise; {top:.2g} of "
              f"the true top three in its top tenth; error of a checkpoint {checkpoint:.3f}")  # fmt: skip
        passed = {name: [passes(one, noise) for one in several] for name, passes in models.GATES.items()}
        print(f"{'':17} passes", ", ".join(f"{name} {np.mean(shares):.0%}" for name, shares in passed.items()))
    explained = ", ".join(f"{name} {share:.2f}" for name, share in models.dose_explains(table).items())
    print(f"R2 of a checkpoint's score, cross-validated: {explained}")


def draw_figure(found: Mapping[str, Courses]) -> None:
    """The mean value over hours, a panel a landscape."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = {"V1 random": "0.7", "V1 TPE": "0.35", "guide, rejected replaced": "tab:orange", "ours": "tab:blue",
               "ours, both": "tab:red"}  # fmt: skip
    figure, panels = pyplot.subplots(1, len(found), figsize=(10, 3.6), sharey=True, squeeze=False)
    for panel, (title, courses) in zip(panels[0], found.items(), strict=True):
        unit = courses["V1 TPE"][:, HOURS, -1].mean()
        for name, colour in colours.items():
            hours, true = courses[name][:, HOURS].mean(axis=0) / unit, courses[name][:, TRUE]
            mean, error = true.mean(axis=0), true.std(axis=0) / math.sqrt(len(true))
            panel.plot(hours, mean, color=colour, label=name, marker=".")
            panel.fill_between(hours, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        panel.axhline(np.median(courses["V1 TPE"][:, TRUE, -1]), color="0.35", linewidth=0.7, linestyle=":")
        panel.set(title=title, xlabel="hours (20 trials of V1 TPE = 1)")
    panels[0][0].set_ylabel("true score of the LoRA handed over")
    panels[0][0].legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)


# --- what is asked ---


def landscapes_of(table: Table) -> Iterator[tuple[str, Landscape]]:
    errors = models.validated(table)
    best = min(errors, key=errors.__getitem__)
    yield f"regressor ({best})", Regression(table, models.fitted(table, best))
    yield "nearest training", NearestTraining(table)


def compare(table: Table, searches: Mapping[str, Search], args: argparse.Namespace) -> dict[str, Courses]:
    found = {}
    for title, landscape in landscapes_of(table):
        started = time.monotonic()
        results = of_each_seed(functools.partial(courses_of_seed, searches, landscape), args)
        found[title] = {name: np.stack([courses[name] for courses in results]) for name in results[0]}
        print(f"\n{title}: {args.seeds} seeds in {time.monotonic() - started:.0f} s")
        print_courses(found[title])
    return found


def compare_searches(table: Table, args: argparse.Namespace) -> None:
    chosen = {name: how for name, how in SEARCHES.items() if not args.only or name in {"V1 TPE", *args.only}}
    found = compare(table, chosen, args)
    for title, courses in found.items():
        print(f"\n{title}, after {TRIALS} trials, paired:")
        print_gains(courses)
    if not args.only:
        draw_figure(found)


def compare_samplers(table: Table, args: argparse.Namespace) -> None:
    chosen = {name: Search(new) for name, new in SAMPLERS.items() if not args.only or name in {"ours", *args.only}}
    found = compare(table, {"V1 TPE": SEARCHES["V1 TPE"], **chosen}, args)
    for title, courses in found.items():
        print(f"\n{title}, against ours after {TRIALS} trials, paired: handed over; best tried")
        for name in chosen:
            better = (courses[name] - courses["ours"])[:, :, -1]
            print(f"{name:<26}{with_interval(better[:, TRUE])}   {with_interval(better[:, TRIED])}")


def compare_earlier(table: Table, args: argparse.Namespace) -> None:
    for title, landscape in landscapes_of(table):
        results = of_each_seed(functools.partial(earlier_of_seed, landscape), args)
        found = {name: np.stack([courses[name] for courses in results]) for name in results[0]}
        best = np.max([courses[:, TRIED, -1] for courses in found.values()], axis=0)
        print(f"\n{title}: {args.seeds} seeds; trials until one is within 5% of the best; handed over after 20, paired")
        for name, courses in found.items():
            near = courses[:, TRIED] >= 0.95 * best[:, None]
            needed = np.where(near.any(axis=1), near.argmax(axis=1) + 1, np.inf)
            better = (courses - found["ours"])[:, TRUE, -1]
            said = "{:.0f} ({:.0f} to {:.0f})".format(np.median(needed), *interval(needed, np.median))
            print(f"{name:<18} {said:>14}, never {np.isinf(needed).mean():.0%}; {with_interval(better)}")


def compare_rules(table: Table, args: argparse.Namespace) -> None:
    for title, landscape in landscapes_of(table):
        found = np.stack(of_each_seed(functools.partial(stopped_of_seed, args.final, landscape), args))
        print(f"\n{title}: {args.seeds} seeds; hours saved, regret, trials stopped")
        for rule, (saved, regret, ended) in zip(RULES, np.moveaxis(found, 0, -1), strict=True):
            print(f"{rule.name:<28}{saved.mean():6.1%}  {with_interval(regret, 4)}  {ended.mean():5.0%}")


def compare_weights(table: Table, args: argparse.Namespace) -> None:
    from scipy.stats import spearmanr

    last = np.arange(len(table.names)), np.array([len(epochs) - 1 for epochs in table.epochs])
    best, rng = np.argsort(-table.judged[last])[:100], np.random.default_rng(0)
    of_20 = np.array([rng.choice(len(table.names), TRIALS, replace=False) for _ in range(2000)])
    print(f"{len(table.names)} trainings: rank correlation with the judge; what picking the best of {TRIALS} loses")
    for name, scores in scores_of(table.terms(np.ones(table.values.shape[-1]))).items():
        ways = {"last": (scores[last], table.judged[last]), "all": (scores[table.there], table.judged[table.there])}
        ways["judge's best 100"] = scores[last][best], table.judged[last][best]
        said = "  ".join(f"{way} {spearmanr(*pair).statistic:.3f}" for way, pair in ways.items())
        picked = of_20[np.arange(len(of_20)), scores[last][of_20].argmax(axis=1)]
        lost = table.judged[last][of_20].max(axis=1) - table.judged[last][picked]
        print(f"{name:8} {said}  lost {lost.mean():.4f}")


COMPARED: dict[str, Callable[[Table, argparse.Namespace], None]] = {
    "searches": compare_searches, "stopping": compare_rules, "samplers": compare_samplers, "earlier": compare_earlier,
    "weights": compare_weights,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("gates", *COMPARED), default="searches")
    parser.add_argument("--seeds", type=int, default=200, help="of prompts, seeds and samplers")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a way to search, or a sampler; repeat"
    )
    parser.add_argument("--final", action="store_true", help="stopping: the final stage picks")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = Table.read()
    if args.what == "gates":
        return print_gates(table)
    COMPARED[args.what](table, args)


if __name__ == "__main__":
    main()
