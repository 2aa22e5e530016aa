"""A closed vocabulary: sentences as numbers, and a small encoder that reads them.

The generators that ship know the words of `frameloom.world.VOCABULARY` and no others; a sentence with other words is
still read, less those words, and the caller is told which they were.
"""

import difflib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from frameloom.errors import InputError

PAD, END = 0, 1


class Words:
    """Numbers for the words of a closed vocabulary: 0 is padding, 1 the end of the sentence."""

    def __init__(self, vocabulary: Sequence[str], length: int = 24) -> None:
        self.vocabulary, self.length = list(vocabulary), length
        self.number = {word: index for index, word in enumerate(self.vocabulary, 2)}

    def __len__(self) -> int:
        return len(self.vocabulary) + 2

    def unknown(self, text: str) -> list[str]:
        """The words of a sentence that the vocabulary lacks, in their order."""
        return [word for word in split(text) if word not in self.number]

    def nearest(self, word: str) -> str | None:
        """The known word that is spelt most alike, if one is."""
        return next(iter(difflib.get_close_matches(word, self.vocabulary, n=1, cutoff=0.7)), None)

    def encode(self, texts: Sequence[str]) -> Int[Tensor, "b n"]:
        """Known words as numbers, an end after the last, padded to `length`. An empty sentence is a lone end.

        Raises InputError for more words than fit.
        """
        out = torch.full((len(texts), self.length), PAD)
        for row, text in zip(out, texts, strict=True):
            ids = [self.number[word] for word in split(text) if word in self.number] + [END]
            if len(ids) > self.length:
                raise InputError(f"the prompt has {len(ids) - 1} words; this model reads {self.length - 1} at most")
            row[: len(ids)] = torch.tensor(ids)
        return out


def split(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


class WordEncoder(nn.Module):
    """Word and position embeddings and a few transformer layers, learned together with what they condition."""

    def __init__(self, words: int, width: int, depth: int = 2, heads: int = 4, length: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """A vector for every word, and which of them are words (padding is not)."""
        known = ids != PAD
        hidden = self.words(ids) + self.positions[: ids.shape[1]]
        return self.layers(hidden, src_key_padding_mask=~known), known
