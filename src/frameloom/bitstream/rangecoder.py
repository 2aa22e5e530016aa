"""Integer symbols to bytes and back at almost their entropy, by range coding.

What the coder sees of a distribution is a table of integer frequencies that sum to 2^16, made by one
deterministic function and stored or derived the same way on both sides. Each entry divided by 2^16 is exact
in a double, so no rounding of any device reaches the coder.

Symbols that each have a table of their own are the slow case: a coder that is given a table for every symbol reads all
of it to find one interval. So encoding looks the interval up here and gives the coder that alone; decoding gives it
narrow tables whole and has wide ones prepared (`Tables`). The bytes are the same in every case.

The coder is constriction's (R. Bamler, Understanding entropy coding with asymmetric numeral systems, 2022).
"""

import constriction
import numpy as np
from jaxtyping import Float32, Float64, Int32, Integer

from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError

TOTAL = 1 << 16
MAX_ALPHABET = 1 << 12
# A stream of one repeated symbol takes next to no bytes, so its length cannot be bounded by the file's.
MAX_SYMBOLS = 1 << 27
UNIT = 1 << 24  # the coder's own resolution, in which it cuts its range
# Reading tables whole is faster than asking prepared ones up to so many symbols, from so many tables at a time on.
_NARROW, _MANY = 64, 32
_EACH = constriction.stream.model.Categorical(perfect=False)


def table_from_counts(counts: Integer[np.ndarray, "k"]) -> Integer[np.ndarray, "k"]:
    """Frequencies, each at least 1, that sum to 2^16, in proportion to how often each symbol occurs.

    Integer arithmetic only. Rounding falls to the most frequent symbol, the first of them if several.
    """
    size = len(counts)
    if not 1 <= size <= MAX_ALPHABET or counts.min() < 0:
        raise ValueError(f"a table holds 1 to {MAX_ALPHABET} symbols with counts of 0 or more")
    counts = counts.astype(np.int64)
    spare = TOTAL - size
    table = 1 + counts * spare // max(int(counts.sum()), 1)
    table[int(counts.argmax())] += TOTAL - int(table.sum())
    return table


def table_from_probabilities(probabilities: np.ndarray) -> Integer[np.ndarray, "k"]:
    """The table nearest to float probabilities. Make it once, on the encoder's side, and store it."""
    return table_from_counts(np.round(np.asarray(probabilities, np.float64) * (1 << 24)).astype(np.int64))


def _model(table: Integer[np.ndarray, "k"]) -> constriction.stream.model.Categorical:
    if len(table) == 1:
        table = np.array([TOTAL - 1, 1])
    return constriction.stream.model.Categorical(table.astype(np.float64) / TOTAL, perfect=False)


def intervals(tables: Integer[np.ndarray, "*n k"]) -> Integer[np.ndarray, "*n k1"]:
    """Where each symbol of a table begins and the one before it ends, in 2^-24 of the coder's range: k + 1 numbers.

    Every symbol has one unit, whatever its frequency, and its share of those that are left, rounded down as a whole.
    """
    size = tables.shape[-1]
    below = np.zeros((*tables.shape[:-1], size + 1), np.int64)
    np.cumsum(tables, axis=-1, out=below[..., 1:])
    return below * (UNIT - size) // TOTAL + np.arange(size + 1)


def thirds(
    starts: Integer[np.ndarray, "*n"], ends: Integer[np.ndarray, "*n"]
) -> tuple[Int32[np.ndarray, "*n"], Float32[np.ndarray, "*n 3"]]:
    """An interval as the coder is told it: as one of three symbols, and the frequencies of the three.

    They are what lies before the interval, itself, and what lies after it. None can be empty, so where the interval
    begins or ends the range it is the first or the last of the three. The coder adds a unit to each.
    """
    which = 1 - (starts == 0) + (ends == UNIT)
    before = np.where(which == 0, ends, starts) - np.where(which == 2, 2, 1)
    own = np.where(which == 1, ends - starts - 1, 0)
    # Whole numbers below 2^24, which float32 holds.
    return which.astype(np.int32), np.stack([before, own, UNIT - 3 - before - own], -1).astype(np.float32)


def _shares(tables: Integer[np.ndarray, "*n k"]) -> Float64[np.ndarray, "*n k"]:
    return tables * (1 / TOTAL)


class Tables:
    """Tables of one length that symbols are coded under again and again: what decoding needs of them, made once."""

    def __init__(self, frequencies: Integer[np.ndarray, "rows k"]) -> None:
        self.frequencies = frequencies
        self.shares = _shares(frequencies)
        self.models = np.array([_model(table) for table in frequencies], object)


class Encoder:
    """Takes runs of symbols, each run under its own table; decode them in the same order."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def put(self, symbols: Integer[np.ndarray, "n"], table: Integer[np.ndarray, "k"]) -> None:
        if len(symbols) and not (symbols.min() >= 0 and symbols.max() < len(table)):
            raise ValueError("a symbol lies outside its table")
        self._coder.encode(symbols.astype(np.int32), _model(table))

    def put_each(self, symbols: Integer[np.ndarray, "n"], tables: Integer[np.ndarray, "n k"]) -> None:
        """Take symbols, each under a table of its own, of two symbols or more."""
        if not len(symbols):
            return
        if not (symbols.min() >= 0 and symbols.max() < tables.shape[1]):
            raise ValueError("a symbol lies outside its table")
        edges, rows = intervals(tables), np.arange(len(symbols))
        self.put_thirds(*thirds(edges[rows, symbols], edges[rows, symbols + 1]))

    def put_thirds(self, which: Int32[np.ndarray, "n"], frequencies: Float32[np.ndarray, "n 3"]) -> None:
        """Take symbols as `thirds` tells them."""
        self._coder.encode(which, _EACH, frequencies)

    def to_bytes(self) -> bytes:
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Gives back what an `Encoder` took. Bytes of no encoder end in InputError or in wrong symbols."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise InputError("the coded symbols are cut short")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def get(self, count: int, table: Integer[np.ndarray, "k"]) -> Integer[np.ndarray, "n"]:
        if not 0 <= count <= MAX_SYMBOLS:
            raise InputError(f"more than {MAX_SYMBOLS:,} coded symbols cannot be meant")
        try:
            symbols = self._coder.decode(_model(table), count)
        except AssertionError:
            raise InputError("the coded symbols are damaged") from None
        if count and symbols.max() >= len(table):
            raise InputError("the coded symbols are damaged")
        return symbols

    def get_each(self, tables: Integer[np.ndarray, "n k"]) -> Integer[np.ndarray, "n"]:
        """As many symbols as there are tables, each under its own."""
        if not len(tables):
            return np.zeros(0, np.int32)
        try:
            return self._coder.decode(_EACH, _shares(tables))
        except AssertionError:
            raise InputError("the coded symbols are damaged") from None

    def get_rows(self, tables: Tables, rows: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
        """As many symbols as there are rows, each under that row of `tables`."""
        try:
            if tables.shares.shape[1] <= _NARROW and len(rows) >= _MANY:
                return self._coder.decode(_EACH, tables.shares.take(rows, 0))
            return np.fromiter(map(self._coder.decode, tables.models[rows]), np.int32, len(rows))
        except AssertionError:
            raise InputError("the coded symbols are damaged") from None


def pack_symbols(symbols: Integer[np.ndarray, "n"], alphabet: int) -> bytes:
    """Symbols in [0, alphabet) as bytes: their frequency table, then the range-coded stream."""
    table = table_from_counts(np.bincount(symbols, minlength=alphabet))
    coder = Encoder()
    coder.put(symbols, table)
    return pack_numbers(table.tolist()) + coder.to_bytes()


def unpack_symbols(data: bytes, count: int, alphabet: int) -> Integer[np.ndarray, "n"]:
    """The `count` symbols that `pack_symbols` took; InputError when the bytes are not such a stream."""
    frequencies, start = unpack_numbers(data, alphabet)
    if len(frequencies) != alphabet or min(frequencies) < 1 or sum(frequencies) != TOTAL:
        raise InputError("the table of frequencies is damaged")
    return Decoder(data[start:]).get(count, np.array(frequencies))
