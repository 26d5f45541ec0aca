"""The small trainer's second script speaks the contract of kohya's sdxl_train_network.py, and really trains."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_world
import numpy as np
import pytest
import toml

sys.path.append(str(demo_world.SMALL_TRAINER))
import sdxl_train_network
import train_network
from library import config_util

RANK, ALPHA = 8, 5
SIZES = [[64, 64, 0, 0, 64, 64]]
CAPTIONS = ["luca, a boy", "a red circle"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("restore_threads")]
Train = Callable[..., Any]
Weights = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder, "SDXL")
    return folder


@pytest.fixture(scope="module")
def train(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train in this process with an output folder of its own; the finished run with its model."""
    run_training = train_network.Training.run

    def work(data_set: dict[str, Any] | None = None, **values: Any) -> Any:
        from accelerate.state import AcceleratorState

        folder = tmp_path_factory.mktemp("run")
        data = toml.loads((world / "dataset.toml").read_text(encoding="utf-8"))
        data["general"] |= data_set or {}
        (folder / "dataset.toml").write_text(toml.dumps(data), encoding="utf-8")
        config = {
            **toml.loads((world / "training.toml").read_text(encoding="utf-8")),
            "pretrained_model_name_or_path": str(world / "base_model"),
            "dataset_config": str(folder / "dataset.toml"),
            "output_dir": str(folder / "out"),
            "output_name": "lora",
            "network_dim": RANK,
            "network_alpha": ALPHA,
            "learning_rate": 2e-3,
            "optimizer_type": "AdamW",
            "max_train_epochs": 1,
            "save_precision": "float",
            **values,
        }
        (folder / "config.toml").write_text(toml.dumps(config), encoding="utf-8")
        AcceleratorState._reset_state(reset_partial_state=True)  # one a process
        caught: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            patch.setattr(train_network.Training, "run", lambda self: caught.append(self))  # the run is wanted
            sdxl_train_network.main(["--config_file", str(folder / "config.toml")])
        (training,) = caught
        run_training(training)
        return training

    return work


@pytest.fixture(scope="module")
def trained(train: Train) -> Any:
    """One epoch with both text encoders; a list's first learning rate counts for both."""
    return train(text_encoder_lr=[1e-3, 0.0])


ONLY_UNET = {"network_train_unet_only": True, "data_set": {"shuffle_caption": False}}


@pytest.fixture(scope="module")
def unet_only(trained: Any, train: Train) -> Any:
    """One epoch of the UNet alone, on the latents that `trained` has cached."""
    return train(**ONLY_UNET)


def read_lora(training: Any) -> tuple[Weights, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(Path(training.args.output_dir) / "lora.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def modules_of(weights: Weights) -> set[str]:
    return {name.partition(".")[0] for name in weights}


def trained_modules(weights: Weights) -> set[str]:
    return {name.partition(".")[0] for name, weight in weights.items() if ".lora_up." in name and weight.any()}


def test_layers_of_the_unet_have_the_original_unets_names(trained: Any) -> None:
    names = {name for name in modules_of(read_lora(trained)[0]) if name.startswith("lora_unet_")}
    places = {re.sub(r"lora_unet_((in|out)put_blocks_\d+|middle_block)_1_.*", r"\1", name) for name in names}
    inner = {f"input_blocks_{number}" for number in (4, 5, 7, 8)} | {f"output_blocks_{number}" for number in range(6)}
    assert places == inner | {"middle_block"}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0" in names
    assert "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj" in names
    assert "lora_unet_output_blocks_5_1_proj_out" in names


def test_each_text_encoder_has_a_prefix_of_its_own(trained: Any) -> None:
    names = {name for name in modules_of(read_lora(trained)[0]) if not name.startswith("lora_unet_")}
    assert {name.partition("_text_model_encoder_layers_")[0] for name in names} == {"lora_te1", "lora_te2"}
    assert len(names) == 2 * 3 * 6  # encoders, layers, and linear layers in each


def test_metadata_says_that_it_is_an_sdxls(trained: Any) -> None:
    _, metadata = read_lora(trained)
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_text_encoder_lr": "0.001",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
    }
    assert {name: metadata[name] for name in expected} == expected


def test_only_the_first_encoders_last_layer_learns_nothing(trained: Any) -> None:
    """Its output is not read; the second's is, by the pooled output."""
    weights, _ = read_lora(trained)
    left = modules_of(weights) - trained_modules(weights)
    assert {name.rpartition("_layers_")[2][0] for name in left} == {"2"}
    assert len(left) == 6 and all(name.startswith("lora_te1_") for name in left)


def predict(pipeline: Any) -> list[Any]:
    """What the text encoders say, and the UNet's guess."""
    import torch

    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        first, second, pooled = sdxl_train_network.encode_captions(pipeline, CAPTIONS)
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor(SIZES * 2)}
        states = torch.cat([first, second], dim=2)
        return [first, second, pooled, pipeline.unet(noisy, 500, states, added_cond_kwargs=conditions).sample]


def test_diffusers_loads_the_whole_file_as_it_was_trained(trained: Any, world: Path) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    loaded = StableDiffusionXLPipeline.from_pretrained(world / "base_model")
    before = predict(loaded)
    weights, _ = read_lora(trained)
    loaded.load_lora_weights(
        {
            name: weight * ALPHA / RANK if ".lora_up." in name else weight
            for name, weight in weights.items()
            if not name.endswith(".alpha")
        }
    )
    parts = (loaded.text_encoder, loaded.text_encoder_2, loaded.unet)
    filled = [name for part in parts for name, module in part.named_modules() if hasattr(module, "lora_A")]
    assert len(filled) == len(modules_of(weights))
    for wanted, found, untrained in zip(predict(trained.pipeline), predict(loaded), before, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(untrained, wanted, atol=1e-3)


def test_latents_are_cached_under_sdxls_name(trained: Any, world: Path) -> None:
    pictures = sorted((world / "images").glob("*.png"))
    names = [f"{file.stem}_0064x0064_sdxl.npz" for file in pictures]
    assert sorted(file.name for file in (world / "images").glob("*_sdxl.npz")) == names


def test_a_file_of_the_unet_alone_has_no_text_encoder(unet_only: Any) -> None:
    weights, _ = read_lora(unet_only)
    assert {name.split("_")[1] for name in weights} == {"unet"}
    assert modules_of(weights) == trained_modules(weights)


def test_cached_text_outputs_train_as_those_that_are_made_anew(unet_only: Any, train: Train, world: Path) -> None:
    cached = train(cache_text_encoder_outputs_to_disk=True, **ONLY_UNET)
    ours, theirs = (read_lora(one)[0] for one in (unet_only, cached))
    learnt = [name for name in ours if ".lora_up." in name]  # from zero
    apart = {name: float((ours[name] - theirs[name]).norm() / ours[name].norm()) for name in learnt}
    assert max(apart.values()) < 0.05, max(apart.items(), key=lambda one: one[1])  # AdamW turns rounding into steps
    with np.load(next((world / "images").glob("*_te_outputs.npz"))) as arrays:
        shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == {"hidden_state1": (77, 32), "hidden_state2": (77, 48), "pool2": (48,)}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cache_text_encoder_outputs": True, "network_train_unet_only": True}, "shuffle_caption"),
        ({"cache_text_encoder_outputs": True, "data_set": {"shuffle_caption": False}}, "cannot be trained"),
        ({"v2": True}, "v2 cannot"),
        ({"data_set": {"enable_bucket": True, "bucket_reso_steps": 48, "min_bucket_reso": 48}}, "divisible by 32"),
    ],
)
def test_what_kohya_refuses_is_refused(train: Train, values: dict[str, Any], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        train(**values)


def test_sizes_are_the_pictures_the_crops_and_the_buckets(tmp_path: Path) -> None:
    wide = config_util.ImageInfo("a.png", 1, "luca", False, (100, 50), (64, 64))
    assert sdxl_train_network.sizes_of(wide) == [50, 100, 16, 0, 64, 64]  # kohya puts a wide picture's top at 16


def test_v_prediction_learns_the_velocity(unet_only: Any) -> None:
    import torch

    args = train_network.read_arguments(["--v_parameterization", "--zero_terminal_snr"], sdxl_train_network.OPTIONS)
    scheduler = train_network.make_noise_scheduler(args)
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.alphas_cumprod[0] > 0.99
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    infos = [config_util.ImageInfo("a.png", 1, "luca", False, (64, 64), (64, 64))] * 2
    batch = {"latents": latents, "captions": CAPTIONS, "infos": infos}
    trainer, guesses = sdxl_train_network.SdxlNetworkTrainer(), []
    listen = unet_only.pipeline.unet.register_forward_hook(lambda unet, given, out: guesses.append((given, out.sample)))
    torch.manual_seed(7)
    with torch.no_grad():
        loss = trainer.loss(unet_only.pipeline, scheduler, batch, args)
    listen.remove()
    ((noisy, steps, *_), guess), scaled = guesses[0], 0.13025 * latents
    signal, noise_share = (share[steps].sqrt().view(-1, 1, 1, 1) for share in shares(scheduler))
    noise = (noisy - signal * scaled) / noise_share
    assert torch.allclose(loss, (guess - (signal * noise - noise_share * scaled)).square().mean(), rtol=1e-4)


def shares(scheduler: Any) -> tuple[Any, Any]:
    """Of the picture's and the noise's variance in what the UNet sees, by step."""
    return scheduler.alphas_cumprod, 1 - scheduler.alphas_cumprod


def test_options_are_those_of_the_real_trainer() -> None:
    options = json.loads(sdxl_train_network.OPTIONS.read_text(encoding="utf-8"))
    actions = train_network.setup_parser(sdxl_train_network.OPTIONS)._actions
    assert {action.option_strings[-1].lstrip("-") for action in actions} - {"help"} == set(options)
    assert {"cache_text_encoder_outputs", "no_half_vae", "zero_terminal_snr"} <= set(options)
