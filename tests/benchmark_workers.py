"""Trials an hour of one, two and four workers on devices of one machine.

    python tests/benchmark_workers.py      four minutes

The program is the real one on a tiny world's inputs. Its trainer, `tests/fault_trainer`, sleeps instead of computing,
and so does the scoring, so that a few cores are enough for four workers. All trainings take as long.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import demo_world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optuna_hyperparameter_search as search

TRIALS, STEPS, TRAINING_SECONDS, SCORING_SECONDS = 8, 120, 12.0, 3.0
SPACE = """
safety_constraints = false
network_dim = 64
max_train_epochs = 12
lr_scheduler = "cosine"
gradient_accumulation_steps = 1
lr_warmup_steps = 50
optimizer_type = "AdamW"
text_encoder_lr = 5e-5
[learning_rate]
low = 6e-5
high = 1.2e-4
[network_alpha_ratio]
low = 0.25
high = 0.7
"""


def score_by_sleeping(folder: Path, device: str, stall_minutes: float) -> None:
    if folder.name == "reference":
        return search.write_json(folder / "anchors.json", {})
    time.sleep(SCORING_SECONDS)
    metrics = {
        "outcome": "scored", "score": 0.5, "standard_error": 0.1, "terms": dict.fromkeys(search.TERMS, 0.5),
        "best_epoch": 12, "checkpoint": f"{search.LORA_NAME}.safetensors", "scoring_seconds": SCORING_SECONDS,
        "screen": [{"epoch": 12, "score": 0.5}],
    }  # fmt: skip
    search.write_json(folder / "metrics.json", metrics)


def seconds_of_study(world: Path, output_dir: Path, workers: int) -> float:
    """From the first trial's begin to the last one's end."""
    files = {
        "dataset-config": "dataset",
        "training-config": "training",
        "scoring-config": "scoring",
        "search-space": "space",
    }
    words = [word for flag, name in files.items() for word in (f"--{flag}", world / f"{name}.toml")]
    words += [
        "--base-model",
        world / "base_model",
        "--sd-scripts",
        world.parent / "trainer",
        "--output-dir",
        output_dir,
    ]
    words += ["--device", ",".join(["cpu"] * workers), "--n-trials", TRIALS, "--prune", "off"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = search.main(list(map(str, words)))
    assert status == 0, said.getvalue()
    trials = search.load_study(search.default_storage(output_dir), search.DEFAULT_STUDY_NAME).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * TRIALS
    return (max(t.datetime_complete for t in trials) - min(t.datetime_start for t in trials)).total_seconds()


def main() -> None:
    top = Path(tempfile.mkdtemp(prefix="workers-"))
    demo_world.make_tiny_world(top / "world")
    (top / "world" / "space.toml").write_text(SPACE, encoding="utf-8")
    (top / "trainer").symlink_to(Path(__file__).resolve().parent / "fault_trainer")
    os.environ["STEP_SECONDS"] = str(TRAINING_SECONDS / STEPS)
    search.score_in_child = score_by_sleeping
    search.Study.decide = lambda *_: None
    alone = 0.0
    for workers in (1, 2, 4):
        seconds = seconds_of_study(top / "world", top / f"out{workers}", workers)
        alone = alone or seconds
        rest = seconds * workers / TRIALS - TRAINING_SECONDS - SCORING_SECONDS
        speed = f"{TRIALS * 3600 / seconds:.0f} trials an hour, {alone / seconds:.2f} times one worker's"
        print(f"{workers} workers: {speed}; {rest:.1f} s a trial besides training and scoring", flush=True)


if __name__ == "__main__":
    main()
