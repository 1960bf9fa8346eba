"""A thin subclass of TRL's GRPOTrainer, for objectives that raise the reward of sampled replies.

Rewards, advantages, TRL's losses, logging and schedules are the library's. What differs: the prompts are those of
`data.train` and the rewards those of `data.rewards`, checked; a prompt is read once for its group; log-probabilities
are computed for the tokens in the loss only (model/logprobs.py), and for objectives with a loss of their own,
completions without an advantage are left out of the forward pass. The reference of `beta` is the base itself, whose
weights are mapped from the same file. Rollouts are in a checkpoint if it is written between their updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, split_tensor_dict

from ..artifacts.checkpoint_files import EARLIER
from ..bases.policy import Policy, Rollouts
from ..contracts import Surgery, cache_of, penalty_of
from ..cost.trace import CACHE
from ..data.rewards import Reward, reply_text
from ..errors import BadInput
from ..foreign import admit_quantised
from ..model import packed
from ..model.logprobs import score_tokens
from ..model.prefix_trie import pack
from ..model.reply import ReplyForm, stop_ids
from ..model.rollouts import sample_groups, sample_with_replays
from ..model.sampling import prompt_ids
from ..recipe import Recipe
from .job import Inputs, Job
from .rl_inputs import LENGTH, cache_policies, check_groups, prompts_of
from .trainers import _OurTrainer

ROLLOUTS = "rollouts.pt"  # of a checkpoint: what TRL's trainer does not save
EQUAL = 20  # rollouts without a difference in reward until the user is told


class PolicyTrainer(_OurTrainer, GRPOTrainer):
    """GRPOTrainer with a trimtab objective."""

    arguments = GRPOConfig
    trace: Any = None  # of a step that is metered (cost/trace.py)

    def _send_telemetry(self) -> None:
        """TRL's trainers report their use to the hub. Ours send nothing."""

    @classmethod
    def build(cls, job: Job, recipe: Recipe, model: Any, args: Any, inputs: Inputs) -> PolicyTrainer:
        rows, rewards = prompts_of(recipe, inputs, model, args, "train", job.say)
        test = None if inputs.test is None else prompts_of(recipe, inputs, model, args, "test", job.say)[0]
        check_groups(args, job.objective, len(rows))
        made = cls(
            job, model=model, args=args, processing_class=inputs.tokenizer, train_dataset=rows, eval_dataset=test,
            reward_funcs=list(rewards), policies=cache_policies(recipe, model),
        )  # fmt: skip
        made.set_reference(recipe)
        return made

    def __init__(self, job: Job, reward_funcs: list[Reward], policies: Sequence[Surgery] = (), **kwargs: Any):
        model, args = kwargs["model"], kwargs["args"]
        self._take(job, model, args)
        self.policies, self.equal = policies, 0
        admit_quantised(model)
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        beta, args.beta = args.beta, 0.0  # else the library would load the model a second time
        own = vars(model).get("forward")
        args.reward_weights = [reward.weight for reward in reward_funcs]
        try:
            super().__init__(reward_funcs=reward_funcs, **kwargs)
        except ValueError as error:  # the library names the arguments that it refuses
            if not any(field.name in str(error) for field in dataclasses.fields(args)):
                raise
            raise BadInput("training", " ".join(str(error).split()).rstrip("."), "Change these fields") from error
        finally:
            args.beta = beta
        for parameter, data in trained:  # see CausalTrainer
            parameter.data = data
        self.router_aux_loss_coef = 1.0  # our forward returns the router's loss with its weight
        self.use_log_probs(model, own)
        self.eos_token_ids = stop_ids(model, self.processing_class, job.base.reply or ReplyForm())
        self.sampling = {
            key: value for key, value in {**self.generation_kwargs, "eos_token_id": self.eos_token_ids}.items()
            if value is not None and key != "cache_implementation"
        }  # fmt: skip

    @property
    def objective(self) -> Policy:
        return self.job.objective  # type: ignore[return-value]

    def largest_batch(self) -> dict[str, Any]:
        """As `engine.inputs.largest_batch`, with the tokens of the longest `prompt`."""
        step = self.pad_to_multiple_of or 1
        prompt, longest = (
            -(-size // step) * step for size in (max(self.train_dataset[LENGTH]), self.max_completion_length)
        )
        rows = self.args.per_device_train_batch_size
        found = self.objective.largest(rows, self.num_generations, prompt, longest)
        return {**found, "filled": 1.0, "lengths": 1 + longest // 16, "prompt": prompt}

    def use_log_probs(self, model: Any, own: Any) -> None:
        """Replaces the head that the library has put on `model` (`own`: the forward that the model itself had)."""
        vars(model).pop("forward", None)
        original = own or model.forward
        entropy = self._entropy_bonus_enabled

        @functools.wraps(type(model).forward)
        def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **more: Any) -> Any:
            if not fused_lm_head:
                return original(*args, **({} if labels is None else {"labels": labels}), **more)
            assert labels is not None
            inputs = {key: more[key] for key in ("input_ids", "attention_mask")}
            found = score_tokens(
                model, inputs, labels, temperature=self.temperature, chunk=self.objective.chunk,
                whole=self.objective.whole, entropy_gradient=entropy,
            )  # fmt: skip
            at, shape = (found.rows, found.columns - 1), labels[:, 1:].shape
            logp, spread = (x.new_zeros(shape).index_put(at, x) for x in (found.logp, found.entropy))
            return FusedCausalLMOutput(log_probs=logp, entropy=spread, aux_loss=found.balance)

        model.forward = forward

    def set_reference(self, recipe: Recipe) -> None:
        """The reference model of `beta`: the base, without patches."""
        if not self.args.beta or any(parameter.is_meta for parameter in self.model.parameters()):
            return
        from ..model.load import load_model

        if getattr(self.model, "is_quantized", False):
            have = "the reference would be a second copy of the 4/8-bit base, which the plan does not cover"
            raise BadInput(f"training: beta: {self.args.beta}", have, "Set beta: 0, or another precision")
        self.ref_model, _ = load_model(recipe.model, task="causal-lm", device=self.args.device)
        self.ref_model.requires_grad_(False).eval()
        self.use_log_probs(self.ref_model, None)
        self.beta = self.args.beta

    # --- rollouts ------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        made = super()._get_train_sampler(dataset)
        return EpochSampler(
            made.data_source, made.mini_repeat_count, made.batch_size, made.repeat_count, made.shuffle, made.seed
        )

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        if isinstance(prompts[0], str) or not self.chat_template_kwargs:
            return [prompt_ids(self.processing_class, prompt) for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """-> the ids of each completion. The prompts come repeated, those of a group together."""
        prompts = prompt_ids[::num_generations]
        assert prompt_ids == [prompt for prompt in prompts for _ in range(num_generations)]
        return self.sample_replies(prompts, num_generations), None

    def sample_replies(self, prompts: list[list[int]], generations: int) -> list[list[int]]:
        """The ids of `generations` replies to each prompt; 4-bit weights are packed for it (model/packed.py)."""
        if self.trace is not None:  # this step is metered
            self.trace.enter("rollouts", CACHE)
        pays = packed.pays(self.max_completion_length) and self.args.device.type == "cpu"
        with self.compute_loss_context_manager(), packed.hold(self.model) if pays else contextlib.nullcontext():
            longest, replays = self.max_completion_length, self.objective.replays(generations)
            if self.model.training and replays:
                return sample_with_replays(self._sample, prompts, generations, replays, longest)
            return self._sample(prompts, generations, longest)

    def _sample(self, prompts: list[list[int]], generations: int, longest: int) -> list[list[int]]:
        settings = {**self.sampling, "max_new_tokens": longest}
        return sample_groups(self.model, self.processing_class, prompts, generations, settings, self.new_cache)

    def new_cache(self) -> Any:
        """A KV cache with the recipe's policy; None without one."""
        return cache_of(self.policies)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with warnings.catch_warnings():  # the library asks for checkpointing by its old name
            warnings.simplefilter("ignore", FutureWarning)
            made = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._total_train_tokens += int(made["prompt_mask"].sum() + made["completion_mask"].sum())
            self._tell_if_equal(made["advantages"])
        mode, generations = (
            ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        )
        count = len(made["advantages"])
        made["group"] = torch.arange(count, device=made["advantages"].device) // generations
        rollouts = Rollouts(made["completion_ids"], made["completion_mask"].bool(), made["advantages"], made["group"])
        made["weights"], made["shares"] = self.objective.weights(rollouts)
        share = (made["weights"] != 0).sum() / made["completion_mask"].sum().clamp(min=1)
        self._metrics[mode]["tokens_in_loss"].append(float(self.accelerator.gather(share).mean()))
        return made

    def _tell_if_equal(self, advantages_B: Tensor) -> None:
        self.equal = 0 if bool(advantages_B.any()) else self.equal + 1
        if self.equal == EQUAL:
            self.job.say(
                f"for {EQUAL} rollouts all {self.num_generations} replies to a prompt have earned the same, so that "
                "nothing was learned: use prompts of another difficulty, a higher temperature, more num_generations, "
                "or a reward that is not all or nothing"
            )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As the library, but without a shuffle of completions: those of a prompt stay together, for their tree."""
        if not self.objective.own_loss or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        at = self._step % self.args.steps_per_generation
        if at == 0 or self._buffered_inputs is None:
            made = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(made, self.args.steps_per_generation)
        return self._buffered_inputs[at]

    # --- the loss ------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step = self._step
        value = super().training_step(model, inputs, 1 if num_items_in_batch is None else num_items_in_batch)
        self._step = step + 1  # a stepper of its own does not pass the library's method
        return value

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The share of an optimizer step's loss, shape (): the library's trainer does not scale it any more."""
        train = self.model.training
        parts = self.current_gradient_accumulation_steps if train else 1
        if not self.objective.own_loss:
            value = super().compute_loss(model, inputs)
        elif (batch := self.batch_of(inputs)) is None:  # no completion has an advantage
            value = torch.zeros((), device=self.args.device, requires_grad=torch.is_grad_enabled())
        else:
            count = len(inputs["completion_ids"])
            value = model(objective_batch=batch, objective_count=count)[0] / parts
        if train:
            self.step_losses.append(value.detach().float())
            self.step_summed = True
            if (penalty := penalty_of(self.job.surgeries)) is not None:
                value = value + penalty / parts
        return value

    def batch_of(self, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The objective's batch of completions (`Policy.loss`), without those that do not count; None if none does."""
        beta = self.beta if self.beta and "ref_per_token_logps" in inputs else 0.0
        counts_BT = inputs["shares"] if beta else inputs["weights"]
        rows = (counts_BT != 0).any(1).nonzero().squeeze(1)
        if not len(rows):
            if self.args.world_size == 1:
                return None
            rows = torch.zeros(1, dtype=torch.int64, device=rows.device)  # all processes run a forward pass
        if self.objective.packs and not beta:
            return self._trees({key: value[rows] for key, value in inputs.items() if value.dim()})
        before, after = inputs["prompt_ids"][rows], inputs["completion_ids"][rows]
        mask = torch.cat([inputs["prompt_mask"][rows], inputs["completion_mask"][rows]], 1)
        step = self.pad_to_multiple_of or 1
        left = int(mask.argmax(1).min()) // step * step  # columns of padding before every prompt
        blank = torch.zeros(before.shape, device=before.device)
        chosen = torch.cat([blank, counts_BT[rows]], 1) != 0
        ids = torch.cat([before, after], 1)
        batch = {
            "input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~chosen, -100),
            "weights": torch.cat([blank, inputs["weights"][rows]], 1),
        }  # fmt: skip
        if beta:
            for name, key in (("reference", "ref_per_token_logps"), ("shares", "shares")):
                batch[name] = torch.cat([blank, inputs[key][rows]], 1)
        return {key: value[:, left:] for key, value in batch.items()}

    def _trees(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as one tree per prompt, with shared prefixes once."""
        device, rows, weights = inputs["prompt_ids"].device, [], []
        for row in range(len(inputs["prompt_ids"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            known = inputs["completion_mask"][row].bool()
            rows.append(prompt + inputs["completion_ids"][row][known].tolist())
            weights.append([0.0] * len(prompt) + inputs["weights"][row][known].tolist())
        made = pack(rows, weights, inputs["group"].tolist(), self.pad_to_multiple_of or 1)
        made = type(made)(*(part.to(device) for part in made))
        return {
            "input_ids": made.ids, "labels": made.ids.masked_fill(made.weights == 0, -100), "weights": made.weights,
            "position_ids": made.positions, "parents": made.parents, "sees": made.sees,
        }  # fmt: skip

    # --- logs and checkpoints ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._metrics["train"].pop("num_tokens", None)
        if self.model.training:
            logs["num_tokens"] = self.tokens()
        super().log(logs, start_time)

    def counts(self, mode: str) -> dict[str, float]:
        return {}

    def samples(self, most: int = 4) -> list[dict[str, Any]]:
        """Some of the newest prompts and replies, with what each earned."""
        logs, found = self._logs, []
        for at in range(max(0, len(logs["prompt"]) - most), len(logs["prompt"])):
            prompt, reply = logs["prompt"][at], reply_text(logs["completion"][at])
            earned = {name: values[at] for name, values in logs["rewards"].items()}
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            found.append({"prompt": asked, "reply": reply, **earned, "advantage": logs["advantages"][at]})
        return found

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            every = self.args.steps_per_generation * self.num_iterations
            left = self._buffered_inputs if self._step % every else None
            entropy = (self.entropy_coef, self._last_world_entropy) if self.use_adaptive_entropy else None
            state = {"step": self._step, "rollouts": left, "entropy": entropy, "equal": self.equal}
            torch.save(state, Path(output_dir or self.args.output_dir) / ROLLOUTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (path := Path(checkpoint) / ROLLOUTS).is_file():
            return
        try:
            state = torch.load(path, weights_only=True, map_location=self.args.device)
            self._step, self._buffered_inputs, self.equal = state["step"], state["rollouts"], state["equal"]
            if state["entropy"] is not None:
                self.entropy_coef, self._last_world_entropy = state["entropy"]
        except Exception as error:  # torch, zipfile and pickle each raise their own types
            raise BadInput(f"resume from {checkpoint}", "its rollouts cannot be read", EARLIER) from error

    prediction_step = GRPOTrainer.prediction_step


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, of which each epoch's depends on its number only: a resumed run has the same."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
