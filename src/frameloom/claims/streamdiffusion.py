"""StreamDiffusion: the same frames from one launch each, guidance without its price, rest when nothing moves."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from frameloom.claims.base import Result
from frameloom.diffusion.generator import Generator, open_generator
from frameloom.progress import Progress
from frameloom.tasks.editing.base import GUIDANCE, Live, Settings, indices
from frameloom.tasks.editing.sequential import Sequential
from frameloom.tasks.editing.streamdiffusion import Gate, Stream
from frameloom.training.pretrained import digest, shipped
from frameloom.world import World, WorldDataset
from frameloom.world.captions import CaptionedClips

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
STEPS = 4
FRAMES = 32
# Frames of each part of the clip for the gate: motion, pause, motion.
MOTION, PAUSE = 60, 50


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Stream against sequential on one model, residual guidance against none, the gate on a clip with a pause.

    The model is the shipped one that follows words, or the shipped digits where that is missing. Nothing is trained.
    """
    torch.manual_seed(seed)
    name = "stiv" if shipped("stiv") else "digits-16"
    model = open_generator(name)
    pictures, prompts = requests(model, name, seed)
    t_index = indices(0.8, STEPS)
    # Full guidance as strong as the model has it; residual guidance at the paper's usual 1.2.
    w = dict.fromkeys(GUIDANCE, 1.2) | {"full": model.defaults.guidance}

    rows, checks = [], {}
    gaps = dict.fromkeys(GUIDANCE, 0.0)
    for prompt in prompts:
        found: dict[str, Tensor] = {}
        for guidance in reversed(GUIDANCE):
            settings = Settings(t_index=t_index, guidance=guidance, w=w[guidance], seed=seed)
            stream, alone = (kind(model, prompt, settings) for kind in (Stream, Sequential))
            found[guidance], expected = restyled(stream, pictures), restyled(alone, pictures)
            apart = float((found[guidance] - expected).abs().max())
            gaps[guidance] += float((found[guidance] - found["full"]).square().mean()) / len(prompts)
            checks |= _counts(guidance, stream, alone)
            checks[f"{guidance} equals sequential"] = checks.get(f"{guidance} equals sequential", True) and apart < 1e-5
            progress("restyling", len(checks) // 2, len(GUIDANCE))
            if prompt == prompts[-1]:
                each = stream.report.evaluations / FRAMES
                rows.append(
                    {"name": f"guidance {guidance}", "from sequential": f"{apart:.0e}", "evaluations": f"{each:g}"}
                )
    for row, guidance in zip(rows, reversed(GUIDANCE), strict=True):
        row |= {"to full (mean square)": f"{gaps[guidance]:.5f}"}
    nearer = {guidance: gaps[guidance] < gaps["none"] for guidance in ("self", "onetime")}

    seconds = _race(model, prompts[0], pictures, t_index, seed)
    faster = seconds["sequential"] / seconds["streamdiffusion"]
    rows += [{"name": name, f"ms a frame, n = {STEPS}": f"{1000 * value:.1f}"} for name, value in seconds.items()]

    slow, fast = gate_on_a_pause("flyover", seed), gate_on_a_pause("motion", seed)
    for kind, (moving, paused) in {"slow camera": slow, "fast bodies": fast}.items():
        rows.append({"name": f"gate, {kind}", "skipped in the pause": f"{paused:.0%}", "in motion": f"{moving:.0%}"})
    checks["the gate rests in a pause"] = min(slow[1], fast[1]) > 0.8
    checks["the gate lets motion through"] = max(slow[0], fast[0]) < 0.05
    checks["the gate skips as often as its formula says"] = gate_follows_its_formula(seed)
    notes = [f"{guidance} is not nearer to full guidance than none" for guidance, so in nearer.items() if not so]
    if slow[0] >= 0.05:
        notes.append(f"of slow motion the gate skips {slow[0]:.0%}: neighbours there are more alike than its threshold")
    return Result(
        "streamdiffusion",
        paper="stream batch about 1.5x over sequential denoising; residual guidance up to 2.05x over classifier-free",
        setting=f"{model.name} {digest(model)}, {FRAMES} frames to each of "
        f"{', '.join(prompts)}; steps {t_index} of 50, w = {w['full']:g} (full) and 1.2, seed {seed}, "
        f"{torch.get_num_threads()} threads",
        rows=rows,
        checks=checks,
        holds=all(nearer.values()) and faster > 1,
        summary=f"{faster:.2f}x the speed of sequential (needs > 1); to full guidance self "
        f"{gaps['self'] / gaps['none']:.2f} and onetime {gaps['onetime'] / gaps['none']:.2f} of none (needs < 1)",
        notes=notes,
    )


def _counts(guidance: str, stream: Live, alone: Live) -> dict[str, bool]:
    price = {"full": 2 * STEPS, "onetime": STEPS + 1}.get(guidance, STEPS)
    right = (
        stream.report.evaluations == alone.report.evaluations == price * FRAMES
        and alone.report.launches == STEPS * FRAMES
        # One a frame, and those that empty the slots at the end.
        and stream.report.launches == FRAMES + STEPS - 1
    )
    return {f"{guidance}: {price} evaluations and 1 launch a frame": right}


def requests(model: Generator, name: str, seed: int) -> tuple[Tensor, list[str]]:
    """Frames `(n, 3, h, w)` to restyle, and the prompts: other classes, or other colours of other shapes."""
    if name == "stiv":
        data = WorldDataset("toys", 1, model.height, model.width, 900_000 + seed, FRAMES, count=1, supersample=2)
        return CaptionedClips(data).read(range(FRAMES))[0][:, 0], [
            "a large blue ball",
            "a small red box",
            "a green ball",
        ]
    from frameloom.tasks.generation.data import digits

    return digits("digits", model.height, seed).batch(list(range(FRAMES)), 0.0)["video"][:, 0], ["3", "7", "8"]


def restyled(live: Live, pictures: Iterable[Tensor]) -> Tensor:
    """The finished latents of all frames, `(n, 1, c, h, w)`: before the decoder clips anything."""
    made = [latent for picture in pictures for latent in live.advance(live.enter(picture))]
    return torch.cat(made + live.finish())


def _race(model: Generator, prompt: str, pictures: Tensor, t_index: tuple[int, ...], seed: int) -> dict[str, float]:
    """Seconds a frame of both, the best of five turns each; the filling of the slots is counted."""
    settings = Settings(t_index=t_index, guidance="none", seed=seed)
    best: dict[str, float] = {}
    for _ in range(5):
        for name, kind in (("sequential", Sequential), ("streamdiffusion", Stream)):
            live = kind(model, prompt, settings)
            begun = time.perf_counter()
            restyled(live, pictures)
            best[name] = min(best.get(name, 1e9), (time.perf_counter() - begun) / len(pictures))
    return best


def gate_on_a_pause(kind: str, seed: int) -> tuple[float, float]:
    """Shares of frames skipped while a scene moves and while it stands still (with the noise of a sensor)."""
    flight = World(kind, [seed], frames=2 * MOTION).render(64, 64)["rgb"][0]
    still = flight[MOTION - 1 : MOTION].expand(PAUSE, -1, -1, -1)
    clip = torch.cat([flight[:MOTION], still, flight[MOTION:]])
    clip = clip + torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed)) / 255
    gate = Gate(seed=seed)
    skipped = torch.tensor([gate.skips(picture) for picture in clip]).float()
    pause = slice(MOTION, MOTION + PAUSE)
    paused = float(skipped[pause].mean())
    return float((skipped.sum() - skipped[pause].sum()) / (2 * MOTION)), paused


def gate_follows_its_formula(seed: int, count: int = 1000) -> bool:
    """At three similarities, the share of `count` seeds at which a frame is skipped, within 3 sigma."""
    for cosine in (0.985, 0.99, 0.997):
        first = torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1)
        second = torch.tensor([cosine / 2 + 0.5, (1 - cosine**2) ** 0.5 / 2 + 0.5, 0.5]).view(3, 1, 1)
        p = (cosine - 0.98) / 0.02
        skipped = 0
        for number in range(count):
            gate = Gate(seed=1000 * seed + number)
            gate.reference = first
            skipped += gate.skips(second)
        if abs(skipped - count * p) > 3 * (count * p * (1 - p)) ** 0.5:
            return False
    return True
