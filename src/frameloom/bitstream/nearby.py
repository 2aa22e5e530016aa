"""Runs of integers that lie near 0, or near integers that both sides already hold, as one range-coded stream.

Each run is coded whole or as its difference to the run before it, under a table that is stored or under one that two
numbers describe: a spike at 0 and tails that fall geometrically. The cheapest of the four is taken, its table's bytes
counted. All tables come of integer arithmetic.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from frameloom.bitstream.rangecoder import TOTAL, Decoder, Encoder, table_from_counts
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError

LIMIT = 2047  # a table holds 4,096 symbols
_DIFFERENCE, _STORED = 1, 2


def spike_table(zero: int, ratio: int, reach: int) -> Integer[np.ndarray, "k"]:
    """Frequencies of -reach..reach: `zero` of 2^16 for 0, each further integer `ratio` / 2^16 of the one before."""
    count = ((TOTAL - zero << 8) // 2 * (TOTAL - ratio)) >> 16
    tail = []
    for _ in range(reach):
        tail.append(count)
        count = count * ratio >> 16
    return table_from_counts(np.array([*tail[::-1], zero << 8, *tail], np.int64))


def pack_nearby(runs: Sequence[np.ndarray], before: Sequence[np.ndarray] | None) -> bytes:
    """Runs of integers within +-2047 as bytes; `before` are as many runs of the same lengths, or None."""
    coder, notes = Encoder(), []
    for which, run in enumerate(runs):
        choices = list(_choices(run, 0))
        if before is not None:
            choices += _choices(run - before[which], _DIFFERENCE)
        _, said, values, table = min(choices, key=lambda choice: choice[0])
        notes += said
        if table is not None:
            coder.put(values + len(table) // 2, table)
    return pack_numbers(notes) + coder.to_bytes()


def unpack_nearby(
    data: bytes, counts: Sequence[int], before: Sequence[np.ndarray] | None
) -> list[Integer[np.ndarray, "n"]]:
    """The runs that `pack_nearby` took. Raises InputError for bytes that it cannot have made."""
    tables, start = [], 0
    for _ in counts:
        (mode, reach), start = unpack_numbers(data, 2, start)
        if mode > _DIFFERENCE + _STORED or reach > LIMIT or (mode & _DIFFERENCE and before is None):
            raise InputError("the coded integers are damaged")
        table = None
        if reach and mode & _STORED:
            stored, start = unpack_numbers(data, 2 * reach + 1, start)
            if len(stored) != 2 * reach + 1 or min(stored) < 1 or sum(stored) != TOTAL:
                raise InputError("a table of frequencies is damaged")
            table = np.array(stored, np.int64)
        elif reach:
            (zero, ratio), start = unpack_numbers(data, 2, start)
            if not (1 <= zero < TOTAL and ratio < TOTAL):
                raise InputError("a table of frequencies is damaged")
            table = spike_table(zero, ratio, reach)
        tables.append((mode, reach, table))
    coder, runs = Decoder(data[start:]), []
    for which, (count, (mode, reach, table)) in enumerate(zip(counts, tables, strict=True)):
        run = np.zeros(count, np.int64) if table is None else coder.get(count, table).astype(np.int64) - reach
        if mode & _DIFFERENCE:
            run = run + before[which]
        if count and np.abs(run).max() > LIMIT:
            raise InputError("a coded integer is out of range")
        runs.append(run)
    return runs


def _choices(values: Integer[np.ndarray, "n"], mode: int):
    """(bits, what is noted, the values, their table) of each way to code them."""
    reach = int(np.abs(values).max(initial=0))
    if reach > LIMIT:
        if not mode & _DIFFERENCE:
            raise ValueError(f"integers beyond {LIMIT} cannot be coded")
        return
    if not reach:
        yield 16.0, [mode, 0], values, None
        return
    counts = np.bincount(values + reach, minlength=2 * reach + 1)
    zero = int(np.clip(round(TOTAL * counts[reach] / len(values)), 1, TOTAL - 1))
    ratio = int(np.clip(round(TOTAL * (1 - 1 / np.abs(values[values != 0]).mean())), 0, TOTAL - 1))
    own = table_from_counts(counts)
    for said, table in (
        ([mode, reach, zero, ratio], spike_table(zero, ratio, reach)),
        ([mode + _STORED, reach, *own.tolist()], own),
    ):
        bits = 8 * len(pack_numbers(said)) - float(counts @ np.log2(table / TOTAL))
        yield bits, said, values, table
