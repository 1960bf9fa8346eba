"""A MEFT run that is killed at any instant resumes bit for bit: 50 kills of a tiny run, each resumed and compared.

The model is a Llama of two blocks (hidden size 64) with random weights, its tables in files, a checkpoint every second
step. A process with all libraries loaded forks each run. The run gets SIGKILL at a random time after a random
checkpoint (or after its start), and is started again as a user would (`resume=true`, or from the start if no checkpoint
was complete). Its files are then compared with those of an undisturbed run: the adapter's files byte by byte; in the
last checkpoint the tables' rows with their moments, the states of optimizer and schedule, the random states, and the
position in the data; and the loss, learning rate and tokens of every step.

    python benchmarks/meft_kill.py [--quick] [--kills 50] [--seed 0] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import conclude, options  # noqa: E402

WORDS = "which country is in the of paris lyon france spain madrid a good bad film ? .".split()
STEPS, SAVE = 10, 2
FIELDS = {"r": 256, "experts": 32, "probes": 4, "k": 8, "adam": "exact", "balance": 0.01, "revive": 4}
VARIANTS = {"fp32 moments": {"moments": "fp32"}, "8-bit moments": {"moments": "int8"}, "hot rows": {"cache": 0.0002}}


def world(folder: Path) -> None:
    """A tiny model with a tokenizer of whole words, and rows to train on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocab = {word: index for index, word in enumerate(["<unk>", "</s>", "<pad>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "llama")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(8, 30)))} for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path, output: str, fields: dict[str, Any], **more: Any) -> Any:
    import trimtab

    return trimtab.Recipe(
        model=str(folder / "llama"), data={"train": str(folder / "text.jsonl")}, patches=[{"meft": FIELDS | fields}],
        training={"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE, "save_total_limit": 2,
                  "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 32,
                  "learning_rate": 1e-2, "logging_steps": 1},
        place={"fast": "cpu", "slow": "disk", "folder": str(folder)}, engine={"allocator": "none"},
        output=str(folder / output), **more,
    )  # fmt: skip


def forked(work: Callable[[], Any], sign: Path | None = None, delay: float = 0.0) -> tuple[int, float]:
    """Run `work` in a copy of this process, killed `delay` seconds after `sign` is there; -> its exit code (minus the
    signal's number), seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    done = threading.Event()

    def kill() -> None:
        while not sign.exists():
            if done.wait(0.005):
                return
        if not done.wait(delay):
            os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill) if sign is not None else None
    if killer:
        killer.start()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it keeps its number until nobody can kill it any more
    done.set()
    if killer:
        killer.join()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


# --- what a run left -------------------------------------------------------------------------------------------------


def left(output: Path) -> dict[str, str]:
    """Name -> digest, of all that must not depend on how often the run was killed."""
    import torch
    from safetensors.torch import load_file

    found = {f"adapter/{path.name}": digest(path.read_bytes()) for path in sorted((output / "adapter").iterdir())}
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for table in sorted((last / "rows").iterdir()):
        for path in sorted(table.iterdir(), key=lambda path: int(path.stem)):  # deltas, the newest last
            held = load_file(path)
            found |= {f"{table.name}/{name}": digest(t) for name, t in held.items() if name.startswith("state.")}
            kinds = [name for name in held if "." not in name and name != "rows"]
            for at, row in enumerate(held["rows"].tolist()):
                found |= {f"{table.name}/{kind}/{row}": digest(held[kind][at]) for kind in kinds}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        found[name] = digest(torch.load(last / name, weights_only=False))
    state = json.loads((last / "trainer_state.json").read_text())
    found["position"] = digest([state[key] for key in ("global_step", "epoch", "max_steps", "num_input_tokens_seen")])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = digest([[row.get(k) for k in ("step", "loss", "grad_norm", "learning_rate", "num_tokens")]
                               for row in lines if "loss" in row])  # fmt: skip
    return {"last": last.name, **found}


def digest(value: Any) -> str:
    """Of numbers: tensors by type, shape and bytes."""
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            whole = value.detach().contiguous().flatten()
            content = whole.view(torch.uint8).numpy().tobytes() if len(whole) else b""
            return str(value.dtype), tuple(value.shape), content
        if isinstance(value, dict):
            return [(str(key), plain(item)) for key, item in value.items()]
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    data = value if isinstance(value, bytes) else pickle.dumps(plain(value))
    return hashlib.sha256(data).hexdigest()


# --- kills -----------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> None:
    import torch

    import trimtab.training.session  # noqa: F401  # all that a run imports, before the first fork

    torch.set_num_threads(1)  # a fork has one thread
    kills = 6 if args.quick else args.kills
    draw, rows = random.Random(args.seed), []
    with_checkpoint = 0
    world(folder)
    for index, (name, fields) in enumerate(VARIANTS.items()):
        outputs = [f"whole-{index}-{again}" for again in range(2)]
        times, began = [], []
        for output in outputs:
            started = time.time()
            times.append(forked(recipe(folder, output, fields).train))
            if times[-1][0]:
                raise SystemExit(f"{name}: an undisturbed run failed")
            began.append((folder / output / "recipe.yaml").stat().st_mtime - started)
        whole, again = left(folder / outputs[0]), left(folder / outputs[1])
        if whole != again:
            raise SystemExit(f"{name}: two undisturbed runs differ: {[k for k in whole if whole[k] != again.get(k)]}")
        between = (min(seconds for _, seconds in times) - min(began)) * SAVE / STEPS
        share = range(kills * index // len(VARIANTS), kills * (index + 1) // len(VARIANTS))
        tally = {"kills": 0, "finished before": 0, "restarted": 0, "resumed": 0, "equal": 0}
        at: list[str] = []
        for number in share:
            while True:
                output = folder / f"killed-{number}"
                after = draw.randrange(0, STEPS, SAVE)
                sign = output / (f"checkpoint-{after}" if after else "recipe.yaml")
                code, _ = forked(recipe(folder, output.name, fields).train, sign, draw.uniform(0, between))
                if code == -signal.SIGKILL:
                    break
                if code:
                    raise SystemExit(f"{name}: a run failed with {code} before it was killed")
                tally["finished before"] += 1
                remove(output)
            tally["kills"] += 1
            newest = max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)
            half = (output / ".checkpoint.partial").is_dir()
            at.append(f"{newest}{'+' if half else ''}")
            going = {"resume": True} if newest else {"overwrite": True}
            tally["resumed" if newest else "restarted"] += 1
            with_checkpoint += newest > 0
            code, _ = forked(recipe(folder, output.name, fields, **going).train)
            found = left(output) if code == 0 else {}
            differs = sorted(key for key in whole.keys() | found.keys() if whole.get(key) != found.get(key))
            tally["equal"] += not differs
            if differs:
                print(f"{name}, kill {number} (checkpoint {at[-1]}): exit {code}, {len(differs)} differ: {differs[:5]}")
            remove(output)
        rows.append({"tables": name, **tally,  "newest checkpoint (+: one half written)": ", ".join(at)})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    summary = {
        "kills": sum(row["kills"] for row in rows), "resumed_equal": sum(row["equal"] for row in rows),
        "with_a_checkpoint": with_checkpoint,
    }  # fmt: skip
    targets = {"kills": [">=", 50], "resumed_equal": [">=", summary["kills"]]}
    conclude(
        "meft_kill", args, summary, targets, title="A killed run resumes bit for bit", claim=CLAIM, rows=rows,
        notes=NOTES,
    )  # fmt: skip


def remove(output: Path) -> None:
    import shutil

    shutil.rmtree(output, ignore_errors=True)


CLAIM = (
    "A MEFT run that is killed (SIGKILL) at a random instant and resumed leaves what an undisturbed one leaves, bit "
    "for bit: adapter, tables with Adam's moments, router, optimizer, schedule, random states, data order, losses."
)
NOTES = [
    "A tiny Llama with random weights, tables in files, 10 steps, a checkpoint every second one. An instant is drawn "
    "as a checkpoint (or the start) and a delay after it, up to what an undisturbed run takes between two "
    "checkpoints.",
    "The runs' folder was in RAM (tmpfs), since other work kept the disk busy; for killing a process this makes no "
    "difference.",
    "The kill ends the process, not the machine: surviving a loss of power depends on fsync before each rename, which "
    "this does not test.",
    "Other work ran on the machine; no figure here is a speed.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs are made (default: the temporary folder)")
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
