"""Optimizers, by the names of sd-scripts' library/train_util.py."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
from typing import Any

PACKAGES = {"lion": ("lion_pytorch", "Lion"), "prodigy": ("prodigyopt", "Prodigy")}

log = logging.getLogger("trainer")


def get_optimizer(args: argparse.Namespace, trainable_params: list[dict[str, Any]]) -> tuple[str, str, Any]:
    """Name, arguments and the optimizer. ImportError without its package; optimizer_args are texts like "eps=1e-8"."""
    name, given = args.optimizer_type, dict(one.split("=", 1) for one in args.optimizer_args or ())
    package, kind = PACKAGES.get(name.lower(), ("bitsandbytes" if "8bit" in name.lower() else "torch", name))
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ImportError(f"No {package} / {package} がインストールされていないようです") from None
    options = {key: ast.literal_eval(value) for key, value in given.items()}
    log.info("use %s optimizer | %s", name, options)
    optimizer = getattr(getattr(module, "optim", module), kind)(trainable_params, lr=args.learning_rate, **options)
    return (
        f"{type(optimizer).__module__}.{kind}",
        ",".join(f"{key}={value}" for key, value in options.items()),
        optimizer,
    )
