"""What becomes of each field of SFTConfig and TrainingArguments: it is honoured, or refused in a sentence.

`HONOURED` fields act exactly as they do in a TRL or transformers script. `REFUSED` fields would do nothing here, or
something else than they say; any value but the library's own default ends the run before it starts. A test walks both
dataclasses, so a field that a new release adds is in one of the two tables or nowhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from transformers import TrainingArguments

from ..errors import BadInput

# fmt: off
HONOURED = frozenset("""
per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha
torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
include_num_input_tokens_seen log_level log_level_replica report_to run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
prediction_loss_only save_only_model save_strategy save_steps save_on_each_node save_total_limit
load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed accelerator_config dataloader_drop_last
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order remove_unused_columns train_sampling_strategy
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
fsdp_config deepspeed router_aux_loss_coef dataset_num_proc eos_token max_length truncation_mode shuffle_dataset
packing packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss
loss_type activation_offloading pad_token
""".split())
# fmt: on

_HUB = ("trimtab sends nothing to a hub", "Leave it out, and upload the finished folder with `hf upload`")
_COMPUTE = "trimtab computes in the model's own type, or in bf16"
_NO_METRICS = "trimtab evaluates the loss during training and no predictions"
_FLAG = "a recipe's verbs decide what runs"
_FUSED = ("trimtab has fused forms of its own (engine: lean)", "Leave it out")
_COMPILE = ("trimtab compiles block by block", "Say engine: {compile: true}")

REFUSED: dict[str, tuple[str, str]] = {  # field -> have, do
    "output_dir": ("a run writes into the recipe's output", "Say output: FOLDER"),
    "use_cpu": ("the recipe's place says where a run computes", "Say place: {fast: cpu}"),
    "resume_from_checkpoint": ("the recipe says whether a run is resumed", "Say resume: true"),
    "model_init_kwargs": ("the model is loaded by the recipe's model block", "Say model: {name: ..., precision: ...}"),
    "trust_remote_code": ("the model is loaded by the recipe's model block", "Say model: {trust_remote_code: true}"),
    "chat_template_path": ("the chat template belongs to the data", "Say data: {chat_template: FILE}"),
    "dataset_text_field": ("columns are named in the data block", "Say data: {columns: {text: NAME}}"),
    "dataset_kwargs": ("trimtab prepares the rows itself", "Describe them in the data block"),
    "fp16": (_COMPUTE, "Say bf16: true"),
    "bf16_full_eval": (_COMPUTE + ", in evaluation too", "Leave it out"),
    "fp16_full_eval": (_COMPUTE + ", in evaluation too", "Leave it out"),
    "torch_compile": _COMPILE, "torch_compile_backend": _COMPILE, "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _FUSED, "liger_kernel_config": _FUSED,
    "use_cache": ("training keeps no key-value cache", "Leave it out"),
    "auto_find_batch_size": ("the planner finds what fits before a run starts", "Run `trimtab plan --search`"),
    "disable_tqdm": ("trimtab shows its own progress", "Leave it out, or run with --quiet"),
    "eval_do_concat_batches": (_NO_METRICS, "Leave it out"), "eval_use_gather_object": (_NO_METRICS, "Leave it out"),
    "eval_accumulation_steps": (_NO_METRICS, "Leave it out"), "include_for_metrics": (_NO_METRICS, "Leave it out"),
    "batch_eval_metrics": (_NO_METRICS, "Leave it out"), "label_names": (_NO_METRICS, "Leave it out"),
    "length_column_name": ("lengths are counted from the tokens", "Leave it out"),
    "skip_memory_metrics": ("trimtab measures memory itself (run.json)", "Leave it out"),
    "enable_jit_checkpoint": ("trimtab writes a checkpoint at Ctrl-C and before a budget is exceeded", "Leave it out"),
    "debug": ("trimtab's trainers have no such hooks", "Leave it out"),
    "do_train": (_FLAG, "Run `trimtab train`"), "do_eval": (_FLAG, "Say eval_strategy, or run `trimtab eval`"),
    "do_predict": (_FLAG, "Run `trimtab eval`"),
    "local_rank": ("the launcher sets it", "Start several processes with torchrun"),
    "parallelism_config": ("trimtab trains data-parallel", "Start several processes with torchrun"),
    "push_to_hub": _HUB, "hub_token": _HUB, "hub_private_repo": _HUB, "hub_model_id": _HUB, "hub_strategy": _HUB,
    "hub_always_push": _HUB, "hub_revision": _HUB,
}  # fmt: skip

_AT_LEAST_0 = (lambda v: 0 <= v < math.inf, "a number from 0 on is needed")
_ABOVE_0 = (lambda v: 0 < v < math.inf, "a number above 0 is needed")
_COUNT = (lambda v: v >= 1, "a whole number from 1 on is needed")
_SHARE = (lambda v: 0 <= v < 1, "a number from 0 to below 1 is needed")

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda v: v == -1 or v >= 1, "-1 (count epochs) or a number from 1 on is needed"),
    "num_train_epochs": _ABOVE_0, "learning_rate": _AT_LEAST_0, "warmup_steps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0, "adam_beta1": _SHARE, "adam_beta2": _SHARE, "adam_epsilon": _AT_LEAST_0,
    "label_smoothing_factor": _SHARE, "max_grad_norm": _AT_LEAST_0, "neftune_noise_alpha": _AT_LEAST_0,
    "per_device_train_batch_size": _COUNT, "per_device_eval_batch_size": _COUNT, "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT, "logging_steps": _ABOVE_0, "save_steps": _ABOVE_0, "eval_steps": _ABOVE_0,
    "eval_delay": _AT_LEAST_0, "save_total_limit": _COUNT, "dataloader_num_workers": _AT_LEAST_0,
    "pad_to_multiple_of": (lambda v: isinstance(v, str) or v >= 1, "a whole number from 1 on is needed"),
    "seed": _AT_LEAST_0, "data_seed": _AT_LEAST_0,
}  # fmt: skip

# field -> the field and values without which it does nothing, and what to do; `eval_strategy: no` in so many words
# turns evaluation off, and what else is said of it may stay
NEEDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "eval_steps": ("eval_strategy", lambda v: v == "steps", "Say eval_strategy: steps"),
    "eval_delay": ("eval_strategy", lambda v: v != "no", "Say eval_strategy: epoch or steps"),
    "eval_on_start": ("eval_strategy", lambda v: v != "no", "Say eval_strategy: epoch or steps"),
    "eval_packing": ("eval_strategy", lambda v: v != "no", "Say eval_strategy: epoch or steps"),
    "save_steps": ("save_strategy", lambda v: v == "steps", "Say save_strategy: steps"),
    "metric_for_best_model": ("load_best_model_at_end", bool, "Say load_best_model_at_end: true"),
    "greater_is_better": ("load_best_model_at_end", bool, "Say load_best_model_at_end: true"),
    "packing_strategy": ("packing", bool, "Say packing: true"),
    "optim_target_modules": ("optim", lambda v: "galore" in v or "apollo" in v, "Take a GaLore or APOLLO optimizer"),
}  # fmt: skip

DEPRECATED_DEFAULTS = {"disable_tqdm": (None, True), "do_eval": (False, None)}  # values that change nothing


def check_fields(values: dict[str, Any], cls: type[TrainingArguments], given: Collection[str]) -> None:
    """BadInput for a field that would be ignored, and for a number outside its range. `values`: the recipe's and our
    defaults, typed; `given`: the names that the recipe has."""
    defaults = {f.name: _default(f) for f in dataclasses.fields(cls) if f.init}
    for key, value in values.items():
        same = value == defaults.get(key) or value in DEPRECATED_DEFAULTS.get(key, ())
        if key in REFUSED and not same:
            raise BadInput(f"training: {key}: {_short(value)}", *REFUSED[key])
        inside, wanted = RANGES.get(key, (lambda v: True, ""))
        if value is not None and not inside(value):
            raise BadInput(f"training: {key}: {_short(value)}", wanted, "Mend the value")
        needed, suits, do = NEEDS.get(key, ("", lambda v: True, ""))
        has = values.get(needed, defaults.get(needed))
        if needed and needed not in given and not same and not suits(getattr(has, "value", has)):
            raise BadInput(f"training: {key}: {_short(value)}", f"it acts with {needed} only", do)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
