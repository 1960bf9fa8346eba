"""Embedding pruning against references that hold the whole vocabulary, and what it counts, keeps and refuses."""

from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from conftest import MODELS, logits, tiny_batch
from helpers_load import tiny_tokenizer
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.methods.causal_lm import CausalLM
from trimtab.methods.embedding_pruning import EmbeddingPruning
from trimtab.methods.full import Full
from trimtab.model import vocabulary
from trimtab.model.head import READ, read_head
from trimtab.model.kept_rows import IDS, KEPT, among_kept
from world import PLACE, same, snapshot, values

V = 128
SOME = torch.arange(20, 60)  # ids that the data have
causal = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # tied; not tied; tied, scaled and capped


def batch_of(seed: int = 1, rows: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = SOME[torch.randint(0, len(SOME), (rows, tokens), generator=random)]
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def put(model: nn.Module, place: Place = PLACE, **fields):
    surgery = EmbeddingPruning(**fields).apply(model, place)
    surgery.calibrate([{"input_ids": SOME[None]}])
    return surgery


def kept(model: nn.Module) -> torch.Tensor:
    return getattr(model.get_input_embeddings(), IDS)


# --- logits ----------------------------------------------------------------------------------------------------------


@causal
@pytest.mark.parametrize("softmax", ["exact", "kept"])
@pytest.mark.parametrize("train", [False, True])
def test_logits_of_kept_ids_are_bit_equal(family, softmax, train):
    """With and without gradients, of frozen rows and of rows that may change, and for one row of one token too."""
    model, whole = MODELS[family](3), MODELS[family](3)
    put(model, softmax=softmax)
    for parameter in model.parameters():
        parameter.requires_grad_(train)
    ids = kept(model)
    assert len(ids) == 64 and model.get_input_embeddings().weight.shape == (64, 64)
    for batch in (batch_of(), batch_of(2, 1, 1)):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                ours, theirs = (m(input_ids=batch["input_ids"]).logits for m in (model, whole))
                assert ours.shape == theirs.shape and torch.equal(ours[..., ids], theirs[..., ids])
                others = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
                if softmax == "exact" or not torch.is_grad_enabled():
                    assert torch.equal(ours[..., others], theirs[..., others])
                else:
                    limit = -torch.inf if family != "gemma2" else -model.config.final_logit_softcapping
                    assert (ours[..., others] == limit).all()


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_encoder_without_a_head(family):
    model, whole = MODELS[family](3), MODELS[family](3)
    put(model)
    batch = {key: batch_of()[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(logits(model, batch), logits(whole, batch))
    assert torch.equal(logits(model, tiny_batch(model)), logits(whole, tiny_batch(whole))), "ids that were not counted"


@causal
@pytest.mark.parametrize("fields", [{}, {"smoothing": 0.2}, {"dft": True}])
@pytest.mark.parametrize("chunk", [5, None])
def test_the_exact_loss_is_the_whole_model_s(family, fields, chunk):
    """Loss, count, and the gradients of all weights; the table's, of the kept rows. Targets may lie outside them."""
    model, whole = MODELS[family](4), MODELS[family](4)
    put(model)
    batch = batch_of()
    batch["labels"][0, 3] = batch["input_ids"][0, 3] = 100  # not kept
    objective = CausalLM(chunk=chunk, **fields)
    assert 100 not in kept(model).tolist()
    (ours, correct, seen), (theirs, *counts) = objective.loss(model, batch), objective.loss(whole, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and [int(correct), int(seen)] == list(map(int, counts))
    ours.backward()
    theirs.backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = wanted[name].grad
        grad = grad[kept(model)] if grad.shape != parameter.shape else grad
        assert torch.allclose(parameter.grad, grad, atol=2e-6), name
        assert grad.any(), name


@causal
@pytest.mark.parametrize("frozen", [False, True])
def test_the_kept_loss_is_over_kept_ids(family, frozen):
    model, whole = MODELS[family](4), MODELS[family](4)
    put(model, softmax="kept")
    batch, ids = batch_of(), kept(model)
    if frozen:
        for each in (model, whole):
            each.get_input_embeddings().weight.requires_grad_(False)
            each.get_output_embeddings().weight.requires_grad_(False)
    place_of = {int(at): row for row, at in enumerate(ids)}
    scores = whole(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][..., ids]
    target = torch.tensor([[place_of.get(int(t), -100) for t in row] for row in batch["labels"][:, 1:]])
    wanted = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-100)
    loss = CausalLM(chunk=4).loss(model, batch).value
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss.backward()
    wanted.backward()
    for ours, theirs in zip(model.model.layers.parameters(), whole.model.layers.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=2e-6)
    assert (model.get_input_embeddings().weight.grad is None) == frozen
    with torch.no_grad():  # evaluation is over all ids
        loss, plain = (CausalLM().loss(each, batch).value for each in (model, whole))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_head_with_a_bias():
    model, whole = MODELS["qwen2"](5), MODELS["qwen2"](5)
    offset = torch.randn(V)
    for each in (model, whole):
        each.lm_head.bias = nn.Parameter(offset.clone())
    put(model)
    batch = batch_of()
    ours, theirs = (CausalLM(chunk=4).loss(each, batch).value for each in (model, whole))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.allclose(model.lm_head.bias.grad, whole.lm_head.bias.grad, atol=2e-6)
    assert torch.equal(logits(model, batch), logits(whole, batch))


# --- rows ------------------------------------------------------------------------------------------------------------


@causal
def test_a_tied_head_stays_tied_and_is_one_parameter(family):
    model = MODELS[family]()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    surgery = put(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied == (family != "qwen2")
    assert len(surgery.tables) == 1 + (not tied)
    assert getattr(model.get_output_embeddings(), KEPT) is surgery.tables[-1]


@pytest.mark.parametrize("slow", ["disk", "ram"])
@causal
def test_the_whole_table_leaves_fast_memory_and_comes_back(family, slow, tmp_path):
    model = MODELS[family]()
    before, weights = snapshot(model), values(model)
    place = Place(fast="cpu", slow=slow, folder=str(tmp_path))
    surgery = put(model, place)
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert len(surgery.in_slow_tier) == (len(surgery.tables) if slow == "disk" else 0)
    size = 64 * 64 * 4 * (1 if slow == "disk" else -1)
    model.requires_grad_(False)
    assert list(surgery.saves().values()) == [size] * len(surgery.tables)
    model.requires_grad_(True)
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_full_trains_kept_rows_only_and_others_stay(family):
    """Six steps of AdamW: the merged model is the one that plain training of all weights gives, for kept ids."""
    model, whole = MODELS[family](6), MODELS[family](6)
    below = put(model)
    above = Full(dtype="fp32").apply(model, PLACE)
    ids, original = kept(model).clone(), whole.get_input_embeddings().weight.detach().clone()
    for each in (model, whole):
        trained = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for step in range(6):
            batch = batch_of(step)
            if family == "bert":
                batch["labels"] = torch.tensor([0, 1, 2])
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        table = each.get_input_embeddings().weight
        assert len(optimizer.state[table]["exp_avg"]) == len(table) == (len(ids) if each is model else V)
    others = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
    above.merge()
    below.merge()
    ours, theirs = model.get_input_embeddings().weight, whole.get_input_embeddings().weight
    assert ours.shape == theirs.shape and torch.equal(ours[others], original[others])
    if family == "bert":  # no head, and so no gradient for rows that do not occur
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours[SOME], original[SOME], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_ids_without_a_row(family):
    model, whole = MODELS[family](), MODELS[family]()
    batch = {"input_ids": torch.tensor([[20, 21, 100, 101, 100, 22]])}
    surgery = put(model, unseen="fetch")
    ids = batch["input_ids"][0]
    assert torch.equal(model.get_input_embeddings()(ids), whole.get_input_embeddings()(ids))
    surgery.revert()
    put(model, unseen="error")
    with pytest.raises(BadInput, match="embed the token 100"):
        model(**batch)


def test_an_unknown_id_is_read_as_unk():
    model = MODELS["llama"]()
    with pytest.raises(BadInput, match="no unknown token"):
        put(model, unseen="unk")
    model.trimtab_tokenizer = tiny_tokenizer()
    surgery = put(model, unseen="unk")
    table = model.get_input_embeddings()
    assert 0 in kept(model).tolist() and torch.equal(table(torch.tensor([101])), table(torch.tensor([0])))
    surgery.revert()


def test_gradients_reach_known_rows_beside_fetched_ones():
    model, whole = MODELS["llama"](), MODELS["llama"]()
    put(model)
    ids = torch.tensor([[20, 100, 21, 20]])
    for each in (model, whole):
        each.get_input_embeddings()(ids).square().sum().backward()
    grad = whole.get_input_embeddings().weight.grad[kept(model)]
    assert torch.allclose(model.get_input_embeddings().weight.grad, grad)


def test_the_padding_row_gets_no_gradient():
    model = MODELS["bert"]()
    put(model)
    table = model.get_input_embeddings()
    assert kept(model)[table.padding_idx] == 0
    table(torch.tensor([[0, 20]])).sum().backward()
    assert not table.weight.grad[table.padding_idx].any() and table.weight.grad.any()


# --- what is counted and kept ----------------------------------------------------------------------------------------


def test_ragged_rows_are_counted_in_parts():
    rows = [[1, 2, 3], [3], [], [3, 5, 5, 5]] * 900
    counts = vocabulary.count_tokens(datasets.Dataset.from_dict({"input_ids": rows}), 8)
    assert counts.tolist() == [0, 900, 900, 2700, 0, 2700, 0, 0]
    assert vocabulary.coverage(counts).endswith("all 4 100.0% of the tokens")
    many = torch.arange(200, 0, -1)
    assert f"100 {float(many[:100].sum() / many.sum()):.1%}, all 200" in vocabulary.coverage(many)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<0x0A>": 1, "word": 2, "a": 3, "Ġ": 4, "é": 5, "日": 6, "other": 7, "<s>": 8}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), unk_token="<unk>")
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<tool>"]})
    made.add_tokens(["added"])
    return made


def test_special_added_byte_and_config_ids_are_always_kept():
    model = MODELS["llama"]()
    model.config.image_token_id, model.generation_config.suppress_tokens = 90, [91, 92]
    model.config.eos_token_id = [2, 93]
    model.config.max_new_tokens = 94  # no id
    model.trimtab_tokenizer = tokenizer = bytes_tokenizer()
    always = vocabulary.always_used(model, V).tolist()
    added = tokenizer.convert_tokens_to_ids(["<tool>", "added"])
    assert always == sorted({0, 1, 2, 3, 4, 5, 8, 90, 91, 92, 93, *added}), "pad, bos and eos of the config among them"
    assert set(always) <= set(put(model) and kept(model).tolist())


def test_rows_limits_what_is_kept_to_the_most_frequent():
    model = MODELS["llama"]()
    surgery = EmbeddingPruning(rows=64).apply(model, PLACE)
    counts = torch.arange(V)
    surgery.calibrate([{"input_ids": torch.arange(V).repeat_interleave(counts)}])
    assert kept(model).tolist() == [0, 1, 2, *range(67, 128)] and surgery.patch.rows == 64
    surgery.revert()
    model.generation_config.suppress_tokens = list(range(100))
    with pytest.raises(BadInput, match="100 special, added and byte tokens"):
        EmbeddingPruning(rows=64).apply(model, PLACE).calibrate([{"input_ids": SOME[None]}])


def test_a_plan_counts_what_calibration_keeps():
    model, twin = MODELS["llama"](), MODELS["llama"]()
    counts = torch.bincount(SOME.repeat(3), minlength=V)
    patch, (first, second) = EmbeddingPruning().counted(twin, counts)
    surgery = put(model)
    assert patch == surgery.patch and patch.rows == 64
    assert "40 of 128 ids occur in 120 tokens" in first and "64 rows are kept" in first
    assert second.startswith("coverage")
    again = patch.apply(twin, PLACE)
    again.calibrate([{"input_ids": SOME[None]}])
    assert torch.equal(kept(twin), kept(model))


def test_probes_use_ids_that_are_kept():
    model = MODELS["llama"]()
    ids = torch.arange(V)
    assert among_kept(model, ids) is ids
    put(model, unseen="error")
    assert set(among_kept(model, ids).tolist()) == set(kept(model).tolist())


def test_the_head_is_read_as_that_of_the_whole_model():
    model, whole = MODELS["gemma2"](), MODELS["gemma2"]()
    put(model)
    ours, theirs = read_head(model), read_head(whole)
    assert (ours.scale, ours.softcap, ours.words) == (theirs.scale, theirs.softcap, theirs.words)
    assert not hasattr(model, READ)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_ids_that_were_never_counted():
    model = MODELS["llama"]()
    before = snapshot(model)
    surgery = EmbeddingPruning().apply(model, PLACE)
    for use in (lambda: model(**batch_of()), surgery.own_tensors):
        with pytest.raises(BadInput, match="never counted"):
            use()
    surgery.revert()
    assert snapshot(model) == before
    tensors = put(MODELS["llama"]()).own_tensors()
    empty = {key: torch.zeros_like(t) for key, t in tensors.items()}
    with pytest.raises(BadInput, match="never counted"):
        EmbeddingPruning().apply(model, PLACE).load_tensors(empty)


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.zeros(2, 0, dtype=torch.int64)}]])
def test_empty_text(batches):
    with pytest.raises(BadInput, match="no tokens to count"):
        EmbeddingPruning().apply(MODELS["llama"](), PLACE).calibrate(batches)


def test_a_mask_of_another_model_or_tokenizer():
    model, other = MODELS["llama"](), MODELS["llama"]()
    tensors = {key: t.clone() for key, t in put(model).own_tensors().items()}
    short = {key: t[:-1] if key.endswith("kept") else t for key, t in tensors.items()}
    fresh = EmbeddingPruning().apply(other, PLACE)
    with pytest.raises(BadInput, match="a mask of 128 ids"):
        fresh.load_tensors(short)
    fresh.load_tensors(tensors)  # a tokenizer that is not known
    assert torch.equal(kept(other), kept(model))
    marks = []
    for tokenizer in (tiny_tokenizer(), bytes_tokenizer()):
        model = MODELS["llama"]()
        model.trimtab_tokenizer = tokenizer
        marks.append((model, put(model), {k: t.clone() for k, t in model and put(MODELS["llama"]()).saved.items()}))
    with pytest.raises(BadInput, match="another tokenizer"):
        marks[0][1].load_tensors(marks[1][1].own_tensors())


def test_other_ids_than_those_that_are_trained_already():
    model, other = MODELS["llama"](), MODELS["llama"]()
    surgery = put(model)
    different = EmbeddingPruning().apply(other, PLACE)
    different.calibrate([{"input_ids": torch.arange(V - 40, V)[None]}])
    Full().apply(model, PLACE)
    surgery.load_tensors({key: t.clone() for key, t in surgery.own_tensors().items()})  # the same: resumed
    with pytest.raises(BadInput, match="the run began with"):
        surgery.load_tensors(different.own_tensors())


@pytest.mark.parametrize("fields,message", [({"rows": 0}, "at least one row"), ({"unseen": "unk"}, "no unknown token")])
def test_bad_fields(fields, message):
    with pytest.raises(BadInput, match=message):
        EmbeddingPruning(**fields).apply(MODELS["llama"](), PLACE)


def test_an_embedding_that_shares_its_weight_with_more():
    model = MODELS["llama"]()
    model.model.extra = nn.Linear(64, V, bias=False)
    model.model.extra.weight = model.get_input_embeddings().weight
    with pytest.raises(BadInput, match="shares its weight"):
        put(model)
    model = MODELS["llama"]()
    model.set_input_embeddings(nn.EmbeddingBag(V, 64))
    with pytest.raises(BadInput, match="not a plain table"):
        put(model)
