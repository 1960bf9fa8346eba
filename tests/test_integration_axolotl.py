"""The plugin for Axolotl, against a stand-in of the two classes that it derives from: Axolotl cannot be installed here,
since it pins other versions of the libraries."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from conftest import MODELS, logits, tiny_batch
from trimtab.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    def get_input_args(self) -> str | None:
        return None

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return []

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        return None


@pytest.fixture
def plugin(monkeypatch):
    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "trimtab.integrations.axolotl", raising=False)
    module = importlib.import_module("trimtab.integrations.axolotl")
    yield module.TrimtabPlugin()
    sys.modules.pop("trimtab.integrations.axolotl")


def cfg(adapter: str, lora_model_dir=None, **fields):
    return SimpleNamespace(adapter=adapter, trimtab=fields, lora_model_dir=lora_model_dir)


def test_it_names_its_adapters_and_its_block(plugin):
    names = [capability.name for capability in plugin.get_adapter_capabilities()]
    assert names == ["paca", "edora", "senszoq", "parallel_adapter", "meft"]
    module, _, name = plugin.get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name)(trimtab={"r": 8}).trimtab == {"r": 8}
    assert plugin.load_adapter(MODELS["llama"](), cfg("lora")) is None


def test_it_trains_saves_and_continues(plugin, tmp_path):
    model, config = plugin.load_adapter(MODELS["llama"](), cfg("paca", r=4))
    assert config.r == 4 and plugin.load_adapter(None, cfg("paca", r=4), config_only=True)[0] is None
    optimizer, batch = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), None
    for _ in range(3):
        batch = tiny_batch(model.base_model.model)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again, _ = plugin.load_adapter(MODELS["llama"](), cfg("paca", str(tmp_path), r=4))
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert any(p.requires_grad for p in again.parameters())


def test_an_unknown_field_is_refused(plugin):
    with pytest.raises(BadInput, match="no such field"):
        plugin.load_adapter(MODELS["llama"](), cfg("paca", rank=4))
