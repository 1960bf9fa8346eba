"""Documents say what the code says: generated parts are fresh, examples run, links lead somewhere."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from conftest import MODELS
from tiny import tiny_folder
from trimtab import Recipe, methods
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.export import FORMS

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
        surgery = methods.find(name)().apply(MODELS["llama"](), Place(fast="cpu"))
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


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
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
    if name == "docs/python.md":
        base, ours = MODELS["llama"]().to(torch.bfloat16).state_dict(), space["model"].state_dict()
        assert list(base) == list(ours)
        assert any(not torch.equal(base[key], ours[key]) for key in base), "the columns were merged"
    assert capsys.readouterr().err == ""


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


def test_without_results_the_page_says_so():
    assert "No results have been recorded yet." in build.results([])
