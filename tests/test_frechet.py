"""Fréchet distances: the closed form for Gaussians, and what the probe's features tell apart."""

import pytest
import torch
import torch.nn.functional as F

from frameloom.errors import InputError
from frameloom.metrics import frechet_distance, moments
from frameloom.world import World
from frameloom.world.probe import HEADS, Probe, accuracy, fd_probe, features, labels, load_probe

CLIPS = 64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_moments(mean, cov, count, seed=0):
    """Rows whose sample mean and covariance are exactly those given."""
    draw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centre, spread = moments(draw)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(spread), (draw - centre).T, upper=False)
    return (torch.linalg.cholesky(cov) @ white).T + mean


def covariance(size, seed):
    half = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T / size


def test_it_is_the_closed_form_for_gaussians_of_one_axis_system():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a, b = torch.tensor([[4.0, 1.0, 0.25], [1.0, 9.0, 0.25]], dtype=torch.float64)
    turn = torch.linalg.qr(covariance(3, 1))[0]
    first = with_moments(mean, turn @ a.diag() @ turn.T, 40)
    second = with_moments(-mean, turn @ b.diag() @ turn.T, 50, seed=1)
    expected = (2 * mean).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_it_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = covariance(6, 2), covariance(6, 3)
    zero = torch.zeros(6, dtype=torch.float64)
    expected = float(a.trace() + b.trace()) - 2 * sqrtm((a @ b).numpy()).real.trace()
    found = frechet_distance(with_moments(zero, a, 30), with_moments(zero, b, 30, seed=4))
    assert found == pytest.approx(expected, rel=1e-8)


def test_it_is_symmetric_zero_with_itself_and_stable_for_few_rows():
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(9, 64, generator=generator), torch.randn(13, 64, generator=generator) * 2 + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) < 1e-6
    assert frechet_distance(a[:1], a[:1] + 3) == pytest.approx(64 * 9, rel=1e-5)
    # Rows on orthogonal axes share no direction: all of both traces remains.
    left, right = torch.zeros(5, 8), torch.zeros(5, 8)
    left[:, :4], right[:, 4:] = torch.randn(2, 5, 4, generator=generator)
    centre = lambda rows: rows - rows.mean(0)  # noqa: E731
    traces = sum(float(moments(rows)[1].trace()) for rows in (left, right))
    assert frechet_distance(centre(left), centre(right)) == pytest.approx(traces, rel=1e-5)


def test_moments_are_those_of_torch():
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(6))
    mean, cov = moments(rows)
    torch.testing.assert_close(mean, rows.double().mean(0))
    torch.testing.assert_close(cov, torch.cov(rows.double().T))


@pytest.fixture(scope="module")
def clips():
    world = World("toys", range(920_000, 920_000 + 2 * CLIPS), size=32)
    return world.render(32, 32, supersample=2)["rgb"], world.captions()


@pytest.fixture(scope="module")
def probe():
    return load_probe()


def test_true_clips_are_near_each_other_and_spoilt_ones_far(clips, probe):
    video, _ = clips
    first, second = video[:CLIPS], video[CLIPS:]
    true = fd_probe(second, first, probe)
    generator = torch.Generator().manual_seed(0)
    spoilt = {
        "blurred": F.avg_pool2d(second.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(second),
        "noisy": (second + 0.1 * torch.randn(second.shape, generator=generator)).clamp(0, 1),
        "frames shuffled": second[:, torch.randperm(16, generator=generator)],
        "colours swapped": second.flip(2),
        "still": second[:, :1].expand_as(second),
        "grey": torch.full_like(second, 0.5),
    }
    for name, video in spoilt.items():
        assert fd_probe(video, first, probe) > 2 * true, name


def test_it_is_zero_for_the_same_clips_and_does_not_mind_their_order(clips, probe):
    video, _ = clips
    one, other = video[:CLIPS], video[CLIPS:]
    assert fd_probe(one, one.flip(0), probe) < 1e-4
    assert fd_probe(one, other, probe) == pytest.approx(fd_probe(other, one, probe), rel=1e-6)


def test_what_is_shipped_names_what_it_sees(clips, probe):
    assert not probe.training
    assert sum(parameter.numel() for parameter in probe.parameters()) < 120_000
    assert min(accuracy(probe, *clips).values()) > 0.9
    backwards = accuracy(probe, clips[0].flip(1), clips[1])
    assert backwards["direction"] < 0.1
    assert backwards["colour"] > 0.9


def test_features_are_of_unit_size_whatever_the_length_and_the_side(clips, probe):
    found = features(probe, clips[0])
    assert found.shape == (2 * CLIPS, 64)
    assert 0.5 < found.std(0).mean() < 1.5
    for shape in ((2, 1, 3, 32, 32), (1, 40, 3, 16, 16), (1, 3, 3, 48, 64)):
        other = features(probe, torch.rand(shape, generator=torch.Generator().manual_seed(0)))
        assert other.shape == (shape[0], 64)
        assert other.isfinite().all()


def test_it_learns():
    world = World("toys", range(16), size=32)
    torch.manual_seed(0)
    fresh = Probe()
    batch = {"video": world.render(32, 32)["rgb"], "labels": labels(world.captions())}
    optimiser = torch.optim.AdamW(fresh.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        losses.append(fresh.loss(batch))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in fresh.parameters())


def test_labels_are_of_what_moves_and_of_what_stands_beside():
    found = labels(["a large red ball rolls left", "a small red box rises and a large blue ball stands still"])
    names = [[kinds[int(k)] for kinds, k in zip(HEADS.values(), row, strict=True)] for row in found]
    assert names == [["red", "ball", "large", "left", "-"], ["red", "box", "small", "up", "blue"]]


def test_a_folder_without_weights_is_answered_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load_probe(tmp_path)
