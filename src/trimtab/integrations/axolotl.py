"""A plugin for Axolotl: `adapter: paca` (edora, senszoq, parallel_adapter, meft), with the method's fields in a block.

    plugins:
      - trimtab.integrations.axolotl.TrimtabPlugin
    adapter: paca
    trimtab: {r: 8, target_modules: all-linear}

It loads what integrations/peft.py makes, so saving, resuming and everything else is Axolotl's. Fields are checked when
the model is loaded; what is unknown or does not fit is refused with a sentence. `lora_model_dir` continues an adapter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel, Field

from ..errors import BadInput, nearest
from . import peft as tuners


class TrimtabArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    trimtab: dict[str, Any] = Field(default_factory=dict, description="The fields of the method named by `adapter`.")


class TrimtabPlugin(BasePlugin):
    """trimtab's trained methods as adapters."""

    def get_input_args(self) -> str:
        return f"{__name__}.TrimtabArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in tuners.NAMES]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """-> (the model with the adapter, or None if only the config is asked for; the config); None for an adapter of
        somebody else."""
        if cfg.adapter not in tuners.NAMES:
            return None
        config = made_config(cfg.adapter, dict(cfg.trimtab or {}), inference)
        if config_only:
            return None, config
        from peft import PeftModel, get_peft_model

        if folder := cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, folder, is_trainable=not inference), config
        return get_peft_model(model, config), config


def made_config(name: str, fields: dict[str, Any], inference: bool) -> Any:
    """The config of a tuner; BadInput for a field that it does not have."""
    cls = tuners.config_of(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise BadInput(f"trimtab: {key} with adapter: {name}", "there is no such field", nearest(key, known))
    return cls(task_type="CAUSAL_LM", inference_mode=inference, **fields)
