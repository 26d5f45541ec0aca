"""The made study speaks the search's format: what it holds is held against a real run of the program, the demo."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_study
import numpy as np
import optuna
import pytest
import toml
from conftest import REPOSITORY, Demo
from optuna.trial import TrialState
from PIL import Image

import optuna_hyperparameter_search as search

pytestmark = pytest.mark.slow

ENDS = {1: "continued"}  # as the demo, which is killed in its second trial
FEW = {"prompts": 4, "plain_prompts": 2, "confirm_prompts": 8, "confirm_plain": 4, "checkpoints": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("made") / "out"
    made_study.make_study(output_dir, trials=2, picture_size=32, ends=ENDS, **FEW)
    return output_dir


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in which everything happens."""
    output_dir = tmp_path_factory.mktemp("night") / "out"
    ends = {2: "diverged", 3: "rejected", 4: "crashed", 6: "out of memory", 8: "hung", 10: "interrupted"}
    ends |= {14: "running", 15: "waiting", 16: "waiting"}
    made_study.make_study(output_dir, trials=17, picture_size=32, ends=ends, keep_checkpoints="all", **FEW)
    return output_dir


def study_in(output_dir: Path, name: str = "made") -> optuna.Study:
    study = search.load_study(search.default_storage(output_dir), name)
    assert study is not None
    return study


def structure(value: Any, path: str = "") -> set[str]:
    """Every path to a value in nested tables and lists, with the value's kind: `screen[].raw.q: number`."""
    if isinstance(value, dict):
        return {line for key, part in value.items() for line in structure(part, f"{path}.{key}")} or {f"{path}: table"}
    if isinstance(value, (list, tuple)):
        return {line for part in value for line in structure(part, f"{path}[]")} or {f"{path}: list"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {f"{path}: number"}
    return {f"{path}: {type(value).__name__}"}


def without(lines: set[str], *parts: str) -> set[str]:
    return {line for line in lines if not any(part in line for part in parts)}


# What depends on the parameters' values, on what happens to be copied or broken, on the number of steps, and on how
# many rounds the final stage has.
ACCIDENTS = ("lr_scheduler_num_cycles", "copies.images", "NoneType", "final-2", "final-3")


def read(path: Path) -> Any:
    return search.read_json(path) if path.suffix == ".json" else toml.loads(path.read_text(encoding="utf-8"))


def named_alike(text: str) -> str:
    """Optuna names an artifact by a random UUID."""
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)


def same_structure(made: Any, real: Any) -> None:
    made_lines, real_lines = (
        {named_alike(line) for line in without(structure(value), *ACCIDENTS)} for value in (made, real)
    )
    assert made_lines == real_lines and made_lines


# --- the same format as a real run's ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.json", "params.json", "config.toml"])
def test_files_of_a_trial_have_the_real_ones_structure(made: Path, demo: Demo, name: str) -> None:
    for number in (0, 1):
        folder = f"trial_{number:04d}"
        same_structure(read(made / folder / name), read(demo.output_dir / folder / name))


@pytest.mark.parametrize(
    "name",
    ["reference/plan.json", "reference/anchors.json", "reference/dataset.toml", "reference/first_step/config.toml",
     "results/best_parameters.json", "results/best_config.toml", "inputs/scoring.toml", "inputs/training.toml"],
)  # fmt: skip
def test_files_of_a_study_have_the_real_ones_structure(made: Path, demo: Demo, name: str) -> None:
    same_structure(read(made / name), read(demo.output_dir / name))


def test_the_study_holds_what_the_real_one_holds(made: Path, demo: Demo) -> None:
    ours, real = study_in(made), study_in(demo.output_dir, "demo")
    same_structure(ours.user_attrs, real.user_attrs)
    assert ours.directions == real.directions


@pytest.mark.parametrize("number", [0, 1])
def test_trials_hold_what_the_real_ones_hold(made: Path, demo: Demo, number: int) -> None:
    ours, real = (study.get_trials()[number] for study in (study_in(made), study_in(demo.output_dir, "demo")))
    assert ours.state == real.state and (ours.value is None) == (real.value is None)
    same_structure(ours.user_attrs, real.user_attrs)
    same_structure(ours.system_attrs, real.system_attrs)
    assert without(set(ours.params), *ACCIDENTS) == without(set(real.params), *ACCIDENTS)
    distributions = [
        {name: kind for name, kind in trial.distributions.items() if name not in ACCIDENTS} for trial in (ours, real)
    ]
    assert distributions[0] == distributions[1]


def files_in(output_dir: Path) -> set[str]:
    """Every file with # for numbers; without the trainer's and the interrupted program's own leavings."""
    names = (path.relative_to(output_dir) for path in output_dir.rglob("*") if path.is_file())
    kept = [name for name in names if name.parts[0] != "inputs" and "logs" not in name.parts]
    return {re.sub(r"\d+", "#", named_alike(str(name))) for name in kept if not name.name.endswith(search.PROCESS_FILE)}


def test_the_same_files_lie_at_the_same_places(made: Path, demo: Demo) -> None:
    assert {name for name in files_in(made) if "lora" not in name} == {
        name for name in files_in(demo.output_dir) if "lora" not in name
    }
    for folder in (made, demo.output_dir):
        for number in (0, 1):
            trial = folder / f"trial_{number:04d}"
            assert [f.name for f in trial.glob("lora*")] == [search.read_json(trial / "metrics.json")["checkpoint"]]
        assert (folder / "reference" / "first_step" / "lora.safetensors").is_file()


def test_the_embeddings_have_the_real_ones_names(made: Path, demo: Demo) -> None:
    with (
        np.load(made / "reference" / "embeddings.npz") as ours,
        np.load(demo.output_dir / "reference" / "embeddings.npz") as real,
    ):
        names = without(set(real.files), *ACCIDENTS)
        assert without(set(ours.files), *ACCIDENTS) == names
        assert all(ours[name].ndim == real[name].ndim for name in names)


def test_the_loras_metadata_and_weights_have_the_real_ones_names(made: Path, demo: Demo) -> None:
    ours, real = (
        search.read_safetensors_header(folder / "reference" / "first_step" / "lora.safetensors")
        for folder in (made, demo.output_dir)
    )
    assert ours["__metadata__"].keys() == real["__metadata__"].keys()
    weights = {key: entry["dtype"] for key, entry in real.items() if key != "__metadata__"}
    assert {key: entry["dtype"] for key, entry in ours.items() if key != "__metadata__"}.items() <= weights.items()


def read_log(folder: Path) -> tuple[search.TrainingProgress, bytes]:
    log = (folder / "training.log").read_bytes()
    progress = search.TrainingProgress()
    progress.read(log.decode())
    progress.finish()
    return progress, log


def test_the_training_log_is_read_as_the_real_one(made: Path, demo: Demo) -> None:
    for output_dir in (made, demo.output_dir):
        folder = output_dir / "trial_0000"
        progress, log = read_log(folder)
        config = read(folder / "config.toml")
        assert progress.epoch == progress.epochs == config["max_train_epochs"]
        assert progress.step == progress.steps > 0 and progress.saved and progress.device
        assert float(progress.loss) > 0 and progress.first_nan_step is None
        epochs = [result["epoch"] for result in read(folder / "metrics.json")["screen"]]
        assert re.findall(rb"(?m)^saving checkpoint: .*/(.+)/lora", log) == [folder.name.encode()] * len(epochs)
        assert log.count(b"\rsteps: ") > progress.steps and log.count(b"avr_loss=") >= progress.steps
        assert log.rstrip().endswith(b"]")  # kohya's bar has the last word


# --- as good as a real one for the program -------------------------------------------------------------


def test_the_program_goes_on_with_it_and_has_nothing_left_to_do(tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    made_study.make_study(output_dir, trials=2, picture_size=32, ends=ENDS, seed=7, **FEW)
    before = files_in(output_dir)
    inputs = output_dir / "inputs"
    command = [sys.executable, str(REPOSITORY / "optuna_hyperparameter_search.py"), "--device", "cpu"]
    command += ["--output-dir", str(output_dir), "--study-name", "made", "--seed", "7", "--n-trials", "2"]
    command += ["--base-model", str(made_study.SMALL_WORLD / "base_model"), "--subject", "luca"]
    command += ["--sd-scripts", str(REPOSITORY / "tests" / "small_trainer")]
    for name in ("dataset", "training", "scoring"):
        command += [f"--{name}-config", str(inputs / f"{name}.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trained" in done.stdout and "Best: trial" in done.stdout
    assert len(study_in(output_dir).get_trials()) == 2 and files_in(output_dir) == before


def weights_of(lora: Path) -> bytes:
    data = lora.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_results_are_written_and_described(night: Path) -> None:
    study = study_in(night)
    for file in (night / "results").glob("*.*"):
        file.unlink()
    search.Results(study, night).write()
    described = search.describe_study(study)
    assert "best first" in described and "1 diverged" in described and "1 running" in described
    best = search.scored_trials(study)[0]
    checkpoint = night / best.user_attrs["folder"] / best.user_attrs["checkpoint"]
    assert weights_of(night / "results" / "best_lora.safetensors") == weights_of(checkpoint)
    assert len((night / "results" / "trials.csv").read_text().splitlines()) == 18


def test_a_new_search_first_tries_the_three_best_settings_of_an_earlier_one(night: Path) -> None:
    search.Results(study_in(night), night).write()
    best = [trial.params for trial in search.ranked_trials(study_in(night))]
    card = search.TrainerFacts("v0.10.1", "NVIDIA GeForce RTX 4080", {"bitsandbytes": True})
    tables, (note,) = search.EnqueueReader(card.can_train, search.V2_1).read([night])
    assert tables == best[:3] and note.startswith("first from out: trial ") and "without" not in note

    without_8bit = search.TrainerFacts("v0.10.1", "cpu", {"bitsandbytes": False})
    tables, _ = search.EnqueueReader(without_8bit.can_train, search.V2_1).read([night])
    assert tables == [params for params in best if params["optimizer_type"] == "AdamW"][:3]


def test_settings_of_an_earlier_search_are_taken_as_far_as_the_space_has_them(night: Path, tmp_path: Path) -> None:
    search.Results(study_in(night), night).write()
    sdxl = search.SearchSpace.read(search.HERE / "configs" / "search_space_sdxl.toml")
    card = search.TrainerFacts("v0.10.1", "NVIDIA GeForce RTX 4080", {"bitsandbytes": True})
    tables, (note,) = search.EnqueueReader(card.can_train, sdxl).read([night])
    assert 0 < len(tables) <= 3 and "text_encoder_lr" in note.partition("without")[2]
    for table in tables:
        assert all(search.holds(sdxl.searched[name], value) for name, value in table.items())
        assert "text_encoder_lr" not in table and "optimizer_type" in table
    (tmp_path / "results").mkdir()
    for text in (None, "nothing\n1\n", "trial,score,final_score\n1,good,\n"):
        if text:
            (tmp_path / "results" / "trials.csv").write_text(text)
        with pytest.raises(search.RefusedInput, match="give a TOML file, or the output folder of a search"):
            search.EnqueueReader(card.can_train, sdxl).read([tmp_path])
    for text in ("trial,score,final_score\n1,,\n", "trial,score\n1,0.5\n"):  # one from before there was a final stage
        (tmp_path / "results" / "trials.csv").write_text(text)
        assert search.EnqueueReader(card.can_train, sdxl).read([tmp_path])[0] == []


def test_every_trial_ends_as_it_was_told(night: Path) -> None:
    trials = study_in(night).get_trials()
    ended = [trial.user_attrs.get("ended", trial.state.name.lower()) for trial in trials]
    s = "scored"
    assert ended == [
        s, s, "diverged", "rejected", "crashed", s, "out of memory", s, "hung", s, "interrupted", s, s, s,
        "running", "waiting", "waiting",
    ]  # fmt: skip
    twice = {4: "crashed", 6: "out of memory", 8: "hung"}
    failures = {trial.number: [f["ended"] for f in trial.user_attrs.get("failures", [])] for trial in trials}
    assert {number: found for number, found in failures.items() if found} == {n: [end] * 2 for n, end in twice.items()}
    states = dict.fromkeys(("diverged", "rejected", "out of memory"), TrialState.PRUNED)
    states |= dict.fromkeys(("running", "interrupted"), TrialState.RUNNING)
    states |= {s: TrialState.COMPLETE, "waiting": TrialState.WAITING}
    assert [trial.state for trial in trials] == [states.get(end, TrialState.FAIL) for end in ended]
    assert all(t.user_attrs.get("reason") for t in trials if t.state == TrialState.FAIL)
    assert "loss was nan from step" in trials[2].user_attrs["reason"]
    assert not (night / "trial_0003").exists() and not (night / "trial_0015").exists()


def test_scored_trials_were_trained_and_their_loras_can_be_loaded(night: Path) -> None:
    for trial in search.scored_trials(study_in(night)):
        folder = search.find_trial_folder(trial, night)
        assert search.has_finished_training(folder)
        for epoch, file in search.saved_checkpoints(folder, trial.params["max_train_epochs"]).items():
            search.check_lora(file, may_be_zero=file.stem != "lora")
            header = search.read_safetensors_header(file)
            assert header["__metadata__"]["ss_epoch"] == str(epoch)
        assert len([name for name in header if name.endswith(".weight")]) == 4
    assert not search.has_finished_training(night / "trial_0002")
    assert not search.has_finished_training(night / "trial_0014")


def test_scores_follow_from_the_raw_values(night: Path) -> None:
    plan, anchors = (search.read_json(night / "reference" / name) for name in ("plan.json", "anchors.json"))
    for trial in search.scored_trials(study_in(night)):
        metrics = search.read_json(search.find_trial_folder(trial, night) / "metrics.json")
        terms = search.terms_of(metrics["raw"], {**anchors, **anchors["confirm"]})
        assert terms == metrics["terms"] == trial.user_attrs["terms"]
        assert search.combine(terms, plan["weights"]) == metrics["score"] == trial.value
        assert 0.2 < metrics["score"] < 0.95
        assert [image["name"] for image in metrics["raw"]["images"]] == [job["name"] for job in plan["confirm"]]


def test_a_subject_is_learnt_and_a_long_training_costs_the_prompt(night: Path) -> None:
    for trial in search.scored_trials(study_in(night)):
        screen = search.read_json(search.find_trial_folder(trial, night) / "metrics.json")["screen"]
        assert screen[0]["terms"]["fidelity"] < screen[-1]["terms"]["fidelity"]
        assert screen[0]["terms"]["text"] > screen[-1]["terms"]["text"]
    scores = [trial.value for trial in search.scored_trials(study_in(night))]
    assert max(scores) - min(scores) > 0.05


def test_there_is_a_picture_of_every_usable_image(night: Path) -> None:
    plan = search.read_json(night / "reference" / "plan.json")
    for trial in search.scored_trials(study_in(night)):
        folder = search.find_trial_folder(trial, night)
        metrics = search.read_json(folder / "metrics.json")
        stages = {f"epoch-{result['epoch']:06d}": result["raw"] for result in metrics["screen"]}
        for name, raw in {**stages, "confirm": metrics["raw"]}.items():
            jobs = {job["name"]: job for job in plan["confirm" if name == "confirm" else "screen"]}
            for image in raw["images"]:
                path = folder / "scores" / name / f"{image['name']}.png"
                if image["usable"]:
                    with Image.open(path) as picture:
                        picture.load()
                        assert picture.size == (jobs[image["name"]]["width"], jobs[image["name"]]["height"])
                        assert search.is_usable(picture, plan["usable"])


def test_the_night_passes_in_the_studys_own_time(night: Path) -> None:
    trials = [trial for trial in study_in(night).get_trials() if trial.datetime_start]
    starts = [trial.datetime_start for trial in trials]
    assert starts == sorted(starts) and starts[0] > made_study.STARTED
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            spent = trial.user_attrs.get("training_seconds", 0) + trial.user_attrs["scoring_seconds"]
            assert trial.duration is not None and trial.duration.total_seconds() == pytest.approx(spent, abs=5)


# --- the maker itself ----------------------------------------------------------------------------------


def contents(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(output_dir.glob("*/**/*")):
        if path.suffix in (".json", ".png", ".safetensors", ".toml"):
            found[str(path.relative_to(output_dir))] = path.read_bytes().replace(str(output_dir).encode(), b"OUT")
    return found


def test_the_same_arguments_make_the_same_study(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("a", "b", "c")]
    studies = [
        made_study.make_study(folder, trials=2, picture_size=32, seed=seed, **FEW)
        for folder, seed in zip(made, (1, 1, 2), strict=True)
    ]
    first, second, third = ([trial.params for trial in study.get_trials()] for study in studies)
    assert first == second != third
    assert contents(made[0]) == contents(made[1])


def test_counts_and_names_are_as_asked_for(tmp_path: Path) -> None:
    study = made_study.make_study(
        tmp_path / "out", trials=1, picture_size=40, checkpoints=16, prompts=20, plain_prompts=9, confirm_prompts=24,
        confirm_plain=12, study_name="large", subject="mia", storage=f"sqlite:///{tmp_path / 'else.db'}",
    )  # fmt: skip
    plan = search.read_json(tmp_path / "out" / "reference" / "plan.json")
    assert (len(plan["screen"]), len(plan["confirm"])) == (20 * 2 + 9, 24 * 3 + 12)
    assert study.study_name == plan["study"] == "large" and plan["subject"] == "mia" and plan["resolution"] == 40
    metrics = search.read_json(tmp_path / "out" / "trial_0000" / "metrics.json")
    assert [result["epoch"] for result in metrics["screen"]] == [
        *range(1, study.trials[0].params["max_train_epochs"] + 1)
    ]
    assert (tmp_path / "else.db").is_file() and not (tmp_path / "out" / search.DATABASE_NAME).exists()


def test_pictures_are_alike_only_where_that_is_wanted(tmp_path: Path) -> None:
    for distinct in (False, True):
        folder = tmp_path / str(distinct)
        made_study.make_study(folder, trials=2, picture_size=32, distinct_pictures=distinct, **FEW)
        pictures = [path.read_bytes() for path in folder.glob("trial_*/scores/*/*.png")]
        assert (len(set(pictures)) == len(pictures)) == distinct
        assert len(set(pictures)) > len(pictures) / 20


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"ends": {0: "burnt"}}, "burnt"),
        ({"ends": {5: "hung"}}, "5: 'hung'"),
        ({"ends": {0: "waiting"}}, "only the last"),
        ({"picture_size": 20}, "picture_size = 20"),
    ],
)
def test_senseless_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        made_study.make_study(tmp_path / "out", trials=2, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="give a new folder"):
        made_study.make_study(tmp_path, trials=1)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_it_can_be_kept_in_postgresql(tmp_path: Path, postgresql: Callable[[], str]) -> None:
    study = made_study.make_study(tmp_path / "out", trials=2, picture_size=32, storage=postgresql(), **FEW)
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 2
    assert study.get_trials()[0].datetime_start > made_study.STARTED
    made_study.engine_of(study).dispose()  # the server waits for it


def test_it_can_be_made_by_hand(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tests" / "made_study.py"), str(tmp_path / "out"), "--trials", "2"]
    command += ["--picture-size", "32", "--checkpoints", "2", "--end", "1=out of memory"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "2 trials, 1 of them scored" in done.stdout
    assert study_in(tmp_path / "out").get_trials()[1].user_attrs["ended"] == "out of memory"
