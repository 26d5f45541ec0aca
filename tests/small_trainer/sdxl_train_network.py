"""The small trainer's second script: it speaks the contract of kohya-ss/sd-scripts' sdxl_train_network.py.

    python sdxl_train_network.py --config_file config.toml

What it shares with train_network.py is there. SDXL has two text encoders, of which the second also gives a pooled
output, and a UNet that is told each picture's sizes. Its layers have the names of Stability AI's own UNet, as in kohya.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_network
from library import config_util
from train_network import Batch, tokenize

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

OPTIONS = train_network.OPTIONS.with_name("sdxl_train_network_options.json")
TEXT_SUFFIX = "_te_outputs.npz"  # of a picture's cached text outputs
TextOutputs = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]  # states (n, 77, d) of both encoders, pooled (n, d)

log = logging.getLogger("trainer")


def encode_captions(pipeline: StableDiffusionXLPipeline, captions: Sequence[str]) -> TextOutputs:
    """The last hidden states but one, without a norm, and the second encoder's projection at the end's token."""
    outputs = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        outputs.append(encoder(tokenize(tokenizer, captions).to(encoder.device), output_hidden_states=True))
    first, second = outputs
    return first.hidden_states[-2], second.hidden_states[-2], second.text_embeds


def sizes_of(info: config_util.ImageInfo) -> list[int]:
    """Height and width of the picture, top and left of the crop, height and width of the bucket."""
    left, top, *_ = config_util.crop_ltrb(info.bucket_reso, info.image_size)
    return [*reversed(info.image_size), int(top), int(left), *reversed(info.bucket_reso)]


class SdxlNetworkTrainer(train_network.NetworkTrainer):
    pipeline_class = "StableDiffusionXLPipeline"
    pipeline_options: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    vae_scale = 0.13025
    latents_suffix = "_sdxl.npz"
    architecture = "stable-diffusion-xl-v1-base/lora"
    implementation = "https://github.com/Stability-AI/generative-models"

    def __init__(self) -> None:
        self.cached: dict[str, TextOutputs] = {}  # by the picture's path

    def version(self, args: argparse.Namespace) -> str:
        return "sdxl_base_v1-0"

    def check(self, args: argparse.Namespace, group: config_util.DatasetGroup) -> None:
        assert not args.v2, "v2 cannot be enabled in SDXL training"
        if args.clip_skip is not None:
            log.warning("clip_skip will be unexpected")  # and changes nothing, as in kohya
        if args.cache_text_encoder_outputs_to_disk and not args.cache_text_encoder_outputs:
            args.cache_text_encoder_outputs = True
            log.warning("cache_text_encoder_outputs is enabled because it is to be cached to disk")
        if args.cache_text_encoder_outputs:
            assert group.is_text_encoder_output_cacheable(), (
                "when caching Text Encoder output, either caption_dropout_rate, shuffle_caption, token_warmup_step "
                "or caption_tag_dropout_rate cannot be used"
            )
            assert args.network_train_unet_only, (
                "network for Text Encoder cannot be trained with caching Text Encoder outputs"
            )
        group.verify_bucket_reso_steps(32)

    def text_encoders(self, pipeline: StableDiffusionXLPipeline) -> dict[str, torch.nn.Module]:
        return {"lora_te1": pipeline.text_encoder, "lora_te2": pipeline.text_encoder_2}

    def cache_text(
        self, args: argparse.Namespace, group: config_util.DatasetGroup, pipeline: StableDiffusionXLPipeline
    ) -> None:
        """As in kohya, captions are taken as the files have them, without prefix and suffix."""
        if not args.cache_text_encoder_outputs:
            return
        log.info("caching Text Encoder outputs...")
        for info in [info for one in group.datasets for info in one.image_data.values()]:
            self.cached[info.absolute_path] = load_text_outputs(info, pipeline, args.cache_text_encoder_outputs_to_disk)

    def encode(self, pipeline: StableDiffusionXLPipeline, batch: Batch, args: argparse.Namespace) -> dict[str, Any]:
        """Both encoders' states side by side, the pooled output, and the sizes."""
        import torch

        if self.cached:
            outputs = [self.cached[info.absolute_path] for info in batch["infos"]]
            first, second, pooled = (torch.cat(parts).to(pipeline.device) for parts in zip(*outputs, strict=True))
        else:
            first, second, pooled = encode_captions(pipeline, batch["captions"])
        sizes = torch.tensor([sizes_of(info) for info in batch["infos"]], device=pooled.device)
        return {
            "encoder_hidden_states": torch.cat([first, second], dim=2),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
        }

    def unet_module(self, name: str, layers_per_block: int) -> str:
        """Attention in the original UNet: blocks are counted through, and a block's second part is its attention."""
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", name)
        if not found:
            return name.replace("mid_block.attentions.0.", "middle_block.1.")
        number = int(found[2]) * (layers_per_block + 1) + int(found[3])
        place = f"input_blocks.{number + 1}" if found[1] == "down" else f"output_blocks.{number}"
        return f"{place}.1.{found[4]}"


def load_text_outputs(info: config_util.ImageInfo, pipeline: StableDiffusionXLPipeline, to_disk: bool) -> TextOutputs:
    """A picture's text outputs: from the cache beside it, else encoded, and cached there."""
    import numpy as np
    import torch

    path = Path(info.absolute_path)
    cache, names = path.with_name(f"{path.stem}{TEXT_SUFFIX}"), ("hidden_state1", "hidden_state2", "pool2")
    if to_disk and cache.is_file():
        with np.load(cache) as arrays:
            first, second, pooled = (torch.from_numpy(arrays[name])[None] for name in names)
        return first, second, pooled
    with torch.no_grad():
        first, second, pooled = (output.cpu() for output in encode_captions(pipeline, [info.caption]))
    if to_disk:
        outputs = zip(names, (first, second, pooled), strict=True)
        np.savez(cache, **{name: output[0].numpy() for name, output in outputs})
    return first, second, pooled


def main(argv: Sequence[str] | None = None) -> int:
    train_network.set_up_logging()
    args = train_network.read_arguments(sys.argv[1:] if argv is None else argv, OPTIONS)
    SdxlNetworkTrainer().train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
