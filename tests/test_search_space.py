"""The V2.1 search space is the specification's, value for value."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

import optuna_hyperparameter_search as search

# The specification's table, written out: nothing here is read from the script.
SPECIFIED = {
    "learning_rate": FloatDistribution(6e-5, 1.2e-4, log=True),
    "text_encoder_lr": FloatDistribution(3e-5, 8e-5, log=True),
    "network_dim": CategoricalDistribution([64, 128, 256]),
    "network_alpha_ratio": FloatDistribution(0.25, 0.9, step=0.05),
    "optimizer_type": CategoricalDistribution(["AdamW", "AdamW8bit"]),
    "max_train_epochs": CategoricalDistribution([12, 16, 20]),
    "lr_scheduler": CategoricalDistribution(["cosine", "cosine_with_restarts", "polynomial"]),
    "gradient_accumulation_steps": CategoricalDistribution([1, 2, 4]),
    "lr_warmup_steps": IntDistribution(50, 200, step=50),
}
NUM_CYCLES = IntDistribution(2, 3)
RATIOS = [
    0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9,
]  # fmt: skip
VALUES: dict[str, Any] = {
    "learning_rate": 8e-5,
    "text_encoder_lr": 4e-5,
    "network_dim": 128,
    "network_alpha_ratio": 0.75,
    "optimizer_type": "AdamW",
    "max_train_epochs": 16,
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "lr_warmup_steps": 150,
}


def distributions(lr_scheduler: str) -> dict[str, optuna.distributions.BaseDistribution]:
    """What suggest_hyperparameters asks a trial for, in its order."""
    trial = FixedTrial({**VALUES, "lr_scheduler": lr_scheduler, "lr_scheduler_num_cycles": 2})
    search.suggest_hyperparameters(trial)
    return trial.distributions


def ask(seed: int) -> tuple[optuna.Trial, dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    trial = study.ask()
    return trial, search.suggest_hyperparameters(trial)


def test_suggests_exactly_the_specified_distributions() -> None:
    assert distributions("cosine") == SPECIFIED


def test_suggests_in_the_order_of_the_specification() -> None:
    assert list(distributions("cosine_with_restarts")) == [*SPECIFIED, "lr_scheduler_num_cycles"]


def test_num_cycles_is_two_or_three() -> None:
    assert distributions("cosine_with_restarts")["lr_scheduler_num_cycles"] == NUM_CYCLES


@pytest.mark.parametrize("lr_scheduler", ["cosine", "polynomial"])
def test_num_cycles_is_neither_asked_nor_returned_without_restarts(lr_scheduler: str) -> None:
    trial = FixedTrial({**VALUES, "lr_scheduler": lr_scheduler, "lr_scheduler_num_cycles": 2})
    assert "lr_scheduler_num_cycles" not in search.suggest_hyperparameters(trial)
    assert "lr_scheduler_num_cycles" not in trial.distributions


def test_the_declared_space_is_the_suggested_one() -> None:
    assert search.SEARCH_SPACE == SPECIFIED
    assert search.V2_1.searched["lr_scheduler_num_cycles"] == NUM_CYCLES


def test_params_hold_every_suggested_value_and_the_alpha() -> None:
    trial, params = ask(seed=0)
    assert set(params) == {*trial.params, "network_alpha"}
    assert {name: params[name] for name in trial.params} == pytest.approx(trial.params)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("ratio", RATIOS)
def test_alpha_is_dim_times_ratio_rounded_down(dim: int, ratio: float) -> None:
    params = search.V2_1.complete({**VALUES, "network_dim": dim, "network_alpha_ratio": ratio})
    hundredths = round(ratio * 100)
    assert params["network_alpha"] == dim * hundredths // 100  # in whole numbers, so without rounding errors
    assert params["network_alpha"] == int(dim * ratio)
    assert type(params["network_alpha"]) is int


def test_every_ratio_that_optuna_can_suggest_has_two_decimals() -> None:
    seen = set()
    for step in range(len(RATIOS)):
        internal = 0.25 + step * 0.05  # 0.6000000000000001 and 0.8500000000000001 among them
        seen.add(search.V2_1.complete({**VALUES, "network_alpha_ratio": internal})["network_alpha_ratio"])
    assert sorted(seen) == RATIOS


def test_ratios_drawn_by_optuna_are_on_the_grid() -> None:
    assert {ask(seed)[1]["network_alpha_ratio"] for seed in range(200)} == set(RATIOS)


def test_alpha_stands_below_dim() -> None:
    highest = search.V2_1.complete({**VALUES, "network_dim": 64, "network_alpha_ratio": 0.9})
    assert highest["network_alpha"] == 57


def test_what_v1_proposed_and_v2_1_removed_is_gone() -> None:
    space = distributions("cosine_with_restarts")
    removed: dict[str, list[Any]] = {
        "optimizer_type": ["Lion", "Prodigy"],
        "max_train_epochs": [8, 10, 15],
        "network_dim": [96, 192],
        "learning_rate": [5e-5, 1.3e-4, 2e-4],
        "text_encoder_lr": [8.1e-5, 1e-4],
        "network_alpha_ratio": [0.2, 0.95, 1.0],
        "lr_scheduler_num_cycles": [1, 4],
    }
    kept = [
        (name, value)
        for name, values in removed.items()
        for value in values
        if (isinstance(space[name], CategoricalDistribution) and value in space[name].choices)
        or (not isinstance(space[name], CategoricalDistribution) and space[name]._contains(value))
    ]
    assert kept == []
    assert "network_alpha" not in space  # an absolute alpha was V1's


def test_describes_alpha_with_its_ratio() -> None:
    lines = search.describe_params(search.V2_1.complete(VALUES)).splitlines()
    assert lines[0] == "Parameters:"
    assert "  network_alpha: 96 (ratio: 0.750)" in lines


def test_describes_every_other_parameter_as_name_and_value() -> None:
    params = search.V2_1.complete(VALUES)
    lines = search.describe_params(params).splitlines()[1:]
    plain = {name: value for name, value in params.items() if name != "network_alpha"}
    assert [line for line in lines if not line.startswith("  network_alpha:")] == [
        f"  {name}: {value}" for name, value in plain.items()
    ]
