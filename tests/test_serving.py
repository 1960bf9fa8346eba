"""`trimtab serve`, asked by the `openai` client over loopback, and its parts."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace

import openai
import pytest

from helpers_reply import byte_folder, byte_tokenizer, learned
from helpers_serve import SECONDS, Served, serving
from trimtab.errors import BadInput, DoesNotFit, Stopped
from trimtab.inference.generate import generate
from trimtab.inference.session import Inference
from trimtab.memory.budget import Budget
from trimtab.memory.guard import Guard
from trimtab.model.sampling import reply_text
from trimtab.planning.inference import Work
from trimtab.planning.plan import Plan
from trimtab.recipe import Recipe
from trimtab.serving import protocol, worker
from trimtab.serving.jobs import Reader
from trimtab.serving.protocol import Refused, Reply, read_ask
from trimtab.serving.serve import serve
from trimtab.serving.text import Growing
from trimtab.serving.worker import Room, Worker, too_large

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"question": "sky", "answer": "über blau, 空は青い, END and more"}, {"question": "coal", "answer": "black"}]
ASKED = [f"what is {word} number {at}" for at in range(10) for word in ("sky", "coal", "x", "the third of these")]
STREAMING = {"streaming_llm": {"window": 1000, "chunk": 0}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Recipe]:
    """name -> the recipe of a finished run, in fp32."""
    folder = tmp_path_factory.mktemp("served")
    model, made = byte_folder(folder / "model"), {}
    for name, patch, steps in (("paca", {"paca": {"r": 32}}, 100), ("meft", {"meft": {"r": 64}}, 2)):
        (folder / name).mkdir()
        made[name] = learned(folder / name, model, ROWS, [patch], training={"max_steps": steps})
    return made


@pytest.fixture(scope="module")
def server(runs):
    """Serves the run that learned ROWS. Ctrl-C ends it; it has asked nobody anything."""
    with serving(runs["paca"].output, "--name", "bytes") as made:
        yield made
        code, out, err = made.end(signal.SIGINT)
        assert code == 130 and "ASKED []" in out and err == "trimtab: stopped\n", (code, out, err[-3000:])


def texts(stream) -> tuple[str, str]:
    """-> (the text of a stream, why it ended)."""
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    return "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason


# --- the server ------------------------------------------------------------------------------------------------------


def test_two_hundred_requests_by_eight_clients(runs, server):
    """Each reply is that of `generate`; nothing leaks from one into another, nor into memory."""
    limits = (7, 16, 25)
    alone: dict[tuple[str, int], str] = {}
    for new in limits:
        replies = generate(runs["paca"], ASKED, max_new_tokens=new)
        alone |= {(prompt, new): reply for prompt, reply in zip(ASKED, replies, strict=True)}
    assert len(set(alone.values())) > 10
    work = [(prompt, limits[at % 3]) for at, prompt in enumerate(ASKED * 5)]
    random.Random(0).shuffle(work)
    clients = [server.client() for _ in range(8)]

    def ask(at: int) -> str:
        prompt, new = work[at]
        return server.chat(prompt, clients[at % 8], max_tokens=new).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(20)))
        early = server.anonymous()
        replies += list(pool.map(ask, range(20, 200)))
    assert replies == [alone[key] for key in work]
    assert server.anonymous() < 1.03 * early


@pytest.mark.parametrize("stop", [None, "END", ["nowhere", "空"], ["END ", "Q"]], ids=str)
def test_a_stream_has_the_same_text(server, stop):
    for prompt in ("sky", ASKED[2]):
        whole = server.chat(prompt, max_tokens=60, stop=stop).choices[0]
        streamed = texts(server.chat(prompt, max_tokens=60, stop=stop, stream=True))
        assert streamed == (whole.message.content, whole.finish_reason)
    sky = server.chat("sky", max_tokens=60, stop=stop)
    if stop is None:
        assert sky.choices[0].message.content == ROWS[0]["answer"]
        assert sky.usage.completion_tokens == len(ROWS[0]["answer"].encode()) + 1
    first = min((at for word in [stop or []] for one in ([word] if isinstance(word, str) else word)
                 if (at := ROWS[0]["answer"].find(one)) >= 0), default=None)  # fmt: skip
    assert sky.choices[0].message.content == ROWS[0]["answer"][:first].strip()
    assert sky.choices[0].finish_reason == "stop"


def test_the_chunks_of_a_stream(server):
    chunks = list(server.chat("coal", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    whole = server.chat("coal")
    assert chunks[-1].usage == whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + 6
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) == len("black") + 3
    cut = server.chat("coal", max_completion_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("bla", "length")


def test_seeds(server):
    ask = lambda **more: server.chat(ASKED[2], max_tokens=30, temperature=5.0, **more).choices[0].message.content  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        seeds = [1, 2, 1, None, 2, None, 1, None]
        found = list(pool.map(lambda seed: ask(**({} if seed is None else {"seed": seed})), seeds))
    assert found[0] == found[2] == found[6] and found[1] == found[4]
    assert len({*found}) == 5, "other seeds give other replies, and without one each is new"
    assert texts(server.chat(ASKED[2], max_tokens=30, temperature=5.0, seed=2, stream=True))[0] == found[1]
    assert ask(seed=1, extra_body={"top_k": 1}) == ask(seed=2, extra_body={"top_k": 1})


def test_completions(runs, server):
    client, tokenizer = server.client(), byte_tokenizer()
    prompts = ["the sky is", "a b c", "空"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    create = lambda prompt, **more: client.completions.create(model="bytes", prompt=prompt, max_tokens=20, **more)  # noqa: E731
    alone = list(generate(runs["paca"], prompts, raw=True, max_new_tokens=20))
    for asked in (prompts, ids):
        made = create(asked)
        assert [choice.text.strip() for choice in made.choices] == alone
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        assert made.usage.prompt_tokens == sum(map(len, ids))
    assert create(ids[0]).choices[0].text == create(prompts[0]).choices[0].text == create(prompts).choices[0].text
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in create(prompts, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert [pieces[at] for at in range(3)] == [choice.text for choice in create(prompts).choices]


def test_conversations(server):
    """Earlier turns count; a text can come in parts; a developer's message is a system message."""
    turns = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"},
             {"role": "user", "content": "coal"}]  # fmt: skip
    create = server.client().chat.completions.create
    tokens = lambda messages: create(model="bytes", messages=messages, max_tokens=1).usage.prompt_tokens  # noqa: E731
    assert tokens(turns) > tokens(turns[2:])
    parts = [{"role": "user", "content": [{"type": "text", "text": "co"}, {"type": "text", "text": "al"}]}]
    assert create(model="bytes", messages=parts).choices[0].message.content == "black"
    roles = [[{"role": role, "content": "be short"}, *turns] for role in ("system", "developer")]
    assert tokens(roles[0]) == tokens(roles[1]) > tokens(turns)


def test_models(server):
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == "bytes" and client.models.retrieve("bytes") == model
    with pytest.raises(openai.NotFoundError, match="this server has 'bytes' only"):
        client.models.retrieve("meta/llama")
    with pytest.raises(openai.NotFoundError, match="this server has 'bytes' only"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "a"}])


MESSAGE = {"messages": [{"role": "user", "content": "sky"}]}
BAD = {  # what is wrong -> (the body, headers, status, what the error says)
    "no JSON": (b'{"messages": [', {}, 400, "not valid"),
    "not UTF-8": (b'{"prompt": "\xff"}', {}, 400, "not valid"),
    "NaN": (b'{"temperature": NaN}', {}, 400, "NaN is not JSON"),
    "nested": (b"[" * 100_000, {}, 400, "nested too deeply"),
    "a list": (b"[]", {}, 400, "JSON list"),
    "empty": (b"", {}, 400, "not valid"),
    "too large": (b" " * (2**20 + 1), {}, 413, "larger than 1,048,576 bytes"),
    "form": (b"a=b", {"content_type": "application/x-www-form-urlencoded"}, 415, "Content-Type: application/json"),
    "another host": (MESSAGE, {"host": "evil.example"}, 403, "this machine only"),
    "unknown field": ({**MESSAGE, "max_token": 1}, {}, 400, 'Did you mean "max_tokens"'),
    "odd field": (b'{"\\ud800": 1}', {}, 400, '"?": this server has no such field'),
    "n": ({**MESSAGE, "n": 2}, {}, 400, "n: 2: this server does not support it"),
    "n as truth": ({**MESSAGE, "n": True}, {}, 400, "n: True"),
    "tools": ({**MESSAGE, "tools": [{"type": "function"}]}, {}, 400, "does not support"),
    "format": ({**MESSAGE, "response_format": {"type": "json_object"}}, {}, 400, "does not support"),
    "penalty": ({**MESSAGE, "presence_penalty": 0.5}, {}, 400, "does not support"),
    "no messages": ({}, {}, 400, "not a list of messages"),
    "empty messages": ({"messages": []}, {}, 400, "not a list of messages"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, {}, 400, "role: 'tool'"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, 400, "not text"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400, "not text"),
    "temperature": ({**MESSAGE, "temperature": -1}, {}, 400, "0 or more"),
    "temperature as text": ({**MESSAGE, "temperature": "hot"}, {}, 400, "0 or more"),
    "top_p": ({**MESSAGE, "top_p": 2}, {}, 400, "at most 1"),
    "top_k": ({**MESSAGE, "top_k": -3}, {}, 400, "top_k"),
    "no tokens": ({**MESSAGE, "max_tokens": 0}, {}, 400, "whole number from 1"),
    "two limits": ({**MESSAGE, "max_tokens": 1, "max_completion_tokens": 2}, {}, 400, "differ"),
    "stop": ({**MESSAGE, "stop": [""]}, {}, 400, "stop"),
    "seed": ({**MESSAGE, "seed": 2**70}, {}, 400, "64 bits"),
    "stream": ({**MESSAGE, "stream": "yes"}, {}, 400, "neither true nor false"),
    "generation_config": ({**MESSAGE, "generation_config": "{}"}, {}, 400, "no such field"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(server, name):
    body, headers, status, words = BAD[name]
    got, answer = server.post(body, **headers)
    assert got == status and words in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_bad_prompts_and_pages(server):
    for prompt in (None, [], "", [[]], [True], [-1], [300], ["a", 5], {}, [["a"]]):
        status, answer = server.post({"prompt": prompt}, "/v1/completions")
        assert status == 400 and answer["error"]["message"].endswith("."), (prompt, answer)
    assert server.post({"prompt": ["a"] * 65}, "/v1/completions")[0] == 400
    for path, status in (("/v1/embeddings", 404), ("/v1/models", 405), ("/docs", 404), ("/load_model", 404)):
        assert server.post({}, path)[0] == status
    accepted = {"n": 1, "user": "me", "logit_bias": {}, "frequency_penalty": 0.0, "tools": None, "store": False}
    assert server.post({**MESSAGE, **accepted, "model": "bytes"})[0] == 200


def test_within_a_budget_until_sigterm(runs):
    """MEFT with a bounded cache. What does not fit is refused, before a stream begins too; a client that disconnects
    is not replied to; SIGTERM cuts a stream in order, refuses who waits, and ends with code 0."""
    recipe = runs["meft"]
    endless = ASKED[0]
    assert len(next(generate(recipe, [endless], max_new_tokens=600)).encode()) > 300, "it has no end"
    alone = list(generate(recipe, ASKED[:2], max_new_tokens=9))
    patches = f"patches={json.dumps([*recipe.patches, STREAMING])}"
    with serving(recipe.output, patches, "budget.fast=1GiB", "--batch", "1") as server:
        assert [server.chat(ask, max_tokens=9).choices[0].message.content for ask in ASKED[:2]] == alone
        for more in ({}, {"stream": True}):
            with pytest.raises(openai.APIStatusError, match="of the fast tier to reply") as told:
                server.chat("a" * 500_000, max_tokens=5, **more)
            assert told.value.status_code == 413 and told.value.code == "does_not_fit"
            assert set(re.findall(r"(\d+) tokens", told.value.message)) == {"5"}, "the number that was asked for"

        stream = server.chat(endless, max_tokens=10**6, stream=True)
        next(piece for piece in stream if piece.choices[0].delta.content)
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            server.chat(endless, server.client().with_options(timeout=0.5), max_tokens=10**6)
        after = server.chat(ASKED[0], max_tokens=9)
        assert after.choices[0].message.content == alone[0], "a million tokens would have taken an hour"

        with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", server.port)) as stalled:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.url.split('/')[2]}\r\nContent-Length: 9\r\n"
            stalled.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())  # and no more
            stream = server.chat(endless, max_tokens=10**6, stream=True)
            heard = [next(stream) for _ in range(3)]
            waits = pool.submit(server.chat, ASKED[1])
            while server.get("/health")["waiting"] < 1:
                pass
            os.kill(server.process.pid, signal.SIGTERM)
            with pytest.raises(openai.InternalServerError, match="the server is stopping"):
                waits.result(SECONDS)
            os.kill(server.process.pid, signal.SIGTERM)  # again: at once
            heard += list(stream)
            assert b"503 Service Unavailable" in stalled.recv(1000)
        assert heard[-1].choices[0].finish_reason == "length" and len(heard) > 4
        out, err = server.process.communicate(timeout=SECONDS)
        assert server.process.returncode == 0 and "ASKED []" in out and err == "", err[-3000:]
    record = json.loads(open(f"{recipe.output}/serve.json").read())
    assert record["predicted"]["fast_peak_bytes"] <= record["budget"]["fast"] == 2**30
    assert record["measured"]["fast_peak_bytes"] < 2**30 and record["reads"]["tokens"] > 0


def test_a_server_that_does_not_start(runs, call):
    folder = runs["paca"].output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = call("serve", folder, "--port", taken.getsockname()[1])
        assert code == 2 and "the port is in use: " not in err and "the port is in use. Choose another" in err
    assert "cannot listen there" in call("serve", folder, "--host", "192.0.2.1", "--port", 0)[2]
    code, _, err = call("serve", folder, "budget.fast=50MiB", "--port", 0)
    assert code == 3 and "of the fast tier" in err
    for setting in ("num_beams=2", "max_length=50", "temperatur=1", "max_new_tokens=0"):
        code, _, err = call("serve", folder, "--port", 0, "--set", setting)
        assert code == 2 and setting.split("=")[0] in err, err
    assert call("serve", folder, "--port", 70000)[0] == 2


# --- its parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(runs):
    with Inference(runs["paca"]) as made:
        yield made


def jobs(made, count: int = 1, **fields) -> tuple[list, Queue]:
    """Jobs for `count` prompts, and the queue that their events go to."""
    events: Queue = Queue()
    ask = read_ask({"prompt": ASKED[:count], "max_tokens": 4, **fields}, "bytes", chat=False)
    return Reader(made, {}).jobs(ask, lambda at, event: events.put((at, event))), events


def last(events: Queue) -> object:
    while not isinstance(found := events.get(timeout=SECONDS)[1], Reply | Exception):
        pass
    return found


def test_the_queue_is_bounded(made):
    busy = Worker(made, rows=2, most=3, failed=print)
    wanted, _ = jobs(made, 3)
    busy.submit(wanted[:2])
    with pytest.raises(Refused, match="2 others wait already") as told:
        busy.submit(wanted[:2])
    assert told.value.status == 429
    busy.drop(wanted[:1])
    busy.submit(wanted[1:])
    with pytest.raises(Refused, match="at most 3 can wait"):
        busy.submit(wanted * 2)
    busy.close(0.0)
    with pytest.raises(Refused, match="stopping"):
        busy.submit(wanted[:1])


def test_a_batch_is_what_is_alike_and_fits(made, monkeypatch):
    ready = Worker(made, rows=8, most=99, failed=print)
    wanted, _ = jobs(made, 6)
    (seeded,), (warm,) = jobs(made, seed=1)[0], jobs(made, temperature=2.0)[0]
    waiting = [*wanted[:3], seeded, warm, *wanted[3:]]
    assert ready._batch(waiting) == wanted
    assert ready._batch(waiting[3:]) == [seeded] and ready._batch(waiting[4:]) == [warm]
    ready.coarse = True  # as for 16-bit weights on a CPU
    assert ready._batch(waiting) == wanted[:4]
    ready.places = 60  # of learned positions
    wanted[1].new = 60 - len(wanted[1].ids)
    assert wanted[1] not in ready._batch(waiting)
    ready.places, ready.coarse, ready.room = None, False, Room(made)
    limited(made, monkeypatch, lambda work: work.rows <= 3 and (work.rows > 1 or work.new <= 50))
    assert ready._batch(waiting) == wanted[:3]
    wanted[0].new = 60
    with pytest.raises(DoesNotFit, match=f"to reply with 60 tokens to a prompt of {len(wanted[0].ids)}: "):
        ready._batch(waiting)


def limited(made, monkeypatch, fits) -> list[Work]:
    """Lets plans of `made` fit where `fits(work)`; -> the list of what is planned."""
    planned = []

    def plan(work):
        planned.append(work)
        return SimpleNamespace(fits=fits(work), fast=100, fast_peak_bytes=101, phase="prompt")

    monkeypatch.setattr(made, "planned", plan)
    return planned


def test_what_fits_is_planned_once(made, monkeypatch):
    planned = limited(made, monkeypatch, lambda work: work.rows * (work.tokens + work.new) <= 1000)
    room = Room(made)
    assert not any(room.excess(Work(2, tokens, 50)) for tokens in range(10, 100)) and len(planned) == 2
    assert not room.excess(Work(1, 500, 400)) and len(planned) == 4, "rounded, it does not fit"
    for _ in range(3):
        assert room.excess(Work(1, 700, 400))[0] == Work(1, 700, 400)
    assert room.excess(Work(2, 800, 400))[0] == Work(1, 700, 400) and len(planned) == 5
    assert not room.known_excess(Work(1, 600, 401)) and room.known_excess(Work(1, 700, 401))


def test_widths_of_16_bit_batches_are_few(made):
    ready = Worker(made, rows=8, most=9, failed=print)
    ready.coarse = True
    widths = {ready._width(width) for width in range(1, 4097)}
    assert len(widths) < 50 and all(width <= ready._width(width) <= 1.26 * width for width in range(8, 4097))
    assert {2 * width for width in widths if 8 <= width <= 2048} <= widths, "of two rows, as of one of twice the width"


def all_replies(made, prompts: list[str], new: int, **worker_settings) -> list[str]:
    """The replies of a Worker to `prompts`, all submitted at once."""
    events: Queue = Queue()
    ask = read_ask({"prompt": prompts, "max_tokens": new}, "bytes", chat=False)
    with Worker(made, rows=8, most=99, failed=print) as running:
        vars(running).update(worker_settings)
        running.submit(Reader(made, {}).jobs(ask, lambda at, event: events.put((at, event))))
        found: dict[int, Reply] = {}
        while len(found) < len(prompts):
            at, event = events.get(timeout=SECONDS)
            assert not isinstance(event, Exception), event
            if isinstance(event, Reply):
                found[at] = event
    return [found[at].text.strip() for at in range(len(prompts))]


def test_a_padded_width_changes_no_reply(runs, made):
    """As for 16-bit weights on a CPU, in fp32."""
    alone = list(generate(runs["paca"], ASKED[:7], raw=True, max_new_tokens=9))
    assert all_replies(made, ASKED[:7], 9, coarse=True) == alone


def test_within_learned_positions(tmp_path):
    """Each reply is as long as if it were alone, although padding takes positions too."""
    recipe = Recipe(model=byte_folder(tmp_path / "gpt2", family="GPT2", max_position_embeddings=64, n_inner=128))
    prompts = ["a" * 50, "b" * 3, "c" * 40, "d" * 63, "e" * 4]
    alone = [next(generate(recipe, [prompt], raw=True, base_only=True, max_new_tokens=64)) for prompt in prompts]
    with Inference(recipe, base_only=True) as made:
        assert all_replies(made, prompts, 64) == alone


@pytest.mark.parametrize("fault", ["budget", "machine", "bug", "memory"])
def test_a_reply_that_fails_ends_alone(made, monkeypatch, capsys, fault):
    def fail(*arguments, **settings):
        if fault == "bug":
            raise RuntimeError("secret")
        if fault == "memory":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        made.guard.why = fault
        made.check()

    real = worker.complete
    monkeypatch.setattr(worker, "complete", fail)
    with Worker(made, rows=2, most=9, failed=print) as running:
        (wanted,), events = jobs(made)
        running.submit([wanted])
        error = last(events)
        status = {"budget": 413, "machine": 503, "bug": 500, "memory": 503}[fault]
        assert protocol.status_of(error) == status and error.__traceback__ is None
        said = protocol.error_body(error)["error"]["message"]
        assert "secret" not in said and said.endswith(".")
        assert ("secret" in capsys.readouterr().err) == (fault == "bug")
        monkeypatch.setattr(worker, "complete", real)
        (wanted,), events = jobs(made)
        running.submit([wanted])
        assert isinstance(last(events), Reply)


def test_a_process_beyond_its_budget_ends(made, monkeypatch):
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(worker.Room, "_fits", lambda self, work: True)
    made.guard.budget = 1
    made.meter.sample()
    failures: Queue = Queue()
    with Worker(made, rows=2, most=9, failed=failures.put) as running:
        (wanted,), events = jobs(made)
        running.submit([wanted])
        assert isinstance(last(events), Stopped)
        error = failures.get(timeout=SECONDS)
        assert isinstance(error, Stopped) and "without any reply" in str(error)


def test_a_server_beyond_its_budget_ends(runs, monkeypatch):
    """`Stopped`, which is exit code 4; its last client gets the reason."""
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Guard, "of", classmethod(lambda cls, budget, device: Guard(budget=1)))
    answers: Queue = Queue()

    def ready(line: str) -> None:
        ask = threading.Thread(target=lambda: answers.put(Served(None, line).post(MESSAGE)), daemon=True)
        ask.start()

    with pytest.raises(Stopped, match="without any reply"):
        serve(runs["paca"], port=0, say=ready)
    status, body = answers.get(timeout=SECONDS)
    assert status == 413 and "stay within" in body["error"]["message"]


def test_a_run_of_plain_prompts_takes_no_conversation(made):
    reader = Reader(made, {"temperature": 0.5})
    reader.form = dataclasses.replace(reader.form, chat=False, after="\n")
    user = {"role": "user", "content": "sky"}
    assert reader._conversation([user]) == "sky\n"
    for messages in ([user, user], [{"role": "system", "content": "a"}, user], [{"role": "assistant", "content": "a"}]):
        with pytest.raises(BadInput, match="not on conversations"):
            reader._conversation(messages)
    reader.form = dataclasses.replace(reader.form, chat=True)
    reader.data = dataclasses.replace(reader.data, system="be short")
    assert reader._conversation([user]) == [{"role": "system", "content": "be short"}, user]
    own = [{"role": "system", "content": "be long"}, user]
    assert reader._conversation(own) == own
    reader.places = 40
    with pytest.raises(Refused, match="learned 40 positions") as told:
        reader.jobs(read_ask({"prompt": "a" * 41}, "bytes", False), print)
    assert told.value.status == 413
    (near,) = reader.jobs(read_ask({"prompt": "a" * 38}, "bytes", False), print)
    assert near.new == 2 and near.settings["temperature"] == 0.5


def test_a_refusal_names_the_tokens_of_the_request():
    made = Plan({"cache": 3 * 2**30}, "reply", 0, 0, 0, Budget(2**30), 10**10, 1, 1)
    for work, more in ((Work(1, 448, 30), ""), (Work(1, 384, 30), "more than "), (Work(1, 448, 20), "more than ")):
        said = str(too_large(400, 30, (work, made)))
        assert said.startswith("1.00 GiB of the fast tier to reply with 30 tokens to a prompt of 400: ")
        assert f": it would use {more}3.00 GiB (reply). " in said


@pytest.mark.parametrize("strip", [True, False])
def test_text_that_grows(strip):
    """Whatever the bytes, the pieces are the whole, which is what `generate` returns."""
    tokenizer, chance = byte_tokenizer(), random.Random(1)
    alphabet = [*"ab \n", "é", "空", "🙂", "END", "EN"]
    for stops in ([], ["END"], ["ab", "空a"], ["\n\n"], ["b é", "é"]):
        for _ in range(60):
            text = "".join(chance.choices(alphabet, k=chance.randrange(12)))
            ids = [*tokenizer(text)["input_ids"], *chance.choices([258, 0xFF - 100, 7], k=chance.randrange(2))]
            grown = Growing(tokenizer, [258], stops, strip, streamed=True)
            pieces = []
            for token in ids:
                pieces.append(grown.add(token))
                if grown.ended:
                    break
            whole, ended = reply_text(tokenizer, ids, {"eos_token_id": [258], "stop_strings": stops})
            assert grown.ended == ended
            assert "".join(pieces) + grown.rest() == grown.whole()
            assert (grown.whole() if strip else grown.whole().strip()) == whole
    grown = Growing(tokenizer, [258], [], True, streamed=True)
    assert [grown.add(token) for token in tokenizer(" a b")["input_ids"]] == ["", "a", "", " b"]


def test_rows_that_depend_on_each_other():
    from trimtab.model.limits import rows_depend

    of = lambda found, **more: SimpleNamespace(  # noqa: E731
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(rope_parameters=found)), **more
    )
    assert rows_depend(of({"rope_type": "dynamic"})) and rows_depend(of({"full": {"rope_type": "longrope"}}))
    assert rows_depend(of(None, is_loaded_in_8bit=True)) and not rows_depend(of({"rope_type": "yarn", "factor": 2.0}))


def test_without_its_libraries_it_says_so(runs, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = call("serve", runs["paca"].output, "--port", 0)
    assert code == 2 and 'uvicorn is not installed. Run: pip install "trimtab[serve]"' in err
