"""sd-scripts is asked what it would train: once a version and inputs, with a time limit, whatever it has renamed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo_world
import pytest
import toml
from conftest import REPOSITORY, DataSetFile

import optuna_hyperparameter_search as search

OPTIONS = {"cache_latents": True}


@pytest.fixture(autouse=True)
def light() -> Iterator[None]:
    with demo_world.light_packages():
        yield


class SdScripts:
    """A copy of the small trainer that counts how often it is started, in a folder that may be changed."""

    def __init__(self, folder: Path, data_set: Path) -> None:
        self.folder, self.data_set, self.cache = folder, data_set, folder.parent / "answer.json"
        shutil.copytree(demo_world.SMALL_TRAINER, folder)
        shutil.copytree(REPOSITORY / "tests" / "kohya", folder.parent / "kohya")
        counted = f"open({str(folder.parent / 'calls')!r}, 'a').write('x')"
        self.script.write_text(f"{self.script.read_text()}".replace("log = logging", f"{counted}\nlog = logging", 1))

    def ask(self, options: dict[str, Any] = OPTIONS) -> search.TrainerFacts:
        config = search.read_data_set_file(self.data_set)
        where = (self.script, sys.executable, "cpu")
        facts = search.Probe(*where, options, Path("/no/model"), config).ask(self.cache)
        search.write_json(self.cache, facts.answer)
        return facts

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert old in text
        (self.folder / file).write_text(text.replace(old, new))

    @property
    def script(self) -> Path:
        return self.folder / "train_network.py"

    @property
    def calls(self) -> int:
        return len((self.folder.parent / "calls").read_text())


@pytest.fixture
def sd_scripts(tmp_path: Path, data_set_file: DataSetFile) -> SdScripts:
    return SdScripts(tmp_path / "sd" / "scripts", data_set_file())


def test_tells_options_pictures_batches_and_caches(sd_scripts: SdScripts) -> None:
    answer = sd_scripts.ask().answer
    assert answer["options"]["mixed_precision"] == {"kind": "str", "choices": ["no", "fp16", "bf16"], "is_list": False}
    assert answer["options"]["sdpa"]["kind"] == "switch" and answer["options"]["text_encoder_lr"]["is_list"]
    assert answer["batches"] == 4 and [image["size"] for image in answer["images"]] == [[64, 64]] * 4
    assert answer["images"][0]["captions"] == ["luca, a boy, smiling"]
    assert answer["trusted"] == {"plain": False, "sized": False}  # nothing is cached on disk
    assert sd_scripts.ask({"cache_latents_to_disk": True}).answer["trusted"] == {"plain": True, "sized": True}
    assert "stopped" not in answer and "unknown" not in answer


def test_is_asked_once_and_again_when_something_has_changed(sd_scripts: SdScripts, tmp_path: Path) -> None:
    for _ in range(2):
        sd_scripts.ask()
    assert sd_scripts.calls == 1
    (tmp_path / "images" / "00.txt").write_text("luca, swimming")
    assert sd_scripts.ask().answer["images"][0]["captions"] == ["luca, swimming"] and sd_scripts.calls == 2
    sd_scripts.ask({**OPTIONS, "caption_prefix": "a"})
    assert sd_scripts.calls == 3
    sd_scripts.replace("library/config_util.py", '"""What', '"""Now what')
    sd_scripts.ask({**OPTIONS, "caption_prefix": "a"})
    assert sd_scripts.calls == 4


def test_a_cache_of_latents_changes_nothing(sd_scripts: SdScripts, tmp_path: Path) -> None:
    sd_scripts.ask()
    (tmp_path / "images" / "00_0064x0064_sd.npz").write_bytes(b"latents")
    sd_scripts.ask()
    assert sd_scripts.calls == 1


def test_a_package_that_was_installed_is_noticed(sd_scripts: SdScripts) -> None:
    """As AdamW8bit needs bitsandbytes."""
    known = json.loads(json.dumps(sd_scripts.ask().answer))
    known["packages"][1] -= 1
    sd_scripts.cache.write_text(json.dumps(known))
    sd_scripts.ask()
    assert sd_scripts.calls == 2


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"key": 1}'])
def test_a_torn_answer_is_asked_for_again(damage: str, sd_scripts: SdScripts) -> None:
    sd_scripts.ask()
    sd_scripts.cache.write_text(damage)
    sd_scripts.ask()
    assert sd_scripts.calls == 2


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("library/config_util.py", "generate_dataset_group_by_blueprint", "make_data_sets"),
        ("library/config_util.py", "image_data", "pictures"),
        ("library/config_util.py", "process_caption", "prepare_caption"),
        ("library/config_util.py", "class ConfigSanitizer", "class Sanitizer"),
        ("library/strategy_base.py", "get_latents_npz_path", "path_of_latents"),
    ],
)
def test_a_renamed_inside_keeps_nobody_from_training(file: str, old: str, new: str, sd_scripts: SdScripts) -> None:
    for name in (file, "library/config_util.py", "train_network.py"):
        text = (sd_scripts.folder / name).read_text()
        new_text = text.replace("ConfigSanitizer", "Sanitizer") if "Sanitizer" in new else text.replace(old, new)
        (sd_scripts.folder / name).write_text(new_text)
    facts = sd_scripts.ask()
    assert facts.answer["unknown"] and "stopped" not in facts.answer and facts.answer["options"]
    config = search.read_data_set_file(sd_scripts.data_set)
    data_set = search.DataSetReader(sd_scripts.data_set, config).read(OPTIONS, facts.answer)
    assert [image.captions for image in data_set.images] == [("luca, a boy, smiling",)] * 4
    assert data_set.batches_per_epoch is None and "does not say what it trains" in data_set.notes[-1]
    known = json.loads(json.dumps({**facts.answer, "notes": data_set.notes}))
    assert search.DataSetReader(sd_scripts.data_set, config).read(OPTIONS, known).notes == data_set.notes  # said once


@pytest.mark.parametrize("lines", [False, True])
def test_metadata_is_read_where_sd_scripts_does_not_answer(lines: bool, sd_scripts: SdScripts, tmp_path: Path) -> None:
    """A changed inside of kohya keeps nobody with a metadata file from training either."""
    folder = tmp_path / "images"
    entries = {name: {"caption": "luca", "tags": "a boy"} for name in ("00.png", "01.png")}
    file = folder / ("meta.jsonl" if lines else "meta.json")
    named = "\n".join(json.dumps({"image_path": name, **entry}) for name, entry in entries.items())
    file.write_text(named if lines else json.dumps(entries))
    data = toml.loads(sd_scripts.data_set.read_text())
    data["datasets"][0]["subsets"] = [{"image_dir": str(folder), "metadata_file": str(file)}]
    sd_scripts.data_set.write_text(toml.dumps(data))
    config = search.read_data_set_file(sd_scripts.data_set)
    data_set = search.DataSetReader(sd_scripts.data_set, config).read(OPTIONS, {"unknown": "no such function"})
    assert [(i.path.name, i.captions) for i in data_set.images] == [(name, ("luca, a boy",)) for name in entries]
    file.write_text("{")
    with pytest.raises(search.RefusedInput, match="can't use metadata_file"):
        search.DataSetReader(sd_scripts.data_set, config).read(OPTIONS, {"unknown": "no such function"})


def test_the_first_steps_log_tells_the_batches(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    log.write_text("  num batches per epoch / 1epochのバッチ数: 12\nx")
    assert search.printed_batches(log) == 12
    log.write_text("nothing")
    assert search.printed_batches(log) is None and search.printed_batches(tmp_path / "none") is None


def ask(folder: Path, body: str, device: str = "cpu", python: str = sys.executable) -> dict[str, Any]:
    folder.mkdir()
    script = folder / "train_network.py"
    script.write_text(body)
    return search.Probe(script, python, device, {}, Path("/no/model"), {"datasets": []}).ask().answer


def test_a_folder_without_the_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match=r"no train_network\.py; give the folder"):
        search.Probe(
            tmp_path / "train_network.py", sys.executable, "cpu", {}, Path("/no/model"), {"datasets": []}
        ).ask()


@pytest.mark.parametrize("body", ["print('hello')", "raise ImportError('no')", "import sys; sys.exit(3)", "x ="])
def test_another_program_of_that_name_is_refused(body: str, tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match="does not answer as kohya's trainer does"):
        ask(tmp_path / "other", body)


def test_a_probe_that_the_kernel_killed_is_no_wrong_python(tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match=r"was killed \(SIGKILL\).*; close other programs and try again"):
        ask(tmp_path / "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.parametrize(("python", "says"), [("/no/such/python", "can't run"), ("/bin/echo", "no working Python")])
def test_a_python_that_is_none_is_refused(python: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match=says):
        ask(tmp_path / "sd", "", python=python)


def test_a_trainer_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PROBE_SECONDS", 2.0)
    with pytest.raises(search.RefusedInput, match="took more than 2 s and was ended"):
        ask(tmp_path / "sd", "import time\ntime.sleep(600)")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    with pytest.raises(
        search.RefusedInput, match="has no diffusers, transformers, safetensors, toml; install it there, or give"
    ):
        ask(tmp_path / "sd", "", python=str(python))


def test_lycoris_is_needed_where_it_is_trained(
    sd_scripts: SdScripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["lycoris"] = None\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    config, about = search.read_data_set_file(sd_scripts.data_set), (sd_scripts.script, sys.executable, "cpu")
    options = {**OPTIONS, "network_module": search.LYCORIS}
    with pytest.raises(search.RefusedInput, match="has no lycoris-lora; install it there"):
        search.Probe(*about, options, Path("/no/model"), config).ask()
    with pytest.raises(search.RefusedInput, match="has no xformers; install it there, or give"):
        search.Probe(*about, {**OPTIONS, "xformers": True}, Path("/no/model"), config).ask()
    search.Probe(*about, OPTIONS, Path("/no/model"), config).ask()


def test_an_argument_that_kohyas_lora_does_not_read_is_refused(sd_scripts: SdScripts) -> None:
    assert sd_scripts.ask().answer["options"]["network_args"]["choices"] == []
    (sd_scripts.folder / "networks").mkdir(exist_ok=True)
    source = "kwargs.get('conv_dim', None)\nkwargs.get(\n    \"conv_alpha\")\n"
    (sd_scripts.folder / "networks" / "lora.py").write_text(source)
    sd_scripts.script.write_text(sd_scripts.script.read_text() + "\n")  # another version
    known = sd_scripts.ask({**OPTIONS, "network_module": "networks.lora"}).answer["options"]
    assert known["network_args"]["choices"] == ["conv_alpha", "conv_dim"]
    assert search._wrong_option("network_args", ["conv_dim=8"], known["network_args"]) == ""
    said = search._wrong_option("network_args", ["conv_dims=8"], known["network_args"])
    assert said == "must be one of conv_alpha, conv_dim"
    known = sd_scripts.ask({**OPTIONS, "network_module": "networks.oft"}).answer["options"]
    assert known["network_args"]["choices"] == []


def test_a_card_that_pytorch_does_not_see_has_no_name(sd_scripts: SdScripts) -> None:
    config = search.read_data_set_file(sd_scripts.data_set)
    where = (sd_scripts.script, sys.executable, "cuda")
    assert search.Probe(*where, OPTIONS, Path("/no/model"), config).ask().device_name == ""


def test_the_probe_leaves_nothing(sd_scripts: SdScripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    before = set(tmp_path.rglob("*"))
    config = search.read_data_set_file(sd_scripts.data_set)
    search.Probe(sd_scripts.script, sys.executable, "cpu", OPTIONS, Path("/no/model"), config).ask()
    made = {path for path in set(tmp_path.rglob("*")) - before if "__pycache__" not in path.parts}
    assert made == {tmp_path / "sd" / "calls"}


def test_the_data_set_that_is_trained_is_the_one_that_was_asked_about(sd_scripts: SdScripts, tmp_path: Path) -> None:
    """Odd names in it pass both ways."""
    folder = tmp_path / 'luca\'s "best" #1 ü'
    shutil.copytree(tmp_path / "images", folder)
    data = toml.loads(sd_scripts.data_set.read_text())
    data["datasets"][0]["subsets"][0]["image_dir"] = str(folder)
    sd_scripts.data_set.write_text(toml.dumps(data))
    assert Path(sd_scripts.ask().answer["images"][0]["path"]).parent == folder


def test_schedules_are_those_of_the_lists_that_kohya_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(search.PROBE.parent)
    probe = importlib.import_module("kohya_probe")
    for name, kinds in (("transformers.trainer_utils", "LINEAR COSINE"), ("diffusers.optimization", "COSINE STEPS")):
        values = [(kind, kind.lower()) for kind in kinds.split()]
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(SchedulerType=Enum("SchedulerType", values)))
    assert probe.names_of_schedulers() == ["linear", "cosine", "steps", "adafactor"]
    for name in ("transformers.trainer_utils", "diffusers.optimization"):
        monkeypatch.delitem(sys.modules, name)
    assert probe.names_of_schedulers() == []  # any name
