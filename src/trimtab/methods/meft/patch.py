"""MEFT: Memory-Efficient Fine-Tuning through Sparse Adapter (Hao et al., ACL 2024, arXiv 2406.04984).

A Parallel Adapter far larger than fast memory is added to each FFN. Its key-value pairs and their Adam state lie in
slow memory, divided into N experts of neighbouring pairs. A router names a few experts for each token, only those are
fetched, and of their keys the K that match the token best add their values to its output.

    p_t = W_g h_t                          experts' scores of token t             (eq. 5)
    E_t = the n_p largest of p_t           experts probed                         (eq. 6)
    a_t = ReLU(g_t h_t W_A[E_t])           keys of these experts                  (eq. 7)
    S_t = the K largest of a_t             pairs that count                       (algorithm 1)
    FFN'(h_t) = FFN(h_t) + s a_t[S_t] W_B[S_t]

    h: what the FFN reads   W_A: keys, transposed   W_B: values   W_g: `router`   N: `experts`   n_p: `probes`
    K: `k`   r: pairs per layer   g_t: each probed expert's gate (1 without one)   s: `scale`

What differs from the paper, and why:
- `per_token` (default): a token uses its own pairs S_t, whatever else is in its batch. `union` is the paper's algorithm
  1: each token uses the pairs of all. With `cap` a training pass fetches only the experts that most tokens want.
- In algorithm 1 the router has no gradient. `gate` (default) multiplies each probed expert's scores by n_p times its
  share in a softmax over the probed ones: 1 on average, never negative (in the authors' simulation it is p itself, and
  the product of two negative ones fires). `centroid` sets W_g to the mean keys after each step, `fixed` leaves it.
- A row of the store is an expert: `block` pairs [key | value]. The backward pass fetches rows again, so that only one
  layer's rows are in use at a time; from the forward pass it keeps h, the experts' numbers and the K scores.
- A trained router also lies in a table; scores use a copy in fast memory. Adam steps touched experts only.
- s = 64, not 1: under Adam, values learn s times as fast as keys and router, which should change little.
- n_p = 8, as in the authors' code. With its N = 4 sqrt(r), a batch of a thousand tokens touches 70 % of all pairs at r
  16,384; here N is 12 sqrt(r), but leaves each token at least K candidates. r is rounded up to whole experts.

Shape letters: T tokens, D hidden size, N experts, B pairs of an expert, P probes, C = P * B candidates, K kept of C.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ...bases.beside_ffn import BesideFFN, BesideSurgery
from ...contracts import Place
from ...errors import BadInput, nearest
from ...foreign import recomputing
from ...model import anatomy
from ...model.row_steps import RowPatch, step_with_optimizers
from ...tiered.adam import MODES, RowAdam
from ...tiered.distributed import settle, store_class
from ...tiered.groups import Groups
from ...tiered.mapped_file import slow_kind
from ...tiered.prefetch import Reader
from ...tiered.store import Rows, TieredStore
from . import experts, routing
from .lookahead import ExpertPrefetcher, LayerTrace
from .router import Routed
from .routing import StableRouter, Words

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
CHOICES = {"semantics": ("per_token", "union"), "adam": MODES,
           "router": ("gate", "centroid", "fixed", "switch", "stable"),
           "moments": tuple(MOMENTS), "prefetch": ("known", "none"),
           "retrieval": ("fast", "slow")}  # fmt: skip
LEAST = {"r": 1, "probes": 1, "k": 1, "balance": 0, "revive": 0, "cache": 0}


@dataclass(frozen=True)
class Meft(BesideFFN):
    """A sparse adapter of `r` key-value pairs beside each FFN, in slow memory."""

    paper: ClassVar[str] = "2406.04984"
    uses_tables: ClassVar[bool] = True
    attribute: ClassVar[str] = "trimtab_meft"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2.5e-4, "warmup_steps": 0.02}  # paper: 1e-4, 2 % warm-up
    shrinkable: ClassVar[tuple[str, ...]] = ("cache", "probes", "r")

    r: int = 4096  # pairs per layer; the paper's "10 %" is 3,200 on LLaMA-7B
    experts: int | None = None  # N; None: 12 sqrt(r), or r probes / k where that is fewer (section 3.3: 4 sqrt(r))
    probes: int = 8  # n_p, experts per token
    k: int = 64  # K, pairs per token (section 4.2)
    semantics: str = "per_token"  # or "union" (algorithm 1)
    router: str = "gate"  # how W_g is trained: "gate", "centroid" or "fixed"; or "switch", "stable" (routing.py)
    capacity: float | None = None  # "switch": tokens per expert, in equal shares; None: 1.25, 0: no limit
    balance_loss: float | None = None  # "switch", "stable": weight of their loss; None: 0.01 and 0.3, as in the papers
    first_stage: float | None = None  # "stable": the first stage's share of the steps; None: 0.1, as in the paper
    scale: float = 64.0  # s: values learn s times as fast as keys; 1 in the paper
    cap: int = 0  # most experts of a layer that a training pass fetches; 0: all that are probed (the paper)
    balance: float = 0.0  # how much a step changes an expert's bias towards equal load; 0: not at all (the paper)
    revive: int = 0  # steps after which an expert that no token probed is drawn anew; 0: never (the paper)
    adam: str = "lazy"  # rows without a gradient: unchanged ("lazy"), or stepped as by dense Adam ("exact")
    retrieval: str = "fast"  # with a GPU, where keys are matched: on it, or on the host ("slow", as in the paper)
    moments: str = "fp32"  # Adam's state: "fp32", "bf16" or "int8" (by blocks of 256, as in bitsandbytes)
    cache: float = 0.0  # GiB of fast memory for the experts used most recently, over all layers
    prefetch: str = "known"  # rows that are read ahead: those "known" to be needed, or "none"
    seed: int = 0  # of the initial keys

    def surgery(self, model: PreTrainedModel) -> MeftSurgery:
        return MeftSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> MeftSurgery:
        notes = tuple(self.notes(*self.layout()))
        surgery = super().apply(model, place)
        surgery.notes = notes
        try:
            step_with_optimizers(surgery.swaps)
            settle(surgery.stores)
        except BaseException:
            surgery.revert()
            raise
        return surgery

    def beside(self, ffns: Sequence[anatomy.Ffn], surgery: MeftSurgery, place: Place) -> Iterator[Adapter]:
        rows, block = self.layout()
        devices = [next(ffn.host.parameters()).device for ffn in ffns]
        make_store = store_class(planned=any(device.type == "meta" for device in devices))
        reader = Reader() if self.prefetch != "none" else None
        if reader is not None:
            surgery.swaps.on_undo(reader.close)
        prefetcher = ExpertPrefetcher()
        for index, (ffn, found) in enumerate(zip(ffns, devices, strict=True)):
            device = place.device if found.type == "meta" else found
            made = functools.partial(
                make_store, folder=place.folder, device=device, slow=slow_kind(place.slow, device), cap=self.cap,
                reader=reader,
            )  # fmt: skip
            form = (rows, block, ffn.width, self.seed * 1_000_003 + index)
            surgery.stores.append(store := made(
                ffn.name, rows, (block, 2 * ffn.width), cache_bytes=int(self.cache * 2**30) // len(ffns),
                moments=MOMENTS[self.moments], initial=functools.partial(experts.initial_rows, *form),
                more=len(ffns) - index - 1,
            ))  # fmt: skip
            tables = []
            if self.router in routing.TRAINED:
                initial = functools.partial(experts.initial_centroids, *form)
                tables.append(made(f"{ffn.name}.router", rows, (ffn.width,), initial=initial))
            if self.router == "stable":
                tables.append(made(f"{ffn.name}.words", rows, (surgery.words_width,)))
            surgery.stores += tables
            yield Adapter(self, store, *tables, prefetcher=prefetcher, words=surgery.words)

    def notes(self, rows: int, block: int) -> Iterator[str]:
        """Warnings about rounded or clipped fields."""
        probed = min(self.probes, rows)
        if rows * block != self.r:
            yield f"meft: r {self.r} is rounded up to {rows * block}: {rows} experts of {block} pairs"
        if self.probes > rows:
            yield f"meft: probes {self.probes}: there are {rows} experts, and each token probes all of them"
        if self.k > probed * block:
            yield f"meft: k {self.k}: a token has {probed * block} candidates ({probed} x {block} pairs), and all count"

    def layout(self) -> tuple[int, int]:
        """-> (N experts, B pairs of each); N * B is r, rounded up to whole experts."""
        for field, words in CHOICES.items():
            if (value := getattr(self, field)) not in words:
                raise BadInput(f'meft: {field}: "{value}"', "there is no such choice", nearest(value, words))
        for field, least in {**LEAST, "cap": self.cap and self.probes}.items():
            if not least <= (value := getattr(self, field)) < math.inf:  # which no NaN is
                raise BadInput(f"meft: {field}: {value}", f"it must be {least} or more",
                               f"Set {field}: {getattr(Meft, field)}")  # fmt: skip
        if not 0 < self.scale < math.inf:
            raise BadInput(f"meft: scale: {self.scale}", "it must be above 0", f"Set scale: {Meft.scale}")
        routing.check(self)
        if self.semantics == "union" and self.router in routing.TRAINED:
            have = "algorithm 1 has no gate: a token uses pairs of experts that it did not probe"
            raise BadInput(f"meft: semantics: union with router: {self.router}", have, "Set router: centroid")
        if self.experts is not None and not 1 <= self.experts <= self.r:
            raise BadInput(f"meft: experts: {self.experts}", f"there are {self.r} pairs", "Use fewer, or omit it")
        if self.experts:
            block = math.ceil(self.r / self.experts)
        else:  # fine enough that a large batch touches less than half, and K candidates a token
            block = min(self.r, max(math.ceil(self.k / self.probes), round(math.sqrt(self.r) / 12)))
        return math.ceil(self.r / block), block


class MeftSurgery(BesideSurgery):
    adapters: dict[str, Adapter]

    def __init__(self, patch: Meft, model: PreTrainedModel):
        super().__init__(patch, model)
        self.stores = []
        self.words = Words()  # of router: stable
        if patch.router == "stable":
            embeddings = model.get_input_embeddings()
            if model.config.is_encoder_decoder:
                raise BadInput(
                    "meft: router: stable", "an encoder and a decoder see different words", "Use router: gate"
                )
            self.words_width = embeddings.weight.shape[1]
            self.swaps.hook(embeddings.register_forward_hook(self.words))

    def begin(self, steps: int) -> None:
        for adapter in self.adapters.values():
            if isinstance(router := adapter.router, StableRouter):
                router.last = math.ceil(routing.setting(self.patch, "first_stage") * steps)

    def penalty(self) -> Tensor | None:
        """The losses of the routers in the newest pass, which have gradients only once."""
        losses: list[Tensor] = []
        for adapter in self.adapters.values():
            if adapter.router_loss is not None:
                losses.append(adapter.router_loss)
            elif adapter.training and adapter.router.has_loss and torch.is_grad_enabled():
                have = "the first forward pass has no gradients, so the router's loss has none"
                asked = f"meft: router: {self.patch.router} with this checkpointing"
                raise BadInput(asked, have, "Set use_reentrant: false")
            adapter.router_loss = None
        return torch.stack(losses).sum() if losses else None

    def revert(self) -> None:
        super().revert()
        for store in self.stores:
            store.drop()

    def own_tensors(self) -> dict[str, Tensor]:
        """`keys`, `values` (experts, block, hidden) and a trained `router` (experts, hidden) are views of tables."""
        own: dict[str, Tensor] = {}
        for name, adapter in self.adapters.items():
            for store in adapter.stores:
                store.catch_up()
            table, width = adapter.store.whole(), adapter.width
            own |= {f"{name}.keys": table[..., :width], f"{name}.values": table[..., width:]}
            if adapter.router.table is not None:
                own[f"{name}.router"] = adapter.router.table.whole()
            own |= {f"{name}.{key}": tensor for key, tensor in adapter.router.own_tensors().items()}
            own[f"{name}.anchor"] = adapter.trained
        return own

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for name, adapter in self.adapters.items():
            for store, key in zip(adapter.stores, ("keys", "router", "words"), strict=False):
                if not store.holds(tensors[f"{name}.{key}"]):
                    store.changed(range(store.rows))
        settle(self.stores)
        for store in self.stores:
            store.rewritten()


class Adapter(RowPatch):
    """s * ReLU(g h W_A[S]) W_B[S], added to y; the pairs are rows of `store`, not parameters of the module.

    `tables`: the rows of a trained router. `prefetcher`: of the model's layers, if rows are prefetched. `words`: for a
    router that chooses by them.
    """

    def __init__(
        self, patch: Meft, store: TieredStore, *tables: TieredStore, prefetcher: ExpertPrefetcher | None = None,
        words: Words | None = None,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.store, self.width = patch, store, store.shape[1] // 2
        self.router = routing.make(patch, store, *tables, words=words)
        self.router_loss: Tensor | None = None  # of the newest pass
        self.stores = self.router.stores
        for each in self.stores:
            RowAdam(each, patch.adam)
        self.probes = self.router.probes
        self.kept = min(patch.k, self.probes * store.shape[0])
        self.trained = nn.Parameter(torch.zeros(0, device=store.model_device))  # stands for the rows
        self.prefetcher = prefetcher if store.reader is not None else None
        self.number = self.prefetcher.join(self.router) if self.prefetcher is not None else 0

    def after_step(self, step: int, changed: Sequence[list[int]]) -> None:
        self.router.after_step(step, changed)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        if not self.enabled:
            return y
        self.begin()
        with _exact(h):
            out, loss = _Beside.apply(h, y, self.trained, self)
        if loss.requires_grad and not recomputing():
            self.router_loss = loss
        return out

    def match(
        self, h_TD: Tensor, gate_TP: Tensor | None, groups: Groups
    ) -> tuple[Rows | None, Tensor, tuple[Tensor, ...]]:
        """-> the rows that were fetched for it, and what `experts.fire` returns. With `retrieval: slow` it computes on
        the host and fetches no rows."""
        store, device = self.store, h_TD.device
        if self.patch.retrieval == "fast" or store.in_place or not store.needs_transfer:
            rows = store.fetch(groups.rows)
            return rows, *experts.fire(h_TD, gate_TP, groups, rows, self.kept)
        gate_TP = None if gate_TP is None else gate_TP.cpu()
        fired_TC, top = experts.fire(h_TD.cpu(), gate_TP, groups.to("cpu"), store.on_host(groups.rows), self.kept)
        store.traffic.down += h_TD.nbytes
        store.traffic.up += sum(tensor.nbytes for tensor in top)
        return None, fired_TC.to(device), tuple(tensor.to(device) for tensor in top)

    def rows(self, fetched: Rows | None, wanted: list[int]) -> Rows:
        """Of the experts `wanted`, from those that were fetched before, or fetched now."""
        return self.store.fetch(wanted) if fetched is None else fetched.of(wanted)

    def extra_repr(self) -> str:
        rows, block = self.store.rows, self.store.shape[0]
        return f"{self.width} -> {rows} experts x {block} pairs -> {self.width}, {self.probes} probed, {self.kept} kept"


def _exact(h: Tensor) -> Any:
    """Products are computed in the rows' precision, also under autocast."""
    return torch.autocast(h.device.type, enabled=False) if h.device.type != "meta" else contextlib.nullcontext()


class _Beside(torch.autograd.Function):
    """y + s * a_t[S_t] W_B[S_t]. The products are in fp32, the rows' precision, or in h's where that is wider."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, trained: Tensor, adapter: Adapter):
        h_in = h.reshape(-1, adapter.width)
        h_TD = h_in.to(torch.promote_types(h.dtype, torch.float32))
        routed = adapter.router.route(h_TD)
        probed_TP, gate_TP = routed[:2]
        groups = adapter.store.group(probed_TP)
        fetched, fired_TC, top = adapter.match(h_TD, gate_TP, groups)
        if adapter.patch.semantics == "union":
            pairs = experts.chosen_pairs(probed_TP, fired_TC, adapter.store)
            out_TD, fired = torch.zeros_like(h_TD), adapter.store.marked(pairs.any(1))
            for expert, row_BD in zip(fired, adapter.rows(fetched, fired), strict=True):
                fired_TB = experts.fire_all(h_TD, row_BD, pairs[expert])
                out_TD.addmm_(fired_TB, row_BD[:, adapter.width :].to(h_TD.dtype))
            ctx.save_for_backward(h_in, None, None, None, pairs)
        else:
            alive = adapter.store.group(probed_TP, experts.alive(fired_TC, adapter.probes))
            out_TD, fired = experts.out(h_TD, fired_TC, alive, adapter.rows(fetched, alive.rows)), alive.rows
            ctx.save_for_backward(h_in, probed_TP.to(torch.int32), gate_TP, routed.words_TE, *top)
        ctx.adapter, ctx.shape, ctx.below = adapter, h.shape, None
        if adapter.prefetcher is not None:
            ctx.below = adapter.prefetcher.record(adapter.number, LayerTrace(groups.rows, fired))
            ctx.recomputed = recomputing()
        loss = routed.loss
        if loss is None:
            ctx.mark_non_differentiable(loss := h.new_zeros(()))
        return torch.add(y, out_TD.view(y.shape), alpha=adapter.patch.scale).to(y.dtype), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_loss: Tensor):
        with _exact(grad):
            return _Beside.backwards(ctx, grad, grad_loss)

    @staticmethod
    def backwards(ctx: Any, grad: Tensor, grad_loss: Tensor):
        h_in, probed_TP, gate_TP, words_TE, *top = ctx.saved_tensors
        adapter: Adapter = ctx.adapter
        h_TD = h_in.to(torch.promote_types(h_in.dtype, torch.float32))
        grad_TD = grad.reshape(h_in.shape).to(h_TD.dtype)
        if adapter.patch.scale != 1.0:
            grad_TD = grad_TD * adapter.patch.scale
        grad_h = torch.zeros_like(h_TD) if ctx.needs_input_grad[0] else None
        if adapter.prefetcher is not None:
            adapter.prefetcher.backward_begins(adapter.number, ctx.below, ctx.recomputed)
        if adapter.patch.semantics == "union":
            experts.back_all(h_TD, grad_TD, grad_h, top[0], adapter.store)
        else:
            fired_TC = experts.spread(top, adapter.probes * adapter.store.shape[0])
            alive_TP = experts.alive(fired_TC, adapter.probes)
            groups = adapter.store.group(probed_TP.long(), alive_TP)
            grad_fired_TC = experts.back(h_TD, grad_TD, grad_h, fired_TC, gate_TP, groups)
            if gate_TP is not None:
                grad_TP = grad_fired_TC.mul_(fired_TC).unflatten(1, (adapter.probes, -1)).sum(-1)
                routed = Routed(probed_TP.long(), gate_TP, None, words_TE)
                adapter.router.back(h_TD, grad_h, routed, grad_TP, grad_loss)
        grad_h = None if grad_h is None else grad_h.to(h_in.dtype).view(ctx.shape)
        return grad_h, grad, torch.zeros_like(adapter.trained), None
