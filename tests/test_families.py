"""Families of base models: what is taken for SDXL, and that it is drawn and scored as kohya trains it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toml

import optuna_hyperparameter_search as search

CONFIGS = search.HERE / "configs"
SDXL = search.FAMILIES["SDXL"]
V_PREDICTION = {"v_parameterization": True, "zero_terminal_snr": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import demo_world

    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder, "SDXL")
    return folder


def make_scorer(world: Path, **options: Any) -> search.ImageScorer:
    settings = search.ScoringSettings.read(world / "scoring.toml")
    images = [(file, "luca, a beach") for file in sorted((world / "images").glob("*.png"))]
    about = (str(world / "base_model"), {"clip_skip": 1, "seed": 42, **options}, None, SDXL)
    return search.ImageScorer(search.PromptChooser("luca", images, settings).plan(*about), "cpu")


@pytest.fixture(scope="module")
def scorer(world: Path) -> search.ImageScorer:
    return make_scorer(world)


def job(prompt: str, seed: int) -> dict[str, Any]:
    return {"prompt": prompt, "negative": "grey", "seed": seed, "width": 64, "height": 96, "steps": 3, "cfg": 5.0}


def test_sdxl_is_drawn_as_its_own_pipeline_draws_it(scorer: search.ImageScorer) -> None:
    import torch

    made = scorer.render([job("luca", 1), job("a red car", 2)])
    for image, (prompt, seed) in zip(made, (("luca", 1), ("a red car", 2)), strict=True):
        assert image.size == (64, 96)
        own = scorer.pipeline(
            prompt, negative_prompt="grey", generator=torch.Generator("cpu").manual_seed(seed), width=64, height=96,
            num_inference_steps=3, guidance_scale=5.0,
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(image).astype(int) - np.asarray(own)).max() <= 1


def write_lora(path: Path, *modules: str) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {}
    for name, width in zip(modules, (32, 32, 48), strict=False):
        weights[f"{name}.lora_down.weight"] = torch.full((2, width), 0.1)
        weights[f"{name}.lora_up.weight"] = torch.full((width, 2), 0.1)
        weights[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(weights, path)


def test_a_lora_of_which_diffusers_knows_only_a_part_is_not_scored(scorer: search.ImageScorer, tmp_path: Path) -> None:
    known, unknown = (f"lora_te1_text_model_encoder_layers_1_self_attn_{name}_proj" for name in ("out", "in"))
    write_lora(tmp_path / "lora.safetensors", known)
    before = scorer._embed_prompts(["luca"])["prompt_embeds"]
    with scorer.lora(tmp_path / "lora.safetensors"):
        assert float((scorer._embed_prompts(["luca"])["prompt_embeds"] - before).detach().abs().max()) > 1e-4
    write_lora(tmp_path / "lora.safetensors", known, unknown)
    with (
        pytest.raises(search.ScoringFailed, match=f"{unknown}.*can't be merged"),
        scorer.lora(tmp_path / "lora.safetensors"),
    ):
        pass
    assert float((scorer._embed_prompts(["luca"])["prompt_embeds"] - before).detach().abs().max()) == 0  # unloaded


FACTORS = {  # of a network's matrices, for a layer of (outputs, inputs)
    "loha": lambda o, i: {"hada_w1_a": (o, 2), "hada_w1_b": (2, i), "hada_w2_a": (o, 2), "hada_w2_b": (2, i)},
    "lokr": lambda o, i: {"lokr_w1": (4, 4), "lokr_w2_a": (o // 4, 2), "lokr_w2_b": (2, i // 4)},
    "whole lokr": lambda o, i: {"lokr_w1": (4, 4), "lokr_w2": (o // 4, i // 4)},
}
LAYERS = {  # by the names in a file
    "lora_te1_text_model_encoder_layers_1_self_attn_out_proj": ("text_encoder", "encoder.layers.1.self_attn.out_proj"),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("text_encoder_2", "encoder.layers.0.mlp.fc1"),
    "lora_unet_input_blocks_4_1_proj_in": ("unet", "down_blocks.1.attentions.0.proj_in"),
    "lora_unet_middle_block_1_proj_out": ("unet", "mid_block.attentions.0.proj_out"),
    "lora_unet_output_blocks_2_1_transformer_blocks_0_attn1_to_q": (
        "unet", "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q",
    ),
}  # fmt: skip


def layer(scorer: search.ImageScorer, part: str, name: str) -> Any:
    return {
        one: module for one, module in getattr(scorer.pipeline, part).named_modules() if one.endswith(name)
    }.popitem()[1]


@pytest.mark.parametrize("algorithm", FACTORS)
def test_a_network_of_lycoris_is_merged_as_its_definition_says(
    scorer: search.ImageScorer, tmp_path: Path, algorithm: str
) -> None:
    from safetensors.numpy import save_file

    rng, weights, changes = np.random.default_rng(0), {}, {}
    before = {name: layer(scorer, *place).weight.detach().numpy().copy() for name, place in LAYERS.items()}
    for name, weight in before.items():
        sizes = FACTORS[algorithm](*weight.shape)
        made = {key: rng.normal(size=size).astype(np.float32) for key, size in sizes.items()}
        weights.update(
            {f"{name}.{key}": values for key, values in made.items()}, **{f"{name}.alpha": np.float32([1])[0]}
        )
        one, *others = made.values()
        if algorithm == "loha":  # rank 2, so alpha / rank is 0.5
            changes[name] = (one @ others[0]) * (others[1] @ others[2]) * 0.5
        else:
            changes[name] = np.kron(one, others[0] @ others[1] * 0.5 if len(others) == 2 else others[0])
    save_file({name: np.asarray(values) for name, values in weights.items()}, tmp_path / "lora.safetensors")
    with scorer.lora(tmp_path / "lora.safetensors", 0.8):
        for name, place in LAYERS.items():
            merged = layer(scorer, *place).weight.detach().numpy()
            assert merged == pytest.approx(before[name] + 0.8 * changes[name], abs=1e-5)
    for name, place in LAYERS.items():
        assert (layer(scorer, *place).weight.detach().numpy() == before[name]).all()


def write_lokr(path: Path, *modules: str) -> None:
    from safetensors.numpy import save_file

    made = {key: np.full(size, 0.1, np.float32) for key, size in FACTORS["whole lokr"](32, 32).items()}
    save_file({f"{name}.{key}": values for name in modules for key, values in made.items()}, path)


def test_a_network_that_can_not_be_merged_whole_is_not_scored(scorer: search.ImageScorer, tmp_path: Path) -> None:
    known, unknown = "lora_te1_text_model_encoder_layers_0_self_attn_out_proj", "lora_unet_nowhere"
    write_lokr(tmp_path / "lora.safetensors", known, unknown)
    before = scorer._embed_prompts(["luca"])["prompt_embeds"]
    with pytest.raises(search.ScoringFailed, match=unknown), scorer.lora(tmp_path / "lora.safetensors"):
        pass
    assert float((scorer._embed_prompts(["luca"])["prompt_embeds"] - before).detach().abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.norm", "middle_block.1.norm"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("conv_in", "conv_in"),
    ],
)
def test_modules_of_sdxl_have_the_names_of_kohyas_own_unet(name: str, known: str) -> None:
    """As the names of all 1,043 modules with weights in its blocks do (both UNets of full size, sd-scripts v0.10.1)."""
    assert search.name_in_xl_unet(name, per_block=3) == known


def test_models_that_take_turns_on_the_card_draw_the_same(
    scorer: search.ImageScorer, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lokr(tmp_path / "lora.safetensors", "lora_te1_text_model_encoder_layers_0_self_attn_out_proj")
    with monkeypatch.context() as patched:
        patched.setattr(search.math, "inf", 0.0)  # bytes free on the card
        small = make_scorer(world)
    assert hasattr(small.pipeline.unet, "_hf_hook") and not hasattr(scorer.pipeline.unet, "_hf_hook")
    jobs = [job("luca", 1), job("a red car", 2)]
    for lora in (False, True):
        made = []
        for one in (scorer, small):
            with one.lora(tmp_path / "lora.safetensors") if lora else contextlib.nullcontext():
                made.append([np.asarray(image) for image in one.render(jobs)])
        assert np.array_equal(*made)


def test_a_v_prediction_model_of_zero_snr_draws_the_picture_that_it_was_trained_on(world: Path) -> None:
    """A model that knows one dark picture must draw it, and not a grey one (arXiv 2305.08891)."""
    import torch

    scheduler = make_scorer(world, **V_PREDICTION).pipeline.scheduler
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999
    wanted = torch.full((1, 4, 8, 8), -1.5)
    latents = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        signal, noise = scheduler.alphas_cumprod[step] ** 0.5, (1 - scheduler.alphas_cumprod[step]) ** 0.5
        guess = signal * (latents - signal * wanted) / noise - noise * wanted
        latents = scheduler.step(guess, step, latents).prev_sample
    torch.testing.assert_close(latents, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("captions", "scoring"),
    [
        (["1girl, luca, solo, beach", "luca, 1girl, forest"], "scoring_anime.toml"),
        (["luca, no_humans", "luca, multiple girls", "luca, score_9, sea"], "scoring_anime.toml"),
        (["luca on a beach, looking at the sea", "1girl, luca, forest"], "scoring_sdxl.toml"),
        (["luca on a beach"], "scoring_sdxl.toml"),
        ([], "scoring_sdxl.toml"),
    ],
)
def test_sdxl_takes_its_own_files_and_tags_their_own_prompts(captions: list[str], scoring: str) -> None:
    data_set = search.DataSet({}, tuple(search.TrainingImage(Path("a"), (text,), True) for text in captions), 1, None)
    found = search.with_family_files(settings(**NONE), SDXL)
    files = (found.training_config, search.shipped_scoring_config(SDXL, data_set), found.search_space)
    assert files == tuple(CONFIGS / name for name in ("training_sdxl.toml", scoring, "search_space_sdxl.toml"))


def test_what_the_user_gives_is_taken_for_any_family() -> None:
    own = {name: Path(f"my_{name}.toml") for name in NONE}
    assert search.with_family_files(settings(**own), SDXL) == settings(**own)


def test_stable_diffusion_1_has_the_guides_space_and_the_files_of_before() -> None:
    captions = (search.TrainingImage(Path("a"), ("1girl, luca",), True),)
    found = search.with_family_files(settings(**NONE), search.SD1)
    assert (found.search_space, found.training_config) == (None, CONFIGS / "training.toml")
    data_set = search.DataSet({}, captions, 1, None)
    assert search.shipped_scoring_config(search.SD1, data_set) == CONFIGS / "scoring.toml"


@pytest.mark.parametrize("name", ["scoring.toml", "scoring_sdxl.toml", "scoring_anime.toml"])
def test_what_an_own_scoring_config_leaves_out_is_as_in_the_familys(name: str, tmp_path: Path) -> None:
    own, shipped = tmp_path / "own.toml", search.ScoringSettings.read(CONFIGS / name)
    own.write_text("")
    assert search.ScoringSettings.read(own, CONFIGS / name) == shipped
    own.write_text("[weights]\ntext = 0.25\n[images]\nsteps = 30\n")
    changed = dataclasses.replace(
        shipped, images={**shipped.images, "steps": 30}, weights={**shipped.weights, "text": 0.25}
    )
    assert search.ScoringSettings.read(own, CONFIGS / name) == changed


def test_an_own_scoring_config_of_sdxl_draws_at_its_size(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders = {"encoders": toml.loads((world / "scoring.toml").read_text(encoding="utf-8"))["encoders"]}
    (tmp_path / "own.toml").write_text(toml.dumps(encoders))
    command = ["--base-model", str(world / "base_model"), "--dataset-config", str(world / "dataset.toml"), "--check"]
    command += ["--training-config", str(world / "training.toml"), "--scoring-config", str(tmp_path / "own.toml")]
    command += ["--sd-scripts", str(search.HERE / "tests" / "small_trainer"), "--device", "cpu"]
    assert search.main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert "of 1024 pixels, by own.toml" in capsys.readouterr().out


NONE = dict.fromkeys(("training_config", "scoring_config", "search_space"))


def settings(**changes: Any) -> search.Settings:
    return search.Settings(
        dataset_config=Path("d"), base_model=Path("m"), output_dir=Path("o"), study_name="s", n_trials=1, device="cpu",
        sd_scripts=Path("k"), trainer_python="python", eval_prompts=None, subject=None, storage="", seed=1,
        enqueue=(), timeout_hours=None, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["scoring.toml", "scoring_sdxl.toml", "scoring_anime.toml"])
def test_every_shipped_scoring_config_has_prompts_for_all_stages(name: str) -> None:
    config = search.ScoringSettings.read(CONFIGS / name)
    plan = search.PromptChooser("luca", [], config).plan("/model", {"clip_skip": 1, "seed": 42}, None, SDXL)
    for stage in ("screen", "confirm", "final-1"):
        prompts = {job["prompt"] for job in plan[stage]}
        wanted = getattr(config, stage.partition("-")[0])
        assert len(prompts) == wanted["prompts"] + wanted["plain_prompts"]
        prefix = config.images["prompt_prefix"]
        assert all(prompt.startswith(prefix) for prompt in prompts)
        assert not any(prefix and prefix in job["text"] for job in plan[stage])


@pytest.mark.parametrize(
    ("only_unet", "table", "says"),
    [
        ("network_train_unet_only = true", "[text_encoder_lr]\nlow = 1e-5\nhigh = 2e-5\n", "has no effect"),
        ("", "[text_encoder_lr]\nlow = 1e-5\nhigh = 2e-5\n", ""),
        ("network_train_unet_only = true", "", ""),
        ("network_train_unet_only = false", "", "no text_encoder_lr"),
        ("", "", "no text_encoder_lr"),
    ],
)
def test_a_space_says_how_text_encoders_are_trained_or_that_they_are_not(
    only_unet: str, table: str, says: str, tmp_path: Path
) -> None:
    shipped = (CONFIGS / "search_space_sdxl.toml").read_text(encoding="utf-8")
    (tmp_path / "space.toml").write_text(shipped.replace("network_train_unet_only = true", only_unet) + table)
    with pytest.raises(search.RefusedInput, match=says) if says else contextlib.nullcontext():
        search.SearchSpace.read(tmp_path / "space.toml")


@pytest.mark.slow
def test_a_search_of_sdxl_trains_scores_and_says_how_to_train_again(world: Path, tmp_path: Path) -> None:
    space = (CONFIGS / "search_space_sdxl.toml").read_text(encoding="utf-8").replace("[10, 16, 20]", "[5, 6]")
    (tmp_path / "space.toml").write_text(space, encoding="utf-8")
    command = ["--sd-scripts", str(search.HERE / "tests" / "small_trainer"), "--base-model", str(world / "base_model")]
    for name in ("dataset", "training", "scoring"):
        command += [f"--{name}-config", str(world / f"{name}.toml")]
    command += ["--search-space", str(tmp_path / "space.toml"), "--device", "cpu", "--n-trials", "1"]
    assert search.main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    trial, results = tmp_path / "out" / "trial_0000", tmp_path / "out" / "results"
    assert search.read_json(trial / "metrics.json")["outcome"] == "scored"
    names = search.read_safetensors_header(results / "best_lora.safetensors")
    assert any("lora_unet_input_blocks_" in name for name in names)
    assert not any("lora_te" in name for name in names)
    assert "sdxl_train_network.py --config_file" in (results / "best_config.toml").read_text(encoding="utf-8")
    assert list((world / "images").glob("*_sdxl.npz"))


def test_all_problems_are_reported_where_the_data_set_is_wrong_too(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--base-model", str(world / "base_model"), "--dataset-config", str(tmp_path / "none.toml"), "--check"]
    command += ["--sd-scripts", str(search.HERE / "tests" / "small_trainer"), "--device", "cpu"]
    assert search.main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "none.toml" in said and "facebook/dinov2-base" in said  # encoders of the default scoring config
    assert "Traceback" not in said


CACHED = "cache_text_encoder_outputs = true"


@pytest.mark.parametrize(
    ("option", "prefix", "warned"), [(CACHED, "photo of ", True), ("", "photo of ", False), (CACHED, "", False)]
)
def test_captions_that_cached_text_would_lack_are_warned_of(
    option: str, prefix: str, warned: bool, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set = (world / "dataset.toml").read_text(encoding="utf-8").replace("shuffle_caption = true", "")
    (tmp_path / "data.toml").write_text(data_set.replace("[general]", f'[general]\ncaption_prefix = "{prefix}"'))
    training = (world / "training.toml").read_text(encoding="utf-8")
    (tmp_path / "training.toml").write_text(option + "\n" + training)
    command = ["--base-model", str(world / "base_model"), "--dataset-config", str(tmp_path / "data.toml"), "--check"]
    command += ["--training-config", str(tmp_path / "training.toml"), "--scoring-config", str(world / "scoring.toml")]
    command += ["--sd-scripts", str(search.HERE / "tests" / "small_trainer"), "--device", "cpu"]
    assert search.main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert ("ignores caption_prefix" in capsys.readouterr().out) == warned


def test_arguments_of_an_optimizer_that_is_left_out_are_left_out_too(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = (world / "training.toml").read_text(encoding="utf-8")
    (tmp_path / "training.toml").write_text(
        training + 'optimizer_type = "Prodigy"\noptimizer_args = ["decouple=True"]\n'
    )
    command = ["--base-model", str(world / "base_model"), "--dataset-config", str(world / "dataset.toml"), "--check"]
    command += ["--training-config", str(tmp_path / "training.toml"), "--scoring-config", str(world / "scoring.toml")]
    command += ["--sd-scripts", str(search.HERE / "tests" / "small_trainer"), "--device", "cpu"]
    status = search.main([*command, "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "optimizer_type, optimizer_args" in said.out  # what the search does not take


def test_a_folder_of_sdxl_is_not_trained_in_fp16_which_kohya_stops_at(world: Path) -> None:
    given = settings(training_config=Path("training.toml"), scoring_config=None)
    given = dataclasses.replace(given, base_model=world / "base_model", device="cuda")
    with pytest.raises(search.RefusedInput, match="bf16"):
        search.check_precision(given, {"mixed_precision": "fp16"}, SDXL)
    search.check_precision(given, {"mixed_precision": "bf16"}, SDXL)
    search.check_precision(given, {"mixed_precision": "fp16"}, search.SD1)
