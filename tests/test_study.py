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
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from safetensors.numpy import save
from sqlalchemy import event

import optuna_hyperparameter_search as search

REPOSITORY = Path(__file__).resolve().parents[1]
SAFE = {
    "learning_rate": 8e-5, "text_encoder_lr": 4e-5, "network_dim": 64, "network_alpha_ratio": 0.5,
    "optimizer_type": "AdamW", "max_train_epochs": 16, "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2, "lr_warmup_steps": 100,
}  # fmt: skip
UNSAFE = {**SAFE, "network_alpha_ratio": 0.9, "optimizer_type": "AdamW8bit"}
TERMS = {"fidelity": 0.5, "text": 0.6, "preservation": 0.7, "variety": 0.8, "usable": 1.0}


@pytest.fixture(autouse=True)
def quick_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite without waiting for the disk: what a power cut would take, no test here looks at."""
    open_storage = search.open_storage

    def open_quickly(url: str) -> optuna.storages.BaseStorage:
        storage = open_storage(url)
        if url.startswith("sqlite"):
            event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
            storage.engine.dispose()
        return storage

    monkeypatch.setattr(search, "open_storage", open_quickly)


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


def settings_for(folder: Path, n_trials: int = 3, **changes: object) -> search.Settings:
    output_dir = folder / "out"
    (output_dir / "reference").mkdir(parents=True, exist_ok=True)
    settings = search.Settings(
        dataset_config=folder / "dataset.toml", base_model=folder / "model.safetensors", output_dir=output_dir,
        study_name="test", n_trials=n_trials, device="cpu", sd_scripts=folder, trainer_python=sys.executable,
        training_config=folder, scoring_config=folder, eval_prompts=None, subject=None,
        storage=search.default_storage(output_dir), seed=1, enqueue=None, timeout_hours=None,
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


def open_study(settings: search.Settings) -> optuna.Study:
    return optuna.create_study(
        study_name=settings.study_name, storage=search.open_storage(settings.storage), direction="maximize",
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
        "checkpoint": "lora.safetensors", "terms": TERMS, "scoring_seconds": 2.0,
    }  # fmt: skip
    search.write_json(folder / "metrics.json", metrics)


def failing(error: BaseException) -> Step:
    def fail(_folder: Path) -> None:
        raise error

    return fail


def run(settings: search.Settings, trainings: list[Step] = (), scorings: list[Step] = ()) -> optuna.Study:
    """One start of the program's main loop; the given steps come first, then good ones."""
    train: Iterator[Step] = itertools.chain(trainings, itertools.repeat(good_training))
    score: Iterator[Step] = itertools.chain(scorings, itertools.repeat(good_scoring))

    def trainer(config: Path, _usual_step: float | None) -> tuple[float, float]:
        next(train)(config.parent)
        return 7.0, 0.5

    study = open_study(settings)
    search.close_interrupted_trials(study, settings)
    objective = search.LoraObjective(settings, {"seed": 42}, trainer, lambda folder: next(score)(folder))
    search.run_study(study, objective, settings, time.monotonic())
    return study


def endings(study: optuna.Study) -> list[tuple[TrialState, str]]:
    return [(trial.state, trial.user_attrs.get("ended", "")) for trial in study.get_trials()]


def suggested(trial: FrozenTrial) -> dict[str, object]:
    return dict(trial.params)


COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


# --- a trial -----------------------------------------------------------------------------------------


def test_a_scored_trial_keeps_all_that_the_report_needs(tmp_path: Path) -> None:
    trial = run(settings_for(tmp_path, 1)).get_trials()[0]
    attrs = trial.user_attrs
    assert trial.value == pytest.approx(0.1) and trial.state == COMPLETE
    assert attrs["training_params"] == search.complete_params(trial.params)
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

    def trainer(config: Path, usual_step: float | None) -> tuple[float, float]:
        good_training(config.parent)
        batches = search.read_toml(config, "config")["gradient_accumulation_steps"]
        usual.append(usual_step and usual_step / batches)
        return 7.0, 2.0 * batches

    settings = settings_for(tmp_path, 6)
    study = open_study(settings)
    search.run_study(study, search.LoraObjective(settings, {}, trainer, good_scoring), settings, time.monotonic())
    assert usual == [None, None, None, 2.0, 2.0, 2.0]
    assert [trial.user_attrs["batch_seconds"] for trial in study.get_trials()] == [2.0] * 6
    assert len({trial.params["gradient_accumulation_steps"] for trial in study.get_trials()}) > 1


def test_the_study_maximizes(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 3))
    assert study.best_trial.number == 2


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


def test_a_folder_that_exists_is_never_written_into(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    (settings.output_dir / "trial_0000").mkdir()
    with pytest.raises(search.SearchStopped):
        run(settings)
    assert list((settings.output_dir / "trial_0000").iterdir()) == []


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
    study = run(settings, [failing(search.TrialFailed("boom")), failing(search.Diverged("nan"))])
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


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_programs_that_share_a_storage_end_at_exactly_n(
    tmp_path: Path, workers: int, database: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(search, "POLL_SECONDS", 0.05)
    urls = {"sqlite": lambda: f"sqlite:///{tmp_path / 'shared.db'}"}
    storage = urls.get(database, lambda: request.getfixturevalue("postgresql")())()
    all_settings = [settings_for(tmp_path / str(n), 16, storage=storage) for n in range(workers)]
    open_study(all_settings[0])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(settings,)) for settings in all_settings]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * workers
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
    assert endings(run(settings)) == [(FAIL, "interrupted"), (COMPLETE, "scored"), (COMPLETE, "scored")]
    written = "".join(file.read_text(errors="replace") for file in settings.output_dir.rglob("*") if file.is_file())
    assert "s3cr3t" in settings.storage and "s3cr3t" not in written + capsys.readouterr().out


# --- killed at any moment ----------------------------------------------------------------------------


WRITES = (
    (optuna.Study, "ask"), (optuna.Study, "tell"), (optuna.Study, "enqueue_trial"), (optuna.Trial, "set_user_attr"),
    (search, "write_atomically"), (Path, "mkdir"), (Path, "unlink"), (os, "link"),
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
        trials = study.get_trials()
        assert sum(map(search.is_trained, trials)) == 2, moment
        assert not [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)], moment
        assert len(set(trainings)) == len(trainings) == 2, moment
        for trial in search.scored_trials(study):
            folder = settings.output_dir / trial.user_attrs["folder"]
            assert json.loads((folder / "metrics.json").read_text())["score"] == trial.value, moment
            assert (folder / "lora.safetensors").is_file(), moment
        if countdown.left > 0:
            assert moment > 80
            return


def test_a_trial_that_nobody_claimed_is_closed_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program died between asking and writing down whose it is, in a storage that others share."""
    settings = settings_for(tmp_path, 2, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    study = open_study(settings)
    study.enqueue_trial(SAFE)
    study.ask()
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(search, "UNCLAIMED_SECONDS", 0.2)
    study = run(settings)
    assert endings(study) == [(FAIL, "interrupted"), (COMPLETE, "scored"), (COMPLETE, "scored")]
    again = [trial for trial in study.get_trials() if trial.user_attrs.get("retry_of") == 0]
    assert len(again) == 1 and {name: again[0].params[name] for name in SAFE} == SAFE


def test_who_slept_too_long_before_claiming_leaves_the_trial_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 1)
    claim, others = search.claim_trial, []

    def sleep_before_claiming(trial: optuna.Trial, settings: search.Settings) -> None:
        if not others:
            others.append(trial.number)
            trial.study.tell(trial.number, state=FAIL)
        claim(trial, settings)

    monkeypatch.setattr(search, "claim_trial", sleep_before_claiming)
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


def test_all_checkpoints_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2, keep_checkpoints="all")
    run(settings, [save_two_checkpoints] * 2)
    assert len(kept(settings)) == 4


def test_what_is_not_scored_yet_is_kept_and_what_was_scored_elsewhere_is_not(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [save_two_checkpoints], [failing(search.ScoringFailed("no encoder")), failing(Killed())])
    assert len([name for name in kept(settings) if name.startswith("trial_0000")]) == 2
    run(settings, [failing(AssertionError("trained again"))])
    assert kept(settings) == ["trial_0002/lora.safetensors"]


OWN = ("lora-copy.safetensors", "lora-best-000006.safetensors", "lora-6.safetensors", "lora2.safetensors")


def save_own_files_too(folder: Path) -> None:
    save_two_checkpoints(folder)
    for name in OWN:
        (folder / name).write_bytes(b"a user's")


def test_a_users_own_files_in_a_trials_folder_are_no_checkpoints_and_never_deleted(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    with pytest.raises(Killed):  # the first trial has finished its training
        run(settings, [save_own_files_too], [failing(search.ScoringFailed("no encoder")), failing(Killed())])
    names = [(epoch, path.name) for epoch, path in search.find_checkpoints(settings.output_dir / "trial_0000")]
    assert names[:-1] == [(6, "lora-000006.safetensors")] and names[-1][1] == "lora.safetensors"
    run(settings, [save_own_files_too])
    own = [name for name in kept(settings) if name.rpartition("/")[2] in OWN]
    assert own == sorted(f"trial_{number:04d}/{name}" for number in (0, 3) for name in OWN)
    assert sorted(set(kept(settings)) - set(own)) == ["trial_0002/lora.safetensors", "trial_0003/lora.safetensors"]


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


# --- retries -----------------------------------------------------------------------------------------


def test_out_of_memory_is_tried_once_more_and_then_learnt_from(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 1), [failing(search.OutOfMemory("no room"))] * 2)
    assert endings(study) == [(FAIL, "out of memory"), (PRUNED, "out of memory"), (COMPLETE, "scored")]
    first, second, third = study.get_trials()
    assert suggested(first) == suggested(second) != suggested(third)
    assert second.user_attrs["retry_of"] == 0


def test_a_crash_is_tried_once_more(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 1), [failing(search.TrialFailed("boom"))] * 2)
    assert endings(study) == [(FAIL, "crashed"), (FAIL, "crashed"), (COMPLETE, "scored")]
    first, second, third = study.get_trials()
    assert suggested(first) == suggested(second) != suggested(third)


def test_an_interruption_is_tried_again_always(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(settings, [failing(KeyboardInterrupt())])
    study = run(settings)
    assert endings(study) == [(FAIL, "interrupted")] * 3 + [(COMPLETE, "scored")]
    assert len({json.dumps(suggested(trial)) for trial in study.get_trials()}) == 1


def test_a_failed_scoring_repeats_only_the_scoring_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1, keep_checkpoints="all")
    trained = [good_training, failing(AssertionError("trained again"))]
    study = run(settings, trained, [failing(search.ScoringFailed("no encoder"))])
    assert endings(study) == [(FAIL, "crashed"), (COMPLETE, "scored")]
    second = study.get_trials()[1]
    assert second.user_attrs["trained_in"] == str(settings.output_dir / "trial_0000")
    assert second.user_attrs["training_seconds"] == 7.0
    for folder in ("trial_0000", "trial_0001"):
        assert (settings.output_dir / folder / "lora.safetensors").read_bytes() == weights_of("trial_0000")


def test_an_interrupted_scoring_is_scored_again_after_any_number_of_interruptions(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [], [failing(KeyboardInterrupt())])
    never = [failing(AssertionError("trained again"))]
    with pytest.raises(KeyboardInterrupt):
        run(settings, never, [failing(KeyboardInterrupt())])
    assert endings(run(settings, never))[-1] == (COMPLETE, "scored")


def test_a_training_that_was_repeated_is_not_trained_a_third_time(tmp_path: Path) -> None:
    """The first one's folder vanished, and the scoring of the second is interrupted too."""
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [], [failing(KeyboardInterrupt())])
    shutil.rmtree(settings.output_dir / "trial_0000")
    with pytest.raises(KeyboardInterrupt):
        run(settings, [good_training], [failing(KeyboardInterrupt())])
    study = run(settings, [failing(AssertionError("trained a third time"))])
    assert [ended for _, ended in endings(study)] == ["interrupted", "interrupted", "scored"]
    assert (settings.output_dir / "trial_0002" / "lora.safetensors").read_bytes() == weights_of("trial_0001")


def test_three_equal_failures_of_different_parameters_stop_the_study(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 5)
    with pytest.raises(search.SearchStopped, match=r"three trials in a row ended alike.*no bitsandbytes"):
        run(settings, [failing(search.TrialFailed("no bitsandbytes"))] * 3)
    assert len(open_study(settings).get_trials(states=(FAIL,))) == 3


def test_failures_that_differ_in_numbers_alone_are_equal(tmp_path: Path) -> None:
    failures = [failing(search.OutOfMemory(f"tried to allocate {n}.00 MiB in trial_{n:04d}")) for n in range(9)]
    with pytest.raises(search.SearchStopped, match="tried to allocate"):
        run(settings_for(tmp_path, 2), failures)


def test_a_rejected_trial_between_equal_failures_does_not_hide_them(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    study = open_study(settings)
    for params in (SAFE, UNSAFE, {**SAFE, "network_dim": 128}, {**SAFE, "network_dim": 256}):
        study.enqueue_trial(params)
    with pytest.raises(search.SearchStopped, match="ended alike"):
        run(settings, [failing(search.TrialFailed("boom"))] * 3)
    assert [ended for _, ended in endings(study)][:4] == ["crashed", "rejected", "crashed", "crashed"]


def test_a_success_between_failures_begins_the_count_anew(tmp_path: Path) -> None:
    failure = failing(search.TrialFailed("boom"))
    study = run(settings_for(tmp_path, 3), [failure, failure, good_training, failure, failure])
    assert [state for state, _ in endings(study)] == [FAIL, FAIL, COMPLETE, FAIL, FAIL, COMPLETE, COMPLETE]


def test_a_crash_an_interruption_and_a_crash_are_enough(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(search.TrialFailed("boom")), failing(KeyboardInterrupt())])
    study = run(settings, [failing(search.TrialFailed("boom"))])
    assert [ended for _, ended in endings(study)] == ["crashed", "interrupted", "crashed", "scored"]
    assert suggested(study.get_trials()[2]) != suggested(study.get_trials()[3])


def test_out_of_memory_before_and_after_an_interruption_is_learnt_from(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [failing(search.OutOfMemory("no room")), failing(KeyboardInterrupt())])
    assert endings(run(settings, [failing(search.OutOfMemory("no room"))]))[2] == (PRUNED, "out of memory")


def test_a_full_disk_interrupts_the_trial_and_stops_the_study(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    for _ in range(2):
        with pytest.raises(search.SearchStopped, match="No space left"):
            run(settings, [failing(OSError(28, "No space left on device"))])
    assert endings(run(settings)) == [(FAIL, "interrupted")] * 2 + [(COMPLETE, "scored")]


def test_different_failures_do_not_stop_it(tmp_path: Path) -> None:
    failures = [failing(search.TrialFailed(f"boom {word}")) for word in ("a", "b", "c", "d")]
    assert endings(run(settings_for(tmp_path, 1), failures))[-1] == (COMPLETE, "scored")


# --- a program that died -----------------------------------------------------------------------------


def test_a_trial_that_was_running_is_closed_and_its_parameters_tried_again(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    with pytest.raises(Killed):
        run(settings, [good_training, failing(Killed())])
    assert open_study(settings).get_trials()[1].state == TrialState.RUNNING
    study = run(settings)
    assert endings(study) == [(COMPLETE, "scored"), (FAIL, "interrupted"), (COMPLETE, "scored")]
    assert suggested(study.get_trials()[1]) == suggested(study.get_trials()[2])


def test_where_the_training_had_finished_only_the_scoring_is_done_again(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [], [failing(Killed())])
    study = run(settings, [failing(AssertionError("trained again"))])
    assert endings(study) == [(FAIL, "interrupted"), (COMPLETE, "scored")]


def test_metrics_that_were_whole_on_disk_are_told_from_there(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def score_and_die(folder: Path) -> None:
        good_scoring(folder)
        raise Killed

    with pytest.raises(Killed):
        run(settings, [], [score_and_die])
    study = run(settings, [failing(AssertionError("trained again"))])
    assert endings(study) == [(COMPLETE, "scored")] and study.best_value == pytest.approx(0.1)


def test_metrics_that_were_whole_at_an_interruption_are_told(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def score_and_interrupt(folder: Path) -> None:
        good_scoring(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, [], [score_and_interrupt])
    assert endings(open_study(settings)) == [(COMPLETE, "scored")]


def test_metrics_that_say_diverged_are_told_so(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)

    def find_nan_and_die(folder: Path) -> None:
        found = {"outcome": "diverged", "reason": "not finite", "score": None, "scoring_seconds": 1.0}
        search.write_json(folder / "metrics.json", found)
        raise Killed

    with pytest.raises(Killed):
        run(settings, [], [find_nan_and_die])
    assert endings(run(settings)) == [(PRUNED, "diverged"), (COMPLETE, "scored")]


def test_metrics_of_a_training_that_had_not_finished_are_not_told(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [failing(Killed())])
    good_scoring(settings.output_dir / "trial_0000")
    assert endings(run(settings)) == [(FAIL, "interrupted"), (COMPLETE, "scored")]


def test_a_score_that_is_no_number_is_a_scoring_that_failed(tmp_path: Path) -> None:
    def score_nan(folder: Path) -> None:
        good_scoring(folder)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**metrics, "score": float("nan")}))

    assert endings(run(settings_for(tmp_path, 1), [], [score_nan])) == [(FAIL, "crashed"), (COMPLETE, "scored")]


def test_a_training_that_ended_as_the_program_died_is_only_scored(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)

    def train_and_die(folder: Path) -> None:
        good_training(folder)
        raise Killed

    with pytest.raises(Killed):
        run(settings, [train_and_die])
    study = run(settings, [failing(AssertionError("trained again"))])
    assert endings(study) == [(FAIL, "interrupted"), (COMPLETE, "scored")]
    assert study.get_trials()[0].user_attrs["training_seconds"] >= 0


def test_a_retry_that_dies_before_it_has_the_checkpoints_loses_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 1)
    never = [failing(AssertionError("trained again"))]
    with monkeypatch.context() as patch:
        patch.setattr(search, "link_training", failing_link)
        with pytest.raises(search.SearchStopped):
            run(settings, [good_training], [failing(search.ScoringFailed("no encoder"))])
    study = run(settings, never)
    assert [ended for _, ended in endings(study)] == ["crashed", "interrupted", "scored"]
    assert (settings.output_dir / "trial_0002" / "lora.safetensors").read_bytes() == weights_of("trial_0000")


def failing_link(source: Path, folder: Path) -> None:
    raise OSError(28, "No space left on device")


def test_checkpoints_are_copied_where_they_can_not_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_args: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    run(settings_for(tmp_path, 1), [], [failing(search.ScoringFailed("no encoder"))])
    assert (tmp_path / "out" / "trial_0001" / "lora.safetensors").read_bytes() == weights_of("trial_0000")


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
    assert endings(run(settings)) == [(FAIL, "interrupted"), (COMPLETE, "scored")]


def test_a_kill_between_closing_and_enqueueing_loses_nothing(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    with pytest.raises(Killed):
        run(settings, [failing(Killed())])
    study = open_study(settings)
    search.close_interrupted_trials(study, settings)  # and the program dies here
    for _ in range(2):
        search.queue_retries(study, settings)
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 1


def test_running_trials_of_another_folder_are_left_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = (settings_for(tmp_path / name, 3, storage=storage) for name in ("here", "there"))
    with pytest.raises(Killed):
        run(there, [failing(Killed())])
    study = open_study(here)
    search.close_interrupted_trials(study, here)
    assert study.get_trials()[0].state == TrialState.RUNNING


def test_a_failed_trial_of_another_folder_is_tried_again_there_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = (settings_for(tmp_path / name, 1, storage=storage) for name in ("here", "there"))
    with pytest.raises(KeyboardInterrupt):
        run(there, [failing(KeyboardInterrupt())])
    study = open_study(here)
    search.queue_retries(study, here)
    assert study.get_trials(states=(TrialState.WAITING,)) == []
    search.queue_retries(study, there)
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 1


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
    study = open_study(settings_for(tmp_path))
    study.enqueue_trial({"network_dim": 64})
    waiting = study.ask()  # the enqueued one ...
    study.enqueue_trial({"network_dim": 128})
    enqueued = study.get_trials()[1]
    fresh = optuna.Trial(study, study._storage.create_new_trial(study._study_id))
    late = study.ask()  # ... and one with a lower number than a trial that began before it
    assert late.number == enqueued.number < fresh.number
    assert [search.is_surplus(study, t.number, 2) for t in (waiting, fresh, late)] == [False, False, True]


def test_a_running_trial_of_a_locked_folder_is_left_alone_in_the_folders_own_database(tmp_path: Path) -> None:
    owner = settings_for(tmp_path / "owner", 3)
    guest = settings_for(tmp_path / "guest", 3, storage=owner.storage)
    with pytest.raises(Killed):
        run(guest, [failing(Killed())])
    study = open_study(owner)
    with search.locked_folder(guest.output_dir):
        search.close_interrupted_trials(study, owner)
        assert study.get_trials()[0].state == TrialState.RUNNING
    search.close_interrupted_trials(study, owner)
    assert study.get_trials()[0].state == FAIL


def test_the_timeout_starts_no_new_trial(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3, timeout_hours=1e-9)
    with pytest.raises(search.SearchStopped, match=r"--timeout 1e-09 is over with 0 of 3 trials trained"):
        run(settings)
    assert open_study(settings).get_trials() == []


# --- storage and lock --------------------------------------------------------------------------------


def test_every_transaction_takes_the_write_lock_at_its_start(tmp_path: Path) -> None:
    storage = search.open_storage(f"sqlite:///{tmp_path / 's.db'}")
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
    open_storage = search.open_storage

    def remember_engine(url: str) -> optuna.storages.BaseStorage:
        storage = open_storage(url)
        engines.append(storage.engine)
        return storage

    monkeypatch.setattr(search, "open_storage", remember_engine)
    padding = "x" * 20_000  # more than the last page has room for
    record = search.record_metrics

    def record_much(trial: optuna.Trial, metrics: search.Metrics, folder: Path) -> None:
        trial.set_user_attr("padding", padding)
        record(trial, metrics, folder)

    with monkeypatch.context() as patched:
        patched.setattr(search, "record_metrics", record_much)
        with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
            run(settings, [], [fill_up])
    assert "full" in str(caught.value.__cause__)
    monkeypatch.setattr(search, "open_storage", open_storage)
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
    assert search.show_storage(address) == shown


def test_what_a_server_says_is_shown(tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match=r"127\.0\.0\.1/db \(.*refused.*\); check the server") as caught:
        search.load_study("postgresql+psycopg://me:s3cr3t@127.0.0.1:1/db", "x")
    assert "s3cr3t" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_without_tables_is_left_so(postgresql: Callable[[], str]) -> None:
    url = postgresql()
    assert search.load_study(url, "x") is None and search.tables_of(url) == set()


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
    assert not search.is_locked(tmp_path) and not search.is_locked(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    with search.locked_folder(tmp_path):
        assert search.is_locked(tmp_path)
    lock = tmp_path / ".lock"
    lock.write_text("process 7 on elsewhere")
    os.utime(lock, (1, 1))
    assert not search.is_locked(tmp_path)
    assert lock.read_text() == "process 7 on elsewhere" and lock.stat().st_mtime == 1


def test_a_folder_belongs_to_one_program(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib, optuna_hyperparameter_search as s\n"
        "with s.locked_folder(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(search.RefusedInput, match=f"in use by process {holder.pid} on "),
        search.locked_folder(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with search.locked_folder(tmp_path):
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
    assert [line.split("inputs: ")[1].split(";")[0] for line in lines] == [
        "training options, clip_skip: was 2, is now 1",
        "training options, sdpa: was True, is now None",
        "training options, xformers: was None, is now True",
    ]


def test_anchors_may_move_by_rounding_but_not_by_more(tmp_path: Path) -> None:
    study = open_study(settings_for(tmp_path))
    anchors = {"screen": {"q_base": 0.5}, "version": "x"}
    search.check_anchors(study, anchors)
    search.check_anchors(study, {"screen": {"q_base": 0.505}, "version": "x"})
    with pytest.raises(search.RefusedInput, match=r"screen, q_base: was 0\.5, is now 0\.52"):
        search.check_anchors(study, {"screen": {"q_base": 0.52}, "version": "x"})


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    search.write_json(settings.reference / "plan.json", {"study": "the first"})
    with pytest.raises(search.RefusedInput, match="holds study 'the first'"):
        search.check_output_folder(settings, None)


def test_trial_folders_without_their_study_are_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    (settings.output_dir / "trial_0003").mkdir()
    with pytest.raises(search.RefusedInput, match="not of this study"):
        search.check_output_folder(settings, None)


# --- enqueueing --------------------------------------------------------------------------------------


def test_enqueued_parameters_come_first_and_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 2)
    study = open_study(settings)
    for _ in range(2):
        search.enqueue_once(study, [dict(SAFE), dict(SAFE)])
    run(settings)
    search.enqueue_once(study, [dict(SAFE)])
    trials = study.get_trials()
    assert len(trials) == 2 and suggested(trials[0]) == SAFE != suggested(trials[1])
