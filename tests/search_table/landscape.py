"""What a training of any settings would give: what the nearest training of the table gave, or what a regressor says.

    landscape = NearestTraining(table)          or Regression(table, fitted(table, "extra trees"))
    landscape.curve(params, rng)                the checkpoints of a training with these settings

No model learns from the group `new`, on which GATES judge both. What both do not say is not said.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from search_table.table import FEATURES, NEW, Draw, Table, features_of, root_mean_square, saved_epochs

FOLDS = 10
SHARED_NOISE = 3.0  # times the variance of the noise of a checkpoint
MOST_ROWS = 400  # of a fit of the Gaussian process's length scales: more take minutes
# How far trainings are apart: weights of standardised features of the last checkpoint. Of some hundred weights those
# that tell the best checkpoint's score best, when each setting is told by the nearest other one.
NEAR = {"dose": 2.0, "dim": 0.5, "accumulation": 1.0, "updates": 1.0, "Lion": 0.5}


@dataclass(frozen=True)
class Curve:
    """A training's checkpoints. Its noise is that of pictures of the table's `training` at `columns`."""

    epochs: list[int]
    training: int
    columns: np.ndarray
    true: np.ndarray
    judged: np.ndarray
    shift: np.ndarray  # true minus the true score of the table's training


class Landscape(Protocol):
    table: Table

    def curve(self, params: Mapping[str, Any], rng: np.random.Generator) -> Curve: ...


class NearestTraining:
    """Every setting is trained as the nearest one of the table was."""

    def __init__(self, table: Table, without: str = NEW) -> None:
        self.table = table
        self._known = np.flatnonzero(table.groups() != without)
        last = np.stack([features[-1] for features in table.features()])[self._known]
        self._scale = np.array([NEAR.get(name, 0.0) for name in FEATURES]) / np.maximum(last.std(axis=0), 1e-9)
        self._last = last * self._scale

    def nearest(self, params: Mapping[str, Any], epochs: list[int], rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Number of the training, and of its checkpoints at the same shares. One of equal settings, at random."""
        far = np.linalg.norm(self._last - features_of(params, epochs[-1:]) * self._scale, axis=1)
        training = int(self._known[np.argmin(far + rng.uniform(0, 1e-6, len(far)))])
        theirs = np.array(self.table.epochs[training])
        shares = np.array(epochs) / epochs[-1]
        return training, np.abs(theirs / theirs[-1] - shares[:, None]).argmin(axis=1)

    def curve(self, params: Mapping[str, Any], rng: np.random.Generator) -> Curve:
        epochs = saved_epochs(params)
        training, columns = self.nearest(params, epochs, rng)
        true, judged = (values[training, columns] for values in (self.table.true, self.table.judged))
        return Curve(epochs, training, columns, true, judged, np.zeros(len(columns)))


class Regression:
    """The model's curve, and what a training seed adds to it. Noise comes from the nearest training."""

    def __init__(self, table: Table, model: Any) -> None:
        self.table, self._model, self._near = table, model, NearestTraining(table)

    def curve(self, params: Mapping[str, Any], rng: np.random.Generator) -> Curve:
        epochs = saved_epochs(params)
        training, columns = self._near.nearest(params, epochs, rng)
        score, judged = self._model.predict(features_of(params, epochs)).T
        seeds = self.table.deviations
        true = with_seed(score, epochs, *seeds[rng.integers(len(seeds))])
        return Curve(epochs, training, columns, true, np.clip(judged, 0, 1), true - self.table.true[training, columns])


def with_seed(score: np.ndarray, epochs: list[int], shares: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return np.clip(score + np.interp(np.array(epochs) / epochs[-1], shares, deviation), 0, 1)


# --- models ---


@dataclass(frozen=True)
class Rows:
    """The table's checkpoints: features, score and judge's overall, and which training and setting each is of."""

    x: np.ndarray
    y: np.ndarray
    training: np.ndarray
    setting: np.ndarray

    @classmethod
    def of(cls, table: Table, chosen: np.ndarray) -> Rows:
        features, settings, counts = table.features(), table.settings(), [len(epochs) for epochs in table.epochs]
        truth = np.stack([table.true, table.judged], axis=-1)
        return cls(
            np.concatenate([features[n] for n in chosen]),
            np.concatenate([truth[n, : counts[n]] for n in chosen]),
            np.concatenate([np.full(counts[n], n) for n in chosen]),
            np.concatenate([np.full(counts[n], settings[n]) for n in chosen]),
        )


class ExtraTrees:
    def __init__(self, min_samples_leaf: int = 2) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        self._forest = ExtraTreesRegressor(100, min_samples_leaf=min_samples_leaf, random_state=0)

    def fit(self, x: np.ndarray, y: np.ndarray) -> ExtraTrees:
        self._trees = [one.tree_ for one in self._forest.fit(x, y).estimators_]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """As the forest's own, which takes five times as long for a few rows."""
        x = x.astype(np.float32)
        return np.mean([tree.predict(x)[:, :, 0] for tree in self._trees], axis=0)


class GaussianProcess:
    """Length scales are learnt from some rows, the values from all.

    A training's checkpoints share what its seed did, so that together they say a third of what as many alone would.
    """

    def __init__(self) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        from sklearn.preprocessing import StandardScaler

        scales = Matern(np.full(len(FEATURES), 2.0), (0.2, 100.0), nu=2.5)
        kernel = ConstantKernel(1.0, (0.1, 100.0)) * scales + WhiteKernel(0.1, (1e-3, 1.0))
        self._scaler, self._new = StandardScaler(), functools.partial(GaussianProcessRegressor, normalize_y=True)
        self._kernel = kernel

    def fit(self, x: np.ndarray, y: np.ndarray) -> GaussianProcess:
        x = self._scaler.fit_transform(x)
        some = np.random.default_rng(0).permutation(len(x))[:MOST_ROWS]
        learnt = self._new(self._kernel, random_state=0).fit(x[some], y[some]).kernel_
        learnt.k2.noise_level *= SHARED_NOISE
        self._fitted = self._new(learnt, optimizer=None).fit(x, y)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._fitted.predict(self._scaler.transform(x))


MODELS: dict[str, Callable[[], Any]] = {"Gaussian process": GaussianProcess, "extra trees": ExtraTrees}


def cross_validated(new_model: Callable[[], Any], rows: Rows) -> np.ndarray:
    """Predictions for rows whose settings the model did not learn from."""
    from sklearn.model_selection import GroupKFold

    found = np.zeros_like(rows.y)
    folds = GroupKFold(min(FOLDS, len(np.unique(rows.setting))))
    for learnt, asked in folds.split(rows.x, groups=rows.setting):
        found[asked] = new_model().fit(rows.x[learnt], rows.y[learnt]).predict(rows.x[asked])
    return found


def learnt_from(table: Table) -> Rows:
    return Rows.of(table, np.flatnonzero(table.groups() != NEW))


def validated(table: Table) -> dict[str, float]:
    """Each model's root mean square error of the score, cross-validated."""
    rows = learnt_from(table)
    return {name: root_mean_square((cross_validated(new, rows) - rows.y)[:, 0]) for name, new in MODELS.items()}


def fitted(table: Table, name: str) -> Any:
    rows = learnt_from(table)
    return MODELS[name]().fit(rows.x, rows.y)


# --- gates, on settings that nothing was learnt from ---


@dataclass(frozen=True)
class Gates:
    rank: float  # Spearman's rank correlation over trainings, of the best checkpoint's score
    error: float  # root mean square, of that score
    top: int  # how many of the true top three are in the predicted top tenth
    checkpoint_error: float  # root mean square, over all checkpoints


# What a regressor must pass. Noise: best_noise().
GATES: dict[str, Callable[[Gates, float], bool]] = {
    "rank correlation": lambda found, noise: found.rank >= 0.85,
    "error": lambda found, noise: found.error <= 1.2 * noise,
    "top three": lambda found, noise: found.top == 3,
}


def gates(told: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> Gates:
    """`told` and `true`: for each setting the curves, shape (curves, checkpoints), that a training may have."""
    from scipy.stats import spearmanr

    best_told, best_true = (np.array([curves.max(axis=1).mean() for curves in every]) for every in (told, true))
    means = (np.concatenate([curves.mean(axis=0) for curves in every]) for every in (told, true))
    tenth = np.argsort(-best_told)[: max(1, round(len(told) / 10))]
    return Gates(
        float(spearmanr(best_told, best_true).statistic),
        root_mean_square(best_told - best_true),
        len({*tenth} & {*np.argsort(-best_true)[:3]}),
        root_mean_square(np.subtract(*means)),
    )


def gates_of_all(table: Table, model: Any, draws: int = 200) -> dict[str, list[Gates]]:
    """For both ways to look up, and for a perfect model, which does not know the training seed: `draws` of it."""
    new, rng, near = np.flatnonzero(table.groups() == NEW), np.random.default_rng(0), NearestTraining(table)
    params, epochs = [table.params[n] for n in new], [table.epochs[n] for n in new]
    true = [table.true[n : n + 1, : len(saved)] for n, saved in zip(new, epochs, strict=True)]
    told = [
        np.stack([with_seed(score, saved, *seed) for seed in table.deviations])
        for score, saved in (
            (model.predict(features_of(*one))[:, 0], one[1]) for one in zip(params, epochs, strict=True)
        )
    ]
    drawn = [rng.integers(len(table.deviations), size=len(new)) for _ in range(draws)]
    return {
        "regressor": [gates(told, true)],
        "nearest training": [gates([near.curve(one, rng).true[None] for one in params], true)],
        "perfect": [gates(told, [curves[[n]] for curves, n in zip(told, seeds, strict=True)]) for seeds in drawn],
    }


def best_noise(table: Table) -> float:
    """Standard deviation of the best checkpoint's score between training seeds: what no model can know."""
    best, settings = np.nanmax(table.true, axis=1), table.settings()
    deviations = []
    for setting in np.unique(settings):
        same = best[settings == setting]
        if len(same) > 1:
            deviations += list((same - same.mean()) * np.sqrt(len(same) / (len(same) - 1)))
    return root_mean_square(deviations) if deviations else 0.0


def draw_noise(table: Table, draws: int = 100) -> dict[str, tuple[float, float]]:
    """Of screening and confirmation: deviation of a score from the true one, all of it and what trials do not share."""
    found = {}
    for stage in ("screen", "confirm"):
        plans = [getattr(Draw.of(table, seed), stage) for seed in range(draws)]
        errors = np.stack([table.scores(plan.times()) - table.true for plan in plans])
        alone = errors - np.nanmean(errors, axis=(1, 2), keepdims=True)
        found[stage] = (float(np.nanstd(errors)), float(np.nanstd(alone)))
    return found


def dose_explains(table: Table) -> dict[str, float]:
    """R2, cross-validated by setting, of the score from one or two features alone (trees), over all checkpoints."""
    rows = learnt_from(table)
    x = dict(zip(FEATURES, rows.x.T, strict=True))
    x["dose without root of dim"] = x["dose"] - x["dim"] / 2
    found = {}
    for names in (("dose without root of dim",), ("dose",), ("dose", "text dose"), ("updates",), ("share",)):
        some = dataclasses.replace(rows, x=np.stack([x[name] for name in names], axis=1))
        error = (cross_validated(functools.partial(ExtraTrees, 5), some) - rows.y)[:, 0]
        found[" + ".join(names)] = 1 - float(np.mean(error**2) / np.var(rows.y[:, 0]))
    return found
