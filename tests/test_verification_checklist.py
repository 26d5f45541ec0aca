"""The verification checklist of the V2.1 implementation guide, a test a line."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from conftest import REPOSITORY, Demo

import optuna_hyperparameter_search as search

SCRIPT = REPOSITORY / "optuna_hyperparameter_search.py"
STABLE = {
    "learning_rate": 8e-5, "text_encoder_lr": 4e-5, "network_dim": 128, "network_alpha_ratio": 0.75,
    "network_alpha": 96, "optimizer_type": "AdamW", "max_train_epochs": 16, "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2, "lr_warmup_steps": 150,
}  # fmt: skip


def test_script_runs_without_syntax_errors() -> None:
    done = subprocess.run([sys.executable, "-W", "error", str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:") and done.stderr == ""


def test_first_trial_prints_alpha_ratio_in_parameters(demo: Demo) -> None:
    first_trial = demo.killed.partition("Trial 0: ")[2].partition("Trial 1: ")[0]
    line = re.search(r"^  network_alpha: (\d+) \(ratio: (0\.\d{3})\)$", first_trial, re.MULTILINE)
    dim = re.search(r"^  network_dim: (\d+)$", first_trial, re.MULTILINE)
    assert line and dim and int(line[1]) == int(int(dim[1]) * float(line[2]))


@pytest.mark.parametrize("ratio", [0.75, 0.8, 0.85, 0.9])
def test_trials_with_alpha_ratio_from_0_75_are_checked_for_all_stability_requirements(ratio: float) -> None:
    stable = {**STABLE, "network_alpha_ratio": ratio, "network_alpha": int(128 * ratio)}
    assert search.check_safety_constraints(stable) == (True, "")
    breaches = {
        "epochs >= 16": {"max_train_epochs": 12},
        "grad_accum >= 2": {"gradient_accumulation_steps": 1},
        "optimizer = AdamW": {"optimizer_type": "AdamW8bit"},
        "warmup >= 150": {"lr_warmup_steps": 100},
    }
    for count in range(1, 5):
        for names in itertools.combinations(breaches, count):
            params = dict(stable)
            for name in names:
                params.update(breaches[name])
            reason = f"High alpha (≥0.75) requires: {', '.join(names)}"
            assert search.check_safety_constraints(params) == (False, reason)


def test_rejected_trials_show_clear_rejection_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_study import settings_for

    unsafe = {**STABLE, "optimizer_type": "AdamW8bit"}
    trial = optuna.create_study().ask()
    objective = search.LoraObjective(settings_for(tmp_path), {}, lambda config: 0.0, lambda folder: None)
    reason = "High alpha (≥0.75) requires: optimizer = AdamW"
    with pytest.raises(optuna.TrialPruned, match=re.escape(reason)):
        objective.train_lora(trial, unsafe)
    assert capsys.readouterr().out == f"\n❌ TRIAL REJECTED: {reason}\nParameters: {json.dumps(unsafe, indent=2)}\n\n"


def test_learning_rate_range_is_6e_5_to_1_2e_4() -> None:
    distribution = search.SEARCH_SPACE["learning_rate"]
    assert distribution == optuna.distributions.FloatDistribution(6e-5, 1.2e-4, log=True)


def test_all_trials_use_epochs_of_at_least_12(demo: Demo) -> None:
    assert search.SEARCH_SPACE["max_train_epochs"].choices == (12, 16, 20)
    for folder in demo.output_dir.glob("trial_*"):
        assert search.read_toml(folder / "config.toml", "config")["max_train_epochs"] >= 12


def test_database_and_logs_are_created_properly(demo: Demo) -> None:
    with sqlite3.connect(demo.output_dir / "optuna_study.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        states = [state for (state,) in database.execute("SELECT state FROM trials ORDER BY number")]
    assert states == ["COMPLETE", "COMPLETE"]
    assert "Trial 0 scored" in (demo.output_dir / "search.log").read_text()
    for number in (0, 1):
        folder = demo.output_dir / f"trial_{number:04d}"
        assert "model saved." in (folder / "training.log").read_text()
        assert "scoring took" in (folder / "scoring.log").read_text()
