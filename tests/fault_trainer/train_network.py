"""A trainer that learns nothing, in a second, and fails where it is told to.

It takes train_network.py's options, prints what that prints, and leaves the files that it leaves (`tests/small_trainer`
is the stand-in that really trains; options, data set and epochs are read by its code). Its weights come from the
config alone: equal parameters, equal files.

FAULT says what goes wrong, from which step on, and in which trial's folder, where it happens once (in all, and always,
if none is named):

    FAULT=hang@3:trial_0001
    hang     no step any more                deaf   the same, and SIGTERM is ignored
    die      an exception, status 1          oom    the card is full, status 1
    kill     SIGKILL, as by the kernel       nan    loss and weights are NaN
    slow     a step takes ten times longer   full   no file may grow beyond 2 kB

STEP_SECONDS is what a step takes (0.002).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SMALL_TRAINER = Path(__file__).resolve().parents[1] / "small_trainer" / "train_network.py"
LAYERS = ("attn1.to_q", "attn2.to_v", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")


def load_small_trainer() -> Any:
    spec = importlib.util.spec_from_file_location("small_trainer", SMALL_TRAINER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_trainer"] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


small = load_small_trainer()


def read_fault(output_dir: str) -> tuple[str, int]:
    """What goes wrong in this folder, and from which step on."""
    fault, _, where = os.environ.get("FAULT", "").partition(":")
    kind, _, step = fault.partition("@")
    happened = Path(output_dir, "fault_happened")
    if not kind or where not in ("", Path(output_dir).name) or happened.exists():
        return "", 0
    if where:
        happened.touch()
    return kind, int(step or 1)


def happen(kind: str) -> None:
    """What a fault does at its step, once or at every later one too."""
    if kind == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind in ("hang", "deaf"):
        time.sleep(3600)
    if kind == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    if kind == "die":
        raise RuntimeError("the worker has lost its mind")
    if kind == "oom":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":
        time.sleep(10 * step_seconds())


def step_seconds() -> float:
    return float(os.environ.get("STEP_SECONDS", "0.002"))


def cache_latents(group: Any) -> None:
    """What kohya leaves beside the pictures."""
    strategy = small.LatentsCachingStrategy.get_strategy()
    for info in [info for one in group.datasets for info in one.image_data.values()]:
        cache = Path(strategy.get_latents_npz_path(info.absolute_path, info.image_size))
        if cache.is_file():
            with np.load(cache) as arrays:
                assert any(arrays[name].ndim == 3 for name in arrays.files if name.startswith("latents"))
            continue
        across, down = info.bucket_reso
        np.savez(cache, latents=np.zeros((4, down // 8, across // 8), np.float32), original_size=info.image_size)


def make_weights(args: argparse.Namespace, epoch: int, broken: bool) -> dict[str, np.ndarray]:
    """A LoRA for a few layers of the base model, under kohya's names, drawn from the config."""
    about = {name: str(value) for name, value in vars(args).items() if not name.endswith(("_dir", "_file"))}
    seed = int(hashlib.sha256(json.dumps([about, epoch], sort_keys=True).encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for prefix, folder in (("lora_unet", "unet"), ("lora_te", "text_encoder")):
        for name, shape in layers_of(Path(args.pretrained_model_name_or_path) / folder):
            key = f"{prefix}_{name.replace('.', '_')}"
            up = (
                np.full((shape[0], args.network_dim), np.nan)
                if broken
                else rng.normal(size=(shape[0], args.network_dim))
            )
            weights[f"{key}.lora_down.weight"] = rng.normal(size=(args.network_dim, shape[1])).astype(np.float16)
            weights[f"{key}.lora_up.weight"] = (0.01 * up).astype(np.float16)
            weights[f"{key}.alpha"] = np.array(args.network_alpha, np.float16)
    return weights


def layers_of(folder: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes (out, in) of the layers that get a LoRA."""
    file = next(folder.glob("*.safetensors"))
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    if folder.name == "text_encoder":  # transformers 5 leaves text_model out
        header = {f"text_model.{name.removeprefix('text_model.')}": entry for name, entry in header.items()}
    names = {name.removesuffix(".weight"): entry for name, entry in header.items() if name.endswith(".weight")}
    return [(name, entry["shape"]) for name, entry in names.items() if name.endswith(LAYERS)]


def save(args: argparse.Namespace, name: str, epoch: int, step: int, broken: bool) -> None:
    from safetensors.numpy import save_file

    file = Path(args.output_dir) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"\nsaving checkpoint: {file}")
    save_file(make_weights(args, epoch, broken), file, metadata={"ss_epoch": str(epoch), "ss_steps": str(step)})


class FaultTrainer(small.NetworkTrainer):
    def prepare_accelerator(self, args: argparse.Namespace) -> Any:
        """Only where it is imported already: a probe waits for this call, and the import takes seconds."""
        return sys.modules["accelerate"].Accelerator() if "accelerate" in sys.modules else None

    def train_on(self, accelerator: Any, args: argparse.Namespace, group: Any) -> None:
        print("accelerator device: cpu")
        train(args, group)


def train(args: argparse.Namespace, group: Any) -> None:
    from tqdm import tqdm

    kind, fault_step = read_fault(args.output_dir)
    if args.cache_latents_to_disk:
        cache_latents(group)
    epochs = small.count_steps(args, len(group))
    small.describe_run(args, group, epochs)
    step, average = 0, small.AverageLoss()
    per_epoch = -(-len(group) // args.gradient_accumulation_steps)
    with tqdm(total=args.max_train_steps, smoothing=0, desc="steps") as bar:
        for epoch in range(1, epochs + 1):
            print(f"\nepoch {epoch}/{epochs}\n")
            for number in range(per_epoch):
                time.sleep(step_seconds())
                step += 1
                reached = bool(kind) and step >= fault_step
                if reached:
                    happen(kind)
                bar.update()
                bar.set_postfix(avr_loss=average.add(number, float("nan") if reached and kind == "nan" else 1 / step))
                if step >= args.max_train_steps:
                    break
            every, broken = args.save_every_n_epochs, kind == "nan" and step >= fault_step
            if every and epoch % every == 0 and epoch < epochs:
                save(args, f"{args.output_name}-{epoch:06d}.safetensors", epoch, step, broken)
        save(args, f"{args.output_name}.safetensors", epochs, step, broken)
        print("model saved.")


def main() -> int:
    FaultTrainer().train(small.read_arguments(sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
