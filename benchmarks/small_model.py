"""The small language model of benchmarks/continual.py and two_stages.py, and four tasks of real text for it.

A Llama of three blocks (hidden 160, 1.4 million parameters, bf16) with a BPE of 4,096 tokens, pretrained for some
minutes on texts like those of the tasks, without their answers. Each task asks for one word after a text and
the task's name:

    author      of 20 words: Austen, Doyle or Shakespeare                  (gutenberg, tinyshakespeare)
    genre       of a text: question, review, problem or play               (squad, glue_sst2, svamp, tinyshakespeare)
    language    of a question, one of seven                                (squad, xquad)
    asks        for a person, a time, a place or a number: by its first    (squad)
                words, "who", "when" or "what year", "where", "how many"
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

WIDTH, LAYERS, VOCABULARY, LENGTH = 160, 3, 4096, 64
PRETRAIN = 900  # steps of 16 texts
TASKS = ("author", "genre", "language", "asks")
LANGUAGES = {"ar": "Arabic", "de": "German", "es": "Spanish", "hi": "Hindi", "ru": "Russian", "zh": "Chinese"}
ASKS = {"who ": "person", "when ": "time", "what year": "time", "where ": "place", "how many": "number"}
TRAIN, APART, TEST = 440, 50, 40  # rows of each task: to train on, for choosing fields, and to score on
NEEDED = "gutenberg, tinyshakespeare, glue_sst2, squad, xquad, svamp, wikitext2, c4_demo"


def load(data: Path, name: str) -> list[dict[str, Any]]:
    text = gzip.decompress((data / f"{name}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.rstrip("\n").split("\n")]


def pieces(text: str, words: int) -> list[str]:
    every = text.replace("_", "").split()
    return [" ".join(every[at : at + words]) for at in range(0, len(every) - words + 1, words)]


def examples(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Task -> texts and answers, equally many of each answer (but for `asks`)."""
    books = [(piece, row["author"].split()[-1]) for row in load(data, "gutenberg/train")
             for piece in pieces(row["text"], 20)]  # fmt: skip
    plays = [piece for row in load(data, "tinyshakespeare/train") for piece in pieces(row["text"], 20)]
    questions = [row["question"] for row in (*load(data, "squad/train"), *load(data, "squad/test"))]
    problems = [f"{row['Body']} {row['Question']}" for row in load(data, "svamp/train")]
    genres = {
        "question": questions,
        "problem": problems,
        "play": plays,
        "review": [row["sentence"] for row in load(data, "glue_sst2/train") if len(row["sentence"]) > 40],
    }
    foreign = [(row["question"][:30], LANGUAGES[row["lang"]]) for row in load(data, "xquad/train")]
    asked = [(text, kind) for text in questions for first, kind in ASKS.items() if text.lower().startswith(first)]
    return {
        "author": alike([*books, *((piece, "Shakespeare") for piece in plays)]),
        "genre": alike([(text, genre) for genre, texts in genres.items() for text in texts]),
        "language": alike([*foreign, *((text, "English") for text in questions)]), "asks": asked,
    }  # fmt: skip


def alike(pairs: list[tuple[str, str]], most: int = 300) -> list[tuple[str, str]]:
    """Up to `most` pairs of each answer, drawn at random."""
    found: dict[str, list[tuple[str, str]]] = {}
    for pair in random.Random(0).sample(pairs, len(pairs)):
        found.setdefault(pair[1], []).append(pair)
    return [pair for of in found.values() for pair in of[: min(most, *map(len, found.values()))]]


def write_tasks(data: Path, out: Path) -> None:
    """TASK_train.jsonl, TASK_apart.jsonl and TASK_test.jsonl of each task, and neutral.jsonl."""
    for task, pairs in examples(data).items():
        drawn = random.Random(1).sample(pairs, len(pairs))
        pairs = list({text[:160]: answer for text, answer in drawn}.items())  # no text twice
        test, apart, train = pairs[:TEST], pairs[80 : 80 + APART], pairs[80 + APART :][:TRAIN]
        parts = {"train": train, "apart": apart, "test": test}
        for part, some in parts.items():
            rows = ({"prompt": f"{text} {task} =>", "completion": f" {answer}"} for text, answer in some)
            (out / f"{task}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    neutral = [piece for row in load(data, "wikitext2/test") for piece in pieces(row["text"], 40)[:2]][:20]
    (out / "neutral.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in neutral), encoding="utf-8")


def make_base(data: Path, folder: Path, steps: int = PRETRAIN) -> None:
    """Trains the tokenizer and the model, and saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [row["text"] for name in ("wikitext2/validation", "c4_demo/train", "gutenberg/train",
                                      "tinyshakespeare/train") for row in load(data, name)]  # fmt: skip
    texts += [row["context"] for row in load(data, "xquad/train") if row["lang"] in ("de", "es")][::20]
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


def base_of(args: argparse.Namespace, folder: Path) -> Path:
    """The folder with the tasks' rows and, in base/, the model: made in `folder`, or in --base unless it is there."""
    base = Path(args.base or folder / "data")
    base.mkdir(parents=True, exist_ok=True)
    write_tasks(Path(args.data), base)
    if not (base / "base" / "config.json").is_file():
        make_base(Path(args.data), base / "base", *([20] if args.quick else []))
    return base
