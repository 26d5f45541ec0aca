"""A small LoRA trainer that speaks the contract of kohya-ss/sd-scripts' train_network.py.

    python train_network.py --config_file config.toml

The same options, config file, data set file (library/config_util.py), output, checkpoint names, weight names,
metadata, latents cache and exit statuses; but made for Stable Diffusion 1.x folders so tiny that a training takes
seconds on a CPU, with nothing beside PyTorch, diffusers, transformers, peft and accelerate. Demo and tests use it.

It really trains: noise or v prediction by gradient descent on LoRA layers of UNet and text encoder. Options that
change nothing here (attention kernels, gradient checkpointing, loader workers, model hub) and those that it leaves out
(augmentation, a weight for regularisation images, other losses, validation, samples, saved states, network_args) are
accepted and ignored. sdxl_train_network.py beside it is the script for SDXL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import toml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from library import config_util
from library.strategy_base import LatentsCachingStrategy, suffix_of
from library.train_util import get_optimizer

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, DiffusionPipeline
    from transformers import CLIPTokenizer

OPTIONS = Path(__file__).resolve().parent.parent / "kohya" / "train_network_options.json"  # the real trainer's
# kohya's defaults of the options that this trainer honours. An option without one is None.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-6, "lr_scheduler": "constant", "lr_warmup_steps": 0, "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0, "max_grad_norm": 1.0, "optimizer_type": "AdamW", "network_alpha": 1.0,
    "network_dim": 4, "gradient_accumulation_steps": 1, "max_train_steps": 1600, "mixed_precision": "no",
    "caption_extension": ".caption", "train_batch_size": 1, "dataset_repeats": 1, "output_name": "last",
    "save_model_as": "safetensors", "keep_tokens": 0,
}  # fmt: skip
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

Batch = dict[str, Any]  # latents (batch, 4, height / 8, width / 8), captions, infos of the pictures

log = logging.getLogger("trainer")


# Options


def int_or_float(value: str) -> int | float:
    return int(value) if float(value) >= 1 else float(value)


KINDS = {"str": str, "int": int, "float": float, "Path": Path, "int_or_float": int_or_float}


def setup_parser(options: Path = OPTIONS) -> argparse.ArgumentParser:
    """Every option of the real trainer, with its kind and choices."""
    parser = argparse.ArgumentParser()
    for name, option in json.loads(options.read_text(encoding="utf-8")).items():
        if option["kind"] == "switch":
            parser.add_argument(f"--{name}", action="store_true")
            continue
        kind = KINDS[option["kind"]]
        choices = [None, *map(kind, option["choices"])] if option["choices"] else None
        nargs = "*" if option["is_list"] else None
        parser.add_argument(f"--{name}", type=kind, default=DEFAULTS.get(name), nargs=nargs, choices=choices)
    return parser


def read_arguments(argv: Sequence[str], options: Path = OPTIONS) -> argparse.Namespace:
    """Command line over config file over defaults; names and types in the file are not checked."""
    parser = setup_parser(options)
    args = parser.parse_args(argv)
    if args.config_file:
        file = Path(args.config_file if args.config_file.endswith(".toml") else f"{args.config_file}.toml")
        if not file.is_file():
            log.info("%s not found.", file)
            sys.exit(1)
        log.info("Loading settings from %s...", file)
        settings: dict[str, Any] = {}
        for key, value in toml.loads(file.read_text(encoding="utf-8")).items():
            settings.update(value if isinstance(value, dict) else {key: value})
        args = parser.parse_args(argv, namespace=argparse.Namespace(**settings))
    args.cache_latents = args.cache_latents or args.cache_latents_to_disk
    return args


# The model


def load_latents(info: config_util.ImageInfo, pipeline: DiffusionPipeline, to_disk: bool) -> torch.Tensor:
    """The picture's unscaled latents: from the cache beside it, else encoded, and cached there.

    As in kohya, a cold run draws the encoder's noise.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    strategy = LatentsCachingStrategy.get_strategy()
    assert strategy
    cache = Path(strategy.get_latents_npz_path(info.absolute_path, info.image_size))
    if to_disk and cache.is_file():
        with np.load(cache) as arrays:
            sized = f"latents{suffix_of(info.bucket_reso)}"  # from sd-scripts v0.10.2 on
            return torch.from_numpy(arrays[sized if sized in arrays else "latents"])
    with Image.open(info.absolute_path) as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(ImageOps.fit(image, info.bucket_reso), dtype=np.float32) / 127.5 - 1
    inputs = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(pipeline.vae.device)
    with torch.no_grad():
        latents = pipeline.vae.encode(inputs).latent_dist.sample()[0].cpu()
    if to_disk:
        corners = np.array(config_util.crop_ltrb(info.bucket_reso, info.image_size), dtype=np.float64)
        np.savez(cache, latents=latents.numpy(), original_size=np.array(info.image_size), crop_ltrb=corners)
    return latents


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def add_lora(model: torch.nn.Module, targets: list[str], args: argparse.Namespace) -> list[torch.nn.Parameter]:
    """LoRA layers on the layers of these names; what there is to train of them."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=args.network_dim, lora_alpha=args.network_alpha, target_modules=targets))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_weights(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Module, side (lora_down or lora_up) and weight."""
    from peft import get_peft_model_state_dict

    for name, weight in get_peft_model_state_dict(model).items():
        module, _, side = name.removesuffix(".weight").rpartition(".")
        yield module, {"lora_A": "lora_down", "lora_B": "lora_up"}[side], weight


# Training


def make_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    from diffusers.optimization import get_scheduler

    warmup = args.lr_warmup_steps  # updates, or a share of all of them
    warmup = int(warmup * args.max_train_steps) if isinstance(warmup, float) else warmup
    if args.lr_scheduler == "constant" and warmup:
        raise ValueError(f"{args.lr_scheduler} does not require `num_warmup_steps`. Set None or 0.")
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_scheduler_num_cycles,
        power=args.lr_scheduler_power,
    )


def learning_rates(args: argparse.Namespace) -> dict[str, float]:
    """text_encoder_lr may be a list, whose first rate networks.lora takes for all text encoders."""
    text = args.text_encoder_lr
    if isinstance(text, list):
        text = text[0] if text else None
    unet = args.learning_rate if args.unet_lr is None else args.unet_lr
    return {"textencoder": args.learning_rate if text is None else text, "unet": unet}


def make_noise_scheduler(args: argparse.Namespace) -> DDPMScheduler:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=bool(args.zero_terminal_snr),
    )


def count_steps(args: argparse.Namespace, batches: int) -> int:
    """Epochs to train; sets max_train_steps (optimizer updates of the whole run) if max_train_epochs is given.

    As in kohya, the last batches of an epoch are an update of their own even if they are fewer.
    """
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_epochs:
        args.max_train_steps = args.max_train_epochs * per_epoch
        print(
            f"override steps. steps for {args.max_train_epochs} epochs is / "
            f"指定エポックまでのステップ数: {args.max_train_steps}"
        )
    return math.ceil(args.max_train_steps / per_epoch)


class AverageLoss:
    """Mean of each batch's last loss, as a running sum: one NaN stays in it for good, as in kohya's bar."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.total = 0.0

    def add(self, number: int, loss: float) -> float:
        if number == len(self.losses):
            self.losses.append(0.0)
        self.total += loss - self.losses[number]
        self.losses[number] = loss
        return self.total / len(self.losses)


class Training:
    """One run: the model, what trains it, and how far it is."""

    def __init__(
        self,
        trainer: NetworkTrainer,
        args: argparse.Namespace,
        group: config_util.DatasetGroup,
        accelerator: Accelerator,
    ) -> None:
        self.trainer, self.args, self.group, self.accelerator = trainer, args, group, accelerator
        self.started, self.epoch, self.step = time.time(), 0, 0
        self.pipeline = trainer.load_pipeline(args, accelerator)
        self.latents = cache_latents(args, group, self.pipeline) if args.cache_latents else {}
        trainer.cache_text(args, group, self.pipeline)
        print(f"import network module: {args.network_module}")
        self.parts = trainer.add_network(self.pipeline, args)
        self.trainable = [parameter for parameters in self.parts.values() for parameter in parameters]
        print("prepare optimizer, data loader etc.")
        rates = learning_rates(args)
        groups = [{"params": parameters, "lr": rates[name]} for name, parameters in self.parts.items()]
        _, _, optimizer = get_optimizer(args, groups)
        self.epochs = count_steps(args, len(group))
        schedule = make_schedule(args, optimizer)
        self.optimizer, self.schedule = accelerator.prepare(optimizer, schedule)
        self.noise_scheduler = make_noise_scheduler(args)

    def run(self) -> None:
        from tqdm import tqdm

        args, average = self.args, AverageLoss()
        describe_run(args, self.group, self.epochs)
        self.accelerator.init_trackers("network_train")
        with tqdm(total=args.max_train_steps, smoothing=0, desc="steps") as bar:
            if args.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
                raise RuntimeError("expected m1 and m2 to have the same dtype, but got: c10::Half != float")
            for epoch in range(1, self.epochs + 1):
                self.epoch = epoch
                print(f"\nepoch {epoch}/{self.epochs}\n")
                log.info("epoch is incremented. current_epoch: %d, epoch: %d", epoch - 1, epoch)
                for number, loss in enumerate(self._train_epoch()):
                    mean = average.add(number, loss)
                    bar.update(self.step - bar.n)
                    bar.set_postfix(avr_loss=mean)
                    rates = zip(self.parts, self.schedule.get_last_lr(), strict=True)
                    logs = {"loss/current": loss, "loss/average": mean, **{f"lr/{name}": rate for name, rate in rates}}
                    self.accelerator.log(logs, step=self.step)
                self.accelerator.log({"loss/epoch_average": mean}, step=epoch)
                every = args.save_every_n_epochs
                if every and epoch % every == 0 and epoch < self.epochs:
                    self._save(f"{args.output_name}-{epoch:06d}.safetensors")
            self._save(f"{args.output_name}.safetensors")
            log.info("model saved.")

    def _train_epoch(self) -> Iterator[float]:
        """Train on every batch once and yield its loss."""
        from torch.utils.data import DataLoader

        drawn = [(one, keys) for one in self.group.datasets for keys in one.draw_batches()]
        random.shuffle(drawn)
        batches = [self._make_batch(one, keys) for one, keys in drawn]
        loader = DataLoader(batches, batch_size=1, collate_fn=lambda one: one[0])
        args, accelerator, pipeline = self.args, self.accelerator, self.pipeline
        for batch in accelerator.prepare_data_loader(loader):
            with accelerator.accumulate(pipeline.unet, *self.trainer.text_encoders(pipeline).values()):
                with accelerator.autocast():
                    loss = self.trainer.loss(pipeline, self.noise_scheduler, batch, args)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self.step += 1
                    accelerator.clip_grad_norm_(self.trainable, args.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            yield loss.item()
            if self.step >= args.max_train_steps:
                return

    def _make_batch(self, dataset: config_util.DreamBoothDataset, keys: Sequence[str]) -> Batch:
        import torch

        infos = [dataset.image_data[key] for key in keys]
        latents = [self.latents.get((info.absolute_path, info.bucket_reso)) for info in infos]
        if not self.latents:
            latents = [load_latents(info, self.pipeline, to_disk=False) for info in infos]
        subsets = [dataset.image_to_subset[key] for key in keys]
        captions = [dataset.process_caption(s, info.caption) for s, info in zip(subsets, infos, strict=True)]
        return {"latents": torch.stack(latents), "captions": captions, "infos": infos}

    def _save(self, name: str) -> None:
        from safetensors.torch import save_file

        file = Path(self.args.output_dir) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"\nsaving checkpoint: {file}")
        weights = self.trainer.state_dict(self.pipeline, self.args)
        save_file(weights, file, metadata=make_metadata(self, weights))


def cache_latents(
    args: argparse.Namespace, group: config_util.DatasetGroup, pipeline: DiffusionPipeline
) -> dict[tuple[str, tuple[int, int]], torch.Tensor]:
    from tqdm import tqdm

    log.info("caching latents...")
    infos = {(info.absolute_path, info.bucket_reso): info for one in group.datasets for info in one.image_data.values()}
    to_disk = args.cache_latents_to_disk
    return {key: load_latents(info, pipeline, to_disk) for key, info in tqdm(infos.items())}


def describe_run(args: argparse.Namespace, group: config_util.DatasetGroup, epochs: int) -> None:
    print("running training / 学習開始")
    print(
        f"  num train images * repeats / 学習画像の数×繰り返し回数: {sum(o.num_train_images for o in group.datasets)}"
    )
    print(f"  num batches per epoch / 1epochのバッチ数: {len(group)}")
    print(f"  num epochs / epoch数: {epochs}")
    print(f"  batch size per device / バッチサイズ: {', '.join(str(one.batch_size) for one in group.datasets)}")
    print(f"  gradient accumulation steps / 勾配を合計するステップ数 = {args.gradient_accumulation_steps}")
    print(f"  total optimization steps / 学習ステップ数: {args.max_train_steps}")


# What a checkpoint says about itself: kohya's names, all values text.

OPTIONS_IN_METADATA = (
    "adaptive_noise_scale cache_latents caption_dropout_every_n_epochs caption_dropout_rate "
    "caption_tag_dropout_rate clip_skip face_crop_aug_range fp8_base fp8_base_unet full_fp16 "
    "gradient_accumulation_steps gradient_checkpointing huber_c huber_scale huber_schedule ip_noise_gamma "
    "ip_noise_gamma_random_strength learning_rate loss_type lowram lr_scheduler lr_warmup_steps "
    "max_grad_norm max_token_length max_train_steps max_validation_steps min_snr_gamma mixed_precision "
    "multires_noise_discount multires_noise_iterations network_alpha network_dim network_dropout "
    "network_module noise_offset noise_offset_random_strength output_name prior_loss_weight "
    "resize_interpolation scale_weight_norms seed text_encoder_lr training_comment unet_lr v2 "
    "validate_every_n_epochs validate_every_n_steps validation_seed validation_split zero_terminal_snr"
).split()


def make_metadata(training: Training, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    from safetensors.torch import save

    args, group = training.args, training.group
    values = {f"ss_{name}": getattr(args, name) for name in OPTIONS_IN_METADATA}
    values["ss_debiased_estimation"] = args.debiased_estimation_loss
    if isinstance(args.text_encoder_lr, list):
        values["ss_text_encoder_lr"] = args.text_encoder_lr[0] if args.text_encoder_lr else None
    kind, trainer = type(training.optimizer.optimizer), training.trainer
    model = Path(args.pretrained_model_name_or_path)
    values |= {
        "ss_base_model_version": trainer.version(args), "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_sd_model_name": model.name, "ss_sd_model_hash": "IsADirectory", "ss_new_sd_model_hash": "IsADirectory",
        "ss_optimizer": f"{kind.__module__}.{kind.__name__}", "ss_session_id": os.getpid(),
        "ss_training_started_at": training.started, "ss_training_finished_at": time.time(),
        "ss_epoch": training.epoch, "ss_steps": training.step, "ss_num_epochs": training.epochs,
        "ss_num_batches_per_epoch": len(group), "ss_num_reg_images": 0,
        "ss_num_train_images": sum(one.num_train_images for one in group.datasets), "ss_num_validation_images": 0,
    }  # fmt: skip
    values |= describe_sets(group)
    values |= describe_model(trainer, args, group)
    data = save(weights)
    values["sshs_model_hash"] = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    values["sshs_legacy_hash"] = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return {name: str(value) for name, value in values.items()}


def describe_sets(group: config_util.DatasetGroup) -> dict[str, str]:
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, Counter[str]] = {}
    for one in group.datasets:
        for key, info in one.image_data.items():
            name = Path(key).parent.name
            folder = folders.setdefault(name, {"n_repeats": info.num_repeats, "img_count": 0})
            folder["img_count"] += 1
            tags.setdefault(name, Counter()).update(tag.strip() for tag in info.caption.split(","))
    tables = [
        {
            "is_dreambooth": True,
            "batch_size_per_device": one.batch_size,
            "num_train_images": one.num_train_images,
            "resolution": (one.width, one.height),
        }
        for one in group.datasets
    ]
    return {
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps(tags),
        "ss_datasets": json.dumps(tables),
    }


def describe_model(
    trainer: NetworkTrainer, args: argparse.Namespace, group: config_util.DatasetGroup
) -> dict[str, Any]:
    """The modelspec.* entries of Stability AI's metadata standard."""
    width, height = group.datasets[0].width, group.datasets[0].height
    layer = {"modelspec.encoder_layer": args.clip_skip} if args.clip_skip else {}
    return layer | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": trainer.architecture,
        "modelspec.implementation": trainer.implementation,
        "modelspec.implementation_version": "small_trainer",
        "modelspec.title": args.metadata_title or args.output_name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if args.v_parameterization else "epsilon",
    }


def set_up_logging() -> None:
    """To stderr; as in kohya, through rich where it is installed, which wraps lines at the terminal's width."""
    try:
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True))
    except ImportError:
        handler = logging.StreamHandler()
    logging.basicConfig(format="%(message)s", datefmt="%Y-%m-%d %H:%M:%S", handlers=[handler])
    log.setLevel(logging.INFO)


class NetworkTrainer:
    """Stable Diffusion 1.x. As in kohya, inputs are read and checked before the card is asked for."""

    pipeline_class = "StableDiffusionPipeline"
    vae_scale = 0.18215  # latents times this have about unit variance
    pipeline_options: ClassVar[dict[str, Any]] = {"safety_checker": None}
    latents_suffix = "_sd.npz"
    architecture, implementation = "stable-diffusion-v1/lora", "diffusers"

    def train(self, args: argparse.Namespace) -> None:
        group = config_util.load_data_set(args, self.latents_suffix)
        if not len(group):
            log.error("No data found. Please verify arguments")  # and status 0, as in kohya
            return
        if args.cache_latents:
            assert group.is_latent_cacheable(), "when caching latents, either color_aug or random_crop cannot be used"
        self.check(args, group)
        log.info("preparing accelerator")
        self.train_on(self.prepare_accelerator(args), args, group)

    def check(self, args: argparse.Namespace, group: config_util.DatasetGroup) -> None:
        group.verify_bucket_reso_steps(64)

    def prepare_accelerator(self, args: argparse.Namespace) -> Accelerator:
        from accelerate import Accelerator

        logs = args.logging_dir and f"{args.logging_dir}/{args.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        return Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with="tensorboard" if logs else None,  # without effect where it is not installed
            project_dir=logs,
        )

    def train_on(self, accelerator: Accelerator, args: argparse.Namespace, group: config_util.DatasetGroup) -> None:
        import torch
        from accelerate.utils import set_seed

        torch.set_num_threads(1)  # the model is too small to share out
        print("accelerator device:", accelerator.device)
        set_seed(random.getrandbits(32) if args.seed is None else args.seed)
        Training(self, args, group, accelerator).run()

    def version(self, args: argparse.Namespace) -> str:
        return "sd_v1_v" if args.v_parameterization else "sd_v1"

    def load_pipeline(self, args: argparse.Namespace, accelerator: Accelerator) -> DiffusionPipeline:
        import diffusers
        import torch

        name = args.pretrained_model_name_or_path
        log.info("loading model for process 0/1")
        log.info("load Diffusers pretrained models: %s", name)
        options: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
        kind = getattr(diffusers, self.pipeline_class)
        pipeline = kind.from_pretrained(name, **options, **self.pipeline_options).to(accelerator.device)
        for model in (pipeline.vae, pipeline.unet, *self.text_encoders(pipeline).values()):
            model.requires_grad_(False)
        return pipeline

    def text_encoders(self, pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
        """By the beginning of their layers' names in a LoRA file."""
        return {"lora_te": pipeline.text_encoder}

    def cache_text(
        self, args: argparse.Namespace, group: config_util.DatasetGroup, pipeline: DiffusionPipeline
    ) -> None:
        """Only SDXL's text outputs can be cached."""

    def add_network(self, pipeline: DiffusionPipeline, args: argparse.Namespace) -> dict[str, list[torch.nn.Parameter]]:
        """LoRA layers, and what there is to train of them: one learning rate a part."""
        log.info("create LoRA network. base dim (rank): %s, alpha: %s", args.network_dim, args.network_alpha)
        parts: dict[str, list[torch.nn.Parameter]] = {}
        if not args.network_train_unet_only:
            encoders = self.text_encoders(pipeline).values()
            parts["textencoder"] = [one for encoder in encoders for one in add_lora(encoder, TEXT_TARGETS, args)]
            log.info("create LoRA for Text Encoder: %d modules.", len(parts["textencoder"]) // 2)
        if not args.network_train_text_encoder_only:
            parts["unet"] = add_lora(pipeline.unet, UNET_TARGETS, args)
            log.info("create LoRA for U-Net: %d modules.", len(parts["unet"]) // 2)
        return parts

    def loss(
        self, pipeline: DiffusionPipeline, noise_scheduler: DDPMScheduler, batch: Batch, args: argparse.Namespace
    ) -> torch.Tensor:
        """Mean squared error of the UNet's guess at the noise, or at the velocity, in noised latents (DDPM)."""
        import torch

        latents = batch["latents"] * self.vae_scale
        noise = torch.randn_like(latents)
        last = noise_scheduler.config.num_train_timesteps
        steps = torch.randint(0, last, (len(latents),), device=latents.device)
        noisy = noise_scheduler.add_noise(latents, noise, steps)
        guess = pipeline.unet(noisy, steps, **self.encode(pipeline, batch, args)).sample
        target = noise_scheduler.get_velocity(latents, noise, steps) if args.v_parameterization else noise
        return torch.nn.functional.mse_loss(guess.float(), target.float())

    def encode(self, pipeline: DiffusionPipeline, batch: Batch, args: argparse.Namespace) -> dict[str, Any]:
        """The UNet's conditioning; clip_skip N takes the Nth last hidden state, through the final layer norm."""
        encoder = pipeline.text_encoder
        output = encoder(tokenize(pipeline.tokenizer, batch["captions"]).to(encoder.device), output_hidden_states=True)
        if not args.clip_skip:
            return {"encoder_hidden_states": output.last_hidden_state}
        norm = getattr(encoder, "text_model", encoder).final_layer_norm  # transformers 5 has no text_model
        return {"encoder_hidden_states": norm(output.hidden_states[-args.clip_skip])}

    def state_dict(self, pipeline: DiffusionPipeline, args: argparse.Namespace) -> dict[str, torch.Tensor]:
        """The LoRA's weights under kohya's names, in save_precision."""
        import torch

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.save_precision, torch.float32)
        weights: dict[str, torch.Tensor] = {}
        for prefix, model in {**self.text_encoders(pipeline), "lora_unet": pipeline.unet}.items():
            if not hasattr(model, "peft_config"):  # only the other part is trained
                continue
            for module, side, weight in lora_weights(model):
                if prefix == "lora_unet":
                    module = self.unet_module(module, pipeline.unet.config.layers_per_block)
                else:
                    module = f"text_model.{module.removeprefix('text_model.')}"
                key = f"{prefix}_{module.replace('.', '_')}"
                weights[f"{key}.{side}.weight"] = weight.detach().to("cpu", dtype).contiguous()
                weights[f"{key}.alpha"] = torch.tensor(float(args.network_alpha), dtype=dtype)
        return weights

    def unet_module(self, name: str, layers_per_block: int) -> str:
        """A layer's name in kohya's UNet; that of Stable Diffusion 1.x has diffusers' names."""
        return name


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    NetworkTrainer().train(read_arguments(sys.argv[1:] if argv is None else argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
