"""Generation shared by the verbs: what a prompt's batch changes of an answer (nothing), and what it leaves behind."""

from __future__ import annotations

import torch

from conftest import MODELS
from tiny import tiny_tokenizer
from trimtab.model.sampling import sample

PROMPTS = ["which city is", "where is the country of a city in", "name the city of the country of a user"]


def test_an_answer_does_not_depend_on_its_batch():
    model, tokenizer = MODELS["llama"](), tiny_tokenizer()
    together = list(sample(model, tokenizer, PROMPTS, max_new_tokens=6))
    assert together == [next(sample(model, tokenizer, [prompt], max_new_tokens=6)) for prompt in PROMPTS]
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert together[0] == tokenizer.decode(ids[0, -6:], skip_special_tokens=True).strip()


def test_the_head_reads_one_piece_and_has_no_hook_afterwards():
    model = MODELS["llama"]()
    seen = []
    watch = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    list(sample(model, tiny_tokenizer(), PROMPTS, max_new_tokens=3))
    assert len(seen) == 3 and all(h.is_contiguous() and h.shape == (3, 1, 64) for h in seen)
    watch.remove()
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks
