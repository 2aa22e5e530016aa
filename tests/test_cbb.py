"""CBB: the bridge between latents in numbers, the decoder between two neighbours, and what it refuses."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from frameloom.cli.app import app
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Plain
from frameloom.diffusion.paths import SteppedBridge
from frameloom.diffusion.run import sample
from frameloom.diffusion.step import Fresh, Universal, ancestral_share
from frameloom.errors import InputError
from frameloom.motion.dis import pixels
from frameloom.tasks.interpolation import interpolate
from frameloom.tasks.interpolation.cbb import CBB, PRESETS, aligned
from frameloom.tasks.interpolation.cbb_autoencoder import Codebook, WindowAttention
from frameloom.training.pretrained import load
from frameloom.video.clip import Clip

PATH = SteppedBridge()


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texture(shift=0.0, height=64, width=96):
    """A smooth picture (3, h, w), moved by so many pixels to the right."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u = x - shift
    waves = [0.5 + 0.2 * np.sin(u / (5 + k) + y / 9) + 0.2 * np.sin(u / 11 - y / (6 + k)) for k in range(3)]
    return torch.from_numpy(np.array(waves)).float()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return CBB(PRESETS["tiny"]).eval()


@pytest.fixture
def settled(untrained, monkeypatch):
    """The untrained model with a U-Net in whose place `says` answers."""

    def put(says):
        monkeypatch.setattr(untrained, "predict", says)
        return untrained

    return put


# --- the bridge -----------------------------------------------------------------------------------------------------


def test_the_bridge_runs_from_a_thousandth_to_all_but_a_thousandth_and_time_zero_is_the_data():
    a, b, c = PATH.coef(torch.tensor([0.0, 1.0, 1000.0], dtype=torch.float64))
    m = torch.tensor([0, 0.001, 0.999], dtype=torch.float64)
    torch.testing.assert_close(a, 1 - m)
    torch.testing.assert_close(b, m)
    torch.testing.assert_close(c, (2 * m * (1 - m)).sqrt())


@pytest.mark.parametrize(("steps", "variance"), [(50, 1.817), (200, 1.942)])
def test_the_noise_of_all_steps_adds_up_to_what_the_paper_counts(untrained, steps, variance):
    grid = untrained.grid(steps)
    t, s = grid[:-1], grid[1:]
    added = (ancestral_share(PATH, t, s) * PATH.coef(s)[2]).square().sum()
    assert float(added) == pytest.approx(variance, abs=1e-3)


@pytest.mark.parametrize("steps", [3, 4, 7, 50, 200, 500])
def test_the_grid_has_so_many_evaluations_falls_and_ends_in_the_last_two(untrained, steps):
    grid = untrained.grid(steps)
    assert len(grid) == steps + 1
    assert grid[0] == 1000
    assert grid[-3:].tolist() == [2, 1, 0]
    assert (grid[1:] < grid[:-1]).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_is_the_published_recursion(settled, eta):
    before, after = randn(2, 1, 3, 8, 8)
    model = settled(lambda noisy, before, after, time: 0.3 * noisy + before * time[0] / 1000)
    made = model.sample_latent(before, after, steps=6, seed=5, eta=eta)

    m = torch.linspace(0.001, 0.999, 1000, dtype=torch.float64)
    v = 2 * m * (1 - m)
    x, fresh = after.double(), torch.Generator().manual_seed(5)
    times = [999, 749, 499, 249, 1, 0]
    for t, u in zip(times, [*times[1:], None], strict=True):
        x0 = x - (0.3 * x + before * (t + 1) / 1000)
        if u is None:
            break
        s2 = (v[t] - v[u] * (1 - m[t]) ** 2 / (1 - m[u]) ** 2) * v[u] / v[t]
        rest = x - (1 - m[t]) * x0 - m[t] * after
        noise = torch.randn(1, 1, 3, 8, 8, generator=fresh)[:, 0]
        x = (1 - m[u]) * x0 + m[u] * after + ((v[u] - s2) / v[t]).sqrt() * rest + eta * s2.sqrt() * noise
    torch.testing.assert_close(made.double(), x0, atol=1e-4, rtol=1e-4)


def test_chains_have_the_marginals_of_the_closed_form(untrained):
    data, end = torch.full((1, 1, 1, 100, 200), 1.5), torch.full((1, 1, 1, 100, 200), -0.5)
    grid = untrained.grid(12)
    begin = PATH.add_noise(data, grid[:1], randn(*data.shape), end)
    seen = []
    oracle = Plain(lambda x, t, cond: data, PATH, "data", Latent(1, 1, 100, 200))
    sample(oracle, begin, grid, Cond(), step=Universal(eta=1.0), noise=Fresh(1), y=end,
           callback=lambda run, x: seen.append((run.s[0], x)))  # fmt: skip
    for time, x in seen:
        a, b, c = (float(value) for value in PATH.coef(time))
        assert float(x.mean()) == pytest.approx(a * 1.5 - b * 0.5, abs=0.025)
        assert float(x.std()) == pytest.approx(c, rel=0.03)


@pytest.mark.parametrize(("steps", "seed"), [(3, 0), (8, 1), (50, 2)])
def test_a_network_that_knows_the_answer_gives_it(settled, steps, seed):
    data, before, after = randn(3, 1, 3, 8, 8)
    model = settled(lambda noisy, before, after, time: noisy - data)
    torch.testing.assert_close(model.sample_latent(before, after, steps, seed), data, atol=1e-6, rtol=0)
    exact = Plain(lambda x, t, cond: data[:, None], PATH, "data", Latent(3, 1, 8, 8))
    made, _ = sample(exact, after[:, None], model.grid(steps), Cond(), step=Universal(eta=1.0), noise=Fresh(seed),
                     y=after[:, None])  # fmt: skip
    assert torch.equal(made[:, 0], data)


def test_every_seed_begins_at_the_latent_of_the_frame_after_and_on_its_side(settled):
    before, after = randn(2, 1, 3, 8, 8)
    asked = []

    def spy(noisy, before, after, time):
        asked.append((noisy, int(time[0])))
        return torch.zeros_like(noisy)

    for seed in (0, 1):
        settled(spy).sample_latent(before, after, 5, seed)
    assert torch.equal(asked[0][0], after)
    assert torch.equal(asked[5][0], after)
    assert not torch.equal(asked[1][0], asked[6][0])
    assert [time for _, time in asked[:5]] == [1000, 667, 334, 2, 1]


def test_eta_scales_the_noise_and_steps_matter(untrained):
    before, after = randn(2, 1, 3, 8, 8)
    with torch.no_grad():
        draw = lambda **how: untrained.sample_latent(before, after, **({"steps": 5, "seed": 0} | how))  # noqa: E731
        assert torch.equal(draw(eta=0.0), draw(eta=0.0, seed=1))
        assert not torch.equal(draw(), draw(seed=1))
        assert not torch.equal(draw(), draw(steps=9))
        assert torch.equal(draw(), draw())


def test_diffusion_from_noise_forgets_nothing_of_its_seed():
    torch.manual_seed(0)
    model = CBB(replace(PRESETS["tiny"], objective="ddpm")).eval()
    data, before, after = randn(3, 1, 3, 8, 8).clamp(-2, 2)

    def oracle(noisy, before, after, time):
        a, _, c = model.path.coef(time)
        return (noisy - a[0] * data) / c[0]

    model.predict = lambda noisy, before, after, time: torch.zeros_like(noisy)
    one, other = (model.sample_latent(before, after, 50, seed, eta=0.0) for seed in (0, 1))
    assert (one - other).std() > 1
    assert one.abs().max() <= 2
    model.predict = oracle
    for eta in (0.0, 1.0):
        torch.testing.assert_close(model.sample_latent(before, after, 50, 3, eta), data, atol=2e-3, rtol=0)


# --- the autoencoder ------------------------------------------------------------------------------------------------


def test_both_neighbours_are_moved_to_the_middle():
    warped, motion, moving = aligned(texture(0), texture(6))
    inner = (slice(None), slice(12, -12), slice(16, -16))
    for moved in warped:
        assert (moved[inner] - texture(3)[inner]).abs().max() < 0.03
    assert float(motion[0][12:-12, 16:-16].mean()) == pytest.approx(3, abs=0.2)
    assert float(motion[1].abs().mean()) < 0.2
    assert moving.min() == 1


def test_where_nothing_moves_the_pictures_stay_as_they_are():
    first = texture()
    second = (first + 0.02 * randn(3, 64, 96)).clamp(0, 1)
    warped, _, moving = aligned(first, second)
    assert moving.max() == 0
    torch.testing.assert_close(warped, torch.stack([first, second]), atol=1e-6, rtol=0)


def test_features_of_the_neighbours_meet_in_the_middle(untrained):
    height, width = 32, 64
    scene = rand(1, 16, height // 2, width // 2 + 8)
    # On a map of half the size 4 pixels of motion from frame to frame are one to either side.
    first, second = (scene[..., 4 + by : 4 + by + width // 2] for by in (1, -1))
    features = [torch.stack([first, second], 1)]
    features += [rand(1, 2, width, height // side, 64 // side) for width, side in ((24, 4), (48, 8))]
    seen = []
    handle = untrained.decoder.attention[-1][0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    motion = torch.zeros(1, 2, height, width)
    motion[:, 0] = 2
    with torch.no_grad():
        untrained.decoder(randn(1, 3, 4, 8), randn(1, 2, 3, 4, 8), features, rand(1, 2, 3, height, width), motion)
    handle.remove()
    inner = seen[0][..., 3:-3]
    torch.testing.assert_close(inner[:, 0], scene[..., 4 : 4 + width // 2][..., 3:-3])
    torch.testing.assert_close(inner[:, 1], inner[:, 0])


def test_training_starts_from_the_mean_of_the_warps(untrained):
    warped = rand(1, 2, 3, 32, 64)
    with torch.no_grad():
        neighbours, features = untrained.encode(rand(1, 2, 3, 32, 64))
        made = untrained.decoder(randn(1, 3, 4, 8), neighbours, features, warped, torch.zeros(1, 2, 32, 64))
    torch.testing.assert_close(made, warped.mean(1))


def test_mask_and_residual_make_the_frame(untrained):
    model = CBB(PRESETS["tiny"]).eval()
    for head, value in zip(model.decoder.heads, (2.0, 0.5), strict=True):
        torch.nn.init.constant_(head[-1].bias, value)
    warped = rand(1, 2, 3, 32, 64)
    with torch.no_grad():
        neighbours, features = model.encode(rand(1, 2, 3, 32, 64))
        made = model.decoder(randn(1, 3, 4, 8), neighbours, features, warped, torch.zeros(1, 2, 32, 64))
    mask = torch.tensor(2.0).sigmoid()
    residual = 2 * torch.tensor(0.5).sigmoid() - 1
    torch.testing.assert_close(made, warped[:, 0] * mask + warped[:, 1] * (1 - mask) + residual)


def test_latents_are_bounded_and_of_the_stride(untrained):
    with torch.no_grad():
        latent, features = untrained.encoder(rand(2, 3, 64, 96))
    assert latent.shape == (2, 3, 8, 12)
    assert latent.abs().max() < 2
    assert [tuple(level.shape[1:]) for level in features] == [(16, 32, 48), (24, 16, 24), (48, 8, 12)]


def test_the_codebook_gives_the_nearest_code_and_lets_gradients_through():
    book = Codebook(16, 3)
    latent = randn(2, 3, 4, 4).requires_grad_()
    code, loss = book(latent)
    flat = latent.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = book.codes[(flat[:, None] - book.codes[None]).square().sum(-1).argmin(1)]
    torch.testing.assert_close(code.permute(0, 2, 3, 1).reshape(-1, 3), nearest)
    distance = (nearest - flat).square().mean()
    torch.testing.assert_close(loss, 1.25 * distance)
    (grad,) = torch.autograd.grad(code.sum(), latent)
    assert torch.equal(grad, torch.ones_like(latent))


@pytest.mark.parametrize("grid", [False, True])
def test_attention_reaches_its_window_or_its_grid_and_no_further(grid):
    torch.manual_seed(0)
    attention = WindowAttention(8, 4, 2, 8, grid)
    x, maps = rand(1, 8, 4, 6), rand(1, 2, 8, 4, 6)
    struck = maps.clone()
    struck[:, 1, :, 1, 2] += 1
    with torch.no_grad():
        reached = (attention(x, struck) - attention(x, maps)).abs().amax((0, 1)) > 1e-7
    expected = torch.zeros(4, 6, dtype=torch.bool)
    rows, columns = ([1, 3], [2, 5]) if grid else ([0, 1], [2, 3])
    expected[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    assert torch.equal(reached, expected)


def test_attention_knows_the_relative_place():
    attention = WindowAttention(8, 8, 2, 8, False)
    with torch.no_grad():
        attention.bias.fill_(-1e4)
        attention.bias[0, 3 * 1 + 2] = 0.0  # one column to the left: the query's less the key's is (0, 1)
        attention.query.weight.zero_()
        attention.query.bias.zero_()
        maps = rand(1, 1, 8, 2, 2)
        struck = maps.clone()
        struck[..., 0, 0] += 1
        reached = (attention(maps[:, 0], struck) - attention(maps[:, 0], maps)).abs().amax((0, 1)) > 1e-6
    assert reached[0, 1]
    assert not reached[1, 1]


# --- training -------------------------------------------------------------------------------------------------------


def batch(progress, count=2, side=32):
    pair = rand(count, 2, 3, side, side)
    return {"pair": pair, "warped": pair, "middle": rand(count, 3, side, side, seed=1),
            "motion": torch.zeros(count, 2, side, side), "progress": torch.full((count,), progress)}  # fmt: skip


@pytest.mark.parametrize(("progress", "learns", "rests"), [(0.0, "encoder", "unet"), (0.9, "unet", "encoder")])
def test_first_the_autoencoder_learns_then_the_u_net_while_the_encoder_stands_still(progress, learns, rests):
    torch.manual_seed(0)
    model = CBB(PRESETS["tiny"])
    # The heads begin at zero, and nothing behind them would learn in a single step.
    for head in model.decoder.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    model.loss(batch(progress)).backward()
    assert all(value.grad is not None for value in getattr(model, learns).parameters())
    assert all(value.grad is None for value in getattr(model, rests).parameters())
    assert all(value.grad is not None for value in model.decoder.parameters())


def test_the_bridge_is_learned_on_both_sides_each_with_its_own_end(settled):
    middle, before, after = torch.zeros(64, 3, 4, 4), torch.full((64, 3, 4, 4), -9.0), torch.full((64, 3, 4, 4), 9.0)
    asked = {}

    def spy(noisy, before, after, time):
        asked.update(noisy=noisy, time=time)
        return noisy.clone()

    torch.manual_seed(0)
    loss = settled(spy).latent_loss(middle, before, after)
    assert loss == 0  # x is zero: x_t - x is x_t
    time, mean = asked["time"], asked["noisy"].mean((1, 2, 3))
    assert 0.3 < (time > 0).float().mean() < 0.7
    assert 1 <= time.abs().min() < time.abs().max() <= 1000
    b = PATH.coef(time.abs())[1]
    assert (mean - 9 * b * time.sign()).abs().max() < 0.6


def test_the_weight_of_a_time_is_one_over_its_noise_and_at_most_five(settled):
    zero = torch.zeros(512, 3, 2, 2)
    asked = {}

    def off_by_one(noisy, before, after, time):
        asked["time"] = time
        return noisy + 1

    torch.manual_seed(0)
    loss = settled(off_by_one).latent_loss(zero, zero, zero)
    weight = (1 / PATH.coef(asked["time"].abs())[2]).clamp(max=5)
    assert float(loss) == pytest.approx(float(weight.mean()), rel=1e-5)
    assert weight.max() == 5


def test_the_side_reaches_the_network_as_its_time(untrained, monkeypatch):
    asked = []
    real = untrained.unet.forward
    monkeypatch.setattr(untrained.unet, "forward", lambda x, time: (asked.append((x.shape[1], time)), real(x, time))[1])
    x = randn(2, 3, 8, 8)
    with torch.no_grad():
        untrained.predict(x, x, x, torch.tensor([7, -7]))
    assert asked[0][0] == 9
    assert asked[0][1].tolist() == [1007, 993]


def test_examples_repeat_come_in_both_orders_and_are_aligned():
    data = CBB.dataset("world", "tiny", 3)
    first, again = data.batch([4, 5, 6, 7], 0.5), data.batch([6], 0.5)
    assert {key: tuple(value.shape) for key, value in first.items()} == {
        "pair": (4, 2, 3, 96, 96), "warped": (4, 2, 3, 96, 96), "middle": (4, 3, 96, 96), "motion": (4, 2, 96, 96),
        "progress": (4,)}  # fmt: skip
    assert all(torch.equal(again[key][0], first[key][2]) for key in first)
    assert (first["progress"] == 0.5).all()
    error = lambda made: (made.mean(1) - first["middle"]).square().mean()  # noqa: E731
    assert error(first["warped"]) < 0.7 * error(first["pair"])


# --- the method -----------------------------------------------------------------------------------------------------


def test_the_same_input_and_seed_give_the_same_frame_of_the_same_size(untrained):
    first, second = texture(0, 70, 90), texture(4, 70, 90)
    made = untrained.middle(first, second, steps=4)
    assert made.shape == first.shape
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, untrained.middle(first, second, steps=4))


@pytest.mark.parametrize("moved", [False, True])
def test_the_bridge_begins_at_the_latent_after_moved_to_the_middle_where_the_config_says_so(moved):
    torch.manual_seed(0)
    model = CBB(replace(PRESETS["tiny"], moved=moved)).eval()
    begun = []

    def spy(before, after, *how):
        begun.append(after)
        return after

    model.sample_latent = spy
    # One stride of motion to either side, so that latents move by a whole place.
    first, second = texture(0), texture(16)
    model.middle(first, second)
    with torch.no_grad():
        places = slice(3, 8)
        after, middle = (model.encoder(picture[None])[0][..., 2:6, places] for picture in (second, texture(8)))
    right, wrong = (middle, after) if moved else (after, middle)
    off = lambda latent: (begun[0][..., 2:6, places] - latent).abs().mean()  # noqa: E731
    assert off(right) < 0.3 * off(wrong)


def test_pictures_that_are_the_same_give_a_copy(untrained):
    picture = texture()
    made = untrained.between(picture, picture.clone())(0.5)
    assert torch.equal(made, picture)
    assert made.data_ptr() != picture.data_ptr()


@pytest.mark.parametrize(
    ("first", "second", "how", "message"),
    [
        ((3, 64, 96), (3, 64, 80), {}, "the first picture is 96x64, the second 80x64"),
        ((3, 63, 96), (3, 63, 96), {}, "96x63 are too small; sides of 64"),
        ((3, 64, 64), (3, 64, 64), {"steps": 2}, "--steps 2: cbb needs 3"),
        ((3, 64, 64), (3, 64, 64), {"steps": 501}, "500 are the most"),
    ],
)
def test_what_it_cannot_take_is_said_in_one_line(untrained, first, second, how, message):
    with pytest.raises(InputError, match=message) as caught:
        untrained.middle(rand(*first), rand(*second), **how)
    assert "\n" not in str(caught.value)


def test_what_stands_still_stays_the_mean_whatever_the_decoder_says(untrained, monkeypatch):
    monkeypatch.setattr(
        untrained.decoder, "forward", lambda latent, neighbours, features, warped, motion: warped[:, 0] * 0
    )
    first = texture()
    second = (first + 0.02 * randn(3, 64, 96)).clamp(0, 1)
    torch.testing.assert_close(untrained.middle(first, second, steps=3), (first + second) / 2)
    assert untrained.middle(first, texture(6), steps=3).max() == 0


def test_only_the_middle_is_known(untrained):
    assert untrained.fixed_t
    with pytest.raises(InputError, match=r"the middle only, not the picture at 0\.25"):
        untrained.between(texture(), texture(2))(0.25)


def test_a_clip_is_halved_with_the_steps_and_the_seed_that_were_asked_for(monkeypatch):
    asked = []

    def blend(self, frame0, frame1, steps, seed, eta):
        asked.append((steps, seed))
        return (frame0 + frame1) / 2

    monkeypatch.setattr(CBB, "middle", blend)
    clip = Clip.from_tensor(torch.stack([texture(2 * k) for k in range(3)]), 10)
    made = interpolate(clip, "4x", "cbb", weights="random", steps=7, seed=3)
    frames = made.tensor()
    assert asked == [(7, 3)] * 6
    torch.testing.assert_close(frames[1], 0.75 * frames[0] + 0.25 * frames[4])
    torch.testing.assert_close(frames[4], texture(2), atol=1e-6, rtol=0)
    other = interpolate(clip, "4x", "cbb", weights="random", steps=7, seed=4)
    assert other.source.label != made.source.label


def test_steps_are_refused_at_once_where_they_cannot_be():
    clip = Clip.from_tensor(torch.stack([texture(2 * k) for k in range(3)]), 10)
    with pytest.raises(InputError, match="--steps 2: cbb needs 3 steps"):
        interpolate(clip, "2x", "cbb", weights="random", steps=2)
    with pytest.raises(InputError, match="--steps 9: dis does not sample"):
        interpolate(clip, "2x", "dis", steps=9)


def save(path, picture):
    cv2.imwrite(str(path), pixels(picture)[..., ::-1])
    return str(path)


def test_two_pictures_on_the_command_line_give_the_one_between(tmp_path):
    first, second = save(tmp_path / "a.png", texture(0)), save(tmp_path / "b.png", texture(4))
    out = tmp_path / "mid.png"
    call = lambda *more: CliRunner().invoke(app, ["interpolate", first, second, *more])  # noqa: E731
    done = call("--method", "cbb", "--weights", "random", "--steps", "3", "--seed", "1", "-o", str(out))
    assert done.exit_code == 0, done.output
    assert cv2.imread(str(out)).shape == (64, 96, 3)
    # Untrained it is the mean of the warps, and those are right here.
    made = torch.from_numpy(cv2.imread(str(out))[..., ::-1].copy()).permute(2, 0, 1) / 255
    assert (made - texture(2)).abs()[:, 12:-12, 16:-16].max() < 0.03
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "mid.png"]


def test_sizes_are_known():
    with pytest.raises(InputError, match="there are tiny, paper"):
        CBB.preset("huge")
    with pytest.raises(InputError, match="--data vimeo: cbb learns from world"):
        CBB.dataset("vimeo", "tiny", 0)
    paper = PRESETS["paper"]
    assert paper.stride == 32
    assert paper.multiple == 256
    assert CBB.recipe("paper").lr == 1e-4


def test_shipped_weights_beat_blending_by_far_and_hardly_depend_on_the_seed():
    model = load("cbb")
    first, middle, second = texture(0), texture(4), texture(8)
    psnr = lambda made: float(-10 * torch.log10((made - middle).square().mean()))  # noqa: E731
    made = torch.stack([model.middle(first, second, 10, seed) for seed in (0, 1)])
    assert psnr(made[0]) > psnr((first + second) / 2) + 5
    assert 0 < (made[0] - made[1]).std() < 0.01
