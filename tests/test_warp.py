"""Warping and splatting: exact on whole flows, differentiable elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.motion.warp import backward_warp, forward_splat


def picture(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constant(x, y, like):
    flow = torch.tensor([float(x), float(y)], dtype=like.dtype)[None, :, None, None]
    return flow.expand(len(like), 2, *like.shape[-2:]).contiguous()


shifts = st.integers(-5, 5)


@settings(max_examples=25, deadline=None)
@given(shifts, shifts)
def test_whole_flow_warps_exactly_and_tells_what_lay_inside(x, y):
    image = picture(2, 3, 9, 12)
    for mode in ("bilinear", "bicubic"):
        warped, valid = backward_warp(image, constant(x, y, image), mode)
        inside = torch.zeros(9, 12, dtype=torch.bool)
        inside[max(0, -y) : 9 - max(0, y), max(0, -x) : 12 - max(0, x)] = True
        assert torch.equal(valid, inside.expand(2, 1, 9, 12))
        expected = torch.roll(image, (-y, -x), (2, 3))
        assert (warped - expected)[inside.expand_as(image)].abs().max() < 1e-5


def test_half_a_pixel_is_the_mean_of_two():
    image = picture(1, 1, 5, 6)
    warped, _ = backward_warp(image, constant(0.5, 0, image))
    assert torch.allclose(warped[..., :-1], (image[..., :-1] + image[..., 1:]) / 2, atol=1e-6)


def test_outside_is_the_border_or_nothing():
    image = picture(1, 1, 5, 6) + 1
    border, valid = backward_warp(image, constant(50, 0, image))
    nothing, _ = backward_warp(image, constant(50, 0, image), padding="zeros")
    assert torch.allclose(border, image[..., -1:].expand_as(border))
    assert nothing.abs().max() == 0
    assert not valid.any()


@settings(max_examples=25, deadline=None)
@given(shifts, shifts, st.sampled_from(["sum", "average", "linear", "softmax"]))
def test_splat_of_a_whole_flow_is_a_copy(x, y, mode):
    image = picture(2, 3, 9, 12, dtype=torch.float64)
    importance = picture(2, 1, 9, 12, seed=1, dtype=torch.float64) + 0.5
    splatted, weight = forward_splat(image, constant(x, y, image), mode, importance)
    covered = weight > 0
    assert covered.sum() == 2 * (9 - abs(y)) * (12 - abs(x))
    expected = torch.roll(image, (y, x), (2, 3)) * covered
    assert torch.allclose(splatted, expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(shifts, shifts)
def test_warping_undoes_splatting_on_covered_pixels(x, y):
    image = picture(1, 2, 9, 12, dtype=torch.float64)
    flow = constant(x, y, image)
    back, valid = backward_warp(forward_splat(image, flow)[0], flow)
    assert torch.allclose(back * valid, image * valid, atol=1e-12)


def test_sum_conserves_mass_inside_the_frame():
    image = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    image[..., 4:8, 4:8] = picture(1, 2, 4, 4, dtype=torch.float64)
    flow = (picture(1, 2, 12, 12, seed=3, dtype=torch.float64) - 0.5) * 6
    assert torch.allclose(forward_splat(image, flow, "sum")[0].sum((2, 3)), image.sum((2, 3)))


def test_softmax_lets_the_important_pixel_win_and_average_does_not():
    image = torch.tensor([[[[1.0, 3.0]]]])
    flow = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])  # both pixels land on the second
    importance = torch.tensor([[[[50.0, 0.0]]]])
    assert forward_splat(image, flow, "average")[0][0, 0, 0].tolist() == [0, 2]
    assert forward_splat(image, flow, "softmax", importance)[0][0, 0, 0].tolist() == [0, pytest.approx(1)]
    linear = forward_splat(image, flow, "linear", torch.tensor([[[[3.0, 1.0]]]]))[0]
    assert linear[0, 0, 0].tolist() == [0, pytest.approx(1.5)]


def test_huge_importance_stays_finite():
    image = picture(1, 1, 4, 4)
    out, _ = forward_splat(image, constant(0, 0, image), "softmax", torch.full((1, 1, 4, 4), 1e4))
    assert torch.allclose(out, image)


@pytest.mark.parametrize("mode", ["sum", "average", "linear", "softmax"])
def test_splat_gradients_agree_with_finite_differences(mode):
    image = picture(1, 2, 4, 5, dtype=torch.float64).requires_grad_()
    # Away from whole coordinates, where the bilinear weights have a kink.
    whole = torch.randint(-2, 3, (1, 2, 4, 5), generator=torch.Generator().manual_seed(1))
    flow = (whole + 0.2 + 0.6 * picture(1, 2, 4, 5, seed=2, dtype=torch.float64)).requires_grad_()
    importance = (picture(1, 1, 4, 5, seed=4, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, f, z: forward_splat(i, f, mode, z)[0], (image, flow, importance))


def test_splat_by_importance_needs_importance():
    image = picture(1, 1, 4, 4)
    with pytest.raises(ValueError, match="needs importance"):
        forward_splat(image, constant(0, 0, image), "softmax")
