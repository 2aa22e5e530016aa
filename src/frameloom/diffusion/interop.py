"""To and from diffusers' schedulers: the path of one, the times at which it would stop, the solver that it is.

A scheduler's training index i is time i + 1 of a VP path; its sigmas are the times of EDM and flow paths.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frameloom.diffusion.paths import EDM, VP, Flow, Path
from frameloom.diffusion.step import DPMpp2M, Heun, Step, Universal
from frameloom.errors import InputError

_KINDS = {"epsilon": "noise", "sample": "data", "v_prediction": "v", "flow_prediction": "velocity"}


def scheduler_of(config: Any) -> Any:
    """A scheduler from its configuration: a dictionary with `_class_name`, or one that is ready already (a new one)."""
    import diffusers

    if not isinstance(config, Mapping):
        return type(config).from_config(config.config)
    name = config.get("_class_name", "DDPMScheduler")
    made = getattr(diffusers, name, None)
    if made is None or not hasattr(made, "set_timesteps"):
        raise InputError(f"scheduler {name}: not one of diffusers {diffusers.__version__}")
    return made.from_config(dict(config))


def path_of(scheduler: Any) -> Path:
    """The path on which a scheduler's model was trained; `scheduler` may be its configuration."""
    made = scheduler_of(scheduler)
    config = made.config
    if _is_flow(made):
        return Flow()
    if _is_edm(made):
        return EDM(t_max=float(config.sigma_max or made.sigmas.max()))
    if not hasattr(made, "alphas_cumprod"):
        raise InputError(f"scheduler {type(made).__name__}: neither a VP, an EDM nor a flow schedule")
    return VP.from_abar(made.alphas_cumprod)


def prediction_of(scheduler: Any) -> str:
    """What the scheduler takes its model to predict, as `to_prediction` names it."""
    made = scheduler_of(scheduler)
    if type(made).__name__.startswith("FlowMatch"):
        return "velocity"
    kind = made.config.get("prediction_type", "epsilon")
    if kind not in _KINDS:
        raise InputError(f"prediction_type {kind}: this must be one of {', '.join(_KINDS)}")
    return _KINDS[kind]


def grid_of(scheduler: Any, n: int, **options: Any) -> Tensor:
    """The `(n + 1,)` times, float64, at which a scheduler of `n` steps stops.

    They end at 0, the data, or at 1, the first index, where the scheduler does so (`set_alpha_to_one=False`,
    `final_sigmas_type="sigma_min"`). DDIM's steps are taken to end where the next one begins; diffusers' own jump by
    `steps // n`, which is the same only where the spacing is even.

    Args:
        options: what else `set_timesteps` takes (`mu`, `sigmas`).
    """
    made = scheduler_of(scheduler)
    try:
        made.set_timesteps(**({} if "sigmas" in options else {"num_inference_steps": n}), **options)
    except ValueError as error:
        raise InputError(f"--steps {n}: {error}") from None
    if _is_flow(made) or _is_edm(made):
        return torch.unique_consecutive(made.sigmas.double())
    path, indices = path_of(made), torch.unique_consecutive(made.timesteps.double().cpu())
    sigmas = getattr(made, "sigmas", None)
    if sigmas is not None and bool((indices != indices.round()).any()):  # between two indices: the noise says where
        return torch.cat([path.t_of_lam(1 / sigmas[:-1].double().unique_consecutive()), _end(made)])
    return torch.cat([indices + 1, _end(made)])


def _end(scheduler: Any) -> Tensor:
    at_first = scheduler.config.get("final_sigmas_type", "zero") == "sigma_min"
    # A consistency model's last step is its estimate, whatever its configuration says.
    if type(scheduler).__name__ != "LCMScheduler" and not scheduler.config.get("set_alpha_to_one", True):
        at_first = True
    return torch.tensor([float(at_first)], dtype=torch.float64)


def start_of(scheduler: Any, n: int) -> float:
    """What unit noise is multiplied with to start a run of `n` steps on the path of the scheduler."""
    made = scheduler_of(scheduler)
    if _is_flow(made):
        return 1.0
    made.set_timesteps(n)
    scale = float(getattr(made, "init_noise_sigma", 1.0))
    # Schedulers of sigmas start in x / a of a VP path.
    shrunk = hasattr(made, "is_scale_input_called") or type(made).__name__.startswith("Heun")
    return scale if _is_edm(made) or not shrunk else scale / (1 + float(made.sigmas[0]) ** 2) ** 0.5


def step_of(scheduler: Any) -> Step:
    """The solver that a scheduler is. Those that have no equal here are taken by DPM-Solver++ (2M).

    `clip_sample` and `thresholding` are not taken over: they are for pixels, not for latents.
    """
    made = scheduler_of(scheduler)
    name = type(made).__name__
    if name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler"):
        return Universal(eta=1.0)
    if name == "LCMScheduler":
        return Universal(r=1.0)
    if name.startswith("Heun"):
        return Heun()
    if "Euler" in name or "DDIM" in name:
        return Universal()
    return DPMpp2M()


def scheduler_for(path: Path, kind: str = "") -> Any:
    """A diffusers scheduler of this path: DDIM, FlowMatchEuler or (for EDM, of v) EulerDiscrete.

    Args:
        kind: what the model predicts; noise, velocity or v when not said.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    if isinstance(path, Flow):
        return FlowMatchEulerDiscreteScheduler()
    if isinstance(path, EDM):
        return EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
            sigma_max=path.t_max, timestep_spacing="leading", steps_offset=1)  # fmt: skip
    if not isinstance(path, VP):
        raise InputError(f"diffusers has no scheduler for the path {type(path).__name__}")
    abar = torch.tensor(path.abar, dtype=torch.float64)
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    said = {ours: theirs for theirs, ours in _KINDS.items()}[kind or "noise"]
    return DDIMScheduler(
        num_train_timesteps=len(abar), trained_betas=betas.tolist(), prediction_type=said, clip_sample=False,
        timestep_spacing="trailing")  # fmt: skip


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
    return flow or type(scheduler).__name__.startswith("FlowMatch")


def _is_edm(scheduler: Any) -> bool:
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return continuous or type(scheduler).__name__.startswith("EDM")
