"""Stacked experts in pieces: the library's own numbers, and few shapes of products."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.model.fused_experts import EXPERTS, LAST, pieces, rows_by_expert
from trimtab.model.fused_ops import fuse_ops

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
FAMILIES = {  # gate and up in one; the same under another name; interleaved, transposed, with biases
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


def mixture(family: str, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    config = getattr(T, f"{family}Config")(**SMALL, **FAMILIES[family])
    return getattr(T, f"{family}ForCausalLM")(config).to(dtype).requires_grad_(False)


def passed(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embedded tokens."""
    ids = torch.randint(0, 128, (4, 70), generator=torch.Generator().manual_seed(1))
    embedded = model.get_input_embeddings().weight[ids].detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits.float()
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("rows", [0, 1, 5, 63, 64, 65, 127, 300, 1000])
def test_pieces_cover_the_rows_and_have_few_sizes(rows):
    found = list(pieces(7, 7 + rows))
    assert {row for piece in found for row in range(piece.start, piece.stop)} == set(range(7, 7 + rows))
    assert all((piece.stop - piece.start).bit_count() == 1 for piece in found)
    assert rows < LAST or all(piece.stop - piece.start >= LAST for piece in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_the_librarys(family):
    model = mixture(family)
    own = passed(model)
    swaps = fuse_ops(model, ops=("experts",))
    assert model.config._experts_implementation == EXPERTS
    ours = passed(model)
    swaps.undo()
    assert model.config._experts_implementation == "grouped_mm"
    assert all(torch.equal(a, b) for a, b in zip(own, ours, strict=True))


def test_each_row_meets_its_experts_weight():
    x, weight = torch.randn(200, 8).bfloat16().requires_grad_(), torch.randn(3, 8, 5).bfloat16()
    ends = torch.tensor([70, 70, 200])  # the second expert has none
    out = rows_by_expert(x, weight, ends)
    wanted = torch.cat([x[:70] @ weight[0], x[70:] @ weight[2]])
    slope = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, slope)
    (own,) = torch.autograd.grad(wanted, x, slope)
    assert torch.allclose(out, wanted, atol=1e-2) and torch.allclose(ours, own, atol=1e-2)


class Rows(TorchDispatchMode):
    """How many rows the products have."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default):
            self.seen.add(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def test_products_have_few_shapes_whatever_the_routing():
    model = mixture("Mixtral")
    swaps = fuse_ops(model, ops=("experts",))
    with torch.no_grad(), Rows() as rows:
        for seed in range(6):
            ids = torch.randint(0, 128, (3, 50), generator=torch.Generator().manual_seed(seed))
            model(input_ids=ids)
    swaps.undo()
    rows.seen.discard(150)  # the head, and the linears of attention
    assert rows.seen <= {2**power for power in range(9)}


@pytest.mark.parametrize("case", ["fp32", "trained"])
def test_others_are_left_to_the_library(case):
    model = mixture("Mixtral", torch.float32 if case == "fp32" else torch.bfloat16)
    if case == "trained":
        model.model.layers[0].mlp.experts.requires_grad_(True)
    swaps = fuse_ops(model, ops=("experts",))
    passed(model)
    swaps.undo()
    assert case == "fp32" or model.model.layers[0].mlp.experts.down_proj.grad is not None


def test_a_model_without_experts_keeps_its_setting():
    model = T.LlamaForCausalLM(T.LlamaConfig(**SMALL)).bfloat16()
    had = getattr(model.config, "_experts_implementation", None)
    swaps = fuse_ops(model)
    assert getattr(model.config, "_experts_implementation", None) == had
    swaps.undo()
