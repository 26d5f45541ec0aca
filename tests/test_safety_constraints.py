"""The seven safety constraints: reasons word for word, and every bound on, just below and just above it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

import optuna_hyperparameter_search as search

LR_AND_8BIT = "High LR (>0.00012) + AdamW8bit = unstable"
ALPHA_IS_DIM = "Alpha ≈ Dim causes overfitting + instability"
DIM_NEEDS_EPOCHS = "High dim (≥256) needs ≥16 epochs for convergence"
LR_NEEDS_WARMUP = "High LR (>0.0001) needs ≥100 warmup steps"
LR_NEEDS_ACCUMULATION = "High LR needs gradient accumulation ≥2"
HIGH_ALPHA_NEEDS = "High alpha (≥0.75) requires: "
EXPLOSION = "Very high alpha (≥0.85) + LR >0.0001 = explosion risk"

SAFE: dict[str, Any] = {
    "learning_rate": 9e-5,
    "text_encoder_lr": 5e-5,
    "network_dim": 128,
    "network_alpha_ratio": 0.5,
    "network_alpha": 64,
    "optimizer_type": "AdamW",
    "max_train_epochs": 16,
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "lr_warmup_steps": 150,
}
# High alpha with everything that constraint 6 asks for.
HIGH = {**SAFE, "network_alpha_ratio": 0.8, "network_alpha": 102}


def reason(base: dict[str, Any] = SAFE, **changes: Any) -> str:
    """The rejection reason, "" for params that pass."""
    valid, why = search.check_safety_constraints({**base, **changes})
    assert type(valid) is bool
    assert valid == (why == "")
    return why


def below(bound: float) -> float:
    return float(np.nextafter(bound, -np.inf))


def above(bound: float) -> float:
    return float(np.nextafter(bound, np.inf))


def test_safe_params_pass() -> None:
    assert search.check_safety_constraints(SAFE) == (True, "")
    assert search.check_safety_constraints(HIGH) == (True, "")


@pytest.mark.parametrize(
    ("lr", "optimizer", "expected"),
    [
        (below(0.00012), "AdamW8bit", ""),
        (0.00012, "AdamW8bit", ""),
        (above(0.00012), "AdamW8bit", LR_AND_8BIT),
        (above(0.00012), "AdamW", ""),
    ],
)
def test_1_high_learning_rate_with_8bit_optimizer(lr: float, optimizer: str, expected: str) -> None:
    assert reason(learning_rate=lr, optimizer_type=optimizer) == expected


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (126, ""),
        (127, ""),
        (127.0, ""),
        (above(127.0), ALPHA_IS_DIM),
        (128, ALPHA_IS_DIM),
        (below(129.0), ALPHA_IS_DIM),
        (129, ""),
        (130, ""),
    ],
)
def test_2_alpha_within_one_of_dim(alpha: float, expected: str) -> None:
    assert reason(network_alpha=alpha) == expected


@pytest.mark.parametrize(
    ("dim", "epochs", "expected"),
    [
        (255, 15, ""),
        (256, 15, DIM_NEEDS_EPOCHS),
        (257, 15, DIM_NEEDS_EPOCHS),
        (256, 16, ""),
        (256, 17, ""),
        (255, 1, ""),
    ],
)
def test_3_high_dim_with_few_epochs(dim: int, epochs: int, expected: str) -> None:
    assert reason(network_dim=dim, max_train_epochs=epochs) == expected


@pytest.mark.parametrize(
    ("lr", "warmup", "expected"),
    [
        (below(0.0001), 99, ""),
        (0.0001, 99, ""),
        (above(0.0001), 99, LR_NEEDS_WARMUP),
        (above(0.0001), 100, ""),
        (above(0.0001), 101, ""),
        (0.0001, 0, ""),
    ],
)
def test_4_high_learning_rate_with_short_warmup(lr: float, warmup: int, expected: str) -> None:
    assert reason(learning_rate=lr, lr_warmup_steps=warmup) == expected


@pytest.mark.parametrize(
    ("accumulation", "lr", "expected"),
    [
        (1, below(0.00011), ""),
        (1, 0.00011, ""),
        (1, above(0.00011), LR_NEEDS_ACCUMULATION),
        (2, above(0.00011), ""),
        (4, above(0.00011), ""),
    ],
)
def test_5_high_learning_rate_without_accumulation(accumulation: int, lr: float, expected: str) -> None:
    assert reason(gradient_accumulation_steps=accumulation, learning_rate=lr) == expected


# What high alpha needs: change -> the words in the reason.
UNMET = {
    ("max_train_epochs", 15): "epochs >= 16",
    ("gradient_accumulation_steps", 1): "grad_accum >= 2",
    ("optimizer_type", "AdamW8bit"): "optimizer = AdamW",
    ("lr_warmup_steps", 149): "warmup >= 150",
}


@pytest.mark.parametrize(
    "changes", [set_ for size in range(1, 5) for set_ in itertools.combinations(UNMET.items(), size)]
)
def test_6_high_alpha_names_all_that_it_misses_in_order(changes: tuple[Any, ...]) -> None:
    params = dict(change for change, _ in changes)
    assert reason(HIGH, **params) == HIGH_ALPHA_NEEDS + ", ".join(words for _, words in changes)


@pytest.mark.parametrize(
    ("ratio", "high"), [(below(0.75), False), (0.75, True), (above(0.75), True), (0.7, False), (0.9, True)]
)
def test_6_high_alpha_begins_at_three_quarters(ratio: float, high: bool) -> None:
    expected = HIGH_ALPHA_NEEDS + "warmup >= 150" if high else ""
    assert reason(HIGH, network_alpha_ratio=ratio, lr_warmup_steps=149) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_train_epochs", 16),
        ("max_train_epochs", 17),
        ("gradient_accumulation_steps", 2),
        ("gradient_accumulation_steps", 3),
        ("lr_warmup_steps", 150),
        ("lr_warmup_steps", 151),
    ],
)
def test_6_high_alpha_passes_on_and_above_its_bounds(name: str, value: int) -> None:
    assert reason(HIGH, **{name: value}) == ""


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Lion", "adamw", "AdamW "])
def test_6_high_alpha_takes_no_optimizer_but_adamw(optimizer: str) -> None:
    assert reason(HIGH, optimizer_type=optimizer) == HIGH_ALPHA_NEEDS + "optimizer = AdamW"


@pytest.mark.parametrize(
    ("ratio", "lr", "expected"),
    [
        (below(0.85), above(0.0001), ""),
        (0.85, below(0.0001), ""),
        (0.85, 0.0001, ""),
        (0.85, above(0.0001), EXPLOSION),
        (above(0.85), above(0.0001), EXPLOSION),
        (0.9, 0.00012, EXPLOSION),
        (0.9, 0.0001, ""),
    ],
)
def test_7_very_high_alpha_with_high_learning_rate(ratio: float, lr: float, expected: str) -> None:
    assert reason(HIGH, network_alpha_ratio=ratio, learning_rate=lr) == expected


def test_the_first_broken_constraint_is_the_reason() -> None:
    params = {
        **SAFE,
        "learning_rate": 2e-4,
        "optimizer_type": "AdamW8bit",
        "network_dim": 256,
        "network_alpha": 256,
        "network_alpha_ratio": 0.9,
        "max_train_epochs": 12,
        "lr_warmup_steps": 50,
        "gradient_accumulation_steps": 1,
    }
    mends: list[tuple[str, dict[str, Any]]] = [
        (LR_AND_8BIT, {"optimizer_type": "AdamW"}),
        (ALPHA_IS_DIM, {"network_alpha": 230}),
        (DIM_NEEDS_EPOCHS, {"network_dim": 128, "network_alpha": 115}),
        (LR_NEEDS_WARMUP, {"lr_warmup_steps": 100}),
        (LR_NEEDS_ACCUMULATION, {"gradient_accumulation_steps": 2}),
        (HIGH_ALPHA_NEEDS + "epochs >= 16, warmup >= 150", {"max_train_epochs": 16, "lr_warmup_steps": 150}),
        (EXPLOSION, {"learning_rate": 0.0001}),
    ]
    for expected, mend in mends:
        assert reason(params) == expected
        params.update(mend)
    assert reason(params) == ""


def test_params_are_left_as_they_were() -> None:
    params = dict(HIGH)
    search.check_safety_constraints(params)
    assert params == HIGH


def specification(params: dict[str, Any]) -> tuple[bool, str]:
    """The implementation guide's function, as it stands there."""
    lr = params["learning_rate"]
    dim = params["network_dim"]
    alpha = params["network_alpha"]
    alpha_ratio = params["network_alpha_ratio"]
    optimizer = params["optimizer_type"]
    epochs = params["max_train_epochs"]
    grad_accum = params["gradient_accumulation_steps"]
    warmup = params["lr_warmup_steps"]

    # Constraint 1: High LR + 8bit optimizer
    if lr > 0.00012 and optimizer == "AdamW8bit":
        return False, "High LR (>0.00012) + AdamW8bit = unstable"

    # Constraint 2: Exact Alpha = Dim (avoid float comparison issues)
    if abs(alpha - dim) < 1:  # Within 1 of being equal
        return False, "Alpha ≈ Dim causes overfitting + instability"

    # Constraint 3: High Dim + Few Epochs
    if dim >= 256 and epochs < 16:
        return False, "High dim (≥256) needs ≥16 epochs for convergence"

    # Constraint 4: Very high LR + low warmup
    if lr > 0.0001 and warmup < 100:
        return False, "High LR (>0.0001) needs ≥100 warmup steps"

    # Constraint 5: Gradient Accumulation 1 + High LR
    if grad_accum == 1 and lr > 0.00011:
        return False, "High LR needs gradient accumulation ≥2"

    # Constraint 6: High memory (ratio >= 0.75) requires strong stability
    if alpha_ratio >= 0.75:
        required_checks = [
            ("epochs >= 16", epochs >= 16),
            ("grad_accum >= 2", grad_accum >= 2),
            ("optimizer = AdamW", optimizer == "AdamW"),  # No 8bit with high alpha
            ("warmup >= 150", warmup >= 150),
        ]

        failed_checks = [name for name, passed in required_checks if not passed]
        if failed_checks:
            return False, f"High alpha (≥0.75) requires: {', '.join(failed_checks)}"

    # Constraint 7: Very high alpha (>= 0.85) + high LR is dangerous
    if alpha_ratio >= 0.85 and lr > 0.0001:
        return False, "Very high alpha (≥0.85) + LR >0.0001 = explosion risk"

    return True, ""


def draw(rng: random.Random) -> dict[str, Any]:
    """Params inside and outside the search space, with the bounds themselves more often than chance has them."""
    dim = rng.choice([64, 96, 128, 192, 255, 256, 257, 512])
    ratio = rng.choice([rng.uniform(0.1, 1.1), round(0.05 * rng.randint(4, 21), 2), 0.75, 0.85, below(0.75), 1.0])
    bounds = [0.0001, 0.00011, 0.00012]
    return {
        "learning_rate": rng.choice(
            [rng.uniform(5e-5, 2e-4), *bounds, above(rng.choice(bounds)), below(rng.choice(bounds))]
        ),
        "text_encoder_lr": rng.uniform(3e-5, 1e-4),
        "network_dim": dim,
        "network_alpha_ratio": ratio,
        "network_alpha": rng.choice([int(dim * ratio)] * 6 + [dim, dim - 1, dim + 0.5]),
        "optimizer_type": rng.choice(["AdamW", "AdamW", "AdamW8bit", "Lion"]),
        "max_train_epochs": rng.choice([8, 12, 15, 16, 20]),
        "gradient_accumulation_steps": rng.choice([1, 2, 4]),
        "lr_warmup_steps": rng.choice([0, 50, 99, 100, 149, 150, 200]),
    }


def test_agrees_with_the_specification_on_20000_random_params() -> None:
    rng = random.Random(20251113)
    seen: Counter[str] = Counter()
    for _ in range(20_000):
        params = draw(rng)
        expected = specification(params)
        assert search.check_safety_constraints(params) == expected, params
        seen[expected[1].split(":")[0]] += 1
    assert len(seen) == 8, seen  # every constraint was met, and so was "none"
    assert min(seen.values()) > 100, seen
