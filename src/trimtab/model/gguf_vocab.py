"""A tokenizer under llama.cpp's keys. BadInput for one whose ids llama.cpp would not reproduce.

llama.cpp has its own tokenizers, and a file names the one it needs. `gpt2` is BPE on bytes, after a split of the text
by regular expressions that `tokenizer.ggml.pre` names. `llama` is SentencePiece's BPE on characters: the pair whose
union has the highest score is merged first, and unknown characters become byte tokens.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import BadInput

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = [r"[^\r\n\p{L}\p{N}]?" + _UPPER + a + _LOWER + b for a, b in (("*", "+"), ("+", "*"))]
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = ("ByteLevel", True)  # GPT-2's own regular expression
PLAIN = ("ByteLevel", False)
# how the text is split before BPE, and whether a whole word of the vocabulary needs no merges -> tokenizer.ggml.pre
SPLITS: dict[tuple[tuple, bool], str] = {
    ((BYTES,), False): "gpt-2",
    ((("Digits", True), BYTES), False): "smollm",
    ((("Split", _CONTRACTIONS + _WORDS + r"\p{N}" + _REST), PLAIN), False): "qwen2",
    ((("Split", _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST), PLAIN), True): "llama-bpe",
    ((("Split", _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST), PLAIN), False): "smaug-bpe",
    ((("Split", "|".join(_CASES) + r"|\p{N}" + _SLASH), PLAIN), True): "tekken",
    ((("Split", "|".join(f"{c}{_CONTRACTIONS}?" for c in _CASES) + r"|\p{N}{1,3}" + _SLASH), PLAIN), False): "gpt-4o",
}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # SentencePiece's


class Vocabulary:
    """The tokens of a tokenizer as llama.cpp stores them; `size`: rows of the model's embeddings."""

    def __init__(self, tokenizer: Any, size: int, asked: str = "export to gguf"):
        self.tokenizer, self.size, self.asked = tokenizer, size, asked
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise self._refused(f"{type(tokenizer).__name__} has no fast form, from which trimtab reads the vocabulary")
        self.form = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self.form["model"]
        if model.get("type") != "BPE":
            raise self._refused(f"its tokenizer is a {model.get('type')} model, and trimtab writes BPE only")
        self.pieces = bool(model.get("byte_fallback"))
        self.merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        if not self.merges:
            raise self._refused("its tokenizer has single characters and no merges, which llama.cpp does not read")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
            raise self._refused("its BPE marks the ends of words, or drops merges at random")
        self.pre = "default" if self.pieces else self._split()
        self.prefix = self._prefix() if self.pieces else False
        self.adds = self._added()
        self.tokens, self.types = self._tokens()

    def _refused(self, have: str) -> BadInput:
        do = "Use --to merged, and llama.cpp's own convert_hf_to_gguf.py on the folder"
        return BadInput(self.asked, f"{have}; llama.cpp would give other ids", do)

    # --- what llama.cpp does before BPE -----------------------------------------------------------------------------

    def _split(self) -> str:
        """The name of the split before BPE on bytes."""
        parts = _flat(self.form.get("pre_tokenizer"), "pretokenizers")
        normal = _flat(self.form.get("normalizer"), "normalizers")
        if any(part["type"] != "NFC" for part in normal):  # llama.cpp expects composed characters
            raise self._refused(f"its tokenizer normalises text ({', '.join(part['type'] for part in normal)})")
        key = tuple(_part(part) for part in parts), bool(self.form["model"].get("ignore_merges"))
        if key not in SPLITS:
            raise self._refused(f"its tokenizer splits text in a way whose name trimtab does not know ({key[0]})")
        return SPLITS[key]

    def _prefix(self) -> bool:
        """Whether SentencePiece puts a space before the text."""
        normal = _flat(self.form.get("normalizer"), "normalizers")
        before = _flat(self.form.get("pre_tokenizer"), "pretokenizers")
        spaces = [part for part in before if part["type"] == "Metaspace"]
        plain = all(
            part["type"] == "Prepend" and part["prepend"] == SPACE
            or part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, SPACE)
            for part in normal
        )  # fmt: skip
        splits = [part for part in before if part["type"] != "Metaspace" and part.get("pattern") != {"String": " "}]
        if not plain or splits or any(part.get("split", True) for part in spaces) or not (normal or spaces):
            raise self._refused("its tokenizer prepares text otherwise than SentencePiece")
        return any(part["type"] == "Prepend" for part in normal) or any(p["prepend_scheme"] != "never" for p in spaces)

    def _added(self) -> tuple[bool, bool]:
        """Whether the tokenizer puts bos before and eos after a text."""
        whole = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for bos in (False, True):
            for eos in (False, True):
                start, end = [self.tokenizer.bos_token_id] * bos, [self.tokenizer.eos_token_id] * eos
                if whole == [*start, *bare, *end]:
                    return bos, eos
        raise self._refused(f"its tokenizer adds other tokens than bos and eos to a text ({whole} for {bare})")

    # --- the vocabulary ---------------------------------------------------------------------------------------------

    def _tokens(self) -> tuple[list[str], list[int]]:
        added = {entry["id"]: entry for entry in self.form["added_tokens"]}
        known = {index: token for token, index in self.form["model"]["vocab"].items()}
        tokens, types = [], []
        unknown = self.tokenizer.unk_token if self.pieces else None
        for index in range(self.size):
            entry, token = added.get(index), known.get(index)
            if entry is not None:
                token, kind = entry["content"], CONTROL if entry["special"] else USER
                if self.pieces and token == unknown:
                    kind = UNKNOWN
                elif self.pieces and kind == USER:
                    token = token.replace(SPACE, " ")
            elif token is None:
                token, kind = f"[PAD{index}]", UNUSED
            else:
                kind = UNKNOWN if token == unknown else BYTE if self.pieces and BYTE_TOKEN.fullmatch(token) else NORMAL
            tokens.append(token)
            types.append(kind)
        if beyond := [token for token, index in self.form["model"]["vocab"].items() if index >= self.size]:
            if beyond[0] not in {entry["content"] for entry in added.values()}:
                raise self._refused(f"its tokenizer has more tokens than the model has embeddings ({beyond[0]!r})")
        if len(set(tokens)) < len(tokens):
            raise self._refused("two of its tokens have the same text")
        if self.pieces and types.count(BYTE) != 256:
            raise self._refused("it has no token for each of the 256 bytes")
        return tokens, types

    def scores(self) -> list[float]:
        """Of SentencePiece's BPE, by id: merges come in falling order of the score of what they make. BadInput if the
        tokenizer's merges cannot be written so."""
        first: dict[str, int] = {}
        last = ""
        for rank, (left, right) in enumerate(self.merges):
            made = left + right
            if made != last and made in first:
                raise self._refused(f"its merges are not SentencePiece's (those of {made!r} are not in one place)")
            first.setdefault(made, rank)
            last = made
        pairs, known = set(self.merges), self.form["model"]["vocab"]
        for token, kind in zip(self.tokens, self.types, strict=True):
            splits = ((token[:at], token[at:]) for at in range(1, len(token) if kind == NORMAL else 0))
            if any(pair not in pairs and pair[0] in known and pair[1] in known for pair in splits):
                raise self._refused(f"its merges are not SentencePiece's ({token!r} has further parts)")
        return [-float(first.get(token.replace(" ", SPACE), len(first))) for token in self.tokens]

    def describe(self, writer: Any, stops: list[int]) -> None:
        """Write the keys of the tokenizer into a gguf.GGUFWriter. `stops`: the ids that end a reply."""
        tokenizer = self.tokenizer
        writer.add_tokenizer_model("llama" if self.pieces else "gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.pieces:
            writer.add_token_scores(self.scores())
        writer.add_token_types(self.types)
        if not self.pieces:
            writer.add_token_merges([" ".join(pair) for pair in self.merges])
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id in stops or not stops else stops[0]
        others = [stop for stop in stops if stop != eos]
        special = {"bos": tokenizer.bos_token_id, "eos": eos, "unk": tokenizer.unk_token_id,
                   "pad": tokenizer.pad_token_id, **dict(zip(("eot", "eom"), others, strict=False))}  # fmt: skip
        for name, index in special.items():
            if index is not None and index < self.size:
                getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.adds[0])
        writer.add_add_eos_token(self.adds[1])
        writer.add_add_space_prefix(self.prefix)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)


def _flat(part: dict | None, key: str) -> list[dict]:
    """The steps of a pre-tokenizer or normaliser, those of sequences in their order."""
    if part is None:
        return []
    return [inner for step in part[key] for inner in _flat(step, key)] if part["type"] == "Sequence" else [part]


def _part(part: dict) -> tuple:
    """What distinguishes a step of a pre-tokenizer."""
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel", part["use_regex"]
    if kind == "Digits":
        return kind, part["individual_digits"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return kind, part["pattern"].get("Regex", part["pattern"])
    return kind, str(part)
