"""Workers on several devices: one study, exactly N trials, and what becomes of a worker that can't go on."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from test_screen import set_up
from test_study import SCORED, endings, good_scoring, good_training, open_study, settings_for

import optuna_hyperparameter_search as search

Training = Callable[[str, Path], None]


def run(settings: search.Settings, training: Training, before_trial: Callable[[], None] = lambda: None) -> search.Study:
    """One start of the program's workers on its devices."""
    study = open_study(settings)

    def study_on(device: str) -> search.Study:
        def trainer(config: Path, _usual_step: float | None, _pause: object) -> tuple[float, float]:
            training(device, config.parent)
            good_training(config.parent)
            return 7.0, 0.5

        objective = search.LoraObjective(settings, {"seed": 42}, trainer, good_scoring)
        return search.Study(study, settings, objective, time.monotonic(), before_trial)

    ours = study_on(settings.devices[0])
    ours.run(search.Workers(settings.devices, study_on).run)
    return ours


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> search.Settings:
    monkeypatch.setattr(search, "POLL_SECONDS", 0.2)
    return settings_for(tmp_path, n_trials=6, device="cuda:0,cuda:1")


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_train_together_what_one_would_train_alone(settings: search.Settings, tmp_path: Path) -> None:
    def train(_device: str, folder: Path) -> None:
        (folder.parent / "reference" / f"{folder.name} {os.getpid()}").touch()
        time.sleep(0.3)

    study = run(settings, train).study
    began = [file.name.split() for file in (settings.output_dir / "reference").glob("trial_*")]
    assert sorted(name for name, _ in began) == [f"trial_{number:04d}" for number in range(6)]  # none of them twice
    trials = study.get_trials()
    assert endings(study) == [SCORED] * 6
    assert len({trial.user_attrs["pid"] for trial in trials} - {os.getpid()}) == 2
    (tmp_path / "alone").mkdir()
    alone = run(settings_for(tmp_path / "alone", n_trials=6, device="cuda:0"), lambda *_: None).study
    assert [trial.params for trial in alone.get_trials()] == [trial.params for trial in trials]


def test_a_device_that_fails_is_left_out_with_the_reason(
    settings: search.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = settings.output_dir / "attempts"  # of cuda:1: two at each of two trials, one at a third

    def train(device: str, _folder: Path) -> None:
        if device == "cuda:1":
            with attempts.open("a") as file:
                file.write("x")
            raise search.OutOfMemory("CUDA out of memory")
        wait_until(lambda: attempts.exists() and attempts.stat().st_size == 5)

    study = run(settings, train).study
    assert sum(map(search.is_trained, study.get_trials())) == 6
    assert "cuda:1 has stopped: the last three attempts ended alike" in capsys.readouterr().out
    assert not [trial for trial in study.get_trials() if trial.state.name == "RUNNING"]


def test_the_search_stops_where_no_device_can_go_on(settings: search.Settings) -> None:
    def train(_device: str, _folder: Path) -> None:
        raise search.TrialFailed("the card is gone")

    with pytest.raises(search.SearchStopped, match=r"the last three attempts ended alike.*the card is gone"):
        run(settings, train)


def test_the_trial_of_a_killed_worker_is_continued_by_the_others(
    settings: search.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = settings.output_dir / "killed"

    def train(_device: str, folder: Path) -> None:
        if folder.name == "trial_0001" and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)

    study = run(settings, train).study
    assert endings(study) == [SCORED] * 6
    assert (
        "has stopped: it was killed (SIGKILL), usually by the kernel because memory ran out; the same command goes on"
        in capsys.readouterr().out
    )


def test_an_interrupted_program_leaves_no_worker_and_goes_on_with_both_trials(settings: search.Settings) -> None:
    begun = settings.output_dir / "begun"
    begun.mkdir()

    def train(_device: str, _folder: Path) -> None:
        (begun / str(os.getpid())).touch()
        time.sleep(60)

    def interrupt_once_both_have_begun(*_: object) -> None:
        if len(list(begun.iterdir())) == 2:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt_once_both_have_begun)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(settings, train)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not any(search.when_started(int(file.name)) for file in begun.iterdir())
    study = open_study(settings)
    assert endings(study) == [(search.TrialState.RUNNING, "interrupted")] * 2
    assert endings(run(settings, lambda *_: time.sleep(0.2)).study) == [SCORED] * 6


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_workers_and_another_program_of_one_study_end_at_exactly_n_trials(
    settings: search.Settings, tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    storage = request.getfixturevalue("postgresql")() if database == "postgresql" else f"sqlite:///{tmp_path}/shared.db"
    shared = {"storage": storage, "n_trials": 9}
    two = dataclasses.replace(settings, **shared)
    (tmp_path / "other").mkdir()
    one = settings_for(tmp_path / "other", device="cuda:0", **shared)
    open_study(two)
    begun = tmp_path / "begun"
    begun.mkdir()

    def train(*_: object) -> None:
        (begun / str(os.getpid())).touch()
        wait_until(lambda: len(list(begun.iterdir())) == 3)  # all three take part, however slowly they start
        time.sleep(0.3)

    other = multiprocessing.get_context("fork").Process(target=run, args=(one, train))
    other.start()
    study = run(two, train).study
    other.join(60)
    assert other.exitcode == 0 and sum(map(search.is_trained, study.get_trials())) == 9
    whose = Counter(trial.user_attrs["output_dir"] for trial in study.get_trials() if search.is_trained(trial))
    assert whose[str(two.output_dir)] >= 2 and whose[str(one.output_dir)] >= 1 and len(whose) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_trial_that_a_worker_continues_counts_before_it_begins_again(settings: search.Settings, seed: int) -> None:
    last = dataclasses.replace(settings, n_trials=1)
    study = open_study(last)
    trial = study.ask()
    ours = search.Study(study, last, lambda _: 0.0, time.monotonic())
    ours.claim(trial)
    trial.set_user_attr("ended", "interrupted")
    waits = random.Random(seed)
    study = run(last, lambda *_: None, lambda: time.sleep(waits.uniform(0.1, 0.5) * (os.getpid() % 2 + 1))).study
    assert endings(study) == [SCORED]


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda:0,cuda:0", "cuda:0 stands there twice"),
        ("cpu,cuda:0", "is no device"),
        ("cuda,cuda:1", "is no device"),
        ("cuda:0,", "is no device"),
        ("cuda:all,cuda:1", "is no device"),
        ("cuda:1,cuda:01", "is no device"),
        ("cuda:x", "is no device"),
        ("cuda:0,cuda:1", ""),
        ("cuda:all", ""),
        ("cpu,cpu,cpu", ""),
    ],
)
def test_devices_are_one_or_several_cards_or_the_cpu(device: str, says: str) -> None:
    args = search.make_parser().parse_args(["--device", device])
    problems = [problem for problem in search.senseless_values(args) if problem.startswith("--device")]
    assert says in problems[0] if says else problems == []


def test_cards_that_pytorch_does_not_see_are_refused(settings: search.Settings) -> None:
    answer = {"torch": "2.6.0", "cards": 1}
    with pytest.raises(search.RefusedInput, match="sees is cuda:0, so there is no cuda:1;"):
        search.TrainerFacts("v0.10.1", "NVIDIA GeForce RTX 4080", answer).check_card(settings)
    mistyped = dataclasses.replace(settings, device="cuda:0,cuda:x")  # of which another line tells
    search.TrainerFacts("v0.10.1", "NVIDIA GeForce RTX 4080", answer).check_card(mistyped)
    both = search.TrainerFacts("v0.10.1", "NVIDIA GeForce RTX 4080", {**answer, "cards": 2})
    both.check_card(settings)
    assert both.cards_of("cuda:all") == "cuda:0,cuda:1" and both.cards_of("cuda:3") == "cuda:3"


def test_the_screen_has_a_block_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch)
    with search.screen.live(["cuda:0", "cuda:1"]):
        blocks = [f"{device} {part}" for device in ("cuda:0", "cuda:1") for part in ("trial", "train", "score")]
        assert list(search.screen._lines) == ["study", *blocks]
    said: list[tuple[object, ...]] = []
    card = search.CardScreen(said.append, "cuda:1", search.Screen())
    card.begin("3", "lr 1e-4")
    card.show("train", "epoch 1/2", 1, 2)
    card.show("study", "1 of 6 trained")
    card.print("\nTrial 3: out\nParameters:")
    assert said == [
        ("show", "cuda:1 trial", "3  lr 1e-4", 0, 1), ("show", "cuda:1 train", "-", 0, 1),
        ("show", "cuda:1 score", "-", 0, 1), ("show", "cuda:1 train", "epoch 1/2", 1, 2),
        ("show", "study", "1 of 6 trained", 0, 1), ("print", "cuda:1  Trial 3: out\ncuda:1  Parameters:"),
    ]  # fmt: skip
