"""Section 8: terms on images whose right answer is known without a model, the plan, the pipeline on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import optuna_hyperparameter_search as search

# Read when huggingface_hub is first imported, which no module does before a test runs: nothing here may use a network.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(search.__file__).resolve().parent
LIMITS = {"flat_std": 5.0, "black_p99": 16.0, "white_p1": 240.0}
WEIGHTS = {
    "fidelity": 0.5, "text": 0.8, "preservation": 0.8, "originality": 0.5, "variety": 0.0, "usable": 2.0,
}  # fmt: skip


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cloud(seed: int, count: int, spread: float = 1.0, towards: np.ndarray | None = None) -> np.ndarray:
    """Unit vectors around a direction."""
    centre = np.zeros(16) if towards is None else towards
    return unit(centre + spread * np.random.default_rng(seed).normal(size=(count, 16)))


NORTH, EAST = np.eye(16)[0], np.eye(16)[1]


# --- terms -------------------------------------------------------------------------------------------


def test_self_similarity_is_the_mean_cosine_of_different_images() -> None:
    assert search.self_similarity(np.array([[1.0, 0], [0, 1], [1, 0]])) == pytest.approx(1 / 3)
    assert search.self_similarity(np.array([[1.0, 0], [1, 0]])) == pytest.approx(1)
    assert search.self_similarity(np.array([[1.0, 0]])) == 1


def test_copies_of_the_data_set_have_the_similarity_of_the_data_set_to_itself() -> None:
    data = cloud(1, 40, 0.3, NORTH)
    assert 1 <= search.subject_similarity(data, data).mean() < 1.05  # each image meets itself once


def test_the_same_subject_drawn_elsewhere_is_as_similar_as_copies() -> None:
    data, right = cloud(1, 1000, 0.3, NORTH), cloud(2, 1000, 0.3, NORTH)  # many, so that chance parts them little
    assert search.subject_similarity(right, data).mean() == pytest.approx(1, abs=0.02)


def test_monotony_gains_nothing() -> None:
    data = cloud(1, 40, 0.3, NORTH)
    half_right_and_monotonous = cloud(3, 40, 0.01, NORTH + EAST)
    right_and_varied = cloud(2, 40, 0.3, NORTH)
    assert (
        search.subject_similarity(right_and_varied, data).mean()
        > search.subject_similarity(half_right_and_monotonous, data).mean()
    )
    # The plain mean cosine would have said the opposite.
    assert (right_and_varied @ data.T).mean() < (unit(half_right_and_monotonous) @ data.T).mean()


def test_a_subject_in_every_second_image_is_half_as_similar() -> None:
    data, right, something_else = cloud(1, 40, 0.1, NORTH), cloud(2, 40, 0.1, NORTH), cloud(3, 40, 5.0)
    mixed = np.concatenate([right[:20], something_else[:20]])
    assert search.subject_similarity(mixed, data).mean() == pytest.approx(
        (search.subject_similarity(right, data).mean() + search.subject_similarity(something_else, data).mean()) / 2,
        abs=0.03,
    )


def test_crossed_similarity_leaves_out_equal_prompts() -> None:
    x = np.array([[1.0, 0], [1, 0], [0, 1]])
    assert search.crossed_similarity(x, x, ["a", "a", "b"]) == pytest.approx(0)
    assert search.crossed_similarity(x, x, ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert search.crossed_similarity(x, x, ["a", "a", "a"]) == 0


def test_spread_within_is_0_where_seeds_change_nothing_and_counts_within_prompts_alone() -> None:
    x = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert search.spread_within(x, ["a", "a", "b", "b"]) == pytest.approx(0)
    assert search.spread_within(x, ["a", "b", "a", "b"]) == pytest.approx(1)
    assert search.spread_within(x, ["a", "b", "c", "d"]) == 0
    assert search.spread_within(x[:0], []) == 0


ANCHORS = {"q": 0.4, "m": 0.3, "m_crossed": 0.1, "plain_crossed": 0.2, "spread": 0.5, "data_spread": 0.4}
BASE_RAW = {"q": 0.4, "m": 0.3, "plain": 1.0, "copies": 0.0, "spread": 0.5, "usable": 1.0}


def test_the_base_model_itself_has_no_fidelity_and_all_the_rest() -> None:
    terms = search.terms_of(BASE_RAW, ANCHORS)
    assert terms == pytest.approx({**dict.fromkeys(WEIGHTS, 1), "fidelity": 0})


def test_the_perfect_lora_scores_1() -> None:
    terms = search.terms_of({**BASE_RAW, "q": 1.0}, ANCHORS)
    assert search.combine(terms, WEIGHTS) == pytest.approx(1)


@pytest.mark.parametrize(
    ("raw", "term", "value"),
    [
        ({"q": 0.85}, "fidelity", 0.5),  # a quarter of 1 - q is left: half of the distance
        ({"q": 0.994}, "fidelity", 0.9),
        ({"q": 0.1}, "fidelity", 0.0),
        ({"q": 1.3}, "fidelity", 1.0),
        ({"m": 0.2}, "text", 0.5),
        ({"m": 0.05}, "text", 0.0),
        ({"plain": 0.6}, "preservation", 0.5),
        ({"copies": 0.25}, "originality", 0.75),
        ({"copies": None}, "originality", 1.0),
        ({"spread": 0.2}, "variety", 0.5),
        ({"spread": 0.45}, "variety", 1.0),
        ({"q": None}, "fidelity", 0.0),
        ({"m": None}, "text", 0.0),
        ({"plain": None}, "preservation", 0.0),
        ({"spread": None}, "variety", 0.0),
        ({"usable": 0.25}, "usable", 0.25),
    ],
)
def test_terms_stand_between_their_anchors(raw: dict[str, Any], term: str, value: float) -> None:
    assert search.terms_of({**BASE_RAW, **raw}, ANCHORS)[term] == pytest.approx(value)


def test_a_base_model_that_already_is_the_subject_does_not_divide_by_zero() -> None:
    terms = search.terms_of({**BASE_RAW, "q": 1.0}, {**ANCHORS, "q": 0.999, "m": 0.1})
    assert terms["fidelity"] == pytest.approx(1 - math.sqrt(1 - 0.001 / 0.05)) and terms["text"] == 1


def test_the_score_is_the_documented_product() -> None:
    terms = {"fidelity": 0.5, "text": 0.4, "preservation": 0.3, "originality": 0.8, "variety": 0.2, "usable": 0.9}
    expected = 0.9**2 * 0.5**0.5 * 0.4**0.8 * 0.3**0.8 * 0.8**0.5
    assert search.combine(terms, WEIGHTS) == pytest.approx(expected)


def test_terms_are_floored_so_that_a_zero_does_not_hide_the_others() -> None:
    lost = dict.fromkeys(WEIGHTS, 0.0)
    assert search.combine(lost, WEIGHTS) == pytest.approx(0.01**4.6)
    assert search.combine({**lost, "text": 1.0}, WEIGHTS) > search.combine(lost, WEIGHTS)


def test_lost_prompts_cannot_be_bought_back_by_copying() -> None:
    copying = {"fidelity": 1.0, "text": 0.0, "preservation": 0.2, "originality": 1.0, "variety": 0.3, "usable": 1.0}
    balanced = {"fidelity": 0.6, "text": 0.7, "preservation": 0.6, "originality": 1.0, "variety": 0.8, "usable": 1.0}
    assert search.combine(balanced, WEIGHTS) > search.combine(copying, WEIGHTS)


def image_rows(scores: list[list[float]], plain: float = 1.0) -> list[dict[str, Any]]:
    """Images of a stage: a list of q a prompt, a value a seed; then two plain prompts."""
    rows = [
        {"name": f"p{prompt:02d}-s{seed}", "subject": True, "usable": True, "q": q, "m": 0.3, "copies": False}
        for prompt, of_seeds in enumerate(scores)
        for seed, q in enumerate(of_seeds)
    ]
    more = {"subject": False, "usable": True, "plain": plain}
    return [*rows, *({"name": f"p{len(scores) + number:02d}-s0", **more} for number in range(2))]


def resampled(scores: list[list[float]], plain: float = 1.0) -> np.ndarray:
    rows = image_rows(scores, plain)
    return search.resampled_scores({**search.average(rows), "spread": 0.5, "images": rows}, ANCHORS, WEIGHTS)


def test_averages_are_over_the_images_that_have_a_value() -> None:
    rows = [{"q": 0.2, "usable": True}, {"q": 0.6, "usable": True}, {"usable": False}, {"plain": 0.9, "usable": True}]
    found = search.average(rows)
    assert found == {"q": pytest.approx(0.4), "m": None, "plain": 0.9, "copies": None, "usable": 0.75}


def share_of_q(scores: np.ndarray) -> np.ndarray:
    """How far q is between its anchors, where all other terms are 1. Fidelity: a distance, exponent 0.5."""
    return 1 - (1 - scores**2) ** 2


def test_a_standard_error_is_that_of_a_mean_over_prompts() -> None:
    """Fidelity alone varies: its standard error is the prompts' standard deviation over the root of their number."""
    of_prompts = np.random.default_rng(0).uniform(0.6, 0.8, 40)
    scores = resampled([[q, q, q] for q in of_prompts])
    expected = np.std((of_prompts - ANCHORS["q"]) / (1 - ANCHORS["q"])) / math.sqrt(len(of_prompts))
    assert np.std(share_of_q(scores)) == pytest.approx(expected, rel=0.1)


def test_a_standard_error_of_few_prompts_is_not_too_small() -> None:
    """Drawn from five prompts, values spread by sqrt(4 / 5) of what they should."""
    of_prompts = [0.60, 0.65, 0.70, 0.75, 0.80]
    scores = resampled([[q] for q in of_prompts])
    expected = np.std(np.array(of_prompts) / (1 - ANCHORS["q"]), ddof=1) / math.sqrt(5)
    assert np.std(share_of_q(scores)) == pytest.approx(expected, rel=0.05)


def test_seeds_of_one_prompt_are_drawn_together() -> None:
    """Three equal images of a prompt tell no more than one."""
    of_prompts = np.random.default_rng(1).uniform(0.6, 0.8, 10)
    assert np.std(resampled([[q] for q in of_prompts])) == pytest.approx(
        np.std(resampled([[q] * 3 for q in of_prompts]))
    )


def test_two_loras_are_compared_in_pairs() -> None:
    """One is always 0.02 of q ahead: the difference is sure, though each score by itself is not."""
    of_prompts = np.random.default_rng(2).uniform(0.5, 0.9, 10)
    one, other = resampled([[q] for q in of_prompts]), resampled([[q - 0.02] for q in of_prompts])
    assert (one - other).min() > 0 and np.std(one) > 5 * np.std(one - other)


def test_the_copy_limit_is_half_way_to_1_from_what_95_percent_of_the_data_set_stay_under() -> None:
    data = cloud(1, 30, 1.0, NORTH)
    nearest = [max(float(x @ y) for other, y in enumerate(data) if other != one) for one, x in enumerate(data)]
    assert search.copy_limit(data, np.eye(30)) == pytest.approx((1 + np.percentile(nearest, 95)) / 2)


def test_the_copy_limit_does_not_count_near_duplicates() -> None:
    data = cloud(1, 30, 1.0, NORTH)
    pixels = search.pixel_vectors([noise(0, 256, seed) for seed in range(30)])
    frames = np.concatenate([pixels, unit(pixels + 1e-3)])
    assert search.copy_limit(unit(np.concatenate([data, data + 1e-3])), frames) == pytest.approx(
        search.copy_limit(data, pixels)
    )
    assert search.copy_limit(data[:1], pixels[:1]) == 1.0
    assert search.copy_limit(data[:3], pixels[[0, 0, 0]]) == 1.0


def test_frames_of_a_film_are_near_duplicates_and_other_pictures_are_not() -> None:
    scene = Image.new("RGB", (64, 64), (120, 160, 200))
    scene.paste((200, 40, 40), (20, 20, 40, 60))
    frame, other = scene.copy(), scene.transpose(Image.Transpose.ROTATE_90)
    frame.paste((210, 50, 40), (21, 20, 41, 60))
    one, two, three = search.pixel_vectors([scene, frame, other])
    assert one @ two > search.NEAR_DUPLICATE > one @ three


# --- usable images -----------------------------------------------------------------------------------


def picture(value: Any, side: int = 32) -> Image.Image:
    return Image.fromarray(np.broadcast_to(np.asarray(value, np.uint8), (side, side, 3)).copy())


def noise(low: int, high: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, (32, 32, 3)).astype(np.uint8))


def with_pixels(value: int, other: int, count: int) -> Image.Image:
    pixels = np.full((32, 32, 3), value, np.uint8)
    pixels[0, :count] = other
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "usable"),
    [
        (noise(0, 256), True),
        (noise(60, 200), True),
        (None, False),
        (picture(0), False),
        (picture(255), False),
        (picture(128), False),
        (picture((200, 30, 30)), False),
        (noise(120, 130), False),
        (with_pixels(0, 255, 5), False),  # black but for 5 of 1024 pixels, whose spread is 17.8
        (with_pixels(255, 0, 5), False),
        (with_pixels(0, 255, 20), True),
        (with_pixels(255, 0, 20), True),
        (noise(0, 14), False),
        (noise(242, 256), False),
    ],
)
def test_black_white_flat_and_broken_images_are_not_usable(image: Image.Image | None, usable: bool) -> None:
    assert search.is_usable(image, LIMITS) is usable


def test_limits_widen_until_every_image_of_the_data_set_is_usable() -> None:
    data = [noise(0, 256), picture(0), picture(255), picture(128)]
    limits = search.widen_limits(LIMITS, data)
    assert all(search.is_usable(image, limits) for image in data)
    assert search.widen_limits(LIMITS, [noise(0, 256)]) == LIMITS


def test_brightness_and_contrast_are_those_of_grey_values() -> None:
    half = Image.fromarray(np.repeat(np.array([0, 200], np.uint8), 32)[None].repeat(64, 0)).convert("RGB")
    assert search.brightness_and_contrast([half]) == {"brightness": 100, "contrast": 100}
    assert search.brightness_and_contrast([]) == {"brightness": None, "contrast": None}


# --- the subject and the plan ------------------------------------------------------------------------

CAPTIONS = [f"luca, a boy, scene {number}" for number in range(12)]


@pytest.mark.parametrize(
    ("captions", "class_tokens", "given", "subject"),
    [
        (CAPTIONS, None, None, "luca"),
        (CAPTIONS, "a boy", None, "a boy"),
        (CAPTIONS, "shs boy", None, "luca"),  # kohya takes class_tokens only where there is no caption
        (["shs boy"] * 3, "shs boy", None, "shs boy"),
        (CAPTIONS, "a boy", " Luca ", "Luca"),
        (["smiling, luca, park", "luca, sea"], None, None, "luca"),
        (["luca"], None, None, "luca"),
    ],
)
def test_finds_the_subject(captions: list[str], class_tokens: str | None, given: str | None, subject: str) -> None:
    assert search.Captions(captions).find_subject(class_tokens, given) == subject


def test_a_subject_that_no_caption_holds_is_refused() -> None:
    with pytest.raises(search.RefusedInput, match="'nobody' stands in no caption"):
        search.Captions(CAPTIONS).find_subject("luca", "nobody")


@pytest.mark.parametrize("captions", [["a boy", "a girl"], [" , "], []])
def test_asks_for_the_subject_where_captions_share_no_tag(captions: list[str]) -> None:
    with pytest.raises(search.RefusedInput, match="give the subject's name"):
        search.Captions(captions).find_subject(None, None)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("luca, a boy, smiling", "a boy, smiling"),
        ("a portrait of Luca in the rain", "a portrait of in the rain"),
        ("a boy, luca", "a boy"),
        ("lucas and lucan, luca", "lucas and lucan"),
        ("luca", ""),
        ("a dog", "a dog"),
    ],
)
def test_takes_the_subject_out_of_a_prompt(prompt: str, text: str) -> None:
    assert search.Subject("luca").removed_from(prompt) == text


def settings_of_configs() -> search.ScoringSettings:
    return search.ScoringSettings.read(REPOSITORY / "configs" / "scoring.toml")


def plan_of(
    captions: list[str] = CAPTIONS,
    training_seed: int = 42,
    prompts: Path | None = None,
    subject: str = "luca",
    final: dict[str, int] | None = None,
    **templates: Sequence[str],
) -> dict[str, Any]:
    images = [(Path(f"/{number}.png"), caption) for number, caption in enumerate(captions)]
    own = settings_of_configs()
    settings = dataclasses.replace(own, prompts={**own.prompts, **templates}, final=final or own.final)
    options = {"clip_skip": 2, "seed": training_seed}
    return search.PromptChooser(subject, images, settings).plan("/model", options, prompts, search.SD1)


def prompts_of(plan: dict[str, Any], stage: str, subject: bool = True) -> set[str]:
    return {job["prompt"] for job in plan[stage] if job["subject"] is subject}


def test_the_plan_has_the_documented_counts_and_shares() -> None:
    plan = plan_of()
    screen, confirm = plan["screen"], plan["confirm"]
    assert len(screen) == 8 * 2 + 4 and len(confirm) == 16 * 3 + 10
    assert [len(plan[stage]) for stage in search.FINAL_ROUNDS] == [16 * 3 + 10] * 3
    prompts = {job["prompt"] for job in confirm if job["subject"]}
    assert len(prompts) == 16 and len(prompts & set(CAPTIONS)) == 4
    assert sum(not job["subject"] for job in screen) == 4
    templates = settings_of_configs().prompts
    for stage, own, elsewhere, style in (("screen", 2, 4, 2), ("confirm", 4, 8, 4), ("final-1", 4, 8, 4)):
        found = prompts_of(plan, stage)
        assert len(found & set(CAPTIONS)) == own
        places = [text.replace("{subject}", "luca") for text in templates["elsewhere"]]
        assert len(found & {*places[::2], *(f"{place}, a boy" for place in places[1::2])}) == elsewhere
        assert len(found & {text.replace("{subject}", "luca") for text in templates["style"]}) == style


@pytest.mark.parametrize(
    ("captions", "look"),
    [
        (["luca, 1boy, solo, red hair, hat, {}", "luca, red hair, hat, glasses, 1boy, {}"], "red hair, hat"),
        (["1boy, luca (series), black_hair, simple background, {}"], "black_hair"),
        (["luca, masterpiece, looking at viewer, {}"], ""),
        (["a photo of luca with red hair on a {}"], ""),
        (["luca, a, b, c, d, e, f, {}"], "a, b, c, d"),
        (["luca, red hair, {}", "luca, {}"], ""),
    ],
    ids=["most tags", "the name within a tag", "no looks", "sentences", "four at most", "half is not most"],
)  # fmt: skip
def test_half_of_the_prompts_elsewhere_say_the_look_as_most_captions_do(captions: list[str], look: str) -> None:
    plan = plan_of([captions[number % len(captions)].format(f"scene {number}") for number in range(12)])
    places = [text.replace("{subject}", "luca") for text in settings_of_configs().prompts["elsewhere"]]
    said = {f"{place}, {look}" if look else place for place in places[1::2]}
    for stage in ("screen", "confirm", "final-1"):
        found = prompts_of(plan, stage)
        assert len(found & said) == len(found & set(places[::2])) >= 2


def test_stages_share_neither_prompts_nor_seeds() -> None:
    plan = plan_of()
    for key in ("prompt", "seed"):
        found = [{job[key] for job in plan[stage]} for stage in ("screen", "confirm", "final-1")]
        assert sum(map(len, found)) == len(set.union(*found))


def test_rounds_of_the_final_stage_have_the_same_prompts_and_other_seeds() -> None:
    rounds = [plan_of()[stage] for stage in search.FINAL_ROUNDS]
    assert len({tuple((job["name"], job["prompt"]) for job in jobs) for jobs in rounds}) == 1
    for prompt in {job["prompt"] for job in rounds[0] if job["subject"]}:
        assert len({job["seed"] for jobs in rounds for job in jobs if job["prompt"] == prompt}) == 9


def test_no_two_pictures_share_a_seed() -> None:
    """A few seeds for all prompts made a value half again as noisy (tests/small_world/README.md)."""
    plan = plan_of()
    seeds = [job["seed"] for stage in search.FIRST_SEEDS for job in plan[stage]]
    assert len(seeds) == len(set(seeds)) == 20 + 4 * 58


def test_only_a_caption_may_be_copied() -> None:
    plan = plan_of()
    assert {job["prompt"] for job in plan["confirm"] if job["caption"]} == prompts_of(plan, "confirm") & set(CAPTIONS)


def test_the_plan_is_json_and_the_same_every_time() -> None:
    """In other programs, too, in which a set of texts has another order."""
    code = "import json, test_scoring; print(json.dumps(test_scoring.plan_of()))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(search.HERE)},
        ).stdout for seed in "12"
    }  # fmt: skip
    assert said == {f"{json.dumps(plan_of())}\n".encode()}


@pytest.mark.parametrize("seed", [1_000_001, 1_000_002, 1_000_005, 2_000_001, 2_000_003])
def test_no_image_is_made_with_the_trainings_seed(seed: int) -> None:
    plan = plan_of(training_seed=seed)
    jobs = plan["screen"] + plan["confirm"]
    assert len({job["seed"] for job in jobs} - {seed}) == len(jobs) == 20 + 58


@pytest.mark.parametrize(
    "captions",
    [["luca, a boy"] * 12, ["luca"] * 12, [""] * 12, CAPTIONS[:3]],
    ids=["one caption", "the name alone", "none", "three captions"],
)
def test_few_captions_are_made_up_for_by_templates(captions: list[str]) -> None:
    plan = plan_of(captions)
    screen, confirm = prompts_of(plan, "screen"), prompts_of(plan, "confirm")
    assert (len(screen), len(confirm)) == (8, 16) and not screen & confirm


def test_captions_without_the_subject_are_not_taken_for_prompts_with_it() -> None:
    odd_spaces = [f"a boy,scene  {number}," for number in range(12)]
    plan = plan_of(odd_spaces)
    assert not (prompts_of(plan, "screen") | prompts_of(plan, "confirm")) & set(odd_spaces)


def test_too_few_templates_are_refused() -> None:
    with pytest.raises(search.RefusedInput, match=r"'elsewhere' and 'style' .* 36 templates short"):
        plan_of([], elsewhere=("{subject} here", "{subject} there"), style=("{subject} in red", "{subject} in blue"))


def test_a_template_that_stands_twice_is_used_once() -> None:
    with pytest.raises(search.RefusedInput, match=r"36 templates short"):
        plan_of([], elsewhere=("{subject} here", "{subject} there") * 9, style=("{subject} red", "{subject} blue") * 9)


def test_plain_prompts_that_name_the_subject_are_left_out() -> None:
    plan = plan_of(class_captions("dog"), subject="dog")
    plain = set.union(*(prompts_of(plan, stage, subject=False) for stage in ("screen", "confirm", "final-1")))
    assert len(plain) == 23 and not any("dog" in prompt for prompt in plain)


def class_captions(subject: str) -> list[str]:
    return [f"{subject}, scene {number}" for number in range(12)]


def test_too_few_plain_prompts_are_refused() -> None:
    with pytest.raises(search.RefusedInput, match=r"'plain' in .* is too short"):
        plan_of(plain=("a red car", "a house", "a tree", "luca's shoes", "a lake"))


def test_plain_prompts_do_not_name_the_subject() -> None:
    plain = [job for job in plan_of()["confirm"] if not job["subject"]]
    assert plain and all(job["text"] == job["prompt"] and "luca" not in job["prompt"] for job in plain)


def test_users_own_prompts_are_split_and_keep_their_options(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "# mine\nluca, at sea --n blurry, bad --w 640 --h 512 --d 7 --l 5.5 --s 12\n\nluca in a car\nluca, night\n"
        "luca in the rain --d 7\nluca, day\nluca at home\n"
    )
    plan = plan_of(prompts=file)
    first = next(job for job in plan["screen"] if job["prompt"] == "luca, at sea")
    assert [first[key] for key in ("negative", "width", "height", "seed", "cfg", "steps")] == [
        "blurry, bad", 640, 512, 7, 5.5, 12,
    ]  # fmt: skip
    assert {job["prompt"] for job in plan["screen"] if job["subject"]} == {"luca, at sea", "luca in the rain"}
    assert {job["prompt"] for job in plan["confirm"] if job["subject"]} == {"luca in a car", "luca, day"}
    assert {job["prompt"] for job in plan["final-3"] if job["subject"]} == {"luca, night", "luca at home"}
    assert not {job["seed"] for job in plan["screen"]} & {job["seed"] for job in plan["confirm"]}
    assert all(sum(not job["subject"] for job in plan[stage]) >= 2 for stage in ("screen", "confirm"))


@pytest.mark.parametrize("prompt", ["a red car,street", "a  dog", "a tree, ", "lucas at sea"])
def test_users_prompts_without_the_subject_are_plain_however_they_are_spaced(tmp_path: Path, prompt: str) -> None:
    (tmp_path / "p.txt").write_text(
        f"luca, 1\n{prompt}\nluca, 2\nluca, 3\nluca, 4\nluca, 5\nluca, 6\na b\na c\na d\na e\na f\n"
    )
    plan = plan_of(prompts=tmp_path / "p.txt")
    assert prompt.strip() in prompts_of(plan, "screen", subject=False)
    assert len(prompts_of(plan, "screen")) == len(prompts_of(plan, "confirm")) == 2


def test_options_are_read_in_either_case_and_with_either_number(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("luca, 1 --W 64 --L 7. --D 0\nluca, 2 --S 3\nluca, 3\nluca, 4\nluca, 5\nluca, 6\n")
    plan = plan_of(prompts=tmp_path / "p.txt")
    assert [plan["screen"][0][key] for key in ("width", "cfg", "seed")] == [64, 7.0, 0]
    assert plan["confirm"][0]["steps"] == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("luca --q 3\nluca", r"line 1 .*'--q 3' is not understood"),
        ("luca\nluca a --s 0", r"line 2 .*'--s 0' is not understood"),
        ("luca --w 0\nluca", "line 1"),
        ("luca --d 99999999999999999999\nluca", "line 1"),
        ("luca --d -1\nluca", "line 1"),
        ("luca --n\nluca", "line 1"),
        ("luca\n--w 64", "line 2.*no prompt"),
        ("luca --w abc\nluca", "line 1"),
        ("luca\nluca --w 500", "line 2.*multiples of 8"),
        ("luca a\nluca b\nluca c", "3 prompts with 'luca'; write at least six"),
        ("luca a\nluca b\nluca c\nLuca", "'Luca' in .* is nothing but the subject's name"),
        ("luca a\nluca a --d 3", "line 2 .*stands there twice"),
        ("luca\nluca a --s 1001", "line 2 .*at most 1000"),
        ("", "0 prompts with"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(search.RefusedInput, match=says):
        plan_of(prompts=tmp_path / "p.txt")


def test_a_missing_prompt_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(search.RefusedInput, match="can't read"):
        plan_of(prompts=tmp_path / "none.txt")


# --- the real pipeline, on tiny models ---------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import demo_world

    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder)
    return folder


@pytest.fixture(scope="module")
def output_dir(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with its plan, as a search makes it."""
    import demo_world

    folder = tmp_path_factory.mktemp("out")
    data = demo_world.read_data_set(world / "dataset.toml", {"cache_latents": True})
    images = [(image.path, *image.captions) for image in data.images]
    settings = search.ScoringSettings.read(world / "scoring.toml")
    about = (str(world / "base_model"), {"clip_skip": 2, "seed": 42}, None, search.SD1)
    plan = search.PromptChooser("luca", images, settings).plan(*about)
    (folder / "reference").mkdir()
    search.write_json(folder / "reference" / "plan.json", plan)
    return folder


@pytest.fixture(scope="module")
def scorer(output_dir: Path) -> search.ImageScorer:
    return search.ImageScorer(search.read_json(output_dir / "reference" / "plan.json"), "cpu")


@pytest.fixture(scope="module")
def folder_scorer(scorer: search.ImageScorer, output_dir: Path) -> search.FolderScorer:
    return search.FolderScorer(scorer, output_dir / "reference")


@pytest.fixture(scope="module")
def anchors(folder_scorer: search.FolderScorer) -> dict[str, Any]:
    return folder_scorer.anchors


def seen_in(folder_scorer: search.FolderScorer, images: list[Image.Image], **anchors: Any) -> dict[str, Any]:
    """The raw values of a screening that has drawn these."""
    limits, made = {**folder_scorer.anchors, **anchors}["usable"], folder_scorer.embeddings
    stage = search.StageImages(folder_scorer.scorer, "screen", images, limits, made["data"])
    return stage.raw_values(made["screen"], made["screen_usable"], folder_scorer.anchors["copy"])


TARGETS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 32),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (32, 32),
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj": (32, 32),
    "lora_te_text_model_encoder_layers_1_self_attn_out_proj": (32, 32),  # by which diffusers knows kohya's form
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (64, 32),
}  # (out, in)


def write_lora(
    path: Path, strength: float = 1.0, alpha: float = 2.0, rank: int = 4, seed: int = 0, precision: str = "float32"
) -> None:
    """A LoRA under kohya's key names; `strength` scales lora_up."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (out, into) in TARGETS.items():
        weights[f"{name}.lora_down.weight"] = torch.randn(rank, into, generator=generator)
        weights[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=generator) * strength
        weights[f"{name}.alpha"] = torch.tensor(alpha)
    save_file({name: weight.to(getattr(torch, precision)) for name, weight in weights.items()}, path)


def make_trial(output_dir: Path, name: str, strengths: list[float], epochs: int) -> Path:
    """A trial's folder as a training leaves it: checkpoints every 2 epochs, the last under the plain name."""
    folder = output_dir / name
    folder.mkdir()
    search.write_json(folder / "params.json", {"max_train_epochs": epochs})
    for number, strength in enumerate(strengths, start=1):
        last = number == len(strengths)
        file = "lora.safetensors" if last else f"lora-{2 * number:06d}.safetensors"
        write_lora(folder / file, strength, seed=number)
    return folder


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_single_file_draws_what_its_folder_draws_with_new_and_old_names_of_the_text_encoder(
    prefix: str, scorer: search.ImageScorer, world: Path, tmp_path: Path
) -> None:
    import tiny_models

    tiny_models.write_single_file(world / "base_model", tmp_path / "sd.safetensors", prefix)
    single = search.ImageScorer({**scorer.plan, "base_model": str(tmp_path / "sd.safetensors")}, "cpu")
    jobs = scorer.plan["screen"][:2]
    assert (pixels(single.render(jobs)) == pixels(scorer.render(jobs))).all()


def test_a_folder_whose_tokenizer_is_one_file_draws_the_same(
    scorer: search.ImageScorer, world: Path, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizerFast

    shutil.copytree(world / "base_model", tmp_path / "sd")
    CLIPTokenizerFast.from_pretrained(tmp_path / "sd" / "tokenizer").save_pretrained(tmp_path / "sd" / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "sd" / "tokenizer" / name).unlink(missing_ok=True)
    other = search.ImageScorer({**scorer.plan, "base_model": str(tmp_path / "sd")}, "cpu")
    jobs = scorer.plan["screen"][:2]
    assert (pixels(other.render(jobs)) == pixels(scorer.render(jobs))).all()


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_lora_changes_the_pictures_and_leaves_no_trace_behind(scorer: search.ImageScorer, tmp_path: Path) -> None:
    jobs = scorer.plan["screen"][:3]
    before = pixels(scorer.render(jobs))
    write_lora(tmp_path / "lora.safetensors", 3.0)
    with scorer.lora(tmp_path / "lora.safetensors"):
        during = pixels(scorer.render(jobs))
    assert (before != during).any()
    np.testing.assert_array_equal(before, pixels(scorer.render(jobs)))


def test_a_lora_of_layers_that_diffusers_does_not_know_there_is_merged_whole(
    scorer: search.ImageScorer, tmp_path: Path
) -> None:
    """As LyCORIS' preset "full" trains them besides."""
    import torch
    from safetensors.torch import load_file, save_file

    write_lora(tmp_path / "known.safetensors", 3.0)
    layer = scorer.pipeline.unet.time_embedding.linear_1
    down, up = torch.full((4, layer.in_features), 0.1), torch.full((layer.out_features, 4), 0.1)
    more = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    more = {f"lora_unet_time_embedding_linear_1.{name}": values for name, values in more.items()}
    save_file({**load_file(tmp_path / "known.safetensors"), **more}, tmp_path / "whole.safetensors")
    jobs, before = scorer.plan["screen"][:2], layer.weight.clone()
    with scorer.lora(tmp_path / "whole.safetensors"):
        whole = pixels(scorer.render(jobs)).astype(int)
    assert torch.equal(layer.weight, before)
    with scorer.lora(tmp_path / "known.safetensors"):
        without = pixels(scorer.render(jobs))
        with torch.no_grad():
            layer.weight += up @ down * 0.5
        by_hand = pixels(scorer.render(jobs))
        layer.weight.data.copy_(before)
    assert np.abs(whole - by_hand).max() <= 1 < np.abs(whole - without).max()


def test_a_lora_acts_the_same_with_a_diffusers_that_scales_mixed_ranks(
    scorer: search.ImageScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.33 to 0.36: convolutions of SDXL worked at dim / conv_dim times their strength."""
    write_lora(tmp_path / "lora.safetensors", 3.0)
    jobs, load = scorer.plan["screen"][:2], type(scorer.pipeline).load_lora_weights
    with scorer.lora(tmp_path / "lora.safetensors"):
        right = pixels(scorer.render(jobs))

    def load_and_scale(pipeline: Any, *given: Any, **options: Any) -> None:
        load(pipeline, *given, **options)
        for module in pipeline.unet.modules():
            if "trial" in getattr(module, "lora_A", {}):
                module.scaling["trial"] *= 8

    monkeypatch.setattr(type(scorer.pipeline), "load_lora_weights", load_and_scale)
    with scorer.lora(tmp_path / "lora.safetensors"):
        np.testing.assert_array_equal(pixels(scorer.render(jobs)), right)


def test_a_lora_is_removed_when_rendering_fails(scorer: search.ImageScorer, tmp_path: Path) -> None:
    jobs = scorer.plan["screen"][:2]
    before = pixels(scorer.render(jobs))
    write_lora(tmp_path / "lora.safetensors", 3.0)
    with pytest.raises(ZeroDivisionError), scorer.lora(tmp_path / "lora.safetensors"):
        _ = 1 / 0
    np.testing.assert_array_equal(before, pixels(scorer.render(jobs)))


@pytest.mark.parametrize(("precision", "alpha"), [("float32", 1.0), ("float16", 3.0), ("bfloat16", 4.0)])
def test_a_lora_is_applied_at_alpha_over_rank(
    scorer: search.ImageScorer, tmp_path: Path, precision: str, alpha: float
) -> None:
    """Against the definition: W + alpha / rank * up @ down, merged by hand."""
    import copy

    import torch
    from safetensors.torch import load_file

    file = tmp_path / "lora.safetensors"
    write_lora(file, 1.0, alpha=alpha, rank=4, precision=precision)
    raw = {name: weight.float() for name, weight in load_file(file).items()}
    merged, names = copy.deepcopy(scorer.pipeline.unet), list(TARGETS)
    attention = merged.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    query = merged.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    for module, name in ((attention.to_k, names[0]), (query.to_q, names[1])):
        with torch.no_grad():
            module.weight += alpha / 4 * raw[f"{name}.lora_up.weight"] @ raw[f"{name}.lora_down.weight"]
    generator = torch.Generator().manual_seed(5)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    with torch.inference_mode():
        plain = scorer.pipeline.unet(latents, 500, states).sample
        by_hand = merged(latents, 500, states).sample
        with scorer.lora(file):
            loaded = scorer.pipeline.unet(latents, 500, states).sample
    assert float((loaded - plain).abs().max()) > 1e-2
    torch.testing.assert_close(loaded, by_hand, atol=1e-3 if precision == "bfloat16" else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_half_precision_renders_and_embeds_with_a_lora_of_any(
    scorer: search.ImageScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What a card does in half precision, on the CPU: no two types may meet in one multiplication."""
    import torch

    write_lora(tmp_path / "lora.safetensors", 3.0, precision=precision)
    jobs, data = scorer.plan["screen"][:2], [noise(0, 256)]
    with scorer.lora(tmp_path / "lora.safetensors"):
        full = pixels(scorer.render(jobs)).astype(int)
    monkeypatch.setattr(scorer, "dtype", torch.float16)
    models = (scorer.pipeline, scorer.dinov2, scorer.clip)
    try:
        for model in models:
            model.to(torch.float16)
        with scorer.lora(tmp_path / "lora.safetensors"):
            images = scorer.render(jobs)
        vectors = scorer.embed_images([*images, *scorer.through_vae(data)]), scorer.embed_texts(["a dog"])
    finally:
        for model in models:
            model.to(torch.float32)
    assert [len(part) for part in vectors] == [3, 1]
    assert np.abs(pixels(images) - full).mean() < 3  # the same pictures, up to rounding


def test_the_text_encoders_part_of_a_lora_is_applied(scorer: search.ImageScorer, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", 3.0)
    before = scorer._embed_prompts(["luca"])["prompt_embeds"]
    with scorer.lora(tmp_path / "lora.safetensors"):
        assert float((scorer._embed_prompts(["luca"])["prompt_embeds"] - before).detach().abs().max()) > 1e-2


def test_clip_skip_counts_as_kohya_does(scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    tokens = scorer.pipeline.tokenizer(["luca"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    encoder = scorer.pipeline.text_encoder
    with torch.inference_mode():
        output = encoder(tokens, output_hidden_states=True)
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        expected = {1: output.last_hidden_state, 2: norm(output.hidden_states[-2]), 3: norm(output.hidden_states[-3])}
        for clip_skip, states in expected.items():
            monkeypatch.setitem(scorer.plan, "clip_skip", clip_skip)
            torch.testing.assert_close(scorer._embed_prompts(["luca"])["prompt_embeds"], states)
    assert not torch.equal(expected[1], expected[2])


def test_the_noise_of_a_picture_does_not_depend_on_its_batch(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = scorer.plan["screen"][:5]
    together = pixels(scorer.render(jobs)).astype(int)
    monkeypatch.setattr(scorer, "batch_size", 2)
    # Sums of another order differ in the last bit, so that a grey value may differ by one.
    assert np.abs(together - pixels(scorer.render(jobs))).max() <= 1


def test_pictures_of_a_batch_are_decoded_one_at_a_time(scorer: search.ImageScorer) -> None:
    """Of 8 pictures at once it took more of a card than all the rest: 5.6 GB before it, 12.5 with it, at 512 pixels."""
    sizes: list[int] = []
    hook = scorer.pipeline.vae.decoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    scorer.render(scorer.plan["confirm"][:3])
    hook.remove()
    assert sizes == [1, 1, 1]


def test_a_full_card_halves_the_batch_down_to_one_and_is_not_tried_again(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    tried: list[int] = []

    def work(batch: list[int], room: int) -> list[int]:
        tried.append(len(batch))
        if len(batch) > room:
            raise torch.OutOfMemoryError
        return batch

    monkeypatch.setattr(scorer, "batch_size", 8)
    for _ in range(2):
        done = [item for batch, _ in scorer._in_batches(list(range(11)), lambda b: work(b, 3)) for item in batch]
        assert done == list(range(11))
    assert tried == [8, 4, *[2] * 5, 1, *[2] * 5, 1]
    with pytest.raises(search.ScoringFailed, match="one image at a time"):
        list(scorer._in_batches([1, 2], lambda b: work(b, 0)))


@pytest.fixture
def moved(scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Models take turns as on a small card; which of them was moved where, in order. The card is the CPU: "cpu:0"."""
    import torch

    moves: list[tuple[str, str]] = []
    models = {"unet": scorer.pipeline.unet, "vae": scorer.pipeline.vae, "dinov2": scorer.dinov2, "clip": scorer.clip}
    names, move = {id(model): name for name, model in models.items()}, torch.nn.Module.to

    def to(model: Any, device: Any, *more: Any, **options: Any) -> Any:
        if id(model) in names:
            moves.append((names[id(model)], str(device)))
        return move(model, device, *more, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(scorer, "takes_turns", True)
    monkeypatch.setattr(scorer, "device", "cpu:0")
    scorer.pipeline.enable_model_cpu_offload(device="cpu:0")
    moves.clear()
    yield moves
    scorer.pipeline.remove_all_hooks()


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_small_card_a_batch_finds_no_model_of_the_last_one(
    scorer: search.ImageScorer, moved: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """diffusers sends away only the model before: so the VAE stayed, and after an error the UNet."""
    import torch

    found: list[list[str]] = []

    def look(_module: Any, _given: Any) -> None:
        found.append([dict(moved)[name] for name in ("unet", "vae")])  # where each was moved last

    def fail(_module: Any, given: tuple[Any, ...], _result: Any) -> None:
        if fails and len(given[0]) == 4:  # two pictures, each with and without its prompt
            raise torch.OutOfMemoryError

    monkeypatch.setattr(scorer, "batch_size", 2 if fails else 1)
    scorer.through_vae([noise(0, 64, 1)])
    encoder, unet = scorer.pipeline.text_encoder, scorer.pipeline.unet
    hooks = [encoder.register_forward_pre_hook(look), unet.register_forward_hook(fail)]
    scorer.render(scorer.plan["screen"][:2])
    for hook in hooks:
        hook.remove()
    assert found == [["cpu", "cpu"]] * (6 if fails else 4)  # negative prompts and prompts of each batch


def test_encoders_are_on_a_small_card_only_while_they_see(
    scorer: search.ImageScorer, moved: list[tuple[str, str]]
) -> None:
    seen = scorer.embed_images([noise(0, 64, 1)])
    scorer.embed_images_for_text([noise(0, 64, 1)])
    scorer.embed_texts(["a dog"])
    assert moved == [(name, where) for name in ("dinov2", "clip", "clip") for where in ("cpu:0", "cpu")]
    assert seen.shape[0] == 1


def test_on_a_small_card_an_encoder_is_loaded_beside_it(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "takes_turns", True)
    monkeypatch.setattr(scorer, "device", "meta")
    encoder, _ = scorer._load_encoder(scorer.plan["encoders"]["dinov2"])
    assert encoder.device.type == "cpu"


@pytest.mark.parametrize(
    ("said", "is_halved"),
    [
        ("CUDA error: out of memory", True),  # torch.AcceleratorError
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("Unable to find a valid cuDNN algorithm to run convolution", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_full_card_is_known_by_what_its_libraries_say(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch, said: str, is_halved: bool
) -> None:
    def work(batch: list[int]) -> list[int]:
        if len(batch) > 1:
            raise RuntimeError(said)
        return batch

    monkeypatch.setattr(scorer, "batch_size", 2)
    if is_halved:
        assert [batch for batch, _ in scorer._in_batches([1, 2], work)] == [[1], [2]]
    else:
        with pytest.raises(RuntimeError, match="shapes"):
            list(scorer._in_batches([1, 2], work))
    with pytest.raises(search.ScoringFailed, match="another program on the card" if is_halved else "hf download name"):
        scorer._load("name", lambda _: work([1, 2]))
    with pytest.raises(search.ScoringFailed if is_halved else RuntimeError, match=re.escape(said)):
        list(scorer._in_batches([1], lambda batch: work(batch * 2)))


def test_scoring_takes_no_more_of_the_card_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (9_000_000_000, 24_000_000_000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    with pytest.raises(search.ScoringFailed, match=r"has 9\.00GB free beside the trainer, and screening needs 12\.0GB"):
        search.ImageScorer({"family": "SDXL", "batch_size": 4}, "cuda:1", 12e9)
    assert limits == [(9 / 24, 1)]


def test_pictures_from_latents_that_are_not_finite_are_none(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    class Broken:
        def __init__(self, pipeline: Any) -> None:
            self.pipeline = pipeline

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipeline, name)

        def __call__(self, **options: Any) -> Any:
            result = self.pipeline(**options)
            result.images[1] = torch.nan
            return result

    monkeypatch.setattr(scorer, "pipeline", Broken(scorer.pipeline))
    images = scorer.render(scorer.plan["screen"][:3])
    assert [image is None for image in images] == [False, True, False]


def test_embeddings_are_unit_vectors_that_tell_images_and_texts_apart(scorer: search.ImageScorer) -> None:
    images = [noise(0, 256, 1), picture((200, 40, 40)), picture((40, 40, 200))]
    for vectors in (
        scorer.embed_images(images),
        scorer.embed_images_for_text(images),
        scorer.embed_texts(["a dog", "a red car on a hill", "x " * 200]),
    ):
        assert vectors.shape[0] == 3
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
        assert search.self_similarity(vectors) < 0.9999


def test_embeddings_that_are_not_finite_are_an_error_and_no_score(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    broken = torch.nn.Linear(1, 1)
    broken.config = scorer.dinov2.config
    broken.forward = lambda pixels: type("Output", (), {"pooler_output": torch.full((len(pixels), 4), torch.nan)})
    monkeypatch.setattr(scorer, "dinov2", broken)
    with pytest.raises(search.ScoringFailed, match="not finite"):
        scorer.embed_images([noise(0, 256)])


def test_image_processors_are_the_pil_ones_with_or_without_torchvision(
    scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked: list[dict[str, Any]] = []
    make = transformers.AutoImageProcessor.from_pretrained
    spy = lambda name, **options: (asked.append(options), make(name, **options))[1]  # noqa: E731
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", spy)
    scorer._load_encoder(scorer.plan["encoders"]["dinov2"])
    assert asked == [{"use_fast": False, "backend": "pil"}]  # torchvision is missing on most machines of tests
    for processor in (scorer.dinov2_processor, scorer.clip_processor):
        assert isinstance(processor(images=[noise(0, 256)], return_tensors="np")["pixel_values"][0], np.ndarray)
        assert not any("Fast" in base.__name__ or "Torchvision" in base.__name__ for base in type(processor).mro())


def test_nothing_of_an_image_is_cut_off_before_it_is_embedded(scorer: search.ImageScorer) -> None:
    """A head at the top of a tall picture, which the encoders' own processors would cut off."""
    body = Image.new("RGB", (64, 128), (90, 140, 90))
    head = body.copy()
    head.paste((250, 30, 30), (16, 0, 48, 24))
    for embed in (scorer.embed_images, scorer.embed_images_for_text):
        one, other = embed([body, head])
        assert float(one @ other) < 0.999


def test_an_encoders_own_crop_is_not_applied(scorer: search.ImageScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [noise(0, 256, seed) for seed in range(2)]
    before = scorer.embed_images(images)
    monkeypatch.setattr(scorer.dinov2_processor, "crop_size", {"height": 14, "width": 14})  # as DINOv2's 224 of 256
    np.testing.assert_array_equal(scorer.embed_images(images), before)


def test_one_image_is_embedded_as_in_a_batch(scorer: search.ImageScorer) -> None:
    images = [noise(0, 256, seed) for seed in range(4)]
    np.testing.assert_allclose(scorer.embed_images(images)[2:3], scorer.embed_images(images[2:3]), atol=1e-5)


def test_data_set_images_keep_their_proportions_and_get_the_scorings_area(scorer: search.ImageScorer) -> None:
    shown = scorer.through_vae([Image.new("RGB", (400, 100)), Image.new("RGB", (30, 30)), Image.new("L", (64, 64))])
    assert [image.size for image in shown] == [(128, 32), (64, 64), (64, 64)]


def test_the_base_models_own_images_are_the_anchors(
    folder_scorer: search.FolderScorer, anchors: dict[str, Any], output_dir: Path
) -> None:
    """A LoRA that does nothing has the base model's raw values, so fidelity 0 and preservation 1."""
    folder = make_trial(output_dir, "trial_nothing", [1e-12], 2)
    result = folder_scorer.score_checkpoint(folder / "lora.safetensors", "screen", folder / "scores", print)
    with np.load(folder / "scores" / "embeddings.npz") as kept:
        np.testing.assert_allclose(kept["dinov2"], folder_scorer.embeddings["screen"], atol=2e-3)
    for name in ("q", "m", "spread"):
        assert result["raw"][name] == pytest.approx(anchors["screen"][name], abs=1e-4)
    assert result["terms"]["preservation"] == pytest.approx(1, abs=0.02)
    assert result["terms"]["fidelity"] == pytest.approx(0, abs=0.01)
    assert len(list((folder / "scores").glob("*.png"))) == len(folder_scorer.plan["screen"])


@pytest.mark.parametrize("lost", [True, False])
def test_a_base_model_that_draws_nothing_usable_is_an_error_and_no_anchor(
    scorer: search.ImageScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    def render(jobs: list[dict[str, Any]], report: Any) -> list[Any]:
        return [picture(0) if job["subject"] is lost else noise(0, 256, job["seed"]) for job in jobs]

    monkeypatch.setattr(scorer, "render", render)
    with pytest.raises(search.ScoringFailed, match="check --base-model"):
        search.FolderScorer(scorer, tmp_path)
    assert not (tmp_path / "anchors.json").exists()


def test_images_of_an_interrupted_scoring_do_not_stay(
    folder_scorer: search.FolderScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p99-s0.png").write_bytes(b"half an ima")
    write_lora(tmp_path / "lora.safetensors")
    monkeypatch.setattr(folder_scorer.scorer, "render", lambda jobs, report: [None, *[noise(0, 256)] * (len(jobs) - 1)])
    folder_scorer.score_checkpoint(tmp_path / "lora.safetensors", "screen", tmp_path / "images", print)
    names = {job["name"] for job in folder_scorer.plan["screen"][1:]}
    assert {path.stem for path in (tmp_path / "images").glob("*.png")} == names


@pytest.mark.parametrize("fill", ["black", "white"])
def test_a_lora_that_draws_black_or_white_has_no_usable_image_and_loses_all(
    folder_scorer: search.FolderScorer, anchors: dict[str, Any], fill: str
) -> None:
    jobs = folder_scorer.plan["screen"]
    raw = seen_in(folder_scorer, [Image.new("RGB", (64, 64), fill) for _ in jobs])
    terms = search.terms_of(raw, {**anchors, **anchors["screen"]})
    assert terms == {**dict.fromkeys(WEIGHTS, 0.0), "originality": 1.0}  # there is nothing that could be a copy
    assert raw["images"][0] == {"name": jobs[0]["name"], "subject": True, "usable": False}


def test_copies_of_the_data_set_are_flagged(
    folder_scorer: search.FolderScorer, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = folder_scorer.plan, make_trial(output_dir, "trial_copies", [1.0], 2)
    shown = folder_scorer.scorer.through_vae([Image.open(path) for path in plan["images"]])
    copies = [shown[number % len(shown)] for number in range(len(plan["confirm"]))]
    monkeypatch.setattr(folder_scorer.scorer, "render", lambda jobs, report: copies[: len(jobs)])
    metrics = folder_scorer.score_trial(folder, {2: folder / "lora.safetensors"})
    wanted = [job["name"] for job in plan["confirm"] if job["subject"] and not job["caption"]]
    assert metrics["copies"]["images"] == wanted and metrics["terms"]["originality"] == 0


def test_usable_images_are_told_by_the_widened_limits(
    folder_scorer: search.FolderScorer, anchors: dict[str, Any]
) -> None:
    dark = noise(0, 14)
    images = [dark] * len(folder_scorer.plan["screen"])
    assert seen_in(folder_scorer, images)["usable"] == 0.0
    raw = seen_in(folder_scorer, images, usable=search.widen_limits(anchors["usable"], [dark]))
    assert raw["usable"] == 1.0
    assert raw["brightness"] == pytest.approx(np.asarray(dark.convert("L")).mean())


def test_the_base_models_anchors_are_what_its_own_images_say(
    folder_scorer: search.FolderScorer, anchors: dict[str, Any], output_dir: Path
) -> None:
    scorer = folder_scorer.scorer
    for stage in ("screen", "confirm"):
        jobs = scorer.plan[stage]
        images = [Image.open(output_dir / "reference" / stage / f"{job['name']}.png") for job in jobs]
        vectors = scorer.embed_images(images)
        about, plain = (np.array([job["subject"] is kind for job in jobs]) for kind in (True, False))
        pictures = scorer.embed_images_for_text([i for i, ok in zip(images, about, strict=True) if ok])
        texts = scorer.embed_texts([job["text"] for job in jobs if job["subject"]])
        names = np.array([job["prompt"] for job in jobs if job["subject"]])
        cosines = pictures @ texts.T
        assert anchors[stage]["m"] == pytest.approx(np.diag(cosines).mean(), abs=1e-4)
        assert anchors[stage]["m_crossed"] == pytest.approx(cosines[names[:, None] != names].mean(), abs=1e-4)
        between_plain = (vectors[plain] @ vectors[plain].T)[~np.eye(plain.sum(), dtype=bool)]
        assert anchors[stage]["plain_crossed"] == pytest.approx(between_plain.mean(), abs=1e-4)
    data = folder_scorer.embeddings["data"]
    assert anchors["data_spread"] == pytest.approx(1 - (data @ data.T)[~np.eye(len(data), dtype=bool)].mean())
    assert 0 < anchors["data"]["brightness"] < 255 and 0 < anchors["data"]["contrast"] < 128


def run_score(folder: Path) -> tuple[int, str]:
    """`--score`, as a user or the search calls it: status and stderr."""
    command = [sys.executable, str(REPOSITORY / "optuna_hyperparameter_search.py"), "--score", str(folder)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_a_trial_is_screened_confirmed_and_scored_the_same_in_every_process(
    output_dir: Path, anchors: dict[str, Any]
) -> None:
    folder = make_trial(output_dir, "trial_0000", [0.2, 1.0, 4.0], 6)
    assert run_score(folder) == (0, "")
    first = search.read_json(folder / "metrics.json")
    search.score_folder(folder, "cpu")
    second = search.read_json(folder / "metrics.json")
    for metrics in (first, second):
        metrics.pop("scoring_seconds")
    assert first == second
    assert [result["epoch"] for result in first["screen"]] == [2, 4, 6]
    assert len({result["score"] for result in first["screen"]}) == 3
    best = max(first["screen"], key=lambda result: result["score"])
    assert (first["best_epoch"], first["checkpoint"]) == (best["epoch"], best["checkpoint"])
    plan = search.read_json(output_dir / "reference" / "plan.json")
    assert [image["name"] for image in first["raw"]["images"]] == [job["name"] for job in plan["confirm"]]
    assert len(list((folder / "scores" / "confirm").glob("*.png"))) == len(plan["confirm"])
    assert first["terms"] == search.terms_of(first["raw"], {**anchors, **anchors["confirm"]})
    assert first["score"] == search.combine(first["terms"], WEIGHTS) and 0 <= first["score"] <= 1
    assert first["terms"].keys() == WEIGHTS.keys()
    assert 0 < first["standard_error"] < 0.5
    flagged = [image["name"] for image in first["raw"]["images"] if image.get("copies")]
    assert first["copies"] == {"limit": anchors["copy"], "images": flagged}
    names = {path.name for path in (folder / "scores").iterdir()}
    assert names == {"epoch-000002", "epoch-000004", "epoch-000006", "confirm", search.CONTACT_SHEET}


def test_what_a_paused_training_has_saved_is_screened_once_for_the_search_and_anew_for_a_user(output_dir: Path) -> None:
    folder = make_trial(output_dir, "trial_0006", [0.2, 1.0, 4.0], 6)
    last = (folder / "lora.safetensors").rename(folder / "later")
    with pytest.raises(search.RefusedInput, match=r"has no lora\.safetensors"):
        search.score_folder(folder, "cpu")
    search.score_folder(folder, "cpu", by_search=True)
    file = folder / "scores" / search.SCREENED
    screened = search.read_json(file)["screen"]
    assert [result["epoch"] for result in screened] == [2, 4] and not (folder / "metrics.json").exists()
    screened[1]["score"] = 2.0
    search.write_json(file, {"screen": screened})
    last.rename(folder / "lora.safetensors")
    search.score_folder(folder, "cpu", by_search=True)
    assert [result["score"] for result in search.read_json(folder / "metrics.json")["screen"]][1] == 2.0
    assert not file.exists()
    search.write_json(file, {"screen": screened})
    search.score_folder(folder, "cpu")
    assert search.read_json(folder / "metrics.json")["screen"][1]["score"] <= 1.0


def test_scoring_again_keeps_what_was_screened_of_checkpoints_that_are_deleted_since(output_dir: Path) -> None:
    folder = make_trial(output_dir, "trial_0003", [0.2, 1.0, 4.0], 6)
    search.score_folder(folder, "cpu")
    first = search.read_json(folder / "metrics.json")
    for result in first["screen"]:
        if result["epoch"] != 4:
            (folder / result["checkpoint"]).unlink()
    search.score_folder(folder, "cpu")
    second = search.read_json(folder / "metrics.json")
    assert [result.pop("deleted", False) for result in second["screen"]] == [True, False, True]
    assert second["screen"] == first["screen"]
    assert (second["best_epoch"], second["checkpoint"]) == (4, "lora-000004.safetensors")
    search.score_folder(folder, "cpu")
    assert [result.get("deleted", False) for result in search.read_json(folder / "metrics.json")["screen"]] == [
        True, False, True,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_user_does_not_score_beside_a_search_that_scores_in_the_folder_that_it_holds(
    output_dir: Path, anchors: dict[str, Any]
) -> None:
    folder = make_trial(output_dir, "trial_0004", [1.0], 2)
    with search.holding(output_dir):
        status, said = run_score(folder)
        assert status == 2 and said.count("\n") == 1 and f"{output_dir} is in use by process {os.getpid()} " in said
        assert not (folder / "metrics.json").exists()
        search.score_in_child(folder, "cpu")
    assert search.read_json(folder / "metrics.json")["outcome"] == "scored"
    assert run_score(folder) == (0, "")


def test_a_scoring_that_is_killed_says_that_memory_ran_out(output_dir: Path) -> None:
    folder = make_trial(output_dir, "trial_0008", [1.0], 2)

    def kill() -> None:
        while (found := search.read_json(folder / "scoring.process.json")) is None:
            time.sleep(0.01)
        os.kill(found["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(search.ScoringFailed, match="memory ran out"):
        search.score_in_child(folder, "cpu")
    killer.join()


def test_a_checkpoint_that_is_not_finite_stops_a_users_scoring_before_an_image_is_made(output_dir: Path) -> None:
    folder = make_trial(output_dir, "trial_0001", [1.0, float("nan")], 4)
    status, said = run_score(folder)
    assert status == 1 and "stopped: weights that are not finite in lora.safetensors (" in said
    assert not (folder / "metrics.json").exists() and not (folder / "scores").exists()


def test_a_half_trained_folder_is_refused(output_dir: Path) -> None:
    folder = make_trial(output_dir, "trial_0009", [1.0, 1.0], 4)
    (folder / "lora.safetensors").unlink()
    status, said = run_score(folder)
    assert status == 2 and "whose training has finished" in said and not (folder / "metrics.json").exists()


def test_a_torn_checkpoint_is_one_line_and_status_1(output_dir: Path) -> None:
    folder = make_trial(output_dir, "trial_0002", [1.0], 2)
    file = folder / "lora.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    status, said = run_score(folder)
    assert status == 1 and said.count("\n") == 1 and "lora.safetensors can't be read" in said
    assert said.endswith(f"; restore it, or train {folder / 'config.toml'} again\n")


def test_what_nobody_thought_of_is_a_scoring_that_failed(output_dir: Path, tmp_path: Path) -> None:
    plan = search.read_json(output_dir / "reference" / "plan.json")
    plan["images"] = [str(tmp_path / "torn.png")]
    (tmp_path / "torn.png").write_bytes(b"no image")
    search.write_json(tmp_path / "reference" / "plan.json", plan)
    with pytest.raises(search.ScoringFailed, match=r"UnidentifiedImageError while scoring .*torn\.png"):
        search.score_folder(tmp_path / "reference", "cpu")


@pytest.mark.parametrize("made", [None, 3])  # versions up to 3 did not say it
def test_a_trial_of_another_definition_is_not_scored_by_this_one(
    output_dir: Path, tmp_path: Path, made: int | None
) -> None:
    name, present = search.SCORE_DEFINITION
    plan = search.read_json(output_dir / "reference" / "plan.json")
    assert plan.pop(name) == present
    search.write_json(tmp_path / "reference" / "plan.json", plan | ({name: made} if made else {}))
    shutil.copytree(make_trial(output_dir, f"trial_old_{made}", [1.0], 2), folder := tmp_path / "trial_0011")
    status, said = run_score(folder)
    assert status == 2 and said.count("\n") == 1 and f"by definition 3, and this program has {present};" in said
    assert not (folder / "metrics.json").exists()


def test_what_is_no_trials_folder_is_refused_in_one_line(tmp_path: Path, output_dir: Path) -> None:
    (output_dir / "trial_empty").mkdir(exist_ok=True)
    for folder in (tmp_path, output_dir / "trial_empty"):
        status, said = run_score(folder)
        assert status == 2 and said.count("\n") == 1 and said.startswith("error: --score:")


@pytest.mark.slow
def test_nothing_but_the_programs_own_lines_are_said_of_a_palette_with_transparency(
    output_dir: Path, tmp_path: Path
) -> None:
    palette = Image.effect_noise((64, 64), 90).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    plan = search.read_json(output_dir / "reference" / "plan.json")
    plan["images"] = [*plan["images"], str(tmp_path / "palette.png")]
    search.write_json(tmp_path / "reference" / "plan.json", plan)
    command = [sys.executable, str(REPOSITORY / "optuna_hyperparameter_search.py"), "--device", "cpu"]
    done = subprocess.run([*command, "--score", str(tmp_path / "reference")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("images: ")]
    assert all(line.startswith("  ") for line in lines), done.stdout


def missing(output_dir: Path, folder: Path, **changed: Any) -> str:
    """What is said of a plan that names something that is not there."""
    plan = {**search.read_json(output_dir / "reference" / "plan.json"), **changed}
    search.write_json(folder / "reference" / "plan.json", plan)
    with pytest.raises(search.ScoringFailed) as error:
        search.score_folder(folder / "reference", "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_libraries_that_can_not_load_a_lora_are_found_out_before_the_reference_is_made(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    def too_old(*_args: Any, **_options: Any) -> None:
        raise ValueError("The version of PEFT you are using is not compatible")

    (tmp_path / "reference" / "first_step").mkdir(parents=True)
    write_lora(tmp_path / "reference" / "first_step" / "lora.safetensors")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_lora_weights", too_old)
    said = missing(output_dir, tmp_path)
    assert "PEFT you are using is not compatible" in said and "pip install -r requirements.txt" in said
    assert not (tmp_path / "reference" / "screen").exists()


def test_an_encoder_that_is_missing_is_one_line_with_the_remedy(output_dir: Path, tmp_path: Path) -> None:
    encoders = {**search.read_json(output_dir / "reference" / "plan.json")["encoders"], "dinov2": "nobody/dinov2"}
    assert "`hf download nobody/dinov2`, or" in missing(output_dir, tmp_path, encoders=encoders)


def test_the_configs_that_a_single_file_needs_are_what_is_to_be_fetched(output_dir: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "model.safetensors")
    said = missing(output_dir, tmp_path, base_model=str(tmp_path / "model.safetensors"), pipeline_config="nobody/sd")
    assert '`hf download nobody/sd --include "*.[jt]*"`' in said and "download /" not in said


def test_a_folder_that_does_not_load_is_what_is_to_be_restored(output_dir: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base_model", tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "config.json").unlink()
    for folder in (tmp_path / "sd", tmp_path / "gone"):
        said = missing(output_dir, tmp_path, base_model=str(folder), pipeline_config="nobody/sd")
        assert f"; restore {folder}, or " in said and "nobody" not in said and "hf download" not in said


# --- the final stage ---------------------------------------------------------------------------------


class MadeFolderScorer(search.FolderScorer):
    """A FolderScorer whose LoRAs have the fidelity that their file's name says, more or less."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.scored = plan, []
        self.anchors = {**dict.fromkeys(search.FINAL_ROUNDS, ANCHORS), "data_spread": 0.4}

    def score_checkpoint(
        self, path: Path, stage: str, images: Path, report: Any = None, strength: float = 1.0
    ) -> dict[str, Any]:
        self.scored.append((path.parent.name, stage, strength))
        report(len(self.plan[stage]))
        assert report.__self__.n <= report.__self__.total  # the bar's
        q, luck = float(path.stem), np.random.default_rng(zlib.crc32(f"{path.stem} {stage}".encode()))
        rows = image_rows([[q - (strength - 0.8) ** 2 + noise for noise in luck.normal(0, 0.01, 3)] for _ in range(8)])
        return self.judge({**search.average(rows), "spread": 0.5, "images": rows}, stage)


def test_the_bar_counts_all_that_is_drawn(tmp_path: Path) -> None:
    _, scored = run_final(tmp_path, "0.700", "0.701", "0.702", "0.703", "0.704")  # it is never beyond its end
    assert len(scored) > 5 + len(search.STRENGTHS)


def test_few_prompts_can_not_show_that_a_trial_loses(tmp_path: Path) -> None:
    result, _ = run_final(tmp_path, "0.900", "0.500", prompts=search.ENOUGH_PROMPTS - 1)
    assert [(found["rounds"], found["dropped"]) for found in result["finalists"]] == [(3, False), (3, False)]
    assert result["strength"] == 1.0


def run_final(folder: Path, *fidelities: str, prompts: int = 16) -> tuple[dict[str, Any], list[tuple[str, str, float]]]:
    folder.mkdir(exist_ok=True)
    files = {str(n): str(folder / f"trial_{n:04d}" / f"{q}.safetensors") for n, q in enumerate(fidelities)}
    search.write_json(folder / search.FINALISTS, files)
    counts = {**settings_of_configs().final, "prompts": prompts}
    scorer = MadeFolderScorer({**plan_of(final=counts), "weights": WEIGHTS})
    final = search.FinalStage(scorer, folder)
    final.run()
    assert final.bar.n == final.bar.total  # whoever watches it sees it end
    return search.read_json(folder / "result.json"), scorer.scored


def test_a_clear_loser_is_dropped_after_a_round_and_equals_go_on(tmp_path: Path) -> None:
    result, scored = run_final(tmp_path, "0.700", "0.701", "0.500")
    assert [(found["trial"], found["rounds"]) for found in result["finalists"]] == [(1, 3), (0, 3), (2, 1)]
    assert [found["dropped"] for found in result["finalists"]] == [False, False, True]
    assert sum(trial == "trial_0002" for trial, _, _ in scored) == 1
    ahead = {found["trial"]: found["ahead_of_winner"] for found in result["finalists"]}
    assert ahead[1] == [0.0, 0.0] and ahead[2][1] < 0


def test_a_winner_that_is_alone_after_a_round_needs_no_other(tmp_path: Path) -> None:
    _, scored = run_final(tmp_path, "0.900", "0.500")
    assert {stage for _, stage, _ in scored} == {"final-1"}


def test_an_interrupted_final_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    first, scored = run_final(tmp_path, "0.700", "0.701")
    (tmp_path / "trial_0001" / "final-3" / "metrics.json").unlink()
    again, repeated = run_final(tmp_path, "0.700", "0.701")
    assert again == first and len(scored) > 6
    assert repeated == [("trial_0001", "final-3", 1.0)]


def test_a_strength_that_is_surely_better_is_recommended(tmp_path: Path) -> None:
    result, _ = run_final(tmp_path, "0.900", "0.500")
    assert list(result["strengths"]) == ["0.6", "0.8", "1.0", "1.2"] and result["strength"] == 0.8


@pytest.mark.slow
def test_the_final_stage_of_real_loras(output_dir: Path) -> None:
    folders = [make_trial(output_dir, f"trial_001{n}", [strength], 2) for n, strength in enumerate((0.2, 0.5, 3.0))]
    final = output_dir / "final"
    final.mkdir()
    search.write_json(
        final / search.FINALISTS, {str(10 + n): str(f / "lora.safetensors") for n, f in enumerate(folders)}
    )
    assert run_score(final) == (0, "")
    result = search.read_json(final / "result.json")
    assert {found["trial"] for found in result["finalists"]} == {10, 11, 12}
    winner = result["finalists"][0]
    assert winner["score"] == max(found["score"] for found in result["finalists"]) and winner["standard_error"] > 0
    plan = search.read_json(output_dir / "reference" / "plan.json")
    shown = final / f"trial_00{winner['trial']}" / "final-1"
    assert len(list(shown.glob("*.png"))) == len(plan["final-1"])
    assert len(list((shown.parent / "strength-0.6").glob("*.png"))) == len(plan["final-1"])
