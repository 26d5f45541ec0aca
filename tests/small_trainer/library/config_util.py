"""What a data set's file describes, under the names of sd-scripts' library/config_util.py.

Keys and types, captions, repeats, regularisation images, buckets and batches are kohya's: kohya_data_set.json and
test_real_kohya.py in tests/ hold them against the real ones. Left out: metadata_file, masks, validation, augmentation.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from .strategy_base import LatentsCachingStrategy

log = logging.getLogger("trainer")
IMAGE_EXTENSIONS = frozenset(".png .jpg .jpeg .webp .bmp .PNG .JPG .JPEG .WEBP .BMP".split())
METADATA_CACHE = "metadata_cache.json"
NAMES_IN_FILE = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}  # of options
DEFAULTS: dict[str, Any] = {
    "batch_size": 1, "num_repeats": 1, "caption_extension": ".caption", "caption_separator": ",", "keep_tokens": 0,
    "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64, "caption_dropout_rate": 0.0,
    "caption_tag_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0, "token_warmup_step": 0,
}  # fmt: skip

# Names and types of a subset's keys, of those that a data set takes too, and of a data set's own.
SUBSET = {
    **dict.fromkeys("shuffle_caption enable_wildcard color_aug flip_aug random_crop cache_info".split(), (bool,)),
    **dict.fromkeys("num_repeats keep_tokens token_warmup_min caption_dropout_every_n_epochs".split(), (int,)),
    **dict.fromkeys("token_warmup_step caption_dropout_rate caption_tag_dropout_rate".split(), (float, int)),
    **dict.fromkeys(
        "keep_tokens_separator secondary_separator caption_separator caption_prefix caption_suffix caption_extension "
        "class_tokens resize_interpolation".split(),
        (str,),
    ),
    "custom_attributes": (dict,),
    "face_crop_aug_range": (list,),
}
OWN = {"image_dir": (str,), "conditioning_data_dir": (str,), "is_reg": (bool,), "alpha_mask": (bool,)}
DATASET = {
    **dict.fromkeys("batch_size bucket_reso_steps max_bucket_reso min_bucket_reso validation_seed".split(), (int,)),
    **dict.fromkeys("bucket_no_upscale enable_bucket".split(), (bool,)),
    **dict.fromkeys("validation_split network_multiplier".split(), (float,)),
    "resolution": (int, list),
}


class Invalid(Exception):
    def __init__(self, path: Sequence[str | int], msg: str) -> None:
        super().__init__(f"{msg} @ {path}")
        self.path, self.msg = path, msg


class MultipleInvalid(Exception):
    def __init__(self, errors: list[Invalid]) -> None:
        super().__init__(str(errors[0]))
        self.errors = errors


class ConfigSanitizer:
    """Refuses keys and types that kohya's own would refuse; all of them at once."""

    def __init__(self, *_supported: bool) -> None:
        self.general_schema = {**DATASET, **SUBSET}
        self.db_dataset_schema = {**DATASET, **SUBSET, "subsets": (list,)}
        self.db_subset_schema = {**SUBSET, **OWN}

    def sanitize_user_config(self, config: dict[str, Any]) -> dict[str, Any]:
        errors = list(self._errors(config))
        if errors:
            log.error("Invalid user config")
            raise MultipleInvalid(errors)
        return config

    def _errors(self, config: dict[str, Any]) -> Iterator[Invalid]:
        yield from check(config, {"general": (dict,), "datasets": (list,)}, [])
        yield from check(config.get("general", {}), self.general_schema, ["general"])
        for number, dataset in enumerate(config.get("datasets", [])):
            yield from check(dataset, self.db_dataset_schema, ["datasets", number])
            for inner, subset in enumerate(dataset.get("subsets", [])):
                yield from check(subset, self.db_subset_schema, ["datasets", number, "subsets", inner])


def check(table: Mapping[str, Any], schema: Mapping[str, tuple[type, ...]], path: list[str | int]) -> Iterator[Invalid]:
    for key, value in table.items():
        place = [*path, key]
        kind = dict if isinstance(value, dict) else type(value)  # an inline table of the toml package is its own kind
        if key not in schema:
            yield Invalid(place, "extra keys not allowed")
        elif kind not in schema[key]:
            yield Invalid(place, f"expected {schema[key][0].__name__}")
        elif kind is list and key in ("resolution", "face_crop_aug_range"):
            inner = int if key == "resolution" else float
            if len(value) != 2 or any(type(item) is not inner for item in value):
                yield Invalid(place, f"expected {inner.__name__}")


def load_user_config(file: str | Path) -> dict[str, Any]:
    text = Path(file).read_text(encoding="utf-8")
    return json.loads(text) if str(file).endswith(".json") else toml.loads(text)


@dataclass
class Blueprint:
    dataset_group: DatasetGroupBlueprint


@dataclass
class DatasetGroupBlueprint:
    datasets: list[DatasetBlueprint]


@dataclass
class DatasetBlueprint:
    params: argparse.Namespace
    subsets: list[SubsetBlueprint]


@dataclass
class SubsetBlueprint:
    params: argparse.Namespace


class BlueprintGenerator:
    """The parameters of every data set and subset: its own, else inherited ones, the options', the defaults."""

    def __init__(self, sanitizer: ConfigSanitizer) -> None:
        self.sanitizer = sanitizer

    def generate(self, user_config: dict[str, Any], args: argparse.Namespace) -> Blueprint:
        config = self.sanitizer.sanitize_user_config(user_config)
        options = {NAMES_IN_FILE.get(name, name): value for name, value in vars(args).items() if value is not None}
        general = config.get("general", {})
        names = {**DATASET, **SUBSET, **OWN}
        datasets = []
        for dataset in config.get("datasets", []):
            subsets = [
                SubsetBlueprint(first_of(names, subset, dataset, general, options, DEFAULTS))
                for subset in dataset.get("subsets", [])
            ]
            datasets.append(DatasetBlueprint(first_of(names, dataset, general, options, DEFAULTS), subsets))
        return Blueprint(DatasetGroupBlueprint(datasets))


def first_of(names: Mapping[str, Any], *tables: Mapping[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(
        **{name: next((table[name] for table in tables if table.get(name) is not None), None) for name in names}
    )


@dataclass
class ImageInfo:
    absolute_path: str
    num_repeats: int
    caption: str
    is_reg: bool
    image_size: tuple[int, int]
    bucket_reso: tuple[int, int] = (0, 0)


class DreamBoothDataset:
    """One [[datasets]] table: its pictures in buckets, of which batches are made."""

    def __init__(self, params: argparse.Namespace, subsets: list[argparse.Namespace]) -> None:
        assert params.resolution is not None, "resolution is required"
        reso = params.resolution
        if isinstance(reso, str):  # an option's
            reso = [int(side) for side in reso.split(",")]
            reso = reso[0] if len(reso) == 1 else reso
        self.params = params
        self.width, self.height = reso if isinstance(reso, list) else (reso, reso)
        self.batch_size: int = params.batch_size
        self.subsets: list[argparse.Namespace] = []
        self.image_data: dict[str, ImageInfo] = {}
        self.image_to_subset: dict[str, argparse.Namespace] = {}
        if params.enable_bucket:
            self._check_bucket_limits()
        self._load(subsets)

    def _check_bucket_limits(self) -> None:
        p = self.params
        low = p.min_bucket_reso - p.min_bucket_reso % p.bucket_reso_steps
        high = math.ceil(p.max_bucket_reso / p.bucket_reso_steps) * p.bucket_reso_steps
        assert min(self.width, self.height) >= low, "min_bucket_reso must be equal or less than resolution"
        assert max(self.width, self.height) <= high, "max_bucket_reso must be equal or greater than resolution"
        p.min_bucket_reso, p.max_bucket_reso = low, high

    def _load(self, subsets: list[argparse.Namespace]) -> None:
        regs: list[tuple[str, ImageInfo, argparse.Namespace]] = []
        trained = 0
        for subset in subsets:
            if subset.num_repeats < 1:
                log.warning("ignore subset with image_dir='%s': num_repeats is less than 1", subset.image_dir)
                continue
            if subset.image_dir in [known.image_dir for known in self.subsets]:
                log.warning("ignore duplicated subset with image_dir='%s': use the first one", subset.image_dir)
                continue
            found = read_folder(subset)
            if not found:
                log.warning("ignore subset with image_dir='%s': no images found", subset.image_dir)
                continue
            self.subsets.append(subset)
            trained += 0 if subset.is_reg else subset.num_repeats * len(found)
            for info in found:
                if subset.is_reg:
                    regs.append((info.absolute_path, info, subset))
                else:
                    self.image_data[info.absolute_path] = info
                    self.image_to_subset[info.absolute_path] = subset
        self.num_train_images = trained
        self._add_regularisation(regs, trained)

    def _add_regularisation(self, regs: list[tuple[str, ImageInfo, argparse.Namespace]], missing: int) -> None:
        """With their own repeats, in order, until they are as many as the subject's; then one more of each in turn."""
        first_round = True
        while regs and missing > 0:
            for key, info, subset in regs:
                if first_round:
                    self.image_data[key], self.image_to_subset[key] = info, subset
                    missing -= info.num_repeats
                else:
                    info.num_repeats += 1
                    missing -= 1
                if missing <= 0:
                    break
            first_round = False

    def make_buckets(self) -> None:
        self.buckets: dict[tuple[int, int], list[str]] = {}
        for key, info in self.image_data.items():
            info.bucket_reso = self.select_bucket(info.image_size)
            self.buckets.setdefault(info.bucket_reso, []).extend([key] * info.num_repeats)

    def select_bucket(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the bucket: nearest aspect ratio of about the same area."""
        p, area = self.params, self.width * self.height
        if not p.enable_bucket:
            return self.width, self.height
        step = p.bucket_reso_steps
        if p.bucket_no_upscale:
            return bucket_without_upscale(size, area, step)
        low, high = p.min_bucket_reso, p.max_bucket_reso
        square = int(math.sqrt(area) // step) * step
        buckets = {(square, square)}
        for side in range(low, high + 1, step):
            other = min(high, area // side // step * step)
            if other >= low:
                buckets |= {(side, other), (other, side)}
        return size if size in buckets else min(sorted(buckets), key=lambda b: abs(b[0] / b[1] - size[0] / size[1]))

    def draw_batches(self) -> list[list[str]]:
        """One epoch's batches of picture names, each of one bucket, in a new order."""
        batches = []
        for keys in self.buckets.values():
            order = random.sample(keys, len(keys))
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        random.shuffle(batches)
        return batches

    def __len__(self) -> int:
        return sum(math.ceil(len(keys) / self.batch_size) for keys in self.buckets.values())

    def __getitem__(self, number: int) -> list[ImageInfo]:
        """A batch without cached latents: kohya cuts pictures only in buckets."""
        infos = [self.image_data[key] for key in self.draw_batches()[number]]
        for info in infos:
            if not self.params.enable_bucket and not self.params.random_crop:
                width, height = info.image_size
                assert width <= self.width and height <= self.height, (
                    "image too large, but cropping and bucketing are disabled / 画像サイズが大きいので"
                    f"face_crop_aug_rangeかrandom_crop、またはbucketを有効にしてください: {info.absolute_path}"
                )
                assert (width, height) == (self.width, self.height), f"image size is small: {info.absolute_path}"
        return infos

    def process_caption(self, subset: argparse.Namespace, caption: str) -> str:
        """A step's caption: one line, one of the alternatives, the tags behind the kept ones in a new order."""
        caption = " ".join(text for text in (subset.caption_prefix, caption, subset.caption_suffix) if text)
        if subset.enable_wildcard:
            caption = random.choice(caption.split("\n")).replace("{{", "\0").replace("}}", "\1")
            caption = re.sub(r"\{([^}]+)\}", lambda match: random.choice(match[1].split("|")), caption)
            caption = caption.replace("\0", "{").replace("\1", "}")
        else:
            caption = caption.split("\n")[0]
        if subset.shuffle_caption:
            kept, rest, last = self._parts(subset, caption)
            random.shuffle(rest)
            caption = ", ".join([*kept, *rest, *last])
        if subset.secondary_separator:
            caption = caption.replace(subset.secondary_separator, subset.caption_separator)
        return caption

    def _parts(self, subset: argparse.Namespace, caption: str) -> tuple[list[str], list[str], list[str]]:
        """The tags that stay in front, that are shuffled, and that stay behind."""
        parts = caption.split(subset.keep_tokens_separator, 2) if subset.keep_tokens_separator else [caption]
        tags = [[tag.strip() for tag in part.split(subset.caption_separator) if tag.strip()] for part in parts]
        if len(tags) == 1:
            return tags[0][: subset.keep_tokens], tags[0][subset.keep_tokens :], []
        return tags[0], tags[1], tags[2] if len(tags) > 2 else []


def bucket_without_upscale(size: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """The picture's own size in whole steps; a larger one is shrunk, along the side that bends its aspect less."""

    def whole(length: float) -> int:
        return int(length + 0.5) // step * step

    width, height = size
    if width * height > area:
        aspect = width / height
        across, down = whole(math.sqrt(area * aspect)), whole(area / math.sqrt(area * aspect))
        by_width, by_height = (across, whole(across / aspect)), (whole(down * aspect), down)
        bends = [abs(w / h - aspect) for w, h in (by_width, by_height)]
        width, height = by_width if bends[0] < bends[1] else by_height
    bucket = (width // step * step, height // step * step)
    bucket[0] / bucket[1]  # of a picture smaller than a step, at which kohya stops so
    return bucket


def crop_ltrb(bucket: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the whole picture inside its bucket: what kohya tells SDXL of the crop."""
    aspect = size[0] / size[1]
    is_wider = bucket[0] / bucket[1] > aspect
    width, height = (bucket[1] * aspect, bucket[1]) if is_wider else (bucket[0], bucket[0] / aspect)
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def read_folder(subset: argparse.Namespace) -> list[ImageInfo]:
    """The pictures of a subset; of the metadata that cache_info has written, where there is one."""
    folder = Path(subset.image_dir)
    if not folder.is_dir():
        log.warning("not directory: %s", folder)
        return []
    cache = folder / METADATA_CACHE
    if subset.cache_info and cache.is_file():
        entries = json.loads(cache.read_text(encoding="utf-8"))
        return [
            ImageInfo(path, subset.num_repeats, entry["caption"], bool(subset.is_reg), tuple(entry["resolution"]))
            for path, entry in entries.items()
        ]
    files = sorted(file for file in folder.iterdir() if file.suffix in IMAGE_EXTENSIONS and file.name[0] != ".")
    log.info("found directory %s contains %d image files", folder, len(files))
    found = [
        ImageInfo(str(file), subset.num_repeats, read_caption(file, subset), bool(subset.is_reg), size_of(file))
        for file in files
    ]
    if subset.cache_info:
        entries = {info.absolute_path: {"caption": info.caption, "resolution": info.image_size} for info in found}
        cache.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return found


def size_of(file: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(file) as image:
        return image.size


def read_caption(image: Path, subset: argparse.Namespace) -> str:
    extension = subset.caption_extension
    extension = extension if not extension or extension.startswith(".") else f".{extension}"
    file = Path(f"{image.with_suffix('')}{extension}")
    if not file.is_file():
        if subset.class_tokens is None:
            log.warning("neither caption file nor class tokens are found. use empty caption for %s", image)
        return subset.class_tokens or ""
    with file.open(encoding="utf-8") as opened:
        lines = opened.readlines()
    assert lines, f"caption file is empty / キャプションファイルが空です: {file}"
    if subset.enable_wildcard:
        return "\n".join(line.strip() for line in lines if line.strip())
    return lines[0].strip()


class DatasetGroup:
    def __init__(self, datasets: list[DreamBoothDataset]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def is_latent_cacheable(self) -> bool:
        return not any(subset.color_aug or subset.random_crop for one in self.datasets for subset in one.subsets)

    def is_text_encoder_output_cacheable(self) -> bool:
        """Whether a picture's caption is the same at every step."""
        changing = "caption_dropout_rate shuffle_caption token_warmup_step caption_tag_dropout_rate".split()
        return not any(getattr(subset, name) for one in self.datasets for subset in one.subsets for name in changing)

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        for one in self.datasets:
            if one.params.enable_bucket:
                steps = one.params.bucket_reso_steps
                assert steps % min_steps == 0, f"bucket_reso_steps is {steps}. it must be divisible by {min_steps}."


def generate_dataset_group_by_blueprint(group: DatasetGroupBlueprint) -> tuple[DatasetGroup, None]:
    datasets = [
        DreamBoothDataset(blueprint.params, [subset.params for subset in blueprint.subsets])
        for blueprint in group.datasets
    ]
    for one in datasets:
        one.make_buckets()
    return DatasetGroup(datasets), None


def load_data_set(args: argparse.Namespace, latents_suffix: str) -> DatasetGroup:
    """As train_network.py does it."""
    LatentsCachingStrategy.set_strategy(LatentsCachingStrategy(bool(args.cache_latents_to_disk), latents_suffix))
    generator = BlueprintGenerator(ConfigSanitizer(True, True, bool(args.masked_loss), True))
    log.info("Loading dataset config from %s", args.dataset_config)
    blueprint = generator.generate(load_user_config(args.dataset_config), args)
    group, _ = generate_dataset_group_by_blueprint(blueprint.dataset_group)
    return group
