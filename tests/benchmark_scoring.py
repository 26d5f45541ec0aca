"""What one scoring process a trial saves, against a fresh process and pipeline for every checkpoint.

    python tests/benchmark_scoring.py
    python tests/benchmark_scoring.py --base-model v1-5.safetensors --pipeline-config FOLDER --lora lora.safetensors

Both ways make the same images of 6 checkpoints, screening all and confirming the best, and must find the same scores.
Without options the models are the demo's tiny ones, so nearly all of the time is starting and loading. A model of full
size is rendered at 64 pixels too: at its own size rendering takes longer, alike in both ways, and the ratio is smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo_world
import toml

import optuna_hyperparameter_search as search

CHECKPOINTS = 6
LORA_TARGETS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 32),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (32, 32),
    "lora_te_text_model_encoder_layers_0_self_attn_out_proj": (32, 32),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (64, 32),
}  # (out, in) in the tiny models


def make_trial(output_dir: Path, args: argparse.Namespace) -> Path:
    """A finished training of 6 checkpoints, and its study's plan."""
    world, trial = output_dir / "world", output_dir / "trial_0000"
    demo_world.make_tiny_world(world)
    data = demo_world.read_data_set(world / "dataset.toml", {"cache_latents": True})
    settings = search.ScoringSettings.read(world / "scoring.toml")
    images = [(image.path, *image.captions) for image in data.images]
    base_model = str(args.base_model.resolve() if args.base_model else world / "base_model")
    about = (base_model, {"clip_skip": 2, "seed": 42}, None, search.SD1)
    plan = search.PromptChooser(demo_world.SUBJECT, images, settings).plan(*about)
    if args.pipeline_config:
        plan["pipeline_config"] = str(args.pipeline_config.resolve())
    search.write_json(output_dir / "reference" / "plan.json", plan)
    trial.mkdir()
    (trial / "config.toml").write_text(toml.dumps({"max_train_epochs": 2 * CHECKPOINTS}))
    for number in range(1, CHECKPOINTS + 1):
        name = f"lora-{2 * number:06d}" if number < CHECKPOINTS else "lora"
        write_lora(trial / f"{name}.safetensors", number, args.lora)
    return trial


def write_lora(path: Path, seed: int, like: Path | None) -> None:
    """A LoRA under kohya's names: of the tiny models, or `like` with its lora_up scaled, so that no two are alike."""
    import torch
    from safetensors.torch import load_file, save_file

    if like:
        weights = load_file(like)
        for name in weights:
            if ".lora_up." in name:
                weights[name] = weights[name] * (1 + seed / 2)
        return save_file(weights, path)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns) in LORA_TARGETS.items():
        weights[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        weights[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
        weights[f"{name}.alpha"] = torch.tensor(4.0)
    return save_file(weights, path)


def score_one_in_this_process(trial: Path, checkpoint: str, stage: str) -> None:
    """What a program without a scoring process of its own does for every checkpoint: load all, score, end."""
    reference = trial.parent / "reference"
    scorer = search.FolderScorer(search.ImageScorer(search.read_json(reference / "plan.json"), "cpu"), reference)
    images = trial / "fresh" / Path(checkpoint).stem / stage
    print(json.dumps(scorer.score_checkpoint(trial / checkpoint, stage, images, lambda made: None)))


def timed(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - started, done.stdout


def one_process(trial: Path) -> tuple[float, list[float]]:
    """Seconds, and the scores: of every checkpoint's screening, then of the confirmation."""
    seconds, _ = timed([sys.executable, str(search.__file__), "--score", str(trial), "--device", "cpu"])
    metrics = search.read_json(trial / "metrics.json")
    return seconds, [*(result["score"] for result in metrics["screen"]), metrics["score"]]


def process_per_checkpoint(trial: Path) -> tuple[float, list[float]]:
    def score(checkpoint: str, stage: str) -> tuple[float, float]:
        command = [sys.executable, __file__, "--worker", str(trial), checkpoint, stage]
        seconds, output = timed(command)
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return seconds, result["score"]

    epochs = search.read_json(trial / "params.json")["max_train_epochs"]
    names = [file.name for file in search.saved_checkpoints(trial, epochs).values()]
    screened = [score(name, "screen") for name in names]
    best = max(range(len(names)), key=lambda number: screened[number][1])
    times, scores = zip(*screened, score(names[best], "confirm"), strict=True)
    return sum(times), list(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base-model", "--pipeline-config", "--lora"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, in turn; the fastest counts")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return score_one_in_this_process(Path(args.worker[0]), *args.worker[1:])
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        trial = make_trial(Path(folder), args)
        # The reference is made once a study and belongs to neither way.
        timed([sys.executable, str(search.__file__), "--score", str(trial.parent / "reference"), "--device", "cpu"])
        runs = [(one_process(trial), process_per_checkpoint(trial)) for _ in range(args.repeats)]
    scores = [way[1] for run in runs for way in run]
    if any(found != scores[0] for found in scores):
        sys.exit(f"the ways disagree: {scores}")
    together, apart = (min(run[way][0] for run in runs) for way in (0, 1))
    print(f"{CHECKPOINTS} checkpoints screened, the best confirmed, {args.repeats} runs each, scores equal bit for bit")
    print(f"one scoring process:            {together:7.1f} s")
    print(f"a process for every checkpoint: {apart:7.1f} s   ({CHECKPOINTS + 1} processes)")
    print(f"ratio:                          {apart / together:7.2f}")


if __name__ == "__main__":
    main()
