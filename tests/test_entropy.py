"""Probability models of integers: what they charge, what they code, and what damaged bytes end in."""

import contextlib
import random
import zlib

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

import seeded
from frameloom.bitstream import entropy
from frameloom.bitstream.entropy import (
    SCALES,
    FactorisedPrior,
    Gaussians,
    gaussian_bits,
    gaussian_table,
    get_values,
    noisy,
    put_values,
    rounded,
)
from frameloom.bitstream.rangecoder import MAX_ALPHABET, TOTAL, Decoder, Encoder, Tables, table_from_counts
from frameloom.errors import InputError

GAUSSIANS = Gaussians()
# Bytes and CRC-32 of what the format's first reader reads; files hold such streams, so they never change.
GOLDEN, GOLDEN_SPLIT = (712, 2118602891), (712, 70829172)


def drawn(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values with the means and scales that they come from, scales from below the least table to 30."""
    chance = torch.Generator().manual_seed(seed)
    means = 20 * torch.randn(count, generator=chance)
    scales = torch.exp(torch.rand(count, generator=chance) * 6 - 2.5)
    return (means + scales * torch.randn(count, generator=chance)).round().long(), means, scales


def there_and_back(values, means, scales) -> torch.Tensor:
    coder = Encoder()
    GAUSSIANS.put(coder, values, means, scales)
    return GAUSSIANS.get(Decoder(coder.to_bytes()), means, scales)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(0, 300), far=st.integers(-(2**30), 2**30))
def test_gaussian_values_come_back_however_unlikely(seed, count, far):
    values, means, scales = drawn(seed, count)
    if count:
        values[seed % count] = far
    assert torch.equal(there_and_back(values, means, scales), values)


def test_gaussian_files_are_as_long_as_the_bits_say():
    values, means, scales = drawn(0, 20_000)
    scales = scales.clamp(min=SCALES[0])
    coder = Encoder()
    GAUSSIANS.put(coder, values, means, scales)
    bits = float(gaussian_bits(values.double(), means.double(), scales.double(), 1e-12).sum())
    assert 8 * len(coder.to_bytes()) == pytest.approx(bits, rel=0.005)


def test_gaussian_bits_have_gradients_far_from_the_mean_on_both_sides():
    values = torch.tensor([-8.0, 8.0], requires_grad=True)
    bits = gaussian_bits(values, torch.zeros(2), torch.full((2,), 1.5), 1e-12)
    bits.sum().backward()
    torch.testing.assert_close(bits[0], bits[1])
    assert values.grad[1] > 1
    torch.testing.assert_close(values.grad[0], -values.grad[1])


@pytest.mark.parametrize("scale", [0.11, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gaussian_bits_and_their_gradients_are_right_far_out_in_the_tails(scale, dtype):
    """Against double precision, out to where the bits are bounded: 9 deviations, and the half integer."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor([-9.0, -8, -7, -6, -4, -1, 0, 0.25, 2, 5, 6, 7, 8, 9]).mul(scale).to(dtype)
    scales = torch.full((len(values),), scale, dtype=exact, requires_grad=True)
    bits = gaussian_bits(values, torch.zeros((), dtype=dtype), scales)
    bits.sum().backward()
    distance = np.abs(values.double().numpy())
    upper, lower = ((half - distance) / float(scales.detach()[0]) for half in (0.5, -0.5))
    chance = ndtr(upper) - ndtr(lower)
    slope = (np.exp(-(upper**2) / 2) * upper - np.exp(-(lower**2) / 2) * lower) / np.sqrt(2 * np.pi) / scale
    # The bound is a probability of 2^-64 more.
    np.testing.assert_allclose(bits.detach().double(), -np.log2(chance + 2.0**-64), rtol=1e-4, atol=1e-4)
    wanted = slope / (chance + 2.0**-64) / np.log(2)
    np.testing.assert_allclose(scales.grad.double(), wanted, rtol=2e-3 if exact == torch.float32 else 1e-6, atol=2e-3)


def test_gaussian_bits_stay_finite_and_bounded_however_far_the_value():
    values = torch.tensor([[0.0], [0.5], [1e3], [1e20], [3e38]], requires_grad=True)
    scales = torch.tensor([1e-6, 0.1, 1.0, 256.0], requires_grad=True)
    bits = gaussian_bits(values, torch.zeros(1), scales)
    bits.sum().backward()
    assert ((bits >= -1e-6) & (bits < 64.01)).all()
    assert torch.isfinite(values.grad).all()
    assert torch.isfinite(scales.grad).all()


def test_the_tables_of_files_never_change():
    assert GAUSSIANS.digest() == 179292989


def test_gaussian_tables_sum_to_their_total_and_leave_nothing_out():
    for mean, scale, low, high in [(0.3, 0.11, -2, 3), (-7.9, 256.0, -1160, 1150), (500.0, 1.0, -3, 3)]:
        table = gaussian_table(mean, scale, low, high)
        assert table.sum() == TOTAL
        assert table.min() >= 1
        assert len(table) == high - low + 2 <= MAX_ALPHABET
    wide = gaussian_table(0.0, 2.0, -12, 12)
    np.testing.assert_allclose(wide[:-1], wide[:-1][::-1], atol=2)


def as_format_1_says(values, means, scales) -> bytes:
    """The same bytes by the plainest road: scale by scale, every table whole, by the coder's own classes."""
    level = np.round(np.log(scales.clip(SCALES[0], SCALES[-1]) / SCALES[0]) / np.log(SCALES[1] / SCALES[0])).astype(int)
    sixteenths = np.round(means * 16).astype(int)
    coder, model = constriction.stream.queue.RangeEncoder(), constriction.stream.model.Categorical(perfect=False)
    for scale in np.unique(level):
        reach = int(np.ceil(4.5 * SCALES[scale])) + 1
        size = 2 * reach + 3
        every = np.flatnonzero(level == scale)
        for start in range(0, len(every), max(1, entropy._ROWS // size)):
            which = every[start : start + max(1, entropy._ROWS // size)]
            rows = [gaussian_table(k % 16 / 16, SCALES[scale], -reach, reach + 1) for k in sixteenths[which]]
            symbols = values[which] - (sixteenths[which] // 16 - reach)
            outside = (symbols < 0) | (symbols > size - 2)
            coder.encode(np.where(outside, size - 1, symbols).astype(np.int32), model, np.array(rows) / TOTAL)
            for distance in symbols[outside].tolist():
                number = 2 * distance if distance >= 0 else -2 * distance - 1
                while True:
                    coder.encode((number & 15) + 16 * (number > 15), constriction.stream.model.Uniform(32))
                    number >>= 4
                    if not number:
                        break
    return coder.get_compressed().astype("<u4").tobytes()


@pytest.mark.parametrize("rows", [1 << 22, 2000])
def test_the_bytes_are_those_of_the_format_whichever_way_the_coder_is_told(monkeypatch, rows):
    monkeypatch.setattr(entropy, "_ROWS", rows)
    count = 1200
    means = 20 * seeded.uniform("means", count)
    scales = np.exp(3.5 * seeded.uniform("scales", count) + 1)
    values = np.round(means + 2.5 * scales * seeded.uniform("values", count)).astype(np.int64)
    values[:300:15] += np.round(4000 * seeded.uniform("far", 20)).astype(np.int64)
    coder = Encoder()
    numbers = [torch.from_numpy(x) for x in (values, means, scales)]
    GAUSSIANS.put(coder, *numbers)
    data = coder.to_bytes()
    assert data == as_format_1_says(values, means, scales)
    assert (len(data), zlib.crc32(data)) == {1 << 22: GOLDEN, 2000: GOLDEN_SPLIT}[rows]
    assert torch.equal(GAUSSIANS.get(Decoder(data), *numbers[1:]), numbers[0])


@pytest.mark.parametrize("size", [2, 3, 5, 300])
def test_a_symbol_is_coded_alike_by_its_table_and_by_its_place(size):
    """At both ends of the range and with symbols of the least frequency."""
    counts = np.zeros(size, np.int64)
    counts[size // 2] = 1
    for table in (table_from_counts(counts), table_from_counts(np.arange(1, size + 1) ** 2)):
        symbols = np.arange(200) * 7 % size
        one, other = Encoder(), Encoder()
        one.put(symbols, table)
        other.put_each(symbols, np.tile(table, (200, 1)))
        assert one.to_bytes() == other.to_bytes()
        for rows in (np.zeros(200, np.int64), np.zeros(5, np.int64)):
            found = Decoder(one.to_bytes()).get_rows(Tables(table[None]), rows)
            assert np.array_equal(found, symbols[: len(rows)])


def test_the_digest_tells_one_set_of_tables_from_another():
    other = Gaussians()
    assert other.digest() == GAUSSIANS.digest()
    other._tables[5].frequencies[3, 2] += 1
    assert other.digest() != GAUSSIANS.digest()


def test_rounding_lets_gradients_through_and_noise_stays_within_half():
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    (rounded(x) * 2).sum().backward()
    assert (x.grad == 2).all()
    assert torch.equal(rounded(x), x.round())
    assert ((noisy(x) - x).abs() <= 0.5).all()


def learned_prior() -> FactorisedPrior:
    """A prior fitted to two channels: a narrow one about 3 and a wide one about -5."""
    torch.manual_seed(0)
    prior = FactorisedPrior(2)
    optimiser = torch.optim.Adam(prior.parameters(), 0.05)
    for _ in range(400):
        values = torch.randn(256, 2) * torch.tensor([1.0, 6.0]) + torch.tensor([3.0, -5.0])
        loss = prior.bits(noisy(values)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return prior


def test_a_factorised_prior_learns_a_density_near_its_entropy():
    prior = learned_prior()
    values = (torch.randn(20_000, 2) * torch.tensor([1.0, 6.0]) + torch.tensor([3.0, -5.0])).round()
    charged = prior.bits(values).mean(0)
    entropy = 0.5 * torch.log2(2 * torch.pi * torch.e * torch.tensor([1.0 + 1 / 12, 36.0]))
    assert (charged < entropy + 0.1).all()


def test_factorised_files_are_as_long_as_the_bits_say():
    prior = learned_prior()
    values = (torch.randn(5_000, 2) * torch.tensor([1.0, 6.0]) + torch.tensor([3.0, -5.0])).round()
    tables = prior.tables(-40, 40)
    assert (tables.sum(1) == TOTAL).all()
    coder = Encoder()
    channels = np.tile([0, 1], 5_000)
    flat = values.flatten().long().numpy()
    put_values(coder, flat, tables[channels], np.full(10_000, -40))
    data = coder.to_bytes()
    assert 8 * len(data) == pytest.approx(float(prior.bits(values).detach().sum()), rel=0.005)
    np.testing.assert_array_equal(get_values(Decoder(data), tables[channels], np.full(10_000, -40)), flat)


def test_the_density_rises_from_0_to_1_whatever_its_parameters():
    torch.manual_seed(1)
    prior = FactorisedPrior(5)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(0, 2)
    x = torch.linspace(-50, 50, 1001)[:, None].expand(-1, 5)
    assert (prior.logits(x).diff(dim=0) >= 0).all()


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="not finite"):
        GAUSSIANS.put(Encoder(), torch.zeros(1).long(), torch.tensor([float("nan")]), torch.ones(1))


def test_mutated_streams_end_in_values_or_in_an_error():
    values, means, scales = drawn(3, 200)
    coder = Encoder()
    GAUSSIANS.put(coder, values, means, scales)
    data = coder.to_bytes()
    chance = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        with contextlib.suppress(InputError):
            assert GAUSSIANS.get(Decoder(bytes(broken)), means, scales).shape == values.shape


def test_both_tails_of_a_learned_density_are_priced_alike():
    prior = FactorisedPrior(1, steps=1)
    with torch.no_grad():
        prior.stretch.zero_()
        prior.shift.zero_()
        low, high = prior.bits(torch.tensor([[-22.0]]), 1e-12), prior.bits(torch.tensor([[22.0]]), 1e-12)
    torch.testing.assert_close(high, low, rtol=1e-4, atol=0)
