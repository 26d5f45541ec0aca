"""Asks sd-scripts what it would train; optuna_hyperparameter_search.py runs this in the trainer's Python.

    python kohya_probe.py SCRIPT CONFIG ANSWER OPTIMIZERS

Runs a training script of kohya-ss/sd-scripts, `SCRIPT --config_file CONFIG`, until it asks for the card, and writes to
the file ANSWER, as JSON, what the script would train. kohya's own code reads options, data set and captions, and stops
at what it refuses; this file only records it. Then kohya makes each optimizer of the JSON file OPTIMIZERS, a list of
tables of options. Nothing else is written.

    missing     packages that are not installed; if there are any, the answer may have no other key
    torch, card, cards, bitsandbytes, packages    the trainer's Python: PyTorch's version, the first card's name, the
                number of cards, whether bitsandbytes works, the folder of packages with its time of change
    options     {name: {kind, choices, is_list}} of the script's parser
    keys        names that a data set's file may hold
    images      path, captions (as trained), has_caption, is_reg, size, bucket, latents (a file), arrays (in it)
    batches     in an epoch
    trusted     which cached latents kohya takes: "plain" arrays of any size, "sized" ones (latents_64x64)
    said        [level, message] of warnings and errors in kohya's log
    stopped     [[place in the data set's file, message]] of what ended the script before the card
    optimizers  [optimizer_type, message] of those that kohya can't make
    unknown     the error that a part of sd-scripts raised here, which has probably been renamed
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import random
import re
import runpy
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "toml")
found: dict[str, Any] = {"said": []}
kohya: dict[str, Any] = {}  # its own objects: "args" and "group"


class Reached(BaseException):
    """The script has read its inputs and asks for the card."""


def ask_for_card(*_args: Any, **_kwargs: Any) -> None:
    raise Reached


def describe_python() -> None:
    import torch

    folder = sysconfig.get_paths()["purelib"]
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    cards = torch.cuda.device_count() if card else 0
    found.update(torch=torch.__version__, card=card, cards=cards, packages=[folder, Path(folder).stat().st_mtime_ns])
    try:
        found["bitsandbytes"] = bool(card and __import__("bitsandbytes"))
    except Exception:  # it raises all sorts where it finds no CUDA library
        found["bitsandbytes"] = False


def listen_to_log() -> None:
    make_record = logging.getLogRecordFactory()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            found["said"].append((record.levelname, record.getMessage()))
        return record

    logging.setLogRecordFactory(make)


def listen_to_parser() -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        options = [action for action in parser._actions if action.option_strings]
        found["options"] = {action.option_strings[-1].lstrip("-"): describe_option(action) for action in options}
        found["options"].get("lr_scheduler", {})["choices"] = names_of_schedulers()
        kohya["args"] = parse_args(parser, *args, **kwargs)
        found["options"].get("network_args", {})["choices"] = names_of_network_args()
        return kohya["args"]

    argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign, assignment]


def names_of_schedulers() -> list[str]:
    """What kohya makes a schedule of, by the lists that it has imported; its parser takes any text."""
    modules = (sys.modules.get(name) for name in ("transformers.trainer_utils", "diffusers.optimization"))
    names = [kind.value for module in modules for kind in getattr(module, "SchedulerType", ())]
    return [*dict.fromkeys(names), "adafactor"] if names else []


def names_of_network_args() -> list[str]:
    """Which arguments kohya's own LoRA reads, by its source; it takes any. [] for another network."""
    file = Path(sys.argv[0]).parent / "networks" / "lora.py"
    if getattr(kohya["args"], "network_module", None) != "networks.lora" or not file.is_file():
        return []
    return sorted(set(re.findall(r"kwargs\.get\(\s*[\"'](\w+)", file.read_text(encoding="utf-8"))))


def describe_option(action: argparse.Action) -> dict[str, Any]:
    kind = "switch" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    choices = [str(choice) for choice in action.choices or () if choice is not None]
    return {"kind": kind, "choices": choices, "is_list": action.nargs in ("*", "+")}


def listen_to_data_set() -> None:
    """Record the data set as soon as kohya has made it."""
    from library import config_util  # of sd-scripts

    sanitizer = config_util.ConfigSanitizer(True, True, True, True)
    schemas = (sanitizer.general_schema, sanitizer.db_dataset_schema, sanitizer.db_subset_schema)
    found["keys"] = sorted({str(key) for schema in schemas for key in schema})
    generate = config_util.generate_dataset_group_by_blueprint

    def make_group(blueprint: Any) -> Any:
        write_no_cache_of_metadata(blueprint)
        made = generate(blueprint)
        kohya["group"] = made[0] if isinstance(made, tuple) else made  # training and validation; before v0.10 one
        state, shuffle = random.getstate(), random.shuffle
        random.shuffle = lambda items: None  # type: ignore[assignment]
        try:
            found.update(
                images=describe_images(kohya["group"]), batches=len(kohya["group"]), trusted=find_trusted_caches()
            )
        except Exception as error:
            found["unknown"] = f"{type(error).__name__}: {error}"
        random.shuffle = shuffle
        random.setstate(state)
        return made

    config_util.generate_dataset_group_by_blueprint = make_group


def write_no_cache_of_metadata(blueprint: Any) -> None:
    """Turn cache_info off where it would write a file beside the pictures."""
    for subset in [subset.params for dataset in blueprint.datasets for subset in dataset.subsets]:
        if getattr(subset, "cache_info", False) and not (Path(subset.image_dir) / "metadata_cache.json").is_file():
            subset.cache_info = False


def describe_images(group: Any) -> list[dict[str, Any]]:
    path_of_cache, _ = caching()
    images = []
    for dataset in group.datasets:
        inner = getattr(dataset, "dreambooth_dataset_delegate", dataset)  # in a data set with masks
        for key, info in inner.image_data.items():
            subset = inner.image_to_subset[key]
            path = Path(info.absolute_path)
            if path.suffix == ".npz":  # metadata whose latents are cached already
                path = Path(subset.image_dir or "") / key
            needed = {"latents_flipped": subset.flip_aug, "alpha_mask": getattr(subset, "alpha_mask", False)}
            images.append(
                {
                    "path": str(path.absolute()),
                    "captions": captions_of(inner, subset, info.caption),
                    "has_caption": info.caption not in ("", getattr(subset, "class_tokens", None)),
                    "is_reg": info.is_reg,
                    "size": list(info.image_size),
                    "bucket": list(info.bucket_reso),
                    "latents": path_of_cache(info.absolute_path, info.image_size),
                    "arrays": ["latents", *[name for name, is_needed in needed.items() if is_needed]],
                }
            )
    return images


def captions_of(dataset: Any, subset: Any, caption: str) -> list[str]:
    """A caption as trained, or each of its lines. kohya splits and joins the tags; none is shuffled or dropped."""
    plain = copy.copy(subset)
    plain.shuffle_caption, plain.caption_prefix, plain.caption_suffix = True, None, None
    plain.caption_dropout_rate = plain.caption_tag_dropout_rate = plain.caption_dropout_every_n_epochs = 0
    plain.token_warmup_step = 0
    whole = " ".join(filter(None, (subset.caption_prefix, caption, subset.caption_suffix)))
    made = []
    for line in whole.split("\n") if subset.enable_wildcard else [whole]:
        random.seed(line)  # always draws the same of several alternatives
        made.append(dataset.process_caption(plain, line))
    return made


def caching() -> tuple[Callable[..., str], Callable[..., bool]]:
    """kohya's functions for the name of a cache of latents, and for whether it is as expected."""
    try:
        from library.strategy_base import LatentsCachingStrategy
    except ImportError:  # before v0.10
        from library.train_util import is_disk_cached_latents_is_expected

        return lambda path, _size: str(Path(path).with_suffix(".npz")), is_disk_cached_latents_is_expected
    strategy = LatentsCachingStrategy.get_strategy()
    return strategy.get_latents_npz_path, strategy.is_disk_cached_latents_expected


def find_trusted_caches() -> dict[str, bool]:
    """Whether kohya takes a cache of 1 x 1 latents where it expects 8 x 8, with plain and with sized names."""
    import numpy as np

    trusted = {}
    arrays = {"latents": np.zeros((4, 1, 1)), "original_size": np.array((8, 8)), "crop_ltrb": np.array((0, 0, 8, 8))}
    _, is_expected = caching()
    with tempfile.TemporaryDirectory() as folder:
        for kind, suffix in (("plain", ""), ("sized", "_8x8")):
            file = Path(folder) / f"{kind}.npz"
            np.savez(file, **{name + suffix: array for name, array in arrays.items()})
            trusted[kind] = bool(is_expected((64, 64), str(file), False, False))
    return trusted


def draw_an_epoch() -> None:
    """Draw all batches once. Without cached latents kohya reads the pictures at each step, and may stop at any."""
    if "group" not in kohya or kohya["args"].cache_latents:
        return
    try:
        if hasattr(kohya["group"], "set_current_strategies"):
            kohya["group"].set_current_strategies()
        for dataset in kohya["group"].datasets:
            for number in range(len(dataset)):
                dataset[number]
    except (AssertionError, ValueError, OSError) as error:
        found["stopped"] = describe_error(error)
    except Exception:  # this part of kohya may need a running training
        pass


def try_optimizers(tables: list[dict[str, Any]]) -> None:
    import torch

    if "args" not in kohya or not tables:
        return
    from library.train_util import get_optimizer  # of sd-scripts

    found["optimizers"] = []
    for options in tables:
        args = argparse.Namespace(**{**vars(kohya["args"]), **options})
        try:
            get_optimizer(args, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])
        except Exception as error:  # a package is missing, or an argument is unknown
            found["optimizers"].append([options["optimizer_type"], f"{type(error).__name__}: {error}"])


def missing_for_options() -> list[str]:
    """Packages that kohya imports only when it trains with these options."""
    args = kohya.get("args")
    module = str(getattr(args, "network_module", None))
    needed = {"lycoris": module.startswith("lycoris."), "xformers": getattr(args, "xformers", False)}
    missing = [name for name, is_needed in needed.items() if is_needed and importlib.util.find_spec(name) is None]
    return ["lycoris-lora" if name == "lycoris" else name for name in missing]


def describe_error(error: BaseException) -> list[Any]:
    parts = getattr(error, "errors", None)  # voluptuous lists all errors of a file
    if isinstance(parts, list):
        return [[list(part.path), str(part.msg)] for part in parts]
    if isinstance(error, (AssertionError, ValueError, OSError)) and str(error):
        return [[[], str(error)]]
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return [[[], f"{type(error).__name__}: {error} at `{line}`"]]


def run(script: str, config: str, optimizers: list[dict[str, Any]]) -> None:
    import accelerate

    describe_python()
    listen_to_log()
    listen_to_parser()
    accelerate.Accelerator.__init__ = ask_for_card
    sys.path.insert(0, str(Path(script).parent))
    try:
        listen_to_data_set()
    except (ImportError, AttributeError, TypeError) as error:
        found["unknown"] = f"{type(error).__name__}: {error}"
    sys.argv = [script, "--config_file", config]
    try:
        runpy.run_path(script, run_name="__main__")
    except Reached:
        draw_an_epoch()
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            found["stopped"] = describe_error(error)
    found["missing"] += missing_for_options()
    try_optimizers(optimizers)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    found["missing"] = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    _, script, config, answer, optimizers = sys.argv
    if not found["missing"]:
        run(script, config, json.loads(Path(optimizers).read_text(encoding="utf-8")))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
