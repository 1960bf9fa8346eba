"""Loads the model of a run: the recipe's base with the run's adapter and the recipe's patches for inference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts.adapter import Base, load_adapter, patches_of, read_meta
from ..artifacts.run_folder import checkpoints, place_of
from ..contracts import Patch, Surgery, When
from ..data.chat import use_template
from ..engine.arguments import training_arguments
from ..engine.inputs import calibration_batches, read_inputs
from ..engine.objectives import arguments_class
from ..engine.patching import apply_patches, revert
from ..errors import BadInput
from ..model.load import load_model
from ..recipe import Recipe


@dataclass
class Loaded:
    """A model for inference. `base`: that of the adapter, or of the recipe if there is none."""

    model: Any
    tokenizer: Any
    base: Base
    patches: list[Patch]  # those of `surgeries`
    folder: Path | None = None  # of the adapter that is loaded
    surgeries: list[Surgery] = field(default_factory=list)

    @property
    def labels(self) -> int | None:
        """Number of outputs of a classifier's head: 1 for regression; None for a language model."""
        return len(self.base.labels) or (1 if self.base.task == "classification" else None)


def load_run(
    recipe: Recipe, adapter_folder: str | Path | None = None, base_only: bool = False, generates: bool = True
) -> Loaded:
    """The recipe's model with the adapter of its run, or with that of `adapter_folder`.

    `base_only`: without the adapter. `generates`: with the recipe's patches for inference. A recipe that trains nothing
    needs no adapter: its patches are applied again. Labels and task are the adapter's if there is one.
    """
    folder, own = _folder(recipe, adapter_folder, base_only), recipe.load_patches()
    base = read_meta(folder).base if folder else Base(recipe.model.name, "", recipe.load_objective().head)
    first, patches = ([p for p in own if p.when is when and generates] for when in (When.LOAD, When.INFER))
    others = [p for p in own if p.when not in (When.LOAD, When.INFER)]
    before = [] if base_only else patches_of(folder) if folder else others
    loaded = Loaded(None, None, base, [*first, *before, *patches], None if base_only else folder)
    place = place_of(recipe)
    model, tokenizer = load_model(
        recipe.model,
        task=base.task,
        labels=loaded.labels,
        names=base.labels,
        device=place.device,
        experts=not any(patch.reads_experts for patch in first),
    )
    loaded.model, loaded.tokenizer = model, tokenizer
    if base.reply.template is not None:  # the run's own, even if its file has changed since
        tokenizer.chat_template = base.reply.template
    else:
        use_template(recipe.data, tokenizer)
    batches = _batches(recipe, [*first, *(before if not folder or base_only else ())], place)
    try:
        loaded.surgeries += apply_patches(model, first, place, When.LOAD, batches)
        if folder and not base_only:
            loaded.surgeries += load_adapter(model, folder, place)
        else:
            loaded.surgeries += apply_patches(model, before, place, When.TRAIN, batches)
        loaded.surgeries += apply_patches(model, patches, place, When.INFER)
    except BaseException:
        revert(loaded.surgeries)
        raise
    loaded.patches = [surgery.patch for surgery in loaded.surgeries]  # as calibration has left them
    model.eval()
    return loaded


def _folder(recipe: Recipe, adapter_folder: str | Path | None, base_only: bool) -> Path | None:
    """The adapter folder to read, if any; with `base_only` only its task and labels are used."""
    if adapter_folder:
        if not Path(adapter_folder).is_dir():
            raise BadInput(f"adapter {adapter_folder}", "there is no such folder", "Name the adapter/ folder of a run")
        return Path(adapter_folder)
    folder = Path(recipe.output) / "adapter"
    if folder.is_dir():
        return folder
    if not base_only and (recipe.trains or _unfinished(Path(recipe.output))):
        do = "Train first, name one with --adapter, or use --base"
        raise BadInput(f"the adapter of {recipe.output}", f"there is no {folder}", do)
    return None


def _unfinished(run: Path) -> bool:
    """Whether the run of this folder trains patches, which a recipe with other patches does not say."""
    try:
        return (run / "recipe.yaml").is_file() and Recipe.load(run).trains
    except BadInput:  # a recipe of another version
        return bool(checkpoints(run))


def _batches(recipe: Recipe, patches: list[Patch], place: Any) -> Any:
    """Calibration batches for `apply_patches`; reads the training rows only if a patch needs them."""
    if not any(patch.calibration_rows for patch in patches):
        return None
    objective = recipe.load_objective()
    cpu = place.device.type == "cpu"
    args = training_arguments(recipe, arguments_class(objective), Path(recipe.output), cpu)
    inputs = read_inputs(recipe, objective, args, lambda line: None)
    return calibration_batches(recipe, inputs, args, place.device)
