"""Documents say what the code says: generated parts are fresh, examples run, links lead somewhere."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement

from conftest import MIXTURES, MODELS
from tiny import tiny_folder
from trimtab import Recipe, cli, methods
from trimtab.artifacts.run_folder import PARTS
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.inference.export import FORMS
from trimtab.recipe import override

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]
)


def _build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("path,text", build.build().items(), ids=lambda item: getattr(item, "name", ""))
def test_generated_parts_are_fresh(path, text):
    """README's table of methods and demo, docs/results.md, the keys: `python docs/build.py` was run."""
    assert path.read_text(encoding="utf-8") == text, "run: python docs/build.py"


def test_every_patch_has_its_row_and_page():
    readme = (ROOT / "README.md").read_text()
    assert build.method_table("docs/methods/") in readme
    for name in methods.names("patch"):
        page = (ROOT / f"docs/methods/{name}.md").read_text()
        assert all(f"## {part}" in page for part in ("The idea", "When to use it", "Recipe", "Memory", "Portability"))
        assert methods.TABLE[name].paper in page


@pytest.mark.parametrize("name", methods.names("patch"))
def test_exports_are_those_of_the_table(name):
    assert set(methods.TABLE[name].exports) <= set(FORMS)
    for form, verb in (("merged", "merge"), ("peft", "portable")):
        patch = methods.find(name)()
        model = MIXTURES["mixtral"]() if patch.reads_experts else MODELS["llama"]()
        surgery = patch.apply(model, Place(fast="cpu"))
        if form in methods.TABLE[name].exports:
            getattr(surgery, verb)()
        else:
            with pytest.raises(BadInput):
                getattr(surgery, verb)()


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pages
def test_recipes_in_pages_are_recipes(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        recipe = Recipe.from_dict(yaml.safe_load(block))
        recipe.load_patches(), recipe.load_objective()


@pages
def test_commands_in_pages_exist(page):
    """Each `trimtab VERB ...` of a shell block is parsed by the command line, and not run; so is each override."""
    command = typer.main.get_command(cli.app)
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "trimtab" or "--help" in words:
                continue
            words = words[1 : words.index(">")] if ">" in words else words[1:]
            at, context = command, None
            while getattr(at, "commands", None):
                at, words = at.commands[words[0]], words[1:]
            with at.make_context(at.name, words, parent=context) as context:
                for order in context.params.get("overrides") or ():
                    override({}, order)


@pytest.mark.parametrize("name", ["README.md", "docs/python.md", "docs/integrations.md"])
def test_python_in_pages_runs(name, tmp_path, monkeypatch, capsys):
    """As it stands, but for a tiny model and two steps."""
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder(tmp_path / "tiny")
    row = json.dumps({"question": "which country is the city in ?", "answer": "the country of a name"}) + "\n"
    for file in ("facts.jsonl.gz", "facts_test.jsonl.gz"):
        (tmp_path / file).write_bytes(gzip.compress(row.encode() * 8))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    capsys.readouterr()
    for block in blocks:
        code = re.sub(r'"max_steps": \d+', '"max_steps": 2', block.replace("smollm2-135m", folder))
        space: dict = {}
        exec(compile(ast.parse(code), name, "exec"), space)
        if "merge()" in block:
            base, ours = MODELS["llama"]().to(torch.bfloat16).state_dict(), space["model"].state_dict()
            assert list(base) == list(ours)
            assert any(not torch.equal(base[key], ours[key]) for key in base), "the columns were merged"
    said = re.sub(r"[^\r\n]*it/s\]", "", capsys.readouterr().err)  # bars of from_pretrained, which a page calls itself
    assert not said.strip()


# --- results ---------------------------------------------------------------------------------------------------------

RESULT = {
    "name": "sft_speed", "title": "Speed", "claim": "Ours against the peer.", "date": "2026-01-01",
    "machine": {"cpu": "A processor", "threads": 2, "memory_bytes": 8 * 2**30}, "versions": {"torch": "2.13.0"},
    "summary": {"speed_ratio": 1.5, "memory_ratio": 0.5, "rows": 2000},
    "targets": {"speed_ratio": [">=", 1.6], "memory_ratio": ["<=", 0.5]},
    "rows": [{"side": "ours", "tokens_per_second": 1234.5}, {"side": "peer", "tokens_per_second": 823, "note": "a|b"}],
    "notes": ["One run only."],
}  # fmt: skip


def test_results_show_what_was_met_and_missed(tmp_path):
    path = tmp_path / "sft_speed.json"
    path.write_text(json.dumps(RESULT))
    page = build.results([path])
    assert "| `speed_ratio` | 1.5 | >= 1.6 | **missed** |" in page
    assert "| `memory_ratio` | 0.5 | <= 0.5 | met |" in page
    assert "| `rows` | 2,000 |  |  |" in page
    assert "| side | tokens_per_second | note |" in page and "a\\|b" in page and "- One run only." in page
    assert "A processor, 2 threads, 8 GiB; torch 2.13.0." in page


@pytest.mark.parametrize("change", [{"summary": None}, {"targets": {"other": [">=", 1]}}])
def test_a_faulty_result_is_refused(tmp_path, change):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({k: v for k, v in (RESULT | change).items() if v is not None}))
    with pytest.raises(SystemExit, match="bad.json"):
        build.results([path])


def _recorded(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def _cells(table: str, row: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_strictest_figures_come_first():
    """README's figures are those of the result files, TRL's with activation checkpointing before those without."""
    readme = (ROOT / "README.md").read_text()
    speed = _recorded("sft_speed")
    held = {row["side"]: float(row["growth of anonymous memory, GiB"].split()[0]) for row in speed["rows"]
            if row["side"].startswith(("TRL", "PaCA r 8", "LoRA r 8"))}  # fmt: skip
    strict, plain = held["TRL + PEFT LoRA r 8, checkpointing"], held["TRL + PEFT LoRA r 8"]
    for ours in ("PaCA r 8", "LoRA r 8"):
        first, second = (_cells(readme, f"{ours} | {how} activation checkpointing") for how in ("with", "without"))
        assert float(first[3].split()[0]) == pytest.approx(held[ours] / strict, abs=0.01)
        assert float(second[3].split()[0]) == pytest.approx(held[ours] / plain, abs=0.01)
        assert readme.index("| with activation") < readme.index("| without activation")
        assert float(first[3].split()[0]) > float(second[3].split()[0])


def test_figures_have_their_conditions_and_intervals():
    readme, facts = (ROOT / "README.md").read_text(), _recorded("knowledge")["summary"]
    best = _cells(readme, "the better of LoRA and PaCA")
    assert best[1] == f"{facts['facts_meft_to_lora']:.2f} x" and best[2].startswith(
        f"{facts['facts_meft_to_lora_low']:.2f} to "
    )
    for words in ("equal fast memory", "262,144 parameters", "4 MiB of slow memory", "14,720", "40 times", "80 or 320"):
        assert words in best[3], words
    many = _cells(readme, "4,000 cities, with more pairs per token")
    low, high = map(float, many[2].split(" to "))
    assert low < 0 < high and many[3] == "no difference shown"
    assert (low + high) / 2 == pytest.approx(facts["real_4000_meft_minus_best_points"], abs=0.06)
    shifted = facts | {"real_meft_minus_best_points_low": 0.1}
    assert _cells(build.real_facts(shifted), "1,000 cities")[3] == "a difference"


def test_a_result_with_paired_ratios_is_shown_by_them():
    found = _recorded("sft_speed")
    found["summary"] |= {"paca_memory_ratio_checkpointing": 0.45, "paca_speed_ratio_checkpointing": 1.5}
    assert _cells(build.against_trl(found), "PaCA r 8 | with activation checkpointing")[2:] == ["1.50 x", "0.45 x"]


def test_the_peer_gets_its_best_setting(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from sft_speed import ANON, CHECKPOINTING, ONCE, PLAIN, SPEED, checkpointing_wins, sides

    plain = [{ANON: 2.0, SPEED: 200.0}] * 3
    assert checkpointing_wins(plain, [{ANON: 1.2, SPEED: 201.0}] * 3)
    assert not checkpointing_wins(plain, [{ANON: 1.2, SPEED: 150.0}] * 3), "it is slower"
    assert not checkpointing_wins(plain, [{ANON: 2.1, SPEED: 210.0}] * 3), "it uses more"
    made = sides("text", 5)
    assert {PLAIN, CHECKPOINTING} <= set(list(made)[:ONCE]), "both run in each round"
    assert made[CHECKPOINTING][0]["checkpointing"] and "checkpointing" not in made[PLAIN][0]
    assert (build.PLAIN, build.CHECKPOINTING) == (PLAIN, CHECKPOINTING)


def test_a_result_of_speed_has_both_settings_of_the_peer(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sft_speed

    def run(job: dict, malloc: str) -> dict:
        memory = 1.2 if job.get("checkpointing") else 2.0 if job["side"] == "peer" else 0.4
        tokens = 210.0 if job.get("checkpointing") else 200.0 if job["side"] == "peer" else 420.0
        return {sft_speed.ANON: memory * sft_speed.GIB, sft_speed.RSS: sft_speed.GIB, sft_speed.SPEED: tokens}

    monkeypatch.setattr(sft_speed, "run", run)
    monkeypatch.setattr(sft_speed, "city_text", lambda path: None)
    monkeypatch.setattr("sys.argv", ["sft_speed.py", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    sft_speed.main()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["summary"]["paca_memory_ratio_checkpointing"] == pytest.approx(1 / 3)
    assert found["summary"]["paca_memory_ratio"] == pytest.approx(0.2)
    assert found["summary"]["lora_speed_ratio_checkpointing"] == pytest.approx(2.0)
    assert found["targets"].keys() <= found["summary"].keys()
    assert [row["side"] for row in found["rows"] if "peer's setting" in row] == [sft_speed.CHECKPOINTING]
    shown = build.against_trl(found)
    assert _cells(shown, "PaCA r 8 | with activation checkpointing")[2:] == ["2.00 x", "0.33 x"]
    assert "reaches 210 tokens/s with checkpointing (runs: 2) and 200 without (runs: 2)" in shown
    assert build.results([tmp_path / "speed.json"])


def test_libraries_have_upper_bounds_that_hold_what_is_pinned():
    """trimtab reaches into these; a new release must not come in untested."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {need.name: need.specifier for need in map(Requirement, needs)}
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"):
        assert any(one.operator == "<" for one in wanted[name]), name
    for name, version in pinned.items():
        assert name not in wanted or wanted[name].contains(version), name
    assert wanted["transformers"].contains("5.24.0") and not wanted["transformers"].contains("5.25.0")


def test_without_results_the_page_says_so():
    assert "No results have been recorded yet." in build.results([])


def test_what_a_run_s_folder_may_hold_is_documented():
    page = (ROOT / "docs/cli.md").read_text()
    for name in (*PARTS, "eval_base.json", "can be given several times"):
        assert name in page, name
