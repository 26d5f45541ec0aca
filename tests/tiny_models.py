"""Tiny random models with the classes and module names of the real ones, for the demo, the tests and the benchmarks.

    make_tiny_pipeline(folder)   Stable Diffusion 1.x as a diffusers folder, 64-pixel images, 8 x 8 latents
    make_tiny_xl_pipeline(folder)  SDXL as a diffusers folder, of the same sizes
    make_tiny_dinov2(folder)     DINOv2 with its image processor
    make_tiny_clip(folder)       CLIP, text and image, with tokenizer and image processor
    write_single_file(folder, file)  the first one as a single file

Each is made from a fixed seed in about a second, without network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH = 32  # of the text encoder's states, the UNet's cross-attention and the encoders' embeddings
WIDTH_2 = 48  # of the states of SDXL's second text encoder
START, END = 512, 513  # token ids behind the byte alphabet
XL_SCALING = 0.13025  # SDXL's: latents times this have about unit variance
XL_PAD = "!"  # token 0, with which SDXL's second tokenizer pads
XL_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "interpolation_type": "linear",
    "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip


def write_tokenizer(
    folder: Path, merges: Sequence[tuple[str, str]] = (), max_length: int = 77, pad: str = "<|endoftext|>"
) -> None:
    """CLIP's tokenizer. Without merges every byte is a token, and 75 letters of a prompt are read."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": symbols[-2], "eos_token": symbols[-1], "unk_token": symbols[-1]}
    special["pad_token"] = pad
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {symbol: number for number, symbol in enumerate(symbols)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


def _text_config(width: int = WIDTH) -> dict[str, Any]:
    return {
        "vocab_size": END + 1,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }


def _make_tiny_vae(**more: Any) -> Any:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        **more,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4  # random weights alone would draw flat grey
    return vae


def xl_conditioning(first: int, second: int, pooled: int) -> dict[str, Any]:
    """What tells a UNet that it reads two text encoders and pooled text of these widths, and six sizes."""
    return {
        "cross_attention_dim": first + second,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + 6 * 8,
    }


def make_tiny_pipeline(folder: Path, seed: int = 1) -> None:
    """A StableDiffusionPipeline of random weights; its images are coloured noise, not flat."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = _make_tiny_vae()
    text_encoder = CLIPTextModel(CLIPTextConfig(**_text_config()))
    write_tokenizer(folder / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_tiny_xl_pipeline(folder: Path, seed: int = 1) -> None:
    """A StableDiffusionXLPipeline of random weights, whose blocks are arranged as SDXL's are."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        norm_num_groups=8,
        **xl_conditioning(WIDTH, WIDTH_2, WIDTH_2),
    )
    vae = _make_tiny_vae(scaling_factor=XL_SCALING, force_upcast=True)
    first = CLIPTextModel(CLIPTextConfig(**_text_config()))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(WIDTH_2), hidden_act="gelu"))
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad=XL_PAD)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**XL_SCHEDULER),
        add_watermarker=False,
    ).save_pretrained(folder)


def write_xl_index(folder: Path) -> None:
    """The file by which diffusers knows an SDXL's parts, for a folder that is put together."""
    parts = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "image_encoder": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **parts}
    _write_json(folder / "model_index.json", index)


def write_image_processor(folder: Path, kind: str, side: int, mean: float, std: float) -> None:
    processor = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [std] * 3,
        "do_convert_rgb": True,
    }
    _write_json(folder / "preprocessor_config.json", processor)


def make_tiny_dinov2(folder: Path, seed: int = 2) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=7
    )
    Dinov2Model(config).save_pretrained(folder)
    write_image_processor(folder, "BitImageProcessor", 28, 0.5, 0.25)


def make_tiny_clip(folder: Path, seed: int = 3) -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": WIDTH}
    CLIPModel(CLIPConfig(text_config=_text_config(), vision_config=vision, projection_dim=WIDTH)).save_pretrained(
        folder
    )
    write_tokenizer(folder)
    write_image_processor(folder, "CLIPImageProcessor", 32, 0.48, 0.27)


# From a diffusers folder's names of tensors to those of a single file.
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_NAMES = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv", "resnets": "block", "down_blocks": "down",
}  # fmt: skip
_UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip


def _unet_name(key: str, layers: int) -> str:
    for old, new in _UNET_NAMES.items():
        key = key.replace(f"{old}.", f"{new}.")
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", key):
        way, block, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        first = block * (layers + 1)
        if way == "down":
            place = f"input_blocks.{first + (layers if kind == 'downsamplers' else number) + 1}"
        else:
            place = f"output_blocks.{first + (layers if kind == 'upsamplers' else number)}"
        inner = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "1"}[kind]
        key = f"{place}.{inner}.{rest.replace('conv.', 'op.') if kind == 'downsamplers' else rest}"
    if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", key):
        key = re.sub(r"\b(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)\b", lambda name: _RESNET[name[0]], key)
    return key


def _vae_name(key: str, levels: int) -> str:
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
    for old, new in _VAE_NAMES.items():
        key = key.replace(f"{old}.", f"{new}.")
    return key


def write_single_file(folder: Path, file: Path, text_encoder: str = "text_model.") -> None:
    """A diffusers folder of make_tiny_pipeline as one file; the text encoder's names have no prefix in old ones."""
    import torch
    from safetensors.torch import load_file, save_file

    parts = ("unet", "vae", "text_encoder")
    unet, vae, text = (load_file(next((folder / part).glob("*.safetensors"))) for part in parts)
    weights = {f"model.diffusion_model.{_unet_name(key, 1)}": value for key, value in unet.items()}
    weights |= {f"first_stage_model.{_vae_name(key, 4)}": value for key, value in vae.items()}
    for key, value in text.items():
        weights[f"cond_stage_model.transformer.{text_encoder}{key.removeprefix('text_model.')}"] = value
    weights[f"cond_stage_model.transformer.{text_encoder}embeddings.position_ids"] = torch.zeros(1, 77)  # of no use
    save_file({key: value.contiguous() for key, value in weights.items()}, file, {"format": "pt"})
