"""FeasibleTPESampler proposes only what may be trained, deals the alpha bands, and still learns."""

from __future__ import annotations

import logging
import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest

import optuna_hyperparameter_search as search

Params = dict[str, Any]
SEEDS = range(30)
TRIALS = 20
RATIOS = {round(0.05 * step, 2) for step in range(5, 19)}
BANDS = Counter(low=6, mid=8, high=6)


@pytest.fixture(autouse=True)
def quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def band(params: Mapping[str, Any]) -> str:
    ratio = params["network_alpha_ratio"]
    return "low" if ratio <= 0.4 else "mid" if ratio <= 0.7 else "high"


def reward(params: Mapping[str, Any]) -> float:
    """Best at the lower ends of the learning rates, and with AdamW; from -2 to 1."""
    rates = math.log(params["learning_rate"] / 6e-5) / math.log(2)
    rates += math.log(params["text_encoder_lr"] / 3e-5) / math.log(8 / 3)
    return (params["optimizer_type"] == "AdamW") - rates


def new_study(seed: int, **sampler: Any) -> optuna.Study:
    return optuna.create_study(sampler=search.FeasibleTPESampler(seed, **sampler), direction="maximize")


def propose(study: optuna.Study, count: int) -> list[Params]:
    """Ask, suggest and tell `count` trials."""
    proposals = []
    for _ in range(count):
        trial = study.ask()
        proposals.append(search.suggest_hyperparameters(trial))
        study.tell(trial, reward(proposals[-1]))
    return proposals


def passes(params: Params) -> bool:
    return search.check_safety_constraints(params)[0]


def identity(params: Params) -> tuple[Any, ...]:
    return tuple(sorted((name, str(value)) for name, value in params.items()))


@pytest.fixture(scope="module")
def proposals() -> dict[int, list[Params]]:
    """The first 20 proposals of 30 studies."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return {seed: propose(new_study(seed), TRIALS) for seed in SEEDS}


def test_no_proposal_is_rejected(proposals: dict[int, list[Params]]) -> None:
    rejected = [p for of_seed in proposals.values() for p in of_seed if not passes(p)]
    assert rejected == []


def test_every_study_holds_six_low_eight_mid_six_high(proposals: dict[int, list[Params]]) -> None:
    assert {seed: Counter(map(band, of_seed)) for seed, of_seed in proposals.items()} == dict.fromkeys(SEEDS, BANDS)


def test_half_of_the_bands_come_in_the_first_half(proposals: dict[int, list[Params]]) -> None:
    assert all(Counter(map(band, p[:10])) == Counter(low=3, mid=4, high=3) for p in proposals.values())


def test_every_ratio_of_the_grid_occurs(proposals: dict[int, list[Params]]) -> None:
    assert {p["network_alpha_ratio"] for of_seed in proposals.values() for p in of_seed} == RATIOS


def test_every_choice_of_the_space_occurs(proposals: dict[int, list[Params]]) -> None:
    everything = [p for of_seed in proposals.values() for p in of_seed]
    for name, choices in {
        "network_dim": {64, 128, 256},
        "optimizer_type": {"AdamW", "AdamW8bit"},
        "max_train_epochs": {12, 16, 20},
        "lr_scheduler": {"cosine", "cosine_with_restarts", "polynomial"},
        "gradient_accumulation_steps": {1, 2, 4},
        "lr_warmup_steps": {50, 100, 150, 200},
    }.items():
        assert {p[name] for p in everything} == choices, name


def test_the_bands_come_in_another_order_for_another_seed(proposals: dict[int, list[Params]]) -> None:
    assert len({tuple(map(band, of_seed)) for of_seed in proposals.values()}) > 20


def test_no_proposal_comes_twice_over_all_seeds(proposals: dict[int, list[Params]]) -> None:
    seen = Counter(identity(p) for of_seed in proposals.values() for p in of_seed)
    assert seen.most_common(1)[0][1] == 1


def test_num_cycles_exists_only_with_restarts(proposals: dict[int, list[Params]]) -> None:
    cycles = Counter(
        (p["lr_scheduler"] == "cosine_with_restarts", p.get("lr_scheduler_num_cycles"))
        for of_seed in proposals.values()
        for p in of_seed
    )
    assert set(cycles) == {(False, None), (True, 2), (True, 3)}


def test_the_same_seed_proposes_the_same_again(proposals: dict[int, list[Params]]) -> None:
    assert propose(new_study(3), TRIALS) == proposals[3]


def test_after_a_failed_trial_something_else_is_proposed() -> None:
    study = new_study(0)
    propose(study, 22)
    found = []
    for _ in range(3):  # TPE does not see a failed trial: its history stays the same
        trial = study.ask()
        found.append(identity(search.suggest_hyperparameters(trial)))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert len(set(found)) == 3


def open_study(path: Path, seed: int) -> optuna.Study:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}}, skip_compatibility_check=True
    )
    return optuna.create_study(
        storage=storage,
        study_name="study",
        direction="maximize",
        load_if_exists=True,
        sampler=search.FeasibleTPESampler(seed),
    )


def test_a_resumed_study_goes_on_as_if_it_had_never_stopped(tmp_path: Path, proposals: dict[int, list[Params]]) -> None:
    resumed: list[Params] = []
    for part in (7, 1, 12):
        resumed += propose(open_study(tmp_path / "study.db", seed=5), part)
    assert len({identity(p) for p in resumed}) == TRIALS
    assert Counter(map(band, resumed)) == BANDS
    assert resumed == proposals[5]


def work(path: str, seed: int, count: int) -> list[Params]:
    """One worker: a process, a study object and a sampler of its own, on the common database."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return propose(open_study(Path(path), seed), count)


def test_four_workers_on_one_database_never_repeat_a_proposal(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    open_study(path, seed=42)  # makes the tables, which workers must not race for
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [worker.result() for worker in [pool.submit(work, str(path), 42, 5) for _ in range(4)]]
    found = [params for of_worker in done for params in of_worker]
    assert len({identity(p) for p in found}) == TRIALS
    assert all(map(passes, found))
    assert Counter(map(band, found)) == BANDS


ENQUEUED: list[Params] = [
    {"optimizer_type": "AdamW8bit"},
    {"network_alpha_ratio": 0.9},
    {"network_alpha_ratio": 0.75, "network_dim": 256},
    {"network_dim": 256},
    {"max_train_epochs": 12},
    {"max_train_epochs": 12, "optimizer_type": "AdamW8bit", "gradient_accumulation_steps": 1, "lr_warmup_steps": 50},
    {"gradient_accumulation_steps": 1},
    {"lr_warmup_steps": 50},
    {"lr_warmup_steps": 100, "learning_rate": 1.2e-4},
    {"learning_rate": 1.2e-4},
    {"learning_rate": 1.2e-4, "optimizer_type": "AdamW8bit"},
    {"learning_rate": 1.15e-4, "network_alpha_ratio": 0.8},
    {"learning_rate": 1.15e-4, "network_alpha_ratio": 0.8, "network_dim": 256, "text_encoder_lr": 8e-5},
    {"network_alpha_ratio": 0.9, "network_dim": 256, "learning_rate": 1e-4},
    {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
    {"lr_scheduler": "polynomial"},
    {"text_encoder_lr": 3e-5, "network_alpha_ratio": 0.25},
]


@pytest.mark.parametrize("finished", [0, 14], ids=["random", "learnt"])
@pytest.mark.parametrize("values", ENQUEUED, ids=lambda values: ",".join(values))
def test_enqueued_values_are_kept_and_completed_to_something_feasible(values: Params, finished: int) -> None:
    for seed in range(3):
        study = new_study(seed)
        propose(study, finished)
        study.enqueue_trial(values)
        (params,) = propose(study, 1)
        assert {name: params[name] for name in values} == values
        assert passes(params), search.check_safety_constraints(params)


def test_enqueued_cycles_are_given_the_restarts_that_they_need() -> None:
    for seed in range(8):
        study = new_study(seed)
        study.enqueue_trial({"lr_scheduler_num_cycles": 3})
        (params,) = propose(study, 1)
        assert params.get("lr_scheduler_num_cycles") == 3


COMPLETE: Params = {
    "learning_rate": 9e-5,
    "text_encoder_lr": 5e-5,
    "network_dim": 128,
    "network_alpha_ratio": 0.6,
    "optimizer_type": "AdamW",
    "max_train_epochs": 16,
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "lr_warmup_steps": 100,
}


def test_a_complete_enqueued_trial_is_taken_as_it_is() -> None:
    study = new_study(0)
    study.enqueue_trial(COMPLETE)
    (params,) = propose(study, 1)
    assert params == {**COMPLETE, "network_alpha": 76}


@pytest.mark.parametrize("finished", [0, 14], ids=["random", "learnt"])
@pytest.mark.parametrize(
    "values",
    [
        {"network_alpha_ratio": 0.85, "learning_rate": 1.05e-4},
        {"network_alpha_ratio": 0.9, "optimizer_type": "AdamW8bit"},
        {**COMPLETE, "network_dim": 256, "max_train_epochs": 12},
    ],
    ids=["explosion", "8bit", "complete"],
)
def test_what_no_completion_can_save_is_proposed_and_left_to_be_rejected(values: Params, finished: int) -> None:
    study = new_study(1)
    propose(study, finished)
    study.enqueue_trial(values)
    (params,) = propose(study, 1)
    assert {name: params[name] for name in values} == values
    assert set(params) >= {*search.SEARCH_SPACE, "network_alpha"}
    assert not passes(params)


def test_enqueued_and_retried_trials_leave_the_bands_of_the_others_alone() -> None:
    for seed in range(5):
        study = new_study(seed)
        own: list[Params] = []
        for turn in range(TRIALS):
            if turn % 3 == 0:
                study.enqueue_trial({"network_alpha_ratio": 0.25})
                propose(study, 1)
            if turn % 5 == 0:  # this one is interrupted and tried again
                trial = study.ask()
                own.append(search.suggest_hyperparameters(trial))
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(trial.params)
                assert propose(study, 1) == [own[-1]]
            else:
                own += propose(study, 1)
        assert Counter(map(band, own)) == BANDS


def test_trials_that_wait_in_the_queue_take_no_turn() -> None:
    study = new_study(2)
    own = propose(study, 10)
    for _ in range(4):
        study.enqueue_trial({"network_alpha_ratio": 0.9})
    queued = propose(study, 4)
    own += propose(study, 10)
    assert [p["network_alpha_ratio"] for p in queued] == [0.9] * 4
    assert Counter(map(band, own)) == BANDS


def without_8bit(params: Params) -> bool:
    return params["optimizer_type"] != "AdamW8bit"


def test_what_the_machine_cannot_train_is_never_proposed() -> None:
    for seed in range(4):
        found = propose(new_study(seed, can_train=without_8bit), 25)
        assert all(map(passes, found))
        assert {p["optimizer_type"] for p in found} == {"AdamW"}
        assert Counter(map(band, found[:TRIALS])) == BANDS


def test_what_no_completion_can_save_is_at_least_completed_to_what_the_machine_has() -> None:
    for seed in range(6):
        study = new_study(seed, can_train=without_8bit)
        study.enqueue_trial({"network_alpha_ratio": 0.9, "max_train_epochs": 12})
        assert propose(study, 1)[0]["optimizer_type"] == "AdamW"


def test_an_enqueued_value_that_the_machine_cannot_train_is_kept() -> None:
    study = new_study(0, can_train=without_8bit)
    study.enqueue_trial({"optimizer_type": "AdamW8bit"})
    assert propose(study, 1)[0]["optimizer_type"] == "AdamW8bit"


def test_a_preference_is_followed_where_there_is_a_choice() -> None:
    for seed in range(4):
        found = propose(new_study(seed, prefers=lambda p: p["lr_warmup_steps"] <= 150), 25)
        assert all(map(passes, found))
        assert {p["lr_warmup_steps"] for p in found} <= {50, 100, 150}
        assert Counter(map(band, found[:TRIALS])) == BANDS


def test_a_preference_that_only_some_bands_can_meet_yields_there_alone() -> None:
    found = propose(new_study(0, prefers=lambda p: p["lr_warmup_steps"] == 50), TRIALS)  # high alpha needs 150
    assert all(map(passes, found))
    assert Counter(map(band, found)) == BANDS
    assert {p["lr_warmup_steps"] for p in found if band(p) != "high"} == {50}


def test_an_impossible_preference_is_given_up_before_safety() -> None:
    found = propose(new_study(0, prefers=lambda p: False), 12)
    assert all(map(passes, found))


def test_an_impossible_preference_is_given_up_before_the_machine() -> None:
    found = propose(new_study(1, can_train=without_8bit, prefers=lambda p: False), 12)
    assert {p["optimizer_type"] for p in found} == {"AdamW"}


def later_mean(seed: int, prefers: Callable[[Params], bool]) -> float:
    """Mean reward of trials 20 to 59, which TPE chooses freely."""
    return sum(map(reward, propose(new_study(seed, prefers=prefers), 60)[20:])) / 40


def test_later_proposals_have_learnt_from_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = [later_mean(seed, lambda p: True) for seed in range(5)]
    monkeypatch.setattr(search, "TPE_TRIES", 0)  # random draws that pass the constraints
    random = [later_mean(seed, lambda p: True) for seed in range(5)]
    assert min(learnt) > max(random) + 0.3, (learnt, random)


def test_it_still_learns_where_the_preference_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "RANDOM_TRIES", 200)  # enough here, and many times as fast
    monkeypatch.setattr(search, "TPE_TRIES", 8)
    learnt = later_mean(0, lambda p: False)
    monkeypatch.setattr(search, "TPE_TRIES", 0)
    assert learnt > later_mean(0, lambda p: False) + 0.3


def test_free_trials_choose_their_ratio_from_what_was_learnt() -> None:
    """After the dealt trials the ratio is TPE's: an objective that loves low alpha gets more of it."""
    study = new_study(0)
    found = []
    for _ in range(60):
        trial = study.ask()
        found.append(search.suggest_hyperparameters(trial))
        study.tell(trial, -found[-1]["network_alpha_ratio"])
    assert Counter(map(band, found[20:]))["low"] > 24  # 40 trials, of which dealing would give 12


def test_nothing_is_warned_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            study = new_study(0, can_train=without_8bit)
            study.enqueue_trial({"network_alpha_ratio": 0.9})
            propose(study, 30)
    finally:
        optuna.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
