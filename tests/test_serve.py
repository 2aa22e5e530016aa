"""A language model behind HTTP, asked by real clients over real sockets."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from frameloom.errors import InputError
from frameloom.language.tokens import TokenModel, open_folder
from frameloom.scale.engine import Engine
from frameloom.scale.flover import FusedDecoder
from frameloom.scale.messages import Writing
from frameloom.scale.qmoe import quantize
from frameloom.scale.sampling import Sampling
from frameloom.scale.serve import open_served, serve
from tiny_server import WORDS, chatting, llama, served


def tokens_alone(model, prompt: list[int], n: int, sampling: Sampling) -> list[int]:
    decoder = FusedDecoder(model, 1, 512)
    request = decoder.submit(prompt, n, sampling)
    decoder.run()
    return request.tokens


@pytest.fixture(scope="module")
def words():
    with served(open_served(None)) as (url, engine):
        yield url, engine


@pytest.fixture(scope="module")
def plain() -> TokenModel:
    return TokenModel("plain", llama(), None, frozenset())


def events(lines) -> list[dict]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def settle(engine: Engine, seconds: float = 20.0) -> None:
    """Wait until nothing is under way."""
    until = time.monotonic() + seconds
    while (engine.decoder.busy or engine.answers) and time.monotonic() < until:
        time.sleep(0.01)
    assert (engine.decoder.active, engine.decoder.waiting, engine.answers) == (0, 0, 0)


def test_the_model_that_ships_completes_a_caption(words):
    url, _ = words
    asked = {"prompt": "a small red", "max_tokens": 20}
    whole = httpx.post(f"{url}/v1/completions", json=asked).json()
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].split()[0] in ("ball", "box", "capsule")
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": len(choice["token_ids"]),
                              "total_tokens": 4 + len(choice["token_ids"])}  # fmt: skip
    with httpx.stream("POST", f"{url}/v1/completions", json=asked | {"stream": True}) as answer:
        lines = list(answer.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [event["choices"][0] for event in events(lines)]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    again = [httpx.post(f"{url}/v1/completions", json=asked | {"temperature": 1.0, "seed": 5}).json() for _ in range(2)]
    assert again[0]["choices"] == again[1]["choices"]


def test_a_stop_ends_the_text_before_it(words):
    url, engine = words
    asked = {"prompt": "a small red", "max_tokens": 20, "stop": [" and"]}
    choice = httpx.post(f"{url}/v1/completions", json=asked).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "and" not in choice["text"]
    settle(engine)


def test_models_health_and_metrics(words):
    url, _ = words
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a small", "max_tokens": 2}).status_code == 200
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "world-words"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    text = httpx.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(values["frameloom_slots"]) == 4
    assert int(values["frameloom_first_token_seconds_count"]) >= 1
    assert values["frameloom_first_token_seconds_count"] == values['frameloom_first_token_seconds_bucket{le="+Inf"}']


@pytest.mark.parametrize(("asked", "status", "said"), [
    ({"prompt": "a smal red"}, 400, "does not know the word 'smal'; did you mean 'small'?"),
    ({"prompt": "a small", "max_tokens": 90}, 400, "3 tokens and 90 new ones make 93; 64 fit"),
    ({"prompt": " "}, 400, "the prompt is empty"),
    ({"prompt": []}, 400, "the prompt is empty"),
    ({"prompt": [1000]}, 400, "outside 0 to"),
    ({"prompt": "a", "max_tokens": 0}, 400, "1 or more"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature -1.0"),
    ({"prompt": "a", "n": 0}, 400, "n: input should be greater than or equal to 1"),
    ({"prompt": "a", "presence_penalty": 1}, 400, "it could change the answer; leave it out, or give 0"),
    ({"prompt": "a", "suffix": "b"}, 400, 'suffix: not done here, and it could change the answer; leave it out, or'),
    ({"prompt": "a", "model": "other"}, 404, "'other' is not served here; 'world-words' is"),
    ({}, 400, "prompt: field required"),
    ({"prompt": "a " * 600_000}, 400, "larger than 1,048,576 bytes"),
])  # fmt: skip
def test_bad_requests_are_told_what_would_be_right(words, asked, status, said):
    url, _ = words
    answer = httpx.post(f"{url}/v1/completions", json=asked)
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert said in message
    assert "\n" not in message


def test_chat_needs_a_template_and_a_foreign_name_is_turned_away(words):
    url, _ = words
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert "no chat template" in answer.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/models", headers={"Host": "elsewhere.example"}).status_code == 400


def test_many_clients_half_of_whom_leave_lose_and_mix_nothing(plain):
    clients, n = 40, 40
    ways = [([1 + i, 2], Sampling(float(i % 2), seed=i)) for i in range(clients)]
    wanted = [tokens_alone(plain.model, prompt, n, how) for prompt, how in ways]

    async def client(http: httpx.AsyncClient, i: int) -> list[int] | None:
        prompt, how = ways[i]
        asked = {"prompt": prompt, "max_tokens": n, "temperature": how.temperature, "seed": how.seed}
        if i % 4 < 2:
            stream = http.stream("POST", "/v1/completions", json=asked | {"stream": True})
            tokens = []
            async with stream as answer:
                async for line in answer.aiter_lines():
                    for event in events([line]):
                        tokens += event["choices"][0]["token_ids"]
                    if i % 2 and tokens:
                        return None
            return tokens
        if i % 2:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/completions", json=asked, timeout=httpx.Timeout(20.0, read=0.02))
            return None
        return (await http.post("/v1/completions", json=asked)).json()["choices"][0]["token_ids"]

    async def all_at_once(url: str) -> list:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60.0) as http:
            return await asyncio.gather(*(client(http, i) for i in range(clients)))

    with served(plain, slots=6, queue=clients, pause=0.003) as (url, engine):
        got = asyncio.run(all_at_once(url))
        settle(engine)
        assert got == [None if i % 2 else wanted[i] for i in range(clients)]
        assert sum(engine.ended.values()) == clients
        assert engine.ended["cancelled"] > clients // 4  # so that some of either kind were, streaming and not
        assert engine.decoder.cache.nbytes == 6 * 64 * 2 * 2 * 2 * 8 * 4


def test_more_than_may_wait_are_told_when_to_come_again(plain):
    asked = {"prompt": [1, 2], "max_tokens": 60}

    async def crowd(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
            return await asyncio.gather(*(http.post("/v1/completions", json=asked) for _ in range(8)))

    with served(plain, slots=1, queue=2, pause=0.01) as (url, engine):
        answers = asyncio.run(crowd(url))
        refused = [answer for answer in answers if answer.status_code == 429]
        # A slot that is free may not be taken yet when the third comes: it then finds the queue full.
        assert len(refused) in (5, 6)
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}
        settle(engine)
        assert engine.refused == len(refused)
        assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60.0).status_code == 200


def test_several_texts_at_once_are_taken_together_or_not_at_all(plain):
    asked = {"prompt": [1, 2], "max_tokens": 60, "stream": True}
    with served(plain, slots=1, queue=4, pause=0.02) as (url, engine):
        post = f"{url}/v1/completions"
        with httpx.stream("POST", post, json=asked | {"n": 3}, headers={"X-Request-Id": "mine"}) as first:
            lines = first.iter_lines()
            assert events([next(lines)])[0]["id"] == "mine"
            assert sorted(request.id for request in engine.decoder._ids.values()) == ["mine", "mine/1", "mine/2"]
            refused = httpx.post(post, json=asked | {"n": 3})
            assert (refused.status_code, engine.answers) == (429, 3)
            wrong = httpx.post(post, json={"prompt": [[1], [WORDS]], "max_tokens": 2})
            assert (wrong.status_code, engine.answers) == (400, 3)
            assert httpx.post(post, json=asked | {"n": 5}).status_code == 400  # never to fit: not to come again
        settle(engine)  # one client left, and with it all three
        assert engine.ended["length"] == 0
        whole = httpx.post(post, json={"prompt": [[1], [2, 3], [4]], "max_tokens": 2}, timeout=60.0).json()
        assert [choice["token_ids"] for choice in whole["choices"]] == [
            tokens_alone(plain.model, prompt, 2, Sampling()) for prompt in ([1], [2, 3], [4])
        ]


def test_a_name_can_be_given_and_is_not_taken_twice_at_once(plain):
    asked = {"prompt": [1, 2], "max_tokens": 60, "stream": True}
    with served(plain, pause=0.05) as (url, engine):
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers={"X-Request-Id": "mine"}) as first:
            lines = first.iter_lines()
            assert events([next(lines)])[0]["id"] == "mine"
            second = httpx.post(f"{url}/v1/completions", json=asked, headers={"X-Request-Id": "mine"})
            assert "id mine: a request of that name is under way" in second.json()["error"]["message"]
        settle(engine)
        assert engine.ended == {"cancelled": 1}


def test_output_that_is_no_number_fails_one_answer_and_an_exception_all(plain):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with served(TokenModel("broken", model, None, frozenset())) as (url, engine):
        post = f"{url}/v1/completions"
        bad = httpx.post(post, json={"prompt": [7]})
        assert (bad.status_code, "no number at token 0" in bad.json()["error"]["message"]) == (500, True)
        with httpx.stream("POST", post, json={"prompt": [7], "stream": True}) as answer:
            assert "no number" in events(answer.iter_lines())[-1]["error"]["message"]
        both = {"prompt": [[1], [7], [2]], "max_tokens": 40}
        assert "no number at token 0" in httpx.post(post, json=both).json()["error"]["message"]
        with httpx.stream("POST", post, json=both | {"stream": True}) as answer:
            assert "no number" in events(answer.iter_lines())[-1]["error"]["message"]
        settle(engine)
        assert httpx.get(f"{url}/health").status_code == 200
        model.forward = lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room"))
        assert "no room" in httpx.post(post, json={"prompt": [1]}).json()["error"]["message"]
        assert httpx.post(post, json={"prompt": [1]}).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503


class Letters:
    """Two tokens a letter beyond ASCII, as byte-level tokenizers have them."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")

    def piece(self, token):
        return self.decode([token])

    def chat(self, messages):
        return None


@given(
    st.text("abéß", max_size=12),
    st.lists(st.integers(1, 4), min_size=24, max_size=24),
    st.sampled_from(["", "ab", "éa"]),
)
def test_text_in_pieces_is_the_text_whatever_the_pieces(text, sizes, stop):
    data, writing, shown, at = text.encode(), Writing(Letters(), b"xy", [stop] if stop else []), "", 0
    for size in sizes:
        part = list(data[at : at + size])
        at += size
        shown += writing.add(part, at >= len(data))
        if writing.stopped or at >= len(data):
            break
    assert shown == (text.split(stop)[0] if stop else text)
    needed = len(text[: text.find(stop) + len(stop)].encode()) if stop and stop in text else len(data)
    assert bytes(writing.tokens) == data[:needed]  # none behind the stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatting(tmp_path_factory.mktemp("model"))


def test_a_folder_of_transformers_with_a_tokenizer_can_chat(folder):
    model = open_served(folder)
    with served(model, max_len=64) as (url, _):
        asked = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 8}
        whole = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        message = whole["choices"][0]["message"]
        assert message["role"] == "assistant"
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked | {"stream": True}) as answer:
            deltas = [event["choices"][0]["delta"] for event in events(answer.iter_lines())]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == message["content"]
        same = {"prompt": model.text.tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True,
                                                                   tokenize=False), "max_tokens": 8}  # fmt: skip
        by_hand = httpx.post(f"{url}/v1/completions", json=same).json()
        assert by_hand["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]


def test_folders_that_cannot_be_served_are_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(config))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (short / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"method": "cbb"}))
    for weights, said in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "holds no config.json"),
                          (tmp_path / "pickled", "holds no .safetensors"), (short, "lacks 9 tensors of Llama"),
                          (other, "holds weights of cbb")):  # fmt: skip
        with pytest.raises(InputError, match=said) as raised:
            open_served(weights)
        assert "\n" not in str(raised.value)
    (short / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a causal language model"):
        open_folder(short)


def test_a_port_in_use_and_a_host_that_is_none_are_errors_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot be taken on 127.0.0.1 .*in use"):
            serve("no/such/folder", port=port)
    with pytest.raises(InputError, match="--port 70000"):
        serve(port=70000)
    with pytest.raises(InputError, match=r"--host nowhere\.invalid"):
        serve(host="nowhere.invalid")


def test_on_sigterm_an_answer_under_way_is_finished(folder):
    command = [sys.executable, "-m", "frameloom", "serve", "--weights", str(folder), "--port", "0", "--max-len", "900"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = next(line for line in process.stderr if " at http" in line).split(" at ")[1].split()[0]
        asked = {"prompt": "the cat", "max_tokens": 800, "stream": True}
        with httpx.stream("POST", url, json=asked, timeout=60.0) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [first, *lines]
        assert "data: [DONE]" in rest
        assert events(rest)[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_mixture_with_compressed_experts_is_served_as_it_generates(tmp_path):
    torch.manual_seed(0)
    shape = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_local_experts=2,
                          num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    MixtralForCausalLM(shape).save_pretrained(tmp_path / "whole")
    save_file({"input_ids": torch.randint(3, 64, (6, 16))}, tmp_path / "tokens.safetensors")
    quantize(tmp_path / "whole", tmp_path / "small", calib=tmp_path / "tokens.safetensors", samples=6)
    model = open_served(tmp_path / "small").model
    decoder = FusedDecoder(model, slots=2, max_len=32)
    request = decoder.submit([3, 4, 5], 6)
    decoder.run()
    alone = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert request.tokens == alone[0, 3:].tolist()
