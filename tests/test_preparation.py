"""Section 12: what is checked and made before the first trial."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import optuna_hyperparameter_search as search

# --- parameters to try first -------------------------------------------------------------------------


def read_enqueue(tmp_path: Path, text: str, *, has_8bit: bool = True) -> list[search.Params]:
    (tmp_path / "first.toml").write_text(text)
    trainer = search.TrainerFacts("v0.10.1", "NVIDIA GeForce RTX 4080", {"bitsandbytes": has_8bit})
    return search.EnqueueReader(trainer.can_train, search.V2_1).read([tmp_path / "first.toml"])[0]


def test_one_table_or_several_trials_can_be_enqueued(tmp_path: Path) -> None:
    assert read_enqueue(tmp_path, "learning_rate = 1e-4\nnetwork_dim = 64") == [
        {"learning_rate": 1e-4, "network_dim": 64}
    ]
    assert len(read_enqueue(tmp_path, "[[trial]]\nnetwork_dim = 64\n[[trial]]\nnetwork_dim = 128")) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("learning_rate = 1.0", "outside the search space; give 6e-05 to 0.00012$"),
        ("learning_rate = nan", "outside the search space"),
        ("network_dim = 96", "give one of 64, 128, 256$"),
        ("network_dim = 64.0", "64, 128, 256"),
        ("network_alpha_ratio = 0.33", "give 0.25 to 0.9 in steps of 0.05$"),
        ("lr_warmup_steps = true", "give 50 to 200 in steps of 50$"),
        ("optimizer_type = 'Lion'", "'AdamW', 'AdamW8bit'"),
        ("learning_rat = 1e-4", "did you mean 'learning_rate'"),
        ("network_alpha = 32", "times a network_dim beside it"),
        ("network_alpha = 33\nnetwork_dim = 64", "times a network_dim beside it"),
        ("network_alpha = 64\nnetwork_dim = 64", "times a network_dim beside it"),
        ("network_alpha = 32\nnetwork_dim = 64\nnetwork_alpha_ratio = 0.75", "or give network_alpha_ratio alone"),
        ("lr_scheduler_num_cycles = 2", "needs lr_scheduler = 'cosine_with_restarts'"),
        ("", "has no parameters"),
        ("trial = 3", "has no parameters"),
        ("network_dim = 64\n[[trial]]\nnetwork_dim = 128", "outside of its"),
    ],
)
def test_what_the_space_does_not_hold_is_refused(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(search.RefusedInput, match=says):
        read_enqueue(tmp_path, line)


def test_8bit_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match="needs bitsandbytes"):
        read_enqueue(tmp_path, "optimizer_type = 'AdamW8bit'", has_8bit=False)


def test_kohyas_own_alpha_is_taken_for_its_ratio(tmp_path: Path) -> None:
    assert read_enqueue(tmp_path, "network_dim = 128\nnetwork_alpha = 96") == [
        {"network_dim": 128, "network_alpha_ratio": 0.75}
    ]


def test_kohyas_own_alpha_beside_its_ratio_says_the_same(tmp_path: Path) -> None:
    same = {"network_dim": 128, "network_alpha_ratio": 0.75}
    assert read_enqueue(tmp_path, "network_dim = 128\nnetwork_alpha = 96\nnetwork_alpha_ratio = 0.75") == [same]


@pytest.mark.parametrize("name", ["search_space_prodigy.toml", "search_space_sdxl.toml"])
def test_a_trials_params_can_be_enqueued_with_what_the_space_sets(tmp_path: Path, name: str) -> None:
    space = search.SearchSpace.read(search.HERE / "configs" / name)
    drawn = space.draw(np.random.default_rng(0))
    search.write_json(tmp_path / "params.json", space.complete(drawn))
    ((table,), _) = search.EnqueueReader(lambda _: True, space).read([tmp_path / "params.json"])
    assert table == {**drawn, "network_alpha_ratio": round(drawn["network_alpha_ratio"], 10)}


def test_what_the_space_sets_otherwise_is_no_parameter(tmp_path: Path) -> None:
    space = search.SearchSpace.read(search.HERE / "configs" / "search_space_sdxl.toml")
    for line, said in (
        ("network_train_unet_only = true", "no parameter that is searched"),
        ("network_train_unet_only = false", "unknown parameter 'network_train_unet_only'"),
    ):
        (tmp_path / "first.toml").write_text(line)
        with pytest.raises(search.RefusedInput, match=said):
            search.EnqueueReader(lambda _: True, space).read([tmp_path / "first.toml"])


def test_what_a_search_wrote_of_a_trial_can_be_enqueued(tmp_path: Path) -> None:
    params = search.V2_1.complete(search.V2_1.draw(np.random.default_rng(0)))
    search.write_json(tmp_path / "trial_0003" / "params.json", params)
    search.write_json(tmp_path / "results" / "best_parameters.json", {"study": "a", "score": 0.5, "parameters": params})
    paths = [tmp_path / "trial_0003", tmp_path / "results" / "best_parameters.json"]
    one, same = search.EnqueueReader(lambda _: True, search.V2_1).read(paths)[0]
    assert one == same == {name: params[name] for name in params if name != "network_alpha"}


def test_a_single_trial_table_is_taken_as_one(tmp_path: Path) -> None:
    assert read_enqueue(tmp_path, "[trial]\nnetwork_dim = 64") == [{"network_dim": 64}]


@pytest.mark.parametrize("ratio", ["0.6", "0.85", "0.25", "0.9"])
def test_the_grids_own_values_are_accepted(tmp_path: Path, ratio: str) -> None:
    assert read_enqueue(tmp_path, f"network_alpha_ratio = {ratio}")


def test_arguments_of_an_earlier_searchs_optimizer_are_those_of_the_space(tmp_path: Path) -> None:
    space = search.SearchSpace.read(search.HERE / "configs" / "search_space_prodigy.toml")
    text = space.searched["optimizer_args"].choices[-1]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "trials.csv").write_text("trial,score,final_score\n0,0.5,\n")
    search.write_json(
        tmp_path / "trial_0000" / "params.json", {"optimizer_type": "Prodigy", "optimizer_args": text.split()}
    )
    ((table,), (note,)) = search.EnqueueReader(lambda _: True, space).read([tmp_path])
    assert "not whole" not in note
    assert table["optimizer_args"] == text and "optimizer_args" not in note


def test_what_is_missing_of_an_earlier_search_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "trials.csv").write_text("trial,score,final_score\n0,0.5,\n1,0.4,\n")
    search.write_json(tmp_path / "trial_0001" / "params.json", {"network_dim": 64})
    ((table,), (note,)) = search.EnqueueReader(lambda _: True, search.V2_1).read([tmp_path])
    assert table == {"network_dim": 64} and "trial 1" in note
    assert note.endswith(f"; not whole: {tmp_path / 'trial_0000' / 'params.json'}")
    (tmp_path / "results" / "trials.csv").write_text("trial,score,final_score\n0,,\n")
    found = search.EnqueueReader(lambda _: True, search.V2_1).read([tmp_path])
    assert found == ([], [f"no trial of {tmp_path.name} has a score"])
