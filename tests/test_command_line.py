"""Sections 12, 13: flags, checks, exit statuses. Bad input: one line each, all at once, status 2, nothing created."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import toml
from conftest import REPOSITORY
from PIL import Image

import optuna_hyperparameter_search as search

SCRIPT = REPOSITORY / "optuna_hyperparameter_search.py"
GUIDES_FLAGS = "--dataset-config --base-model --output-dir --study-name --n-trials --device".split()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import demo_world

    folder = tmp_path_factory.mktemp("world")
    demo_world.make_tiny_world(folder)
    return folder


Command = Callable[..., list[str]]


@pytest.fixture
def command(world: Path, tmp_path: Path) -> Command:
    """A whole, valid command line of a search; keywords replace a flag's value, None leaves it out."""

    def make(**changes: object) -> list[str]:
        flags: dict[str, object] = {
            "dataset_config": world / "dataset.toml",
            "base_model": world / "base_model",
            "output_dir": tmp_path / "out",
            "sd_scripts": REPOSITORY / "tests" / "small_trainer",
            "training_config": world / "training.toml",
            "scoring_config": world / "scoring.toml",
            "device": "cpu",
            "n_trials": 2,
            **changes,
        }
        return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]

    return make


def errors_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[str]:
    """The error lines of a command that must be refused."""
    assert search.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return lines


# --- help --------------------------------------------------------------------------------------------


def test_help_names_every_flag_and_groups_them() -> None:
    parser = search.make_parser()
    text, flags = parser.format_help(), {action.option_strings[-1] for action in parser._actions}
    assert {*GUIDES_FLAGS, "--prune", "--search-space"} < flags
    for flag in flags:
        assert re.search(rf"^  (-h, )?{flag}\b", text, re.MULTILINE), flag
    groups = re.findall(r"^([a-z].*):$", text, re.MULTILINE)
    assert groups[1:] == [
        "what to train on", "how much to search", "where things are", "settings files", "instead of searching",
    ]  # fmt: skip


def test_help_and_errors_wait_for_no_large_library() -> None:
    code = (
        "import sys, optuna_hyperparameter_search as s\n"
        "try: s.main(['--help'])\nexcept SystemExit: pass\n"
        "s.main([])\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'PIL', 'sqlalchemy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- what is refused ---------------------------------------------------------------------------------


def test_an_empty_command_lists_all_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    missing = [line.split()[1] for line in errors_of(capsys, [])]
    assert missing[:4] == ["--dataset-config", "--base-model", "--output-dir", "--sd-scripts"]
    assert set(missing[4:]) <= {"--scoring-config:"}  # encoders that are not on this machine


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_trials": 0}, "--n-trials: 0 must be above 0"),
        ({"n_trials": -3}, "--n-trials: -3"),
        ({"timeout": "nan"}, "--timeout: nan"),
        ({"timeout": 0}, "--timeout: 0.0"),
        ({"seed": -1}, "--seed: -1"),
        ({"device": "gpu"}, "--device: 'gpu'"),
        ({"device": "cuda:x"}, "--device: 'cuda:x'"),
        ({"study_name": " "}, " is empty"),
    ],
)
def test_senseless_values_are_refused(
    command: Command, capsys: pytest.CaptureFixture[str], changes: dict[str, object], says: str
) -> None:
    (line,) = errors_of(capsys, command(**changes))
    assert says in line


def test_all_problems_are_reported_at_once_and_nothing_is_made(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs"
    (inputs / "empty").mkdir(parents=True)
    (inputs / "training.toml").write_text("v2 = true\nuse_8bit_adam = true\n")
    (inputs / "scoring.toml").write_text("[images]\nresolutoin = 512\n")
    (inputs / "model.ckpt").write_bytes(b"\x80\x04pickle")
    (inputs / "first.toml").write_text("network_dim = 96\n")
    (inputs / "data.toml").write_text(
        toml.dumps(
            {"datasets": [{"resolution": 64, "bach_size": 2, "subsets": [{"image_dir": str(inputs / "empty")}]}]}
        )
    )
    arguments = command(
        dataset_config=inputs / "data.toml", base_model=inputs / "model.ckpt",
        training_config=inputs / "training.toml", scoring_config=inputs / "scoring.toml", enqueue=inputs / "first.toml",
    )  # fmt: skip
    text = "\n".join(errors_of(capsys, arguments))
    for part in (
        "'v2' in", "'use_8bit_adam' in", "unknown key 'resolutoin' in [images]", "did you mean 'resolution'?",
        "may be a pickle", "unknown key 'bach_size'", "did you mean 'batch_size'?",
        "has no images", "network_dim = 96",
    ):  # fmt: skip
        assert part in text, part
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs"]


def test_a_key_that_the_trainer_does_not_know_is_refused_with_the_nearest(
    command: Command, capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path
) -> None:
    options = toml.loads((world / "training.toml").read_text())
    (tmp_path / "training.toml").write_text(toml.dumps({**options, "noise_ofset": 0.1}))
    (line,) = errors_of(capsys, command(training_config=tmp_path / "training.toml"))
    assert "'noise_ofset'" in line and "did you mean 'noise_offset'?" in line
    assert not (tmp_path / "out").exists()


def test_half_precision_on_the_cpu_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (line,) = errors_of(capsys, command(training_config=REPOSITORY / "configs" / "training.toml"))
    assert "mixed_precision = 'fp16'" in line and 'set it to "no"' in line


def test_missing_files_are_named(command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nowhere = tmp_path / "no where"
    lines = errors_of(
        capsys,
        command(
            dataset_config=nowhere, base_model=nowhere, training_config=nowhere, eval_prompts=nowhere, enqueue=nowhere
        ),
    )
    flags = {line.split()[1] for line in lines}
    assert flags >= {"--dataset-config:", "--base-model:", "--training-config:", "--enqueue:"}


def test_an_output_folder_that_is_a_file_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    lines = errors_of(capsys, command())
    assert any("out is no folder that this user can write" in line for line in lines)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("sqlite://", "keeps nothing"),
        ("sqlite:///:memory:", "keeps nothing"),
        (
            "sqlite:////no/such/place/study.db",
            "there is no folder /no/such/place for sqlite:////no/such/place/study.db",
        ),
        (
            "sqlite:///no/study.db",
            f"there is no folder {Path.cwd()}/no for sqlite:///no/study.db; make it (a path from",
        ),
        ("nonsense", "nonsense is no address of a database"),
    ],
)
def test_a_storage_that_can_not_be_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, storage: str, says: str
) -> None:
    (line,) = errors_of(capsys, command(storage=storage))
    assert says in line and not (tmp_path / "out").exists()


def test_an_output_folder_below_a_file_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (line,) = errors_of(capsys, command(output_dir=tmp_path / "file" / "out"))
    assert f"--output-dir: {tmp_path / 'file'} is no folder" in line


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('mixed_precision = "fp61"', "must be one of no, fp16, bf16"),
        ("sdpa = 2", "must be true or false"),
        ("noise_offset = true", "must be a number"),
    ],
)
def test_an_option_of_another_kind_than_the_trainers_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path, line: str, says: str
) -> None:
    options = toml.loads((world / "training.toml").read_text()) | toml.loads(line)
    (tmp_path / "training.toml").write_text(toml.dumps(options))
    (found,) = errors_of(capsys, command(training_config=tmp_path / "training.toml"))
    assert says in found and line.split()[0] in found


def test_senseless_numbers_do_not_hide_bad_files(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    lines = errors_of(capsys, command(n_trials=0, base_model="/no/model", eval_prompts="/no/prompts"))
    for flag in ("--n-trials", "--base-model", "--eval-prompts"):
        assert any(flag in line for line in lines), flag


def test_a_truncated_picture_is_named(command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for name in ("whole.jpg", "torn.jpg"):
        Image.effect_noise((64, 64), 80).save(tmp_path / "images" / name)
        (tmp_path / "images" / name).with_suffix(".txt").write_text("luca, a boy")
    torn = tmp_path / "images" / "torn.jpg"
    torn.write_bytes(torn.read_bytes()[:1000])
    data = {"datasets": [{"resolution": 64, "caption_extension": ".txt", "subsets": [{"image_dir": str(torn.parent)}]}]}
    (tmp_path / "data.toml").write_text(toml.dumps(data))
    (line,) = errors_of(capsys, command(dataset_config=tmp_path / "data.toml"))
    assert f"can't use {torn}" in line and "truncated" in line


def test_an_output_folder_among_the_pictures_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    (line,) = errors_of(capsys, command(output_dir=world / "images"))
    assert "holds the data set's pictures" in line


def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--n-trails", "3"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --n-trails; see --help\n"


def test_enqueued_parameters_that_will_be_rejected_are_warned_of(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "first.toml").write_text(
        "[[trial]]\nnetwork_alpha_ratio = 0.9\nmax_train_epochs = 12\n[[trial]]\nnetwork_alpha_ratio = 0.9\n"
    )
    assert search.main([*command(enqueue=tmp_path / "first.toml"), "--check"]) == 0
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "--enqueue" in line)
    assert "High alpha (≥0.75) requires: epochs >= 16" in warning


def test_whoever_stops_reading_does_not_stop_the_search(command: Command) -> None:
    line = " ".join(shlex.quote(part) for part in [sys.executable, str(SCRIPT), *command(), "--check"])
    pipe = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -n 1"], capture_output=True, text=True, timeout=100
    )
    assert pipe.returncode == 0 and pipe.stdout == "Checking the inputs ...\n" and pipe.stderr == ""


@pytest.mark.parametrize("nobody", ["2>&1 | true", "2>/dev/full", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("flag", ["--report", "--no-such-flag"])
def test_a_refusal_that_nobody_reads_is_a_refusal_still(flag: str, nobody: str) -> None:
    """What a shell script goes by."""
    line = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))} {flag} {nobody}; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", line], timeout=100).returncode == 2


def test_a_long_scoring_is_warned_of_with_the_remedy(command: Command, world: Path, tmp_path: Path) -> None:
    settings, _ = search.read_settings(search.make_parser().parse_args(command()))
    inputs = search.check_inputs(settings)
    assert not any("scoring a trial takes" in line for line in search.CheckReport(inputs).warnings())
    job = {"width": 512, "height": 512, "steps": 25, "seed": 1}
    plan = {**inputs.plan, "screen": [job] * 80, "confirm": [job] * 58}
    many = dataclasses.replace(inputs, plan=plan, settings=dataclasses.replace(settings, device="cuda"))
    (warning,) = (line for line in search.CheckReport(many).warnings() if "scoring a trial takes" in line)
    assert "6 min" in warning and "raise save_every_n_epochs" in warning


@pytest.mark.parametrize(
    ("bucket", "scored", "is_warned_of"),
    [((512, 512), 512, False), ((384, 640), 1024, True), ((704, 1024), 1024, False), (None, 1024, False)],
)
def test_a_training_on_far_fewer_pixels_than_are_scored_is_warned_of(
    command: Command, bucket: tuple[int, int] | None, scored: int, is_warned_of: bool
) -> None:
    """The example data set's file with an SDXL model."""
    inputs = search.check_inputs(search.read_settings(search.make_parser().parse_args(command()))[0])
    images = tuple(dataclasses.replace(image, bucket=bucket) for image in inputs.data_set.images)
    data_set = dataclasses.replace(inputs.data_set, images=images)
    changed = dataclasses.replace(inputs, data_set=data_set, plan={**inputs.plan, "resolution": scored})
    warned = [line for line in search.CheckReport(changed).warnings() if "pixels, and scored at" in line]
    assert bool(warned) is is_warned_of
    if warned:
        assert "about 496 x 496 pixels" in warned[0] and "resolution = 1024 and max_bucket_reso = 2048" in warned[0]


@pytest.mark.parametrize(("option", "is_warned_of"), [("", False), (" --d 42", True)])
def test_prompts_that_share_seeds_are_warned_of(
    command: Command, tmp_path: Path, option: str, is_warned_of: bool
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"luca, {place}{option}\n" for place in "abcdefgh"))
    settings, _ = search.read_settings(search.make_parser().parse_args(command(eval_prompts=file)))
    warnings = search.CheckReport(search.check_inputs(settings)).warnings()
    assert any("share seeds" in line and "leave out --d" in line for line in warnings) is is_warned_of


def test_an_encoder_out_of_reach_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    scoring = toml.loads((world / "scoring.toml").read_text())
    scoring["encoders"] |= {"dinov2": "nobody/nothing", "clip": str(tmp_path)}
    (tmp_path / "scoring.toml").write_text(toml.dumps(scoring))
    lines = errors_of(capsys, command(scoring_config=tmp_path / "scoring.toml"))
    (dinov2,) = (line for line in lines if "dinov2 = 'nobody/nothing'" in line)
    assert "is not whole on this machine" in dinov2 and "hf download nobody/nothing" in dinov2
    assert any("clip =" in line and "folder without config.json" in line for line in lines)


def test_too_small_a_disk_is_refused(command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (line,) = errors_of(capsys, command(n_trials=2 * 10**9))
    assert "TB are needed for checkpoints and pictures" in line and not (tmp_path / "out").exists()


def test_8bit_cannot_be_enqueued_on_the_cpu(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "first.toml").write_text('optimizer_type = "AdamW8bit"')
    (line,) = errors_of(capsys, command(enqueue=tmp_path / "first.toml"))
    assert "needs bitsandbytes and a CUDA card" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--report"], "--output-dir is missing"),
        (["--report", "--output-dir", "/nowhere/at/all"], "no study 'lora_v2.1' in /nowhere/at/all"),
        (["--demo", "--base-model", "x"], "--demo: has its own inputs and runs on the CPU; leave out --base-model"),
        (["--demo", "--sd-scripts", "x"], "leave out --sd-scripts"),
        (["--demo", "--device", "cpu,cpu"], "leave out --device"),
        (["--score", "/nowhere/at/all"], "is no trial's folder"),
        (["--score", "/nowhere/at/all", "--scoring-config", "my.toml"], "--score judges as the study does"),
    ],
)
def test_other_modes_refuse_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    (line,) = errors_of(capsys, arguments)
    assert says in line


# --- check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "share"), [(0.6, 0.9, "100%"), (0.1, 0.4, "")])
def test_a_warm_up_that_is_a_share_is_warned_of_by_that_share(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, low: float, high: float, share: str
) -> None:
    text = (REPOSITORY / "configs" / "search_space_v2.1.toml").read_text(encoding="utf-8")
    given = re.sub(r"(?s)(\[lr_warmup_steps\][^\n]*\n).*?\n\n", rf"\1low = {low}\nhigh = {high}\n\n", text)
    (tmp_path / "space.toml").write_text(given, encoding="utf-8")
    assert search.main([*command(search_space=tmp_path / "space.toml"), "--check"]) == 0
    said = re.findall(r"(\d+%) of the proposals warm up for more than half", capsys.readouterr().out)
    assert said == ([share] if share else [])


def test_check_says_what_it_found_and_makes_nothing(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert search.main([*command(), "--check"]) == 0
    shown = capsys.readouterr().out
    found = dict(re.findall(r"^  (\w[\w -]*?)  +(.+)$", shown, re.MULTILINE))
    assert found["base model"] == "base_model (SD1.x)"
    assert found["data set"] == "10 images, 10 captions, 0 for regularisation"
    assert found["subject"].startswith("'luca'")
    steps = "10 or 5 or 3 an epoch, 36 to 200 a training (by accumulation and epochs), a checkpoint every 5 epochs"
    assert found["steps"] == steps
    assert "of the proposals warm up for more than half of the run, " in shown
    assert found["device"] == "cpu" and "no AdamW8bit" in found["optimizers"]
    assert found["sd-scripts"].startswith("files ")
    assert "MB needed" in found["disk"] and "0 of 2 trained" in found["study"]
    assert not (tmp_path / "out").exists()


# --- a running search --------------------------------------------------------------------------------


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"never said {text!r}:\n{seen}")


@pytest.mark.slow
def test_the_queue_of_the_readme_checks_all_searches_first_and_goes_on_after_one_that_stops(
    command: Command, tmp_path: Path
) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (checks,) = re.findall(r"(?m)^    (xargs .*--check .*) &&$", readme)
    (runs,) = re.findall(r"(?m)^    (xargs .*search.py < .*)$", readme)
    (shown,) = re.findall(r"(?m)^    (for .*Best: trial.*)$", readme)
    program = shlex.join([sys.executable, str(SCRIPT)])

    def begin(*seeds: object) -> subprocess.CompletedProcess[str]:
        flags = [command(output_dir=tmp_path / "runs" / f"night {n}", n_trials=1, seed=s) for n, s in enumerate(seeds)]
        (tmp_path / "night.txt").write_text("".join(f"{shlex.join(line)}\n" for line in flags))
        line = f"{checks} && {runs}".replace("python optuna_hyperparameter_search.py", program)
        return subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)

    refused = begin(1, 2, "none")
    assert refused.returncode != 0 and "--seed" in refused.stderr and not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "night 0").mkdir(parents=True)
    with search.holding(tmp_path / "runs" / "night 0"):  # so that the first one stops
        stopped = begin(1, 2)
    assert stopped.returncode != 0 and "night 0" in stopped.stderr and "1 of 1 trained" in stopped.stdout
    assert not (tmp_path / "runs" / "night 0" / "results").exists()
    resumed = begin(1, 2)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    best = subprocess.run(["sh", "-c", shown], cwd=tmp_path, capture_output=True, text=True).stdout
    assert [line.split("/search.log:")[0] for line in best.splitlines()] == ["runs/night 0", "runs/night 1"]


@pytest.mark.slow
def test_two_workers_train_one_study_in_one_folder_with_one_log(command: Command, tmp_path: Path) -> None:
    arguments = command(device="cpu,cpu", n_trials=3)
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "out" / "search.log").read_text()
    for said in (done.stdout, log):
        assert {f"cpu {n}" for n in (1, 2)} == set(re.findall(r"(cpu \d)  Trial \d+ scored", said))
        assert "3 of 3 trained" in said and said.count("Making the reference") == 1
    assert len(list((tmp_path / "out").glob("trial_*/lora*.safetensors"))) == 3 and "Best: trial" in done.stdout
    again = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert again.returncode == 0 and "scored" not in again.stdout.partition("Study '")[0]


@pytest.mark.slow
def test_what_libraries_warn_of_is_in_the_log_and_not_on_the_screen(
    command: Command, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "images", tmp_path / "images")
    palette = Image.open(tmp_path / "images" / "luca_01.png").convert("P")
    palette.save(tmp_path / "images" / "luca_01.png", transparency=bytes(range(256)))
    data_set = (world / "dataset.toml").read_text().replace(str(world / "images"), str(tmp_path / "images"))
    (tmp_path / "dataset.toml").write_text(data_set)
    arguments = command(dataset_config=tmp_path / "dataset.toml")
    check = subprocess.run([sys.executable, str(SCRIPT), *arguments, "--check"], capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (0, "")
    process = start(arguments)
    seen = read_until(process, "Trial 0: ")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    own = ("Checking ", "Making ", "Trying ", "Trial 0: ", "  ")
    assert [line for line in seen.splitlines() if line and not line.startswith(own)] == []
    assert "Palette images with Transparency" not in seen
    assert "Palette images with Transparency" in (tmp_path / "out" / "search.log").read_text()


def trainers_below(folder: Path) -> list[int]:
    """Processes whose command line names this folder's trial configs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "train_network.py" in line and str(folder) in line:
            found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_search_and_its_trainer_and_the_trial_is_tried_again(
    command: Command, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    process = start(command(study_name="signals"))
    read_until(process, "  epoch 2/")  # 1/1 is the first step, before any trial
    assert trainers_below(out)
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=15)[0]
    assert process.returncode == 130 and "the same command resumes" in output and "Traceback" not in output
    assert trainers_below(out) == []
    study = search.load_study(search.default_storage(out), "signals")
    assert study is not None
    (trial,) = study.get_trials()
    assert trial.state.name == "RUNNING" and trial.user_attrs["ended"] == "interrupted"


def scoring_of(command: Command) -> str:
    return next(part for part in command() if part.startswith("--scoring-config=")).partition("=")[2]


def test_a_second_program_and_changed_inputs_are_refused(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    process = start(command())
    read_until(process, "  epoch 2/")  # 1/1 is the first step, before any trial
    (line,) = errors_of(capsys, command())
    assert f"is in use by process {process.pid} on " in line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)

    (line,) = errors_of(capsys, command(seed=7))
    assert "seed (--seed): was 42, is now 7" in line
    scoring = toml.loads(Path(scoring_of(command)).read_text())
    scoring["images"]["steps"] += 1
    (tmp_path / "scoring.toml").write_text(toml.dumps(scoring))
    lines = errors_of(capsys, command(scoring_config=tmp_path / "scoring.toml"))
    assert [line.partition("--subject), ")[2].partition(";")[0] for line in lines] == [
        f"{stage}, steps: was [4], is now [5]" for stage in ("screen", "confirm", "final-1")
    ]
    (line,) = errors_of(capsys, command(study_name="another"))
    assert "holds study 'lora_v2.1'" in line
    assert search.main(["--report", f"--output-dir={tmp_path / 'out'}"]) == 0
    assert "Nothing was scored yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ([64, 128], [64, 128, 256], "it: has [256] besides now"), ([64, 128], [64], "it: lacks [128] now"),
        ([64, 128], [32, 128], "it: was [64], is now [32]"), ([64, 128], [64, 128], ""),
        ([64, 128], [128, 64], "it: has another order or number of the same now"),
        ([1, 1, 2], [1, 2], "it: has another order or number of the same now"),
    ],
)  # fmt: skip
def test_a_changed_list_is_told_by_what_has_come_and_gone(old: list[int], new: list[int], said: str) -> None:
    assert search.fingerprint_differences(old, new, "it") == ([said] if said else [])


def test_a_trainer_that_does_not_work_costs_no_trial(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = REPOSITORY / "tests" / "small_trainer" / "train_network.py"
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "train_network.py").write_text(
        f"import runpy, sys\nif 'first_step' in sys.argv[-1]: raise ImportError('DLL load failed')\n"
        f"sys.path.insert(0, {str(real.parent)!r})\nrunpy.run_path({str(real)!r}, run_name='__main__')\n"
    )
    assert search.main(command(sd_scripts=tmp_path / "sd")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: the trainer does not work: the trainer ended with status 1: ImportError: DLL load")
    study = search.load_study(search.default_storage(tmp_path / "out"), "lora_v2.1")
    assert study is not None and study.get_trials() == []


@pytest.mark.slow
def test_a_timeout_is_status_1_and_says_why(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(command(timeout=1e-9)) == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: --timeout 1e-09 is over with 0 of 2 trials trained") and said.count("\n") == 1


# --- disk, file systems, security ---------------------------------------------------------------------

MOUNTS = {
    "/": "ext4", "/mnt/c": "9p", "/srv/my share": "nfs4", "/srv/my share/deep": "cifs", "/mnt": "tmpfs",
}  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "kind", "warned"),
    [
        ("/home/me/runs", "ext4", False),
        ("/mnt/c/Users/me/runs", "9p", True),
        ("/mnt/c", "9p", True),
        ("/mnt/cd/runs", "tmpfs", False),
        ("/srv/my share/runs", "nfs4", True),
        ("/srv/my share/deep/runs", "cifs", True),
    ],
)
def test_knows_the_file_system_of_a_folder(
    folder: str, kind: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    top = tmp_path.resolve()
    (top / folder[1:]).mkdir(parents=True)
    mounts = [SimpleNamespace(mountpoint=f"{top}{point}".rstrip("/"), fstype=kind) for point, kind in MOUNTS.items()]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert search.file_system(top / folder[1:] / "new") == kind
    assert (kind in search.NOT_LOCAL) == warned


def test_a_network_share_is_warned_of(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind = search.file_system(tmp_path)
    monkeypatch.setattr(search, "NOT_LOCAL", [kind])
    assert search.main([*command(), "--check"]) == 0
    said = capsys.readouterr().out
    assert f"is on a Windows drive or a network share ({kind}): a database is slow and may fail there; give" in said


def test_room_is_looked_for_before_every_trial(command: Command) -> None:
    settings = search.read_settings(search.make_parser().parse_args(command()))[0]
    inputs = search.check_inputs(settings)
    inputs.check_room(inputs.largest_trial_bytes(), search.SearchStopped)
    huge = {"name": "p", "width": 10**9, "height": 10**9}
    inputs = dataclasses.replace(inputs, plan={**inputs.plan, "screen": [huge]})
    ours = search.study_on_device(inputs, optuna.create_study(), 0.0, "cpu")
    for remedy in ("raise save_every_n_epochs", "move it to a larger disk"):
        with pytest.raises(search.SearchStopped, match=f"B are free in .*; make room, or .*{remedy}$"):
            ours.before_trial()
        settings.reference.mkdir(parents=True, exist_ok=True)
        (settings.reference / "plan.json").touch()  # begun: no option may change any more


def test_room_is_needed_for_the_most_checkpoints_and_all_their_images(
    command: Command, world: Path, tmp_path: Path
) -> None:
    options = toml.loads((world / "training.toml").read_text()) | {"save_every_n_epochs": 2}
    (tmp_path / "training.toml").write_text(toml.dumps(options))
    arguments = command(training_config=tmp_path / "training.toml")
    inputs = search.check_inputs(search.read_settings(search.make_parser().parse_args(arguments))[0])
    pixels = {stage: sum(job["width"] * job["height"] for job in inputs.plan[stage]) for stage in ("screen", "confirm")}
    checkpoints = 20 // 2
    images = search.PNG_BYTES_PER_PIXEL * (checkpoints * pixels["screen"] + pixels["confirm"])
    weights = checkpoints * inputs.base_model.lora_bytes_per_dim * 256  # of half precision
    assert inputs.largest_trial_bytes() == pytest.approx(images + weights)
    for left, more in ((1, 0), (2, 1), (20, 1)):  # beside the needs of one device
        one = dataclasses.replace(inputs.settings, n_trials=left)
        two = dataclasses.replace(one, device="cuda:0,cuda:1")
        alone, both = (dataclasses.replace(inputs, settings=of).needed_bytes() for of in (one, two))
        assert both - alone == pytest.approx(more * (images + weights))


def test_files_have_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        search.write_json(tmp_path / "new" / "x.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "x.json").stat().st_mode & 0o777 == 0o600
