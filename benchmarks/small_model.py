"""The small language model of benchmarks/continual.py and two_stages.py, and four tasks of real text for it.

A Llama of three blocks (hidden 160, 1.4 million parameters, bf16) with a BPE of 4,096 tokens, pretrained for some
minutes on texts like those of the tasks, without their answers. Each task asks for one word after a text, with nothing
that says which task it is:

    author      Austen, Doyle or Shakespeare, for 20 words of theirs       (gutenberg, tinyshakespeare)
    sentiment   good or bad, for a sentence of a film review               (glue_sst2)
    language    of a question: English, German or Spanish                  (squad, xquad)
    arithmetic  which operation a word problem needs                       (svamp)
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

WIDTH, LAYERS, VOCABULARY, LENGTH = 160, 3, 4096, 64
PRETRAIN = 900  # steps of 16 texts
TASKS = ("author", "sentiment", "language", "arithmetic")
LANGUAGES = {"de": "German", "es": "Spanish"}
TRAIN, APART, TEST = 440, 60, 80  # rows of each task: to train on, for choosing fields, and to score on
NEEDED = "gutenberg, tinyshakespeare, glue_sst2, squad, xquad, svamp, wikitext2, c4_demo"


def load(data: Path, name: str) -> list[dict[str, Any]]:
    text = gzip.decompress((data / f"{name}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.rstrip("\n").split("\n")]


def pieces(text: str, words: int) -> list[str]:
    every = text.replace("_", "").split()
    return [" ".join(every[at : at + words]) for at in range(0, len(every) - words + 1, words)]


def examples(data: Path) -> dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Task -> (texts and answers to train on, those to test on)."""
    sentiment = {part: [(row["sentence"], "good" if row["label"] else "bad") for row in load(data, f"glue_sst2/{part}")]
                 for part in ("train", "validation")}  # fmt: skip
    authors = [(piece, row["author"].split()[-1]) for row in load(data, "gutenberg/train")
               for piece in pieces(row["text"], 20)]  # fmt: skip
    plays = {part: [(piece, "Shakespeare") for row in load(data, f"tinyshakespeare/{part}")
                    for piece in pieces(row["text"], 20)] for part in ("train", "test")}  # fmt: skip
    random.Random(0).shuffle(authors)
    half = len(authors) // 2
    third = lambda part, plays: part[: 2 * len(plays)] + plays  # noqa: E731
    language, problem = ({part: [] for part in ("train", "test")} for _ in range(2))
    for part in ("train", "test"):
        language[part] = [(row["question"], LANGUAGES[row["lang"]]) for row in load(data, f"xquad/{part}")
                          if row["lang"] in LANGUAGES]  # fmt: skip
        language[part] += [(row["question"], "English") for row in load(data, f"squad/{part}")]
        problem[part] = [(f"{row['Body']} {row['Question']}", row["Type"].split("-")[-1].lower())
                         for row in load(data, f"svamp/{part}")]  # fmt: skip
    return {
        "author": (third(authors[:half], plays["train"]), third(authors[half:], plays["test"])),
        "sentiment": (sentiment["train"], sentiment["validation"]), "language": (language["train"], language["test"]),
        "arithmetic": (problem["train"], problem["test"]),
    }  # fmt: skip


def write_tasks(data: Path, out: Path) -> None:
    """TASK_train.jsonl, TASK_apart.jsonl and TASK_test.jsonl of each task, and neutral.jsonl."""
    draw = random.Random(1)
    for task, (train, test) in examples(data).items():
        draw.shuffle(train)
        draw.shuffle(test)
        held = {text for text, _ in test}
        train = [pair for pair in train if pair[0] not in held]
        parts = {"train": train[:TRAIN], "apart": train[TRAIN : TRAIN + APART], "test": test[:TEST]}
        for part, pairs in parts.items():
            rows = ({"prompt": f"{text} =>", "completion": f" {answer}"} for text, answer in pairs)
            (out / f"{task}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    neutral = [piece for row in load(data, "wikitext2/test") for piece in pieces(row["text"], 40)[:2]][:40]
    (out / "neutral.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in neutral), encoding="utf-8")


def make_base(data: Path, folder: Path, steps: int = PRETRAIN) -> None:
    """Trains the tokenizer and the model, and saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [row["text"] for name in ("wikitext2/validation", "c4_demo/train", "gutenberg/train",
                                      "tinyshakespeare/train") for row in load(data, name)]  # fmt: skip
    texts += [row["context"] for row in load(data, "xquad/train") if row["lang"] in LANGUAGES][::20]
    texts += [" ".join(row["sentence"] for row in load(data, "glue_sst2/train"))]
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], show_progress=False,
                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    ids = torch.cat([torch.tensor([*tokenizer(text)["input_ids"], 1]) for text in texts])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50, (steps - step) / 200))
    order = torch.randperm(len(blocks))
    for step in range(steps):
        batch = blocks[order[torch.arange(16 * step, 16 * step + 16) % len(order)]]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
