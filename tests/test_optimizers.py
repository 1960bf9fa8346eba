"""Optimizers of `training.optim` beside PyTorch's own: planned by one real step, or refused in a sentence."""

from __future__ import annotations

import importlib.util

import pytest

from helpers_run import make_world, run, tree
from trimtab.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")
BLOCKS = {"optim_target_modules": ["attn", "mlp"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("optim,more", [
    ("adamw_8bit", {}), ("paged_adamw_8bit", {}), ("adafactor", {}),
    pytest.param("galore_adamw", BLOCKS, marks=pytest.mark.skipif(not has("galore_torch"), reason="no galore-torch")),
    pytest.param("apollo_adamw", BLOCKS, marks=pytest.mark.skipif(not has("apollo_torch"), reason="no apollo-torch")),
])  # fmt: skip
def test_the_plan_is_what_the_run_counts(optim, more, world, tmp_path):
    keys = tree(world, tmp_path / "run", {"full": {}}, max_steps=3, optim=optim, learning_rate=1e-3, **more)
    done = run(keys, budget={"fast": "4GiB"})
    predicted, measured = done["predicted"]["live_peak_bytes"], done["measured"]["live_peak_bytes"]
    assert abs(predicted - measured) <= 0.01 * measured


@pytest.mark.parametrize("optim,what", [
    ("adamw_torch_xla", "for XLA devices"), ("grokadamw", "pip install grokadamw"),
    ("stable_adamw", "pip install torch-optimi"),
])  # fmt: skip
def test_what_cannot_run_here_is_refused_before_the_model_is_loaded(optim, what, world, tmp_path):
    if "pip" in what and has({"grokadamw": "grokadamw", "stable_adamw": "optimi"}[optim]):
        pytest.skip("it is installed")
    with pytest.raises(BadInput, match=what):
        run({**tree(world, tmp_path / "run", {"full": {}}, max_steps=1, optim=optim), "model": "nowhere"})


@pytest.mark.skipif(not has("lomo_optim"), reason="no lomo-optim")
def test_steps_during_the_backward_pass_are_not_planned(world, tmp_path):
    with pytest.raises(BadInput, match="during the backward pass"):
        run(tree(world, tmp_path / "run", {"full": {}}, max_steps=1, optim="lomo"), budget={"fast": "4GiB"})
