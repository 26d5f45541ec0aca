"""Whether the small world is true: what its models can do, and whether the score sees what a judge sees.

    python tests/small_world/benchmark.py gates       the models by themselves, before any LoRA
    python tests/small_world/benchmark.py ladder      learning rates from 0.01 to 100 times the V2.1 range
    python tests/small_world/benchmark.py truth       30 settings: rank correlation of score and judge, spread and noise
    python tests/small_world/benchmark.py flaws       what the score takes off for drawn pictures with a known flaw
    python tests/small_world/benchmark.py noise       how far a value moves with other prompts, seeds or trainings
    python tests/small_world/benchmark.py final       what the final stage gains in simulated studies, after truth
    python tests/small_world/benchmark.py studies     5 studies of 12 trials: what the final stage's winner is worth
    python tests/small_world/benchmark.py earlier     biased world's studies with and without the middle one's settings
    python tests/small_world/benchmark.py candidates  other definitions of the score, on flaws, trainings and noise
    python tests/small_world/benchmark.py strip       draw the README's picture from what `--demo` left in --output-dir

Each trial is trained by the demo's trainer and scored by the search's own scoring process in a study's folder
(--output-dir, one for each --world, kept: what was trained there before is not trained again). One at a time for each
core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import toml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import demo_world
from small_world import judge, scenes, wide
from small_world.confirmation import STAGE, Confirmation, Judged, read_pictures
from small_world.definitions import DEFINITIONS, PRESENT
from small_world.final import noise_of, simulate
from small_world.flaws import FLAWS
from small_world.noise import Pool, mean_and_deviation
from small_world.worlds import WORLDS, make_world

import optuna_hyperparameter_search as search

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "optuna_hyperparameter_search.py"
# `--score` would do the same, but only for one trial of a study at a time.
SCORE = f"""import pathlib, sys
sys.path.insert(0, {str(HERE.parents[1])!r})
import optuna_hyperparameter_search
optuna_hyperparameter_search.score_folder(pathlib.Path(sys.argv[1]), "cpu")
"""
MIDDLE: dict[str, Any] = {  # of the V2.1 space
    "learning_rate": 8.5e-5, "text_encoder_lr": 5e-5, "network_dim": 128, "network_alpha": 64,
    "optimizer_type": "AdamW", "max_train_epochs": 16, "lr_scheduler": "cosine", "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 50,
}  # fmt: skip
RATES = ("learning_rate", "text_encoder_lr")
TERMS = search.TERMS


# Gates


def psnr(scorer: search.ImageScorer, drawn: list[scenes.Scene]) -> float:
    """Peak signal-to-noise ratio, dB, of scenes that went through the autoencoder, over all of them together."""
    pictures = [scenes.draw(scene) for scene in drawn]
    shown = scorer.through_vae(pictures)
    errors = [np.square(judge.to_array(a) - judge.to_array(b)).mean() for a, b in zip(pictures, shown, strict=True)]
    return float(10 * np.log10(255**2 / np.mean(errors)))


def job(prompt: str, seed: int, like: dict[str, Any]) -> dict[str, Any]:
    return {**like, "name": f"{seed}", "prompt": prompt, "text": prompt, "seed": seed, "subject": False}


def measure_gates(output_dir: Path) -> dict[str, float]:
    """All figures of the gates, on seeds that nothing else uses."""
    plan = search.read_json(output_dir / "reference" / "plan.json")
    anchors = search.read_json(output_dir / "reference" / "anchors.json")
    scorer = search.ImageScorer(plan, "cpu")
    rng = random.Random(5000)
    fresh = [scenes.random_scene(rng) for _ in range(1200)]
    figures = {
        "autoencoder, held-out scenes, dB": psnr(scorer, fresh[:200]),
        "autoencoder, the character, dB": psnr(scorer, [scenes.random_scene(rng, scenes.LUCA) for _ in range(100)]),
    }
    held_out = [scene for scene in fresh if scenes.is_held_out(scene)][:100]
    prompts = [", ".join(scenes.tags(scene)) for scene in held_out]
    pictures = scorer.render([job(prompt, 9000 + n, plan["screen"][0]) for n, prompt in enumerate(prompts)])
    seen = [judge.see_shape(judge.to_array(picture)) for picture in pictures]
    for fact, asked in (("shape", 0), ("colour", 1)):
        right = [getattr(s, fact) == scene.what[asked] for s, scene in zip(seen, held_out, strict=True)]
        figures[f"base model, {fact} right"] = float(np.mean(right))
    for fact in ("place", "background"):
        right = [getattr(s, fact) == getattr(scene, fact) for s, scene in zip(seen, held_out, strict=True)]
        figures[f"base model, {fact} right"] = float(np.mean(right))
    images, texts = scorer.embed_images_for_text(pictures), scorer.embed_texts(prompts)
    cosines = images @ texts.T
    matched = np.diag(cosines)
    shuffled = np.array([np.delete(row, n).mean() for n, row in enumerate(cosines)])
    gain = matched - shuffled
    figures["prompts, matched cosine"] = float(matched.mean())
    figures["prompts, shuffled cosine"] = float(shuffled.mean())
    figures["prompts, matched above shuffled, standard errors"] = float(
        gain.mean() / (gain.std() / math.sqrt(len(gain)))
    )
    for stage in ("screen", "confirm"):
        figures[f"q(data) - q(base), {stage}"] = 1 - anchors[stage]["q"]
    return figures


GATES = {
    "autoencoder, held-out scenes, dB": 27,
    "autoencoder, the character, dB": 27,
    "base model, shape right": 0.7,
    "base model, colour right": 0.7,
    "base model, place right": 0.7,
    "prompts, matched above shuffled, standard errors": 3,
    "q(data) - q(base), screen": 0.1,
    "q(data) - q(base), confirm": 0.1,
}


def gates(output_dir: Path) -> bool:
    figures = measure_gates(output_dir)
    for name, value in figures.items():
        least = GATES.get(name)
        verdict = "" if least is None else f"   at least {least}: {'ok' if value >= least else 'NOT REACHED'}"
        print(f"{name:52s} {value:8.3f}{verdict}")
    return all(figures[name] >= least for name, least in GATES.items())


# Trials


def make_study(output_dir: Path) -> None:
    """A study with its reference and one trial, and what the base model makes of the many prompts."""
    if not (output_dir / "trial_0000" / "metrics.json").is_file():
        search_in(output_dir, output_dir.name, trials=1)
    run(output_dir / "trial_0000", sys.executable, HERE / "wide.py", output_dir / "reference")


def search_in(output_dir: Path, world: str, trials: int, seed: int = 42, *more: object) -> None:
    """Run the search itself, or go on with it."""
    inputs = output_dir / "inputs"
    make_world(world, inputs)
    files = {"--dataset-config": "dataset.toml", "--base-model": "base_model", "--training-config": "training.toml",
             "--scoring-config": "scoring.toml"}  # fmt: skip
    command = [sys.executable, SCRIPT, *(word for flag, file in files.items() for word in (flag, inputs / file))]
    command += [
        "--sd-scripts",
        demo_world.SMALL_TRAINER,
        "--trainer-python",
        sys.executable,
        "--device",
        "cpu",
        "--seed",
        seed,
    ]
    command += ["--subject", demo_world.SUBJECT, "--n-trials", trials, "--output-dir", output_dir, *more]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def try_out(output_dir: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Train and score one setting in a folder of its own, or read what was found before."""
    folder = output_dir / name
    if not (folder / "seconds.json").is_file():  # written last
        config = toml.loads((output_dir / "trial_0000" / "config.toml").read_text(encoding="utf-8"))
        for path in ("output_dir", "logging_dir"):
            config[path] = config[path].replace("trial_0000", name)
        folder.mkdir(exist_ok=True)
        changes = {**(MIDDLE if family_of(output_dir) is search.SD1 else {}), **changes}
        (folder / "config.toml").write_text(toml.dumps({**config, **changes}), encoding="utf-8")
        search.write_json(folder / "params.json", changes)
        started = time.monotonic()
        if not (folder / f"{search.LORA_NAME}.safetensors").is_file():
            trainer = demo_world.SMALL_TRAINER / family_of(output_dir).script
            run(folder, sys.executable, trainer, "--config_file", folder / "config.toml")
        trained = time.monotonic()
        run(folder, sys.executable, "-c", SCORE, folder)
        if search.read_json(folder / "metrics.json")["outcome"] == "scored":
            run(folder, sys.executable, HERE / "wide.py", folder)
        seconds = {"training": trained - started, "scoring": time.monotonic() - trained}
        (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    metrics = search.read_json(folder / "metrics.json")
    return {"name": name, **{key: metrics[key] for key in ("outcome", "score", "terms", "best_epoch", "checkpoint")}}


def family_of(output_dir: Path) -> search.Family:
    """By the folder's name, which is its world's."""
    return search.FAMILIES[WORLDS[output_dir.name].family]


def run(folder: Path, *command: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        subprocess.run(list(map(str, command)), stdout=log, stderr=log, env=environment, check=True)


def try_all(output_dir: Path, settings: Iterable[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """In the order of `settings`, one at a time for each core; prints each."""
    return [describe(result) for result in at_once(lambda one: try_out(output_dir, *one), settings)]


def at_once(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """What `work` makes of the items, in their order, one at a time for each core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(work, list(items))


def describe(result: dict[str, Any]) -> dict[str, Any]:
    if result["outcome"] != "scored":
        print(f"{result['name']:28s} {result['outcome']}", flush=True)
        return result
    terms = "  ".join(f"{name[:6]} {result['terms'][name]:.3f}" for name in TERMS)
    print(f"{result['name']:28s} {result['score']:.4f}  {terms}", flush=True)
    return result


# The ladder and the truth

LADDER = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
MORE_SEEDS = (0.01, 1.0, 100.0)


def ladder(output_dir: Path) -> bool:
    """Print the score at multiples of the V2.1 range's middle; whether it is best at 1, or next to it, by the means."""
    names = [(factor, seed) for factor in LADDER for seed in ((42, 43, 44) if factor in MORE_SEEDS else (42,))]
    results = try_all(output_dir, [(f"ladder_{f:g}_seed{s}", scaled(f, s)) for f, s in names])
    scores: dict[float, list[float]] = {}
    for (factor, _), result in zip(names, results, strict=True):
        scores.setdefault(factor, []).append(result["score"] or 0.0)
    means = {factor: float(np.mean(found)) for factor, found in scores.items()}
    print("\n".join(f"{factor:8g} x  score {mean:.4f}" for factor, mean in means.items()))
    best = max(means, key=means.__getitem__)
    print(f"best at {best:g} x")
    return best in (0.3, 1.0, 3.0)


def scaled(factor: float, seed: int) -> dict[str, Any]:
    rates = {name: MIDDLE[name] * factor for name in RATES}
    return {**rates, "seed": seed}


# The README's picture


def strip(output_dir: Path) -> bool:
    """strip.png beside this file: the data set, and on the same prompts and seeds the base model and the best LoRA."""
    from PIL import ImageDraw

    best = search.read_json(output_dir / "results" / "best_parameters.json")
    names = [f"p{prompt:02d}-s0.png" for prompt in range(8)]
    data = sorted((output_dir / "inputs" / "images").glob("*.png"))[: len(names)]
    rows = {
        "data set": data,
        "base model": [output_dir / "reference" / "confirm" / name for name in names],
        "best LoRA": [output_dir / f"trial_{best['trial']:04d}" / "scores" / "confirm" / name for name in names],
    }
    side, label = 3 * scenes.SIDE, 84
    picture = Image.new("RGB", (label + len(names) * (side + 4), len(rows) * (side + 4)), "white")
    for row, (name, files) in enumerate(rows.items()):
        ImageDraw.Draw(picture).text((6, row * (side + 4) + side / 2 - 6), name, fill="black")
        for column, file in enumerate(files):
            shown = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            picture.paste(shown, (label + column * (side + 4), row * (side + 4) + 2))
    picture.quantize(256, dither=Image.Dither.NONE).save(HERE / "strip.png", optimize=True)
    return True


SEEDS_OF_ONE = tuple(range(101, 107))


def truth(output_dir: Path) -> bool:
    """Print the rank correlation of score and judge over 20 or 30 settings, and the middle world's spread and noise."""
    rng = random.Random(11)
    settings, middle = feasible(output_dir, 30), output_dir.name == "middle"
    inside = [(f"truth_v21_{n:02d}", setting) for n, setting in enumerate(settings[: 20 if middle else 12])]
    outside = [(f"truth_far_{n:02d}", {**setting, **far(rng, setting)}) for n, setting in enumerate(settings[20:])]
    outside = outside if middle else outside[:8]
    scored = [result for result in try_all(output_dir, inside + outside) if result["outcome"] == "scored"]
    agreement = {stage: print_agreement(output_dir, stage, scored) for stage in (STAGE, wide.STAGE)}
    if not middle:
        return agreement[wide.STAGE] >= 0.8
    low, high = np.percentile([r["score"] for r in scored if "v21" in r["name"]], (5, 95))
    seeds = [r["score"] for r in try_all(output_dir, map(again, SEEDS_OF_ONE))]
    noise = float(np.std(seeds, ddof=1))
    print(f"scores inside V2.1, 5th to 95th percentile {low:.4f} to {high:.4f}; standard deviation over "
          f"{len(seeds)} training seeds of one setting {noise:.4f}; ratio {(high - low) / noise:.2f}")  # fmt: skip
    return agreement[wide.STAGE] >= 0.9


PAIRS = (("fidelity", "character"), ("text", "text"), ("preservation", "plain"))  # of our terms and the judge's


def print_agreement(output_dir: Path, stage: str, scored: list[dict[str, Any]]) -> float:
    """Rank correlations (Spearman) with the judge on a stage's pictures; the present score's over all trainings."""
    confirmation = Confirmation(output_dir, stage)
    found = {result["name"]: confirmation.of_trial(output_dir / result["name"]) for result in scored}
    search.write_json(output_dir / f"judged_{stage}.json", {name: vars(judged) for name, judged in found.items()})
    several = {
        "all": list(found.values()),
        "those within the space": [judged for name, judged in found.items() if "v21" in name],
    }
    for name, some in several.items():
        overall = [judged.judge["overall"] for judged in some]
        said = [f"{of} {rank_correlation([j.scores[of] for j in some], overall):.3f}" for of in DEFINITIONS]
        for ours, theirs in PAIRS:
            x, y = [j.terms[ours] for j in some], [j.judge[theirs] for j in some]
            said.append(f"{ours} {rank_correlation(x, y):.3f} (pairs {right_pairs(x, y):.3f})")
        print(f"{output_dir.name}, {stage} ({len(confirmation.jobs)} pictures), {len(some)} trainings {name}: "
              + "  ".join(said), flush=True)  # fmt: skip
    every = several["all"]
    return rank_correlation([j.scores[PRESENT] for j in every], [j.judge["overall"] for j in every])


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's rho; ties get their mean rank. NaN where one of them does not vary."""

    def ranks(values: list[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def right_pairs(x: list[float], y: list[float]) -> float:
    """Share of the pairs that y tells apart which x puts in the same order; half of one where x does not vary."""
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for a, b in itertools.combinations(zip(x, y, strict=True), 2)]
    told = [(1 + ours * theirs) / 2 for ours, theirs in signs if theirs]
    return float(np.mean(told)) if told else math.nan


def feasible(output_dir: Path, count: int) -> list[dict[str, Any]]:
    """What the program itself would propose before it has learnt anything, each with a training seed of its own."""
    data_set = demo_world.read_data_set(output_dir / "inputs" / "dataset.toml", {"cache_latents": True})
    file = family_of(output_dir).search_space
    space = search.SearchSpace.read(demo_world.CONFIGS / file) if file else search.V2_1
    sampler = search.FeasibleTPESampler(
        11,
        space,
        can_train=lambda params: params.get("optimizer_type") != "AdamW8bit",
        prefers=lambda params: params["lr_warmup_steps"] < data_set.updates(params),
    )
    study = optuna.create_study(sampler=sampler)
    proposals = [search.suggest_hyperparameters(study.ask(), space) for _ in range(count)]
    return [
        {**{name: value for name, value in params.items() if name != "network_alpha_ratio"}, "seed": 100 + number}
        for number, params in enumerate(proposals)
    ]


def far(rng: random.Random, setting: Mapping[str, Any]) -> dict[str, float]:
    """The setting's learning rates from a hundredth to a hundred times the V2.1 range's."""
    factor = log_uniform(rng, 0.01, 100)
    return {name: MIDDLE[name] * factor for name in RATES if name in setting}


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


# Flaws, noise, and definitions of the score that compete


def flaws(output_dir: Path) -> bool:
    """Print what the score takes off for each flaw; whether each costs more than twice the confirmation's noise."""
    confirmation = Confirmation(output_dir)
    found = judge_flaws(confirmation)
    deviation = known_noise(output_dir).get("default", {}).get(PRESENT, (0.0, DEVIATION))[1]
    print(f"{'':34s}  score  {'  '.join(f'{name[:6]:6s}' for name in TERMS)}  judge  loss in standard deviations")
    for name, judged in found.items():
        terms = "  ".join(f"{judged.terms[term]:6.3f}" for term in TERMS)
        loss = (found["right"].scores[PRESENT] - judged.scores[PRESENT]) / deviation
        told = judged.judge["overall"]
        print(f"{name:34s} {judged.scores[PRESENT]:6.3f}  {terms}  {told:5.2f}  {loss:6.1f}", flush=True)
    print(f"standard deviation {deviation:.4f}")
    return not too_cheap(found, PRESENT, deviation)


def judge_flaws(confirmation: Confirmation) -> dict[str, Judged]:
    jobs, world = confirmation.jobs, confirmation.world
    return {name: confirmation.judged(confirmation.shown(flaw(jobs, world))) for name, flaw in FLAWS.items()}


LEAST_LOSS = 2.0  # standard deviations
DEVIATION = 0.046  # of a confirmation, as `noise` found it with the default counts
KNOWN_CHEAP = {"ears missing", "ears purple"}  # flaws that cost less: this world's DINOv2 hardly sees ears


def too_cheap(found: Mapping[str, Judged], definition: str, deviation: float) -> list[str]:
    """Flaws that cost less than LEAST_LOSS."""
    best = found["right"].scores[definition]
    return [
        name
        for name, judged in found.items()
        if name != "right" and best - judged.scores[definition] <= LEAST_LOSS * deviation
    ]


def noise(output_dir: Path) -> bool:
    """Print and keep how far a middling LoRA's value moves, by definition: over prompts and seeds, over trainings.

    Beside it stands the mean standard error that a report would show.
    """
    confirmation = Confirmation(output_dir)
    first = try_out(output_dir, *again(SEEDS_OF_ONE[0]))
    pool = Pool(confirmation, output_dir / first["name"] / first["checkpoint"], output_dir / "noise")
    settings = {"demo": output_dir / "inputs" / "scoring.toml", "default": demo_world.CONFIGS / "scoring.toml"}
    counts = {name: search.ScoringSettings.read(path).confirm for name, path in settings.items()}
    known = {name: pool.spread(each) for name, each in counts.items()}
    search.write_json(output_dir / NOISE_FILE, known)
    results = [try_out(output_dir, *again(seed)) for seed in SEEDS_OF_ONE]
    trained = [confirmation.of_trial(output_dir / result["name"]) for result in results]
    known["trainings"] = {name: mean_and_deviation([judged.scores[name] for judged in trained]) for name in DEFINITIONS}
    for what, found in known.items():
        said = "  ".join(f"{name}: {mean:.3f} +- {deviation:.4f}" for name, (mean, deviation) in found.items())
        print(f"{what:10s} {said}")
    for name, each in counts.items():
        shown = float(np.mean(pool.standard_errors(each)))
        print(f"{name:10s} mean of the standard errors shown {shown:.4f}, true deviation {known[name][PRESENT][1]:.4f}")
    return True


def again(seed: int) -> tuple[str, dict[str, Any]]:
    """The middle of the search space, trained with this seed."""
    return f"truth_again_{seed}", {"seed": seed}


NOISE_FILE = "noise.json"


def known_noise(output_dir: Path) -> dict[str, dict[str, tuple[float, float]]]:
    return search.read_json(output_dir / NOISE_FILE) or {}


def pictures_of(confirmation: Confirmation, folder: Path) -> list[Image.Image]:
    return read_pictures(folder / "scores" / STAGE, confirmation.jobs)


def final(output_dir: Path) -> bool:
    """Print how well simulated studies choose, with and without the final stage; whether it meets its aims."""
    confirmation = Confirmation(output_dir)
    folders = [folder for folder in scored_trials(output_dir) if "v21" in folder.name]
    found = [confirmation.value(pictures_of(confirmation, folder)) for folder in folders]
    noises = [noise_of(images, error) for _, error, images in found]
    settings = search.ScoringSettings.read(demo_world.CONFIGS / "scoring.toml")
    counts = {"confirm": (settings.confirm["prompts"], settings.confirm["seeds"])}
    counts["final"] = (settings.final["prompts"], settings.final["seeds"] * len(search.FINAL_ROUNDS))
    for stage, (prompts, seeds) in counts.items():
        deviation = float(np.median([one.deviation(prompts, seeds) for one in noises]))
        print(f"standard deviation of a value, {stage} ({prompts} x {seeds}): {deviation:.4f}")
    picked = simulate([score for score, _, _ in found], noises, counts)
    for name, one in picked.items():
        said = f"regret {one.regret:.4f}, truly best {one.truly_best:.0%}, overstated by {one.overstated:.4f}"
        print(f"{name:13s} {said}")
    return picked["final stage"].regret <= 0.015 and picked["final stage"].truly_best >= 0.55


STUDY_SEEDS, STUDY_TRIALS = range(1, 6), 12


def studies(output_dir: Path) -> bool:
    """Print what the winners of whole studies are worth on many other pictures, with and without the final stage."""
    folders = [output_dir.with_name(f"study_{seed}") for seed in STUDY_SEEDS]

    def whole(folder: Path) -> None:
        search_in(folder, output_dir.name, STUDY_TRIALS, int(folder.name.removeprefix("study_")))
        for trial in [folder / "reference", *kept_trials(folder)]:
            run(folder, sys.executable, HERE / "wide.py", trial)

    list(at_once(whole, folders))
    gains = [print_study(folder) for folder in folders]
    mean, deviation = mean_and_deviation(gains)
    print(f"gained by the final stage: {mean:.4f} +- {deviation / math.sqrt(len(gains)):.4f}")
    return mean >= 0


def earlier(output_dir: Path) -> bool:
    """Print how soon studies of the biased world are near their best, with a middle world's search enqueued or not."""
    known, trials = output_dir.with_name("earlier"), 8
    search_in(known, "middle", STUDY_TRIALS, 1)
    arms = {"alone": [], "three best first": ["--enqueue", known]}
    studies = [
        (output_dir.with_name(f"biased {seed} {arm}"), seed, more) for seed in (1, 2, 3) for arm, more in arms.items()
    ]
    list(at_once(lambda study: search_in(study[0], "biased", trials, study[1], *study[2]), studies))
    for alone, enqueued in zip(studies[::2], studies[1::2], strict=True):
        values = [[trial["score"] or 0.0 for trial in trials_of(study[0])] for study in (alone, enqueued)]
        best = max(map(max, values))
        for study, found in zip((alone, enqueued), values, strict=True):
            near = next((number for number, value in enumerate(found, 1) if value >= 0.95 * best), math.inf)
            print(f"{study[0].name:26s} within 5% after {near:g}: {' '.join(f'{value:.3f}' for value in found)}")
    return True


def trials_of(output_dir: Path) -> list[dict[str, Any]]:
    study = search.load_study(search.default_storage(output_dir), search.DEFAULT_STUDY_NAME)
    assert study is not None
    return [search.facts_of(trial) for trial in study.get_trials(deepcopy=False)]


def print_study(folder: Path) -> float:
    """What the final stage's choice is worth more than the confirmation's."""
    confirmation = Confirmation(folder, wide.STAGE)
    trials = kept_trials(folder)
    told = {trial.name: search.read_json(trial / "metrics.json")["score"] for trial in trials}
    found = {trial.name: confirmation.of_trial(trial) for trial in trials}
    worth = {name: judged.scores[PRESENT] for name, judged in found.items()}
    decided = f"trial_{search.read_json(folder / 'results' / 'best_parameters.json')['trial']:04d}"
    picked = {
        "confirmation": max(told, key=told.__getitem__),
        "final stage": decided,
        "best": max(worth, key=worth.__getitem__),
    }
    for how, name in picked.items():
        judged = found[name].judge["overall"]
        print(f"{folder.name}  {how:12s} {name}  told {told[name]:.3f}, worth {worth[name]:.3f}, judge {judged:.3f}")
    return worth[decided] - worth[picked["confirmation"]]


def candidates(output_dir: Path) -> bool:
    """Print what each definition takes off for each flaw, in standard deviations."""
    confirmation = Confirmation(output_dir)
    found, known = judge_flaws(confirmation), known_noise(output_dir)
    passed = [print_losses(found, {name: known[counts][name][1] for name in DEFINITIONS}, counts) for counts in COUNTS]
    print_row("right, score", lambda name: found["right"].scores[name])
    return any(passed)


COUNTS = ("demo", "default")  # of pictures in a confirmation


def print_losses(found: Mapping[str, Judged], deviations: Mapping[str, float], counts: str) -> bool:
    """Whether a definition makes every flaw cost enough."""
    print(f"{counts + ' counts':34s}  {'  '.join(f'{name:>10s}' for name in DEFINITIONS)}  judge")
    for flaw, judged in found.items():
        losses = [(found["right"].scores[name] - judged.scores[name]) / deviations[name] for name in DEFINITIONS]
        print(f"{flaw:34s}  {'  '.join(f'{loss:10.1f}' for loss in losses)}  {judged.judge['overall']:5.2f}")
    print_row("standard deviation", lambda name: deviations[name])
    cheap = {name: too_cheap(found, name, deviations[name]) for name in DEFINITIONS}
    print("\n".join(f"too cheap in {name}: {', '.join(flaws) or 'none'}" for name, flaws in cheap.items()))
    return not all(cheap.values())


def print_row(what: str, value: Callable[[str], float]) -> None:
    print(f"{what:34s}  {'  '.join(f'{value(name):10.3f}' for name in DEFINITIONS)}")


def scored_trials(output_dir: Path) -> list[Path]:
    """Folders of trials whose confirmation is there."""
    found = sorted(output_dir.glob("*/metrics.json"))
    return [file.parent for file in found if search.read_json(file)["outcome"] == "scored"]


def kept_trials(output_dir: Path) -> list[Path]:
    """Those whose LoRA is there: the search keeps the ten best ones'."""
    found = scored_trials(output_dir)
    return [folder for folder in found if (folder / search.read_json(folder / "metrics.json")["checkpoint"]).is_file()]


COMMANDS = {
    "gates": gates, "ladder": ladder, "truth": truth, "strip": strip,
    "flaws": flaws, "noise": noise, "final": final, "studies": studies, "earlier": earlier,
    "candidates": candidates,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(COMMANDS))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/small_world"))
    parser.add_argument("--world", choices=tuple(WORLDS), help="default: middle; of truth, all of them")
    args = parser.parse_args()
    output_dir = args.output_dir.resolve()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    held = []
    for world in [args.world] if args.world else WORLDS if args.what == "truth" else ["middle"]:
        where = output_dir if args.what == "strip" else output_dir / world
        if args.what not in ("strip", "earlier"):
            make_study(where)
        held.append(COMMANDS[args.what](where))
    print("holds" if all(held) else "does NOT hold")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
