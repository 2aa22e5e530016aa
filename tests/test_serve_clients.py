"""Real clients, from their packages, against a server on a loopback port; none of them retries what was refused."""

import asyncio

import httpx
import huggingface_hub
import langchain_openai
import openai
import pydantic
import pydantic_ai
import pytest
import smolagents
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from frameloom.scale.serve import open_served
from tiny_server import chatting, served

CAT = [{"role": "user", "content": "the cat"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]}]
TWICE = CAT * 2  # which the model's template refuses
REFUSED = "Conversation roles must alternate"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = open_served(chatting(tmp_path_factory.mktemp("model")))
    with served(model, slots=4, queue=24, max_len=96) as (url, engine):
        yield url, model, engine


@pytest.fixture(scope="module")
def at(server) -> dict:
    return {"base_url": f"{server[0]}/v1", "api_key": "none"}


@pytest.fixture(scope="module")
def name(server) -> str:
    return server[1].name


@pytest.fixture(scope="module")
def cat(server) -> str:
    """What the model says greedily to CAT, in eight tokens."""
    asked = {"messages": CAT, "max_tokens": 8}
    return httpx.post(f"{server[0]}/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]


class Count(httpx.HTTPTransport):
    """How many requests a client sends."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: list[int] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        self.statuses.append(answer.status_code)
        return answer


@pytest.fixture
def counted(at):
    """openai's client with its own retries, and what it was answered."""
    transport = Count()
    with httpx.Client(transport=transport) as http, openai.OpenAI(**at, http_client=http) as client:
        yield client, transport.statuses


def test_openai_completes_and_streams(at, name):
    with openai.OpenAI(**at) as client:
        whole = client.completions.create(model=name, prompt=["the cat", "sat"], max_tokens=8, logprobs=2, echo=False,
                                          best_of=1, stop=None, suffix=None, seed=None, user="me")  # fmt: skip
        assert [choice.index for choice in whole.choices] == [0, 1]
        assert all(len(choice.logprobs.tokens) == 8 for choice in whole.choices)
        assert all(len(rivals) in (2, 3) for rivals in whole.choices[0].logprobs.top_logprobs)
        tokens = client.completions.create(model=name, prompt=[[5, 8], [2], [7]], max_tokens=3, logit_bias={})
        assert [choice.index for choice in tokens.choices] == [0, 1, 2]
        found = ["", ""]
        options = {"include_usage": True}
        for chunk in client.completions.create(model=name, prompt=["the cat", "sat"], max_tokens=8, stream=True,
                                               stream_options=options):  # fmt: skip
            for choice in chunk.choices:
                found[choice.index] += choice.text
        assert found == [choice.text for choice in whole.choices]
        assert chunk.usage == whole.usage
        assert chunk.object == "text_completion"


def test_openai_chats_and_streams(at, name, cat):
    with openai.OpenAI(**at) as client:
        chat = client.chat.completions
        whole = chat.create(model=name, messages=CAT, max_completion_tokens=8, n=2, logprobs=True, top_logprobs=3,
                            store=False, metadata={}, tools=[], tool_choice="none", response_format={"type": "text"},
                            temperature=None, presence_penalty=0, frequency_penalty=None, stop=None)  # fmt: skip
        assert [choice.message.content for choice in whole.choices] == [cat, cat]
        told = whole.choices[1].logprobs.content
        assert len(told) == 8
        assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 3 for one in told)
        again = chat.create(model=name, messages=[*CAT, whole.choices[0].message, *PARTS], max_tokens=8)
        silent = [*CAT, {"role": "assistant", "content": None}, *PARTS]
        assert again.choices[0].message.content
        assert chat.create(model=name, messages=silent, max_tokens=8).choices[0].message.content
        chunks = list(chat.create(model=name, messages=CAT, max_tokens=8, stream=True,
                                  stream_options={"include_usage": True}))  # fmt: skip
        assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == cat
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert (chunks[-1].object, chunks[-1].usage.completion_tokens) == ("chat.completion.chunk", 8)
        with chat.stream(model=name, messages=CAT, max_tokens=8, logprobs=True, stop=cat[3:5]) as events:
            assert events.get_final_completion().choices[0].message.content == cat.split(cat[3:5])[0]
        assert chat.create(model=name, messages=CAT).usage.total_tokens == 96


def test_openai_draws_anew_without_a_seed_and_alike_with_one(at, name):
    async def drawn(**more) -> list[str]:
        async with openai.AsyncOpenAI(**at) as client:
            chat = client.chat.completions
            asked = {"model": name, "messages": CAT, "max_tokens": 12, "temperature": 1.0} | more
            answers = await asyncio.gather(*(chat.create(**asked) for _ in range(4)))
            return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(drawn()))) == 4
    assert len(set(asyncio.run(drawn(seed=7)))) == 1


def test_openai_finds_models_and_its_errors(counted, name):
    client, statuses = counted
    assert client.models.retrieve(name).id == name
    assert [model.id for model in client.models.list()] == [name]

    class Answer(pydantic.BaseModel):
        number: int

    chat = client.chat.completions
    for status, wrong, said, ask in (
        (404, openai.NotFoundError, "not served here", lambda: client.models.retrieve("other")),
        (404, openai.NotFoundError, "not served here", lambda: chat.create(model="other", messages=CAT)),
        (404, openai.NotFoundError, "POST /v1/responses", lambda: client.responses.create(model=name, input="a")),
        (400, openai.BadRequestError, REFUSED, lambda: chat.create(model=name, messages=TWICE)),
        (400, openai.BadRequestError, "response_format", lambda: chat.parse(model=name, messages=CAT,
                                                                            response_format=Answer)),
        (400, openai.BadRequestError, "logit_bias", lambda: chat.create(model=name, messages=CAT, logit_bias={"5": 1})),
        (400, openai.BadRequestError, "96 fit", lambda: client.completions.create(model=name, prompt="a",
                                                                                  max_tokens=96)),
    ):  # fmt: skip
        statuses.clear()
        with pytest.raises(wrong, match=said) as raised:
            ask()
        assert raised.value.type == "invalid_request_error"
        assert statuses == [status]  # once: trying again would not help


def test_openai_comes_again_when_there_was_no_room(tmp_path):
    model = open_served(chatting(tmp_path))
    with served(model, slots=1, queue=1, max_len=96, pause=0.01) as (url, engine):
        transport = Count()
        with (
            httpx.Client(transport=transport) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client,
        ):
            asked = {"model": model.name, "prompt": "a", "max_tokens": 64, "stream": True}
            streams = [client.completions.create(**asked) for _ in range(2)]
            whole = client.completions.create(model=model.name, prompt="the cat", max_tokens=4)
            assert whole.usage.completion_tokens == 4
            assert transport.statuses[:3] == [200, 200, 429]
            assert transport.statuses[-1] == 200
            made = [sum(len(chunk.choices[0].token_ids) for chunk in stream) for stream in streams]
            assert made == [64, 64]
        assert engine.refused >= 1


def test_langchain_completes_and_chats(at, name, cat):
    text = langchain_openai.OpenAI(**at, model=name, max_tokens=8, temperature=0)
    first = text.invoke("the cat")
    generated = text.generate(["the cat", "sat"])
    assert [one[0].text for one in generated.generations] == [first, text.invoke("sat")]
    assert generated.llm_output["token_usage"]["completion_tokens"] == 16
    assert "".join(text.stream("the cat")) == first
    several = langchain_openai.OpenAI(**at, model=name, max_tokens=8, n=2, best_of=2, seed=5, logprobs=2)
    assert len(several.generate(["the cat"]).generations[0]) == 2
    chat = langchain_openai.ChatOpenAI(**at, model=name, max_tokens=8, temperature=0)
    assert chat.invoke("the cat").content == cat
    assert "".join(chunk.content for chunk in chat.stream("the cat")) == cat
    told = langchain_openai.ChatOpenAI(**at, model=name, max_tokens=8, logprobs=True, top_logprobs=2, n=2, seed=1)
    history = [("system", "sat"), ("human", [{"type": "text", "text": "the cat"}]), ("ai", ""), ("human", "on")]
    assert len(told.invoke(history).response_metadata["logprobs"]["content"]) == 8
    schema = {"title": "A", "description": "a", "type": "object", "properties": {"a": {"type": "integer"}}}
    with pytest.raises(openai.BadRequestError, match="response_format: not done here"):
        chat.with_structured_output(schema).invoke("the cat")


def test_hugging_face_chats_with_and_without_a_name(server, name, cat):
    with huggingface_hub.InferenceClient(base_url=f"{server[0]}/v1") as client:
        assert client.chat_completion(CAT, max_tokens=8).choices[0].message.content == cat
        chunks = list(client.chat_completion(CAT, max_tokens=8, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == cat
        told = client.chat.completions.create(model=name, messages=PARTS, max_tokens=8, logprobs=True, top_logprobs=2,
                                              seed=3, temperature=0.5, logit_bias=None, stop=None)  # fmt: skip
        assert [len(one.top_logprobs) for one in told.choices[0].logprobs.content] == [2] * 8
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match=REFUSED):
            client.chat_completion(TWICE)


def test_pydantic_ai_runs_streams_and_remembers(at, name, cat):
    model = OpenAIChatModel(name, provider=OpenAIProvider(**at))
    agent = pydantic_ai.Agent(model, model_settings={"max_tokens": 8, "temperature": 0.0})
    first = agent.run_sync("the cat")
    assert first.output == cat
    assert first.usage.output_tokens == 8
    assert agent.run_sync("sat", message_history=first.all_messages()).output
    assert agent.run_sync(["the", "cat"]).output
    settings = {"max_tokens": 8, "seed": 4, "top_p": 0.9, "openai_logprobs": True, "openai_top_logprobs": 2,
                "logit_bias": {}}  # fmt: skip
    assert pydantic_ai.Agent(model, instructions="sat", model_settings=settings).run_sync("the cat").output

    async def streamed() -> str:
        async with agent.run_stream("the cat") as stream:
            return [text async for text in stream.stream_text(debounce_by=None)][-1]

    assert asyncio.run(streamed()) == cat

    class Answer(pydantic.BaseModel):
        number: int

    with pytest.raises(pydantic_ai.ModelHTTPError, match=r"tool(s|_choice): not done here"):
        pydantic_ai.Agent(model, output_type=Answer).run_sync("the cat")


def test_smolagents_speaks_in_parts_and_streams(at, name, cat):
    for flat in (False, True):
        model = smolagents.OpenAIServerModel(name, api_base=at["base_url"], api_key="none", max_tokens=8, temperature=0,
                                             flatten_messages_as_text=flat)  # fmt: skip
        asked = [smolagents.ChatMessage(role="user", content=[{"type": "text", "text": "the cat"}])]
        assert model(asked).content == cat
        stopped = model(asked, stop_sequences=[cat[3:5]])
        assert stopped.content == cat.split(cat[3:5])[0]
        deltas = list(model.generate_stream(asked))
        assert "".join(delta.content or "" for delta in deltas) == cat
        assert deltas[-1].token_usage.output_tokens == 8
