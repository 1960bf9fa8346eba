"""KV-cache eviction on SmolLM2-135M (bf16): time of a token behind a long context, memory, and what eviction costs.

Speed: one token after the other behind a random cache of 131,072 tokens: transformers' default cache, our full cache,
and CAKE with 1,024 tokens per layer, in alternating fresh processes.

Quality: the prompt is read once; then each policy evicts down to equal bytes, 3.2 % and 10 % of the full cache, and the
same continuation is scored (`--data FOLDER` with wikitext2) or a needle is asked for, before or after the eviction is
decided (question within the prompt, or after it). KL is to the model with its full cache, in nats per token. Pairs of
policies are compared on the same texts, with bootstrap intervals.

    python benchmarks/kv_cache.py --data FOLDER [--quick] [--rounds 3] [--parts speed,memory,quality] [--json FILE]
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, alternate, arguments, conclude, itself, options, ratios, say, spread  # noqa: E402

MIB = 2**20
CONTEXT, KEPT, TOKENS = 131_072, 1024, {"default": 5, "full": 10, "cake": 160}
POLICIES: dict[str, dict[str, Any]] = {
    "cake": {}, "snapkv": {}, "pyramidkv": {}, "tova": {}, "streaming_llm": {}, "cake, 8 bits": {"bits": 8},
    "cake, 4 bits": {"bits": 4},
}  # fmt: skip
SHARES = (0.032, 0.1)
LENGTHS, SCORED = (2048, 4096, 7900), 128
TARGETS = {
    "decode_to_default": [">=", 30], "decode_to_full": [">=", 10], "peak_to_budget": ["<=", 1.05],
    "kl_cake_to_snapkv": ["<=", 1.0], "kl_cake_to_pyramidkv": ["<=", 1.0],
}  # fmt: skip
CLAIM = (
    "Behind 131,072 tokens, SmolLM2-135M generates at least 30 times as fast with CAKE (1,024 tokens a layer) as with "
    "transformers' default cache, and 10 times as fast as with a full cache reserved once; the cache never exceeds its "
    "budget and one chunk; and at equal bytes CAKE is at least as near to the full cache as SnapKV and PyramidKV."
)
NOTES = [
    "decode: seconds of a token, the median over tokens and rounds; CAKE's is the mean over 160 tokens, evictions "
    "included. The cache is filled with random numbers.",
    "peak_to_budget: the largest size of CAKE's cache, evicting layers included, while a prompt of 7,900 tokens is "
    "read in chunks of 1,024 and 64 tokens are generated, over its budget in bytes and one layer's chunk.",
    "KL: mean over the scored tokens of KL(full || evicted), then over texts. kl_cake_to_...: ratio of means at 3.2 %; "
    "with 8 and 4 bits, more tokens stay in the same bytes.",
    "needles: of those that the model finds with its full cache, the share found; 'aware': the question is part of the "
    "prompt that is judged, 'agnostic': it comes after the eviction.",
]


def load() -> tuple[Any, Any]:
    from trimtab.model.load import load_model

    model, tokenizer = load_model("smollm2-135m")
    return model.eval(), tokenizer


# --- speed and memory ------------------------------------------------------------------------------------------------


def speed(job: dict[str, Any]) -> None:
    """A child: seconds of each token behind a random cache."""
    import torch
    from transformers import DynamicCache

    from trimtab import methods
    from trimtab.model.kv_cache import KeptCache, attending

    model, _ = load()
    config = model.config
    heads, width, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    kept = KEPT if job["side"] == "cake" else job["context"]
    if job["side"] == "default":
        cache = DynamicCache(config=config)
    else:
        policy = methods.find("cake")(budget=KEPT) if job["side"] == "cake" else methods.find("full_cache")()
        cache = KeptCache(layers, policy)
        cache.expect([(0, job["context"])], job["tokens"])
    with torch.no_grad(), attending(model, cache):
        for layer in range(layers):
            numbers = torch.randn(2, 1, heads, kept, width, dtype=torch.bfloat16) * 0.3
            cache.update(numbers[0], numbers[1], layer)
            if job["side"] != "default":
                cache.layers[layer].seen = cache.layers[layer].rows[0].seen = job["context"]
        times = []
        for step in range(job["tokens"]):
            began = time.perf_counter()
            places = torch.tensor([[job["context"] + step]])
            model(input_ids=torch.tensor([[7]]), position_ids=places, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - began)
    one = statistics.mean(times[8:]) if job["side"] == "cake" else statistics.median(times[1:])
    say("result", {"seconds": one})


def memory(job: dict[str, Any]) -> None:
    """A child: the largest size of CAKE's cache over its budget and a chunk."""
    import torch

    from trimtab import methods
    from trimtab.model.kv_cache import KeptCache, attending
    from trimtab.model.sampling import complete

    model, tokenizer = load()
    layers, chunk, held = model.config.num_hidden_layers, 1024, [0]
    budget = job["budget"]
    cache = KeptCache(layers, methods.find("cake")(budget=f"{budget}B", chunk=chunk))
    after = KeptCache.attended

    def watched(self: Any, number: int, new: int) -> None:
        held[0] = max(held[0], self.nbytes)
        after(self, number, new)

    KeptCache.attended = watched  # type: ignore[method-assign]
    ids = torch.randint(5, 40_000, (1, job["prompt"]), generator=torch.Generator().manual_seed(0))
    with attending(model, cache):
        complete(model, tokenizer, ids, torch.ones_like(ids), cache=cache, max_new_tokens=64, min_new_tokens=64)
    row = cache.layers[0].rows[0]
    say("result", {"peak": held[0], "allowed": budget + min(chunk, job["prompt"]) * row.token_bytes, "budget": budget,
                   "end": cache.nbytes})  # fmt: skip


# --- quality ---------------------------------------------------------------------------------------------------------


class Texts:
    """Prompts of one length with continuations, from WikiText articles joined."""

    def __init__(self, data: Path, tokenizer: Any, split: str):
        lines = gzip.decompress((data / "wikitext2" / f"{split}.jsonl.gz").read_bytes()).decode().splitlines()
        words = "\n".join(json.loads(line)["text"] for line in lines).replace(" <unk>", " it")
        self.tokenizer, self.ids = tokenizer, tokenizer(words)["input_ids"]

    def continuations(self, length: int, count: int) -> Iterator[list[int]]:
        whole, step = length + SCORED, (len(self.ids) - length - SCORED) // max(1, count - 1)
        yield from (self.ids[at * step : at * step + whole] for at in range(count))

    def needles(self, length: int, count: int) -> Iterator[tuple[list[int], list[int], str]]:
        """(context with the needle, question, answer)"""
        draw = random.Random(length)
        for _ in range(count):
            number, town = str(draw.randint(10_000, 99_999)), draw.choice(["Lima", "Oslo", "Cairo", "Seoul", "Quito"])
            fact = self.tokenizer(f"\nThe secret number of {town} is {number}. Remember it.\n")["input_ids"]
            asks = self.tokenizer(f"\nQuestion: What is the secret number of {town}?\nAnswer: The secret number of "
                                  f"{town} is")["input_ids"]  # fmt: skip
            start, room = draw.randrange(len(self.ids) - length), length - len(fact) - len(asks)
            depth = int(room * draw.random())
            text = self.ids[start : start + room]
            yield text[:depth] + fact + text[depth:], asks, number


class Caches:
    """Reads a prompt once, then makes the cache that each policy would have left of it."""

    def __init__(self, model: Any):
        from trimtab import methods

        self.model, self.layers = model, model.config.num_hidden_layers
        self.find = methods.find
        self.scale = model.config.head_dim**-0.5

    def read(self, ids: list[int]) -> Any:
        """The full cache, with the newest queries of each layer."""
        from trimtab.model.kv_cache import KeptCache

        class Recording(self.find("full_cache")):  # type: ignore[misc, name-defined]
            queries = 32

        cache = KeptCache(self.layers, Recording(chunk=0))
        self.step(cache, ids)
        return cache

    def step(self, cache: Any, ids: list[int]) -> Any:
        """-> logits (T, V) of `ids`, which the cache then has."""
        import torch

        from trimtab.model.kv_cache import attending

        seen = cache.layers[0].seen
        places = torch.arange(seen, seen + len(ids))[None]
        with torch.no_grad(), attending(self.model, cache):
            out = self.model(input_ids=torch.tensor([ids]), position_ids=places, past_key_values=cache, use_cache=True,
                             logits_to_keep=min(len(ids), SCORED))  # fmt: skip
        return out.logits[0].float()

    def evicted(self, full: Any, name: str, share: float, prompt: int) -> Any:
        """A copy of `full` with what the policy keeps of it; nothing is evicted from it later."""
        from trimtab.model.kv_cache import KeptCache
        from trimtab.model.kv_rows import Row

        kind, fields = name.split(",")[0], POLICIES[name]
        first = full.layers[0].rows[0]
        size = int(share * prompt * self.layers * first.token_bytes)
        if kind == "streaming_llm":
            policy = self.find(kind)(window=max(1, int(share * prompt) - 4), **fields)
        else:
            window = {} if kind == "tova" else {"window": 16 if share * prompt < 80 else 32}
            ring = 0 if kind == "tova" else self.layers * first.queries[:, :1].nbytes * window["window"]
            one = self.layers * first.token_bytes  # the budget is for tokens alone, the same for all
            policy = self.find(kind)(budget=f"{size + ring + one}B", **fields, **window)
        cache = KeptCache(self.layers, policy)
        for layer, own in zip(cache.layers, full.layers, strict=True):
            old, row = own.rows[0], Row(policy.bits)
            row.append(old.keys, old.values)
            row.queries = old.queries[:, -policy.queries :] if policy.queries else None
            layer.rows, layer.is_initialized, layer.seen = [row], True, own.seen
            layer.scale, layer.width = self.scale, old.values.shape[2]
            layer.dtype, layer.device = old.keys.dtype, old.keys.device
            cache.attended(layer.number, row.new)
        cache.policy = self.find("full_cache")(bits=policy.bits)
        return cache

    def copy(self, cache: Any) -> Any:
        from trimtab.model.kv_cache import KeptCache

        new = KeptCache(self.layers, self.find("full_cache")(bits=cache.policy.bits))
        for layer, own in zip(new.layers, cache.layers, strict=True):
            layer.rows, layer.is_initialized, layer.seen = [own.rows[0].copy()], True, own.seen
            layer.width, layer.dtype, layer.device = own.width, own.dtype, own.device
        return new

    def reply(self, cache: Any, ids: list[int], tokens: int = 6) -> list[int]:
        made = []
        for _ in range(tokens):
            made.append(int(self.step(cache, ids)[-1].argmax()))
            ids = made[-1:]
        return made


def quality(job: dict[str, Any]) -> None:
    """A child: KL of each policy on each text, and needles found."""
    import torch

    torch.manual_seed(0)
    model, tokenizer = load()
    texts, caches = Texts(Path(job["data"]), tokenizer, "test"), Caches(model)
    kl: dict[str, list[float]] = {}
    for length, count in job["texts"].items():
        for ids in texts.continuations(int(length), count):
            prompt, rest = ids[: int(length)], ids[int(length) :]
            full = caches.read(prompt)
            sides = {f"{name} at {share:.1%}": caches.evicted(full, name, share, len(prompt))
                     for name in POLICIES for share in SHARES}  # fmt: skip
            own = caches.step(full, rest).log_softmax(-1)
            for name, cache in sides.items():
                other = caches.step(cache, rest).log_softmax(-1)
                kl.setdefault(name, []).append(float((own.exp() * (own - other)).sum(-1).mean()))
            print(f"{length}: " + ", ".join(f"{name} {of[-1]:.3f}" for name, of in kl.items()), flush=True)
    found: dict[str, list[int]] = {}
    for length, count in job["needles"].items():
        for context, asks, answer in texts.needles(int(length), count):
            right = lambda made, answer=answer: int(answer in tokenizer.decode(made).replace(" ", ""))  # noqa: E731
            for way in ("aware", "agnostic"):
                read, then = (context + asks[:-1], asks[-1:]) if way == "aware" else (context, asks)
                full = caches.read(read)
                sides = {f"{name} at {share:.1%}, {way}": caches.evicted(full, name, share, len(read))
                         for name in POLICIES for share in SHARES}  # fmt: skip
                found.setdefault(f"full, {way}", []).append(right(caches.reply(caches.copy(full), then)))
                for name, cache in sides.items():
                    found.setdefault(name, []).append(right(caches.reply(cache, then)))
    say("result", {"kl": kl, "needles": found})


def interval(one: list[float], other: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """-> the ratio of the means, with a 95 % bootstrap interval over texts."""
    draw, many, got = random.Random(0), len(one), []
    for _ in range(draws):
        at = [draw.randrange(many) for _ in range(many)]
        got.append(sum(one[i] for i in at) / sum(other[i] for i in at))
    got.sort()
    return sum(one) / sum(other), got[int(0.025 * draws)], got[int(0.975 * draws)]


WORKERS = {"speed": speed, "memory": memory, "quality": quality}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument(
        "--parts", default="speed,memory,quality", help="figures of other parts stay in the result file"
    )
    if (args := arguments(parser, lambda job: WORKERS[job["kind"]](job), needs_data=True)) is None:
        return
    before = json.loads((RESULTS / "kv_cache.json").read_text()) if (RESULTS / "kv_cache.json").is_file() else {}
    summary, rows = dict(before.get("summary", {})), {}
    for row in before.get("rows", []):
        rows.setdefault(row["part"], []).append(row)
    parts = args.parts.split(",")
    if "speed" in parts:
        context, rounds = (8192, 1) if args.quick else (CONTEXT, args.rounds)
        job = {"kind": "speed", "context": context}
        runs = alternate({side: lambda side=side, n=n: itself(__file__, {**job, "side": side, "tokens": n})
                          for side, n in TOKENS.items()}, rounds)  # fmt: skip
        for side in ("default", "full"):
            summary[f"decode_to_{side}"] = statistics.median(ratios(runs[side], runs["cake"], "seconds"))
        rows["speed"] = [{"cache": side, "context": context, "ms/token": spread([1000 * r["seconds"] for r in of])}
                         for side, of in runs.items()]  # fmt: skip
    if "memory" in parts:
        job = {"kind": "memory", "budget": 24 * MIB, "prompt": 2048 if args.quick else 7900}
        made = itself(__file__, job)
        summary["peak_to_budget"] = made["peak"] / made["allowed"]
        rows["memory"] = [
            {key: f"{value / MIB:.2f} MiB" for key, value in made.items() if not key.endswith(("_peak",))}
        ]
    if "quality" in parts:
        sizes = {"texts": {"2048": 2}, "needles": {"1024": 2}} if args.quick else \
            {"texts": {str(n): 8 for n in LENGTHS}, "needles": {"2048": 12, "4096": 8}}  # fmt: skip
        made = itself(__file__, {"kind": "quality", "data": args.data, **sizes}, timeout=7200)
        kl, found = made["kl"], made["needles"]
        rows["kl"], rows["needles"] = [], []
        for share in SHARES:
            for name in POLICIES:
                own, ref = kl[f"{name} at {share:.1%}"], kl[f"cake at {share:.1%}"]
                middle, low, high = interval(ref, own)
                rows["kl"].append({"policy": name, "cache": f"{share:.1%}", "KL": f"{statistics.mean(own):.4f}",
                                   "CAKE over it": f"{middle:.3f} [{low:.3f}, {high:.3f}]"})  # fmt: skip
                if name in ("snapkv", "pyramidkv"):
                    summary[f"kl_cake_to_{name}{'' if share == SHARES[0] else '_10'}"] = middle
        for way in ("aware", "agnostic"):
            able = found[f"full, {way}"]
            rows["needles"].append({"policy": f"full, {way}", "found": f"{sum(able)} of {len(able)}"})
            for name in sorted(key for key in found if key.endswith(f", {way}") and not key.startswith("full")):
                both = sum(a and b for a, b in zip(able, found[name], strict=True))
                rows["needles"].append({"policy": name, "found": f"{both} of {sum(able)}"})
    listed = [{"part": part, **row} for part, of in rows.items() for row in of]
    for row in listed:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    conclude(
        "kv_cache", args, summary, TARGETS, title="A KV cache within a budget", claim=CLAIM, rows=listed, notes=NOTES
    )


if __name__ == "__main__":
    main()
