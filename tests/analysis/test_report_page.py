"""A run's page: whole in one file, safe with any text, drawn by a browser without errors."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from dsv3_jax.analysis.report_page import TIMES, write_page
from dsv3_jax.config import UserError
from tests.analysis.test_report import make_run

HOSTILE = "</script><script>alert(1)</script> & <b>\u2028"


@pytest.fixture
def page(tmp_path):
    run = make_run(tmp_path / "run", num_lines=200)
    lines = [
        {"step": step, "prompt": "def f", "text": f"{HOSTILE} {step}"} for step in (10, 20, 10)
    ]
    torn = '{"step": 30, "prom'
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + torn)
    return write_page(run)


class Parsed(HTMLParser):
    """Tags with what would load something from elsewhere, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.scripts, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.loads += [values[name] for name in ("src", "href") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts and self.lasttag == "script":
            self.scripts[-1] += data


def test_the_page_is_whole_in_itself(page):
    parsed = Parsed(page.read_text())
    assert parsed.loads == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp", page.read_text())
    assert len(parsed.scripts) == 2, "the data, and what draws them; a text ends neither"
    wanted = set(re.findall(r'\bat\("([\w-]+)"\)', parsed.scripts[1]))
    assert wanted | {"data"} <= set(parsed.ids)


def test_numbers_and_texts_are_those_of_the_run(page):
    data = json.loads(Parsed(page.read_text()).scripts[0])
    charts = {chart["title"]: chart["lines"] for chart in data["charts"]}
    records = [json.loads(line) for line in (page.parent / "metrics.jsonl").open()]
    loss = [[r["step"], r["loss"]] for r in records if "loss" in r]
    assert charts["Loss"][0]["points"] == loss
    assert "Model FLOPs utilisation" not in charts, "what was not measured has no chart"
    times = data["load"]["times"]
    assert len(times) == TIMES and times[-1]["step"] == records[-1]["step"]
    assert times[-1]["load"] == [r for r in records if "expert_load" in r][-1]["expert_load"]
    assert len(data["load"]["layers"]) == len(times[0]["load"])
    assert [s["step"] for s in data["samples"]] == [10, 20]
    assert data["samples"][0]["text"] == f"{HOSTILE} 10"


def test_a_run_of_one_line_has_a_page_and_no_run_has_none(tmp_path):
    run = make_run(tmp_path / "run", num_lines=1)
    (run / "config.json").unlink(missing_ok=True)
    assert "no config.json that can be read" in write_page(run).read_text()
    with pytest.raises(UserError, match="no such run"):
        write_page(tmp_path / "nothing")


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


@pytest.mark.slow
def test_a_browser_draws_it(page, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no headless browser on PATH: {', '.join(BROWSERS)}")
    headless = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
    ]
    shown = subprocess.run(
        [*headless, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert 'data-drawn="yes"' in shown
    data = json.loads(Parsed(page.read_text()).scripts[0])
    assert shown.count('class="chart"') == len(data["charts"])
    assert "&lt;/script&gt;" in shown, "the hostile text is text"
