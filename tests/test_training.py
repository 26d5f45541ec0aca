"""Section 7: the trial's config, the trainer's process, its progress, and the judgement of its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toml
from safetensors.numpy import save_file

import optuna_hyperparameter_search as search

REPOSITORY = Path(__file__).resolve().parents[1]
PARAMS: search.Params = {
    "learning_rate": 8e-5,
    "text_encoder_lr": 4e-5,
    "network_dim": 64,
    "network_alpha_ratio": 0.5,
    "network_alpha": 32,
    "optimizer_type": "AdamW",
    "max_train_epochs": 12,
    "lr_scheduler": "cosine_with_restarts",
    "gradient_accumulation_steps": 2,
    "lr_warmup_steps": 50,
    "lr_scheduler_num_cycles": 3,
}
# What kohya prints, with its bars ended by CR and its colours.
OUTPUT = (
    "accelerator device: cpu\n"
    "override steps. steps for 12 epochs is / 指定エポックまでのステップ数: 24\n"
    "\rsteps:   0%|          | 0/24 [00:00<?, ?it/s]\x1b[32mINFO\x1b[0m something\n"
    "\nepoch 1/12\n"
    "\rsteps:   4%|▍         | 1/24 [00:07<02:41,  7.02s/it]"
    "\rsteps:   8%|▊         | 2/24 [00:14<02:34,  7.01s/it, avr_loss=0.123]"
    "\nvalidation steps:  50%|█████     | 9/18 [00:14<02:34,  7.01s/it, val_loss=0.5]\n"
    "saving checkpoint: /x/lora-000002.safetensors\n"
    "model saved.\n"
)


def save_lora(path: Path, up: float = 0.01, dtype: type = np.float16) -> None:
    down, weight = np.ones((4, 8), dtype), np.full((8, 4), up, dtype)
    alpha = np.array(2.0, dtype)
    save_file(
        {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": weight, "lora_unet_x.alpha": alpha},
        str(path),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trial's folder after a good training of 4 epochs, saved every 2."""
    config = search.trial_config({**PARAMS, "max_train_epochs": 4}, {}, Path("/m"), Path("/d"), tmp_path)
    (tmp_path / "config.toml").write_text(toml.dumps(config))
    save_lora(tmp_path / "lora-000002.safetensors")
    save_lora(tmp_path / "lora.safetensors")
    return tmp_path


def progress_of(output: str) -> search.TrainingProgress:
    progress = search.TrainingProgress()
    progress.read(output)
    progress.finish()
    return progress


# --- the config --------------------------------------------------------------------------------------


def test_config_holds_searched_values_fixed_options_and_paths_under_kohyas_names() -> None:
    config = search.trial_config(PARAMS, {"seed": 42}, Path("/m.safetensors"), Path("/d.toml"), Path("/out"))
    assert config["network_alpha"] == 32 and config["seed"] == 42
    assert config["pretrained_model_name_or_path"] == "/m.safetensors"
    assert "network_alpha_ratio" not in config
    assert toml.loads(toml.dumps(config)) == config


def test_every_key_that_is_written_is_an_option_of_the_real_trainer() -> None:
    known: set[str] = set()
    for family in search.FAMILIES.values():
        file = Path(family.script).with_suffix("").name + "_options.json"
        options = json.loads((REPOSITORY / "tests" / "kohya" / file).read_text())
        fixed = search.read_training_options(REPOSITORY / "configs" / family.training_config)
        for params in (PARAMS, search.FIRST_STEP_PARAMS):
            written = search.trial_config(params, fixed, Path("/m"), Path("/d"), Path("/o"))
            assert written.keys() <= options.keys()
        known |= options.keys()
    assert search.REFUSED_OPTIONS.keys() <= known


# --- progress ----------------------------------------------------------------------------------------


def test_reads_epoch_step_loss_and_eta_however_the_output_is_cut() -> None:
    whole = progress_of(OUTPUT)
    piecewise = search.TrainingProgress()
    for character in OUTPUT:
        piecewise.read(character)
    piecewise.finish()
    for progress in (whole, piecewise):
        assert (progress.epoch, progress.epochs, progress.step, progress.steps) == (1, 12, 2, 24)
        assert (progress.loss, progress.eta, progress.device, progress.saved) == ("0.123", "02:34", "cpu", True)


def test_notes_the_step_at_which_the_loss_became_nan() -> None:
    progress = progress_of("epoch 1/2\n\rsteps:  50%|█ | 3/6 [00:01<00:01,  2.0it/s, avr_loss=nan]")
    assert progress.first_nan_step == 3


def test_away_from_a_terminal_each_epoch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    bars = "\rsteps:  50%|█ | 3/6 [00:01<00:01,  2.0it/s, avr_loss=0.5]"
    progress_of(f"epoch 1/2\n{bars}{bars}\nepoch 2/2\n{bars}{bars}\n")
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]


# --- the end -----------------------------------------------------------------------------------------


def test_a_good_training_passes(folder: Path) -> None:
    progress_of(OUTPUT).judge_end(folder, 0)


def test_checkpoints_come_with_their_epochs_in_order(folder: Path) -> None:
    found = [(epoch, file.name) for epoch, file in search.saved_checkpoints(folder, 4).items()]
    assert found == [(2, "lora-000002.safetensors"), (4, "lora.safetensors")]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite_are_diverged(folder: Path, value: float, dtype: type) -> None:
    save_lora(folder / "lora-000002.safetensors", value, dtype)
    with pytest.raises(search.Diverged, match=r"not finite in lora-000002\.safetensors"):
        progress_of(OUTPUT).judge_end(folder, 0)


def test_bfloat16_is_read_by_its_bits(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    for value, finite in ((0.01, True), (3e38, True), (float("nan"), False), (float("inf"), False)):
        save_torch({"a.lora_up.weight": torch.full((2, 2), value, dtype=torch.bfloat16)}, tmp_path / "l.safetensors")
        with contextlib.nullcontext() if finite else pytest.raises(search.Diverged):
            search.check_lora(tmp_path / "l.safetensors")


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_lora_that_learnt_nothing_is_the_set_ups_fault(folder: Path, zero: float) -> None:
    save_lora(folder / "lora.safetensors", zero)
    with pytest.raises(search.TrialFailed, match="moved from zero") as caught:
        progress_of(OUTPUT).judge_end(folder, 0)
    assert caught.value.ended == "crashed"


def test_an_early_checkpoint_may_be_zero_as_a_warm_up_begins(folder: Path) -> None:
    save_lora(folder / "lora-000002.safetensors", 0.0)
    progress_of(OUTPUT).judge_end(folder, 0)


def test_the_largest_finite_half_is_finite(folder: Path) -> None:
    save_lora(folder / "lora.safetensors", 65504.0)
    search.check_lora(folder / "lora.safetensors")


def test_a_file_without_the_trainers_word_is_not_enough(folder: Path) -> None:
    with pytest.raises(search.TrialFailed, match="saved no LoRA"):
        progress_of(OUTPUT.replace("model saved.", "")).judge_end(folder, 0)


def test_a_full_disk_is_no_trials_fault(folder: Path) -> None:
    output = OUTPUT + "OSError: [Errno 28] No space left on device\n"
    with pytest.raises(OSError, match="No space left on device"):
        progress_of(output).judge_end(folder, 1)


def test_a_training_that_nobody_saw_the_end_of_is_known_by_its_log_and_files(folder: Path) -> None:
    assert not search.has_finished_training(folder)
    (folder / "training.log").write_text(OUTPUT)
    assert search.has_finished_training(folder)
    save_lora(folder / "lora.safetensors", float("nan"))
    assert not search.has_finished_training(folder)


def test_a_torn_checkpoint_is_a_crash(folder: Path) -> None:
    whole = (folder / "lora.safetensors").read_bytes()
    (folder / "lora.safetensors").write_bytes(whole[:-1])
    with pytest.raises(search.TrialFailed, match="torn") as caught:
        progress_of(OUTPUT).judge_end(folder, 0)
    assert caught.value.ended == "crashed"


@pytest.mark.parametrize(
    ("status", "output", "kind", "ended", "says"),
    [
        (0, "No data found.\n", search.TrialFailed, "crashed", "saved no LoRA: No data found"),
        (0, "model saved.\n", search.TrialFailed, "crashed", "saved no LoRA"),
        (1, "Traceback\n  File x\nValueError: bad\n", search.TrialFailed, "crashed", "status 1: ValueError: bad"),
        (-15, "", search.TrialFailed, "crashed", "it printed nothing"),
        (-9, "", search.OutOfMemory, "out of memory", "SIGKILL"),
        (
            1,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n",
            search.OutOfMemory,
            "out of memory",
            "CUDA out of memory",
        ),
        (1, "torch.cuda.OutOfMemoryError: CUDA out of memory.\n", search.OutOfMemory, "out of memory", "CUDA"),
        (1, "RuntimeError: GET was unable to find an engine\n", search.OutOfMemory, "out of memory", "an engine"),
    ],
)
def test_ends_are_told_apart(
    tmp_path: Path, status: int, output: str, kind: type[search.TrialFailed], ended: str, says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        progress_of(output).judge_end(tmp_path, status)
    assert caught.value.ended == ended


def test_a_training_on_the_cpu_is_no_training_on_the_card(folder: Path) -> None:
    with pytest.raises(search.TrialFailed, match="used the CPU instead of cuda"):
        progress_of(OUTPUT).check(folder, "cuda", 1, None)


def test_a_trainer_that_uses_the_cpu_instead_of_the_card_is_stopped_at_once(tmp_path: Path) -> None:
    script = tmp_path / "train_network.py"
    script.write_text("import time\nprint('accelerator device: cpu')\ntime.sleep(60)")
    search.write_toml(tmp_path / "config.toml", {"output_dir": str(tmp_path)})
    started = time.monotonic()
    with pytest.raises(search.TrialFailed, match=r"used the CPU instead of cuda:0; its PyTorch does not see the card"):
        search.KohyaTrainer(sys.executable, script, "cuda:0")(tmp_path / "config.toml")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("device", "says"), [("cuda", "cuda"), ("cuda", "cuda:0"), ("cpu", "cpu"), ("cuda", "")])
def test_a_trainer_on_the_device_that_was_asked_for_goes_on(device: str, says: str, tmp_path: Path) -> None:
    progress = progress_of(f"accelerator device: {says}\n" if says else "loading\n")
    progress.check(tmp_path, device, 1, None)


# --- the process -------------------------------------------------------------------------------------

SLEEPER = "import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"


def unwatched() -> None: ...


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_output_is_kept_unchanged_and_status_returned(tmp_path: Path) -> None:
    seen: list[str] = []
    code = "import sys; sys.stdout.write('a\\r'); sys.stderr.write('指b'); sys.exit(3)"
    child = search.ChildProcess([sys.executable, "-c", code], "cpu")
    status = child.run(seen.append, unwatched, tmp_path / "log")
    assert status == 3 and "".join(seen) == "a\r指b"
    assert (tmp_path / "log").read_bytes() == "a\r指b".encode()


def test_a_child_speaks_utf_8_whatever_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    code = "import sys; print('指定 \\udcff'); print('指定', file=sys.stderr)"
    status, said = search.capture([sys.executable, "-c", code], "cpu")
    assert status == 0 and said.count("指定") == 2, said


def test_whatever_ends_the_call_ends_the_whole_process_tree() -> None:
    pids: list[int] = []

    def interrupt(text: str) -> None:
        pids.extend(map(int, text.split()))
        raise KeyboardInterrupt

    code = SLEEPER + "import os; print(f'{os.getpid()} {p.pid}', flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        search.ChildProcess([sys.executable, "-c", code], "cpu").run(interrupt, unwatched)
    assert len(pids) == 2 and wait_until_dead(pids, 5)


def test_a_trainer_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TERMINATION_SECONDS", 0.3)
    pids: list[int] = []

    def interrupt(text: str) -> None:
        pids.extend(map(int, text.split()))
        raise KeyboardInterrupt

    code = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        search.ChildProcess([sys.executable, "-c", code], "cpu").run(interrupt, unwatched)
    assert wait_until_dead(pids, 5)


def test_a_child_that_closes_its_output_and_lives_on_is_still_watched() -> None:
    calls: list[float] = []

    def watch() -> None:
        calls.append(time.monotonic())
        if len(calls) == 5:
            raise search.Hung("silent for too long")

    code = "import os, time; os.close(1); os.close(2); time.sleep(60)"
    with pytest.raises(search.Hung):
        search.ChildProcess([sys.executable, "-c", code], "cpu").run(print, watch)
    assert 1.5 < calls[-1] - calls[0] < 10  # about every second


def test_a_child_that_closes_its_output_ends_with_its_own_status() -> None:
    started = time.monotonic()
    code = "import os, sys, time; print('x', flush=True); os.close(1); os.close(2); time.sleep(1.5); os._exit(7)"
    seen: list[str] = []
    command = [sys.executable, "-c", code]
    assert search.ChildProcess(command, "cpu").run(seen.append, unwatched) == 7
    assert "".join(seen) == "x\n" and 1.5 < time.monotonic() - started < 10


def test_a_hung_trainer_is_found_though_it_has_closed_its_output(tmp_path: Path) -> None:
    script = tmp_path / "train_network.py"
    script.write_text("import os, time; os.close(1); os.close(2); time.sleep(60)")
    search.write_toml(tmp_path / "config.toml", {"output_dir": str(tmp_path)})
    with pytest.raises(search.Hung, match="printed nothing while it loaded"):
        search.KohyaTrainer(sys.executable, script, "cpu", stall_minutes=0.01)(tmp_path / "config.toml")


@pytest.mark.parametrize("output", ["print('some output', flush=True)", "os.close(1); os.close(2)", ""])
def test_a_short_program_that_does_not_end_is_ended_and_refused(output: str) -> None:
    started = time.monotonic()
    code = f"import os, time\n{output}\ntime.sleep(60)"
    with pytest.raises(search.RefusedInput, match="took more than 1 s and was ended; run it by hand"):
        search.capture([sys.executable, "-c", code], "cpu", seconds=1)
    assert time.monotonic() - started < 8


def test_a_short_program_that_never_stops_printing_is_ended() -> None:
    with pytest.raises(search.RefusedInput, match=r"took more than 0\.5 s"):
        search.capture(["sh", "-c", "while :; do echo x; done"], "cpu", seconds=0.5)


def test_a_short_program_within_its_time_says_status_and_output() -> None:
    assert search.capture(["sh", "-c", "echo well; exit 3"], "cpu", seconds=30) == (3, "well\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_program_takes_its_trainer_along() -> None:
    code = (
        "import sys, optuna_hyperparameter_search as s\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "s.ChildProcess([sys.executable, '-c', child], 'cpu').run(lambda t: print(t, flush=True), lambda: None)\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    trainer = int(program.stdout.readline())
    assert is_alive(trainer)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    assert wait_until_dead([trainer], 5)


@pytest.mark.parametrize(
    ("device", "outside", "inside"),
    [("cpu", None, ""), ("cpu", "3", ""), ("cuda", "3", "3"), ("cuda:1", None, "1"), ("cuda:1", "4,7", "7")],
)
def test_a_child_sees_only_the_card_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: str, outside: str | None, inside: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outside is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outside)
    assert search.ChildProcess.environment(device)["CUDA_VISIBLE_DEVICES"] == inside


# --- pauses ------------------------------------------------------------------------------------------

SAVER = """
import sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

folder = Path(sys.argv[2]).parent
for epoch in (1, 2, 3):
    name = f"lora-{epoch:06d}.safetensors" if epoch < 3 else "lora.safetensors"
    save_file({"a.lora_up.weight": np.ones(4, np.float16)}, folder / name)
    print(f"\\rsteps:  10%|#         | {epoch}/9 [00:01<00:03, 9.00it/s, avr_loss=0.1]", flush=True)
    for tick in range(25 if epoch == 2 else 10):  # in silence
        with (folder / "ticks").open("a") as file:
            print(time.time(), file=file)
        time.sleep(0.1)
print("model saved.")
"""


@pytest.fixture
def saver(tmp_path: Path) -> search.KohyaTrainer:
    """Saves three epochs of a second each, the second one of two and a half."""
    (tmp_path / "train_network.py").write_text(SAVER)
    return search.KohyaTrainer(sys.executable, tmp_path / "train_network.py", "cpu", stall_minutes=0.06)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def trainer_of(folder: Path) -> int:
    return search.read_json(folder / f"training{search.PROCESS_FILE}")["pid"]


def test_a_trainer_stands_still_in_a_pause_and_goes_on(saver: search.KohyaTrainer, tmp_path: Path) -> None:
    """Longer than a stall of 3.6 seconds; and the training's seconds are those without it."""
    seen: list[str] = []
    paused: list[float] = []

    def work(seconds: float) -> None:
        began, started = time.time(), time.monotonic()
        time.sleep(4)
        seen.append(state_of(trainer_of(tmp_path)))
        ticks = list(map(float, (tmp_path / "ticks").read_text().split()))
        assert len(ticks) >= 10 and all(tick < began + 0.1 for tick in ticks) and 1 < seconds < 10
        paused.append(time.monotonic() - started)

    started = time.monotonic()
    seconds, _ = saver(tmp_path / "config.toml", None, search.Pause(tmp_path / "lora-000002.safetensors", work))
    assert seen == ["T"]
    assert seconds == pytest.approx(time.monotonic() - started - paused[0], abs=0.5)


def test_an_error_in_a_pause_ends_the_training(saver: search.KohyaTrainer, tmp_path: Path) -> None:
    pids: list[int] = []

    def work(_seconds: float) -> None:
        pids.append(trainer_of(tmp_path))
        raise search.StoppedEarly("too low to win")

    with pytest.raises(search.StoppedEarly):
        saver(tmp_path / "config.toml", None, search.Pause(tmp_path / "lora-000001.safetensors", work))
    assert wait_until_dead(pids, 1) and not (tmp_path / "lora.safetensors").exists()


def test_weights_that_are_not_finite_end_the_training_at_its_pause(tmp_path: Path) -> None:
    (tmp_path / "train_network.py").write_text(SAVER.replace("np.ones(4,", "np.full(4, np.nan,"))
    trainer = search.KohyaTrainer(sys.executable, tmp_path / "train_network.py", "cpu")
    with pytest.raises(search.Diverged, match="not finite in lora-000001"):
        trainer(tmp_path / "config.toml", None, search.Pause(tmp_path / "lora-000001.safetensors", print))


def test_a_torn_checkpoint_is_not_saved_yet(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "lora-000001.safetensors"
    assert not search.is_saved(file)
    save_file({"a.lora_up.weight": np.ones(64, np.float16)}, file)
    whole = file.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert not search.is_saved(file)
    file.write_bytes(whole)
    assert search.is_saved(file)


# --- sd-scripts itself -------------------------------------------------------------------------------


def test_pictures_are_held_by_one_program_at_a_time(tmp_path: Path) -> None:
    import fcntl

    handle = os.open(tmp_path, os.O_RDONLY)
    with search.locked([tmp_path, tmp_path]), pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
