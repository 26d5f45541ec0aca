"""Train the small world's models from nothing and save them beside this file, in fp16.

    python tests/small_world/make_weights.py                      everything, about 1.3 hours on two cores
    python tests/small_world/make_weights.py --only unet          one of autoencoder, decoder, clip, dinov2, unet,
                                                                  unet_xl
    python tests/small_world/make_weights.py --folder /tmp/world  somewhere else

Every random number comes from SEED. What is made is what a StableDiffusionPipeline, DINOv2 and CLIP are saved as:
base_model/, dinov2/ and clip/. As in Stable Diffusion itself, the text encoder is CLIP's, and frozen while the UNet
learns. xl_model/ holds the layers of the UNet that went on learning to be an SDXL's. The rest of it is base_model/'s,
and its second text encoder is CLIP's, with the projection: demo_world.py puts it together.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, mse_loss, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
from small_world import scenes
from small_world.scenes import Identity, Scene

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

HERE = Path(__file__).resolve().parent
SEED = 20
WIDTH = 128  # of the text encoder's states, the UNet's cross-attention and the encoders' embeddings
TOKENS = 32  # of a prompt, for the pipeline
LATENT_CHANNELS = 8
SCALING = 0.18215  # kohya's trainers know no other: latents times this have a standard deviation of 1
SENSITIVITY = {"unet": 60.0, "text encoder": 10.0}  # how many times more than otherwise a LoRA's step changes
CLIP_SKIP = 2  # as in configs/training.toml

STEPS = {  # the numbers of batches
    "autoencoder": 3500, "decoder": 3000, "clip": 2500, "dinov2": 2000, "unet": 10000, "unet_xl": 2500,
}  # fmt: skip


# Data and the loop that all trainings share


def random_scenes(rng: random.Random, count: int) -> list[Scene]:
    return [scenes.random_scene(rng) for _ in range(count)]


def to_tensor(pictures: Sequence[Scene]) -> torch.Tensor:
    """(n, 3, 32, 32) in [-1, 1]."""
    pixels = np.stack([np.asarray(scenes.draw(scene)) for scene in pictures]).astype(np.float32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def named_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as an encoder or a base model meets it: half of the figures have a name."""
    name = scenes.random_name(rng) if isinstance(scene.what, Identity) and rng.random() < 0.5 else None
    return scenes.caption(scene, rng, name)


def steps(what: str, parameters: Any, count: int, rate: float) -> Iterator[tuple[int, Any]]:
    """`count` times: hands out (step, update), where update(loss) is one step of AdamW under a one-cycle schedule."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=count, pct_start=0.05)
    started, losses = time.monotonic(), []

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    for step in range(count):
        yield step, update
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            mean = sum(losses[-100:]) / 100
            print(f"{what}: step {step + 1}/{count}  loss {mean:.4f}  {seconds:.0f} s", flush=True)


# The trainings


def train_autoencoder(folder: Path) -> None:
    """AutoencoderKL, 3 x 32 x 32 to 8 x 8 x 8; figures of all kinds, Luca's parts among them but never together."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    vae = AutoencoderKL(
        block_out_channels=(8, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=scenes.SIDE,
        scaling_factor=SCALING,
    )
    for _, update in steps("autoencoder", vae.parameters(), STEPS["autoencoder"], 2e-3):
        pictures = to_tensor(varied_scenes(rng, 24))
        latents = vae.encode(pictures).latent_dist
        far = latents.mean.square() + latents.var - 1 - latents.logvar  # KL to a standard normal, times 2
        update(restoration_loss(vae.decode(latents.sample()).sample, pictures) + 5e-5 * far.mean())
    unify_latents(vae, to_tensor(varied_scenes(rng, 512)))
    vae.half().save_pretrained(folder / "base_model" / "vae")


def train_decoder(folder: Path) -> None:
    """The autoencoder's decoder alone, on more figures: the latents, which the UNet learns, stay as they are."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    rng = random.Random(SEED + 1)
    where = folder / "base_model" / "vae"
    vae = AutoencoderKL.from_pretrained(where, torch_dtype=torch.float32)
    trained = itertools.chain(vae.decoder.parameters(), vae.post_quant_conv.parameters())
    for _, update in steps("decoder", trained, STEPS["decoder"], 2e-3):
        figures = [scenes.random_scene(rng, scenes.random_identity(rng, scenes.HEADGEARS)) for _ in range(16)]
        pictures = to_tensor(varied_scenes(rng, 8) + figures)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample()
        update(restoration_loss(vae.decode(latents).sample, pictures))
    vae.register_to_config(_name_or_path="")  # not the folder of the machine that it was made on
    vae.half().save_pretrained(where)


def restoration_loss(restored: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    return mse_loss(restored, pictures) + 0.1 * (restored - pictures).abs().mean()


def varied_scenes(rng: random.Random, count: int) -> list[Scene]:
    """Scenes with all three headgears, as DINOv2 and a VAE in the large world have seen all kinds of things."""
    drawn = random_scenes(rng, count)
    kinds = [scenes.random_identity(rng, scenes.HEADGEARS) for _ in drawn]
    return [
        dataclasses.replace(scene, what=who) if isinstance(scene.what, Identity) else scene
        for scene, who in zip(drawn, kinds, strict=True)
    ]


def unify_latents(vae: Any, pictures: torch.Tensor) -> None:
    """Scale the two outermost layers of the latents so that their standard deviation is 1 / SCALING."""
    with torch.no_grad():
        factor = 1 / (SCALING * vae.encode(pictures).latent_dist.sample().std())
        half = LATENT_CHANNELS
        vae.quant_conv.weight[:half] *= factor
        vae.quant_conv.bias[:half] *= factor
        vae.quant_conv.bias[half:] += 2 * factor.log()
        vae.post_quant_conv.weight /= factor


def write_tokenizer(folder: Path, max_length: int) -> None:
    """CLIP's kind of tokenizer whose merges make a token of every word of the captions; names stay syllables."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = random.Random(SEED)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", min_frequency=50, show_progress=False)
    texts = [scenes.caption(scene, rng) for scene in random_scenes(rng, 4000)]
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    tiny_models.write_tokenizer(folder, [tuple(pair) for pair in merges], max_length)


def train_clip(folder: Path) -> None:
    """CLIP, contrastively; its text model becomes the pipeline's text encoder."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    write_tokenizer(folder / "clip", 77)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**size, **ends, "pad_token_id": tokenizer.eos_token_id, "num_hidden_layers": 3}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**size, "num_hidden_layers": 3, "image_size": scenes.SIDE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    for _, update in steps("clip", clip.parameters(), STEPS["clip"], 1e-3):
        drawn = random_scenes(rng, 96)
        captions = [named_caption(scene, rng) for scene in drawn]
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        output = clip(pixel_values=to_tensor(drawn) / IMAGE_STD, **tokens)
        update(contrastive_loss(output.logits_per_text, which_fit(drawn, captions)))
    clip.half().save_pretrained(folder / "clip")
    tiny_models.write_image_processor(folder / "clip", "CLIPImageProcessor", scenes.SIDE, 0.5, IMAGE_STD / 2)
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "clip").state_dict())
    encoder.half().save_pretrained(folder / "base_model" / "text_encoder")
    name_text_encoder_as_published(folder / "base_model" / "text_encoder" / "model.safetensors")
    write_tokenizer(folder / "base_model" / "tokenizer", TOKENS)


IMAGE_STD = 0.6  # of pictures in [-1, 1]; the encoders' processors divide by half of it


def which_fit(drawn: Sequence[Scene], captions: Sequence[str]) -> torch.Tensor:
    """(captions, scenes): 1 where all that a caption says is true of a scene, though it may say less than all."""
    said = [{tag for tag in caption.split(", ") if " " in tag} for caption in captions]
    true = [
        set(scenes.tags(scene)) | {tag.replace(f"{scene.size} ", "") for tag in scenes.tags(scene)} for scene in drawn
    ]
    return torch.tensor([[float(words <= facts) for facts in true] for words in said])


def contrastive_loss(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """CLIP's loss both ways, with equal shares for all that fit."""
    return (
        cross_entropy(logits, fits / fits.sum(dim=1, keepdim=True))
        + cross_entropy(logits.T, fits.T / fits.T.sum(dim=1, keepdim=True))
    ) / 2


def train_dinov2(folder: Path) -> None:
    """Dinov2Model whose class token tells identities apart: pictures of one identity are pulled together.

    The background, place and size are read from it too, by heads that are thrown away: otherwise it would be blind to
    all that is not the thing.
    """
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=4, image_size=scenes.SIDE,
        patch_size=8, layerscale_value=0.1,
    )  # fmt: skip
    model = Dinov2Model(config)
    heads = torch.nn.ModuleList([torch.nn.Linear(WIDTH, len(names)) for names in SURROUNDINGS])
    parameters = itertools.chain(model.parameters(), heads.parameters())
    for _, update in steps("dinov2", parameters, STEPS["dinov2"], 1e-3):
        drawn = [scenes.random_scene(rng, thing) for thing in things_to_tell_apart(rng) for _ in range(4)]
        vectors = model(to_tensor(drawn) / IMAGE_STD).pooler_output
        loss = identity_loss(normalize(vectors, dim=1), torch.arange(32).repeat_interleave(4))
        for head, names, facts in zip(heads, SURROUNDINGS, zip(*map(surroundings, drawn), strict=True), strict=True):
            loss = loss + 0.3 * cross_entropy(head(vectors), torch.tensor([names.index(fact) for fact in facts]))
        update(loss)
    model.half().save_pretrained(folder / "dinov2")
    tiny_models.write_image_processor(folder / "dinov2", "BitImageProcessor", scenes.SIDE, 0.5, IMAGE_STD / 2)


SURROUNDINGS = (tuple(scenes.BACKGROUNDS), tuple(scenes.PLACES), tuple(scenes.SIZES))


def surroundings(scene: Scene) -> tuple[str, str, str]:
    return scene.background, scene.place, scene.size


def things_to_tell_apart(rng: random.Random) -> list[Any]:
    """32 of them: eight families of three figures that differ in one part, and eight plain shapes."""
    things: list[Any] = []
    for _ in range(8):
        first = scenes.random_identity(rng, scenes.HEADGEARS)
        things += [first, relative(rng, first), relative(rng, first)]
    return things + [(rng.choice(scenes.SHAPES), rng.choice(tuple(scenes.COLOURS))) for _ in range(8)]


def relative(rng: random.Random, who: Identity) -> Identity:
    """Another figure that differs from this one in one part or colour, and is as far from Luca as all are."""
    while True:
        part = rng.choice([field.name for field in dataclasses.fields(Identity)])
        found = dataclasses.replace(who, **{part: getattr(scenes.random_identity(rng, scenes.HEADGEARS), part)})
        if found != who and scenes.is_possible(found):
            return found


def identity_loss(vectors: torch.Tensor, labels: torch.Tensor, temperature: float = 0.15) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362) of unit vectors (n, d)."""
    logits = vectors @ vectors.T / temperature
    logits = logits.masked_fill(torch.eye(len(vectors), dtype=torch.bool), -1e9)
    alike = (labels[:, None] == labels).float().fill_diagonal_(0)
    return -(torch.log_softmax(logits, dim=1) * alike).sum() / alike.sum()


def train_unet(folder: Path) -> None:
    """UNet2DConditionModel on the autoencoder's latents and the text encoder's states; saves the whole pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = folder / "base_model"
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    vae.register_to_config(_name_or_path="")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=scenes.SIDE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # heads, as in SD 1.x
        norm_num_groups=16,
    )
    ema = EMAModel(unet.parameters(), decay=0.999)

    def embed(texts: Sequence[str]) -> list[torch.Tensor]:
        """Hidden states (n, 32, 128) at CLIP_SKIP, through the final layer norm, as kohya takes them."""
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return [norm(read(encoder, tokenizer, texts).hidden_states[-CLIP_SKIP])]

    latents, states = encode_scenes(rng, 30_000, vae, embed)
    (empty,) = encode(embed, [""])
    batch = 32
    for _, update in steps("unet", unet.parameters(), STEPS["unet"], 1e-3):
        chosen = torch.randint(0, len(latents), (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        when = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))
        conditioning = states[chosen].float()
        conditioning[torch.rand(batch) < 0.1] = empty
        noisy = scheduler.add_noise(latents[chosen].float() * SCALING, noise, when)
        update(mse_loss(unet(noisy, when, conditioning).sample, noise))
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    make_sensitive(unet, encoder, SENSITIVITY)
    StableDiffusionPipeline(
        vae=vae.half(), text_encoder=encoder.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(model)  # fmt: skip
    name_text_encoder_as_published(model / "text_encoder" / "model.safetensors")


def make_sensitive(unet: Any, encoder: Any, factors: Mapping[str, float]) -> None:
    """Multiply what goes into linear layers by a factor and divide their weights by it: the same function.

    A LoRA's step through such a layer changes its output that many times as much. Models as small as these would
    otherwise want learning rates far above Stable Diffusion's, and V2.1's would teach them nothing in 250 steps.
    """
    encoder = getattr(encoder, "text_model", encoder)  # transformers 5 has no text_model
    for layer in encoder.encoder.layers:
        attention = layer.self_attn
        shift(factors["text encoder"], layer.layer_norm1, attention.q_proj, attention.k_proj, attention.v_proj)
        shift(factors["text encoder"], layer.layer_norm2, layer.mlp.fc1)
    make_unet_sensitive(unet, factors["unet"])
    readers = [layer for block in blocks_of(unet) for layer in (block.attn2.to_k, block.attn2.to_v)]
    shift(factors["unet"], encoder.final_layer_norm, *readers)


def make_unet_sensitive(unet: Any, factor: float) -> None:
    """The layers that read the UNet's own norms."""
    for module in unet.modules():
        if hasattr(module, "transformer_blocks"):
            shift(factor, module.norm, module.proj_in)
    for block in blocks_of(unet):
        shift(factor, block.norm1, block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        shift(factor, block.norm2, block.attn2.to_q)
        shift(factor, block.norm3, block.ff.net[0].proj)


def blocks_of(unet: Any) -> list[Any]:
    transformers = [module for module in unet.modules() if hasattr(module, "transformer_blocks")]
    return [block for transformer in transformers for block in transformer.transformer_blocks]


def shift(factor: float, norm: Any, *layers: Any) -> None:
    with torch.no_grad():
        norm.weight *= factor
        norm.bias *= factor
        for layer in layers:
            layer.weight /= factor


def name_text_encoder_as_published(file: Path) -> None:
    """Weights as `text_model.*`, as in Stable Diffusion's own files: transformers 5 reads both, 4 only these."""
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


Embed = Callable[[Sequence[str]], list[torch.Tensor]]  # what a UNet reads of texts


def encode_scenes(rng: random.Random, count: int, vae: Any, embed: Embed) -> list[torch.Tensor]:
    """Latents (n, 8, 8, 8) and what `embed` makes of captions, fp16, of `count` new scenes but those held out."""
    parts = []
    for _ in range(count // 100):
        drawn = [scene for scene in random_scenes(rng, 100) if not scenes.is_held_out(scene)]
        with torch.no_grad():
            latents = vae.encode(to_tensor(drawn)).latent_dist.sample()
        texts = encode(embed, [named_caption(scene, rng) for scene in drawn])
        parts.append([part.half() for part in (latents, *texts)])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def encode(embed: Embed, texts: Sequence[str]) -> list[torch.Tensor]:
    with torch.no_grad():
        return embed(texts)


def read(encoder: Any, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Any:
    """An encoder's output."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids, output_hidden_states=True)


# What SDXL has besides


def train_unet_xl(folder: Path) -> None:
    """The base model's UNet learns to read two encoders, the pooled text and the sizes; its convolutions stay.

    Each of states, second states and pooled text is left out of every fifth picture, so that all three are read.
    """
    import demo_world
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline
    from diffusers.training_utils import EMAModel

    torch.manual_seed(SEED)
    rng = random.Random(SEED + 3)
    unet = widen_unet(folder / "base_model")
    with tempfile.TemporaryDirectory() as made:
        unet.save_pretrained(folder / "xl_model" / "unet")  # until it has learnt, for the folder that is put together
        demo_world.put_xl_together(folder, Path(made))
        xl = StableDiffusionXLPipeline.from_pretrained(made, torch_dtype=torch.float32)

    def embed(texts: Sequence[str]) -> list[torch.Tensor]:
        """The last hidden states but one, without a norm, and the second encoder's projection."""
        first, second = read(xl.text_encoder, xl.tokenizer, texts), read(xl.text_encoder_2, xl.tokenizer_2, texts)
        return [first.hidden_states[-2], second.hidden_states[-2], second.text_embeds]

    unet.requires_grad_(False)
    learning = {name: weight for name, weight in unet.named_parameters() if re.search(LEARNT_BY_XL, name)}
    for weight in learning.values():
        weight.requires_grad_(True)
    ema = EMAModel(learning.values(), decay=0.995)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, *texts = encode_scenes(rng, 20_000, xl.vae, embed)
    empty, batch = encode(embed, [""]), 32
    sizes = torch.tensor([[scenes.SIDE, scenes.SIDE, 0, 0, scenes.SIDE, scenes.SIDE]]).expand(batch, -1)
    for _, update in steps("unet xl", learning.values(), STEPS["unet_xl"], 5e-4):
        chosen = torch.randint(0, len(latents), (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        when = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))
        without_prompt, without = torch.rand(batch) < 0.1, torch.rand(batch, 3) < 0.2
        parts = [part[chosen].float() for part in texts]
        for number, part in enumerate(parts):
            part[without[:, number]] = 0
            part[without_prompt] = empty[number]
        conditions = {"text_embeds": parts[2], "time_ids": sizes}
        noisy = scheduler.add_noise(latents[chosen].float() * xl.vae.config.scaling_factor, noise, when)
        update(mse_loss(unet(noisy, when, torch.cat(parts[:2], dim=2), added_cond_kwargs=conditions).sample, noise))
        ema.step(learning.values())
    ema.copy_to(learning.values())
    make_unet_sensitive(unet, SENSITIVITY["unet"])
    unet.register_to_config(_name_or_path="")
    unet.save_config(folder / "xl_model" / "unet")
    learnt = {name: weight.detach().half().contiguous() for name, weight in learning.items()}
    save_file(learnt, folder / "xl_model" / "unet" / demo_world.WEIGHTS, {"format": "pt"})


LEARNT_BY_XL = r"attentions|add_embedding|time_emb_proj"  # names of layers


def widen_unet(base_model: Path) -> Any:
    """base_model/'s UNet as an SDXL's that at first computes about what it did, and reads nothing new."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    old = UNet2DConditionModel.from_pretrained(base_model / "unet", torch_dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(base_model / "text_encoder", torch_dtype=torch.float32)
    make_sensitive(old, encoder, {name: 1 / factor for name, factor in SENSITIVITY.items()})
    config = {name: value for name, value in old.config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel(**{**config, **tiny_models.xl_conditioning(WIDTH, WIDTH, WIDTH)})
    norm = getattr(encoder, "text_model", encoder).final_layer_norm  # SDXL's UNet reads the states before it
    weights = old.state_dict()
    for name, wanted in unet.state_dict().items():
        if name.startswith("add_embedding"):
            weights[name] = torch.zeros_like(wanted) if "linear_2" in name else wanted
        elif re.search(r"attn2\.to_[kv]\.weight", name):
            weights[name] = torch.cat(
                [weights[name] * norm.weight / STATES_STD, torch.zeros(len(wanted), WIDTH)], dim=1
            )
        weights[name] = weights[name].detach().view(wanted.shape)  # 1 x 1 convolutions become linear
    unet.load_state_dict(weights)
    return unet


STATES_STD = 3.5  # of the first text encoder's states before its final norm


TRAININGS = {
    "autoencoder": train_autoencoder,
    "decoder": train_decoder,
    "clip": train_clip,
    "dinov2": train_dinov2,
    "unet": train_unet,
    "unet_xl": train_unet_xl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--only", choices=TRAININGS, help="one training; it needs those before it, but not DINOv2's")
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name, train in TRAININGS.items():
        if args.only in (None, name):
            train(args.folder)


if __name__ == "__main__":
    main()
