"""Patch tokens that know parts, read from the small world's DINOv2 by a linear map.

The small DINOv2 has learnt with its class token alone, so its patch tokens see little more than colour. DINOv2's own
patch tokens learn by filling in masked patches (iBOT), and tell parts of things apart. A ridge regression stands in for
that: from all hidden states of a patch, at twice the pixels, to the shares of its pixels that belong to each part and
each colour. It learns from figures and shapes of all kinds, never from Luca.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from small_world import scenes
from small_world.make_weights import IMAGE_STD, things_to_tell_apart

SIDE = 64  # pixels of a picture as the encoder gets it
PATCHES = 8  # along each side
SCENES = 320  # to learn from
RANDOM_FEATURES = 768  # rectified random mixtures of the hidden states, so that the map is not only linear in them


class PatchReader:
    """Learns when it is made: three seconds of a core."""

    def __init__(self, dinov2: Any) -> None:
        self.dinov2 = dinov2
        rng = random.Random(77)
        drawn = [scenes.random_scene(rng, thing) for _ in range(SCENES // 32) for thing in things_to_tell_apart(rng)]
        states = np.concatenate(list(self._states([scenes.draw(scene) for scene in drawn])))
        mix = np.random.default_rng(77).normal(size=(states.shape[1] + 1, RANDOM_FEATURES))
        self._centre, self._scale = states.mean(axis=0), states.std(axis=0) + 1e-6
        self._mix = mix / np.sqrt(states.shape[1])
        inputs, wanted = self._inputs(states), patch_shares(drawn).reshape(len(states), -1)
        self._mean = inputs.mean(axis=0)
        inputs -= self._mean
        square = inputs.T @ inputs + np.eye(inputs.shape[1])
        self._map = np.linalg.solve(square, inputs.T @ (wanted - wanted.mean(axis=0)))

    def _states(self, pictures: Sequence[Image.Image]) -> Any:
        """For each batch (patches of all its pictures, d): the hidden states of all layers side by side."""
        import torch

        for start in range(0, len(pictures), 32):
            shown = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures[start : start + 32]]
            pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in shown]) / 127.5 - 1
            with torch.inference_mode():
                found = self.dinov2(torch.from_numpy(pixels).permute(0, 3, 1, 2) / IMAGE_STD, output_hidden_states=True)
            states = torch.cat([layer[:, 1:] for layer in found.hidden_states], dim=2)
            yield states.reshape(-1, states.shape[2]).float().numpy()

    def _inputs(self, states: np.ndarray) -> np.ndarray:
        even = (states - self._centre) / self._scale
        ones = np.ones((len(even), 1), dtype=even.dtype)
        mixed = np.maximum(np.hstack([even, ones]) @ self._mix.astype(even.dtype), 0)
        return np.hstack([even, mixed])

    def tokens(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors (n, patches, kinds and paints): what each patch shows, less what patches show on average."""
        found = [(self._inputs(states) - self._mean) @ self._map for states in self._states(pictures)]
        vectors = np.concatenate(found).reshape(len(pictures), PATCHES**2, -1)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-12)


def patch_shares(drawn: Sequence[scenes.Scene]) -> np.ndarray:
    """(n, patches, kinds and paints): the share of a patch's pixels that belongs to each of them."""
    labels = zip(*map(scenes.pixel_labels, drawn), strict=True)
    counts = (len(scenes.KINDS), len(scenes.PAINTS))
    return np.concatenate([shares(np.stack(some), count) for some, count in zip(labels, counts, strict=True)], axis=2)


def shares(labels: np.ndarray, count: int) -> np.ndarray:
    """(n, patches, count) of labels (n, side, side) below count."""
    cut = labels.reshape(len(labels), PATCHES, labels.shape[1] // PATCHES, PATCHES, -1)
    return np.stack([(cut == label).mean(axis=(2, 4)).reshape(len(labels), -1) for label in range(count)], axis=2)
