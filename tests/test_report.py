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
from trimtab.planning.remembered import remember
from trimtab.recipe import Recipe
from trimtab.report.figures import HOWS, bars, curves, throughput, timeline, timelines
from trimtab.report.report import POINTS, Run, read, report

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
    """Two finished runs of two patches, both evaluated before and after; of one a plan was shown before."""
    folder = tmp_path_factory.mktemp("runs")
    set_cache = pytest.MonkeyPatch()
    set_cache.setenv("TRIMTAB_CACHE", str(folder / "cache"))
    world = make_world(folder)
    for name, patch in (("paca", {"paca": {"r": 4}}), ("lora", {"lora": {"r": 4}})):
        keys = tree(world, folder / name, patch, max_steps=5) | {"budget": {"fast": 8 * GIB}}
        keys["data"]["test"] = keys["data"]["train"]
        recipe = Recipe.from_dict(keys)
        if name == "paca":
            remember(recipe, recipe.plan())
        recipe.train()
        recipe.evaluate(base_only=True, limit=4)
        recipe.evaluate(limit=4)
    set_cache.undo()
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
    for words in ("paca (r: 4)", "4,096", "8.00 GiB", "run's own plan", "measured", "which country is", "before"):
        assert words in page.text, words


def test_bars_are_what_was_predicted_and_measured(ran):
    run = read(ran / "paca")
    traces = bars(run)["data"]
    assert [trace["name"] for trace in traces] == list(HOWS.values()), "the plan shown before is beside them"
    for how, trace in zip(HOWS, traces, strict=True):
        held = run.run[how]["bytes"]
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


def test_the_loss_has_a_switch_to_a_log_scale(ran):
    written = report([ran / "paca", ran / "lora"])
    page = Page(written)
    buttons = re.findall(r'<button type="button" data-figure="(\w+)" aria-pressed="false">(.*?)</button>',
                         written.read_text(encoding="utf-8"))  # fmt: skip
    assert ("figure0", "log scale") in buttons
    figure = page.json("figures")["figure0"]
    losses = [y for trace in figure["data"] for y in trace["y"]]
    switched = figure["switch"]["yaxis"]
    low, high = (10**end for end in switched["range"])
    assert switched["type"] == "log" and low < min(losses) and max(losses) < high
    assert len(switched["tickvals"]) >= 3 and all(low <= tick <= high for tick in switched["tickvals"])
    assert figure["layout"]["yaxis"].get("type") is None, "linear at first"


@pytest.mark.parametrize("losses,ticks", [
    ([5.0, 0.05], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"]), ([1e4, 1e-2], ["0.01", "0.1", "1", "10"]),
    ([4.2, 2.9], ["3", "3.5", "4"]), ([0.0, 0.0], None), ([2.0, 0.0], []),
])  # fmt: skip
def test_ticks_of_the_log_scale_are_whole_values(losses, ticks):
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    figure = curves([Run("a", metrics=rows)], "loss", "loss")
    if ticks is None:
        assert "switch" not in figure, "no loss is above zero"
    else:
        assert figure["switch"]["yaxis"].get("ticktext", [])[: len(ticks)] == ticks


def _held(name: str, process: float, steps: list[float]) -> Run:
    rows = [{"seconds": n, "anon": process * GIB} for n in range(2)]
    rows += [{"seconds": n, "anon": (process + step) * GIB, "parts": {"process": process * GIB, "weights": 0}}
             for n, step in enumerate(steps, 2)]  # fmt: skip
    return Run(name, memory=rows)


def test_runs_side_by_side_have_equal_axes(ran):
    first, second = timelines([_held("a", 0.4, [0.1, 0.3]), _held("b", 0.5, [0.2] * 9)], [1.0 * GIB, None])
    for axis in ("xaxis", "yaxis"):
        assert first["layout"][axis]["range"] == second["layout"][axis]["range"]
    assert first["layout"]["xaxis"]["range"] == [0, 10]
    assert first["layout"]["yaxis"]["range"][1] > 1.0, "the budget of one is within both"
    runs = [read(ran / name) for name in ("paca", "lora")]
    one, two = (bars(run, runs) for run in runs)
    assert one["layout"]["xaxis"]["range"] == two["layout"]["xaxis"]["range"]
    assert [trace["y"] for trace in one["data"]][0] == [trace["y"] for trace in two["data"]][0], "the same kinds"
    most = max(x for figure in (one, two) for trace in figure["data"] for x in trace["x"])
    assert one["layout"]["xaxis"]["range"][1] >= most


def test_what_the_process_held_before_is_a_thin_band():
    (figure,) = timelines([_held("a", 0.4, [0.0, 0.2, 0.5])], [1.25 * GIB])
    low, high = figure["layout"]["yaxis"]["range"]
    assert 0 < (0.4 - low) / (high - low) < 0.1 and high > 1.25
    assert figure["switch"]["yaxis"]["range"] == [0, pytest.approx(1.4)]
    (figure,) = timelines([_held("a", 0.1, [5.0])], [None])
    assert figure["layout"]["yaxis"]["range"][0] == 0 and "switch" not in figure, "it is thin already"
    (figure,) = timelines([Run("killed", memory=[{"seconds": 0, "anon": GIB}])], [None])
    assert figure["layout"]["yaxis"]["range"][0] == 0 and "switch" not in figure, "it is not known"
    assert timelines([Run("empty")], [None]) == [None]


def test_the_plan_that_was_shown_stands_beside_the_runs_own(ran, tmp_path, call, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    world = make_world(tmp_path)
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, max_steps=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(keys))
    code, out, _ = call("plan", recipe, "--json")
    planned = json.loads(out)
    assert code == 0 and call("train", recipe, "--quiet")[0] == 0
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["shown"]["fast_peak_bytes"] == planned["fast_peak_bytes"]
    batch = found["shown"]["batch"]
    assert batch == planned["batch"]
    found["predicted"]["batch"] = batch
    (tmp_path / "run" / "run.json").write_text(json.dumps(found))
    text = Page(report([tmp_path / "run"])).text
    assert "plan shown before" in text and f"Both plans are for batches of 2 x {batch['tokens']} tokens" in text
    found["predicted"]["batch"] = {"rows": 2, "tokens": 7}
    (tmp_path / "run" / "run.json").write_text(json.dumps(found))
    text = Page(report([tmp_path / "run"])).text
    assert f"for batches of 2 x {batch['tokens']} tokens; the run planned for batches of 2 x 7 tokens" in text
    assert call("train", recipe, f"output={tmp_path / 'other'}", "--quiet")[0] == 0
    other = json.loads((tmp_path / "other" / "run.json").read_text())
    assert other["shown"] == {}, "it was another run's plan"
    text = Page(report([tmp_path / "other"])).text
    assert "plan shown before" not in text and "no plan of this recipe was shown before the run" in text


def test_on_a_narrow_screen_a_row_of_a_wide_table_is_stacked(ran):
    html = report([ran / "paca", ran / "lora"]).read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width' in html
    tables = re.findall(r"<table(.*?)>(.*?)</table>", html, re.DOTALL)
    assert tables
    for kind, inner in tables:
        cells = re.findall(r"<td(.*?)>", inner)
        if inner.count("</th>", 0, inner.index("</thead>")) > 2:
            assert "stack" in kind and all('data-label="' in cell for cell in cells)
        else:
            assert "stack" not in kind


def test_a_killed_run_and_damaged_files(ran, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("metrics.jsonl", "memory.jsonl", "recipe.yaml"):
        (folder / name).write_bytes((ran / "paca" / name).read_bytes())
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[: whole.rindex(b'"loss"')] + b"\xff\xfe")
    page = Page(report([folder]))
    assert "the run did not finish" in page.text and "1 line of metrics.jsonl could not be read" in page.text
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
