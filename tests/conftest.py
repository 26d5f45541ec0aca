"""Shared by all tests: the script on the import path, and a small data set."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import toml
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their programs, ignore it

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers whose processes take all cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

Pictures = Callable[..., Path]
DataSetFile = Callable[..., Path]


# One worker of pytest-xdist takes all modules that read the demo, and first, since the demo takes longest.
READ_DEMO = {"test_dashboard", "test_made_study", "test_results", "test_small_world", "test_verification_checklist"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in READ_DEMO)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Every module stays on one worker, which makes its fixtures once."""
    from xdist.scheduler import LoadScopeScheduling

    class ModuleScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = Path(nodeid.partition("::")[0]).stem
            return "demo" if module in READ_DEMO else module

    config.option.loadscopereorder = False  # it would begin with the modules that have the most tests
    return ModuleScheduling(config, log)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line says what was not run, and what it needs."""
    reasons = (report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ()))
    left_out = [f"{count} {reason}" for reason, count in Counter(reasons).most_common()]
    if config.option.markexpr == "not slow" and not config.option.collectonly:
        left_out.append('slow tests (give -m "")')
    if left_out:
        terminalreporter.write_line(f"not run: {'; '.join(left_out)}")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder without the test's name, in which a test would find the word that it looks for in a message."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def restore_threads() -> Iterator[None]:
    """A trainer sets them for its process, which in some tests is theirs."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Make a folder of PNG pictures with captions: pictures("images", [(64, 64)] * 4)."""

    def make(
        name: str = "images",
        sizes: Sequence[tuple[int, int]] = ((64, 64),) * 4,
        caption: str | None = "luca, a boy, smiling",
        extension: str = ".txt",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", tuple(size), (40 * number % 256, 90, 160)).save(folder / f"{number:02}.png")
            if caption is not None:
                (folder / f"{number:02}{extension}").write_text(caption, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def data_set_file(tmp_path: Path, pictures: Pictures) -> DataSetFile:
    """Write a kohya data set TOML: data_set_file(general={...}, dataset={...}, subsets=[{...}])."""

    def make(
        *,
        general: Mapping[str, Any] | None = None,
        dataset: Mapping[str, Any] | None = None,
        subsets: Sequence[Mapping[str, Any]] | None = None,
        name: str = "data_set.toml",
    ) -> Path:
        if subsets is None:
            subsets = [{"image_dir": str(pictures())}]
        config = {
            "general": {"caption_extension": ".txt", **(general or {})},
            "datasets": [{"resolution": 64, **(dataset or {}), "subsets": [dict(subset) for subset in subsets]}],
        }
        path = tmp_path / name
        path.write_text(toml.dumps(config), encoding="utf-8")
        return path

    return make


@dataclass(frozen=True)
class Demo:
    """What `--demo` left and printed: killed with kill -9 in its second trial, then started again."""

    output_dir: Path
    killed: str
    resumed: str
    status: int


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    output_dir = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, str(REPOSITORY / "optuna_hyperparameter_search.py"), "--demo", "--n-trials", "2"]
    command += ["--output-dir", str(output_dir)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert first.stdout is not None
    killed = ""
    for line in first.stdout:
        killed += line
        if "Trial 1: " in killed and "  epoch 2/" in line:
            break
    first.kill()
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return Demo(output_dir, killed, second.stdout + second.stderr, second.returncode)


def _postgresql_programs() -> Path | None:
    """The folder of Debian's PostgreSQL server programs, or of those on the PATH."""
    there = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ.get("PATH", "").split(os.pathsep))]
    return next((folder for folder in there if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """A PostgreSQL of its own on loopback: user, password and address of a URL."""
    programs = _postgresql_programs()
    if programs is None or not importlib.util.find_spec("psycopg"):
        pytest.skip("on PostgreSQL (apt-get install postgresql, pip install 'psycopg[binary]')")
    # The server refuses to run as root; Debian's package has made a user for it.
    user = "postgres" if os.geteuid() == 0 else None
    top = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if user:
        shutil.chown(top, user)
    (top / "password").write_text("s3cr3t\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = [programs / "initdb", "-D", top / "data", "-U", "searcher", "-A", "scram-sha-256", "--no-sync"]
    subprocess.run([*made, "--pwfile", top / "password"], user=user, check=True, capture_output=True, cwd="/")
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    server = subprocess.Popen(
        [programs / "postgres", "-D", top / "data", "-p", str(port), *options],
        user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"searcher:s3cr3t@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for connections that are still open
        server.wait(30)
        shutil.rmtree(top, ignore_errors=True)


@pytest.fixture
def postgresql(postgresql_server: str) -> Callable[[], str]:
    """Makes an empty database and returns its URL."""
    import psycopg

    def make() -> str:
        name = f"study_{uuid.uuid4().hex}"
        for _ in range(50):  # the port is open before the server lets anyone in
            with contextlib.suppress(psycopg.OperationalError):
                with psycopg.connect(f"postgresql://{postgresql_server}/postgres", autocommit=True) as connection:
                    connection.execute(f"CREATE DATABASE {name}")
                return f"postgresql+psycopg://{postgresql_server}/{name}"
            time.sleep(0.1)
        raise AssertionError("the PostgreSQL server lets nobody in")

    return make
