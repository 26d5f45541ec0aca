"""How large results/report.html is, how long it takes to write, and what it adds to a trial.

    python tests/benchmark_report.py
    python tests/benchmark_report.py FOLDER...

A folder is that of a finished study with a database of its own; it is not changed. Without any, two are made first: 20
trials with pictures of 512 pixels, which takes a minute and 2 GB, and 200 trials with pictures of 64 pixels.

One more trial is the best one, whose pictures are on the page twice, where all others were there before. Its contact
sheet, upload, page and notes are what the search does after training and scoring it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import made_study
import optuna
from optuna.trial import FrozenTrial, TrialState

import optuna_hyperparameter_search as search

STUDIES = ((20, 512), (200, 64))  # trials, and their pictures' size
TRIAL_SECONDS = 60  # of a trial that is over soon


def seconds(work: Callable[..., object], *args: object) -> float:
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def load(output_dir: Path) -> optuna.Study:
    plan = search.read_json(output_dir / "reference" / "plan.json") or {}
    name = plan.get("study", search.DEFAULT_STUDY_NAME)
    study = search.load_study(search.default_storage(output_dir), name)
    if study is None or not search.scored_trials(study):
        raise SystemExit(f"{output_dir}: no study {name!r} with a scored trial")
    return study


def link_folders(source: Path, target: Path, *, but: str) -> None:
    """The files and folders of one folder in a new one, as links."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != but:
            (target / path.name).symlink_to(path.resolve())


def link_study(source: Path, target: Path, best: FrozenTrial) -> None:
    """A study's folder, in which all that the search writes after a trial is new."""
    folder = search.find_trial_folder(best, source)
    for name in ("results", search.ARTIFACTS):
        (target / name).mkdir(parents=True)
    for path in (source / "reference", *source.glob("trial_*")):
        if path.name != folder.name:
            (target / path.name).symlink_to(path.resolve())
    link_folders(folder, target / folder.name, but="scores")
    link_folders(folder / "scores", target / folder.name / "scores", but=search.CONTACT_SHEET)


def before_the_last(study: optuna.Study, best: FrozenTrial, target: Path) -> tuple[optuna.Study, int]:
    """The study in a new database while its best trial is being trained, and that trial's id there."""
    copy = optuna.create_study(
        study_name=study.study_name, direction="maximize", storage=search.Storage(search.default_storage(target)).open()
    )
    for name, value in study.user_attrs.items():
        copy.set_user_attr(name, value)
    for trial in study.get_trials():
        if trial.number == best.number:
            trial.state, trial.value, trial.datetime_complete = TrialState.RUNNING, None, None
            trial.system_attrs = {}  # neither note nor artifact
        copy.add_trial(trial)
    return copy, copy.get_trials(deepcopy=False)[best.number]._trial_id


def one_more(study: optuna.Study, source: Path, target: Path) -> dict[str, float]:
    """Seconds of each part of what the search does for its best trial, when all others were there before."""
    best = search.scored_trials(study)[0]
    link_study(source, target, best)
    copy, trial_id = before_the_last(study, best, target)
    search.Results(copy, target).write_report()
    search.write_notes(copy)
    folder = search.find_trial_folder(best, target)
    sheet = search.ContactSheet(folder)
    spent = {"contact sheet": seconds(sheet.make)}
    trial = optuna.Trial(copy, trial_id)
    spent["upload"] = seconds(sheet.attach_to, trial)
    assert len(sheet.attached_to(trial, copy._storage)) == 1
    copy._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [best.value or 0.0])
    spent["page"] = seconds(search.Results(copy, target).write_report)
    spent["notes"] = seconds(search.write_notes, copy)
    return spent


def measure(output_dir: Path) -> None:
    study = load(output_dir)
    with tempfile.TemporaryDirectory() as top:
        target = Path(top) / "whole"
        link_study(output_dir, target, search.scored_trials(study)[0])
        written = seconds(search.Results(study, target).write_report)
        size = (target / "results" / search.REPORT_NAME).stat().st_size
        spent = one_more(study, output_dir, Path(top) / "one_more")
    total = sum(spent.values())
    trials = study.get_trials(deepcopy=False)
    print(f"{output_dir}: {len(trials)} trials, {len(search.scored_trials(study))} of them scored")
    print(f"  the page:        {size / 1e6:6.2f} MB")
    print(f"  written in:      {written:6.2f} s")
    parts = ", ".join(f"{name} {value:.2f}" for name, value in spent.items())
    print(f"  one more trial:  {total:6.2f} s, {100 * total / TRIAL_SECONDS:.1f}% of a trial of a minute   ({parts})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for folder in args.folders:
        measure(folder.resolve())
    for trials, size in () if args.folders else STUDIES:
        with tempfile.TemporaryDirectory() as top:
            made_study.make_study(Path(top) / "study", trials=trials, picture_size=size, distinct_pictures=size > 64)
            measure(Path(top) / "study")


if __name__ == "__main__":
    main()
