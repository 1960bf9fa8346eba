"""The report: one file that needs no network, with the run's own figures, which survives what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from helpers_run import make_world, tree
from trimtab.errors import BadInput
from trimtab.recipe import Recipe
from trimtab.report import POINTS, read, report
from trimtab.report_figures import bars, throughput, timeline

pytestmark = pytest.mark.filterwarnings("ignore")
GIB = 2**30


class Page(HTMLParser):
    """What a browser would see: the text, what is embedded, and every address."""

    VOID = {"meta", "link", "br", "input"}

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.scripts: dict[str, str] = {}
        self.text, self._script = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag == "script":
            self._script = values.get("id") or f"script{len(self.scripts)}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def json(self, name: str) -> dict:
        return json.loads(self.scripts[name])


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Two finished runs of two patches, both evaluated before and after."""
    folder = tmp_path_factory.mktemp("runs")
    world = make_world(folder)
    for name, patch in (("paca", {"paca": {"r": 4}}), ("lora", {"lora": {"r": 4}})):
        keys = tree(world, folder / name, patch, max_steps=5) | {"budget": {"fast": 8 * GIB}}
        keys["data"]["test"] = keys["data"]["train"]
        recipe = Recipe.from_dict(keys)
        recipe.train()
        recipe.evaluate(base_only=True, limit=4)
        recipe.evaluate(limit=4)
    return folder


def test_one_file_that_needs_nothing_else(ran, tmp_path):
    written = report([ran / "paca"])
    assert written == ran / "paca" / "report.html"
    page, found = Page(written), json.loads((ran / "paca" / "run.json").read_text())
    assert page.addresses == ["data:,"], "nothing is fetched"
    assert "@import" not in written.read_text()[:5000]
    assert page.json("runs") == {"paca": found}
    figures = page.json("figures")
    losses = [json.loads(line)["loss"] for line in (ran / "paca" / "metrics.jsonl").read_text().splitlines()[:5]]
    assert figures["figure0"]["data"][0]["y"] == losses
    assert written.read_text(encoding="utf-8").count(get_plotlyjs()) == 1
    for words in ("paca (r: 4)", "4,096", "8.00 GiB", "predicted", "measured", "which country is", "before"):
        assert words in page.text, words


def test_bars_are_what_was_predicted_and_measured(ran):
    run = read(ran / "paca")
    for trace in bars(run)["data"]:
        held = run.run[trace["name"]]["bytes"]
        assert dict(zip(trace["y"], trace["x"], strict=True)) == {
            kind: pytest.approx(held.get(kind, 0) / 2**20, abs=1e-3) for kind in trace["y"]
        }
    measured = run.run["measured"]
    assert sum(v for k, v in measured["bytes"].items() if k != "mapped weights") == measured["live_peak_bytes"]
    assert measured["bytes"].get("mapped weights", 0) == measured["mapped_weight_bytes"]
    for kind, size in run.run["predicted"]["bytes"].items():
        assert measured["bytes"].get(kind, 0) == pytest.approx(size, rel=0.15, abs=4096), kind


def test_the_stack_is_what_the_process_held(ran):
    run = read(ran / "paca")
    figure = timeline(run, 8 * GIB)
    tops = [sum(heights) for heights in zip(*(trace["y"] for trace in figure["data"]), strict=True)]
    assert tops == pytest.approx([row["anon"] / GIB for row in run.memory], abs=1e-3) and len(tops) >= 2
    assert figure["layout"]["shapes"][0]["y0"] == 8.0
    assert run.memory[-1]["parts"]["adapter"] == run.run["measured"]["bytes"]["adapter"]


def test_runs_side_by_side(ran, tmp_path):
    page = Page(report([ran / "paca", ran / "lora"], tmp_path / "both.html"))
    assert page.json("runs").keys() == {"paca", "lora"}
    assert [trace["name"] for trace in page.json("figures")["figure0"]["data"]] == ["paca", "lora"]
    (tmp_path / "paca").mkdir()
    (tmp_path / "paca" / "recipe.yaml").write_text("model: x\n")
    same = Page(report([ran / "paca", tmp_path / "paca"], tmp_path / "same.html"))
    assert len(same.json("runs")) == 2, "two folders of one name keep two names"


def test_a_killed_run_and_damaged_files(ran, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("metrics.jsonl", "memory.jsonl", "recipe.yaml"):
        (folder / name).write_bytes((ran / "paca" / name).read_bytes())
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[: whole.rindex(b'"loss"')] + b"\xff\xfe")
    page = Page(report([folder]))
    assert "did not come to its end" in page.text and "1 line of metrics.jsonl could not be read" in page.text
    (folder / "run.json").write_text('{"steps": 3, "measured": [1, 2], "predicted": {"bytes": 7}, "final_loss": NaN,')
    assert "run.json could not be read" in Page(report([folder])).text
    (folder / "run.json").write_text(
        json.dumps({"steps": "<b>x</b>", "measured": [1], "predicted": {"bytes": 7}, "final_loss": float("nan"),
                    "versions": 3, "machine": "</script><script>alert(1)</script>"})
    )  # fmt: skip
    (folder / "memory.jsonl").write_text('{"anon": 5, "parts": [], "seconds": null}\n[]\nnull\n{"anon": "x"}\n')
    (folder / "eval.json").write_text('{"metrics": 3, "samples": [4, {"prompt": "</script>", "reply": "<i>"}]}')
    (folder / "recipe.yaml").write_text("patches: 5\nbudget: {fast: many}\nmodel: 3\n")
    page = Page(report([folder]))
    assert page.json("runs")["killed"]["final_loss"] is None and "<i>" in page.text
    for name in ("run.json", "eval.json"):
        (folder / name).write_text("[" * 100_000)
    (folder / "recipe.yaml").write_text("a: [")
    assert "recipe.yaml could not be read" in Page(report([folder])).text


def test_what_is_no_run_is_refused(ran, tmp_path, call):
    with pytest.raises(BadInput, match="no such folder"):
        report([tmp_path / "nowhere"])
    with pytest.raises(BadInput, match="none of run.json"):
        report([tmp_path])
    with pytest.raises(BadInput, match="--out"):
        report([ran / "paca"], tmp_path / "no" / "folder.html")
    code, out, err = call("report", tmp_path)
    assert code == 2 and out == "" and "Traceback" not in err
    code, out, err = call("report", ran / "paca", ran / "lora", "--out", tmp_path / "page.html")
    assert code == 0 and Path(out.strip()) == tmp_path / "page.html" and (tmp_path / "page.html").is_file()


def test_open_shows_it(ran, call, monkeypatch):
    import webbrowser

    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    assert call("report", ran / "paca", "--open")[0] == 0
    assert shown == [(ran / "paca" / "report.html").resolve().as_uri()]


def test_a_long_run_is_thinned_and_a_resumed_one_goes_on(tmp_path):
    rows = [{"step": n, "seconds": n % 5000 * 0.5, "loss": 1.0, "num_tokens": n * 10} for n in range(1, 9001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"seconds": n % 5 * 1.0, "anon": GIB} for n in range(10)]
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    run = read(tmp_path)
    assert POINTS / 2 < len(run.metrics) <= POINTS + 1 and run.metrics[-1]["step"] == 9000
    speeds = throughput([run])["data"][0]["y"]
    assert set(speeds) == {20.0} and len(speeds) == len(run.metrics) - 2
    seconds = timeline(run, None)["data"][0]["x"]
    assert seconds == sorted(seconds) and seconds[-1] == 8.0


def test_eval_leaves_its_results(ran):
    base, after = (json.loads((ran / "paca" / name).read_text()) for name in ("eval_base.json", "eval.json"))
    assert base["adapter"] is None and after["rows"] == 4 and base["test"] == ["facts.jsonl"]
    assert re.match(r".*paca$", after["adapter"]) and base["metrics"].keys() == after["metrics"].keys()
