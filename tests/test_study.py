"""Sections 9 and 10: what a trial's end means to the study, resuming, retries, counting, lock and fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from safetensors.numpy import save
from sqlalchemy import Engine, event

import optuna_hyperparameter_search as search

REPOSITORY = Path(__file__).resolve().parents[1]
SAFE = {
    "learning_rate": 8e-5, "text_encoder_lr": 4e-5, "network_dim": 64, "network_alpha_ratio": 0.5,
    "optimizer_type": "AdamW", "max_train_epochs": 16, "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2, "lr_warmup_steps": 100,
}  # fmt: skip
UNSAFE = {**SAFE, "network_alpha_ratio": 0.9, "optimizer_type": "AdamW8bit"}
TERMS = {"fidelity": 0.5, "text": 0.6, "preservation": 0.7, "originality": 0.9, "variety": 0.8, "usable": 1.0}


@pytest.fixture(autouse=True)
def quick_commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing waits for the disk: what a power cut would take, no test here looks at."""
    monkeypatch.setattr(os, "fsync", lambda _file: None)

    def wait_for_no_disk(connection: object, _record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", wait_for_no_disk)
    yield
    event.remove(Engine, "connect", wait_for_no_disk)


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


def settings_for(folder: Path, n_trials: int = 3, **changes: object) -> search.Settings:
    output_dir = folder / "out"
    (output_dir / "reference").mkdir(parents=True, exist_ok=True)
    settings = search.Settings(
        dataset_config=folder / "dataset.toml", base_model=folder / "model.safetensors", output_dir=output_dir,
        study_name="test", n_trials=n_trials, device="cpu", sd_scripts=folder, trainer_python=sys.executable,
        training_config=folder, scoring_config=folder, eval_prompts=None, subject=None,
        storage=search.default_storage(output_dir), seed=1, enqueue=(), timeout_hours=None,
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


def open_study(settings: search.Settings) -> optuna.Study:
    return optuna.create_study(
        study_name=settings.study_name, storage=search.Storage(settings.storage).open(), direction="maximize",
        sampler=search.FeasibleTPESampler(settings.seed), load_if_exists=True,
    )  # fmt: skip


Step = Callable[[Path], None]


def weights_of(name: str) -> bytes:
    """A safetensors file that no other trial has."""
    return save({"a.lora_up.weight": np.frombuffer(name.encode(), dtype=np.float16)}, {"ss_output_name": name})


def good_training(folder: Path) -> None:
    (folder / "lora.safetensors").write_bytes(weights_of(folder.name))
    (folder / "training.log").write_text("model saved.\n")


def good_scoring(folder: Path) -> None:
    number = int(folder.name.rpartition("_")[2])
    metrics = {
        "outcome": "scored", "reason": "", "score": 0.1 + number / 100, "best_epoch": 12,
        "checkpoint": "lora.safetensors", "terms": TERMS, "scoring_seconds": 2.0, "standard_error": 0.001, "screen": [],
    }  # fmt: skip
    search.write_json(folder / "metrics.json", metrics)


def failing(error: BaseException) -> Step:
    def fail(*_: object) -> None:
        raise error

    return fail


def nothing_to_try(trial: optuna.Trial) -> float:
    raise AssertionError(f"trial {trial.number} was tried")


def study_of(settings: search.Settings, objective: Callable[[optuna.Trial], float] = nothing_to_try) -> search.Study:
    """The program's view of a study, by a start of its own."""
    return search.Study(open_study(settings), settings, objective, time.monotonic())


def run(settings: search.Settings, trainings: list[Step] = (), scorings: list[Step] = ()) -> optuna.Study:
    """One start of the program's main loop; the given steps come first, then good ones."""
    train: Iterator[Step] = itertools.chain(trainings, itertools.repeat(good_training))
    score: Iterator[Step] = itertools.chain(scorings, itertools.repeat(good_scoring))

    def trainer(config: Path, _usual_step: float | None, _pause: object) -> tuple[float, float]:
        next(train)(config.parent)
        return 7.0, 0.5

    objective = search.LoraObjective(settings, {"seed": 42}, trainer, lambda folder: next(score)(folder))
    ours = study_of(settings, objective)
    ours.run()
    return ours.study


def endings(study: optuna.Study) -> list[tuple[TrialState, str]]:
    return [(trial.state, trial.user_attrs.get("ended", "")) for trial in study.get_trials()]


def suggested(trial: FrozenTrial) -> dict[str, object]:
    return dict(trial.params)


COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING
SCORED, LEFT = (COMPLETE, "scored"), (RUNNING, "interrupted")


# --- a trial -----------------------------------------------------------------------------------------


def test_a_scored_trial_keeps_all_that_the_report_needs(tmp_path: Path) -> None:
    trial = run(settings_for(tmp_path, 1)).get_trials()[0]
    attrs = trial.user_attrs
    assert trial.value == pytest.approx(0.1) and trial.state == COMPLETE
    assert attrs["training_params"] == search.V2_1.complete(trial.params)
    assert attrs["ended"] == "scored" and attrs["best_epoch"] == 12 and attrs["terms"] == TERMS
    assert attrs["training_seconds"] == 7.0 and attrs["scoring_seconds"] == 2.0
    assert {"host", "pid", "folder", "output_dir"} <= attrs.keys()


def test_a_trials_folder_holds_its_config_and_parameters(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    trial = run(settings).get_trials()[0]
    folder = settings.output_dir / "trial_0000"
    assert json.loads((folder / "params.json").read_text()) == trial.user_attrs["training_params"]
    config = search.read_toml(folder / "config.toml", "config")
    assert config["output_dir"] == str(folder) and config["network_dim"] == trial.params["network_dim"]


def test_accumulated_batches_make_no_step_slow(tmp_path: Path) -> None:
    """Four batches a step take four times as long, and the card is well."""
    usual: list[float | None] = []

    def trainer(config: Path, usual_step: float | None, _pause: object) -> tuple[float, float]:
        good_training(config.parent)
        batches = search.read_toml(config, "config")["gradient_accumulation_steps"]
        usual.append(usual_step and usual_step / batches)
        return 7.0, 2.0 * batches

    settings = settings_for(tmp_path, 6)
    ours = study_of(settings, search.LoraObjective(settings, {}, trainer, good_scoring))
    ours.run()
    study = ours.study
    assert usual == [None, None, None, 2.0, 2.0, 2.0]
    assert [trial.user_attrs["batch_seconds"] for trial in study.get_trials()] == [2.0] * 6
    assert len({trial.params["gradient_accumulation_steps"] for trial in study.get_trials()}) > 1


def test_unsafe_parameters_are_rejected_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, 1)
    study = open_study(settings)
    study.enqueue_trial(UNSAFE)
    run(settings)
    rejected = study.get_trials()[0]
    reason = "High alpha (≥0.75) requires: optimizer = AdamW, warmup >= 150"
    assert rejected.state == PRUNED and rejected.user_attrs["ended"] == "rejected"
    assert rejected.user_attrs["rejection_reason"] == reason
    assert not (settings.output_dir / "trial_0000").exists()
    shown = capsys.readouterr().out
    assert f"\n❌ TRIAL REJECTED: {reason}\nParameters: {{\n" in shown
    printed = shown[shown.index("{") :]
    assert json.JSONDecoder().raw_decode(printed)[0]["network_alpha"] == 57


def test_a_folder_of_something_else_is_never_written_into(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    (settings.output_dir / "trial_0000").mkdir()
    (settings.output_dir / "trial_0000" / "notes.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(search.SearchStopped, match="files of something else"):
            run(settings)
    assert [file.name for file in (settings.output_dir / "trial_0000").iterdir()] == ["notes.txt"]
    (settings.output_dir / "trial_0000" / "notes.txt").unlink()
    assert endings(run(settings)) == [SCORED]


# --- early stopping ----------------------------------------------------------------------------------

STOP_EARLY = {"at_percent": 50, "whole_trials": 2, "keep_percent": 50.0}


def screening(score: float, *epochs: int) -> Step:
    """What screening leaves in the pause, with this score for each epoch."""

    def screen(folder: Path) -> None:
        found = [{"epoch": epoch, "checkpoint": f"lora-{epoch:06d}.safetensors", "score": score} for epoch in epochs]
        search.write_json(folder / "scores" / search.SCREENED, {"screen": found})

    return screen


@dataclasses.dataclass
class Pausing:
    """A study whose trainer pauses where it is told to."""

    settings: search.Settings
    halves: list[Step]  # of the trainings that are paused, in order
    pauses: dict[str, str] = dataclasses.field(default_factory=dict)  # checkpoints, by the trial's folder

    def train(self, config: Path, _usual_step: float | None, pause: search.Pause | None) -> tuple[float, float]:
        if pause:
            self.pauses[config.parent.name] = pause.checkpoint.stem
            pause.work(3.0)
        good_training(config.parent)
        return 7.0, 0.5

    def score(self, folder: Path) -> None:
        if not (folder / "lora.safetensors").exists():
            return self.halves.pop(0)(folder)
        good_scoring(folder)
        metrics = search.read_json(folder / "metrics.json")
        found = [{"epoch": epoch, "score": metrics["score"]} for epoch in (5, 10, 15)]
        search.write_json(folder / "metrics.json", {**metrics, "screen": found})

    def run(self, stops: bool = True) -> optuna.Study:
        options = {"seed": 42, "save_every_n_epochs": 5}
        early = search.EarlyStopping(STOP_EARLY, 5, self.score)
        objective = search.LoraObjective(self.settings, options, self.train, self.score, early if stops else None)
        ours = study_of(self.settings, objective)
        ours.study.pruner = early.pruner()
        ours.run()
        return ours.study


STOPPED = (PRUNED, "stopped early")


def test_a_training_that_scores_below_the_median_half_way_is_stopped_and_counts(tmp_path: Path) -> None:
    pausing = Pausing(settings_for(tmp_path, 4), [screening(0.05, 5), screening(0.9, 5)])
    study = pausing.run()
    assert endings(study) == [SCORED, SCORED, STOPPED, SCORED]
    assert list(pausing.pauses) == ["trial_0002", "trial_0003"]
    stopped = study.get_trials()[2]
    assert stopped.intermediate_values[50] == 0.05 and search.is_trained(stopped)
    assert stopped.user_attrs["stopped"]["training_seconds"] == 3.0 and "lost_seconds" not in stopped.user_attrs
    epochs, epoch = stopped.params["max_train_epochs"], stopped.user_attrs["stopped"]["stopped_epoch"]
    facts = search.facts_of(stopped)
    assert facts["saved_seconds"] == pytest.approx(3.0 * (epochs - epoch) / epoch)
    assert facts["score"] is None  # Optuna gives it its last value
    assert "0.050, below 0.105, which 50% of 2 whole trainings had by then" in stopped.user_attrs["reason"]


@pytest.mark.parametrize(("epochs", "pause"), [(12, "lora-000005"), (16, "lora-000005"), (20, "lora-000010")])
def test_the_pause_is_at_the_last_checkpoint_up_to_half_of_the_epochs(tmp_path: Path, epochs: int, pause: str) -> None:
    pausing = Pausing(settings_for(tmp_path, 3), [screening(0.9, 5)])
    study = open_study(pausing.settings)
    for _ in range(3):
        study.enqueue_trial({"max_train_epochs": epochs})
    pausing.run()
    assert pausing.pauses["trial_0002"] == pause


def test_trainings_of_different_lengths_compare_at_the_same_share(tmp_path: Path) -> None:
    study = optuna.create_study()
    for epochs, expected in ((12, {50: 0.1, 60: 0.1}), (16, {40: 0.1, 50: 0.1, 60: 0.1}), (20, {30: 0.1, 50: 0.3})):
        study.enqueue_trial({"max_train_epochs": epochs})
        trial = study.ask(search.SEARCH_SPACE)
        found = [{"epoch": 5, "score": 0.1}, {"epoch": 10, "score": 0.3}, {"epoch": 15, "score": 0.2}]
        search.EarlyStopping.report(trial, found)
        reported = study.get_trials()[trial.number].intermediate_values
        assert expected.items() <= reported.items() and max(reported) == 100 and reported[100] == 0.3


def test_what_was_reported_before_is_not_reported_again(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    study = optuna.create_study()
    study.enqueue_trial({"max_train_epochs": 20})
    trial = study.ask(search.SEARCH_SPACE)
    search.EarlyStopping.report(trial, [{"epoch": 10, "score": 0.1}], until=50)
    search.EarlyStopping.report(trial, [{"epoch": 10, "score": 0.7}, {"epoch": 20, "score": 0.8}])
    reported = trial.study.get_trials()[0].intermediate_values
    assert reported == {50: 0.1, 60: 0.7, 70: 0.7, 80: 0.7, 90: 0.7, 100: 0.8}
    assert not recwarn.list


def test_without_early_stopping_nothing_is_paused(tmp_path: Path) -> None:
    pausing = Pausing(settings_for(tmp_path, 4), [])
    assert endings(pausing.run(stops=False)) == [SCORED] * 4 and not pausing.pauses


def test_a_screening_that_fails_is_said_once_and_all_others_are_trained_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = search.ScoringFailed("the card has 2.0GB free beside the trainer, and screening needs 6.0GB")
    pausing = Pausing(settings_for(tmp_path, 6), [failing(full)])
    assert endings(pausing.run()) == [SCORED] * 6
    assert list(pausing.pauses) == ["trial_0002"]
    assert capsys.readouterr().out.count("no more trainings are stopped early in this run") == 1


def test_a_screening_that_failed_is_tried_again_by_the_next_start(tmp_path: Path) -> None:
    """Whoever made room on the card gives the same command again."""
    pausing = Pausing(settings_for(tmp_path, 3), [failing(search.ScoringFailed("no room")), screening(0.9, 5)])
    pausing.run()
    pausing.settings = settings_for(tmp_path, 4)
    pausing.run()
    assert list(pausing.pauses) == ["trial_0002", "trial_0003"]


def test_trainings_that_told_nothing_half_way_are_no_measure(tmp_path: Path) -> None:
    """They are of an earlier version."""
    run(settings_for(tmp_path, 2))
    pausing = Pausing(settings_for(tmp_path, 5), [screening(0.05, 5)])
    assert endings(pausing.run()) == [SCORED] * 4 + [STOPPED]
    assert list(pausing.pauses) == ["trial_0004"]


def test_a_kill_before_a_stop_is_told_does_not_train_again(tmp_path: Path) -> None:
    pausing = Pausing(settings_for(tmp_path, 3), [screening(0.05, 5)])
    killed = unittest.mock.patch.object(search.Study, "finish", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        pausing.run()
    pausing.pauses.clear()
    study = pausing.run()
    assert endings(study) == [SCORED, SCORED, STOPPED] and not pausing.pauses
    assert "lost_seconds" not in study.get_trials()[2].user_attrs


# --- counting ----------------------------------------------------------------------------------------


def test_a_finished_study_trains_nothing_more(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    run(settings)
    study = run(settings, [failing(AssertionError("trained once more"))])
    assert len(study.get_trials()) == 2


def test_a_larger_n_trials_goes_on(tmp_path: Path) -> None:
    run(settings_for(tmp_path, 2))
    assert len(run(settings_for(tmp_path, 5)).get_trials()) == 5


def test_rejected_and_failed_trials_do_not_count_but_diverged_ones_do(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3)
    open_study(settings).enqueue_trial(UNSAFE)
    study = run(settings, [failing(search.TrialFailed("boom"))] * 2 + [failing(search.Diverged("nan"))])
    assert endings(study) == [
        (PRUNED, "rejected"),
        (FAIL, "crashed"),
        (PRUNED, "diverged"),
        (COMPLETE, "scored"),
        (COMPLETE, "scored"),
    ]


def test_a_diverged_trial_is_pruned_with_its_reason_and_no_value(tmp_path: Path) -> None:
    trial = run(settings_for(tmp_path, 2), [failing(search.Diverged("weights not finite"))]).get_trials()[0]
    assert trial.state == PRUNED and trial.value is None and trial.intermediate_values == {}
    assert trial.user_attrs["reason"] == "weights not finite"


def _work(settings: search.Settings) -> None:
    run(settings)


def work_at_once(work: Callable[[search.Settings], None], all_settings: list[search.Settings]) -> list[int | None]:
    """The exit status of a program a folder."""
    open_study(all_settings[0])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(settings,)) for settings in all_settings]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_programs_that_share_a_storage_end_at_exactly_n(
    tmp_path: Path, workers: int, database: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(search, "POLL_SECONDS", 0.05)
    urls = {"sqlite": lambda: f"sqlite:///{tmp_path / 'shared.db'}"}
    storage = urls.get(database, lambda: request.getfixturevalue("postgresql")())()
    all_settings = [settings_for(tmp_path / str(n), 16, storage=storage) for n in range(workers)]
    assert work_at_once(_work, all_settings) == [0] * workers
    trials = open_study(all_settings[0]).get_trials()
    assert sum(map(search.is_trained, trials)) == 16
    learning_rates = [trial.params["learning_rate"] for trial in trials if trial.params]
    assert len(set(learning_rates)) == len(learning_rates)


def test_a_study_on_postgresql_is_resumed_and_its_password_hidden(
    tmp_path: Path, postgresql: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, 2, storage=postgresql())
    with pytest.raises(Killed):
        run(settings, [failing(Killed())])
    assert endings(run(settings)) == [SCORED] * 2
    written = "".join(file.read_text(errors="replace") for file in settings.output_dir.rglob("*") if file.is_file())
    shown = search.Storage(settings.storage).shown
    assert "s3cr3t" in settings.storage and "s3cr3t" not in written + capsys.readouterr().out + shown
    assert shown.startswith("postgresql+psycopg://***@")


# --- killed at any moment ----------------------------------------------------------------------------


WRITES = (
    (optuna.Study, "ask"), (optuna.Study, "tell"), (optuna.Study, "enqueue_trial"), (optuna.Trial, "set_user_attr"),
    (search, "write_atomically"), (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree"),
)  # fmt: skip


class Countdown:
    """Kills the program before, or right after, its nth write of any kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, *, after: bool) -> None:
        self.left, self.after = n, after
        for owner, name in WRITES:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, write: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Killed
            result = write(*args, **kwargs)
            if self.left == 0:
                raise Killed
            return result

        return counted


@pytest.mark.slow
def test_a_kill_at_any_write_loses_nothing_and_trains_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials, whose first scoring fails: all orderings of database and files, one after the other."""
    open_study(settings_for(tmp_path / "empty"))
    for moment in itertools.count(1):
        shutil.copytree(tmp_path / "empty", tmp_path / f"moment_{moment}")
        settings = settings_for(tmp_path / f"moment_{moment}", 2)
        trainings: list[str] = []

        def train(folder: Path, trainings: list[str] = trainings) -> None:
            trainings.append((folder / "params.json").read_text())
            good_training(folder)

        steps = itertools.repeat(train)
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            countdown = Countdown(patched, (moment + 1) // 2, after=moment % 2 == 0)
            run(settings, steps, [failing(search.ScoringFailed("no encoder"))])
        study = run(settings, steps)
        assert endings(study) == [SCORED] * 2, moment
        assert len(set(trainings)) == len(trainings) == 2, moment
        for trial in search.scored_trials(study):
            folder = settings.output_dir / trial.user_attrs["folder"]
            assert json.loads((folder / "metrics.json").read_text())["score"] == trial.value, moment
            assert (folder / "lora.safetensors").is_file(), moment
        if countdown.left > 0:
            assert moment > 80
            return


def with_an_unclaimed_trial(tmp_path: Path) -> search.Settings:
    """In a storage that others share, a program died after it asked for an enqueued trial and before it claimed it."""
    settings = settings_for(tmp_path, 2, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    ours = study_of(settings)
    ours.enqueue([SAFE])
    ours.study.ask()
    return settings


def test_a_trial_that_nobody_claimed_is_closed_and_what_was_enqueued_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_an_unclaimed_trial(tmp_path)
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(search, "UNCLAIMED_SECONDS", 0.2)
    study = run(settings)
    assert endings(study) == [(FAIL, "interrupted"), SCORED, SCORED]
    assert sorted(suggested(trial) == SAFE for trial in study.get_trials()) == [False, False, True]
    study_of(settings).enqueue([SAFE])  # by the same command, given again
    assert len(study.get_trials()) == 3


def test_what_was_enqueued_for_a_trial_that_was_closed_is_enqueued_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill came between closing the trial that nobody claimed and enqueueing its values again."""
    settings = with_an_unclaimed_trial(tmp_path)
    monkeypatch.setattr(search, "UNCLAIMED_SECONDS", 0)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(optuna.Study, "enqueue_trial", lambda *_, **__: failing(Killed())(tmp_path))
        run(settings)
    for _ in range(2):
        study_of(settings).enqueue([SAFE])
    assert [state for state, _ in endings(open_study(settings))] == [FAIL, WAITING]


def test_a_trial_that_nobody_claimed_is_continued_in_the_folders_own_database(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    ours = study_of(settings)
    ours.enqueue([SAFE])
    ours.study.ask()
    study = run(settings)
    assert endings(study) == [SCORED] and suggested(study.get_trials()[0]) == SAFE


def test_who_slept_too_long_before_claiming_leaves_the_trial_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 1)
    claim, others = search.Study.claim, []

    def sleep_before_claiming(self: search.Study, trial: optuna.Trial) -> None:
        if not others:
            others.append(trial.number)
            trial.study.tell(trial.number, state=FAIL)
        claim(self, trial)

    monkeypatch.setattr(search.Study, "claim", sleep_before_claiming)
    assert endings(run(settings)) == [(FAIL, ""), (COMPLETE, "scored")]


# --- the disk ----------------------------------------------------------------------------------------


def save_two_checkpoints(folder: Path) -> None:
    (folder / "lora-000006.safetensors").write_bytes(b"earlier weights of " + folder.name.encode())
    good_training(folder)


def kept(settings: search.Settings) -> list[str]:
    return sorted(str(file.relative_to(settings.output_dir)) for file in settings.output_dir.glob("trial_*/lora*"))


def test_of_every_scored_trial_the_chosen_checkpoint_is_kept_and_of_the_study_ten(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 12)
    run(settings, [save_two_checkpoints] * 12)  # scores rise with the trial's number
    assert kept(settings) == [f"trial_{number:04d}/lora.safetensors" for number in range(2, 12)]


def test_the_last_final_stages_winner_is_kept_though_ten_others_have_a_higher_value(tmp_path: Path) -> None:
    """Values are noisy; the next final stage compares it again."""
    settings = settings_for(tmp_path, 4)
    study = run(settings, [save_two_checkpoints] * 4)
    study.set_user_attr("final", {"scored": 4, "finalists": [{"trial": 1}, {"trial": 3}]})
    more = dataclasses.replace(settings, n_trials=14)
    run(more, [save_two_checkpoints] * 10)
    assert kept(more) == [f"trial_{number:04d}/lora.safetensors" for number in (1, *range(4, 14))]


def test_a_trial_that_another_worker_scores_at_that_moment_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 2)
    study = run(settings, [save_two_checkpoints] * 2)
    before = kept(settings)
    everything = study.get_trials(deepcopy=False)
    readings = iter([everything[:1], everything])  # the second trial is told between the two
    monkeypatch.setattr(study, "get_trials", lambda **_: next(readings))
    search.Study(study, settings, lambda _: 0.0, time.monotonic()).delete_spare_checkpoints()
    assert kept(settings) == before and len(before) == 2


def test_all_checkpoints_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2, keep_checkpoints="all")
    run(settings, [save_two_checkpoints] * 2)
    assert len(kept(settings)) == 4


def test_what_is_not_scored_yet_is_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [save_two_checkpoints], [failing(search.ScoringFailed("no encoder")), failing(Killed())])
    assert len(kept(settings)) == 2
    run(settings, [failing(AssertionError("trained again"))])
    assert kept(settings) == ["trial_0000/lora.safetensors"]


OWN = ("lora-copy.safetensors", "lora-best-000006.safetensors", "lora-6.safetensors", "lora2.safetensors")


def save_own_files_too(folder: Path) -> None:
    save_two_checkpoints(folder)
    for name in OWN:
        (folder / name).write_bytes(b"a user's")


def test_a_users_own_files_in_a_trials_folder_are_no_checkpoints_and_never_deleted(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    with pytest.raises(Killed):  # the first trial has finished its training
        run(settings, [save_own_files_too], [failing(search.ScoringFailed("no encoder")), failing(Killed())])
    found = search.saved_checkpoints(settings.output_dir / "trial_0000", 16)
    assert {epoch: file.name for epoch, file in found.items()} == {6: "lora-000006.safetensors", 16: "lora.safetensors"}
    run(settings, [save_own_files_too])
    own = [name for name in kept(settings) if name.rpartition("/")[2] in OWN]
    assert own == sorted(f"trial_{number:04d}/{name}" for number in (0, 1) for name in OWN)
    assert sorted(set(kept(settings)) - set(own)) == ["trial_0000/lora.safetensors", "trial_0001/lora.safetensors"]


def test_a_diverged_trial_keeps_no_checkpoint(tmp_path: Path) -> None:
    def diverge(folder: Path) -> None:
        save_two_checkpoints(folder)
        raise search.Diverged("not finite")

    settings = settings_for(tmp_path, 1)
    run(settings, [diverge])
    assert kept(settings) == []


def test_another_folders_checkpoints_are_left_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    ours, others = (settings_for(tmp_path / name, n, storage=storage) for name, n in (("ours", 2), ("others", 1)))
    run(others, [save_two_checkpoints])
    before = kept(others)
    (others.output_dir / "trial_0000" / "lora-000006.safetensors").write_bytes(b"put back")
    run(ours, [save_two_checkpoints])
    assert len(kept(others)) == len(before) + 1


# --- failures -----------------------------------------------------------------------------------------


# --- the final stage ---------------------------------------------------------------------------------


def scored_as(settings: search.Settings, values: list[tuple[float, float]]) -> optuna.Study:
    """A study whose trials have these scores and standard errors."""

    def scoring(value: float, error: float) -> Step:
        def score(folder: Path) -> None:
            good_scoring(folder)
            metrics = {**search.read_json(folder / "metrics.json"), "score": value, "standard_error": error}
            search.write_json(folder / "metrics.json", metrics)

        return score

    return run(settings, scorings=[scoring(*one) for one in values])


def finalists(tmp_path: Path, values: list[tuple[float, float]]) -> list[int]:
    settings = settings_for(tmp_path, len(values))
    return list(map(int, search.choose_finalists(scored_as(settings, values), settings.output_dir)))


def test_the_three_best_trials_are_finalists(tmp_path: Path) -> None:
    assert finalists(tmp_path, [(0.5, 0.01), (0.8, 0.01), (0.6, 0.01), (0.7, 0.01)]) == [1, 3, 2]


def test_a_trial_that_may_be_as_good_as_the_best_is_a_finalist_up_to_five(tmp_path: Path) -> None:
    close = [(0.70, 0.05), (0.69, 0.05), (0.68, 0.05), (0.67, 0.05), (0.66, 0.05), (0.65, 0.05)]
    assert finalists(tmp_path, close) == [0, 1, 2, 3, 4]
    # 0.14 is just within two standard errors of the difference, 2 x 0.0707; 0.15 is not.
    assert finalists(tmp_path / "more", [(0.7, 0.05), (0.69, 0.05), (0.68, 0.05), (0.56, 0.05), (0.55, 0.05)]) == [
        0, 1, 2, 3,
    ]  # fmt: skip


def test_a_trial_whose_checkpoint_is_elsewhere_is_no_finalist(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3)
    study = scored_as(settings, [(0.5, 0.01), (0.6, 0.01), (0.7, 0.01)])
    (settings.output_dir / "trial_0002" / "lora.safetensors").unlink()
    assert list(search.choose_finalists(study, settings.output_dir)) == ["1", "0"]


class Final:
    """Stands for the scoring process in final/: the order of finalists is turned round."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.runs = list(errors), []

    def __call__(self, folder: Path) -> None:
        numbers = list(search.read_json(folder / search.FINALISTS))
        self.runs.append(numbers)
        if self.errors:
            raise self.errors.pop()
        found = [
            {"trial": int(number), "score": 0.4, "standard_error": 0.02, "terms": TERMS, "rounds": 3,
             "ahead_of_winner": [-0.05, 0.01], "dropped": place > 1}
            for place, number in enumerate(reversed(numbers))
        ]  # fmt: skip
        search.write_json(folder / "result.json", {"finalists": found, "strengths": {"1.0": 0.4}, "strength": 0.8})


VALUES = [(0.5, 0.01), (0.6, 0.01), (0.7, 0.01)]


def test_the_final_stage_decides_which_trial_is_best(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3)
    study, final = scored_as(settings, VALUES), Final()
    study_of(settings).decide(final)
    assert final.runs == [["2", "1", "0"]] and study.user_attrs["final_seconds"] >= 0
    assert [trial.number for trial in search.ranked_trials(study)] == [0, 1, 2]
    search.Results(study, settings.output_dir).write()
    best = search.read_json(settings.output_dir / "results" / "best_parameters.json")
    assert (best["trial"], best["score"], best["final_score"], best["strength"]) == (0, 0.5, 0.4, 0.8)
    said = search.Results(study, settings.output_dir).describe_best()
    assert "Best: trial 0" in said and "may be as good: 1;" in said and "strength 0.8" in said


def test_the_final_stage_is_not_run_again_for_the_same_trials(tmp_path: Path) -> None:
    settings, final = settings_for(tmp_path, 3), Final()
    scored_as(settings, VALUES)
    for _ in range(2):
        study_of(settings).decide(final)
    assert len(final.runs) == 1


def test_the_final_stage_is_not_run_again_where_the_study_was_moved(tmp_path: Path) -> None:
    settings, final = settings_for(tmp_path / "old", 3), Final()
    scored_as(settings, VALUES)
    study_of(settings).decide(final)
    settings.output_dir.rename(tmp_path / "new")
    moved = dataclasses.replace(settings, output_dir=tmp_path / "new", storage=search.default_storage(tmp_path / "new"))
    study_of(moved).decide(final)
    assert len(final.runs) == 1 and search.final_places(open_study(moved))


def test_more_trials_are_decided_on_anew(tmp_path: Path) -> None:
    settings, final = settings_for(tmp_path, 3), Final()
    study = scored_as(settings, VALUES)
    study_of(settings).decide(final)
    scored_as(dataclasses.replace(settings, n_trials=4), [(0.9, 0.01)])
    assert [trial.number for trial in search.ranked_trials(study)] == [3, 2, 1, 0]  # the final knows nothing of 3
    study_of(settings).decide(final)
    assert final.runs[1] == ["3", "2", "1", "0"]  # 0 is the earlier winner
    assert [trial.number for trial in search.ranked_trials(study)] == [0, 1, 2, 3]


def test_more_trials_that_are_worse_need_no_new_final_stage(tmp_path: Path) -> None:
    settings, final = settings_for(tmp_path, 3), Final()
    study = scored_as(settings, VALUES)
    study_of(settings).decide(final)
    scored_as(dataclasses.replace(settings, n_trials=4), [(0.1, 0.01)])
    study_of(settings).decide(final)
    assert len(final.runs) == 1 and search.final_places(study)


def test_a_final_stage_that_fails_or_is_interrupted_is_tried_again(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3)
    study, final = scored_as(settings, VALUES), Final(KeyboardInterrupt(), search.ScoringFailed("no memory"))
    with pytest.raises(search.SearchStopped, match="final stage failed: no memory; the same command tries it again"):
        study_of(settings).decide(final)
    with pytest.raises(KeyboardInterrupt):
        study_of(settings).decide(final)
    assert not search.final_places(study)
    study_of(settings).decide(final)
    assert len(final.runs) == 3 and search.final_places(study)


def test_of_programs_that_share_a_study_the_one_with_the_best_trial_runs_the_final_stage(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    ours, theirs = (settings_for(tmp_path / name, count, storage=storage) for name, count in (("a", 2), ("b", 4)))
    scored_as(ours, VALUES[:2])
    study, final = scored_as(theirs, [(0.7, 0.01), (0.8, 0.01)]), Final()
    study_of(dataclasses.replace(ours, n_trials=4)).decide(final)
    assert not final.runs
    study_of(theirs).decide(final)
    assert final.runs == [["3", "2", "1"]] and search.final_places(study)


def test_a_final_stage_is_run_again_where_its_winner_is_gone(tmp_path: Path) -> None:
    settings, final = settings_for(tmp_path, 4), Final()
    scored_as(settings, [*VALUES, (0.8, 0.01)])
    study_of(settings).decide(final)
    (settings.output_dir / "trial_0001" / "lora.safetensors").unlink()  # which has won
    study_of(settings).decide(final)
    assert final.runs == [["3", "2", "1"], ["3", "2", "0"]]


def test_one_scored_trial_needs_no_final_stage(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    scored_as(settings, VALUES[:1])
    study_of(settings).decide(failing(AssertionError("was run")))


def failures_of(trial: FrozenTrial) -> list[tuple[str, bool]]:
    return [(failure["ended"], failure["trained"]) for failure in trial.user_attrs["failures"]]


def test_out_of_memory_is_tried_once_more_and_then_learnt_from(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 1), [failing(search.OutOfMemory("no room"))] * 2)
    assert endings(study) == [(PRUNED, "out of memory"), SCORED]
    first, second = study.get_trials()
    assert failures_of(first) == [("out of memory", False)] * 2 and first.user_attrs["reason"] == "no room"
    assert suggested(first) != suggested(second)


def test_a_crash_is_tried_once_more(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 1), [failing(search.TrialFailed("boom"))] * 2)
    assert endings(study) == [(FAIL, "crashed"), SCORED]
    first, second = study.get_trials()
    assert failures_of(first) == [("crashed", False)] * 2 and first.user_attrs["reason"] == "boom"
    assert suggested(first) != suggested(second)


def test_a_crash_that_does_not_come_again_costs_no_trial(tmp_path: Path) -> None:
    trial, *others = run(settings_for(tmp_path, 1), [failing(search.TrialFailed("boom"))]).get_trials()
    assert trial.state == COMPLETE and failures_of(trial) == [("crashed", False)] and not others
    assert "reason" not in trial.user_attrs


def test_an_interruption_is_tried_again_always(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    seen = set()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(settings, [failing(KeyboardInterrupt())])
        (trial,) = open_study(settings).get_trials()
        assert (trial.state, trial.user_attrs["ended"]) == LEFT
        seen.add(json.dumps(suggested(trial)))
    study = run(settings)
    assert endings(study) == [SCORED] and {json.dumps(suggested(study.get_trials()[0]))} == seen


def test_a_folder_of_the_same_path_on_another_machine_is_not_this_one(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1, storage=f"sqlite:///{tmp_path}/shared.db")
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(KeyboardInterrupt())])
    first = settings.output_dir.rename(tmp_path / "the first machine's")
    assert endings(run(settings_for(tmp_path, 1, storage=settings.storage))) == [LEFT, SCORED]
    settings.output_dir.rename(tmp_path / "the second machine's")
    first.rename(settings.output_dir)
    assert endings(run(dataclasses.replace(settings, n_trials=2))) == [SCORED, SCORED]


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_that_was_copied_without_its_hidden_files_goes_on(tmp_path: Path, shared: bool) -> None:
    settings = settings_for(tmp_path, 1, **({"storage": f"sqlite:///{tmp_path}/shared.db"} if shared else {}))
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(KeyboardInterrupt())])
    for file in settings.output_dir.rglob(".*"):
        file.unlink()
    assert endings(run(settings)) == [SCORED]


def test_a_study_with_its_own_database_goes_on_without_the_folders_id(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(KeyboardInterrupt())])
    (settings.reference / "id").unlink()
    with search.holding(settings.output_dir):
        assert endings(run(settings)) == [SCORED]


def test_a_failed_scoring_repeats_only_the_scoring_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    trained = [good_training, failing(AssertionError("trained again"))]
    study = run(settings, trained, [failing(search.ScoringFailed("no encoder"))])
    (trial,) = study.get_trials()
    assert endings(study) == [SCORED] and failures_of(trial) == [("crashed", True)]
    assert trial.user_attrs["training_seconds"] == 7.0


def test_a_scoring_that_fails_twice_ends_the_trial(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    study = run(settings, [], [failing(search.ScoringFailed("no encoder"))] * 2)
    assert endings(study) == [(FAIL, "crashed"), SCORED]
    assert failures_of(study.get_trials()[0]) == [("crashed", True)] * 2


def test_a_crash_and_a_failed_scoring_are_two_kinds(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 1), [failing(search.TrialFailed("boom"))], [failing(search.ScoringFailed("x"))])
    assert endings(study) == [SCORED]
    assert failures_of(study.get_trials()[0]) == [("crashed", False), ("crashed", True)]


def test_an_interrupted_scoring_is_scored_again_after_any_number_of_interruptions(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [], [failing(KeyboardInterrupt())])
    never = [failing(AssertionError("trained again"))]
    with pytest.raises(KeyboardInterrupt):
        run(settings, never, [failing(KeyboardInterrupt())])
    assert endings(run(settings, never)) == [SCORED]


def test_a_training_that_was_repeated_is_not_trained_a_third_time(tmp_path: Path) -> None:
    """Its folder vanished, and the scoring after the second training is interrupted too."""
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [], [failing(KeyboardInterrupt())])
    shutil.rmtree(settings.output_dir / "trial_0000")
    with pytest.raises(KeyboardInterrupt):
        run(settings, [good_training], [failing(KeyboardInterrupt())])
    assert endings(run(settings, [failing(AssertionError("trained a third time"))])) == [SCORED]


def test_a_training_that_starts_again_finds_nothing_of_the_broken_one(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    folder = settings.output_dir / "trial_0000"

    def break_off(folder: Path) -> None:
        save_two_checkpoints(folder)
        (folder / "logs").mkdir()
        (folder / "logs" / "events").write_text("of the first attempt")
        (folder / "training.log").write_text("Traceback")
        (folder / "my notes.txt").write_text("mine")
        raise search.TrialFailed("the trainer ended with status 1, after it had saved all")

    seen: list[str] = []

    def look_and_train(folder: Path) -> None:
        seen.extend(sorted(file.name for file in folder.iterdir()))
        good_training(folder)

    assert endings(run(settings, [break_off, look_and_train])) == [SCORED]
    assert seen == ["config.toml", "my notes.txt", "params.json", "training.earlier.log"]
    assert (folder / "training.earlier.log").read_text() == "Traceback"


def test_a_training_that_failed_is_not_taken_for_one_whose_end_nobody_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saved everything and then ended badly, on the CPU for example; the program dies before the next attempt."""
    monkeypatch.setattr(search, "has_finished_training", lambda folder: (folder / "lora.safetensors").is_file())
    settings = settings_for(tmp_path, 1)

    def end_badly(folder: Path) -> None:
        good_training(folder)
        raise search.TrialFailed("the trainer used the CPU instead of cuda")

    trained: list[Path] = []
    with pytest.raises(Killed):
        run(settings, [end_badly, failing(Killed())])
    assert endings(run(settings, [lambda folder: (trained.append(folder), good_training(folder))])) == [SCORED]
    assert trained == [settings.output_dir / "trial_0000"]


def test_three_equal_failures_of_different_parameters_stop_the_study(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 5)
    with pytest.raises(search.SearchStopped, match=r"the last three attempts ended alike.*no bitsandbytes"):
        run(settings, [failing(search.TrialFailed("no bitsandbytes"))] * 3)
    assert endings(open_study(settings)) == [(FAIL, "crashed"), LEFT]


def test_failures_that_differ_in_numbers_alone_are_equal(tmp_path: Path) -> None:
    failures = [failing(search.OutOfMemory(f"tried to allocate {n}.00 MiB in trial_{n:04d}")) for n in range(9)]
    with pytest.raises(search.SearchStopped, match="tried to allocate"):
        run(settings_for(tmp_path, 2), failures)


def test_two_trials_that_are_too_large_for_the_card_do_not_stop_the_study(tmp_path: Path) -> None:
    """Each is tried twice, so there are four equal failures in a row; a third such trial is needed."""
    full = failing(search.OutOfMemory("no room"))
    assert endings(run(settings_for(tmp_path / "two", 1), [full] * 4)) == [(PRUNED, "out of memory")] * 2 + [SCORED]
    with pytest.raises(search.SearchStopped, match="ended alike"):
        run(settings_for(tmp_path / "three", 5), [full] * 5)


def test_a_rejected_trial_between_equal_failures_does_not_hide_them(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    study = open_study(settings)
    for params in (SAFE, UNSAFE, {**SAFE, "network_dim": 128}):
        study.enqueue_trial(params)
    with pytest.raises(search.SearchStopped, match="ended alike"):
        run(settings, [failing(search.TrialFailed("boom"))] * 3)
    assert [ended for _, ended in endings(study)] == ["crashed", "rejected", "interrupted"]


def test_a_success_between_failures_begins_the_count_anew(tmp_path: Path) -> None:
    failure = failing(search.TrialFailed("boom"))
    study = run(settings_for(tmp_path, 3), [failure, failure, good_training, failure, failure])
    assert [state for state, _ in endings(study)] == [FAIL, COMPLETE, FAIL, COMPLETE, COMPLETE]


def test_failures_of_an_earlier_start_do_not_stop_this_one(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    for failures in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            run(settings, [failing(search.TrialFailed("boom"))] * failures + [failing(KeyboardInterrupt())])
    assert endings(run(settings)) == [(FAIL, "crashed"), SCORED]


def test_a_crash_an_interruption_and_a_crash_are_enough(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(search.TrialFailed("boom")), failing(KeyboardInterrupt())])
    study = run(settings, [failing(search.TrialFailed("boom"))])
    assert endings(study) == [(FAIL, "crashed"), SCORED]
    assert suggested(study.get_trials()[0]) != suggested(study.get_trials()[1])


def test_out_of_memory_before_and_after_an_interruption_is_learnt_from(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(search.OutOfMemory("no room")), failing(KeyboardInterrupt())])
    assert endings(run(settings, [failing(search.OutOfMemory("no room"))]))[0] == (PRUNED, "out of memory")


def test_a_full_disk_interrupts_the_trial_and_stops_the_study(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    for _ in range(2):
        with pytest.raises(search.SearchStopped, match=f"No space left on device: {settings.output_dir}; mend that"):
            run(settings, [failing(OSError(28, "No space left on device"))])
        assert endings(open_study(settings)) == [LEFT]
    study = run(settings)
    assert endings(study) == [SCORED] and "failures" not in study.get_trials()[0].user_attrs


def test_different_failures_do_not_stop_it(tmp_path: Path) -> None:
    failures = [failing(search.TrialFailed(f"boom {word}")) for word in ("a", "b", "c", "d")]
    assert endings(run(settings_for(tmp_path, 1), failures))[-1] == (COMPLETE, "scored")


# --- a program that died -----------------------------------------------------------------------------


def test_a_trial_that_was_running_is_continued_with_its_own_parameters(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    with pytest.raises(Killed):
        run(settings, [good_training, failing(Killed())])
    left = open_study(settings).get_trials()[1]
    assert left.state == RUNNING and "ended" not in left.user_attrs
    study = run(settings)
    assert endings(study) == [SCORED] * 2
    assert suggested(study.get_trials()[1]) == suggested(left)


def test_where_the_training_had_finished_only_the_scoring_is_done_again(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [], [failing(Killed())])
    assert endings(run(settings, [failing(AssertionError("trained again"))])) == [SCORED]


def test_metrics_that_were_whole_on_disk_are_told_from_there(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def score_and_die(folder: Path) -> None:
        good_scoring(folder)
        raise Killed

    with pytest.raises(Killed):
        run(settings, [], [score_and_die])
    never = failing(AssertionError("made again"))
    study = run(settings, [never], [never])
    assert endings(study) == [(COMPLETE, "scored")] and study.best_value == pytest.approx(0.1)


def test_metrics_that_were_whole_at_an_interruption_are_told(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def score_and_interrupt(folder: Path) -> None:
        good_scoring(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, [], [score_and_interrupt])
    assert endings(open_study(settings)) == [(COMPLETE, "scored")]


def test_metrics_of_a_training_that_had_not_finished_are_not_told(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [failing(Killed())])
    good_scoring(settings.output_dir / "trial_0000")
    done: list[tuple[str, Path]] = []
    training = [lambda folder: (done.append(("trained", folder)), good_training(folder))]
    scoring = [lambda folder: (done.append(("scored", folder)), good_scoring(folder))]
    assert endings(run(settings, training, scoring)) == [SCORED]
    assert done == [(what, settings.output_dir / "trial_0000") for what in ("trained", "scored")]


def test_a_score_that_is_no_number_is_a_scoring_that_failed(tmp_path: Path) -> None:
    def score_nan(folder: Path) -> None:
        good_scoring(folder)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**metrics, "score": float("nan")}))

    study = run(settings_for(tmp_path, 1), [], [score_nan])
    assert endings(study) == [SCORED] and failures_of(study.get_trials()[0]) == [("crashed", True)]


def test_what_an_interrupted_attempt_wasted_is_added_up(tmp_path: Path) -> None:
    """From its config to its newest file, however long the program was gone."""
    settings = settings_for(tmp_path, 1)

    def train_for_a_minute_and_die(folder: Path) -> None:
        ended = (folder / "config.toml").stat().st_mtime + 60
        (folder / "training.log").touch()
        os.utime(folder / "training.log", (ended, ended))
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            run(settings, [train_for_a_minute_and_die])
    (trial,) = run(settings).get_trials()
    assert trial.user_attrs["lost_seconds"] == pytest.approx(120, abs=2) and trial.state == COMPLETE


def test_a_training_that_ended_as_the_program_died_is_only_scored(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def train_and_die(folder: Path) -> None:
        good_training(folder)
        raise Killed

    with pytest.raises(Killed):
        run(settings, [train_and_die])
    study = run(settings, [failing(AssertionError("trained again"))])
    assert endings(study) == [SCORED]
    assert study.get_trials()[0].user_attrs["training_seconds"] >= 0


def test_what_was_not_yet_suggested_is_completed_around_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of suggesting: the trial keeps its first values, and the whole passes the constraints."""
    suggest = search._suggest
    for count in range(1, len(search.SEARCH_SPACE) + 1):
        settings = settings_for(tmp_path / str(count), 1)
        names = iter([None] * count)

        def suggest_some(trial: optuna.Trial, name: str, kind: object, names: Iterator[None] = names) -> object:
            if next(names, Killed) is Killed:
                raise Killed
            return suggest(trial, name, kind)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(search, "_suggest", suggest_some)
            run(settings, [failing(Killed())])
        before = suggested(open_study(settings).get_trials()[0])
        assert len(before) == count
        (trial,) = run(settings).get_trials()
        assert before.items() <= trial.params.items() and trial.state == COMPLETE


def test_enqueued_values_survive_a_death_before_they_were_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 1)
    open_study(settings).enqueue_trial({"network_dim": 128, "network_alpha_ratio": 0.3})
    with monkeypatch.context() as patch:
        patch.setattr(search, "suggest_hyperparameters", failing(Killed()))
        with pytest.raises(Killed):
            run(settings)
    trial = run(settings).get_trials()[-1]
    assert trial.params["network_dim"] == 128 and trial.params["network_alpha_ratio"] == 0.3


def test_torn_metrics_are_not_told(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def tear_and_die(folder: Path) -> None:
        (folder / "metrics.json").write_text('{"outcome": "sco')
        raise Killed

    with pytest.raises(Killed):
        run(settings, [], [tear_and_die])
    assert endings(run(settings)) == [SCORED]


# --- several folders in one storage -------------------------------------------------------------------


def two_folders(tmp_path: Path, n_trials: int) -> tuple[search.Settings, search.Settings]:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = (settings_for(tmp_path / name, n_trials, storage=storage) for name in ("here", "there"))
    return here, there


def interrupted_in(settings: search.Settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(KeyboardInterrupt())])


def test_running_trials_of_another_folder_are_left_alone(tmp_path: Path) -> None:
    here, there = two_folders(tmp_path, 3)
    with pytest.raises(Killed):
        run(there, [failing(Killed())])
    study_of(here).adopt()
    assert open_study(here).get_trials()[0].user_attrs["output_dir"] == str(there.output_dir)


def test_an_interrupted_trial_is_continued_in_its_own_folder_alone(tmp_path: Path) -> None:
    here, there = two_folders(tmp_path, 2)
    interrupted_in(there)
    interrupted_in(here)
    study = run(there)
    assert endings(study) == [SCORED, LEFT, SCORED]  # and nobody waits for the one that stopped
    assert [trial.user_attrs["output_dir"] for trial in study.get_trials()] == [
        str(settings.output_dir) for settings in (there, here, there)
    ]


def test_who_comes_back_when_the_others_have_trained_the_last_ones_is_one_too_many(tmp_path: Path) -> None:
    here, there = two_folders(tmp_path, 2)
    interrupted_in(there)
    run(here)
    study = run(there, [failing(AssertionError("trained one too many"))])
    assert endings(study) == [(FAIL, "interrupted"), SCORED, SCORED]
    assert study.get_trials()[0].user_attrs["reason"] == "enough other trials are trained"


def test_who_comes_back_while_the_others_train_the_last_ones_is_one_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two_folders(tmp_path, 1)
    interrupted_in(there)
    monkeypatch.setattr(search.screen, "wait", failing(Killed()))

    def come_back(folder: Path) -> None:
        with pytest.raises(Killed):  # once it is closed, it waits
            run(there, [failing(AssertionError("trained one too many"))])
        good_training(folder)

    assert endings(run(here, [come_back])) == [(FAIL, "interrupted"), SCORED]


def test_who_comes_back_in_time_is_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = two_folders(tmp_path, 1)
    interrupted_in(there)
    monkeypatch.setattr(search.screen, "wait", failing(Killed()))

    def look(folder: Path) -> None:
        with pytest.raises(Killed):  # it waits for this one
            run(here, [failing(AssertionError("trained one too many"))])
        good_training(folder)

    assert endings(run(there, [look])) == [SCORED]


def _work_interrupted(settings: search.Settings) -> None:
    """A program that is interrupted in its first training, in its third's scoring, and then goes on."""
    for steps in (([failing(KeyboardInterrupt())], []), ([], [good_scoring, failing(KeyboardInterrupt())])):
        with contextlib.suppress(KeyboardInterrupt):
            run(settings, *steps)
    run(settings)


@pytest.mark.parametrize("workers", [2, 8])
def test_programs_that_are_interrupted_and_come_back_end_at_exactly_n(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "POLL_SECONDS", 0.05)
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    all_settings = [settings_for(tmp_path / str(n), 12, storage=storage) for n in range(workers)]
    assert work_at_once(_work_interrupted, all_settings) == [0] * workers
    trials = open_study(all_settings[0]).get_trials()
    assert sum(map(search.is_trained, trials)) == 12
    assert {trial.state for trial in trials} <= {COMPLETE, FAIL}


def test_another_programs_trial_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = (settings_for(tmp_path / name, 1, storage=storage) for name in ("here", "there"))
    other = open_study(there)
    trial = other.ask()
    trial.set_user_attr("output_dir", str(there.output_dir))
    waited = []

    def finish_meanwhile(_seconds: float) -> None:
        waited.append(trial.number)
        trial.set_user_attr("ended", "scored")
        other.tell(trial, 0.5)

    monkeypatch.setattr(search.screen, "wait", finish_meanwhile)
    assert endings(run(here)) == [(COMPLETE, "scored")] and waited == [0]


def test_of_two_that_begin_at_once_the_later_one_is_surplus(tmp_path: Path) -> None:
    ours = study_of(settings_for(tmp_path, 2))
    study = ours.study
    study.enqueue_trial({"network_dim": 64})
    waiting = study.ask()  # the enqueued one ...
    study.enqueue_trial({"network_dim": 128})
    enqueued = study.get_trials()[1]
    fresh = optuna.Trial(study, study._storage.create_new_trial(study._study_id))
    late = study.ask()  # ... and one with a lower number than a trial that began before it
    assert late.number == enqueued.number < fresh.number
    assert [ours.close_surplus(trial) for trial in (waiting, fresh, late)] == [False, False, True]
    assert [state for state, _ in endings(study)] == [RUNNING, FAIL, RUNNING, WAITING]  # an enqueued one again


def test_a_running_trial_of_a_locked_folder_is_left_alone_in_the_folders_own_database(tmp_path: Path) -> None:
    owner = settings_for(tmp_path / "owner", 3)
    guest = settings_for(tmp_path / "guest", 3, storage=owner.storage)
    with pytest.raises(Killed):
        run(guest, [failing(Killed())])
    ours = study_of(owner)
    with search.holding(guest.output_dir):
        ours.adopt()
        assert ours.study.get_trials()[0].user_attrs["output_dir"] == str(guest.output_dir)
    ours.adopt()
    assert ours.study.get_trials()[0].user_attrs["output_dir"] == str(owner.output_dir)


def test_the_timeout_starts_no_new_trial(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3, timeout_hours=1e-9)
    with pytest.raises(search.SearchStopped, match=r"--timeout 1e-09 is over with 0 of 3 trials trained"):
        run(settings)
    assert open_study(settings).get_trials() == []


# --- storage and lock --------------------------------------------------------------------------------


def test_every_transaction_takes_the_write_lock_at_its_start(tmp_path: Path) -> None:
    storage = search.Storage(f"sqlite:///{tmp_path / 's.db'}").open()
    other = sqlite3.connect(tmp_path / "s.db", timeout=0)
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_text("this is no database, " * 100)
    with pytest.raises(search.RefusedInput) as caught:
        search.load_study(f"sqlite:///{tmp_path / 's.db'}", "x")
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


def test_another_programs_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    before = (tmp_path / "s.db").read_bytes()
    with pytest.raises(search.RefusedInput, match="database of another program"):
        search.load_study(f"sqlite:///{tmp_path / 's.db'}", "x")
    assert (tmp_path / "s.db").read_bytes() == before


def test_a_study_of_a_newer_optuna_is_refused_in_one_line(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    open_study(settings)
    with sqlite3.connect(settings.output_dir / search.DATABASE_NAME) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    with pytest.raises(search.RefusedInput, match=r"was made by a newer Optuna.*pip install -U optuna") as caught:
        search.load_study(settings.storage, settings.study_name)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


def test_a_database_that_can_grow_no_more_stops_the_search_which_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite says the same as on a full disk; the trial is told from its files when there is room."""
    settings = settings_for(tmp_path, 2)
    open_study(settings)

    def fill_up(folder: Path) -> None:
        good_scoring(folder)
        with sqlite3.connect(settings.output_dir / search.DATABASE_NAME) as database:
            (pages,) = database.execute("PRAGMA page_count").fetchone()
        event.listen(
            engines[-1], "begin", lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        )

    engines = []
    open_storage, objective = search.Storage.open, search.LoraObjective.__call__

    def remember_engine(self: search.Storage) -> optuna.storages.BaseStorage:
        storage = open_storage(self)
        engines.append(storage.engine)
        return storage

    def write_much(self: search.LoraObjective, trial: optuna.Trial) -> float:
        value = objective(self, trial)
        trial.set_user_attr("padding", "x" * 20_000)  # more than the last page has room for
        return value

    with monkeypatch.context() as patched:
        patched.setattr(search.Storage, "open", remember_engine)
        patched.setattr(search.LoraObjective, "__call__", write_much)
        with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
            run(settings, [], [fill_up])
    assert "full" in str(caught.value.__cause__)
    study = run(settings)
    assert endings(study) == [(COMPLETE, "scored")] * 2
    assert study.get_trials()[0].value == pytest.approx(0.1)


def test_an_empty_file_is_no_study_yet(tmp_path: Path) -> None:
    (tmp_path / "s.db").touch()
    for dialect in ("sqlite", "sqlite+pysqlite"):
        assert search.load_study(f"{dialect}:///{tmp_path / 's.db'}", "x") is None
    assert (tmp_path / "s.db").stat().st_size == 0


def test_looking_for_a_study_makes_no_database(tmp_path: Path) -> None:
    assert search.load_study(f"sqlite:///{tmp_path / 's.db'}", "x") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:s3cr3t@host/db", "postgresql://***@host/db"),
        ("postgresql+psycopg://me:s3cr3t%40@host.lan:5432/db?sslmode=require", "postgresql+psycopg://***@host.lan/db"),
        ("mysql+pymysql://127.0.0.1/db", "mysql+pymysql://127.0.0.1/db"),
        ("sqlite:////runs/my studies #1.db", "sqlite:////runs/my studies #1.db"),
        ("sqlite:////home/me@lab/out/optuna_study.db", "sqlite:////home/me@lab/out/optuna_study.db"),
        ("postgresql://me:s3@cr3t@host/db", "postgresql://***"),
        ("me:s3cr3t@host/db", "***"),
    ],
)
def test_of_an_address_only_what_is_no_secret_is_shown(address: str, shown: str) -> None:
    assert search.Storage(address).shown == shown


def test_what_a_server_says_is_shown() -> None:
    pytest.importorskip("psycopg", reason="on PostgreSQL (apt-get install postgresql, pip install 'psycopg[binary]')")
    with pytest.raises(search.RefusedInput, match=r"127\.0\.0\.1/db \(.*refused.*\); check the server") as caught:
        search.load_study("postgresql+psycopg://me:s3cr3t@127.0.0.1:1/db", "x")
    assert "s3cr3t" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_without_tables_is_left_so(postgresql: Callable[[], str]) -> None:
    url = postgresql()
    assert search.load_study(url, "x") is None and search.Storage(url).tables() == set()


def test_a_study_that_was_only_created_is_gone_on_with(tmp_path: Path) -> None:
    """Its program was killed before it wrote the fingerprint."""
    settings = settings_for(tmp_path)
    open_study(settings)
    study = search.load_study(settings.storage, settings.study_name)
    assert study is not None and study.get_trials() == []


def test_what_a_killed_program_had_not_committed_is_rolled_back(tmp_path: Path) -> None:
    """Killed in the middle of a commit, it leaves a journal, which nobody can read past without writing."""
    settings = settings_for(tmp_path)
    database = settings.output_dir / search.DATABASE_NAME
    open_study(settings)
    code = (
        "import os, sqlite3, sys\nd = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "d.execute('PRAGMA cache_size=1'); d.execute('BEGIN IMMEDIATE')\nfor n in range(500):\n"
        "    d.execute('INSERT INTO studies (study_name) VALUES (?)', (f'{n}' * 500,))\nos.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(database)])
    assert database.with_name(f"{database.name}-journal").stat().st_size > 0
    assert search.find_study(settings) is not None
    assert len(optuna.get_all_study_names(settings.storage)) == 1


def test_asking_whether_a_folder_is_locked_only_looks(tmp_path: Path) -> None:
    assert not search.is_held(tmp_path) and not search.is_held(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    with search.holding(tmp_path):
        assert search.is_held(tmp_path)
    file = tmp_path / ".lock"
    file.write_text("process 7 on elsewhere")
    os.utime(file, (1, 1))
    assert not search.is_held(tmp_path)
    assert file.read_text() == "process 7 on elsewhere" and file.stat().st_mtime == 1


def test_a_folder_belongs_to_one_program(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib, optuna_hyperparameter_search as s\n"
        "with s.holding(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(search.RefusedInput, match=f"in use by process {holder.pid} on "),
        search.holding(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with search.holding(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


# --- fingerprint -------------------------------------------------------------------------------------


def test_differences_are_named_down_to_the_setting(tmp_path: Path) -> None:
    study = open_study(settings_for(tmp_path))
    fingerprint = {"seed": 1, "training options": {"clip_skip": 2, "sdpa": True}, "encoders": {"clip": "a"}}
    study.set_user_attr("fingerprint", fingerprint)
    search.check_fingerprint(study, fingerprint)
    with pytest.raises(search.RefusedInput) as caught:
        changed = {"seed": 1, "training options": {"clip_skip": 1, "xformers": True}, "encoders": {"clip": "a"}}
        search.check_fingerprint(study, changed)
    lines = caught.value.problems
    remedy = "; nothing is trained in it yet: delete its --output-dir; with --storage give another --study-name, too"
    assert all(line.endswith(remedy) for line in lines)
    assert [line.split("inputs: ")[1].split(";")[0] for line in lines] == [
        "training options, clip_skip: was 2, is now 1",
        "training options, sdpa: was True, is now None",
        "training options, xformers: was None, is now True",
    ]


def test_a_space_that_was_a_file_is_named_as_one(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 1))
    file = search.space_fingerprint(search.SearchSpace.read(search.HERE / "configs" / "search_space_prodigy.toml"))
    spaces = [{"search space": space} for space in (file, search.space_fingerprint(search.V2_1))]
    for old, new, said in (
        (*spaces, "search space: was that of a --search-space file, is now V2.1; its scores would not be comparable"),
        (*spaces[::-1], "search space: was V2.1, is now that of a --search-space file; its scores"),
    ):
        study.set_user_attr("fingerprint", old)
        with pytest.raises(search.RefusedInput, match=f"made with other inputs: {said}") as caught:
            search.check_fingerprint(study, new)
        assert caught.value.problems[0].endswith("--output-dir (with --storage another --study-name, too)")


def test_anchors_may_move_by_rounding_but_not_by_more(tmp_path: Path) -> None:
    study = open_study(settings_for(tmp_path))
    anchors = {"screen": {"q_base": 0.5}, "version": "x"}
    search.check_anchors(study, anchors)
    search.check_anchors(study, {"screen": {"q_base": 0.505}, "version": "x"})
    with pytest.raises(search.RefusedInput, match=r"screen, q_base: was 0\.5, is now 0\.52"):
        search.check_anchors(study, {"screen": {"q_base": 0.52}, "version": "x"})


@pytest.mark.parametrize(
    ("stored", "named"),
    [({}, "form of the study: was None"), (dict([search.STUDY_FORM]), "definition of the score: was None")],
)  # fmt: skip
def test_a_study_of_an_earlier_version_is_refused_and_can_be_shown(
    tmp_path: Path, stored: dict[str, int], named: str
) -> None:
    settings = settings_for(tmp_path)
    study = open_study(settings)
    study.set_user_attr("fingerprint", {**stored, "seed": 1})
    with pytest.raises(search.RefusedInput, match=r"made by another version of this program.*--output-dir") as caught:
        search.check_fingerprint(study, {**dict([search.STUDY_FORM, search.SCORE_DEFINITION]), "seed": 2})
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value) and named in str(caught.value)
    assert search.load_study(settings.storage, settings.study_name) is not None


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    search.write_json(settings.reference / "plan.json", {"study": "the first"})
    with pytest.raises(search.RefusedInput, match="holds study 'the first'"):
        search.find_study(settings)


def test_trial_folders_without_their_study_are_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    (settings.output_dir / "trial_0003").mkdir()
    with pytest.raises(search.RefusedInput, match="not of this study"):
        search.find_study(settings)


# --- enqueueing --------------------------------------------------------------------------------------


def test_enqueued_parameters_come_first_and_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    ours = study_of(settings)
    for _ in range(2):
        ours.enqueue([dict(SAFE), dict(SAFE)])
    run(settings)
    ours.enqueue([dict(SAFE)])
    trials = ours.study.get_trials()
    assert len(trials) == 2 and suggested(trials[0]) == SAFE != suggested(trials[1])
    ours.enqueue([dict(trials[1].params)])  # which the sampler has proposed
    assert len(ours.study.get_trials()) == 2
