"""What a user sees: a live region in a terminal, plain lines elsewhere; most of it of the real program."""

from __future__ import annotations

import datetime
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import demo_world
import pytest
from fault_storm import environment, search_command, wait_until_none
from optuna.trial import FrozenTrial, TrialState

import optuna_hyperparameter_search as search

LABELS = ("study", "trial", "train", "score")
NAME = "[bold]storm"
PARAMS = search.V2_1.complete(
    {
        "network_dim": 128,
        "network_alpha_ratio": 0.55,
        "learning_rate": 1e-4,
        "text_encoder_lr": 4.8e-5,
        "optimizer_type": "AdamW8bit",
        "max_train_epochs": 12,
        "lr_scheduler": "cosine_with_restarts",
        "gradient_accumulation_steps": 2,
        "lr_warmup_steps": 100,
        "lr_scheduler_num_cycles": 2,
    }
)


# --- a terminal, and what it shows -------------------------------------------------------------------


class Terminal:
    """A terminal of so many columns: what was printed into it, as it looks and in its scroll-back."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        pyte = pytest.importorskip("pyte", reason="of the screen in a terminal (pip install pyte)")
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self.columns = columns

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    def all_lines(self) -> list[str]:
        above = ["".join(line[column].data for column in range(self.columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in above] + self.lines()

    def shows_cursor(self) -> bool:
        return not self._screen.cursor.hidden


def region(lines: list[str]) -> list[str]:
    """The four lines of a live region that stands whole."""
    for start in range(len(lines) - 3):
        if all(line.startswith(f"{label} ") for label, line in zip(LABELS, lines[start:], strict=False)):
            return lines[start : start + 4]
    return []


def left_over(lines: list[str]) -> list[str]:
    """What is left of live regions; the table of results begins with "trial", too."""
    labels = tuple(f"{label} " for label in LABELS)
    return [line for line in lines if line.startswith(labels) and not line.startswith("trial  final  ")]


@dataclass
class Session:
    """A program's life in a pseudo-terminal."""

    terminal: Terminal
    output: bytes = b""
    regions: list[list[str]] = field(default_factory=list)  # all that were seen, in order
    status: int | None = None


def run_in_terminal(
    command: list[str], variables: dict[str, str], columns: int = 80, ctrl_c: Callable[[Session], bool] | None = None
) -> Session:
    """Run to the end; press Ctrl-C once, when that function says so."""
    session = Session(Terminal(columns))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**environment(**{"TERM": "xterm-256color", **variables})}
    for name in ("COLUMNS", "LINES", *(name for name in ("NO_COLOR", "FORCE_COLOR") if name not in variables)):
        env.pop(name, None)

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    program = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=take_terminal)
    os.close(slave)
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            if not select.select([master], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(master, 1 << 16)
            except OSError:  # the program is gone
                break
            session.output += data
            session.terminal.feed(data)
            if (now := region(session.terminal.lines())) and session.regions[-1:] != [now]:
                session.regions.append(now)
            if ctrl_c and ctrl_c(session):
                ctrl_c = None
                os.write(master, b"\x03")
        session.status = program.wait(10)
    finally:
        program.kill()
        program.wait()
        os.close(master)
    return session


# --- the real program --------------------------------------------------------------------------------


@dataclass
class Evening:
    """Three runs of one study: whole in a terminal, interrupted in a poor terminal, and to its end in a pipe."""

    top: Path

    def command(self, n_trials: int) -> list[str]:
        return search_command(self.top / "world", self.top / "out", n_trials, "--study-name", NAME)


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory) -> Evening:
    top = tmp_path_factory.mktemp("evening")
    demo_world.make_tiny_world(top / "world")
    return Evening(top)


@pytest.fixture(scope="module")
def whole(evening: Evening) -> Session:
    """Two trials at 80 columns; the second crashes, and is tried again."""
    variables = {"STEP_SECONDS": "0.02", "FAULT": "die@3:trial_0001", "COLORTERM": "truecolor"}
    session = run_in_terminal(evening.command(2), variables)
    assert session.status == 0, session.terminal.all_lines()
    return session


@pytest.fixture(scope="module")
def interrupted(evening: Evening, whole: Session) -> Session:
    """Ctrl-C in the third training, in a terminal without colours and Unicode."""
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1"}
    return run_in_terminal(
        evening.command(3),
        {"STEP_SECONDS": "0.05", **poor},
        ctrl_c=lambda session: bool(session.regions) and "epoch 8/" in session.regions[-1][2],
    )


@pytest.fixture(scope="module")
def plain(evening: Evening, interrupted: Session) -> str:
    """The rest, in a pipe that is said to be a terminal."""
    env = environment(FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm-256color")
    done = subprocess.run(evening.command(3), capture_output=True, env=env, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.decode()


def test_the_live_region_tells_study_trial_training_and_scoring(whole: Session) -> None:
    trial = r"trial 0  dim \d+  alpha \d+ \(ratio 0\.\d{3}\)  lr \S+e-05/\S+e-05  AdamW"
    bar = "[━╸╺]{8}"
    training = rf"train {bar} epoch [3-9]/\d+  step \d+/\d+  [\d.]+ it/s  loss 0\.\d+  ETA \d\d:\d\d"
    scoring = rf"score {bar} [1-9]\d* of \d+ images"
    first = r"study 0 of 2 trained, no score yet, end not known yet +0:0\d:\d\d"
    later = r"study 1 of 2 trained, best 0\.\d{3} \(trial 0\), done ~\w{3} \d\d:\d\d +0:\d\d:\d\d"
    for study, second, third, fourth in (
        (first, trial, training, f"score {bar} -"),
        (first, trial, rf"train {bar} epoch.*", scoring),
        (first, "trial none yet: the reference is made", f"train {bar} -", scoring),
        (later, trial.replace(" 0 ", " 1 "), ".*", ".*"),
    ):
        wanted = re.compile("\n".join((study, second + ".*", third, fourth)))
        assert any(wanted.fullmatch("\n".join(seen)) for seen in whole.regions), (wanted.pattern, whole.regions)


def test_no_line_of_the_live_region_wraps_or_is_left_over(whole: Session) -> None:
    assert len(whole.regions) > 20
    assert any(seen[1].endswith("…") for seen in whole.regions)  # a trial's parameters are longer than a line
    assert not left_over(whole.terminal.all_lines())
    assert whole.terminal.shows_cursor()


def test_one_line_stays_of_a_trial(whole: Session) -> None:
    lines = whole.terminal.all_lines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Making the reference"))
    end = next(number for number, line in enumerate(lines) if line.startswith("Study '"))
    scored = r"Trial {} scored 0\.\d{{3}} \+-0\.\d{{3}}, epoch \d+; {} of 2 trained, best 0\.\d{{3}} \(trial \d\)"
    wanted = (
        scored.format(0, 1),
        r"Trial 1 crashed: the trainer ended with status 1: RuntimeError: the worker has l\nost its mind",
        scored.format(1, 2),
        r"The final stage: trials \d, \d once more, on fresh prompts and seeds \.\.\.",
    )
    said = "\n".join(lines[start + 1 : end]).strip()
    assert re.fullmatch("\n".join(wanted), said), said
    assert lines[end] == f"Study '{NAME}', best first:"


def test_details_are_in_the_log(whole: Session, evening: Evening) -> None:
    said = (evening.top / "out" / "search.log").read_text()
    for line in ("  network_alpha: ", "  epoch 1/", "  scoring took ", "  epoch   5    score ", "Trial 0 scored "):
        assert line in said
        assert line == "Trial 0 scored " or line not in "\n".join(whole.terminal.all_lines())


COLOURS = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10[0-7])(?:;\d+)*m")


def test_colours_only_without_no_color(whole: Session, interrupted: Session) -> None:
    assert COLOURS.search(whole.output) and not COLOURS.search(interrupted.output)


def test_only_ascii_where_the_terminal_knows_no_more(interrupted: Session) -> None:
    assert interrupted.output.isascii() and b"?" not in interrupted.output.replace(b"ETA ?", b"").replace(b"[?25", b"")
    assert any(re.match("train -+ +epoch ", seen[2]) for seen in interrupted.regions)


def test_ctrl_c_leaves_the_terminal_clean(interrupted: Session, evening: Evening) -> None:
    assert interrupted.status == 130
    assert interrupted.terminal.shows_cursor()
    lines = [line for line in interrupted.terminal.all_lines() if line]
    assert not left_over(lines)
    assert lines[-1] == "interrupted; the same command resumes"
    assert "Trial 2 was interrupted; the same command continues it." in lines
    assert not wait_until_none(evening.top / "out", 2)


def test_a_pipe_gets_plain_lines_whatever_is_forced(plain: str) -> None:
    assert "\x1b" not in plain and "\r" not in plain
    assert re.search(r"^  epoch 2/\d+  step \d+/\d+ +\d+%  loss \S+  ETA \S+$", plain, re.MULTILINE)
    assert re.search(r"^  network_alpha: \d+ \(ratio: 0\.\d{3}\)$", plain, re.MULTILINE)
    assert re.search(r"^  epoch   5    score 0\.\d{3} \+-0\.\d{3}  \(fidelity", plain, re.MULTILINE)
    assert re.search(
        r"^Trial 2 scored .*; 3 of 3 trained, best 0\.\d{3} \(trial \d\), done ~\w{3} \d\d:\d\d$", plain, re.MULTILINE
    )


# --- the screen alone --------------------------------------------------------------------------------


class Stdout(io.TextIOWrapper):
    """A terminal as the program's standard output."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, errors="replace", newline="\r\n")

    def isatty(self) -> bool:
        return True

    def take(self) -> bytes:
        self.flush()
        return self.bytes.getvalue()


def set_up(monkeypatch: pytest.MonkeyPatch, columns: int = 80, encoding: str = "utf-8") -> Stdout:
    """Call it in the test itself: pytest changes sys.stdout after the fixtures."""
    for name, value in {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(search, "screen", search.Screen())
    stdout = Stdout(encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    return stdout


def show_a_long_training() -> None:
    progress = search.TrainingProgress()
    progress.read("epoch 12/20\n")
    for step in range(1234, 1241):
        progress.read(f"\rsteps:  50%|█ | {step}/4000 [1:00:01<1:02:11,  1.85it/s, avr_loss=0.0862]")
        time.sleep(0.002)


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_no_row_is_longer_than_the_terminal_is_wide(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, terminal = set_up(monkeypatch, columns), Terminal(columns)
    with search.screen.live():
        search.screen.begin("12", *search.brief_params(PARAMS))
        search.screen.show("study", "12 of 20 trained, best 0.7315 (trial 12), done ~Sat 07:41")
        show_a_long_training()
        search.screen.show("score", "37 of 148 images", 37, 148)
        redraw()
        terminal.feed(stdout.take())
        lines = terminal.lines()
        shown = region(lines)
        assert shown and not any(lines[4:])
        assert columns < 80 or not any("…" in shown[number] for number in (0, 2, 3))
    if columns == 80:
        assert re.fullmatch(r"study 12 of 20 trained, best 0.7315 \(trial 12\), done ~Sat 07:41 +0:00:\d\d", shown[0])
        assert "12  dim 128  alpha 70 (ratio 0.550)  lr 1.00e-04/4.80e-05  AdamW8bit" in shown[1]
        steps = r"epoch 12/20  step 1240/4000  \d+(\.\d+)? it/s  loss 0.0862  ETA 1:02:11"
        assert re.fullmatch(rf"train [━╸╺]{{8}} {steps}", shown[2])
    if columns == 40:
        assert re.fullmatch("train [━╸╺]{8} epoch 12/20  step 1240/4…", shown[2])
        assert re.fullmatch("score [━╸╺]{8} 37 of 148 images", shown[3])


def redraw() -> None:
    time.sleep(1 / search.REDRAWS_PER_SECOND)
    search.screen.refresh()


def test_names_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)
    terminal = Terminal()
    with search.screen.live():
        search.screen.begin("[red]:boom:\x1b[31m{task}")
        search.say("A warning of [bold]x[/bold] and :smile: \x1b[2J")
        redraw()
        terminal.feed(stdout.take())
        assert terminal.lines()[0] == "A warning of [bold]x[/bold] and :smile: \\x1b[2J"
        assert region(terminal.lines())[1] == "trial [red]:boom:\\x1b[31m{task}"


def test_redraws_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, now = set_up(monkeypatch), time.monotonic()
    with search.screen.live():
        before = stdout.take().count(b"study")
        monkeypatch.setattr(search.time, "monotonic", lambda: now)
        for _ in range(500):
            now += 0.001
            search.screen.refresh()
        assert 3 <= stdout.take().count(b"study") - before <= 7


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_moves_no_cursor_gets_plain_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)
    monkeypatch.setenv("TERM", term)
    with search.screen.live():
        search.screen.refresh()
        search.say("a detail", detail=True)
    assert stdout.take() == b"a detail\r\n"


def test_details_give_way_to_the_live_region(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)
    with search.screen.live():
        search.say("a detail", detail=True)
        search.say("\na line")
    assert b"a detail" not in stdout.take() and b"a line" in stdout.take()


def test_a_signal_waits_for_a_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)
    terminal = Terminal()
    write = stdout.write

    def interrupted(text: str) -> int:
        monkeypatch.setattr(stdout, "write", write)
        written = write(text)
        search.signal.raise_signal(search.signal.SIGTERM)  # rich does not know yet that this is written
        return written

    before = search.signal.signal(search.signal.SIGTERM, search.interrupt)
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), search.screen.live():
            monkeypatch.setattr(stdout, "write", interrupted)
            search.say("whole")
    finally:
        search.signal.signal(search.signal.SIGTERM, before)
    terminal.feed(stdout.take())
    assert [line for line in terminal.lines() if line] == ["whole"] and terminal.shows_cursor()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        search.interrupt(search.signal.SIGINT)


def test_a_terminal_that_is_gone_ends_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)

    def gone(_text: str) -> int:
        raise OSError(5, "Input/output error")

    with search.screen.live():
        monkeypatch.setattr(stdout, "write", gone)
        search.say("unheard")
        assert sys.stdout is not stdout
        redraw()


def test_an_error_finds_the_live_region_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)
    terminal = Terminal()
    with pytest.raises(search.SearchStopped), search.screen.live():
        raise search.SearchStopped("full")
    terminal.feed(stdout.take())
    assert not any(terminal.lines()) and terminal.shows_cursor()


# --- what the rows say -------------------------------------------------------------------------------

SCORING = (
    "  data set: 16 images through the VAE\n\rimages:   0%|     | 0/148 [00:00<?, ? images/s]"
    "\rimages:  25%|█    | 37/148 [00:05<00:15,  7.30 images/s]\r          \r"
    "  epoch   5    score 0.6840\n/lib/library.py:3: UserWarning: odd\n"
    "  note: 2 images look flat\nfetching:  10%|#  | 1/10 [00:00<?, ?it/s]\rstopped: bad\n"
    "\rimages:  26%|█    | 38/148 [00:05<00:15,  7.30 images/s"
)


@pytest.mark.parametrize("cut", [*range(1, len(SCORING), 7), 1000])
def test_images_and_lines_are_read_however_they_are_cut(cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    progress = search.ScoringProgress()
    for start in range(0, len(SCORING), cut):
        progress.read(SCORING[start : start + cut])
    assert (progress.step, progress.steps) == (37, 148)
    assert progress.lines[-1] == "stopped: bad" and len(progress.lines) == 5
    assert capsys.readouterr().out == (
        "  data set: 16 images through the VAE\n  epoch   5    score 0.6840\n  note: 2 images look flat\n"
    )
    progress.read("]")  # a bar that is whole need not wait for the next one
    assert progress.step == 38


def test_images_are_said_every_ten_seconds_at_most(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(search.time, "monotonic", lambda: now)
    progress = search.ScoringProgress()
    for made in range(41):
        progress.read(f"\rimages:  10%|#  | {made}/148 [00:00<?, ? images/s]")
        now += 0.6
    assert capsys.readouterr().out == "  images 17 of 148\n  images 34 of 148\n"


def test_a_users_scoring_shows_one_bar_that_is_cleanly_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = set_up(monkeypatch)
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)  # however long the machine stands still
    terminal = Terminal()
    bar = search.image_bar(10_000)
    for _ in range(1000):
        bar.update(1)
    bar.write("  epoch   5    score 0.6840")
    bar.update(9_000)
    bar.close()
    print("  scoring took 8 s")
    said = stdout.take()
    assert said.count(b"images:") == 2  # at the start and after the line: what lies between was too quick
    terminal.feed(said)
    assert [line for line in terminal.lines() if line] == ["  epoch   5    score 0.6840", "  scoring took 8 s"]


def trial_of(state: TrialState, used: float = 0.0, training: float = 60.0) -> FrozenTrial:
    """A trial that began so many seconds ago, or that took 40 s to score."""
    attrs = {"training_seconds": training, "scoring_seconds": 40.0, "began": time.time() - used}
    began = datetime.datetime.now() - datetime.timedelta(seconds=used)
    over = None if state == TrialState.RUNNING else began
    return FrozenTrial(0, state, 0.5, began, over, {}, {}, attrs, {}, {}, 0)


@pytest.mark.parametrize(
    ("trials", "used", "left"),
    [(3, [], 300), (3, [40], 260), (3, [500], 200), (1, [500], 0), (4, [40, 60], 150), (2, [-9], 200)],
)
def test_the_end_is_as_far_as_usual_trials_take(trials: int, used: list[float], left: float) -> None:
    scored = [trial_of(TrialState.COMPLETE, training=seconds) for seconds in (10.0, 60.0, 900.0)]
    running = [trial_of(TrialState.RUNNING, seconds) for seconds in used]
    paused = trial_of(TrialState.RUNNING, 50)  # whose program was stopped
    paused.user_attrs["ended"] = "interrupted"
    assert search.seconds_left([*scored, *running, paused], 3 + trials) == pytest.approx(left, abs=1)


def test_plain_lines_import_no_rich() -> None:
    code = "import sys, optuna_hyperparameter_search as s; s.say('x')\nassert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(search.__file__).parent, check=True, capture_output=True)
