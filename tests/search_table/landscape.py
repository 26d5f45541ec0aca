"""What a training of any settings would give: what the nearest training of the table gave, or what a regressor says.

    landscape = NearestTraining(table)          or Regression(table, fitted(table, "extra trees"))
    landscape.curve(params, rng)                the checkpoints of a training with these settings

No model learns from the group `new`, on which gates() judges both. What both do not say is not said.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from search_table.table import FEATURES, NEW, Draw, Params, Table, features_of, root_mean_square, saved_epochs

FOLDS = 10
MOST_ROWS = 400  # of a fit of the Gaussian process's length scales: more take minutes
GATES = {"rank correlation": 0.85, "error": 1.2, "true top three in its top tenth": 3}
# How far trainings are apart: weights of standardised features of the last checkpoint. Of some hundred weights those
# that tell the best checkpoint's score best, when each setting is told by the nearest other one.
NEAR = {"dose": 2.0, "text dose": 0.5, "ratio": 0.5, "dim": 1.0, "accumulation": 0.5, "Lion": 2.0}


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
    """The model's curve, and what the training seed adds to all of it. Noise comes from the nearest training."""

    def __init__(self, table: Table, model: Any) -> None:
        self.table, self._model, self._near = table, model, NearestTraining(table)
        self._residual = table.seed_noise()[0]

    def curve(self, params: Mapping[str, Any], rng: np.random.Generator) -> Curve:
        epochs = saved_epochs(params)
        training, columns = self._near.nearest(params, epochs, rng)
        score, judged = self._model.predict(features_of(params, epochs)).T
        true = np.clip(score + rng.normal(0, self._residual), 0, 1)
        return Curve(epochs, training, columns, true, np.clip(judged, 0, 1), true - self.table.true[training, columns])


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
    """Length scales are learnt from some rows, the values from all."""

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


def gates(table: Table, predict: Callable[[Params], np.ndarray]) -> Gates:
    """`predict` gives a curve of scores."""
    from scipy.stats import spearmanr

    new = np.flatnonzero(table.groups() == NEW)
    told = [predict(table.params[n]) for n in new]
    true = [table.true[n, : len(curve)] for n, curve in zip(new, told, strict=True)]
    best_told, best_true = (np.array([curve.max() for curve in curves]) for curves in (told, true))
    tenth = np.argsort(-best_told)[: max(1, round(len(new) / 10))]
    return Gates(
        float(spearmanr(best_told, best_true).statistic),
        root_mean_square(best_told - best_true),
        len({*tenth} & {*np.argsort(-best_true)[:3]}),
        root_mean_square(np.concatenate(told) - np.concatenate(true)),
    )


def gates_of_both(table: Table, model: Any) -> dict[str, Gates]:
    near, rng = NearestTraining(table), np.random.default_rng(0)
    return {
        "regressor": gates(table, lambda params: model.predict(features_of(params, saved_epochs(params)))[:, 0]),
        "nearest training": gates(table, lambda params: near.curve(params, rng).true),
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
    x["dose x root of dim"] = x["dose"] + x["dim"] / 2  # alpha / root of dim, as rsLoRA scales (arXiv 2312.03732)
    found = {}
    for names in (("dose",), ("dose x root of dim",), ("dose", "text dose"), ("updates",), ("share",)):
        some = dataclasses.replace(rows, x=np.stack([x[name] for name in names], axis=1))
        error = (cross_validated(functools.partial(ExtraTrees, 5), some) - rows.y)[:, 0]
        found[" + ".join(names)] = 1 - float(np.mean(error**2) / np.var(rows.y[:, 0]))
    return found
