"""Measures against values computed by hand."""

import math

import pytest
import torch

from frameloom.errors import InputError
from frameloom.metrics import (
    bd_rate,
    bits_per_pixel,
    endpoint_error,
    ms_ssim,
    outlier_share,
    psnr,
    psnr_of_mean,
    ssim,
)


def test_psnr_is_the_mean_over_frames():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr(a, b).item() == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert psnr_of_mean(a, b).item() == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2), abs=1e-3)


def test_equal_pictures_measure_90_db():
    assert psnr(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)).item() == pytest.approx(90, abs=1e-3)


def test_ssim_of_two_flat_pictures_is_the_luminance_term():
    a, b = torch.full((1, 3, 32, 32), 0.2), torch.full((1, 3, 32, 32), 0.6)
    expected = (2 * 0.2 * 0.6 + 0.01**2) / (0.2**2 + 0.6**2 + 0.01**2)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_structural_similarity_of_equal_pictures_is_one():
    a = torch.rand(2, 3, 192, 200, generator=torch.Generator().manual_seed(0))
    assert ssim(a, a).item() == pytest.approx(1)
    assert ms_ssim(a, a).item() == pytest.approx(1)
    assert ms_ssim(a[..., :64, :128], a[..., :64, :128]).item() == pytest.approx(1)
    assert ms_ssim(a[..., :12, :12], a[..., :12, :12]).item() == pytest.approx(1)


def test_structural_similarity_falls_with_noise_and_has_a_gradient():
    chance = torch.Generator().manual_seed(0)
    a = torch.rand(1, 3, 64, 64, generator=chance)
    near, far = ((a + k * torch.randn(a.shape, generator=chance)).requires_grad_() for k in (0.05, 0.3))
    for measure in (ssim, ms_ssim):
        assert measure(near, a) > measure(far, a)
        (grad,) = torch.autograd.grad(measure(far, a), far)
        assert grad.abs().sum() > 0


def test_bits_per_pixel_counts_every_byte():
    assert bits_per_pixel(1000, 10, 20, 40) == 1.0


def test_bd_rate_of_a_curve_at_half_the_rate_is_minus_50_percent():
    anchor = [(100.0, 30.0), (200.0, 33.0), (400.0, 35.5), (800.0, 37.0)]
    half = [(rate / 2, quality) for rate, quality in reversed(anchor)]
    assert bd_rate(anchor, half) == pytest.approx(-50)
    assert bd_rate(half, anchor) == pytest.approx(100)
    assert bd_rate(anchor, anchor) == pytest.approx(0)


def test_bd_rate_averages_over_common_quality_only():
    # log2 rate is linear in quality; over 34..36 the second curve needs 2^1 times the bits.
    one = [(2.0**k, 30.0 + k) for k in range(7)]
    other = [(2.0 ** (k + 1), 30.0 + k) for k in range(4, 9)]
    assert bd_rate(one, other) == pytest.approx(100)


@pytest.mark.parametrize(
    "points",
    [[(1.0, 30.0)], [(1.0, 30.0), (2.0, 30.0)], [(1.0, 10.0), (2.0, 20.0)], [(0.0, 30.0), (1.0, 31.0)]],
)
def test_bd_rate_refuses_curves_that_cannot_be_compared(points):
    with pytest.raises(InputError, match="bd_rate"):
        bd_rate([(1.0, 30.0), (2.0, 33.0)], points)


def test_endpoint_error_is_the_mean_distance():
    truth = torch.zeros(1, 1, 2, 1, 2)
    flow = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).reshape(1, 1, 2, 1, 2)  # (3, 4) and (0, 1)
    assert endpoint_error(flow, truth).item() == pytest.approx(3)
    assert endpoint_error(flow, truth, torch.tensor([[[[True, False]]]])).item() == pytest.approx(5)


def test_an_outlier_is_off_by_3_pixels_and_5_percent():
    truth = torch.tensor([[0.0, 100.0, 100.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 1, 2, 1, 4)
    off = torch.tensor([[4.0, 104.0, 106.0, 2.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 1, 2, 1, 4)
    assert outlier_share(off, truth).item() == pytest.approx(50)
    assert outlier_share(off, truth, torch.tensor([[[[True, True, False, False]]]])).item() == pytest.approx(50)
