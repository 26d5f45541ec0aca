"""What the user gives is read as kohya reads it, or refused: in one line a problem, all problems at once."""

from __future__ import annotations

import importlib
import json
import random
import re
import shlex
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import demo_world
import pytest
import tiny_models
import toml
from conftest import DataSetFile, Pictures

import optuna_hyperparameter_search as search

sys.path.append(str(demo_world.SMALL_TRAINER))  # for its library
KOHYA = json.loads((Path(__file__).parent / "kohya_data_set.json").read_text(encoding="utf-8"))
OPTIONS: dict[str, Any] = {"cache_latents": True}  # otherwise kohya takes only pictures of the very resolution


def refusal(read: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The problems that a reader reports, each of them one line."""
    with pytest.raises(search.RefusedInput) as caught:
        read(*args)
    problems = caught.value.problems
    assert problems
    assert all(problem.strip() and "\n" not in problem for problem in problems)
    assert len(set(problems)) == len(problems)
    return problems


def the_refusal(read: Callable[..., Any], *args: Any) -> str:
    """The one problem that there is."""
    problems = refusal(read, *args)
    assert len(problems) == 1, problems
    return problems[0]


# ------------------------------------------------------------------------------------------------------
# Any TOML
# ------------------------------------------------------------------------------------------------------


def read_training_options(path: Path, known: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Read, and checked as options of a trainer that knows these."""
    return search.check_training_options(search.read_training_options(path), path, known)


READERS: dict[str, Callable[[Path], Any]] = {
    "--dataset-config": search.read_data_set_file,
    "--training-config": read_training_options,
    "--scoring-config": search.ScoringSettings.read,
}


@pytest.mark.parametrize("flag", READERS)
@pytest.mark.parametrize(
    "content",
    [
        b"a = ",
        b"[x",
        b"a = [1, 'b']",
        b"a = .1",
        b"\xff\xfe\x00",
        b"a = 1\na = 2",
        b"x\n" * 9,
        b"a = 'b",
        b"]]",
        b"= 1",
    ],
)
def test_refuses_a_file_that_is_no_toml_and_names_flag_and_file(flag: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    problem = the_refusal(READERS[flag], path)
    assert problem.startswith(flag)
    assert str(path) in problem


@pytest.mark.parametrize("flag", READERS)
def test_refuses_a_missing_file(flag: str, tmp_path: Path) -> None:
    assert str(tmp_path / "none.toml") in the_refusal(READERS[flag], tmp_path / "none.toml")


@pytest.mark.parametrize("flag", READERS)
def test_refuses_a_folder_in_place_of_a_file(flag: str, tmp_path: Path) -> None:
    assert the_refusal(READERS[flag], tmp_path).startswith(flag)


# ------------------------------------------------------------------------------------------------------
# The fixed training options
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "training.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_reads_the_training_options_that_come_with_the_program(repository: Path) -> None:
    options = read_training_options(repository / "configs" / "training.toml")
    v1 = {
        "network_module": "networks.lora",
        "mixed_precision": "fp16",
        "gradient_checkpointing": True,
        "cache_latents": True,
        "save_every_n_epochs": 2,
        "seed": 42,
        "clip_skip": 2,
        "sdpa": True,
    }
    assert {name: options[name] for name in v1} == v1
    assert options["save_model_as"] == "safetensors"


def test_flattens_one_level_of_tables(training: Callable[[str], Path]) -> None:
    options = read_training_options(training('[model]\nsdpa = true\n[save]\nsave_precision = "bf16"\n'))
    assert options["sdpa"] is True
    assert options["save_precision"] == "bf16"
    assert not {"model", "save"} & options.keys()


IGNORED = (
    # searched
    "learning_rate unet_lr text_encoder_lr network_dim network_alpha optimizer_type max_train_epochs lr_scheduler "
    "lr_scheduler_num_cycles gradient_accumulation_steps lr_warmup_steps "
    # set by the program
    "max_train_steps epoch train_data_dir save_last_n_epochs save_last_n_steps save_last_n_epochs_state "
    "save_last_n_steps_state output_dir output_name output_config logging_dir pretrained_model_name_or_path "
    "dataset_config"
).split()
FORBIDDEN = (
    # would quietly beat the search or the program
    "use_8bit_adam use_lion_optimizer lr_scheduler_type network_train_unet_only network_train_text_encoder_only "
    "dim_from_weights network_weights "
    # secrets
    "huggingface_token wandb_api_key "
    # would fill the disk
    "save_state save_state_on_train_end save_state_to_huggingface"
).split()


@pytest.mark.parametrize("key", FORBIDDEN)
@pytest.mark.parametrize("table", ["", "[some]\n"], ids=["top", "table"])
def test_refuses_a_fixed_option_that_would_beat_the_search(
    key: str, table: str, training: Callable[[str], Path]
) -> None:
    path = training(f"{table}{key} = 1\nseed = 7\n")
    problem = the_refusal(read_training_options, path)
    assert f"'{key}'" in problem
    assert str(path) in problem


@pytest.mark.parametrize("table", ["", "[some]\n"], ids=["top", "table"])
def test_what_the_search_sets_is_left_out_and_named(table: str, training: Callable[[str], Path]) -> None:
    path = training(table + "".join(f"{key} = 1\n" for key in IGNORED) + "seed = 7\n")
    options = read_training_options(path)
    assert options["seed"] == 7 and not set(IGNORED) & options.keys()
    assert [key for key in search.read_training_options(path) if key not in options] == IGNORED  # as --check names them


def test_a_preset_of_kohyas_gui_is_read_as_the_gui_reads_it(tmp_path: Path) -> None:
    known = json.loads((Path(__file__).parent / "kohya" / "train_network_options.json").read_text(encoding="utf-8"))
    path = tmp_path / "preset.json"
    preset = {
        "LoRA_type": "Standard", "learning_rate": 0.0001, "network_dim": 32, "epoch": 50, "max_resolution": "512,512",
        "optimizer": "AdamW", "lr_warmup": 10, "xformers": "sdpa", "max_token_length": "75", "clip_skip": "2",
        "seed": "", "vae_batch_size": 0, "min_snr_gamma": 5, "noise_offset": "0.05", "cache_latents": True,
        "full_bf16": False, "keep_tokens": "0", "max_data_loader_n_workers": "0", "mixed_precision": "bf16",
        "output_dir": "D:/out", "v2": False, "wandb_api_key": "", "save_every_n_epochs": 1, "output_name": "001",
        "optimizer_args": "decouple=True d_coef=2", "dynamo_backend": "no", "metadata_title": "1984", "odd": [[1, {}]],
        "multires_noise_iterations": 6.0, "network_args": "rank_dropout=0.1 module_dropout=0.2",
        "bucket_reso_steps": 64.0,
    }  # fmt: skip
    path.write_text(json.dumps(preset), encoding="utf-8")
    options = read_training_options(path, known)
    assert options == {
        "network_module": "networks.lora", "save_model_as": "safetensors", "save_every_n_epochs": 1, "clip_skip": 2,
        "seed": 42, "sdpa": True, "min_snr_gamma": 5, "noise_offset": 0.05, "cache_latents": True,
        "mixed_precision": "bf16", "metadata_title": "1984", "multires_noise_iterations": 6, "bucket_reso_steps": 64,
        "network_args": ["rank_dropout=0.1", "module_dropout=0.2"],
    }  # fmt: skip
    unchecked = search.read_training_options(path)  # the trainer is asked with these
    assert type(unchecked["bucket_reso_steps"]) is int and "optimizer_args" in search.ignored_options(unchecked)
    ignored = [key for key in unchecked if key not in options]
    names = "learning_rate network_dim epoch max_resolution optimizer lr_warmup output_dir output_name optimizer_args"
    assert ignored == names.split()
    path.write_text("[1, 2]", encoding="utf-8")
    assert "(it holds no { } of names and values)" in the_refusal(search.read_training_options, path)


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("Standard", "networks.lora", None),
        ("Kohya LoCon", "networks.lora", ["conv_dim=8", "conv_alpha=4", "rank_dropout=0.1"]),
        ("LyCORIS/LoKr", "lycoris.kohya",
         ["conv_dim=8", "conv_alpha=4", "rank_dropout=0.1", "factor=4", "algo=lokr", "preset=full"]),
    ],
)  # fmt: skip
def test_a_preset_trains_the_kind_of_lora_that_it_names(
    tmp_path: Path, kind: str, module: str, arguments: list[str] | None
) -> None:
    about = {"conv_dim": 8, "conv_alpha": 4, "LyCORIS_preset": "full", "factor": 4, "use_tucker": False}
    preset = {"LoRA_type": kind, "rank_dropout": "0.1", **about}
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(preset), encoding="utf-8")
    options = read_training_options(path)
    assert (options["network_module"], options.get("network_args")) == (module, arguments)
    path.write_text(json.dumps({**preset, "train_norm": True}), encoding="utf-8")
    if module == search.LYCORIS:
        assert "can't be scored with train_norm" in the_refusal(read_training_options, path)


def test_a_kind_of_lora_that_cant_be_scored_is_named(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    for kind, said in (("LyCORIS/iA3", "algo is one of lora,"), ("Kohya DyLoRA", "must be 'networks.lora' or")):
        path.write_text(json.dumps({"LoRA_type": kind}), encoding="utf-8")
        assert said in the_refusal(read_training_options, path)


@pytest.mark.parametrize(("value", "is_right"), [("cosine", True), ("adafactor:1e-3", True), ("cosin", False)])
def test_a_choice_of_kohya_may_be_followed_by_its_own_value(value: str, is_right: bool) -> None:
    said = search._wrong_option("lr_scheduler", value, {"kind": "str", "choices": ["cosine", "adafactor"]})
    assert (said == "") == is_right


def test_a_toml_that_kohyas_gui_saved_is_taken(training: Callable[[str], Path]) -> None:
    known = json.loads((Path(__file__).parent / "kohya" / "train_network_options.json").read_text(encoding="utf-8"))
    text = """
bucket_no_upscale = true
clip_skip = 1
dynamo_backend = "no"
epoch = 8
huggingface_token = ""
learning_rate = 0.00004
lr_scheduler_args = []
max_token_length = 75
max_train_steps = 1600
noise_offset_type = "Original"
optimizer_args = ["d_coef=2"]
optimizer_type = "Prodigy"
output_dir = "/app/outputs"
persistent_data_loader_workers = 1
sample_prompts = ""
xformers = true
"""
    options = read_training_options(training(text), known)
    expected = {"bucket_no_upscale": True, "clip_skip": 1, "persistent_data_loader_workers": True, "xformers": True}
    assert options == {
        "network_module": "networks.lora", "save_model_as": "safetensors", "save_every_n_epochs": 1, "seed": 42,
        **expected,
    }  # fmt: skip


def test_reports_all_forbidden_options_at_once(training: Callable[[str], Path]) -> None:
    path = training('save_state = true\nwandb_api_key = "x"\nsave_model_as = "ckpt"\nclip_skip = 0\n')
    problems = "\n".join(refusal(read_training_options, path))
    for word in ("save_state", "wandb_api_key", "save_model_as", "clip_skip"):
        assert word in problems


@pytest.mark.parametrize("line", ["v2 = false", 'vae = ""', "save_state = false", 'wandb_api_key = ""'])
def test_a_forbidden_option_at_kohyas_default_is_dropped(line: str, training: Callable[[str], Path]) -> None:
    options = read_training_options(training(f"{line}\nsdpa = true\n"))
    assert line.split()[0] not in options and options["sdpa"] is True


@pytest.mark.parametrize("line", ["lr_decay_steps = 0", "v2 = true", 'vae = "vae.safetensors"', 'base_weights = ["a"]'])
def test_a_forbidden_option_with_any_other_value_is_refused(line: str, training: Callable[[str], Path]) -> None:
    assert line.split()[0] in the_refusal(read_training_options, training(line))


def test_trains_what_can_be_scored_and_nothing_else(training: Callable[[str], Path]) -> None:
    assert read_training_options(training(""))["network_module"] == "networks.lora"
    assert "networks.oft" in the_refusal(read_training_options, training('network_module = "networks.oft"'))
    lycoris = 'network_module = "lycoris.kohya"\nnetwork_args = ["conv_dim=4", '
    assert read_training_options(training(f'{lycoris}"algo=LoKr", "dora_wd=False"]'))["network_args"][1] == "algo=LoKr"
    for unscored in ("algo=oft", "dora_wd=True", 'algo=lokr", "use_tucker=1'):
        assert "can't be scored" in the_refusal(read_training_options, training(f'{lycoris}"{unscored}"]'))


def test_a_preset_of_lycoris_is_read_for_what_cant_be_scored(training: Callable[[str], Path], tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    config = training(f'network_module = "lycoris.kohya"\nnetwork_args = ["algo=lokr", "preset={preset}"]')
    assert "can't read" in the_refusal(read_training_options, config)
    preset.write_text('enable_conv = true\n[module_algo_map.Attention]\nalgo = "loha"\ntrain_norm = false\n')
    assert read_training_options(config)["network_args"] == ["algo=lokr", f"preset={preset}"]
    for unscored in ('algo = "oft"', "algo = 3", "train_norm = true", "dora_wd = true"):
        preset.write_text(f"[name_algo_map.mid_block]\n{unscored}\n")
        assert "can't be scored" in the_refusal(read_training_options, config)
    assert read_training_options(training('network_args = ["preset=full"]'))["network_args"] == ["preset=full"]


@pytest.mark.parametrize("key", ["network_args", "optimizer_args", "lr_scheduler_args"])
@pytest.mark.parametrize("argument", ["conv_dim", "a=1=2", "a=1 b=2", "algo = lokr", "=1", ""])
def test_an_argument_is_a_name_and_a_value(key: str, argument: str) -> None:
    said = search._wrong_option(key, ["a=1", argument], {"kind": "str", "is_list": True})
    assert said == f"must hold texts such as 'name=value', and {argument!r} is none; correct it"


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("network_dropout", 27.0, "network_dropout from 0 to below 1"), ("network_dropout", -0.1, "network_dropout"),
        ("network_dropout", 1, "network_dropout"), ("network_dropout", 0.25, ""), ("caption_dropout_rate", 1.0, ""),
        ("caption_dropout_rate", 1.5, "caption_dropout_rate from 0 to 1"), ("caption_dropout_every_n_epochs", 5, ""),
        ("network_args", ["conv_dim=8", "rank_dropout=1"], "rank_dropout from 0 to below 1"),
        ("network_args", ["module_dropout=no"], "module_dropout"),
        ("network_args", ["rank_dropout=nan"], "rank_dropout"),
        ("network_args", ["rank_dropout=0.1", "conv_dim=8"], ""),
    ],
)  # fmt: skip
def test_a_dropout_is_a_share(key: str, value: Any, wrong: str) -> None:
    said = search._wrong_option(key, value, {"is_list": True})
    assert said.startswith(f"must have {wrong}") if wrong else not said


def test_a_number_that_is_too_large_is_told_so(training: Callable[[str], Path]) -> None:
    problem = the_refusal(read_training_options, training("seed = 5000000000"))
    assert "must be a whole number of 0 or more, and below 4294967296" in problem


def test_a_batch_has_a_picture(training: Callable[[str], Path]) -> None:
    assert "train_batch_size = 0" in the_refusal(read_training_options, training("train_batch_size = 0"))


def test_paths_become_absolute(
    training: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "tokenizers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = read_training_options(training('tokenizer_cache_dir = "cache/tokenizers"\nmetadata_title = "a/b"'))
    assert options["tokenizer_cache_dir"] == str(tmp_path / "cache" / "tokenizers")
    assert options["metadata_title"] == "a/b"


def test_never_shows_a_secret(training: Callable[[str], Path]) -> None:
    problem = the_refusal(read_training_options, training('wandb_api_key = "very-secret"\n'))
    assert "very-secret" not in problem


@pytest.mark.parametrize("kind", ["ckpt", "pt", "diffusers"])
def test_refuses_another_file_format_than_safetensors(kind: str, training: Callable[[str], Path]) -> None:
    assert "save_model_as" in the_refusal(read_training_options, training(f'save_model_as = "{kind}"\n'))


@pytest.mark.parametrize("value", ['"vae.pt"', '"a/b.CKPT"', '["one.safetensors", "two.bin"]', '["x.pth"]'])
def test_refuses_pickles_anywhere(value: str, training: Callable[[str], Path]) -> None:
    problem = the_refusal(read_training_options, training(f"sample_prompts = {value}\n"))
    assert "pickle" in problem
    assert "sample_prompts" in problem


@pytest.mark.parametrize(
    "line",
    [
        "save_every_n_epochs = 0",
        "save_every_n_epochs = 1.5",
        'clip_skip = "2"',
        "clip_skip = -1",
        "seed = 1.5",
        "seed = -1",
    ],
)
def test_refuses_numbers_that_the_program_cannot_work_with(line: str, training: Callable[[str], Path]) -> None:
    assert line.split()[0] in the_refusal(read_training_options, training(line))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("resolution = 512", "in quotes"),
        ("caption_prefix = 5", "must be a text"),
        ("max_grad_norm = 'big'", "must be a number"),
        ("train_batch_size = 1.5", "must be a whole number"),
        ("sdpa = 2", "must be true or false"),
        ("sdpa = 1", ""),
        ("gradient_checkpointing = 'yes'", "must be true or false"),
        ("mixed_precision = 'fp8'", "one of no, fp16, bf16"),
        ("optimizer_args = 'weight_decay=0.1'", ""),
        ("optimizer_args = ['weight_decay=0.1']", ""),
        ("network_args = [1]", "must be a text"),
        ("noise_ofset = 0.1", "did you mean 'noise_offset'?"),
        ("loss_type = 'l3'", "one of l1, l2"),
        ("max_token_length = 225", ""),
        ("lr_scheduler_power = 2", ""),
        ("min_snr_gamma = true", "must be a number"),
    ],
)
def test_options_are_those_of_the_trainer_and_of_their_kinds(
    line: str, says: str, training: Callable[[str], Path]
) -> None:
    known = json.loads((Path(__file__).parent / "kohya" / "train_network_options.json").read_text(encoding="utf-8"))
    if not says:
        assert line.split()[0] in read_training_options(training(line), known)
    else:
        problem = the_refusal(read_training_options, training(line), known)
        assert says in problem and line.split()[0] in problem


def test_an_empty_list_is_unset(training: Callable[[str], Path]) -> None:
    """As kohya's GUI saves it."""
    assert "optimizer_args" not in read_training_options(training("optimizer_args = []\nlr_scheduler_args = []"))


# ------------------------------------------------------------------------------------------------------
# The scoring settings
# ------------------------------------------------------------------------------------------------------

ScoringFile = Callable[[Callable[[dict[str, Any]], Any]], Path]


@pytest.fixture
def scoring(repository: Path, tmp_path: Path) -> ScoringFile:
    """configs/scoring.toml with a change made to it."""

    def write(change: Callable[[dict[str, Any]], Any]) -> Path:
        content = toml.loads((repository / "configs" / "scoring.toml").read_text(encoding="utf-8"))
        change(content)
        path = tmp_path / "scoring.toml"
        path.write_text(toml.dumps(content), encoding="utf-8")
        return path

    return write


def test_reads_the_scoring_settings_that_come_with_the_program(repository: Path) -> None:
    settings = search.ScoringSettings.read(repository / "configs" / "scoring.toml")
    assert settings.screen == {"prompts": 8, "seeds": 2, "plain_prompts": 4}
    assert settings.confirm == {"prompts": 16, "seeds": 3, "plain_prompts": 10}
    assert settings.weights == {
        "fidelity": 0.5, "text": 0.8, "preservation": 0.8, "originality": 0.5, "variety": 0.0, "usable": 2.0,
    }  # fmt: skip
    assert [settings.images[name] for name in ("resolution", "steps", "guidance_scale")] == [512, 25, 7.0]
    assert settings.usable == {"flat_std": 5.0, "black_p99": 16.0, "white_p1": 240.0}
    assert settings.encoders["dinov2"] == "facebook/dinov2-base"
    assert settings.encoders["clip"] == "openai/clip-vit-large-patch14"
    assert all("{subject}" in template for template in settings.prompts["elsewhere"] + settings.prompts["style"])
    assert not any("{subject}" in template for template in settings.prompts["plain"])


TABLES = "images screen confirm final stop_early weights encoders usable prompts".split()


@pytest.mark.parametrize("table", TABLES)
def test_refuses_an_unknown_key_in_every_scoring_table(table: str, scoring: ScoringFile) -> None:
    path = scoring(lambda content: content[table].update(no_such_key=1))
    problem = the_refusal(search.ScoringSettings.read, path)
    assert "'no_such_key'" in problem
    assert f"[{table}]" in problem
    assert str(path) in problem


@pytest.mark.parametrize("table", TABLES)
def test_what_a_scoring_config_leaves_out_is_as_in_the_shipped_one(table: str, scoring: ScoringFile) -> None:
    shipped = search.ScoringSettings.read(Path(search.HERE) / "configs" / "scoring.toml")
    assert search.ScoringSettings.read(scoring(lambda content: content.pop(table))) == shipped
    assert search.ScoringSettings.read(scoring(lambda content: content[table].popitem())) == shipped


def test_a_scoring_config_may_change_one_value(tmp_path: Path) -> None:
    (tmp_path / "scoring.toml").write_text("[images]\nsteps = 12\n")
    changed = search.ScoringSettings.read(tmp_path / "scoring.toml")
    assert (changed.images["steps"], changed.images["resolution"]) == (12, 512)
    assert changed.prompts["plain"]


def test_a_table_of_a_scoring_config_must_be_one(scoring: ScoringFile) -> None:
    problem = the_refusal(search.ScoringSettings.read, scoring(lambda content: content.update(images=3)))
    assert problem.startswith("--scoring-config: [images] in ") and problem.endswith("; write its keys below it")


@pytest.mark.parametrize(
    ("table", "wrong", "right"),
    [("images", "resolutoin", "resolution"), ("weights", "fidelty", "fidelity"), ("prompts", "elswhere", "elsewhere")],
)
def test_hints_at_the_nearest_scoring_key(table: str, wrong: str, right: str, scoring: ScoringFile) -> None:
    problem = the_refusal(search.ScoringSettings.read, scoring(lambda content: content[table].update({wrong: 1})))
    assert f"did you mean '{right}'?" in problem


def test_hints_at_the_nearest_scoring_table(scoring: ScoringFile) -> None:
    problem = the_refusal(search.ScoringSettings.read, scoring(lambda content: content.update(wieghts={"a": 1})))
    assert "did you mean 'weights'?" in problem


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("images", "resolution", 512.0),
        ("images", "resolution", 8),
        ("images", "resolution", 500),  # the VAE works on blocks of 8 pixels
        ("images", "steps", 0),
        ("images", "steps", "25"),
        ("images", "steps", True),
        ("images", "guidance_scale", -1.0),
        ("images", "guidance_scale", float("nan")),
        ("images", "guidance_scale", float("inf")),
        ("images", "negative_prompt", 3),
        ("images", "batch_size", 0),
        ("screen", "seeds", 1),
        ("confirm", "prompts", 0),
        ("weights", "text", -0.1),
        ("weights", "text", "0.5"),
        ("encoders", "clip", 1),
        ("usable", "flat_std", "5"),
        ("prompts", "style", ["{subject}"]),
        ("prompts", "style", "{subject}, oil"),
        ("prompts", "style", ["{subject}, oil", "  "]),
        ("prompts", "plain", ["a cat", "{subject} with a cat"]),
    ],
)
def test_refuses_wrong_scoring_values(table: str, key: str, value: Any, scoring: ScoringFile) -> None:
    path = scoring(lambda content: content[table].update({key: value}))
    assert f"{key} in [{table}] of {path}" in the_refusal(search.ScoringSettings.read, path)


def test_takes_whole_numbers_where_fractions_may_stand(scoring: ScoringFile) -> None:
    path = scoring(lambda content: content["images"].update(guidance_scale=7))
    assert search.ScoringSettings.read(path).images["guidance_scale"] == 7


def test_takes_a_weight_of_nothing_but_not_all_of_them(scoring: ScoringFile) -> None:
    path = scoring(lambda content: content["weights"].update(text=0.0))
    assert search.ScoringSettings.read(path).weights["text"] == 0
    path = scoring(lambda content: content["weights"].update(dict.fromkeys(content["weights"], 0.0)))
    assert "weights" in the_refusal(search.ScoringSettings.read, path)


@pytest.mark.parametrize("key", ["elsewhere", "style"])
@pytest.mark.parametrize("template", ["{subjct} in snow", "{subject in snow", "{} in snow", "{subject.x}", "in snow"])
def test_refuses_a_prompt_that_cannot_name_the_subject(key: str, template: str, scoring: ScoringFile) -> None:
    """Found here, it costs nothing; found by scoring, it costs a training."""
    problem = the_refusal(
        search.ScoringSettings.read, scoring(lambda content: content["prompts"][key].append(template))
    )
    assert repr(template) in problem
    assert key in problem


def test_reports_all_that_is_wrong_with_the_scoring_settings(scoring: ScoringFile) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"].update(steps=0, extra=1)
        content["weights"]["text"] = -1.0
        content["wrong"] = {}

    assert len(refusal(search.ScoringSettings.read, scoring(change))) == 4


# ------------------------------------------------------------------------------------------------------
# The data set
# ------------------------------------------------------------------------------------------------------


def read(path: Path, options: Mapping[str, Any] = OPTIONS) -> search.DataSet:
    return demo_world.read_data_set(path, options)


def test_the_example_is_refused_only_for_the_folder_that_the_user_must_fill_in(repository: Path) -> None:
    problem = the_refusal(read, repository / "configs" / "luca_human_dataset.toml")
    assert "/path/to/luca_human/images" in problem


def test_the_example_reads_once_its_folder_is_filled_in(repository: Path, tmp_path: Path, pictures: Pictures) -> None:
    text = (repository / "configs" / "luca_human_dataset.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("/path/to/luca_human/images", str(pictures(sizes=[(512, 512)] * 9))), encoding="utf-8")
    found = read(path)
    assert len(found.images) == 9
    assert found.batches_per_epoch == 2  # nine pictures of one size at batch 8


def test_reads_pictures_captions_and_repeats(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures(sizes=[(64, 48), (32, 32)], caption="luca, smiling\nnot this line")
    found = read(data_set_file(subsets=[{"image_dir": str(folder), "num_repeats": 3}]))
    assert [(image.path, image.captions, image.size) for image in found.images] == [
        (folder / "00.png", ("luca, smiling",), (64, 48)),
        (folder / "01.png", ("luca, smiling",), (32, 32)),
    ]
    assert all(image.has_caption and not image.is_reg and image.bucket == (64, 64) for image in found.images)
    assert found.images[0].latents == folder / "00_0064x0048_sd.npz"
    assert found.batches_per_epoch == 6


def test_updates_are_counted_as_the_trainer_counts_them(data_set_file: DataSetFile, pictures: Pictures) -> None:
    """410 pictures at batch 8 and accumulation 4: 13 updates an epoch, 156 in 12 epochs."""
    folder = pictures(sizes=[(8, 8)] * 41)
    found = read(data_set_file(dataset={"batch_size": 8}, subsets=[{"image_dir": str(folder), "num_repeats": 10}]))
    assert found.batches_per_epoch == 52
    assert found.updates({"gradient_accumulation_steps": 4, "max_train_epochs": 12}) == 156
    assert found.updates({"gradient_accumulation_steps": 1, "max_train_epochs": 20}) == 1040


def test_a_part_filled_accumulation_is_an_update(data_set_file: DataSetFile, pictures: Pictures) -> None:
    found = read(data_set_file(subsets=[{"image_dir": str(pictures(sizes=[(8, 8)] * 5))}]))
    assert found.updates({"gradient_accumulation_steps": 2, "max_train_epochs": 12}) == 36


# --- names of keys


def test_the_stand_in_takes_kohyas_keys() -> None:
    config_util = importlib.import_module("library.config_util")
    sanitizer = config_util.ConfigSanitizer()
    assert sorted(sanitizer.general_schema) == KOHYA["keys"]["general"]
    assert sorted(sanitizer.db_dataset_schema) == KOHYA["keys"]["dataset"]
    assert sorted(sanitizer.db_subset_schema.keys() - {"conditioning_data_dir"}) == KOHYA["keys"]["subset"]


TABLE_OF = ("top", "general", "dataset", "subset")


@pytest.fixture
def with_key(data_set_file: DataSetFile, pictures: Pictures) -> Callable[[str, str, Any], Path]:
    """A good data set with one more key in the table that is asked for."""

    def write(table: str, key: str, value: Any) -> Path:
        parts: dict[str, dict[str, Any]] = {name: {} for name in TABLE_OF}
        parts[table][key] = value
        path = data_set_file(
            general=parts["general"],
            dataset=parts["dataset"],
            subsets=[{"image_dir": str(pictures()), **parts["subset"]}],
        )
        text = path.read_text(encoding="utf-8")
        path.write_text(toml.dumps(parts["top"]) + text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("table", TABLE_OF)
def test_refuses_an_unknown_key_in_every_table(table: str, with_key: Callable[[str, str, Any], Path]) -> None:
    path = with_key(table, "no_such_key", 1)
    problem = the_refusal(read, path)
    assert "'no_such_key'" in problem
    assert str(path) in problem


@pytest.mark.parametrize(
    ("table", "wrong", "right"),
    [
        ("general", "caption_extention", "caption_extension"),
        ("dataset", "batchsize", "batch_size"),
        ("dataset", "enable_buckets", "enable_bucket"),
        ("subset", "num_repeat", "num_repeats"),
        ("top", "dataset", "datasets"),
    ],
)
def test_hints_at_the_nearest_key(
    table: str, wrong: str, right: str, with_key: Callable[[str, str, Any], Path]
) -> None:
    assert f"did you mean '{right}'?" in the_refusal(read, with_key(table, wrong, 1))


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("general", "image_dir", "x"),
        ("dataset", "image_dir", "x"),
        ("subset", "resolution", 512),
        ("general", "is_reg", True),
    ],
)
def test_refuses_a_key_in_a_table_where_kohya_does_not_take_it(
    table: str, key: str, value: Any, with_key: Callable[[str, str, Any], Path]
) -> None:
    assert f"'{key}'" in the_refusal(read, with_key(table, key, value))


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("dataset", "bucket_reso_steps", "64"),
        ("dataset", "enable_bucket", "yes"),
        ("dataset", "batch_size", "2"),
        ("dataset", "network_multiplier", 1),
        ("general", "caption_extension", 5),
        ("general", "class_tokens", ["luca"]),
        ("subset", "flip_aug", 1),
        ("subset", "is_reg", "no"),
        ("subset", "keep_tokens", 1.0),
        ("subset", "image_dir", 3),
    ],
)
def test_refuses_a_value_of_a_type_that_stops_kohya(
    table: str, key: str, value: Any, with_key: Callable[[str, str, Any], Path]
) -> None:
    path = with_key(table, key, value)
    assert any(key in problem and str(path) in problem for problem in refusal(read, path))


@pytest.mark.parametrize("key", ["caption_dropout_rate", "caption_tag_dropout_rate"])
@pytest.mark.parametrize("table", ["general", "dataset", "subset"])
def test_a_dropout_of_the_data_set_is_a_share(table: str, key: str, with_key: Callable[[str, str, Any], Path]) -> None:
    for wrong in (27.0, -0.1, 2):
        path = with_key(table, key, wrong)
        assert f"--dataset-config: {key} = {wrong} in {path} is no share of the captions; give 0 to 1" in refusal(
            read, path
        )
    assert len(read(with_key(table, key, 1.0)).images) == 4


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("subset", "caption_dropout_rate", 0),
        ("subset", "token_warmup_step", 0.5),
        ("dataset", "network_multiplier", 1.0),
    ],
)
def test_takes_the_types_that_kohya_takes(
    table: str, key: str, value: Any, with_key: Callable[[str, str, Any], Path]
) -> None:
    assert len(read(with_key(table, key, value)).images) == 4


@pytest.mark.parametrize("switch", [True, 1])
def test_pictures_of_one_name_would_share_a_cache(switch: Any, pictures: Pictures, data_set_file: DataSetFile) -> None:
    folder = pictures()
    (folder / "00.png").rename(folder / "01.jpg")
    path = data_set_file(subsets=[{"image_dir": str(folder)}])
    assert "would share one cache of latents" in the_refusal(read, path, {**OPTIONS, "cache_latents_to_disk": switch})


def test_the_caption_of_a_face_crop_is_read(pictures: Pictures, data_set_file: DataSetFile) -> None:
    folder = pictures()
    (folder / "00.png").rename(folder / "00_1_2_30_40.png")
    path = data_set_file(subsets=[{"image_dir": str(folder)}])
    reader = search.DataSetReader(path, search.read_data_set_file(path))
    assert "captions that are not read" not in str(reader.read(OPTIONS, {}).notes)
    (folder / "other.txt").write_text("nobody's")
    reader = search.DataSetReader(path, search.read_data_set_file(path))
    assert f"captions that are not read in {folder}: 1 .txt, other.txt for one" in str(reader.read(OPTIONS, {}).notes)


@pytest.mark.parametrize(("switch", "says"), [(1, "luca, hat"), (0, "luca, (hat:1.2)")])
def test_weights_are_taken_out_of_captions_only_where_kohya_reads_them(
    switch: int, says: str, pictures: Pictures, data_set_file: DataSetFile
) -> None:
    path = data_set_file(subsets=[{"image_dir": str(pictures(caption="luca, (hat:1.2)"))}])
    reader = search.DataSetReader(path, search.read_data_set_file(path))
    assert {image.captions for image in reader.read({**OPTIONS, "weighted_captions": switch}, {}).images} == {(says,)}


# --- structure


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[general]\n",
        "[[datasets]]\nresolution = 64\n",
        "datasets = 3\n",
        "[datasets]\nresolution = 64\n",
        "general = 1\n[[datasets]]\nresolution = 64\n",
        "[[datasets]]\nresolution = 64\nsubsets = 1\n",
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nnum_repeats = 1\n",
    ],
)
def test_refuses_a_data_set_that_lacks_a_part(text: str, tmp_path: Path) -> None:
    path = tmp_path / "part.toml"
    path.write_text(text, encoding="utf-8")
    assert any(str(path) in problem for problem in refusal(read, path))


@pytest.mark.parametrize("resolution", [0, -1, 64.0, "64", [64], [64, 64, 64], [64, 0]])
def test_refuses_a_resolution_that_is_none(resolution: Any, data_set_file: DataSetFile) -> None:
    assert any("resolution" in problem for problem in refusal(read, data_set_file(dataset={"resolution": resolution})))


def test_refuses_a_missing_resolution(data_set_file: DataSetFile) -> None:
    path = data_set_file()
    path.write_text(path.read_text(encoding="utf-8").replace("resolution = 64", ""), encoding="utf-8")
    assert "resolution" in the_refusal(read, path)


@pytest.mark.parametrize("repeats", [0, -1, 1.5])
def test_refuses_repeats_that_make_kohya_skip_the_folder(
    repeats: Any, data_set_file: DataSetFile, pictures: Pictures
) -> None:
    path = data_set_file(subsets=[{"image_dir": str(pictures()), "num_repeats": repeats}])
    assert any("num_repeats" in problem for problem in refusal(read, path))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bucket_reso": 63},
        {"min_bucket_reso": 192},
        {"bucket_reso_steps": 0},
        {"bucket_reso_steps": 32},
        {"min_bucket_reso": 0},
    ],
    ids=["above the largest bucket", "below the smallest bucket", "no steps", "half steps", "no bucket"],
)
def test_refuses_bucket_settings_that_stop_kohya(settings: Mapping[str, int], data_set_file: DataSetFile) -> None:
    small = {"resolution": 128, "min_bucket_reso": 64, "max_bucket_reso": 192, "bucket_reso_steps": 64, **settings}
    problem = the_refusal(read, data_set_file(dataset={"enable_bucket": True, **small}))
    assert "kohya stops before its first step" in problem


@pytest.mark.parametrize("said", ["Can't load tokenizer for 'openai/clip-vit-large-patch14'", "at `open(vocab_file)`"])
def test_a_tokenizer_that_kohya_does_not_get_is_named(said: str, data_set_file: DataSetFile) -> None:
    path = data_set_file()
    reader = search.DataSetReader(path, search.read_data_set_file(path))
    with pytest.raises(
        search.RefusedInput, match="it can't get its tokenizers; `hf download openai/clip-vit-large-patch14`"
    ):
        reader.read({}, {"stopped": [[[], said]], "said": []})


def test_refuses_a_picture_smaller_than_a_bucket_step_without_upscaling(
    data_set_file: DataSetFile, pictures: Pictures
) -> None:
    folder = pictures(sizes=[(512, 512), (300, 63)])  # kohya divides by the bucket's height of 0
    dataset = {"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True}
    assert "division by zero" in the_refusal(read, data_set_file(dataset=dataset, subsets=[{"image_dir": str(folder)}]))


@pytest.mark.parametrize("key", ["color_aug", "random_crop"])
def test_refuses_what_can_not_go_with_cached_latents(key: str, data_set_file: DataSetFile, pictures: Pictures) -> None:
    path = data_set_file(subsets=[{"image_dir": str(pictures()), key: True}])
    assert "caching latents" in the_refusal(read, path, {"cache_latents_to_disk": True})
    assert read(path, {}).batches_per_epoch == 4


# --- folders and pictures


def test_refuses_a_folder_that_does_not_exist(data_set_file: DataSetFile, tmp_path: Path) -> None:
    assert "no/such" in the_refusal(read, data_set_file(subsets=[{"image_dir": str(tmp_path / "no/such")}]))


def test_refuses_an_empty_folder(data_set_file: DataSetFile, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    problem = the_refusal(read, data_set_file(subsets=[{"image_dir": str(tmp_path / "empty")}]))
    assert "has no images" in problem


def test_refuses_a_folder_given_twice(data_set_file: DataSetFile, pictures: Pictures) -> None:
    """kohya takes the first and ignores the second, whatever its repeats."""
    subset = {"image_dir": str(pictures())}
    assert "ignore duplicated subset" in the_refusal(
        read, data_set_file(subsets=[subset, {**subset, "num_repeats": 5}])
    )


def test_refuses_a_picture_that_is_none(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures()
    (folder / "01.png").write_bytes(b"not a picture")
    assert str(folder / "01.png") in the_refusal(read, data_set_file(subsets=[{"image_dir": str(folder)}]))


def test_passes_over_the_files_that_kohya_passes_over(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures()
    (folder / "._00.png").write_bytes(b"what macOS leaves behind")
    (folder / "00_0064x0064_sd.npz").write_bytes(b"a latents cache")
    (folder / "picture.gif").write_bytes(b"")
    (folder / "sub").mkdir()
    shutil.copy(folder / "00.png", folder / "sub" / "deeper.png")
    assert [image.path.name for image in read(data_set_file(subsets=[{"image_dir": str(folder)}])).images] == [
        "00.png",
        "01.png",
        "02.png",
        "03.png",
    ]


@pytest.mark.parametrize("suffix", "png jpg jpeg webp bmp PNG JPG JPEG WEBP BMP".split())
def test_takes_every_kind_of_picture_that_kohya_takes(
    suffix: str, data_set_file: DataSetFile, pictures: Pictures
) -> None:
    folder = pictures(sizes=[(64, 64)])
    (folder / "00.png").rename(folder / f"00.{suffix}")
    path = data_set_file(subsets=[{"image_dir": str(folder)}])
    assert len(read(path).images) == 1
    without_answer = search.DataSetReader(path, search.read_data_set_file(path)).read(OPTIONS, {})
    assert len(without_answer.images) == 1


def test_looks_for_a_relative_folder_beside_the_file(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures("beside")
    found = read(data_set_file(subsets=[{"image_dir": "beside"}]))
    assert found.images[0].path.parent == folder
    assert found.config["datasets"][0]["subsets"][0]["image_dir"] == str(folder)


def test_looks_for_a_relative_folder_in_the_current_folder_first(
    data_set_file: DataSetFile, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures("mine")
    here = pictures("elsewhere/mine")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read(data_set_file(subsets=[{"image_dir": "mine"}])).images[0].path.parent == here


def test_a_link_to_a_folder_of_links_is_followed(
    data_set_file: DataSetFile, pictures: Pictures, tmp_path: Path
) -> None:
    (tmp_path / "links").mkdir()
    for file in pictures().iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(tmp_path / "links")
    assert len(read(data_set_file(subsets=[{"image_dir": str(tmp_path / "link")}])).images) == 4


# --- captions


def test_refuses_pictures_without_caption_and_says_how_many(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures()
    (folder / "02.txt").unlink()
    problem = the_refusal(read, data_set_file(subsets=[{"image_dir": str(folder)}]))
    assert "1 of 4" in problem
    assert "02.png" in problem


def test_captions_are_looked_for_by_their_extension(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures(extension=".cap")
    assert "4 of 4" in the_refusal(read, data_set_file(subsets=[{"image_dir": str(folder)}]))
    found = read(data_set_file(subsets=[{"image_dir": str(folder), "caption_extension": ".cap"}]))
    assert found.images[0].captions == ("luca, a boy, smiling",)


def test_an_extension_may_be_given_without_its_dot(data_set_file: DataSetFile) -> None:
    assert read(data_set_file(general={"caption_extension": "txt"})).images[0].captions == ("luca, a boy, smiling",)


def test_captions_are_read_with_prefix_suffix_and_separators(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures(caption="a boy;smiling ||| beach", sizes=[(64, 64)])
    general = {"caption_prefix": "luca,", "caption_separator": ";", "keep_tokens_separator": "|||"}
    path = data_set_file(general=general, subsets=[{"image_dir": str(folder), "caption_suffix": "; film still"}])
    assert [image.captions for image in read(path).images] == [("luca, a boy, smiling, beach, film still",)]


def test_kohyas_own_extension_is_caption(data_set_file: DataSetFile, pictures: Pictures) -> None:
    path = data_set_file(subsets=[{"image_dir": str(pictures(extension=".caption"))}])
    path.write_text(path.read_text(encoding="utf-8").replace('caption_extension = ".txt"', ""), encoding="utf-8")
    assert read(path).images[0].captions == ("luca, a boy, smiling",)


def test_the_training_options_may_name_the_extension(data_set_file: DataSetFile, pictures: Pictures) -> None:
    path = data_set_file(subsets=[{"image_dir": str(pictures(extension=".cap"))}])
    path.write_text(path.read_text(encoding="utf-8").replace('caption_extension = ".txt"', ""), encoding="utf-8")
    assert read(path, {**OPTIONS, "caption_extension": ".cap"}).images[0].captions == ("luca, a boy, smiling",)


@pytest.mark.parametrize("table", ["general", "dataset", "subset"])
def test_class_tokens_stand_in_for_captions(table: str, data_set_file: DataSetFile, pictures: Pictures) -> None:
    parts: dict[str, dict[str, Any]] = {"general": {}, "dataset": {}, "subset": {}}
    parts[table]["class_tokens"] = "luca boy"
    subsets = [{"image_dir": str(pictures(caption=None)), **parts["subset"]}]
    found = read(data_set_file(general=parts["general"], dataset=parts["dataset"], subsets=subsets))
    assert {image.captions for image in found.images} == {("luca boy",)}
    assert found.class_tokens == "luca boy"


def test_the_nearest_class_tokens_win(data_set_file: DataSetFile, pictures: Pictures) -> None:
    subsets = [{"image_dir": str(pictures(caption=None)), "class_tokens": "luca"}]
    found = read(data_set_file(general={"class_tokens": "somebody"}, subsets=subsets))
    assert {image.captions for image in found.images} == {("luca",)}
    assert found.class_tokens == "luca"


def test_two_class_tokens_are_no_name(data_set_file: DataSetFile, pictures: Pictures) -> None:
    subsets = [{"image_dir": str(pictures(name)), "class_tokens": name} for name in ("luca", "alberto")]
    assert read(data_set_file(subsets=subsets)).class_tokens is None


def test_refuses_captions_that_stop_kohya(data_set_file: DataSetFile, pictures: Pictures) -> None:
    folder = pictures()
    (folder / "00.txt").write_bytes(b"")
    (folder / "01.txt").write_bytes("luca, caf\xe9".encode("latin-1"))
    problems = refusal(read, data_set_file(subsets=[{"image_dir": str(folder)}]))
    assert [re.search(r"\d\d\.txt is (\w+ ?\w*)", problem)[0] for problem in problems] == [
        "00.txt is empty",
        "01.txt is not UTF",
    ]


# --- all at once


def test_reports_all_that_is_wrong_with_the_data_set(
    data_set_file: DataSetFile, pictures: Pictures, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    path = data_set_file(
        general={"shufle_caption": True},
        dataset={"resolution": "64", "batchsize": 4},
        subsets=[
            {"image_dir": str(tmp_path / "nowhere")},
            {"image_dir": str(tmp_path / "empty"), "num_repeat": 2},
            {"image_dir": str(pictures(caption=None))},
        ],
    )
    problems = "\n".join(refusal(read, path))
    for word in ("shufle_caption", "resolution", "batchsize", "nowhere", "no images", "num_repeat'", "4 of 4"):
        assert word in problems, word


# --- regularisation images


def test_regularisation_images_are_not_the_subjects(data_set_file: DataSetFile, pictures: Pictures) -> None:
    subsets = [{"image_dir": str(pictures("own"))}, {"image_dir": str(pictures("reg", caption=None)), "is_reg": True}]
    found = read(data_set_file(subsets=subsets))
    assert [image.path.parent.name for image in found.subject_images] == ["own"] * 4
    assert found.batches_per_epoch == 8


def test_refuses_a_data_set_of_regularisation_images_alone(data_set_file: DataSetFile, pictures: Pictures) -> None:
    assert "regularisation" in the_refusal(
        read, data_set_file(subsets=[{"image_dir": str(pictures()), "is_reg": True}])
    )


# --- counting, beside the trainer's own numbers


@pytest.mark.parametrize("no_upscale", [False, True])
def test_puts_pictures_into_the_buckets_that_kohya_puts_them_into(no_upscale: bool) -> None:
    rows = [row for row in KOHYA["buckets"] if bool(row[7]) == no_upscale]
    assert len(rows) > 50
    assert [row for row in rows if list(bucket_of(row)) != row[8:]] == []


def bucket_of(row: Sequence[int]) -> tuple[int, int]:
    config_util = importlib.import_module("library.config_util")
    width, height, reso_width, reso_height, smallest, largest, step, no_upscale = row[:8]
    dataset = {
        "enable_bucket": True,
        "min_bucket_reso": smallest,
        "max_bucket_reso": largest,
        "bucket_reso_steps": step,
        "bucket_no_upscale": bool(no_upscale),
        "resolution": [reso_width, reso_height],
    }
    names = {**config_util.DATASET, **config_util.SUBSET}
    params = config_util.first_of(names, dataset, config_util.DEFAULTS)
    return config_util.DreamBoothDataset(params, []).select_bucket((width, height))


@pytest.mark.parametrize("case", range(len(KOHYA["data_sets"])))
def test_counts_the_batches_that_kohya_counts(case: int, pictures: Pictures, tmp_path: Path) -> None:
    known = json.loads(json.dumps(KOHYA["data_sets"][case]))
    subsets = [subset for dataset in known["config"]["datasets"] for subset in dataset["subsets"]]
    for number, (subset, sizes) in enumerate(zip(subsets, known["sizes"], strict=True)):
        subset["image_dir"] = str(pictures(f"folder{number}", sizes))
    path = tmp_path / "case.toml"
    path.write_text(toml.dumps(known["config"]), encoding="utf-8")
    assert read(path, {**OPTIONS, **known["options"]}).batches_per_epoch == known["batches"]


@pytest.mark.parametrize(("given", "bucket"), [("512", (512, 512)), ("512,768", (512, 768)), ("512, 512", (512, 512))])
def test_the_training_options_may_name_resolution_and_batch(
    given: str, bucket: tuple[int, int], data_set_file: DataSetFile, pictures: Pictures
) -> None:
    """On kohya's command line, and so in its config file, a resolution is a text."""
    path = data_set_file(subsets=[{"image_dir": str(pictures(sizes=[(32, 32)] * 5))}])
    path.write_text(path.read_text(encoding="utf-8").replace("resolution = 64", ""), encoding="utf-8")
    found = read(path, {**OPTIONS, "resolution": given, "train_batch_size": 2})
    assert found.batches_per_epoch == 3 and {image.bucket for image in found.images} == {bucket}


def test_the_data_set_beats_the_training_options(data_set_file: DataSetFile) -> None:
    path = data_set_file(dataset={"batch_size": 4})
    assert read(path, {**OPTIONS, "train_batch_size": 1, "resolution": "512"}).batches_per_epoch == 1


# ------------------------------------------------------------------------------------------------------
# The base model
# ------------------------------------------------------------------------------------------------------

CROSS_ATTENTION = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_ENCODER = "cond_stage_model.transformer."
Shapes = Mapping[str, Sequence[int]]


def _layers(*names: str, bias: bool = True) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", *(["bias"] if bias else []))]


def _within(place: str, names: Sequence[str]) -> list[str]:
    return [f"{place}.{name}" for name in names]


def unet_tensors() -> list[str]:
    """The names of a Stable Diffusion 1.x UNet in a single file."""
    resnet = _layers("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    widened = [*resnet, *_layers("skip_connection")]
    inner = _layers("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
    inner += _layers(*(f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"), bias=False)
    attention = [*_layers("norm", "proj_in", "proj_out"), *_within("transformer_blocks.0", inner)]
    names = _layers("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    for block in range(1, 12):
        down = block in (3, 6, 9)
        parts = _layers("op") if down else widened if block in (4, 7) else resnet
        names += _within(f"input_blocks.{block}.0", parts)
        names += _within(f"input_blocks.{block}.1", attention) if block < 9 and not down else []
    for place, parts in enumerate((resnet, attention, resnet)):
        names += _within(f"middle_block.{place}", parts)
    for block in range(12):
        names += _within(f"output_blocks.{block}.0", widened)
        names += _within(f"output_blocks.{block}.1", attention) if block > 2 else []
        names += _layers(f"output_blocks.{block}.{1 if block == 2 else 2}.conv") if block in (2, 5, 8) else []
    return _within("model.diffusion_model", names)


def xl_unet_tensors() -> list[str]:
    """The names of an SDXL UNet in a single file."""
    resnet = _layers("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    widened = [*resnet, *_layers("skip_connection")]
    inner = _layers("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
    inner += _layers(*(f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"), bias=False)

    def attention(depth: int) -> list[str]:
        blocks = [name for number in range(depth) for name in _within(f"transformer_blocks.{number}", inner)]
        return [*_layers("norm", "proj_in", "proj_out"), *blocks]

    names = _layers("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0")
    names += _layers("out.0", "out.2", "input_blocks.3.0.op", "input_blocks.6.0.op")
    for block, depth in {1: 0, 2: 0, 4: 2, 5: 2, 7: 10, 8: 10}.items():
        names += _within(f"input_blocks.{block}.0", widened if block in (4, 7) else resnet)
        names += _within(f"input_blocks.{block}.1", attention(depth)) if depth else []
    for place, parts in enumerate((resnet, attention(10), resnet)):
        names += _within(f"middle_block.{place}", parts)
    for block, depth in enumerate((10, 10, 10, 2, 2, 2, 0, 0, 0)):
        names += _within(f"output_blocks.{block}.0", widened)
        names += _within(f"output_blocks.{block}.1", attention(depth)) if depth else []
        names += _layers(f"output_blocks.{block}.2.conv") if block in (2, 5) else []
    return _within("model.diffusion_model", names)


def xl_text_tensors() -> list[str]:
    """Those of SDXL's two text encoders: CLIP's, and OpenCLIP's under its own names."""
    first = [f"conditioner.embedders.0.transformer.{name.removeprefix(TEXT_ENCODER)}" for name in text_tensors()]
    layer = _layers("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    layer += ["attn.in_proj_weight", "attn.in_proj_bias"]
    second = ["positional_embedding", "text_projection", "token_embedding.weight", "logit_scale"]
    second += _layers("ln_final")
    second += [name for number in range(32) for name in _within(f"transformer.resblocks.{number}", layer)]
    return [*first, *_within("conditioner.embedders.1.model", second)]


def vae_tensors() -> list[str]:
    resnet = _layers("norm1", "conv1", "norm2", "conv2")
    names = _layers("quant_conv", "post_quant_conv")
    for coder, way, blocks, widened, scaled in (
        ("encoder", "down", 2, (1, 2), {0: "downsample", 1: "downsample", 2: "downsample"}),
        ("decoder", "up", 3, (0, 1), {1: "upsample", 2: "upsample", 3: "upsample"}),
    ):
        names += _within(coder, _layers("conv_in", "norm_out", "conv_out"))
        names += _within(f"{coder}.mid.attn_1", _layers("norm", "q", "k", "v", "proj_out"))
        names += [name for block in (1, 2) for name in _within(f"{coder}.mid.block_{block}", resnet)]
        for level in range(4):
            for block in range(blocks):
                parts = [*resnet, *_layers("nin_shortcut")] if block == 0 and level in widened else resnet
                names += _within(f"{coder}.{way}.{level}.block.{block}", parts)
            names += _layers(f"{coder}.{way}.{level}.{scaled[level]}.conv") if level in scaled else []
    return _within("first_stage_model", names)


def text_tensors(prefix: str = "text_model.") -> list[str]:
    """The text encoder's; old files have no prefix."""
    layer = _layers("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    layer += _layers(*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "embeddings.position_ids"]
    names += _layers("final_layer_norm")
    names += [name for number in range(12) for name in _within(f"encoder.layers.{number}", layer)]
    return [f"{TEXT_ENCODER}{prefix}{name}" for name in names]


SD1: Shapes = {
    **dict.fromkeys((*unet_tensors(), *vae_tensors(), *text_tensors()), (1,)),
    FIRST: (2, 4, 3, 3),
    CROSS_ATTENTION: (4, 768),
}


SDXL: Shapes = {**dict.fromkeys((*xl_unet_tensors(), *vae_tensors(), *xl_text_tensors()), (1,)), FIRST: (2, 4, 3, 3)}


def write_safetensors(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Path:
    """A whole fp16 file with zeros; big tensors would only make the test slow."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def test_knows_stable_diffusion_1(tmp_path: Path) -> None:
    model = search.BaseModel.inspect(write_safetensors(tmp_path / "sd.safetensors", SD1, {"format": "pt"}))
    assert model.family is search.SD1


def test_knows_sdxl(tmp_path: Path) -> None:
    model = search.BaseModel.inspect(write_safetensors(tmp_path / "xl.safetensors", SDXL, {"format": "pt"}))
    assert model.family.name == "SDXL"
    assert model.prediction == {}  # it does not say


@pytest.mark.parametrize(
    ("markers", "said", "prediction"),
    [
        (["v_pred"], {}, {"v_parameterization": True}),
        (["v_pred", "ztsnr"], {}, {"v_parameterization": True, "zero_terminal_snr": True}),
        ([], {"modelspec.prediction_type": "v"}, {"v_parameterization": True}),
        ([], {"modelspec.prediction_type": "epsilon"}, {"v_parameterization": False}),
        ([], {"modelspec.prediction_type": "something new"}, {}),
    ],
)
def test_a_file_may_say_how_the_model_predicts(
    markers: list[str], said: dict[str, str], prediction: dict[str, bool], tmp_path: Path
) -> None:
    file = write_safetensors(tmp_path / "xl.safetensors", {**SDXL, **dict.fromkeys(markers, (0,))}, said)
    assert search.BaseModel.inspect(file).prediction == prediction


def test_options_that_contradict_the_model_are_refused_and_those_that_lack_are_added() -> None:
    path, known = Path("training.toml"), {"v_parameterization": True, "zero_terminal_snr": True}
    assert search.add_prediction({"seed": 1}, known, path) == {"seed": 1, **known}
    assert search.add_prediction({"seed": 1}, {"v_parameterization": False}, path) == {"seed": 1}
    for options, said in (
        ({"v_parameterization": False}, known),
        ({"v_parameterization": True}, {"v_parameterization": False}),
    ):
        assert "v_parameterization" in the_refusal(search.add_prediction, options, said, path)


SDXL_MARK = "resblocks.9.mlp.c_proj.bias"
OTHER_MODELS: dict[str, tuple[str, Shapes]] = {
    "SD2": ("SD2", {FIRST: (2, 4, 3, 3), CROSS_ATTENTION: (4, 1024)}),
    "half of SDXL": (
        "second text encoder instead of 389",
        {
            **SD1,
            **{name: (1,) for name in SDXL if ".1.model." not in name},
            f"conditioner.embedders.1.model.transformer.{SDXL_MARK}": (4,),
        },
    ),
    "SDXL inpainting": ("inpainting", {**SDXL, FIRST: (2, 9, 3, 3)}),
    "Lumina": ("Lumina", {"noise_refiner.0.attention.qkv.weight": (4, 4), "cap_embedder.0.weight": (4,)}),
    "Qwen-Image": ("Qwen-Image", {"txt_norm.weight": (4,), "transformer_blocks.0.attn.to_k.weight": (4, 4)}),
    "SDXL refiner": ("refiner", {f"conditioner.embedders.0.model.transformer.{SDXL_MARK}": (4,)}),
    "SD3": ("SD3", {"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (4,)}),
    "FLUX": ("FLUX", {"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}),
    "FLUX in a checkpoint": ("FLUX", {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (4,)}),
    "inpainting": ("inpainting", {**SD1, FIRST: (2, 9, 3, 3)}),
    "LoRA": ("LoRA", {"lora_unet_down_blocks_0.lora_down.weight": (4, 8), "lora_te_text.alpha": ()}),
    "something else": ("unknown", {"model.embed_tokens.weight": (4, 8)}),
    "empty": ("unknown", {}),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_refuses_other_families_by_name(kind: str, tmp_path: Path) -> None:
    name, shapes = OTHER_MODELS[kind]
    problem = the_refusal(search.BaseModel.inspect, write_safetensors(tmp_path / "model.safetensors", shapes))
    assert name in problem
    assert "model.safetensors" in problem


def without(*starts: str) -> Shapes:
    return {name: shape for name, shape in SD1.items() if not name.startswith(starts)}


VAE = "first_stage_model."


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (without(VAE), ["no VAE"]),
        (without(f"{VAE}encoder."), ["142 tensors of its VAE instead of 248"]),
        (without(f"{VAE}decoder.mid.attn_1.q.weight"), ["247 tensors of its VAE instead of 248"]),
        (without(TEXT_ENCODER), ["no text encoder"]),
        (without(f"{TEXT_ENCODER}text_model.encoder.layers.11."), ["180 tensors of its text encoder instead of 196"]),
        ({**SD1, f"{TEXT_ENCODER}text_projection.weight": (4, 4)}, ["197 tensors of its text encoder"]),
        (without("model.diffusion_model.output_blocks.11."), ["648 tensors of its UNet instead of 686"]),
        (without("model.", TEXT_ENCODER), ["no UNet", "no text encoder"]),
        (without("model.", VAE), ["no UNet", "no VAE"]),
    ],
)
def test_refuses_a_file_that_lacks_a_part_and_names_it(shapes: Shapes, says: list[str], tmp_path: Path) -> None:
    problem = the_refusal(search.BaseModel.inspect, write_safetensors(tmp_path / "sd.safetensors", shapes))
    assert all(part in problem for part in says)
    assert problem.count("no ") + problem.count("tensors of") == len(says)


def test_knows_the_old_names_of_the_text_encoder_and_passes_over_what_kohya_passes_over(tmp_path: Path) -> None:
    others = ("model_ema.decay", "betas", "cond_stage_model.logit_scale", f"{VAE}loss.logvar")
    old = {**without(TEXT_ENCODER), **dict.fromkeys((*text_tensors(""), *others), (1,))}
    new, layer = dict(SD1), "encoder.layers.3.mlp.fc1.weight"
    old[f"{TEXT_ENCODER}{layer}"] = new[f"{TEXT_ENCODER}text_model.{layer}"] = (30, 40)
    models = [search.BaseModel.inspect(write_safetensors(tmp_path / "sd.safetensors", file)) for file in (old, new)]
    assert models[0].lora_bytes_per_dim == models[1].lora_bytes_per_dim >= 2 * (30 + 40)


def test_a_link_into_the_hubs_cache_is_refused_since_kohya_goes_by_the_name_behind_it(tmp_path: Path) -> None:
    blob = write_safetensors(tmp_path / "blobs" / ("6ce0161689" * 6), SD1)
    link = tmp_path / "my models" / "sd.safetensors"
    link.parent.mkdir()
    link.symlink_to(blob)
    for given in (link, blob):
        problem = the_refusal(search.BaseModel.inspect, given)
        assert f"take {blob} for a pickle" in problem and "name" in problem
        assert f"cp -L {shlex.quote(str(given))} " in problem


def test_a_link_to_a_file_with_the_right_name_is_good(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write_safetensors(tmp_path / "sd.safetensors", SD1))
    assert search.BaseModel.inspect(tmp_path / "link").family is search.SD1


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin", "pth", "CKPT"])
def test_refuses_pickles_unopened(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_safetensors(tmp_path / "good.safetensors", SD1)
    path = good.rename(tmp_path / f"model.{suffix}")
    monkeypatch.setattr(search, "read_safetensors_header", lambda *_: pytest.fail("opened"))
    assert f"take {path} for a pickle" in the_refusal(search.BaseModel.inspect, path)


def test_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in the_refusal(search.BaseModel.inspect, tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -2, -1])
def test_refuses_a_torn_file(keep: int, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "sd.safetensors", SD1)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep] if keep >= 0 else whole[: len(whole) + keep])
    assert str(path) in the_refusal(search.BaseModel.inspect, path)


def test_refuses_a_file_that_is_longer_than_its_header_says(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "sd.safetensors", SD1)
    path.write_bytes(path.read_bytes() + b"x")
    assert "torn" in the_refusal(search.BaseModel.inspect, path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "3",
        '"text"',
        "{",
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"data_offsets": [0]}}',
        '{"a": {"data_offsets": [0, "x"], "shape": [1]}}',
        f'{{"{CROSS_ATTENTION}": {{"data_offsets": [0, 0]}}}}',
        f'{{"{CROSS_ATTENTION}": {{"data_offsets": [0, 0], "shape": []}}}}',
        f'{{"{CROSS_ATTENTION}": {{"data_offsets": [0, 0], "shape": "768"}}}}',
        f'{{"{FIRST}": {{"data_offsets": [0, 0], "shape": [4]}}}}',
    ],
)
def test_refuses_headers_that_make_no_sense(header: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert "odd.safetensors" in the_refusal(search.BaseModel.inspect, path)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "sd.safetensors", SD1)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(damaged), 260))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert search.BaseModel.inspect(path).family is search.SD1
        except search.RefusedInput as error:
            assert len(error.problems) == 1


def test_the_fingerprint_follows_the_weights_and_not_the_name(tmp_path: Path) -> None:
    first = search.BaseModel.inspect(write_safetensors(tmp_path / "a.safetensors", SD1))
    same = search.BaseModel.inspect(write_safetensors(tmp_path / "b.safetensors", SD1))
    path = write_safetensors(tmp_path / "c.safetensors", SD1)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert first.fingerprint == same.fingerprint
    assert search.BaseModel.inspect(path).fingerprint != first.fingerprint


def test_expects_a_lora_of_the_size_that_kohya_writes(tmp_path: Path) -> None:
    """Two factors of rank 1 in fp16 for each linear layer and 1x1 convolution; none for norms and 3x3s."""
    block = "model.diffusion_model.input_blocks.1.1"
    text = "cond_stage_model.transformer.text_model.encoder.layers.0"
    adapted: Shapes = {
        CROSS_ATTENTION: (4, 768),
        f"{block}.transformer_blocks.0.attn1.to_q.weight": (10, 20),
        f"{block}.transformer_blocks.0.ff.net.0.proj.weight": (30, 40),
        f"{block}.proj_in.weight": (5, 6, 1, 1),
        f"{block}.proj_out.weight": (7, 8, 1, 1),
        "model.diffusion_model.middle_block.1.proj_in.weight": (9, 10, 1, 1),
        f"{text}.self_attn.q_proj.weight": (11, 12),
        f"{text}.mlp.fc1.weight": (13, 14),
        f"{text}.mlp.fc2.weight": (15, 16),
    }
    left_alone: Shapes = {
        FIRST: (2, 4, 3, 3),
        f"{block}.transformer_blocks.0.norm1.weight": (50,),
        f"{block}.transformer_blocks.0.attn1.to_out.0.bias": (50,),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (60, 60, 3, 3),
        "model.diffusion_model.time_embed.0.weight": (70, 70),
        f"{TEXT_ENCODER}text_model.final_layer_norm.weight": (50,),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (80, 80, 1, 1),
    }
    model = search.BaseModel.inspect(write_safetensors(tmp_path / "sd.safetensors", {**SD1, **adapted, **left_alone}))
    assert model.lora_bytes_per_dim == sum(2 * (shape[0] + shape[1]) for shape in adapted.values())


def test_an_sdxl_lora_has_the_size_that_kohya_writes(tmp_path: Path) -> None:
    adapted: Shapes = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (4, 8),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (5, 6),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (7, 8),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (9, 10),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.out_proj.weight": (11, 12),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc2.weight": (13, 14),
        "model.diffusion_model.input_blocks.4.1.proj_out.weight": (15, 16),
    }
    together = {"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (30, 10)}  # three layers
    others = {
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": (1, 77)
    }  # ComfyUI saves it
    file = write_safetensors(tmp_path / "xl.safetensors", {**SDXL, **adapted, **together, **others})
    expected = sum(2 * (shape[0] + shape[1]) for shape in adapted.values()) + 3 * 2 * (10 + 10)
    assert search.BaseModel.inspect(file).lora_bytes_per_dim == expected


def write_folder(folder: Path, pipeline: str = "StableDiffusionPipeline", width: int = 768) -> Path:
    """A diffusers folder, as small as the program's checks allow."""
    unet = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, 8)}
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4)}
    write_safetensors(folder / "text_encoder" / "model.safetensors", text)
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": (4, 4)})
    parts = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
    index = {
        "_class_name": pipeline,
        "feature_extractor": [None, None],
        **{part: ["library", "Class"] for part in parts},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, file in (("vae", "config"), ("text_encoder", "config"), ("scheduler", "scheduler_config")):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / f"{file}.json").write_text("{}")
    (folder / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": width, "in_channels": 4}))
    tiny_models.write_tokenizer(folder / "tokenizer")
    return folder


def test_knows_a_diffusers_folder(tmp_path: Path) -> None:
    model = search.BaseModel.inspect(write_folder(tmp_path / "sd"))
    assert model.family is search.SD1
    assert model.lora_bytes_per_dim == 2 * (4 + 8) + 2 * (4 + 4)


def test_a_safety_checker_gets_no_lora(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    expected = search.BaseModel.inspect(folder).lora_bytes_per_dim
    vision = {"vision_model.vision_model.encoder.layers.0.self_attn.q_proj.weight": (16, 16)}
    write_safetensors(folder / "safety_checker" / "model.safetensors", vision)
    assert search.BaseModel.inspect(folder).lora_bytes_per_dim == expected


@pytest.mark.parametrize(
    ("pipeline", "width", "name"),
    [
        ("StableDiffusionXLInpaintPipeline", 2048, "StableDiffusionXLInpaintPipeline"),
        ("StableDiffusionInpaintPipeline", 768, "StableDiffusionInpaintPipeline"),
        ("FluxPipeline", 768, "FluxPipeline"),
        ("StableDiffusionPipeline", 1024, "SD2"),
    ],
)
def test_refuses_folders_of_other_families(pipeline: str, width: int, name: str, tmp_path: Path) -> None:
    assert name in the_refusal(search.BaseModel.inspect, write_folder(tmp_path / "other", pipeline, width))


def test_refuses_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    (folder / "model_index.json").unlink()
    assert "model_index.json" in the_refusal(search.BaseModel.inspect, folder)


@pytest.mark.parametrize("index", [{}, {"_class_name": None}, {"_class_name": ["StableDiffusionPipeline"]}])
def test_refuses_a_folder_that_does_not_say_what_it_is(index: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    (folder / "model_index.json").write_text(json.dumps(index))
    problem = the_refusal(search.BaseModel.inspect, folder)
    assert "which this search does not train" in problem and "None" not in problem


def test_refuses_a_folder_with_pickled_weights_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    for weights in folder.glob("*/*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    assert "safetensors" in the_refusal(search.BaseModel.inspect, folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_refuses_a_folder_with_a_part_in_another_format(part: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    assert f"no whole {part}/{weights.name}" in the_refusal(search.BaseModel.inspect, folder)


def test_refuses_a_folder_with_torn_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in the_refusal(search.BaseModel.inspect, folder)


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    ],
)  # fmt: skip
def test_refuses_a_folder_that_lacks_a_file_and_names_it(file: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    (folder / file).unlink()
    assert f" has no whole {file}, so" in the_refusal(search.BaseModel.inspect, folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler", "tokenizer"])
def test_refuses_a_folder_that_lacks_a_part_or_does_not_name_it(part: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    shutil.move(folder / part, tmp_path)
    assert f"no whole {part}/" in the_refusal(search.BaseModel.inspect, folder)
    shutil.move(tmp_path / part, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: [None, None]}))
    assert f" has no {part} in model_index.json, so" in the_refusal(search.BaseModel.inspect, folder)


def test_a_feature_extractor_is_needed_where_it_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    named = {**index, "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(named))
    assert "no whole feature_extractor/preprocessor_config.json" in the_refusal(search.BaseModel.inspect, folder)


def test_refuses_a_torn_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_start"')
    assert "no whole scheduler/scheduler_config.json" in the_refusal(search.BaseModel.inspect, folder)


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_refuses_a_folder_that_has_weights_in_variants_only(variant: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    for weights in folder.glob("*/*.safetensors"):
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))
    problem = the_refusal(search.BaseModel.inspect, folder)
    assert problem.count(f"(rename diffusion_pytorch_model.{variant}.safetensors)") == 2
    assert f"no whole text_encoder/model.safetensors (rename model.{variant}.safetensors)" in problem


def shard(folder: Path, stem: str) -> None:
    """Weights in two files and their index, as diffusers and transformers save large models."""
    (folder / f"{stem}.safetensors").rename(folder / f"{stem}-00001-of-00002.safetensors")
    write_safetensors(folder / f"{stem}-00002-of-00002.safetensors", {"other": (4,)})
    where = {"first": f"{stem}-00001-of-00002.safetensors", "other": f"{stem}-00002-of-00002.safetensors"}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize(("part", "stem"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_weights_may_be_in_shards_which_must_all_be_there(part: str, stem: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    shard(folder / part, stem)
    assert search.BaseModel.inspect(folder).family is search.SD1
    (folder / part / f"{stem}-00002-of-00002.safetensors").unlink()
    problem = the_refusal(search.BaseModel.inspect, folder)
    assert f"no whole {part}/{stem}-00002-of-00002.safetensors, so" in problem
    (folder / part / f"{stem}.safetensors.index.json").unlink()
    assert f"no whole {part}/{stem}.safetensors, so" in the_refusal(search.BaseModel.inspect, folder)


def test_a_tokenizer_may_be_one_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    assert search.BaseModel.inspect(folder).family is search.SD1


def test_both_tokenizers_of_sdxl_may_be_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "xl"
    tiny_models.make_tiny_xl_pipeline(folder)
    for part in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            (folder / part / name).unlink()
        (folder / part / "tokenizer.json").write_text("{}")
    assert search.BaseModel.inspect(folder).family.name == "SDXL"
