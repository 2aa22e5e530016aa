"""The fit of a network to one video: steps down a schedule until it ends, time is up, or the quality is there."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from frameloom.errors import InputError, Interrupted
from frameloom.metrics.image import ms_ssim, ssim
from frameloom.progress import Progress, silent
from frameloom.training.state import load_more, load_state, read_facts, save_state

_log = logging.getLogger("frameloom.compression")

Loss = Callable[[Tensor, Tensor], Tensor]

KEEP_EVERY = 15.0  # seconds between two saves of a fit's state
BUSY = 0.7  # of one processor; a fit that got less did not have the time that it was given

LOSSES: dict[str, Loss] = {
    "l2": F.mse_loss,
    "fusion6": lambda out, target: 0.7 * F.l1_loss(out, target) + 0.3 * (1 - ssim(out, target)),
    "fusion10": lambda out, target: 0.7 * F.l1_loss(out, target) + 0.3 * (1 - ms_ssim(out, target)),
}


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up from 0.1 over the first tenth, then half a cosine down to 0; `progress` is in [0, 1]."""
    if progress < 0.1:
        return 0.1 + 0.9 * progress / 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def falling(progress: float) -> float:
    """Half a cosine down to 0, without a warm-up."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class State:
    """Where a fit keeps itself, so that a killed one goes on: the stage it is in, its step and its weights.

    A fit may have several stages (a video in groups, a rate stage after the fit), counted from `base` where one fit
    follows another; a stage that the file has left behind is skipped. `more` are tensors that later stages need of
    earlier ones. `about` says which video and which settings the state belongs to.
    """

    path: Path
    about: str
    resume: bool = False
    stage: int = 0
    base: int = 0
    step: int = 0
    elapsed: float = 0.0
    more: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        facts = read_facts(self.path) if self.resume else None
        if facts is None:
            if self.resume:
                _log.warning("--resume: there is no %s; it begins anew", self.path)
            return
        if facts.get("about") != self.about:
            raise InputError(
                f"--resume: {self.path} is of another video or of other settings; delete it, or give those"
            )
        self.stage, self.step, self.elapsed = int(facts["stage"]), int(facts["step"]), float(facts["elapsed"])
        self.more = load_more(self.path)

    def keep(self, stage: int, step: int, elapsed: float, module: nn.Module, optimisers) -> None:
        """Write the state of a stage after `step` steps and `elapsed` seconds of it."""
        facts = {"about": self.about, "stage": str(stage), "step": str(step), "elapsed": repr(elapsed)}
        save_state(self.path, {"module": module}, optimisers, facts, self.more)

    def restore(self, module: nn.Module, optimisers) -> tuple[int, float]:
        """Put the kept weights into place; the steps and seconds that they took."""
        load_state(self.path, {"module": module}, optimisers)
        return self.step, self.elapsed

    def restart(self, **more: Tensor) -> None:
        """From the first stage again, with `more` remembered: the next fit is of another network."""
        self.stage, self.step, self.elapsed = self.base, 0, 0.0
        self.more |= more

    def forget(self) -> None:
        """Remove the file: the fit has ended well."""
        self.path.unlink(missing_ok=True)


def descend(
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    loss_at: Callable[[int], Float[Tensor, ""]],
    *,
    steps: int | None,
    minutes: float | None = None,
    schedule: Callable[[float], float] = learning_rate_factor,
    reached: Callable[[int], bool] | None = None,
    stage: int = 0,
    state: State | None = None,
    seed: int = 0,
    progress: Progress = silent,
    label: str = "fitting",
) -> int:
    """Step after step on `loss_at(step)`, every learning rate times `schedule(share done)`; the steps it came to.

    Ends after `steps` steps (None: only `minutes` counts), after `minutes` by the clock on the wall (the schedule then
    runs by whichever is further along; where others kept the processor busy, it is said), or as soon as
    `reached(steps done)` says so. Step k draws its chance from the seed and k alone, so that with a `state` a killed
    fit goes on to the same weights (unless `minutes` ruled it: no two runs take as long).

    Raises:
        InputError: the loss is no finite number any more; the step is named.
        Interrupted: Ctrl-C; with a `state`, it is saved.
    """
    if state is not None:
        stage += state.base
    rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    done, before = 0, 0.0
    if state is not None and state.resume:
        if state.stage > stage:
            return steps or 0
        if state.stage == stage and state.step:
            done, before = state.restore(module, optimisers)
    # A stage that had ended before the kill stays so, and one that is good enough as it starts takes no step.
    if reached is not None and reached(done):
        return done
    begun = kept = time.monotonic()
    worked = time.process_time()
    module.train()
    try:
        with torch.random.fork_rng(devices=[]):
            while steps is None or done < steps:
                elapsed = before + time.monotonic() - begun
                share = 0.0 if steps is None else done / steps
                if minutes is not None:
                    share = max(share, elapsed / (60 * minutes))
                    if share >= 1:
                        break
                for optimiser, own in zip(optimisers, rates, strict=True):
                    for group, rate in zip(optimiser.param_groups, own, strict=True):
                        group["lr"] = rate * schedule(share)
                torch.manual_seed(seed * 1_000_003 + done)
                value = loss_at(done)
                if not math.isfinite(value.item()):
                    raise InputError(f"the loss is NaN or infinite at step {done + 1}; use a lower learning rate, such "
                                     f"as --set learning_rate={rates[0][0] / 10:.1g}")  # fmt: skip
                for optimiser in optimisers:
                    optimiser.zero_grad(set_to_none=True)
                value.backward()
                for optimiser in optimisers:
                    optimiser.step()
                done += 1
                progress(label, done, steps)
                if state is not None and time.monotonic() - kept > KEEP_EVERY:
                    kept = time.monotonic()
                    state.keep(stage, done, before + kept - begun, module, optimisers)
                if reached is not None and reached(done):
                    break
    except KeyboardInterrupt:
        # The step that was under way may have changed some weights: what was kept before it is whole.
        raise Interrupted(stopped(state)) from None
    module.eval()
    seconds, worked = time.monotonic() - begun, time.process_time() - worked
    if minutes is not None and worked < BUSY * seconds and next(module.parameters()).device.type == "cpu":
        _log.warning("%s: the machine was busy: %.0f s of processor time in %.0f s by the clock, which --minutes "
                     "counts; --epochs does not depend on that", label, worked, seconds)  # fmt: skip
    if state is not None:
        state.keep(stage, done, before + seconds, module, optimisers)
    return done


def stopped(state: State | None) -> str:
    """What to tell whoever stopped it."""
    if state is None or not state.path.is_file():
        return "stopped; nothing was written"
    return f"stopped; the same command with --resume goes on from {state.path}"


class Shuffled:
    """The batches of every epoch, shuffled by the seed and the epoch; the last incomplete batch is left out.

    A clip shorter than a batch is one batch.
    """

    def __init__(self, frames: UInt8[Tensor, "t 3 h w"], batch: int, seed: int, device: torch.device) -> None:
        self.frames, self.batch, self.seed, self.device = frames, min(batch, len(frames)), seed, device
        self.steps = len(frames) // self.batch

    def __call__(self, step: int) -> tuple[Tensor, Float[Tensor, "b 3 h w"]]:
        """Frame numbers and pictures in [0, 1] of a step."""
        epoch, within = divmod(step, self.steps)
        order = torch.randperm(len(self.frames), generator=torch.Generator().manual_seed(self.seed + 7919 * epoch))
        index = order[within * self.batch : (within + 1) * self.batch]
        pictures = self.frames[index].to(self.device).float().div(255)
        return index.to(self.device), pictures.contiguous(memory_format=torch.channels_last)


def fit(
    network: nn.Module,
    frames: UInt8[Tensor, "t 3 h w"],
    *,
    epochs: int | None = 300,
    minutes: float | None = None,
    batch: int = 2,
    learning_rate: float | int = 1e-3,
    optimiser: type[torch.optim.Optimizer] | None = None,
    slow: nn.Module | None = None,
    loss: str | Loss = "l2",
    seen: Float[Tensor, "t 1 h w"] | None = None,
    seed: int = 0,
    mixed: bool = False,
    reached: Callable[[int], bool] | None = None,
    stage: int = 0,
    state: State | None = None,
    progress: Progress = silent,
    label: str = "fitting",
) -> int:
    """Train `network` in place, on its own device, so that `network(index, pictures)` returns `pictures`.

    `index` is (b,) frame numbers and `pictures` (b, 3, h, w) in [0, 1]. The same seed gives the same weights, unless
    `minutes` ends the fit. Returns the steps it came to.

    Args:
        epochs: passes over the clip; None where `minutes` alone says when it ends.
        optimiser: Adam without weight decay for None.
        slow: a part of the network that learns at a tenth of the rate.
        loss: a name in `LOSSES`, or a function of what was drawn and what should have been.
        seen: 1 where a pixel counts; what is hidden is drawn as the network likes.
        mixed: run the network in bfloat16 where autocast allows it; the loss is always float32.
        reached: asked after every epoch, with the steps done; the fit ends when it says so.

    Raises InputError when the loss is no longer finite.
    """
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs {epochs}: a fit takes 1 epoch or more")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"--minutes {minutes:g}: a fit takes a time above 0")
    if epochs is None and minutes is None:
        raise ValueError("a fit ends by epochs, by minutes or by both")
    if isinstance(loss, str) and loss not in LOSSES:
        raise InputError(f"--loss {loss}: there are {', '.join(LOSSES)}")
    measure = LOSSES[loss] if isinstance(loss, str) else loss
    device = next(network.parameters()).device
    batches = Shuffled(frames, batch, seed, device)
    made = optimiser or (lambda weights, lr: torch.optim.Adam(weights, lr, betas=(0.9, 0.999), fused=True))

    behind = set() if slow is None else set(slow.parameters())
    groups = [{"params": [weight for weight in network.parameters() if weight not in behind]}]
    if behind:
        groups.append({"params": list(slow.parameters()), "lr": learning_rate / 10})

    def loss_at(step: int) -> Tensor:
        index, pictures = batches(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            out = network(index, pictures)
        out = out.float()
        if seen is not None:
            counts = seen[index.cpu()].to(device)
            out, pictures = out * counts, pictures * counts
        return measure(out, pictures)

    return descend(
        network,
        [made(groups, learning_rate)],
        loss_at,
        steps=None if epochs is None else batches.steps * epochs,
        minutes=minutes,
        reached=None if reached is None else lambda done: done % batches.steps == 0 and reached(done),
        stage=stage,
        state=state,
        seed=seed,
        progress=progress,
        label=label,
    )
