"""The whole program with the real sd-scripts on the CPU; skipped unless SD_SCRIPTS_DIR names it.

    SD_SCRIPTS_DIR=~/sd-scripts SD_SCRIPTS_PYTHON=~/kohya/bin/python python -m pytest tests/test_real_kohya.py

SD_SCRIPTS_PYTHON (default: this Python) must import what kohya needs; without torchvision a stand-in on its path
will do. Makes a full-size SD 1.5 single file of random weights (2 GB, by kohya's own converter), and trains one
trial of 12 epochs of one step on four 64-pixel pictures, killed, resumed, and paused half-way: minutes on two cores.
What sd-scripts says of people's data sets is tried in test_field_cases.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import toml
from conftest import REPOSITORY, DataSetFile, Pictures
from optuna.trial import FrozenTrial

import optuna_hyperparameter_search as search

SD_SCRIPTS = os.environ.get("SD_SCRIPTS_DIR")
PYTHON = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
pytestmark = pytest.mark.skipif(not SD_SCRIPTS, reason="with the real sd-scripts (SD_SCRIPTS_DIR=its folder)")

# Run by kohya's Python in kohya's folder: argv[1] is the file to make, argv[2] the folder for the configs.
MAKE_SD15 = """
import sys, torch
sys.path.insert(0, ".")
from pathlib import Path
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from library import model_util
from transformers import CLIPTextConfig, CLIPTextModel
torch.manual_seed(0)
unet = UNet2DConditionModel(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                    block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                    num_attention_heads=12, projection_dim=768))
file, configs = sys.argv[1:]
for name, model in (("unet", unet), ("vae", vae)):
    model.save_config(configs + "/" + name)
text.config.architectures = ["CLIPTextModel"]
text.config.save_pretrained(configs + "/text_encoder")
DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
              steps_offset=1).save_pretrained(configs + "/scheduler")
model_util.save_stable_diffusion_checkpoint(False, file, text, unet, None, 0, 0, None, torch.float16, vae)
"""
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_sd15(folder: Path) -> tuple[Path, Path]:
    """A single file and the folder of its configs."""
    file, configs = folder / "sd15.safetensors", folder / "configs"
    tiny_models.write_tokenizer(configs / "tokenizer")
    (configs / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    subprocess.run([PYTHON, "-c", MAKE_SD15, str(file), str(configs)], cwd=SD_SCRIPTS, check=True)
    return file, configs


def weights_of(lora: Path) -> bytes:
    """All of a LoRA file but its header."""
    content = lora.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def command_for(folder: Path, data_set: Path) -> list[str]:
    """The search's command, with all inputs made in the folder but the data set; its results go to out/ there."""
    base_model, configs = make_sd15(folder)
    tokenizers = folder / "tokenizers" / "openai_clip-vit-large-patch14"
    tiny_models.write_tokenizer(tokenizers)
    tiny_models.make_tiny_dinov2(folder / "dinov2")
    tiny_models.make_tiny_clip(folder / "clip")
    training = toml.loads((REPOSITORY / "configs" / "training.toml").read_text())
    training |= {"mixed_precision": "no", "save_every_n_epochs": 6, "max_data_loader_n_workers": 0}
    training |= {"persistent_data_loader_workers": False, "tokenizer_cache_dir": str(tokenizers.parent)}
    (folder / "training.toml").write_text(toml.dumps(training))
    encoders = {name: str(folder / name) for name in ("dinov2", "clip")}
    stages = {key: {"prompts": 2, "seeds": 2, "plain_prompts": 2} for key in ("screen", "confirm", "final")}
    scoring = {
        "images": {"resolution": 64, "steps": 2}, "encoders": {**encoders, "pipeline_config": str(configs)}, **stages,
        "stop_early": {"at_percent": 50, "whole_trials": 0},  # the trainer is paused at epoch 6
    }  # fmt: skip
    (folder / "scoring.toml").write_text(toml.dumps(scoring))
    (folder / "first.toml").write_text("max_train_epochs = 12\nnetwork_dim = 64\ngradient_accumulation_steps = 1")
    return [
        sys.executable, str(REPOSITORY / "optuna_hyperparameter_search.py"), f"--dataset-config={data_set}",
        f"--base-model={base_model}", f"--sd-scripts={SD_SCRIPTS}", f"--trainer-python={PYTHON}",
        f"--training-config={folder / 'training.toml'}", f"--scoring-config={folder / 'scoring.toml'}",
        f"--enqueue={folder / 'first.toml'}", f"--output-dir={folder / 'out'}", "--n-trials=1", "--device=cpu",
    ]  # fmt: skip


def killed_at(wanted: str, command: list[str]) -> str:
    """What the command said until then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if wanted in line:
            break
    process.kill()
    process.wait()
    assert wanted in said, said
    return said


def check_scored(out: Path, trial: FrozenTrial, said: str) -> None:
    """Screened at its pause, and whole."""
    assert trial.user_attrs["ended"] == "scored" and trial.user_attrs["lost_seconds"] > 0
    metrics = search.read_json(out / "trial_0000" / "metrics.json")
    assert [result["epoch"] for result in metrics["screen"]] == [6, 12]
    assert "epoch 12/12  step 12/12  100%" in said
    assert "epoch 6/12: the trainer is paused" in said and said.count("epoch   6    score") == 1
    assert list(trial.intermediate_values) == [50, 60, 70, 80, 90, 100]
    curve = search.loss_curve(out / "trial_0000" / "training.log", epochs=12)
    assert [epoch for epoch, _ in curve] == list(range(1, 13)) and all(loss > 0 for _, loss in curve)
    assert "trial 0" in (out / "results" / "report.html").read_text(encoding="utf-8")
    assert (out / "trial_0000" / "scores" / "contact_sheet.jpg").is_file()
    runs = {file.parent.relative_to(out).parts[0] for file in out.rglob("events.out.tfevents.*")}
    assert runs == {"trial_0000"}  # what TensorBoard shows


def check_best_lora(lora: Path, base_model: Path) -> None:
    """kohya's own labels, and the size that the search reckons with."""
    header = search.read_safetensors_header(lora)
    metadata = header["__metadata__"]
    assert metadata["ss_network_dim"] == "64" and metadata["ss_num_epochs"] == "12"
    weights = [entry["data_offsets"] for name, entry in header.items() if name.endswith(".weight")]
    saved = sum(end - start for start, end in weights)
    assert 64 * search.BaseModel.inspect(base_model).lora_bytes_per_dim == pytest.approx(saved, rel=0.01)


def test_a_trial_with_the_real_trainer(tmp_path: Path, pictures: Pictures, data_set_file: DataSetFile) -> None:
    folder = pictures(sizes=[(64, 64)] * 4)
    command = command_for(tmp_path, data_set_file(dataset={"batch_size": 4}, subsets=[{"image_dir": str(folder)}]))
    out = tmp_path / "out"
    said = killed_at("epoch 2/12", command)
    assert "no option" not in said and "does not say what it trains" not in said
    answer = search.read_json(out / "reference" / "kohya_answer.json")
    for part in ("reference/first_step", "trial_0000"):  # the probe's count is what kohya then prints
        assert answer["batches"] == search.printed_batches(out / part / "training.log") == 1
    assert [Path(image["latents"]).is_file() for image in answer["images"]] == [True] * 4

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trying the trainer out" not in done.stdout  # its latents and its answer are known
    study = search.load_study(search.default_storage(out), "lora_v2.1")
    assert study is not None
    (trial,) = study.get_trials()
    check_scored(out, trial, done.stdout)
    best = out / "results" / "best_lora.safetensors"
    check_best_lora(best, tmp_path / "sd15.safetensors")

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "Trial 1" not in again.stdout
    config = out / "results" / "best_config.toml"
    retrain = [PYTHON, "train_network.py", "--config_file", str(config)]
    subprocess.run(retrain, cwd=SD_SCRIPTS, check=True, env=search.ChildProcess.environment("cpu"))
    repeated = Path(toml.loads(config.read_text())["output_dir"]) / trial.user_attrs["checkpoint"]
    assert weights_of(repeated) == weights_of(best)  # bit for bit, without a pause
