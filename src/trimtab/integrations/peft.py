"""trimtab's methods as tuners of PEFT: `import trimtab.integrations.peft`, and then PEFT's own functions.

    from trimtab.integrations.peft import PacaConfig
    model = get_peft_model(model, PacaConfig(r=8, target_modules="all-linear"))

Each config has the fields of the patch of the same name, but for `targets`, which PEFT calls `target_modules`. Saving,
loading, several adapters, disabling and merging are PEFT's; so are `Trainer`, and TRL's trainers with `peft_config`. A
process that loads such an adapter must import this module first. MEFT's rows are stepped by any optimizer that has the
model's trained parameters; they are saved with an adapter, and not in `optimizer.pt`. `PeftType` is an enum that PEFT
does not let others extend; one member is added for each method (tested with PEFT 0.19 to 0.21).

What needs trimtab's own training loop is refused: PaCA's `reselect_every`, and MEFT's routers with a loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..contracts import Batch, Patch, Place, Surgery
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.row_steps import step_with_optimizers
from ..model.surgery import on_a_copy
from ..quiet import no_kernel_lookup
from ..tiered.distributed import settle

no_kernel_lookup()
from peft import PeftConfig, PeftType  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge  # noqa: E402
from peft.utils.peft_types import register_peft_method  # noqa: E402

LINEAR, BESIDE = ("paca", "edora", "senszoq"), ("parallel_adapter", "meft")
NAMES = (*LINEAR, *BESIDE)
LOOP = {"reselect_every": 0, "router": ("gate", "centroid", "fixed")}  # fields -> the values that need no loop of ours


def _title(name: str) -> str:
    return name.title().replace("_", "")


def config_class(name: str) -> type[PeftConfig]:
    """The dataclass of a method's fields, as PEFT's configs are: `target_modules` may be a list, a regex or
    "all-linear"."""
    patch = methods.find(name)
    fields: list[Any] = [(f.name, f.type, f) for f in dataclasses.fields(patch) if f.name != "targets"]
    fields = [(key, kind, dataclasses.field(default=f.default)) for key, kind, f in fields]
    if name in LINEAR:
        targets = dataclasses.field(default="all-linear", metadata={"help": "names, a regex, or 'all-linear'"})
        fields.append(("target_modules", "list[str] | str | None", targets))

    def post_init(self: Any) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = getattr(PeftType, name.upper())
        self.patch()

    def to_patch(self: Any) -> Patch:
        values = {key: getattr(self, key) for key, *_ in fields if key != "target_modules"}
        for key, fine in LOOP.items():
            if key in values and values[key] not in (fine if isinstance(fine, tuple) else (fine,)):
                have = "only trimtab's own training has what it needs"
                raise BadInput(f"{name} in PEFT: {key}: {values[key]}", have, "Use `trimtab train`, or another value")
        if name in LINEAR:
            named = self.target_modules or "all-linear"
            values["targets"] = named if isinstance(named, str) else ",".join(sorted(named))
        return patch(**values)

    made = dataclasses.make_dataclass(
        f"{_title(name)}Config", fields, bases=(PeftConfig,), kw_only=True,
        namespace={"__post_init__": post_init, "patch": to_patch, "__doc__": f"{methods.TABLE[name].title} in PEFT."},
    )  # fmt: skip
    made.__module__ = __name__
    return made


class _Layer(BaseTunerLayer):
    """The adapters of one linear, or of one FFN, by name."""

    def _active(self) -> list[Any]:
        return [] if self.disable_adapters else [self.adapters[n] for n in self.active_adapters if n in self.adapters]

    @property
    def adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])


class LinearLayer(nn.Module, _Layer):
    """A frozen linear and, by adapter, what a patch wraps it in. Several active adapters add up."""

    def __init__(self, base_layer: nn.Module, attribute: str):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = (attribute,)
        setattr(self, attribute, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._plain: Tensor | None = None  # the weight before it was merged

    def add(self, name: str, wrapper: nn.Module) -> None:
        base = wrapper._modules.pop("base")  # it has one place in the state dict: base_layer
        object.__setattr__(wrapper, "base", base)
        self.adapters[name] = wrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.merged else self._active()
        if len(active) == 1:
            return active[0](x)
        y = self.base_layer(x)
        return y + sum((wrapper(x) - y for wrapper in active), torch.zeros_like(y)) if active else y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapters:
                continue
            if quant.is_quantised(self.base_layer):
                self.base_layer = quant.dense_linear(self.base_layer)
                for wrapper in self.adapters.values():
                    object.__setattr__(wrapper, "base", self.base_layer)
                    wrapper.quantised = False
            weight = self.base_layer.weight
            plain = weight.detach().clone() if self._plain is None else self._plain
            effective = self._effective(name, plain)
            if safe_merge and not effective.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            weight.data.add_((effective - plain).to(weight.dtype)) if self.merged else weight.data.copy_(effective)
            self._plain = plain
            self.merged_adapters.append(name)

    def _effective(self, name: str, plain: Tensor) -> Tensor:
        """The weight with one adapter, from the weight without any."""
        with on_a_copy(self.base_layer):
            self.base_layer.weight.data.copy_(plain)
            return self.adapters[name].merge_into_base().weight.data

    def unmerge(self) -> None:
        if self._plain is not None:
            self.base_layer.weight.data.copy_(self._plain)
        self._plain, self.merged_adapters = None, []

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, wrapper in self.adapters.items():
            saved = {key: state.get(f"{prefix}{self.adapter_layer_names[0]}.{name}.{key}") for key in
                     ("check", "columns", "counts", "values")}  # fmt: skip
            if hasattr(wrapper, "require_same"):
                wrapper.require_same(saved["check"])
            if hasattr(wrapper, "set_pattern") and saved["columns"] is not None and saved["counts"] is not None:
                wrapper.set_pattern(type(wrapper.pattern)(saved["columns"], saved["counts"], wrapper.shape))
        super()._load_from_state_dict(state, prefix, *args)


class BesideLayer(nn.Module, _Layer):
    """The networks beside one FFN, by adapter; a hook on the FFN adds those that are active to its output."""

    def __init__(self, attribute: str):
        super().__init__()
        self.adapter_layer_names = (attribute,)
        setattr(self, attribute, nn.ModuleDict())
        self.merged_adapters: list[str] = []

    def add_to(self, h: Tensor, y: Tensor) -> Tensor:
        for adapter in self._active():
            y = adapter(h, y)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("A network beside an FFN depends on its input, so it cannot be merged into weights. "
                         "Keep the adapter")  # fmt: skip

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _rows(self, adapter: nn.Module) -> dict[str, Tensor]:
        """What an adapter holds in tables, and so not as parameters: keys, values, a trained router."""
        if not hasattr(adapter, "stores"):
            return {}
        for store in adapter.stores:
            store.catch_up()
        table, width = adapter.store.whole(), adapter.width
        found = {"keys": table[..., :width], "values": table[..., width:]}
        if adapter.router.table is not None:
            found["router_rows"] = adapter.router.table.whole()
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, adapter in self.adapters.items():
            for key, tensor in self._rows(adapter).items():
                destination[f"{prefix}{self.adapter_layer_names[0]}.{name}.{key}"] = tensor.detach().clone()

    @torch.no_grad()
    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, meta: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
        for name, adapter in self.adapters.items():
            own = {f"{prefix}{self.adapter_layer_names[0]}.{name}.{key}": t for key, t in self._rows(adapter).items()}
            if not own or not own.keys() & state.keys():
                continue
            for key, tensor in own.items():
                if key not in state or state[key].shape != tensor.shape:
                    errors.append(f"{key}: {tuple(tensor.shape)} is expected")
                    continue
                tensor.copy_(state[key])
            for store in adapter.stores:
                store.changed(range(store.rows))
            settle(adapter.stores)
            for store in adapter.stores:
                store.rewritten()
            adapter.router.refresh()


class Tuner(BaseTuner):
    """A patch on a model, layer by layer, as PEFT's tuners are. A subclass for each method has its name."""

    method: str
    tuner_layer_cls = _Layer  # type: ignore[assignment]
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        if self.method == "meft" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            have = "only trimtab's own training shares a table between processes"
            raise BadInput("meft in PEFT in several processes", have, "Use `trimtab train` under torchrun")
        patch = config.patch()
        surgeries = self.__dict__.setdefault("surgeries", {})
        flags = [(p, p.requires_grad) for p in model.parameters()]
        with _in_place(model, lambda layer: layer.base_layer):
            surgeries[adapter_name] = surgery = patch.surgery(model)
            made = _linears(patch, surgery, model) if self.method in LINEAR else _networks(patch, surgery, model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for place, name, adapter in made:
            self._put(place, name, adapter, adapter_name)
        self.set_adapter(self.active_adapters)
        self._mark_only_adapters_as_trainable(model)
        if config.inference_mode:
            for _, _, adapter in made:
                adapter.requires_grad_(False)

    def _put(self, place: Any, name: str, adapter: nn.Module, adapter_name: str) -> None:
        attribute = f"{self.method}_adapters"
        if self.method in LINEAR:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, LinearLayer):
                path, _, leaf = name.rpartition(".")
                layer, old = LinearLayer(layer, attribute), layer
                layer.train(old.training)
                self.model.get_submodule(path)._modules[leaf] = layer
            layer.add(adapter_name, adapter.train(layer.training))
        else:
            layer = getattr(place.host, f"trimtab_{self.method}", None)
            if layer is None:
                layer = BesideLayer(attribute).train(place.host.training)
                setattr(place.host, f"trimtab_{self.method}", layer)
                self.__dict__.setdefault("hooks", []).append((place, place.beside(layer.add_to)))
            layer.adapters[adapter_name] = adapter.train(layer.training)
        self.targeted_module_names += [name] if name not in self.targeted_module_names else []

    def calibrate(self, batches: Iterable[Batch], adapter_name: str = "default") -> None:
        """Chooses what depends on data, with batches of tokens and labels: SensZOQ's entries. Before training."""
        with _in_place(self.model, lambda layer: layer.adapters[adapter_name]):
            self.surgeries[adapter_name].calibrate(batches)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("trimtab's tuners choose all layers at once (inject_adapter)")

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for store in self.surgeries.pop(adapter_name).stores:
            store.drop()

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> nn.Module:
        options.pop("progressbar", None)
        for name, module in [*self.model.named_modules()]:
            if isinstance(module, _Layer) and merge:
                module.merge(**options)
            if isinstance(module, LinearLayer):
                if not merge:
                    module.unmerge()
                path, _, leaf = name.rpartition(".")
                self.model.get_submodule(path)._modules[leaf] = module.base_layer
        for place, handle in self.__dict__.pop("hooks", []):
            handle.remove()
            delattr(place.host, f"trimtab_{self.method}")
        del self.model.peft_config
        return self.model


@contextmanager
def _in_place(model: nn.Module, module_of: Callable[[LinearLayer], nn.Module]) -> Iterator[None]:
    """Within it, each layer of ours is replaced by `module_of` it: its base, or one of its adapters."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LinearLayer)]

    def put(pick: Any) -> None:
        for name, layer in layers:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._modules[leaf] = pick(layer)

    put(module_of)
    try:
        yield
    finally:
        put(lambda layer: layer)


def _linears(patch: Any, surgery: Surgery, model: Any) -> list[tuple[Any, str, nn.Module]]:
    """(None, path, the wrapper) of each target. `patch.apply` prepares them, and is undone."""
    applied = patch.apply(model, Place())
    layers = dict(applied.layers)
    applied.swaps.undo()
    surgery.layers, surgery.notes = layers, applied.notes
    return [(None, name, layer) for name, layer in layers.items()]


def _networks(patch: Any, surgery: Surgery, model: Any) -> list[tuple[Any, str, nn.Module]]:
    """(the FFN, its path, the network beside it) of each FFN."""
    ffns = anatomy.ffns(model)
    device = next(model.parameters()).device
    made = list(patch.beside(ffns, surgery, Place(fast=str(device))))
    if surgery.stores:
        step_with_optimizers(surgery.swaps)
        settle(surgery.stores)
    return [(ffn, ffn.name, adapter) for ffn, adapter in zip(ffns, made, strict=True)]


def _register(name: str) -> type[PeftConfig] | None:
    """Makes a method known to PEFT; None if this PEFT has one of its name, which is then the one to use."""
    member = name.upper()
    if member in PeftType.__members__:
        return None
    made = str.__new__(PeftType, member)
    made._name_ = made._value_ = member
    PeftType._member_map_[member] = made
    PeftType._value2member_map_[member] = made
    PeftType._member_names_.append(member)
    type.__setattr__(PeftType, member, made)
    config = config_class(name)
    tuner = type(f"{_title(name)}Tuner", (Tuner,), {"method": name, "prefix": f"{name}_"})
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=f"{name}_")
    return config


def __getattr__(name: str) -> Any:
    """PEFT's own config, for a method that this PEFT has itself."""
    import peft

    if name.endswith("Config") and hasattr(peft, name):
        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def config_of(name: str) -> type[PeftConfig]:
    """The config class of a method, ours or PEFT's own."""
    return globals().get(f"{_title(name)}Config") or __getattr__(f"{_title(name)}Config")


for _name in NAMES:
    if (_made := _register(_name)) is not None:
        globals()[_made.__name__] = _made
