"""The small world: its scenes, the judge that knows how they are drawn, and what its trained models can do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import demo_world
import numpy as np
import pytest
from conftest import Demo
from demo_world import SMALL_WORLD
from small_world import benchmark, judge, scenes

import optuna_hyperparameter_search as search


def many_scenes(count: int = 300) -> list[scenes.Scene]:
    rng = random.Random(3)
    return [scenes.random_scene(rng) for _ in range(count)]


# --- scenes and data set ---


def test_a_seed_draws_the_same_pictures_again() -> None:
    first, second = ([np.asarray(scenes.draw(scene)) for scene in many_scenes(30)] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({picture.tobytes() for picture in first}) > 25


def test_the_base_model_never_sees_the_character_or_most_of_him() -> None:
    figures = [scene.what for scene in many_scenes(3000) if isinstance(scene.what, scenes.Identity)]
    assert len(figures) > 1000
    assert all(who.headgear != "ears" for who in figures)
    shared = [sum(a == b for a, b in zip(who.colours, scenes.LUCA.colours, strict=True)) for who in figures]
    assert max(shared) <= 1


def test_one_shape_in_five_is_held_out() -> None:
    shapes = [scene for scene in many_scenes(3000) if isinstance(scene.what, tuple)]
    assert 0.15 < np.mean([scenes.is_held_out(scene) for scene in shapes]) < 0.25


def test_a_caption_says_only_what_is_drawn_and_begins_with_the_name() -> None:
    rng = random.Random(1)
    for scene in many_scenes(100):
        name, *rest = scenes.caption(scene, rng, "mibo").split(", ")
        facts = {*scenes.tags(scene), *(tag.replace(f"{scene.size} ", "") for tag in scenes.tags(scene))}
        assert name == "mibo" and rest and set(rest) <= facts


def test_names_are_never_the_characters() -> None:
    rng = random.Random(0)
    assert "luca" not in {scenes.random_name(rng) for _ in range(20_000)}


def test_prompts_ask_for_what_neither_data_set_nor_base_model_have_seen() -> None:
    prompts = demo_world.make_prompts()
    captions = {", ".join(scenes.tags(scene)) for scene in demo_world.luca_scenes(16)}
    assert len(captions) == 16
    assert not {prompt.removeprefix("{subject}, ") for prompt in prompts["elsewhere"]} & captions
    assert len(set(prompts["plain"])) == len(prompts["plain"]) >= 9


# --- the judge ---


def test_the_judge_sees_every_plain_shape_as_it_was_drawn() -> None:
    for scene in many_scenes():
        if isinstance(scene.what, tuple):
            seen = judge.see_shape(judge.to_array(scenes.draw(scene)))
            assert (seen.shape, seen.colour, seen.place, seen.background) == (
                *scene.what,
                scene.place,
                scene.background,
            )


def test_the_judge_knows_the_character_from_all_others() -> None:
    lucas = [judge.see_luca(judge.to_array(scenes.draw(scene))) for scene in demo_world.luca_scenes(16)]
    figures = [scene for scene in many_scenes() if isinstance(scene.what, scenes.Identity)]
    others = [judge.see_luca(judge.to_array(scenes.draw(scene))).character for scene in figures]
    assert min(seen.character for seen in lucas) > max(others) + 0.15
    assert [(seen.place, seen.background) for seen in lucas] == [
        (scene.place, scene.background) for scene in demo_world.luca_scenes(16)
    ]


def test_a_part_in_a_wrong_colour_costs_its_share() -> None:
    right = scenes.Scene("at night", scenes.LUCA, "in the middle", "large")
    wrong = scenes.Scene("at night", judge.recoloured("body", "yellow"), "in the middle", "large")
    whole, less = (judge.see_luca(judge.to_array(scenes.draw(scene))).character for scene in (right, wrong))
    assert whole - less == pytest.approx(0.25, abs=0.05)


def test_the_judge_counts_what_the_prompt_says_and_no_more() -> None:
    seen = judge.Seen("in snow", "on the left")
    assert judge.obedience("luca, a figure, on the left, in snow", seen) == 1.0
    assert judge.obedience("luca, a figure, on the left, at night", seen) == 0.5
    assert judge.obedience("luca, at night", seen) == 0.0
    assert judge.obedience("luca", seen) == 1.0


def test_rank_correlation_of_known_rows() -> None:
    assert benchmark.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert benchmark.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert benchmark.rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # a tie


# --- the trained models ---


def test_all_weights_are_small_and_safe() -> None:
    files = list(SMALL_WORLD.rglob("*.safetensors"))
    assert len(files) == 5  # UNet, VAE, text encoder, CLIP, DINOv2
    assert sum(file.stat().st_size for file in files) <= 15e6
    kinds = {
        entry["dtype"] for file in files for entry in search.read_safetensors_header(file).values() if "dtype" in entry
    }
    assert kinds <= {"F16", "I64"}
    assert not [file for file in SMALL_WORLD.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_every_word_of_the_captions_is_one_token() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(SMALL_WORLD / "base_model" / "tokenizer")
    words = {word for scene in many_scenes() for tag in scenes.tags(scene) for word in tag.split()}
    assert {word: tokenizer.tokenize(word) for word in words} == {word: [f"{word}</w>"] for word in words}


def test_the_text_encoders_weights_are_named_as_transformers_4_reads_them() -> None:
    header = search.read_safetensors_header(SMALL_WORLD / "base_model" / "text_encoder" / "model.safetensors")
    names = [name for name in header if name != "__metadata__"]
    assert names and all(name.startswith("text_model.") for name in names)


@pytest.mark.parametrize("who", [None, scenes.LUCA], ids=["held-out scenes", "the character"])
def test_the_autoencoder_restores_pictures_at_27_db(who: scenes.Identity | None) -> None:
    import torch
    from diffusers import AutoencoderKL
    from small_world.make_weights import to_tensor

    vae = AutoencoderKL.from_pretrained(SMALL_WORLD / "base_model" / "vae", torch_dtype=torch.float32)
    rng = random.Random(99)
    pictures = to_tensor([scenes.random_scene(rng, who) for _ in range(200)])
    with torch.no_grad():
        restored = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    assert -10 * ((restored - pictures) / 2).square().mean().log10() >= 27


def test_no_config_names_a_folder_of_the_machine_that_made_it() -> None:
    paths = [search.read_json(file).get("_name_or_path", "") for file in SMALL_WORLD.glob("**/config.json")]
    assert len(paths) == 5 and not any(paths)


def test_a_sensitive_model_is_the_same_function_of_larger_inputs_to_its_layers(tmp_path: Path) -> None:
    import tiny_models
    import torch
    from diffusers import StableDiffusionPipeline
    from small_world.make_weights import SENSITIVITY, make_sensitive

    tiny_models.make_tiny_pipeline(tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    tokens = torch.arange(77)[None]
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    inputs = []
    block = next(module for module in pipeline.unet.modules() if hasattr(module, "attn2"))
    for layer in (block.attn1.to_q, block.attn2.to_v, block.ff.net[0].proj):
        layer.register_forward_hook(lambda layer, given, output: inputs.append(given[0]))

    def predict() -> Any:
        with torch.no_grad():
            return pipeline.unet(noisy, 500, pipeline.text_encoder(tokens).last_hidden_state).sample

    plain = predict()
    make_sensitive(pipeline.unet, pipeline.text_encoder)
    assert torch.allclose(predict(), plain, atol=1e-5)
    for before, after in zip(inputs[:3], inputs[3:], strict=True):
        assert torch.allclose(after, SENSITIVITY["unet"] * before, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_gates_hold(demo: Demo) -> None:
    figures = benchmark.measure_gates(demo.output_dir)
    assert not {name: figures[name] for name, least in benchmark.GATES.items() if figures[name] < least}


@pytest.mark.slow
def test_the_demos_best_lora_shows_the_character(demo: Demo) -> None:
    best = search.read_json(demo.output_dir / "results" / "best_parameters.json")
    trained = benchmark.judge_trial(demo.output_dir, demo.output_dir / f"trial_{best['trial']:04d}")
    base = benchmark.judge_pictures(demo.output_dir, demo.output_dir / "reference" / "confirm")
    assert trained["character"] > 2 * base["character"]
