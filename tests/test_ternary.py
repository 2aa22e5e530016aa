"""The code of ternary weights: exact for every width and density, as small as published, and multiplied as it is."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import InputError
from frameloom.scale import ternary
from frameloom.scale.packed import restored, stored
from frameloom.scale.ternary import TernaryLinear, check, decode, dense, dictionary, encode, levels, multiply, quantise


def independent(height: int, width: int, zero: float, seed: int = 0) -> torch.Tensor:
    """Trits drawn independently."""
    u = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    return ((u >= zero).to(torch.int8) + (u >= (1 + zero) / 2)).to(torch.int8)


@pytest.mark.parametrize("width", range(1, 98))
def test_every_width_comes_back(width):
    for zero in (0.0, 0.5, 0.885, 1.0):
        trits = independent(5, width, zero, seed=width)
        words, offsets = encode(trits)
        check(words, offsets, width)
        assert torch.equal(decode(words, offsets, width), trits)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 97), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1 << 30))
def test_any_mixture_of_trits_comes_back_from_both_codes(height, width, zero, low, seed):
    rng = np.random.default_rng(seed)
    p = np.array([zero, (1 - zero) * low, (1 - zero) * (1 - low)])
    trits = torch.from_numpy(rng.choice(3, (height, width), p=p / p.sum()).astype(np.int8))
    rows = torch.tensor([[-1.5, 0.75]]).expand(height, 2).contiguous()
    for pack in ("auto", "range"):
        layer = restored(stored(trits, rows, "ternary", pack), (height, width), "ternary")
        assert torch.equal(layer.trits(), trits)


def test_the_dictionary_is_the_published_one():
    code = dictionary()
    pairs = torch.bincount(code.lengths // 2).tolist()
    assert pairs == [0, 9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]
    # of lengths and weights as the authors' code makes them, entry by entry
    assert code.checksum == "af22677c0c11a376d53ef234c339b96a630cb004db0ed64c8634ecdc3b567efd"
    assert code.places.shape == (1 << 16, 3)  # no entry has more than three weights that are not zero
    single, order = [0.885, 0.0575, 0.0575], []
    for sequence, length in zip(code.trits.tolist(), code.lengths.tolist(), strict=True):
        weight = 1.0
        for first, second in zip(sequence[:length:2], sequence[1:length:2], strict=True):
            weight *= single[first] * single[second]
        order.append(weight)
    assert order[-1] == pytest.approx(1.145e-5, rel=1e-3)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(order))


def test_every_prefix_of_an_entry_is_an_entry():
    children = dictionary().children
    reached = children[children >= 0]
    assert len(reached.unique()) == len(reached) == 1 << 16


def test_the_size_is_the_published_one_at_every_density():
    golden = {0.70: 1.697, 0.80: 1.123, 0.85: 0.873, 0.885: 0.743, 0.90: 0.690, 0.95: 0.595}
    for zero, bits in golden.items():
        words, _ = encode(independent(256, 2080, zero))
        assert 16 * len(words) / (256 * 2080) == pytest.approx(bits, rel=0.012)
    layer = TernaryLinear(*encode(independent(64, 2080, 0.885)), torch.tensor([[-1.0, 1.0]]).expand(64, 2), 2080)
    assert layer.bits == 16 * len(layer.w_comp) / (64 * 2080) + (32 * 65 + 32 * 64) / (64 * 2080) < 0.80


def test_range_coding_comes_within_a_tenth_of_the_entropy():
    trits = independent(64, 2080, 0.885)
    shares = torch.bincount(trits.view(-1).long()) / trits.numel()
    entropy = float(-(shares * shares.log2()).sum())
    state = stored(trits, torch.ones(64, 2), "ternary", "range")
    size = 8 * sum(value.numel() * value.element_size() for value in state.values()) / trits.numel()
    assert entropy < size < 1.10 * entropy


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 97), st.integers(1, 5), st.floats(0, 1), st.integers(0, 1 << 30))
def test_the_product_from_the_code_is_that_of_the_matrix(height, width, batch, zero, seed):
    torch.manual_seed(seed)
    trits = independent(height, width, zero, seed)
    rows = torch.stack([-torch.rand(height), torch.rand(height)], 1)
    x = torch.randn(batch, width)
    assert torch.equal(dense(*encode(trits), rows, width), ternary.spread(trits, rows))
    exact = x.double() @ ternary.spread(trits, rows).double().t()
    assert torch.allclose(multiply(x, *encode(trits), rows).double(), exact, atol=1e-5)


def test_a_layer_from_a_matrix_holds_its_nearest_levels_and_a_ternary_one_comes_back():
    torch.manual_seed(0)
    w = torch.randn(16, 48)
    w[3] = 0  # all zeros
    w[4] = 0.25  # equal minimum and maximum
    w[5] = w[5].abs()  # no negative weights: a zero must not be taken for lo, which is 0 as well
    w[5, 7] = w[6, 8] = 0
    layer = TernaryLinear.from_dense(w)
    assert torch.equal(layer.trits(), quantise(w, levels(w)))
    assert not layer.trits()[3].any()
    assert torch.equal(layer.dense()[4], w[4])
    assert not (layer.trits()[5] == ternary.LOW).any()
    assert torch.equal(TernaryLinear.from_dense(layer.dense()).dense(), layer.dense())
    hi = levels(w)[:, 1:]
    assert not quantise(hi / 2, levels(w)).any()  # at the very half: zero
    assert bool((quantise(hi * 0.51, levels(w)) == ternary.HIGH)[hi > 0].all())


def test_a_layer_keeps_shapes_and_types_of_its_input():
    layer = TernaryLinear.from_dense(torch.randn(6, 10))
    assert layer(torch.randn(2, 3, 10)).shape == (2, 3, 6)
    assert layer(torch.randn(10)).shape == (6,)
    assert layer(torch.randn(4, 10).bfloat16()).dtype == torch.bfloat16
    assert sorted(layer.state_dict()) == ["row_off", "ter_minmax", "w_comp"]
    assert layer.w_comp.dtype == torch.int16


def test_damaged_words_are_one_line():
    words, offsets = encode(independent(4, 60, 0.885))
    for damage, what in ((lambda: check(words.roll(1), offsets, 60), "has not 60 weights"),
                         (lambda: check(words[:-1], offsets, 60), "do not cover"),
                         (lambda: check(words, offsets.flip(0), 60), "do not cover"),
                         (lambda: check(words, offsets, 62), "has not 62 weights"),
                         (lambda: check(words, offsets, 1 << 30), "at most 2\\^31"),
                         (lambda: TernaryLinear(words, offsets, torch.ones(3), 60), "two a row"),
                         (lambda: dictionary(1.5), "no dictionary has"),
                         (lambda: encode(torch.zeros(0, 4, dtype=torch.int8)), "cannot be coded")):  # fmt: skip
        with pytest.raises(InputError, match=what):
            damage()
