"""The house's floors: each module imports only from below, methods never know each other, nothing goes in a circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from structure import FILES, ROOT, floor, imports  # noqa: E402


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_go_down(name):
    assert floor(name) >= 0, f"{name} stands on no floor: give it one in FLOORS"
    for other in imports(name) - {""}:
        assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"
        assert not (family(name) and family(other) not in ("", family(name))), f"{name} imports {other}"


def family(name: str) -> str:
    """The method that a module of `methods` belongs to: a file, or a folder with all its files."""
    return name.split(".")[1] if name.startswith("methods.") else ""


def test_no_circle():
    TopologicalSorter({name: imports(name) - {""} for name in FILES if name}).prepare()


def test_few_files_stand_in_the_hall():
    assert len([name for name, path in FILES.items() if path.parent == ROOT]) <= 12


@pytest.mark.parametrize("name", FILES)
def test_files_stay_small(name):
    limit = 250 if name == "contracts" else 320 if re.fullmatch(r"methods\.\w+", name) else 400
    assert len(FILES[name].read_text().splitlines()) <= limit


@pytest.mark.parametrize("folder,pattern", [("tests", "test_*.py"), ("benchmarks", "*.py")])
def test_tests_and_benchmarks_import_helpers_not_each_other(folder, pattern):
    """What several of them use stands in modules of its own."""
    paths = sorted((Path(__file__).parents[1] / folder).glob(pattern))
    run = {path.stem for path in paths if folder == "tests" or "def main(" in path.read_text()}
    assert len(run) > 10
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not run & set(names), f"{path.name} imports {run & set(names)}"


def test_importing_trimtab_loads_no_torch():
    heavy = ("torch", "transformers", "peft", "trl", "datasets")
    code = f"import sys, trimtab, trimtab.methods; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
