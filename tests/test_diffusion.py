"""The diffusion core against written-out formulas and exact denoisers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.diffusion.analytic import GaussianMixture
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import Ctx, current
from frameloom.diffusion.denoiser import Given, Latent, Plain, rebase, velocity
from frameloom.diffusion.guide import CFG, RCFG, CFGpp, Joint, Separate, Unguided, Weak, evaluate, renormed
from frameloom.diffusion.hooks import Cached, every, install, only
from frameloom.diffusion.objective import LogitNormal, UShape, masked_mean, min_snr, pseudo_huber
from frameloom.diffusion.paths import EDM, VP, BrownianBridge, Flow, GmaxBridge, Trig
from frameloom.diffusion.predict import Prediction, target, to_prediction
from frameloom.diffusion.run import Edit, HoldGiven, sample
from frameloom.diffusion.step import (
    AB2,
    STEPS,
    Correlated,
    DPMpp2M,
    Fixed,
    Fresh,
    Grids,
    Heun,
    Slots,
    Universal,
    step,
    universal,
)
from frameloom.errors import InputError

GAUSSIAN = {"vp": VP.of(), "cosine": VP.of("cosine"), "edm": EDM(), "flow": Flow(), "trig": Trig()}
BRIDGES = {"brownian": BrownianBridge(), "gmax": GmaxBridge()}
SHAPE = (2, 3, 1, 2, 2)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(path, seed=0, std=0.3):
    return GaussianMixture(2 * noise(4, 3, 1, 2, 2, seed=seed), std, path, classes=torch.tensor([0, 0, 1, 2]))


def inner(path, *shares):
    return torch.tensor([share * path.t_max for share in shares], dtype=torch.float64)


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAUSSIAN)
def test_a_path_starts_at_the_data_and_only_gets_noisier(name):
    path = GAUSSIAN[name]
    a, b, c = path.coef(torch.zeros(1, dtype=torch.float64))
    assert (float(a), float(b), float(c)) == (1, 0, 0)
    lam = path.lam(torch.linspace(0.001, 1, 50, dtype=torch.float64) * path.t_max)
    assert bool((lam.diff() < 0).all())


@pytest.mark.parametrize("name", GAUSSIAN)
def test_lam_and_its_inverse_agree(name):
    path = GAUSSIAN[name]
    t = inner(path, 0.02, 0.3, 0.7, 0.98)
    assert torch.allclose(path.t_of_lam(path.lam(t)), t, rtol=1e-6)


@pytest.mark.parametrize("name", [*GAUSSIAN, *BRIDGES])
def test_rates_are_the_derivatives_of_the_coefficients(name):
    path = (GAUSSIAN | BRIDGES)[name]
    t, h = inner(path, 0.2015, 0.5005, 0.8004), 1e-6 * path.t_max
    for rate, high, low in zip(path.rates(t), path.coef(t + h), path.coef(t - h), strict=True):
        assert torch.allclose(rate, (high - low) / (2 * h), atol=1e-6 / h * 1e-6, rtol=1e-4)


def test_the_written_out_coefficients():
    t = torch.tensor([0.3], dtype=torch.float64)
    assert [float(v) for v in Flow().coef(t)] == [0.7, 0, 0.3]
    assert [float(v) for v in EDM().coef(t)] == [1, 0, 0.3]
    assert float(Trig().coef(t)[0]) == pytest.approx(math.cos(0.15 * math.pi))
    m = 0.001 + 0.998 * 0.3
    bridge = [float(v) for v in BrownianBridge(2.0).coef(t)]
    assert bridge == pytest.approx([1 - m, m, math.sqrt(4 * (m - m * m))])
    s2, s1 = 0.5 * 49.99 * 0.09 + 0.01 * 0.3, 25.005
    gmax = [float(v) for v in GmaxBridge().coef(t)]
    assert gmax == pytest.approx([(s1 - s2) / s1, s2 / s1, math.sqrt((s1 - s2) * s2 / s1)])
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    a, _, c = VP.of().coef(torch.tensor([1.0, 500.0, 1000.0], dtype=torch.float64))
    assert torch.allclose(a**2, abar[[0, 499, 999]], atol=1e-14)
    assert torch.allclose(a**2 + c**2, torch.ones(3, dtype=torch.float64))


def test_zero_terminal_snr_ends_in_noise_alone():
    a, _, c = VP.of(zero_snr=True).coef(torch.tensor([1000.0, 1.0], dtype=torch.float64))
    assert float(a[0]) == 0
    assert float(c[0]) == 1
    assert float(a[1] ** 2) == pytest.approx(1 - 1e-4)


# --- predictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["data", "noise", "v", "velocity", "velocity-", "edm", "difference"])
@pytest.mark.parametrize("name", [*GAUSSIAN, *BRIDGES])
@settings(max_examples=5, deadline=None)
@given(share=st.floats(0.05, 0.95))
def test_the_target_of_a_network_read_back_is_what_it_was_made_of(kind, name, share):
    path = (GAUSSIAN | BRIDGES)[name]
    x0, eps = noise(*SHAPE), noise(*SHAPE, seed=1)
    y = noise(*SHAPE, seed=2) if path.bridge else None
    t = inner(path, share, share / 2)
    x = path.add_noise(x0, t, eps, y)
    found = to_prediction(kind, target(kind, x0, eps, t, path, y), x, t, path, y)
    assert torch.allclose(found.x0, x0, atol=1e-5)
    assert torch.allclose(found.eps, eps, atol=1e-5)


def test_noise_cannot_be_turned_into_data_where_there_is_no_data():
    path = VP.of(zero_snr=True)
    t = torch.full((2,), 1000.0, dtype=torch.float64)
    with pytest.raises(InputError, match="signal-to-noise ratio of 0"):
        to_prediction("noise", noise(*SHAPE), noise(*SHAPE), t, path)
    v = to_prediction("v", noise(*SHAPE), noise(*SHAPE, seed=1), t, path)
    assert torch.allclose(v.x0, -noise(*SHAPE))


# --- the universal step (sampling.md 2.4) --------------------------------------------------------------------------


def pair(path, high=0.6, low=0.35):
    t, s = inner(path, high, high), inner(path, low, low)
    x0, eps = noise(*SHAPE), noise(*SHAPE, seed=1)
    x = path.add_noise(x0 + 0.1, t, eps)
    return t, s, x, Prediction.from_x0(path, x, t, x0), [v.view(-1, 1, 1, 1, 1) for v in (*path.coef(t), *path.coef(s))]


def test_ddim_and_euler_are_the_universal_step_without_fresh_noise():
    for path in (VP.of(), EDM(), Flow()):
        t, s, x, p, (_, _, _, a_s, _, c_s) = pair(path)
        made = universal(path, x, p, t, s)
        assert torch.allclose(made, a_s * p.x0 + c_s * p.eps, atol=1e-14)
        if not isinstance(path, VP):  # Euler on dx/dt
            v = target("velocity", p.x0, p.eps, t, path)
            assert torch.allclose(made, x + (s - t).view(-1, 1, 1, 1, 1) * v, atol=1e-12)
        # first-order DPM-Solver++
        lam_t, lam_s = path.lam(t), path.lam(s)
        h = torch.log(lam_s / lam_t).view(-1, 1, 1, 1, 1)
        c_t = path.coef(t)[2].view(-1, 1, 1, 1, 1)
        assert torch.allclose(made, c_s / c_t * x - a_s * torch.expm1(-h) * p.x0, atol=1e-12)


def test_eta_one_is_ancestral_sampling():
    path = VP.of()
    t, s, x, p, (a_t, _, _, a_s, _, c_s) = pair(path)
    z = noise(*SHAPE, seed=3)
    ctx = Ctx(path, 1, noise=Fixed(z))
    made = Universal(eta=1.0)(x, p, t, s, ctx)
    abar_t, abar_s = a_t**2, a_s**2
    sigma = torch.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
    assert torch.allclose(made, a_s * p.x0 + torch.sqrt(1 - abar_s - sigma**2) * p.eps + sigma * z, atol=1e-12)
    # k-diffusion's Euler-ancestral on the variance-exploding path
    path = EDM()
    t, s, x, p, (_, _, c_t, _, _, c_s) = pair(path, 0.02, 0.01)
    made = Universal(eta=1.0)(x, p, t, s, Ctx(path, 1, noise=Fixed(z)))
    up = torch.sqrt(c_s**2 * (c_t**2 - c_s**2) / c_t**2)
    down = torch.sqrt(c_s**2 - up**2)
    assert torch.allclose(made, x + (x - p.x0) / c_t * (down - c_t) + up * z, atol=1e-9)


def test_the_bridges_posterior_is_the_step_with_eta_one():
    """The mean and the variance of x_s given x0, y and x_t, by Gaussian conditioning of the two marginals."""
    path = BrownianBridge()
    t, s = inner(path, 0.7, 0.7), inner(path, 0.4, 0.4)
    x0, y, z, eps = (noise(*SHAPE, seed=k) for k in range(4))
    x = path.add_noise(x0, t, eps, y)
    p = Prediction.from_x0(path, x, t, x0, y)
    made = Universal(eta=1.0)(x, p, t, s, Ctx(path, 1, y=y, noise=Fixed(z)))
    (a_t, b_t, c_t), (a_s, b_s, c_s) = ([v.view(-1, 1, 1, 1, 1) for v in path.coef(u)] for u in (t, s))
    gain = a_t / a_s  # x_t = gain x_s + ... + fresh noise, Markov in the ratio of a
    mean = a_s * x0 + b_s * y + gain * c_s**2 / c_t**2 * (x - a_t * x0 - b_t * y)
    variance = c_s**2 - (gain * c_s**2 / c_t) ** 2
    assert torch.allclose(made, mean + variance.sqrt() * z, atol=1e-10)


def test_consistency_sampling_forgets_the_old_noise():
    path = VP.of()
    t, s, x, p, (_, _, _, a_s, _, c_s) = pair(path)
    z = noise(*SHAPE, seed=3)
    made = Universal(r=1.0)(x, p, t, s, Ctx(path, 1, noise=Fixed(z)))
    assert torch.allclose(made, a_s * p.x0 + c_s * z, atol=1e-14)


def test_held_frames_are_returned_untouched():
    path = Flow()
    x = noise(1, 3, 1, 2, 2)
    t = torch.tensor([[0.0, 0.5, 0.7]], dtype=torch.float64)
    s = torch.tensor([[0.0, 0.5, 0.4]], dtype=torch.float64)
    p = Prediction(noise(1, 3, 1, 2, 2, seed=1), noise(1, 3, 1, 2, 2, seed=2))
    made = universal(path, x, p, t, s, 1.0, noise(1, 3, 1, 2, 2, seed=3))
    assert torch.equal(made[:, :2], x[:, :2])
    assert not torch.equal(made[:, 2], x[:, 2])


def test_dpmpp2m_is_its_written_formula():
    path = VP.of()
    grid = Grids.indices([900.0, 600.0, 300.0, 100.0])
    den = mixture(path)
    x = noise(*SHAPE)
    cond = den.labels(torch.tensor([0, 1]))
    made, _ = sample(den, x, grid, cond, step=DPMpp2M())
    y, before = x, None
    for t, s in pairwise(grid):
        x0 = den(y, t.expand(2), cond).x0
        (a_t, _, c_t), (a_s, _, c_s) = path.coef(t), path.coef(s)
        if before is None or s == 0:
            y = a_s * x0 + c_s * (y - a_t * x0) / c_t
        else:
            h, h0 = math.log(path.lam(s) / path.lam(t)), math.log(path.lam(t) / path.lam(before[1]))
            q = h0 / h
            data = (1 + 1 / (2 * q)) * x0 - before[0] / (2 * q)
            y = c_s / c_t * y - a_s * math.expm1(-h) * data
        before = (x0, t)
    assert torch.allclose(made, y, atol=1e-10)


def error(solver, n, path, make):
    """Distance of an n-step run from the run of very many steps of the second-order solver."""
    den = GaussianMixture(0.5 * noise(3, 1, 1, 2, 2), 0.8, path)
    x = noise(1, 1, 1, 2, 2, seed=5) * path.coef(make(8)[0])[2]
    truth, _ = sample(den, x, make(1024), Cond(), step=Heun())
    made, _ = sample(den, x, make(n), Cond(), step=solver)
    return float((made - truth).abs().max())


@pytest.mark.parametrize(("solver", "order"), [(Universal(), 1), (Heun(), 2), (DPMpp2M(), 2), (AB2(), 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    path = EDM()
    # Stops at a little noise: at none, the last step is of first order whatever the solver.
    make = lambda n: torch.linspace(5.0, 0.5, n + 1, dtype=torch.float64)  # noqa: E731
    ratio = error(solver, 32, path, make) / error(solver, 64, path, make)
    assert 2**order * 0.75 < ratio < 2**order * 1.45


# --- rebase --------------------------------------------------------------------------------------------------------


def test_rebase_there_and_back_is_the_identity():
    den = mixture(Flow())
    there = rebase(rebase(den, VP.of()), Flow())
    x, t, cond = noise(*SHAPE), torch.tensor([0.3, 0.8], dtype=torch.float64), Cond()
    assert torch.allclose(there(x, t, cond).x0, den(x, t, cond).x0, atol=1e-6)
    assert torch.allclose(there(x, t, cond).eps, den(x, t, cond).eps, atol=1e-5)


def test_one_mixture_is_sampled_to_the_same_points_through_every_path():
    # The same noise at the same signal-to-noise ratios, on the way of each path.
    sigmas = Grids.karras(EDM(), 200, low=0.002, high=60.0)[:-1]
    ends = {}
    for name, path in GAUSSIAN.items():
        grid = torch.cat([path.t_of_lam(1 / sigmas), torch.zeros(1, dtype=torch.float64)])
        a, _, c = path.coef(grid[0])
        den = rebase(mixture(Flow()), path)
        start = noise(*SHAPE, seed=7) * c + 0 * a
        ends[name], _ = sample(den, start, grid, Cond(), step=Heun())
    for name in ends:
        assert torch.allclose(ends[name], ends["flow"], atol=1e-3), name


def test_rebase_refuses_more_noise_than_the_network_was_trained_on():
    den = rebase(mixture(VP.of("scaled_linear", start=0.00085, end=0.012)), Flow())
    with pytest.raises(InputError, match=r"signal-to-noise ratio of 0 was asked.*trained down to 0\.00468"):
        den(noise(*SHAPE), torch.ones(2, dtype=torch.float64), Cond())


def test_the_velocity_of_an_exact_denoiser_moves_the_marginals():
    den = mixture(Flow())
    x, t = noise(*SHAPE), torch.tensor([0.5, 0.5], dtype=torch.float64)
    p = den(x, t, Cond())
    assert torch.allclose(velocity(den, x, t, Cond()), (x - p.x0) / 0.5, atol=1e-10)


# --- guidance ------------------------------------------------------------------------------------------------------


def asked(guide, x, t, cond, path=None, **state):
    den = mixture(path or Flow())
    ctx = Ctx(den.path, 4, **state)
    return guide.combine(evaluate(den, guide.branches(cond, ctx), x, t, ctx), x, t, ctx), ctx


def test_guidance_is_the_same_in_every_output_space():
    path, den = VP.of(), mixture(VP.of())
    x, t = noise(*SHAPE), inner(path, 0.4, 0.7)
    c, u = den(x, t, den.labels(torch.tensor([0, 1]))), den(x, t, Cond())
    made, _ = asked(CFG(3.0), x, t, den.labels(torch.tensor([0, 1])), path)
    for kind in ("noise", "v", "velocity", "data"):
        outs = [target(kind, p.x0, p.eps, t, path) for p in (c, u)]
        there = to_prediction(kind, outs[1] + 3.0 * (outs[0] - outs[1]), x, t, path)
        assert torch.allclose(there.x0, made.x0, atol=1e-8), kind
        assert torch.allclose(there.eps, made.eps, atol=1e-8), kind


@pytest.mark.parametrize("guide", [CFG(4.0), Joint(4.0), Separate(1.5, 4.0, ("label",)), CFGpp(0.5)])
def test_branches_in_one_batch_or_one_after_the_other_say_the_same(guide):
    den = mixture(Flow())
    cond = Cond({"label": torch.tensor([0, 1])}, {"label": torch.tensor([-1])})
    x, t = noise(*SHAPE), inner(den.path, 0.4, 0.7)
    ctx = Ctx(den.path, 4)
    branches = guide.branches(cond, ctx)
    together = evaluate(den, branches, x, t, ctx, together=True)
    launches = ctx.report.launches
    apart = evaluate(den, branches, x, t, ctx, together=False)
    assert launches == 1
    assert ctx.report.launches == 1 + len(branches)
    for name in together:
        assert torch.allclose(together[name].x0, apart[name].x0, atol=1e-12)


def test_guidance_takes_a_number_a_ramp_over_frames_or_a_function_of_the_run():
    x, t = noise(*SHAPE), inner(Flow(), 0.4, 0.7)
    cond = mixture(Flow()).labels(torch.tensor([0, 1]))
    ramp = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1)
    made, _ = asked(CFG(ramp), x, t, cond)
    for frame, w in enumerate((1.0, 2.0, 3.0)):
        whole, _ = asked(CFG(w), x, t, cond)
        assert torch.allclose(made.x0[:, frame], whole.x0[:, frame])
    later, _ = asked(CFG(lambda share: 1 + 4 * share), x, t, cond, i=2)
    assert torch.allclose(later.x0, asked(CFG(3.0), x, t, cond)[0].x0)


def test_guidance_outside_its_interval_costs_one_evaluation():
    cond = mixture(Flow()).labels(torch.tensor([0, 1]))
    x, t = noise(*SHAPE), inner(Flow(), 0.4, 0.7)
    _, ctx = asked(CFG(3.0, interval=(0.25, 0.75)), x, t, cond, i=0)
    assert ctx.report.nfe == 1
    _, ctx = asked(CFG(3.0, interval=(0.25, 0.75)), x, t, cond, i=1)
    assert ctx.report.nfe == 2


def test_joint_guidance_keeps_the_length_of_the_conditional_velocity():
    cond = mixture(Flow()).labels(torch.tensor([0, 1]))
    x, t = noise(*SHAPE), inner(Flow(), 0.4, 0.7)
    made, ctx = asked(Joint(7.5), x, t, cond)
    plain, _ = asked(CFG(1.0), x, t, cond)
    length = lambda p: (p.eps - p.x0).flatten(1).norm(dim=1)  # noqa: E731
    assert torch.allclose(length(made) / length(plain), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert ctx.report.nfe == 2
    again = renormed(made, plain, x, t, ctx)
    assert torch.allclose(again.x0, made.x0, atol=1e-9)


def test_separate_guidance_with_equal_strengths_is_joint_guidance():
    den = mixture(Flow())
    cond = Cond(
        {"label": torch.tensor([0, 1]), "image": noise(2, 1)}, {"label": torch.tensor([-1]), "image": noise(1, 1)}
    )
    x, t, ctx = noise(*SHAPE), inner(Flow(), 0.4, 0.7), Ctx(Flow(), 4)
    guides = Separate(4.0, 4.0, ("label",)), Joint(4.0, renorm=False)
    three, two = (g.combine(evaluate(den, g.branches(cond, ctx), x, t, ctx), x, t, ctx) for g in guides)
    assert torch.allclose(three.x0, two.x0, atol=1e-6)
    assert ctx.report.nfe == 5


def test_cfgpp_takes_its_noise_from_the_unconditional_branch():
    den = mixture(Flow())
    cond, x, t = den.labels(torch.tensor([0, 1])), noise(*SHAPE), inner(Flow(), 0.4, 0.7)
    made, _ = asked(CFGpp(0.6), x, t, cond)
    u, c = den(x, t, Cond()), den(x, t, cond)
    assert torch.equal(made.eps, u.eps)
    assert torch.allclose(made.x0, u.x0 + 0.6 * (c.x0 - u.x0))


def test_residual_guidance_calls_the_network_once_and_agrees_with_its_equation():
    den = mixture(Flow())
    cond, x, t = den.labels(torch.tensor([0, 1])), noise(*SHAPE), inner(Flow(), 0.4, 0.7)
    reference = noise(*SHAPE, seed=9)
    a, _, c = (v.view(-1, 1, 1, 1, 1) for v in Flow().coef(t))
    eps_c, residual = den(x, t, cond).eps, (x - a * reference) / c
    for delta in (1.0, 0.7):
        made, ctx = asked(RCFG(1.3, delta, "self", reference), x, t, cond)
        assert torch.allclose(made.eps, delta * residual + 1.3 * (eps_c - delta * residual), atol=1e-10)
        assert ctx.report.evaluations == {"cond": 1}


def test_onetime_residual_guidance_asks_the_unconditional_branch_in_the_first_step_only():
    den = mixture(Flow())
    _, report = sample(den, noise(*SHAPE), Grids.linear(Flow(), 5), den.labels(torch.tensor([0, 1])), guide=RCFG(1.2))
    assert report.evaluations == {"cond": 5, "null": 1}


def test_rescaled_guidance_has_the_deviation_of_the_conditional_output():
    cond = mixture(Flow()).labels(torch.tensor([0, 1]))
    x, t = noise(*SHAPE), inner(Flow(), 0.4, 0.7)
    made, _ = asked(CFG(6.0, rescale=1.0, space="velocity"), x, t, cond)
    plain, _ = asked(CFG(1.0), x, t, cond)
    std = lambda p: target("velocity", p.x0, p.eps, t, Flow()).flatten(1).std(1)  # noqa: E731
    assert torch.allclose(std(made), std(plain), atol=1e-8)


def test_a_condition_without_an_empty_form_cannot_be_guided_away_from():
    with pytest.raises(InputError, match="no empty picture"):
        Cond({"picture": noise(1, 2)}).null("picture")


# --- the loop ------------------------------------------------------------------------------------------------------


def test_equal_times_for_all_frames_are_one_time_for_the_clip():
    den = mixture(VP.of())
    grid = Grids.trailing(VP.of(), 7)
    cond = den.labels(torch.tensor([0, 1]))
    for name in ("ddim", "ancestral", "heun", "dpmpp2m"):
        one, _ = sample(
            den, noise(*SHAPE), grid, cond, guide=CFG(2.0), step=step(name), noise=Fixed(noise(*SHAPE, seed=4))
        )
        many, _ = sample(den, noise(*SHAPE), grid[:, None].expand(-1, 3), cond, guide=CFG(2.0), step=step(name),
                         noise=Fixed(noise(*SHAPE, seed=4)))  # fmt: skip
        assert torch.allclose(one, many, atol=1e-10), name


def test_a_plan_with_columns_needs_a_network_with_a_time_for_every_frame():
    den = Plain(lambda x, t, cond: x, Flow(), "data", Latent(1, 3, 2, 2))
    with pytest.raises(InputError, match="one noise level for a whole clip"):
        sample(den, noise(*SHAPE), Grids.linear(Flow(), 2)[:, None].expand(-1, 3), Cond())


def test_the_report_counts_what_a_counting_network_sees():
    seen = []

    def network(x, t, cond):
        seen.append(len(x))
        return x * 0.5

    den = Plain(network, Flow(), "data", Latent(1, 3, 2, 2))
    cond = Cond({"label": torch.tensor([0, 1])}, {"label": torch.tensor([-1])})
    _, report = sample(den, noise(*SHAPE), Grids.linear(Flow(), 6), cond, guide=CFG(2.0))
    assert report.launches == len(seen) == 6
    assert report.nfe == sum(seen) / 2 == 12
    assert report.frames == sum(seen) * 3
    seen.clear()
    _, report = sample(den, noise(*SHAPE), Grids.linear(Flow(), 6), cond, step=Heun())
    assert report.nfe == 11  # 2n - 1


def test_a_sample_that_is_no_number_stops_with_the_step_named():
    def network(x, t, cond):
        return x * (float("nan") if float(t[0]) < 0.61 else 1.0)

    den = Plain(network, Flow(), "data", Latent(1, 3, 2, 2))
    with pytest.raises(InputError, match="at step 3 of 5"):
        sample(den, noise(*SHAPE), Grids.linear(Flow(), 5), Cond())


def test_edits_change_the_estimate_and_the_sample():
    class Grey(Edit):
        def on_x0(self, p, x, t, ctx):
            return Prediction(p.x0 * 0 + 0.25, p.eps)

    den = mixture(Flow())
    made, _ = sample(den, noise(*SHAPE), Grids.linear(Flow(), 4), Cond(), edits=[Grey()])
    assert torch.allclose(made, torch.full(SHAPE, 0.25, dtype=torch.float64))


def test_given_frames_end_bit_equal_and_are_seen_clean_by_the_network():
    seen = []

    def network(x, t, cond):
        seen.append(x[:, 0].clone())
        return x * 0.5

    path = Flow()
    clean, given = noise(*SHAPE, seed=8), torch.tensor([[True, False, False]]).expand(2, -1)
    den = Given(Plain(network, path, "data", Latent(1, 3, 2, 2)))
    cond = Cond({"given": given, "clean": clean}, {"given": torch.zeros_like(given)})
    start = noise(*SHAPE)
    made, _ = sample(den, start, Grids.linear(path, 4), cond, guide=Joint(3.0), edits=[HoldGiven(clean, given, start)])
    assert torch.equal(made[:, 0], clean[:, 0])
    # Conditional rows see the frame itself, null rows see it as noisy as the rest.
    for i, rows in enumerate(seen):
        t = 1 - i / 4
        assert torch.equal(rows[:2], clean[:, 0])
        assert torch.allclose(rows[2:], (1 - t) * clean[:, 0] + t * start[:, 0], atol=1e-12)


def test_noise_policies():
    x, ctx = noise(*SHAPE), Ctx(Flow(), 3)
    assert torch.equal(Fresh(3)(x, ctx), Fresh(3)(x, ctx))
    twice = Fresh(3)
    assert not torch.equal(twice(x, ctx), twice(x, ctx))
    ctx.i = 1
    assert Slots([x, x + 1])(x, ctx) is not x
    assert torch.equal(Slots([x, x + 1])(x, ctx), x + 1)
    many = Correlated(0.8)
    big = torch.zeros(1, 4, 1, 64, 64, dtype=torch.float64)
    first, second = many(big, ctx), many(big, ctx)
    assert float((first * second).mean()) == pytest.approx(0.8, abs=0.03)
    assert float(second.var()) == pytest.approx(1, abs=0.03)


def test_grids_fall_to_their_end():
    path = VP.of()
    for grid in (Grids.linear(path, 7), Grids.trailing(path, 7), Grids.leading(path, 7), Grids.karras(EDM(), 7),
                 Grids.shift(Flow(), 7), Grids.indices([5.0, 2.0])):  # fmt: skip
        assert bool((grid.diff() < 0).all())
        assert float(grid[-1]) == 0
    assert len(Grids.linear(path, 7)) == 8
    with pytest.raises(InputError, match="there are euler"):
        step("rk9")
    assert set(STEPS) >= {"ddim", "heun", "dpmpp2m", "lcm"}


# --- hooks ---------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2).double()

    def forward(self, x):
        return self.inner(x)


class Hosted:
    path, latent = Flow(), Latent(1, 3, 2, 2)

    def __init__(self):
        torch.manual_seed(0)
        self.net = Net()

    def __call__(self, x, t, cond):
        return Prediction.from_x0(self.path, x, t, self.net(x))

    def sites(self, kind):
        from frameloom.diffusion.denoiser import Site

        if kind == "mlp":
            yield Site("inner", self.net.inner, "mlp")


class Double:
    def wrap(self, site, forward, args, kwargs):
        return 2 * forward(*args, **kwargs)


def test_hooks_stack_and_leave_no_trace_even_after_an_exception():
    den = Hosted()
    x = noise(*SHAPE)
    before = dict(den.net.inner.__dict__)
    plain = den.net(x)

    def broken():
        with install(den, [("mlp", Double()), ("mlp", Double())]):
            assert torch.allclose(den.net(x), 4 * plain)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        broken()
    assert den.net.inner.__dict__ == before
    assert torch.equal(den.net(x), plain)
    with pytest.raises(InputError, match="no temporal self"), install(den, [("temporal_self", Double())]):
        pass


def test_a_cache_keeps_a_memory_for_every_branch():
    den = Hosted()
    cond = Cond({"label": torch.tensor([0, 1])}, {"label": torch.tensor([-1])})
    cache = Cached(every(2))
    made, report = sample(den, noise(*SHAPE), Grids.linear(Flow(), 6), cond, guide=CFG(2.0), hooks=[("mlp", cache)],
                          together=False)  # fmt: skip
    assert report.cache_hits == 3 * 2  # steps 0, 2 and 4 are computed, in both branches
    assert current() is None
    fresh, _ = sample(den, noise(*SHAPE), Grids.linear(Flow(), 6), cond, guide=CFG(2.0),
                      hooks=[("mlp", Cached(only(range(6))))])  # fmt: skip
    plain, _ = sample(den, noise(*SHAPE), Grids.linear(Flow(), 6), cond, guide=CFG(2.0))
    assert torch.equal(fresh, plain)
    assert not torch.equal(made, plain)


def test_guidance_away_from_a_weaker_network():
    den = Hosted()
    x, t, ctx = noise(*SHAPE), inner(Flow(), 0.4, 0.7), Ctx(Flow(), 4)
    guide = Weak([("mlp", Double())], 0.5)
    made = guide.combine(evaluate(den, guide.branches(Cond(), ctx), x, t, ctx), x, t, ctx)
    plain = den.net(x)
    assert torch.allclose(made.x0, plain + 0.5 * (plain - 2 * plain), atol=1e-12)


# --- objectives ----------------------------------------------------------------------------------------------------


def test_the_u_shaped_density_has_its_closed_form():
    from scipy.stats import kstest

    torch.manual_seed(0)
    draws = UShape(4.0)(20_000).double().numpy()
    assert draws.min() >= 1e-5
    assert draws.max() <= 1 - 1e-5
    cdf = lambda t: (torch.expm1(4 * torch.as_tensor(t)) + (math.exp(4) - torch.exp(4 * (1 - torch.as_tensor(t))))).numpy() / (2 * math.expm1(4))  # noqa: E501, E731  # fmt: skip
    assert kstest(draws, cdf).pvalue > 0.01


def test_other_densities_weights_and_metrics():
    torch.manual_seed(0)
    t = LogitNormal(0.0, 1.0)(50_000)
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    path = VP.of()
    times = torch.tensor([10.0, 900.0], dtype=torch.float64)
    assert torch.allclose(min_snr(path, times, "data"), torch.minimum(path.lam(times) ** 2, torch.tensor(5.0)).float())
    with pytest.raises(InputError, match="min-SNR"):
        min_snr(path, times, "velocity")
    d = torch.full((1, 10), 3.0)
    c = 0.00054 * 10
    assert float(pseudo_huber(d, d * 0)) == pytest.approx((math.sqrt(90 + c * c) - c) / 10)
    errors = torch.tensor([[1.0, 5.0]]).view(1, 2, 1, 1, 1)
    assert float(masked_mean(errors, torch.tensor([[True, False]]))) == 1
    assert float(masked_mean(errors, None)) == 3


def test_unguided_is_one_branch():
    assert [b.name for b in Unguided().branches(Cond(), Ctx(Flow(), 1))] == ["cond"]
