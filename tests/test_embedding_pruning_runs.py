"""Embedding pruning through whole runs: planned and measured bytes, checkpoints, exports, and what a plan shows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from helpers_load import tiny_tokenizer
from helpers_run import left, rows, run, same, tree, write_rows
from tiny import recipe_of
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.inference.export import export
from trimtab.inference.generate import generate
from trimtab.inference.load_run import load_run
from trimtab.planning.inference import plan_recipe
from trimtab.recipe import Recipe
from trimtab.training.train import train
from world import at_step

pytestmark = pytest.mark.filterwarnings("ignore")
V, HIDDEN = 512, 64
USED, KEPT = 25, 64  # ids that the tokenizer has; rows that are kept
PRUNED = {"embedding_pruning": {}}
ABOVE = {
    "lora": {"lora": {"r": 4}}, "paca": {"paca": {"r": 4}}, "parallel_adapter": {"parallel_adapter": {"r": 16}},
    "meft": {"meft": {"r": 64, "k": 16, "scale": 1.0}}, "full": {"full": {}}, "full bf16": {"full": {"dtype": "keep"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Language models, tied and not, and an encoder, with a vocabulary of which the tokenizer has a part."""
    folder = tmp_path_factory.mktemp("world")
    shape = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": V}  # fmt: skip
    torch.manual_seed(0)
    for name, tied in (("llama", True), ("untied", False)):
        config = LlamaConfig(**shape, num_key_value_heads=2, pad_token_id=None, tie_word_embeddings=tied)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**shape, **still)).save_pretrained(folder / "bert")
    for name in ("llama", "untied", "bert"):
        tiny_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "facts.jsonl", rows())
    write_rows(folder / "films.jsonl", [{"text": f"the film is {word}", "label": word} for word in ("good", "bad")] * 6)
    return folder


def keys(world, output, *patches, model: str = "llama", precision: str = "auto", **training):
    made = tree(world, output, {}, **training)
    if model == "bert":
        made |= {"objective": "classification", "data": {"train": str(world / "films.jsonl")}}
    return {**made, "model": {"name": str(world / model), "precision": precision}, "patches": list(patches)}


# --- memory ----------------------------------------------------------------------------------------------------------


OTHERS = [(above, *kind) for above in ("lora", "full") for kind in (("untied", "fp32"), ("bert", "auto"))]


@pytest.mark.parametrize("above,model,precision", [*((above, "llama", "auto") for above in ABOVE), *OTHERS])
def test_the_plan_is_what_the_meter_finds(world, tmp_path, above, model, precision):
    """On a mapped base, on one that is converted (its rows move to the slow tier), and on an encoder."""
    steps = {"max_steps": 3, "learning_rate": 1e-3}
    made = run(keys(world, tmp_path / "run", PRUNED, ABOVE[above], model=model, precision=precision, **steps))
    predicted, measured = made["predicted"]["live_peak_bytes"], made["measured"]["live_peak_bytes"]
    assert -0.005 <= predicted / measured - 1 <= (0.3 if above == "meft" else 0.005)


@pytest.mark.parametrize("softmax", ["exact", "kept"])
@pytest.mark.parametrize("model,precision", [("llama", "auto"), ("untied", "fp32"), ("untied", "nf4")])
@pytest.mark.parametrize("above", ["lora", "full"])
def test_what_is_promised_is_saved(world, tmp_path, model, precision, above, softmax):
    if (above, precision) == ("full", "nf4"):
        pytest.skip("full fine-tuning refuses 4 bits")
    fields = {"embedding_pruning": {"softmax": softmax}}
    pruned, plain = (
        plan_recipe(Recipe.from_dict(keys(world, tmp_path, *patches, model=model, precision=precision)), process=0)
        for patches in ([fields, ABOVE[above]], [ABOVE[above]])
    )  # fmt: skip
    dropped, tables = (V - KEPT) * HIDDEN, 1 if model == "llama" else 2
    size = {"auto": 2, "fp32": 4, "nf4": 2}[precision]
    copies = dropped * size if precision == "fp32" else -KEPT * HIDDEN * size  # mapped rows use no fast memory
    promised = tables * (copies + (4 * 4 * dropped if above == "full" else 0))
    less = plain.live_peak_bytes - pruned.live_peak_bytes
    maps = 4 * V + 8 * KEPT + V // 8 + 16
    logits = 4 * 48 * (V if softmax == "exact" else V - KEPT) * 4  # a chunk's buffers and temporary products
    assert abs(less - promised) <= maps + logits
    assert any("saves fast memory" in note for note in pruned.notes)


def test_a_run_without_a_patch_on_top_is_planned_too(world, tmp_path):
    made = plan_recipe(Recipe.from_dict(keys(world, tmp_path, PRUNED)))
    assert any(f"{KEPT} rows are kept" in note for note in made.notes)
    assert made.kinds["adapter"] == KEPT * HIDDEN * 2 + 4 * V + 8 * KEPT + V // 8 + 16


@pytest.mark.parametrize("above", ["lora", "full"])
def test_beside_a_gpu_the_whole_table_is_in_ram(world, tmp_path, above):
    pruned, plain = (
        plan_recipe(Recipe.from_dict({
            **keys(world, tmp_path, *patches, model="untied"), "place": "cuda", "budget": {"fast": "24GiB"},
        })) for patches in ([PRUNED, ABOVE[above]], [ABOVE[above]])
    )  # fmt: skip
    table = V * HIDDEN * 2
    assert pruned.slow_bytes == 2 * table and plain.slow_bytes == 0
    less = {kind: plain.kinds.get(kind, 0) - pruned.kinds.get(kind, 0) for kind in plain.kinds}
    dropped, maps = 2 * (V - KEPT) * HIDDEN, 4 * V + 8 * KEPT + V // 8 + 16
    assert less["weights"] + less["adapter"] == dropped * (2 + (4 if above == "full" else 0)) - maps
    assert less["optimizer"] == (8 * dropped if above == "full" else 0)


def test_a_plan_shows_the_count_before_anything_is_done(world, tmp_path, call):
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_dict(keys(world, tmp_path / "run", PRUNED, ABOVE["full"])).to_yaml())
    code, out, _ = call("plan", path)
    assert code == 0 and not (tmp_path / "run").exists()
    assert "of 512 ids occur in" in out and f"{KEPT} rows are kept" in out
    assert "coverage, by the most frequent ids:" in out and "100.0% of the tokens" in out
    assert "at the peak it saves" in out
    for component in ("embedding and tied head -", "trained embedding", "gradients of the embedding", "moments of the"):
        assert component in out


def test_rows_that_cannot_be_read_are_planned_as_if_all_ids_were_used(world, tmp_path):
    recipe = recipe_of(str(world / "llama"), ABOVE["lora"])
    recipe = Recipe.from_dict({**recipe.to_dict(), "patches": [PRUNED, ABOVE["lora"]]})
    made, plain = plan_recipe(recipe), plan_recipe(recipe_of(str(world / "llama"), ABOVE["lora"]))
    assert made.live_peak_bytes >= plain.live_peak_bytes + V * HIDDEN * 2


# --- runs ------------------------------------------------------------------------------------------------------------

READER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("which country is paris in ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        table = model.get_input_embeddings().weight.clone()
        save_file({"ids": ids, "logits": model(ids).logits, "table": table}, folder + "/found")
assert not any(name.startswith("trimtab") for name in sys.modules)
"""


def test_an_export_is_a_standard_model_of_the_whole_vocabulary(world, tmp_path):
    cases = {"full": "llama", "lora": "untied"}
    recipes = {a: Recipe.from_dict(keys(world, tmp_path / a, PRUNED, ABOVE[a], model=m)) for a, m in cases.items()}
    for made in recipes.values():
        train(made)
    folders = {above: export(made, "merged") for above, made in recipes.items()}
    subprocess.run([sys.executable, "-c", READER, *map(str, folders.values())], check=True)
    peft = load_file(export(recipes["lora"], "peft") / "adapter_model.safetensors")
    ours = load_file(tmp_path / "lora" / "adapter" / "1-lora" / "adapter_model.safetensors")
    assert peft.keys() == ours.keys() and all(torch.equal(peft[key], ours[key]) for key in peft)
    for above, model in cases.items():
        found, base = load_file(folders[above] / "found"), load_file(world / model / "model.safetensors")
        same_rows = (found["table"] == (table := base["model.embed_tokens.weight"])).all(1)
        assert found["table"].shape == table.shape and same_rows[KEPT:].all()
        assert bool(same_rows.all()) == (above == "lora")
        loaded = load_run(recipes[above])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(loaded.model(found["ids"]).logits, found["logits"], atol=0.05)
        assert loaded.patches[0].rows == KEPT


@pytest.mark.parametrize("above", ["lora", "full"])
def test_a_stopped_run_resumes_bit_for_bit(world, tmp_path, above):
    def interrupt():
        raise KeyboardInterrupt

    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole, parts = (keys(world, tmp_path / name, PRUNED, ABOVE[above], **steps) for name in ("whole", "parts"))
    run(whole)
    with pytest.raises(KeyboardInterrupt), at_step(3, interrupt):
        run(parts)
    run(parts, resume=True)
    same(left(tmp_path / "whole"), left(tmp_path / "parts"))


def test_losses_are_those_of_the_whole_model(world, tmp_path):
    """Exact: each loss of a run is that without pruning. On held-out rows with other ids too."""
    held = [{"question": "which good film is bad ?", "answer": "the ."}] * 4
    test = str(write_rows(tmp_path / "held.jsonl", held))
    found = []
    for name, patches in (("pruned", [PRUNED, ABOVE["lora"]]), ("plain", [ABOVE["lora"]])):
        made = keys(world, tmp_path / name, *patches, max_steps=5, precision="fp32", learning_rate=1e-3)
        made["data"]["test"] = test
        run(made)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        found.append((losses, evaluate(Recipe.from_dict(made))["metrics"]["loss"]))
    assert found[0][0] == pytest.approx(found[1][0], abs=2e-5)
    assert found[0][1] == pytest.approx(found[1][1], abs=2e-5)


@pytest.mark.parametrize("fields", [{"softmax": "kept", "unseen": "error"}, {"unseen": "unk"}])
def test_each_choice_trains_evaluates_and_generates(world, tmp_path, fields):
    made = keys(world, tmp_path / "run", {"embedding_pruning": fields}, ABOVE["lora"], max_steps=3, precision="nf4")
    made["data"]["test"] = made["data"]["train"]
    recipe = Recipe.from_dict(made)
    assert run(made)["steps"] == 3
    assert evaluate(recipe)["metrics"]["loss"] > 0
    assert len(list(generate(recipe, ["which country is paris in ?"], max_new_tokens=3))) == 1


def test_a_classifier_and_packed_rows(world, tmp_path):
    assert run(keys(world, tmp_path / "a", PRUNED, ABOVE["lora"], model="bert", max_steps=3))["steps"] == 3
    error = {"embedding_pruning": {"unseen": "error"}}
    assert run(keys(world, tmp_path / "b", error, ABOVE["lora"], max_steps=2, packing=True))["steps"] == 2


def test_pruning_of_weights_goes_with_it(world, tmp_path):
    made = run(keys(world, tmp_path / "run", PRUNED, {"pruning": {"score": "wanda"}}, ABOVE["lora"], max_steps=3))
    assert made["predicted"]["live_peak_bytes"] == pytest.approx(made["measured"]["live_peak_bytes"], rel=0.005)


def test_after_a_trained_patch_it_is_refused(world, tmp_path):
    with pytest.raises(BadInput, match="before the other patch"):
        run(keys(world, tmp_path / "run", ABOVE["lora"], PRUNED))
    assert not (tmp_path / "run").exists()
