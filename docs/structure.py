"""Who imports whom in src/trimtab, as floors and as a picture (docs/architecture.svg).

A package, or a file directly in src/trimtab, is one box. Boxes lie on floors; each imports only from its own floor and
from those below. tests/test_floors.py holds the code to this.
"""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1] / "src/trimtab"
FLOORS = (  # from the ground up; a module belongs to the first line that fits
    r"errors|foreign|files|quiet|validation|process(\..+)?",
    r"memory(\..+)?",
    r"tiered(\..+)?",
    r"(model|data)(\..+)?",
    r"cost(\..+)?",
    r"contracts",
    r"bases(\..+)?",
    r"methods(\..+)?",
    r"recipe|artifacts(\..+)?|integrations(\..+)?",
    r"engine(\..+)?",
    r"doctor|schema|(planning|training|inference|report)(\..+)?",
    r"serving(\..+)?",
    r"cli|__main__",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of trimtab that `name` imports, anywhere in it, also inside functions."""
    path = FILES[name]
    package = ["trimtab", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            below = {f"{source}.{alias.name}" for alias in node.names}
            found |= {path if path.removeprefix("trimtab.") in FILES else source for path in below}
    ours = {path.removeprefix("trimtab").removeprefix(".") for path in found if re.match(r"trimtab(\.|$)", path)}
    return (ours & FILES.keys()) - {name}


def floor(name: str) -> int:
    return next((rank for rank, pattern in enumerate(FLOORS) if re.fullmatch(pattern, name)), -1)


def boxes() -> dict[str, set[str]]:
    """Box -> the boxes that it imports."""
    found: dict[str, set[str]] = {name.split(".")[0]: set() for name in FILES if name}
    for name in filter(None, FILES):
        box = name.split(".")[0]
        found[box] |= {other.split(".")[0] for other in imports(name) if other} - {box}
    return found


def reduced(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The arrows that no longer way through other boxes says already."""

    def reaches(start: str, end: str, direct: bool = False) -> bool:
        return any(other == end and direct or other != end and reaches(other, end, True) for other in graph[start])

    return {(box, other) for box, others in graph.items() for other in others if not reaches(box, other)}


def picture() -> str:
    """The boxes on their floors, as SVG text; a box's number counts its files."""
    graph = boxes()
    ranks: dict[int, list[str]] = {}
    for box in graph:
        ranks.setdefault(max(floor(name) for name in FILES if name.split(".")[0] == box), []).append(box)
    with matplotlib.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 1.05 * len(ranks) + 0.4), layout="constrained")
        axes = figure.subplots()
        at: dict[str, tuple[float, float]] = {}
        for level, rank in enumerate(sorted(ranks)):
            row = sorted(ranks[rank])
            for place, box in enumerate(row):
                at[box] = ((place + 0.5) / len(row) * 10, float(level))
        for box, other in sorted(reduced(graph)):
            (x1, y1), (x2, y2) = at[box], at[other]
            style = {"arrowstyle": "-|>", "color": "#94a3b8", "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
            if y1 == y2:  # above the boxes between them
                style["connectionstyle"] = f"arc3,rad={-0.13 if x2 > x1 else 0.13}"
                axes.annotate("", (x2, y2 + 0.27), (x1, y1 + 0.27), arrowprops=style, zorder=1)
            else:
                axes.annotate("", (x2, y2 + 0.27), (x1, y1 - 0.27), arrowprops=style, zorder=1)
        for box, (x, y) in at.items():
            count = sum(name.split(".")[0] == box for name in FILES)
            room = count > 1 or box in ("bases",)
            face = "#e0f2fe" if room else "#f1f5f9"
            shape = FancyBboxPatch((x - 0.55, y - 0.2), 1.1, 0.4, boxstyle="round,pad=0.06", fc=face, ec="#334155")
            axes.add_patch(shape)
            shape.set_zorder(2)
            axes.text(x, y + 0.02, f"{box}/" if room else box, ha="center", va="center", fontsize=9, zorder=3)
            if room:
                axes.text(x, y - 0.2, f"{count} files", ha="center", va="center", fontsize=6, color="#475569", zorder=3)
        axes.set_xlim(0, 10)
        axes.set_ylim(-0.5, len(ranks) - 0.5)
        axes.axis("off")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.M)
