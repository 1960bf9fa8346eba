"""Replies come in the form that the run was trained in: template, tools, ends, lengths; and greedy means greedy."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from helpers_reply import CHATML, SKY, byte_folder, byte_tokenizer, learned
from helpers_run import write_rows
from trimtab.data.chat import reply_form
from trimtab.data.rows import read_rows
from trimtab.data.spec import DataSpec
from trimtab.errors import BadInput
from trimtab.inference.export import export
from trimtab.inference.generate import chat, generate
from trimtab.model.reply import ReplyForm, stop_ids, stop_texts
from trimtab.model.sampling import check_generation, prompt_ids, sample

PLAIN = (  # its turns end with a line, which is no token of its own
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WORDS = PLAIN.replace("'\n'", "' END OF TURN\n'")


def right(recipe, **options) -> float:
    return recipe.evaluate(**options)["metrics"]["exact_match"]


def asked(recipe, *prompts, **settings) -> list[str]:
    return list(generate(recipe, prompts, **settings))


# --- where a reply ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos, template", [("<|im_end|>", CHATML), ("<|endoftext|>", CHATML),
                                           ("<|endoftext|>", PLAIN), ("<|endoftext|>", WORDS)])  # fmt: skip
def test_a_reply_ends_where_a_trained_turn_does(tmp_path, eos, template):
    """generation_config's eos is <|endoftext|>, which no row of a chat ends with."""
    recipe = learned(tmp_path, byte_folder(tmp_path / "m", template, eos, stop=256), SKY)
    assert right(recipe) == 1.0
    assert asked(recipe, "sky", "coal") == ["blue", "black"]
    merged = export(recipe, "merged")
    ends = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((merged / "config.json").read_text())["eos_token_id"]
    if template == CHATML:
        assert ends == [256, 258]
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": "coal"}])])
        out = transformers.AutoModelForCausalLM.from_pretrained(merged).generate(ids, do_sample=False, max_new_tokens=9)
        assert tokenizer.decode(out[0, ids.shape[1] :]) == "black<|im_end|>"


def test_ends_of_a_reply():
    from types import SimpleNamespace

    def ends(tokenizer, config=None, generation=None, **form):
        text = SimpleNamespace(eos_token_id=config)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text),
                                generation_config=SimpleNamespace(eos_token_id=generation))  # fmt: skip
        return stop_ids(model, tokenizer, ReplyForm(**form))

    assert ends(byte_tokenizer(eos="<|endoftext|>")) == [256, 258]
    assert ends(byte_tokenizer(None), config=5, generation=[6, 7]) == [5, 6, 7, 258]
    assert ends(byte_tokenizer(PLAIN), eos_token="<pad>") == [258, 259]
    assert stop_texts(byte_tokenizer(WORDS), ["blue"]) == ["END OF TURN"]
    assert stop_texts(byte_tokenizer(PLAIN), ["blue"]) == ["\n"] and not stop_texts(byte_tokenizer(PLAIN), ["a\nb"])
    both = byte_tokenizer(CHATML.replace("<|im_end|>", " END<pad>"))
    assert ends(both) == [258, 259] and stop_texts(both, []) == ["END"]
    refusing = byte_tokenizer("{{ raise_exception('no') }}")
    assert ends(refusing) == [258] and not stop_texts(refusing, [])


# --- how a prompt is put ---------------------------------------------------------------------------------------------


def test_tools_reach_the_template(tmp_path):
    template = "{{ (tools[0]['name'] if tools else 'none') + '\n' }}" + CHATML
    talk = [{"role": "user", "content": "x"}]
    rows = [{"messages": [*talk, {"role": "assistant", "content": said}], "tools": [{"name": name}]}
            for said, name in (("one", "alpha"), ("two", "beta"))]  # fmt: skip
    assert right(learned(tmp_path, byte_folder(tmp_path / "m", template), rows)) == 1.0


FORMS = {
    "question without a template": (SKY, {"chat": False}),
    "prompt + completion": ([{"prompt": row["question"], "completion": f" {row['answer']}"} for row in SKY], {}),
    "prompt + completion in a chat": (
        [{"prompt": row["question"], "completion": row["answer"]} for row in SKY], {"chat": True},
    ),
    "a system message": (SKY, {"system": "be short"}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_generate_asks_as_the_rows_did(tmp_path, form):
    rows, data = FORMS[form]
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), rows, data=data)
    assert asked(recipe, "sky", "coal") == ["blue", "black"] and right(recipe) == 1.0


def test_the_form_is_read_from_the_adapter_or_else_from_the_rows(tmp_path, capsys, monkeypatch):
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY, patches=[{"lora": {}}], data={"chat": False})
    meta = json.loads((tmp_path / "run" / "adapter" / "trimtab.json").read_text())
    assert meta["base"]["reply"] == {"chat": False, "after": "\n", "longest": 5, "stop": [], "eos_token": None,
                                     "template": None}  # fmt: skip
    seen = []
    monkeypatch.setattr("trimtab.model.sampling.sample", lambda m, t, prompts, **_: seen.extend(prompts) or [""])
    asked(recipe, "sky", base_only=True)
    meta["base"].pop("reply")  # as an older adapter has it
    (tmp_path / "run" / "adapter" / "trimtab.json").write_text(json.dumps(meta))
    asked(recipe, "sky")
    asked(recipe, "sky", raw=True)
    assert seen == ["sky\n", "sky\n", "sky"]
    for broken in ({"chat": 3}, {"longest": -1}, {"stop": [""]}, {"colour": 1}, {"template": []}, []):
        meta["base"]["reply"] = broken
        (tmp_path / "run" / "adapter" / "trimtab.json").write_text(json.dumps(meta))
        with pytest.raises(BadInput, match="damaged"):
            asked(recipe, "sky")


def test_a_conversation_uses_the_form_too(tmp_path, capsys, monkeypatch):
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY, data={"chat": False})
    lines = iter(["sky", "coal"])
    monkeypatch.setattr("trimtab.inference.generate._ask", lambda terminal: next(lines, None))
    chat(recipe)
    assert capsys.readouterr().out.split() == ["blue", "black"]


def test_a_plain_prompt_ends_where_its_reply_begins():
    from helpers_load import tiny_tokenizer

    tokenizer = tiny_tokenizer(None)  # puts [CLS] before and [SEP] after a text
    assert prompt_ids(tokenizer, "paris") == tokenizer("paris")["input_ids"][:-1] == [3, tokenizer.vocab["paris"]]


@pytest.mark.parametrize("name, made", [("chatml", "<|im_start|>assistant\n"), ("own.jinja", "<|im_start|>bot\n")])
def test_a_template_of_ones_own(tmp_path, name, made):
    """The run keeps its text: the file may change afterwards."""
    own = tmp_path / "own.jinja"
    own.write_text(CHATML.replace("assistant", "bot").replace("m['role']", "m['role'].replace('assistant', 'bot')"))
    model = byte_folder(tmp_path / "m", None, eos="<|endoftext|>", stop=256)
    recipe = learned(tmp_path, model, SKY, data={"chat_template": name if name == "chatml" else str(own)})
    own.write_text("{{ raise_exception('changed since') }}")
    assert asked(recipe, "sky") == ["blue"] and right(recipe) == 1.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(recipe, "merged"))
    talk = [{"role": "user", "content": "sky"}]
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False).endswith(made)


@pytest.mark.parametrize("name, words", [("chatmll", 'Did you mean "chatml"'), ("bad.jinja", "refuses it"),
                                         ("bytes.jinja", "UTF-8")])  # fmt: skip
def test_templates_that_are_none(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\xff")
    spec = DataSpec(str(write_rows(tmp_path / "d.jsonl", SKY)), chat_template=name)
    with pytest.raises(BadInput, match=words):
        read_rows(spec, "train", byte_tokenizer())


def test_a_template_without_a_chat_is_refused(tmp_path):
    path = str(write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}]))
    with pytest.raises(BadInput, match="data.chat_template: the prompt . completion rows are plain text"):
        read_rows(DataSpec(path, chat_template="chatml"), "train", byte_tokenizer())


# --- how long, and what greedy is ------------------------------------------------------------------------------------

LONG = " ".join(f"{i:03d}" for i in range(80)) + " #### 42"


def test_long_answers_are_not_cut(tmp_path):
    rows = [{"question": "n", "answer": LONG}]
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), rows, training={"max_steps": 120})
    said: list[str] = []
    found = recipe.evaluate(say=said.append)
    assert found["metrics"]["exact_match"] == 1.0 and found["cut_replies"] == 0 and not said
    assert asked(recipe, "n") == [LONG]  # the adapter's folder knows how long its answers were
    short = type(recipe)(**{**vars(recipe), "data": {**vars(recipe.data), "reply_tokens": 50}})
    found = short.evaluate(say=said.append)
    assert found["cut_replies"] == 1 and found["metrics"]["exact_match"] == 0.0
    assert said == ["1 of 1 replies were cut at 50 tokens; data.reply_tokens sets how long they may be"]
    assert asked(short, "n", say=said.append) == [LONG[:50].strip()] and "1 of 1 replies were cut" in said[-1]
    with pytest.raises(BadInput, match="reply_tokens"):
        DataSpec(reply_tokens=0)


def test_greedy_is_greedy(tmp_path):
    bending = {"no_repeat_ngram_size": 2, "repetition_penalty": 2.0, "num_beams": 3, "min_new_tokens": 30}
    rows = [{"question": "a", "answer": "aaaa bbbb aaaa bbbb"}, {"question": "n", "answer": "no no no no"}]
    recipe = learned(tmp_path, byte_folder(tmp_path / "m", generation=bending), rows)
    assert right(recipe) == 1.0 and asked(recipe, "n") == ["no no no no"]
    assert asked(recipe, "n", no_repeat_ngram_size=2) != ["no no no no"]  # what the user says, counts
    kept = json.loads((export(recipe, "merged") / "generation_config.json").read_text())
    assert not bending.keys() & kept.keys()


def test_the_models_own_way_of_sampling_stays(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        byte_folder(tmp_path / "m", generation={"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.0})
    )
    before = model.generation_config.to_dict()
    greedy = list(sample(model, byte_tokenizer(), ["sky"], max_new_tokens=8))
    assert list(sample(model, byte_tokenizer(), ["sky"], max_new_tokens=8, do_sample=True)) == greedy
    assert model.generation_config.to_dict() == before


SETTINGS = {
    "num_return_sequences": (2, "each prompt gets one reply"), "max_new_tokens": (0, "it is below 1 or not whole"),
    "max_length": ("x", "it is below 1 or not whole"), "temperature": (-1, "it must be 0 or more"),
    "top_p": (5, "it must be above 0 and at most 1"),
    "stop_strings": ([""], "not a list of texts"), "output_scores": (True, "only the texts of replies"),
    "num_beams": (0, "it is below 1 or not whole"),
    "early_stopping": ("often", "early_stopping"), "penalty_alpha": (0.6, "from the hub"),
    "max_new_token": (4, 'Did you mean "max_new_tokens"'),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be(name):
    value, words = SETTINGS[name]
    with pytest.raises(BadInput, match=words):
        check_generation({name: value})


def test_settings_are_made_consistent():
    assert check_generation({"temperature": 0.0, "top_p": 0.9, "do_sample": True}) == {"do_sample": False}
    assert check_generation({"temperature": 0.5}) == {"temperature": 0.5, "do_sample": True}
    assert check_generation({"stop_strings": "END", "num_return_sequences": 1}) == {"stop_strings": ["END"]}


def test_prompts_and_settings_of_a_run(tmp_path):
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY)
    assert asked(recipe, "sky", temperature=0.0) == ["blue"] == asked(recipe, "sky", num_beams=2)
    assert asked(recipe, "sky", stop_strings=["u"]) == ["bl"]
    assert len(asked(recipe, "")) == 1  # in a chat, an empty turn
    with pytest.raises(BadInput, match="it has no tokens"):
        asked(recipe, "", raw=True)
    for refused in ({"max_length": 5}, {"top_k": -3}):
        with pytest.raises(BadInput, match=f"transformers refuses it .*{next(iter(refused))}"):
            asked(recipe, "sky", **refused)


def test_learned_positions_limit_a_reply(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        byte_folder(tmp_path / "m", family="GPT2", max_position_embeddings=16)
    )
    tokenizer, cut = byte_tokenizer(), set()
    model.lm_head.weight.data[256:] = -100.0  # no reply ends
    list(sample(model, tokenizer, ["sky"], max_new_tokens=50, cut=cut))
    assert cut == {0}
    with pytest.raises(BadInput, match="prompt of 20 tokens: the model has learned 16 positions"):
        list(sample(model, tokenizer, ["s" * 20]))


def test_run_json_tells_of_the_weights_that_were_kept(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", [{"question": "sky", "answer": "green"}])
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "load_best_model_at_end": True, "max_steps": 4, "learning_rate": 0.05}  # fmt: skip
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY, data={"test": str(test)}, training=best)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    kept = min(losses, key=losses.__getitem__)
    assert kept < 4 == told["steps"] and told["kept_step"] == kept
    assert told["evaluation"]["eval_loss"] == losses[kept]
    assert told["final_loss"] == next(line["loss"] for line in lines if line["step"] == kept and "loss" in line)
    assert recipe.evaluate()["metrics"]["loss"] == pytest.approx(losses[kept], rel=1e-4)


def test_the_longest_answer_is_counted(tmp_path):
    path = str(write_rows(tmp_path / "d.jsonl", [{"question": "a", "answer": ["b", "ccc"]}, *SKY]))
    form = reply_form(read_rows(DataSpec(path), "train", byte_tokenizer()), DataSpec(path), byte_tokenizer())
    assert (form.chat, form.longest) == (True, 5)
    assert (form.max_tokens(None), form.max_tokens(7), form.max_tokens(None, 64)) == (29, 7, 64)
