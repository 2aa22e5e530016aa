"""What clients of `frameloom serve` send and get, in the shapes of OpenAI's API."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from frameloom.errors import InputError
from frameloom.language.tokens import Text
from frameloom.scale.flover import Request
from frameloom.scale.sampling import Likelihood, Sampling

# What may be said and has no part in the answer.
IDLE = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
})  # fmt: skip

# What is not done here, with the values that ask for nothing; the first is the one to recommend.
NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "min_p": (0,), "typical_p": (1,), "min_tokens": (0,), "ignore_eos": (False,), "use_beam_search": (False,),
    "echo": (False,), "suffix": ("",), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "reasoning_effort": ("none",),
    "verbosity": ("medium",), "modalities": (["text"],), "response_format": ({"type": "text"},),
    "best_of": (1,), "top_logprobs": (0,), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
}  # fmt: skip

# huggingface_hub's client must name a model even where none was given to it.
NO_NAME = "dummy"

MOST_LIKELIEST = 20
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


class Given(BaseModel):
    """A JSON object in which null means that nothing was said."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Given):
    include_usage: bool = False


class Ask(Given):
    """What both endpoints take. What changes an answer and is not done here is refused, not ignored."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=256)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=128)

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name not in IDLE and value not in (None, [], {}, *NEUTRAL.get(name, ())):
                instead = f", or give {json.dumps(NEUTRAL[name][0])}" if name in NEUTRAL else ""
                raise InputError(f"{' '.join(name.split())[:80]}: not done here, and it could change the answer; "
                                 f"leave it out{instead}")  # fmt: skip
        return kept

    @field_validator("model")
    @classmethod
    def _no_name(cls, value: str) -> str | None:
        return None if value == NO_NAME else value

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("top_k")
    @classmethod
    def _all_tokens(cls, value: int) -> int:
        return 0 if value == -1 else value

    @property
    def stops(self) -> list[str]:
        return [text for text in self.stop if text]

    def sampling(self, number: int) -> Sampling:
        """Of the text `number` of the `n` after one prompt: the first has the seed that was given, the others have
        seeds made of it. Without one every text of every request has a fresh seed.
        """
        if self.seed is None:
            seed = secrets.randbits(63)
        elif number == 0:
            seed = self.seed % 2**63
        else:
            seed = int(np.random.SeedSequence([self.seed % 2**63, number]).generate_state(1, np.uint64)[0] >> 1)
        return Sampling(self.temperature, self.top_k, self.top_p, seed)


class CompletionAsk(Ask):
    prompt: list[str | list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)
    best_of: int = 1

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> list:
        """One text or one list of token numbers is a list of one prompt."""
        items = value if isinstance(value, list) and value else [value]
        if all(type(item) is int for item in items):
            items = [items]
        if not all(isinstance(one, str) or (isinstance(one, list) and all(type(item) is int for item in one))
                   for one in items):  # fmt: skip
            raise InputError("a text or a list of token numbers is wanted, or a list of such")
        return items

    @field_validator("logprobs", mode="before")
    @classmethod
    def _how_many(cls, value: Any) -> Any:
        if value is True:
            raise InputError(f"how many of the likeliest tokens is wanted, 0 to {MOST_LIKELIEST}, not true")
        return None if value is False else value

    @model_validator(mode="after")
    def _all_of_the_best(self) -> "CompletionAsk":
        if self.best_of not in (1, self.n):
            raise InputError("best_of: answers are not ranked here; leave it out, or give the same as n")
        return self

    @property
    def texts(self) -> int:
        """How many are asked for."""
        return self.n * len(self.prompt)

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class Message(Given):
    """A message; what else it has reaches the template of the model."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Parts that are all text, a line each."""
        if not isinstance(value, list):
            return value
        for part in value:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else None
                raise InputError(f"a part of type {str(kind)[:80]!r}; parts of type 'text' are read, and no others")
        return "\n".join(part["text"] for part in value)

    @model_validator(mode="after")
    def _text_alone(self) -> "Message":
        for name in ("tool_calls", "function_call", "audio"):
            if (self.model_extra or {}).get(name):
                raise InputError(f"{name} are not done here; leave such messages out")
        if self.content is None:
            if self.role != "assistant":
                raise InputError(f"content is wanted in a message of role {self.role[:80]!r}")
            self.content = ""
        return self


class ChatAsk(Ask):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LIKELIEST)

    @model_validator(mode="after")
    def _told_at_all(self) -> "ChatAsk":
        if self.top_logprobs and not self.logprobs:
            raise InputError('top_logprobs: needs "logprobs": true')
        return self

    @property
    def texts(self) -> int:
        """How many are asked for."""
        return self.n

    @property
    def limit(self) -> int | None:
        """How many tokens at most; None is all that there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def note(self) -> str:
        """What was asked for twice and differently."""
        if None in (self.max_tokens, self.max_completion_tokens) or self.max_tokens == self.max_completion_tokens:
            return ""
        return f"max_completion_tokens {self.max_completion_tokens} holds, not max_tokens {self.max_tokens}"


class Writing:
    """The text of an answer as its tokens come, up to the first of `stops`, whose last token is then the last taken.

    Held back are the ends of the text that may still change: half a letter, and what may become a stop. With
    `placed`, `places` are where in the text every token begins.
    """

    def __init__(self, text: Text | None, prompt: Sequence[int], stops: Sequence[str], placed: bool = False) -> None:
        self.text, self.stops, self.placed = text, stops, placed
        self.tokens: list[int] = []
        self.places: list[int] = []
        self.stopped = False
        # Decoded behind the end of the prompt, or else some tokenizers would swallow the space before the first word.
        self._before = list(prompt[-4:])
        self._skip = len(text.decode(self._before)) if text else 0
        self._sent = self._whole = 0

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """What can be shown since the last call."""
        if len(tokens) < 2 or not (self.stops or self.placed):
            return self._add(tokens, last)
        shown = ""
        for at, token in enumerate(tokens, 1):
            shown += self._add([token], last and at == len(tokens))
            if self.stopped:
                break
        return shown

    def _add(self, tokens: Sequence[int], last: bool) -> str:
        self.tokens += tokens
        if self.text is None:
            self.places += [0] * len(tokens)
            return ""
        whole = self.text.decode([*self._before, *self.tokens])[self._skip :]
        if self.placed and tokens:
            piece = self.text.piece(tokens[0])
            own = piece and "\ufffd" not in piece and whole.endswith(piece)
            self.places.append(len(whole) - len(piece) if own else self._whole)  # half a letter is where the letter is
        self._whole = len(whole.rstrip("\ufffd"))
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif last:
            end = len(whole)
        else:
            end = self._whole
            for stop in self.stops:
                overlap = max((k for k in range(1, len(stop)) if whole.endswith(stop[:k])), default=0)
                end = min(end, len(whole) - overlap)
        shown = whole[self._sent : end]
        self._sent = max(self._sent, end)
        return shown


class Part:
    """What came of one text at once: the text to show, its tokens, and how it ended if it has."""

    def __init__(
        self, index: int, request: Request, writing: Writing, text: str, begin: int, finish: str | None
    ) -> None:
        self.index, self.text, self.finish = index, text, finish
        self.tokens = writing.tokens[begin:]
        self.places = writing.places[begin:]
        self.likelihoods = request.likelihoods[begin : len(writing.tokens)]


class Shape:
    """The JSON around pieces of text, for one request."""

    def __init__(self, id: str, model: str, text: Text | None, chat: bool, told: bool, prompt: int) -> None:
        self.text, self.chat, self.told, self.prompt = text, chat, told, prompt
        self.base = {"id": id, "created": int(time.time()), "model": model}

    def event(self, part: Part, first: bool) -> dict:
        """A piece of one text, for a stream."""
        if self.chat:
            said: dict = {"delta": ({"role": "assistant"} if first else {}) | {"content": part.text}}
        else:
            said = {"text": part.text}
        return self._around([self._choice(part, said)], "chat.completion.chunk")

    def whole(self, parts: Sequence[Part]) -> dict:
        choices = [
            self._choice(part, {"message": {"role": "assistant", "content": part.text}} if self.chat else
                         {"text": part.text}) for part in parts
        ]  # fmt: skip
        made = sum(len(part.tokens) for part in parts)
        return self._around(choices, "chat.completion") | {"usage": self.usage(made)}

    def totals(self, made: int) -> dict:
        """The end of a stream whose client wants the usage."""
        return self._around([], "chat.completion.chunk") | {"usage": self.usage(made)}

    def usage(self, made: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": made, "total_tokens": self.prompt + made}

    def _around(self, choices: list[dict], chat: str) -> dict:
        return self.base | {"object": chat if self.chat else "text_completion", "choices": choices}

    def _choice(self, part: Part, said: dict) -> dict:
        told = (self._chat_logprobs if self.chat else self._completion_logprobs)(part) if self.told else None
        return {"index": part.index} | said | {"token_ids": part.tokens, "logprobs": told, "finish_reason": part.finish}

    def _name(self, token: int) -> str:
        """What a token is called: its text; one without (half a letter, the end of a text) goes by its number."""
        piece = self.text.piece(token) if self.text else ""
        return piece if piece and "\ufffd" not in piece else f"token_id:{token}"

    def _named(self, token: int, logprob: float) -> dict:
        name = self._name(token)
        spelt = None if name == f"token_id:{token}" else list(name.encode())
        return {"token": name, "logprob": _written(logprob), "bytes": spelt}

    def _chat_logprobs(self, part: Part) -> dict:
        content = [
            self._named(token, likely.logprob) | {"top_logprobs": [self._named(*one) for one in likely.likeliest]}
            for token, likely in zip(part.tokens, part.likelihoods, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _completion_logprobs(self, part: Part) -> dict:
        return {
            "tokens": [self._name(token) for token in part.tokens],
            "token_logprobs": [_written(likely.logprob) for likely in part.likelihoods],
            "top_logprobs": [self._rivals(*one) for one in zip(part.tokens, part.likelihoods, strict=True)],
            "text_offset": part.places,
        }

    def _rivals(self, token: int, likely: Likelihood) -> dict[str, float]:
        """The likeliest, and the chosen one if it is not among them; of two of the same text the likelier."""
        names: dict[str, float] = {}
        for rival, logprob in (*likely.likeliest, (token, likely.logprob)):
            names.setdefault(self._name(rival), _written(logprob))
        return names


def _written(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
