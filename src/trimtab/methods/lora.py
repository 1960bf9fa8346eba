"""LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu et al., arXiv 2106.09685.

    h = W_0 x + (alpha / r) B A x      (equation 3, section 4.1; rslora: alpha / sqrt(r), arXiv 2312.03732)

    W_0: the frozen weight   A: `lora_A`, (r, in)   B: `lora_B`, (out, r), zero at the start   alpha: `alpha`

The layers are `peft`'s, inserted in place and without a wrapper, so the model remains an ordinary transformers model.
On a 4- or 8-bit base this is QLoRA (2305.14314); with `dora` the weight's norm is trained separately from its direction
(2402.09353).

Two forms keep less for the backward pass. `fa` (LoRA-FA, 2308.03303): A stays as it was drawn, and each linear keeps
A x, (T, r), instead of x, (T, in). The gradient g of B becomes g (A A^T)^-1 / s^2, s = alpha / r, as in peft's LoRA-FA
optimizer, but before clipping and for any optimizer. `velora` (VeLoRA, 2405.17991): x is kept as one number for each of
`velora_groups` groups, and the gradient of A is computed from those; fields and defaults are peft's `VeloraConfig`.
Linears that read the same input share its code, and x is never rebuilt, as it is in peft.

Ours are: reverting (module by module, and the weights that PiSSA and OLoRA change), random numbers that do not touch
the global generator, files in PEFT's layout, and, for the plain case (no dropout, no DoRA), one autograd function that
replaces peft's chain of casts and products. It computes the same sum in the base's precision and saves x, A x and the
fp32 weights for the backward pass, but no fp32 copy of x. A test compares it with peft's own forward.
"""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Place, Portable, Surgery
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.freeze import freeze_base
from ..model.low_rank import Codes, corrected, unit
from ..model.peft_layers import ADAPTER, bare, dense, forward_of, weighted
from ..model.surgery import PATCH_MARK, Swaps, on_a_copy
from ..quiet import no_kernel_lookup

if TYPE_CHECKING:
    from peft import LoraConfig

EMBED = "lora_velora_embed"  # peft's name for VeLoRA's v
INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")


@dataclass(frozen=True)
class LoRA(Patch):
    """Low-rank adapters beside the targeted linears, computed by peft."""

    paper: ClassVar[str] = "2106.09685"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-4}  # QLoRA, arXiv 2305.14314, appendix B
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"fa": True}, {"velora": True})

    r: int = 8
    alpha: float | None = None  # None: 2 r
    dropout: float = 0.0
    targets: str = "all-linear"  # "all-linear", a comma list of name endings ("q_proj,v_proj"), or a regex on the path
    dora: bool = False
    rslora: bool = False
    init: str = "default"  # as peft's init_lora_weights; "default" is its True
    fa: bool = False  # LoRA-FA: A stays frozen, and a linear keeps A x instead of its input
    velora: bool = False  # VeLoRA: a linear keeps one number for each group of its input, for the gradient of A
    velora_groups: int = 64  # peft's num_groups
    velora_scale: float = 1.0  # peft's scale: the gradient of A times it
    velora_init: Literal["batch_average", "batch_average_once", "random"] = "batch_average"  # peft's init_type
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
                parts = bare(model)
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
    def shards(self) -> bool:  # type: ignore[override]
        return not (self.dora or self.fa or self.velora) and self.init == "default"

    @property
    def autocast(self) -> bool:
        """peft's own forward uses less memory and is faster under autocast; ours casts by itself."""
        return not self._plain

    @property
    def gradient_reason(self) -> str:  # type: ignore[override]
        return "fa and velora change what is kept for gradients, of which it has none" if self.fa or self.velora else ""

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
        self._check_forms(targets)
        if self.init not in INITS and not self.init.startswith("pissa_niter_"):
            raise BadInput(f'lora: init: "{self.init}"', "there is no such init", f"Use one of {', '.join(INITS)}")
        on_cpu = [linear for linear in targets.values() if linear.weight.device.type in ("cpu", "meta")]
        if self.dora and any(quant.stored_as(linear) == "int8" for linear in on_cpu):
            raise BadInput(
                "lora: dora on an 8-bit base", "peft loses its scales on a CPU", "Load the base in nf4 or bf16"
            )
        if self._moves_base and any(not linear.weight.is_floating_point() for linear in targets.values()):
            raise BadInput(f'lora: init: "{self.init}"', "the base is quantised", 'Set init to "default"')

    def _check_forms(self, targets: dict[str, nn.Module]) -> None:
        """BadInput for what `fa` and `velora` cannot be combined with."""
        stated = [
            key for key in ("velora_groups", "velora_scale", "velora_init") if vars(self).get(key) != getattr(LoRA, key)
        ]
        narrow = min(anatomy.widths(linear)[0] for linear in targets.values())
        int8 = any(quant.stored_as(linear) == "int8" for linear in targets.values())
        one, less = "Keep one of the two", "Set velora_groups to a smaller number"
        faults = {  # asked -> whether it is so, have, do
            "fa with velora": (self.fa and self.velora, "A is frozen, so its gradient needs no input at all", one),
            "fa with dora": (self.fa and self.dora, "LoRA-FA's gradient is for B alone, not for a norm beside it", one),
            "velora with dora": (self.velora and self.dora, "peft computes DoRA, and keeps whole inputs", one),
            "velora with dropout": (self.velora and self.dropout, "each linear then has an input of its own", one),
            "velora on an 8-bit base": (self.velora and int8, "peft's own layer keeps whole inputs", "Use nf4 or bf16"),
            f"{stated[:1]} without velora": (stated and not self.velora, "it would do nothing", "Set velora: true"),
            f"velora_groups: {self.velora_groups}": (
                self.velora and not 1 <= self.velora_groups < narrow, f"a linear reads {narrow} numbers a token", less),
            f"velora_scale: {self.velora_scale}": (
                not 0 < self.velora_scale < math.inf, "it multiplies the gradient of A", "Set velora_scale: 1"),
        }  # fmt: skip
        for asked, (wrong, have, do) in faults.items():
            if wrong:
                raise BadInput(f"lora: {asked}", have, do)


class LoraSurgery(Surgery):
    merges_apart = True

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
            layer.__class__ = weighted(type(layer))
            self.swaps.set_attribute(layer, PATCH_MARK, True)
        codes = self._codes() if self.patch.velora else {}
        for name, linear in targets.items():
            layer = self.layers[name]
            if self.patch._plain and quant.stored_as(linear) != "int8":
                self.swaps.set_attribute(layer, "forward", forward_of(layer, codes.get(name), self.patch.velora_scale))
            if self.patch.fa:
                a_RI = layer.lora_A[ADAPTER].weight.requires_grad_(False)
                layer.lora_B[ADAPTER].weight.register_hook(corrected(a_RI, layer.scaling[ADAPTER]))

    def _codes(self) -> dict[str, Codes]:
        """VeLoRA: by path, what compresses the layer's input; one for all layers that read the same. The first of them
        keeps a fixed v, under peft's name."""
        patch, found = self.patch, {}
        for group in anatomy.shared_input_groups(list(self.layers)):
            first = self.layers[group[0]]
            codes = Codes(patch.velora_groups, first.in_features, patch.velora_init, partial(getattr, first, EMBED))
            if patch.velora_init != "batch_average":
                v_D = torch.zeros(codes.size, device=first.lora_A[ADAPTER].weight.device)
                if patch.velora_init == "random" and not v_D.is_meta:
                    rng = torch.Generator().manual_seed((patch.seed << 20) + zlib.crc32(group[0].encode()))
                    v_D.copy_(unit(torch.randn(codes.size, generator=rng)))
                first.register_buffer(EMBED, v_D)
            found |= dict.fromkeys(group, codes)
        return found

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
                plain = dense(layer, self.model.dtype)
                merged[name] = (plain, plain.weight.data)
        self.swaps.undo()
        for name, (linear, values) in merged.items():
            linear.weight.data = values
            self._put_back(name, linear)

    def merged_weight(self, path: str) -> Tensor | None:
        if (layer := self.layers.get(path)) is None:
            return None
        if not layer.base_layer.weight.is_floating_point():
            return dense(layer, self.model.dtype).weight.data
        try:
            with on_a_copy(layer.base_layer):
                layer.merge()
                return anatomy.dense_view(layer.base_layer).data
        finally:
            layer.merged_adapters.clear()

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
        own = {name: tensor.detach() for name, tensor in self.own_tensors().items() if not name.endswith(EMBED)}
        tensors = {f"base_model.model.{name}": tensor for name, tensor in own.items()}
        return Portable(self._config(), tensors)
