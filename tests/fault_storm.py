"""Kill the search and its trainer at random moments, start it again until its study is complete, and look for damage.

    python tests/fault_storm.py --kills 100                      a quarter of an hour on two cores
    python tests/fault_storm.py --kills 100 --seed 7 --output-dir runs/storm
    python tests/fault_storm.py --kills 100 --device cpu,cpu     with two workers, which are killed, too

The program is the real one, with its real scoring of a tiny model; the trainer is `tests/fault_trainer`. Every figure
but the first two must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo_world
from optuna.trial import FrozenTrial, TrialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optuna_hyperparameter_search as search

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "optuna_hyperparameter_search.py"
STUDY = "storm"


def search_command(world: Path, output_dir: Path, n_trials: int, *more: object) -> list[str]:
    """The program on a tiny world's inputs, with the trainer that fails where it is told to."""
    given = {
        "--dataset-config": world / "dataset.toml", "--base-model": world / "base_model",
        "--training-config": world / "training.toml", "--scoring-config": world / "scoring.toml",
        "--sd-scripts": REPOSITORY / "tests" / "fault_trainer", "--output-dir": output_dir, "--device": "cpu",
        "--study-name": STUDY, "--n-trials": n_trials,
    }  # fmt: skip
    return [sys.executable, str(SCRIPT), *(str(part) for pair in given.items() for part in pair), *map(str, more)]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: with more of them than cores they would wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def hear_signals() -> None:
    """In a child: undo what nohup, or a shell's background job, has set and would pass on."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def processes_of(folder: Path) -> dict[int, str]:
    """Number and command line of every living process that has this folder in its command line; but for our own."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if state != "Z" and f"{folder}/" in f"{line.replace(' ', '/')}/" and int(entry.name) != os.getpid():
            found[int(entry.name)] = line
    return found


def wait_until_none(folder: Path, seconds: float) -> dict[int, str]:
    """The processes that are left after a while; none, as soon as there is none."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@dataclass
class Damage:
    """What a storm has done, found by comparing the study and the folders with what was seen before."""

    output_dir: Path
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _complete: dict[int, float] = field(default_factory=dict)
    _configs: dict[str, bytes] = field(default_factory=dict)
    _metrics: dict[str, bytes] = field(default_factory=dict)
    _logs: dict[str, bytes] = field(default_factory=dict)  # of trainings that were finished

    def note(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.notes.append(f"{kind}: {what}")

    def trials(self) -> list[FrozenTrial]:
        study = search.load_study(search.default_storage(self.output_dir), STUDY)
        return study.get_trials() if study else []

    def look(self) -> None:
        """After a kill, before the next start."""
        for folder in sorted(self.output_dir.glob("trial_*")):
            self._compare(self._configs, folder / "config.toml")
        for trial in self.trials():
            folder = self.output_dir / f"trial_{trial.number:04d}"
            if trial.user_attrs.get("training_seconds") is not None:
                self._compare(self._logs, folder / "training.log", "parameters trained twice without reason")
            if trial.state == TrialState.COMPLETE:
                self._complete.setdefault(trial.number, trial.value or 0.0)
                self._compare(self._metrics, folder / "metrics.json")
        now = {trial.number: trial.value for trial in self.trials() if trial.state == TrialState.COMPLETE}
        for number, value in self._complete.items():
            if now.get(number) != value:
                self.note("COMPLETE trials lost", f"trial {number} was {value}, is {now.get(number)}")

    def _compare(self, seen: dict[str, bytes], file: Path, kind: str = "folders overwritten") -> None:
        if file.is_file():
            content = file.read_bytes()
            if seen.setdefault(str(file), content) != content:
                self.note(kind, str(file))
                seen[str(file)] = content

    def look_at_the_end(self, n_trials: int) -> None:
        self.look()
        self._look_for_repetition()
        self._look_for_torn_files()
        trained = sum(map(search.is_trained, self.trials()))
        if trained != n_trials:
            self.note("trained trials too many or too few", f"{trained} instead of {n_trials}")
        for trial in self.trials():
            if trial.state == TrialState.RUNNING:
                self.note("trials left running", str(trial.number))

    def _look_for_repetition(self) -> None:
        """No two trials have equal parameters, as a copy of one that was interrupted would have."""
        seen: dict[str, int] = {}
        for trial in self.trials():
            if "training_params" in trial.user_attrs:
                params = json.dumps(trial.user_attrs["training_params"], sort_keys=True)
                if params in seen:
                    self.note("parameters trained twice without reason", f"trials {seen[params]} and {trial.number}")
                seen[params] = trial.number
            if trial.user_attrs.get("ended") == "interrupted":
                self.note("interrupted trials given up", f"{trial.number}: {trial.user_attrs.get('reason')}")

    def _look_for_torn_files(self) -> None:
        for file in self.output_dir.rglob("*"):
            if file.suffix == ".json" and search.read_json(file) is None:
                self.note("files torn", str(file))
            if file.suffix == ".tmp":
                self.note("files torn", f"{file} is left over")
        for trial in self.trials():
            if trial.state == TrialState.COMPLETE:
                chosen = self.output_dir / trial.user_attrs["folder"] / trial.user_attrs["checkpoint"]
                if chosen.is_file():
                    search.check_lora(chosen)
        best = self.output_dir / "results" / "best_lora.safetensors"
        search.check_lora(best)
        with closing(sqlite3.connect(self.output_dir / search.DATABASE_NAME)) as database:
            if database.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                self.note("files torn", search.DATABASE_NAME)


KINDS = (
    "trained trials too many or too few", "trials left running", "interrupted trials given up", "COMPLETE trials lost",
    "folders overwritten",
    "parameters trained twice without reason", "orphans", "files torn", "restarts that needed a person",
)  # fmt: skip


def child_of(output_dir: Path) -> int | None:
    """A trainer or scorer that runs below an output folder."""
    for file in output_dir.glob(f"**/*{search.PROCESS_FILE}"):
        if known := search.read_json(file):
            return int(known["pid"])
    return None


A_CHILD, A_WORKER = "its child", "one of its workers"


def workers_of(program: subprocess.Popen[Any]) -> list[int]:
    """Its forks: they have its command line."""
    of, line = Path(f"/proc/{program.pid}/task/{program.pid}/children"), Path(f"/proc/{program.pid}/cmdline")
    with contextlib.suppress(OSError):
        whose = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in of.read_text().split()}
        return [int(pid) for pid, found in whose.items() if found == line.read_bytes()]
    return []


def strike(rng: random.Random, program: subprocess.Popen[Any], output_dir: Path, may_hit_child: bool) -> str:
    """Kill the program, mostly hard, or what it has started; what was done."""
    workers = workers_of(program) if may_hit_child else []
    if workers and rng.random() < 0.25:
        os.kill(rng.choice(workers), signal.SIGKILL)
        return A_WORKER
    child = child_of(output_dir) if may_hit_child else None
    if child and rng.random() < 0.25:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return A_CHILD
    number = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    program.send_signal(number)
    return number.name


def storm(
    world: Path, output_dir: Path, kills: int, n_trials: int, seed: int, longest_life: float, device: str = "cpu"
) -> Damage:
    """The storm itself; prints a line a kill. A program's child is killed once: three times would be the set-up's."""
    rng, damage, left, starts = random.Random(seed), Damage(output_dir), kills, 0
    command = search_command(world, output_dir, n_trials, "--device", device)
    while True:
        starts, hit_child = starts + 1, False
        with open(output_dir.parent / "screen.txt", "a", encoding="utf-8") as screen:
            program = subprocess.Popen(
                command, stdout=screen, stderr=screen, env=environment(), preexec_fn=hear_signals
            )
        while left and (what := wait_and_strike(rng, program, output_dir, longest_life, not hit_child)):
            left -= 1
            print(f"kill {kills - left} of {kills}: {what}", flush=True)
            hit_child = what in (A_CHILD, A_WORKER)
            if not hit_child:
                break
        status = program.wait(600)
        for pid, line in wait_until_none(output_dir, 1.5).items():
            damage.note("orphans", f"{pid} {line}")
        damage.look()
        if status in (1, 2) and not hit_child:
            damage.note("restarts that needed a person", f"status {status}")
        if status == 0 or damage.counts["restarts that needed a person"] > 3:
            damage.look_at_the_end(n_trials)
            print(f"ended after {kills - left} kills and {starts} starts")
            return damage


def wait_and_strike(
    rng: random.Random, program: subprocess.Popen[Any], output_dir: Path, longest_life: float, may_hit_child: bool
) -> str:
    """What was done after a random time; nothing, if the program ended before."""
    try:
        program.wait(rng.uniform(0.2, longest_life))
        return ""
    except subprocess.TimeoutExpired:
        return strike(rng, program, output_dir, may_hit_child)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--n-trials", type=int, default=None, help="of the study (a third of the kills)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest-life", type=float, default=14.0, help="seconds until the next kill, at most")
    parser.add_argument("--device", default="cpu", help="cpu, or cpu,cpu for two workers")
    parser.add_argument("--output-dir", type=Path, default=None, help="a new folder (a temporary one)")
    args = parser.parse_args()
    top = (args.output_dir or Path(tempfile.mkdtemp(prefix="storm-"))).resolve()
    demo_world.make_tiny_world(top / "world")
    n_trials = args.n_trials or max(2, args.kills // 3)
    damage = storm(top / "world", top / "out", args.kills, n_trials, args.seed, args.longest_life, args.device)
    print(f"trained trials: {sum(map(search.is_trained, damage.trials()))} of {n_trials}")
    print("\n".join(f"{kind}: {damage.counts[kind]}" for kind in KINDS))
    print("\n".join(damage.notes))
    return 1 if damage.notes else 0


if __name__ == "__main__":
    sys.exit(main())
