"""How many proposals are rejected, and which alpha ratios get trained: beside suggest-then-reject, and beside V1.

    python tests/benchmark_sampler.py [--seeds 30] [--trials 20]

The same made-up objective and the same seeds for all three; nothing is trained. Suggest-then-reject is the
implementation guide's: Optuna's own TPE, and a rejected proposal is pruned. V1 had no constraints: its share
of rejected proposals is what V2.1's constraints say of them, and all of them count as trained.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import optuna_hyperparameter_search as search

Params = dict[str, Any]


def suggest_v1(trial: optuna.Trial) -> Params:
    """V1's search space: absolute alphas, wide learning rates, Lion, short trainings."""
    params: Params = {
        "learning_rate": trial.suggest_float("learning_rate", 5e-5, 2e-4, log=True),
        "text_encoder_lr": trial.suggest_float("text_encoder_lr", 3e-5, 1e-4, log=True),
        "network_dim": trial.suggest_categorical("network_dim", [64, 96, 128, 192, 256]),
        "network_alpha": trial.suggest_categorical("network_alpha", [32, 48, 64, 96, 128]),
        "optimizer_type": trial.suggest_categorical("optimizer_type", ["AdamW", "AdamW8bit", "Lion"]),
        "max_train_epochs": trial.suggest_categorical("max_train_epochs", [8, 10, 12, 15]),
        "lr_scheduler": trial.suggest_categorical("lr_scheduler", ["cosine", "cosine_with_restarts", "polynomial"]),
        "gradient_accumulation_steps": trial.suggest_categorical("gradient_accumulation_steps", [1, 2, 4]),
        "lr_warmup_steps": trial.suggest_int("lr_warmup_steps", 50, 200, step=50),
    }
    params["network_alpha"] = min(params["network_alpha"], params["network_dim"])
    params["network_alpha_ratio"] = params["network_alpha"] / params["network_dim"]
    return params


@dataclass(frozen=True)
class Contender:
    name: str
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    suggest: Callable[[optuna.Trial], Params]
    trains_rejected: bool = False


@dataclass
class Tally:
    proposed: int = 0
    rejected: int = 0
    worst: float = 0.0  # largest share rejected in one study
    bands: Counter[str] = field(default_factory=Counter)
    best: list[float] = field(default_factory=list)
    seconds: float = 0.0


def plain_tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


CONTENDERS = (
    Contender("FeasibleTPESampler", search.FeasibleTPESampler, search.suggest_hyperparameters),
    Contender("suggest, then reject", plain_tpe, search.suggest_hyperparameters),
    Contender("V1 (no constraints)", plain_tpe, suggest_v1, True),
)


def value(params: Mapping[str, Any]) -> float:
    """A smooth hill in [0, 1] with its top at ratio 0.6, learning rates 8e-5 and 5e-5, and dim 128."""
    distance = (params["network_alpha_ratio"] - 0.6) ** 2 * 4
    distance += math.log(params["learning_rate"] / 8e-5) ** 2 + math.log(params["text_encoder_lr"] / 5e-5) ** 2
    distance += math.log2(params["network_dim"] / 128) ** 2 / 8
    return math.exp(-distance)


def band(ratio: float) -> str:
    """The guide's bands; what lies between two of them belongs to the middle one."""
    return "low" if ratio <= 0.4 + 1e-9 else "high" if ratio >= 0.75 - 1e-9 else "mid"


def run_study(contender: Contender, seed: int, trials: int, tally: Tally) -> None:
    study = optuna.create_study(sampler=contender.sampler(seed), direction="maximize")
    rejected = 0
    values = []
    for _ in range(trials):
        started = time.perf_counter()
        trial = study.ask()
        params = contender.suggest(trial)
        tally.seconds += time.perf_counter() - started
        valid, _ = search.check_safety_constraints(params)
        rejected += not valid
        if valid or contender.trains_rejected:
            tally.bands[band(params["network_alpha_ratio"])] += 1
            values.append(value(params))
            study.tell(trial, values[-1])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    tally.proposed += trials
    tally.rejected += rejected
    tally.worst = max(tally.worst, rejected / trials)
    tally.best.append(max(values, default=0.0))


def row(name: str, tally: Tally) -> str:
    trained = max(sum(tally.bands.values()), 1)
    shares = "  ".join(f"{tally.bands[name] / trained:5.1%}" for name in ("low", "mid", "high"))
    return (
        f"{name:<22}{tally.rejected / tally.proposed:7.1%}  {tally.worst:7.1%}   {shares}  "
        f"{sum(tally.best) / len(tally.best):6.3f}  {1000 * tally.seconds / tally.proposed:6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the samplers; nothing is trained.")
    parser.add_argument("--seeds", type=int, default=30, help="studies, with seeds from 0 on (default 30)")
    parser.add_argument("--trials", type=int, default=20, help="proposals in each study (default 20)")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.trials < 1:
        parser.error("--seeds and --trials must be from 1 on")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"Optuna {optuna.__version__}, {arguments.seeds} seeds x {arguments.trials} proposals")
    print(f"{'':<22}{'rejected':>7} {'worst':>8}  {'of the trained: low':>19}  {'mid':>4}  {'high':>5}", end="")
    print(f"  {'best':>6}  {'ms':>6}")
    for contender in CONTENDERS:
        tally = Tally()
        for seed in range(arguments.seeds):
            run_study(contender, seed, arguments.trials, tally)
        print(row(contender.name, tally), flush=True)
    print(f"{'the guide promises':<22}{'< 10%':>7}  {'':>7}   {'30%':>5}  {'40%':>5}  {'30%':>5}")


if __name__ == "__main__":
    main()
