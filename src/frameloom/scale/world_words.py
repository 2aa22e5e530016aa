"""A small language model of the captions of the synthetic world: what `frameloom serve` serves when given nothing.

It completes "a small red" to a sentence about a clip. It is a stock Llama of transformers on the closed vocabulary of
`frameloom.world`, a token a word, trained on captions alone: no picture is rendered for it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from frameloom.errors import InputError
from frameloom.language.tokens import TokenModel, WordTokens
from frameloom.language.words import END, PAD, Words
from frameloom.training.recipe import Recipe
from frameloom.world import VOCABULARY, WorldDataset

WORDS = Words(VOCABULARY, length=32)

# How many captions of every kind of scene; some kinds have more to say than others.
KINDS = {"objects": 6000, "toys": 4000, "bounce": 2000, "figure": 500, "flyover": 200, "motion": 200, "talk": 100}


@dataclass(frozen=True)
class Config:
    width: int = 96
    depth: int = 4
    heads: int = 4
    length: int = 64


class WorldWords(nn.Module):
    """A Llama of `config.depth` layers over the words of the world."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS), hidden_size=config.width, intermediate_size=config.width * 8 // 3,
                num_hidden_layers=config.depth, num_attention_heads=config.heads,
                num_key_value_heads=config.heads, max_position_embeddings=config.length, tie_word_embeddings=False,
                bos_token_id=END, eos_token_id=END, pad_token_id=PAD, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n words"]:
        """Logits of the word after each."""
        return self.model(input_ids=ids, use_cache=False).logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy of every word of `ids` `(b, n)` and of the end, in nats."""
        ids = batch["ids"]
        begun = torch.cat([torch.full_like(ids[:, :1], END), ids[:, :-1]], 1)
        return cross_entropy(self(begun).flatten(0, 1), ids.flatten(), ignore_index=PAD)

    def served(self) -> TokenModel:
        return TokenModel("world-words", self.model, WordTokens(WORDS), frozenset([END]))

    @classmethod
    def preset(cls, size: str) -> Config:
        if size != "tiny":
            raise InputError(f"--size {size}: world-words comes in tiny alone")
        return Config()

    @classmethod
    def recipe(cls, size: str) -> Recipe:
        return Recipe(steps=800, batch_size=64, lr=3e-3, warmup=100, weight_decay=0.01)

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Any:
        if source != "world":
            raise InputError(f"--data {source}: world-words learns the captions of world")
        return Captions(seed)


class Captions:
    """Captions of scenes of all kinds, `seed` the world's, in random order."""

    def __init__(self, seed: int, share: float = 1.0) -> None:
        texts = [text for kind, count in KINDS.items() for text in captions(kind, max(1, round(share * count)), seed)]
        self.seed, self.ids = seed, WORDS.encode(texts)

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        chosen = np.random.default_rng([self.seed, indices[0]]).integers(len(self.ids), size=len(indices))
        ids = self.ids[chosen]
        return {"ids": ids[:, : int((ids != PAD).sum(1).max())]}


def captions(kind: str, count: int, seed: int) -> list[str]:
    """Captions of `count` scenes of one kind; no two seeds share a scene."""
    data = WorldDataset(kind, 8, 16, 16, seed, count)
    return [
        text for begin in range(0, count, 64) for text in data.world(range(begin, min(begin + 64, count))).captions()
    ]
