"""Recipe <-> YAML: model + data + place + patches + objective + stepper + training arguments.

`Recipe.load("recipe.yaml", ["training.max_steps=20"])` reads a file and overrides; `Recipe(...)` takes the same keys
from Python. Every key is checked against the dataclasses below (and a patch's against the patch's own), and an unknown
one is answered with the nearest name. Reading a recipe loads no torch unless it names a patch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from . import methods
from .data.spec import DataSpec
from .errors import BadInput, nearest
from .model.spec import ModelSpec
from .yaml_text import LONGEST, read_yaml

if TYPE_CHECKING:
    from .contracts import Objective, Patch, Place, Stepper


@dataclass(frozen=True)
class PlaceSpec:
    """Where things are kept: `fast` (auto, cpu, cuda), `slow` (auto, ram, disk), `folder` for the slow tier's files."""

    fast: str = "auto"
    slow: Literal["auto", "ram", "disk"] = "auto"
    folder: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """How steps are computed; none of it changes what is computed beyond rounding."""

    recompute: Literal["auto", "none", "ffn"] = "auto"  # gated FFNs again in backward; auto: on a 4/8-bit base
    lean: bool | list[Literal["norm", "ffn", "attention", "experts"]] = (
        True  # leaner forms of these parts; or only some
    )
    compile: bool = False  # torch.compile each block
    prefetch: bool = True  # read a mapped base too large for memory ahead, by blocks; not with compile
    stop_if_diverged: bool = True  # end a run whose loss is not finite, or far above a uniform guess's
    allocator: Literal["auto", "none", "mimalloc", "jemalloc", "tcmalloc"] = "auto"  # a malloc that gives memory back


# What `training:` may hold besides the fields of TRL's SFTConfig or transformers' TrainingArguments: nothing.
# These are our defaults where theirs would surprise on a small machine.
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_length": 512,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "activation_checkpointing": False,
    "seed": 0,
}

# transformers 5.23 renamed these; the old names are still what most people write
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@dataclass(frozen=True)
class Recipe:
    """One run, whole. Each field is a key of the YAML file; only `model`, `data` and one patch are needed to train."""

    model: ModelSpec = field(default_factory=lambda: ModelSpec("smollm2-135m"))
    data: DataSpec = field(default_factory=DataSpec)
    patches: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    objective: str | dict[str, dict[str, Any]] = "causal_lm"
    stepper: str | dict[str, dict[str, Any]] = "backprop"
    training: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, str | int] | None = None
    place: PlaceSpec = field(default_factory=PlaceSpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    output: str = "runs/run"
    resume: bool = False  # go on from the newest checkpoint in `output`
    overwrite: bool = False  # replace the run that `output` holds

    def __post_init__(self):
        # From Python the same short forms as in YAML are taken: a model's name, a data dict, ready patch objects.
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("model", _as(ModelSpec, self.model, "model", short="name"))
        put("data", _as(DataSpec, self.data, "data", short="train"))
        put("place", _as(PlaceSpec, self.place, "place", short="fast"))
        put("engine", _as(EngineSpec, self.engine, "engine"))
        put("patches", [_patch_entry(entry) for entry in self.patches])
        put("output", str(self.output))
        data = [
            name for of in (self.data.train, self.data.test) for name in ([of] if isinstance(of, str) else of or [])
        ]
        for where, name in (("model", self.model.name), *(("data", name) for name in data), ("output", self.output),
                            ("place: folder", self.place.folder or "")):  # fmt: skip
            if not _nameable(name):
                raise BadInput(f"{where}: {name!r}", "no file can have such a name", "Check the value")

    # --- reading and writing -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a YAML file, or the one in a run's folder; `overrides` are "key=value" ("training.max_steps=20").

        Data files are looked for beside the recipe first, then in the working folder.
        """
        path = Path(path)
        if (path / "recipe.yaml").is_file():
            path = path / "recipe.yaml"
        tree = _read_yaml(path)
        for text in overrides:
            override(tree, text)
        data = tree.get("data")
        if isinstance(data, str):
            tree["data"] = data = {"train": data}
        if isinstance(data, dict):
            for split in ("train", "test", "chat_template"):
                value = data.get(split)
                names = [value] if isinstance(value, str) else value
                if not isinstance(names, list) or not all(isinstance(name, str) and _nameable(name) for name in names):
                    continue  # refused with the data's other keys
                beside = [path.parent / name for name in names]
                if beside and value != "chatml" and all(p.exists() for p in beside):
                    data[split] = str(beside[0]) if isinstance(value, str) else [str(p) for p in beside]
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Recipe:
        return build(cls, tree, "recipe")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """A name for what is computed: equal recipes, equal hash (where it writes and how it resumes do not count)."""
        tree = {k: v for k, v in self.to_dict().items() if k not in ("output", "resume", "overwrite")}
        return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]

    # --- what it names -------------------------------------------------------------------------------------------

    def load_patches(self) -> list[Patch]:
        """The patches as objects, in order; checks each one's keys and that they compose."""
        patches = []
        for entry in self.patches:
            ((name, values),) = entry.items()
            patches.append(build(methods.find(name), values, f"patches: {name}"))
        for patch in patches:
            alike = [p for p in patches if p.when is patch.when]
            if patch.exclusive_reason and len(alike) > 1:
                others = ", ".join(methods.name_of(p) for p in alike if p is not patch)
                asked = f"{methods.name_of(patch)} with {others}"
                raise BadInput(asked, patch.exclusive_reason, "Take one of them out")
        return patches

    @property
    def trains(self) -> bool:
        """Whether one of its patches is trained."""
        names = {name for entry in self.patches for name in entry}
        return any(methods.TABLE[name].when == "train" for name in names & methods.TABLE.keys())

    def load_objective(self) -> Objective:
        return self._one(self.objective, "objective")

    def load_stepper(self) -> Stepper:
        return self._one(self.stepper, "stepper")

    def load_place(self) -> Place:
        from .contracts import Place

        return Place(**dataclasses.asdict(self.place))

    def training_values(self) -> dict[str, Any]:
        """`training:` over the methods' defaults over ours; of several patches the smallest learning rate counts."""
        for old, new in RENAMED.items():
            if old in self.training and new in self.training:
                raise BadInput(f'training: "{old}" and "{new}"', "they are two names of one field", f"Keep {new}")
        given = {RENAMED.get(key, key): value for key, value in self.training.items()}
        wanted: dict[str, Any] = {**self._class(self.objective, "objective").defaults}
        for of_patch in (methods.find(next(iter(entry))).defaults for entry in self.patches):
            rate = min(of_patch.get("learning_rate", math.inf), wanted.get("learning_rate", math.inf))
            wanted |= of_patch | ({"learning_rate": rate} if rate < math.inf else {})
        return {**TRAINING_DEFAULTS, **wanted, **given}

    # --- doing ---------------------------------------------------------------------------------------------------

    def plan(self, **options: Any) -> Any:
        """What it will hold in memory (`trimtab.plan.plan`)."""
        return self._verb("planning.plan")(self, **options)

    def train(self, **options: Any) -> dict[str, Any]:
        """Run it; returns what run.json holds (`trimtab.training.train`)."""
        return self._verb("training.train")(self, **options)

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """Measure it on data.test (`trimtab.inference.evaluate`)."""
        return self._verb("inference.evaluate")(self, **options)

    @staticmethod
    def _verb(name: str) -> Any:
        # A door for Python users to the floor above; the recipe itself knows none of the verbs.
        return getattr(import_module(f"{__package__}.{name}"), name.split(".")[-1])

    @staticmethod
    def _class(value: str | dict[str, dict[str, Any]], kind: str) -> Any:
        return methods.find(value if isinstance(value, str) else next(iter(value), ""), kind)

    @staticmethod
    def _one(value: str | dict[str, dict[str, Any]], kind: str) -> Any:
        if isinstance(value, dict) and len(value) != 1:
            raise BadInput(f"{kind}: {value!r}", f"one {kind} is wanted", f'Write "{kind}: NAME"')
        name, values = (value, {}) if isinstance(value, str) else next(iter(value.items()))
        return build(methods.find(name, kind), values or {}, f"{kind}: {name}")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        have = f"there is no such file; the folder has {', '.join(there[:8])}" if there else "there is no such file"
        raise BadInput(f"recipe {path}", have, "Check the path")
    try:
        if path.stat().st_size > 4 * LONGEST:
            raise BadInput(f"recipe {path}", f"it has {path.stat().st_size:,} bytes", "Keep data in files of their own")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {path}", f"it cannot be read ({error})", "Write it as YAML, in UTF-8") from None
    tree = read_yaml(text, f"recipe {path}")
    if not isinstance(tree, dict):
        raise BadInput(f"recipe {path}", "it holds no keys", 'Start with "model:", "data:" and "patches:"')
    return tree


def override(tree: dict[str, Any], order: str) -> None:
    """Put one "key=value" into a tree of a recipe, the value read as YAML."""
    key, sign, text = order.partition("=")
    if not sign or not key:
        raise BadInput(f'"{order}"', "it is not of the form key=value", 'Write, say, "training.max_steps=20"')
    *parents, last = key.split(".")
    node: Any = tree
    for block, short in (("model", "name"), ("data", "train"), ("place", "fast")):
        if parents == [block] and isinstance(tree.get(block), str | list):
            tree[block] = {short: tree[block]}
    for parent in parents:
        if isinstance(node, list):  # patches.paca.r
            entry = next((i for i, e in enumerate(node) if e == parent or isinstance(e, dict) and parent in e), None)
            if entry is None:
                raise BadInput(f'"{order}"', f"the recipe has no patch {parent}", "Name one that it has")
            if not isinstance(node[entry], dict) or node[entry][parent] is None:
                node[entry] = {parent: {}}
            node = node[entry][parent]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise BadInput(f'"{order}"', f"{parent} holds a value, not keys", "Check the key")
    try:
        value = read_yaml(text, order)
        value = float(text) if isinstance(value, str) and _is_float(text) else value  # YAML 1.1 reads 1e-4 as text
    except BadInput:  # it is no YAML: text
        value = text
    if isinstance(node, list):
        raise BadInput(
            f'"{order}"', f"{key.rpartition('.')[0]} holds a list", "Name a field of a patch: patches.paca.r=8"
        )
    node[last] = value


def _nameable(name: str) -> bool:
    """Whether a file system may know `name`: others raise errors of their own where they are looked for."""
    return "\0" not in name and len(name) < 4096 and all(len(part.encode()) < 256 for part in name.split("/"))


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as(cls: type, value: Any, where: str, short: str | None = None) -> Any:
    if isinstance(value, cls):
        return value
    if short and isinstance(value, str | list | Path):
        value = {short: value}
    if isinstance(value, dict):
        value = {k: str(v) if isinstance(v, Path) else v for k, v in value.items()}
    return build(cls, {} if value is None else value, where)


def build(cls: type, values: Any, where: str) -> Any:
    """`cls(**values)` with every key and type checked; errors name the key and the nearest known one."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise BadInput(f"{where}: {values!r}", "this place holds keys", "Write key: value lines under it")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise BadInput(f'{where}: "{key}"', "there is no such key", nearest(str(key), fields))
    numbers: dict[str, Any] = dict(values)
    for key, value in values.items():  # YAML 1.1 reads 1e-4 as text
        if isinstance(value, str) and "float" in str(fields[key].type) and _is_float(value):
            numbers[key] = float(value)
    if cls is Recipe:  # its nested parts are built one by one in __post_init__, each with its own errors
        for key, (kind, wanted) in KINDS.items():
            if key in numbers and not isinstance(numbers[key], kind):
                raise BadInput(f"recipe: {key}: {numbers[key]!r}", f"{wanted} is wanted there", "Check the indentation")
        return cls(**numbers)
    try:
        return TypeAdapter(cls).validate_python(numbers)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or where
        raise BadInput(
            f"{where}: {place}: {first['input']!r}", first["msg"].lower(), "Give a value of that kind"
        ) from None


KINDS: dict[str, tuple[Any, str]] = {
    "training": (dict, "a block of keys"), "patches": (list, "a list"), "output": (str, "a folder's name"),
    "objective": (str | dict, "a name"), "stepper": (str | dict, "a name"), "budget": (dict | None, "a block of keys"),
    "resume": (bool, "true or false"), "overwrite": (bool, "true or false"),
}  # fmt: skip


def _patch_entry(entry: Any) -> dict[str, dict[str, Any]]:
    """One item of `patches:` as {name: {fields}}; takes "paca", {"paca": {...}}, {"paca": None} or a Patch object."""
    if dataclasses.is_dataclass(entry) and not isinstance(entry, type):
        return {methods.name_of(entry): dataclasses.asdict(entry)}
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise BadInput(f"patches: {entry!r}", "each item names one patch", 'Write "- paca: {r: 8}"')
    ((name, values),) = entry.items()
    if name not in methods.names("patch"):
        raise BadInput(f'patch "{name}"', "there is no such patch", nearest(str(name), methods.names("patch")))
    if not isinstance(values, dict | None):
        raise BadInput(f"patches: {name}: {values!r}", "a patch holds keys", f'Write "- {name}: {{key: value}}"')
    return {name: dict(values or {})}
