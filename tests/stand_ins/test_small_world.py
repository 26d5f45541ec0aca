"""The small world: its scenes, the judge that knows how they are drawn, and what its trained models can do."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import demo_world
import numpy as np
import pytest
from conftest import Demo
from demo_world import SMALL_WORLD
from small_world import benchmark, final, flaws, judge, scenes, wide, worlds
from small_world.confirmation import Confirmation

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


def test_pairs_that_the_judge_finds_equal_say_nothing_of_the_order() -> None:
    assert benchmark.right_pairs([3, 1, 2, 5], [1, 1, 1, 2]) == 1
    assert benchmark.right_pairs([3, 1, 2, 2], [1, 1, 1, 2]) == pytest.approx((0 + 1 + 0.5) / 3)
    assert math.isnan(benchmark.right_pairs([1, 2], [1, 1]))


# --- pictures with a known flaw ---

PROMPTS = [
    f"luca, a large figure, {place}, {background}" for place in scenes.PLACES for background in scenes.BACKGROUNDS
]
JOBS = [{"name": f"p{number:02d}", "prompt": prompt, "subject": True} for number, prompt in enumerate(PROMPTS)]
PLAIN = [
    {"name": f"q{number}", "prompt": "a small red circle, on the left, in snow", "subject": False}
    for number in range(4)
]


def flawed(name: str) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Jobs with and without the subject, and a flaw's pictures of them."""
    circle = scenes.draw(scenes.Scene("in snow", ("circle", "red"), "on the left", "small"))
    training = [scenes.draw(scene) for scene in demo_world.luca_scenes(16)]
    world = flaws.World({job["name"]: circle for job in PLAIN}, training, demo_world.luca_scenes(16))
    return JOBS + PLAIN, [judge.to_array(picture) for picture in flaws.FLAWS[name](JOBS + PLAIN, world)]


def told_of(name: str) -> dict[str, float]:
    jobs, pictures = flawed(name)
    training = [judge.to_array(scenes.draw(scene)) for scene in demo_world.luca_scenes(16)]
    captions = {", ".join(["luca", *scenes.tags(scene)]) for scene in demo_world.luca_scenes(16)}
    return judge.truth([job["prompt"] for job in jobs], pictures, training, captions)


def test_right_pictures_are_what_their_prompts_ask_for() -> None:
    told = told_of("right")
    assert told["character"] > 0.9
    assert (told["text"], told["plain"], told["copies"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("part", ["ears", "head", "body", "belt"])
@pytest.mark.parametrize("flaw", ["missing", "purple"])
def test_a_part_that_is_missing_or_recoloured_costs_the_judge_its_share(part: str, flaw: str) -> None:
    assert 0.12 < told_of("right")["character"] - told_of(f"{part} {flaw}")["character"] < 0.3


@pytest.mark.parametrize("name", ["background ignored", "place ignored"])
def test_what_the_prompt_says_is_ignored_in_every_picture(name: str) -> None:
    assert told_of(name)["text"] == pytest.approx(0.5, abs=0.1)


def test_a_share_of_the_pictures_shows_another_figure() -> None:
    (_, right), (_, three), (_, half) = map(flawed, ("right", "right in 3 of 4", "right in 1 of 2"))
    changed = [sum(not np.array_equal(a, b) for a, b in zip(right, some, strict=True)) for some in (three, half)]
    assert (len(JOBS), changed) == (18, [5, 9])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_character_bleeds_into_a_share_of_the_plain_pictures(share: float) -> None:
    assert told_of(f"character in {share:.0%} of plain")["plain"] == 1 - share


def test_the_judge_tells_copies_from_the_subject_drawn_anew() -> None:
    for name in ("nearest training picture pasted", "random training picture pasted"):
        assert (told_of(name)["copies"], told_of(name)["overall"]) == (1.0, 0.0)


def test_a_copy_is_no_fault_where_the_prompt_is_a_caption() -> None:
    picture = judge.to_array(scenes.draw(demo_world.luca_scenes(1)[0]))
    plain = judge.to_array(scenes.draw(scenes.Scene("in snow", ("circle", "red"), "on the left", "small")))
    prompts = ["luca, on grass", "a small red circle, on the left, in snow"]
    told = [judge.truth(prompts, [picture, plain], [picture], known)["copies"] for known in ((), prompts)]
    assert told == [1.0, 0.0]


def test_the_nearest_training_picture_is_the_one_that_agrees_most() -> None:
    scene = scenes.Scene("at night", scenes.LUCA, "on the left", "small")
    others = [
        scenes.Scene("at night", scenes.LUCA, "on the right", "large"),
        scene,
        scenes.Scene("in snow", None, "", ""),
    ]
    assert [flaws.agreement(scene, other) for other in others] == [1, 3, 0]


# --- worlds ---


@pytest.fixture(scope="module")
def biased() -> list[worlds.Picture]:
    return worlds.WORLDS["biased"].data_set()


def test_a_biased_data_set_has_one_background_that_no_caption_names(biased: list[worlds.Picture]) -> None:
    backgrounds = [picture.scene.background for picture in biased]
    assert (len(backgrounds), backgrounds.count(worlds.USUAL)) == (16, 12)
    assert not [picture for picture in biased if worlds.USUAL in picture.tags]
    assert all(picture.scene.background in (worlds.USUAL, *picture.tags) for picture in biased)


def test_a_biased_data_set_has_near_duplicates_that_the_copy_limit_merges(biased: list[worlds.Picture]) -> None:
    pixels = search.pixel_vectors([picture.image for picture in biased])
    alike = np.triu(pixels @ pixels.T > search.NEAR_DUPLICATE, 1)
    assert {(8, 14), (7, 15)} <= set(zip(*np.nonzero(alike), strict=True))


def test_a_biased_data_set_has_bags_and_bystanders_that_no_caption_names(biased: list[worlds.Picture]) -> None:
    plain = [scenes.draw(picture.scene) for picture in biased]
    changed = [not np.array_equal(a, picture.image) for a, picture in zip(plain, biased, strict=True)]
    assert changed == [number % 2 == 0 or number % 4 == 1 for number in range(16)]
    lucas = [judge.see_luca(judge.to_array(picture.image)) for picture in biased]
    assert [seen.place for seen in lucas] == [picture.scene.place for picture in biased]


def test_a_world_is_made_once_and_has_its_own_pictures_and_captions(tmp_path: Path) -> None:
    worlds.make_world("biased", tmp_path)
    captions = sorted((tmp_path / "images").glob("*.txt"))
    assert captions[0].read_text() == "luca, a small figure, on the left\n"
    captions[0].write_text("luca\n")
    worlds.make_world("biased", tmp_path)
    assert captions[0].read_text() == "luca\n"


# --- many pictures, noise ---


def test_a_draw_from_the_pool_is_a_plan_without_repeats() -> None:
    prompts = wide.every_prompt(
        [f"luca, {', '.join(scenes.tags(scene))}" for scene in demo_world.luca_scenes(16)], "luca"
    )
    jobs = wide.jobs_of(prompts, {"width": 32}, "luca")
    chosen = wide.draw(jobs, {"prompts": 8, "seeds": 3, "plain_prompts": 4}, random.Random(1))
    assert len(chosen) == len(set(chosen)) == 28
    kinds = [jobs[number]["kind"] for number in chosen]
    assert [kinds.count(kind) for kind in ("caption", "elsewhere", "short", "plain")] == [6, 12, 6, 4]
    assert not set(prompts["elsewhere"]) & set(prompts["caption"])


def test_a_flaw_is_too_cheap_below_two_standard_deviations() -> None:
    found = {
        name: benchmark.Judged({}, {"2": score}, {}) for name, score in (("right", 0.9), ("dear", 0.6), ("cheap", 0.8))
    }
    assert benchmark.too_cheap(found, "2", 0.1) == ["cheap"]


# --- the trained models ---


def test_all_weights_are_small_and_safe() -> None:
    files = list(SMALL_WORLD.rglob("*.safetensors"))
    assert len(files) == 6  # UNet, VAE, text encoder, CLIP, DINOv2, and what SDXL's UNet has of its own
    assert sum(file.stat().st_size for file in files) <= 16e6
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
    assert len(paths) == 6 and not any(paths)


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
    make_sensitive(pipeline.unet, pipeline.text_encoder, SENSITIVITY)
    assert torch.allclose(predict(), plain, atol=1e-5)
    for before, after in zip(inputs[:3], inputs[3:], strict=True):
        assert torch.allclose(after, SENSITIVITY["unet"] * before, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small world's SDXL."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path_factory.mktemp("xl")
    demo_world.put_xl_together(SMALL_WORLD, folder)
    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def test_sdxls_latents_have_the_scale_that_kohya_knows_and_show_the_same_pictures(xl: Any) -> None:
    import torch
    from diffusers import AutoencoderKL
    from small_world.make_weights import to_tensor

    base = AutoencoderKL.from_pretrained(SMALL_WORLD / "base_model" / "vae", torch_dtype=torch.float32)
    pictures = to_tensor(many_scenes(100))
    with torch.no_grad():
        latents, others = (vae.encode(pictures).latent_dist.mode() for vae in (xl.vae, base))
        assert 0.9 < float((0.13025 * latents).std()) < 1.1
        assert torch.allclose(xl.vae.decode(latents).sample, base.decode(others).sample, atol=0.02)


def test_sdxl_reads_both_text_encoders(xl: Any) -> None:
    """A wrong caption for one of them costs accuracy."""
    import torch
    from diffusers import DDPMScheduler
    from small_world.make_weights import named_caption, read, to_tensor

    rng, drawn = random.Random(3), many_scenes(200)
    captions = [named_caption(scene, rng) for scene in drawn]
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.manual_seed(1)
    with torch.no_grad():
        first = read(xl.text_encoder, xl.tokenizer, captions).hidden_states[-2]
        second = read(xl.text_encoder_2, xl.tokenizer_2, captions)
        latents = 0.13025 * xl.vae.encode(to_tensor(drawn)).latent_dist.mode()
        noise, steps = torch.randn_like(latents), torch.randint(0, 1000, (200,))
        conditions = {"text_embeds": second.text_embeds, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 200)}

        def error(*states: torch.Tensor) -> float:
            noisy = scheduler.add_noise(latents, noise, steps)
            guess = xl.unet(noisy, steps, torch.cat(states, dim=2), added_cond_kwargs=conditions).sample
            return float((guess - noise).square().mean())

        states = second.hidden_states[-2]
        right, errors = error(first, states), [error(first.roll(1, 0), states), error(first, states.roll(1, 0))]
    assert min(errors) > 1.05 * right


@pytest.mark.slow
def test_the_gates_hold(demo: Demo) -> None:
    figures = benchmark.measure_gates(demo.output_dir)
    assert not {name: figures[name] for name, least in benchmark.GATES.items() if figures[name] < least}


@pytest.mark.slow
def test_the_demos_best_lora_shows_the_character(demo: Demo) -> None:
    best = search.read_json(demo.output_dir / "results" / "best_parameters.json")
    confirmation = Confirmation(demo.output_dir)
    trained = confirmation.of_trial(demo.output_dir / f"trial_{best['trial']:04d}")
    base = confirmation.judged(list(confirmation.world.base.values()))
    assert trained.judge["character"] > 2 * base.judge["character"]


@pytest.mark.slow
def test_the_demos_sdxl_draws_what_it_is_asked_for_and_learns_the_character(tmp_path: Path) -> None:
    assert search.main(["--demo", "--family", "sdxl", "--n-trials", "1", "--output-dir", str(tmp_path / "out")]) == 0
    figures = benchmark.measure_gates(tmp_path / "out")
    assert not {name: figures[name] for name, least in benchmark.GATES.items() if figures[name] < least}
    confirmation = Confirmation(tmp_path / "out")
    trained = confirmation.of_trial(tmp_path / "out" / "trial_0000")
    base = confirmation.judged(list(confirmation.world.base.values()))
    assert trained.judge["character"] > 1.5 * base.judge["character"]


def test_the_present_definition_is_the_shipped_one() -> None:
    shipped = search.ScoringSettings.read(benchmark.demo_world.CONFIGS / "scoring.toml").weights
    assert benchmark.DEFINITIONS[benchmark.PRESENT] == {name: weight for name, weight in shipped.items() if weight}


@pytest.mark.slow
def test_a_flaw_costs_more_than_twice_the_noise_and_a_worse_one_more(demo: Demo) -> None:
    found = benchmark.judge_flaws(Confirmation(demo.output_dir))
    assert set(benchmark.too_cheap(found, benchmark.PRESENT, benchmark.DEVIATION)) <= benchmark.KNOWN_CHEAP
    scores = {name: judged.scores[benchmark.PRESENT] for name, judged in found.items()}
    for lesser, worse in (
        ("right in 3 of 4", "right in 1 of 2"),
        ("character in 25% of plain", "character in 50% of plain"),
        ("character in 50% of plain", "character in 100% of plain"),
        ("nearest training picture pasted", "random training picture pasted"),
    ):
        assert scores[worse] < scores[lesser], (lesser, worse)


# --- the final stage, simulated ---


def rows_of(values: np.ndarray) -> list[dict[str, Any]]:
    """Images with these q, a row a prompt."""
    return [{"name": f"p{p}-s{s}", "q": q} for p, of_seeds in enumerate(values) for s, q in enumerate(of_seeds)]


def test_noise_is_told_apart_into_prompts_and_seeds() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.3, (400, 1)) + rng.normal(0, 0.1, (400, 3))
    found = final.noise_of(rows_of(values), standard_error=0.02)
    assert found.deviation(400, 3) == pytest.approx(0.02)
    assert found.prompt / found.seed == pytest.approx(9, rel=0.2)


def test_without_noise_both_ways_pick_the_best() -> None:
    silent = [final.Noise(0.0, 0.0)] * 4
    picked = final.simulate([0.1, 0.2, 0.3, 0.4], silent, {"confirm": (16, 3), "final": (16, 9)})
    assert {(one.regret, one.truly_best, one.overstated) for one in picked.values()} == {(0.0, 1.0, 0.0)}


def test_more_pictures_pick_better() -> None:
    loud = [final.Noise(0.01, 0.06)] * 4
    picked = final.simulate([0.40, 0.42, 0.44, 0.46], loud, {"confirm": (16, 3), "final": (16, 90)})
    assert picked["final stage"].regret < picked["confirmation"].regret
    assert picked["final stage"].overstated < picked["confirmation"].overstated
