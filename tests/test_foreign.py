"""Private names of other libraries: each that trimtab uses is there, with the parameters that it relies on.

A failure names what an upgrade has changed. A private name that is used and not in these tables fails as well.
"""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import Trainer, trainer_utils
from trl import GRPOTrainer, SFTTrainer

import trimtab
from conftest import GQA, MODELS
from trimtab import foreign, methods
from trimtab.engine import rl_trainer, trainers

ROOT = Path(trimtab.__file__).parent

# Methods of the libraries that trimtab's classes override, or call by these arguments: owner -> name -> parameters.
METHODS: dict[Any, dict[str, str]] = {
    Trainer: {
        "_clip_grad_norm": "model",
        "_get_grad_norm": "model grad_norm=None",
        "_get_num_items_in_batch": "batch_samples device",
        "_get_output_dir": "trial",
        "_get_train_sampler": "train_dataset=None",
        "_load_best_model": "",
        "_load_from_checkpoint": "resume_from_checkpoint model=None",
        "_load_optimizer_and_scheduler": "checkpoint",
        "_save_optimizer_and_scheduler": "output_dir",
        "_defer_fsdp_gradient_reduction": "",
        "_load_rng_state": "checkpoint",
        "_move_model_to_device": "model device",
        "_prepare_inputs": "inputs",
        "_save": "output_dir=None state_dict=None",
        "_save_checkpoint": "model trial",
        "_set_signature_columns_if_needed": "",
        "compute_loss": "model inputs return_outputs=False num_items_in_batch=None",
        "compute_loss_context_manager": "",
        "prediction_step": "model inputs prediction_loss_only ignore_keys=None",
    },
    SFTTrainer: {
        "_prepare_dataset": "dataset processing_class args packing formatting_func dataset_name",
        "_save_checkpoint": "model trial",
        "_send_telemetry": "",
        "compute_loss": "model inputs return_outputs=False num_items_in_batch=None",
    },
    GRPOTrainer: {
        "_generate_and_score_completions": "inputs",
        "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images=False",
        "_get_train_sampler": "dataset=None",
        "_load_optimizer_and_scheduler": "checkpoint",
        "_prepare_inputs": "generation_batch",
        "_save_checkpoint": "model trial",
        "_send_telemetry": "",
        "_tokenize_prompts": "prompts",
        "compute_loss": "model inputs return_outputs=False num_items_in_batch=None",
        "prediction_step": "model inputs prediction_loss_only ignore_keys=None",
        "training_step": "model inputs num_items_in_batch",
    },
    trl.trainer.sft_trainer.DataCollatorForLanguageModeling: {"torch_call": "examples"},
    BaseTuner: {
        "_check_new_adapter_config": "config",
        "_create_and_replace": "peft_config adapter_name target target_name parent current_key parameter_name=None",
        "_mark_only_adapters_as_trainable": "model",
        "_unload_and_optionally_merge": "merge=True progressbar=False safe_merge=False adapter_names=None",
        "delete_adapter": "adapter_name",
        "inject_adapter": "model adapter_name autocast_adapter_dtype=True low_cpu_mem_usage=False state_dict=None",
    },
    nn.Module: {
        "_load_from_state_dict": "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
        "_save_to_state_dict": "destination prefix keep_vars",
    },
}


def _experts() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    model = transformers.Qwen3MoeForCausalLM(config)
    assert model.config._experts_implementation == "grouped_mm"
    return next(module for module in model.modules() if hasattr(module, "_is_expert_parallel"))


def _with_hooks() -> nn.Module:
    model = MODELS["llama"]()
    model.enable_input_require_grads()
    return model


# Private attributes that trimtab reads or sets where they are -> something that has them.
ATTRIBUTES: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("_modules", "_parameters", "_buffers", "_compiled_call_impl"), lambda: nn.Linear(1, 1)),
    **dict.fromkeys(("_member_map_", "_member_names_", "_value2member_map_"), lambda: PeftType),
    **dict.fromkeys(("_name_", "_value_"), lambda: PeftType.LORA),
    "_version": lambda: torch.zeros(1),
    "_cdata": lambda: torch.zeros(1).untyped_storage(),
    "_schema": lambda: torch.ops.aten.add.Tensor,
    "_overloadpacket": lambda: torch.ops.aten.add.Tensor,
    "_last_lr": lambda: torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], 0.1)),
    "_local_scalar_dense": lambda: torch.ops.aten,
    "_grouped_mm": lambda: torch.ops.aten,
    "_attn_implementation": lambda: MODELS["llama"]().config,
    "_name_or_path": lambda: MODELS["llama"]().config,
    "_experts_implementation": lambda: MODELS["llama"]().config,
    "_is_expert_parallel": _experts,
    "_apply_gate": _experts,
    "_require_grads_hooks": _with_hooks,
}
IN_SOURCE = {  # attributes that the libraries' own code sets or asks for
    "_total_train_tokens": SFTTrainer,
    "_hf_peft_config_loaded": trainer_utils,
    **dict.fromkeys(
        ("_step", "_buffered_inputs", "_metrics", "_logs", "_entropy_bonus_enabled", "_last_world_entropy"), GRPOTrainer
    ),
    "_is_hf_initialized": transformers.modeling_utils,
    "_gradient_checkpointing_func": transformers.modeling_utils,
    "_ddp_params_and_buffers_to_ignore": torch.nn.parallel.distributed,
}
PUBLIC = {"_exit", "_replace"}  # of os and of named tuples, in spite of their names


def parameters(method: Any) -> str:
    found = list(inspect.signature(method).parameters.values())[1:]
    return " ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found)


@pytest.mark.parametrize("owner,name", [(owner, name) for owner, names in METHODS.items() for name in names])
def test_a_method_has_the_parameters_that_are_relied_on(owner, name):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__} has no {name} any more"
    assert parameters(method) == METHODS[owner][name], f"{owner.__name__}.{name}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_there(name):
    assert hasattr(ATTRIBUTES[name](), name)


@pytest.mark.parametrize("name", IN_SOURCE)
def test_the_library_uses_an_attribute(name):
    assert name in inspect.getsource(IN_SOURCE[name])


def test_what_is_called_computes_what_it_should():
    x = torch.randn(3, 5, requires_grad=True)
    p = x.softmax(-1)
    d_p = torch.randn(3, 5)
    (d_x,) = torch.autograd.grad(p, x, d_p)
    assert torch.allclose(foreign.softmax_backward(d_p, p.detach(), -1, p.dtype), d_x)
    to = [torch.zeros(2), torch.zeros(3)]
    foreign.foreach_copy(to, [torch.ones(2), torch.ones(3)])
    assert all(bool((tensor == 1).all()) for tensor in to)
    for fused, kind in ((foreign.fused_adam, torch.optim.Adam), (foreign.fused_adamw, torch.optim.AdamW)):
        parameter = torch.ones(4, requires_grad=True)
        parameter.grad = torch.arange(4.0)
        mine, grad, m, v, step = parameter.detach().clone(), parameter.grad.clone(), *torch.zeros(2, 4), torch.ones(())
        kind([parameter], lr=0.1, weight_decay=0.3).step()
        fused([mine], [grad], [m], [v], [], [step], lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.3, eps=1e-8,
              amsgrad=False, maximize=False, grad_scale=None, found_inf=None)  # fmt: skip
        assert torch.allclose(mine, parameter)


def test_a_backward_pass_is_seen():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(foreign.recomputing()))
    assert not foreign.recomputing()
    y.backward()
    assert seen == [True] and not foreign.recomputing()


def test_a_quantised_model_is_admitted_and_left_as_it_was():
    model = MODELS["llama"]()
    foreign.admit_quantised(model)
    assert not model._hf_peft_config_loaded, "it is not quantised"
    model.is_quantized, before = True, set(vars(model)) | {"is_quantized"}
    foreign.admit_quantised(model)
    assert model._hf_peft_config_loaded
    foreign.admit_quantised(model, False)
    assert not model._hf_peft_config_loaded and set(vars(model)) == before


# --- nothing else ----------------------------------------------------------------------------------------------------

TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def our_names() -> Iterator[str]:
    """The names that trimtab itself defines: functions, classes, variables, fields, and attributes of `self`."""
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield ast.literal_eval(node.args[1])


OURS = set(our_names())
LISTED = {*ATTRIBUTES, *IN_SOURCE, *PUBLIC, *(name for names in METHODS.values() for name in names)}


@pytest.mark.parametrize("file", [file for file in TREES if file != "foreign.py"])
def test_no_other_private_name_is_used(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if ast.unparse(node.value) == "aten":
                continue  # an operation: one that is gone fails when the module is imported
            assert node.attr in LISTED | OURS, f"line {node.lineno}: list {ast.unparse(node)} in tests/test_foreign.py"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(map(private, names)), f"line {node.lineno}: import it in trimtab/foreign.py"


def subclasses(owner: type) -> Iterator[type]:
    for found in owner.__subclasses__():
        yield found
        yield from subclasses(found)


def test_every_private_method_that_ours_override_is_listed():
    for name, row in methods.TABLE.items():
        methods.find(name, row.kind)
    ours = {cls for owner in METHODS for cls in subclasses(owner) if cls.__module__.startswith("trimtab.")}
    assert {trainers.CausalTrainer, trainers.ClassifierTrainer, rl_trainer.PolicyTrainer} < ours
    for cls in ours:
        libraries = [base for base in cls.__mro__ if not base.__module__.startswith("trimtab.")]
        listed = {name for base in libraries for name in METHODS.get(base, ())}
        for part in set(cls.__mro__) - set(libraries):
            for name in filter(private, vars(part).keys() - {"_abc_impl"}):
                assert name in listed or not any(name in vars(base) for base in libraries), f"{cls.__name__}.{name}"


def test_libraries_have_upper_bounds():
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    bounds = {text.split(">")[0]: text for text in project["dependencies"]}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets"):
        assert "<" in bounds[name], name
