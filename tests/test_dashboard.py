"""What optuna-dashboard and TensorBoard show of a study, asked over HTTP as a browser would."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import REPOSITORY, Demo
from optuna.trial import TrialState
from optuna_dashboard import get_note, save_note
from PIL import Image
from test_study import TERMS, Killed, failing, good_training, open_study, run, settings_for

import optuna_hyperparameter_search as search

SCRIPT = REPOSITORY / "optuna_hyperparameter_search.py"
RED, BLUE = (220, 20, 20), (20, 20, 220)
PROMPTS = [
    "a red wall",
    *[f"luca, {place}" for place in ("指輪 \U0001f98a", "on *sand*", "at night", "in \udc80 snow")],
]


def job(number: int, seed: int, prompt: str) -> dict[str, Any]:
    return {"name": f"p{number:02d}-s{seed}", "prompt": prompt, "subject": prompt != PROMPTS[0]}


def write_plan(output_dir: Path, prompts: list[str] = PROMPTS) -> None:
    jobs = [job(number, seed, prompt) for number, prompt in enumerate(prompts) for seed in range(2)]
    plan = {"study": "test", "screen": jobs, "confirm": jobs[:4]}
    (output_dir / "reference" / "plan.json").write_text(json.dumps(plan))


def score_with_pictures(folder: Path, epochs: tuple[int, ...] = (5, 12), noise: bool = False) -> None:
    """What the scoring process leaves: red pictures without the subject, blue ones with him, one missing."""
    plan = search.read_json(folder.parent / "reference" / "plan.json")
    for stage, name in [*(("screen", f"epoch-{epoch:06d}") for epoch in epochs), ("confirm", "confirm")]:
        (folder / "scores" / name).mkdir(parents=True)
        for one in plan[stage]:
            picture = Image.new("RGB", (64, 64), BLUE if one["subject"] else RED)
            picture = Image.effect_noise((512, 512), 100) if noise else picture
            picture.save(folder / "scores" / name / f"{one['name']}.png")
    (folder / "scores" / f"epoch-{epochs[0]:06d}" / "p01-s0.png").unlink()
    screen = [{"epoch": epoch, "checkpoint": "lora.safetensors", "score": 0.2} for epoch in epochs]
    metrics = {
        "outcome": "scored", "reason": "", "score": 0.1 + int(folder.name[-4:]) / 100, "best_epoch": epochs[-1],
        "checkpoint": "lora.safetensors", "terms": TERMS, "scoring_seconds": 2.0, "screen": screen,
        "standard_error": 0.01,
    }  # fmt: skip
    search.write_json(folder / "metrics.json", metrics)


def searched(tmp_path: Path, n_trials: int = 1, trainings: list[Callable[[Path], None]] = ()) -> search.Settings:
    """A study that has been run to its end, with everything that is published of it."""
    settings = settings_for(tmp_path, n_trials, command="python search.py --storage 'x:***@y'")
    write_plan(settings.output_dir)
    study = run(settings, list(trainings), [score_with_pictures] * n_trials)
    study.set_user_attr("fingerprint", {})  # as the program's own studies have
    study.set_user_attr("command", settings.command)
    study.set_user_attr("n_trials", n_trials)
    search.show_results(study, settings.output_dir)
    return settings


def artifacts_of(settings: search.Settings) -> list[Path]:
    return sorted((settings.output_dir / "artifacts").glob("*"))


@contextlib.contextmanager
def served(*command: str) -> Iterator[Callable[[str], bytes]]:
    """A server program on a free port of loopback; what a GET of a path answers. Ended by its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*command, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.read()

    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None, f"{command[0]} ended with {server.returncode}"
            time.sleep(0.1)
        yield get
    finally:
        server.terminate()
        server.wait(30)


def program(name: str) -> str:
    """A console script beside the Python that runs the tests."""
    return str(Path(sys.executable).with_name(name))


# --- optuna-dashboard --------------------------------------------------------------------------------


def test_the_dashboard_shows_metric_notes_and_contact_sheets(tmp_path: Path) -> None:
    settings = searched(tmp_path, 2, [good_training, failing(search.Diverged("loss is *nan* <b>"))])
    storage, artifacts = settings.storage, settings.output_dir / "artifacts"
    with served(program("optuna-dashboard"), storage, "--artifact-dir", str(artifacts)) as get:
        (summary,) = json.loads(get("/api/studies"))["study_summaries"]
        detail = json.loads(get(f"/api/studies/{summary['study_id']}"))
        trials = {trial["number"]: trial for trial in detail["trials"]}
        assert "2 of 2 trials trained" in detail["note"]["body"] and settings.command in detail["note"]["body"]
        assert "**Score 0.100 +-0.010**, epoch 12 of" in trials[0]["note"]["body"] and "| text | 0.600 |" in str(
            trials[0]
        )
        assert r"loss is \*nan\* \<b\>" in trials[1]["note"]["body"]
        assert "trial\\_0000" in trials[0]["note"]["body"] and trials[1]["artifacts"] == []
        (artifact,) = trials[0]["artifacts"]
        sheet = get(f"/artifacts/{summary['study_id']}/{trials[0]['trial_id']}/{artifact['artifact_id']}")
    assert artifact["filename"] == "contact_sheet.jpg" and artifact["mimetype"] == "image/jpeg"
    assert sheet == (settings.output_dir / "trial_0000" / "scores" / "contact_sheet.jpg").read_bytes()
    assert Image.open(io.BytesIO(sheet)).format == "JPEG"


def test_the_program_names_its_metric_and_keeps_its_command_without_the_password(demo: Demo) -> None:
    study = search.load_study(search.default_storage(demo.output_dir), "demo")
    with served(program("optuna-dashboard"), search.default_storage(demo.output_dir)) as get:
        (summary,) = json.loads(get("/api/studies"))["study_summaries"]
        assert json.loads(get(f"/api/studies/{summary['study_id']}"))["objective_names"] == ["score"]
    assert study.user_attrs["n_trials"] == 2
    assert f"--demo --n-trials 2 --output-dir {demo.output_dir}" in study.user_attrs["command"]
    assert study.user_attrs["command"] in get_note(study) and "2 of 2 trials trained." in get_note(study)
    assert len(list((demo.output_dir / "artifacts").iterdir())) == 2
    assert "contact sheet" not in demo.resumed and "optuna-dashboard" not in demo.resumed


def test_a_password_in_the_command_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(search, "run", lambda args: seen.append(args.command))
    assert search.main(["--check", "--storage", "postgresql://me:s3cr3t@host/db"]) == 0
    assert "s3cr3t" not in seen[0] and "--check --storage" in seen[0] and "host/db" in seen[0]


def test_a_note_that_the_user_has_edited_is_left_alone(tmp_path: Path) -> None:
    settings = searched(tmp_path)
    study = open_study(settings)
    trial = optuna.Trial(study, study.get_trials()[0]._trial_id)
    save_note(trial, "my favourite")
    search.write_notes(study)
    assert get_note(trial) == "my favourite" and "1 of 1 trials trained" in get_note(study)
    study.set_user_attr("n_trials", 9)
    search.write_notes(study)
    assert "1 of 9 trials trained" in get_note(study)
    save_note(study, "mine")
    search.write_notes(study)
    assert get_note(study) == "mine"


# --- artifacts ---------------------------------------------------------------------------------------


def test_an_interrupted_trial_told_from_its_metrics_gets_its_contact_sheet_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    write_plan(settings.output_dir)

    def killed_after_scoring(folder: Path) -> None:
        score_with_pictures(folder)
        raise Killed

    with pytest.raises(Killed):
        run(settings, [], [killed_after_scoring])
    assert artifacts_of(settings) == []
    study = run(settings)
    assert study.get_trials()[0].state == TrialState.COMPLETE and len(artifacts_of(settings)) == 1


def test_a_kill_between_upload_and_tell_leaves_one_whole_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 1)
    write_plan(settings.output_dir)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(optuna.Study, "tell", lambda *_, **__: failing(Killed())(tmp_path))
        run(settings, [], [score_with_pictures])
    (artifact,) = artifacts_of(settings)
    whole = artifact.read_bytes()
    artifact.write_bytes(whole[:100])
    study = run(settings)
    assert study.get_trials()[0].state == TrialState.COMPLETE
    assert artifacts_of(settings) == [artifact] and artifact.read_bytes() == whole


def test_a_failing_upload_costs_a_warning_and_not_the_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path, 1)
    write_plan(settings.output_dir)
    (settings.output_dir / "artifacts").write_text("a file where the folder should be")
    study = run(settings, [], [score_with_pictures])
    assert study.get_trials()[0].value == pytest.approx(0.1)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "trial 0 has no contact sheet in optuna-dashboard" in warned[0]


@pytest.mark.parametrize("lost", ["artifacts", "artifacts and the sheet"])
def test_report_restores_the_artifacts_of_a_copied_folder(tmp_path: Path, lost: str) -> None:
    settings = searched(tmp_path / "first")
    (name,) = [file.name for file in artifacts_of(settings)]
    sheet = artifacts_of(settings)[0].read_bytes()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(settings.output_dir, elsewhere)
    shutil.rmtree(settings.output_dir)
    shutil.rmtree(elsewhere / "artifacts")
    if lost != "artifacts":
        (elsewhere / "trial_0000" / "scores" / "contact_sheet.jpg").unlink()
    command = [sys.executable, str(SCRIPT), "--report", "--output-dir", str(elsewhere)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "artifacts" / name).read_bytes() == sheet


# --- the contact sheet -------------------------------------------------------------------------------


def sheet_of(tmp_path: Path, prompts: list[str] = PROMPTS, **scoring: Any) -> tuple[Path, Image.Image]:
    folder = tmp_path / "trial_0000"
    (tmp_path / "reference").mkdir()
    folder.mkdir()
    write_plan(tmp_path, prompts)
    score_with_pictures(folder, **scoring)
    sheet = search.ContactSheet(folder)
    sheet.make()
    return sheet.file, Image.open(sheet.file).convert("RGB")


def test_the_sheet_has_a_row_a_checkpoint_and_the_plain_prompts_last(tmp_path: Path) -> None:
    _, sheet = sheet_of(tmp_path)
    tile, head = search.SHEET_TILE, 3 * search.SHEET_LINE + search.SHEET_GAP
    row = tile + search.SHEET_GAP + search.SHEET_LINE

    def tile_at(column: int, top: int, aside: int = 20) -> tuple[int, ...]:
        at = search.SHEET_GAP + column * (tile + search.SHEET_GAP) + tile // 2 - aside
        return tuple(sheet.getpixel((at, top + search.SHEET_LINE + tile // 2)))

    near = pytest.approx
    for top in (head, head + row):
        assert tile_at(4, top) == near(RED, abs=12) and tile_at(1, top) == near(BLUE, abs=12)
    assert tile_at(0, head) == near(search._GREY, abs=12) and tile_at(0, head, 0) != near(search._GREY, abs=60)
    assert tile_at(0, head + row) == near(BLUE, abs=12)
    assert sheet.height == 2 * head + 3 * row
    assert tile_at(0, 2 * head + 2 * row) == near(BLUE, abs=12)
    assert tile_at(1, 2 * head + 2 * row) == near(RED, abs=12) and tile_at(2, 2 * head + 2 * row) == (255,) * 3
    frame = sheet.getpixel((search.SHEET_GAP - 2, head + row + search.SHEET_LINE + tile // 2))
    assert frame == near(search._GREEN, abs=60)
    assert sheet.getpixel((search.SHEET_GAP - 2, head + search.SHEET_LINE + tile // 2)) == near((255,) * 3, abs=20)


def test_a_sheet_of_many_prompts_and_checkpoints_fits_on_a_screen(tmp_path: Path) -> None:
    prompts = [*PROMPTS[:1], *[f"luca, number {number}, " + "word " * 50 for number in range(20)]]
    _, sheet = sheet_of(tmp_path, prompts, epochs=(1, 2, 3, 4, 5, 6, 7, 8), noise=True)
    assert 1400 <= sheet.width <= 1600 and sheet.height <= 2400


# --- TensorBoard -------------------------------------------------------------------------------------


def test_tensorboard_shows_every_trained_trial_by_name_with_kohyas_tags(demo: Demo) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("of the trainer's logs (pip install tensorboard)")
    with served(program("tensorboard"), "--logdir", str(demo.output_dir)) as get:
        tags: dict[str, Any] = {}
        for _ in range(60):
            tags = json.loads(get("/data/plugin/scalars/tags"))
            if len(tags) >= 2 and all(len(of_one) == 5 for of_one in tags.values()):
                break
            time.sleep(1)
    runs = {name.partition("/")[0]: name for name in tags if not name.startswith("results/")}
    assert sorted(runs) == ["trial_0000", "trial_0001"]  # the second was killed and trained again
    expected = {"loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet"}
    assert set(tags[runs["trial_0000"]]) == set(tags[runs["trial_0001"]]) == expected
    assert runs["trial_0000"].endswith("/network_train")


# --- the best LoRA -----------------------------------------------------------------------------------


def test_the_best_lora_says_which_trial_made_it_and_is_else_kohyas(demo: Demo) -> None:
    import hashlib

    from safetensors import safe_open

    copy = demo.output_dir / "results" / "best_lora.safetensors"
    best = search.ranked_trials(search.load_study(search.default_storage(demo.output_dir), "demo"))[0]
    with safe_open(copy, "numpy") as file:
        metadata = file.metadata()
    assert metadata["optuna_study"] == "demo" and metadata["optuna_score"] == str(best.value)
    data = copy.read_bytes()
    weights = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(weights).hexdigest()
    from diffusers import StableDiffusionPipeline

    state, _ = StableDiffusionPipeline.lora_state_dict(str(copy.parent), weight_name=copy.name)
    assert state


def test_the_best_lora_is_not_written_again_when_it_is_the_same(tmp_path: Path) -> None:
    settings = searched(tmp_path)
    copy = settings.output_dir / "results" / "best_lora.safetensors"
    before = copy.stat()
    search.Results(open_study(settings), settings.output_dir).write()
    assert copy.stat().st_ino == before.st_ino and copy.stat().st_mtime_ns == before.st_mtime_ns
