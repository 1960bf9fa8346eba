"""The table of methods. It imports none of them; the README, the CLI's help and the law tests are derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import BadInput, nearest


@dataclass(frozen=True)
class Row:
    """One method: where its class is, what kind it is (patch, objective, stepper), and a one-line summary."""

    target: str  # "module:Class" under trimtab.methods
    kind: str
    title: str
    summary: str
    paper: str = ""  # arXiv id
    exports: tuple[str, ...] = ()  # the forms that a patch can be exported to, of trimtab.inference.export.FORMS
    when: str = "train"  # a patch's `when` (contracts.When)

    def load(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(import_module(f".{module}", __name__), name)


TABLE: dict[str, Row] = {
    "paca": Row("paca:PaCA", "patch", "PaCA, QPaCA", "trains r input columns of each weight in place; a 4/8-bit base "
                "makes it QPaCA", "2503.01905", ("peft", "merged", "gguf", "gguf-lora")),
    "lora": Row("lora:LoRA", "patch", "LoRA, QLoRA, DoRA, LoRA-FA, VeLoRA", "low-rank adapters, computed by peft; "
                "two forms keep less of the activations", "2106.09685", ("peft", "merged", "gguf", "gguf-lora")),
    "edora": Row("edora:EDoRA", "patch", "EDoRA", "trains an r x r core between the weight's own singular vectors, and "
                 "each row's norm", "2501.12067", ("peft", "merged", "gguf")),
    "senszoq": Row("senszoq:SensZOQ", "patch", "SensZOQ", "trains the 0.1 % of the weights that matter most, as "
                   "a sparse change of a dense or 4-bit base", "2406.02913", ("peft", "merged", "gguf")),
    "diff_pruning": Row("diff_pruning:DiffPruning", "patch", "Diff pruning", "learns which 0.5 % of the parameters a "
                        "task changes, by gates that open and close", "2012.07463", ("peft", "merged", "gguf")),
    "parallel_adapter": Row("parallel_adapter:ParallelAdapter", "patch", "Parallel Adapter",
                            "a wide two-layer ReLU network beside each FFN", "2110.04366"),
    "meft": Row("meft:Meft", "patch", "MEFT", "a sparse adapter larger than fast memory; only the experts that a batch "
                "needs are fetched", "2406.04984"),
    "lst": Row("lst:LST", "patch", "LST", "a narrow side network that reads the model's blocks; no backward pass "
               "through the model", "2206.06522"),
    "full": Row("full:Full", "patch", "Full fine-tuning", "trains every weight", exports=("merged", "gguf")),
    "pruning": Row("pruning:Pruning", "patch", "Magnitude pruning, Wanda", "sets the least important weights to zero, "
                   "before training or for export", "2306.11695", ("merged", "gguf"), "both"),
    "sparsegpt": Row("sparsegpt:SparseGPT", "patch", "SparseGPT", "sets weights to zero and makes up for them in the "
                     "others, by the Hessian of each linear's inputs; optionally in 4 bits", "2301.00774",
                     ("merged", "gguf"), "both"),
    "embedding_pruning": Row("embedding_pruning:EmbeddingPruning", "patch", "Embedding pruning", "keeps only the "
                             "embeddings of ids that occur in the data", "2309.08708", ("merged", "gguf"), "both"),
    "cake": Row("cake:CAKE", "patch", "CAKE", "a KV cache within a budget, divided among layers by how they attend",
                "2503.12491", when="infer"),
    "snapkv": Row("snapkv:SnapKV", "patch", "SnapKV", "keeps what the newest tokens attend to in the KV cache",
                  "2404.14469", when="infer"),
    "pyramidkv": Row("pyramidkv:PyramidKV", "patch", "PyramidKV", "as SnapKV, with more tokens in the lower layers",
                     "2406.02069", when="infer"),
    "tova": Row("tova:TOVA", "patch", "TOVA", "evicts the token to which the newest one attends least",
                "2401.06104", when="infer"),
    "streaming_llm": Row("streaming_llm:StreamingLLM", "patch", "StreamingLLM", "keeps only the first and the newest "
                         "tokens in the KV cache", "2309.17453", when="infer"),
    "fiddler": Row("fiddler:Fiddler", "patch", "Fiddler", "keeps the experts of a mixture in slow memory, and a "
                   "working set of them in fast memory; for generation and training", "2402.07033", when="load"),
    "full_cache": Row("full_cache:FullCache", "patch", "Full KV cache", "all tokens, in memory that is reserved once, "
                      "in 16, 8 or 4 bits", when="infer"),
    "head": Row("classification:Head", "part", "Classification head", "the new head that classification trains"),
    "causal_lm": Row("causal_lm:CausalLM", "objective", "Causal language modelling",
                     "next-token loss; logits are computed in chunks"),
    "classification": Row("classification:Classification", "objective", "Sequence classification",
                          "a classification head on an encoder or decoder"),
    "black_box": Row("causal_lm:BlackBox", "objective", "Black-box metrics",
                     "one minus accuracy, exact match or F1 of replies; for `stepper: mezo`"),
    "grpo": Row("grpo:GRPO", "objective", "GRPO", "rewards of sampled replies, all tokens; TRL's loss", "2402.03300"),
    "s_grpo": Row("s_grpo:SGRPO", "objective", "S-GRPO", "as GRPO, on a random part of the tokens", "2504.20834"),
    "t_spmo": Row("t_spmo:TSPMO", "objective", "T-SPMO", "as GRPO, on the tokens at which replies part; credit by "
                  "prefix", "2504.20834"),
    "mezo": Row("mezo:Mezo", "stepper", "MeZO", "steps by differences of losses: forward passes only", "2305.17333"),
    "backprop": Row("backprop:Backprop", "stepper", "Back-propagation", "autograd and transformers' optimizers"),
}  # fmt: skip


def names(kind: str, when: str = "") -> list[str]:
    """The names of one kind; with `when`, only those of that `when`."""
    return [name for name, row in TABLE.items() if row.kind == kind and when in ("", row.when)]


def find(name: str, kind: str = "patch") -> Any:
    """The class called `name` in the table; the error for an unknown name suggests the nearest one."""
    if name not in TABLE or TABLE[name].kind not in (kind, "part"):
        raise BadInput(f'{kind} "{name}"', f"there is no such {kind}", nearest(name, names(kind)))
    return TABLE[name].load()


def name_of(instance: Any) -> str:
    """The table's name for an instance of a method's class."""
    wanted = type(instance).__name__
    return next(name for name, row in TABLE.items() if row.target.endswith(":" + wanted))
