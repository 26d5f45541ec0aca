"""The small trainer speaks the contract of kohya's train_network.py, and really trains."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import demo_world
import numpy as np
import pytest
import toml

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS / "small_trainer" / "train_network.py"
EPOCHS, EVERY, BATCHES = 12, 4, 10  # of the shared run; the demo's data set gives 10 batches an epoch
RANK, ALPHA = 16, 8

# What a reader of kohya's output looks for.
EPOCH = re.compile(r"^epoch (\d+)/(\d+)\s*$", re.MULTILINE)
BAR = re.compile(
    r"(?<!validation )steps:\s+\d+%\|[^|]*\|\s*(\d+)/(\d+) "
    r"\[([\d:]+)<([\d:?]+),\s*([\d.]+(?:e[+-]?\d+)?|\?)(it/s|s/it)"
)
LOSS = re.compile(r"avr_loss=\s*(nan|[-+]?inf|[-+]?[\d.]+(?:e[-+]?\d+)?)")
TOTAL = re.compile(r"override steps\. steps for (\d+) epochs is [^:]*: (\d+)")
SAVE = re.compile(r"^saving checkpoint: (.+)$", re.MULTILINE)
DONE = re.compile(r"model saved\.")

OPTIONS = json.loads((TESTS / "kohya" / "train_network_options.json").read_text(encoding="utf-8"))
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("restore_threads")]
Result = subprocess.CompletedProcess[str]


def facts(name: str) -> set[str]:
    return set((TESTS / "kohya" / f"{name}.txt").read_text(encoding="utf-8").split())


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **environment}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def run(*arguments: object, **environment: str) -> Result:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder)
    return folder


WriteConfig = Callable[..., Path]


@pytest.fixture(scope="module")
def write_config(world: Path, tmp_path_factory: pytest.TempPathFactory) -> WriteConfig:
    """A complete training config with an output folder of its own, the given values put in last."""

    def write(**values: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        config = {
            **toml.loads((world / "training.toml").read_text(encoding="utf-8")),
            "pretrained_model_name_or_path": str(world / "base_model"),
            "dataset_config": str(world / "dataset.toml"),
            "output_dir": str(folder / "out"),
            "output_name": "lora",
            "network_dim": RANK,
            "network_alpha": ALPHA,
            "learning_rate": 2e-3,
            "text_encoder_lr": 1e-3,
            "optimizer_type": "AdamW",
            "lr_scheduler": "cosine",
            "max_train_epochs": EPOCHS,
            "save_every_n_epochs": EVERY,
            **values,
        }
        file = folder / "config.toml"
        file.write_text(toml.dumps(config), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def trained(write_config: WriteConfig) -> tuple[Result, Path]:
    """One training as a process, cold cache; its result and its output folder."""
    config = write_config()
    return run("--config_file", config), config.parent / "out"


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("train_network")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def train_here(trainer: ModuleType, write_config: WriteConfig) -> Callable[..., Any]:
    """Train in this process, which has torch loaded already; the finished run with its model."""
    run_training = trainer.Training.run

    def train(**values: Any) -> Any:
        from accelerate.state import AcceleratorState

        args = trainer.read_arguments(["--config_file", str(write_config(**values))])
        AcceleratorState._reset_state(reset_partial_state=True)  # one a process, and it keeps the precision
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            caught: list[Any] = []
            patch.setattr(
                trainer.Training, "run", lambda self: caught.append(self)
            )  # the finished run is wanted, which train() drops
            trainer.NetworkTrainer().train(args)
        (training,) = caught
        run_training(training)
        return training

    return train


def weights_and_metadata(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


# What it prints and writes


def test_ends_with_status_0_and_says_that_the_model_is_saved(trained: tuple[Result, Path]) -> None:
    result, _ = trained
    assert result.returncode == 0, result.stderr[-2000:]
    assert DONE.search(result.stderr)


def test_prints_every_epoch_on_stdout(trained: tuple[Result, Path]) -> None:
    found = [(int(number), int(of)) for number, of in EPOCH.findall(trained[0].stdout)]
    assert found == [(number, EPOCHS) for number in range(1, EPOCHS + 1)]


def test_ends_at_max_train_steps(train_here: Callable[..., Any]) -> None:
    training = train_here(max_train_epochs=None, max_train_steps=1)
    assert training.step == 1 and training.epoch == 1


def test_prints_the_number_of_steps_on_stdout(trained: tuple[Result, Path]) -> None:
    assert [match.groups() for match in TOTAL.finditer(trained[0].stdout)] == [(str(EPOCHS), str(EPOCHS * BATCHES))]


def test_draws_the_bar_on_stderr_from_the_first_step_to_the_last(trained: tuple[Result, Path]) -> None:
    bars = [match.groups() for match in BAR.finditer(trained[0].stderr)]
    total = str(EPOCHS * BATCHES)
    assert (bars[0][0], bars[0][3], bars[0][4]) == ("0", "?", "?")
    assert (bars[-1][0], bars[-1][1], bars[-1][3]) == (total, total, "00:00")
    assert len(bars) > EPOCHS * BATCHES


def test_the_bar_shows_finite_losses(trained: tuple[Result, Path]) -> None:
    losses = [float(loss) for loss in LOSS.findall(trained[0].stderr)]
    assert len(losses) >= EPOCHS * BATCHES
    assert all(math.isfinite(loss) for loss in losses)


def test_prints_the_device_on_stdout(trained: tuple[Result, Path]) -> None:
    assert re.search(r"^accelerator device: cpu$", trained[0].stdout, re.MULTILINE)


def test_saves_every_n_epochs_and_the_last_epoch_under_the_plain_name_alone(trained: tuple[Result, Path]) -> None:
    result, folder = trained
    names = ["lora-000004.safetensors", "lora-000008.safetensors", "lora.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert SAVE.findall(result.stdout) == [str(folder / name) for name in names]


@pytest.mark.parametrize(("name", "epoch"), [("lora-000004", 4), ("lora", EPOCHS)])
def test_metadata_says_epoch_and_steps(trained: tuple[Result, Path], name: str, epoch: int) -> None:
    _, metadata = weights_and_metadata(trained[1] / f"{name}.safetensors")
    assert (metadata["ss_epoch"], metadata["ss_steps"]) == (str(epoch), str(epoch * BATCHES))
    assert metadata["ss_num_epochs"] == str(EPOCHS)


def test_metadata_has_kohyas_names(trained: tuple[Result, Path]) -> None:
    _, metadata = weights_and_metadata(trained[1] / "lora.safetensors")
    assert set(metadata) == facts("lora_metadata_names")


def test_metadata_holds_the_settings_as_text(trained: tuple[Result, Path]) -> None:
    _, metadata = weights_and_metadata(trained[1] / "lora.safetensors")
    expected = {
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(ALPHA),
        "ss_learning_rate": "0.002",
        "ss_text_encoder_lr": "0.001",
        "ss_lr_scheduler": "cosine",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_seed": "42",
        "ss_clip_skip": "2",
        "ss_output_name": "lora",
        "ss_base_model_version": "sd_v1",
    }
    assert {name: metadata[name] for name in expected} == expected


def test_weights_have_kohyas_names(trained: tuple[Result, Path]) -> None:
    weights, _ = weights_and_metadata(trained[1] / "lora.safetensors")
    assert {re.sub(r"\d+", "N", name) for name in weights} == facts("lora_weight_names")


def test_weights_have_rank_alpha_and_precision(trained: tuple[Result, Path]) -> None:
    import torch

    weights, _ = weights_and_metadata(trained[1] / "lora.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert {weight.item() for name, weight in weights.items() if name.endswith(".alpha")} == {float(ALPHA)}
    assert {weight.shape[0] for name, weight in weights.items() if ".lora_down." in name} == {RANK}
    assert {weight.shape[1] for name, weight in weights.items() if ".lora_up." in name} == {RANK}


def test_caches_latents_beside_the_pictures(trained: tuple[Result, Path], world: Path) -> None:
    pictures = sorted((world / "images").glob("*.png"))
    caches = sorted((world / "images").glob("*.npz"))
    assert [file.name for file in caches] == [f"{file.stem}_0064x0064_sd.npz" for file in pictures]
    with np.load(caches[0]) as arrays:
        found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    assert found == {
        "latents": ((4, 8, 8), "float32"),
        "original_size": ((2,), "int64"),
        "crop_ltrb": ((4,), "float64"),
    }


# What it learns


def noise_error(pipeline: Any, trainer: ModuleType, folder: Path) -> float:
    """Error of the UNet's guess on all pictures of the data set, for fixed noise and timesteps."""
    import torch

    captions, latents = [], []
    for cache in sorted(folder.glob("*.npz")):
        with np.load(cache) as arrays:
            latents.append(torch.from_numpy(arrays["latents"]))
        captions.append(cache.with_name(cache.name.replace("_0064x0064_sd.npz", ".txt")).read_text().strip())
    batch = {"latents": torch.stack(latents), "captions": captions}
    args = trainer.read_arguments(["--clip_skip", "2"])
    noise = trainer.make_noise_scheduler(args)
    torch.manual_seed(5)
    with torch.no_grad():
        losses = [trainer.NetworkTrainer().loss(pipeline, noise, batch, args).item() for _ in range(8)]
    return sum(losses) / len(losses)


def load_pipeline(world: Path, lora: Path | None = None) -> Any:
    """The base model, with the LoRA loaded by diffusers: alpha / rank put into lora_up, the alphas dropped."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(world / "base_model", safety_checker=None)
    if lora:
        weights, _ = weights_and_metadata(lora)
        alphas = {name.removesuffix(".alpha"): weights.pop(name) for name in list(weights) if name.endswith(".alpha")}
        for name in weights:
            if ".lora_up." in name:
                weights[name] = weights[name].float() * alphas[name.partition(".")[0]] / weights[name].shape[1]
            weights[name] = weights[name].float()
        pipeline.load_lora_weights(weights)
    return pipeline


def test_predicts_the_noise_of_its_data_set_better_than_the_base_model(
    trained: tuple[Result, Path], trainer: ModuleType, world: Path
) -> None:
    before = noise_error(load_pipeline(world), trainer, world / "images")
    after = noise_error(load_pipeline(world, trained[1] / "lora.safetensors"), trainer, world / "images")
    assert after < 0.97 * before


def test_later_checkpoints_differ_from_earlier_ones(trained: tuple[Result, Path]) -> None:
    early, _ = weights_and_metadata(trained[1] / "lora-000004.safetensors")
    late, _ = weights_and_metadata(trained[1] / "lora-000008.safetensors")
    moved = [name for name in early if ".lora_up." in name and not early[name].equal(late[name])]
    assert any(name.startswith("lora_unet") for name in moved)
    assert any(name.startswith("lora_te") for name in moved)


def test_the_text_encoders_skipped_layer_is_not_trained(trained: tuple[Result, Path]) -> None:
    weights, _ = weights_and_metadata(trained[1] / "lora.safetensors")
    layers = sorted({name.split("_")[6] for name in weights if name.startswith("lora_te")})
    touched = {
        name.split("_")[6] for name in weights if "lora_te" in name and ".lora_up." in name and weights[name].any()
    }
    assert touched == set(layers[:-1])  # clip_skip 2


@pytest.fixture(scope="module")
def short_run(trained: tuple[Result, Path], train_here: Callable[..., Any]) -> Any:
    """Two epochs in full precision, on the cache that `trained` left; only the UNet has a learning rate."""
    return train_here(max_train_epochs=2, gradient_accumulation_steps=4, text_encoder_lr=0.0, save_precision="float")


def final_weights(training: Any) -> dict[str, Any]:
    return weights_and_metadata(Path(training.args.output_dir) / "lora.safetensors")[0]


def test_a_remainder_of_batches_is_an_update_of_its_own(short_run: Any) -> None:
    assert short_run.step == short_run.args.max_train_steps == 2 * math.ceil(BATCHES / 4)


def test_text_encoder_and_unet_have_learning_rates_of_their_own(short_run: Any) -> None:
    ups = {name: weight for name, weight in final_weights(short_run).items() if ".lora_up." in name}
    assert not any(weight.any() for name, weight in ups.items() if name.startswith("lora_te"))
    assert any(weight.any() for name, weight in ups.items() if name.startswith("lora_unet"))


def test_the_saved_file_is_the_model_that_was_trained(train_here: Callable[..., Any], world: Path) -> None:
    import torch

    training = train_here(max_train_epochs=1, save_precision="float", network_dim=64, network_alpha=57)
    loaded = load_pipeline(world, Path(training.args.output_dir) / "lora.safetensors")
    torch.manual_seed(9)
    noisy, state = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    tokens = loaded.tokenizer(["luca, a boy"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs, base = (
            (one.unet(noisy, 500, state).sample, one.text_encoder(tokens).last_hidden_state)
            for one in (training.pipeline, loaded, load_pipeline(world))
        )
    for mine, other, untrained in zip(ours, theirs, base, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)
        assert not torch.allclose(mine, untrained, atol=1e-3)


def test_merging_alpha_over_rank_times_up_and_down_gives_the_loaded_model(
    trained: tuple[Result, Path], world: Path
) -> None:
    import torch

    file = trained[1] / "lora.safetensors"
    weights, _ = weights_and_metadata(file)
    merged, loaded = load_pipeline(world).unet, load_pipeline(world, file).unet
    modules = {f"lora_unet_{name.replace('.', '_')}": module for name, module in merged.named_modules()}
    for name in (name for name in weights if name.startswith("lora_unet") and name.endswith(".alpha")):
        key = name.removesuffix(".alpha")
        up, down = (weights[f"{key}.{side}.weight"].float().flatten(1) for side in ("lora_up", "lora_down"))
        weight = modules[key].weight.data
        weight += (weights[name].float() / RANK * up @ down).view_as(weight)
    torch.manual_seed(9)
    noisy, state = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        assert torch.allclose(merged(noisy, 500, state).sample, loaded(noisy, 500, state).sample, atol=1e-4)


def test_the_same_seed_on_a_warm_cache_gives_the_same_weights(short_run: Any, train_here: Callable[..., Any]) -> None:
    again = train_here(max_train_epochs=2, gradient_accumulation_steps=4, text_encoder_lr=0.0, save_precision="float")
    first, second = final_weights(short_run), final_weights(again)
    assert all(first[name].equal(second[name]) for name in first)


@pytest.fixture
def schedule_of(trainer: ModuleType) -> Callable[..., list[float]]:
    """The learning rate of every update of a run of 60, as shares of the peak."""

    def rates(name: str, *more: str, warmup: int = 0) -> list[float]:
        import torch

        arguments = ["--lr_scheduler", name, "--lr_warmup_steps", str(warmup), "--max_train_steps", "60", *more]
        args = trainer.read_arguments([*arguments, "--learning_rate", "1.0"])
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = trainer.make_schedule(args, optimizer)
        found = []
        for _ in range(60):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    return rates


@pytest.mark.parametrize("name", ["cosine", "cosine_with_restarts", "polynomial"])
def test_warms_up_to_the_peak_and_falls(schedule_of: Callable[..., list[float]], name: str) -> None:
    rates = schedule_of(name, warmup=20)
    assert rates[0] == 0 and rates[10] == pytest.approx(0.5) and rates[20] == pytest.approx(1.0)
    assert rates[-1] < 0.05


def test_restarts_return_to_the_peak_once_a_cycle(schedule_of: Callable[..., list[float]]) -> None:
    rates = schedule_of("cosine_with_restarts", "--lr_scheduler_num_cycles", "3")
    assert [step for step, rate in enumerate(rates) if rate == pytest.approx(1.0)] == [0, 20, 40]


def test_constant_refuses_a_warm_up(schedule_of: Callable[..., list[float]]) -> None:
    with pytest.raises(ValueError, match="does not require `num_warmup_steps`"):
        schedule_of("constant", warmup=5)


def test_one_nan_stays_in_the_average_loss(trainer: ModuleType) -> None:
    average = trainer.AverageLoss()
    assert [average.add(number, loss) for number, loss in ((0, 1.0), (1, 3.0), (0, 2.0))] == [1.0, 2.0, 2.5]
    average.add(1, math.nan)
    assert math.isnan(average.add(1, 1.0))


# Ends


def test_divergence_goes_on_and_saves_nan(trained: tuple[Result, Path], write_config: WriteConfig) -> None:
    config = write_config(learning_rate=1e30, text_encoder_lr=1e30, max_train_epochs=2, save_every_n_epochs=1)
    result = run("--config_file", config)
    assert result.returncode == 0 and DONE.search(result.stderr)
    assert LOSS.findall(result.stderr)[-1] == "nan"
    for name in ("lora-000001", "lora"):
        weights, _ = weights_and_metadata(config.parent / "out" / f"{name}.safetensors")
        assert not all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_no_pictures_is_status_0_and_no_file(write_config: WriteConfig, tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    data_set = tmp_path / "dataset.toml"
    subset = {"image_dir": str(tmp_path / folder)}
    data_set.write_text(toml.dumps({"datasets": [{"resolution": 64, "batch_size": 1, "subsets": [subset]}]}))
    config = write_config(dataset_config=str(data_set))
    result = run("--config_file", config)
    assert result.returncode == 0
    assert "No data found" in result.stderr
    assert not (config.parent / "out").exists()


def test_an_unknown_argument_is_status_2(write_config: WriteConfig) -> None:
    result = run("--config_file", write_config(), "--no_such_option", "3")
    assert result.returncode == 2
    assert "unrecognized arguments: --no_such_option 3" in result.stderr


def test_a_missing_model_is_status_1(write_config: WriteConfig) -> None:
    result = run("--config_file", write_config(pretrained_model_name_or_path="/no/such/model.safetensors"))
    assert result.returncode == 1
    assert re.search(r"^\w*Error: .*/no/such/model.safetensors", result.stderr, re.MULTILINE)


def test_adamw8bit_without_bitsandbytes_is_an_import_error(
    trainer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ImportError, match="No bitsandbytes"):
        trainer.get_optimizer(trainer.read_arguments(["--optimizer_type", "AdamW8bit"]), [])


def test_an_unknown_optimizer_is_an_attribute_error(trainer: ModuleType) -> None:
    with pytest.raises(AttributeError, match="NoSuchOptimizer"):
        trainer.get_optimizer(trainer.read_arguments(["--optimizer_type", "NoSuchOptimizer"]), [])


def test_fp16_on_the_cpu_fails_at_the_first_step(train_here: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="c10::Half != float"):
        train_here(mixed_precision="fp16")


def test_sigterm_ends_it(write_config: WriteConfig) -> None:
    process = start("--config_file", write_config(max_train_epochs=1000))
    try:
        assert process.stdout is not None
        assert any(line.startswith("epoch 1/1000") for line in process.stdout)
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM
    finally:
        process.kill()


# Options


def test_help_lists_every_option_of_the_real_trainer() -> None:
    result = run("--help")
    assert result.returncode == 0
    listed = re.findall(r"^ +(?:-\w, )?(--\w+)", result.stdout, re.MULTILINE)
    assert set(listed) - {"--help"} == {f"--{name}" for name in OPTIONS}


def test_flags_take_no_value_and_other_options_take_one(trainer: ModuleType) -> None:
    actions = {action.option_strings[-1]: action for action in trainer.setup_parser()._actions}
    flags = {f"--{name}" for name, option in OPTIONS.items() if option["kind"] == "switch"}
    assert {name for name, action in actions.items() if action.nargs == 0} - {"--help"} == flags


def test_the_command_line_beats_the_file(trainer: ModuleType, write_config: WriteConfig) -> None:
    args = trainer.read_arguments(["--config_file", str(write_config(network_dim=8)), "--network_dim", "4"])
    assert args.network_dim == 4


def test_the_file_is_flattened_one_level_and_unknown_keys_pass(trainer: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("no_such_key = 1\n[network]\nnetwork_dim = 8\n[network.deeper]\nseed = 7\n")
    args = trainer.read_arguments(["--config_file", str(file)])
    assert (args.network_dim, args.seed) == (8, None)


def test_a_missing_config_file_is_status_1() -> None:
    assert run("--config_file", "/no/such/config.toml").returncode == 1


def test_shuffling_keeps_the_first_tags(world: Path) -> None:
    config_util = importlib.import_module("library.config_util")
    names = {**config_util.DATASET, **config_util.SUBSET}
    subset = config_util.first_of(names, {"shuffle_caption": True, "keep_tokens": 1}, config_util.DEFAULTS)
    caption = "luca, a, b, c, d, e"
    dataset = object.__new__(config_util.DreamBoothDataset)  # no folder is needed
    drawn = {dataset.process_caption(subset, caption) for _ in range(50)}
    assert len(drawn) > 1
    assert all(one.startswith("luca, ") and sorted(one) == sorted(caption) for one in drawn)
