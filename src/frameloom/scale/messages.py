"""What clients of `frameloom serve` send and get, in the shapes of OpenAI's API."""

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from frameloom.language.tokens import Text


class Ask(BaseModel):
    """What both endpoints take. What changes an answer and is not done here is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: str | list[str] = Field(default_factory=list, max_length=256)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    n: Literal[1] = 1
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]


class CompletionAsk(Ask):
    prompt: str | list[int]


class Message(BaseModel):
    role: str
    content: str


class ChatAsk(Ask):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None


class Writing:
    """The text of an answer as its tokens come, up to the first of `stops`.

    Held back are the ends of the text that may still change: half a letter, and what may become a stop.
    """

    def __init__(self, text: Text | None, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.text, self.stops, self.tokens = text, stops, []
        self.stopped = False
        # Decoded behind the end of the prompt, or else some tokenizers would swallow the space before the first word.
        self._before = list(prompt[-4:])
        self._skip = len(text.decode(self._before)) if text else 0
        self._sent = 0

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """What can be shown since the last call."""
        self.tokens += tokens
        if self.text is None:
            return ""
        whole = self.text.decode([*self._before, *self.tokens])[self._skip :]
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif last:
            end = len(whole)
        else:
            end = len(whole.rstrip("\ufffd"))
            for stop in self.stops:
                overlap = max((k for k in range(1, len(stop)) if whole.endswith(stop[:k])), default=0)
                end = min(end, len(whole) - overlap)
        shown = whole[self._sent : end]
        self._sent = max(self._sent, end)
        return shown


class Shape:
    """The JSON around a piece of text, for one request."""

    def __init__(self, id: str, model: str, chat: bool, prompt: int) -> None:
        self.chat, self.prompt = chat, prompt
        self.base = {"id": id, "created": int(time.time()), "model": model}

    def part(self, text: str, tokens: list[int], finish: str | None, first: bool) -> dict:
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | {"content": text}
            choice, name = {"delta": delta}, "chat.completion.chunk"
        else:
            choice, name = {"text": text}, "text_completion"
        more = {"index": 0, "token_ids": tokens, "logprobs": None, "finish_reason": finish}
        return self.base | {"object": name, "choices": [choice | more]}

    def whole(self, text: str, tokens: list[int], finish: str) -> dict:
        if self.chat:
            choice, name = {"message": {"role": "assistant", "content": text}}, "chat.completion"
        else:
            choice, name = {"text": text}, "text_completion"
        more = {"index": 0, "token_ids": tokens, "logprobs": None, "finish_reason": finish}
        return self.base | {"object": name, "choices": [choice | more], "usage": self.usage(len(tokens))}

    def usage(self, made: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": made, "total_tokens": self.prompt + made}
