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
from dataclasses import field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from . import methods
from .data.spec import DataSpec
from .data.stage import AnchorSpec, RehearsalSpec, StageSpec
from .errors import BadInput, nearest
from .memory.place import Place
from .model.spec import ModelSpec
from .validation import LONGEST, Block, FileName, build, read_yaml, require_text_keys, write_yaml

if TYPE_CHECKING:
    from .contracts import Objective, Patch, Stepper


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


Part = str | dict[str, dict[str, Any] | None]  # an objective or a stepper: "name" or {"name": {fields}}


@dataclass(frozen=True)
class EngineSpec(Block):
    """How steps are computed. None of these changes the results beyond rounding."""

    recompute: Literal["auto", "none", "ffn"] = "auto"  # recompute gated FFNs in backward; auto: on a 4/8-bit base
    fused_ops: bool | list[Literal["norm", "ffn", "attention", "experts"]] = True  # memory-saving forms of all or some
    compile: bool = False  # torch.compile each block
    prefetch: bool = True  # prefetch a mapped base, by blocks, if it is too large for memory; not with compile
    stop_if_diverged: bool = True  # end a run if its loss is not finite, or far above that of a uniform guess
    allocator: Literal["auto", "none", "mimalloc", "jemalloc", "tcmalloc"] = "auto"  # a malloc that returns memory


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
class Recipe(Block):
    """One run, whole. Each field is a key of the YAML file; only `model`, `data` and one patch are needed to train."""

    model: ModelSpec = field(default_factory=lambda: ModelSpec("smollm2-135m"))
    data: DataSpec = field(default_factory=DataSpec)
    patches: list[Annotated[dict[str, dict[str, Any]], BeforeValidator(_patch_entry)]] = field(default_factory=list)
    objective: Part = "causal_lm"
    stepper: Part = "backprop"
    training: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
    place: Place = field(default_factory=Place)
    engine: EngineSpec = field(default_factory=EngineSpec)
    stages: list[StageSpec] = field(default_factory=list)
    rehearsal: RehearsalSpec | None = None
    anchor: AnchorSpec | None = None
    neutral: FileName | None = None  # rows of text whose perplexity is measured after each stage
    output: FileName = "runs/run"
    resume: bool = False  # go on from the newest checkpoint in `output`
    overwrite: bool = False  # replace the run that `output` holds

    # --- reading and writing -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = (), final: bool = False) -> Recipe:
        """Read a YAML file, or the one in a run's folder; `overrides` are "key=value" ("training.max_steps=20").

        Data files are looked for beside the recipe first, then in the working folder. `final`: the recipe of the last
        stage, if there are several, which `overrides` then change.
        """
        path, run = Path(path), None
        if (path / "recipe.yaml").is_file():
            path, run = path / "recipe.yaml", path
        tree = _read_yaml(path)
        if run is not None:  # a copied or moved run is its own
            tree["output"] = str(run)
        if final and tree.get("stages"):
            tree = cls.from_dict(tree).final.to_dict()
        for text in overrides:
            override(tree, text)
        recipe = cls.from_dict(tree)
        patches = [_beside(entry, path.parent) for entry in recipe.patches]
        stages = [_stage_beside(stage, path.parent) for stage in recipe.stages]
        neutral = recipe.neutral and DataSpec(test=recipe.neutral).beside(path.parent).test
        return dataclasses.replace(
            recipe, data=recipe.data.beside(path.parent), patches=patches, stages=stages, neutral=neutral
        )

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Recipe:
        require_text_keys(tree, cls.key())
        return build(cls, tree, cls.key())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return write_yaml(self.to_dict())

    @property
    def hash(self) -> str:
        """A name for what is computed: equal recipes, equal hash (where it writes and how it resumes do not count)."""
        tree = {k: v for k, v in self.to_dict().items() if k not in ("output", "resume", "overwrite")}
        for key in ("stages", "rehearsal", "anchor", "neutral"):  # as if a recipe without them had no such key
            if not tree[key]:
                del tree[key]
        tree["training"] = {k: v for k, v in self.training.items() if k != "max_minutes"}  # when it stops, not what
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
        whole = next((p for p in patches if p.trains_base), None)
        if whole is not None and any(p.reads_experts for p in patches):
            have = "experts in slow memory are frozen"
            raise BadInput(f"{methods.name_of(whole)} of a model without its experts", have, "Train lora or paca")
        return patches

    @property
    def with_experts(self) -> bool:
        """Whether a model is loaded with its experts: not if a patch reads them from the checkpoint."""
        return not any(methods.find(name).reads_experts for entry in self.patches for name in entry)

    @property
    def trains(self) -> bool:
        """Whether one of its patches is trained."""
        names = {name for entry in self.patches for name in entry}
        return any(methods.TABLE[name].when == "train" for name in names & methods.TABLE.keys())

    def load_objective(self) -> Objective:
        return self._one(self.objective, "objective")

    def load_stepper(self) -> Stepper:
        return self._one(self.stepper, "stepper")

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
        wanted |= self._class(self.stepper, "stepper").defaults
        return {**TRAINING_DEFAULTS, **wanted, **given}

    def data_files(self) -> tuple[list[str], list[str]]:
        """-> the files of `data.train` and of `data.test`, of all stages, each once."""
        specs = [stage.data for stage in self.stage_recipes()] or [self.data]
        train = [name for s in specs for name in ([s.train] if isinstance(s.train, str) else s.train or ())]
        return list(dict.fromkeys(train)), list(dict.fromkeys(s.test for s in specs if s.test))

    def stage_recipes(self) -> list[Recipe]:
        """One recipe per stage: its data and training over the recipe's own, its output in a folder of this one's.

        `max_minutes` of the recipe limits the whole run, and is left out of them.
        """
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"stages: {twice[0]}", "two stages have this name", "Give each stage a name of its own")
        whole = {key: value for key, value in self.training.items() if key != "max_minutes"}
        made = []
        for number, stage in enumerate(self.stages, 1):
            data = build(DataSpec, {**dataclasses.asdict(self.data), **stage.data}, f"stages: {stage.name}: data")
            made.append(dataclasses.replace(
                self, data=data, objective=self._objective_of(number), training={**whole, **stage.training},
                stages=[], rehearsal=None, neutral=None,
                anchor=self.anchor_between(number - 1) or self.anchor_between(number),
                output=str(Path(self.output) / "stages" / f"{number}-{stage.name}"),
            ))  # fmt: skip
        return made

    def _objective_of(self, number: int) -> Part:
        """The objective of a stage: from the second on, a language model's may learn kept probabilities."""
        if number == 1 or self.rehearsal is None or not self.rehearsal.kept_tops:
            return self.objective
        name, values = (self.objective, {}) if isinstance(self.objective, str) else next(iter(self.objective.items()))
        return {name: {**(values or {}), "soft": self.rehearsal.kept_tops}} if name == "causal_lm" else self.objective

    def anchor_between(self, index: int) -> AnchorSpec | None:
        """What holds stage `index` near the stage before; None for the first, and for an index past the last."""
        if not 0 < index < len(self.stages) or not self.stages[index].follows:
            return None
        return self.stages[index].anchor or self.anchor

    @property
    def final(self) -> Recipe:
        """The recipe whose model the run's folder has in the end: that of the last stage, or itself."""
        return dataclasses.replace(self.stage_recipes()[-1], output=self.output) if self.stages else self

    # --- doing ---------------------------------------------------------------------------------------------------

    def plan(self, **options: Any) -> Any:
        """Predict its memory and speed (`trimtab.planning.plan`)."""
        return self._verb("planning.inference", "plan_recipe")(self, **options)

    def train(self, **options: Any) -> dict[str, Any]:
        """Run it; returns the content of run.json (`trimtab.training.train`)."""
        return self._verb("training.train", "train")(self, **options)

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """Measure it on data.test (`trimtab.inference.evaluate`)."""
        return self._verb("inference.evaluate", "evaluate")(self.final, **options)

    @staticmethod
    def _verb(module: str, name: str) -> Any:
        # For Python users only: the verbs import this module, so it finds them when they are called.
        return getattr(import_module(f"{__package__}.{module}"), name)

    @staticmethod
    def _class(value: Part, kind: str) -> Any:
        return methods.find(value if isinstance(value, str) else next(iter(value), ""), kind)

    @staticmethod
    def _one(value: Part, kind: str) -> Any:
        if isinstance(value, dict) and len(value) != 1:
            raise BadInput(f"{kind}: {value!r}", f"one {kind} is wanted", f'Write "{kind}: NAME"')
        name, values = (value, {}) if isinstance(value, str) else next(iter(value.items()))
        return build(methods.find(name, kind), values, f"{kind}: {name}")


def _beside(entry: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The patch with its calibration file named by its path, if that is in `folder`."""
    ((name, values),) = entry.items()
    file = values.get("calibration")
    there = isinstance(file, str) and file and (folder / file).is_file()
    return {name: {**values, "calibration": str(folder / file)}} if there else entry  # type: ignore[operator]


def _stage_beside(stage: StageSpec, folder: Path) -> StageSpec:
    """The stage with files and an adapter that are in `folder` named by their paths."""
    named = build(DataSpec, stage.data, f"stages: {stage.name}: data").beside(folder)
    there = stage.adapter and (folder / stage.adapter).is_dir()
    adapter = str(folder / stage.adapter) if there else stage.adapter  # type: ignore[operator]
    return dataclasses.replace(stage, data={key: getattr(named, key) for key in stage.data}, adapter=adapter)


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
    for block in (ModelSpec, DataSpec, Place):
        if parents == [block.key()] and isinstance(tree.get(block.key()), str | list):
            tree[block.key()] = {block.short: tree[block.key()]}
    if len(parents) > 1 and parents[0] in ("objective", "stepper") and tree.get(parents[0]) == parents[1]:
        tree[parents[0]] = {parents[1]: {}}
    for parent in parents:
        if isinstance(node, list):  # patches.paca.r
            entry = next((i for i, e in enumerate(node) if e == parent or isinstance(e, dict) and parent in e), None)
            if entry is None and parent in methods.names("patch", "infer"):  # it may be added for a call of generate
                entry = len(node)
                node.append({parent: {}})
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
    except BadInput:  # it is no YAML: text
        value = text
    if isinstance(node, list):
        raise BadInput(
            f'"{order}"', f"{key.rpartition('.')[0]} holds a list", "Name a field of a patch: patches.paca.r=8"
        )
    node[last] = value
