"""LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu et al., arXiv 2106.09685.

    h = W_0 x + (alpha / r) B A x      (equation 3, section 4.1; rslora: alpha / sqrt(r), arXiv 2312.03732)

    W_0: the frozen weight   A: `lora_A`, (r, in)   B: `lora_B`, (out, r), zero at the start   alpha: `alpha`

The layers are `peft`'s, inserted in place and without a wrapper, so the model remains an ordinary transformers model.
On a 4- or 8-bit base this is QLoRA (2305.14314); with `dora` the weight's norm is trained separately from its direction
(2402.09353).

Ours are: reverting (module by module, and the weights that PiSSA and OLoRA change), random numbers that do not touch
the global generator, files in PEFT's layout, and, for the plain case (no dropout, no DoRA), one autograd function that
replaces peft's chain of casts and products. It computes the same sum in the base's precision and saves x, A x and the
fp32 weights for the backward pass, but no fp32 copy of x. A test compares it with peft's own forward.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Place, Portable, Surgery
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.freeze import freeze_base
from ..model.surgery import PATCH_MARK, Swaps
from ..quiet import no_kernel_lookup

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"  # peft's name for the one adapter of a model
INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")


@dataclass(frozen=True)
class LoRA(Patch):
    """Low-rank adapters beside the targeted linears, computed by peft."""

    paper: ClassVar[str] = "2106.09685"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-4}  # QLoRA, arXiv 2305.14314, appendix B
    shards: ClassVar[bool] = True

    r: int = 8
    alpha: float | None = None  # None: 2 r
    dropout: float = 0.0
    targets: str = "all-linear"  # "all-linear", a comma list of name endings ("q_proj,v_proj"), or a regex on the path
    dora: bool = False
    rslora: bool = False
    init: str = "default"  # as peft's init_lora_weights; "default" is its True
    seed: int = 0

    def apply(self, model: PreTrainedModel, place: Place) -> LoraSurgery:
        no_kernel_lookup()
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype

        if hasattr(model, "peft_config"):
            raise BadInput("apply lora", "the model already has a peft adapter", "Merge or unload that one first")
        targets = anatomy.target_linears(model, self.targets)
        self._check(targets)
        config = self.peft_config(targets)
        surgery = LoraSurgery(self, model)
        surgery.notes = anatomy.unreached(model, self.targets)
        freeze_base(model, surgery.swaps)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        surgery.keep(targets, changed=self._moves_base)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                empty = next(model.parameters()).device.type == "meta"
                parts = _parts(model)
                inject_adapter_in_model(config, parts, ADAPTER, low_cpu_mem_usage=empty)
            model.peft_config = parts.peft_config
            cast_adapter_dtype(model, ADAPTER)  # A and B in fp32
        except (ValueError, TypeError) as error:
            surgery.swaps.undo()
            raise BadInput("apply lora", f"peft refuses ({error})".rstrip("."), "Change the patch's fields") from None
        for parameter, flag in flags:  # peft froze the other patches' parameters too
            parameter.requires_grad_(flag)
        surgery.adopt(targets)
        return surgery

    @property
    def autocast(self) -> bool:
        """peft's own forward uses less memory and is faster under autocast; ours casts by itself."""
        return not self._plain

    @property
    def _plain(self) -> bool:
        return not self.dora and not self.dropout

    def peft_config(self, targets: dict[str, nn.Module]) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(targets),
            fan_in_fan_out=any(isinstance(linear, anatomy.Conv1D) for linear in targets.values()),
            use_dora=self.dora,
            use_rslora=self.rslora,
            init_lora_weights=True if self.init == "default" else self.init,
        )

    @property
    def _moves_base(self) -> bool:
        """PiSSA and OLoRA subtract from the weight what they put into the adapter."""
        return self.init.startswith(("pissa", "olora"))

    def _check(self, targets: dict[str, nn.Module]) -> None:
        if self.r < 1:
            raise BadInput(f"lora: r: {self.r}", "a rank is at least 1", "Set r to 8, for example")
        if self.alpha is not None and not 0 < abs(self.alpha) < math.inf:
            raise BadInput(f"lora: alpha: {self.alpha}", "alpha / r scales the adapter", "Set alpha to 16, for example")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"lora: dropout: {self.dropout}", "it is a share, 0 or more and below 1", "Set dropout: 0")
        if self.init not in INITS and not self.init.startswith("pissa_niter_"):
            raise BadInput(f'lora: init: "{self.init}"', "there is no such init", f"Use one of {', '.join(INITS)}")
        on_cpu = [linear for linear in targets.values() if linear.weight.device.type in ("cpu", "meta")]
        if self.dora and any(quant.stored_as(linear) == "int8" for linear in on_cpu):
            raise BadInput(
                "lora: dora on an 8-bit base", "peft loses its scales on a CPU", "Load the base in nf4 or bf16"
            )
        if self._moves_base and any(not linear.weight.is_floating_point() for linear in targets.values()):
            raise BadInput(f'lora: init: "{self.init}"', "the base is quantised", 'Set init to "default"')


class LoraSurgery(Surgery):
    def __init__(self, patch: LoRA, model: PreTrainedModel):
        self.patch, self.model = patch, model
        self.swaps = Swaps(model)
        self.layers: dict[str, nn.Module] = {}  # path -> peft's layer

    def keep(self, targets: dict[str, nn.Module], changed: bool) -> None:
        """Before peft's layers are inserted: record each linear, and its values where peft will write new ones."""
        self.swaps.on_undo(lambda: vars(self.model).pop("peft_config", None))
        for name, linear in targets.items():
            self.swaps.on_undo(lambda name=name, linear=linear: self._put_back(name, linear))
            if changed:
                original = linear.weight.data
                linear.weight.data = original.clone()
                self.swaps.on_undo(lambda linear=linear, original=original: setattr(linear.weight, "data", original))

    def adopt(self, targets: dict[str, nn.Module]) -> None:
        """After peft's layers are inserted: record and adapt them."""
        for name, linear in targets.items():
            self.layers[name] = layer = self.model.get_submodule(name).train(linear.training)
            layer.__class__ = _weighted(type(layer))
            self.swaps.set_attribute(layer, PATCH_MARK, True)
            if self.patch._plain and quant.stored_as(linear) != "int8":
                self.swaps.set_attribute(layer, "forward", _forward(layer))

    def _put_back(self, name: str, linear: nn.Module) -> None:
        path, _, leaf = name.rpartition(".")
        linear.train(self.model.get_submodule(name).training)
        self.model.get_submodule(path)._modules[leaf] = linear

    def revert(self) -> None:
        self.swaps.undo()

    def merge(self) -> None:
        """W_0 + (alpha / r) B A, by peft. A plain linear replaces a 4- or 8-bit one, so nothing is rounded again."""
        if broken := [name for name, tensor in self.own_tensors().items() if not tensor.isfinite().all()]:
            raise BadInput("merge lora", f"{broken[0]} has NaN or infinity", "Use an earlier checkpoint")
        merged = {}
        for name, layer in self.layers.items():
            if layer.base_layer.weight.is_floating_point():
                layer.merge()
                merged[name] = (layer.base_layer, layer.base_layer.weight.data)
            else:
                plain = _dense(layer, self.model.dtype)
                merged[name] = (plain, plain.weight.data)
        self.swaps.undo()
        for name, (linear, values) in merged.items():
            linear.weight.data = values
            self._put_back(name, linear)

    def own_tensors(self) -> dict[str, Tensor]:
        """Under PEFT's names without its prefix: `<path>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`."""
        return {
            f"{name}.{key.replace(f'.{ADAPTER}', '')}".replace("magnitude_vector.weight", "magnitude_vector"): tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.state_dict(keep_vars=True).items()
            if not key.startswith("base_layer.")
        }

    def adapter_config(self) -> dict[str, Any]:
        """The content of peft's adapter_config.json."""
        config = self._config().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}

    def _config(self) -> LoraConfig:
        config = copy.deepcopy(self.model.peft_config[ADAPTER])
        config.inference_mode = True
        config.base_model_name_or_path = self.model.config.name_or_path or None
        return config

    def portable(self) -> Portable:
        """As peft saves it. When it is loaded, PiSSA and OLoRA are computed again from the same base."""
        if self.patch.init.startswith("pissa_niter"):
            raise BadInput("export lora to peft", "its init was random, and peft cannot repeat it", "Use --to merged")
        tensors = {f"base_model.model.{name}": tensor.detach() for name, tensor in self.own_tensors().items()}
        return Portable(self._config(), tensors)


def _parts(model: PreTrainedModel) -> nn.Module:
    """The model's modules without its config, so that peft takes the names as they are.

    From the config, peft would conclude that the gate_proj of a dense FFN or of a shared expert means stacked experts,
    and that Mamba's kernels cannot be adapted; these read the weight that `_Weighted` provides.
    """
    parts = nn.Module()
    vars(parts)["_modules"] = model._modules
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(parts, name, getattr(model, name))
    return parts


class _Weighted:
    """Mixed into the class of peft's layer: `weight` is the effective weight, for models that read it themselves."""

    @property
    def weight(self: Any) -> Tensor:
        base = self.get_base_layer().weight
        plain = not self.merged and not self.disable_adapters and not self.lora_variant
        return base + self.get_delta_weight(ADAPTER).to(base.dtype) if plain and base.is_floating_point() else base


@functools.cache
def _weighted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Weighted, kind), {})


def _forward(layer: nn.Module) -> Any:
    """peft's forward, with `_LowRank` if the only active adapter is the plain one."""
    theirs = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not args and not kwargs and not layer.disable_adapters and not layer.merged
        if not plain or layer.active_adapters != [ADAPTER] or not x.is_floating_point():
            return theirs(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        return _LowRank.apply(x, a_RI, b_OR, layer.base_layer, layer.scaling[ADAPTER])

    return forward


class _LowRank(torch.autograd.Function):
    """Equation 3 in x's dtype. T tokens (all leading dimensions), I in, O out, R rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, base: nn.Module, scale: float) -> Tensor:
        y = quant.product(base, x)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        low_TR = x_TI @ a_RI.to(x.dtype).T
        y_TO.addmm_(low_TR, b_OR.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, low_TR, a_RI, b_OR)
        ctx.base, ctx.scale = base, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, low_TR, a_RI, b_OR = ctx.saved_tensors
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        slope_TR = (dy_TO @ b_OR.to(dy.dtype)).mul_(ctx.scale)
        dx = d_a_RI = d_b_OR = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ quant.dense_weight(ctx.base, dy.dtype)
            dx = dx_TI.addmm_(slope_TR, a_RI.to(dy.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_a_RI = (slope_TR.T @ x_TI).to(a_RI.dtype)
        if ctx.needs_input_grad[2]:
            d_b_OR = (low_TR.T @ dy_TO).T.to(b_OR.dtype) * ctx.scale
        return dx, d_a_RI, d_b_OR, None, None


def _dense(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain linear with the de-quantised weight of peft's `layer` and its adapter."""
    from peft.utils.integrations import dequantize_module_weight

    base, variant = layer.base_layer, layer.lora_variant.get(ADAPTER)
    weight_OI = dequantize_module_weight(base).float()
    if variant is None:
        weight_OI = weight_OI + layer.get_delta_weight(ADAPTER).float()
    else:
        weight_OI = variant.merge_safe(layer, ADAPTER, weight_OI)
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight_OI.detach().to(dtype), requires_grad=False)
    plain.bias = base.bias
    return plain
