"""--search-space: what a file may say, what it is refused for, and that proposals keep to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import REPOSITORY
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import optuna_hyperparameter_search as search

CONFIGS = REPOSITORY / "configs"
SHIPPED = sorted(CONFIGS.glob("search_space_*.toml"))
FIXED = """
text_encoder_lr = 5e-5
network_dim = 64
network_alpha_ratio = 0.5
max_train_epochs = 10
lr_scheduler = "cosine"
gradient_accumulation_steps = 1
lr_warmup_steps = 100
"""
SMALL = f"""{FIXED}
[optimizer_type]
choices = ["AdamW", "Prodigy"]

[learning_rate]
low = 1e-5
high = 1e-3
log = true
when = {{ optimizer_type = "AdamW" }}

[[set]]
when = {{ optimizer_type = "Prodigy" }}
learning_rate = 1.0
optimizer_args = "d_coef=2 weight_decay=0.01"
"""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_text(text: str) -> search.SearchSpace:
        (tmp_path / "space.toml").write_text(text, encoding="utf-8")
        return search.SearchSpace.read(tmp_path / "space.toml")

    return read_text


def proposals(space: search.SearchSpace, seed: int, count: int = 20) -> list[dict[str, Any]]:
    sampler = search.FeasibleTPESampler(seed, space)
    study, found = optuna.create_study(sampler=sampler, direction="maximize"), []
    for _ in range(count):
        trial = study.ask()
        found.append(search.suggest_hyperparameters(trial, space))
        study.tell(trial, float(np.random.default_rng(len(found)).random()))
    return found


# --- what is shipped ---


def test_the_shipped_v2_1_is_the_code() -> None:
    assert search.SearchSpace.read(CONFIGS / "search_space_v2.1.toml") == search.V2_1


def test_the_examples_in_the_comments_may_be_written_below_the_parameters(read: Any) -> None:
    text = (CONFIGS / "search_space_v2.1.toml").read_text(encoding="utf-8")
    rules = re.findall(r"(?m)^#     (\[\[\w+\]\]|\w+ = .*?)(?:   .*)?$", text.partition("x network_alpha_ratio")[2])
    space = read("\n".join([text, *rules]))
    assert [rules[0], rules[3], len(rules)] == ["[[set]]", "[[forbid]]", 7]
    assert len(space.fixed[1:]) == len(space.forbidden) == 1 and not list(space.idle_rules())


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_what_a_shipped_space_proposes_may_be_trained(file: Path) -> None:
    space = search.SearchSpace.read(file)
    for seed in range(30):
        for params in proposals(space, seed):
            assert search.may_train(params, space) == (True, "")


def test_a_study_of_v2_1_from_before_there_were_files_goes_on() -> None:
    assert search.space_fingerprint(search.V2_1) == "815f09ec20ce1215"
    assert search.space_fingerprint(
        search.SearchSpace.read(CONFIGS / "search_space_v2.1.toml")
    ) == search.space_fingerprint(search.V2_1)


def test_prodigy_has_its_own_learning_rate_and_no_restarts() -> None:
    space = search.SearchSpace.read(CONFIGS / "search_space_prodigy.toml")
    found = [params for seed in range(5) for params in proposals(space, seed)]
    prodigy = [params for params in found if params["optimizer_type"] == "Prodigy"]
    assert 5 < len(prodigy) < len(found) - 5
    assert {params["learning_rate"] for params in prodigy} == {1.0}
    assert all("safeguard_warmup=True" in params["optimizer_args"] for params in prodigy)
    assert not any(params["lr_scheduler"] == "cosine_with_restarts" for params in prodigy)
    assert all(
        params["learning_rate"] < 1e-3 and "optimizer_args" not in params for params in found if params not in prodigy
    )


# --- what a file says ---


def test_a_table_is_a_distribution(read: Any) -> None:
    space = read(f"""learning_rate = 1e-4
optimizer_type = "AdamW"
{FIXED.replace("max_train_epochs = 10", "")}
max_grad_norm = 1.0
[max_train_epochs]
low = 8
high = 16
step = 4
[min_snr_gamma]
low = 1.0
high = 10.0
[network_dropout]
choices = [0.0, 0.1]
[noise_offset]
low = 0.01
high = 0.1
log = true
[loss_type]
choices = ["l2", "huber"]
[huber_c]
low = 0.05
high = 0.2
when = {{ loss_type = "huber" }}
""")
    assert space.searched == {
        "max_train_epochs": IntDistribution(8, 16, step=4),
        "min_snr_gamma": FloatDistribution(1.0, 10.0),
        "network_dropout": CategoricalDistribution((0.0, 0.1)),
        "noise_offset": FloatDistribution(0.01, 0.1, log=True),
        "loss_type": CategoricalDistribution(("l2", "huber")),
        "huber_c": FloatDistribution(0.05, 0.2),
    }
    assert not space.alpha_bands
    for params in proposals(space, 0):
        assert params["max_grad_norm"] == 1.0
        assert params["network_alpha"] == 32
        assert ("huber_c" in params) is (params["loss_type"] == "huber")


def test_whole_limits_are_numbers_where_the_option_is_one_and_warm_up_may_be_a_share(read: Any) -> None:
    text = SMALL.replace("lr_warmup_steps = 100", "").replace(
        "low = 1e-5\nhigh = 1e-3\nlog = true", "low = 0\nhigh = 1"
    )
    space = read(text + "[lr_warmup_steps]\nlow = 0.05\nhigh = 0.2\n")
    assert space.searched["learning_rate"] == FloatDistribution(0, 1)
    assert space.searched["lr_warmup_steps"] == FloatDistribution(0.05, 0.2)
    assert read(text + "[lr_warmup_steps]\nlow = 0\nhigh = 9\n").searched["lr_warmup_steps"] == IntDistribution(0, 9)


def test_values_that_belong_to_another_are_set_with_it(read: Any) -> None:
    found = proposals(read(SMALL), 1)
    assert {params["optimizer_type"] for params in found} == {"AdamW", "Prodigy"}
    for params in found:
        is_prodigy = params["optimizer_type"] == "Prodigy"
        assert (params["learning_rate"] == 1.0) is is_prodigy
        assert params.get("optimizer_args") == (["d_coef=2", "weight_decay=0.01"] if is_prodigy else None)


def test_a_condition_compares_numbers_values_and_lists() -> None:
    params = {"rate": 2e-4, "kind": "b", "flag": True}
    for condition, expected in [
        ({"rate": "> 1e-4"}, True), ({"rate": "<1e-4"}, False), ({"rate": ">= 2e-4"}, True),
        ({"rate": "<= 2E-4"}, True), ({"kind": "b"}, True), ({"kind": ["a", "b"]}, True), ({"kind": ["a"]}, False),
        ({"flag": True}, True), ({"rate": "> 1e-4", "kind": "a"}, False), ({"rate": "> 1e-4", "kind": "b"}, True),
        ({"other": 1}, False), ({}, True),
    ]:  # fmt: skip
        assert search.meets(params, condition) is expected, condition


@pytest.mark.parametrize(("wanted", "idle"), [("> 1", True), ("< 1e-9", True), ("> 5e-5", False), ("<= 6e-5", False)])
def test_a_rule_that_no_value_meets_is_told(read: Any, wanted: str, idle: bool) -> None:
    text = (CONFIGS / "search_space_v2.1.toml").read_text(encoding="utf-8")
    space = read(f"{text}\n[[forbid]]\nlearning_rate = '{wanted}'\nreason = 'x'\n")
    said = f"[[forbid]] in {space.name} does nothing, since learning_rate is never {wanted!r}; correct it"
    assert list(space.idle_rules()) == ([said] if idle else [])


def test_a_forbidden_combination_is_never_proposed_nor_trained(read: Any) -> None:
    space = read(
        SMALL
        + """
[[forbid]]
optimizer_type = "AdamW"
learning_rate = "> 3e-5"
reason = "it burns"
"""
    )
    for seed in range(5):
        assert all(params["learning_rate"] == 1 or params["learning_rate"] <= 3e-5 for params in proposals(space, seed))
    for values, expected in (
        ({"optimizer_type": "AdamW", "learning_rate": 1e-4}, (False, "it burns")),
        ({"optimizer_type": "Prodigy"}, (True, "")),
    ):
        assert search.may_train(space.complete(values), space) == expected


def test_v2_1s_constraints_hold_for_what_is_searched_unless_the_file_says_no(read: Any) -> None:
    text = SMALL.replace("max_train_epochs = 10", "").replace("network_dim = 64", "")
    text += "[network_dim]\nchoices = [64, 256]\n[max_train_epochs]\nchoices = [12, 16]\n"
    large = {"network_dim": 256, "max_train_epochs": 12, "optimizer_type": "Prodigy"}
    for values, more, expected in (
        (large, "", (False, "High dim (≥256) needs ≥16 epochs for convergence")),
        ({**large, "max_train_epochs": 16}, "", (True, "")),  # its learning rate of 1 is not searched
        (large, "safety_constraints = false\n", (True, "")),
    ):
        space = read(more + text)
        assert search.may_train(space.complete(values), space) == expected


def test_an_alpha_of_dim_is_not_proposed_where_the_constraints_hold(read: Any) -> None:
    text = SMALL.replace("network_alpha_ratio = 0.5", "") + "[network_alpha_ratio]\nlow = 0.8\nhigh = 1.0\nstep = 0.1\n"
    assert 64 not in {params["network_alpha"] for params in proposals(read(text), 0)}


CHAIN = (
    SMALL
    + """
[loss_type]
choices = ["l2", "huber"]
[huber_schedule]
choices = ["snr", "constant"]
when = { loss_type = "huber" }
[huber_c]
low = 0.1
high = 0.2
when = { huber_schedule = "snr" }
[[forbid]]
huber_c = "> 0.11"
reason = "too much"
[weighting]
choices = ["a=1 b=2", "a=1"]
"""
)


def test_rules_hold_along_a_chain_of_conditions_and_for_several_arguments(read: Any) -> None:
    space = read(CHAIN.replace("weighting", "network_args") + '[[forbid]]\nnetwork_args = "a=1 b=2"\nreason = "x"\n')
    found = [params for seed in range(4) for params in proposals(space, seed)]
    assert {params["network_args"][0] for params in found} == {"a=1"} and len(found[0]["network_args"]) == 1
    depths = [params["huber_c"] for params in found if "huber_c" in params]
    assert len(depths) > 5 and max(depths) <= 0.11


def test_parameters_with_conditions_are_drawn_apart() -> None:
    space = search.SearchSpace.read(CONFIGS / "search_space_prodigy.toml")
    found = [params for seed in range(20) for params in proposals(space, seed, 10) if params["learning_rate"] < 1]
    rates = np.log([[params["learning_rate"], params["text_encoder_lr"]] for params in found])
    assert abs(np.corrcoef(rates.T)[0, 1]) < 0.3


def test_v2_1_proposes_what_it_did_before_there_were_files() -> None:
    study = optuna.create_study(sampler=search.FeasibleTPESampler(0), direction="maximize")
    found = [sorted(search.suggest_hyperparameters(study.ask()).items()) for _ in range(20)]  # before TPE has learnt
    assert search.digest(str(found))[:16] == "84fe91d951ebd5e6"


def test_alpha_bands_can_be_left_out(read: Any) -> None:
    text = (CONFIGS / "search_space_v2.1.toml").read_text(encoding="utf-8")
    space = read(text.replace("alpha_bands = true", "alpha_bands = false"))
    assert space == search.replace(search.V2_1, alpha_bands=False)
    ratios = [params["network_alpha_ratio"] for params in proposals(space, 3, 10)]
    assert sum(ratio >= 0.75 for ratio in ratios) != 3 or sum(ratio <= 0.4 for ratio in ratios) != 3


def test_no_setting_is_proposed_twice_while_there_are_others(read: Any) -> None:
    text = FIXED.replace("network_dim = 64", "").replace("network_alpha_ratio = 0.5", "").replace("[", "")
    text += 'learning_rate = 1e-4\noptimizer_type = "AdamW"\n[network_dim]\nchoices = [16, 32]\n'
    space = read(text + "[network_alpha_ratio]\nlow = 0.1\nhigh = 0.5\nstep = 0.1\n")
    for seed in range(5):
        found = proposals(space, seed, 12)
        assert len({(params["network_dim"], params["network_alpha_ratio"]) for params in found[:10]}) == 10


def test_enqueued_values_bring_what_they_depend_on(read: Any) -> None:
    space = read(SMALL)
    study = optuna.create_study(sampler=search.FeasibleTPESampler(0, space))
    study.enqueue_trial({"learning_rate": 2e-4})
    assert search.suggest_hyperparameters(study.ask(), space)["optimizer_type"] == "AdamW"


# --- what it is refused for ---

LR = "[learning_rate]\nlow = 1e-5\n"
SCHEDULER = "[lr_scheduler]\nchoices = ['cosine']\n"
REFUSED = [
    (LR, "[learning_rate]: no high; give low and high"),
    ("[learning_rate]\nlow = 1e-3\nhigh = 1e-5\n", "[learning_rate]: low <= high must hold"),
    ("[learning_rate]\nlow = 0.0\nhigh = 1e-5\nlog = true\n", "[learning_rate]: low > 0 must hold"),
    ("[learning_rate]\nlow = 'a'\nhigh = 1e-5\n", "[learning_rate]: low must be a number"),
    (f"{LR}high = 1e-4\nlog = 'yes'\n", "[learning_rate]: log must be true or false"),
    (f"{LR}high = 1e-4\nhihg = 1\n", "[learning_rate]: unknown key 'hihg'; did you mean 'high'?"),
    ("[lr_warmup_steps]\nlow = 0\nhigh = 100\nstep = 30\n", "[lr_warmup_steps]: high is not low and some steps more"),
    ("[network_dim]\nchoices = []\n", "[network_dim]: The choices must contain one or more elements; give low"),
    ("[network_dim]\nchoices = 64\n", "[network_dim]: choices must be a list"),
    ("[network_dim]\nchoices = [64]\nlow = 1\n", "[network_dim]: choices must be a list"),
    (f"{LR}high = 1e-4\nwhen = {{ lr_schedulr = 'cosine' }}\n",
     "[learning_rate], when: 'lr_schedulr' is not searched above it"),
    (f"{SCHEDULER}{LR}high = 1e-4\nwhen = {{ lr_scheduler = 'linear' }}\n", "lr_scheduler is never 'linear'"),
    (f"{SCHEDULER}[[forbid]]\nlr_scheduler = '> 3'\nreason = 'x'\n", "[[forbid]]: lr_scheduler is never '> 3'"),
    (f"{SCHEDULER}[[forbid]]\nlr_scheduler = 'cosine'\n", "[[forbid]] has no reason"),
    ("[[forbid]]\nreason = 'x'\n", "[[forbid]] holds always; name parameters"),
    ("[[set]]\nlearning_rate = 1.0\n", "[[set]] holds always; add when = {...}"),
    ("forbid = 3\n", "forbid must be a table; write [[forbid]] above it"),
    ("alpha_bands = 'yes'\n", "alpha_bands must be true or false"),
    ("alpha_bands = 0\n", "alpha_bands must be true or false"),
    ("network_alpha_ratio = 'half'\n", "network_alpha_ratio must be a number"),
    ("[network_dim]\nchoices = ['64']\n", "network_dim must be a whole number"),
    ("network_dim = -8\n", "network_dim must be a whole number of 1 or more"),
    ("lr_warmup_steps = '10%'\n", "lr_warmup_steps must be a number"),
    ("gradient_accumulation_steps = 0\n", "gradient_accumulation_steps must be a whole number of 1 or more"),
    ("learning_rate = 2026-01-01\n", "learning_rate must be a number"),
    ("max_grad_norm = 2026-01-01\n", "max_grad_norm must be a text, a number, true, false, or a list of these"),
    ("[network_dim]\nlow = 8\nhigh = 100000000000000000000\n", "[network_dim]: "),
    ("[max_grad_norm]\nlow = -1.7e308\nhigh = 1.7e308\n", "[max_grad_norm]: "),
    ("[network_dim]\nchoices = [64, 64]\n", "[network_dim]: a choice stands there twice"),
    (f"{SCHEDULER}[[forbid]]\nlr_scheduler = []\nreason = 'x'\n", "lr_scheduler is never []"),
    (f"{SCHEDULER}[[set]]\nwhen = {{ lr_scheduler = 'cosine' }}\n", "[[set]] sets nothing"),
    ("alpha_bands = true\n", "alpha_bands = true needs V2.1's network_alpha_ratio"),
    ("[lr_warmup_steps]\nlow = 5\nhigh = 20.0\n", "lr_warmup_steps must be a whole number, or a share of the run"),
    ("lr_warmup_steps = 100.0\n", "lr_warmup_steps must be a whole number, or a share of the run below 1"),
    ("[[forbidden]]\nnetwork_dim = 64\n", "[[forbidden]] is no table of a search space; did you mean 'forbid'?"),
    (f"{LR}high = 1e-4\n{LR}high = 1e-4\n", "is not valid TOML (What? learning_rate already exists); "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=range(len(REFUSED)))
def test_a_faulty_file_is_refused_with_one_line(read: Any, text: str, said: str) -> None:
    with pytest.raises(search.RefusedInput) as refused:
        read(text)
    (line,) = [line for line in refused.value.problems if said in line]
    assert line.startswith("--search-space: ") and "\n" not in line


def test_what_v2_1_has_must_be_given(read: Any) -> None:
    with pytest.raises(search.RefusedInput) as refused:
        read(FIXED)
    assert [re.search(r"no (\w+)", line)[1] for line in refused.value.problems] == ["learning_rate", "optimizer_type"]
    with pytest.raises(search.RefusedInput, match="no learning_rate in some trials"):
        read(SMALL.replace("learning_rate = 1.0\n", ""))


def test_a_value_is_not_searched_and_fixed(read: Any) -> None:
    with pytest.raises(search.RefusedInput, match="learning_rate is both searched and fixed"):
        read(SMALL.replace('{ optimizer_type = "Prodigy" }', '{ optimizer_type = ["AdamW", "Prodigy"] }'))


def test_two_tables_do_not_set_one_value(read: Any) -> None:
    tables = "[[set]]\nwhen = { optimizer_type = 'Prodigy' }\nmax_grad_norm = 0.0\n"
    read(SMALL + tables + tables)
    with pytest.raises(search.RefusedInput, match=r"two \[\[set\]\] give max_grad_norm two values in some trials"):
        read(SMALL + tables + tables.replace("0.0", "1.0"))


KNOWN = {
    **{name: {"kind": "float"} for name in ("learning_rate", "text_encoder_lr", "min_snr_gamma", "unet_lr")},
    **{name: {"kind": "int"} for name in ("network_dim", "max_train_epochs", "gradient_accumulation_steps")},
    "lr_warmup_steps": {"kind": "int_or_float"}, "optimizer_type": {"kind": "str"},
    "lr_scheduler": {"kind": "str"}, "optimizer_args": {"kind": "str", "is_list": True},
    "max_grad_norm": {"kind": "float"}, "loss_type": {"kind": "str", "choices": ["l2", "huber"]},
    "seed": {"kind": "int"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("min_snr_gama = 5.0", "'min_snr_gama' is no option of this sd-scripts; did you mean 'min_snr_gamma'?"),
        ("loss_type = 'l3'", "a value of loss_type must be one of l2, huber"),
        ("max_train_steps = 100", "'max_train_steps' is set by this program for every trial; delete it"),
        ("resume = 'x'", "'resume' would quietly beat a searched value; delete it"),
        ("output_dir = '/tmp'", "'output_dir' is set by this program for every trial; delete it"),
        ("seed = 3", "'seed' is the same in all trials; give it in the training config"),
        ("max_grad_norm = 0.5", "'max_grad_norm' is in the training config, too; delete one of them"),
        ("network_alpha = 3", "network_alpha follows from network_alpha_ratio; give that instead"),
        ("min_snr_gamma = 'a'", "a value of min_snr_gamma must be a number"),
    ],
)
def test_options_are_those_of_the_trainer(read: Any, more: str, said: str) -> None:
    space, options = read(f"{more}\n{SMALL}"), {"seed": 42, "max_grad_norm": 1.0, "learning_rate": 1e-4}
    with pytest.raises(search.RefusedInput) as refused:
        search.check_space_options(space, options, {}, {"options": KNOWN}, lambda _: True)
    assert [line.split("space.toml: ")[1] for line in refused.value.problems] == [said]
    right = read(f"unet_lr = 1e-4\nlearning_rate = 1e-4\n{FIXED}\n[optimizer_type]\nchoices = ['AdamW']")
    search.check_space_options(right, options, {}, {"options": KNOWN}, lambda _: True)


def test_what_the_data_sets_file_sets_is_not_searched(read: Any) -> None:
    space, options = read(f"min_snr_gamma = 5.0\n{SMALL}"), {"options": KNOWN}
    data_set = {"general": {"resolution": 512}, "datasets": [{"batch_size": 2, "subsets": [{"image_dir": "x"}]}]}
    assert search.options_of_data_set(data_set) == {"resolution", "train_batch_size", "subsets", "image_dir"}
    search.check_space_options(space, {}, data_set, options, lambda _: True)
    data_set["datasets"][0]["subsets"][0]["min_snr_gamma"] = 1.0
    with pytest.raises(search.RefusedInput, match="'min_snr_gamma' has no effect, since the data set's file sets it"):
        search.check_space_options(space, {}, data_set, options, lambda _: True)
    with pytest.raises(search.RefusedInput, match="'train_batch_size' is the same in all trials"):
        search.check_space_options(read(f"train_batch_size = 2\n{SMALL}"), {}, {}, options, lambda _: True)


@pytest.mark.parametrize(
    ("line", "other"), [("unet_lr = 1e-4", "learning_rate"), ("lr_scheduler_type = 'X'", "lr_scheduler")]
)
def test_what_another_option_overrules_is_not_searched(read: Any, line: str, other: str) -> None:
    searched = SMALL.replace('lr_scheduler = "cosine"\n', "") + '[lr_scheduler]\nchoices = ["cosine", "linear"]\n'
    with pytest.raises(search.RefusedInput, match=f"{other} is searched, but has no effect with {line.split()[0]}"):
        read(f"{line}\n{searched}")


def test_fixed_arguments_of_an_optimizer_are_the_training_configs(read: Any) -> None:
    answer = {"options": {}, "optimizers": [["AdamW", "TypeError: weight_decai"]]}
    with pytest.raises(search.RefusedInput, match=r"^--training-config: kohya can't make AdamW"):
        search.check_space_options(search.V2_1, {"optimizer_args": ["weight_decai=1"]}, {}, answer, lambda _: True)


def test_an_optimizer_that_kohya_cant_make_is_refused(read: Any) -> None:
    space = read(SMALL)
    assert [table["optimizer_type"] for table in space.optimizers()] in (["AdamW", "Prodigy"], ["Prodigy", "AdamW"])
    assert {"learning_rate": 1.0, "optimizer_type": "Prodigy", "optimizer_args": ["d_coef=2", "weight_decay=0.01"]} in (
        space.optimizers()
    )
    answer = {"options": KNOWN, "optimizers": [["AdamW8bit", "no"], ["Prodigy", "ImportError: No prodigyopt"]]}
    with pytest.raises(search.RefusedInput) as refused:
        search.check_space_options(space, {}, {}, answer, lambda params: params["optimizer_type"] != "AdamW8bit")
    (line,) = refused.value.problems  # without bitsandbytes AdamW8bit is never proposed
    assert line.startswith("--search-space: space.toml: ")
    assert "kohya can't make Prodigy (ImportError: No prodigyopt); install or correct it" in line
