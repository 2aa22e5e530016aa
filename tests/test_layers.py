"""The shared layers against plain definitions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.layers.losses import laplacian_loss, laplacian_pyramid
from frameloom.layers.selective_scan import attention_macs, scan_macs, selective_scan


def inputs(tokens=37, batch=2, groups=2, channels=3, states=4, dtype=torch.float32, seed=0, step=0.5):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=dtype)  # noqa: E731
    return {
        "x": normal(tokens, batch, groups, channels),
        "dt": torch.rand(tokens, batch, groups, channels, generator=draw, dtype=dtype) * step,
        "A": -torch.rand(groups, states, channels, generator=draw, dtype=dtype) * states - 0.05,
        "B": normal(tokens, batch, groups, states),
        "C": normal(tokens, batch, groups, states),
        "D": normal(groups, channels),
    }


def step_by_step(x, dt, A, B, C, D):
    """The recurrence as written, one token and one einsum at a time, in the precision of its inputs."""
    h = torch.zeros(*x.shape[1:], A.shape[-2], dtype=x.dtype)
    out = []
    for token in range(len(x)):
        decay = torch.exp(torch.einsum("bkd,knd->bkdn", dt[token], A))
        h = decay * h + torch.einsum("bkd,bkn->bkdn", dt[token] * x[token], B[token])
        out.append(torch.einsum("bkdn,bkn->bkd", h, C[token]) + D * x[token])
    return torch.stack(out)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 16, 37, 64])
def test_scan_equals_the_recurrence_step_by_step(chunk, parallel):
    values = inputs()
    assert relative(selective_scan(**values, chunk=chunk, parallel=parallel), step_by_step(**values)) < 1e-5


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_gradients_of_the_scan_equal_those_of_the_recurrence(chunk, parallel):
    values = {key: value.requires_grad_() for key, value in inputs().items()}
    weight = torch.randn(37, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((step_by_step(**values) * weight).sum(), list(values.values()))
    made = torch.autograd.grad(
        (selective_scan(**values, chunk=chunk, parallel=parallel) * weight).sum(), list(values.values())
    )
    for name, a, b in zip(values, made, expected, strict=True):
        assert relative(a, b) < 1e-5, name


def test_gradients_of_the_scan_agree_with_finite_differences():
    values = inputs(tokens=7, batch=1, channels=2, states=2, dtype=torch.float64)
    leaves = tuple(value.requires_grad_() for value in values.values())
    assert torch.autograd.gradcheck(lambda *leaf: selective_scan(*leaf, chunk=3), leaves)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("step", [1e-9, 1e3])
def test_scan_neither_overflows_nor_yields_nan_at_extreme_decays(step, parallel):
    values = {key: value.requires_grad_() for key, value in inputs(tokens=300, step=step).items()}
    y = selective_scan(**values, chunk=64, parallel=parallel)
    grads = torch.autograd.grad(y.sum(), list(values.values()))
    assert all(value.isfinite().all() for value in (y, *grads))
    # relative to float64, for the reference loses digits too
    exact = step_by_step(**{key: value.detach().double() for key, value in values.items()})
    assert relative(y.detach().double(), exact) < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**16))
def test_output_of_the_scan_does_not_depend_on_the_chunk(tokens, chunk, parallel, seed):
    values = inputs(tokens=tokens, seed=seed)
    whole = selective_scan(**values, chunk=tokens, parallel=False)
    assert relative(selective_scan(**values, chunk=chunk, parallel=parallel), whole) < 1e-5


def test_scan_stays_in_float32_under_autocast():
    values = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(**values)
    assert y.dtype == torch.float32
    assert relative(y, step_by_step(**values)) < 1e-5


def test_later_tokens_leave_earlier_outputs_alone():
    values = inputs()
    changed = dict(values, x=values["x"].clone())
    changed["x"][20:] += 1
    a, b = selective_scan(**values, chunk=8), selective_scan(**changed, chunk=8)
    assert torch.equal(a[:20], b[:20])
    assert not torch.allclose(a[20:], b[20:])


def test_twice_the_tokens_cost_a_scan_twice_and_attention_four_times():
    assert scan_macs(2048, 64, 16) == 2 * scan_macs(1024, 64, 16)
    assert attention_macs(2048, 64) == 4 * attention_macs(1024, 64)


def test_scan_memory_grows_with_the_tokens_and_not_with_tokens_times_states():
    tokens, channels, states = 512, 16, 16
    values = {key: v.requires_grad_() for key, v in inputs(tokens, 1, 1, channels, states).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(**values, chunk=64)
    assert sum(kept) < tokens * channels * states / 2


@settings(max_examples=20, deadline=None)
@given(st.integers(64, 90), st.integers(64, 90), st.integers(0, 2**16))
def test_a_band_is_the_picture_less_its_smaller_copy(height, width, seed):
    image = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(seed))
    band, low = laplacian_pyramid(image, levels=1)
    assert low.shape[-2:] == ((height + 1) // 2, (width + 1) // 2)
    # A pixel of the copy lies on every second pixel of the picture.
    weights = torch.tensor([1.0, 6.0, 1.0]) / 8
    brought_up = F.conv2d(low, (weights[:, None] * weights).expand(2, 1, 3, 3), groups=2)
    inside = (image - band)[..., 2:-2:2, 2:-2:2]
    assert torch.allclose(inside, brought_up[..., : inside.shape[-2], : inside.shape[-1]], atol=1e-5)


def test_bands_of_a_flat_picture_are_empty():
    *bands, low = laplacian_pyramid(torch.full((1, 3, 64, 96), 0.25))
    assert [tuple(band.shape[-2:]) for band in bands] == [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]
    assert max(band.abs().max() for band in bands) < 1e-6
    assert torch.allclose(low, torch.tensor(0.25))


def test_laplacian_loss_sees_a_change_of_level_and_of_detail():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert laplacian_loss(image, image) == 0
    assert laplacian_loss(image + 0.1, image) == pytest.approx(0.1, rel=1e-3)
    ripple = 0.1 * (torch.arange(64) % 2 * 2 - 1)
    assert laplacian_loss(image + ripple, image) > 0.09


def test_laplacian_loss_is_float32_under_autocast():
    a, b = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = laplacian_loss(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(laplacian_loss(a, b), plain)
