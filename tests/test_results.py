"""Section 11 and the whole program, on what the demo left: killed in its second trial, started again."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import toml
from conftest import REPOSITORY, Demo
from optuna.trial import FrozenTrial, TrialState
from test_study import SAFE, TERMS, failing, good_training, open_study, run, settings_for
from test_study import study_of as study_of_settings

import optuna_hyperparameter_search as search

SCRIPT = REPOSITORY / "optuna_hyperparameter_search.py"


def study_of(demo: Demo) -> optuna.Study:
    study = search.load_study(search.default_storage(demo.output_dir), "demo")
    assert study is not None
    return study


# --- the whole program -------------------------------------------------------------------------------


def test_a_search_killed_in_a_training_resumes_to_exactly_n_trained_trials(demo: Demo) -> None:
    assert demo.status == 0, demo.resumed
    trials = study_of(demo).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert "Trial 1 was interrupted; it is continued." in demo.resumed


def test_the_killed_trial_is_trained_again_in_its_folder_with_its_parameters(demo: Demo) -> None:
    assert sorted(folder.name for folder in demo.output_dir.glob("trial_*")) == ["trial_0000", "trial_0001"]
    begun, again = (said.partition("Trial 1: ")[2].partition("\n  epoch ")[0] for said in (demo.killed, demo.resumed))
    assert begun == again and "learning_rate" in begun
    folder = demo.output_dir / "trial_0001"
    logs = [(folder / name).read_text(encoding="utf-8") for name in ("training.earlier.log", "training.log")]
    assert ["model saved." in log for log in logs] == [False, True]


def test_the_latents_are_cached_once_before_the_first_trial(demo: Demo) -> None:
    assert "Trying the trainer out" in demo.killed.partition("Trial 0: ")[0]
    assert "Trying the trainer out" not in demo.resumed
    header = search.read_safetensors_header(demo.output_dir / "reference" / "first_step" / "lora.safetensors")
    assert header["__metadata__"]["ss_steps"] == "1"
    cache = list((demo.output_dir / "inputs" / "images").glob("*.npz"))
    first_trial = (demo.output_dir / "trial_0000" / "config.toml").stat().st_mtime
    assert len(cache) == 16 and all(file.stat().st_mtime < first_trial for file in cache)


def test_every_checkpoint_is_scored_and_the_best_epoch_kept(demo: Demo) -> None:
    for number in (0, 1):
        folder, trial = demo.output_dir / f"trial_{number:04d}", study_of(demo).get_trials()[number]
        metrics = search.read_json(folder / "metrics.json")
        last = search.read_json(folder / "params.json")["max_train_epochs"]
        assert [result["epoch"] for result in metrics["screen"]] == [*range(5, last, 5), last]
        assert [file.name for file in folder.glob("lora*.safetensors")] == [metrics["checkpoint"]]
        assert trial.value == metrics["score"] and trial.user_attrs["best_epoch"] == metrics["best_epoch"]
        assert set(trial.user_attrs["terms"]) == set(search.TERMS)
        assert len(list((folder / "scores" / "confirm").glob("*.png"))) > 0


def test_the_anchors_are_made_once(demo: Demo) -> None:
    assert "Making the reference" in demo.killed and "Making the reference" not in demo.resumed
    anchors = search.read_json(demo.output_dir / "reference" / "anchors.json")
    stored = study_of(demo).user_attrs["anchors"]
    assert stored == {name: anchors[name] for name in stored}  # the final stage has added its own
    assert anchors.keys() - stored.keys() <= search.FINAL_ROUNDS.keys() and {"screen", "confirm"} <= stored.keys()


def test_the_configs_optional_keys_repeat_the_training(demo: Demo) -> None:
    config = search.read_toml(demo.output_dir / "trial_0000" / "config.toml", "config")
    params = search.read_json(demo.output_dir / "trial_0000" / "params.json")
    assert config["output_dir"] == str(demo.output_dir / "trial_0000")
    assert {config[name] == params[name] for name in params if name != "network_alpha_ratio"} == {True}


def test_the_disk_is_reckoned_from_the_size_of_the_loras(demo: Demo) -> None:
    """The layers that are counted in the base model are those that the trainer adapted."""
    base_model = search.BaseModel.inspect(demo.output_dir / "inputs" / "base_model")
    (checkpoint,) = (demo.output_dir / "trial_0000").glob("lora*.safetensors")
    header = search.read_safetensors_header(checkpoint)
    weights = [entry for name, entry in header.items() if name.endswith(".weight")]
    assert {entry["dtype"] for entry in weights} == {"F16"}
    dim = search.read_json(demo.output_dir / "trial_0000" / "params.json")["network_dim"]
    saved = sum(end - start for start, end in (entry["data_offsets"] for entry in weights))
    assert dim * base_model.lora_bytes_per_dim == pytest.approx(saved, rel=0.05)


# --- results/ ----------------------------------------------------------------------------------------


FINAL_LABELS = {"optuna_final_score", "optuna_final_standard_error", "optuna_strength"}


def assert_is_labelled_copy(copy: Path, checkpoint: Path, best: FrozenTrial) -> None:
    """The same tensors in the same bytes and order, all of the trainer's metadata, and whose LoRA it is."""
    ours, theirs = search.read_safetensors_header(copy), search.read_safetensors_header(checkpoint)
    study = {name: value for name, value in ours["__metadata__"].items() if name.startswith("optuna_")}
    assert ours.pop("__metadata__") == {**theirs.pop("__metadata__"), **study}
    assert list(ours.items()) == list(theirs.items())
    assert tensor_bytes(copy) == tensor_bytes(checkpoint)
    assert float(study.pop("optuna_score")) == best.value and int(study.pop("optuna_trial")) == best.number
    assert int(study.pop("optuna_epoch")) == best.user_attrs["best_epoch"]
    assert float(study.pop("optuna_standard_error")) == best.user_attrs["standard_error"]
    study = {name: value for name, value in study.items() if name not in FINAL_LABELS}
    assert study.keys() == {"optuna_study"} and study["optuna_study"] in ("demo", "test")


def tensor_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and len(data) > 8 + length
    return data[8 + length :]


def test_the_best_lora_is_the_chosen_checkpoint_of_the_best_trial(demo: Demo) -> None:
    best = search.ranked_trials(study_of(demo))[0]
    chosen = demo.output_dir / best.user_attrs["folder"] / best.user_attrs["checkpoint"]
    assert_is_labelled_copy(demo.output_dir / "results" / "best_lora.safetensors", chosen, best)
    parameters = search.read_json(demo.output_dir / "results" / "best_parameters.json")
    assert parameters["trial"] == best.number and parameters["score"] == best.value
    assert parameters["parameters"] == best.user_attrs["training_params"]


@pytest.mark.slow
def test_the_best_config_trains_the_same_lora_again(demo: Demo) -> None:
    """Run unchanged by the trainer, from another folder: the checkpoint that the comment names is the best LoRA."""
    results = demo.output_dir / "results"
    text = (results / "best_config.toml").read_text()
    config = toml.loads(text)
    retrained = Path(config["output_dir"])
    best = search.ranked_trials(study_of(demo))[0]
    assert retrained == results / f"retrained_{best.user_attrs['folder']}" and not retrained.exists()
    assert config["dataset_config"] == str(results / "dataset.toml")
    trainer = REPOSITORY / "tests" / "small_trainer" / "train_network.py"
    command = [sys.executable, str(trainer), "--config_file", str(results / "best_config.toml")]
    environment = search.ChildProcess.environment("cpu")
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"take epoch {best.user_attrs['best_epoch']} of" in text
    from safetensors.numpy import load_file

    again = load_file(retrained / best.user_attrs["checkpoint"])
    first = load_file(results / "best_lora.safetensors")
    assert first.keys() == again.keys() and all((first[name] == again[name]).all() for name in first)


def test_trials_csv_has_a_row_for_every_trial(demo: Demo) -> None:
    with (demo.output_dir / "results" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ended"] for row in rows] == ["scored"] * 2
    assert [float(row["score"]) for row in rows] == [trial.value for trial in study_of(demo).get_trials()]
    assert set(search.SEARCH_SPACE) <= rows[0].keys()


def test_trials_csv_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    study = run(settings, [failing(search.Diverged("nan in its weights"))])
    search.Results(study, settings.output_dir).write_trials_csv()
    with (settings.output_dir / "results" / "trials.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["ended"] == "diverged" and {row[name] for name in ("score", "standard_error", *search.TERMS)} == {""}


def test_report_shows_the_same_again_and_needs_the_folder_alone(demo: Demo) -> None:
    (demo.output_dir / "results" / "trials.csv").unlink()
    command = [sys.executable, str(SCRIPT), "--report", "--output-dir", str(demo.output_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    table = demo.resumed.partition("Study 'demo', best first:")[2]
    assert f"the LoRA        {demo.output_dir / 'results' / 'best_lora.safetensors'}" in table
    assert table and table.strip() in done.stdout
    assert (demo.output_dir / "results" / "trials.csv").is_file()


# --- tables ------------------------------------------------------------------------------------------


def test_the_table_is_best_first_and_says_how_the_others_ended(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3)
    study = run(settings, [good_training, failing(search.Diverged("nan"))])
    lines = search.describe_study(study).splitlines()
    rows = [line for line in lines if line[:5].strip().isdigit()]
    assert [int(row.split()[0]) for row in rows] == [2, 0]
    assert "Without a score: 1 diverged (results/trials.csv says why)" in lines
    head = next(line for line in lines if line.startswith("trial"))
    assert len(head) == len(rows[0]) == len(rows[1])


def test_every_column_of_the_table_stands_below_its_head(tmp_path: Path) -> None:
    lines = search.describe_study(run(settings_for(tmp_path, 2))).splitlines()
    head = next(line for line in lines if line.startswith("trial"))
    starts = [found.start() for found in re.finditer(r"\S+", head)]
    rows = [line for line in lines if line[:5].strip().isdigit()]
    assert {row[start - 2 : start] for row in rows for start in starts[1:]} == {"  "}
    cells = [row[start:end].split() for row in rows for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert len(rows) == 2 and {len(words) for words in cells} == {1}


def test_the_table_has_a_dash_where_no_text_encoder_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, all_of = run(settings_for(tmp_path, 1)), search.params_of
    without = {name: value for name, value in all_of(study.trials[0]).items() if name != "text_encoder_lr"}
    monkeypatch.setattr(search, "params_of", lambda trial: without)
    head, row = [line.split() for line in search.describe_study(study).splitlines()[2:4]]
    assert dict(zip(head, row, strict=True))["te_lr"] == "-" and "nan" not in row


def test_of_equal_scores_the_earlier_trial_stands_first(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 2), [], [lambda folder: score_with(folder, 1.0)] * 2)
    assert [trial.number for trial in search.scored_trials(study)] == [0, 1]


@pytest.mark.parametrize("moved", [False, True])
def test_the_best_lora_is_found_in_the_folder_of_the_program_that_made_it(tmp_path: Path, moved: bool) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = (settings_for(tmp_path / name, 1, storage=storage) for name in ("here", "there"))
    run(here)
    study = run(settings_for(tmp_path / "there", 2, storage=storage))  # trial 1 scores higher
    output_dir = there.output_dir
    if moved:
        output_dir = there.output_dir.rename(tmp_path / "elsewhere")
    search.Results(study, output_dir if moved else here.output_dir).write()
    results = (output_dir if moved else here.output_dir) / "results"
    assert tensor_bytes(results / "best_lora.safetensors") == b"trial_0001"
    assert search.read_json(results / "best_parameters.json")["trial"] == 1


def test_where_the_best_trials_files_are_gone_the_table_is_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, 1)
    study = run(settings)
    (settings.output_dir / "trial_0000" / "lora.safetensors").unlink()
    search.show_results(study, settings.output_dir)
    shown = capsys.readouterr().out
    place = f"{socket.gethostname()}:{settings.output_dir}"
    assert "Study 'test', best first:" in shown and f"bring them back from {place} and give --report again)" in shown
    assert "best_lora.safetensors" not in shown
    assert (settings.output_dir / "results" / "trials.csv").is_file()


def test_where_the_best_trials_files_are_gone_results_keep_its_lora_or_the_next_best_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, 2)
    study = run(settings)  # trial 1 scores higher
    search.show_results(study, settings.output_dir)
    shutil.rmtree(settings.output_dir / "trial_0001")
    capsys.readouterr()
    search.show_results(study, settings.output_dir)
    shown = capsys.readouterr().out
    assert f"warning: trial 1 is not whole in {settings.output_dir / 'trial_0001'}; its LoRA stays in" in shown
    assert "Best: trial 1" in shown
    assert tensor_bytes(settings.output_dir / "results" / "best_lora.safetensors") == b"trial_0001"
    (settings.output_dir / "results" / "best_lora.safetensors").unlink()
    search.show_results(study, settings.output_dir)
    assert "give --report again, or take trial_0000, the next best)" in capsys.readouterr().out


def test_a_report_without_the_reference_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path, 1)
    run(settings).set_user_attr("fingerprint", {})
    (settings.reference / "plan.json").unlink(missing_ok=True)
    assert search.main(["--report", f"--output-dir={settings.output_dir}", "--study-name=test"]) == 0
    said = f"warning: {settings.reference} is not whole, so the report lacks pictures; the search mends it"
    assert said in capsys.readouterr().out


# --- votes -------------------------------------------------------------------------------------------


def valued(number: int, score: float, fidelity: float, text: float = 0.5) -> FrozenTrial:
    terms = {"fidelity": fidelity, "text": text}
    trial = optuna.trial.create_trial(value=score, user_attrs={"terms": terms})
    trial.number = number
    return trial


def vote(left: int, right: int, choice: str) -> dict[str, object]:
    return {"left": left, "right": right, "vote": choice}


VALUED = [valued(0, 0.9, 0.1), valued(1, 0.8, 0.2), valued(2, 0.6, 0.3), valued(3, 0.25, 0.3)]
FINAL = {
    number: {"score": score, "terms": dict.fromkeys(search.TERMS, 0.5) | {"fidelity": fidelity}}
    for number, score, fidelity in ((0, 0.7, 0.4), (1, 0.75, 0.1))
}


def test_a_value_agrees_if_the_vote_is_for_the_higher_one() -> None:
    votes = [vote(0, 1, "left"), vote(2, 1, "right"), vote(3, 0, "left")]
    agreed = search.Comparison(VALUED, {}).agreement(votes)
    assert agreed["score"] == [1, 1, 0] and agreed["fidelity"] == [0, 0, 1]


def test_draws_and_equal_or_missing_values_neither_agree_nor_disagree() -> None:
    votes = [vote(0, 1, "equal"), vote(2, 3, "left")]
    agreed = search.Comparison(VALUED, {}).agreement(votes)
    assert agreed["score"] == [1]
    assert [agreed[name] for name in ("fidelity", "text", "variety")] == [[], [], []]


def test_two_finalists_are_compared_by_the_final_stage_and_others_by_the_confirmation() -> None:
    votes = [vote(0, 1, "right"), vote(0, 2, "left")]
    agreed = search.Comparison(VALUED, FINAL).agreement(votes)
    assert agreed["score"] == [1, 1] and agreed["fidelity"] == [0, 0]


def test_trials_rank_by_wins_and_halved_draws() -> None:
    votes = [vote(0, 1, "right"), vote(2, 1, "equal"), vote(2, 0, "left"), vote(1, 0, "left")]
    ranking = search.Comparison.ranking(votes)
    assert list(ranking.items()) == [("trial 1", [1, 0.5, 1]), ("trial 2", [0.5, 1]), ("trial 0", [0, 0, 0])]


@pytest.mark.parametrize(  # worked out by hand from Wilson's formula
    ("part", "count", "low", "high"),
    [(3, 4, 0.3006, 0.9544), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 20, 0.5313, 0.8881)],
)
def test_intervals_are_wilsons(part: int, count: int, low: float, high: float) -> None:
    said = search.describe_share("score", [1.0] * part + [0.0] * (count - part))
    assert said.endswith(f"({low:.0%} to {high:.0%}; {part} of {count})")


def test_votes_are_told_as_shares_with_intervals() -> None:
    votes = [vote(0, 1, "left"), vote(1, 2, "left"), vote(0, 2, "right"), vote(0, 3, "left"), vote(0, 3, "equal")]
    lines = search.Comparison(VALUED, {}).describe(votes).splitlines()
    assert lines[0].startswith("Your eye against the score: 5 votes")
    assert "  score          75%  (30% to 95%; 3 of 4)" in lines
    assert "  originality      -" in lines
    assert "  trial 0        62%  (22% to 91%; 2.5 of 4)" in lines


def test_pairs_with_the_closest_scores_come_first() -> None:
    pairs = search.Comparison(VALUED, {}).pairs()
    assert list(map(sorted, pairs)) == [[0, 1], [1, 2], [0, 2], [2, 3], [1, 3], [0, 3]]
    final = {number: {"score": score, "terms": {}} for number, score in ((0, 0.95), (1, 0.25))}
    assert list(map(sorted, search.Comparison(VALUED, final).pairs()))[-1] == [0, 1]


def test_sides_of_a_pair_are_drawn_and_stay_when_other_trials_come() -> None:
    trials = [valued(number, 0.01 * number, 0.1) for number in range(8)]
    pairs = search.Comparison(trials, {}).pairs()
    assert 7 < sum(left < right for left, right in pairs) < 21 and len(pairs) == 28
    fewer = search.Comparison(trials[5:2:-1], {}).pairs()
    assert len(fewer) == 3 and all(pair in pairs for pair in fewer)


def read_votes(file: Path) -> list[search.Vote]:
    study = optuna.create_study(direction="maximize", study_name="test")
    study.add_trials([*VALUED, optuna.trial.create_trial(state=TrialState.FAIL)])
    return search.Comparison(search.scored_trials(study), {}).read_votes(file, "test")


def test_votes_are_read_as_they_were_saved(tmp_path: Path) -> None:
    votes = [vote(0, 1, "left"), vote(3, 2, "equal")]
    (tmp_path / "votes.json").write_text(json.dumps({"study": "test", "votes": votes}))
    assert read_votes(tmp_path / "votes.json") == votes
    assert read_votes(tmp_path / "none.json") == []


GOOD_VOTE = vote(0, 1, "left")


@pytest.mark.parametrize(
    "text",
    [
        "", '{"study": "test", "votes": [{"left": 0', "[]", "{}", '{"study": "test"}',
        *(json.dumps({"study": "test", "votes": votes}) for votes in (None, {}, "left", [None], [[0, 1, "left"]])),
        *(
            json.dumps({"study": "test", "votes": [GOOD_VOTE, {**GOOD_VOTE, **wrong}]})
            for wrong in (
                {"left": 7}, {"left": 4}, {"left": "0"}, {"left": True}, {"left": 0.0}, {"left": [0]}, {"left": 1},
                {"right": None}, {"vote": "up"}, {"vote": 1}, {"vote": ["left"]},
            )
        ),
        json.dumps({"study": "another", "votes": [GOOD_VOTE]}),
        json.dumps({"study": ["test"], "votes": [GOOD_VOTE]}),
    ],
)  # fmt: skip
def test_damaged_and_foreign_votes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "votes.json").write_text(text)
    with pytest.raises(search.SearchError, match="damaged, or not on scored trials of study 'test'; take it away, or"):
        read_votes(tmp_path / "votes.json")


def improvements(study: optuna.Study) -> list[str]:
    return search.describe_study(study).partition("Expected improvements, measured:\n")[2].splitlines()


def test_expected_improvements_are_measured(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 4)
    open_study(settings).enqueue_trial({**SAFE, "learning_rate": 1.1e-4, "lr_warmup_steps": 50})
    study = run(settings, [failing(search.Diverged("nan"))])  # scored: trials 2, 3, 4 with 0.12, 0.13, 0.14
    lines = [" ".join(line.split()) for line in improvements(study)]
    assert lines[:4] == [
        "rejected proposals 20% (1 of 5; expected < 10%)",
        "stable trainings 75% (3 of 4; expected 80-90%)",
        "quality failures (usable < 0.9) 0% (0 of 4; expected < 10%)",
        "optimal (within 5% of the best) 25% (1 of 4; expected 30-40%)",
    ]
    shares = [int(line.split("(")[2].split()[0]) for line in lines[4:]]
    assert sum(shares) == 4


def test_what_the_user_enqueued_is_no_proposal(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    study_of_settings(settings).enqueue([{**SAFE, "learning_rate": 1.1e-4, "lr_warmup_steps": 50}])
    study = run(settings)
    assert [trial.user_attrs["ended"] for trial in study.get_trials()] == ["rejected", "scored"]
    assert "0%  (0 of 1;" in improvements(study)[0]


def test_unusable_pictures_are_quality_failures(tmp_path: Path) -> None:
    study = run(settings_for(tmp_path, 2), [], [lambda folder: score_with(folder, 0.5)])
    assert "50%  (1 of 2" in improvements(study)[2]


def score_with(folder: Path, usable: float) -> None:
    metrics = {
        "outcome": "scored", "reason": "", "score": 0.2, "best_epoch": 12, "checkpoint": "lora.safetensors",
        "terms": {**TERMS, "usable": usable}, "scoring_seconds": 1.0, "standard_error": 0.01, "screen": [],
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_a_report_shows_the_trials_under_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path, 2)
    study = run(settings, [], [lambda folder: score_with(folder, 0.8), lambda folder: score_with(folder, 0.9)])
    study.set_user_attr("fingerprint", {})
    scoring = toml.loads((REPOSITORY / "configs" / "scoring.toml").read_text(encoding="utf-8"))
    scoring["weights"] = {**dict.fromkeys(scoring["weights"], 0.0), "usable": 1.0}
    (tmp_path / "other.toml").write_text(toml.dumps(scoring), encoding="utf-8")
    flags = ["--report", f"--output-dir={settings.output_dir}", "--study-name=test"]
    assert search.main([*flags, f"--scoring-config={tmp_path / 'other.toml'}"]) == 0
    said = capsys.readouterr().out.partition("With the weights of --scoring-config:\n")[2]
    assert [line.split() for line in said.splitlines()] == [
        ["trial", "1", "0.900", "(was", "0.200)"], ["trial", "0", "0.800", "(was", "0.200)"],
    ]  # fmt: skip


def test_a_study_without_a_score_says_so_and_why(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 3)
    with pytest.raises(search.SearchStopped):
        run(settings, [failing(search.TrialFailed("no such card"))] * 3)
    study = open_study(settings)
    search.Results(study, settings.output_dir).write()
    said = search.describe_study(study)
    assert said.startswith("Nothing was scored yet in study 'test': ")
    assert "1 crashed, 1 interrupted" in said and "The last one: no such card" in said
    assert not (settings.output_dir / "results" / "best_lora.safetensors").exists()


@pytest.mark.parametrize(
    ("best", "says"), [(1.2e-4, "upper end: raise"), (6e-5, "lower end: lower"), (9e-5, "neither")]
)
def test_the_report_says_which_way_the_dose_should_move(tmp_path: Path, best: float, says: str) -> None:
    """Twelve trials that differ in their learning rates alone; the nearer to `best`, the better."""
    study = optuna.create_study(direction="maximize")
    for number in range(12):
        params = {**SAFE, "learning_rate": 6e-5 + number * 6e-5 / 11}
        score = 1 - abs(params["learning_rate"] - best) * 1e3
        attrs = {"training_params": search.V2_1.complete(params), "ended": "scored", "terms": TERMS}
        study.add_trial(
            optuna.create_trial(value=score, params=params, distributions=search.SEARCH_SPACE, user_attrs=attrs)
        )
    assert says in search.Results(study, tmp_path).dose_advice()


def test_doses_that_were_stopped_early_count_for_the_advice(tmp_path: Path) -> None:
    """Only the five best have a score; they have the highest doses of all that were tried."""
    study = optuna.create_study(direction="maximize")
    for number in range(12):
        params = {**SAFE, "learning_rate": 6e-5 + number * 6e-5 / 11}
        attrs = {"training_params": search.V2_1.complete(params), "ended": "scored", "terms": TERMS}
        end: dict[str, object] = {"value": number / 20}
        if number < 7:
            attrs["ended"] = "stopped early"
            end = {"state": TrialState.PRUNED, "intermediate_values": {50: number / 20}}
        study.add_trial(optuna.create_trial(params=params, distributions=search.SEARCH_SPACE, user_attrs=attrs, **end))
    results = search.Results(study, tmp_path)
    assert "upper end: raise" in results.dose_advice()


def test_a_study_of_an_earlier_version_has_no_plot_of_scores_while_training(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    for number in range(3):
        attrs = {"training_params": search.V2_1.complete(SAFE), "ended": "scored", "terms": TERMS}
        space = search.SEARCH_SPACE
        study.add_trial(optuna.create_trial(value=number / 9, params=SAFE, distributions=space, user_attrs=attrs))
    plots = search.Results(study, tmp_path).plots()
    assert "Score against dose" in plots and "Score while training" not in plots
