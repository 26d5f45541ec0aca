"""Samplers that compete with the search's own, over the same space and constraints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial
from search_table.make_table import ends_warm_up, updates
from search_table.table import Params

import optuna_hyperparameter_search as search

NEVER = 1_000_000  # trials before TPE begins
GP_DRAWS = 512  # feasible ones, of which the Gaussian process takes the best


def first_sampler(seed: int) -> search.FeasibleTPESampler:
    """The search's own, as the search makes it."""
    return search.FeasibleTPESampler(seed, prefers=ends_warm_up)


class StartUpSampler(search.FeasibleTPESampler):
    """TPE begins after another number of trials."""

    def __init__(self, seed: int, start_up: int) -> None:
        super().__init__(seed, prefers=ends_warm_up)
        self._start_up = start_up

    def _tpe(self, number: int, *, multivariate: bool) -> optuna.samplers.TPESampler:
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                n_startup_trials=self._start_up, multivariate=multivariate, constant_liar=True, seed=seed
            )


class NoBandsSampler(StartUpSampler):
    """No bands are dealt."""

    def _dealt_ratio(self, study: optuna.Study, trial: FrozenTrial, rng: np.random.Generator) -> Params:
        return {}


class FeasibleRandomSampler(NoBandsSampler):
    """Uniform draws of what may be trained."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, NEVER)


class BandSampler(search.FeasibleTPESampler):
    """TPE proposes the ratio too, and proposals outside the dealt band are drawn again."""

    _band: tuple[float, ...] | None = None

    def _dealt_ratio(self, study: optuna.Study, trial: FrozenTrial, rng: np.random.Generator) -> Params:
        ratio = super()._dealt_ratio(study, trial, rng).get("network_alpha_ratio")
        self._band = next((band for band in set(search.BAND_BLOCK) if ratio in band), None)
        return {}

    def _is_possible(self, values: Params) -> bool:
        ratio = round(values["network_alpha_ratio"], 2)
        return (self._band is None or ratio in self._band) and super()._is_possible(values)


class UnconditionalSampler(search.FeasibleTPESampler):
    """Leaves the cycles of a schedule, which not every trial has, to sample_independent()."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(search.SEARCH_SPACE)


class DoseSampler(UnconditionalSampler):
    """TPE sees the dose, ratio x learning rate x updates, in place of the learning rate, which follows from it."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Params:
        rng = np.random.default_rng((self.seed, trial.number))
        dealt = self._dealt_ratio(study, trial, rng)
        space = {name: one for name, one in search_space.items() if name not in dealt and name != "learning_rate"}
        space["dose"] = FloatDistribution(1e-4, 1.0, log=True)
        seen, tpe = with_doses(study), self._tpe(trial.number, multivariate=True)
        seen.ask()
        asked = seen.get_trials(deepcopy=False)[-1]
        for _ in range(search.TPE_TRIES):
            drawn = tpe.sample_relative(seen, asked, space)
            if not drawn:
                break
            values = search.V2_1.complete({**dealt, **drawn})
            values["learning_rate"] = values.pop("dose") / (values["network_alpha_ratio"] * updates(values))
            limits = search_space["learning_rate"]
            if (
                limits.low <= values["learning_rate"] <= limits.high
                and self._is_possible(values)
                and self.prefers(values)
            ):
                return {name: values[name] for name in search_space}
        while True:
            drawn = {name: search._draw(one, rng) for name, one in search_space.items() if name not in dealt}
            if self._is_possible({**dealt, **drawn}) and self.prefers(search.V2_1.complete({**dealt, **drawn})):
                return {**dealt, **drawn}


def with_doses(study: optuna.Study) -> optuna.Study:
    """The study's trials with a dose in place of a learning rate."""
    seen = optuna.create_study(direction="maximize")
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            dose = trial.params["network_alpha_ratio"] * trial.params["learning_rate"] * updates(trial.params)
            distributions = {**trial.distributions, "dose": FloatDistribution(1e-4, 1.0, log=True)}
            params = {**trial.params, "dose": dose}
            del params["learning_rate"], distributions["learning_rate"]
            seen.add_trial(
                optuna.trial.create_trial(
                    state=trial.state, value=trial.value, params=params, distributions=distributions,
                    intermediate_values=trial.intermediate_values,
                )
            )  # fmt: skip
    return seen


class FeasibleGPSampler(UnconditionalSampler):
    """Optuna's Gaussian process; its acquisition function chooses between feasible draws in the dealt bands."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Params:
        rng = np.random.default_rng((self.seed, trial.number))
        dealt = self._dealt_ratio(study, trial, rng)
        draws: list[Params] = []
        while len(draws) < GP_DRAWS:
            values = {name: search._draw(one, rng) for name, one in search_space.items() if name not in dealt}
            values |= dealt
            if self._is_possible(values) and self.prefers(search.V2_1.complete(values)):
                draws.append(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process = ChoosingGPSampler(draws, search_space, int(rng.integers(1 << 31)))
            return process.sample_relative(study, trial, search_space) or draws[0]


class ChoosingGPSampler(optuna.samplers.GPSampler):
    """Optuna's, with the acquisition function's best of some draws in place of its best anywhere."""

    def __init__(self, draws: list[Params], search_space: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=10)
        self._trials = [
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE, value=0.0, params=draw, distributions=search_space
            )
            for draw in draws
        ]

    def _optimize_acqf(self, acqf: Any, best_params: np.ndarray | None) -> np.ndarray:
        normalised = acqf.search_space.get_normalized_params(self._trials)
        return normalised[int(acqf.eval_acqf_no_grad(normalised).argmax())]


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "ours": first_sampler,
    "random in the dealt bands": lambda seed: StartUpSampler(seed, NEVER),
    "random, no bands": FeasibleRandomSampler,
    "TPE, no bands": lambda seed: NoBandsSampler(seed, 10),
    "TPE after 5": lambda seed: StartUpSampler(seed, 5),
    "TPE after 7": lambda seed: StartUpSampler(seed, 7),
    "TPE after 14": lambda seed: StartUpSampler(seed, 14),
    "band rejected": lambda seed: BandSampler(seed, prefers=ends_warm_up),
    "dose": lambda seed: DoseSampler(seed, prefers=ends_warm_up),
    "Gaussian process": lambda seed: FeasibleGPSampler(seed, prefers=ends_warm_up),
}
