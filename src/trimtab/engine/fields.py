"""Each field of SFTConfig, GRPOConfig and TrainingArguments is honoured, or refused with a message.

`HONOURED` fields act exactly as in a TRL or transformers script. `REFUSED` fields would do nothing here, or something
else than they state; any value but the library's default is refused before the run starts. A test checks that every
field of both dataclasses is in one of the two tables.
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
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
deepspeed router_aux_loss_coef dataset_num_proc eos_token max_length truncation_mode shuffle_dataset
packing packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss
loss_type activation_offloading pad_token
disable_dropout num_generations num_generations_eval max_completion_length ds3_gather_for_generation
generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs
repetition_penalty beta num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos
vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level multi_objective_aggregation scale_rewards
mask_truncated_completions top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl
""".split())
# fmt: on

_HUB = ("trimtab sends nothing to a hub", "Leave it out, and upload the finished folder with `hf upload`")
_COMPUTE = "trimtab computes in the model's own dtype, or in bf16"
_NO_METRICS = "during training trimtab evaluates only the loss, not predictions"
_SHARD = ("the recipe's place sets whether weights are split over processes", "Set place: {shard: true}")
_FLAG = "the trimtab command decides what runs"
_FUSED = ("trimtab has its own fused operations (engine: fused_ops)", "Leave it out")
_COMPILE = ("trimtab compiles block by block", "Set engine: {compile: true}")

_VLLM = ("vLLM is a server of its own, and trimtab samples within the budget", "Leave it out")
_ROLLOUTS = ("trimtab samples the replies itself, and reads each prompt once for its group", "Leave it out")
_REFERENCE = ("the reference of beta is the base without patches, which stays as it is", "Leave it out")
_SHOWN = ("trimtab writes samples of the replies into the run's folder (completions.jsonl)", "Leave it out")

REFUSED: dict[str, tuple[str, str]] = {  # field -> have, do
    "output_dir": ("the recipe's output sets the folder of a run", "Set output: FOLDER"),
    "use_cpu": ("the recipe's place sets where a run computes", "Set place: {fast: cpu}"),
    "resume_from_checkpoint": ("the recipe sets whether a run is resumed", "Set resume: true"),
    "model_init_kwargs": ("the recipe's model block sets how it is loaded", "Set model: {name: ..., precision: ...}"),
    "trust_remote_code": ("the recipe's model block sets how it is loaded", "Set model: {trust_remote_code: true}"),
    "chat_template_path": ("the chat template belongs to the data", "Set data: {chat_template: FILE}"),
    "dataset_text_field": ("columns are named in the data block", "Set data: {columns: {text: NAME}}"),
    "dataset_kwargs": ("trimtab prepares the rows itself", "Describe them in the data block"),
    "fp16": (_COMPUTE, "Set bf16: true"),
    "bf16_full_eval": (_COMPUTE + ", in evaluation too", "Leave it out"),
    "fp16_full_eval": (_COMPUTE + ", in evaluation too", "Leave it out"),
    "torch_compile": _COMPILE, "torch_compile_backend": _COMPILE, "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _FUSED, "liger_kernel_config": _FUSED,
    "use_cache": ("training uses no KV cache", "Leave it out"),
    "auto_find_batch_size": ("the planner finds what fits before a run starts", "Run `trimtab plan --search`"),
    "disable_tqdm": ("trimtab shows its own progress", "Leave it out, or run with --quiet"),
    "eval_do_concat_batches": (_NO_METRICS, "Leave it out"), "eval_use_gather_object": (_NO_METRICS, "Leave it out"),
    "eval_accumulation_steps": (_NO_METRICS, "Leave it out"), "include_for_metrics": (_NO_METRICS, "Leave it out"),
    "batch_eval_metrics": (_NO_METRICS, "Leave it out"), "label_names": (_NO_METRICS, "Leave it out"),
    "length_column_name": ("trimtab counts lengths in tokens itself", "Leave it out"),
    "skip_memory_metrics": ("trimtab measures memory itself (run.json)", "Leave it out"),
    "enable_jit_checkpoint": ("trimtab writes a checkpoint at Ctrl-C and before a budget is exceeded", "Leave it out"),
    **{f"vllm_{name}": _VLLM for name in (
        "mode", "model_impl", "enable_sleep_mode", "structured_outputs_regex", "server_base_url", "server_host",
        "server_port", "server_timeout", "group_port", "gpu_memory_utilization", "max_model_length",
        "tensor_parallel_size", "importance_sampling_correction", "importance_sampling_mode",
        "importance_sampling_clip_max", "importance_sampling_clip_min", "importance_sampling_cap",
    )},
    "use_vllm": _VLLM, "use_transformers_continuous_batching": _ROLLOUTS, "use_transformers_paged": _ROLLOUTS,
    "transformers_continuous_batching_config": _ROLLOUTS, "cache_implementation": _ROLLOUTS,
    "sync_ref_model": _REFERENCE, "ref_model_mixup_alpha": _REFERENCE, "ref_model_sync_steps": _REFERENCE,
    "log_completions": _SHOWN, "log_multimodal": _SHOWN, "num_completions_to_print": _SHOWN,
    "log_unique_prompts": _SHOWN, "log_completions_hub_repo": _HUB,
    "reward_weights": ("rewards and their weights belong to the data", "Set data: {rewards: [NAME: {weight: 2}]}"),
    "max_tool_calling_iterations": ("replies call no tools here", "Leave it out"),
    "cast_lm_head_to_fp32": (_COMPUTE + "; log-probabilities are fp32 anyway", "Leave it out"),
    "debug": ("trimtab's trainers have no such hooks", "Leave it out"),
    "fsdp": _SHARD, "fsdp_config": _SHARD,
    "do_train": (_FLAG, "Run `trimtab train`"), "do_eval": (_FLAG, "Set eval_strategy, or run `trimtab eval`"),
    "do_predict": (_FLAG, "Run `trimtab eval`"),
    "local_rank": ("the launcher sets it", "Start several processes with torchrun"),
    "parallelism_config": ("trimtab trains data-parallel", "Start several processes with torchrun"),
    "push_to_hub": _HUB, "hub_token": _HUB, "hub_private_repo": _HUB, "hub_model_id": _HUB, "hub_strategy": _HUB,
    "hub_always_push": _HUB, "hub_revision": _HUB,
}  # fmt: skip

_AT_LEAST_0 = (lambda v: 0 <= v < math.inf, "it must be 0 or more")
_ABOVE_0 = (lambda v: 0 < v < math.inf, "it must be above 0")
_COUNT = (lambda v: v >= 1, "it must be a whole number of 1 or more")
_SHARE = (lambda v: 0 <= v < 1, "it must be 0 or more, and below 1")

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda v: v == -1 or v >= 1, "it must be 1 or more, or -1 (count epochs)"),
    "num_train_epochs": _ABOVE_0, "learning_rate": _AT_LEAST_0, "warmup_steps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0, "adam_beta1": _SHARE, "adam_beta2": _SHARE, "adam_epsilon": _AT_LEAST_0,
    "label_smoothing_factor": _SHARE, "max_grad_norm": _AT_LEAST_0, "neftune_noise_alpha": _AT_LEAST_0,
    "per_device_train_batch_size": _COUNT, "per_device_eval_batch_size": _COUNT, "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT, "logging_steps": _ABOVE_0, "save_steps": _ABOVE_0, "eval_steps": _ABOVE_0,
    "eval_delay": _AT_LEAST_0, "save_total_limit": _COUNT, "dataloader_num_workers": _AT_LEAST_0,
    "pad_to_multiple_of": (lambda v: isinstance(v, str) or v >= 1, _COUNT[1]),
    "seed": _AT_LEAST_0, "data_seed": _AT_LEAST_0,
    "num_generations": (lambda v: v >= 2, "it must be 2 or more: a reply's advantage is over the others"),
    "num_generations_eval": _COUNT, "max_completion_length": _COUNT, "generation_batch_size": _COUNT,
    "steps_per_generation": _COUNT, "num_iterations": _COUNT, "temperature": _ABOVE_0,
    "top_p": (lambda v: 0 < v <= 1, "it must be above 0 and at most 1"), "top_k": _AT_LEAST_0, "beta": _AT_LEAST_0,
    "top_entropy_quantile": (lambda v: 0 < v <= 1, "it must be above 0 and at most 1"),
}  # fmt: skip

# field -> the field that it needs, the values of it that it needs, and what to do; if the recipe sets the needed field
# (`eval_strategy: no`), a field that then does nothing may stay
NEEDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "eval_steps": ("eval_strategy", lambda v: v == "steps", "Set eval_strategy: steps"),
    "eval_delay": ("eval_strategy", lambda v: v != "no", "Set eval_strategy: epoch or steps"),
    "eval_on_start": ("eval_strategy", lambda v: v != "no", "Set eval_strategy: epoch or steps"),
    "eval_packing": ("eval_strategy", lambda v: v != "no", "Set eval_strategy: epoch or steps"),
    "save_steps": ("save_strategy", lambda v: v == "steps", "Set save_strategy: steps"),
    "metric_for_best_model": ("load_best_model_at_end", bool, "Set load_best_model_at_end: true"),
    "greater_is_better": ("load_best_model_at_end", bool, "Set load_best_model_at_end: true"),
    "packing_strategy": ("packing", bool, "Set packing: true"),
    "activation_checkpointing_kwargs": ("activation_checkpointing", bool, "Set activation_checkpointing: true"),
    "optim_target_modules": ("optim", lambda v: "galore" in v or "apollo" in v, "Use a GaLore or APOLLO optimizer"),
}  # fmt: skip

DEPRECATED_DEFAULTS = {"disable_tqdm": (None, True), "do_eval": (False, None)}  # values that change nothing


def check_fields(values: dict[str, Any], cls: type[TrainingArguments], given: Collection[str]) -> None:
    """BadInput for a field that would be ignored, and for a number outside its range. `values`: those of the recipe and
    our defaults, typed; `given`: the names in the recipe."""
    defaults = {f.name: _default(f) for f in dataclasses.fields(cls) if f.init}
    for key, value in values.items():
        same = value == defaults.get(key) or value in DEPRECATED_DEFAULTS.get(key, ())
        if key in REFUSED and not same:
            raise BadInput(f"training: {key}: {_short(value)}", *REFUSED[key])
        inside, wanted = RANGES.get(key, (lambda v: True, ""))
        if value is not None and not inside(value):
            raise BadInput(f"training: {key}: {_short(value)}", wanted, "Correct the value")
        needed, suits, do = NEEDS.get(key, ("", lambda v: True, ""))
        has = values.get(needed, defaults.get(needed))
        if needed and needed not in given and not same and not suits(getattr(has, "value", has)):
            raise BadInput(f"training: {key}: {_short(value)}", f"it has an effect only with {needed}", do)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
