"""Nothing is sent anywhere: connections and look-ups are counted over the verbs, with no variable that forbids them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trimtab
from helpers_network import REFUSED
from helpers_run import make_world, tree

FORBID = ("CI", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY",
          "DISABLE_TELEMETRY", "DO_NOT_TRACK")  # fmt: skip

VERBS = (
    REFUSED
    + """
def verb(*arguments):
    sys.argv = ["trimtab", *arguments]
    try:
        cli.main()
    except SystemExit as done:
        assert not done.code, (arguments, done.code)

def waited_for():
    from huggingface_hub.utils import _telemetry
    if _telemetry._TELEMETRY_THREAD is not None:
        _telemetry._TELEMETRY_QUEUE.join()
    return list(asked)

recipe, folder = sys.argv[1:3]
for arguments in (["plan", recipe], ["train", recipe, "-q"], ["eval", recipe, "-q"],
                  ["generate", recipe, "-p", "paris", "--set", "max_new_tokens=2"], ["export", recipe, "--to", "peft"],
                  ["export", recipe, "--to", "merged"], ["report", folder]):
    verb(*arguments)
ours = waited_for()

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
args = SFTConfig(folder + "/theirs", report_to="none", use_cpu=True, bf16=False)
tokenizer = AutoTokenizer.from_pretrained(sys.argv_model)
SFTTrainer(AutoModelForCausalLM.from_pretrained(sys.argv_model), args, processing_class=tokenizer,
           train_dataset=Dataset.from_list([{"text": "paris"}]))
theirs = waited_for()[len(ours):]
print("COUNTED", len(ours), len(theirs), ours, theirs[:3])
"""
)


def environment(*paths: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in FORBID}
    source = [str(path) for path in paths] + [str(Path(trimtab.__file__).parents[1])]
    return {**kept, "PYTHONPATH": os.pathsep.join(source), "TRIMTAB_ALLOCATOR": "none"}


@pytest.mark.filterwarnings("ignore")
def test_no_verb_connects_to_anything(tmp_path):
    world = make_world(tmp_path)
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, max_steps=2)
    keys["data"]["test"] = keys["data"]["train"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    code = VERBS.replace("sys.argv_model", repr(keys["model"]))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "r.yaml", tmp_path / "run"], env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counted = next(line for line in done.stdout.splitlines() if line.startswith("COUNTED"))
    _, ours, theirs, *what = counted.split(maxsplit=3)
    assert int(ours) == 0, what
    assert int(theirs) > 0, "a trainer of TRL's own still reports as its user has set it, and the count sees it"


@pytest.fixture(scope="module")
def looked_up(tmp_path_factory):
    """code -> the output of a process with a package `kernels` that says when it is asked for one. Skipped where
    bitsandbytes asks for none."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(
        "def get_kernel(*a, **k):\n    print('LOOKED UP')\n    raise OSError"
    )

    def imported(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    if "LOOKED UP" not in imported("import bitsandbytes"):
        pytest.skip("bitsandbytes looks for kernels on processors with AVX512-BF16 only")
    return imported


def test_importing_bitsandbytes_looks_up_no_kernel(looked_up):
    ours = "from trimtab.quiet import silence_libraries\nwith silence_libraries(): import bitsandbytes, peft\n"
    found = looked_up(ours + "import kernels\nprint(kernels)")
    assert "LOOKED UP" not in found and "site" in found, "others find the package as before"


OWN_MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from trimtab import Place, methods
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2))
assert "bitsandbytes" not in sys.modules
surgery = methods.find("{name}")(r=2).apply(model, Place())
surgery.portable()
assert "bitsandbytes" in sys.modules
"""
STEP = """
import sys, torch
from trimtab.tiered import adam_state, store, record
made = store.TieredStore("table", 4, (3, 10), moments=torch.int8)
assert "bitsandbytes" not in sys.modules
adam_state.write(made, record.M, 0, torch.ones(3, 10))
assert "bitsandbytes" in sys.modules
"""
BY_HAND = {
    **{name: OWN_MODEL.format(name=name) for name in ("lora", "paca", "edora")},
    "8-bit moments": STEP,
    "packed": "import trimtab.model.packed as p, sys; p.available(); assert 'bitsandbytes' in sys.modules",
}


@pytest.mark.parametrize("what", BY_HAND)
def test_neither_does_what_is_called_by_hand(looked_up, what):
    assert "LOOKED UP" not in looked_up(BY_HAND[what])
