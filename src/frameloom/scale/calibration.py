"""What a model is shown while it is compressed: sentences as tokens, for models of one stack and of two."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from frameloom.errors import InputError

_FIRST_SEED = 5_000_000  # far from the seeds that models of the world are trained on
_SPAN, _SHARE = 3, 0.15


@dataclass(frozen=True)
class Sample:
    """One sequence, without padding.

    Attributes:
        ids: tokens of the first stack.
        target: tokens that the second stack says, for a model of two.
        shown, said: which positions of `ids`, and of `target`, count as calibration; all if None. Positions of
            sentinels carry no content, and there are many of them.
    """

    ids: Int64[Tensor, "n"]
    target: Int64[Tensor, "m"] | None = None
    shown: Bool[Tensor, "n"] | None = None
    said: Bool[Tensor, "m"] | None = None


def captions(count: int, seed: int = 0) -> list[str]:
    """Sentences about worlds of moving objects."""
    from frameloom.world import World

    first = _FIRST_SEED + 100_000 * seed
    return [str(text) for text in World("objects", range(first, first + count), frames=8).captions()]


def read(source: "str | Path | Sequence[Sample]", folder: Path, count: int, *, seq2seq: bool, seed: int = 0,
         longest: int = 512) -> list[Sample]:  # fmt: skip
    """Up to `count` samples.

    Args:
        source: `"world"`, for captions of the built-in world; a text file, a sentence a line; a safetensors file with
            `input_ids` `(n, length)`, and `labels` for a model of two stacks, each padded with -100; or samples.
        folder: the model's, whose tokenizer reads text.
        count: how many samples at most.
        seq2seq: the model has two stacks; spans of a text are then hidden from the first and said by the second.
        longest: longer sequences are cut.

    Raises:
        InputError: no such file, an empty one, no tokenizer, or no sentinels in it.
    """
    if not isinstance(source, str | Path):
        found = list(source)[:count]
        if not found:
            raise InputError("no calibration samples were given; a few hundred are usual")
        return found
    path = Path(source)
    if path.suffix == ".safetensors":
        return _tokens(path, count, seq2seq, longest)
    texts = captions(count, seed) if str(source) == "world" else _lines(path)[:count]
    tokenizer = _tokenizer(folder)
    ids = [torch.tensor(tokenizer(text)["input_ids"][:longest], dtype=torch.int64) for text in texts]
    if not seq2seq:
        return [Sample(row) for row in ids if len(row)]
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(100)]
    sentinels = [number for number in sentinels if number is not None and number != tokenizer.unk_token_id]
    if len(sentinels) < 2:
        raise InputError(f"{folder}: its tokenizer has no <extra_id_0>, with which spans are hidden; "
                         "give samples as a safetensors file with input_ids and labels")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return [hide_spans(row, torch.tensor(sentinels), generator) for row in ids if len(row) > 1]


def hide_spans(ids: Int64[Tensor, "n"], sentinels: Int64[Tensor, "k"], generator: torch.Generator) -> Sample:
    """T5's task: about 15% of the tokens, in spans of 3, give way to a sentinel each; the answer lists what was there.

    C. Raffel and others, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR
    2020, arXiv 1910.10683.
    """
    count = min(max(1, round(_SHARE * len(ids) / _SPAN)), len(sentinels) - 1)
    width = min(_SPAN, max(1, len(ids) // (2 * count)))
    # Spans never touch: their starts are spread over what is left when every span and a token behind it are set aside.
    free = len(ids) - count * (width + 1)
    starts = torch.randint(0, max(free, 0) + 1, (count,), generator=generator).sort().values
    starts = (starts + torch.arange(count) * (width + 1)).tolist()
    shown, said, last = [], [], 0
    for sentinel, start in zip(sentinels, starts, strict=False):
        shown += [ids[last:start], sentinel[None]]
        said += [sentinel[None], ids[start : start + width]]
        last = start + width
    said.append(sentinels[count][None])
    source, target = torch.cat([*shown, ids[last:]]), torch.cat(said)
    return Sample(source, target, ~torch.isin(source, sentinels), ~torch.isin(target, sentinels))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--calib {path}: cannot be read ({type(error).__name__}); world, a text file with a sentence "
                         "a line, or a safetensors file with input_ids is wanted") from None  # fmt: skip
    if not lines:
        raise InputError(f"--calib {path}: holds no sentence; one a line is wanted")
    return lines


def _tokens(path: Path, count: int, seq2seq: bool, longest: int) -> list[Sample]:
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"--calib {path}: cannot be read ({type(error).__name__})") from None
    wanted = ("input_ids", "labels") if seq2seq else ("input_ids",)
    for name in wanted:
        if name not in found or found[name].ndim != 2 or found[name].is_floating_point():
            raise InputError(f"--calib {path}: holds no {name} as whole numbers (samples, length)")
    rows = [[row[row >= 0][:longest].long() for row in found[name][:count]] for name in wanted]
    samples = [Sample(*both) for both in zip(*rows, strict=True) if all(len(row) for row in both)]
    if not samples:
        raise InputError(f"--calib {path}: holds no tokens")
    return samples


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever its files make it raise
        raise InputError(f"{folder}: holds no tokenizer that reads text ({type(error).__name__}); put one there, or "
                         "give --calib a safetensors file with input_ids") from None  # fmt: skip
