"""What embedding pruning counts, keeps and refuses."""

from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from conftest import MODELS
from helpers_kept import SOME, V, batch_of, kept, put
from helpers_load import tiny_tokenizer
from trimtab.errors import BadInput
from trimtab.methods.embedding_pruning import EmbeddingPruning
from trimtab.methods.full import Full
from trimtab.model import vocabulary
from trimtab.model.head import READ, read_head
from trimtab.model.kept_rows import among_kept
from world import PLACE, snapshot


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
