"""GGUF files of ours under a real llama.cpp: ids, greedy replies, adapters, logits of each family, and memory.

llama.cpp runs through `llama-cpp-python`, which is in no extra of trimtab. Give the interpreter of an environment apart
that has it: `python -m venv E && E/bin/pip install llama-cpp-python`.

A LoRA (rank 8 on all linears) trains on SmolLM2-135M for a few steps, on text about cities. The run is exported as gguf
and as gguf-lora, its base as gguf. The other side is transformers, and peft's own adapter, on the same base in fp32.

    python benchmarks/gguf_llama_cpp.py --llama-cpp E/bin/python [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from common import arguments, city_text, conclude, itself, options, say, trimtab  # noqa: E402

MIB, NEW = 2**20, 64
PROMPTS = ["The capital of France is", "Once upon a time there was", "Vienna is a city in", "def fibonacci(n):",
           "<|im_start|>user\nName three rivers.<|im_end|>\n<|im_start|>assistant\n",
           "To make bread you need flour, water and",
           "In 1969, two astronauts", "The opposite of hot is"]  # fmt: skip
TYPES = ["f32", "f16", "q8_0", "q4_0"]
TARGETS = {
    "same_tokens_merged": [">=", 64], "same_tokens_adapter": [">=", 64], "ids_that_differ": ["<=", 0],
    "growth_beyond_largest_mib": ["<=", 256], "worst_family_error": ["<=", 1e-2],
}  # fmt: skip
CLAIM = (
    "A merged run as an F16 GGUF file, and its adapter as a GGUF LoRA beside the F16 base, give under llama.cpp the "
    "greedy tokens of the same run under transformers and peft, 64 of 64 in the median prompt; writing takes at most "
    "the largest tensor and 256 MiB."
)
NOTES = [
    "same_tokens: how many of the 64 greedy tokens come before the first that differs, the median over the prompts; "
    "same_whole: the number of prompts of which all are equal. At F16, llama.cpp rounds the inputs of each product to "
    "16 bits and keeps a 16-bit cache; transformers computes in fp32.",
    "closest_call: of the first tokens that differ, the largest gap in logits between ours and llama.cpp's choice, by "
    "the fp32 model.",
    "worst_family_error: the largest difference of logits, over their standard deviation, of tiny random models of "
    "each family and rope scaling, with F32 files and an F32 cache. llama.cpp reads Gemma's GELU from a 16-bit table. "
    "ids_that_differ: texts that llama.cpp's own tokenizer turns into other ids; of those that begin with a space, "
    "ids_after_a_space: llama.cpp puts SentencePiece's space before them too, transformers' LlamaTokenizer does not.",
    "growth: anonymous memory at its highest while the file is written, over that before; growth_beyond_largest: less "
    "the largest tensor of the file.",
]

SIDE = """
import json, sys
import llama_cpp, numpy
job = json.loads(sys.stdin.read())
cache = {} if job.get("cache") == "f16" else {"type_k": 0, "type_v": 0}
said = []
for one in job["files"]:
    llama = llama_cpp.Llama(one["file"], n_ctx=512, n_batch=256, n_threads=1, logits_all=True, verbose=False, seed=1,
                            lora_path=one.get("lora"), **cache)
    row = {"ids": [llama.tokenize(t.encode(), add_bos=True, special=True) for t in one.get("texts", [])]}
    row["replies"] = []
    for ids in row["ids"] if job.get("new") else []:
        llama.reset()
        made = []
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == job["new"]:
                break
        row["replies"].append(made)
    if "ids" in one:
        llama.reset()
        llama.eval(one["ids"])
        row["logits"] = numpy.array(llama.scores[: len(one["ids"])]).tolist()
    said.append(row)
    llama.close()
print("@side " + json.dumps({"version": llama_cpp.__version__, "rows": said}))
"""


def side(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp gives for a job, in its own environment."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([python, "-I", "-c", SIDE], input=json.dumps(job), capture_output=True, text=True,
                              timeout=900, cwd=empty)  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("@side ")), None)
    if line is None:
        raise SystemExit(f"llama.cpp failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(line[6:])


# --- children --------------------------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    {"replies": replies, "grow": grow, "family": family}[job["do"]](job)


def replies(job: dict[str, Any]) -> None:
    """Greedy tokens of transformers in fp32, with peft's adapter if there is one; and the gaps to llama.cpp's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.model.hub import cached_folder

    folder = cached_folder("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    model, tokenizer = model.eval(), AutoTokenizer.from_pretrained(folder)
    made, ids, gaps = [], [], []
    with torch.no_grad():
        for prompt, theirs in zip(job["prompts"], job["theirs"], strict=True):
            ids.append(tokenizer(prompt)["input_ids"])
            given, past, reply, gap = torch.tensor([ids[-1]]), None, [], 0.0
            for at in range(job["new"]):
                out = model(given, past_key_values=past, use_cache=True)
                scores, past = out.logits[0, -1], out.past_key_values
                token = int(scores.argmax())
                if token != theirs[at] and reply == theirs[:at]:
                    gap = float(scores[token] - scores[theirs[at]])
                reply.append(token)
                given = torch.tensor([[token]])
            made.append(reply)
            gaps.append(gap)
    say("result", {"replies": made, "ids": ids, "gaps": gaps})


def grow(job: dict[str, Any]) -> None:
    """How much the process grows while the run is written as a file of type `outtype`."""
    import gguf

    from trimtab.inference import export_gguf
    from trimtab.inference.export import export
    from trimtab.memory.meter import Meter
    from trimtab.recipe import Recipe

    write, meter = export_gguf.write_model, Meter(seconds=0.002)

    def metered(*args: Any) -> Path:
        meter.start()
        try:
            return write(*args)
        finally:
            meter.stop()

    export_gguf.write_model = metered
    folder = export(Recipe.load(job["recipe"]), "gguf", job["out"], outtype=job["outtype"])
    file = next(folder.glob("*.gguf"))
    largest = max(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    say("result", {"growth": meter.result()["fast_growth_bytes"], "largest": int(largest), "size": file.stat().st_size})


def family(job: dict[str, Any]) -> None:
    """A tiny random model of a family, written in F32; its logits and its ids of some texts."""
    import torch

    from helpers_gguf import FAMILIES, PROBES, make
    from trimtab.artifacts.adapter import Base
    from trimtab.inference.export_gguf import write_model

    FAMILIES["gemma"] = ("Gemma", {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}, FAMILIES["gemma2"][2])
    model, tokenizer = make(job["family"], **job["fields"])
    file = write_model(Path(job["folder"]), job["name"], "f32", model, tokenizer, [], Base("tiny", "", "causal-lm"))
    ids = torch.randint(4, len(tokenizer), (48,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    say("result", {"file": str(file), "ids": ids.tolist(), "logits": logits.tolist(), "texts": PROBES,
                   "tokens": [tokenizer(text)["input_ids"] for text in PROBES]})  # fmt: skip


# --- what is measured ------------------------------------------------------------------------------------------------


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}


def families(python: str, folder: Path, quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Tiny models of each family: the difference of logits, and how many texts get other ids."""
    import numpy

    three = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    cases = {name: (name, {}) for name in ("llama", "llama-biased", "llama-2", "mistral", "qwen2", "qwen3", "gemma",
                                           "gemma2", "gemma3")}  # fmt: skip
    cases |= {"llama 3's rope": ("llama", three), "linear rope": ("llama", rope("linear")),
              "yarn": ("qwen2", rope("yarn", original_max_position_embeddings=64))}  # fmt: skip
    rows, chosen = [], [*cases][:: 5 if quick else 1]
    for name, (kind, fields) in ((name, cases[name]) for name in chosen):
        made = itself(__file__, {"do": "family", "family": kind, "fields": fields, "name": name, "folder": str(folder)})
        given = {"file": made["file"], "ids": made["ids"], "texts": made["texts"]}
        found = side(python, {"files": [given], "cache": "f32"})["rows"][0]
        ours, theirs = numpy.array(made["logits"]), numpy.array(found["logits"])
        error = float(numpy.abs(ours - theirs).max() / ours.std())
        pairs = zip(made["texts"], made["tokens"], found["ids"], strict=True)
        other = [text for text, a, b in pairs if a != b]
        spaced = sum(text.startswith(" ") for text in other)
        rows.append({"what": name, "logit error": error, "other ids": len(other), "after a space": spaced})
        print(json.dumps(rows[-1]), flush=True)
    return {"worst_family_error": max(row["logit error"] for row in rows),
            "ids_that_differ": sum(row["other ids"] - row["after a space"] for row in rows),
            "ids_after_a_space": sum(row["after a space"] for row in rows)}, rows  # fmt: skip


def same(ours: list[int], theirs: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="the interpreter of an environment with llama-cpp-python")
    if (args := arguments(parser, worker)) is None:
        return
    if not args.llama_cpp:
        raise SystemExit("--llama-cpp PYTHON is needed: an environment with llama-cpp-python")
    prompts, new = (PROMPTS[:3], 32) if args.quick else (PROMPTS, NEW)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures, rows = families(args.llama_cpp, folder, args.quick)
        recipe, base = trained(folder, steps=4 if args.quick else 20)
        for to, more in (("gguf", ()), ("gguf-lora", ()), ("peft", ())):
            made(trimtab("export", str(recipe), "--to", to, *more))
        run = folder / "run"
        files = {"base": [base, None], "merged": [run / "gguf/run-F16.gguf", None],
                 "adapter": [base, run / "gguf-lora/run-lora-F32.gguf"]}  # fmt: skip
        whole, version = {}, ""
        for name, (file, lora) in files.items():
            job = {
                "files": [{"file": str(file), "lora": lora and str(lora), "texts": prompts}],
                "new": new,
                "cache": "f16",
            }
            said = side(args.llama_cpp, job)
            version, theirs = said["version"], said["rows"][0]
            adapter = "" if name == "base" else str(run / "peft")
            ours = itself(__file__, {"do": "replies", "adapter": adapter, "prompts": prompts, "new": new,
                                     "theirs": theirs["replies"]})  # fmt: skip
            counts = sorted(map(same, ours["replies"], theirs["replies"]))
            whole[name] = ours["replies"]
            figures |= {f"same_tokens_{name}": counts[len(counts) // 2], f"same_whole_{name}": counts.count(new)}
            figures["ids_that_differ"] += sum(a != b for a, b in zip(ours["ids"], theirs["ids"], strict=True))
            rows.append({"what": name, "prompts": len(prompts), "equal to the end": counts.count(new),
                         "fewest equal": counts[0], "closest_call": max(ours["gaps"])})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        figures["replies_that_training_changed"] = sum(
            a != b for a, b in zip(whole["base"], whole["adapter"], strict=True)
        )
        for outtype in TYPES[1:2] if args.quick else TYPES:
            grown = itself(
                __file__, {"do": "grow", "recipe": str(recipe), "outtype": outtype, "out": str(folder / outtype)}
            )
            rows.append({"what": f"write {outtype}", "growth MiB": grown["growth"] / MIB,
                         "largest MiB": grown["largest"] / MIB, "file MiB": grown["size"] / MIB})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        written = [row for row in rows if "growth MiB" in row]
        figures["growth_beyond_largest_mib"] = max(row["growth MiB"] - row["largest MiB"] for row in written)
    targets = {key: [op, new] if value == NEW else [op, value] for key, (op, value) in TARGETS.items()}
    conclude("gguf_llama_cpp", args, figures, targets, title="GGUF under llama.cpp", claim=CLAIM, rows=rows,
             notes=[*NOTES, f"llama-cpp-python {version}."])  # fmt: skip


def trained(folder: Path, steps: int) -> tuple[Path, Path]:
    """-> (the recipe of a run that has learned something, its base as an F16 file)."""
    from trimtab.artifacts.adapter import Base
    from trimtab.inference.export_gguf import write_model
    from trimtab.model.load import load_model

    city_text(folder / "cities.jsonl")
    recipe = folder / "r.yaml"
    recipe.write_text(json.dumps({
        "model": "smollm2-135m", "patches": [{"lora": {"r": 8}}],
        "data": {"train": str(folder / "cities.jsonl"), "too_long": "cut"},
        "training": {"max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_length": 128,
                     "save_strategy": "no"},
        "output": str(folder / "run"),
    }), encoding="utf-8")  # fmt: skip
    made(trimtab("train", str(recipe), "-q", timeout=1800))
    model, tokenizer = load_model("smollm2-135m")
    return recipe, write_model(folder, "base", "f16", model, tokenizer, [], Base("smollm2-135m", "", "causal-lm"))


def made(done: tuple[int, str, str]) -> None:
    if done[0]:
        raise SystemExit(done[2])


if __name__ == "__main__":
    main()
