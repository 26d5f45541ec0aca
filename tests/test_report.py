"""results/report.html, in a real browser from disk and as a text, in every state of a study."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_study
import optuna
import pytest
from optuna.trial import FrozenTrial

import optuna_hyperparameter_search as search

TERMS = ("fidelity", "text", "preservation", "originality", "variety", "usable")
ENDS = {2: "diverged", 3: "rejected", 4: "crashed"}
FEW = {"prompts": 2, "plain_prompts": 2, "confirm_prompts": 3, "confirm_plain": 2, "checkpoints": 2}
MAX_PAGE_BYTES = 12_000_000
ODD_NAME = "it's 100% #1? <ü>"


# --- a browser ----------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, and what it asked the network for and wrote to its console."""

    def __init__(self, chromium: str, chromedriver: str, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for name in ("headless", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                     "disable-component-update", "disable-sync", "disable-dev-shm-usage",
                     "enable-unsafe-swiftshader"):  # WebGL for parallel coordinates  # fmt: skip
            options.add_argument(f"--{name}")
        options.add_argument(f"--user-data-dir={profile}")
        if os.geteuid() == 0:  # whom Chromium's sandbox refuses
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(chromedriver)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(60)

    def open(self, page: Path, fragment: str = "") -> None:
        """Anew, 1280 pixels wide and in light colours."""
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver.get("about:blank")
        self.resize(1280)
        self.prefer("light")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(page.as_uri() + fragment)
        WebDriverWait(self.driver, 60).until(lambda _: self.run("return document.readyState") == "complete")

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *args: object) -> Any:
        return self.driver.execute_script(script, *args)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent.trim())"
        return self.run(script, css)

    def click(self, css: str) -> None:
        element = self.driver.find_element("css selector", css)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def wait(self, script: str, seconds: float = 20) -> bool:
        """Whether `return script` was true in time."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.driver, seconds, 0.1).until(lambda _: self.run(f"return {script}"))
        except TimeoutException:
            return False

    def see_all(self) -> None:
        """Open all trials, and scroll through the whole page."""
        self.driver.execute_async_script(
            """const done = arguments[arguments.length - 1];
            document.querySelectorAll("details").forEach(one => { one.open = true; });
            let top = 0;
            (function further() {
              scrollTo(0, top);
              top += 600;
              const more = top < document.documentElement.scrollHeight;
              setTimeout(more ? further : done, 40);
            })();"""
        )
        assert self.wait("[...document.querySelectorAll('.plot')].every(box => box.querySelector('svg'))"), "no plot"

    def press(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def tab_to(self, css: str) -> None:
        from selenium.webdriver.common.keys import Keys

        for _ in range(200):
            self.press(Keys.TAB)
            if self.run("return document.activeElement.matches(arguments[0])", css):
                return
        raise AssertionError(f"200 times Tab do not lead to {css}")

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver and importlib.util.find_spec("selenium")):
        pytest.skip("of the report in a browser (apt-get install chromium chromium-driver, pip install selenium)")
    started = Browser(chromium, chromedriver, tmp_path_factory.mktemp("chromium"))
    try:
        yield started
    finally:
        started.driver.quit()


# --- a page as a text ---------------------------------------------------------------------------------


class Shown(HTMLParser):
    """What a page says and shows: `text` without scripts and styles, images, and the ids of its rows."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.images, self.rows, self.missing = "", [], [], []  # type: ignore[var-annotated]
        self._hidden = False
        self.source = page.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._hidden = tag in ("script", "style")
        if tag == "img":
            self.images.append(found)
        if found.get("class") == "missing":
            self.missing.append(found["aria-label"])
        if tag == "li":
            self.rows.append(found["id"])

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def page_of(output_dir: Path) -> Path:
    return output_dir / "results" / "report.html"


def study_in(output_dir: Path, name: str = "made") -> optuna.Study:
    study = search.load_study(search.default_storage(output_dir), name)
    assert study is not None
    return study


def rewritten(output_dir: Path) -> Shown:
    search.Results(study_in(output_dir), output_dir).write_report()
    return Shown(page_of(output_dir))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of seven trials, four of them scored; no test changes it."""
    output_dir = tmp_path_factory.mktemp("report") / "out"
    made_study.make_study(output_dir, trials=7, checkpoints=4, ends=ENDS)
    return output_dir


@pytest.fixture(scope="module")
def ranked(made: Path) -> list[FrozenTrial]:
    return search.scored_trials(study_in(made))


@pytest.fixture
def page(browser: Browser, made: Path) -> Browser:
    browser.open(page_of(made))
    return browser


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The folder of a study of two scored trials, to be changed."""
    output_dir = tmp_path / "out"
    made_study.make_study(output_dir, trials=2, picture_size=32, **FEW)
    return output_dir


# --- the leaderboard ----------------------------------------------------------------------------------


def sorted_by(ranked: list[FrozenTrial], name: str) -> list[str]:
    def key(trial: FrozenTrial) -> tuple[float, float]:
        return -(trial.value if name == "score" else trial.user_attrs["terms"][name]), -trial.value

    return [f"trial-{trial.number}" for trial in sorted(ranked, key=key)]


def rows(page: Browser) -> list[str]:
    """The ids of the leaderboard's rows from top to bottom."""
    return page.run(
        """const top = row => row.getBoundingClientRect().top;
        return [...document.querySelectorAll(".trial")].sort((a, b) => top(a) - top(b)).map(row => row.id);"""
    )


def pressed(page: Browser) -> list[str]:
    return page.texts("[data-sort][aria-pressed=true]")


def test_the_best_trial_comes_first(page: Browser, ranked: list[FrozenTrial]) -> None:
    assert rows(page) == sorted_by(ranked, "score") and pressed(page) == ["score"]


@pytest.mark.parametrize("name", ["score", *TERMS])
def test_a_button_sorts_the_trials(page: Browser, ranked: list[FrozenTrial], name: str) -> None:
    page.run("const list = document.getElementById('trials'); list.append(...[...list.children].reverse())")
    page.click(f"[data-sort={name}]")
    assert rows(page) == sorted_by(ranked, name)


def test_the_button_that_sorts_is_the_pressed_one(page: Browser) -> None:
    seen = []
    for name in ("variety", "text", "score"):
        page.click(f"[data-sort={name}]")
        seen += pressed(page)
    assert seen == ["variety", "text", "score"]


def open_best(page: Browser, ranked: list[FrozenTrial]) -> str:
    """Open the best trial by a click; its row's selector."""
    row = f"#trial-{ranked[0].number}"
    page.click(f"{row} summary")
    return row


def test_an_opened_trial_shows_a_column_for_each_epoch(page: Browser, made: Path, ranked: list[FrozenTrial]) -> None:
    row = open_best(page, ranked)
    metrics = search.read_json(search.find_trial_folder(ranked[0], made) / "metrics.json")
    epochs = [result["epoch"] for result in metrics["screen"]]
    heads = [text.removesuffix(", chosen") for text in page.texts(f"{row} .grid thead th")]
    assert heads == [f"epoch {epoch}" for epoch in epochs] and len(epochs) > 2
    shown = page.run("return [...document.querySelectorAll(arguments[0])].map(r => r.cells.length)", f"{row} .grid tr")
    assert set(shown) == {1 + len(epochs)}


def test_an_opened_trial_shows_a_row_for_each_prompt(page: Browser, made: Path, ranked: list[FrozenTrial]) -> None:
    row = open_best(page, ranked)
    plan = search.read_json(made / "reference" / "plan.json")
    prompts = {job["prompt"] for job in plan["screen"]}
    heads = page.texts(f"{row} .grid tbody tr:has(img) th")
    assert set(heads) == prompts and len(heads) == len(prompts)


def test_an_opened_trial_marks_the_chosen_column(page: Browser, ranked: list[FrozenTrial]) -> None:
    row = open_best(page, ranked)
    chosen = f"epoch {ranked[0].user_attrs['best_epoch']}, chosen"
    heads = page.texts(f"{row} .grid thead tr > *")
    assert [text for text in heads if "chosen" in text] == [chosen]
    marked = page.run(
        "return [...document.querySelectorAll(arguments[0])].map(one => one.closest('td').cellIndex)",
        f"{row} .grid .chosen",
    )
    assert set(marked) == {heads.index(chosen)} and len(marked) == len(page.all(f"{row} .grid tbody tr:has(img)"))


def test_an_opened_trial_shows_the_score_under_each_column(
    page: Browser, made: Path, ranked: list[FrozenTrial]
) -> None:
    row = open_best(page, ranked)
    metrics = search.read_json(search.find_trial_folder(ranked[0], made) / "metrics.json")
    assert page.texts(f"{row} .grid tbody tr:last-child td") == [
        f"{result['score']:.4f}" for result in metrics["screen"]
    ]


def test_an_opened_trial_draws_its_curves(page: Browser, ranked: list[FrozenTrial]) -> None:
    plot = f"#trial-{ranked[0].number} .plot"
    assert not page.all(f"{plot} svg")  # not before it is seen
    open_best(page, ranked)
    page.run("document.querySelector(arguments[0]).scrollIntoView()", plot)
    assert page.wait(f"document.querySelectorAll('{plot} svg .scatterlayer .trace').length == {len(TERMS) + 2}")


def test_a_link_to_a_trial_opens_it(browser: Browser, made: Path, ranked: list[FrozenTrial]) -> None:
    browser.open(page_of(made), f"#trial-{ranked[1].number}")
    assert browser.run("return [...document.querySelectorAll('.trial:has(details[open])')].map(one => one.id)") == [
        f"trial-{ranked[1].number}"
    ]


def test_trials_without_a_score_are_listed_with_their_reasons(page: Browser, made: Path) -> None:
    listed = page.run(
        "return [...document.querySelectorAll('#leaderboard table.plain tbody tr')].map("
        "row => [...row.cells].slice(0, 3).map(cell => cell.textContent))"
    )
    trials = study_in(made).get_trials()
    reasons = [trials[n].user_attrs.get("rejection_reason") or trials[n].user_attrs["reason"] for n in ENDS]
    assert listed == [[str(n), end, reason] for (n, end), reason in zip(ENDS.items(), reasons, strict=True)]
    assert all(reasons)


# --- the final stage ----------------------------------------------------------------------------------


def test_the_final_stage_puts_finalists_and_strengths_side_by_side(small: Path) -> None:
    final = study_in(small).user_attrs["final"]
    page = rewritten(small)
    for found in final["finalists"]:
        assert search.with_error(found).replace("+-", "±") in page.text
        shown = [image for image in page.images if f"final/trial_{found['trial']:04d}/final-1/" in image["src"]]
        assert len(shown) == 8 * (2 if found is final["finalists"][0] else 1)  # the winner's once more at strength 1
    assert {"strength-0.6", "strength-0.8", "strength-1.2"} <= {
        Path(image["src"]).parent.name for image in page.images if "/final/" in image["src"]
    }
    assert page.rows == [f"trial-{found['trial']}" for found in final["finalists"]]
    why = ": no other one is clearly better" if final["strength"] == 1 else ""
    assert f"Use it at strength {final['strength']}{why}." in page.text


@pytest.mark.parametrize("said", [True, False])
def test_finalists_that_can_not_be_told_apart_are_named(small: Path, said: bool) -> None:
    study = study_in(small)
    final = study.user_attrs["final"]
    final["finalists"][1]["dropped"] = not said
    study.set_user_attr("final", final)
    second = final["finalists"][1]["trial"]
    assert (f"Trial {second} may be as good." in rewritten(small).text) is said


def test_no_final_stage_is_shown_while_trials_are_left(made: Path) -> None:
    assert "The final stage" not in Shown(page_of(made)).text


# --- the winner ---------------------------------------------------------------------------------------


def test_the_winner_shows_score_epoch_and_terms(page: Browser, ranked: list[FrozenTrial]) -> None:
    attrs = ranked[0].user_attrs
    assert page.texts("#winner .head .score") == [f"{ranked[0].value:.3f} ±{attrs['standard_error']:.3f}"]
    assert page.texts("#winner .head strong") == [
        f"trial {ranked[0].number}, epoch {attrs['best_epoch']} of {attrs['training_params']['max_train_epochs']}"
    ]
    terms = [text.split() for text in page.texts("#winner .term")]
    assert [(words[0], words[-1]) for words in terms] == [(name, f"{attrs['terms'][name]:.2f}") for name in TERMS]


def test_the_winner_says_where_its_file_is_and_how_to_train_it(page: Browser, made: Path) -> None:
    lora, command = page.texts("#winner code")
    assert lora == str(made / "results" / "best_lora.safetensors") and Path(lora).is_file()
    assert command.split() == [
        "python", "train_network.py", "--config_file", str(made / "results" / "best_config.toml")
    ]  # fmt: skip


def test_the_winner_stands_beside_the_base_model_and_the_data_set(page: Browser, made: Path) -> None:
    kinds = ("with the best LoRA:", "without a LoRA:", "picture ")
    alts = page.run("return [...document.querySelectorAll('#winner img')].map(image => image.alt)")
    jobs = search.first_seeds(search.read_json(made / "reference" / "plan.json")["confirm"], 16)
    data = len(list((made / "reference" / "data_set").glob("*.png")))
    assert [sum(alt.startswith(kind) for alt in alts) for kind in kinds] == [len(jobs), len(jobs), data] and data


def test_a_copy_button_selects_its_text(page: Browser) -> None:
    page.click("#winner .copy")
    assert page.wait("document.querySelector('#winner .copy').textContent != 'Copy'")
    assert page.run("return getSelection().toString().trim()") == page.texts("#winner code")[0]


# --- the whole page -----------------------------------------------------------------------------------


def use_all(page: Browser) -> None:
    """Scroll through the whole page with all trials open, and sort them in every way."""
    page.see_all()
    for name in ("score", *TERMS):
        page.click(f"[data-sort={name}]")
    page.see_all()


def test_the_page_asks_for_pictures_in_the_studys_folder_and_nothing_else(page: Browser, made: Path) -> None:
    use_all(page)
    asked = [url for url in page.requests() if not url.startswith(("data:", "blob:"))]
    pictures = [url for url in asked if url.startswith(made.as_uri()) and url.endswith(".png")]
    assert len(pictures) > 100 and set(asked) - {*pictures} == {page_of(made).as_uri()}


def test_pictures_far_below_are_not_loaded_at_first(page: Browser) -> None:
    loaded = {url for url in page.requests() if url.endswith(".png")}
    assert 0 < len(loaded) < len(page.all("img")) / 3


def test_a_copied_folder_shows_its_own_pictures(browser: Browser, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / ODD_NAME
    shutil.copytree(made, copy)
    browser.open(page_of(copy))
    asked = [url for url in browser.requests() if url.endswith(".png")]
    assert asked and all(url.startswith(copy.as_uri()) for url in asked) and not browser.all("a.missing")


def test_pictures_of_trials_in_another_folder_are_shown(browser: Browser, tmp_path: Path) -> None:
    made_in, moved_to = tmp_path / ODD_NAME, tmp_path / "out"
    made_study.make_study(made_in, trials=1, picture_size=32, **FEW)
    shutil.copytree(made_in, moved_to, ignore=shutil.ignore_patterns("trial_*"))
    rewritten(moved_to)
    browser.open(page_of(moved_to))
    browser.see_all()
    assert browser.wait("[...document.images].every(image => image.naturalWidth)")
    asked = [url for url in browser.requests() if "/trial_0000/scores/" in url]
    assert asked and all(url.startswith(made_in.as_uri()) for url in asked) and not browser.all(".missing")


@pytest.mark.parametrize("bring", [shutil.copytree, os.symlink], ids=["copied", "linked"])
def test_files_on_another_host_are_named_until_they_are_brought(bring: Callable[..., object], tmp_path: Path) -> None:
    there, here, mounted = tmp_path / "there", tmp_path / "here", tmp_path / "mounted"
    made_study.make_study(there, trials=1, picture_size=32, **FEW)
    shutil.copytree(there, here, ignore=shutil.ignore_patterns("trial_*"))
    there.rename(mounted)
    page = rewritten(here)
    place = f"Its files are on {socket.gethostname()} in {there}/trial_0000."
    assert page.text.count(place) == 2 and f"Copy or link that folder into {here}," in page.text
    assert any(label.startswith("trial 0:") for label in page.missing)
    bring(mounted / "trial_0000", here / "trial_0000")
    search.Results(study_in(here), here).write()
    page = Shown(page_of(here))
    assert "Its files are on" not in page.text and page.missing == []
    lora = search.read_json(here / "results" / "best_parameters.json")["checkpoint"]
    assert lora == str(here / "trial_0000" / Path(lora).name)


def test_another_trials_folder_under_its_name_is_not_taken_for_it(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    made_study.make_study(there, trials=2, picture_size=32, **FEW)
    shutil.copytree(there, here, ignore=shutil.ignore_patterns("trial_*"))
    best = search.ranked_trials(study_in(here))[0].number
    shutil.copytree(there / f"trial_{1 - best:04d}", here / f"trial_{best:04d}")
    there.rename(tmp_path / "mounted")
    assert f"Its files are on {socket.gethostname()} in {there}/trial_{best:04d}." in rewritten(here).text
    (here / "results" / "best_lora.safetensors").unlink()
    with pytest.raises(search.SearchStopped, match="files are not whole"):
        search.Results(study_in(here), here).write()


def test_a_space_without_alpha_bands_has_no_shares_of_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = made_study.make_study(out, trials=2, picture_size=32, **FEW)
    assert "low alpha (0.25-0.40)" in rewritten(out).text
    searched = {"network_dim": {"choices": [8, 16]}, "fixed": [[{}, {"learning_rate": 1.0}]], "alpha_bands": False}
    study.set_user_attr("fingerprint", {**study.user_attrs["fingerprint"], "search space": searched})
    page = rewritten(out).text
    assert "stable trainings" in page and "low alpha (0.25-0.40)" not in page.partition("Where the time went")[0]
    assert '"learning_rate": 1.0' in page and "fixed =" not in page


def test_the_command_that_trains_again_names_the_familys_script(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made_study.make_study(out, trials=1, picture_size=32, **FEW)
    assert "python train_network.py --config_file" in rewritten(out).text
    plan = search.read_json(out / "reference" / "plan.json")
    search.write_json(out / "reference" / "plan.json", {**plan, "family": "SDXL"})
    assert "python sdxl_train_network.py --config_file" in rewritten(out).text


def test_a_line_of_parameters_names_no_rate_that_a_trial_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, all_of = tmp_path / "out", search.params_of
    made_study.make_study(out, trials=2, picture_size=32, **FEW)
    assert re.search(r", lr \d\.\d\de-\d\d/\d\.\d\de-\d\d, ", rewritten(out).text)

    def without_it(trial: FrozenTrial) -> dict[str, Any]:
        known = {**all_of(trial), "network_train_unet_only": True}
        return {name: value for name, value in known.items() if name != "text_encoder_lr"}

    monkeypatch.setattr(search, "params_of", without_it)
    page = rewritten(out).text
    assert re.search(r", lr \d\.\d\de-\d\d, AdamW", page) and " nan," not in page


def test_the_console_stays_empty(page: Browser) -> None:
    use_all(page)
    assert page.console() == []


def test_every_picture_is_loaded(page: Browser) -> None:
    page.see_all()
    page.wait("[...document.images].every(image => image.naturalWidth)")
    assert page.run("return [...document.images].filter(i => !i.naturalWidth).map(i => i.outerHTML.slice(-200))") == []
    assert len(page.all("img")) > 100


def test_every_picture_is_described(page: Browser) -> None:
    assert page.run("return [...document.images].filter(i => !i.alt.trim()).map(i => i.outerHTML.slice(-200))") == []


def test_every_link_leads_to_a_file(page: Browser, made: Path) -> None:
    links = page.run("return [...document.querySelectorAll('a')].map(one => one.getAttribute('href'))")
    files = [urllib.parse.unquote(link) for link in links if link and not link.startswith("#")]
    assert [file for file in files if not (made / "results" / file).exists()] == []
    assert sum(file.endswith(".png") for file in files) > 100


def test_every_link_within_the_page_has_a_target(page: Browser) -> None:
    script = "return [...document.querySelectorAll('a[href^=\"#\"]')].map(one => one.getAttribute('href'))"
    links = page.run(script)
    assert links and [link for link in links if not page.all(link)] == []


def test_a_picture_leads_to_the_whole_picture(page: Browser) -> None:
    sizes = page.run(
        """return Promise.all([...document.querySelectorAll("#winner .picture")].slice(0, 3).map(async link => {
          const whole = new Image();
          whole.src = link.href;
          await whole.decode();
          return whole.naturalWidth;
        }))"""
    )
    assert sizes == [64] * 3


@pytest.mark.parametrize("width", [400, 768, 2560])
def test_nothing_makes_the_page_scroll_sideways(page: Browser, width: int) -> None:
    page.resize(width)
    page.see_all()
    wider = """return [...document.body.querySelectorAll("*")].filter(one => !one.closest(".scroll, pre, svg")
      && one.getBoundingClientRect().right > arguments[0]).map(one => one.outerHTML.slice(0, 150))"""
    assert page.run("return document.documentElement.scrollWidth") <= width, page.run(wider, width)


CONTRASTS = """
const linear = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const luminance = colour => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(parts(colour)[i]), 0);
function background(element) {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor, alpha = parts(colour)[3];
    if (alpha === undefined || alpha > 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
const ratio = element => {
  const [low, high] = [getComputedStyle(element).color, background(element)].map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const hasText = element => [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
return [...document.body.querySelectorAll("*")].filter(one => hasText(one) && !one.closest("script, .plot"))
  .map(one => [`${one.tagName.toLowerCase()}.${one.className}`, ratio(one)]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    found = page.run(CONTRASTS)
    assert {name for name, _ in found} >= {"p.soft", "a.", "figcaption.", "button.copy", "code.", "summary.", "dd."}
    assert [(name, ratio) for name, ratio in found if ratio < 4.5] == []


def test_a_dark_desktop_gets_a_dark_page(page: Browser) -> None:
    colour = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.run(colour)
    page.prefer("dark")
    assert (light, page.run(colour)) == ("rgb(250, 250, 250)", "rgb(19, 19, 22)")


# --- the keyboard -------------------------------------------------------------------------------------


def outline(page: Browser) -> float:
    """How wide the outline around what has the focus is, in pixels."""
    style = page.run("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
    return 0.0 if style[0] == "none" else float(style[1].removesuffix("px"))


def test_the_keyboard_sorts(page: Browser, ranked: list[FrozenTrial]) -> None:
    from selenium.webdriver.common.keys import Keys

    page.tab_to("[data-sort=preservation]")
    page.press(Keys.ENTER)
    assert rows(page) == sorted_by(ranked, "preservation") and pressed(page) == ["preservation"]


@pytest.mark.parametrize("key", ["ENTER", "SPACE"])
def test_the_keyboard_opens_a_trial(page: Browser, key: str) -> None:
    from selenium.webdriver.common.keys import Keys

    page.tab_to(".trial summary")
    page.press(getattr(Keys, key))
    assert page.run("return document.activeElement.parentElement.open")


@pytest.mark.parametrize("css", ["nav a", "[data-sort]", "[data-vote]", ".copy", ".picture", "summary"])
def test_the_focus_is_visible(page: Browser, css: str) -> None:
    page.tab_to(css)
    assert outline(page) >= 2


# --- the blind comparison ---------------------------------------------------------------------------

REFUSE_STORAGE = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('refused'); }});"
KEYS = {"left": "1", "equal": "0", "right": "2"}


@pytest.fixture
def eye(browser: Browser, made: Path) -> Browser:
    """The page without votes."""
    browser.open(page_of(made))
    browser.run("localStorage.clear()")
    browser.open(page_of(made), "#eye")
    return browser


def comparison_of(output_dir: Path) -> search.Comparison:
    study = study_in(output_dir)
    return search.Comparison(search.ranked_trials(study), search.final_places(study))


def pairs_of(output_dir: Path) -> list[list[int]]:
    return comparison_of(output_dir).pairs()


def download(page: Browser, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    allowed = {"behavior": "allow", "downloadPath": str(folder)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
    page.click("#download")
    for _ in range(200):
        if search.read_json(folder / "votes.json"):
            return folder / "votes.json"
        time.sleep(0.1)
    raise AssertionError("nothing was downloaded in 20 seconds")


def voted(page: Browser, folder: Path) -> list[tuple[list[int], str]]:
    votes = search.read_json(download(page, folder))["votes"]
    return [([vote["left"], vote["right"]], vote["vote"]) for vote in votes]


def test_a_comparison_does_not_say_which_trials_it_shows(eye: Browser) -> None:
    assert len(eye.all("#eye .side img")) == 8 and eye.all("#eye a[href]") == []
    said = eye.run(
        """const parts = [...document.querySelectorAll("#eye, #eye :not(template)")];
        return parts.flatMap(one => [one.title, one.alt, one.innerText, one.ariaLabel]).join(" ")"""
    )
    assert "left" in said and re.findall(r"trial_?\s*\d|\d\.\d\d", said) == []


def test_both_sides_show_the_same_prompts_and_seeds_of_the_pairs_trials(eye: Browser, made: Path) -> None:
    sides = eye.run(
        """return [...document.querySelectorAll("#eye .side")].map(
          side => [...side.querySelectorAll("img")].map(image => image.src.split("/").slice(-4)))"""
    )
    folders = [[parts[0] for parts in side] for side in sides]
    assert folders == [[f"trial_{number:04d}"] * 4 for number in pairs_of(made)[0]]
    assert [parts[1:] for parts in sides[0]] == [parts[1:] for parts in sides[1]]


@pytest.mark.parametrize("choice", KEYS)
def test_a_button_votes_on_the_pair_and_shows_the_next(eye: Browser, made: Path, tmp_path: Path, choice: str) -> None:
    before = eye.texts("#voted")
    eye.click(f"[data-vote={choice}]")
    assert before + eye.texts("#voted") == ["0 of 6", "1 of 6"]
    eye.click("[data-vote=left]")
    assert voted(eye, tmp_path) == [(pairs_of(made)[0], choice), (pairs_of(made)[1], "left")]


@pytest.mark.parametrize("choice", KEYS)
def test_a_key_votes_once_the_section_is_clicked(eye: Browser, made: Path, tmp_path: Path, choice: str) -> None:
    eye.click("#eye .side img")
    eye.press(KEYS[choice])
    assert voted(eye, tmp_path) == [(pairs_of(made)[0], choice)]


def test_a_key_that_is_held_down_votes_once(eye: Browser) -> None:
    eye.click("#eye .side img")
    for repeats in (False, True, True):
        event = {"type": "keyDown", "key": "1", "text": "1", "autoRepeat": repeats}
        eye.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event)
    assert eye.texts("#voted") == ["1 of 6"]


def test_keys_elsewhere_in_the_page_vote_for_nothing(eye: Browser) -> None:
    eye.click("#leaderboard-title")
    eye.press("1")
    assert eye.texts("#voted") == ["0 of 6"]


def test_after_a_vote_the_button_keeps_the_focus(eye: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    eye.tab_to("[data-vote=right]")
    for _ in range(6):
        eye.press(Keys.ENTER)
    assert eye.texts("#voted") == ["6 of 6"] and eye.texts(".side") == ["All pairs have a vote."] * 2
    assert eye.run("return document.activeElement.dataset.vote") == "right" and outline(eye) >= 2


def test_a_reload_keeps_votes_and_the_order_of_pairs(eye: Browser, made: Path, tmp_path: Path) -> None:
    eye.click("[data-vote=right]")
    eye.open(page_of(made))
    assert eye.texts("#voted") == ["1 of 6"]
    eye.click("[data-vote=equal]")
    assert voted(eye, tmp_path) == [(pairs_of(made)[0], "right"), (pairs_of(made)[1], "equal")]


def test_undo_takes_the_last_vote_back(eye: Browser, made: Path, tmp_path: Path) -> None:
    eye.click("[data-vote=right]")
    eye.click("[data-vote=right]")
    eye.click("#undo")
    eye.click("[data-vote=left]")
    assert voted(eye, tmp_path) == [(pairs_of(made)[0], "right"), (pairs_of(made)[1], "left")]


def test_where_the_browser_keeps_nothing_votes_stay_until_the_page_is_left(
    eye: Browser, made: Path, tmp_path: Path
) -> None:
    assert not eye.run("return document.getElementById('forgets').offsetWidth")
    added = eye.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": REFUSE_STORAGE})
    try:
        eye.open(page_of(made))
        eye.click("[data-vote=left]")
        assert voted(eye, tmp_path) == [(pairs_of(made)[0], "left")] and eye.console() == []
        assert eye.run("return document.getElementById('forgets').offsetWidth")
    finally:
        eye.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_votes_of_another_study_of_that_name_are_not_shown(eye: Browser, made: Path, small: Path) -> None:
    for _ in pairs_of(made):
        eye.click("[data-vote=left]")
    assert {*map(tuple, pairs_of(small))} <= {*map(tuple, pairs_of(made))}
    eye.open(page_of(small))
    assert eye.texts("#voted") == ["0 of 1"]


def test_the_report_reads_the_votes_that_it_saved(
    eye: Browser, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(made, copy)
    for number, pair in enumerate(pairs_of(made)):
        one, two = comparison_of(made).values(*pair)
        agrees = "left" if one["score"] > two["score"] else "right"
        eye.click(f"[data-vote={agrees if number else 'equal'}]")
    download(eye, copy / "results")
    assert search.main(["--report", "--output-dir", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "6 votes" in said and "  score         100%  (57% to 100%; 5 of 5)" in said
    eye.open(page_of(copy))
    assert eye.texts("#eye pre")[0] in said


def test_a_bad_file_of_votes_is_one_warning(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "out"
    shutil.copytree(made, copy, ignore=shutil.ignore_patterns("*.png"))
    (copy / "results" / "votes.json").write_text('{"study": "made", "vo')
    page_of(copy).unlink()
    assert search.main(["--report", "--output-dir", str(copy)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "votes.json" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: ") and "damaged" in warnings[0]
    assert page_of(copy).is_file()


def test_trials_without_pictures_are_not_compared(small: Path) -> None:
    assert 'id="eye"' in rewritten(small).source
    shutil.rmtree(small / "trial_0001" / "scores")
    assert 'id="eye"' not in rewritten(small).source


# --- texts of others ----------------------------------------------------------------------------------

EVIL_NAME = '<script>alert(1)</script>&"'
EVIL = "<b onmouseover=x>\"'</script><img src=x onerror=alert(2)>&amp;"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of which every text that someone else wrote is markup."""
    output_dir = tmp_path_factory.mktemp("evil") / "out"
    study = made_study.make_study(
        output_dir, trials=4, picture_size=32, study_name=EVIL_NAME, ends={2: "crashed", 3: "rejected"}, **FEW
    )
    plan = search.read_json(output_dir / "reference" / "plan.json")
    for stage in ("screen", "confirm"):
        for job in plan[stage]:
            job["prompt"] += EVIL
    search.write_json(output_dir / "reference" / "plan.json", plan | {"subject": EVIL})
    for name in ("command", "n_trials"):
        study.set_user_attr(name, EVIL)
    study.set_user_attr("environment", {f"tool {EVIL}": EVIL})
    change_attrs(study, {"reason": EVIL, "rejection_reason": EVIL})
    changed = study_in(output_dir, EVIL_NAME)
    search.Results(changed, output_dir).write_report()
    return output_dir


def change_attrs(study: optuna.Study, values: Mapping[str, Any]) -> None:
    """Attributes of finished trials, which Optuna itself does not change any more."""
    from sqlalchemy import text

    change = text('UPDATE trial_user_attributes SET value_json = :value WHERE "key" = :name')
    with made_study.engine_of(study).begin() as connection:
        for name, value in values.items():
            assert connection.execute(change, {"value": json.dumps(value), "name": name}).rowcount


def test_texts_of_others_add_no_element(browser: Browser, evil: Path) -> None:
    browser.open(page_of(evil))
    browser.see_all()
    assert browser.run("return document.querySelectorAll('b, [onmouseover], [onerror], img:not([alt])').length") == 0
    plots, scripts = len(browser.all(".plot")), len(browser.all("script"))
    assert scripts == plots + 3 and plots > 2


def test_texts_of_others_run_nothing(browser: Browser, evil: Path) -> None:
    browser.open(page_of(evil))  # an alert would make the next command fail
    browser.see_all()
    assert browser.console() == []


@pytest.mark.parametrize(
    "css", ["#winner figcaption", ".grid th[scope=row]", "td.why", "#made code", "#made dt", "#made dd", "header p"]
)
def test_texts_of_others_are_shown_as_they_are(browser: Browser, evil: Path, css: str) -> None:
    browser.open(page_of(evil))
    assert any(EVIL in text for text in browser.texts(css))


def test_the_name_of_the_study_is_shown_as_it_is(browser: Browser, evil: Path) -> None:
    browser.open(page_of(evil))
    assert browser.driver.title.startswith(EVIL_NAME) and browser.texts("h1")[0].startswith(EVIL_NAME)


# --- every state of a study ---------------------------------------------------------------------------


def test_before_the_first_trial(tmp_path: Path) -> None:
    made_study.make_study(tmp_path, trials=0, picture_size=32, **FEW)
    shown = rewritten(tmp_path)
    assert "No trial has a score yet." in shown.text and "Nothing has been trained yet." in shown.text
    assert shown.rows == []


def test_before_there_is_a_plan(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    study = optuna.create_study(direction="maximize", study_name="new")
    search.Results(study, tmp_path).write_report()
    assert "No trial has a score yet." in Shown(page_of(tmp_path)).text


def test_after_one_trial(tmp_path: Path) -> None:
    made_study.make_study(tmp_path, trials=1, picture_size=32, **FEW)
    shown = rewritten(tmp_path)
    assert shown.rows == ["trial-0"] and "It takes two trials with a score to compare them." in shown.text


def test_when_all_trials_failed(tmp_path: Path) -> None:
    made_study.make_study(tmp_path, trials=3, picture_size=32, ends=dict.fromkeys(range(3), "crashed"), **FEW)
    shown = rewritten(tmp_path)
    assert "No trial has a score yet; below is how the others ended." in shown.text and shown.rows == []
    assert shown.text.count("the trainer ended with status 1") == 3


def test_while_a_trial_is_running(tmp_path: Path) -> None:
    made_study.make_study(tmp_path, trials=2, picture_size=32, ends={1: "running"}, **FEW)
    assert "1 of 2 trials trained; trial 1 is running." in rewritten(tmp_path).text


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 trials, most of them copies of the first ones with scores and pictures of the same folders."""
    output_dir = tmp_path_factory.mktemp("many") / "out"
    made_study.make_study(output_dir, trials=4, picture_size=32, **FEW)
    study = study_in(output_dir)
    trials = study.get_trials()
    for number in range(196):
        copy = trials[number % 4]
        copy.value = 0.1 + number % 100 / 1000
        study.add_trial(copy)
    search.Results(study, output_dir).write_report()
    return output_dir


def test_of_two_hundred_trials_all_are_listed(many: Path) -> None:
    ranked = search.scored_trials(study_in(many))
    assert Shown(page_of(many)).rows == [f"trial-{trial.number}" for trial in ranked] and len(ranked) == 200


def test_of_two_hundred_trials_all_have_pictures(many: Path) -> None:
    alts = [image["alt"] for image in Shown(page_of(many)).images]
    pictured = {int(alt.split(":")[0].removeprefix("trial ")) for alt in alts if alt.startswith("trial ")}
    assert pictured == set(range(200))


def test_the_page_of_two_hundred_trials_is_small(many: Path) -> None:
    assert page_of(many).stat().st_size < MAX_PAGE_BYTES


def test_a_picture_that_is_gone_is_named(small: Path) -> None:
    before = rewritten(small).missing
    best = search.scored_trials(study_in(small))[0]
    job = search.read_json(small / "reference" / "plan.json")["confirm"][0]
    (search.find_trial_folder(best, small) / "scores" / "confirm" / f"{job['name']}.png").unlink()
    shown = rewritten(small)
    assert sorted(set(shown.missing) - set(before)) == [
        f"prompt: {job['prompt']}: no picture",
        f"trial {best.number}: {job['prompt']}: no picture",
        f"with the best LoRA: {job['prompt']}: no picture",
    ]
    assert "no picture" in shown.text


def test_a_picture_that_is_gone_is_no_link(small: Path) -> None:
    gone = small / "reference" / "confirm" / "p00-s0.png"
    before = rewritten(small).source.count('href="../reference/confirm/p00-s0.png"')
    gone.unlink()
    assert before and gone.name not in re.findall(r'href="../reference/confirm/([^"]+)"', rewritten(small).source)


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(b""), Path.unlink])
def test_a_picture_that_is_empty_or_goes_after_the_page_was_written_is_shown_as_missing(
    browser: Browser, small: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(min((small / "reference" / "data_set").glob("*.png")))
    browser.open(page_of(small))
    browser.see_all()
    assert browser.wait("document.querySelector('a.missing')")
    assert browser.texts("a.missing") == ["no picture"]
    assert browser.run("return document.querySelector('a.missing').title") == "picture 1 of the data set"


def test_metrics_that_are_gone_are_said_to_be(small: Path) -> None:
    (small / "trial_0001" / "metrics.json").unlink()
    shown = rewritten(small)
    assert sorted(shown.rows) == ["trial-0", "trial-1"]
    again = f"Its metrics.json is not whole in its folder; --score {small}/trial_0001 makes it again."
    assert shown.text.count(again) == 1


def test_a_folder_that_is_gone_leaves_the_trial_in_the_list(small: Path) -> None:
    worst = search.scored_trials(study_in(small))[-1]
    shutil.rmtree(search.find_trial_folder(worst, small))
    shown = rewritten(small)
    assert len(shown.rows) == 2 and any(label.startswith(f"trial {worst.number}:") for label in shown.missing)


def test_the_page_is_written_though_the_best_trials_folder_is_gone(small: Path) -> None:
    shutil.rmtree(search.find_trial_folder(search.scored_trials(study_in(small))[0], small))
    page_of(small).unlink()
    (small / "results" / "best_lora.safetensors").unlink()
    with pytest.raises(search.SearchStopped):
        search.Results(study_in(small), small).write()
    assert "with the best LoRA" in Shown(page_of(small)).missing[0]


def test_a_password_is_not_in_the_page(tmp_path: Path, postgresql: Callable[[], str]) -> None:
    url = postgresql()
    study = made_study.make_study(tmp_path / "out", trials=2, picture_size=32, storage=url, **FEW)
    study.set_user_attr("command", " ".join(search.without_storage(["--storage", url])))
    search.Results(study, tmp_path / "out").write()
    made_study.engine_of(study).dispose()  # the server waits for it
    shown = Shown(page_of(tmp_path / "out"))
    assert len(shown.rows) == 2 and "--storage postgresql+psycopg://***@" in shown.source
    assert "s3cr3t" in url and "s3cr3t" not in shown.source


# --- what it shows of the trials ----------------------------------------------------------------------


def test_the_loss_curve_is_read_from_kohyas_bars(tmp_path: Path) -> None:
    bars = [
        f"\rsteps:  50%|#####     | {step}/4 [00:0{step}<00:01,  1.00it/s, avr_loss={loss}]"
        for step, loss in ((1, "0.5"), (2, "nan"), (2, "0.25"), (3, "nan"), (4, "1e-3"))
    ]
    (tmp_path / "training.log").write_text("epoch 1/2\n" + "".join(bars) + "\nmodel saved.\n", encoding="utf-8")
    curve = search.loss_curve(tmp_path / "training.log", epochs=2)
    assert curve == [(0.5, 0.5), (1.0, 0.25), (1.5, None), (2.0, 0.001)]
    assert search.loss_curve(tmp_path / "none.log", epochs=2) == []


def test_the_time_is_shared_out_to_what_it_went_into(tmp_path: Path) -> None:
    ends = {1: "crashed", 2: "continued"}
    study = made_study.make_study(tmp_path / "out", trials=4, picture_size=32, ends=ends, **FEW)
    again = study.get_trials()[0]  # a scored trial whose first attempt led to nothing
    again.user_attrs["lost_seconds"] = 240.0
    study.add_trial(again)
    trials = study.get_trials()
    scored = [trial.user_attrs for trial in trials if trial.value is not None]
    spent = {
        "training": sum(attrs["training_seconds"] for attrs in scored),
        "scoring": sum(attrs["scoring_seconds"] for attrs in scored),
        "waiting": sum(trial.user_attrs["waited_seconds"] for trial in trials),
        "wasted": sum(trial.user_attrs.get("lost_seconds", 0) for trial in trials),
    }
    shown = re.findall(r"(training|scoring|waiting|wasted)([\d.]+) min \((\d+)%\)", rewritten(tmp_path / "out").text)
    total = sum(spent.values())
    assert shown == [(name, f"{value / 60:.1f}", f"{100 * value / total:.0f}") for name, value in spent.items()]
    assert spent["wasted"] >= 240
    study.set_user_attr("final_seconds", 120.0)
    said = f"final stage2.0 min ({12000 / (total + 120):.0f}%)"
    assert said in rewritten(tmp_path / "out").text
