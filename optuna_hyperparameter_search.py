#!/usr/bin/env python3
"""Find the best character LoRA: search the hyperparameters of kohya-ss/sd-scripts with Optuna.

See it work on this machine, without a GPU, downloads or sd-scripts:

    python optuna_hyperparameter_search.py --demo

Look at the inputs before a night is spent on them, then search; the same command again resumes:

    python optuna_hyperparameter_search.py --check --sd-scripts ~/sd-scripts \\
        --dataset-config configs/luca_human_dataset.toml --base-model v1-5-pruned-emaonly.safetensors \\
        --output-dir runs/luca
    python optuna_hyperparameter_search.py --sd-scripts ~/sd-scripts \\
        --dataset-config configs/luca_human_dataset.toml --base-model v1-5-pruned-emaonly.safetensors \\
        --output-dir runs/luca --study-name luca_v2.1 --n-trials 20 --device cuda

Data flow of a trial:
    sampler -> params -> safety constraints -> config.toml -> train_network.py -> checkpoints
            -> scoring process -> metrics.json -> study -> results/

Sections, each using only names defined above it:
    1 imports and constants    5 safety constraints    9 objective    13 command line
    2 errors, screen, files    6 sampler              10 study
    3 settings and inputs      7 training             11 results
    4 search space             8 scoring              12 preparation
"""

# ======================================================================================================
# 1. Imports and constants. torch, diffusers, transformers, Pillow and rich are imported by the functions
#    that use them, so that --help, --check and errors answer at once.
# ======================================================================================================

from __future__ import annotations

import argparse
import codecs
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing.connection
import operator
import os
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import urllib.parse
import uuid
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import optuna
import toml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

if sys.platform != "win32":  # native Windows is refused in one line
    import fcntl

HERE = Path(__file__).resolve().parent
DATABASE_NAME = "optuna_study.db"
LOG_NAME = "search.log"
ANSWER_NAME = "kohya_answer.json"  # in reference/: what sd-scripts answered to the probe
ARTIFACTS = "artifacts"  # in the output folder, for optuna-dashboard --artifact-dir
DEFAULT_STUDY_NAME = "lora_v2.1"
FIRST_STEP = "first_step"  # in reference/: a LoRA of one step
NO_WEIGHTS = ' --include "*.[jt]*"'  # .json and .txt files; not every `hf download` takes two patterns
LORA_NAME = "lora"  # kohya's output_name: lora-000002.safetensors ... lora.safetensors
Params = dict[str, Any]


# ======================================================================================================
# 2. Errors, the screen, and files. A message says what was refused, the value, and what to do next.
# ======================================================================================================

REDRAWS_PER_SECOND = 8  # of the live region, at most


class SearchError(Exception):
    """Base of every error that this program raises on purpose."""


class RefusedInput(SearchError):
    """Something that the user gave can't be used. Holds one line a problem; exit status 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems(list[str]):
    """Collects what several checks refuse, so that all of it is reported at once."""

    def of(self, check: Callable[..., Any], *args: Any) -> Any:
        """What the check returns; None if it refuses, and if what it checks first is missing (None)."""
        try:
            return None if args and args[0] is None else check(*args)
        except RefusedInput as error:
            self += [line for line in error.problems if line not in self]
            return None

    def refuse(self) -> None:
        if self:
            raise RefusedInput(*self)


class SearchStopped(SearchError):
    """The search stopped by itself: going on would waste trials. Exit status 1."""


class TrialFailed(SearchError):
    """One trial ended without a value. Its user_attrs keep `ended`."""

    ended = "crashed"


class OutOfMemory(TrialFailed):
    """The card (or the machine) had no memory left."""

    ended = "out of memory"


class Diverged(TrialFailed):
    """A checkpoint has weights that are not finite (NaN or infinite)."""

    ended = "diverged"


class StoppedEarly(TrialFailed):
    """Its checkpoints score too low for the training to go on."""

    ended = "stopped early"


class Hung(TrialFailed):
    """The trainer ran on, but made no progress."""

    ended = "hung"


class ScoringFailed(TrialFailed):
    """The training succeeded, and its scoring failed. Only the scoring is repeated."""


def interrupt(number: int, _frame: Any = None) -> None:
    """The handler of signals; its error names all but Ctrl-C. A second one cuts short what the first waits for."""
    raise KeyboardInterrupt(signal.Signals(number).name) if number != signal.SIGINT else KeyboardInterrupt


def printable(text: object) -> str:
    """The text with unprintable characters escaped, so that no file name in it can break or colour a line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


class Screen:
    """What the user sees: lines that stay and, in a terminal, a live region below them: the study, and each device.

    No thread redraws the region, because this program forks. Code that waits calls refresh().
    """

    def __init__(self) -> None:
        self.started = time.monotonic()  # about when the program did
        self.log_file: Path | None = None
        self._log_failed = False
        self._live: Any = None  # rich.live.Live, where there is a terminal
        self._lines: dict[str, Any] = {}  # its lines by name, each a rich.progress.Progress with one task
        self._next_redraw = 0.0

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def show(self, name: str, text: str, done: float = 0, total: float = 1) -> None:
        """Set the text and the bar of a line of the live region: study, trial, train or score."""
        if self._live is not None:
            self._lines[name].update(0, text=printable(text), completed=done, total=total)

    def begin(self, *pieces: str) -> None:
        """Name the trial (or other work) that begins; nothing of it is trained or scored yet."""
        for name, text in {"trial": "  ".join(pieces), "train": "-", "score": "-"}.items():
            self.show(name, text)

    def print(self, text: str, *, detail: bool = False) -> None:
        """Print lines that stay. Details are left out while there is a live region."""
        if self._live is None:
            try:
                print(text, flush=True)
            except OSError:  # the reader is gone (`| head`, a closed terminal); search.log has it all
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        elif not detail:
            with self._drawing():
                self._live.console.print(text.strip("\n"), soft_wrap=True)

    def log(self, text: str) -> None:
        """Append to search.log, once there is one. A full disk costs lines of the log, but never stops the search."""
        try:
            if self.log_file:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(f"{datetime.datetime.now().isoformat(' ', 'milliseconds')} {text}\n")
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                file = printable(self.log_file)
                self.print(f"warning: can't write to {file} ({error.strerror}), so it lacks what follows; make room")

    def refresh(self) -> None:
        """Redraw the live region, unless it was redrawn just now."""
        if self._live is not None and time.monotonic() >= self._next_redraw:
            with self._drawing():
                self._live.refresh()
            self._next_redraw = time.monotonic() + 1 / REDRAWS_PER_SECOND

    def wait(self, seconds: float) -> None:
        """Sleep, and keep the clock of the live region running."""
        for _ in range(times := math.ceil(seconds)):
            self.refresh()
            time.sleep(seconds / times)

    @contextlib.contextmanager
    def live(self, devices: Sequence[str] = ("",)) -> Iterator[None]:
        """Show the live region, with a block for each device, where the terminal can, and remove it at the end."""
        live = self._make_live(devices) if sys.stdout and sys.stdout.isatty() else None
        try:
            if live:
                with self._drawing():
                    live.start(refresh=True)
            self._live = live
            yield
        finally:
            self._live = None
            if live:
                with self._drawing():
                    live.stop()

    def _make_live(self, devices: Sequence[str]) -> Any:
        """A line for the study, then three for each device; None for a terminal like TERM=dumb."""
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        # markup=False: brackets in a user's file names are no markup.
        console = Console(force_terminal=True, force_jupyter=False, markup=False, highlight=False, emoji=False)
        if not console.is_interactive:
            return None
        label = TextColumn("{task.description}", style="bold", markup=False)
        room = Column(ratio=1, no_wrap=True, overflow="crop" if console.options.ascii_only else "ellipsis")
        text = TextColumn("{task.fields[text]}", markup=False, table_column=room)
        bar = BarColumn(max(8, min(30, console.width - 72)))  # label and text of a training take 72 columns
        columns = {"study": (text, TimeElapsedColumn()), "trial": (text,), "train": (bar, text), "score": (bar, text)}
        self._lines = {}
        for device, part in [("", "study"), *itertools.product(devices, ("trial", "train", "score"))]:
            name = f"{device} {part}".strip()
            self._lines[name] = Progress(label, *columns[part], console=console, expand=True)
            self._lines[name].add_task(name, total=1, text="-")
        self._lines["study"].tasks[0].start_time = self.started
        rows = Group(*self._lines.values(), "")  # the cursor stands in the empty row, and ^C is echoed there
        off = dict.fromkeys(("auto_refresh", "redirect_stdout", "redirect_stderr"), False)
        return Live(rows, console=console, transient=True, **off)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Hold a signal back until the redraw is whole; a second signal interrupts at once. Ignores a closed terminal.

        A signal mask would not do: one of NumPy's threads takes the signal, and Python runs the handler in this thread.
        """
        held: list[int] = []
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {n: signal.signal(n, lambda n, _: interrupt(n) if held else held.append(n)) for n in numbers}
        try:
            yield
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


class CardScreen(Screen):
    """What a worker on one of several devices says: its program shows it, in the device's block or behind its name."""

    def __init__(self, tell: Callable[[tuple[Any, ...]], Any], device: str, whole: Screen) -> None:
        super().__init__()
        self._tell, self._device, self._live, self.log_file = tell, device, whole._live, whole.log_file
        self._next_redraw = math.inf  # only the program draws

    def show(self, name: str, text: str, done: float = 0, total: float = 1) -> None:
        self._tell(("show", name if name == "study" else f"{self._device} {name}", text, done, total))

    def print(self, text: str, *, detail: bool = False) -> None:
        if not (detail and self.is_live):
            self._tell(("print", self._behind_device(text)))

    def log(self, text: str) -> None:
        super().log(self._behind_device(text))

    def _behind_device(self, text: str) -> str:
        return "\n".join(f"{self._device}  {line}" for line in text.strip("\n").split("\n"))


screen = Screen()


class LibraryLog(logging.Handler):
    """Sends the warnings of libraries to search.log instead of the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        screen.log(record.getMessage())


def say(text: str = "", *, detail: bool = False) -> None:
    """Print to the screen and append to search.log. A live region hides details from the screen alone."""
    text = "\n".join(map(printable, text.split("\n")))
    screen.print(text, detail=detail)
    screen.log(text)


@contextlib.contextmanager
def only_warning(what: str) -> Iterator[None]:
    """Turn an error into a warning, for work that the search can do without. The error follows `what`."""
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, SearchError) else f"{type(error).__name__}: "
        say(f"warning: {what} ({name}{one_line(error)})")


def write_atomically(path: Path, data: str | bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write (or let `data` write) beside the file and rename into place, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_toml(path: Path, data: Mapping[str, Any], comment: str = "") -> None:
    """Write TOML with texts quoted as in JSON: `toml` itself garbles no-break spaces, control characters and \\x."""
    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = lambda text: json.dumps(text, ensure_ascii=False)
    write_atomically(path, comment + toml.dumps(data, encoder))


def read_json(path: Path) -> Any:
    """The object in a JSON file; None for a missing or damaged file and for any other value."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
    return None


def digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def quick_digest(path: Path) -> str:
    """A quick digest of a large file: its size, its first mebibyte (a safetensors header) and 16 samples."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        sha.update(file.read(1 << 20))
        for part in range(16):
            file.seek(size * part // 16)
            sha.update(file.read(1 << 16))
    return sha.hexdigest()


def nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest valid one, or to delete it."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else "; delete it"


def one_line(text: object, limit: int = 300) -> str:
    return " ".join(str(text).split())[:limit]


# ======================================================================================================
# 3. Settings and inputs: the command line, configs/*.toml, the data set and the base model. Reads files; writes
#    none. An unknown key is an error that names the key, the file and the nearest valid name.
# ======================================================================================================

ALL_CARDS = "cuda:all"
_CARD = "cuda:(0|[1-9][0-9]?)"
DEVICE = re.compile(rf"{ALL_CARDS}|cuda|{_CARD}(,{_CARD})*|cpu(,cpu)*")


@dataclass(frozen=True)
class Settings:
    """The settings of one search, named as the flags of the command line."""

    dataset_config: Path
    base_model: Path
    output_dir: Path
    study_name: str
    n_trials: int
    device: str  # "cuda", "cuda:N" or "cpu"
    sd_scripts: Path
    trainer_python: str
    training_config: Path | None  # this, scoring config and search space: None for those of the base model's family
    scoring_config: Path | None
    eval_prompts: Path | None
    subject: str | None
    storage: str  # SQLAlchemy URL
    seed: int
    enqueue: Sequence[Path]  # files of parameters, and output folders of earlier searches
    timeout_hours: float | None
    search_space: Path | None = None
    stall_minutes: float = 30.0
    keep_checkpoints: str = "best"  # or "all"
    prune: str = "on"  # or "off": no training is stopped early
    command: str = ""  # as the user typed it, without passwords

    @property
    def devices(self) -> list[str]:
        return self.device.split(",")

    @property
    def reference(self) -> Path:
        return self.output_dir / "reference"


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Parse with the `toml` package, because kohya does: a file that it can't read can't be trained either."""
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if kind == "JSON" else toml.loads(text)
        json.dumps(content, ensure_ascii=False, default=str).encode()  # ValueError for what is no Unicode
        if not isinstance(content, dict):
            raise ValueError("it holds no { } of names and values")
        return content
    except OSError as error:
        raise RefusedInput(f"{what}: can't read {path} ({error.strerror}); give a readable {kind} file") from error
    except UnicodeDecodeError as error:
        raise RefusedInput(f"{what}: {path} is not text in UTF-8; save it as UTF-8") from error
    except Exception as error:  # toml raises TypeError, IndexError and more on some malformed files
        remedy = "write paths with / instead of backslashes" if "scape" in str(error) else "correct it there"
        remedy = "write the numbers of a list alike, such as 1.0" if "homogeneous" in str(error) else remedy
        said = one_line(error).partition("?{")[0]  # toml shows all that it has read
        raise RefusedInput(f"{what}: {path} is not valid {kind} ({said}); {remedy}") from error


MAX_STEPS = 1000  # as many as Stable Diffusion was trained with
CURVE_STEP = 10  # percent of a training's epochs, at which its best score so far is reported
# Kinds of values: what messages call them, and the Python types.
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "switch": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "int_or_float": ("a number", (int, float)),
    "str": ('a text, in quotes (such as "512,768")', (str,)),
    "list": ("a list", (list,)),
}


def _wrong_value(value: Any, kind: str, smallest: int | None = None) -> str:
    """What is wrong with a value, or ''. `smallest` holds for a number, and for the length of a list."""
    wanted, kinds = _KINDS.get(kind, ("", (type(value),)))
    if type(value) not in kinds:
        return f"must be {wanted}"
    size = len(value) if isinstance(value, list) else value
    if smallest is not None and not smallest <= size < 2**32:
        return f"must be {wanted} of {smallest} or more" + ("" if size < smallest else f", and below {2**32}")
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    is_no_share = kind == "int_or_float" and isinstance(value, float) and value >= 1
    return "must be a whole number, or a share of the run below 1" if is_no_share else ""


@dataclass(frozen=True)
class ScoringSettings:
    """The tables of configs/scoring.toml; every key is explained there."""

    images: dict[str, Any]
    screen: dict[str, int]  # counts of a stage: prompts with the subject, seeds of each, plain_prompts without it
    confirm: dict[str, int]
    final: dict[str, int]  # of each round
    stop_early: dict[str, float]
    weights: dict[str, float]  # exponent of each term
    encoders: dict[str, str]
    usable: dict[str, float]  # in units of 0..255
    prompts: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path, family_file: Path | None = None) -> ScoringSettings:
        """Read and check a scoring config. What it leaves out is as in the family's, and in configs/scoring.toml."""
        first = HERE / "configs" / "scoring.toml"  # has all keys
        files = (first, family_file or first, path)
        shipped, of_family, given = (read_toml(file, "--scoring-config") for file in files)
        shipped, problems = {table: {**found, **of_family.get(table, {})} for table, found in shipped.items()}, []
        for table, found in given.items():
            if not isinstance(found, dict) or table not in shipped:
                remedy = "; write its keys below it" if table in shipped else nearest(table, shipped)
                problems.append(f"[{table}] in {path} is no table of a scoring config{remedy}")
                continue
            examples = shipped[table]
            for key, value in found.items():
                if key not in examples:
                    problems.append(f"unknown key '{key}' in [{table}] of {path}{nearest(key, examples)}")
                elif wrong := cls._wrong_setting(table, key, value, examples[key]):
                    problems.append(f"{key} in [{table}] of {path} {wrong}; see configs/scoring.toml")
            shipped[table] = {**examples, **found}
        if not problems and not any(shipped["weights"].values()):
            problems.append(f"all weights of {path} are 0, so every trial would score 1; raise one")
        Problems(f"--scoring-config: {problem}" for problem in sorted(problems)).refuse()
        return cls(**shipped)

    @staticmethod
    def _wrong_setting(table: str, key: str, value: Any, example: Any) -> str:
        kind = type(example).__name__
        counts = {"images": 1, "stop_early": 0}
        smallest = {"str": None, "float": 0, "list": 2, "int": counts.get(table, 2)}[kind]
        if wrong := _wrong_value(value, kind, smallest):
            return wrong
        if key == "resolution" and (value % 8 or value < 16):
            return "must be a multiple of 8 (the VAE's factor), from 16 on"
        if key == "at_percent" and (value % CURVE_STEP or value > 90):
            return f"must be a multiple of {CURVE_STEP}, up to 90"
        most = {"steps": MAX_STEPS, "keep_percent": 100}
        if key in most and value > most[key]:
            return f"must be at most {most[key]}"
        templates = value if table == "prompts" else []
        if not all(isinstance(text, str) and text.strip() for text in templates):
            return "must be a list of texts"
        if key == "plain" and (odd := [text for text in templates if "{subject}" in text]):
            return f"must not have {{subject}}, which is in {', '.join(map(repr, odd))}"
        named = [text for text in templates if key != "plain"]
        odd = [text for text in named if "{subject}" not in text or set("{}") & set(text.replace("{subject}", ""))]
        return f"must have {{subject}}, and no other braces, in {', '.join(map(repr, odd))}" if odd else ""


# Options that a fixed training config must not hold, and why; some of them may be searched.
_REFUSED = toml.loads((HERE / "configs" / "refused_options.toml").read_text(encoding="utf-8"))["refused"]
REFUSED_OPTIONS: dict[str, str] = {key: table["why"] for table in _REFUSED for key in table["options"].split()}
SEARCHABLE_OPTIONS = {key for table in _REFUSED if table.get("may_be_searched") for key in table["options"].split()}
IGNORED_OPTIONS = {key for table in _REFUSED if table.get("is_ignored") for key in table["options"].split()}
LYCORIS, ALGORITHMS = "lycoris.kohya", ("lora", "locon", "loha", "lokr")
NOT_MERGED = ("dora_wd", "train_norm", "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "rs_lora")
# The search can score no others; the first is the default.
_SCORED = {"save_model_as": ["safetensors"], "network_module": ["networks.lora", LYCORIS]}
_SMALLEST = {"save_every_n_epochs": 1, "clip_skip": 1, "seed": 0, "train_batch_size": 1}
GUI_OPTIONS = {"epoch", "noise_offset_type"}  # of kohya's GUI, which it writes for sd-scripts, too
# What the GUI gives to kohya's own LoRA of convolutions, and to LyCORIS besides.
LORA_ARGUMENTS = ["conv_dim", "conv_alpha", "rank_dropout", "module_dropout"]
LYCORIS_ARGUMENTS = [*LORA_ARGUMENTS, *"factor use_cp use_tucker decompose_both train_norm dora_wd".split()]
GUI_DEFAULTS = {"max_token_length": 75, "dynamo_backend": "no"}  # which sd-scripts does not have


def path_remedy(text: str) -> str:
    """The remedy for a path that does not exist. A drive or a backslash shows that it is one of Windows."""
    # TOML reads C:\new as C:, a line break, ew.
    text = text.translate({8: r"\b", 9: r"\t", 10: r"\n", 12: r"\f", 13: r"\r"})
    if drive := re.match(r"([A-Za-z]):(?=[\\/])", text):
        linux = text[2:].replace("\\", "/")
        return f"Windows' drives are below /mnt in WSL2: give '/mnt/{drive[1].lower()}{linux}'"
    if "\\" in text:
        return "write / for each backslash, which TOML changes between double quotes"
    return "correct it there"


def read_training_options(path: Path) -> dict[str, Any]:
    """The fixed kohya options, unchecked and flattened by one level, as kohya does. Unset options are dropped."""
    given: dict[str, Any] = {}
    for key, value in read_toml(path, "--training-config").items():
        given.update(value if isinstance(value, dict) else {key: value})
    given = read_preset(given) if path.suffix.lower() == ".json" else given
    options: dict[str, Any] = {key: scored[0] for key, scored in _SCORED.items()}
    options |= {"save_every_n_epochs": 1, "clip_skip": 1, "seed": 42}
    for key, value in given.items():
        if value == "" or value == [] or GUI_DEFAULTS.get(key) == value or (key in REFUSED_OPTIONS and value is False):
            continue  # kohya's GUI and others save every option, set or not
        is_path = isinstance(value, str) and "/" in value and os.path.exists(value)  # noqa: PTH110 - Path raises
        options[key] = str(Path(value).resolve()) if is_path else value  # the config is used from other folders too
        if key.endswith("_args") and isinstance(value, str):
            options[key] = value.split()  # kohya would take each letter for an argument
    return options


def read_preset(given: Mapping[str, Any]) -> Params:
    """The options in a JSON preset of kohya's GUI, as it gives them to sd-scripts: "2" is a number, and 0 is unset."""
    options = {}
    for key, value in given.items():
        if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?(e[-+]?\d\d?)?", value):
            options[key] = json.loads(value)
        elif isinstance(value, (str, int, float)):
            options[key] = int(value) if isinstance(value, float) and value.is_integer() else value
    if options.get("xformers") in ("xformers", "sdpa"):
        options[options.pop("xformers")] = True
    maker, _, algorithm = str(options.pop("LoRA_type", "Standard")).partition("/")
    if maker in ("Kohya LoCon", "LyCORIS"):
        taken = {name: options.pop(name, 0) for name in (LYCORIS_ARGUMENTS if algorithm else LORA_ARGUMENTS)}
        taken |= {"algo": algorithm.lower(), "preset": algorithm and options.pop("LyCORIS_preset", "")}
        arguments = [f"{name}={value}" for name, value in taken.items() if value]
        options["network_args"] = " ".join([*arguments, str(options.get("network_args", ""))])
    if maker not in ("Standard", "Kohya LoCon"):
        options["network_module"] = LYCORIS if maker == "LyCORIS" else maker
    return {key: value for key, value in options.items() if value != 0}


def ignored_options(options: Params) -> set[str]:
    """What a training config may hold, and the search sets itself or does without."""
    is_of_optimizer = {"optimizer", "optimizer_type"} & options.keys()  # which is not taken from the file
    return IGNORED_OPTIONS | GUI_OPTIONS | ({"optimizer_args"} if is_of_optimizer else set())


def check_training_options(options: Params, path: Path, known: Mapping[str, Mapping[str, Any]]) -> Params:
    """The options of that file that count; RefusedInput lists faults. `known`: those of the trainer's parser."""
    problems, is_preset = [], path.suffix.lower() == ".json"
    ignored = ignored_options(options) | (options.keys() - known if is_preset and known else set())
    options = {key: _fit(value, known.get(key, {}), is_preset) for key, value in options.items() if key not in ignored}
    for key, value in options.items():
        if key in REFUSED_OPTIONS:
            problems.append(f"'{key}' in {path} {REFUSED_OPTIONS[key]}")
        elif known and key not in known:
            valid = known.keys() - REFUSED_OPTIONS.keys()
            problems.append(f"'{key}' in {path} is no option of this sd-scripts{nearest(key, valid)}")
        elif wrong := _wrong_option(key, value, known.get(key, {})):
            problems.append(f"{key} = {value!r} in {path} {wrong}")
    Problems(f"--training-config: {problem}" for problem in problems).refuse()
    return options


def _fit(value: Any, option: Mapping[str, Any], is_preset: bool) -> Any:
    """A value as the option's kind has it, where that says the same: 1 for a switch, 2.0 for a whole number."""
    kind = option.get("kind")
    if kind == "switch" and type(value) is int and value in (0, 1):
        return bool(value)
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if is_preset and kind == "str" and type(value) in (int, float) else value


def _wrong_option(key: str, value: Any, option: Mapping[str, Any]) -> str:
    """What is wrong with a fixed option's value, or ''. `option` describes it, as kohya's parser does."""
    if value not in (scored := _SCORED.get(key, [value])):
        return f"must be {' or '.join(map(repr, scored))}, or it can't be scored"
    kind = "int" if key in _SMALLEST else option.get("kind", "").replace("Path", "str")
    items = value if isinstance(value, list) and option.get("is_list", True) else [value]
    if key.endswith("_args") and isinstance(value, str):
        items = value.split()
    for item in items:
        text = str(item)
        if wrong := _wrong_value(item, kind, _SMALLEST.get(key)):
            return wrong
        if option.get("choices") and re.split("[:=]", text)[0] not in option["choices"]:  # adafactor:1e-4
            return f"must be one of {', '.join(option['choices'])}"
        if Path(text).suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
            return "is a pickle; use a safetensors file"
        if re.match(r"[A-Za-z]:[\\/]", text):
            return f"does not exist; {path_remedy(text)}"
        if key.endswith("_args") and not re.fullmatch(r"\w+=[^=]*", text):
            return f"must hold texts such as 'name=value', and {text!r} is none; correct it"
        if wrong := key == "network_args" and _unscored_network(*text.split("=")):
            return wrong
        name, _, number = text.rpartition("=")
        if re.fullmatch(r"\w*dropout(_rate)?", name or key) and not _is_dropout(number, is_whole="caption" in key):
            return f"must have {name or key} from 0 to {'1' if 'caption' in key else 'below 1'}"
    return ""


def _is_dropout(text: str, *, is_whole: bool) -> bool:
    """Whether it is a share. Captions may all be dropped, but not a whole network."""
    try:
        return 0 <= float(text) < 1 or (is_whole and float(text) == 1)
    except ValueError:
        return False


def _unscored_network(name: str, said: Any) -> str:
    """Why a network with an argument can't be scored, or ''. LyCORIS takes more of them from a preset's file."""
    if name == "preset" and Path(said).suffix:
        said = read_toml(Path(said), "--training-config")
    if isinstance(said, dict):
        return next(filter(None, itertools.starmap(_unscored_network, said.items())), "")
    if name == "algo" and str(said).lower() not in ALGORITHMS:
        return f"can't be scored; algo is one of {', '.join(ALGORITHMS)}"
    is_off = str(said).lower() in ("false", "0")
    return f"can't be scored with {name}; leave it out" if name in NOT_MERGED and not is_off else ""


# Suffixes of pictures. sd-scripts always trains the first group; the rest depends on the plug-ins of its Python.
_ALWAYS_TRAINED = {*".png .jpg .jpeg .webp .bmp .PNG .JPG .JPEG .WEBP .BMP".split()}
_PICTURE_SUFFIXES = {*".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif .jxl .heic .heif .psd .svg .ico".split()}
_FACE = re.compile(r"(?<=.)(_[^_]*){4}$")  # the name of a face crop ends in its place; its caption's need not
_FOLDERS = ("image_dir", "conditioning_data_dir", "metadata_file")  # keys of a subset that hold a path


@dataclass(frozen=True)
class TrainingImage:
    """A picture as one [[datasets]] table trains it."""

    path: Path
    captions: tuple[str, ...]  # without shuffling and dropout; of several, kohya draws one at each step
    has_caption: bool  # False: its caption is class_tokens, or empty
    is_reg: bool = False
    bucket: tuple[int, int] | None = None  # width, height in pixels that are trained
    size: tuple[int, int] | None = None  # width, height in pixels, as kohya knows it
    latents: Path | None = None  # the file in which kohya caches them
    arrays: tuple[str, ...] = ("latents",)  # names of the arrays that the cache must hold

    @classmethod
    def of(cls, found: Mapping[str, Any], weighted: bool) -> TrainingImage:
        """A picture as configs/kohya_probe.py describes it."""
        captions = tuple(as_tags(text, weighted=weighted) for text in found["captions"])
        bucket, size, arrays = (tuple(found[name]) for name in ("bucket", "size", "arrays"))
        path, latents = Path(found["path"]), Path(found["latents"])
        return cls(path, captions, found["has_caption"], found["is_reg"], bucket, size, latents, arrays)


def as_tags(caption: str, *, weighted: bool = False) -> str:
    """A caption as tags with ', ' between them, without byte order mark and, if `weighted`, without kohya's weights.

    With weighted_captions `(curly hair:1.2)` is `curly hair`, `[beach]` is `beach`, and a backslash keeps a bracket.
    """
    if weighted:
        caption = re.sub(r"\\([()\[\]\\])|:\s*[+-]?[.\d]+\s*(?=\))|[()\[\]]", lambda match: match[1] or "", caption)
    return ", ".join(filter(None, (tag.strip("\ufeff\u200b \t\r\n") for tag in caption.split(","))))


@dataclass(frozen=True)
class DataSet:
    """A kohya data set. Folders in `config` are absolute; kohya itself counted the batches."""

    config: dict[str, Any]
    images: tuple[TrainingImage, ...]
    batches_per_epoch: int | None  # None: not known before the first step
    class_tokens: str | None
    notes: tuple[str, ...] = ()  # what the user should know about it

    @property
    def subject_images(self) -> list[TrainingImage]:
        return [image for image in self.images if not image.is_reg]

    def updates(self, params: Mapping[str, Any]) -> int:
        """Optimizer updates of a whole training, as kohya counts them (its bar shows the same number)."""
        assert self.batches_per_epoch is not None
        per_epoch = math.ceil(self.batches_per_epoch / params["gradient_accumulation_steps"])
        return params["max_train_epochs"] * per_epoch


def read_data_set_file(path: Path) -> dict[str, Any]:
    """Read kohya's data set file. Relative paths are tried in the current folder, as by kohya, then beside the file."""
    config, subsets = read_toml(path, "--dataset-config"), []
    with contextlib.suppress(KeyError, TypeError):
        subsets = [subset for dataset in config["datasets"] for subset in dataset["subsets"]]
    tables = [config.setdefault("general", {}), *subsets]
    if not subsets or not all(isinstance(table, dict) for table in tables):
        why = f"{path} has no [[datasets]] with [[datasets.subsets]], or [general] is no table"
        raise RefusedInput(f"--dataset-config: {why}; see configs/luca_human_dataset.toml")
    for subset, key in itertools.product(subsets, _FOLDERS):
        if subset.get(key) and isinstance(subset[key], str):
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, ~nobody
                given = Path(subset[key]).expanduser()
                places = [place for place in (given, path.parent / given) if place.exists()]
                subset[key] = str(places[0].resolve()) if places else subset[key]
    return config


def why_stopped(answer: Mapping[str, Any]) -> str:
    """kohya's last error and what stopped it."""
    errors = [message for level, message in answer["said"] if level in ("ERROR", "CRITICAL")]
    texts = [*errors[-1:], *(message for _, message in answer.get("stopped", [])[:1])]
    return one_line("; ".join(filter(None, map(in_english, texts)))) or "no reason"


def in_english(message: str) -> str:
    """A message of kohya's without its Japanese half."""
    return re.sub(r" / [^:]*[\u3040-\u9fff][^:]*", "", message)


def tables_of_data_set(config: Any) -> list[dict[str, Any]]:
    """All tables of a data set's file, each with options of its own."""
    tables = [config["general"], *config["datasets"]] if config else []
    return [*tables, *(subset for data_set in tables[1:] for subset in data_set["subsets"])]


class DataSetReader:
    """Reads a data set; collects its problems, and notes for the user."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.folders: dict[Path, list[Path]] = {}  # the files of each folder
        self.problems: list[str] = []
        self.notes: list[str] = []

    def read(self, options: Mapping[str, Any], answer: Mapping[str, Any]) -> DataSet:
        """The data set of sd-scripts' `answer`, else as it lies in its folders. RefusedInput lists all problems."""
        inherited = {"caption_extension": ".caption", **options, **self.config["general"]}
        subsets = [{**inherited, **data, **subset} for data in self.config["datasets"] for subset in data["subsets"]]
        images = [image for settings in subsets for image in self._list_subset(settings)]
        if "images" in answer:
            images = [TrainingImage.of(found, bool(options.get("weighted_captions"))) for found in answer["images"]]
        if "notes" not in answer:  # no earlier start has looked at these files
            self._check_pictures(images, bool(options.get("cache_latents_to_disk")))
            self._note_unused_files(images)
            if answer and "images" not in answer:
                why = f"this sd-scripts does not say what it trains ({answer.get('unknown', 'no answer')})"
                self.notes.append(f"{why}; all pictures in the folders count, and the first step tells the batches")
        self._hear_kohya(answer)
        if answer and not self.problems and all(image.is_reg for image in images):
            self.problems.append(f"{self.path} has only regularisation images; add the character's own")
        smallest = min((side for image in images for side in image.bucket or ()), default=8)
        if smallest < 8:  # pixels of one latent
            self.problems.append(f"{self.path}: a resolution of {smallest} pixels is too small; raise it")
        Problems(f"--dataset-config: {problem}" for problem in dict.fromkeys(self.problems)).refuse()
        tokens = {str(known.get("class_tokens") or "") for known in subsets if not known.get("is_reg")} - {""}
        class_tokens = tokens.pop() if len(tokens) == 1 else None
        notes = tuple(answer.get("notes", self.notes))
        return DataSet(self.config, tuple(images), answer.get("batches"), class_tokens, notes)

    def _list_subset(self, settings: Mapping[str, Any]) -> list[TrainingImage]:
        """A subset's pictures as they lie in its folder, for an sd-scripts that does not say what it trains."""
        place, metadata = str(settings.get("image_dir", "")), settings.get("metadata_file")
        folder, captions = Path(place), {}
        if os.path.isdir(place) and os.access(place, os.R_OK | os.X_OK):  # noqa: PTH112 - Path raises
            self.folders[folder] = sorted(file for file in folder.iterdir() if file.name[0] != ".")
            captions = {} if metadata else self._read_captions(folder, settings)
        elif place or not metadata:
            self.problems.append(f"image_dir {place!r} in {self.path} is no folder you can read; {path_remedy(place)}")
        if isinstance(metadata, str):
            captions = self._read_metadata(Path(metadata), folder)
        tokens, is_reg = str(settings.get("class_tokens") or ""), settings.get("is_reg") is True
        weighted = bool(settings.get("weighted_captions"))  # in the training config
        found = ((path, as_tags(said or tokens, weighted=weighted), said) for path, said in captions.items())
        return [TrainingImage(path, (tags,), said is not None, is_reg) for path, tags, said in found]

    def _read_metadata(self, file: Path, folder: Path) -> dict[Path, str | None]:
        """The captions in kohya's metadata: {"picture": {"caption", "tags"}}, or lines with "image_path" as well."""
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                entries = {line["image_path"]: line for line in map(json.loads, text.splitlines())}
            else:
                entries = json.loads(text)
            said = {name: (entry.get("caption"), entry.get("tags")) for name, entry in entries.items()}
            return {folder / name: ", ".join(filter(None, parts)) for name, parts in said.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.problems.append(f"can't use metadata_file {file} ({one_line(error)}); mend it")
            return {}

    def _read_captions(self, folder: Path, settings: Mapping[str, Any]) -> dict[Path, str | None]:
        """The caption of each picture in a folder; None if it has none."""
        files, extension = self.folders[folder], f".{settings['caption_extension']}".replace("..", ".")
        if not self._pictures_in(folder):
            self.problems.append(f"image_dir {folder} has no images; {self._find_images(files)}")
        captions = {file: self._read_caption(file, extension) for file in files if file.suffix in _ALWAYS_TRAINED}
        without = [file.name for file, caption in captions.items() if caption is None]
        if without and not settings.get("class_tokens") and settings.get("is_reg") is not True:
            counted = f"{len(without)} of {len(captions)} images in {folder}, {without[0]} for one,"
            remedy = "write them, or set caption_extension or class_tokens"
            self.problems.append(f"{counted} have no {extension} caption and no class_tokens; {remedy}")
        return captions

    def _find_images(self, files: Sequence[Path]) -> str:
        """The remedy for a folder without pictures. Only kohya's command line takes the parent of `10_luca`."""
        best = max(files, key=lambda file: len(self._pictures_in(file)), default=self.path)
        if not (count := len(self._pictures_in(best))):
            return "give the folder that holds them (kohya would train nothing and say it succeeded)"
        repeats = re.match(r"(\d+)_", best.name)
        more = f" and num_repeats = {repeats[1]}" if repeats else ""
        return f"its folder {best.name!r} has {count}: give {str(best)!r}{more}"

    def _read_caption(self, picture: Path, extension: str) -> str | None:
        """The first line of a picture's caption; None if there is no file."""
        stems = (picture.stem, _FACE.sub("", picture.stem))
        file = next((file for stem in stems if (file := picture.with_name(stem + extension)).is_file()), None)
        try:
            text = file.read_text(encoding="utf-8") if file else None
        except UnicodeDecodeError:
            self.problems.append(f"caption {file} is not UTF-8; save it as UTF-8")
            return ""
        except OSError as error:
            self.problems.append(f"can't read caption {file} ({error.strerror}); make it readable")
            return ""
        if text == "":
            self.problems.append(f"caption {file} is empty, and kohya would stop at it; write it, or delete it")
        return text and text.split("\n")[0].strip()

    def _check_pictures(self, images: Iterable[TrainingImage], on_disk: bool) -> None:
        """Open each picture as scoring will."""
        from PIL import Image

        turned, by_stem = [], {}
        pictures = {image.path: image for image in images}
        for path, image in pictures.items():
            try:
                str(path).encode()  # plan.json and the trainer need a name in UTF-8
                if not path.is_file():  # opening a pipe would block
                    raise ValueError("it is no regular file")
                with Image.open(path) as opened:
                    opened.load()  # kohya stops at a truncated picture, perhaps hours later
                    turned += [path.name] if opened.getexif().get(0x0112, 1) != 1 else []
            except Exception as error:  # Pillow raises all sorts on damaged files
                self.problems.append(f"can't use {path} ({one_line(error)}); replace, remove or convert it to PNG")
                continue
            other, size = by_stem.setdefault(path.with_suffix(""), path), image.size or opened.size
            if on_disk and other != path:
                self.problems.append(f"{other} and {path.name} would share one cache of latents; rename one")
            if on_disk and any(abs(size[side] - opened.size[side]) > 1 for side in (0, 1)):
                why = f"{path} has another size than a .npz file beside it says ({size[0]} x {size[1]})"
                self.problems.append(f"{why}, and kohya trusts the .npz file; delete its .npz files")
        if turned:
            counted = f"{', '.join(turned[:3])}, {len(turned)} of {len(pictures)}"
            self.notes.append(f"rotated by EXIF in viewers, but trained as stored: {counted}")

    def _note_unused_files(self, images: Iterable[TrainingImage]) -> None:
        """Note how many files of the folders kohya does not use."""
        trained = {image.path for image in images}
        with_caption = {image.path.with_suffix("") for image in images if image.has_caption}
        with_caption |= {place.with_name(_FACE.sub("", place.name)) for place in with_caption}
        for folder, files in self.folders.items():
            by_cache = folder / "metadata_cache.json" in files and "metadata_cache.json is read instead (cache_info)"
            pictures = [file for file in files if file.suffix.lower() in _PICTURE_SUFFIXES and file not in trained]
            others = [file for file in files if file.with_suffix("") not in with_caption]
            captions = [file for file in others if file.suffix in (".txt", ".caption", ".cap", ".tags", ".json")]
            for what, found, remedy in (
                ("not trained", pictures, by_cache or "convert them, or leave them"),
                ("captions that are not read", captions, "set caption_extension, rename them, or leave them"),
            ):
                counts = ", ".join(f"{n} {suffix}" for suffix, n in Counter(file.suffix for file in found).items())
                self.notes += [f"{what} in {folder}: {counts}, {found[0].name} for one; {remedy}"] if found else []
            for inner in filter(self._pictures_in, files):
                count = len(self._pictures_in(inner))
                self.notes.append(f"not trained: {count} in {inner}; kohya does not look into subfolders")

    def _hear_kohya(self, answer: Mapping[str, Any]) -> None:
        """Add what kohya refuses. Why it stopped is added only if no other problem explains it."""
        for key, value in [item for table in tables_of_data_set(self.config) for item in table.items()]:
            if key == "batch_size" and type(value) is int and value < 1:
                self.problems.append(f"batch_size = {value} in {self.path} trains nothing; give 1 or more")
            if key.endswith("dropout_rate") and type(value) in (int, float) and not 0 <= value <= 1:
                self.problems.append(f"{key} = {value} in {self.path} is no share of the captions; give 0 to 1")
        for place, message in answer.get("stopped", []):
            value = None
            with contextlib.suppress(KeyError, IndexError, TypeError):  # the place may name a key that is missing
                value = functools.reduce(lambda table, key: table[key], place, self.config)
            if "extra keys" in message:
                known = ("general", "datasets", *answer.get("keys", ()))
                self.problems.append(f"unknown key {place[-1]!r} in {self.path}{nearest(place[-1], known)}")
            elif place:
                self.problems.append(f"kohya refuses {place[-1]} = {value!r} in {self.path} ({message}); correct it")
        if not self.problems:
            left_out = [said.partition(" / ")[0] for _, said in answer.get("said", []) if said.startswith("ignore ")]
            self.problems += [f"{self.path}: kohya would {one_line(said)}; correct that" for said in left_out]
        if answer.get("stopped") and not self.problems:
            stops = f"with {self.path} and the training config kohya stops before its first step"
            said, remedy = why_stopped(answer), "correct them"
            if re.search("openai/clip|laion/CLIP|vocab_file", said):
                said = "it can't get its tokenizers"
                remedy = "`hf download openai/clip-vit-large-patch14` (for SDXL also `hf download "
                remedy += f"laion/CLIP-ViT-bigG-14-laion2B-39B-b160k{NO_WEIGHTS}`), or set tokenizer_cache_dir"
            self.problems.append(f"{stops}: {said}; {remedy}")

    @staticmethod
    def _pictures_in(folder: Path) -> list[Path]:
        """The pictures of a folder; [] for a file, and for a folder that can't be read."""
        return [file for file in folder.glob("*") if file.suffix.lower() in _PICTURE_SUFFIXES]


_MODELS = toml.loads((HERE / "configs" / "base_models.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Family:
    """All that differs between the families of base models, as configs/base_models.toml has it."""

    name: str
    script: str  # of sd-scripts
    pipeline: str  # class of diffusers
    latents: str  # end of the names of cached latents
    screening_gb: float  # of the card
    vae_overflows: bool  # in fp16
    training_config: str  # these four in configs/
    scoring_config: str
    tags_scoring_config: str  # where the captions are tags
    search_space: str  # "" for V2.1
    file: dict[str, dict[str, Any]]  # "names" and number of the "tensors" of each part
    folder: dict[str, list[str]]  # the files of each part


FAMILIES = {name: Family(name, **table) for name, table in _MODELS["families"].items()}
SD1 = FAMILIES["SD1.x"]


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets of a safetensors file; ValueError for any other file, or half of one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"), path.open("rb") as file:  # safe_open checks the header, and the file's size
            return json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except SafetensorError as error:
        raise ValueError(f"it is torn, or no safetensors file: {error}") from error


@dataclass(frozen=True)
class BaseModel:
    family: Family
    fingerprint: str
    lora_bytes_per_dim: int  # of an fp16 LoRA
    adapted_bytes: int  # of the layers that it adapts, in fp16
    prediction: dict[str, bool]  # kohya's v_parameterization and zero_terminal_snr, as far as the model tells them

    @classmethod
    def inspect(cls, path: Path) -> BaseModel:
        """What a safetensors file or a diffusers folder holds; RefusedInput if it can't be trained."""
        remedy = f"give a whole safetensors file or diffusers folder of {' or '.join(FAMILIES)}"
        if not path.exists():
            raise RefusedInput(f"--base-model: {path} does not exist; {remedy}")
        is_file, real = path.is_file(), path.resolve()
        if is_file and real.suffix.lower() != ".safetensors":
            copy = f"cp -L {shlex.quote(str(path))} MODEL.safetensors"
            why = f"kohya would take {real} for a pickle by its name, and it may be a pickle, which can run code"
            raise RefusedInput(f"--base-model: {why}; if it is a safetensors file, copy it with the right name: {copy}")
        files, header = [path] if is_file else sorted(path.glob("*/*.safetensors")), {}
        for file in files:
            try:
                found = read_safetensors_header(file)
            except (ValueError, OSError) as error:
                raise RefusedInput(f"--base-model: can't use {file} ({one_line(error)}); {remedy}") from error
            if is_file or file.parent.name in ("unet", "text_encoder", "text_encoder_2"):  # others get no LoRA
                # Both text encoders name their tensors alike.
                header.update({name if is_file else f"{file.parent.name} {name}": one for name, one in found.items()})
        name = cls._family_of_file(header) if is_file else cls._family_of_folder(path)
        if (family := FAMILIES.get(name)) is None:
            raise RefusedInput(f"--base-model: {path} is {name}, which this search does not train; {remedy}")
        if missing := cls._missing_in_file(header, family) if is_file else cls._missing_in_folder(path, family):
            raise RefusedInput(f"--base-model: {path} has {', '.join(missing)}, so it can't be loaded; {remedy}")
        adapted, per_dim, whole = "|".join(_MODELS["layers"]["lora"]), 0, 0
        for key, entry in header.items():
            if re.search(adapted, key) and len(entry["shape"]) >= 2:
                inputs = 3 if key.endswith("in_proj_weight") else 1  # OpenCLIP's is query, key and value in one
                per_dim += 2 * (entry["shape"][0] + inputs * entry["shape"][1])
                whole += 2 * math.prod(entry["shape"])
        prediction = cls._prediction_of_file(header) if is_file else cls._prediction_of_folder(path)
        return cls(family, digest("".join(map(quick_digest, files))), per_dim, whole, prediction)

    @staticmethod
    def _family_of_file(header: Mapping[str, Any]) -> str:
        names = "\n".join(header)
        layers = (_MODELS["layers"][name] for name in ("first", "cross_attention"))
        first, cross = (header.get(layer, {}).get("shape") or [0] for layer in layers)
        if first[1:2] == [9]:
            return "an inpainting model"
        if found := [family for family, mark in _MODELS["marks"].items() if re.search(mark, names)]:
            return found[0]
        parts = {part: bool(re.search(known["names"], names)) for part, known in SD1.file.items()}
        if cross[-1] == 768 or (any(parts.values()) and not parts["UNet"]):
            return SD1.name
        return "SD2.x" if cross[-1] == 1024 else "of an unknown family"

    @staticmethod
    def _family_of_folder(folder: Path) -> str:
        index, unet = (read_json(folder / file) for file in ("model_index.json", "unet/config.json"))
        if index is None:
            return "a folder without model_index.json"
        if unet and unet.get("cross_attention_dim") == 1024:
            return "SD2.x"
        kind = str(index.get("_class_name") or "of an unknown kind")
        return next((family.name for family in FAMILIES.values() if family.pipeline == kind), kind)

    @staticmethod
    def _missing_in_file(header: Mapping[str, Any], family: Family) -> list[str]:
        """What kohya would miss in a file, or would not know."""
        missing, names = [], "\n".join(header)
        for part, known in family.file.items():
            count, wanted = len(re.findall(known["names"], names)), known["tensors"]
            if count != wanted:
                missing.append(f"{count} tensors of its {part} instead of {wanted}" if count else f"no {part}")
        return missing

    @classmethod
    def _missing_in_folder(cls, folder: Path, family: Family) -> list[str]:
        index, missing = read_json(folder / "model_index.json") or {}, []
        for part, names in family.folder.items():
            if index.get(part) in (None, [None, None]):
                missing += [f"no {part} in model_index.json"] if part != "feature_extractor" else []
            elif not (part.startswith("tokenizer") and (folder / part / "tokenizer.json").is_file()):
                for file in itertools.chain(*(cls._files_of(folder / part / name) for name in names)):
                    if read_json(file) is None if file.suffix == ".json" else not file.is_file():
                        variants = [other.name for other in sorted(file.parent.glob(f"{file.stem}.*.safetensors"))]
                        hint = f" (rename {' or '.join(variants)})" if variants else ""
                        missing.append(f"no whole {part}/{file.name}{hint}")
        return missing

    @staticmethod
    def _prediction_of_file(header: Mapping[str, Any]) -> dict[str, bool]:
        """By the empty tensors v_pred and ztsnr, which such models hold, or by the metadata of Stability AI's form."""
        said = header.get("__metadata__", {}).get("modelspec.prediction_type")
        found = {"zero_terminal_snr": True} if "ztsnr" in header else {}
        if "v_pred" in header or said in ("v", "v_prediction", "epsilon"):
            found["v_parameterization"] = "v_pred" in header or said != "epsilon"
        return found

    @staticmethod
    def _prediction_of_folder(folder: Path) -> dict[str, bool]:
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json") or {}
        found = {"zero_terminal_snr": True} if scheduler.get("rescale_betas_zero_snr") is True else {}
        return {**found, "v_parameterization": scheduler.get("prediction_type") == "v_prediction"}

    @staticmethod
    def _files_of(file: Path) -> list[Path]:
        """The shards that an index names in place of a file, or the file itself."""
        shards = (read_json(file.with_name(f"{file.name}.index.json")) or {}).get("weight_map")
        is_split = isinstance(shards, dict) and not file.is_file()
        return sorted({file.with_name(str(shard)) for shard in shards.values()}) if is_split else [file]


# ======================================================================================================
# 4. Search space: V2.1, or a file of --search-space. The distributions never depend on the machine, so that a study
#    can move. Reads that file.
# ======================================================================================================

SEARCH_SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(6e-5, 1.2e-4, log=True),  # narrowed from V1's 5e-5 .. 2e-4
    "text_encoder_lr": FloatDistribution(3e-5, 8e-5, log=True),  # narrowed from V1's 1e-4
    "network_dim": CategoricalDistribution((64, 128, 256)),
    "network_alpha_ratio": FloatDistribution(0.25, 0.9, step=0.05),  # alpha = dim x ratio, never equal to dim
    "optimizer_type": CategoricalDistribution(("AdamW", "AdamW8bit")),  # Lion was unreliable in V1
    "max_train_epochs": CategoricalDistribution((12, 16, 20)),  # V1's 8 and 10 stopped too early
    "lr_scheduler": CategoricalDistribution(("cosine", "cosine_with_restarts", "polynomial")),
    "gradient_accumulation_steps": CategoricalDistribution((1, 2, 4)),
    "lr_warmup_steps": IntDistribution(50, 200, step=50),  # optimizer updates
}
_COMPARISON = re.compile(r"(<=|>=|<|>) *([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.IGNORECASE)
NEEDED = {  # kinds and smallest values of what V2.1 searches
    "network_dim": ("int", 1), "max_train_epochs": ("int", 1), "gradient_accumulation_steps": ("int", 1),
    "lr_warmup_steps": ("int_or_float", 0), "learning_rate": ("float", 0), "text_encoder_lr": ("float", 0),
    "network_alpha_ratio": ("float", 0), "optimizer_type": ("str", None), "lr_scheduler": ("str", None),
}  # fmt: skip
OVERRULES = {"unet_lr": "learning_rate", "lr_scheduler_type": "lr_scheduler"}  # kohya then does not read the second
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
Condition = Mapping[str, Any]  # by parameter: a value, a list of values, or a text such as "> 1e-4"


def missing_params(params: Mapping[str, Any]) -> list[str]:
    """What a setting lacks of V2.1's parameters. Text encoders that are not trained need no learning rate."""
    needless = {"text_encoder_lr"} if params.get("network_train_unet_only") else set()
    return sorted(SEARCH_SPACE.keys() - params.keys() - needless)


def as_drawn(value: Any) -> Any:
    """A value as distributions have it: several arguments are one text."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def meets(params: Mapping[str, Any], condition: Condition) -> bool:
    """Whether each parameter that the condition names has the value that it wants."""

    def meets_one(value: Any, wanted: Any) -> bool:
        value = as_drawn(value)
        if found := isinstance(wanted, str) and _COMPARISON.fullmatch(wanted):
            return _COMPARE[found[1]](value, float(found[2]))
        return value in (wanted if isinstance(wanted, list) else [wanted])

    return all(name in params and meets_one(params[name], wanted) for name, wanted in condition.items())


def describe_range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"one of {', '.join(map(repr, distribution.choices))}"
    step = f" in steps of {distribution.step}" if distribution.step else ""
    return f"{distribution.low} to {distribution.high}{step}"


def holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a parameter may have a value."""
    if type(value) not in map(type, getattr(distribution, "choices", (1, 1.0))):  # Optuna takes True and 1.0 for 1
        return False
    with contextlib.suppress(ValueError, OverflowError):
        optuna.create_trial(value=0.0, params={"it": value}, distributions={"it": distribution})
        return True
    return False


def _draw(distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    """A uniform draw; for a log distribution, its logarithm is uniform."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[rng.integers(len(distribution.choices))]
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        value = float(np.clip(math.exp(rng.uniform(math.log(low), math.log(high))), low, high))
        return round(value) if isinstance(distribution, IntDistribution) else value
    if step is None:
        return float(rng.uniform(low, high))
    value = low + step * int(rng.integers(round((high - low) / step) + 1))
    return int(value) if isinstance(distribution, IntDistribution) else round(value, 10)


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, what is fixed besides, and what must not be trained."""

    name: str = dataclasses.field(compare=False)
    searched: dict[str, BaseDistribution]  # a parameter with a condition comes after those that it names
    when: dict[str, Condition]  # of parameters that not every trial has
    # Values, and when they are set; the first ones always.
    fixed: list[tuple[Condition, Params]] = dataclasses.field(default_factory=lambda: [({}, {})])
    forbidden: list[tuple[Condition, str]] = dataclasses.field(default_factory=list)  # and why
    safety_constraints: bool = True
    alpha_bands: bool = True

    @classmethod
    def read(cls, path: Path) -> SearchSpace:
        """Read a file such as configs/search_space_v2.1.toml, which explains its form; RefusedInput lists faults."""
        content, problems = read_toml(path, "--search-space"), Problems()
        space = cls(path.name, {}, {})
        rules = {name: content.pop(name, []) for name in ("set", "forbid")}
        switches = {name: content.pop(name) for name in ("safety_constraints", "alpha_bands") if name in content}
        for name, given in content.items():
            if isinstance(given, dict):
                problems.of(space._add, name, given)
            else:
                space.fixed[0][1][name] = given
        for kind, tables in rules.items():
            for table in tables if isinstance(tables, list) else [tables]:
                problems.of(space._add_rule, kind, table)
        has_bands = space.searched.get("network_alpha_ratio") == SEARCH_SPACE["network_alpha_ratio"]
        wrong = [name for name, value in switches.items() if type(value) is not bool]
        problems += [f"{name} must be true or false; correct it" for name in wrong]
        problems += dict.fromkeys(space._wrong_kinds())
        if switches.get("alpha_bands") is True and not has_bands:
            problems.append("alpha_bands = true needs V2.1's network_alpha_ratio; correct one of them")
        problems += [] if problems else sorted(set(space._faults()))
        Problems(f"--search-space: {path}: {problem}" for problem in problems).refuse()
        return replace(space, **{"alpha_bands": has_bands, **switches})

    def _add(self, name: str, given: Params) -> None:
        """Add a parameter's table; RefusedInput if it describes none."""
        condition = given.pop("when", {})
        self._check_condition(condition, f"[{name}], when")
        try:
            distribution = self._distribution(given, may_be_whole=NEEDED.get(name, ("",))[0] != "float")
            _draw(distribution, np.random.default_rng(0))  # OverflowError for a range without end
            self.searched[name] = distribution
        except (ValueError, ArithmeticError, UserWarning) as error:
            said = one_line(error).replace("`", "").rstrip(".")
            said = "high is not low and some steps more" if isinstance(error, UserWarning) else said
            raise RefusedInput(f"[{name}]: {said}; give low and high (and step or log), or choices") from error
        self.when.update({name: condition} if condition else {})

    @staticmethod
    def _distribution(given: Params, *, may_be_whole: bool) -> BaseDistribution:
        """The distribution that a parameter's table describes. Raises as Optuna does if it describes none."""
        kinds = {"low": "float", "high": "float", "step": "float", "log": "switch", "choices": "list"}
        for key, value in given.items():
            if key not in kinds:
                raise ValueError(f"unknown key '{key}'{nearest(key, kinds)}")
            if wrong := _wrong_value(value, kinds[key]):
                raise ValueError(f"{key} {wrong}")
        if "choices" in given:
            choices = given["choices"]
            if len(given) > 1 or not all(isinstance(choice, (str, int, float)) for choice in choices):
                raise ValueError("choices must be a list of texts, numbers or switches, and stand alone")
            if len(set(map(repr, choices))) < len(choices):
                raise ValueError("a choice stands there twice")
            return CategoricalDistribution(choices)
        if missing := sorted({"low", "high"} - given.keys()):
            raise ValueError(f"no {' and no '.join(missing)}")
        is_whole = may_be_whole and not any(isinstance(value, float) for value in given.values())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna would move `high` to the last step
            return IntDistribution(**given) if is_whole else FloatDistribution(**given)

    def _add_rule(self, kind: str, table: Any) -> None:
        """Add a [[set]] or [[forbid]] table."""
        where = f"[[{kind}]]"
        if not isinstance(table, dict):
            raise RefusedInput(f"{kind} must be a table; write {where} above it")
        if kind == "set":
            condition = table.pop("when", None)
            self.fixed.append((condition, table))
            if not table:
                raise RefusedInput(f"{where} sets nothing; add a value, or delete it")
        else:
            condition, reason = table, table.pop("reason", "")
            self.forbidden.append((condition, str(reason)))
            if not (isinstance(reason, str) and reason.strip()):
                raise RefusedInput(f'{where} has no reason; add reason = "..."')
        if not condition:
            raise RefusedInput(f"{where} holds always; {'add when = {...}' if kind == 'set' else 'name parameters'}")
        self._check_condition(condition, where)

    def _check_condition(self, condition: Any, where: str) -> None:
        """RefusedInput unless it compares parameters that are searched with values that they may have."""
        if not isinstance(condition, dict):
            raise RefusedInput(f"{where} must be a table of parameters and values; correct it")
        for name, wanted in condition.items():
            if name not in self.searched:
                raise RefusedInput(f"{where}: {name!r} is not searched above it{nearest(name, self.searched)}")
            is_number = not any(isinstance(value, str) for value in self.values(name))
            if is_number and isinstance(wanted, str) and _COMPARISON.fullmatch(wanted):
                continue
            for value in wanted if wanted and isinstance(wanted, list) else [wanted]:
                if not holds(self.searched[name], value):
                    forms = "give a value that it may have, a list of them, or for numbers one comparison such as '> 3'"
                    raise RefusedInput(f"{where}: {name} is never {value!r}; {forms}")

    def idle_rules(self) -> Iterator[str]:
        """Comparisons in [[forbid]] that hold for neither end of a range, and so for no trial."""
        for name, wanted in [item for condition, _ in self.forbidden for item in condition.items()]:
            compares = isinstance(wanted, str) and _COMPARISON.fullmatch(wanted)
            if compares and not any(meets({name: value}, {name: wanted}) for value in self.values(name)):
                yield f"[[forbid]] in {self.name} does nothing, since {name} is never {wanted!r}; correct it"

    def _wrong_kinds(self) -> Iterator[str]:
        """What is wrong with the values that the search itself reckons with, and with those that nobody takes."""
        for name, (kind, smallest) in NEEDED.items():
            for wrong in filter(None, (_wrong_value(value, kind, smallest) for value in self.values(name))):
                yield f"{name} {wrong}; correct it"
        for name, value in [item for _, values in self.fixed for item in values.items()]:
            items = value if isinstance(value, list) else [value]
            if any(isinstance(one, dict) for one in items):
                yield f"[[{name}]] is no table of a search space{nearest(name, ('set', 'forbid'))}"
            elif not all(isinstance(one, (str, int, float)) for one in items):
                yield f"{name} must be a text, a number, true, false, or a list of these; correct it"

    def _faults(self) -> Iterator[str]:
        """What is wrong with drawn settings: each must have all that V2.1 has, searched or fixed."""
        rng = np.random.default_rng(0)
        for values in (self.draw(rng) for _ in range(500)):
            params = self.complete(values)
            if params.get("network_train_unet_only") and "text_encoder_lr" in params:
                yield "text_encoder_lr has no effect with network_train_unet_only; delete one of them"
            for name, other in OVERRULES.items():
                if params.get(name) and other in values:
                    yield f"{other} is searched, but has no effect with {name}; fix it, or delete one of them"
            for name in missing_params(params):
                yield f"no {name} in some trials; search it, or fix it: {name} = ... above the first table"
            found = [fixed for condition, fixed in self.fixed if meets(values, condition)]
            for name in {name for fixed in found for name in fixed} & values.keys():
                yield f"{name} is both searched and fixed in some trials; give one of them another `when`"
            for one, two in itertools.combinations(found[1:], 2):
                for name in [name for name in one.keys() & two.keys() if one[name] != two[name]]:
                    yield f"two [[set]] give {name} two values in some trials; give one of them another `when`"

    def values(self, name: str) -> list[Any]:
        """What a parameter may be: all choices, or the lowest and the highest value; fixed values, too."""
        searched = self.searched.get(name)
        found = list(getattr(searched, "choices", ())) or [searched.low, searched.high] if searched else []
        return [*found, *(values[name] for _, values in self.fixed if name in values)]

    @property
    def trained_parts(self) -> Params:
        """network_train_unet_only, if it holds for all trials: without it kohya refuses to cache text outputs."""
        return {name: value for name, value in self.fixed[0][1].items() if name == "network_train_unet_only"}

    def optimizers(self) -> list[Params]:
        """Those that trials may have, each once, with the options that belong to them."""
        names = ("optimizer_type", "optimizer_args", "learning_rate")
        rng, found = np.random.default_rng(0), {}
        for params in (self.complete(self.draw(rng)) for _ in range(500)):
            about = {name: params[name] for name in names if name in params}
            found.setdefault(str([about.get(name) for name in names[:2]]), about)
        return list(found.values())

    def draw(self, rng: np.random.Generator) -> Params:
        """Values for all parameters, drawn at random."""
        values: Params = {}
        for name, distribution in self.searched.items():
            if meets(values, self.when.get(name, {})):
                values[name] = _draw(distribution, rng)
        return values

    def complete(self, values: Mapping[str, Any]) -> Params:
        """The suggested values with those that are fixed, and the network_alpha that follows from them."""
        params = {**values}
        for condition, fixed in self.fixed:
            params |= fixed if meets(values, condition) else {}
        for name in [name for name in params if name.endswith("_args") and isinstance(params[name], str)]:
            params[name] = params[name].split()  # kohya wants a list, and Optuna has none
        if {"network_alpha_ratio", "network_dim"} <= params.keys():
            params["network_alpha_ratio"] = round(params["network_alpha_ratio"], 10)  # Optuna: 0.6000000000000001
            # kohya takes an alpha of 0 for dim.
            params["network_alpha"] = max(1, int(params["network_dim"] * params["network_alpha_ratio"]))
        return params


V2_1 = SearchSpace(
    name="V2.1",
    searched={**SEARCH_SPACE, "lr_scheduler_num_cycles": IntDistribution(2, 3)},  # one cycle would be plain cosine
    when={"lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts"}},
)


def suggest_hyperparameters(trial: optuna.trial.BaseTrial, space: SearchSpace = V2_1) -> Params:
    """All parameters of a trial, network_alpha included; lr_scheduler_num_cycles only with restarts."""
    values: Params = {}
    for name, distribution in space.searched.items():
        if meets(values, space.when.get(name, {})):
            values[name] = _suggest(trial, name, distribution)
    return space.complete(values)


def _suggest(trial: optuna.trial.BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def describe_params(params: Mapping[str, Any]) -> str:
    """The parameters as the screen shows them, one a line, alpha with its ratio."""
    shown = {**params, "network_alpha": f"{params['network_alpha']} (ratio: {params['network_alpha_ratio']:.3f})"}
    return "\n".join(["Parameters:", *(f"  {name}: {value}" for name, value in shown.items())])


def brief_params(params: Mapping[str, Any]) -> list[str]:
    """The parameters for one line, the most important first. The line of the training shows the epochs."""
    return [
        f"dim {params['network_dim']}",
        f"alpha {params['network_alpha']} (ratio {params['network_alpha_ratio']:.3f})",
        "lr " + "/".join(f"{params[name]:.2e}" for name in ("learning_rate", "text_encoder_lr") if name in params),
        params["optimizer_type"],
        params["lr_scheduler"],
        f"accumulation {params['gradient_accumulation_steps']}",
        f"warm-up {params['lr_warmup_steps']}",
    ]


def space_fingerprint(space: SearchSpace) -> Any:
    """What a study must not change in it; of V2.1 a digest."""
    of = optuna.distributions.distribution_to_json
    if space == V2_1:
        return digest(json.dumps({name: of(one) for name, one in V2_1.searched.items()}))[:16]
    names = ("when", "fixed", "forbidden", "safety_constraints", "alpha_bands")
    searched = {name: json.loads(of(one))["attributes"] for name, one in space.searched.items()}
    return {**searched, **{name: getattr(space, name) for name in names}}


# ======================================================================================================
# 5. Safety constraints (V2.1). Pure.
# ======================================================================================================


def check_safety_constraints(params: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a combination is safe to train, and if not, why: (is_valid, rejection_reason)."""
    # What a --search-space does not search breaks no constraint.
    lr = params.get("learning_rate", 0.0)
    dim = params.get("network_dim", 0)
    ratio = params.get("network_alpha_ratio", 0.0)
    optimizer = params.get("optimizer_type", "AdamW")
    epochs = params.get("max_train_epochs", math.inf)
    grad_accum = params.get("gradient_accumulation_steps", math.inf)
    warmup = params.get("lr_warmup_steps", math.inf)

    if lr > 0.00012 and optimizer == "AdamW8bit":
        return False, "High LR (>0.00012) + AdamW8bit = unstable"
    if abs(params.get("network_alpha", math.inf) - dim) < 1:
        return False, "Alpha ≈ Dim causes overfitting + instability"
    if dim >= 256 and epochs < 16:
        return False, "High dim (≥256) needs ≥16 epochs for convergence"
    if lr > 0.0001 and warmup < 100:
        return False, "High LR (>0.0001) needs ≥100 warmup steps"
    if grad_accum == 1 and lr > 0.00011:
        return False, "High LR needs gradient accumulation ≥2"
    if ratio >= 0.75:
        required = {
            "epochs >= 16": epochs >= 16,
            "grad_accum >= 2": grad_accum >= 2,
            "optimizer = AdamW": optimizer == "AdamW",
            "warmup >= 150": warmup >= 150,
        }
        if failed := [name for name, passed in required.items() if not passed]:
            return False, f"High alpha (≥0.75) requires: {', '.join(failed)}"
    if ratio >= 0.85 and lr > 0.0001:
        return False, "Very high alpha (≥0.85) + LR >0.0001 = explosion risk"
    return True, ""


def may_train(params: Mapping[str, Any], space: SearchSpace) -> tuple[bool, str]:
    """Whether a setting may be trained, and if not, why. The safety constraints judge what the space searches."""
    if missing := missing_params(params):
        return False, f"{space.name} gives no {', '.join(missing)} for it"
    names = [name for name in space.searched if meets(params, space.when.get(name, {}))]
    names += ["network_alpha", "network_dim"] if "network_alpha_ratio" in names else []
    searched = {name: params[name] for name in names if name in params}
    optimizer = searched.get("optimizer_type", "AdamW")  # kohya takes these names in either case
    searched["optimizer_type"] = {"adamw": "AdamW", "adamw8bit": "AdamW8bit"}.get(optimizer.lower(), optimizer)
    verdicts = [check_safety_constraints(searched)] if space.safety_constraints else []
    verdicts += [(False, reason) for condition, reason in space.forbidden if meets(params, condition)]
    return next((verdict for verdict in verdicts if not verdict[0]), (True, ""))


# ======================================================================================================
# 6. Sampler: Optuna's TPE that proposes only what passes section 5, and keeps the guide's alpha bands.
# ======================================================================================================

RATIOS = tuple(round(0.05 * n, 2) for n in range(5, 19))  # low from 0.25, middle from 0.45, high from 0.75 to 0.90
BAND_BLOCK = (RATIOS[:4],) * 3 + (RATIOS[4:10],) * 4 + (RATIOS[10:],) * 3  # the guide's 30 / 40 / 30 %
DEALT_TRIALS = 20  # then TPE has seen all bands, and chooses them
TPE_TRIES = 64  # about 5 ms each
RANDOM_TRIES = 2000  # about 20 microseconds each; the rarest completion seen is 1 in 40
Check = Callable[[Params], bool]


def fixed_params(trial: FrozenTrial) -> Params:
    """The enqueued values of a trial. suggest_* returns them, whatever the sampler proposes."""
    return trial.system_attrs.get("fixed_params", {})


@dataclass(eq=False)
class FeasibleTPESampler(optuna.samplers.BaseSampler):
    """TPE over all parameters without a condition, drawn again until the proposal may be trained.

    Every draw depends on (seed, trial.number) alone, so neither a resumed study nor parallel workers repeat one. The
    first 20 trials that were not enqueued get their alpha bands from shuffled blocks of 3 low, 4 middle and 3 high
    ones; TPE proposes the rest. Parameters with a condition are drawn one by one: a joint space with them would hide
    from TPE all trials without them. Enqueued values are kept and completed. If no proposal passes all checks, the
    first safe one is taken, else the first one that this machine can train, which `train_lora` rejects.
    """

    seed: int
    space: SearchSpace = V2_1
    can_train: Check = lambda _: True  # what this machine can train (AdamW8bit needs CUDA and bitsandbytes)
    prefers: Check = lambda _: True  # what it should train, if it has the choice (a warm-up shorter than the run)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.space.searched)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Params:
        rng = np.random.default_rng((self.seed, trial.number))
        given = {**fixed_params(trial), **trial.params}  # an interrupted trial has some or all values
        fixed = given if fixed_params(trial) else {**self._dealt_ratio(study, trial, rng), **given}
        for name in [name for name in self.space.when if name in fixed]:  # what it depends on
            wanted = self.space.when[name].items()
            fixed = {**{other: value for other, value in wanted if holds(search_space[other], value)}, **fixed}
        names = [name for name in search_space if name not in fixed]
        joint = {name: search_space[name] for name in names if name not in self.space.when}
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        # To train one of these again would tell nothing.
        known = [self.space.complete(other.params) for other in others if other.state != TrialState.FAIL]
        tpe = self._tpe(trial.number, multivariate=True)
        proposals: list[Params] = []
        ruled = {*NEEDED, *(name for condition, _ in self.space.forbidden for name in condition)}
        alone = functools.cache(lambda name: self.sample_independent(study, trial, name, search_space[name]))
        for attempt in range(TPE_TRIES + RANDOM_TRIES):
            learnt = tpe.sample_relative(study, trial, joint) if attempt < TPE_TRIES else {}  # {}: too few trials
            values = {**fixed, **(learnt or {name: _draw(one, rng) for name, one in joint.items()})}
            for name in names:
                if name not in joint and meets(values, self.space.when[name]):
                    is_redrawn = attempt >= TPE_TRIES and name in ruled  # one draw may break a rule with all others
                    values[name] = _draw(search_space[name], rng) if is_redrawn else alone(name)
            proposals.append(values)
            params = self.space.complete(values)
            if self._is_possible(values) and self.prefers(params) and params not in known:
                return values
        safe = filter(self._is_possible, proposals)
        trainable = (values for values in proposals if self.can_train(self.space.complete(values)))
        return next(itertools.chain(safe, trainable, proposals[-1:]))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """For parameters with a condition, each with random numbers of its own."""
        place = [place for place, name in enumerate(self.space.when) if name == param_name and place > 0]
        sampler = self._tpe(trial.number, *place, multivariate=False)  # the first one, V2.1's only one, has no place
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _is_possible(self, values: Params) -> bool:
        params = self.space.complete(values)
        return may_train(params, self.space)[0] and self.can_train(params)

    def _dealt_ratio(self, study: optuna.Study, trial: FrozenTrial, rng: np.random.Generator) -> Params:
        """A ratio from the band whose turn it is. Enqueued trials take no turn."""
        turn = sum(t.number < trial.number and not fixed_params(t) for t in study.get_trials(deepcopy=False))
        if turn >= DEALT_TRIALS or not self.space.alpha_bands:
            return {}
        block, position = divmod(turn, len(BAND_BLOCK))
        order = np.random.default_rng((self.seed, block)).permutation(len(BAND_BLOCK))
        return {"network_alpha_ratio": float(rng.choice(BAND_BLOCK[order[position]]))}

    def _tpe(self, *numbers: int, multivariate: bool) -> optuna.samplers.TPESampler:
        """A TPE whose random numbers depend on the study's seed and these numbers alone, the first a trial's."""
        seed = int(np.random.SeedSequence((self.seed, *numbers)).generate_state(1)[0])
        with warnings.catch_warnings():  # 4.6 calls both arguments experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(multivariate=multivariate, constant_liar=True, seed=seed)


# ======================================================================================================
# 7. Training: the one place that starts a process, a trial's kohya config, its checkpoints, its progress and end;
#    cached latents; the probe of sd-scripts. Touches the trial's folder.
# ======================================================================================================

TERMINATION_SECONDS = 5.0  # between SIGTERM and SIGKILL
PROCESS_FILE = ".process.json"  # suffix of training. and scoring.process.json, while the process lives
STARTING_ALLOWANCE = 4  # times --stall-minutes while the model loads and latents are cached
KILLED = "was killed (SIGKILL), usually by the kernel because memory ran out"
SLOW_STEP = 3.0  # times the usual seconds of a step; slower is warned of
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def when_started(pid: int) -> str | None:
    """The boot and the clock tick at which a process started; None if it does not live, or there is no /proc."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot} {after_name[19]}" if after_name[0] != "Z" else None  # fields 22 and 3 of proc(5)
    return None


def die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # 1: PR_SET_PDEATHSIG of linux/prctl.h


class ChildProcess(subprocess.Popen[bytes]):
    """A program in a session of its own. It dies with this one, even by kill -9, so that it never keeps the card."""

    stdout: IO[bytes]

    def __init__(self, command: Sequence[str], device: str, **variables: str) -> None:
        environment = {**self.environment(device), **variables}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        super().__init__(command, env=environment, start_new_session=True, preexec_fn=die_with_parent, **streams)

    def run(self, on_text: Callable[[str], Any], watch: Callable[[], Any], log: Path | None = None) -> int:
        """Wait for the end and return the status. `on_text` gets the output, and `log` the same bytes.

        `watch` is called about every second. Whatever ends this call ends the session, which a PROCESS_FILE names.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with contextlib.ExitStack() as stack:
            if log:
                stack.callback(log.with_suffix(PROCESS_FILE).unlink, missing_ok=True)
            stack.callback(self._end)
            if log:
                about = {"pid": self.pid, "started": when_started(self.pid), "folder": str(log.parent)}
                write_json(log.with_suffix(PROCESS_FILE), about)
            file = stack.enter_context((log or Path(os.devnull)).open("ab"))
            while data := self._read(watch):
                file.write(data)
                file.flush()
                on_text(decoder.decode(data))
            return self.wait()

    def _read(self, watch: Callable[[], Any]) -> bytes:
        """The next piece of output; b"" once the process has ended, even if a child of its own holds the pipe open."""
        while True:
            ended = self.poll() is not None
            watch()
            screen.refresh()
            if select.select([self.stdout], [], [], 1.0)[0]:
                if data := os.read(self.stdout.fileno(), 1 << 16):
                    return data
                with contextlib.suppress(subprocess.TimeoutExpired):  # it may close its output and run on
                    self.wait(1.0)
            if ended:
                return b""

    def _end(self) -> None:
        """SIGTERM, then SIGKILL to whatever is left of its session."""
        try:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if self.poll() is None:
                    os.killpg(self.pid, signal.SIGTERM)
                    self.wait(TERMINATION_SECONDS)
        finally:  # a second Ctrl-C, too, gets here at once
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()
            self.stdout.close()

    @staticmethod
    def end_left_over(file: Path) -> None:
        """Kill the process that a dead program's PROCESS_FILE names. Its number may be another process's by now.

        The file may be in another program's folder, which the user has linked here or copied; then nothing is done.
        """
        known = read_json(file) or {}
        started, made_in = known.get("started"), Path(known.get("folder", file.parent))
        if made_in != file.parent and made_in.is_dir():
            return
        if started and when_started(known["pid"]) == started:
            say(f"Process {known['pid']} in {file.parent} has outlived the program that started it and is killed.")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(known["pid"], signal.SIGKILL)
            deadline = time.monotonic() + TERMINATION_SECONDS
            while when_started(known["pid"]) == started and time.monotonic() < deadline:
                time.sleep(0.05)
        file.unlink(missing_ok=True)

    @staticmethod
    def environment(device: str) -> dict[str, str]:
        """The environment of a child: unbuffered UTF-8, no wrapped lines, and only the card that was asked for."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "COLUMNS": "250"}
        environment["PYTHONIOENCODING"] = "utf-8:replace"  # else the shell's would override PYTHONUTF8
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif ":" in device:
            index = int(device.partition(":")[2])
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            cards = [*map(str, range(index + 1))] if visible is None else visible.split(",")
            environment["CUDA_VISIBLE_DEVICES"] = cards[index] if index < len(cards) else ""
        return environment


def trial_config(
    params: Mapping[str, Any], options: Mapping[str, Any], base_model: Path, dataset_config: Path, folder: Path
) -> dict[str, Any]:
    """The complete config of one training, for kohya's --config_file."""
    return {
        "pretrained_model_name_or_path": str(base_model.resolve()),
        "dataset_config": str(dataset_config),
        "output_dir": str(folder),
        "output_name": LORA_NAME,
        "logging_dir": str(folder / "logs"),
        **options,
        **{name: value for name, value in params.items() if name != "network_alpha_ratio"},
    }


def checkpoint_files(folder: Path) -> list[Path]:
    """The files in which kohya saves a trial's epochs, in order. Other files there belong to the user."""
    return [*sorted(folder.glob(f"{LORA_NAME}-{'[0-9]' * 6}.safetensors")), folder / f"{LORA_NAME}.safetensors"]


def saved_checkpoints(folder: Path, epochs: int) -> dict[int, Path]:
    """The checkpoints that are there, by epoch, in order. The last one's name has no number; its epoch is `epochs`."""
    saved = filter(Path.is_file, checkpoint_files(folder))
    return {epochs if file.stem == LORA_NAME else int(file.stem[-6:]): file for file in saved}


def is_saved(path: Path) -> bool:
    """Whether a checkpoint is there, and whole; Diverged if its weights are not finite."""
    try:
        check_lora(path)
    except Diverged:
        raise
    except TrialFailed:  # not there yet, or not yet whole
        return False
    return True


_BEGINS_AT_ZERO = re.compile(r"\.(lora_up\.weight|hada_w2_a|lokr_w2(_b)?)$")
_DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}  # of safetensors' names


def check_lora(path: Path, *, may_be_zero: bool = False) -> None:
    """Diverged for weights that are not finite; TrialFailed for a torn file, or a last one that learnt nothing."""
    try:
        header = {key: entry for key, entry in read_safetensors_header(path).items() if key != "__metadata__"}
        data = np.memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise TrialFailed(f"{path.name} can't be read: {error}") from error
    start = len(data) - max((entry["data_offsets"][1] for entry in header.values()), default=0)
    learnt = False
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[begin:end].tobytes(), _DTYPES.get(entry["dtype"], np.uint8))
        if entry["dtype"] == "BF16":  # the upper half of a float32, which NumPy does not know
            values = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
        if not np.isfinite(values).all():
            raise Diverged(f"weights that are not finite in {path.name} ({name})")
        learnt = learnt or bool(_BEGINS_AT_ZERO.search(name) and values.any())
    if path.stem == LORA_NAME and not learnt and not may_be_zero:  # an earlier one may be: a warm-up begins with 0
        raise TrialFailed(f"no weight of {path.name} has moved from zero")


def has_finished_training(folder: Path) -> bool:
    """Whether a training whose end this program did not see has ended well."""
    with contextlib.suppress(OSError, TrialFailed):
        if "model saved." in (folder / "training.log").read_text(encoding="utf-8", errors="replace"):
            for path in checkpoint_files(folder):
                check_lora(path)
            return True
    return False


_BAR = re.compile(  # tqdm's, with kohya's loss
    r"\s*(?:(?P<name>[^|]*): +)?\d+%\|[^|]*\| *(?P<step>\d+)/(?P<steps>\d+) \[[\d:]+<(?P<eta>[\d:?]+)"
    r"(?:.*avr_loss=(?P<loss>nan|[-+]?inf|[-+]?[\d.]+(?:e[-+]?\d+)?))?"
)
_OUT_OF_MEMORY = (
    re.compile(  # the last two: no engine of cuDNN had room; a cuDNN that does not fit PyTorch says the same
        r"OutOfMemoryError|out of memory|CU(BLAS|DNN)_STATUS_\w*ALLOC\w*_FAILED"
        r"|unable to find an engine|valid cuDNN algorithm",
        re.IGNORECASE,
    )
)
_ERROR_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*)|\bERROR +.+")


class ProcessOutput:
    """Reads what a trainer or scorer prints: lines, and the tqdm bar that counts its steps."""

    bar_name = ""  # of that bar

    def __init__(self) -> None:
        self.step = self.steps = 0
        self.eta = ""
        self.lines: deque[str] = deque(maxlen=200)  # the last lines, without bars
        self.last_sign = time.monotonic()  # of progress: a step, or any output before the first and after the last
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._unfinished = ""

    def read(self, text: str) -> None:
        """Take the next piece of output, cut anywhere. A bar begins with CR; a line ends with LF."""
        if self.step in (0, self.steps):
            self.last_sign = time.monotonic()
        *pieces, self._unfinished = re.split(r"[\r\n]", self._unfinished + text)
        for piece in pieces:
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece)  # without colours
            if not self._is_bar(line) and line.strip():
                self.lines.append(line)
                self.read_line(line)
        if self._unfinished.endswith("]") and self._is_bar(self._unfinished):
            self._unfinished = ""  # show a whole bar before the CR of the next one

    def _is_bar(self, line: str) -> bool:
        bar = _BAR.match(line)
        if bar and bar["name"] == self.bar_name:
            self.read_bar(bar)
        return bool(bar)

    def read_bar(self, bar: re.Match[str]) -> None:
        step, now = int(bar["step"]), time.monotonic()
        if step > self.step:
            if self.step:
                self._step_seconds.append((now - self.last_sign) / (step - self.step))
            self.last_sign = now
        self.step, self.steps, self.eta = step, int(bar["steps"]), bar["eta"]

    def read_line(self, line: str) -> None:
        """For subclasses: take what they need from a line."""

    def seconds_per_step(self) -> float | None:
        """The median of the last steps; None before there are five."""
        return float(np.median(self._step_seconds)) if len(self._step_seconds) >= 5 else None

    def error(self) -> str:
        """The last line that names an error, else the last line."""
        lines = [line.strip().removeprefix("stopped: ") for line in self.lines] or ["it printed nothing"]
        errors = [error[0] for line in lines if (error := _ERROR_LINE.search(line))]
        return one_line((errors or lines)[-1])

    def refuse_full_disk(self) -> None:
        """OSError if the output says that the disk is full: then no trial can go on."""
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if any(os.strerror(number) in line for line in self.lines):
                raise OSError(number, os.strerror(number))


class TrainingProgress(ProcessOutput):
    """Reads kohya's output, prints a line for each epoch, and judges the training."""

    bar_name = "steps"

    def __init__(self) -> None:
        super().__init__()
        self.epoch = self.epochs = 0
        self.loss = self.device = ""
        self.first_nan_step: int | None = None
        self.saved = self.was_paused = False
        self._finite: set[Path] = set()  # checkpoints that were found to be finite
        self._said_slow = False
        screen.show("train", "starting: the model is loaded, latents are cached")

    def finish(self) -> None:
        self.read("\n")
        self._end_epoch()

    def read_bar(self, bar: re.Match[str]) -> None:
        super().read_bar(bar)
        self.loss = bar["loss"] or self.loss
        if bar["loss"] == "nan" and self.first_nan_step is None:
            self.first_nan_step = self.step
        if self.epoch:
            each = self.seconds_per_step()
            if each and self.was_paused:  # which the bar's own ETA counts in
                self.eta = tqdm.format_interval((self.steps - self.step) * each)
            speed = "- it/s" if not each else f"{1 / each:.3g} it/s" if each < 1 else f"{each:.3g} s/it"
            screen.show("train", self.describe(speed), self.step, self.steps)

    def read_line(self, line: str) -> None:
        if epoch := re.fullmatch(r"epoch (\d+)/(\d+)\s*", line):
            self._end_epoch()
            self.epoch, self.epochs = int(epoch[1]), int(epoch[2])
        elif device := re.match(r"accelerator device: (\S+)", line):
            self.device = device[1]
        self.saved = self.saved or "model saved." in line

    def describe(self, speed: str) -> str:
        at = f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}"
        return f"{at}  {speed}  loss {self.loss or '-'}  ETA {self.eta or '?'}"

    def _end_epoch(self) -> None:
        if self.epoch:
            say(f"  {self.describe(f'{100 * self.step // max(1, self.steps):3d}%')}", detail=True)

    def check(self, folder: Path, device: str, stall_minutes: float, usual_step: float | None) -> None:
        """Judge a running training; an error ends the trainer. `usual_step`: the usual seconds of a step, if known."""
        if device != "cpu" and self.device.startswith("cpu"):  # kohya does so without a warning
            raise TrialFailed(f"the trainer used the CPU instead of {device}; its PyTorch does not see the card")
        minutes = stall_minutes * (1 if self.step else STARTING_ALLOWANCE)
        if time.monotonic() - self.last_sign > 60 * minutes:
            what = f"made no step after step {self.step}" if self.step else "printed nothing while it loaded"
            raise Hung(f"the trainer {what} for {minutes:g} minutes and was stopped (--stall-minutes)")
        if self.first_nan_step is not None:
            self._check_weights(folder)
        now = self.seconds_per_step()
        if usual_step and now and now > SLOW_STEP * usual_step and not self._said_slow:
            self._said_slow = True
            why = "does another program use the card, or its driver spill into system memory (Windows)?"
            say(f"  warning: a step takes {now:.3g} s, in this study usually {usual_step:.3g} s; {why}")

    def _check_weights(self, folder: Path) -> None:
        """Diverged if a checkpoint is not finite. A loss of NaN is no proof: fp16 may skip the bad step."""
        for path in set(checkpoint_files(folder)) - self._finite:
            try:
                if is_saved(path):
                    self._finite.add(path)
            except Diverged as error:
                since = f"loss was nan from step {self.first_nan_step}; stopped at step {self.step} of {self.steps}"
                raise Diverged(f"{error}; {since}") from error

    def judge_end(self, folder: Path, status: int) -> None:
        """Raise why the training failed. kohya ends with status 0 when it finds no image, too."""
        if status != 0:
            self.refuse_full_disk()
            if status == -signal.SIGKILL:
                raise OutOfMemory(f"the trainer {KILLED}")
            if any(_OUT_OF_MEMORY.search(line) for line in self.lines):
                raise OutOfMemory(self.error())
            raise TrialFailed(f"the trainer ended with status {status}: {self.error()}")
        if not (self.saved and (folder / f"{LORA_NAME}.safetensors").is_file()):
            raise TrialFailed(f"the trainer ended with status 0 but saved no LoRA: {self.error()}")
        for path in checkpoint_files(folder):
            check_lora(path, may_be_zero=folder.name == FIRST_STEP)  # fp16 may skip its only step


@dataclass(frozen=True)
class Pause:
    """A moment of a training, and what is done while the trainer waits. An error of it ends the training."""

    checkpoint: Path  # when this one is saved
    work: Callable[[float], None]  # gets the seconds that were trained so far


@dataclass(frozen=True)
class KohyaTrainer:
    """Runs a training script of sd-scripts."""

    python: str
    script: Path
    device: str
    stall_minutes: float = 30.0

    def __call__(
        self, config: Path, usual_step: float | None = None, pause: Pause | None = None
    ) -> tuple[float, float | None]:
        """Run the training of a config.toml; TrialFailed says why it failed. `usual_step` is TrainingProgress.check's.

        Returns the seconds of the training, without its pause, and of a step (None for very few steps).
        """
        started, folder, progress = time.monotonic(), config.parent, TrainingProgress()
        child = ChildProcess([self.python, str(self.script), "--config_file", str(config)], self.device)

        def watch() -> None:
            nonlocal started, pause
            progress.check(folder, self.device, self.stall_minutes, usual_step)
            if pause and child.poll() is None and is_saved(pause.checkpoint):
                work, pause, paused = pause.work, None, time.monotonic()
                child.send_signal(signal.SIGSTOP)  # but not to its children, which nobody would end after a kill -9
                try:
                    work(paused - started)
                finally:
                    child.send_signal(signal.SIGCONT)
                progress.was_paused, progress.last_sign = True, time.monotonic()  # it made no step, and did not hang
                started += progress.last_sign - paused

        try:
            status = child.run(progress.read, watch, folder / "training.log")
        finally:
            progress.finish()
        progress.judge_end(folder, status)
        return time.monotonic() - started, progress.seconds_per_step()


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Lock folders, and wait until they are free: two trainers may tear a cache of latents that both write."""
    with contextlib.ExitStack() as stack:
        for folder in sorted(set(folders)):  # always in this order, against deadlocks
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            with contextlib.suppress(OSError):  # a network share may have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Latents:
    """The latents that kohya caches beside the pictures."""

    images: Sequence[TrainingImage]
    trusted: Mapping[str, bool]  # the probe's: does kohya take "plain" arrays of any size, and "sized" ones (v0.10.2)?
    scale: int  # pixels of a latent

    @staticmethod
    def sizes(file: Path) -> dict[str, tuple[int, ...]] | None:
        """Width and height of a file's arrays (`latents`, or `latents_HEIGHTxWIDTH`); None if NumPy can't read it."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name].shape[:-3:-1] for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def state(self, image: TrainingImage) -> str:
        """good, missing (kohya makes it), torn, foreign (another program's), or wrong (kohya would train that size)."""
        assert image.latents and image.bucket
        if not image.latents.exists():
            return "missing"
        found = self.sizes(image.latents)
        if not found:
            is_kohyas = image.latents.name.endswith(tuple(family.latents for family in FAMILIES.values()))
            return "torn" if is_kohyas else "foreign"
        wanted = (image.bucket[0] // self.scale, image.bucket[1] // self.scale)
        sized = f"_{wanted[1]}x{wanted[0]}" if self.trusted["sized"] else ""
        if not all(name in found or name + sized in found for name in image.arrays):
            return "missing"
        if (sized and "latents" + sized in found) or found["latents"] == wanted:
            return "good"
        return "wrong" if self.trusted["plain"] else "missing"

    def check(self) -> None:
        """RefusedInput if kohya would stop, or train the wrong latents without a warning."""
        counts = Counter(path for path, _ in {(image.path, image.bucket) for image in self.images})
        for image in self.images:
            state, folder, why = self.state(image), image.path.parent, ""
            if state == "foreign":
                why = f"{image.latents} is no cache of latents, but kohya would take it for one; move it away"
            elif state == "wrong":
                cached = [side * self.scale for side in (self.sizes(image.latents) or {})["latents"]]
                size = "{} x {} instead of {} x {}".format(*cached, *image.bucket)
                why = f"{image.latents} holds {size}, which kohya would train; delete all such files"
            elif state != "good" and not os.access(folder, os.W_OK):
                why = f"{folder} can't be written, but kohya would cache latents there; make it writable"
            elif (count := counts[image.path]) > 1 and not self.trusted["sized"]:
                why = f"{image.path} is trained at {count} sizes, and this sd-scripts caches one; take v0.10.2"
            if why:
                remedy = "or set cache_latents_to_disk = false in the training config"
                raise RefusedInput(f"--dataset-config: {why}, {remedy}")

    def prepare(self) -> bool:
        """Delete torn caches, which a killed trainer leaves, and return whether all are there. Needs the lock."""
        states = [(image.latents, self.state(image)) for image in self.images]
        torn = {file for file, state in states if file and state == "torn"}
        for file in torn:
            file.unlink(missing_ok=True)
        if torn:
            say(f"Deleted {len(torn)} torn caches of latents ({min(torn)}); kohya makes them again.")
        return all(state == "good" for _, state in states)


def capture(command: Sequence[str], device: str, seconds: float = 60.0) -> tuple[int, str]:
    """Status and output of a short program; RefusedInput if it does not start, or takes longer than `seconds`."""
    output: list[str] = []
    deadline = time.monotonic() + seconds

    def watch() -> None:
        if time.monotonic() > deadline:
            why = f"`{shlex.join(command)}` took more than {seconds:g} s and was ended"
            raise RefusedInput(f"{why}; run it by hand to see why, or try again if the disk is slow")

    try:
        status = ChildProcess(command, device).run(output.append, watch)
    except OSError as error:
        why = f"can't run {command[0]} ({error.strerror})"
        raise RefusedInput(f"--trainer-python: {why}; give kohya's python") from error
    return status, "".join(output)


TRIED_VERSIONS = "v0.9.1, v0.10.1 and the latents of v0.10.2"
PROBE = HERE / "configs" / "kohya_probe.py"
PROBE_SECONDS = 900.0  # imports PyTorch, reads every picture's size
NEEDS_CARD = "needs bitsandbytes and a CUDA card"  # said of an 8-bit optimizer
FIRST_STEP_PARAMS: Params = {  # a small LoRA
    "network_dim": 4,
    "network_alpha": 1,
    "learning_rate": 1e-5,
    "optimizer_type": "AdamW",
    "lr_scheduler": "constant",
    "max_train_steps": 1,
}


@dataclass(frozen=True)
class TrainerFacts:
    """What is known of sd-scripts and its Python."""

    version: str
    device_name: str  # "cpu", or the card's
    answer: dict[str, Any]  # of the probe, as configs/kohya_probe.py describes it

    def can_train(self, params: Mapping[str, Any]) -> bool:
        """AdamW8bit needs bitsandbytes and a CUDA card; without them it is never proposed."""
        has_8bit = self.answer["bitsandbytes"] and self.device_name != "cpu"
        return has_8bit or "8bit" not in str(params.get("optimizer_type")).lower()

    def cards_of(self, device: str) -> str:
        """--device, with every card's name in place of cuda:all."""
        names = [f"cuda:{number}" for number in range(self.answer.get("cards", 0))]
        return ",".join(names or ["cuda"]) if device == ALL_CARDS else device

    def check_card(self, settings: Settings) -> None:
        if not self.device_name:
            why = f"PyTorch {self.answer['torch']} of {settings.trainer_python} sees no {settings.device}"
            raise RefusedInput(f"--device: {why}; kohya would train on the CPU; correct it, or give --device cpu")
        if len(settings.devices) > 1 and self.device_name != "cpu" and DEVICE.fullmatch(settings.device):
            cards = self.answer["cards"]
            if unseen := [name for name in settings.devices if int(name.partition(":")[2]) >= cards]:
                said = f"the last card that PyTorch sees is cuda:{cards - 1}, so there is no {', '.join(unseen)}"
                raise RefusedInput(f"--device: {said}; correct it")


@dataclass(frozen=True)
class Probe:
    """Asks sd-scripts, in the trainer's Python, what it would train."""

    script: Path  # the trainer, in the folder of sd-scripts
    python: str
    device: str
    options: Mapping[str, Any]
    base_model: Path
    data_set: Mapping[str, Any]  # its file's content
    optimizers: Sequence[Params] = ()  # that kohya must be able to make

    def ask(self, cache: Path | None = None) -> TrainerFacts:
        """The answer, from `cache` if nothing has changed since; RefusedInput for a trainer that does not work."""
        folder, name = self.script.parent, self.script.name
        if not self.script.is_file():
            raise RefusedInput(f"--sd-scripts: {folder} has no {name}; give the folder of sd-scripts")
        version = self._version(folder)
        about = [version, quick_digest(PROBE), name, self.python, socket.gethostname()]
        about += [self.device, os.environ.get("CUDA_VISIBLE_DEVICES"), sorted(map(str, Path("/dev").glob("nvidia?")))]
        about += [dict(self.options), str(self.base_model), self.data_set, self._data_set_files(), self.optimizers]
        key = digest(json.dumps(about, default=str))
        answer = (read_json(cache) if cache else None) or {}
        place, changed = answer.get("packages", ("", 0))  # where something may have been installed or removed since
        if answer.get("key") != key or not Path(place).is_dir() or Path(place).stat().st_mtime_ns != changed:
            answer = {**self._run(), "key": key}
        if missing := ", ".join(answer["missing"]):
            why = f"{self.python} has no {missing}"
            remedy = "install it there, or give the Python of kohya, or leave out the option that needs it"
            raise RefusedInput(f"--trainer-python: {why}; {remedy}")
        if "dataset_config" not in answer.get("options", {}):
            why = f"{self.script} does not answer as kohya's trainer does ({why_stopped(answer)})"
            raise RefusedInput(f"--sd-scripts: {why}; check --sd-scripts and --trainer-python")
        return TrainerFacts(version, answer["card"] if self.device != "cpu" else "cpu", answer)

    def _version(self, folder: Path) -> str:
        """Git's description, and a digest of the trainer's files, which a user may have changed."""
        # Other scripts build on train_network.py.
        files = dict.fromkeys([self.script, folder / "train_network.py", *sorted(folder.glob("library/*.py"))])
        content = "files " + digest(b"".join(file.read_bytes() for file in files if file.is_file()))[:8]
        if (folder / ".git").exists() and shutil.which("git"):
            with contextlib.suppress(RefusedInput):  # training needs no git
                status, output = capture(["git", "-C", str(folder), "describe", "--tags", "--always"], "cpu")
                return f"{output.strip()} ({content})" if status == 0 else content
        return content

    def _data_set_files(self) -> list[Any]:
        """Name, size and time of each file of the data set, but of no cached latents."""
        subsets = [subset for dataset in self.data_set["datasets"] for subset in dataset["subsets"]]
        places = sorted({str(subset.get(key, "")) for subset in subsets for key in _FOLDERS})
        about = []
        for place in map(Path, filter(os.path.exists, places)):  # Path.exists raises on odd names
            with contextlib.suppress(PermissionError):
                for file in sorted(place.iterdir()) if place.is_dir() else [place]:
                    if file.exists() and not (file.is_file() or file.is_dir()):  # reading a pipe would block
                        raise RefusedInput(f"--dataset-config: can't use {file}, which is no file; remove it")
                    if file.suffix != ".npz" and file.exists():
                        about.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
        return about

    def _run(self) -> dict[str, Any]:
        """Run configs/kohya_probe.py, whose files are deleted afterwards."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            files = ("dataset.json", "config.toml", "answer.json", "optimizers.json")
            data_set, config, answer_file, optimizers = (folder / name for name in files)
            # As JSON, because the toml package garbles odd keys before kohya can refuse them.
            data_set.write_text(json.dumps(self.data_set, default=str), encoding="utf-8")
            optimizers.write_text(json.dumps(self.optimizers), encoding="utf-8")
            write_toml(config, trial_config(FIRST_STEP_PARAMS, self.options, self.base_model, data_set, folder / "out"))
            command = [self.python, *map(str, (PROBE, self.script, config, answer_file, optimizers))]
            status, said = capture(command, self.device, PROBE_SECONDS)
            answer = read_json(answer_file)
        if status == -signal.SIGKILL:
            raise RefusedInput(f"--trainer-python: {self.python} {KILLED}; close other programs and try again")
        if answer is None or "missing" not in answer:
            output = ProcessOutput()
            output.read(said + "\n")
            why = f"{self.python} is no working Python ({output.error()})"
            raise RefusedInput(f"--trainer-python: {why}; give kohya's python")
        return answer


# ======================================================================================================
# 8. Scoring: which images to make (pure), and the child process that makes and judges them. Touches torch,
#    diffusers and transformers, a trial's scores/ and metrics.json, reference/ and artifacts/.
# ======================================================================================================

# --- the plan: prompts and seeds, made by the search, the same for all trials of a study ---

SCORE_DEFINITION = ("definition of the score", 4)  # one more whenever a term or the plan changes its meaning
# First seeds of the stages, further from each other than a stage has pictures. Rounds have the same prompts.
FINAL_ROUNDS = {"final-1": 3_000_001, "final-2": 4_000_001, "final-3": 5_000_001}
FIRST_SEEDS = {"screen": 1_000_001, "confirm": 2_000_001, **FINAL_ROUNDS}  # under their names in all files
# Tags of quality, number, view and looks: none of them is a name. Without the last, none says how anybody looks.
_COMMON_TEXT = (HERE / "configs" / "common_tags.txt").read_text(encoding="utf-8")
COMMON_TAGS, NO_LOOKS = (
    re.compile("|".join(fnmatch.translate(line) for line in text.splitlines() if line and line[0] != "#"))
    for text in (_COMMON_TEXT, _COMMON_TEXT.partition("# Looks")[0])
)
_COUNT_TAG = re.compile(r"(\d\+?|multiple[ _])(girl|boy|other)s?|solo|no[ _]humans|score_\d.*", re.IGNORECASE)
NEARLY_ALL = 0.75  # a tag in this share of the captions may be the name that somebody forgot in the others
# Letters of scripts that put spaces between words; Thai, Lao, Burmese, Khmer, Chinese, Japanese and Korean do not.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
# Options in either case, as kohya reads them. 0 pixels, 0 steps and seeds too large for torch do not match.
_PROMPT_OPTION = re.compile(
    r"n +(?P<negative>.+)|w +(?P<width>0*[1-9]\d{0,3})|h +(?P<height>0*[1-9]\d{0,3})|s +(?P<steps>0*[1-9]\d{0,3})"
    r"|d +(?P<seed>\d{1,18})|l +(?P<cfg>\d+\.?\d*)",
    re.IGNORECASE,
)
Prompt = dict[str, Any]  # "prompt" and "subject", and what a line of --eval-prompts sets besides


class Subject:
    """A subject's name, found as a word of its own in either case."""

    def __init__(self, name: str) -> None:
        before = rf"(?<!{_LETTER})" if re.match(_LETTER, name) else ""
        after = rf"(?!{_LETTER})" if re.match(_LETTER, name[-1:]) else ""
        self.name = name
        self._pattern = re.compile(f"{before}{re.escape(name)}{after}", re.IGNORECASE)

    def is_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def removed_from(self, prompt: str) -> str:
        """The prompt without the name, for CLIP, which has never learnt it."""
        tags = (" ".join(tag.split()) for tag in self._pattern.sub(" ", prompt).split(","))
        return ", ".join(tag for tag in tags if tag)


class Captions:
    """A data set's captions: which of their tags may be the subject's name."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        # Odd line ends (U+2028) separate tags as commas do.
        self.tags = [[tag.strip() for tag in re.split("[,，、\u2028\u2029\x85\v\f]", text)] for text in texts]
        self.counts = Counter(tag for tags in self.tags for tag in dict.fromkeys(tags) if tag)
        folded = [{tag.casefold() for tag in tags} for tags in self.tags]
        first = dict.fromkeys(self.tags[0]) if texts else ()
        shared = [tag for tag in first if tag and all(tag.casefold() in tags for tags in folded)]
        self.common = [tag for tag in shared if self.is_common(tag)]
        self.candidates = [tag for tag in shared if tag not in self.common]  # that all captions share

    @staticmethod
    def is_common(tag: str, known: re.Pattern[str] = COMMON_TAGS) -> bool:
        return known.match(re.sub(r"[()\\]|:[\d.]+", "", tag).replace("_", " ").lower()) is not None

    def are_tags(self) -> bool:
        """Whether these are tags, as models of drawings know them: most captions have one such as 1girl or solo."""
        count = sum(any(map(_COUNT_TAG.fullmatch, tags)) for tags in self.tags)
        return count > len(self.texts) / 2

    def look(self, subject: Subject) -> list[str]:
        """How the captions say that the subject looks: up to four tags that more than half of them have."""
        often = (tag for tag, count in self.counts.most_common() if count > len(self.texts) / 2)
        return [tag for tag in often if not (subject.is_in(tag) or self.is_common(tag, NO_LOOKS))][:4]

    def find_subject(self, class_tokens: str | None, given: str | None) -> str:
        """As given, else class_tokens, else the first name that all captions share; a name in no caption is refused."""
        # Taggers write one word, such as `1girl`. A phrase, such as `a boy`, was written on purpose.
        is_tag = class_tokens in self.common and " " not in class_tokens
        name = (given or ("" if is_tag else class_tokens) or "").strip()
        if name and any(map(Subject(name).is_in, self.texts)):
            return name
        if given:
            raise RefusedInput(f"--subject: {given!r} stands in no caption of the data set; give the name they use")
        if self.candidates or is_tag:
            return self.candidates[0] if self.candidates else class_tokens
        words = [set(re.findall(r"[^\W\d_]{2,}", text)) for text in self.texts] or [set()]
        in_all = sorted(word for word in set.intersection(*words) if not COMMON_TAGS.match(word.lower()))
        said = f"class_tokens {class_tokens!r} stand in no caption, and " if class_tokens else ""
        said += f"the captions share {'only ' + ', '.join(self.common) if self.common else 'no tag'}"
        said += f"; these words stand in all of them: {', '.join(in_all[:10])}" if in_all else ""
        raise RefusedInput(f"--subject: {said}; give the subject's name as the captions have it, --subject NAME")


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of the items, spread over all of them."""
    count = min(count, len(items))
    return [items[position * len(items) // count] for position in range(count)]


class PromptChooser:
    """Chooses prompts, of which no two stages share one, and seeds, of which none is the training's."""

    def __init__(self, subject: str, images: Sequence[tuple[Path, str]], settings: ScoringSettings) -> None:
        """`images`: pictures of the data set, each with a caption."""
        self.subject, self.settings = Subject(subject), settings
        self.images = dict.fromkeys(path for path, _ in images)
        self.captions = dict.fromkeys(text for _, text in images)
        self.counts = {"screen": settings.screen, "confirm": settings.confirm, "final": settings.final}

    def from_captions(self) -> dict[str, list[Prompt]]:
        """In each stage 1/4 are captions, 1/2 show the subject elsewhere, 1/4 in another style; then plain ones."""
        named = [c for c in self.captions if self.subject.is_in(c) and self.subject.removed_from(c)]
        look = ", ".join(["", *Captions(list(self.captions)).look(self.subject)])
        templates = self.settings.prompts
        elsewhere, style = self._filled(templates["elsewhere"], look), self._filled(templates["style"])
        chosen, missing = self._plain(), 0
        for number, (stage, counts) in enumerate(self.counts.items()):
            texts = _evenly(named[number :: len(self.counts)], counts["prompts"] // 4)
            texts += itertools.islice(style, counts["prompts"] // 4)
            texts += itertools.islice(elsewhere, counts["prompts"] - len(texts))  # and in place of missing captions
            texts += itertools.islice(style, counts["prompts"] - len(texts))
            missing += counts["prompts"] - len(texts)
            chosen[stage] = [{"prompt": text, "subject": True} for text in texts] + chosen[stage]
        if missing:
            said = f"the lists 'elsewhere' and 'style' in [prompts] are {missing} templates short"
            remedy = "add some, or lower prompts in [screen], [confirm] or [final]"
            raise RefusedInput(f"--scoring-config: {said}; {remedy}")
        return chosen

    def _filled(self, templates: Iterable[str], look: str = "") -> Iterator[str]:
        """Templates of the subject; every second one says its look, since a bare name favours an overtrained LoRA."""
        for number, text in enumerate(dict.fromkeys(templates)):
            yield text.replace("{subject}", self.subject.name) + look * (number % 2)

    def _plain(self) -> dict[str, list[Prompt]]:
        """For each stage prompts without the subject, at least two, because an anchor compares them with each other."""
        # A template may happen to name the subject: "a dog running", where it is a dog.
        texts = dict.fromkeys(self.settings.prompts["plain"])
        pool = ({"prompt": text, "subject": False} for text in texts if not self.subject.is_in(text))
        chosen = {stage: list(itertools.islice(pool, counts["plain_prompts"])) for stage, counts in self.counts.items()}
        if any(len(prompts) < 2 for prompts in chosen.values()):
            said = f"the list 'plain' in [prompts] is too short: a stage needs two without {self.subject.name!r}"
            raise RefusedInput(f"--scoring-config: {said}; add some")
        return chosen

    def from_file(self, path: Path) -> dict[str, list[Prompt]]:
        """The user's prompts, dealt to the three stages; those without the subject are plain ones."""
        lines = [{**line, "subject": self.subject.is_in(line["prompt"])} for line in read_eval_prompts(path)]
        about, plain = ([line for line in lines if line["subject"] is kind] for kind in (True, False))
        bare = [line["prompt"] for line in about if not self.subject.removed_from(line["prompt"])]
        said = [f"'{prompt}' in {path} is nothing but the subject's name; say what it shows" for prompt in bare]
        if len(about) < 6:  # two a stage: pictures are compared with the other prompts, too
            said.append(f"{path} has {len(about)} prompts with {self.subject.name!r}; write at least six")
        Problems(f"--eval-prompts: {problem}" for problem in said).refuse()
        # An anchor needs two plain ones a stage; with fewer, those of scoring.toml are used.
        others = {stage: plain[n::3] for n, stage in enumerate(self.counts)} if len(plain) >= 6 else self._plain()
        return {stage: about[number::3] + others[stage] for number, stage in enumerate(self.counts)}

    def image_jobs(self, prompts: dict[str, list[Prompt]], stage: str, training_seed: int) -> Iterator[dict[str, Any]]:
        """One job an image: every subject prompt with the stage's number of seeds, every plain prompt with one.

        Each prompt has seeds of its own, unless its `--d` says which. A few seeds for all prompts made a value half
        again as noisy (`tests/small_world/README.md`).
        """
        images, kind = self.settings.images, stage.partition("-")[0]
        for number, prompt in enumerate(prompts[kind]):
            most = self.counts[kind]["seeds"]
            # Screening begins at the prompt's own seed; a later stage is as far from it as the stages' first seeds are.
            first = prompt.get("seed", FIRST_SEEDS["screen"] + number * (most + 1))
            start = first + FIRST_SEEDS[stage] - FIRST_SEEDS["screen"]
            seeds = most if prompt["subject"] else 1
            unused = [seed for seed in range(start, start + seeds + 1) if seed != training_seed]
            for count, seed in enumerate(unused[:seeds]):
                yield {  # the order is part of a study's fingerprint
                    "name": f"p{number:02d}-s{count}",
                    "prompt": images["prompt_prefix"] + prompt["prompt"],
                    "text": self.subject.removed_from(prompt["prompt"]),
                    "negative": prompt.get("negative", images["negative_prompt"]),
                    "seed": seed,
                    "width": prompt.get("width", images["resolution"]),
                    "height": prompt.get("height", images["resolution"]),
                    "steps": prompt.get("steps", images["steps"]),
                    "cfg": prompt.get("cfg", images["guidance_scale"]),
                    "subject": prompt["subject"],
                    "caption": prompt["prompt"] in self.captions,  # a copy is what it asks for
                }

    def plan(self, base_model: str, options: Params, eval_prompts: Path | None, family: Family) -> dict[str, Any]:
        """All that the scoring process needs, as JSON: models, settings, and the image jobs of all stages."""
        settings = self.settings
        prompts = self.from_file(eval_prompts) if eval_prompts else self.from_captions()
        return {
            SCORE_DEFINITION[0]: SCORE_DEFINITION[1],
            "family": family.name,
            "base_model": base_model,
            "pipeline_config": settings.encoders["pipeline_config"],
            "encoders": {name: settings.encoders[name] for name in ("dinov2", "clip")},
            "images": list(map(str, self.images)),
            "batch_size": settings.images["batch_size"],
            "subject": self.subject.name,
            "clip_skip": options["clip_skip"],
            "scheduler": scheduler_of(options),
            "resolution": settings.images["resolution"],
            "weights": settings.weights,
            "stop_early": settings.stop_early,
            "usable": settings.usable,
            **{stage: list(self.image_jobs(prompts, stage, options["seed"])) for stage in FIRST_SEEDS},
        }


def family_of(plan: Mapping[str, Any]) -> Family:
    return FAMILIES[plan.get("family", SD1.name)]  # earlier versions knew no other


def scheduler_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' scheduler must know, so that the model draws as it was trained with kohya's options."""
    found: dict[str, Any] = {"prediction_type": "v_prediction"} if options.get("v_parameterization") else {}
    if options.get("zero_terminal_snr"):  # arXiv 2305.08891: the first step must be the last one of the training
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found


def read_eval_prompts(path: Path) -> list[Prompt]:
    """kohya's sample-prompt format: `text --n negative --w 512 --h 512 --d seed --l cfg --s steps`, # for comments."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput(f"--eval-prompts: can't read {path} ({one_line(error)}); give text in UTF-8") from error
    if path.suffix.lower() in (".toml", ".json"):  # kohya knows these forms, too
        raise RefusedInput(f"--eval-prompts: {path} would be read as lines; give a text file with one prompt a line")
    prompts: dict[str, Prompt] = {}
    problems = Problems()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        text, *options = (" " + line.strip()).split(" --")
        prompt: Prompt = {"prompt": text.strip()}
        matches = {option: _PROMPT_OPTION.fullmatch(option.strip()) for option in options}
        for match in filter(None, matches.values()):
            kind = {"negative": str, "cfg": float}.get(match.lastgroup, int)
            prompt[match.lastgroup] = kind(match[match.lastgroup])
        unknown = [f"'--{one_line(option, 40)}'" for option, match in matches.items() if not match]
        known = "--n text, --w, --h, --s whole numbers from 1, --d a whole number, --l a number"
        wrong = {
            "no prompt before the first option; write `text --w 512 ...`": not prompt["prompt"],
            f"{', '.join(unknown)} is not understood; known are {known}": unknown,
            "--w and --h must be multiples of 8": prompt.get("width", 8) % 8 or prompt.get("height", 8) % 8,
            f"--s must be at most {MAX_STEPS}": prompt.get("steps", 1) > MAX_STEPS,
            # Screening and confirmation would share it.
            "this prompt stands there twice; delete one, several seeds are used anyway": prompt["prompt"] in prompts,
        }
        problems += [f"--eval-prompts: line {number} of {path}: {what}" for what, holds in wrong.items() if holds]
        prompts[prompt["prompt"]] = prompt
    problems.refuse()
    return list(prompts.values())


# --- the terms: pure functions of unit vectors, shape (images, dimensions) ---

TERM_FLOOR = 0.01  # a term of zero would hide all differences in the others
SIMILARITY_FLOOR = 0.01
MIN_HEADROOM = {"fidelity": 0.05, "text": 0.02}  # the least from 0 to 1 of a term; less would magnify noise
NEAR_DUPLICATE = 0.95  # cosine of two pictures' pixels; above it they count as one, as two frames of a film do
RESAMPLES = 1000  # of the prompts, for a standard error


def self_similarity(x: np.ndarray) -> float:
    """s(X): mean cosine between different images of X, in [-1, 1]; 1 for a single image."""
    return 1 - spread_within(x, np.zeros(len(x)))


def subject_similarity(x: np.ndarray, data: np.ndarray) -> np.ndarray:
    """q of each image of X: mean cos(x, data) / sqrt(max(s(X), s(data)) s(data)); on average about 1 for the data set.

    The division (from CyberHarem) takes away what images gain by being all alike. They gain nothing by being less alike
    than the data set, hence the maximum: without it a LoRA that got the subject right in one image of two had 0.95
    (`tests/small_world/benchmark.py`).
    """
    s_data = max(self_similarity(data), SIMILARITY_FLOOR)
    return (x @ data.T).mean(axis=1) / math.sqrt(max(self_similarity(x), s_data) * s_data)


def copy_limit(data: np.ndarray, pixels: np.ndarray) -> float:
    """A similarity above which an image copies one of the data set; 1 for a single image.

    Half-way to 1 from what 95% of the data set's images stay under with their nearest neighbours. A right image may lie
    between two of the data set: without the half, 11 to 50% of right ones counted (tests/small_world/README.md).
    Of near-duplicates in `pixels` only the first counts, because two frames of a film would push the limit to 1.
    """
    kept: list[int] = []
    for number, row in enumerate(pixels @ pixels.T):
        if not np.any(row[kept] > NEAR_DUPLICATE):
            kept.append(number)
    nearest = (data[kept] @ data[kept].T - 2 * np.eye(len(kept))).max(axis=1)  # an image is not its own neighbour
    return float(1 + np.percentile(nearest, 95)) / 2 if len(kept) > 1 else 1.0


def pixel_vectors(images: Sequence[Any]) -> np.ndarray:
    """Unit vectors of PIL images' own pixels, 16 x 16 of each, without their mean."""
    small = [np.asarray(image.convert("RGB").resize((16, 16)), dtype=np.float64).ravel() for image in images]
    centred = np.stack([pixels - pixels.mean() for pixels in small])
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def crossed_similarity(x: np.ndarray, y: np.ndarray, labels: Sequence[str] | np.ndarray) -> float:
    """Mean cosine of rows of x with rows of y of another label; 0 where all labels are alike."""
    names = np.array(labels)
    different = names[:, None] != names
    return float((x @ y.T)[different].mean()) if different.any() else 0.0


def spread_within(x: np.ndarray, labels: Sequence[str] | np.ndarray) -> float:
    """Mean distance (1 - cosine) between different images of the same label; 0 where no label has two."""
    names = np.array(labels)
    alike = (names[:, None] == names) & ~np.eye(len(x), dtype=bool)
    return float((1 - x @ x.T)[alike].mean()) if alike.any() else 0.0


def terms_of(raw: Mapping[str, Any], anchors: Mapping[str, Any]) -> dict[str, Any]:
    """The terms in [0, 1]: a stage's raw values between its anchors; 0 for None, where no image was usable.

    Fidelity is a distance, not a cosine: the share of the base model's distance to the data set, sqrt(2 - 2 q), that
    the LoRA takes away. Near 1 a cosine hardly changes, so a missing part would cost nothing.
    Raw values may be arrays, with one value a resampling; then the terms are arrays, too.
    """
    scaled = {
        "fidelity": (raw["q"], anchors["q"], 1.0, MIN_HEADROOM["fidelity"]),
        "text": (raw["m"], anchors["m_crossed"], anchors["m"], MIN_HEADROOM["text"]),
        "preservation": (raw["plain"], anchors["plain_crossed"], 1.0, 1e-6),
        "originality": (1 - np.nan_to_num(np.array(raw["copies"], float)), 0.0, 1.0, 1.0),
        "variety": (raw["spread"], 0.0, min(anchors["spread"], anchors["data_spread"]), 1e-6),
        "usable": (raw["usable"], 0.0, 1.0, 1.0),
    }
    terms = {
        name: np.nan_to_num(np.clip((np.array(value, float) - zero) / max(one - zero, headroom), 0.0, 1.0))
        for name, (value, zero, one, headroom) in scaled.items()
    }
    return {**terms, "fidelity": 1 - np.sqrt(1 - terms["fidelity"])}


def combine(terms: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The score in [0, 1]: product of term ** weight, so that no term can buy back another."""
    return math.prod(np.maximum(terms[name], TERM_FLOOR) ** weight for name, weight in weights.items())


def with_error(found: Mapping[str, Any]) -> str:
    """A score and its standard error, in ASCII, since not every terminal knows more. Earlier versions have none."""
    error = found["standard_error"]
    return f"{found['score']:.3f}" + (f" +-{error:.3f}" if math.isfinite(error) else "")


AVERAGED = ("q", "m", "plain", "copies", "usable")  # raw values that are means over a stage's images


def average(images: Sequence[Mapping[str, Any]], times: np.ndarray | None = None) -> dict[str, Any]:
    """Means of the images' own values, None where no image has one.

    `times`, shape (draws, images): how often each draw takes each image. Then the means have shape (draws,).
    """
    values = np.array([[image.get(name, math.nan) for name in AVERAGED] for image in images], dtype=float)
    taken = np.ones(len(images)) if times is None else times
    with np.errstate(invalid="ignore"):
        means = (taken @ np.where(np.isfinite(values), values, 0.0) / (taken @ np.isfinite(values))).T
    if times is None:
        means = [None if math.isnan(mean) else float(mean) for mean in means]
    return dict(zip(AVERAGED, means, strict=True))


def resampled_scores(raw: Mapping[str, Any], anchors: Mapping[str, Any], weights: Mapping[str, float]) -> np.ndarray:
    """Scores of a stage with its prompts drawn anew, with replacement (bootstrap); shape (RESAMPLES,).

    The images of one prompt stay together. Prompts with and without the subject are drawn apart. Two stages with the
    same prompts get the same draws, so the difference of their scores is one in pairs. Draws from n prompts spread too
    little by sqrt((n - 1) / n), which is put right.
    """
    names = np.array([image["name"].partition("-")[0] for image in raw["images"]])
    about = np.array([image["subject"] for image in raw["images"]])
    times, rng = np.zeros((RESAMPLES, len(names))), np.random.default_rng(0)
    for kind in (True, False):
        prompts, places = np.unique(names[about == kind], return_inverse=True)
        drawn = rng.multinomial(len(prompts), np.full(len(prompts), 1 / max(1, len(prompts))), size=RESAMPLES)
        times[:, about == kind] = drawn[:, places]
    scores = combine(terms_of({**raw, **average(raw["images"], times)}, anchors), weights)
    n = max(2, len(np.unique(names[about])))
    return scores.mean() + (scores - scores.mean()) * math.sqrt(n / (n - 1))


def grey_statistics(image: Any) -> dict[str, float]:
    """Statistics of a PIL image's grey values, 0..255; three have the names of the limits that they must keep."""
    grey = np.asarray(image.convert("L"), dtype=np.float64).ravel()
    p1, p99 = np.percentile(grey, (1, 99))
    return {"mean": float(grey.mean()), "flat_std": float(grey.std()), "black_p99": float(p99), "white_p1": float(p1)}


def is_usable(image: Any | None, limits: Mapping[str, float]) -> bool:
    """Whether an image is not flat, black or white. None stands for latents that are not finite."""
    return image is not None and widen_limits(limits, [image]) == limits


def widen_limits(limits: Mapping[str, float], images: Sequence[Any]) -> dict[str, float]:
    """The limits of a usable image, wide enough for all of the data set's images."""
    found = [limits, *map(grey_statistics, images)]
    return {name: (max if name == "white_p1" else min)(one[name] for one in found) for name in limits}


def brightness_and_contrast(images: Sequence[Any]) -> dict[str, float | None]:
    """Mean and standard deviation of the grey values, 0..255, averaged over the images (V1's users look for them)."""
    found = [grey_statistics(image) for image in images]
    names = {"brightness": "mean", "contrast": "flat_std"}
    return {key: float(np.mean([one[name] for one in found])) if found else None for key, name in names.items()}


# --- the child process: models, images, embeddings ---

_MERGED_PARTS = {f"{kind}_w{number}{end}" for kind in ("hada", "lokr") for number in "12" for end in ("", "_a", "_b")}
_MERGED_PARTS |= {"alpha", "lora_up.weight", "lora_down.weight"}
_XL_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
_XL_RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def name_in_xl_unet(name: str, per_block: int) -> str:
    """What Stability AI's SDXL UNet, and so kohya's, calls a module of a block in diffusers' one."""
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.+)", name)
    if not match:
        return name
    side, block, kind, number, inner = match.groups()
    inner = "op" if kind == "downsamplers" else _XL_RESNET.get(inner, inner)
    place = {"attentions": 1, "upsamplers": 2}.get(kind, 0)
    if side == "mid":  # resnet, attention, resnet
        return f"middle_block.{2 * int(number) + place}.{inner}"
    layer = per_block * int(block) + (per_block - 1 if kind.endswith("samplers") else int(number))
    return f"input_blocks.{layer + 1}.{place}.{inner}" if side == "down" else f"output_blocks.{layer}.{place}.{inner}"


def change_of_weight(parts: Mapping[str, Any]) -> Any:
    """What a network adds to a layer's weight, (outputs, inputs), from its matrices in fp32; KeyError for another kind.

    LoRA: up @ down. LoHa: (w1_a @ w1_b) * (w2_a @ w2_b). LoKr: kron(w1, w2), of which each may be w_a @ w_b. All times
    alpha / rank, as LyCORIS trains them (arXiv:2309.14859). Its own merging, up to 4.1.3, applies alpha / rank twice.
    """
    import torch

    parts = {name: values.flatten(1) if values.ndim > 1 else values for name, values in parts.items()}
    if odd := parts.keys() - _MERGED_PARTS:
        raise KeyError(odd)

    def whole(name: str) -> Any:
        return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]

    if "lora_up.weight" in parts:
        change = parts["lora_up.weight"] @ parts["lora_down.weight"]
    elif any(name.startswith("hada") for name in parts):
        change = whole("hada_w1") * whole("hada_w2")
    else:
        change = torch.kron(whole("lokr_w1"), whole("lokr_w2"))
    ranks = [len(values) for name, values in parts.items() if name.endswith("_b") or "down" in name]
    return change * (float(parts.get("alpha", ranks[0])) / ranks[0]) if ranks else change


def is_out_of_memory(error: Exception) -> bool:
    """Of the card. cuBLAS and cuDNN have no type of their own for it."""
    return bool(_OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))


class ImageScorer:
    """Owns the pipeline and both encoders, loaded once a process: renders jobs, embeds images and texts."""

    def __init__(self, plan: Mapping[str, Any], device: str, needed_bytes: float = 0.0) -> None:
        """ScoringFailed if not so much of the card is free: under WSL2 its driver would take the system's memory."""
        import diffusers
        import huggingface_hub.utils
        import torch
        import transformers

        # No progress bars and no advice that a user of this program can't follow.
        warnings.filterwarnings("ignore")
        huggingface_hub.utils.logging.set_verbosity_error()
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        self.torch, self.plan, self.device, self.family = torch, plan, device, family_of(plan)
        self.batch_size: int = plan["batch_size"]
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ScoringFailed(f"PyTorch {torch.__version__} sees no {device}; reinstall it, or use --device cpu")
        self.free = math.inf
        if device.startswith("cuda"):  # an allocator without a limit keeps 3 GB more than it needs
            card = torch.device(device).index or 0
            self.free, total = torch.cuda.mem_get_info(card)
            torch.cuda.set_per_process_memory_fraction(self.free / total, card)
        if self.free < needed_bytes:
            there, needed = (tqdm.format_sizeof(count, "B") for count in (self.free, needed_bytes))
            raise ScoringFailed(f"the card has {there} free beside the trainer, and screening needs {needed}")
        self.takes_turns = self.free < self.family.screening_gb * 1e9  # one model at a time on the card
        self.dtype = torch.float16 if device.startswith("cuda") else torch.float32
        encoders, base_model = plan["encoders"], plan["base_model"]
        configs = [plan["pipeline_config"]] if Path(base_model).is_file() else []
        self.pipeline = self._load(base_model, self._load_pipeline, *configs)
        self.dinov2, self.dinov2_processor = self._load(encoders["dinov2"], self._load_encoder)
        self.clip, self.clip_processor = self._load(encoders["clip"], self._load_encoder)
        self.clip_tokenizer = self._load(encoders["clip"], transformers.AutoTokenizer.from_pretrained)

    def _load(self, name: str, load: Callable[[str], Any], *needed: str) -> Any:
        """`needed` must be there as well: for a base model in one file its configs and tokenizer."""
        try:
            return load(name)
        except Exception as error:
            if is_out_of_memory(error):
                raise ScoringFailed(f"out of memory while loading {name}: is another program on the card?") from error
            commands = {name: f"hf download {name}"} | {place: f"hf download {place}{NO_WEIGHTS}" for place in needed}
            remedies = (
                f"restore {place}" if Path(place).is_absolute() or Path(place).exists() else f"`{command}`"
                for place, command in commands.items()
            )
            raise ScoringFailed(
                f"can't load {name} ({type(error).__name__}: {one_line(error, 160)}); {' or '.join(remedies)}, "
                "or name another folder (base model: --base-model; the others: [encoders] in the scoring config)"
            ) from error

    def _load_pipeline(self, name: str) -> Any:
        """The family's pipeline. SD 1.x is loaded without its safety checker, which would blacken images."""
        import diffusers
        from transformers import CLIPTokenizerFast

        kind, options = getattr(diffusers, self.family.pipeline), {"torch_dtype": self.dtype}
        if self.family is SD1:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if Path(name).is_dir():
            folders = {part: Path(name) / part for part in self.family.folder if part.startswith("tokenizer")}
            only_new = [part for part, folder in folders.items() if not (folder / "vocab.json").is_file()]
            pipeline = kind.from_pretrained(name, use_safetensors=True, **options, **dict.fromkeys(only_new))
            for part in only_new:  # saved by transformers 5
                setattr(pipeline, part, CLIPTokenizerFast.from_pretrained(folders[part]))
        else:
            config = self.plan["pipeline_config"]
            if self.family is SD1:
                options["text_encoder"] = self._load_text_encoder(name, config)
            pipeline = kind.from_single_file(name, config=config, **options)
        # DPM++ 2M adds no noise between the steps, and 25 of them are enough (diffusers' own advice).
        solver, own = diffusers.DPMSolverMultistepScheduler, self.plan.get("scheduler", {})
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config, **own)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_slicing()  # decodes one image at a time: 8 of 512 pixels at once took 7 GB more
        if self.family.vae_overflows and self.dtype == self.torch.float16:
            has_bf16 = self.torch.cuda.get_device_capability(self.device) >= (8, 0)  # half of the memory of fp32
            pipeline.vae.to(self.torch.bfloat16 if has_bf16 else self.torch.float32)
        if not self.takes_turns:
            return pipeline.to(self.device)
        pipeline.enable_model_cpu_offload(device=self.device)
        return pipeline

    def _load_text_encoder(self, name: str, config: str) -> Any:
        """A single file's. Old names of its tensors lack `text_model.`, and from_single_file does not know them."""
        from safetensors import safe_open
        from transformers import CLIPTextConfig, CLIPTextModel

        with safe_open(name, "pt") as file:
            prefix = re.compile(r"cond_stage_model\.transformer\.(text_model\.)?")
            keys = [key for key in file.keys() if prefix.match(key)]  # noqa: SIM118
            weights = {prefix.sub("text_model.", key, count=1): file.get_tensor(key) for key in keys}
        settings = CLIPTextConfig.from_pretrained(config, subfolder="text_encoder")
        return CLIPTextModel.from_pretrained(None, config=settings, state_dict=weights, torch_dtype=self.dtype)

    def _load_encoder(self, name: str) -> tuple[Any, Any]:
        import transformers

        # The PIL processors give the same pixels with and without torchvision. transformers 4 and 5.0 know them as
        # use_fast=False, later ones as backend="pil"; each ignores the other's argument.
        processor = transformers.AutoImageProcessor.from_pretrained(name, use_fast=False, backend="pil")
        model = transformers.AutoModel.from_pretrained(name, torch_dtype=self.dtype, use_safetensors=True)
        return model.to("cpu" if self.takes_turns else self.device).eval(), processor

    @contextlib.contextmanager
    def _in_turn(self, encoder: Any) -> Iterator[Any]:
        """The encoder on the card; where models take turns, for as long as it is used."""
        yield encoder.to(self.device)
        if self.takes_turns:
            encoder.to("cpu")

    @contextlib.contextmanager
    def lora(self, path: Path, strength: float = 1.0) -> Iterator[None]:
        """With a kohya LoRA; afterwards the pipeline is bit for bit as before."""
        from safetensors.torch import load_file

        weights = load_file(path)
        with contextlib.ExitStack() as undo:
            if not self._add_beside(dict(weights), path, strength, undo):
                self._merge(weights, path, strength, undo)
            yield

    def _add_beside(self, weights: dict[str, Any], path: Path, strength: float, undo: contextlib.ExitStack) -> bool:
        """Add a LoRA as diffusers does; False, and nothing is added, where that knows only a part of its modules."""
        if not all(key.endswith((".alpha", ".lora_down.weight", ".lora_up.weight")) for key in weights):
            return False
        modules = {key.partition(".")[0] for key in weights}
        for module in modules:
            down, up = (f"{module}.lora_{side}.weight" for side in ("down", "up"))
            alpha = float(weights.pop(f"{module}.alpha", len(weights[down])))  # diffusers 0.32 ignores mixed ones
            weights[up] = weights[up].float() * (strength * alpha / len(weights[down]))
        try:
            self.pipeline.load_lora_weights(weights, adapter_name="trial")
        except (ValueError, ImportError, AttributeError) as error:  # a library found another one too old
            said = f"diffusers can't load {path} ({type(error).__name__}: {one_line(error, 160)})"
            raise ScoringFailed(f"{said}; do the libraries fit? pip install -r requirements.txt") from error
        undo.callback(self.pipeline.unload_lora_weights)
        models = [model for model in self.pipeline.components.values() if isinstance(model, self.torch.nn.Module)]
        added = [m for model in models for m in model.modules() if "trial" in getattr(m, "lora_A", {})]
        for module in added:  # alpha / rank is in the weights; diffusers 0.33 to 0.36 scales mixed ranks besides
            module.scaling["trial"] = 1.0
        is_whole = len(modules) == len(added)
        if not is_whole:
            undo.close()
        return is_whole

    def _merge(self, weights: Mapping[str, Any], path: Path, strength: float, undo: contextlib.ExitStack) -> None:
        """Add a LoHa, a LoKr, or a LoRA of layers that diffusers does not know there, to the pipeline's weights."""
        modules, networks = self._modules_by_name(), {}
        for key, values in weights.items():
            name, _, part = key.partition(".")
            networks.setdefault(name, {})[part] = values.float()
        for name, parts in networks.items():
            try:
                module = modules[name]
                change = strength * change_of_weight(parts).reshape(module.weight.shape)
            except (KeyError, RuntimeError) as error:
                remedy = f"use {' or '.join(ALGORITHMS)}, and none of {', '.join(NOT_MERGED)}"
                raise ScoringFailed(f"{path}: {name} ({', '.join(parts)}) can't be merged; {remedy}") from error
            before = module.weight.data.cpu()
            undo.callback(self._set_weight, module, before)
            self._set_weight(module, before.float() + change)

    @staticmethod
    def _set_weight(module: Any, values: Any) -> None:
        module.weight.data = values.to(module.weight)

    def _modules_by_name(self) -> dict[str, Any]:
        """Modules of the pipeline that a network may adapt, by the names that kohya gives them."""
        names = {"unet": "unet", "text_encoder": "te" if self.family is SD1 else "te1", "text_encoder_2": "te2"}
        found = {}
        for part, model in self.pipeline.components.items():
            # transformers 5 has taken one level out.
            above = "" if part == "unet" or hasattr(model, "text_model") else "text_model."
            for name, module in model.named_modules() if part in names and model else ():
                is_xl = part == "unet" and self.family is not SD1
                full = name_in_xl_unet(name, model.config.layers_per_block + 1) if is_xl else above + name
                found[f"lora_{names[part]}_{full}".replace(".", "_")] = module
        return found

    def render(self, jobs: Sequence[Mapping[str, Any]], report: Callable[[int], None] = lambda made: None) -> list[Any]:
        """A PIL image for every job, in order; None where the latents were not finite. Reports each batch's size."""
        images: dict[int, Any] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, job in enumerate(jobs):
            groups.setdefault((job["width"], job["height"], job["steps"], job["cfg"]), []).append(number)
        for numbers in groups.values():
            for batch, made in self._in_batches(numbers, lambda batch: self._render_batch([jobs[n] for n in batch])):
                images.update(zip(batch, made, strict=True))
                report(len(batch))
        return [images[number] for number in range(len(jobs))]

    def _in_batches(self, items: Sequence[Any], work: Callable[[Sequence[Any]], Any]) -> Iterator[tuple[Any, Any]]:
        """Batches of the plan's size; halved down to one when the card has no room, and kept so for the process."""
        position = 0
        while position < len(items):
            batch = items[position : position + self.batch_size]
            try:
                made = work(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                said = one_line(f"{type(error).__name__}: {error}", 160)
            else:
                yield batch, made
                position += len(batch)
                continue
            if len(batch) == 1:
                raise ScoringFailed(f"out of memory with one image at a time: is another program on the card? ({said})")
            self.batch_size = len(batch) // 2
            self.torch.cuda.empty_cache()  # not before the exception is gone, which holds the batch's tensors

    def _render_batch(self, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
        torch, first = self.torch, jobs[0]
        # Where models take turns, the VAE of the last batch, or the UNet of one without room, is on the card still.
        self.pipeline.maybe_free_model_hooks()
        with torch.inference_mode():
            without = self._embed_prompts([job["negative"] for job in jobs])
            # Every image has a generator of its own, on the CPU: neither batch nor device changes the picture.
            latents = self.pipeline(
                **self._embed_prompts([job["prompt"] for job in jobs]),
                **{f"negative_{name}": values for name, values in without.items()},
                generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in jobs],
                width=first["width"],
                height=first["height"],
                num_inference_steps=first["steps"],
                guidance_scale=first["cfg"],
                output_type="latent",
            ).images
            finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
            images = self._decode(torch.nan_to_num(latents))
        return [image if ok else None for image, ok in zip(images, finite, strict=True)]

    def _decode(self, latents: Any) -> list[Any]:
        vae = self.pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float()
        return self.pipeline.image_processor.postprocess(self.torch.nan_to_num(pixels), output_type="pil")

    def _embed_prompts(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The pipeline's arguments: embeddings (n, 77, d) as kohya trains with them; of SDXL also pooled ones (n, d).

        SD 1.x: the hidden state at kohya's clip_skip from the end, then the final norm. SDXL: the last hidden state but
        one of both text encoders, whatever clip_skip says, without a norm.
        """
        # Done here because kohya's clip_skip 2 is diffusers' 1, and the newest diffusers fails with any.
        outputs, pipeline = [], self.pipeline
        for part in ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",):
            tokenizer, encoder = getattr(pipeline, f"tokenizer{part}"), getattr(pipeline, f"text_encoder{part}")
            cut = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            tokens = tokenizer(list(prompts), return_tensors="pt", **cut)
            outputs.append(encoder(tokens.input_ids.to(self.device), output_hidden_states=True))
        if len(outputs) == 2:
            states = self.torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            return {"prompt_embeds": states, "pooled_prompt_embeds": outputs[1].text_embeds}
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return {"prompt_embeds": norm(outputs[0].hidden_states[-max(1, self.plan["clip_skip"])])}

    def through_vae(self, images: Sequence[Any]) -> list[Any]:
        """Data set images as this VAE shows them, with the scoring resolution's area and their own proportions."""
        vae, processor, result = self.pipeline.vae, self.pipeline.image_processor, []
        with self.torch.inference_mode():
            for image in images:
                scale = self.plan["resolution"] / math.sqrt(image.width * image.height)
                width, height = (max(8, round(side * scale / 8) * 8) for side in image.size)
                pixels = processor.preprocess(image.convert("RGB"), height=height, width=width)
                latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
                result += self._decode(latents * vae.config.scaling_factor)
        return result

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        """DINOv2 unit vectors (n, d): the normed class token."""
        side = self.dinov2.config.image_size  # 518 pixels, as DINOv2 was trained
        with self._in_turn(self.dinov2) as dinov2:
            return self._embed(images, side, self.dinov2_processor, lambda pixels: dinov2(pixels).pooler_output)

    def embed_images_for_text(self, images: Sequence[Any]) -> np.ndarray:
        """CLIP unit vectors (n, d) of images."""
        side = self.clip.config.vision_config.image_size
        with self._in_turn(self.clip) as clip:
            see, project = clip.vision_model, clip.visual_projection
            return self._embed(images, side, self.clip_processor, lambda pixels: project(see(pixels).pooler_output))

    def _embed(self, images: Sequence[Any], side: int, processor: Any, model: Callable[[Any], Any]) -> np.ndarray:
        """Unit vectors of whole images, padded to a square: the processor alone would crop, and cut off heads."""
        from PIL import ImageOps

        grey = tuple(round(255 * mean) for mean in processor.image_mean)

        def work(batch: Sequence[Any]) -> np.ndarray:
            squares = [ImageOps.pad(image.convert("RGB"), (side, side), color=grey) for image in batch]
            options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
            pixels = processor(images=squares, **options)["pixel_values"]
            with self.torch.inference_mode():
                return self._unit_vectors(model(pixels.to(self.device, self.dtype)))

        return np.concatenate([vectors for _, vectors in self._in_batches(images, work)])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """CLIP unit vectors (n, d) of texts, which are cut at CLIP's 77 tokens."""
        tokens = self.clip_tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        with self._in_turn(self.clip) as clip, self.torch.inference_mode():
            tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            return self._unit_vectors(clip.text_projection(clip.text_model(**tokens).pooler_output))

    @staticmethod
    def _unit_vectors(output: Any) -> np.ndarray:
        vectors = output.float().cpu().numpy().astype(np.float64)
        if not np.isfinite(vectors).all():  # would become a score of NaN
            raise ScoringFailed("an encoder gave values that are not finite; check [encoders] in the scoring config")
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# --- the child process: reference, screening, confirmation ---

FINAL = "final"  # in the output folder
FINALISTS = "finalists.json"  # in final/: the finalists' checkpoints, by trial number
SCREENED = "screened.json"  # in a trial's scores/, until the trial is scored


def score_folder(folder: Path, device: str, *, by_search: bool = False) -> None:
    """Write a trial's metrics.json, make OUTPUT_DIR/reference or run the final stage in OUTPUT_DIR/final.

    Any other folder is a RefusedInput. `by_search`: it has checked the weights, and may have paused the training; then
    what is saved so far is screened.
    """
    started = time.monotonic()
    reference, plan, checkpoints = find_what_to_score(folder, may_be_paused=by_search)
    is_paused = by_search and bool(checkpoints) and not (folder / f"{LORA_NAME}.safetensors").is_file()
    try:
        if not by_search:  # all is made anew
            (folder / "scores" / SCREENED).unlink(missing_ok=True)
            for path in checkpoints.values():
                try:
                    check_lora(path)
                except TrialFailed as error:
                    raise ScoringFailed(f"{error}; restore it, or train {folder / 'config.toml'} again") from error
        needed = 1e9 * family_of(plan).screening_gb if is_paused else 0.0
        scorer = FolderScorer(ImageScorer(plan, device, needed), reference)
        if is_paused:
            with image_bar(len(checkpoints) * len(plan["screen"])) as bar:
                scorer.screen_checkpoints(folder, checkpoints, bar)
        elif checkpoints:
            metrics = scorer.score_trial(folder, checkpoints)
            seconds = round(time.monotonic() - started, 1)
            write_json(folder / "metrics.json", {**metrics, "scoring_seconds": seconds})
            (folder / "scores" / SCREENED).unlink(missing_ok=True)
            with only_warning("no contact sheet could be made"):
                ContactSheet(folder).make()
        elif (folder / FINALISTS).is_file():
            FinalStage(scorer, folder).run()
    except SearchError:
        raise
    except Exception as error:
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        raise ScoringFailed(f"{kind} while scoring {folder}: {one_line(error)}") from error
    print(f"  scoring took {time.monotonic() - started:.0f} s", flush=True)


def find_what_to_score(folder: Path, *, may_be_paused: bool = False) -> tuple[Path, dict[str, Any], dict[int, Path]]:
    """The reference's folder, its plan, a trial's checkpoints by epoch; RefusedInput if the folder can't be scored."""
    is_reference = (folder / "plan.json").is_file()
    reference = folder if is_reference else folder.parent / "reference"
    plan = read_json(reference / "plan.json")
    if plan is None or not plan.keys() >= {"base_model", "encoders", "images", *FIRST_SEEDS}:
        raise RefusedInput(f"--score: {folder} is no trial's folder (no whole {reference / 'plan.json'}); give one")
    if (made := plan.get(SCORE_DEFINITION[0])) != SCORE_DEFINITION[1]:
        said = f"{folder} is scored by definition {made or 3}, and this program has {SCORE_DEFINITION[1]}"
        raise RefusedInput(f"--score: {said}; use the version that made it")
    if is_reference or (folder / FINALISTS).is_file():
        return reference, plan, {}
    params = read_json(folder / "params.json") or {}
    checkpoints = saved_checkpoints(folder, params.get("max_train_epochs", 0))
    scored = (read_json(folder / "metrics.json") or {}).get("outcome") == "scored"  # then only its best one is kept
    if not (params and checkpoints and (scored or may_be_paused or checkpoint_files(folder)[-1].is_file())):
        why = f"{folder} has no {LORA_NAME}.safetensors or no whole params.json"
        raise RefusedInput(f"--score: {why}; give a trial's folder whose training has finished")
    return reference, plan, checkpoints


def image_bar(images: int) -> tqdm:
    """A bar that counts the images. A user may look at it, and the search's ScoringProgress reads it."""
    return tqdm(total=images, file=sys.stdout, desc="images", unit=" images", mininterval=0.5, leave=False)


class StageImages:
    """A stage's images, and what the encoders see in those that are usable."""

    def __init__(
        self, scorer: ImageScorer, stage: str, images: Sequence[Any], limits: Mapping[str, float], data: np.ndarray
    ) -> None:
        jobs = scorer.plan[stage]
        self.jobs, self.images, self.data = jobs, images, data
        self.prompts = np.array([job["prompt"] for job in jobs])
        self.usable = np.array([is_usable(image, limits) for image in images])
        usable = np.flatnonzero(self.usable)
        self.about, self.plain = ([n for n in usable if jobs[n]["subject"] is kind] for kind in (True, False))
        self.vectors = np.zeros((len(images), data.shape[1]))
        if len(usable):
            self.vectors[usable] = scorer.embed_images([images[n] for n in usable])
        self.pictures = self.texts = np.zeros((0, 1))
        if self.about:
            self.pictures = scorer.embed_images_for_text([images[n] for n in self.about])
            self.texts = scorer.embed_texts([jobs[n]["text"] for n in self.about])

    def anchors(self) -> dict[str, float]:
        """What the base model reaches on this stage's prompts and seeds; terms_of() says where a term is 0 and 1."""
        about, plain = self.prompts[self.about], self.prompts[self.plain]
        reached = self.raw_values(self.vectors, self.usable, 1.0)
        return {
            **{name: reached[name] for name in ("q", "m", "spread")},
            "m_crossed": crossed_similarity(self.pictures, self.texts, about),
            "plain_crossed": crossed_similarity(self.vectors[self.plain], self.vectors[self.plain], plain),
        }

    def raw_values(self, base: np.ndarray, base_usable: np.ndarray, limit: float) -> dict[str, Any]:
        """Values of each image and their averages, None where no image is usable.

        `base` holds the base model's vectors. An image more similar than `limit` to one of the data set is a copy,
        unless its prompt is a caption of the data set.
        """
        known = zip(self.jobs, self.usable.tolist(), strict=True)
        images = [{"name": job["name"], "subject": job["subject"], "usable": ok} for job, ok in known]
        shown, spread = self.vectors[self.about], None
        if self.about:
            similar, texts = subject_similarity(shown, self.data), (self.pictures * self.texts).sum(axis=1)
            nearest, spread = (shown @ self.data.T).max(axis=1), spread_within(shown, self.prompts[self.about])
            for number, q, m, near in zip(self.about, similar, texts, nearest, strict=True):
                images[number].update(q=float(q), m=float(m), nearest=float(near))
                if not self.jobs[number]["caption"]:
                    images[number]["copies"] = bool(near > limit)
        for number in self.plain:
            if base_usable[number]:
                images[number]["plain"] = float(self.vectors[number] @ base[number])
        grey = brightness_and_contrast([self.images[n] for n in np.flatnonzero(self.usable)])
        return {**average(images), "spread": spread, **grey, "images": images}

    def keep(self, folder: Path) -> None:
        """Keep what the encoders saw, so that another way to judge needs no rendering."""
        seen = {"dinov2": self.vectors, "clip_images": self.pictures, "clip_texts": self.texts}
        half = {name: vectors.astype(np.float16) for name, vectors in seen.items()}
        write_atomically(folder / "embeddings.npz", functools.partial(np.savez_compressed, **half))


class FolderScorer:
    """Scores trials against their study's reference, which it makes if it is not there yet."""

    def __init__(self, scorer: ImageScorer, reference: Path) -> None:
        self.scorer, self.plan, self.reference = scorer, scorer.plan, reference
        self.anchors: dict[str, Any] | None = read_json(reference / "anchors.json")
        if self.anchors is None:
            self._make_reference()
        with np.load(reference / "embeddings.npz") as stored:
            self.embeddings = dict(stored)

    def _make_reference(self) -> None:
        """Measure the study's anchors. anchors.json is written last: where it is, the embeddings are too."""
        first_step = self.reference / FIRST_STEP / f"{LORA_NAME}.safetensors"
        if first_step.is_file():
            with self.scorer.lora(first_step):
                pass  # a LoRA that can't be loaded is better found now than after the first training
        self._measure_data_set()
        with image_bar(len(self.plan["screen"]) + len(self.plan["confirm"])) as bar:
            self._measure_base(["screen", "confirm"], bar.update)

    def _measure_base(self, stages: Sequence[str], report: Callable[[int], None]) -> None:
        """Render the base model's own images of these stages, which give their anchors, and keep all anchors."""
        for stage in stages:
            made = self._render(stage, self.reference / stage, report)
            if not (made.about and made.plain):
                said = f"the base model's images in {self.reference / stage}, with or without the subject"
                raise ScoringFailed(f"{said}, are all flat, black, white or broken; check --base-model")
            self.embeddings |= {stage: made.vectors, f"{stage}_usable": made.usable}
            self.anchors[stage] = made.anchors()
        write_atomically(self.reference / "embeddings.npz", functools.partial(np.savez, **self.embeddings))
        write_json(self.reference / "anchors.json", self.anchors)

    def _measure_data_set(self) -> None:
        from PIL import Image

        paths, limits = self.plan["images"], self.plan["usable"]
        print(f"  data set: {len(paths)} images through the VAE", flush=True)
        shown = [image for path in paths for image in self.scorer.through_vae([Image.open(path)])]
        unusable = [Path(path).name for path, image in zip(paths, shown, strict=True) if not is_usable(image, limits)]
        if unusable:
            said = f"{len(unusable)} images of the data set look flat, black or white ({unusable[0]})"
            print(f"  note: {said}; the limits are widened to include them", flush=True)
        data = self.scorer.embed_images(shown)
        self.embeddings = {"data": data}
        self.anchors = {
            "usable": widen_limits(limits, shown),
            "data_spread": 1 - self_similarity(data),
            "copy": copy_limit(data, pixel_vectors(shown)),
            "data": brightness_and_contrast(shown),
        }

    def _render(self, stage: str, folder: Path, report: Callable[[int], None]) -> StageImages:
        """Render, keep and embed the images of a stage."""
        for left_over in folder.glob("*.png"):  # of a scoring that was interrupted
            left_over.unlink()
        images = self.scorer.render(self.plan[stage], report)
        for job, image in zip(self.plan[stage], images, strict=True):
            if image is not None:
                # The quickest compression: a fifth of the time for a fifth more bytes.
                save = functools.partial(image.save, format="PNG", compress_level=1)
                write_atomically(folder / f"{job['name']}.png", save)
        return StageImages(self.scorer, stage, images, self.anchors["usable"], self.embeddings["data"])

    def score_checkpoint(
        self, path: Path, stage: str, images: Path, report: Callable[[int], Any], strength: float = 1.0
    ) -> dict[str, Any]:
        """Score, terms and raw values of one checkpoint in one stage; its images are kept."""
        if stage not in self.anchors:
            self._measure_base([stage], report)
        with self.scorer.lora(path, strength):
            made = self._render(stage, images, report)
        made.keep(images)
        base = (self.embeddings[stage], self.embeddings[f"{stage}_usable"])
        return self.judge(made.raw_values(*base, self.anchors["copy"]), stage)

    def judge(self, raw: Mapping[str, Any], *stages: str) -> dict[str, Any]:
        """Score, its standard error and terms from the raw values of one stage, or of several together."""
        terms = {name: float(value) for name, value in terms_of(raw, self._anchors_of(stages)).items()}
        score, error = combine(terms, self.plan["weights"]), np.std(self.resampled(raw, *stages))
        return {"score": float(score), "standard_error": float(error), "terms": terms, "raw": raw}

    def resampled(self, raw: Mapping[str, Any], *stages: str) -> np.ndarray:
        return resampled_scores(raw, self._anchors_of(stages), self.plan["weights"])

    def _anchors_of(self, stages: Sequence[str]) -> dict[str, Any]:
        """The study's anchors, and the means of the stages' own."""
        own = [self.anchors[stage] for stage in stages]
        return {**self.anchors, **{name: float(np.mean([one[name] for one in own])) for name in own[0]}}

    def score_trial(self, folder: Path, checkpoints: Mapping[int, Path]) -> dict[str, Any]:
        """Screen every checkpoint, then confirm the best one on other prompts and seeds; returns metrics.json."""
        # Results of deleted checkpoints stay, marked. Such a checkpoint can't be the best: it can't be confirmed.
        known = (read_json(folder / "metrics.json") or {}).get("screen", [])
        deleted = [{**result, "deleted": True} for result in known if not (folder / result["checkpoint"]).is_file()]
        with image_bar(len(checkpoints) * len(self.plan["screen"]) + len(self.plan["confirm"])) as bar:
            screened = self.screen_checkpoints(folder, checkpoints, bar)
            best = max(screened, key=lambda result: result["score"])
            path, images = folder / best["checkpoint"], folder / "scores" / "confirm"
            confirmed = self.score_checkpoint(path, "confirm", images, bar.update)
        print(f"  epoch {best['epoch']:3d} is {self._describe(confirmed)}   on other prompts and seeds", flush=True)
        copies = [image["name"] for image in confirmed["raw"]["images"] if image.get("copies")]
        return {
            "outcome": "scored",
            **confirmed,
            "best_epoch": best["epoch"],
            "checkpoint": best["checkpoint"],
            "screen": sorted(deleted + screened, key=lambda result: result["epoch"]),
            "copies": {"limit": self.anchors["copy"], "images": copies},
            "device": self.scorer.device,
        }

    def screen_checkpoints(self, folder: Path, checkpoints: Mapping[int, Path], bar: tqdm) -> list[dict[str, Any]]:
        """What screening finds of each checkpoint. It is kept, so that none is screened again."""
        file = folder / "scores" / SCREENED
        known = {result["checkpoint"]: result for result in (read_json(file) or {}).get("screen", [])}
        for epoch, path in checkpoints.items():
            if path.name in known:
                bar.update(len(self.plan["screen"]))
                continue
            result = self.score_checkpoint(path, "screen", folder / "scores" / f"epoch-{epoch:06d}", bar.update)
            known[path.name] = {"epoch": epoch, "checkpoint": path.name, **result}
            write_json(file, {"screen": list(known.values())})
            bar.write(f"  epoch {epoch:3d}    {self._describe(result)}")
        return [known[path.name] for path in checkpoints.values()]

    @staticmethod
    def _describe(result: Mapping[str, Any]) -> str:
        terms = "  ".join(f"{name} {value:.3f}" for name, value in result["terms"].items())
        return f"score {with_error(result)}  ({terms})"


# --- the child process: the final stage ---

# A finalist is dropped if this percentile of its lead over the leader is below 0. Of equal trials 97.5 would drop every
# fifth one: each round has several comparisons, with a leader that was chosen for being the highest.
LOSES_SURELY = 99.5
ENOUGH_PROMPTS = 8  # fewer can't show that a trial loses
STRENGTHS = (0.6, 0.8, 1.2)  # of the winner, besides 1


class FinalStage:
    """Compares a study's best trials on fresh prompts and seeds, in rounds. A clear loser is dropped after each.

    Each round of each finalist is a file in final/, so an interrupted stage goes on where it was.
    """

    def __init__(self, scorer: FolderScorer, folder: Path) -> None:
        self.scorer, self.folder = scorer, folder
        self.checkpoints = {number: Path(path) for number, path in (read_json(folder / FINALISTS) or {}).items()}
        # What was found of each finalist, by round.
        self.rounds: dict[str, dict[str, dict[str, Any]]] = {number: {} for number in self.checkpoints}
        self.first = next(iter(FINAL_ROUNDS))
        about = {job["prompt"] for job in scorer.plan[self.first] if job["subject"]}
        self.may_drop = len(about) >= ENOUGH_PROMPTS
        self.bar = image_bar(1)

    def run(self) -> None:
        left, rounds = list(self.checkpoints), list(FINAL_ROUNDS)
        while rounds and len(left) > 1:
            self._expect(len(left), rounds)
            stage = rounds.pop(0)
            for number in left:
                self.rounds[number][stage] = self._score(number, stage)
            judged = {number: self._judge(number) for number in left}
            said = ", ".join(f"trial {number} {with_error(found)}" for number, found in judged.items())
            self.bar.write(f"  round {stage[-1]}: {said}")
            leader = max(left, key=lambda number: judged[number]["score"])
            if self.may_drop:
                left = [n for n in left if np.percentile(self._ahead(n, leader), LOSES_SURELY) >= 0]
        self._expect(0, [])
        ranked = sorted(self.checkpoints, key=lambda number: (number in left, self._judge(number)["score"]))[::-1]
        found = [{**self._summary_of(number, ranked[0]), "dropped": number not in left} for number in ranked]
        write_json(self.folder / "result.json", {"finalists": found, **self._strengths(ranked[0])})
        self.bar.close()

    def _expect(self, finalists: int, rounds: Sequence[str]) -> None:
        """Set the bar's total: what is drawn already, by so many finalists in these rounds, and at other strengths."""
        plan, base = self.scorer.plan, self.scorer.anchors
        images = sum(len(plan[stage]) * (finalists + (stage not in base)) for stage in rounds)
        self.bar.total = self.bar.n + images + len(STRENGTHS) * len(plan[self.first])
        self.bar.refresh()

    def _score(self, number: str, stage: str, strength: float = 1.0) -> dict[str, Any]:
        """A round of a finalist, from its file if it was made before."""
        path = self.checkpoints[number]
        images = self.folder / path.parent.name / (stage if strength == 1 else f"strength-{strength}")
        known = read_json(images / "metrics.json")
        if known and known["checkpoint"] == path.name:
            self.bar.update(len(self.scorer.plan[stage]))
            return known
        result = self.scorer.score_checkpoint(path, stage, images, self.bar.update, strength)
        write_json(images / "metrics.json", {"checkpoint": path.name, **result})
        return result

    def _raw(self, number: str, stages: Iterable[str]) -> dict[str, Any]:
        """The raw values of several rounds together."""
        rounds = [self.rounds[number][stage]["raw"] for stage in stages]
        images = [image for raw in rounds for image in raw["images"]]
        spreads = [raw["spread"] for raw in rounds if raw["spread"] is not None]
        return {**average(images), "spread": float(np.mean(spreads)) if spreads else None, "images": images}

    def _judge(self, number: str) -> dict[str, Any]:
        return self.scorer.judge(self._raw(number, self.rounds[number]), *self.rounds[number])

    def _ahead(self, number: str, other: str) -> np.ndarray:
        """Resampled differences of two scores, on the rounds that both have."""
        stages = min(self.rounds[number], self.rounds[other], key=len)
        one, two = (self.scorer.resampled(self._raw(n, stages), *stages) for n in (number, other))
        return one - two

    def _summary_of(self, number: str, winner: str) -> dict[str, Any]:
        """A finalist's values, and the 99% interval of how far it is ahead of the winner: dropped ones are below 0."""
        judged, limits = self._judge(number), (100 - LOSES_SURELY, LOSES_SURELY)
        about = {name: judged[name] for name in ("score", "standard_error", "terms")}
        interval = np.percentile(self._ahead(number, winner), limits).tolist()
        return {"trial": int(number), **about, "rounds": len(self.rounds[number]), "ahead_of_winner": interval}

    def _strengths(self, winner: str) -> dict[str, Any]:
        """The winner's score at several strengths, and the best one, if it is surely better than 1."""
        found = {strength: self._score(winner, self.first, strength) for strength in STRENGTHS}
        found = dict(sorted({**found, 1.0: self.rounds[winner][self.first]}.items()))
        best = max(found, key=lambda strength: found[strength]["score"])
        one, two = (self.scorer.resampled(found[strength]["raw"], self.first) for strength in (best, 1.0))
        is_better = self.may_drop and np.percentile(one - two, 100 - LOSES_SURELY) > 0
        scores = {str(strength): result["score"] for strength, result in found.items()}
        return {"strengths": scores, "strength": best if is_better else 1.0}


# --- the contact sheet of a trial ---

CONTACT_SHEET = "contact_sheet.jpg"  # in scores/
SHEET_WIDTH, SHEET_HEIGHT, SHEET_COLUMNS = 1600, 2400, 12  # pixels and columns at most
SHEET_TILE, SHEET_GAP, SHEET_LINE = 200, 6, 18  # pixels: largest picture, between pictures, a line of text
_BLACK, _GREY, _GREEN = (30, 30, 30), (200, 200, 200), (0, 140, 60)


def first_seeds(jobs: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """One job a prompt, with its first seed: at most `count`, spread over a stage's plan, the subject's first."""
    first = [job for job in jobs if job["name"].endswith("-s0")]
    return sorted(_evenly(first, count), key=lambda job: not job["subject"])


class ContactSheet:
    """A trial's pictures on one sheet: a file in its scores/, and attached to it for optuna-dashboard."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scores" / CONTACT_SHEET

    def make(self) -> None:
        """A row a checkpoint, with one picture a prompt; then the best checkpoint's on the confirming prompts."""
        files = (self.folder.parent / "reference" / "plan.json", self.folder / "metrics.json")
        plan, metrics = map(read_json, files)
        if plan is None or metrics is None:
            raise FileNotFoundError(f"no whole plan.json and metrics.json for {self.folder}")
        scores, best, screened = self.folder / "scores", metrics["best_epoch"], []
        for result in metrics["screen"]:
            is_best = result["epoch"] == best
            label = f"epoch {result['epoch']}  score {result['score']:.3f}" + "  best" * is_best
            screened.append((scores / f"epoch-{result['epoch']:06d}", label, is_best))
        label = f"epoch {best}  score {with_error(metrics)}  on other prompts and seeds: the trial's score"
        sheet = self._draw(plan, {"screen": screened, "confirm": [(scores / "confirm", label, True)]})
        write_atomically(self.file, functools.partial(sheet.save, format="JPEG", quality=80))

    def _draw(self, plan: Mapping[str, Any], rows: Mapping[str, Sequence[tuple[Path, str, bool]]]) -> Any:
        """Each stage's prompts, and below them its rows: folder of the pictures, label, whether it is the best one."""
        from PIL import Image, ImageDraw, ImageFont

        sheet = Image.new("RGB", (SHEET_WIDTH, SHEET_HEIGHT), "white")
        draw = ImageDraw.Draw(sheet)
        draw.font = ImageFont.load_default(13)  # has most of the prompts' characters
        right = top = 0
        highest = min(SHEET_TILE, SHEET_HEIGHT // (len(rows["screen"]) + 2) - 2 * SHEET_LINE)
        for stage in rows:
            jobs = first_seeds(plan[stage], SHEET_COLUMNS)
            side = min(highest, (SHEET_WIDTH - SHEET_GAP) // len(jobs) - SHEET_GAP)
            columns = [(SHEET_GAP + number * (side + SHEET_GAP), job) for number, job in enumerate(jobs)]
            for left, job in columns:
                lines = textwrap.wrap(printable(job["prompt"]), max(4, side // 7), max_lines=3, placeholder=" ...")
                draw.text((left, top + SHEET_GAP + SHEET_LINE * (3 - len(lines))), "\n".join(lines), fill=_BLACK)
            top += 3 * SHEET_LINE + SHEET_GAP
            for folder, label, is_best in rows[stage]:
                draw.text((SHEET_GAP, top), label, fill=_GREEN if is_best else _BLACK)
                top += SHEET_LINE
                for left, job in columns:
                    tile = self._tile(folder / f"{job['name']}.png", side, _GREEN if is_best else "white")
                    sheet.paste(tile, (left - 2, top - 2))
                top += side + SHEET_GAP
            right = max(right, columns[-1][0] + side + SHEET_GAP)
        return sheet.crop((0, 0, right, top))

    @staticmethod
    def _tile(file: Path, side: int, frame: Any) -> Any:
        """A picture, `side` pixels wide and high, in a frame of 2 pixels; a cross where there is none."""
        from PIL import Image, ImageDraw, ImageOps

        try:
            with Image.open(file) as picture:
                enlarged = Image.Resampling.NEAREST if max(picture.size) < side else Image.Resampling.BICUBIC
                tile = ImageOps.pad(picture.convert("RGB"), (side, side), enlarged, "white")
        except (OSError, ValueError):  # not there, or torn
            tile = Image.new("RGB", (side, side), _GREY)
            ImageDraw.Draw(tile).line(((0, 0), (side, side), (side, 0), (0, side)), fill=_BLACK)
        return ImageOps.expand(tile, 2, frame)

    def content(self) -> bytes:
        if not self.file.is_file():
            self.make()
        return self.file.read_bytes()

    @staticmethod
    def attached_to(trial: optuna.Trial | FrozenTrial, storage: optuna.storages.BaseStorage) -> list[str]:
        """Names in artifacts/ of a trial's contact sheets: one, or none yet. A user may attach other files."""
        attached = optuna.artifacts.get_all_artifact_meta(trial, storage=storage)
        return [artifact.artifact_id for artifact in attached if artifact.filename == CONTACT_SHEET]

    def attach_to(self, trial: optuna.Trial) -> None:
        """Before the trial is told its score: Optuna lets nothing be added to a finished trial."""
        artifacts, content = self.folder.parent / ARTIFACTS, self.content()
        known = self.attached_to(trial, trial.storage)
        for artifact in known:  # by an earlier attempt
            write_atomically(artifacts / artifact, content)
        if not known:
            artifacts.mkdir(exist_ok=True)
            store = optuna.artifacts.FileSystemArtifactStore(base_path=artifacts)
            optuna.artifacts.upload_artifact(artifact_store=store, file_path=str(self.file), study_or_trial=trial)

    def restore(self, trial: FrozenTrial, storage: optuna.storages.BaseStorage, artifacts: Path) -> None:
        """Write the attached file again if it is missing, from the trial's pictures if need be."""
        for artifact in self.attached_to(trial, storage):
            if not (artifacts / artifact).exists() and self.file.parent.is_dir():
                write_atomically(artifacts / artifact, self.content())


# ======================================================================================================
# 9. Objective: binds settings, trainer and scorer. Touches the trial's folder and its attributes.
# ======================================================================================================

PARENT_HOLDS_FOLDER = "LORA_SEARCH_HOLDS_FOLDER"  # in the scoring process's environment
SECONDS_PER_LINE = 10.0  # between two lines that count images, where there is no live region


class ScoringProgress(ProcessOutput):
    """Reads the scoring process's output: says its lines, and counts the images that are made."""

    bar_name = "images"

    def __init__(self) -> None:
        super().__init__()
        self._said = time.monotonic()
        screen.show("score", "starting: the models are loaded")

    def read_bar(self, bar: re.Match[str]) -> None:
        super().read_bar(bar)
        screen.show("score", f"{self.step} of {self.steps} images", self.step, self.steps)
        if time.monotonic() - self._said > SECONDS_PER_LINE:
            self._said = time.monotonic()
            say(f"  images {self.step} of {self.steps}", detail=True)

    def read_line(self, line: str) -> None:
        if line.startswith(("  ", "warning: ")):  # not a library's lines; score_in_child says why it stopped
            say(line, detail=not line.startswith("  note: "))


def score_in_child(folder: Path, device: str, stall_minutes: float = 30.0) -> None:
    """Have a child process do what score_folder does, so that this program never touches CUDA."""
    progress = ScoringProgress()

    def watch() -> None:
        minutes = STARTING_ALLOWANCE * stall_minutes  # a batch on the CPU may take half an hour
        if time.monotonic() - progress.last_sign > 60 * minutes:
            raise ScoringFailed(f"scoring said nothing for {minutes:g} minutes and was stopped (--stall-minutes)")

    command = [sys.executable, str(Path(__file__).resolve()), "--score", str(folder)]
    command += ["--device", device.partition(":")[0]]  # the child sees one card alone, whose number is then 0
    child = ChildProcess(command, device, **{PARENT_HOLDS_FOLDER: "1"})
    status = child.run(progress.read, watch, folder / "scoring.log")
    if status != 0:
        progress.refuse_full_disk()
        ended = KILLED if status == -signal.SIGKILL else f"ended with status {status}: {progress.error()}"
        raise ScoringFailed(f"scoring {ended}")


def params_of(trial: optuna.Trial | FrozenTrial) -> Params:
    """All that a trial is trained with; only what was suggested, where it has not come to that."""
    return trial.user_attrs.get("training_params", trial.params)


@dataclass
class EarlyStopping:
    """Ends trainings that are unlikely to win: the trainer waits once, while its checkpoints so far are screened."""

    settings: Mapping[str, float]  # [stop_early] of the scoring config
    save_every: int  # epochs
    scorer: Callable[[Path], None]
    has_failed: bool = False  # in this run, which then trains everything whole

    def pruner(self) -> optuna.pruners.BasePruner:
        """Keeps what is among the best whole trainings, by the best score so far at the same share of the epochs."""
        whole = max(1, int(self.settings["whole_trials"]))
        return optuna.pruners.PercentilePruner(self.settings["keep_percent"], n_startup_trials=0, n_min_trials=whole)

    def pause(self, trial: optuna.Trial, folder: Path) -> Pause | None:
        """Where the training is judged: at its last checkpoint up to `at_percent`, if enough others are whole."""
        epochs = params_of(trial)["max_train_epochs"]
        epoch = int(epochs * self.settings["at_percent"] / 100) // self.save_every * self.save_every
        if self.has_failed or len(self._others(trial)) < self.settings["whole_trials"] or not 0 < epoch < epochs:
            return None
        checkpoint = folder / f"{LORA_NAME}-{epoch:06d}.safetensors"
        return Pause(checkpoint, functools.partial(self.judge, trial, folder, epoch))

    def _others(self, trial: optuna.Trial) -> list[float]:
        """What whole trainings had at the same share of their epochs."""
        trials = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = (other.intermediate_values.get(int(self.settings["at_percent"])) for other in trials)
        return [value for value in values if value is not None]

    def judge(self, trial: optuna.Trial, folder: Path, epoch: int, training_seconds: float) -> None:
        """While the trainer waits: screen what it has saved, and StoppedEarly if that is too bad to go on."""
        started, epochs = time.monotonic(), params_of(trial)["max_train_epochs"]
        screen.show("train", f"epoch {epoch}/{epochs}  paused", epoch, epochs)
        say(f"  epoch {epoch}/{epochs}: the trainer is paused, and its checkpoints are screened", detail=True)
        try:
            self.scorer(folder)
            if (found := read_json(folder / "scores" / SCREENED)) is None:
                raise ScoringFailed(f"screening left no {SCREENED}")
        except ScoringFailed as error:
            self.has_failed = True
            say(f"warning: no more trainings are stopped early in this run, since screening failed: {one_line(error)}")
            return
        finally:
            seconds = round(time.monotonic() - started, 1)
            trial.set_user_attr("screening_seconds", seconds)
        screen.show("score", "-")
        self.report(trial, found["screen"], int(self.settings["at_percent"]))
        if trial.should_prune():
            kept, others = self.settings["keep_percent"], self._others(trial)
            best, limit = max(result["score"] for result in found["screen"]), np.percentile(others, 100 - kept)
            reason = f"its best score up to epoch {epoch} of {epochs} was {best:.3f}, "
            reason += f"below {limit:.3f}, which {kept:g}% of {len(others)} whole trainings had by then"
            spent = {"training_seconds": round(training_seconds, 1), "scoring_seconds": seconds}
            trial.set_user_attr("stopped", {**spent, "stopped_epoch": epoch, "best_so_far": best, "reason": reason})
            raise StoppedEarly(reason)

    @staticmethod
    def report(trial: optuna.Trial, screened: Sequence[Mapping[str, Any]], until: int = 100) -> None:
        """Report the best screening score so far at each tenth of the epochs, up to `until` percent.

        So trainings of 12, 16 and 20 epochs compare at the same step. What was reported before stays, as Optuna has it.
        """
        epochs = params_of(trial)["max_train_epochs"]
        known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for percent in sorted(set(range(CURVE_STEP, until + 1, CURVE_STEP)) - known.keys()):
            scores = [result["score"] for result in screened if 100 * result["epoch"] <= percent * epochs]
            if scores:
                trial.report(max(scores), step=percent)


@dataclass(frozen=True)
class LoraObjective:
    """Optuna's objective: the score in [0, 1] of the LoRA that a trial's parameters make."""

    settings: Settings
    options: Mapping[str, Any]
    # Gives seconds of the training, of a step.
    trainer: Callable[[Path, float | None, Pause | None], tuple[float, float | None]]
    scorer: Callable[[Path], None]
    early_stopping: EarlyStopping | None = None
    space: SearchSpace = V2_1

    def __call__(self, trial: optuna.Trial) -> float:
        params = suggest_hyperparameters(trial, self.space)
        trial.set_user_attr("training_params", params)
        checkpoint = self.train_lora(trial, params)
        return self.score_checkpoints(trial, checkpoint.parent)

    def train_lora(self, trial: optuna.Trial, params: Params) -> Path:
        """Train with `params`, unless an earlier attempt has done it; the path of the last checkpoint.

        Raises optuna.TrialPruned for unsafe parameters, before anything is made, and TrialFailed as the trainer does.
        """
        is_valid, rejection_reason = may_train(params, self.space)
        if not is_valid:
            say(f"\n❌ TRIAL REJECTED: {rejection_reason}")
            say(f"Parameters: {json.dumps(params, indent=2)}\n", detail=True)
            raise optuna.TrialPruned(rejection_reason)

        if stopped := trial.user_attrs.get("stopped"):  # its program was killed before it told the study
            raise StoppedEarly(stopped["reason"])
        folder = trial_folder(self.settings.output_dir, trial.number)
        checkpoint = folder / f"{LORA_NAME}.safetensors"
        screen.begin(str(trial.number), *brief_params(params))
        say(f"\nTrial {trial.number}: {folder}\n{describe_params(params)}", detail=True)
        config = self._write_config(folder, params)
        if trial.user_attrs.get("training_seconds") is not None and checkpoint.is_file():
            screen.show("train", "already done", 1)
            say("  already trained; only the scoring is done again", detail=True)
            return checkpoint
        for name in ("training_seconds", "screening_seconds"):
            trial.set_user_attr(name, None)
        self._clear(folder)
        batches = params["gradient_accumulation_steps"]  # a step
        trials = trial.study.get_trials(deepcopy=False)
        known = [seconds for other in trials if (seconds := other.user_attrs.get("batch_seconds"))]
        usual_step = batches * float(np.median(known)) if len(known) >= 3 else None
        pause = self.early_stopping.pause(trial, folder) if self.early_stopping else None
        seconds, step_seconds = self.trainer(config, usual_step, pause)
        trial.set_user_attr("batch_seconds", step_seconds and step_seconds / batches)
        trial.set_user_attr("training_seconds", round(seconds, 1))
        return checkpoint

    def _write_config(self, folder: Path, params: Params) -> Path:
        """Write config.toml and params.json into the trial's folder, which is new or of an earlier attempt."""
        folder.mkdir(exist_ok=True)
        if any(folder.glob("[!.]*")) and read_json(folder / "params.json") != params:
            raise FileExistsError(errno.EEXIST, "there are files of something else; move them away", str(folder))
        dataset_config = self.settings.reference / "dataset.toml"
        config = trial_config(params, self.options, self.settings.base_model, dataset_config, folder)
        write_json(folder / "params.json", params)
        write_toml(folder / "config.toml", config)
        return folder / "config.toml"

    def _clear(self, folder: Path) -> None:
        """Remove what a broken training left, so that nothing stale is judged, scored or shown. Its log is kept."""
        for file in (*checkpoint_files(folder), folder / "metrics.json", *folder.glob(".*.tmp")):
            file.unlink(missing_ok=True)
        for name in ("logs", "scores"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / "training.log").is_file():
            (folder / "training.log").replace(folder / "training.earlier.log")

    def score_checkpoints(self, trial: optuna.Trial, folder: Path) -> float:
        """The score in a trial's metrics.json, which the scoring process makes where there is none yet."""
        if read_json(folder / "metrics.json") is None:
            self.scorer(folder)
        metrics = read_json(folder / "metrics.json")
        if metrics is None:
            raise ScoringFailed(f"scoring left no {folder / 'metrics.json'}; see scoring.log there")
        screening_seconds = trial.user_attrs.get("screening_seconds") or 0.0
        trial.set_user_attr("scoring_seconds", metrics["scoring_seconds"] + screening_seconds)
        if not math.isfinite(metrics["score"]):  # Optuna would make a failure of it, without a reason
            raise ScoringFailed(f"the score is {metrics['score']}; check [encoders] in the scoring config")
        for name in ("best_epoch", "checkpoint", "terms", "standard_error"):
            trial.set_user_attr(name, metrics[name])
        trial.set_user_attr("ended", "scored")
        EarlyStopping.report(trial, metrics["screen"])
        with only_warning(f"trial {trial.number} has no contact sheet in optuna-dashboard"):
            ContactSheet(folder).attach_to(trial)
        return metrics["score"]


def trial_folder(output_dir: Path, number: int) -> Path:
    return output_dir / f"trial_{number:04d}"


# ======================================================================================================
# 10. Study: storage, lock, fingerprint, resume, what counts as a trial, stopping, workers. Touches the database, the
#     output folder's lock and id and, of a trial's folder, what is spare or stale.
# ======================================================================================================

SQLITE_LOCK_SECONDS = 60
EQUAL_FAILURES = 3  # in a row stop the search
INTERRUPTED = "interrupted"  # the `ended` of a RUNNING trial on which no program works, and of one that was given up
POLL_SECONDS = 10  # between looks at the trials of other programs
UNCLAIMED_SECONDS = 600  # claiming takes milliseconds; clocks of machines that share a study may differ
KEPT_TRIALS = 10  # whose best checkpoint is kept
ANCHOR_TOLERANCE = 0.01  # fp16 on another card moves an anchor in [0, 1] by less
GREY_TOLERANCE = 1.0  # and one in 0..255
FINALISTS_AT_LEAST, FINALISTS_AT_MOST = 3, 5
STUDY_FORM = ("form of the study", 2)  # in form 1 an interrupted trial was closed, and a copy of it tried
ANOTHER_STUDY = "give another --output-dir (with --storage another --study-name, too)"
TOGETHER = "which goes with which"  # in the fingerprint
Places = Mapping[int, Mapping[str, Any]]  # what final_places() tells, by trial


def default_storage(output_dir: Path) -> str:
    return f"sqlite:///{output_dir / DATABASE_NAME}"


# An address that can be read in one way only. In any other, each part may belong to the password.
_CLEAR_ADDRESS = re.compile(
    r"(?P<kind>\w+(\+\w+)?://)(?P<who>[\w.~%-]+(:[\w.~%-]*)?@)?(?P<host>[\w.-]+)(:\d{1,5})?(?P<name>/[\w.-]+)"
    r"(\?(sslmode|charset)=[\w-]+)?"
)
_KNOWN_KIND = re.compile(r"(sqlite|postgres|postgresql|mysql|mariadb|mssql|oracle|journal|grpc|redis)(?=[:+])")


@dataclass(frozen=True)
class Storage:
    """The database of a study, by the URL that --storage gives."""

    url: str

    @property
    def file(self) -> Path | None:
        """The file of a URL such as sqlite:///study.db; None for a server, and for what is kept in memory."""
        default = rf".*/{DATABASE_NAME}"  # in a folder of any name, which may hold a ?
        found = re.fullmatch(rf"sqlite(?:\+pysqlite)?:///(?!file:|:memory:)((?s:{default})|[^?]+)", self.url)
        return Path(found[1]) if found else None

    def _engine(self) -> tuple[str, dict[str, Any]]:
        """URL and arguments of an engine. SQLAlchemy and Optuna would misread %, ? and {} in a file's name."""
        if self.file is None:
            return self.url, {}
        options = {"timeout": SQLITE_LOCK_SECONDS, "check_same_thread": False, "isolation_level": None}
        return "sqlite:///study.db", {"creator": functools.partial(sqlite3.connect, self.file, **options)}

    def tables(self) -> set[str]:
        """The tables in the database. Makes none, and no file."""
        import sqlalchemy

        if self.file and not self.file.exists():
            return set()
        url, arguments = self._engine()
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, **arguments)
        return set(sqlalchemy.inspect(engine).get_table_names())

    def open(self) -> optuna.storages.BaseStorage:
        """Optuna's storage. Without BEGIN IMMEDIATE, two programs take the same enqueued trial (35 of 200 measured)."""
        from sqlalchemy import event

        is_made = "alembic_version" in self.tables()  # else Optuna would add tables to an older version's
        url, arguments = self._engine()
        storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments, skip_table_creation=is_made)
        if self.file:
            event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return storage

    def describe_error(self, error: BaseException) -> str:
        """What an exception says; its type alone where the text may hold a part of a password."""
        error = error.__cause__ or error
        return type(error).__name__ if self.shown.endswith("***") else one_line(error, 160)

    @property
    def shown(self) -> str:
        """What may be shown of it: a file; a database's kind, host and name; of an unclear address its kind alone."""
        file = self.file or re.fullmatch(r"[\w./~-]+", self.url)
        if file and ("@" not in self.url or self.url.endswith(f"/{DATABASE_NAME}")):
            return self.url
        if clear := _CLEAR_ADDRESS.fullmatch(self.url):
            return f"{clear['kind']}{'***@' if clear['who'] else ''}{clear['host']}{clear['name']}"
        kind = _KNOWN_KIND.match(self.url)
        return f"{kind[0]}://***" if kind else "***"

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn whatever is raised while the storage is opened into RefusedInput."""
        from sqlalchemy.exc import ArgumentError

        where = self.shown
        try:
            yield
        except RefusedInput:
            raise
        except Exception as error:
            said = f"can't open {where} ({self.describe_error(error)}); "
            if "storage upgrade" in str(error):
                said = f"{where} was made by an older Optuna; optuna storage upgrade --storage {where}"
            elif "updating optuna" in str(error):
                said = f"{where} was made by a newer Optuna than {optuna.__version__}; pip install -U optuna"
            elif self.file:
                said += "if another program holds it, wait; else restore the file or give another one"
            elif isinstance(error, ArgumentError):
                said = f"{where} is no address of a database; give sqlite:///FILE or, for several machines, "
                said += "postgresql+psycopg://USER:PASSWORD@HOST/NAME, the password percent-encoded (@ is %40); "
                said += "no journal file, no gRPC"
            elif isinstance(error, ImportError):
                said += 'pip install its driver: "psycopg[binary]" for postgresql+psycopg, pymysql for mysql+pymysql'
            else:
                said += "check the server and the address, whose password must be percent-encoded (@ is %40)"
            raise RefusedInput(f"--storage: {said}") from error


def load_study(storage: str, study_name: str) -> optuna.Study | None:
    """A study that exists, or None; makes nothing. RefusedInput if it can't be read, or is not this program's."""
    database = Storage(storage)
    with database.refusing():
        for place in (database.file, database.file.parent) if database.file else ():
            if place.exists() and not os.access(place, os.W_OK):
                remedy = "make it writable, or copy its folder"
                raise RefusedInput(f"--storage: {database.shown} is not for this user to write; {remedy}")
        tables = database.tables()
        if database.file and tables and not tables >= {"studies", "trials", "version_info"}:
            raise ValueError("it is the database of another program")
        if "alembic_version" not in tables:
            return None
        try:
            study = optuna.load_study(study_name=study_name, storage=database.open())
        except KeyError:
            return None
        refuse_foreign_study(study)
        return study


def refuse_foreign_study(study: optuna.Study) -> None:
    """RefusedInput for another program's study. An empty one may be ours, killed before it had a fingerprint."""
    is_new = not study.user_attrs and not study.get_trials(deepcopy=False)
    is_ours = is_new or isinstance(study.user_attrs.get("fingerprint"), dict)
    if not is_ours or study.directions != [optuna.study.StudyDirection.MAXIMIZE]:
        raise RefusedInput(f"--storage: study {study.study_name!r} is not this program's; give another --study-name")


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """An output folder belongs to one running program; RefusedInput names the one that holds it already."""
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            in_use = f"{folder} is in use by {file.read().strip() or 'another program'}"
            raise RefusedInput(f"{in_use}; wait for it, or give another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether a program holds it, or may hold it, where this user can't see that; changes nothing."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))


def fingerprint_differences(old: Any, new: Any, name: str = "", *, tolerance: float = 0.0) -> list[str]:
    """`name: was X, is now Y` for each setting that differs (numbers by more than `tolerance`)."""
    if isinstance(old, list) and isinstance(new, list):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        if old != new and not (gone and come):
            said = f"has {one_line(come, 80)} besides" if come else f"lacks {one_line(gone, 80)}"
            return [f"{name}: {said if gone or come else 'has another order or number of the same'} now"]
        old, new = gone, come
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{name}, {key}" if name else key
            lines += fingerprint_differences(old.get(key), new.get(key), inner, tolerance=tolerance)
        return lines
    are_numbers = isinstance(old, float) and isinstance(new, float)
    is_same = math.isclose(old, new, rel_tol=0, abs_tol=tolerance) if are_numbers else old == new
    return [] if is_same else [f"{name}: was {one_line(old, 80)}, is now {one_line(new, 80)}"]


def check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """RefusedInput names every difference between the study's inputs and the ones given now."""
    as_given = json.loads(json.dumps(fingerprint))
    stored = study.user_attrs.get("fingerprint", as_given)
    versions = (STUDY_FORM[0], SCORE_DEFINITION[0])
    if made := fingerprint_differences(*({name: one.get(name) for name in versions} for one in (stored, as_given))):
        said = f"study {study.study_name!r} was made by another version of this program, and only that can resume it"
        known = "--report still shows it, --enqueue FOLDER begins with its best settings"
        raise RefusedInput(f"{said} ({made[0]}); {ANOTHER_STUDY}. {known}")
    spaces = [isinstance(one.get("search space"), dict) for one in (stored, as_given)]
    if spaces[0] != spaces[1]:
        of = ["that of a --search-space file" if is_file else "V2.1" for is_file in spaces]
        stored, as_given = ({**one, "search space": name} for one, name in zip((stored, as_given), of, strict=True))
    differences = fingerprint_differences(stored, as_given)
    differences = [line for line in differences if TOGETHER not in line] or differences
    said = f"study {study.study_name!r} was made with other inputs"
    remedy = f"its scores would not be comparable; restore it, or {ANOTHER_STUDY}"
    if not any(map(is_trained, study.get_trials(deepcopy=False))):
        remedy = "nothing is trained in it yet: delete its --output-dir; with --storage give another --study-name, too"
    if differences:
        raise RefusedInput(*(f"{said}: {difference}; {remedy}" for difference in differences))


def is_trained(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards --n-trials: its training ended, well, diverged or stopped early."""
    if trial.state == TrialState.PRUNED:
        return trial.user_attrs.get("ended") in (Diverged.ended, StoppedEarly.ended)
    return trial.state == TrialState.COMPLETE


def is_at_work(trial: FrozenTrial) -> bool:
    """Whether a program works on it. An interrupted trial stays RUNNING, but nobody does."""
    return trial.state == TrialState.RUNNING and trial.user_attrs.get("ended") != INTERRUPTED


def scored_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with a score, best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: (-(trial.value or 0.0), trial.number))


def ranked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with a score, best first; where the final stage has decided, its order comes before the values."""
    scored, places = scored_trials(study), final_places(study)
    return sorted(scored, key=lambda trial: places[trial.number]["place"] if trial.number in places else len(places))


def final_places(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """What the final stage found of each finalist, by trial; {} before it, and while trials were scored since."""
    final = study.user_attrs.get("final", {})
    if final.get("scored") != len(scored_trials(study)):
        return {}
    return {found["trial"]: {**found, "place": place} for place, found in enumerate(final["finalists"])}


def last_winner(study: optuna.Study) -> int | None:
    """The trial that the last final stage decided for, also where trials were scored since."""
    return next((found["trial"] for found in study.user_attrs.get("final", {}).get("finalists", [])), None)


def choose_finalists(study: optuna.Study, output_dir: Path) -> dict[str, str]:
    """The finalists' checkpoints, by trial number: the three best, and the next two if they may be as good as the best.

    That is, within two standard errors of the difference. Checkpoints must be at hand. An earlier winner comes again.
    """
    scored = [(t, find_trial_folder(t, output_dir) / t.user_attrs["checkpoint"]) for t in scored_trials(study)]
    found = [(trial, path) for trial, path in scored if path.is_file()]
    chosen = {}
    for place, (trial, path) in enumerate(found):
        errors = [one.user_attrs["standard_error"] for one in (found[0][0], trial)]
        is_close = found[0][0].value - trial.value <= 2 * math.hypot(*errors) and place < FINALISTS_AT_MOST
        if place < FINALISTS_AT_LEAST or is_close or trial.number == last_winner(study):
            chosen[str(trial.number)] = str(path)
    return chosen


def find_trial_folder(trial: FrozenTrial, output_dir: Path) -> Path:
    """Where a trial's files are: below output_dir, to which a study may have been moved, else where it was made."""
    here, there = (folder / trial.user_attrs["folder"] for folder in (output_dir, Path(trial.user_attrs["output_dir"])))
    is_anothers = read_json(here / "params.json") not in (None, params_of(trial))  # copied under a wrong number
    return there if is_anothers or (there.is_dir() and not here.is_dir()) else here


@dataclass
class Study:
    """A study in an output folder that this program holds: which trial is next, whose it is, and how it ended.

    All of it is in the database and in the trials' folders, so that a kill at any point loses nothing.
    """

    study: optuna.Study
    settings: Settings
    objective: Callable[[optuna.Trial], float]
    started: float  # when the program was, in time.monotonic()'s seconds
    before_trial: Callable[[], None] = lambda: None  # may raise SearchStopped

    def __post_init__(self) -> None:
        self.has_own_database = Storage(self.settings.storage).file == self.settings.output_dir / DATABASE_NAME
        self.idle_since, self.main = self.started, os.getpid()  # workers on several devices are forks of it
        # Tells this folder from one of the same path on another machine. Copies of the folder take it along.
        file = self.settings.reference / "id"
        if not file.is_file():
            write_atomically(file, uuid.uuid4().hex)
        self.folder_id = file.read_text(encoding="utf-8")
        self.failures: deque[tuple[str, Params]] = deque(maxlen=EQUAL_FAILURES)  # of this run, the last in a row

    def run(self, work: Callable[[], None] | None = None) -> None:
        """Run trials, or have `work` call this on each device, until n_trials are trained; else SearchStopped."""
        try:
            if os.getpid() == self.main:
                self.adopt()
            (work or self._run)()
        except optuna.exceptions.StorageInternalError:
            raise
        except (Exception, KeyboardInterrupt):
            with contextlib.suppress(Exception):  # the user must hear what ended the search
                self.pause()
            raise

    def _run(self) -> None:
        waits_for: list[int] = []
        while True:
            self.close_unclaimed()
            self.delete_spare_checkpoints()
            left_over = self._take_left_over()
            trials = self.study.get_trials(deepcopy=False)
            trained = sum(map(is_trained, trials))
            running = [trial.number for trial in trials if is_at_work(trial)]
            if trained >= self.settings.n_trials and not left_over:
                return
            screen.show("study", ", ".join(self.progress()))
            hours = self.settings.timeout_hours
            if hours is not None and time.monotonic() - self.started >= 3600 * hours:
                said = f"--timeout {hours:g} is over with {trained} of {self.settings.n_trials} trials trained"
                raise SearchStopped(f"{said}; the same command goes on")
            if trained + len(running) >= self.settings.n_trials and not left_over:  # other programs train the rest
                if running != waits_for:
                    say(f"Waiting for trials {running}, which others run in this study.")
                waits_for = running
                screen.begin("of others:", *map(str, running))
                screen.wait(POLL_SECONDS)
                continue
            self.before_trial()
            if trial := self.resume(left_over) if left_over else self._ask():
                self.run_trial(trial)
                self._stop_after_equal_failures()

    # --- whose trial it is ---

    def _is_here(self, trial: FrozenTrial) -> bool:
        """Whether it is in this output folder, so that this program continues it."""
        made_in = trial.user_attrs.get("folder_id", self.folder_id)  # earlier versions did not say
        is_of_path = trial.user_attrs.get("output_dir") == str(self.settings.output_dir)
        return is_of_path and (self.has_own_database or made_in == self.folder_id)

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return self.has_own_database or self._is_here(trial)

    def _left_over(self) -> list[FrozenTrial]:
        """Running trials of this folder but those of living workers on other devices."""
        own = filter(self._is_here, self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        mine = {os.getpid(), self.main}
        return [trial for trial in own if (pid := trial.user_attrs.get("pid")) in mine or when_started(pid) is None]

    def _take_left_over(self) -> optuna.Trial | None:
        with locked([self.settings.output_dir]):  # against the workers on other devices
            for frozen in self._left_over():
                trial = optuna.Trial(self.study, frozen._trial_id)
                self.claim(trial)
                if frozen.user_attrs.get("ended") == INTERRUPTED:
                    trial.set_user_attr("ended", "returning")  # else the others would not count it
                return trial
        return None

    def adopt(self) -> None:
        """Take over trials that a program left RUNNING in this folder; call it only while holding the folder's lock."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            made_in = frozen.user_attrs.get("output_dir")  # elsewhere, if the folder was moved with its database
            if self._is_here(frozen) or (self.has_own_database and not (made_in and is_held(Path(made_in)))):
                self.claim(optuna.Trial(self.study, frozen._trial_id))
                say(f"Trial {frozen.number} was interrupted; it is continued.")

    def claim(self, trial: optuna.Trial) -> None:
        """Write down whose trial it is. The folder's id comes first: a path alone would be that of any machine."""
        trial.set_user_attr("folder_id", self.folder_id)
        trial.set_user_attr("output_dir", str(self.settings.output_dir))
        trial.set_user_attr("folder", trial_folder(self.settings.output_dir, trial.number).name)
        trial.set_user_attr("host", socket.gethostname())
        trial.set_user_attr("pid", os.getpid())

    def close_unclaimed(self) -> None:
        """Close trials that nobody claimed, since their program died (if it only slept, it asks for another one)."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            is_old = time.time() - frozen.datetime_start.timestamp() > UNCLAIMED_SECONDS
            if "output_dir" not in frozen.user_attrs and is_old:
                # Another program may have closed it already.
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
                    self._close(frozen, "its program died as it began")

    def _close(self, frozen: FrozenTrial, reason: str) -> None:
        """Close a trial that is not continued; a user's own parameters are enqueued again."""
        say(f"Trial {frozen.number} is closed: {reason}.")
        self.finish(optuna.Trial(self.study, frozen._trial_id), INTERRUPTED, reason, TrialState.FAIL)
        if fixed := fixed_params(frozen):
            self.study.enqueue_trial(params=fixed, user_attrs={"enqueued": frozen.user_attrs.get("enqueued")})

    def enqueue(self, tables: Sequence[Params]) -> None:
        """Enqueue the user's own parameters; those that were tried add nothing, unless their trial was closed."""
        trials = self.study.get_trials(deepcopy=False)
        closed = (TrialState.FAIL, INTERRUPTED)
        counted = [t for t in trials if (t.state, t.user_attrs.get("ended")) != closed]
        known = [params for trial in counted for params in (fixed_params(trial), trial.params)]
        for table in tables:
            if table not in known:
                known.append(table)
                self.study.enqueue_trial(params=table, user_attrs={"enqueued": True})

    # --- the next trial ---

    def _ask(self) -> optuna.Trial | None:
        """A new trial; None if other programs train the last ones, or closed it while this program slept."""
        with locked([self.settings.output_dir]):  # against the workers on other devices
            trials = self.study.get_trials(deepcopy=False)
            at_work = [t for t in trials if is_at_work(t) or (t.state == TrialState.RUNNING and self._is_here(t))]
            if sum(map(is_trained, trials)) + len(at_work) >= self.settings.n_trials:
                return None
            trial = self.study.ask()
            try:
                self.claim(trial)
            except optuna.exceptions.UpdateFinishedTrialError:
                return None
        return None if self.close_surplus(trial) else trial

    def resume(self, trial: optuna.Trial) -> optuna.Trial | None:
        """Go on with the trial of an earlier attempt; None if other programs train the last ones by now."""
        attrs = trial.user_attrs
        if self.close_surplus(trial):
            return None
        if attrs.get("ended") == "returning":
            trial.set_user_attr("ended", "running")
        lora = trial_folder(self.settings.output_dir, trial.number) / f"{LORA_NAME}.safetensors"
        if attrs.get("training_seconds") is None and has_finished_training(lora.parent):
            seconds = lora.stat().st_mtime - attrs["began"] - (attrs.get("screening_seconds") or 0.0)
            trial.set_user_attr("training_seconds", round(seconds, 1))
        if not (self._is_scored(trial) or "stopped" in attrs):
            self._add_lost_seconds(trial)
        return trial

    def close_surplus(self, trial: optuna.Trial) -> bool:
        """Close a trial if the others suffice: those trained, and those at work before this one began, or returned."""
        trials = self.study.get_trials(deepcopy=False)
        own = trials[trial.number]
        others, returns = [t for t in trials if t.number != own.number], own.user_attrs.get("ended") == "returning"
        turn = own.datetime_start, own.number  # an enqueued trial may begin after one with a higher number
        ahead = [t for t in others if is_at_work(t) and (returns or (t.datetime_start, t.number) < turn)]
        is_surplus = len(ahead) + sum(map(is_trained, others)) >= self.settings.n_trials
        if is_surplus:
            self._close(own, "enough other trials are trained")
        return is_surplus

    def _is_scored(self, trial: optuna.Trial) -> bool:
        """Whether all that is left to do is to tell the score."""
        metrics = read_json(trial_folder(self.settings.output_dir, trial.number) / "metrics.json")
        return trial.user_attrs.get("training_seconds") is not None and metrics is not None

    # --- how it ended ---

    def run_trial(self, trial: optuna.Trial) -> None:
        """Run one trial and tell the study how it ended, if it did."""
        waited = trial.user_attrs.get("waited_seconds", 0.0) + time.monotonic() - self.idle_since
        trial.set_user_attr("waited_seconds", round(waited, 1))
        trial.set_user_attr("began", time.time())  # this attempt of it
        try:
            value = self.objective(trial)
        except optuna.TrialPruned as pruned:
            self.finish(trial, "rejected", str(pruned), TrialState.PRUNED)
        except TrialFailed as error:
            self._fail(trial, error)
        except OSError as error:  # a full or vanished disk: not the parameters' fault
            said = f"{error.strerror or error}: {error.filename or self.settings.output_dir}"
            raise SearchStopped(f"{said}; mend that (a full disk?) and give the same command again") from error
        else:
            self.failures.clear()
            self.study.tell(trial, value)
            progress, done = self.progress()
            scored = with_error({**trial.user_attrs, "score": value})
            said = f"Trial {trial.number} scored {scored}, epoch {trial.user_attrs['best_epoch']}; {progress}"
            say(said if screen.is_live else f"{said}, {done}")
        self.idle_since = time.monotonic()

    def _fail(self, trial: optuna.Trial, error: TrialFailed) -> None:
        """Leave the trial RUNNING for a second attempt, unless it diverged, was stopped early, or failed so before.

        The sampler learns from divergence, early stopping and lack of memory (PRUNED), not from other failures (FAIL).
        """
        say(f"Trial {trial.number} {error.ended}: {one_line(error)}")
        if isinstance(error, (Diverged, StoppedEarly)):
            self.failures.clear()
            self.finish(trial, error.ended, str(error), TrialState.PRUNED)
            return
        was_trained = trial.user_attrs.get("training_seconds") is not None
        folder = trial_folder(self.settings.output_dir, trial.number)
        (folder / "metrics.json").unlink(missing_ok=True)
        if not was_trained:  # else the next start would take it for a finished training
            (folder / f"{LORA_NAME}.safetensors").unlink(missing_ok=True)
        kind, earlier = {"ended": error.ended, "trained": was_trained}, trial.user_attrs.get("failures", [])
        trial.set_user_attr("failures", [*earlier, {**kind, "reason": one_line(error)}])
        is_learnt, is_second = isinstance(error, OutOfMemory), any(kind.items() <= one.items() for one in earlier)
        if not (is_learnt and is_second):  # else two trials that are too large would stop the search
            self.failures.append((f"{error.ended}: {one_line(error)}", trial.params))
        if is_second:
            self.finish(trial, error.ended, str(error), TrialState.PRUNED if is_learnt else TrialState.FAIL)

    def finish(self, trial: optuna.Trial, ended: str, reason: str, state: TrialState) -> None:
        trial.set_user_attr("ended", ended)
        if ended != StoppedEarly.ended:
            self._add_lost_seconds(trial, trial.user_attrs.get("training_seconds") or 0.0)
        trial.set_user_attr("rejection_reason" if ended == "rejected" else "reason", one_line(reason))
        self.study.tell(trial, state=state)

    def _add_lost_seconds(self, trial: optuna.Trial, more: float = 0.0) -> None:
        """Add what the last attempt wasted: from its start, or its training's end, to its newest file."""
        folder, attrs = trial_folder(self.settings.output_dir, trial.number), trial.user_attrs
        since, lora = attrs.get("began", math.inf), folder / f"{LORA_NAME}.safetensors"
        if attrs.get("training_seconds") is not None and lora.is_file():
            since = max(since, lora.stat().st_mtime)
        newest = max((file.stat().st_mtime for file in (*folder.glob("*.*"), *folder.glob("scores/*"))), default=0.0)
        lost = attrs.get("lost_seconds", 0.0) + more + max(0.0, newest - since)
        trial.set_user_attr("lost_seconds", round(lost, 1))

    def pause(self) -> None:
        """Tell the scores that are ready, and mark unfinished trials so that other programs do not wait for them."""
        for frozen in self._left_over():
            if os.getpid() not in (self.main, frozen.user_attrs.get("pid")):
                continue  # no worker's own: the program sees to it once all have ended
            trial = optuna.Trial(self.study, frozen._trial_id)
            if self._is_scored(trial):
                self.run_trial(trial)
            else:
                trial.set_user_attr("ended", INTERRUPTED)
                say(f"Trial {trial.number} was interrupted; the same command continues it.")

    def _stop_after_equal_failures(self) -> None:
        """SearchStopped after three failures in a row that differ in their parameters, and else in numbers alone."""
        alike = {re.sub(r"\d+", "#", reason) for reason, _ in self.failures}
        have_differed = any(params != self.failures[0][1] for _, params in self.failures)
        if len(self.failures) == EQUAL_FAILURES and len(alike) == 1 and have_differed:
            said = "the last three attempts ended alike, so it is the set-up and not the parameters"
            raise SearchStopped(f"{said}: {self.failures[-1][0]}; mend that and give the same command again")

    def decide(self, scorer: Callable[[Path], None]) -> None:
        """Run the final stage between the best trials, unless it is done; the program that has the best one does it."""
        scored, folder = scored_trials(self.study), self.settings.output_dir / FINAL
        finalists = choose_finalists(self.study, self.settings.output_dir)
        about = {"scored": len(scored), "chosen": list(finalists)}
        known = self.study.user_attrs.get("final", {})
        if len(finalists) < 2 or not self._is_ours(scored[0]) or about.items() <= known.items():
            return
        if read_json(folder / FINALISTS) != finalists or read_json(folder / "result.json") is None:
            screen.begin("final stage:", *finalists)
            say(f"The final stage: trials {', '.join(finalists)} once more, on fresh prompts and seeds ...")
            (folder / "result.json").unlink(missing_ok=True)
            write_json(folder / FINALISTS, finalists)
            started = time.monotonic()
            try:
                scorer(folder)
            except ScoringFailed as error:
                raise SearchStopped(f"the final stage failed: {error}; the same command tries it again") from error
            self.study.set_user_attr("final_seconds", round(time.monotonic() - started, 1))
        self.study.set_user_attr("final", {**about, **read_json(folder / "result.json")})

    # --- what is shown, and what is kept ---

    def progress(self) -> tuple[str, str]:
        """How far the study is, with its best score; and when it will be done."""
        trials, planned = self.study.get_trials(deepcopy=False), self.settings.n_trials
        scores = (f"best {trial.value:.3f} (trial {trial.number})" for trial in scored_trials(self.study))
        left = seconds_left(trials, planned)
        end = datetime.datetime.now() + datetime.timedelta(seconds=left or 0)
        done = "end not known yet" if left is None else f"done ~{end:%a %H:%M}"
        return f"{sum(map(is_trained, trials))} of {planned} trained, {next(scores, 'no score yet')}", done

    def delete_spare_checkpoints(self) -> None:
        """Delete the checkpoints of this folder's ended trials, but keep the study's ten best and its last winner."""
        if self.settings.keep_checkpoints == "all":
            return
        # Read before the best ones: what another worker scores in between is then left alone.
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if "ended" in trial.user_attrs]
        scored, winner = scored_trials(self.study), last_winner(self.study)
        kept = scored[:KEPT_TRIALS] + [trial for trial in scored if trial.number == winner]
        names = {trial.number: trial.user_attrs.get("checkpoint") for trial in kept}
        for trial in filter(is_trained, ended):
            if self._is_ours(trial):
                for file in checkpoint_files(trial_folder(self.settings.output_dir, trial.number)):
                    if file.name != names.get(trial.number):
                        file.unlink(missing_ok=True)


@dataclass
class Workers:
    """A fork of this program for each device, which trains one trial at a time of the study that they share.

    What a worker says, this program shows. One that can't go on is left out with its reason, and the others go on; one
    that is killed leaves its trial to them.
    """

    devices: Sequence[str]
    study_on: Callable[[str], Study]

    @property
    def names(self) -> list[str]:
        """The devices, or cpu 1, cpu 2."""
        return [f"{one} {n}" if self.devices.count(one) > 1 else one for n, one in enumerate(self.devices, start=1)]

    def run(self) -> None:
        """Until all have ended; SearchStopped if none of them could go on to the end."""
        context, workers, reasons = multiprocessing.get_context("fork"), {}, []
        try:
            for name, device in zip(self.names, self.devices, strict=True):
                ours, theirs = context.Pipe(duplex=False)
                about = theirs, device, self.study_on(device)
                workers[ours] = context.Process(target=self._work, args=about, name=name, daemon=True)
                workers[ours].start()
                theirs.close()
            while workers:
                for ours in multiprocessing.connection.wait(list(workers), 1.0):
                    what, *about = self._hear(ours, workers[ours])
                    if what != "ended":
                        getattr(screen, what)(*about)
                        continue
                    ended = workers.pop(ours)
                    if about:
                        reasons.append(f"{ended.name} has stopped: {about[0]}")
                        say(reasons[-1])
                screen.refresh()
        finally:
            for process in workers.values():
                process.terminate()
            for process in workers.values():
                process.join(2 * TERMINATION_SECONDS)
                process.kill()
                process.join()
        if len(reasons) == len(self.devices):
            raise SearchStopped(reasons[-1])

    @staticmethod
    def _hear(ours: Any, process: Any) -> tuple[Any, ...]:
        """A method of the screen with its arguments; or that the worker has ended, and why if it was too early."""
        try:
            return ours.recv()
        except (EOFError, OSError):  # a kill may have cut off what it said
            process.join()
            killed = f"it {KILLED}; the same command goes on"
            ended = killed if process.exitcode == -signal.SIGKILL else f"it ended with status {process.exitcode}"
            return ("ended", ended) if process.exitcode else ("ended",)

    def _work(self, tell: Any, device: str, ours: Study) -> None:
        global screen
        os.setsid()  # Ctrl-C is for the program, which then ends its workers
        die_with_parent()
        if os.getppid() != ours.main:  # it has died before
            return
        screen = CardScreen(tell.send, multiprocessing.current_process().name, screen)
        if device == "cpu":
            threads = len(os.sched_getaffinity(0)) // len(self.devices)
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        ours.study._storage._backend.engine.dispose(close=False)  # the program's own connections
        try:
            ours.run()
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, (SearchError, KeyboardInterrupt, optuna.exceptions.StorageInternalError)):
                screen.log(traceback.format_exc())
            storage = Storage(ours.settings.storage)
            told = one_line(error, 1000) if isinstance(error, SearchError) else storage.describe_error(error)
            tell.send(("ended", told or type(error).__name__))


def seconds_left(trials: Sequence[FrozenTrial], n_trials: int) -> float | None:
    """Seconds until the programs at work have trained n_trials, at the median trial's speed; None without a score."""
    scored = [trial.user_attrs for trial in trials if trial.state == TrialState.COMPLETE]
    if not scored:
        return None
    usual = float(np.median([attrs["training_seconds"] + attrs["scoring_seconds"] for attrs in scored]))
    used = [time.time() - t.user_attrs["began"] for t in trials if is_at_work(t) and "began" in t.user_attrs]
    ahead = usual * (n_trials - sum(map(is_trained, trials))) - np.clip(used, 0, usual).sum()
    return max(0.0, float(ahead)) / max(1, len(used))


# ======================================================================================================
# 11. Results: tables, the best LoRA, the report, the dashboard's notes. Writes results/ and artifacts/.
# ======================================================================================================

TERMS = ("fidelity", "text", "preservation", "originality", "variety", "usable")
OPTIMAL_SHARE_OF_BEST = 0.95  # the guide's "optimal configs": within 5% of the best score
QUALITY_FAILURE_BELOW = 0.9  # share of usable images
ALPHA_BANDS = {  # the guide's: lowest and highest ratio, and the share of the trials that it expects
    "low alpha (0.25-0.40)": (0.0, 0.42, "30%"),
    "mid alpha (0.45-0.70)": (0.42, 0.72, "40%"),
    "high alpha (0.75-0.90)": (0.72, math.inf, "30%"),
}
# The table's columns: the head, and how a trial's facts are formatted below it.
TABLE = """
    trial={trial:5d} final={final} score={score:.3f} +-={standard_error:.3f} fidel.={fidelity:6.3f} text={text:.3f}
    pres.={preservation:.3f} orig.={originality:.3f} usable={usable:6.3f} epoch={best_epoch:2d}/{max_train_epochs}
    learning_rate={learning_rate:13.2e} te_lr={text_encoder_lr:.1e} dim={network_dim:3d} alpha={network_alpha:5d}
    optimizer={optimizer_type} scheduler={lr_scheduler} accum={gradient_accumulation_steps:5d}
    warmup={lr_warmup_steps:6g} minutes={minutes:7.1f}
"""
# A training acts about in proportion to alpha ratio x learning rate x updates, which explains half of the variance of a
# score (tests/search_table). Updates are an epoch's batches, the same in all trials, times epochs / accumulation.
DOSE_PARTS = ("network_alpha_ratio", "max_train_epochs", "gradient_accumulation_steps")
REPORT_NAME = "report.html"
DATA_SET_PICTURES = "data_set"  # in reference/
SHOWN_PICTURES = 8
CURVE_POINTS = 100


def facts_of(trial: FrozenTrial, places: Places | None = None) -> dict[str, Any]:
    """What tables and report say of a trial, in one level: its attributes, terms and parameters by their names."""
    attrs = {**trial.user_attrs, **trial.user_attrs.get("stopped", {})}
    found, params = (places or {}).get(trial.number, {}), params_of(trial)
    ratio, epochs, steps = (params.get(name, math.nan) for name in DOSE_PARTS)
    trained = attrs.get("stopped_epoch", math.nan) / epochs
    return {
        # An earlier version has not measured all, and text encoders may not be trained.
        **dict.fromkeys((*TERMS, "standard_error", "text_encoder_lr"), math.nan),
        "final": with_error(found) if found else "-",
        **{f"final_{name}": found.get(name) for name in ("score", "standard_error")},
        "trial": trial.number,
        "state": trial.state.name,
        "score": trial.value if trial.state == TrialState.COMPLETE else None,  # Optuna gives a pruned one its last
        "outcome": attrs.get("ended", trial.state.name.lower()),
        "why": attrs.get("rejection_reason") or attrs.get("reason") or "",
        "saved_seconds": attrs["training_seconds"] * (1 / trained - 1) if "stopped" in attrs else 0.0,
        "minutes": sum(attrs.get(name) or 0 for name in ("training_seconds", "scoring_seconds")) / 60,
        **attrs,
        **attrs.get("terms", {}),
        **params,
        "brief": brief_params(params) if "training_params" in attrs and not missing_params(params) else [],
        "dose": ratio * params.get("learning_rate", math.nan) * epochs / steps,
        "text_encoder_dose": ratio * params.get("text_encoder_lr", math.nan) * epochs / steps,
    }


def measure_improvements(study: optuna.Study) -> list[tuple[str, int, int, str]]:
    """The guide's expected improvements: name, the part and the whole that this study measured, and the target."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    proposals = [t.user_attrs.get("ended") for t in trials if "enqueued" not in t.user_attrs]
    trained = [facts_of(t) for t in trials if is_trained(t)]
    outcomes, ratios = ([facts[name] for facts in trained] for name in ("outcome", "network_alpha_ratio"))
    stable, judged = (len(trained) - outcomes.count(ended) for ended in (Diverged.ended, StoppedEarly.ended))
    scored = [facts_of(t) for t in scored_trials(study)]
    failures = sum(facts["usable"] < QUALITY_FAILURE_BELOW for facts in scored)
    optimal = sum(facts["score"] >= OPTIMAL_SHARE_OF_BEST * scored[0]["score"] for facts in scored)
    space = study.user_attrs.get("fingerprint", {}).get("search space")
    dealt = ALPHA_BANDS if not isinstance(space, dict) or space["alpha_bands"] else {}
    bands = ((name, sum(low < ratio <= high for ratio in ratios), of) for name, (low, high, of) in dealt.items())
    return [
        ("rejected proposals", proposals.count("rejected"), len(proposals), "< 10%"),
        ("stable trainings", stable, len(trained), "80-90%"),
        ("quality failures (usable < 0.9)", failures, judged, "< 10%"),
        ("optimal (within 5% of the best)", optimal, judged, "30-40%"),
        *((name, part, len(trained), expected) for name, part, expected in bands),
    ]


def describe_study(study: optuna.Study) -> str:
    """The table of the trials, best first, how the others ended, and the measured improvements."""
    others = [facts_of(t) for t in study.get_trials(deepcopy=False) if t.state != TrialState.COMPLETE]
    ended = ", ".join(f"{count} {name}" for name, count in Counter(facts["outcome"] for facts in others).items())
    places = final_places(study)
    ranked = [facts_of(trial, places) for trial in ranked_trials(study)]
    if not ranked:
        reasons = [facts["why"] for facts in others if facts["why"]]
        last = f" The last one: {reasons[-1]}" if reasons else ""
        return f"Nothing was scored yet in study {study.study_name!r}: {ended or 'it has no trials'}.{last}"
    heads, cells = zip(*(column.split("=") for column in TABLE.split()), strict=True)
    dashed = functools.partial(re.sub, r"\bnan$", "-")  # such as text_encoder_lr where none is trained
    rows = [heads, *([dashed(cell.format(**facts)) for cell in cells] for facts in ranked)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"\nStudy {study.study_name!r}, best first:", *("  ".join(map(str.ljust, row, widths)) for row in rows)]
    if ended:
        lines.append(f"Without a score: {ended} (results/trials.csv says why)")
    if saved := sum(facts["saved_seconds"] for facts in others):
        lines.append(f"Early stopping saved about {saved / 60:.0f} min of training")
    lines += ["", "Expected improvements, measured:"]
    for name, part, whole, target in measure_improvements(study):
        lines.append(f"  {name:33s}{100 * part / max(whole, 1):4.0f}%  ({part} of {whole}; expected {target})")
    return "\n".join(lines)


# --- the blind comparison in the report, and what its votes say ---

VOTES_NAME = "votes.json"  # in results/, where the user puts what the report saved
COMPARED_TRIALS = 8  # 28 pairs
VOTES = {"left": 1, "equal": 0, "right": -1}  # a vote as the sign of left minus right
Z_95 = 1.96  # 95% of a normal distribution are within so many standard deviations
Vote = Mapping[str, Any]  # "left" and "right": numbers of trials; "vote": one of VOTES


@dataclass(frozen=True)
class Comparison:
    """Scored trials in pairs for the user's eye, and what the votes say."""

    trials: Sequence[FrozenTrial]
    places: Places

    def values(self, *pair: int) -> list[dict[str, Any]]:
        """Score and terms of two trials: of the final stage if both were in it, else of the confirmation."""
        if self.places.keys() >= {*pair}:
            return [{**self.places[number]["terms"], "score": self.places[number]["score"]} for number in pair]
        by_number = {trial.number: trial for trial in self.trials}
        return [facts_of(by_number[number]) for number in pair]

    def pairs(self) -> list[list[int]]:
        """All pairs, the closest scores first. Which trial is left is random, but the same in every report."""
        pairs = itertools.combinations(sorted(trial.number for trial in self.trials), 2)

        def gap(pair: tuple[int, int]) -> float:
            left, right = self.values(*pair)
            return abs(left["score"] - right["score"])

        return [np.random.default_rng(pair).permutation(pair).tolist() for pair in sorted(pairs, key=gap)]

    def read_votes(self, path: Path, study_name: str) -> list[Vote]:
        """The votes of a file, [] if there is none. SearchError if it is damaged or not on this study's trials."""
        known = {trial.number for trial in self.trials}

        def is_vote(vote: Any) -> bool:
            trials = [vote.get("left"), vote.get("right")] if isinstance(vote, dict) else []
            are_known = all(type(trial) is int and trial in known for trial in trials) and len(set(trials)) == 2
            return are_known and vote.get("vote") in list(VOTES)

        found = read_json(path) or {} if path.exists() else {"study": study_name, "votes": []}
        votes = found.get("votes")
        if found.get("study") != study_name or not isinstance(votes, list) or not all(map(is_vote, votes)):
            remedy = "take it away, or download it again from the report"
            raise SearchError(f"it is damaged, or not on scored trials of study {study_name!r}; {remedy}")
        return votes

    def agreement(self, votes: Iterable[Vote]) -> dict[str, list[float]]:
        """For score and terms: 1 for a vote for the higher value, 0 for the lower. Draws and equals are left out."""
        agreed: dict[str, list[float]] = {name: [] for name in ("score", *TERMS)}
        for vote in votes:
            left, right = self.values(vote["left"], vote["right"])
            for name, found in agreed.items():
                sign = (left[name] > right[name]) - (left[name] < right[name])  # 0 for NaN, too
                if sign and VOTES[vote["vote"]]:
                    found.append(float(sign == VOTES[vote["vote"]]))
        return agreed

    @staticmethod
    def ranking(votes: Iterable[Vote]) -> dict[str, list[float]]:
        """For each trial, the best first: 1 for a comparison that it won, 0.5 for a draw, 0 for a loss."""
        won: dict[str, list[float]] = {}
        for vote in votes:
            left = (1 + VOTES[vote["vote"]]) / 2
            won.setdefault(f"trial {vote['left']}", []).append(left)
            won.setdefault(f"trial {vote['right']}", []).append(1 - left)
        return dict(sorted(won.items(), key=lambda one: -float(np.mean(one[1]))))

    def describe(self, votes: Sequence[Vote]) -> str:
        """What the user's votes say, and their 95% intervals."""
        lines = [f"Your eye against the score: {len(votes)} votes, with 95% intervals", "Decided votes that agree with"]
        lines += itertools.starmap(describe_share, self.agreement(votes).items())
        lines.append("Comparisons won (a draw is half)")
        lines += itertools.starmap(describe_share, self.ranking(votes).items())
        return "\n".join(lines)


def describe_share(name: str, won: Sequence[float]) -> str:
    """The share of comparisons won, with the 95% interval of Wilson (1927), which holds for few votes, too."""
    if not won:
        return f"  {name:14s}   -"
    share, spread = sum(won) / len(won), Z_95**2 / len(won)
    reach = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (np.clip((share + spread / 2 + side) / (1 + spread), 0, 1) for side in (-reach, reach))
    return f"  {name:14s}{share:4.0%}  ({low:.0%} to {high:.0%}; {sum(won):g} of {len(won)})"


def loss_curve(log_file: Path, epochs: int) -> list[tuple[float, float | None]]:
    """(epoch, average loss) along a training, from kohya's own bars; None for a loss that is not finite."""
    text = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    bars = filter(None, map(_BAR.match, re.split(r"[\r\n]", text)))
    known = [bar for bar in bars if bar["name"] == TrainingProgress.bar_name and bar["loss"]]
    losses = {round(int(bar["step"]) / int(bar["steps"]) * epochs, 3): float(bar["loss"]) for bar in known}
    return _evenly([(epoch, loss if math.isfinite(loss) else None) for epoch, loss in losses.items()], CURVE_POINTS)


class Results:
    """The files in results/, made anew from the study and the trials' folders."""

    def __init__(self, study: optuna.Study, output_dir: Path) -> None:
        self.study, self.output_dir, self.folder = study, output_dir, output_dir / "results"
        self.ranked, self.places = ranked_trials(study), final_places(study)
        # The finalists that can't be told apart from the winner, which comes first.
        self.rivals = [number for number, found in self.places.items() if not found["dropped"]][1:]
        self.votes = ""
        with only_warning(f"{self.folder / VOTES_NAME} is left out"):
            comparison = Comparison(self.ranked, self.places)
            if votes := comparison.read_votes(self.folder / VOTES_NAME, study.study_name):
                self.votes = comparison.describe(votes)

    def write(self) -> None:
        """SearchStopped if the best trial's files are gone; all else is written before."""
        self.write_trials_csv()
        try:
            if self.ranked:
                self.write_best(self.ranked[0])
        finally:
            with only_warning(f"{self.folder / REPORT_NAME} is not written"):
                self.write_report()

    def describe_best(self) -> str:
        """Which trial is best, which may be as good, and where its files are."""
        facts = facts_of(self.ranked[0], self.places)
        said = f"\nBest: trial {facts['trial']}, epoch {facts['best_epoch']}, score {with_error(facts)}"
        if self.places:
            said += f", final {facts['final']}"
            if self.rivals:
                said += f"\n  trials that may be as good: {', '.join(map(str, self.rivals))}; compare their pictures"
            said += f"\n  use it at       strength {self.study.user_attrs['final']['strength']}"
        return (
            f"{said}\n"
            f"  the LoRA        {self.folder / 'best_lora.safetensors'}\n"
            f"  its settings    {self.folder / 'best_config.toml'}\n"
            f"  its pictures    {find_trial_folder(self.ranked[0], self.output_dir) / 'scores' / 'confirm'}\n"
            f"  base model's    {self.output_dir / 'reference' / 'confirm'}\n"
            f"  all trials      {self.folder / 'trials.csv'}\n"
            f"  why, to look at {self.folder / REPORT_NAME}"
        )

    def write_trials_csv(self) -> None:
        about = "trial state score standard_error final_score final_standard_error ended best_epoch training_seconds "
        about += "scoring_seconds stopped_epoch rejection_reason reason host output_dir folder dose text_encoder_dose"
        trials = [facts_of(trial, self.places) for trial in self.study.get_trials(deepcopy=False)]
        others = (name for facts in trials for name in facts.get("training_params", ()))
        columns = dict.fromkeys((*about.split(), *TERMS, *V2_1.searched, *others))
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: value for name, value in facts.items() if value == value} for facts in trials)  # no NaN
        write_atomically(self.folder / "trials.csv", file.getvalue())

    def write_best(self, best: FrozenTrial) -> None:
        """The best LoRA, its parameters, and the config that trains it again. SearchStopped if its files are gone."""
        attrs, folder = best.user_attrs, find_trial_folder(best, self.output_dir)
        checkpoint, copy = folder / attrs["checkpoint"], self.folder / "best_lora.safetensors"
        about = {"study": self.study.study_name, "trial": best.number, "score": best.value}
        about |= {name: attrs[name] for name in ("standard_error",) if name in attrs}  # not in an earlier version's
        if self.places:
            about |= {f"final_{name}": self.places[best.number][name] for name in ("score", "standard_error")}
            about["strength"] = self.study.user_attrs["final"]["strength"]
        try:
            lora = self._labelled(checkpoint, {**about, "epoch": attrs["best_epoch"]})
            config = toml.loads((folder / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            known = read_json(self.folder / "best_parameters.json") or {}
            if copy.is_file() and {"study": self.study.study_name, "trial": best.number}.items() <= known.items():
                say(f"warning: trial {best.number} is not whole in {folder}; its LoRA stays in {self.folder}")
                return
            back = f"bring them back from {attrs['host']}:{attrs['output_dir']} and give --report again"
            others = (find_trial_folder(t, self.output_dir) / t.user_attrs["checkpoint"] for t in self.ranked)
            next_best = next((f", or take {path.parent.name}, the next best" for path in others if path.is_file()), "")
            raise SearchStopped(f"the best trial's files are not whole in {folder}; {back}{next_best}") from error
        if not (copy.is_file() and copy.read_bytes() == lora):
            write_atomically(copy, lora)
        kept = {"best_epoch": attrs["best_epoch"], "checkpoint": str(checkpoint), "terms": attrs["terms"]}
        write_json(self.folder / "best_parameters.json", {**about, **kept, "parameters": attrs["training_params"]})
        self._write_best_config(best, folder, config)

    def _write_best_config(self, best: FrozenTrial, folder: Path, config: dict[str, Any]) -> None:
        """The best trial's config, changed so that it trains into a folder in results/, with a data set file there."""
        retrained = self.folder / f"retrained_{folder.name}"
        data_set, path = self.folder / "dataset.toml", self.folder / "best_config.toml"
        if (dataset_config := folder.parent / "reference" / "dataset.toml").is_file():
            write_atomically(data_set, dataset_config.read_bytes())
            config["dataset_config"] = str(data_set)
        config.update(output_dir=str(retrained), logging_dir=str(retrained / "logs"))
        epoch, checkpoint = best.user_attrs["best_epoch"], best.user_attrs["checkpoint"]
        family = family_of(read_json(folder.parent / "reference" / "plan.json") or {})
        comment = (
            f"# Trial {best.number}, score {best.value:.3f}. Train it again:\n"
            f"#     python {family.script} --config_file {shlex.quote(str(path))}\n"
            f"# and take epoch {epoch} of {config['max_train_epochs']}: {retrained / checkpoint}\n\n"
        )
        write_toml(path, config, comment)

    @staticmethod
    def _labelled(checkpoint: Path, labels: Mapping[str, object]) -> bytes:
        """A checkpoint with `labels` as optuna_... in its metadata. Only its header changes, padded to 8 bytes."""
        header, data = read_safetensors_header(checkpoint), checkpoint.read_bytes()
        metadata = header.pop("__metadata__", {})
        metadata |= {f"optuna_{name}": printable(value) for name, value in labels.items()}
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]

    def write_report(self) -> None:
        """A page that needs no network. Its pictures stay where they are."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs

        trials, reference = self.study.get_trials(deepcopy=False), self.output_dir / "reference"
        plan = read_json(reference / "plan.json") or dict.fromkeys(FIRST_SEEDS, ())
        pictured = [t for t in self.ranked if (find_trial_folder(t, self.output_dir) / "scores" / "confirm").is_dir()]
        loader = FileSystemLoader(HERE / "configs")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        environment.filters["link"] = lambda path: urllib.parse.quote(os.fsencode(os.path.relpath(path, self.folder)))
        environment.filters |= {"toml": toml.dumps, "quote": shlex.quote}
        environment.filters["value"] = lambda found: with_error(found).replace("+-", "±")
        page = environment.get_template(REPORT_NAME).render(
            results=self,
            final_folder=self.output_dir / FINAL,
            written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            optuna_version=optuna.__version__,
            terms=TERMS,
            script=family_of(plan).script,
            data_set=sorted((reference / DATA_SET_PICTURES).glob("*.png")),
            plan=plan,
            first_seeds=first_seeds,
            began=min((trial.datetime_start for trial in trials if trial.datetime_start), default=""),
            trained=sum(map(is_trained, trials)),
            trials=[facts_of(trial) for trial in trials],
            entries=[self.entry(trial) for trial in self.ranked],
            plots=self.plots() if len(self.ranked) > 1 else {},
            improvements=measure_improvements(self.study),
            pairs=Comparison(pictured[:COMPARED_TRIALS], self.places).pairs(),
            plotly_js=get_plotlyjs(),
        )
        write_atomically(self.folder / REPORT_NAME, page.encode(errors="replace"))

    def entry(self, trial: FrozenTrial) -> dict[str, Any]:
        """A scored trial: its row in the leaderboard, and its details."""
        folder = find_trial_folder(trial, self.output_dir)
        metrics = read_json(folder / "metrics.json") or {}
        epochs, copies = metrics.get("screen", []), metrics.get("copies", {}).get("images", [])
        loss = loss_curve(folder / "training.log", params_of(trial)["max_train_epochs"])
        lines = [
            {"name": "loss", "x": [epoch for epoch, _ in loss], "y": [value for _, value in loss], "yaxis": "y2"},
            *({"name": name, "y": [one["terms"].get(name) for one in epochs], "line": {"width": 1}} for name in TERMS),
            {"name": "score", "y": [one["score"] for one in epochs], "line": {"width": 4}},
        ]
        curves = [{"x": [one["epoch"] for one in epochs], **line} for line in lines]
        details = {"folder": folder, "copies": len(copies), "epochs": epochs, "curves": curves}
        return {**facts_of(trial, self.places), **details}

    def plots(self) -> dict[str, Any]:
        """Plotly figures by title: Optuna's own where they can be drawn, and two of ours."""
        from optuna import importance, visualization

        figures, common = {}, set.intersection(*(set(trial.params) for trial in self.ranked))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental in 4.x; few trials, which the page says too
            evaluator = importance.PedAnovaImportanceEvaluator()
            for title, draw, options in (
                ("History of the best", visualization.plot_optimization_history, {}),
                ("Score while training", self._plot_while_training, {}),
                ("Parameter importances", visualization.plot_param_importances, {"evaluator": evaluator}),
                ("Parallel coordinates", visualization.plot_parallel_coordinate, {"params": sorted(common)}),
            ):
                with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):  # e.g. all scores are equal
                    figures[title] = draw(self.study, **options)
        figures |= self.plots_by_band()
        return {title: json.loads(figure.to_json()) for title, figure in figures.items()}

    def _plot_while_training(self, study: optuna.Study) -> Any:
        """Optuna's figure of the best score so far by percent of the epochs; what has no score in the end is faint."""
        figure = optuna.visualization.plot_intermediate_values(study)
        whole = {f"Trial{trial.number}" for trial in self.ranked}
        for line in figure.data:
            line.update(opacity=1.0 if line.name in whole else 0.3)
        if not figure.data:
            raise ValueError("no trial of this study tells its score while it was trained")
        return figure.update_layout(xaxis_title="percent of the epochs", yaxis_title="best score so far")

    def plots_by_band(self) -> dict[str, Any]:
        """Two figures: scores by dose, and scores by the guide's alpha bands."""
        from plotly.graph_objects import Figure

        by_dose, by_band = Figure(), Figure()
        for name, (low, high, _) in ALPHA_BANDS.items():
            found = [facts for facts in map(facts_of, self.ranked) if low < facts["network_alpha_ratio"] <= high]
            scores = {"y": [one["score"] for one in found], "text": [f"trial {one['trial']}" for one in found]}
            by_dose.add_scatter(x=[one["dose"] for one in found], mode="markers", marker_size=10, name=name, **scores)
            by_band.add_box(boxpoints="all", name=f"{name}: {len(found)}", **scores)
        stopped = [facts for facts in map(facts_of, self.study.get_trials(deepcopy=False)) if "best_so_far" in facts]
        at = {"x": [one["dose"] for one in stopped], "y": [one["best_so_far"] for one in stopped]}
        circle = {"symbol": "circle-open", "color": "grey"}
        by_dose.add_scatter(**at, mode="markers", marker=circle, name="stopped early")
        across = {"xaxis_title": "alpha ratio x learning_rate x epochs / accumulation", "xaxis_exponentformat": "e"}
        by_dose.update_layout(yaxis_title="score", xaxis_type="log", **across)
        by_band.update_layout(yaxis_title="score", showlegend=False)
        return {"Score against dose": by_dose, "Alpha bands": by_band}

    def dose_advice(self) -> str:
        """Which way to move, by the mean place of the best five among all doses. Chance alone says so in 5 to 11%."""
        doses = sorted(facts_of(trial)["dose"] for trial in self.study.get_trials(deepcopy=False) if is_trained(trial))
        if len(doses) < 10 or not self.ranked:
            return ""
        place = np.mean([doses.index(facts_of(trial)["dose"]) for trial in self.ranked[:5]]) / (len(doses) - 1)
        if place > 0.7:
            return "The best five lie at the upper end: raise learning rate, alpha or epochs, or accumulate less."
        if place < 0.3:
            return "The best five lie at the lower end: lower learning rate, alpha or epochs, or accumulate more."
        return "The best five lie at neither end."


def as_markdown(text: object) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(text))


def note_of_trial(trial: FrozenTrial) -> str:
    facts = facts_of(trial)
    lines = [f"**{as_markdown(facts['outcome'])}**"]
    if trial.state == TrialState.COMPLETE:
        terms = "".join(f"\n| {name} | {value:.3f} |" for name, value in facts["terms"].items())
        lines = [f"**Score {with_error(facts)}**, epoch {facts['best_epoch']} of {facts['max_train_epochs']}"]
        lines.append("| term | |\n|---|---|" + terms)
    if facts["why"]:
        lines.append(as_markdown(facts["why"]))
    if "folder" in facts:
        lines.append(f"Folder: {as_markdown(Path(facts['output_dir']) / facts['folder'])}")
    return "\n\n".join(lines)


def note_of_study(study: optuna.Study) -> str:
    trained = sum(map(is_trained, study.get_trials(deepcopy=False)))
    planned, command = study.user_attrs.get("n_trials"), study.user_attrs.get("command")
    lines = [
        f"{trained}{f' of {planned}' if planned else ''} trials trained.",
        "A trial's score is a product of terms in 0 to 1, each to the power of its weight: fidelity (does it look "
        "like the data set?), text (does it follow the prompt?), preservation (is the rest left alone?), "
        "originality (is it more than a copy?) and usable (no broken pictures). The best checkpoint is scored on "
        "other prompts and seeds than those it was chosen by; its standard error follows.",
    ]
    for number, found in final_places(study).items():
        lines.append(f"Final stage: trial {number}, {with_error(found)}.")
    if command:
        lines.append(f"Started by:\n\n    {printable(command)}")  # an indented block is shown as it is
    return "\n\n".join(lines)


def write_notes(study: optuna.Study) -> None:
    """Notes of the study and of each finished trial, for optuna-dashboard. A user's own notes stay."""
    from optuna_dashboard import get_note, save_note

    noted = study._storage.get_study_system_attrs(study._study_id)  # get_note() would load them for each trial
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and f"dashboard:{trial._trial_id}:note_ver" not in noted:
            save_note(optuna.Trial(study, trial._trial_id), note_of_trial(trial))
    note, present = note_of_study(study), get_note(study)
    if note != present and digest(present) in study.user_attrs.get("own_notes", [digest("")]):
        study.set_user_attr("own_notes", [digest(present), digest(note)])  # both: a kill may come before the next
        save_note(study, note)


# ======================================================================================================
# 12. Preparation: all checks, before a GPU second or a database row is spent; then what is made once a study:
#     its row, the trainer's first step, the reference. Touches the study, reference/ and caches of latents.
# ======================================================================================================

# Options that the search space must not change, besides those in _SCORED and _SMALLEST.
OF_ALL_TRIALS = {"mixed_precision", "cache_latents", "cache_latents_to_disk", "resolution"}
DRAWN = 2000  # settings, by which a search space is judged
PNG_BYTES_PER_PIXEL = 2  # of a photograph, about
REPORT_BYTES = 1e7  # half of them Plotly's script
SECONDS_PER_IMAGE = 1.0  # of 512 pixels and 25 steps on a 16 GB card, about
CHANGE_CAPTIONS = {"caption_prefix", "caption_suffix", "enable_wildcard"}  # keys of kohya's data set file
LONG_SCORING_SECONDS = 300  # a tenth of a training of 50 minutes
# File systems of Windows drives under WSL2 and of network shares: SQLite locks badly on them, or not at all.
NOT_LOCAL = "9p v9fs drvfs nfs nfs4 cifs smb3 smbfs fuse.sshfs ceph glusterfs".split()
ENCODER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


@dataclass(frozen=True)
class Inputs:
    """All inputs of a search, read and checked."""

    settings: Settings
    options: dict[str, Any]  # kohya's fixed ones
    data_set: DataSet
    base_model: BaseModel
    plan: dict[str, Any]  # of the scoring
    trainer: TrainerFacts
    enqueued: list[Params]
    study: optuna.Study | None  # None before its first run
    space: SearchSpace = V2_1
    notes: Sequence[str] = ()  # on what was enqueued

    @property
    def trained(self) -> int:
        """How many trials the study has trained."""
        return sum(map(is_trained, self.study.get_trials(deepcopy=False))) if self.study else 0

    @property
    def latents(self) -> Latents | None:
        """kohya's caches beside the pictures; None if it makes none, or does not say where."""
        if not self.options.get("cache_latents_to_disk") or "trusted" not in self.trainer.answer:
            return None
        vae = read_json(self.settings.base_model / "vae" / "config.json") or {}
        scale = 2 ** (len(vae.get("block_out_channels", range(4))) - 1)  # 8 in Stable Diffusion
        return Latents(self.data_set.images, self.trainer.answer["trusted"], scale)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that a study's scores depend on, by name. A resumed study must have the same."""
        images, config = self.data_set.images, json.dumps(self.data_set.config)
        for folder in sorted({str(image.path.parent) for image in images}, key=len, reverse=True):  # it may move
            config = config.replace(json.dumps(folder)[1:-1], json.dumps(Path(folder).name)[1:-1])
        captions = digest(json.dumps([(image.path.name, *image.captions) for image in images]))
        pictures = digest(json.dumps([(image.path.name, quick_digest(image.path)) for image in images]))
        scoring = {key: self.plan[key] for key in ("clip_skip", "resolution", "subject", "usable", "weights")}
        for stage in ("screen", "confirm", "final-1"):  # by name; the other rounds follow from the first
            names = ("prompt", "negative", "seed", "width", "height", "steps", "cfg")
            scoring[stage] = {name: list(dict.fromkeys(job[name] for job in self.plan[stage])) for name in names}
            scoring[stage][TOGETHER] = digest(json.dumps(self.plan[stage]))[:16]
        encoders = {}
        for name, place in self.plan["encoders"].items():  # a folder is known by its weights, wherever they lie
            files = sorted(Path(place).glob("*.safetensors"))
            encoders[name] = f"files {digest(''.join(map(quick_digest, files)))[:16]}" if files else place
        return {
            STUDY_FORM[0]: STUDY_FORM[1],
            SCORE_DEFINITION[0]: SCORE_DEFINITION[1],
            "search space": space_fingerprint(self.space),
            "Optuna's major version": optuna.__version__.split(".")[0],
            "seed (--seed)": self.settings.seed,
            "base model (--base-model)": self.base_model.fingerprint[:16],
            "data set (--dataset-config)": {
                "general": json.loads(config)["general"],
                "datasets": dict(enumerate(json.loads(config)["datasets"], start=1)),
                "captions": captions[:16],
                "pictures": f"{len(images)} ({pictures[:16]})",
            },
            "training options (--training-config)": dict(self.options),
            "scoring (--scoring-config, --eval-prompts, --subject)": scoring,
            "encoders": encoders,
        }

    @property
    def tools(self) -> dict[str, str]:
        """Tools whose change moves scores a little, so that it is warned of and not refused."""
        trainer = self.trainer
        about = {"card": trainer.device_name, "sd-scripts": trainer.version, "PyTorch": trainer.answer["torch"]}
        return {**about, "Optuna": optuna.__version__}

    def prefers(self, params: Params) -> bool:
        """Whether the warm-up ends before the run does: else the learning rate asked for is never reached."""
        return self.data_set.batches_per_epoch is None or params["lr_warmup_steps"] < self.data_set.updates(params)

    def sampler(self) -> FeasibleTPESampler:
        can_train, prefers = self.trainer.can_train, self.prefers
        return FeasibleTPESampler(self.settings.seed, self.space, can_train=can_train, prefers=prefers)

    @functools.cached_property
    def allowed(self) -> list[Params]:
        """Of DRAWN settings, drawn at random, those that may be trained; RefusedInput if there are none."""
        rng = np.random.default_rng(0)
        drawn = [self.space.complete(self.space.draw(rng)) for _ in range(DRAWN)]
        found = [params for params in drawn if may_train(params, self.space)[0] and self.trainer.can_train(params)]
        if not found:
            why, count = Counter(may_train(params, self.space)[1] for params in drawn).most_common(1)[0]
            said = f"none of {DRAWN} settings drawn from {self.space.name} may be trained, {count} of them since: "
            said += why or f"the optimizer {NEEDS_CARD}"
            raise RefusedInput(f"--search-space: {said}; loosen its rules")
        return found

    def trial_size(self, choose: Callable[[Sequence[int]], float]) -> tuple[int, float, float]:
        """How many checkpoints a trial has, the bytes of each, and those of its pictures; `choose`: max or np.mean."""
        dim, epochs = (choose(self.space.values(name)) for name in ("network_dim", "max_train_epochs"))
        checkpoints = math.ceil(epochs / self.options["save_every_n_epochs"])
        halves = 1 if self.options.get("save_precision") in ("fp16", "bf16") else 2
        pictures = checkpoints * self.stage_bytes("screen") + self.stage_bytes("confirm")
        saved = self.base_model.lora_bytes_per_dim * dim
        if self.options["network_module"] == LYCORIS:  # LoKr's dim may be 100,000, which means whole matrices
            saved = min(saved, self.base_model.adapted_bytes)
        return checkpoints, saved * halves, pictures

    def stage_bytes(self, stage: str) -> float:
        return sum(job["width"] * job["height"] for job in self.plan[stage]) * PNG_BYTES_PER_PIXEL

    def largest_trial_bytes(self) -> float:
        """On disk while a trial runs: all checkpoints of the largest network_dim, and its pictures."""
        checkpoints, each, pictures = self.trial_size(max)
        return checkpoints * each + pictures

    def needed_bytes(self) -> float:
        """What trials to train leave on disk, on average, and what the largest one needs as it runs on each device."""
        left, (checkpoints, each, pictures) = max(0, self.settings.n_trials - self.trained), self.trial_size(np.mean)
        kept = min(left, KEPT_TRIALS) if self.settings.keep_checkpoints == "best" else left * checkpoints
        final = (2 + FINALISTS_AT_MOST) * sum(map(self.stage_bytes, FINAL_ROUNDS))  # with base model and strengths
        running = min(left, len(self.settings.devices)) * self.largest_trial_bytes()
        return kept * each + left * pictures + (REPORT_BYTES + each + final + running if left else 0)

    def free_bytes(self) -> int:
        return shutil.disk_usage(nearest_folder(self.settings.output_dir)).free

    def check_room(self, needed: float, error: type[SearchError]) -> None:
        """Raises `error` where so many bytes are not free."""
        if needed > (free := self.free_bytes()):
            need, there = (tqdm.format_sizeof(count, "B") for count in (needed, free))
            said = f"{need} are needed for checkpoints and pictures, {there} are free in {self.settings.output_dir}"
            is_begun = (self.settings.reference / "plan.json").exists()
            remedy = "move it to a larger disk" if is_begun else "give another one, or raise save_every_n_epochs"
            raise error(f"--output-dir: {said}; make room, or {remedy}")


def check_inputs(settings: Settings, known_problems: Sequence[str] = (), *, afresh: bool = False) -> Inputs:
    """Read and check everything; makes nothing. RefusedInput lists all problems. `afresh` asks sd-scripts once more."""
    problems = Problems(known_problems)
    base_model = problems.of(BaseModel.inspect, settings.base_model)
    family = base_model.family if base_model else SD1
    settings = with_family_files(settings, family)
    raw = problems.of(read_training_options, settings.training_config)
    if raw and base_model:
        raw = problems.of(add_prediction, raw, base_model.prediction, settings.training_config)
    config = problems.of(read_data_set_file, settings.dataset_config)
    read = problems.of(SearchSpace.read, settings.search_space) if settings.search_space else V2_1
    space = read or V2_1
    trainer = settings.sd_scripts and problems.of(ask_trainer, settings, family, raw or {}, config, space, afresh)
    answer, can_train = (trainer.answer, trainer.can_train) if trainer else ({}, lambda _: True)
    if trainer:
        settings = replace(settings, device=trainer.cards_of(settings.device))
        problems.of(trainer.check_card, settings)
    options = problems.of(check_training_options, raw, settings.training_config, answer.get("options", {}))
    data_set = config and problems.of(DataSetReader(settings.dataset_config, config).read, raw or {}, answer)
    problems.of(check_precision, settings, options or {}, family)
    problems.of(read_eval_prompts, settings.eval_prompts)
    shipped = shipped_scoring_config(family, data_set)
    settings = replace(settings, scoring_config=settings.scoring_config or shipped)
    scoring = problems.of(ScoringSettings.read, settings.scoring_config, shipped)
    plan = data_set and scoring and options and problems.of(make_plan, settings, data_set, scoring, options, family)
    problems.of(check_packages)
    problems.of(check_scoring_models, scoring, family, settings.base_model)
    problems.of(check_space_options, space, raw or {}, config, answer, can_train)
    enqueued, notes = problems.of(EnqueueReader(can_train, space).read, settings.enqueue if read else ()) or ([], [])
    study = problems.of(find_study, settings) if settings.output_dir else None
    problems.of(check_output_dir, settings.output_dir, data_set)
    inputs = Inputs(settings, options, data_set, base_model, plan, trainer, enqueued, study, space, notes)
    problems.refuse()  # what follows needs inputs that are right by themselves
    problems.of(Latents.check, inputs.latents)
    problems.of(lambda: inputs.allowed)
    problems.of(check_fingerprint, inputs.study, inputs.fingerprint)
    problems.of(inputs.check_room, inputs.needed_bytes(), RefusedInput)
    problems.refuse()
    return inputs


def check_space_options(
    space: SearchSpace, options: Params, data_set: Any, answer: Mapping[str, Any], can_train: Check
) -> None:
    """RefusedInput unless a space holds options that this sd-scripts has, with values and optimizers that it takes."""
    known, problems = answer.get("options", {}), []
    for name in dict.fromkeys([*space.searched, *(name for _, values in space.fixed for name in values)]):
        wrong = [text for value in space.values(name) if (text := _wrong_option(name, value, known.get(name, {})))]
        if name == "network_alpha":
            problems.append("network_alpha follows from network_alpha_ratio; give that instead")
        elif name in REFUSED_OPTIONS.keys() - SEARCHABLE_OPTIONS:
            problems.append(f"'{name}' {REFUSED_OPTIONS[name]}")
        elif name in _SCORED or name in _SMALLEST or name in OF_ALL_TRIALS:
            problems.append(f"'{name}' is the same in all trials; give it in the training config")
        elif name in options_of_data_set(data_set):
            problems.append(f"'{name}' has no effect, since the data set's file sets it; delete one of them")
        elif name in options.keys() - IGNORED_OPTIONS:
            problems.append(f"'{name}' is in the training config, too; delete one of them")
        elif known and name not in known and name != "network_alpha_ratio":
            problems.append(f"'{name}' is no option of this sd-scripts{nearest(name, known)}")
        if known.get(name, {}).get("kind") == "float" and isinstance(space.searched.get(name), IntDistribution):
            problems.append(f"{name} would be a whole number; write its range with points, such as 1.0")
        problems += [f"a value of {name} {text}" for text in wrong[:1]]
    where = f"--search-space: {space.name}"
    lines = [f"{where}: {problem}" for problem in dict.fromkeys(problems)]
    is_fixed = "optimizer_args" in options.keys() - ignored_options(options)
    for name, why in answer.get("optimizers", []):
        if can_train({"optimizer_type": name}):
            said = f"kohya can't make {name} ({one_line(in_english(why))}); install or correct it"
            lines.append(f"{'--training-config' if is_fixed else where}: {said}")
    Problems(lines).refuse()


def options_of_data_set(config: Any) -> set[str]:
    """The options that a data set's file sets: kohya takes them from there."""
    return {{"batch_size": "train_batch_size"}.get(key, key) for table in tables_of_data_set(config) for key in table}


def with_family_files(settings: Settings, family: Family) -> Settings:
    """The settings with the family's training config and search space where none is given."""
    training = settings.training_config or HERE / "configs" / family.training_config
    space = HERE / "configs" / family.search_space if family.search_space else None
    return replace(settings, training_config=training, search_space=settings.search_space or space)


def shipped_scoring_config(family: Family, data_set: DataSet | None) -> Path:
    """The family's scoring config. Captions that are tags may have one of their own."""
    texts = [text for image in data_set.subject_images for text in image.captions] if data_set else []
    return HERE / "configs" / (family.tags_scoring_config if Captions(texts).are_tags() else family.scoring_config)


def add_prediction(options: Params, known: Mapping[str, bool], path: Path) -> Params:
    """kohya's options with what the base model says of its prediction; RefusedInput where they contradict it."""
    for name, value in known.items():
        if options.get(name, value) != value:
            why = f"{name} = {str(options[name]).lower()} in {path}, but the base model says {str(value).lower()}"
            raise RefusedInput(f"--training-config: {why}; delete it")
    return {**options, **{name: True for name, value in known.items() if value}}


def ask_trainer(
    settings: Settings, family: Family, options: Mapping[str, Any], config: Any, space: SearchSpace, afresh: bool
) -> TrainerFacts:
    """What sd-scripts answers about inputs of which some may be missing."""
    left_out = REFUSED_OPTIONS.keys() | ignored_options(options)
    fixed = {k: v for k, v in options.items() if k.isidentifier() and k not in left_out} | space.trained_parts
    optimizers = space.optimizers() if space is not V2_1 or "optimizer_args" in fixed else []
    cache = settings.reference / ANSWER_NAME if settings.output_dir and not afresh else None
    device = settings.devices[0] if DEVICE.fullmatch(settings.device) else "cpu"
    device = device if len(settings.devices) == 1 and device != ALL_CARDS else device.partition(":")[0]  # sees all
    about = (fixed, settings.base_model or Path("missing"), config or {"datasets": []}, optimizers)
    return Probe(settings.sd_scripts / family.script, settings.trainer_python, device, *about).ask(cache)


def check_packages() -> None:
    """RefusedInput if this Python lacks what requirements.txt lists."""
    tools = "torch diffusers transformers peft safetensors PIL optuna_dashboard rich jinja2 plotly psutil"
    if missing := [name for name in tools.split() if importlib.util.find_spec(name) is None]:
        raise RefusedInput(f"this Python has no {', '.join(missing)}; pip install -r requirements.txt")


def check_precision(settings: Settings, options: Mapping[str, Any], family: Family) -> None:
    where = f"mixed_precision = 'fp16' in {settings.training_config}"
    if options.get("mixed_precision") == "fp16" and family is not SD1 and settings.base_model.is_dir():
        why = "kohya then loads a folder of SDXL only from *.fp16.safetensors, and the scoring from the others"
        raise RefusedInput(f'--training-config: {where}: {why}; set it to "bf16", or give a single file')
    if settings.devices[0] == "cpu" and options.get("mixed_precision") == "fp16":
        raise RefusedInput(f'--training-config: {where} needs a CUDA card; set it to "no" for --device cpu')


def check_scoring_models(scoring: ScoringSettings, family: Family, base_model: Path | None) -> None:
    problems = Problems()
    for key in ("dinov2", "clip"):
        problems.of(check_scoring_model, key, scoring.encoders[key], ENCODER_FILES)
    if base_model and base_model.is_file():  # it holds no pipeline config
        files = ["model_index.json", *(f"{part}/vocab.json" for part in family.folder if "tokenizer" in part)]
        problems.of(check_scoring_model, "pipeline_config", scoring.encoders["pipeline_config"], files)
    problems.refuse()


def check_scoring_model(key: str, name: str, files: Sequence[str]) -> None:
    """RefusedInput unless a model that the scoring config names is a whole folder, cached, or on the hub."""
    import huggingface_hub.utils
    from huggingface_hub.errors import HFValidationError

    where = f"--scoring-config: {key} = {name!r}"
    if os.path.isdir(name or "."):  # noqa: PTH112 - Path raises on too long a name
        if missing := [file for file in files if not (Path(name) / file).is_file()]:
            raise RefusedInput(f"{where} is a folder without {', '.join(missing)}; give the model's folder")
        kind = str((read_json(Path(name) / "config.json") or {}).get("model_type", key))
        if not kind.startswith(key):
            raise RefusedInput(f"{where} holds a model of another kind, {kind}; give the folder of {key}")
        for file in Path(name).glob("*.safetensors"):
            try:
                read_safetensors_header(file)
            except (ValueError, OSError) as error:
                raise RefusedInput(f"{where}: can't use {file.name} ({one_line(error)}); fetch it again") from error
        return
    huggingface_hub.utils.logging.set_verbosity_error()  # it prints to the screen by itself
    try:
        if not all(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in files):
            huggingface_hub.HfApi().model_info(name, timeout=10)
    except HFValidationError:
        raise RefusedInput(f"{where} is no folder and no name on the hub; {path_remedy(name)}") from None
    except Exception as error:  # the client's errors come from several libraries
        why = f"is not whole on this machine and the hub does not give it ({type(error).__name__})"
        command = f"hf download {name}{NO_WEIGHTS if key == 'pipeline_config' else ''}"
        raise RefusedInput(f"{where} {why}; fetch it once with `{command}`, or give a folder") from error


def find_study(settings: Settings) -> optuna.Study | None:
    """The study to resume, or None; RefusedInput for a storage or an output folder in which none could be kept.

    An output folder holds one study, which knows the trial folders in it.
    """
    storage, output_dir = Storage(settings.storage), settings.output_dir
    if settings.storage.startswith("sqlite") and storage.file is None:
        why = f"{storage.shown} keeps nothing or has options"
        raise RefusedInput(f"--storage: {why}; give sqlite:///FILE, or leave it out")
    is_own = storage.file == output_dir / DATABASE_NAME
    if storage.file and not os.path.isdir(storage.file.parent) and not is_own:  # noqa: PTH112 - Path raises
        folder = f" {storage.file.parent.absolute()}" if storage.shown == storage.url else ""
        nowhere = f"there is no folder{folder} for {storage.shown}"
        raise RefusedInput(f"--storage: {nowhere}; make it (a path from / on needs four slashes: sqlite:////...)")
    study = load_study(settings.storage, settings.study_name)
    remedy = "move it away, or give another --output-dir"
    for name in ("reference", "results", ARTIFACTS, LOG_NAME, ".lock"):
        place = output_dir / name
        if place.exists() and place.is_file() != (name in (LOG_NAME, ".lock")):
            raise RefusedInput(f"--output-dir: {place} is not this program's; {remedy}")
    owner = (read_json(settings.reference / "plan.json") or {}).get("study", settings.study_name)
    if owner != settings.study_name:
        other = f"give another --output-dir, or --study-name {owner}"
        raise RefusedInput(f"--output-dir: {output_dir} holds study {owner!r}; {other}")
    known = {trial.number for trial in study.get_trials(deepcopy=False)} if study else set()
    for folder in sorted(output_dir.glob("trial_*")):
        number = folder.name.removeprefix("trial_")
        if number.isdecimal() and int(number) not in known:
            found = "give the --storage it was made with, or restore its database"
            raise RefusedInput(f"--output-dir: {folder} is not of this study; {found}; else {remedy}")
    return study


def make_plan(
    settings: Settings, data_set: DataSet, scoring: ScoringSettings, options: Params, family: Family = SD1
) -> dict[str, Any]:
    # A file that two [[datasets]] train at two resolutions is one picture.
    images = list(dict.fromkeys((image.path, text) for image in data_set.subject_images for text in image.captions))
    captions = Captions([caption for _, caption in images])
    subject = captions.find_subject(data_set.class_tokens, settings.subject)
    about = (str(settings.base_model.resolve()), options, settings.eval_prompts, family)
    return PromptChooser(subject, images, scoring).plan(*about)


@dataclass(frozen=True)
class EnqueueReader:
    """Reads the parameters to try first: those of files, and the best ones of earlier searches' output folders."""

    can_train: Check
    space: SearchSpace

    def read(self, paths: Iterable[Path]) -> tuple[list[Params], list[str]]:
        """All parameters, and what is to be said of the folders."""
        problems = Problems()
        places = [path / "params.json" if (path / "params.json").is_file() else path for path in paths]  # a trial's
        read = [problems.of(self.best_of_earlier if path.is_dir() else self.read_file, path) for path in places]
        problems.refuse()
        return [table for tables, _ in read for table in tables], [note for _, note in read if note]

    def best_of_earlier(self, folder: Path) -> tuple[list[Params], str]:
        """An earlier search's three best settings that may be trained here, as far as this space has their values."""
        try:
            table = csv.DictReader(io.StringIO((folder / "results" / "trials.csv").read_text(encoding="utf-8")))
            rows = [row for row in table if row["score"]]
            scored = {int(row["trial"]): (float(row.get("final_score") or -1), float(row["score"])) for row in rows}
        except (OSError, ValueError, KeyError, csv.Error) as error:
            why = f"can't read {folder}/results/trials.csv ({one_line(error)})"
            raise RefusedInput(f"--enqueue: {why}; give a TOML file, or the output folder of a search") from error
        found, left_out, missing = {}, {}, []
        for number in sorted(scored, key=scored.__getitem__, reverse=True)[:20]:
            file, values = trial_folder(folder, number) / "params.json", {}
            given = read_json(file) or {}
            missing += [] if given else [str(file)]
            for name in self.space.searched:
                value = as_drawn(given.get(name))
                if holds(self.space.searched[name], value) and meets(values, self.space.when.get(name, {})):
                    values[name] = value
            if values and values not in found.values() and not self.why_rejected(values):
                found[number], kept = values, self.space.complete(values)
                left_out |= {name: value for name, value in given.items() if kept.get(name) != value}
            if len(found) == 3:
                break
        note = f"first from {folder.name}: trial {', '.join(map(str, found))}"
        if not found:
            note = f"no trial of {folder.name} " + ("may be trained here" if scored else "has a score")
        note += f", without {', '.join(left_out)}" if left_out else ""
        return list(found.values()), note + (f"; not whole: {', '.join(missing[:3])}" if missing else "")

    def why_rejected(self, table: Params) -> str:
        """Why enqueued parameters are rejected, whatever completes them; "" if they may be trained."""
        study = optuna.create_study(sampler=FeasibleTPESampler(0, self.space, can_train=self.can_train))
        study.enqueue_trial(table)
        params = suggest_hyperparameters(study.ask(), self.space)
        reason = may_train(params, self.space)[1]
        return reason or ("" if self.can_train(params) else f"{params['optimizer_type']} {NEEDS_CARD}")

    def read_file(self, path: Path) -> tuple[list[Params], str]:
        """Parameters to try first: one table, or several [[trial]]s. RefusedInput lists what can't be tried."""
        content = read_toml(path, "--enqueue")
        if isinstance(content.get("parameters"), dict):  # best_parameters.json
            content = content["parameters"]
        given = content.pop("trial", [])
        tables = [given] if isinstance(given, dict) else given or [content]
        if not isinstance(tables, list) or not all(isinstance(table, dict) and table for table in tables):
            remedy = "write e.g. learning_rate = 1e-4, or [[trial]] tables"
            raise RefusedInput(f"--enqueue: {path} has no parameters; {remedy}")
        tables = list(map(self._searched_in, tables))
        problems = [problem for table in tables for problem in self._wrong_parameters(table)]
        if content and given:
            problems.append("has parameters outside of its [[trial]] tables; put all into tables")
        Problems(f"--enqueue: {path}: {problem}" for problem in problems).refuse()
        return tables, ""

    def _searched_in(self, given: Params) -> Params:
        """Parameters without what the space sets itself, as params.json has it; the ratio in place of network_alpha."""
        searched = self.space.searched
        texts = {name: as_drawn(given[name]) for name in given.keys() & searched.keys() if name.endswith("_args")}
        table = {**given, **texts}
        right = {name: table[name] for name in searched if name in table and holds(searched[name], table[name])}
        own = {name: value for name, value in self.space.complete(right).items() if name not in searched}
        table = {name: value for name, value in table.items() if name not in own or own[name] != value}
        dim, alpha, ratios = (*map(table.get, ("network_dim", "network_alpha")), searched.get("network_alpha_ratio"))
        if ratios and "network_alpha_ratio" not in table and type(dim) is type(alpha) is int and dim > 0:
            grid = [*RATIOS, round(alpha / dim, 10)]
            for ratio in [one for one in grid if int(dim * one) == alpha and holds(ratios, one)][:1]:
                del table["network_alpha"]
                table["network_alpha_ratio"] = ratio
        return table

    def _wrong_parameters(self, table: Params) -> Iterator[str]:
        """What is wrong with enqueued parameters."""
        searched = self.space.searched
        if not table:
            yield "has no parameter that is searched; add one"
        for name, value in table.items():
            if name == "network_alpha":
                rule = "is not a network_alpha_ratio of this search space times a network_dim beside it"
                yield f"network_alpha = {value!r} {rule}; correct it, or give network_alpha_ratio alone"
            elif name not in searched:
                yield f"unknown parameter '{name}'{nearest(name, searched)}"
            elif not holds(searched[name], value):
                yield f"{name} = {value!r} is outside the search space; give {describe_range(searched[name])}"
        if not self.can_train(table):
            yield f"{table['optimizer_type']} {NEEDS_CARD}; install it or use AdamW"
        for name in table.keys() & self.space.when.keys():
            if not meets(table, self.space.when[name]):
                wanted = self.space.when[name].items()
                needed = (f"{n} {v}" if _COMPARISON.fullmatch(str(v)) else f"{n} = {v!r}" for n, v in wanted)
                yield f"{name} needs {' and '.join(needed)}; add it"


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, or will hold it; "" where it is unknown."""
    import psutil

    kinds = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((kinds[place] for place in map(str, (folder, *folder.parents)) if place in kinds), "")


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_output_dir(folder: Path, data_set: DataSet | None = None) -> None:
    """RefusedInput for a folder that this user can't write, or that holds the data set's pictures."""
    above = nearest_folder(folder)
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise RefusedInput(f"--output-dir: {above} is no folder that this user can write; give another folder")
    if data_set and folder in {image.path.parent for image in data_set.images}:
        raise RefusedInput(f"--output-dir: {folder} holds the data set's pictures; give another folder")


class CheckReport:
    """What --check prints: a line for each thing found, then notes and warnings."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.settings = inputs, inputs.settings
        self.captions = Captions([text for image in inputs.data_set.subject_images for text in image.captions])

    def __str__(self) -> str:
        notes, tokens = [*self.inputs.data_set.notes, *self.inputs.notes], self.inputs.data_set.class_tokens
        file = self.settings.training_config
        if ignored := [key for key in read_training_options(file) if key not in self.inputs.options]:
            notes.append(f"the search does not take from {file.name}: {', '.join(ignored)}")
        if overruled := sorted(options_of_data_set(self.inputs.data_set.config) & self.inputs.options.keys()):
            notes.append(f"the data set's file overrules {', '.join(overruled)} of {file.name}")
        if tokens and not any(map(Subject(tokens).is_in, self.captions.texts)):
            notes.append(f"class_tokens {tokens!r} are trained nowhere: every picture has a caption without them")
        lines = [f"  {name:11s} {printable(value)}" for name, value in self._rows().items()]
        lines += [f"  note: {note}" for note in notes]
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.warnings())])

    def _rows(self) -> dict[str, str]:
        inputs, settings = self.inputs, self.settings
        data, trainer, plan, every = inputs.data_set, inputs.trainer, inputs.plan, inputs.options["save_every_n_epochs"]
        captions = sum(image.has_caption for image in data.subject_images)
        others = len(data.images) - len(data.subject_images)
        optimizers = list(dict.fromkeys(map(str, inputs.space.values("optimizer_type"))))
        able = [name for name in optimizers if trainer.can_train({"optimizer_type": name})]
        unable = [name for name in optimizers if name not in able]
        needed, free = (tqdm.format_sizeof(count, "B") for count in (inputs.needed_bytes(), inputs.free_bytes()))
        trained = f"{inputs.trained} of {settings.n_trials} trained"
        predicts = {"v_parameterization": "v-prediction", "zero_terminal_snr": "zero SNR"}
        kinds = [inputs.base_model.family.name, *(predicts[key] for key in predicts if inputs.options.get(key))]
        return {
            "base model": f"{settings.base_model.name} ({', '.join(kinds)})",
            "data set": f"{len(data.subject_images)} images, {captions} captions, {others} for regularisation",
            "subject": self._subject(),
            "steps": f"{self._steps()}, a checkpoint every {'epoch' if every == 1 else f'{every} epochs'}",
            "sd-scripts": f"{trainer.version} in {settings.sd_scripts}, with PyTorch {trainer.answer['torch']} "
            f"(this search was tried with {TRIED_VERSIONS})",
            "device": trainer.device_name + (f" ({settings.device})" if len(settings.devices) > 1 else ""),
            "space": f"{inputs.space.name}: {len(inputs.space.searched)} parameters; "
            f"{len(inputs.allowed) / DRAWN:.0%} of their combinations may be trained here",
            "optimizers": ", ".join(able) + (f" (no bitsandbytes on CUDA: no {', '.join(unable)})" if unable else ""),
            "scoring": f"{len(plan['screen'])} images a checkpoint, {len(plan['confirm'])} for the best one, "
            f"of {plan['resolution']} pixels, by {settings.scoring_config.name}; "
            f"about {inputs.base_model.family.screening_gb:g} GB of a card (with less its models take turns)",
            "early stop": self._early_stop(),
            "disk": f"{needed} needed for average trials and the largest one on each device, {free} free",
            "study": f"{settings.study_name!r}, {trained}, in {Storage(settings.storage).shown}",
        }

    def _early_stop(self) -> str:
        stop, every = self.inputs.plan["stop_early"], self.inputs.options["save_every_n_epochs"]
        half = int(min(self.inputs.space.values("max_train_epochs")) * stop["at_percent"] / 100)
        if self.settings.prune == "off" or not half:
            return "off"
        rare = "" if every <= half else " (some trainings have no checkpoint by then)"
        return f"at {stop['at_percent']}% of the epochs, after {stop['whole_trials']} whole trainings{rare}"

    def _subject(self) -> str:
        """The subject's name and, unless it was given, the other tags that may be the name."""
        name, captions, total = self.inputs.plan["subject"], self.captions, len(self.captions.texts)
        if self.settings.subject:
            return repr(name)
        others = [tag for tag in captions.candidates if tag != name]
        most = [tag for tag, count in captions.counts.items() if NEARLY_ALL * total <= count < total]
        nearly = [tag for tag in most if not captions.is_common(tag)]
        said = f"; all captions share {', '.join(map(repr, others[:5]))} too" if others else ""
        said += f"; most have {', '.join(map(repr, nearly[:3]))}" if nearly else ""
        return f"{name!r}{said} (--subject overrules it)"

    def _steps(self) -> str:
        """Updates an epoch and a training, for all accumulations and epochs that may be drawn."""
        if self.inputs.data_set.batches_per_epoch is None:
            return "to be told by the first step"
        values = self.inputs.space.values
        epochs, accumulations = (values(name) for name in ("max_train_epochs", "gradient_accumulation_steps"))
        trainings = [{"max_train_epochs": 1, "gradient_accumulation_steps": number} for number in accumulations]
        each = [self.inputs.data_set.updates(training) for training in trainings]
        by_accumulation = " or ".join(dict.fromkeys(map(str, each)))
        shortest, longest = min(each) * min(epochs), max(each) * max(epochs)
        return f"{by_accumulation} an epoch, {shortest} to {longest} a training (by accumulation and epochs)"

    def _long_warm_ups(self) -> Iterator[str]:
        """Where proposals warm up for more than half of the run: a warm-up is a count of steps, or a share below 1."""
        counted = self.inputs.allowed if self.inputs.data_set.batches_per_epoch else []
        warm = [(params["lr_warmup_steps"], self.inputs.data_set.updates(params)) for params in counted]
        shares = np.array([steps if isinstance(steps, float) else steps / of for steps, of in warm])
        if (shares > 0.5).any():
            said = f"{np.mean(shares > 0.5):.0%} of the proposals warm up for more than half of the run"
            said += f", {np.mean(shares >= 1):.0%} for all of it, which the search avoids where it can"
            yield f"{said}; a larger num_repeats or a smaller batch_size gives more steps"

    def _small_training(self) -> Iterator[str]:
        """A data set's file that was written for SD 1.x trains SDXL on a quarter of its pixels."""
        scored = self.inputs.plan["resolution"]
        pictures = self.inputs.data_set.subject_images
        sides = [math.sqrt(math.prod(image.bucket)) for image in pictures if image.bucket]
        if sides and 1.5 * (side := np.median(sides)) < scored:
            said = f"pictures are trained at about {side:.0f} x {side:.0f} pixels, and scored at {scored} x {scored}"
            remedy = f"resolution = {scored} and max_bucket_reso = {2 * scored}, or larger pictures"
            yield f"{said}; the data set's file wants {remedy}"

    def warnings(self) -> Iterator[str]:
        inputs, folder = self.inputs, self.settings.output_dir
        images = inputs.latents.images if inputs.latents else ()
        cached = [image for image in images if image.latents and image.latents.exists()]
        if older := [one for one in cached if one.latents.stat().st_mtime < one.path.stat().st_mtime]:
            said = f"newer than their cached latents, which are trained: {len(older)} of {len(images)} pictures"
            yield f"{said}; delete {older[0].latents} if {older[0].path.name} has changed"
        yield from self._small_training()
        yield from self._long_warm_ups()
        tables = tables_of_data_set(inputs.data_set.config)
        changed = {key for key in CHANGE_CAPTIONS if any(table.get(key) for table in tables)}
        if changed and inputs.options.get("cache_text_encoder_outputs"):
            said = f"{', '.join(sorted(changed))} of the data set: kohya would train the captions without them"
            yield f"cache_text_encoder_outputs ignores {said}; delete one of the two"
        yield from inputs.space.idle_rules()
        if len(inputs.allowed) < DRAWN / 200:
            yield f"{inputs.space.name} forbids so much that trials may be rejected; narrow its ranges instead"
        if (different := len(set(map(str, inputs.allowed)))) < min(self.settings.n_trials, len(inputs.allowed)):
            yield f"{inputs.space.name} allows only {different} different settings, so that some are trained twice"
        jobs = inputs.trial_size(np.mean)[0] * inputs.plan["screen"] + inputs.plan["confirm"]
        pixels = sum(job["width"] * job["height"] * job["steps"] for job in jobs)
        seconds = pixels / (512 * 512 * 25) * SECONDS_PER_IMAGE
        if seconds > LONG_SCORING_SECONDS and self.settings.devices[0] != "cpu" and not inputs.study:
            remedy = "raise save_every_n_epochs, or lower prompts of [screen] in the scoring config"
            yield f"scoring a trial takes about {seconds / 60:.0f} min on a 16 GB card; {remedy}"
        if (kind := file_system(folder)) in NOT_LOCAL:
            said = f"{folder} is on a Windows drive or a network share ({kind}): a database is slow and may fail there"
            yield f"{said}; give an --output-dir on a local Linux disk (under WSL2: below ~)"
        if len({job["seed"] for job in inputs.plan["confirm"]}) < len(inputs.plan["confirm"]):
            yield "prompts of --eval-prompts share seeds, so that scores are noisier than they say; leave out --d"
        for table in inputs.enqueued:
            if reason := EnqueueReader(inputs.trainer.can_train, inputs.space).why_rejected(table):
                yield f"--enqueue: {table} will be rejected whatever completes it: {reason}"
        known = inputs.study.user_attrs.get("environment") if inputs.study else None
        for difference in fingerprint_differences(known or inputs.tools, inputs.tools):
            yield f"the study was begun with other tools: {difference}"


def open_study(inputs: Inputs) -> optuna.Study:
    """Create or resume the study; RefusedInput if another program made it with other inputs meanwhile."""
    settings, storage = inputs.settings, Storage(inputs.settings.storage)
    with storage.refusing(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            study_name=settings.study_name, storage=storage.open(), direction="maximize", load_if_exists=True
        )
        refuse_foreign_study(study)
        check_fingerprint(study, inputs.fingerprint)
        if "fingerprint" not in study.user_attrs:
            study.set_user_attr("fingerprint", inputs.fingerprint)
            study.set_user_attr("environment", inputs.tools)
        study.set_user_attr("n_trials", settings.n_trials)
        study.set_user_attr("command", settings.command)
        study.set_metric_names(["score"])
    return study


class Reference:
    """OUTPUT_DIR/reference: what is made once a study, before its first trial."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.folder = inputs.settings.reference

    def write_inputs(self) -> None:
        """Write what trainer and scorer read."""
        write_json(self.folder / "plan.json", {"study": self.inputs.settings.study_name, **self.inputs.plan})
        write_toml(self.folder / "dataset.toml", self.inputs.data_set.config)
        with only_warning("the report will show no pictures of the data set"):
            from PIL import Image

            # Copies, since --report may run where the data set is not.
            for number, image in enumerate(_evenly(self.inputs.data_set.subject_images, SHOWN_PICTURES)):
                file = self.folder / DATA_SET_PICTURES / f"{number:02d}.png"
                if not file.is_file():
                    with Image.open(image.path) as picture:
                        picture.thumbnail((512, 512))
                        write_atomically(file, functools.partial(picture.convert("RGB").save, format="PNG"))
        write_json(self.folder / ANSWER_NAME, {**self.inputs.trainer.answer, "notes": self.inputs.data_set.notes})

    def train_first_step(self, trainer: KohyaTrainer) -> Inputs:
        """Let kohya train one step: it shows that the trainer works, and caches the latents.

        A training that makes the cache draws other random numbers than one that finds it. After this all trials find
        it, so that equal parameters give equal weights. Returns the inputs with the batches that kohya printed.
        """
        data_set, folder = self.inputs.data_set, self.folder / FIRST_STEP
        try:
            with locked(image.path.parent for image in data_set.images):
                if not self._is_tried_out():
                    screen.begin("none yet: the trainer is tried out")
                    say("Trying the trainer out for one step, which also caches the latents, once a study ...")
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    options = {**self.inputs.options, **self.inputs.space.trained_parts}
                    about = (options, self.inputs.settings.base_model, self.folder / "dataset.toml", folder)
                    write_toml(folder / "config.toml", trial_config(FIRST_STEP_PARAMS, *about))
                    trainer(folder / "config.toml")
                    shutil.rmtree(folder / "logs", ignore_errors=True)  # TensorBoard is to show trials alone
        except TrialFailed as error:
            raise SearchStopped(f"the trainer does not work: {error}; see {folder / 'training.log'}") from error
        batches = printed_batches(folder / "training.log") or data_set.batches_per_epoch
        if batches != data_set.batches_per_epoch:
            say(f"kohya trains {batches} batches an epoch (counted before: {data_set.batches_per_epoch or 'none'}).")
        return replace(self.inputs, data_set=replace(data_set, batches_per_epoch=batches))

    def _is_tried_out(self) -> bool:
        """Whether the first step left its LoRA, whole, and all latents are there; deletes torn latents in any case."""
        are_cached = self.inputs.latents is None or self.inputs.latents.prepare()
        with contextlib.suppress(TrialFailed):
            check_lora(self.folder / FIRST_STEP / f"{LORA_NAME}.safetensors", may_be_zero=True)
            return are_cached
        return False

    def make_anchors(self, study: optuna.Study, scorer: Callable[[Path], None]) -> None:
        """Have the base model's images made, which give the score's anchors, and check the anchors."""
        if read_json(self.folder / "anchors.json") is None:
            screen.begin("none yet: the reference is made")
            say("Making the reference: the base model's own images, once a study ...")
            try:
                scorer(self.folder)
            except ScoringFailed as error:
                raise SearchStopped(f"the reference could not be made: {error}") from error
        check_anchors(study, read_json(self.folder / "anchors.json"))


def printed_batches(training_log: Path) -> int | None:
    """The batches of an epoch, which kohya prints before its first step; None if it does not."""
    with contextlib.suppress(OSError):
        said = training_log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"num batches per epoch[^:\n]*: (\d+)", said):
            return int(found[1])
    return None


def check_anchors(study: optuna.Study, anchors: Mapping[str, Any]) -> None:
    """Keep the anchors in the study; RefusedInput if it has others, by which its scores are not comparable."""
    stored, moved = study.user_attrs.get("anchors", anchors), []
    study.set_user_attr("anchors", stored)
    for name in [name for name in stored if name != "data"]:  # no score depends on it; the final stage adds its own
        tolerance = GREY_TOLERANCE if name == "usable" else ANCHOR_TOLERANCE
        moved += fingerprint_differences(stored[name], anchors.get(name), name, tolerance=tolerance)
    if moved:
        differ = f"the score's anchors differ from the study's ({'; '.join(moved[:3])})"
        raise RefusedInput(f"{differ}: its scores would not be comparable; restore reference/, or {ANOTHER_STUDY}")


# ======================================================================================================
# 13. Command line: parser, demo, main. The only place that prints an error and chooses an exit status:
#     0 complete, 1 stopped by itself, 2 refused, 130 interrupted.
# ======================================================================================================


def _path(text: str) -> Path:
    """A path that the file system and a UTF-8 file can hold; whether something is there is checked later."""
    if not text or (sys.platform != "win32" and re.match(r"[A-Za-z]:\\", text)):
        raise argparse.ArgumentTypeError(f"{text!r} can't be a path here; {path_remedy(text)}")
    try:
        text.encode()
        path = Path(text).expanduser()
        path.exists()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} can't be a path ({one_line(error, 80)}); correct it") from None
    return path


def _program(text: str) -> str:
    """A program as a shell finds it: by its path if it has a slash, else on the PATH. A venv's link is not followed."""
    return str(_path(text).absolute()) if "/" in text else shutil.which(text) or text


class OneLineParser(argparse.ArgumentParser):
    """argparse, with its errors in this program's form: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        if words := message.partition("unrecognized arguments: ")[2].split():
            # Only flags are shown: after a mistyped --storage the other words may be parts of a password.
            flags = [word.partition("=")[0] for word in words if word.startswith(("--", "\u2013", "\u2014"))]
            message = f"unrecognized arguments: {' '.join(flags) or 'values without a flag'}"
        raise RefusedInput(f"{message}; see --help")


def add_other_modes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("instead of searching")
    add = group.add_mutually_exclusive_group().add_argument
    add("--check", action="store_true", help="check all inputs, say what was found, and stop")
    report = "write results/ and show the trials; with --scoring-config, under its weights"
    add("--report", action="store_true", help=report)
    add("--score", type=_path, metavar="TRIAL_FOLDER", help="score the checkpoints of one trial")
    add("--demo", action="store_true", help="the whole program on small inputs of its own, on the CPU")
    families = {"type": str.lower, "choices": [name.lower() for name in FAMILIES]}
    group.add_argument("--family", **families, help=f"of the demo's base model ({SD1.name.lower()})")


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Search the hyperparameters of kohya-ss/sd-scripts for the best character LoRA. "
        "Running the same command again resumes the study, whatever happened to the first run. "
        "Ctrl-C, or kill with its process number, ends it within ten seconds.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to train on").add_argument
    add("--dataset-config", type=_path, metavar="TOML", help="kohya's data set file")
    add("--base-model", type=_path, metavar="MODEL", help="SD 1.x or SDXL, a safetensors file or a diffusers folder")
    add("--subject", metavar="NAME", help="the character's name in the captions (default: found there)")
    add("--eval-prompts", type=_path, metavar="FILE", help="your own prompts, in kohya's sample-prompt format")

    add = parser.add_argument_group("how much to search").add_argument
    add("--n-trials", type=int, metavar="N", help="trials to train in total, earlier runs included (20)")
    first = "to try first: files of parameters, or output folders of earlier searches, each one's three best"
    add("--enqueue", type=_path, nargs="+", action="extend", default=[], metavar="PATH", help=first)
    add("--timeout", dest="timeout_hours", type=float, metavar="HOURS", help="start no new trial after that")
    add("--prune", choices=("on", "off"), default="on", help="stop trainings early that are unlikely to win (on)")
    add("--stall-minutes", type=float, default=30.0, metavar="MINUTES", help="stop a trainer that makes no step (30)")
    add("--seed", type=int, default=42, help="of the proposals, not of the trainings (42)")

    add = parser.add_argument_group("where things are").add_argument
    add("--output-dir", type=_path, metavar="DIR", help="the study, its trials and results/")
    add("--keep-checkpoints", choices=("best", "all"), default="best", help="those of the best trials, or all (best)")
    add("--study-name", metavar="NAME", help=f"the study's name in its storage ({DEFAULT_STUDY_NAME})")
    add("--storage", metavar="URL", help="the study's database (SQLite in the output folder)")
    several = f"cuda:0,cuda:1; {ALL_CARDS}; cpu,cpu"
    add("--device", default="cuda", help=f"cuda, cuda:N or cpu (cuda); several share the trials ({several})")
    nearby: dict[str, Any] = {"default": os.environ.get("SD_SCRIPTS_DIR") or None, "metavar": "DIR"}
    add("--sd-scripts", type=_path, **nearby, help="kohya-ss/sd-scripts ($SD_SCRIPTS_DIR, else looked for nearby)")
    add("--trainer-python", type=_program, default=sys.executable, metavar="EXE", help="kohya's Python (this one)")

    add = parser.add_argument_group("settings files").add_argument
    add("--training-config", type=_path, metavar="TOML", help="fixed kohya options (the family's, in configs/)")
    add("--search-space", type=_path, metavar="TOML", help="what is searched (V2.1; for SDXL its own, in configs/)")
    add("--scoring-config", type=_path, metavar="TOML", help="how LoRAs are judged (the family's, in configs/)")

    add_other_modes(parser)
    return parser


def find_sd_scripts() -> Path:
    """Where people have it: beside this script, in the current folder, at home; there perhaps inside kohya_ss."""
    bases = dict.fromkeys((HERE, HERE.parent, Path.cwd(), Path.home()))
    places = [base / name for base in bases for name in ("", "sd-scripts", "kohya_ss/sd-scripts")]
    if found := next((place for place in places if (place / "train_network.py").is_file()), None):
        return found
    nowhere = f"there is no sd-scripts/ or kohya_ss/sd-scripts/ in {', '.join(map(str, bases))}"
    raise RefusedInput(f"--sd-scripts is missing; give kohya-ss/sd-scripts' folder ({nowhere})")


def read_settings(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """The command line as Settings, and what is missing or wrong in it; a missing value is None."""
    problems = Problems(senseless_values(args))
    for flag, value, remedy in (
        ("--dataset-config", args.dataset_config, "give kohya's data set TOML (see configs/)"),
        ("--base-model", args.base_model, f"give a safetensors file of {' or '.join(FAMILIES)}"),
        ("--output-dir", args.output_dir, "give a folder for the study"),
    ):
        problems += [] if value else [f"{flag} is missing; {remedy}"]
    values = {name: value for name, value in vars(args).items() if name in Settings.__annotations__}
    values["sd_scripts"] = args.sd_scripts or problems.of(find_sd_scripts)
    for name in ("dataset_config", "output_dir", "sd_scripts"):
        values[name] = values[name] and values[name].resolve()
    values["base_model"] = args.base_model and args.base_model.absolute()  # a link's own name is shown
    values["study_name"] = args.study_name or DEFAULT_STUDY_NAME
    values["n_trials"] = 20 if args.n_trials is None else args.n_trials
    values["storage"] = args.storage or (default_storage(values["output_dir"]) if args.output_dir else "")
    return Settings(**values), problems


def senseless_values(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the command line's values."""
    if sys.platform == "win32":
        yield "native Windows is not supported; run it in WSL2"
    if not DEVICE.fullmatch(args.device):
        yield f"--device: {args.device!r} is no device; give cuda, cuda:N, cuda:N,cuda:M, {ALL_CARDS}, cpu or cpu,cpu"
    if args.output_dir and args.output_dir.resolve() in [path.resolve() for path in args.enqueue]:
        yield f"--enqueue: {args.output_dir} is the folder of this search; give an earlier one's, or leave it out"
    cards = [name for name in args.device.split(",") if name != "cpu"]
    if repeated := {name for name in cards if cards.count(name) > 1}:
        yield f"--device: {', '.join(repeated)} stands there twice; leave one out"
    if args.family and not args.demo:
        yield "--family: is for --demo alone, since a base model's file says its family; leave it out"
    if args.scoring_config and args.score:
        yield "--scoring-config: --score judges as the study does; leave it out, or give it with --report"
    for flag, value, low, high in (
        ("--n-trials", args.n_trials, 0, 2**31),
        ("--timeout", args.timeout_hours, 0, math.inf),
        ("--stall-minutes", args.stall_minutes, 0, math.inf),
        ("--seed", args.seed, -1, 2**32),
    ):
        if value is not None and not low < value < high:
            yield f"{flag}: {one_line(value, 20)} must be above {low} and below {high}; correct it"
    name = args.study_name
    if name is not None and not (name.strip() and name == name.encode(errors="replace").decode()):
        yield f"--study-name: {name!r} is empty or not UTF-8; give another name, or leave it out"


def run_search(settings: Settings, known_problems: Sequence[str], *, only_check: bool = False) -> None:
    """The whole search, or only its checks."""
    started = time.monotonic()
    say("Checking the inputs ...")
    inputs = check_inputs(settings, known_problems, afresh=only_check)
    settings = inputs.settings
    if only_check:
        say(str(CheckReport(inputs)))
        return
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    with holding(settings.output_dir):
        screen.log_file = settings.output_dir / LOG_NAME
        say(str(CheckReport(inputs)))
        for folders in ("trial_*", "reference/**", FINAL):  # the lock says that whoever started it has ended
            for file in settings.output_dir.glob(f"{folders}/*{PROCESS_FILE}"):
                ChildProcess.end_left_over(file)
        study = open_study(inputs)
        study_on = functools.partial(study_on_device, inputs, study, started)
        ours = study_on(settings.devices[0])
        with screen.live():
            screen.show("study", ", ".join(ours.progress()))
            reference = Reference(inputs)
            reference.write_inputs()
            study.sampler = reference.train_first_step(ours.objective.trainer).sampler()
            reference.make_anchors(study, ours.objective.scorer)
        ours.enqueue(inputs.enqueued)
        try:
            workers = Workers(settings.devices, study_on) if len(settings.devices) > 1 else None
            with screen.live(workers.names if workers else ("",)):
                ours.run(workers and workers.run)
            with screen.live():
                ours.decide(ours.objective.scorer)
        finally:
            show_results(study, settings.output_dir)


def study_on_device(inputs: Inputs, study: optuna.Study, started: float, device: str) -> Study:
    """The study as the program, or its worker on a device, runs it."""
    settings, script = inputs.settings, inputs.settings.sd_scripts / inputs.base_model.family.script
    scorer = functools.partial(score_in_child, device=device, stall_minutes=settings.stall_minutes)
    trainer = KohyaTrainer(settings.trainer_python, script, device, settings.stall_minutes)
    early = EarlyStopping(inputs.plan["stop_early"], inputs.options["save_every_n_epochs"], scorer)
    study.pruner = early.pruner()
    stopping = early if settings.prune == "on" else None
    objective = LoraObjective(settings, inputs.options, trainer, scorer, stopping, inputs.space)

    def before_trial() -> None:
        inputs.check_room(inputs.largest_trial_bytes(), SearchStopped)
        with only_warning(f"not all of {settings.output_dir / 'results'} is written"):
            Results(study, settings.output_dir).write()
        with only_warning("the notes for optuna-dashboard are not all written"):
            write_notes(study)

    return Study(study, settings, objective, started, before_trial)


def describe_end(error: BaseException, storage: str) -> tuple[int, str]:
    """The exit status for what ended the program, and what is said of it."""
    if isinstance(error, RefusedInput):
        return 2, "\n".join(f"error: {printable(problem)}" for problem in error.problems)
    if isinstance(error, KeyboardInterrupt):  # a line of its own, after the terminal's ^C
        return 130, f"\ninterrupted{f' ({error})' if str(error) else ''}; the same command resumes"
    told = Storage(storage).describe_error(error) if storage else one_line(error.__cause__ or error)
    if isinstance(error, SearchError):
        why = one_line(error, 1000)
    elif isinstance(error, optuna.exceptions.StorageInternalError):
        why = f"the study's database failed ({told}); the same command goes on"
    elif isinstance(error, OSError):  # a disk that is full or gone, outside of any trial
        why = f"{one_line(error)}; mend that and give the same command again"
    else:  # a fault of this program
        lines = traceback.format_tb(error.__traceback__)
        return 1, "".join(["Traceback (most recent call last):\n", *lines, f"{type(error).__name__}: {told}"])
    return 1, f"stopped: {printable(why)}"


def run_report(args: argparse.Namespace) -> None:
    if args.output_dir is None:
        raise RefusedInput("--output-dir is missing; give the folder of the study")
    output_dir = args.output_dir.resolve()
    plan = read_json(output_dir / "reference" / "plan.json") or {}
    name = args.study_name or plan.get("study", DEFAULT_STUDY_NAME)
    study = load_study(args.storage or default_storage(output_dir), name)
    if study is None:
        raise RefusedInput(f"--report: no study {name!r} in {output_dir}; check --output-dir, --study-name, --storage")
    weights = ScoringSettings.read(args.scoring_config).weights if args.scoring_config else None
    if not plan:
        say(f"warning: {output_dir / 'reference'} is not whole, so the report lacks pictures; the search mends it")
    show_results(study, output_dir)
    if weights and (scored := scored_trials(study)):  # an earlier version has not measured all terms
        known = {name: w for name, w in weights.items() if all(name in trial.user_attrs["terms"] for trial in scored)}
        found = ((float(combine(trial.user_attrs["terms"], known)), trial) for trial in scored)
        say("\nWith the weights of --scoring-config:")
        for score, trial in sorted(found, key=lambda one: -one[0]):
            say(f"  trial {trial.number:5d}  {score:.3f}  (was {trial.value:.3f})")


def show_results(study: optuna.Study, output_dir: Path) -> None:
    """The table comes first: a full disk must hide neither it nor why the search ended."""
    say(describe_study(study))
    results = Results(study, output_dir)
    if results.votes:
        say(f"\n{results.votes}")
    with only_warning(f"not all of {results.folder} is written"):
        results.write()
        if results.ranked:
            say(results.describe_best())
    with only_warning("optuna-dashboard does not show all notes and contact sheets"):
        write_notes(study)
        for trial in results.ranked:
            ContactSheet(find_trial_folder(trial, output_dir)).restore(trial, study._storage, output_dir / ARTIFACTS)


def demo_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Make the demo's inputs in its output folder; in all else it is a real run."""
    maker = HERE / "tests" / "demo_world.py"
    if not maker.is_file():
        raise RefusedInput(f"--demo: {maker} is missing; get the whole repository")
    inputs = ("dataset_config", "base_model", "scoring_config", "training_config", "sd_scripts", "trainer_python")
    defaults = vars(make_parser().parse_args([]))
    for own in (*inputs, "device"):
        if getattr(args, own) not in (defaults[own], "cpu"):
            raise RefusedInput(f"--demo: has its own inputs and runs on the CPU; leave out --{own.replace('_', '-')}")
    family = next((name for name in FAMILIES if name.lower() == args.family), SD1.name)
    args.output_dir = (args.output_dir or Path("runs/demo" if family == SD1.name else f"runs/demo_{family}")).resolve()
    problems = Problems(senseless_values(args))
    problems.of(check_output_dir, args.output_dir)
    problems.refuse()
    world = args.output_dir / "inputs"
    sys.path.insert(0, str(maker.parent))
    import demo_world

    say(f"The demo's data set, small Stable Diffusion and settings: {world}")
    demo_world.make_demo_world(world, family)
    args.dataset_config, args.base_model = world / "dataset.toml", world / "base_model"
    args.sd_scripts, args.trainer_python = HERE / "tests" / "small_trainer", sys.executable
    args.training_config, args.scoring_config = world / "training.toml", world / "scoring.toml"
    args.device, args.n_trials, args.study_name = "cpu", args.n_trials or 4, args.study_name or "demo"
    return args


def run(args: argparse.Namespace) -> None:
    if args.score:
        Problems(senseless_values(args)).refuse()
        folder = args.score.resolve()
        is_ours = bool(os.environ.get(PARENT_HOLDS_FOLDER))
        find_what_to_score(folder, may_be_paused=is_ours)  # before a lock is made where it has no place
        with contextlib.nullcontext() if is_ours else holding(folder.parent):
            device = "cuda" if args.device == ALL_CARDS else args.device.split(",")[0]
            score_folder(folder, device, by_search=is_ours)
    elif args.report:
        run_report(args)
    else:
        run_search(*read_settings(demo_settings(args) if args.demo else args), only_check=args.check)


def interrupt_unless_typed(number: int, _frame: Any) -> None:
    """Handles SIGINT in a script's background job: `kill -INT` is meant for it, Ctrl-C for what the script waits for.

    A terminal sends Ctrl-C to its foreground process group alone, to which such a job still belongs.
    """
    with contextlib.suppress(OSError), open("/dev/tty", "rb") as terminal:  # OSError: there is no terminal
        if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
            return
    interrupt(number)


def without_storage(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line, with no more of --storage than may be shown."""
    words = [sys.executable, *sys.argv] if argv is None else [Path(__file__).name, *argv]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--storage=") else [word])]
    return [Storage(word).shown if before == "--storage" else word for before, word in itertools.pairwise(["", *words])]


def catch_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the search in an orderly way, unless the parent process ignores them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # native Windows, which is refused, has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, interrupt)
        elif number == signal.SIGINT:  # a script has it ignored in what it starts with `&`
            signal.signal(number, interrupt_unless_typed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 complete, 1 stopped by itself, 2 refused before anything was done, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a search
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[LibraryLog()])
    catch_signals()
    storage = ""
    try:
        args = make_parser().parse_args(argv)
        storage = args.storage or ""
        args.command = shlex.join(without_storage(argv))
        run(args)
    except (Exception, KeyboardInterrupt) as error:
        status, said = describe_end(error, storage)
        screen.log(said.strip())
        try:
            print(said, file=sys.stderr, flush=True)
        except OSError:  # whoever read it is gone
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        return status
    finally:
        screen.log_file = None
    return 0


if __name__ == "__main__":
    sys.exit(main())
