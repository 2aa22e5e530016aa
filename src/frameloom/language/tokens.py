"""Causal language models and what turns text into their tokens and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from frameloom.errors import InputError
from frameloom.language.words import END, Words, split


@runtime_checkable
class Text(Protocol):
    """Between text and tokens. `decode` of a whole answer continues the prompt's text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def piece(self, token: int) -> str:
        """The text of one token in the middle of others; empty if it has none, U+FFFD in it if it is half a letter."""
        ...

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int] | None:
        """A conversation as a prompt, or None for a model that was not made for any.

        Raises InputError for one that the model's template refuses, in the template's words.
        """


@dataclass(frozen=True)
class TokenModel:
    """A model ready to decode with: its `text` is None if it knows tokens alone, `eos` ends an answer."""

    name: str
    model: nn.Module
    text: Text | None
    eos: frozenset[int]


class WordTokens:
    """One token a word of a closed vocabulary; a text begins after the end of another."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def encode(self, text: str) -> list[int]:
        """Raises InputError for no words, and for those that the vocabulary lacks, with the nearest that it has."""
        if not split(text):
            raise InputError("the prompt is empty; one word or more is wanted")
        if unknown := self.words.unknown(text):
            near = self.words.nearest(unknown[0])
            known = self.words.vocabulary
            hint = f"did you mean {near!r}?" if near else f"it knows {len(known)}, such as {known[-1]!r}"
            raise InputError(f"the model does not know the word {unknown[0]!r}; {hint}")
        return [END] + [self.words.number[word] for word in split(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" {self.words.vocabulary[token - 2]}" for token in tokens if token > END)

    def piece(self, token: int) -> str:
        return self.decode([token])

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int] | None:
        return None


class TokenizerText:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Some tokenizers swallow the space before the first word, so that a token is looked at behind another.
        self._ahead = list(tokenizer("a", add_special_tokens=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self.decode([*self._ahead, token])[len(self.decode(self._ahead)) :]

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int] | None:
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            return None
        try:
            made = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        # A template is a program of the folder's, run on messages of the client's: it may raise on purpose, or stumble.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:500]
            raise InputError(f"the model's chat template refuses these messages: {reason}") from None
        return list(made["input_ids"])


def open_folder(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> TokenModel:
    """A causal language model as transformers keeps it: `config.json`, safetensors, and a tokenizer if there is one.

    Nothing is downloaded, no code of the folder is run, and no pickle is read. `dtype` None is float32 on a
    processor, the file's own elsewhere.

    Raises:
        InputError: the folder lacks something, or holds another kind of model, or not all of its weights.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise InputError(f"--weights {folder}: holds no config.json")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"--weights {folder}: holds no .safetensors; other formats are not read, since they can run "
                         "code (save_pretrained writes it)")  # fmt: skip
    kind = dtype or (torch.float32 if device == "cpu" else "auto")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            attn_implementation="sdpa", dtype=kind,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--weights {folder}: not a causal language model that transformers opens ({reason})"
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"--weights {folder}: lacks {len(missing)} tensors of {type(model).__name__}, such as "
                         f"{missing[0]}")  # fmt: skip
    return with_tokenizer(folder, model.to(device).eval())


def with_tokenizer(folder: Path, model: nn.Module) -> TokenModel:
    """A model of transformers and the tokenizer of its folder, if there is one.

    Raises InputError for a tokenizer that cannot be opened.
    """
    from transformers import AutoTokenizer

    text = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            text = TokenizerText(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"--weights {folder}: its tokenizer cannot be opened ({reason})") from None
    ends = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    eos = frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
    return TokenModel(folder.resolve().name, model, text, eos)
