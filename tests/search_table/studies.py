"""Whole studies on the table: real Optuna studies and samplers, the script's early stopping, and its final stage."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import TrialState
from search_table.landscape import Curve, Landscape
from search_table.make_table import SAVE_EVERY
from search_table.table import CONFIG, Draw, Params, Plan

import optuna_hyperparameter_search as search

TRIALS = 20
EPOCH_SECONDS = 30 * 60 / 16  # 16 epochs in half an hour
PICTURE_SECONDS = 1.0  # on a consumer card; 0.41 on an H100


# --- one training, scored ---


@dataclass(frozen=True)
class Tried:
    """A trial that was trained. One that was stopped has no value."""

    hours: float
    curve: Curve
    seen: int  # checkpoints that were trained
    best: int  # of them, by screening
    value: float = -math.inf

    @property
    def lora(self) -> tuple[int, int]:
        """The table's training and checkpoint that lend their pictures."""
        return self.curve.training, int(self.curve.columns[self.best])

    @property
    def shift(self) -> float:
        return float(self.curve.shift[self.best])


class Scores:
    """The scores of the whole table on one seed's prompts and seeds."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self.landscape, self.seed, self.draw = landscape, seed, Draw.of(landscape.table, seed)
        self.screened, self.confirmed = map(self._all, (self.draw.screen, self.draw.confirm))
        self._many = functools.cache(lambda rounds: self._plan(rounds).resampled())
        self._rounds = functools.cache(lambda rounds: self._all(self._plan(rounds)))
        self._resampled: dict[tuple[int, int, int], np.ndarray] = {}

    def _all(self, plan: Plan) -> np.ndarray:
        return self.landscape.table.scores(plan.times())

    def _plan(self, rounds: int) -> Plan:
        """The confirmation, or so many rounds of the final stage together."""
        return self.draw.rounds[rounds - 1] if rounds else self.draw.confirm

    def train(self, params: Params, number: int) -> Curve:
        return self.landscape.curve(params, np.random.default_rng((self.seed, number)))

    def screen(self, curve: Curve) -> np.ndarray:
        return np.clip(self.screened[curve.training, curve.columns] + curve.shift, 0, 1)

    def confirm(self, curve: Curve, best: int) -> float:
        return float(np.clip(self.confirmed[curve.training, curve.columns[best]] + curve.shift[best], 0, 1))

    def final(self, tried: Tried, rounds: int) -> float:
        return float(self._rounds(rounds)[tried.lora] + tried.shift)

    def resampled(self, tried: Tried, rounds: int = 0) -> np.ndarray:
        key = (*tried.lora, rounds)
        if key not in self._resampled:
            self._resampled[key] = self.landscape.table.resampled(*tried.lora, self._plan(rounds), self._many(rounds))
        return self._resampled[key] + tried.shift

    def error(self, tried: Tried) -> float:
        return float(np.std(self.resampled(tried)))

    def hours(self, epochs: int, checkpoints: int, *, confirmed: bool = True) -> float:
        pictures = checkpoints * self.draw.screen.size() + confirmed * self.draw.confirm.size()
        return (epochs * EPOCH_SECONDS + pictures * PICTURE_SECONDS) / 3600


# --- early stopping ---


@dataclass(frozen=True)
class Rule:
    """When a training is stopped: it is asked at these percents of its epochs."""

    name: str
    pruner: Callable[[], optuna.pruners.BasePruner]
    asked: tuple[int, ...]
    confirms: bool = False  # the best checkpoint of a stopped training is confirmed, as if it were whole


def keep_rule(kept: float, share: int, whole: int) -> Rule:
    """The script's own, with other numbers."""
    early = search.EarlyStopping({"keep_percent": kept, "whole_trials": whole, "at_percent": share}, SAVE_EVERY, print)
    return Rule(f"keep {kept:.0f}% at {share}%, after {whole}", early.pruner, (share,))


OUR_RULE = keep_rule(*(CONFIG["stop_early"][name] for name in ("keep_percent", "at_percent", "whole_trials")))


class PatientPruner(optuna.pruners.BasePruner):
    """Stops when the running best has not risen for some steps. (Optuna's asks that values fall.)"""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        best = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
        return len(best) > self._steps and best[-1] <= best[-1 - self._steps]


def try_training(trial: optuna.Trial, curve: Curve, scores: Scores, rule: Rule | None) -> Tried:
    """Train and score a trial, and tell its study."""
    epochs, screened = curve.epochs[-1], scores.screen(curve)
    results = [
        {"epoch": epoch, "score": score} for epoch, score in zip(curve.epochs, map(float, screened), strict=True)
    ]
    seen = len(results)
    for share in rule.asked if rule else ():
        search.EarlyStopping.report(trial, results, share)
        if trial.should_prune():
            seen = sum(100 * epoch <= share * epochs for epoch in curve.epochs)
            break
    else:
        if rule:
            search.EarlyStopping.report(trial, results)
    confirmed = seen == len(results) or rule is None or rule.confirms
    best = int(screened[:seen].argmax())
    value = scores.confirm(curve, best) if confirmed else -math.inf
    if confirmed:
        trial.study.tell(trial, value)
    else:
        trial.study.tell(trial, state=TrialState.PRUNED)
    return Tried(scores.hours(curve.epochs[seen - 1], seen, confirmed=confirmed), curve, seen, best, value)


# --- one study ---


@dataclass(frozen=True)
class Search:
    """A way to search."""

    sampler: Callable[[int], optuna.samplers.BaseSampler]
    suggest: Callable[[optuna.Trial], Params] = search.suggest_hyperparameters
    rejected: str = "trained"  # what is not safe; or it "counts", or is "replaced"
    rule: Rule | None = None
    first: Sequence[Params] = ()  # enqueued


def run_study(how: Search, scores: Scores, trials: int = TRIALS) -> list[Tried | None]:
    """The trials that count; None for one that was rejected."""
    pruner = how.rule.pruner() if how.rule else optuna.pruners.NopPruner()
    study = optuna.create_study(sampler=how.sampler(scores.seed), pruner=pruner, direction="maximize")
    for params in how.first:
        study.enqueue_trial(params)
    tried: list[Tried | None] = []
    while len(tried) < trials:
        trial = study.ask()
        params = how.suggest(trial)
        if how.rejected != "trained" and not search.check_safety_constraints(params)[0]:
            study.tell(trial, state=TrialState.PRUNED)
            tried += [None] if how.rejected == "counts" else []
        else:
            tried.append(try_training(trial, scores.train(params, trial.number), scores, how.rule))
    return tried


def choose_finalists(told: Sequence[Tried], scores: Scores) -> list[Tried]:
    """As search.choose_finalists."""
    ranked = sorted(told, key=lambda tried: -tried.value)[: search.FINALISTS_AT_MOST]
    errors = [scores.error(tried) for tried in ranked]
    return [
        tried
        for place, tried in enumerate(ranked)
        if place < search.FINALISTS_AT_LEAST
        or ranked[0].value - tried.value <= 2 * math.hypot(errors[0], errors[place])
    ]


def final_stage(finalists: Sequence[Tried], scores: Scores) -> tuple[Tried, float]:
    """As search.FinalStage: the winner, and the hours that the stage takes."""
    left, size, pictures = list(finalists), scores.draw.rounds[0].size(), 0
    for rounds in range(1, len(scores.draw.rounds) + 1):
        pictures += size * (len(left) + 1)  # the base model draws each round once
        leader = max(left, key=lambda tried: scores.final(tried, rounds))
        first = scores.resampled(leader, rounds)
        left = [t for t in left if np.percentile(scores.resampled(t, rounds) - first, search.LOSES_SURELY) >= 0]
        if len(left) == 1:
            break
    pictures += len(search.STRENGTHS) * size
    return max(left, key=lambda tried: scores.final(tried, rounds)), pictures * PICTURE_SECONDS / 3600


COURSE = ("hours", "true", "judged", "tried")  # of the LoRA handed over the true value; of the best one tried, too


def course_of(every: Sequence[Tried | None], scores: Scores, *, final: bool = False) -> np.ndarray:
    """COURSE after each trial, were it the last; shape (COURSE, trials)."""
    hours, best, told, found, seen = 0.0, 0.0, [], [], {}
    for one in every:
        if one:
            hours, best = hours + one.hours, max(best, float(one.curve.true[: one.seen].max()))
            told += [one] if one.value > -math.inf else []
        pick, more = max(told, key=lambda tried: tried.value, default=None), 0.0
        if final and pick:
            finalists = choose_finalists(told, scores)
            key = tuple(map(id, finalists))
            if key not in seen:
                seen[key] = final_stage(finalists, scores)
            pick, more = seen[key]
        values = (pick.curve.true[pick.best], pick.curve.judged[pick.best]) if pick else (0.0, 0.0)
        found.append((hours + more, *map(float, values), best))
    return np.array(found).T
