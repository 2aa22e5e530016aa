"""The container, the range coder and the quantiser: round trips, and what damaged bytes end in."""

import contextlib
import json
import random
import struct
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.bitstream.container import FORMAT, Container, Header, parse
from frameloom.bitstream.quantise import SIDE_SHARE, pack_sides, quantise, side_shape, unpack_sides
from frameloom.bitstream.rangecoder import (
    TOTAL,
    Decoder,
    Encoder,
    pack_symbols,
    table_from_counts,
    table_from_probabilities,
    unpack_symbols,
)
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError
from frameloom.video.colour import BT709, Colour

HEADER = Header(
    method="hnerv",
    config={"strides": [2, 2]},
    width=128,
    height=64,
    frames=32,
    rate=Fraction(30000, 1001),
    colour=Colour(BT709, False, 1, 1, 8),
    pixel_aspect=Fraction(16, 15),
)


def sample() -> bytes:
    return Container(HEADER, {"weights": bytes(range(200)), "embeddings": b"abc", "empty": b""}).to_bytes()


def with_header(data: bytes, change) -> bytes:
    """The file with its header edited and its checksum made right again, as an attacker would."""
    length = struct.unpack_from("<I", data, 10)[0]
    body = json.loads(data[18 : 18 + length])
    change(body)
    text = json.dumps(body).encode()
    return data[:10] + struct.pack("<II", len(text), zlib.crc32(text)) + text + data[18 + length :]


def test_a_container_comes_back_as_it_was():
    container = parse(sample())
    assert container.header == HEADER
    assert container.sections == {"weights": bytes(range(200)), "embeddings": b"abc", "empty": b""}


def test_the_length_of_a_file_is_its_header_and_its_sections():
    data = sample()
    assert len(data) == 18 + struct.unpack_from("<I", data, 10)[0] + 203


def test_damage_is_named_by_section():
    data = bytearray(sample())
    data[-100] ^= 1
    with pytest.raises(InputError, match=r"out\.flm: section 'weights' is damaged"):
        parse(bytes(data), "out.flm")
    with pytest.raises(InputError, match=r"out\.flm: section 'embeddings' is cut short \(2 of 3 bytes\)"):
        parse(sample()[:-1], "out.flm")
    with pytest.raises(InputError, match=r"out\.flm: damaged; 1 bytes follow the last section"):
        parse(sample() + b"x", "out.flm")


@pytest.mark.parametrize("data", [b"", b"\x89FLM", b"RIFF" * 100])
def test_another_kind_of_file_is_refused(data):
    with pytest.raises(InputError, match=r"out\.flm: not a frameloom file"):
        parse(data, "out.flm")


def test_a_newer_format_is_refused_by_number():
    data = bytearray(sample())
    struct.pack_into("<H", data, 8, FORMAT + 1)
    with pytest.raises(InputError, match=r"out\.flm: needs frameloom format 3; this reads 2"):
        parse(bytes(data), "out.flm")
    newer = Container(replace(HEADER, reader=FORMAT + 1), {}).to_bytes()
    with pytest.raises(InputError, match="needs frameloom format 3; this reads 2"):
        parse(newer)


HOSTILE = [
    lambda body: body.update(width=0),
    lambda body: body.update(width=65536, height=65536),
    lambda body: body.update(frames=10**30),
    lambda body: body.update(frames=True),
    lambda body: body.update(frames="32"),
    lambda body: body.update(rate=[1, 0]),
    lambda body: body.update(rate=3),
    lambda body: body.update(rate=[1, 2, 3]),
    lambda body: body.update(pixel_aspect=["1", 1]),
    lambda body: body.update(reader=None),
    lambda body: body.update(config=[]),
    lambda body: body.update(extra=1),
    lambda body: body.pop("method"),
    lambda body: body["colour"].update(matrix=200),
    lambda body: body["colour"].pop("depth"),
    lambda body: body.update(colour=4),
    lambda body: body["sections"].append(["weights", 0, 0]),
    lambda body: body["sections"].append([["list"], 0, 0]),
    lambda body: body["sections"].append(["more", 1 << 62, 0]),
    lambda body: body["sections"].append(["more", -1, 0]),
    lambda body: body.update(sections=[[f"s{k}", 0, 0] for k in range(1000)]),
    lambda body: body.update(sections=5),
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_header_is_refused(change):
    with pytest.raises(InputError):
        parse(with_header(sample(), change))


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"{}", b"[]", b'{"sections":[[]]}'])
def test_a_header_that_is_no_description_is_refused(text):
    with pytest.raises(InputError, match="header is damaged"):
        parse(sample()[:10] + struct.pack("<II", len(text), zlib.crc32(text)) + text)


def test_mutated_files_are_read_or_refused():
    source, chance = sample(), random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(source)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(data))
            kind = chance.randrange(3)
            if kind == 0:
                data[place] = chance.randrange(256)
            elif kind == 1:
                del data[place : place + chance.randrange(1, 20)]
            else:
                data[place:place] = chance.randbytes(chance.randrange(1, 20))
        try:
            parse(bytes(data))
        except InputError:
            refused += 1
    assert refused > 450


@given(st.lists(st.integers(0, 2**62)))
def test_numbers_come_back_as_they_were(numbers):
    data = pack_numbers(numbers)
    assert unpack_numbers(data, len(numbers)) == (numbers, len(data))


def test_numbers_without_an_end_are_refused():
    for data in (b"\x80", b"\xff" * 40, b""):
        with pytest.raises(InputError):
            unpack_numbers(data, 1)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300))
def test_a_table_sums_to_its_total_and_leaves_no_symbol_out(counts):
    table = table_from_counts(np.array(counts))
    assert table.sum() == TOTAL
    assert table.min() >= 1


def test_tables_are_as_computed_by_hand():
    # 65536 - 3 spare, in thirds and sixths, plus 1 each; what rounding leaves goes to the most frequent.
    assert table_from_counts(np.array([3, 2, 1])).tolist() == [32768, 21845, 10923]
    assert table_from_probabilities(np.array([0.25, 0.75])).tolist() == [16384, 49152]


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2000), st.integers(0, 2**32 - 1))
def test_symbols_come_back_as_they_were(alphabet, count, seed):
    symbols = np.minimum(np.random.default_rng(seed).geometric(0.1, count) - 1, alphabet - 1)
    assert np.array_equal(unpack_symbols(pack_symbols(symbols, alphabet), count, alphabet), symbols)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_runs_under_different_tables_come_back_in_order(seed, lengths):
    chance = np.random.default_rng(seed)
    runs = []
    coder = Encoder()
    for length in lengths:
        table = table_from_counts(chance.integers(0, 100, chance.integers(1, 40)))
        symbols = chance.integers(0, len(table), length)
        coder.put(symbols, table)
        runs.append((symbols, table))
    decoder = Decoder(coder.to_bytes())
    for symbols, table in runs:
        assert np.array_equal(decoder.get(len(symbols), table), symbols)


def test_coded_size_is_the_entropy():
    symbols = np.minimum(np.random.default_rng(0).geometric(0.2, 50_000) - 1, 63)
    share = np.bincount(symbols) / len(symbols)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() * len(symbols) / 8
    assert entropy < len(pack_symbols(symbols, 64)) < entropy * 1.002 + 160


def test_a_symbol_outside_its_table_is_not_coded():
    with pytest.raises(ValueError, match="outside"):
        Encoder().put(np.array([4]), table_from_counts(np.ones(4, np.int64)))


def test_mutated_symbols_are_wrong_or_refused():
    chance = random.Random(0)
    source = pack_symbols(np.random.default_rng(0).integers(0, 64, 500), 64)
    for _ in range(300):
        data = bytearray(source)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        del data[len(data) - chance.choice([0, 0, 4, 5]) :]
        with contextlib.suppress(InputError):
            assert len(unpack_symbols(bytes(data), 500, 64)) == 500


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([2, 16, 20, 64, 256]),
    st.floats(-4, 3),
    st.integers(0, 2**32 - 1),
)
def test_quantised_values_are_within_half_a_step(shape, levels, log_scale, seed):
    torch.manual_seed(seed)
    tensor = torch.randn(shape) * 10**log_scale
    found = quantise(tensor, levels)
    # float16 moves both ends of the range by up to 2^-11 of themselves, or by its least step near zero.
    slack = 2e-3 * tensor.abs().max() * 2 + 2**-24 * levels
    assert (found.values() - tensor).abs().max() <= 0.5 * found.scale.float().max() + slack
    assert int(found.symbols.max()) < levels


def test_an_axis_is_chosen_when_it_helps_and_costs_little():
    tensor = torch.randn(100, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 40)
    assert quantise(tensor, 256).axis == 0  # a pair for each of 40 columns is 1% of 4000, for each of 100 rows 2.5%
    assert quantise(tensor[:50], 256).axis is None  # 2% of 2000 is not below 2%


def test_the_published_model_has_the_published_number_of_side_numbers():
    # The authors' 1.5M file: 23,028 side numbers, reached by these axes of these tensors.
    axes = {(1425, 68, 1, 1): 1, (768, 57, 3, 3): 1, (640, 48, 5, 5): 0, (132, 40, 5, 5): 0, (112, 33, 5, 5):
            0, (68, 16, 1, 1): 0, (132, 16, 2, 4): 0}  # fmt: skip
    sides = sum(torch.Size(side_shape(shape, axis)).numel() for shape, axis in axes.items())
    assert 2 * (sides + 8) == 23_028  # seven biases and the head's weight have one pair each
    assert all(
        torch.Size(side_shape(shape, axis)).numel() < SIDE_SHARE * torch.Size(shape).numel()
        for shape, axis in axes.items()
    )


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4), torch.full((5,), -2.5), torch.full((4, 4), 1e-9)])
def test_a_constant_tensor_is_kept(tensor):
    assert torch.allclose(quantise(tensor, 256).values(), tensor, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_float16_cannot_hold_are_refused(value):
    with pytest.raises(InputError, match="32752"):
        quantise(torch.tensor([0.0, value]), 256)


def test_side_numbers_come_back_bit_for_bit():
    torch.manual_seed(0)
    tensors = [quantise(torch.randn(shape), 256) for shape in ((400, 60), (7,), (3, 5, 1, 1))]
    shapes = [tuple(one.symbols.shape) for one in tensors]
    for one, (axis, low, scale) in zip(tensors, unpack_sides(pack_sides(tensors), shapes), strict=True):
        assert axis == one.axis
        assert torch.equal(low, one.low)
        assert torch.equal(scale, one.scale)


def test_damaged_side_numbers_are_refused():
    data = pack_sides([quantise(torch.randn(50, 70), 256)])
    for bad in (data[:-1], data + b"\0", b"\x07" + data[1:], b"", data[:1] + b"\xff\x7f" * (len(data) // 2)):
        with pytest.raises(InputError):
            unpack_sides(bad, [(50, 70)])
