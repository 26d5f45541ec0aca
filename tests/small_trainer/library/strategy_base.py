"""Where latents are cached, under the names of sd-scripts' library/strategy_base.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SCALE = 8  # pixels of a latent


class LatentsCachingStrategy:
    _strategy: LatentsCachingStrategy | None = None

    def __init__(self, cache_to_disk: bool, suffix: str = "_sd.npz") -> None:
        self.cache_to_disk, self.suffix = cache_to_disk, suffix

    @classmethod
    def set_strategy(cls, strategy: LatentsCachingStrategy) -> None:
        cls._strategy = strategy

    @classmethod
    def get_strategy(cls) -> LatentsCachingStrategy | None:
        return cls._strategy

    def get_latents_npz_path(self, absolute_path: str, image_size: tuple[int, int]) -> str:
        """By the picture's own size, whatever the resolution; an old file without it is used where there is one."""
        path = Path(absolute_path)
        old = path.with_suffix(".npz")
        name = f"{path.stem}_{image_size[0]:04d}x{image_size[1]:04d}{self.suffix}"
        return str(old if old.exists() else path.with_name(name))

    def is_disk_cached_latents_expected(
        self, bucket_reso: tuple[int, int], npz_path: str, flip_aug: bool, alpha_mask: bool
    ) -> bool:
        """Under its size's name, or a plain one of whatever size."""
        if not self.cache_to_disk or not Path(npz_path).exists():
            return False
        with np.load(npz_path) as arrays:
            return any(f"latents{suffix}" in arrays for suffix in ("", suffix_of(bucket_reso)))


def suffix_of(bucket_reso: tuple[int, int]) -> str:
    width, height = bucket_reso
    return f"_{height // SCALE}x{width // SCALE}"
