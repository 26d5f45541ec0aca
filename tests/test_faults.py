"""What happens to a search in the night: the real program, real processes, real faults, and the study afterwards.

The trainer is tests/fault_trainer, whose output and files are compared with the small trainer's here.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import demo_world
import fault_storm
import numpy as np
import pytest
import toml
from fault_storm import STUDY, environment, search_command
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

import optuna_hyperparameter_search as search

COMPLETE, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING
TESTS = Path(__file__).resolve().parent


@dataclass
class Night:
    """A study that has one trial, in folders of its own."""

    world: Path
    output_dir: Path

    def command(self, n_trials: int, *more: object) -> list[str]:
        return search_command(self.world, self.output_dir, n_trials, *more)

    def run(self, n_trials: int, *more: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = self.command(n_trials, *more)
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(**variables))

    def start(self, n_trials: int, *more: object, **variables: str) -> subprocess.Popen[str]:
        command, env = self.command(n_trials, *more), environment(**variables)
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            preexec_fn=fault_storm.hear_signals,
        )  # fmt: skip

    def trials(self) -> list[FrozenTrial]:
        study = search.load_study(search.default_storage(self.output_dir), STUDY)
        return study.get_trials() if study else []

    def failures(self, number: int) -> list[str]:
        return [failure["ended"] for failure in self.trials()[number].user_attrs["failures"]]

    def endings(self) -> list[tuple[TrialState, str]]:
        return [(trial.state, trial.user_attrs.get("ended", "")) for trial in self.trials()]

    @property
    def log(self) -> Path:
        return self.output_dir / search.LOG_NAME

    def folder(self, number: int) -> Path:
        return self.output_dir / f"trial_{number:04d}"


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory) -> Night:
    """One trial is trained and scored; what this took is not repeated by every test."""
    top = tmp_path_factory.mktemp("evening")
    demo_world.make_tiny_world(top / "world")
    night = Night(top / "world", top / "out")
    done = night.run(1)
    assert done.returncode == 0, done.stdout + done.stderr
    return night


@pytest.fixture
def night(evening: Night, tmp_path: Path) -> Night:
    """A copy of the study, in a folder to which it has been moved; the data set is a copy, too."""
    shutil.copytree(evening.output_dir, tmp_path / "out")
    shutil.copytree(evening.world, tmp_path / "world")
    demo_world.make_tiny_world(tmp_path / "world")  # its files name their own folder
    return Night(tmp_path / "world", tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[int], Path]:
    """A file system of so many MB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(megabytes: int) -> Path:
        options = ["-o", f"size={megabytes}m"]
        if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("on a full disk (need a user who may mount a tmpfs)")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


def read_until(program: subprocess.Popen[str], what: str) -> str:
    """What a program prints up to a line with these words, and that line."""
    assert program.stdout is not None
    said = ""
    for line in program.stdout:
        said += line
        if what in line:
            return said
    raise AssertionError(f"never said {what!r}:\n{said}")


SCORED = (COMPLETE, "scored")
LEFT = (RUNNING, "interrupted")


# --- the trainer that fails speaks as the one that trains ---------------------------------------------


@pytest.mark.slow
def test_the_fault_trainers_output_and_files_are_of_the_small_trainers_kinds(evening: Night, tmp_path: Path) -> None:
    config = toml.loads((evening.folder(0) / "config.toml").read_text())
    config.update(output_dir=str(tmp_path / "small"), network_dim=4, network_alpha=2, max_train_epochs=6)
    (tmp_path / "config.toml").write_text(toml.dumps({**config, "logging_dir": str(tmp_path / "logs")}))
    command = [sys.executable, TESTS / "small_trainer" / "train_network.py", "--config_file", tmp_path / "config.toml"]
    real = subprocess.run(command, capture_output=True, env=environment(COLUMNS="250"), check=True)
    ours = (evening.folder(0) / "training.log").read_bytes()
    kinds = (
        rb"\nepoch \d+/\d+\n",
        rb"steps:\s+\d+%\|[^|]*\| *\d+/\d+ \[[^\]]*avr_loss=[\d.e-]+\]",
        rb"\nsaving checkpoint: \S+\.safetensors\n",
        rb"model saved\.",
        rb"accelerator device: cpu\n",
        rb"override steps\. steps for \d+ epochs is ",
    )
    for kind in kinds:
        assert re.search(kind, real.stdout + real.stderr) and re.search(kind, ours), kind
    theirs = search.read_safetensors_header(tmp_path / "small" / "lora-000005.safetensors")
    kept = next(evening.folder(0).glob("lora*.safetensors"))
    assert search.read_safetensors_header(kept).keys() <= theirs.keys()


# --- a trainer that goes wrong -----------------------------------------------------------------------


def test_a_diverged_training_is_stopped_at_its_next_checkpoint(night: Night) -> None:
    done = night.run(2, FAULT="nan@3:trial_0001", STEP_SECONDS="0.05")
    assert done.returncode == 0, done.stdout
    assert night.endings() == [SCORED, (PRUNED, "diverged")]
    reason = night.trials()[1].user_attrs["reason"]
    found = re.search(r"loss was nan from step (\d+); stopped at step (\d+) of (\d+)", reason)
    assert found, reason
    first, stopped, steps = map(int, found.groups())
    assert first == 3 and stopped < 0.7 * steps  # a checkpoint every five epochs of twelve or more
    assert not list(night.folder(1).glob("lora*.safetensors"))
    print(f"{1 - stopped / steps:.0%} of the training time saved")


def test_a_loss_of_nan_alone_does_not_stop_a_training(tmp_path: Path) -> None:
    """fp16's scaler skips a bad step, after which kohya's average stays NaN and the weights are well."""
    progress = search.TrainingProgress()
    watch = functools.partial(progress.check, tmp_path, "cpu", 1, None)
    file = tmp_path / "lora-000002.safetensors"
    progress.read("epoch 1/2\n\rsteps:  50%|█ | 3/6 [00:01<00:01,  2.0it/s, avr_loss=nan]\n")
    watch()  # not there yet
    from safetensors.numpy import save_file

    save_file({"lora_unet_x.lora_up.weight": np.ones((2, 2), np.float16)}, file)
    watch()
    save_file({"lora_unet_x.lora_up.weight": np.full((2, 2), np.nan, np.float16)}, tmp_path / "lora.safetensors")
    with pytest.raises(search.Diverged, match=r"lora\.safetensors.*loss was nan from step 3; stopped at step 3 of 6"):
        watch()


@pytest.mark.slow
def test_a_hung_trainer_is_stopped_and_the_trial_tried_again(night: Night) -> None:
    done = night.run(2, "--stall-minutes", 0.1, FAULT="hang@4:trial_0001", STEP_SECONDS="0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert night.endings() == [SCORED, SCORED] and night.failures(1) == ["hung"]
    assert "made no step after step 3 for 0.1 minutes and was stopped (--stall-minutes)" in done.stdout
    assert not fault_storm.processes_of(night.output_dir)


def test_a_trainer_that_is_silent_while_it_loads_has_four_times_as_long(tmp_path: Path) -> None:
    progress = search.TrainingProgress()
    watch = functools.partial(progress.check, tmp_path, "cpu", 1, None)
    progress.last_sign -= 3 * 60
    watch()
    progress.last_sign -= 2 * 60
    with pytest.raises(search.Hung, match="printed nothing while it loaded for 4 minutes"):
        watch()
    progress.read("caching latents: 3%\n")
    watch()


def test_a_crash_is_named_by_its_last_line_and_tried_again(night: Night) -> None:
    done = night.run(2, FAULT="die@3:trial_0001")
    assert night.endings() == [SCORED, SCORED] and night.failures(1) == ["crashed"]
    assert "ended with status 1: RuntimeError: the worker has lost its mind" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["oom", "kill"])
def test_out_of_memory_is_tried_again(night: Night, fault: str) -> None:
    night.run(2, FAULT=f"{fault}@3:trial_0001")
    assert night.endings() == [SCORED, SCORED] and night.failures(1) == ["out of memory"]


@pytest.mark.slow
def test_what_always_happens_stops_the_search(night: Night) -> None:
    done = night.run(4, FAULT="die@1")
    assert done.returncode == 1
    assert night.endings() == [SCORED, (TrialState.FAIL, "crashed"), LEFT]
    assert night.failures(1) == ["crashed"] * 2 and night.failures(2) == ["crashed"]
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("stopped: the last three attempts ended alike")
    assert night.run(2).returncode == 0


def test_a_card_that_spills_into_memory_is_warned_of_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    progress = search.TrainingProgress()
    for step in range(1, 9):
        time.sleep(0.01)
        progress.read(f"\rsteps:  50%|█ | {step}/20 [00:01<00:01,  2.0it/s, avr_loss=0.5]\r")
        progress.check(tmp_path, "cpu", 1, usual_step=0.001)
    assert capsys.readouterr().out.count("warning: a step takes") == 1


# --- killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))],
    ids=lambda number: number.name,
)
def test_a_signal_ends_program_and_deaf_trainer_within_ten_seconds(night: Night, number: signal.Signals) -> None:
    program = night.start(2, FAULT="deaf@4:trial_0001")
    read_until(program, "Trial 1: ")
    while not list(night.folder(1).glob(f"*{search.PROCESS_FILE}")):
        time.sleep(0.05)
    time.sleep(1.5)  # until it is deaf
    began = time.monotonic()
    program.send_signal(number)
    said, _ = program.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert program.returncode == 130, said
    assert not fault_storm.wait_until_none(night.output_dir, 1)
    assert night.endings() == [SCORED, LEFT]


@pytest.mark.slow
def test_kill_int_ends_a_search_that_a_script_has_put_into_the_background(night: Night) -> None:
    """A shell without job control lets its `&` jobs ignore SIGINT."""
    script = f"{shlex.join(night.command(2))} & echo $!; wait"
    shell = subprocess.Popen(
        ["nohup", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment(STEP_SECONDS="0.05"), start_new_session=True,
    )  # fmt: skip
    pid = int(re.findall(r"^\d+$", read_until(shell, "epoch 2/"), re.MULTILINE)[0])
    os.kill(pid, signal.SIGHUP)  # which nohup lets it ignore
    time.sleep(1)
    assert night.endings()[1:] == [(TrialState.RUNNING, "")]
    os.kill(pid, signal.SIGINT)
    said, _ = shell.communicate(timeout=30)
    assert said.endswith("\ninterrupted; the same command resumes\n"), said
    assert night.endings() == [SCORED, LEFT]


@pytest.mark.slow
def test_ctrl_c_spares_a_search_that_the_script_in_the_terminal_has_put_into_the_background(
    night: Night, tmp_path: Path
) -> None:
    """As it spares every other program there: it is for what the script waits for (`search & tail -f search.log`)."""
    search_it = f"{shlex.join(night.command(2))} >{tmp_path / 'said'} 2>&1 & echo $! >{tmp_path / 'pid'}"
    session, terminal = pty.fork()
    if session == 0:
        fault_storm.hear_signals()
        script = shlex.quote(f"{search_it}; sleep 300; echo not reached")
        os.execvpe("sh", ["sh", "-c", f"trap : INT; sh -c {script}; sleep 300"], environment(STEP_SECONDS="0.05"))
    try:
        while "epoch 2/" not in ((tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""):
            time.sleep(0.1)
        pid = int((tmp_path / "pid").read_text())
        os.write(terminal, b"\x03")
        time.sleep(1)
        assert night.endings()[1:] == [(TrialState.RUNNING, "")]
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while search.when_started(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert night.endings() == [SCORED, LEFT]
    finally:
        os.killpg(session, signal.SIGKILL)
        os.waitpid(session, 0)
        os.close(terminal)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(night: Night) -> None:
    program = night.start(2, FAULT="deaf@4:trial_0001")
    read_until(program, "Trial 1: ")
    time.sleep(3)
    program.send_signal(signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert not fault_storm.wait_until_none(night.output_dir, 1)
    assert night.run(2).returncode == 0
    assert night.endings() == [SCORED, SCORED]


def test_a_killed_program_leaves_no_trainer(night: Night) -> None:
    program = night.start(2, FAULT="deaf@4:trial_0001")
    read_until(program, "Trial 1: ")
    time.sleep(3)
    program.kill()
    program.communicate(timeout=30)
    assert not fault_storm.wait_until_none(night.output_dir, 2)


def test_a_process_that_outlived_the_program_is_ended_at_the_next_start(night: Night) -> None:
    processes = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(4)]
    left_over, in_final, innocent, of_another = processes
    another = night.output_dir.parent / "another program's" / "trial_0007"
    another.mkdir(parents=True)
    try:
        for place, process, started, made_in in (
            ("reference/7", left_over, "", night.output_dir / "reference/7"),
            ("final", in_final, "", Path("/where/the/folder/was")),
            ("reference/8", innocent, "another boot 1", night.output_dir / "reference/8"),  # its number was given anew
            (another, of_another, "", another),
            ("reference/9", of_another, "", another),  # copied from there
        ):
            (night.output_dir / place).mkdir(exist_ok=True)
            started = started or search.when_started(process.pid)
            (night.output_dir / place / f"training{search.PROCESS_FILE}").write_text(
                json.dumps({"pid": process.pid, "started": started, "folder": str(made_in)})
            )
        done = night.run(1)
        (night.output_dir / "linked").symlink_to(another)
        search.ChildProcess.end_left_over(night.output_dir / "linked" / f"training{search.PROCESS_FILE}")
        assert left_over.wait(5) == in_final.wait(5) == -signal.SIGKILL
        assert innocent.poll() is None and of_another.poll() is None
        assert (another / f"training{search.PROCESS_FILE}").is_file()
        assert f"Process {left_over.pid} in" in done.stdout and "has outlived the program" in done.stdout
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_study_maximizes(night: Night) -> None:
    study = search.load_study(search.default_storage(night.output_dir), STUDY)
    assert study is not None and study.direction == StudyDirection.MAXIMIZE


# --- trainings that are stopped early ------------------------------------------------------------------


def stop_early(night: Night, first_score: float) -> None:
    """From the second trial on; the first one's scores while it was trained are these."""
    file = night.world / "scoring.toml"
    settings = toml.loads(file.read_text())
    settings["stop_early"] |= {"at_percent": 50, "whole_trials": 1}
    file.write_text(toml.dumps(settings))
    with closing(sqlite3.connect(night.output_dir / search.DATABASE_NAME)) as database, database:
        database.execute("UPDATE trial_intermediate_values SET intermediate_value = ?", (first_score,))


STOPPED = (PRUNED, "stopped early")
PAUSED = "the trainer is paused"


def test_what_can_not_win_is_stopped_half_way_and_counts(night: Night) -> None:
    stop_early(night, 2.0)
    done = night.run(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert night.endings() == [SCORED, STOPPED]
    trial, folder = night.trials()[1], night.folder(1)
    epochs = trial.params["max_train_epochs"]
    epoch = epochs // 2 // 5 * 5
    best = max(trial.intermediate_values.values())
    reason = f"its best score up to epoch {epoch} of {epochs} was {best:.3f}, below 2.000, "
    reason += "which 50% of 1 whole trainings had by then"
    assert f"epoch {epoch}/{epochs}: {PAUSED}" in done.stdout
    assert f"Trial 1 stopped early: {reason}" in done.stdout and trial.user_attrs["reason"] == reason
    assert trial.intermediate_values.keys() == {p for p in range(10, 51, 10) if p * epochs >= 100 * 5}
    assert "model saved." not in (folder / "training.log").read_text()
    assert not list(folder.glob("*.safetensors")) and not (folder / "metrics.json").exists()
    assert reason in (night.output_dir / "results" / "trials.csv").read_text()
    assert not fault_storm.processes_of(night.output_dir)


def test_what_may_win_goes_on_and_the_pictures_of_the_pause_are_not_made_again(night: Night) -> None:
    stop_early(night, -1.0)
    done = night.run(2)
    assert done.returncode == 0 and PAUSED in done.stdout
    assert night.endings() == [SCORED, SCORED]
    second = night.trials()[1]
    found = Counter(re.findall(r"\n  epoch +(\d+)    score", done.stdout))
    assert set(found.values()) == {1} and len(found) == math.ceil(second.params["max_train_epochs"] / 5)
    assert second.user_attrs["scoring_seconds"] > second.user_attrs["screening_seconds"] > 0


@pytest.mark.parametrize(
    "whom", ["program", *(pytest.param(whom, marks=pytest.mark.slow) for whom in ("trainer", "scorer", "by SIGTERM"))]
)
def test_a_kill_in_the_pause_leaves_nobody_and_the_study_goes_on(night: Night, whom: str) -> None:
    stop_early(night, -1.0)
    program = night.start(2, STEP_SECONDS="0.02")
    said = read_until(program, PAUSED)
    time.sleep(1)
    processes = fault_storm.processes_of(night.output_dir)
    trainer = next(pid for pid, line in processes.items() if "train_network.py" in line)
    scorer = next(pid for pid, line in processes.items() if "--score" in line)
    assert Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[0] == "T"  # stopped
    pid = {"trainer": trainer, "scorer": scorer}.get(whom, program.pid)
    os.kill(pid, signal.SIGTERM if "SIGTERM" in whom else signal.SIGKILL)
    said += program.communicate(timeout=120)[0]
    assert not fault_storm.wait_until_none(night.output_dir, 7), said
    if whom == "scorer":
        assert program.returncode == 0 and "no more trainings are stopped early in this run" in said
    elif whom != "trainer":  # of which the program makes a second attempt
        assert night.run(2).returncode == 0
    assert night.endings() == [SCORED, SCORED]


def test_prune_off_trains_all_of_them_whole(night: Night) -> None:
    stop_early(night, 2.0)
    done = night.run(2, "--prune", "off")
    assert done.returncode == 0 and PAUSED not in done.stdout
    assert night.endings() == [SCORED, SCORED]


# --- the log -----------------------------------------------------------------------------------------


def last_of_log(night: Night) -> str:
    """The last line of search.log, without its time."""
    found = re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (.*)\n\Z", night.log.read_text(), re.MULTILINE)
    assert found, night.log.read_text()[-500:]
    return found[1]


def test_the_log_says_why_a_search_stopped(night: Night) -> None:
    done = night.run(2, "--timeout", 1e-9)
    assert done.returncode == 1
    assert last_of_log(night) == done.stderr.strip() and "--timeout 1e-09 is over" in done.stderr


def test_the_log_says_why_a_search_was_refused_after_its_folder_was_locked(night: Night) -> None:
    anchors = night.output_dir / "reference" / "anchors.json"
    moved = {
        name: value + 1 if isinstance(value, float) else value
        for name, value in json.loads(anchors.read_text()).items()
    }
    anchors.write_text(json.dumps(moved))
    done = night.run(2)
    assert done.returncode == 2
    assert last_of_log(night) == done.stderr.strip() and "anchors differ from the study's" in done.stderr


def test_the_log_says_that_a_search_was_interrupted(night: Night) -> None:
    program = night.start(2, STEP_SECONDS="0.05")
    read_until(program, "epoch 2/")
    program.terminate()
    said, _ = program.communicate(timeout=30)
    assert program.returncode == 130
    assert last_of_log(night) == said.splitlines()[-1] == "interrupted (SIGTERM); the same command resumes"


def test_the_log_holds_the_programs_own_faults(night: Night) -> None:
    code = "import sys, optuna_hyperparameter_search as s\ns.Study = None\nsys.exit(s.main(sys.argv[1:]))\n"
    command = [sys.executable, "-c", code, *night.command(2)[2:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment(), timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    end = "".join(done.stderr.splitlines(keepends=True)[-3:])  # main's own frames are not in the log
    assert night.log.read_text().endswith(end) and end.endswith("TypeError: 'NoneType' object is not callable\n")


@pytest.mark.slow
def test_a_log_that_takes_no_more_disturbs_nothing(night: Night, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1)
    night.log.unlink()
    night.log.symlink_to(disk / "search.log")
    (disk / "ballast").write_bytes(b"x" * shutil.disk_usage(disk).free)
    done = night.run(2)
    assert done.returncode == 0 and done.stderr == ""
    warnings = [line for line in done.stdout.splitlines() if "search.log" in line]
    assert warnings == [
        f"warning: can't write to {night.log} (No space left on device), so it lacks what follows; make room"
    ]
    program = night.start(3, STEP_SECONDS="0.05")
    read_until(program, "epoch 2/")
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=30)
    assert program.returncode == 130 and said.endswith("\ninterrupted; the same command resumes\n"), said


def test_a_log_goes_on_when_there_is_room_again(
    small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1)
    monkeypatch.setattr(search.screen, "log_file", disk / "search.log")
    (disk / "ballast").write_bytes(b"x" * shutil.disk_usage(disk).free)
    search.say("unheard")
    search.say("unheard, too")
    (disk / "ballast").unlink()
    search.say("heard")
    assert capsys.readouterr().out.count("warning: ") == 1
    assert re.fullmatch(r"[-\d]+ [:.\d]+ heard\n", (disk / "search.log").read_text())


# --- twice at once -----------------------------------------------------------------------------------


def test_a_second_program_in_the_same_folder_is_refused(night: Night) -> None:
    program = night.start(2, FAULT="hang@4:trial_0001")
    read_until(program, "Trial 1: ")
    second = night.run(2)
    program.terminate()
    program.communicate(timeout=30)
    assert second.returncode == 2
    assert f"is in use by process {program.pid} on " in second.stderr and "Traceback" not in second.stderr


# --- the disk ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_that_grows_too_large_stops_the_search_which_goes_on_later(night: Night) -> None:
    done = night.run(2, FAULT="full@4:trial_0001")
    assert done.returncode == 1
    assert night.endings() == [SCORED, LEFT]
    assert done.stderr.startswith("stopped: ") and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert night.run(2).returncode == 0
    assert night.endings() == [SCORED, SCORED]


@pytest.mark.slow
def test_pictures_that_find_no_room_are_no_trials_fault(night: Night) -> None:
    """The scorer of a trial, allowed files of 3 kB: an OSError, at which the search stops, and no failed trial."""
    code = (
        "import pathlib, resource, signal, sys, optuna_hyperparameter_search as s\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try:\n    s.score_in_child(pathlib.Path(sys.argv[1]), 'cpu')\n"
        "except OSError as error:\n    print('OSError:', error)\n"
    )
    command = [sys.executable, "-c", code, str(night.folder(0))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment(), timeout=120)
    assert "OSError: [Errno 27] File too large" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_full_disk_stops_the_search_which_goes_on_when_there_is_room(
    night: Night, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(60)
    shutil.copytree(night.output_dir, disk / "out")
    moved = Night(night.world, disk / "out")
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"x" * (free - 200_000))
    refused = moved.run(2)
    assert refused.returncode == 2 and re.search(r"MB are needed .* free in", refused.stderr)
    (disk / "ballast").unlink()
    program = moved.start(2, FAULT="slow@1:trial_0001", STEP_SECONDS="0.05")
    read_until(program, "epoch 2/")
    (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))
    said, _ = program.communicate(timeout=120)
    assert program.returncode == 1 and "No space left on device" in said and "Traceback" not in said, said
    (disk / "ballast").unlink()
    assert moved.run(2).returncode == 0
    assert [ending for ending in moved.endings() if ending == SCORED] == [SCORED] * 2


# --- the database ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_database_that_another_process_holds_for_a_while_is_waited_for(night: Night) -> None:
    program = night.start(2, STEP_SECONDS="0.02")
    read_until(program, "Trial 1: ")
    with closing(sqlite3.connect(night.output_dir / search.DATABASE_NAME)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(8)
        database.rollback()
    said, _ = program.communicate(timeout=120)
    assert program.returncode == 0, said
    assert night.endings() == [SCORED, SCORED]


@pytest.mark.slow
def test_a_database_that_stays_locked_stops_the_search_which_loses_nothing(night: Night) -> None:
    code = (
        "import sys, optuna_hyperparameter_search as s\ns.SQLITE_LOCK_SECONDS = 0.5\nsys.exit(s.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *night.command(2)[2:]]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TESTS.parent,
        env=environment(STEP_SECONDS="0.05"),
    )  # fmt: skip
    read_until(program, "epoch 2/")
    with closing(sqlite3.connect(night.output_dir / search.DATABASE_NAME)) as database:
        database.execute("BEGIN EXCLUSIVE")
        said, _ = program.communicate(timeout=120)
        database.rollback()
    assert program.returncode == 1 and "database failed" in said and "locked" in said and "Traceback" not in said, said
    assert night.run(2).returncode == 0
    assert [ending for ending in night.endings() if ending == SCORED] == [SCORED] * 2


# --- the latents' cache ------------------------------------------------------------------------------


def test_torn_latents_are_made_again_before_the_trainer_stumbles(night: Night) -> None:
    caches = sorted((night.world / "images").glob("*.npz"))
    caches[0].write_bytes(caches[0].read_bytes()[:100])
    caches[1].write_bytes(b"")
    done = night.run(2)
    assert done.returncode == 0, done.stdout
    assert "Deleted 2 torn caches of latents" in done.stdout and "Trying the trainer out" in done.stdout
    assert all((search.Latents.sizes(cache) or {})["latents"] == (8, 8) for cache in caches)


def test_torn_latents_do_not_keep_a_first_start_from_training(night: Night) -> None:
    """A power cut in the first step leaves them, and so may another trainer."""
    shutil.rmtree(night.output_dir)
    torn = min((night.world / "images").glob("*.npz"))
    torn.write_bytes(torn.read_bytes()[:100])
    done = night.run(1)
    assert done.returncode == 0 and "Deleted 1 torn caches of latents" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"latents_16x8": (4, 16, 8)}], ids=["one size", "two sizes"])
def test_latents_under_the_keys_of_newer_trainers_are_good(more: dict[str, tuple[int, ...]], night: Night) -> None:
    """sd-scripts names each size in the keys from v0.10.2 on; a file may hold several."""
    caches = sorted((night.world / "images").glob("*.npz"))
    for cache in caches:
        with np.load(cache) as old:
            arrays = {f"{name}_8x8": old[name] for name in old.files}
        np.savez(cache, **arrays, **{name: np.zeros(shape, np.float32) for name, shape in more.items()})
    before = [cache.read_bytes() for cache in caches]
    done = night.run(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deleted" not in done.stdout and "Trying the trainer out" not in done.stdout
    assert [cache.read_bytes() for cache in caches] == before


@pytest.mark.slow
def test_latents_that_are_gone_are_made_before_the_next_trial(night: Night) -> None:
    """A training that has to make them draws other random numbers than one that finds them."""
    caches = sorted((night.world / "images").glob("*.npz"))
    caches[0].unlink()
    done = night.run(2)
    assert done.returncode == 0 and "Trying the trainer out" in done.stdout and caches[0].is_file()


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_torn_first_step_is_made_again(keep: int, night: Night) -> None:
    lora = night.output_dir / "reference" / "first_step" / "lora.safetensors"
    whole = lora.read_bytes()
    lora.write_bytes(whole[:keep])
    done = night.run(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trying the trainer out" in done.stdout and lora.stat().st_size == len(whole)


@pytest.mark.slow
def test_a_resume_starts_without_asking_sd_scripts(night: Night) -> None:
    """A trainer's Python that answers no probe can still train."""
    python = night.output_dir.parent / "python"
    script = (
        f'#!/bin/sh\ncase "$1" in *kohya_probe.py) [ -e {python}.off ] && exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.write_text(script)
    python.chmod(0o755)
    assert night.run(2, "--trainer-python", python).returncode == 0
    Path(f"{python}.off").touch()
    done = night.run(3, "--trainer-python", python)
    assert done.returncode == 0, done.stderr
    refused = night.run(3, "--trainer-python", python, "--check")  # a check asks anew
    assert refused.returncode == 2 and "no working Python" in refused.stderr


def test_a_file_that_only_looks_like_latents_is_refused_and_kept(night: Night) -> None:
    picture = next((night.world / "images").glob("*.png"))
    (night.world / "images" / f"{picture.stem}.npz").write_bytes(b"my notes")
    done = night.run(2)
    assert done.returncode == 2 and f"{picture.stem}.npz is no cache of latents" in done.stderr
    assert (night.world / "images" / f"{picture.stem}.npz").read_bytes() == b"my notes"


def test_latents_of_another_resolution_are_refused(night: Night) -> None:
    cache = next((night.world / "images").glob("*.npz"))
    np.savez(cache, latents=np.zeros((4, 64, 64), np.float32))
    done = night.run(2)
    assert done.returncode == 2
    assert f"{cache} holds 512 x 512 instead of 64 x 64" in done.stderr and cache.is_file()


# --- the storm ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
def test_a_short_storm_does_no_damage(tmp_path: Path, device: str) -> None:
    demo_world.make_tiny_world(tmp_path / "world")
    about = {"kills": 4, "n_trials": 2, "seed": 3, "longest_life": 14, "device": device}
    damage = fault_storm.storm(tmp_path / "world", tmp_path / "out", **about)
    assert damage.notes == []
    assert sum(map(search.is_trained, damage.trials())) == 2
