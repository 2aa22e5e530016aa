"""What a request may say: what is unset, what changes nothing, what is refused, and what several texts at once are."""

import json

import httpx
import pytest
import torch

from frameloom.language.tokens import TokenizerText, TokenModel
from frameloom.scale.serve import open_served
from tiny_server import chatting, llama, served

TEXT = {"prompt": "the cat", "max_tokens": 6}
CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 6}
PATHS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatting(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder) -> TokenModel:
    return open_served(folder)


@pytest.fixture(scope="module")
def post(model):
    with (
        served(model, slots=4, queue=24, max_len=96) as (url, engine),
        httpx.Client(base_url=url, timeout=60.0) as http,
    ):

        def ask(asked: dict, status: int = 200) -> dict:
            answer = http.post(PATHS["prompt" if "prompt" in asked else "messages"], json=asked)
            assert answer.status_code == status, answer.text
            return answer.json()

        ask.http, ask.engine = http, engine
        yield ask


def texts(answer: dict) -> list[list[int]]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["token_ids"] for choice in answer["choices"]]


def streamed(post, asked: dict) -> list[dict]:
    path = PATHS["prompt" if "prompt" in asked else "messages"]
    with post.http.stream("POST", path, json=asked | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


UNSET = ("stop", "seed", "temperature", "top_p", "top_k", "n", "stream", "stream_options", "presence_penalty",
         "frequency_penalty", "logprobs", "logit_bias", "user", "model", "response_format", "tools", "tool_choice",
         "store", "metadata", "functions", "function_call", "min_p", "echo", "suffix", "best_of", "top_logprobs",
         "max_completion_tokens", "service_tier", "something_new")  # fmt: skip
SAYS_NOTHING = (
    {"logprobs": False}, {"logit_bias": {}}, {"echo": False}, {"best_of": 1}, {"suffix": ""}, {"n": 1},
    {"response_format": {"type": "text"}}, {"tools": []}, {"tools": [], "tool_choice": "none"}, {"store": False},
    {"store": True}, {"metadata": {}}, {"metadata": {"a": "b"}}, {"repetition_penalty": 1.0}, {"top_k": -1},
    {"presence_penalty": 0, "frequency_penalty": 0.0}, {"user": "me"}, {"stop": []}, {"stop": ""}, {"min_p": 0.0},
    {"parallel_tool_calls": True}, {"service_tier": "auto"}, {"stream_options": {"include_usage": True}},
    {"model": "dummy"}, {"seed": -(2**63)}, {"top_logprobs": 0}, {"functions": [], "function_call": "none"},
    {"stop": [], "temperature": 0, "top_p": 1, "seed": 3, "stream": False},
)  # fmt: skip


@pytest.mark.parametrize("asked", [TEXT, CHAT], ids=["completions", "chat"])
def test_null_and_values_that_ask_for_nothing_leave_the_answer_as_it_is(post, asked):
    plain = post(asked)["choices"]
    assert post(asked | dict.fromkeys(UNSET))["choices"] == plain
    for said in SAYS_NOTHING:
        assert post(asked | said)["choices"] == plain, said


SCHEMA = {"type": "json_schema", "json_schema": {"name": "A", "schema": {"type": "object"}}}
TOOL = {"type": "function", "function": {"name": "A", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(("asked", "said", "message"), [
    (TEXT, {"echo": True}, "echo: not done here, and it could change the answer; leave it out, or give false"),
    (TEXT, {"suffix": "b"}, 'suffix: not done here, and it could change the answer; leave it out, or give ""'),
    (TEXT, {"best_of": 3, "n": 2}, "best_of: answers are not ranked here; leave it out, or give the same as n"),
    (TEXT, {"logprobs": True}, "logprobs: how many of the likeliest tokens is wanted, 0 to 20, not true"),
    (TEXT, {"logprobs": 21}, "logprobs: input should be less than or equal to 20"),
    (TEXT, {"logit_bias": {"5": 1}}, "logit_bias: not done here, and it could change the answer; leave it out"),
    (TEXT, {"repetition_penalty": 1.1}, "leave it out, or give 1"),
    (TEXT, {"frequency_penalty": -0.5}, "leave it out, or give 0"),
    (TEXT, {"a\nb": 1}, "a b: not done here"),
    (TEXT, {"n": 1, "prompt": ["a"] * 100_000}, "100000 texts are asked for at once"),
    (TEXT, {"guided_json": {"type": "object"}}, "guided_json: not done here"),
    (TEXT, {"n": 129}, "n: input should be less than or equal to 128"),
    (TEXT, {"n": 12, "prompt": ["a", "b", "c"]}, "36 texts are asked for at once; 24 may wait (--queue)"),
    (TEXT, {"seed": 2**63}, "seed: "), (TEXT, {"top_k": -2}, "top_k -2"), (TEXT, {"stop": 5}, "stop: "),
    (TEXT, {"prompt": ["a", 5]}, "prompt: a text or a list of token numbers is wanted, or a list of such"),
    (TEXT, {"prompt": {"a": 1}}, "prompt: a text or a list"), (TEXT, {"prompt": [True]}, "prompt: a text or a list"),
    (TEXT, {"prompt": []}, "the prompt is empty"), (TEXT, {"prompt": [[1], []]}, "the prompt is empty"),
    (TEXT, {"prompt": ""}, "the prompt is empty"),
    (CHAT, {"response_format": {"type": "json_object"}},
     'response_format: not done here, and it could change the answer; leave it out, or give {"type": "text"}'),
    (CHAT, {"response_format": SCHEMA}, 'leave it out, or give {"type": "text"}'),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tools: not done here, and it could change the answer"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "A"}}}, "tools: not done here"),
    (CHAT, {"top_logprobs": 2}, 'top_logprobs: needs "logprobs": true'),
    (CHAT, {"messages": []}, "messages: "),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0: content is wanted in a message of role 'user'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0: content is wanted"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content: a part of type 'image_url'; parts of type 'text' are read, and no others"),
    (CHAT, {"messages": [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
     "messages.1: tool_calls are not done here"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]},
     "the model's chat template refuses these messages: There is no role tool"),
    (CHAT, {"messages": CHAT["messages"] * 2}, "Conversation roles must alternate user/assistant/user/assistant/..."),
])  # fmt: skip
def test_what_would_change_the_answer_is_refused_in_one_line(post, asked, said, message):
    error = post(asked | said, 400)["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", 400)


def test_a_template_that_stumbles_is_the_requests_fault_too(model):
    tokenizer = model.text.tokenizer
    kept = tokenizer.chat_template
    try:
        with served(model, max_len=96) as (url, _):
            for template, words in (
                ("{{ messages[0].content.nothing() }}", "has no attribute 'nothing'"),
                ("{{ 1 / 0 }}", "division"),
                ("{{ 'a' + 1 }}", "str"),
                ("{% if %}", "Expected"),
            ):
                tokenizer.chat_template = template
                answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
                assert answer.status_code == 400
                assert "the model's chat template refuses these messages: " in answer.json()["error"]["message"]
                assert words in answer.json()["error"]["message"]
    finally:
        tokenizer.chat_template = kept


def test_parts_and_silent_assistants_are_the_texts_they_stand_for(post):
    wanted = post({"messages": [{"role": "user", "content": "the cat\nsat"}, {"role": "assistant", "content": ""},
                                {"role": "user", "content": "on"}]})  # fmt: skip
    for silent in ({"content": None}, {}, {"content": None, "refusal": None, "tool_calls": None, "annotations": []}):
        parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat"}]
        got = post({"messages": [{"role": "user", "content": parts, "name": None}, {"role": "assistant"} | silent,
                                 {"role": "user", "content": [{"type": "text", "text": "on"}]}]})  # fmt: skip
        assert got["choices"] == wanted["choices"]
        assert got["usage"] == wanted["usage"]


def test_what_else_a_message_has_reaches_the_template(model):
    tokenizer, kept = model.text.tokenizer, model.text.tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ m.name }} {{ m.content }}{% endfor %}"
        with served(model, max_len=96) as (url, _):
            named = {"messages": [{"role": "user", "content": "the cat", "name": "mat"}], "max_tokens": 5}
            got = httpx.post(f"{url}/v1/chat/completions", json=named).json()
            same = httpx.post(f"{url}/v1/completions", json={"prompt": "mat the cat", "max_tokens": 5}).json()
            assert texts(got) == texts(same)
    finally:
        tokenizer.chat_template = kept


def test_a_list_of_prompts_has_one_choice_each_in_its_order(post, model):
    prompts = ["the cat", "sat", "on the mat", "a", "the", "cat cat cat"]
    for way in ({}, {"temperature": 1.0, "seed": 5}):
        alone = [post({"prompt": prompt, "max_tokens": 9} | way) for prompt in prompts]
        most = {"prompt": prompts, "max_tokens": 9} | way
        whole = post(most)
        assert texts(whole) == [one["choices"][0]["token_ids"] for one in alone]
        assert whole["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
        assert whole["usage"]["completion_tokens"] == 9 * len(prompts)
        numbers = [model.text.encode(prompt) for prompt in prompts]
        assert texts(post(most | {"prompt": numbers})) == texts(whole)
        assert texts(post(most | {"prompt": numbers[2]})) == texts(whole)[2:3]
        found: list[list[int]] = [[] for _ in prompts]
        for event in streamed(post, most):
            for choice in event["choices"]:
                found[choice["index"]] += choice["token_ids"]
        assert found == texts(whole)


def test_n_texts_differ_and_come_again_with_their_seed(post):
    for asked in (TEXT | {"prompt": ["the cat", "sat"]}, CHAT):
        way = asked | {"temperature": 1.0, "seed": 11, "n": 3, "max_tokens": 12}
        whole = post(way)
        found, count = texts(whole), len(asked.get("prompt", [0]))
        assert len(found) == 3 * count
        assert len({tuple(text) for text in found}) == len(found)
        assert texts(post(way)) == found
        assert texts(post(way | {"n": 1})) == found[::3]
        assert texts(post(way | {"seed": 12})) != found
        assert whole["usage"] == {"prompt_tokens": (once := post(way | {"n": 1})["usage"]["prompt_tokens"]),
                                  "completion_tokens": 36 * count, "total_tokens": once + 36 * count}  # fmt: skip
        pieces: dict[int, list] = {}
        for event in streamed(post, way):
            for choice in event["choices"]:
                pieces.setdefault(choice["index"], []).append(choice)
        assert [[token for one in pieces[i] for token in one["token_ids"]] for i in range(3 * count)] == found
        for parts in pieces.values():
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
            assert "delta" not in parts[0] or [part["delta"].get("role") for part in parts] == ["assistant"] + [
                None
            ] * (len(parts) - 1)


def test_without_a_seed_every_answer_is_its_own(post):
    way = TEXT | {"temperature": 1.0, "max_tokens": 12}
    found = [tuple(text) for _ in range(4) for text in texts(post(way | {"n": 2}))]
    assert len(set(found)) == len(found)
    assert texts(post(way | {"seed": 0})) == texts(post(way | {"seed": 0}))
    assert texts(post(TEXT)) == texts(post(TEXT))  # greedily there is nothing to draw


def test_one_text_that_stops_leaves_the_others_to_go_on(post):
    asked = TEXT | {"temperature": 1.0, "seed": 11, "n": 3, "max_tokens": 12}
    whole = [choice["text"] for choice in post(asked)["choices"]]
    stop = next(
        whole[1][k : k + 2]
        for k in range(len(whole[1]))
        if all(whole[1][k : k + 2] not in one for one in (whole[0], whole[2]))
    )
    got = post(asked | {"stop": stop})["choices"]
    assert [choice["text"] for choice in got] == [whole[0], whole[1].split(stop)[0], whole[2]]
    assert [choice["finish_reason"] for choice in got] == ["length", "stop", "length"]
    again = post(asked | {"stop": stop})["choices"]
    assert again == got  # down to the tokens: those behind the stop are never counted, however they came


def test_chat_without_a_limit_uses_the_room_that_is_left(post):
    messages = {"messages": CHAT["messages"]}
    usage = post(messages)["usage"]
    assert usage["total_tokens"] == 96
    assert post({"prompt": "the cat"})["usage"]["completion_tokens"] == 16
    assert post(messages | {"max_tokens": 5})["usage"]["completion_tokens"] == 5
    both = post.http.post("/v1/chat/completions", json=messages | {"max_tokens": 5, "max_completion_tokens": 7})
    assert both.json()["usage"]["completion_tokens"] == 7
    assert both.headers["x-frameloom-note"] == "max_completion_tokens 7 holds, not max_tokens 5"
    long = {"messages": [{"role": "user", "content": "the cat " * 60}]}
    assert "96 fit (--max-len)" in post(long, 400)["error"]["message"]


def test_whatever_is_refused_is_refused_in_the_json_of_errors(post):
    http = post.http
    for answer, status, said in (
        (http.get("/v1/engines"), 404, "GET /v1/engines: not found"),
        (http.post("/v1/responses", json={}), 404, "POST /v1/responses"),
        (http.get("/v1/chat/completions"), 405, "GET /v1/chat/completions: method not allowed"),
        (http.delete("/v1/models"), 405, "method not allowed"),
        (http.get("/v1/models", headers={"Host": "elsewhere.example:80"}), 400, "the host 'elsewhere.example'"),
        (http.post("/v1/completions", json=TEXT, headers={"Host": "[2001:db8::1]:80"}), 400, "the host '2001:db8::1'"),
        (http.post("/v1/completions", content=b"{"), 400, "the request: "),
        (http.get("/v1/models/other"), 404, "the model 'other' is not served here"),
        (http.get("/v1/models/a/b"), 404, "the model 'a/b' is not served here"),
    ):  # fmt: skip
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert said in answer.json()["error"]["message"]
    assert http.get("/v1/chat/completions").headers["allow"] == "POST"


def test_what_is_served_can_be_asked_for_by_name_and_probed_by_head(post):
    http = post.http
    one = http.get("/v1/models").json()["data"][0]
    assert http.get(f"/v1/models/{one['id']}").json() == one
    for path in ("/health", "/metrics", "/v1/models", f"/v1/models/{one['id']}"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1"):
        assert http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("asked", [TEXT, CHAT], ids=["completions", "chat"])
def test_the_usage_of_a_stream_comes_in_a_chunk_of_its_own(post, asked):
    whole = post(asked)
    found = streamed(post, asked | {"stream_options": {"include_usage": True}})
    assert [chunk["usage"] for chunk in found] == [None] * (len(found) - 1) + [whole["usage"]]
    assert found[-1]["choices"] == []
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk" if asked is CHAT else "text_completion"}
    assert len({chunk["id"] for chunk in found}) == 1
    for options in (None, {}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": False}):
        assert all("usage" not in chunk for chunk in streamed(post, asked | {"stream_options": options}))


@torch.no_grad()
def plainly(model: TokenModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The log-probabilities of every token of the vocabulary in each place, in one pass without any cache."""
    logits = model.model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def name(model: TokenModel, token: int) -> str:
    piece = model.text.tokenizer.decode([token], skip_special_tokens=True)
    return piece if piece and "\ufffd" not in piece else f"token_id:{token}"


@pytest.mark.parametrize("way", [{}, {"temperature": 2.0, "top_p": 0.9, "seed": 4, "n": 3}], ids=["greedy", "drawn"])
def test_logprobs_of_completions_are_those_of_a_plain_pass(post, model, way):
    prompts = ["the cat", "sat"]
    asked = {"prompt": prompts, "max_tokens": 20, "logprobs": 3} | way
    whole = post(asked)["choices"]
    for at, choice in enumerate(whole):
        tokens, told = choice["token_ids"], choice["logprobs"]
        logs = plainly(model, model.text.encode(prompts[at // way.get("n", 1)]), tokens)
        assert told["tokens"] == [name(model, token) for token in tokens]
        assert told["token_logprobs"] == pytest.approx([float(logs[i, t]) for i, t in enumerate(tokens)], abs=1e-4)
        for i, rivals in enumerate(told["top_logprobs"]):
            best, ids = logs[i].topk(3)
            wanted = dict(zip([name(model, int(t)) for t in ids], best.tolist(), strict=True))
            wanted.setdefault(name(model, tokens[i]), float(logs[i, tokens[i]]))
            assert rivals == pytest.approx(wanted, abs=1e-4)
        for token, begin, following in zip(
            told["tokens"], told["text_offset"], [*told["text_offset"][1:], None], strict=True
        ):
            if not token.startswith("token_id:"):
                assert choice["text"].startswith(token, begin)
            assert following is None or following >= begin
        assert any(token.startswith("token_id:") for token in told["tokens"]) or not way  # halves of letters are there
    joined = [{key: [] for key in choice["logprobs"]} for choice in whole]
    for event in streamed(post, asked):
        for choice in event["choices"]:
            assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
            for key, values in choice["logprobs"].items():
                joined[choice["index"]][key] += values
    for choice, found in zip(whole, joined, strict=True):
        assert found["tokens"] == choice["logprobs"]["tokens"]
        assert found["text_offset"] == choice["logprobs"]["text_offset"]
        assert found["token_logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        assert [list(one) for one in found["top_logprobs"]] == [list(one) for one in choice["logprobs"]["top_logprobs"]]
    bare = post(asked | {"logprobs": 0})["choices"][0]
    assert [list(one) for one in bare["logprobs"]["top_logprobs"]] == [[token] for token in bare["logprobs"]["tokens"]]


@pytest.mark.parametrize("most", [0, 5, 20])
def test_logprobs_of_chat_are_those_of_a_plain_pass(post, model, most):
    asked = CHAT | {"max_tokens": 20, "temperature": 1.0, "seed": 2, "n": 2, "logprobs": True, "top_logprobs": most}
    prompt = model.text.chat(CHAT["messages"])
    whole = post(asked)["choices"]
    for choice in whole:
        logs = plainly(model, prompt, choice["token_ids"])
        for i, (token, told) in enumerate(zip(choice["token_ids"], choice["logprobs"]["content"], strict=True)):
            assert told["token"] == name(model, token)
            assert told["bytes"] == (None if told["token"].startswith("token_id:") else list(told["token"].encode()))
            assert told["logprob"] == pytest.approx(float(logs[i, token]), abs=1e-4)
            best, ids = logs[i].topk(max(most, 1))
            assert [one["logprob"] for one in told["top_logprobs"]] == pytest.approx(best[:most].tolist(), abs=1e-4)
            assert [one["token"] for one in told["top_logprobs"]] == [name(model, int(t)) for t in ids[:most]]
    joined: dict[int, list] = {0: [], 1: []}
    for event in streamed(post, asked):
        for choice in event["choices"]:
            joined[choice["index"]] += choice["logprobs"]["content"]
    for choice in whole:
        assert [one["token"] for one in joined[choice["index"]]] == [
            one["token"] for one in choice["logprobs"]["content"]
        ]
    assert all(choice["logprobs"] is None for choice in post(CHAT)["choices"])


def test_logprobs_of_what_cannot_be_and_of_a_model_without_text_can_be_written(folder):
    plain = llama()
    bias = torch.zeros(61)
    bias[9:] = -torch.inf
    plain.lm_head.bias = torch.nn.Parameter(bias)
    with served(TokenModel("plain", plain, None, frozenset())) as (url, _):
        asked = {"prompt": [1, 2], "max_tokens": 3, "logprobs": 20}
        told = httpx.post(f"{url}/v1/completions", json=asked).json()["choices"][0]
        assert told["logprobs"]["tokens"] == [f"token_id:{token}" for token in told["token_ids"]]
        for rivals in told["logprobs"]["top_logprobs"]:
            assert len(rivals) == 20
            assert sorted(rivals.values())[:11] == [-9999.0] * 11
            assert sum(value > -9999.0 for value in rivals.values()) == 9


def test_a_token_looked_at_alone_keeps_its_space(folder):
    """Tokenizers with a mark for the space swallow it at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marked = Tokenizer(
        models.BPE({"<unk>": 0, "▁a": 1, "▁cat": 2, "s": 3, "▁": 4, "a": 5}, [("▁", "a")], unk_token="<unk>")
    )
    marked.pre_tokenizer, marked.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = TokenizerText(PreTrainedTokenizerFast(tokenizer_object=marked))
    assert text.decode([2, 3]) == "cats"
    assert [text.piece(token) for token in (2, 3)] == [" cat", "s"]


# What other clients send (recorded from litellm 1.83.0 and instructor 1.17.0; openai's own cannot be told apart).
SENT = [
    # litellm's completion with an assistant's empty message: the content is left out
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}, {"role": "user", "content": "a"}],
     "logprobs": True, "max_completion_tokens": 8, "n": 2, "seed": 3, "temperature": 0.4, "top_logprobs": 2},
    # litellm with its own message sent back: it carries fields of its own
    {"messages": [{"role": "user", "content": "a"},
                  {"content": "hi", "role": "assistant", "provider_specific_fields": {"refusal": None}},
                  {"role": "user", "content": "a"}]},
    # litellm to a vLLM, and with neutral formats and tools
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "top_k": -1, "repetition_penalty": 1.0},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "text"}, "tool_choice": "none",
     "tools": []},
    # litellm's text completion
    {"prompt": ["a", "b"], "max_tokens": 8, "logprobs": 2},
    # instructor, with the schema in words
    {"messages": [{"role": "system", "content": "a json"}, {"role": "user", "content": "a\n\nin a ```json block"}]},
]  # fmt: skip


@pytest.mark.parametrize("asked", SENT, ids=lambda asked: "-".join(asked))
def test_what_clients_were_seen_to_send_is_answered(post, asked):
    assert len(post(asked)["choices"]) == asked.get("n", 1) * (len(asked["prompt"]) if "prompt" in asked else 1)
