"""The table of trained LoRAs: its draws, whole studies on it, and what a regressor learns from it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import benchmark_search
import numpy as np
import optuna
import pytest
from benchmark_sampler import band
from search_table import landscape, make_table, samplers, studies
from search_table.landscape import NearestTraining
from search_table.studies import Scores, course_of, keep_rule, run_study
from search_table.table import (
    AVERAGED,
    CONFIG,
    WEIGHTS,
    Draw,
    Plan,
    Table,
    features_of,
    learning_rate_shape,
    saved_epochs,
)
from small_world import worlds

import optuna_hyperparameter_search as search

LOOKED_UP = ("regressor", "nearest training")
SHAPE = (4, 2, 3)  # subject prompts, seeds, plain prompts


def made_table(trainings: int = 40, noise: float = 0.0, new: int = 0) -> Table:
    """The score rises with the dose, and falls again; at no noise all pictures of a checkpoint are alike."""
    rng, study = np.random.default_rng(0), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    params = [search.suggest_hyperparameters(study.ask()) for _ in range(trainings)]
    epochs = [saved_epochs(one) for one in params]
    pictures, most = SHAPE[0] * SHAPE[1] + SHAPE[2], max(map(len, epochs))
    values = np.full((len(AVERAGED), trainings, most, pictures), np.nan)
    about = np.arange(pictures) < SHAPE[0] * SHAPE[1]
    for number, (one, saved) in enumerate(zip(params, epochs, strict=True)):
        dose = features_of(one, saved)[:, :1]
        quality = np.exp(-((dose + 6) ** 2) / 4) + rng.normal(0, noise, (len(saved), pictures))
        found = np.stack([quality, 0.5 + 0 * quality, 0 * quality, 1 + 0 * quality, 1 + 0 * quality])
        found[:3, :, ~about], found[3][:, about] = np.nan, np.nan
        values[:, number, : len(saved)] = found
    base = np.array([np.where(about, 0.0, np.nan), np.where(about, 0.5, np.nan)])
    names = [f"{'new' if number < new else 'v21'}-{number:03d}" for number in range(trainings)]
    crossed, judged = {"m_crossed": 0.0, "plain_crossed": 0.0}, np.ones((trainings, most))
    return Table(names, params, epochs, np.ones((trainings, 2)), values, base, SHAPE, crossed, judged, about)


@pytest.fixture(scope="module")
def table() -> Table:
    """As it is in the repository."""
    return Table.read()


# --- draws ---


def raw_of(table: Table, training: int, checkpoint: int) -> dict[str, Any]:
    """As a stage of the search keeps it; a picture's name begins with its prompt's."""
    prompts, seeds, _ = table.shape
    images = []
    for number, column in enumerate(table.values[:, training, checkpoint].T):
        about = number < prompts * seeds
        name = f"{number // seeds:02d}-s{number % seeds}" if about else f"plain{number:02d}-s0"
        known = {key: value for key, value in zip(AVERAGED, column, strict=True) if math.isfinite(value)}
        images.append({"name": name, "subject": about, **known})
    return {**search.average(images), "spread": None, "images": images}


def everything_once(table: Table) -> Plan:
    prompts, seeds, plain = table.shape
    every = np.eye(prompts * seeds + plain)
    return Plan(every[: prompts * seeds].reshape(prompts, seeds, -1).sum(axis=1), every[prompts * seeds :])


def test_a_draw_of_everything_has_the_score_that_the_search_computes(table: Table) -> None:
    times = everything_once(table).times()
    for training in (0, len(table.names) - 1):
        raw = raw_of(table, training, 2)
        expected = search.combine(search.terms_of(raw, table.anchors(times)), WEIGHTS)
        assert table.scores(times)[training, 2] == pytest.approx(expected)
        assert table.true[training, 2] == pytest.approx(expected)


def test_resampled_scores_are_the_searchs_own(table: Table) -> None:
    plan, raw = everything_once(table), raw_of(table, 0, 2)
    expected = search.resampled_scores(raw, table.anchors(plan.times()), WEIGHTS)
    assert table.resampled(0, 2, plan, plan.resampled()) == pytest.approx(expected)


def test_a_draw_has_as_many_pictures_as_the_scoring_config_says(table: Table) -> None:
    draw = Draw.of(table, 7)
    for plan, stage in ((draw.screen, "screen"), (draw.confirm, "confirm"), (draw.rounds[0], "final")):
        counts = CONFIG[stage]
        assert plan.size() == counts["prompts"] * counts["seeds"] + counts["plain_prompts"]
    assert [plan.size() for plan in draw.rounds] == [draw.rounds[0].size() * count for count in (1, 2, 3)]
    prompts, seeds, _ = table.shape
    shown = [plan.prompts[:, : prompts * seeds].reshape(-1, prompts, seeds) for plan in draw.rounds]
    assert all(np.array_equal(some.any(axis=2), shown[0].any(axis=2)) for some in shown)  # the same prompts
    assert len({tuple(seeds) for seeds in shown[2].sum(axis=1)}) > 1  # each with seeds of its own


def test_more_trainings_would_draw_the_tables_own_pictures(tmp_path: Path) -> None:
    worlds.make_world("middle", tmp_path)
    images = sorted(map(str, (tmp_path / "images").glob("*.png")))
    jobs = make_table.table_jobs({"images": images, "subject": "luca", "confirm": [{}]})
    with np.load(make_table.PICTURES) as known:
        assert [job["prompt"] for job in jobs] == known["prompts"].tolist()
    assert len({job["seed"] for job in jobs if job["subject"]}) == make_table.COUNTS["seeds"]


def test_a_training_without_more_checkpoints_has_no_score_there(table: Table) -> None:
    for scores, epochs in zip(table.true, table.epochs, strict=True):
        assert np.isfinite(scores).sum() == len(epochs)


def test_draws_spread_around_the_true_score(table: Table) -> None:
    scores = np.stack([table.scores(Draw.of(table, seed).confirm.times())[:, 2] for seed in range(100)])
    error = scores.std(axis=0) / 10
    assert np.mean(np.abs(scores.mean(axis=0) - table.true[:, 2]) < 4 * error) > 0.9


@pytest.mark.parametrize("scheduler", ["cosine", "cosine_with_restarts", "polynomial"])
def test_the_learning_rate_is_shaped_as_the_trainer_shapes_it(scheduler: str) -> None:
    torch, optimization = pytest.importorskip("torch"), pytest.importorskip("diffusers.optimization")
    params = {"lr_scheduler": scheduler, "lr_scheduler_num_cycles": 2, "lr_warmup_steps": 100, "max_train_epochs": 12,
              "gradient_accumulation_steps": 2}  # fmt: skip
    count, warm_up = make_table.updates(params), make_table.warm_up(params)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = optimization.get_scheduler(scheduler, optimizer, None, warm_up, count, num_cycles=2)
    expected = []
    for _ in range(count):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert learning_rate_shape(params) == pytest.approx(np.array(expected), abs=1e-6)


# --- studies ---


@pytest.mark.parametrize("name", benchmark_search.SEARCHES)
def test_a_way_to_search_counts_its_trials_exactly(name: str) -> None:
    tried = run_study(benchmark_search.SEARCHES[name], Scores(NearestTraining(made_table()), 3))
    assert len(tried) == studies.TRIALS
    assert (None in tried) is (name == "guide, rejected count")


@pytest.mark.parametrize("final", [False, True])
def test_without_noise_the_best_training_is_handed_over(final: bool) -> None:
    scores = Scores(NearestTraining(made_table()), 1)
    course = course_of(run_study(benchmark_search.SEARCHES["ours"], scores), scores, final=final)
    assert course[benchmark_search.TRUE] == pytest.approx(course[benchmark_search.TRIED])
    assert np.all(np.diff(course[benchmark_search.HOURS]) > 0)


def test_a_stopped_training_saves_hours_and_is_not_handed_over() -> None:
    scores, ours = Scores(NearestTraining(made_table(noise=0.3)), 2), benchmark_search.SEARCHES["V2.1 random feasible"]
    whole = [one for one in run_study(ours, scores) if one]
    tried = [one for one in run_study(dataclasses.replace(ours, rule=keep_rule(50, 50, 5)), scores) if one]
    places = [place for place, one in enumerate(tried) if one.seen < len(one.curve.epochs)]
    assert places and min(places) >= 5
    for place in places:
        stopped = tried[place]
        assert stopped.value == -math.inf
        assert stopped.curve.epochs[stopped.seen - 1] == stopped.curve.epochs[-1] / 2
        assert stopped.hours < 0.6 * whole[place].hours


def test_the_final_stage_costs_pictures_and_drops_clear_losers() -> None:
    scores = Scores(NearestTraining(made_table()), 1)
    tried = [one for one in run_study(benchmark_search.SEARCHES["ours"], scores) if one]
    tried.sort(key=lambda one: -one.value)
    size = scores.draw.rounds[0].size()
    winner, hours = studies.final_stage([tried[0], tried[-1]], scores)
    assert winner is tried[0]
    assert hours * 3600 / studies.PICTURE_SECONDS == size * (3 + len(search.STRENGTHS))  # one round of two and the base


def test_who_never_gets_there_needs_infinite_hours() -> None:
    course = np.zeros((2, len(studies.COURSE), 3))
    course[:, 0] = [1, 2, 3]
    course[0, 1] = [0.1, 0.6, 0.2]
    assert list(benchmark_search.hours_to(0.5, course)) == [2, math.inf]


# --- samplers ---


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_proposes_what_may_be_trained_in_the_guides_bands(name: str) -> None:
    if name == "Gaussian process":
        pytest.importorskip("scipy", reason="of Optuna's Gaussian process (pip install scipy)")
    study = optuna.create_study(sampler=samplers.SAMPLERS[name](3), direction="maximize")
    bands: Counter[str] = Counter()
    for _ in range(studies.TRIALS):
        trial = study.ask()
        params = search.suggest_hyperparameters(trial)
        assert search.check_safety_constraints(params)[0] and make_table.ends_warm_up(params)
        bands[band(params["network_alpha_ratio"])] += 1
        study.tell(trial, params["network_alpha_ratio"])
    assert name.endswith("no bands") or bands == {"low": 6, "mid": 8, "high": 6}


# --- the regressor ---


@pytest.mark.filterwarnings("ignore:.*optimal value found")
@pytest.mark.parametrize("name", landscape.MODELS)
def test_a_regressor_learns_a_table_without_noise(name: str) -> None:
    pytest.importorskip("sklearn", reason="of the search table's regressors (pip install scipy scikit-learn)")
    table = made_table(80, new=20)
    (found,), (near,) = (landscape.gates_of_all(table, landscape.fitted(table, name))[of] for of in LOOKED_UP)
    assert found.rank > 0.8
    assert found.checkpoint_error < near.checkpoint_error


@pytest.mark.filterwarnings("ignore:.*optimal value found")
def test_a_perfect_model_fails_a_gate_by_the_noise_of_training_seeds_alone() -> None:
    pytest.importorskip("sklearn", reason="of the search table's regressors (pip install scipy scikit-learn)")
    quiet, noisy = made_table(80, new=20), made_table(80, new=20)
    deviations = [(np.array([0.0, 1.0]), np.full(2, shift)) for shift in (-0.3, 0.3)]
    object.__setattr__(noisy, "deviations", deviations)
    perfect = [
        landscape.gates_of_all(table, landscape.fitted(table, "extra trees"))["perfect"] for table in (quiet, noisy)
    ]
    assert {one.rank for one in perfect[0]} == {1.0}
    assert np.mean([one.rank for one in perfect[1]]) < 0.9
