"""Checks that stock peft loads an adapter into the modules where it was trained, by peft itself on an empty model.

peft maps old names in some models: in a mixture of experts it takes the `gate_proj` of a dense FFN or of a shared
expert for stacked experts, and it refuses parts of Mamba.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import BadInput
from ..quiet import peft

DO = "Export it as merged, or train other targets (q_proj, k_proj, v_proj, o_proj)"


def require_loadable(model: PreTrainedModel, config: Any, names: Iterable[str]) -> None:
    """BadInput if peft refuses `config` on such a model, or expects other tensors than `names`."""
    asked = f"export to peft on {type(model).__name__}"
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    if config.peft_type.value == "SHIRA":  # peft chooses its entries by values, which the twin does not have
        ends = tuple(config.target_modules)
        theirs = {
            name: m for name, m in twin.named_modules() if name in ends or name.endswith(tuple("." + e for e in ends))
        }
        ours = {name.removeprefix("base_model.model.").partition(".shira_")[0] for name in names}
        if odd := sorted(theirs.keys() ^ ours or (name for name, m in theirs.items() if type(m) is not nn.Linear)):
            raise BadInput(asked, f"peft's SHiRA cannot be put on the same linears, {odd[0]} among them", DO)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the comparison below finds what they warn of
            peft().inject_adapter_in_model(copy.deepcopy(config), twin, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(asked, f"stock peft refuses it ({error})".rstrip("."), DO) from None
    theirs = {
        f"base_model.model.{name.partition('.lora_')[0]}" for name, _ in twin.named_parameters() if ".lora_" in name
    }
    if odd := sorted(theirs ^ {name.partition(".lora_")[0] for name in names}):
        raise BadInput(asked, f"stock peft would put {len(odd)} of its parts elsewhere, {odd[0]} among them", DO)
