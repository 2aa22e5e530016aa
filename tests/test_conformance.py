"""Our steps and grids against diffusers' schedulers, on a random network: the same numbers."""

import diffusers
import pytest
import torch

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Plain
from frameloom.diffusion.interop import grid_of, path_of, prediction_of, scheduler_for, scheduler_of, start_of, step_of
from frameloom.diffusion.paths import EDM, VP, BrownianBridge, Flow
from frameloom.diffusion.run import sample
from frameloom.diffusion.step import Fresh, Universal
from frameloom.errors import InputError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def network():
    """Any smooth function of a sample `(b, 2, 3, 4, 4)` and a time."""
    torch.manual_seed(0)
    inner, outer = torch.nn.Linear(48, 64), torch.nn.Linear(64, 48)

    def run(x, share):
        with torch.no_grad():
            hidden = torch.tanh(inner(x.flatten(2)) + share.reshape(-1, 1, 1).float())
            return outer(hidden).reshape(x.shape)

    return run


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def theirs(scheduler, network, noise, n, seed=3):
    """diffusers' own loop."""
    scheduler.set_timesteps(n)
    x = noise * getattr(scheduler, "init_noise_sigma", 1)
    generator = torch.Generator().manual_seed(seed)
    takes = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled, torch.as_tensor(t).float() / 1000)
        x = scheduler.step(output, t, x, **({"generator": generator} if takes else {}), return_dict=False)[0]
    return x


CASES = {
    "ddim": (diffusers.DDIMScheduler, SD | {"clip_sample": False}),
    "ddim-sd": (diffusers.DDIMScheduler, SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim-zero-snr": (diffusers.DDIMScheduler, SD | {"clip_sample": False, "rescale_betas_zero_snr": True,
                      "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "cogvideox": (diffusers.CogVideoXDDIMScheduler, {"clip_sample": False, "rescale_betas_zero_snr": True,
                  "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "ddpm-data": (diffusers.DDPMScheduler, SD | {"clip_sample": False, "prediction_type": "sample"}),
    "euler": (diffusers.EulerDiscreteScheduler, SD | {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler-karras": (diffusers.EulerDiscreteScheduler, SD | {"use_karras_sigmas": True}),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, SD | {"timestep_spacing": "trailing"}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, SD | {"timestep_spacing": "trailing"}),
    "dpm++2m-v": (diffusers.DPMSolverMultistepScheduler, SD | {"prediction_type": "v_prediction"}),
    "lcm": (diffusers.LCMScheduler, SD | {"clip_sample": False}),
    "heun": (diffusers.HeunDiscreteScheduler, SD | {"timestep_spacing": "trailing"}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "svd": (diffusers.EulerDiscreteScheduler, SD | {"prediction_type": "v_prediction", "timestep_type": "continuous",
            "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "timestep_spacing": "leading"}),
}  # fmt: skip


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("name", CASES)
def test_our_loop_gives_what_the_scheduler_gives(name, n, network, noise):
    make, options = CASES[name]
    scheduler = make(**options)
    path, grid, kind = path_of(scheduler), grid_of(scheduler, n), prediction_of(scheduler)
    expected = theirs(scheduler, network, noise, n)

    def host(x, t, cond):
        if isinstance(path, EDM):
            return network(x / (t**2 + 1).sqrt()[:, None, None, None, None].float(), 0.25 * t.log() / 1000)
        return network(x, t if isinstance(path, Flow) else (t - 1) / 1000)

    latent, start = Latent(3, 2, 4, 4), noise * start_of(scheduler, n)
    found, _ = sample(Plain(host, path, kind, latent), start, grid, Cond(), step=step_of(scheduler), noise=Fresh(3))
    worst = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert worst < 1e-5, worst


def test_grids_end_where_the_scheduler_does():
    assert grid_of(diffusers.DDIMScheduler(steps_offset=1), 4).tolist() == [752, 502, 252, 2, 0]
    assert grid_of(diffusers.DDIMScheduler(set_alpha_to_one=False), 4).tolist() == [751, 501, 251, 1, 1]
    euler = diffusers.EulerDiscreteScheduler(final_sigmas_type="sigma_min", timestep_spacing="trailing")
    assert grid_of(euler, 2).tolist() == [1000, 500, 1]
    flow = grid_of(diffusers.FlowMatchEulerDiscreteScheduler(), 3, sigmas=[1.0, 0.5, 0.25])
    assert flow.tolist() == [1, 0.5, 0.25, 0]


def test_flow_schedulers_of_other_names():
    """As Wan is published: UniPC on a flow."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert path_of(scheduler) == Flow()
    assert prediction_of(scheduler) == "velocity"
    grid = grid_of(scheduler, 4)
    assert len(grid) == 5
    assert grid[-1] == 0
    torch.testing.assert_close(grid, torch.tensor([0.9997, 0.9, 0.75, 0.5, 0]).double(), atol=5e-3, rtol=0)


def test_a_configuration_is_as_good_as_a_scheduler():
    config = {"_class_name": "DDIMScheduler", **SD, "rescale_betas_zero_snr": True}
    made = path_of(config)
    expected = VP.of("scaled_linear", 1000, 0.00085, 0.012, zero_snr=True)
    at = torch.tensor([1.0, 250, 999, 1000])
    torch.testing.assert_close(made.coef(at)[0], expected.coef(at)[0], atol=1e-5, rtol=1e-5)
    assert float(made.coef(at)[0][-1]) == 0


@pytest.mark.parametrize("path", [VP.of("cosine"), VP.of("linear", zero_snr=True), Flow(), EDM(700.0)])
def test_there_and_back(path):
    back = path_of(scheduler_for(path))
    at = torch.linspace(0, 1, 7, dtype=torch.float64) * path.t_max
    for one, other in zip(path.coef(at), back.coef(at), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert prediction_of(scheduler_for(VP.of(), "v")) == "v"


def test_what_cannot_be_exchanged_is_said():
    with pytest.raises(InputError, match="BrownianBridge"):
        scheduler_for(BrownianBridge())
    with pytest.raises(InputError, match="NoSuchScheduler"):
        scheduler_of({"_class_name": "NoSuchScheduler"})
    assert step_of(diffusers.DDIMScheduler()) == Universal()
