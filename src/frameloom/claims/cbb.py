"""CBB: a bridge from one neighbour to the middle draws nearly the same frame each time; diffusion from noise does not."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.claims.base import Result
from frameloom.claims.vfimamba import held_out
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Plain
from frameloom.diffusion.paths import SteppedBridge
from frameloom.diffusion.run import sample
from frameloom.diffusion.step import Fresh, Universal, ancestral_share
from frameloom.progress import Progress
from frameloom.tasks.interpolation.blend import Blend
from frameloom.tasks.interpolation.cbb import CBB, STEPS, aligned
from frameloom.tasks.interpolation.dis import DIS
from frameloom.tasks.interpolation.triplets import Curriculum, Triplets
from frameloom.training import Recipe, load, train
from frameloom.training.loop import fit

# Each U-Net learns from the same latents of the shipped encoder, from the same fresh start.
TRIPLETS = 384
RECIPE = Recipe(steps=1500, batch_size=8, lr=1e-3, final_lr=2e-5, ema=0.995, bf16=True)
CROP = 96
SPEED = 12.0
CLIPS = 12
SEEDS = 8


class _Latents:
    """Latents of many triplets, a batch of them drawn again and again: the same draw for every objective."""

    def __init__(self, model: CBB, seed: int, progress: Progress) -> None:
        world = Triplets(CROP, seed, Curriculum(start=8, end=24))
        parts = []
        for begin in range(0, TRIPLETS, 8):
            made = world.batch(list(range(begin, begin + 8)), begin / TRIPLETS)
            with torch.inference_mode():
                parts.append(torch.cat([model.encode(made["pair"])[0], model.encoder(made["middle"])[0][:, None]], 1))
            progress("triplets", begin + 8, TRIPLETS)
        self.latents = torch.cat(parts).clone()

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """`latents` (b, 3, c, h, w): before, after and middle."""
        rows = torch.randint(len(self.latents), (len(indices),), generator=torch.Generator().manual_seed(indices[0]))
        return {"latents": self.latents[rows]}


def _loss(model: CBB, batch: dict[str, Tensor]) -> Tensor:
    before, after, middle = batch["latents"].unbind(1)
    return model.latent_loss(middle, before, after)


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Two U-Nets of one size and budget between the same encoder and decoder: the bridge, and DDPM from noise."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        shipped = load("cbb", train("cbb", Path(folder) / "own", seed=seed, progress=progress) if retrain else None)
        data = _Latents(shipped, seed, progress)
        arms = {}
        for objective in ("bridge", "ddpm"):
            torch.manual_seed(seed)
            arm = CBB(replace(shipped.config, objective=objective))
            for part in ("encoder", "codebook", "decoder", "sketch"):
                setattr(arm, part, copy.deepcopy(getattr(shipped, part)).requires_grad_(False))
            arms[objective], _ = fit(arm, data, RECIPE, Path(folder) / objective, loss=_loss, label=objective,
                                     seed=seed, progress=progress)  # fmt: skip
    pairs, middles = held_out(seed, SPEED)
    pairs, middles = pairs[:CLIPS], middles[:CLIPS]
    scene = _Scene(shipped, pairs, middles)
    ways = {"bridge": ("bridge", 1.0), "ddpm, ancestral": ("ddpm", 1.0), "ddpm, ddim": ("ddpm", 0.0)}
    figures = {name: scene.figures(arms[arm], eta) for name, (arm, eta) in ways.items()}
    rows = [{"name": name, "frame": f"{decibels:.2f} dB", "std over seeds": f"{255 * spread:.3f} of 255",
             "latent": f"{latent:.3f} off, std {deviation:.3f}"}
            for name, (decibels, spread, latent, deviation) in figures.items()]  # fmt: skip
    whole = scene.figures(shipped, 1.0, seeds=1)[0]
    for name, made in {"blend": Blend().between, "dis": DIS().between}.items():
        rows.append({"name": name, "frame": f"{scene.decibels([made(*pair)(0.5) for pair in pairs]):.2f} dB"})
    rows.append({"name": "cbb as shipped", "frame": f"{whole:.2f} dB"})
    best = max(figures["ddpm, ancestral"][0], figures["ddpm, ddim"][0])
    gain, ratio = figures["bridge"][0] - best, figures["bridge"][1] / figures["ddpm, ancestral"][1]
    return Result(
        "cbb",
        paper="cumulative variance of 2 against 11 for DDPM; the best LPIPS and FID on four test sets",
        setting=f"U-Nets of {RECIPE.steps} steps on {TRIPLETS} world triplets, {CLIPS} held-out scenes, largest motion "
        f"{SPEED:g} px, {STEPS} steps of sampling, {SEEDS} seeds, seed {seed}",
        rows=rows,
        checks={"variance of 1.817 and 1.942": variance(shipped), "marginals": marginals(shipped),
                "an oracle's answer for any seed and steps": oracle(shipped), "start without chance": start(shipped),
                "some chance remains": figures["bridge"][1] > 0},
        holds=gain >= 0.5 and ratio <= 0.5,
        summary=f"std over seeds {ratio:.2f} of ancestral ddpm's (needs <= 0.5), {gain:+.2f} dB over the better of its "
        "samplers (needs >= 0.5)",
    )  # fmt: skip


class _Scene:
    """Held-out pairs, aligned and encoded once."""

    def __init__(self, model: CBB, pairs: Float[Tensor, "n 2 3 h w"], middles: Float[Tensor, "n 3 h w"]) -> None:
        self.middles = middles
        warped, motion = zip(*(aligned(*pair) for pair in pairs), strict=True)
        self.warped, self.motion = torch.stack(warped), torch.stack(motion)
        with torch.inference_mode():
            self.neighbours, self.features = model.encode(pairs)
            self.true, _ = model.encoder(middles)

    @torch.inference_mode()
    def figures(self, model: CBB, eta: float, seeds: int = SEEDS) -> tuple[float, float, float, float]:
        """Mean PSNR, deviation of the frame over seeds, mean error of the latent and its deviation over seeds."""
        latents = torch.stack([model.sample_latent(*self.neighbours.unbind(1), STEPS, s, eta) for s in range(seeds)])
        frames = torch.stack([
            model.decoder(model.codebook(latent)[0], self.neighbours, self.features, self.warped, self.motion)
            for latent in latents
        ]).clamp(0, 1)  # fmt: skip
        deviations = [float(x.var(0).mean().sqrt()) if seeds > 1 else 0.0 for x in (frames, latents)]
        off = float((latents - self.true).square().mean().sqrt())
        return mean(self.decibels(list(made)) for made in frames), deviations[0], off, deviations[1]

    def decibels(self, made: list[Tensor]) -> float:
        """Mean PSNR of one frame a pair."""
        errors = torch.stack([(a - b).square().mean() for a, b in zip(made, self.middles, strict=True)])
        return float((-10 * errors.log10()).mean())


def variance(model: CBB) -> bool:
    """What 50 and 200 steps add in noise, summed."""
    found = []
    for steps in (50, 200):
        grid, path = model.grid(steps), model.path
        found.append(float((ancestral_share(path, grid[:-1], grid[1:]) * path.coef(grid[1:])[2]).square().sum()))
    return abs(found[0] - 1.817) < 1e-3 and abs(found[1] - 1.942) < 1e-3


def marginals(model: CBB) -> bool:
    """20,000 chains with an oracle have the mean and the deviation of the closed form at every step."""
    path, grid = SteppedBridge(), model.grid(STEPS)
    data, end = torch.full((1, 1, 1, 100, 200), 1.5), torch.full((1, 1, 1, 100, 200), -0.5)
    begin = path.add_noise(data, grid[:1], torch.randn(data.shape, generator=torch.Generator().manual_seed(0)), end)
    right = []

    def look(run, x: Tensor) -> None:
        a, b, c = (float(value) for value in path.coef(run.s[0]))
        right.append(abs(float(x.mean()) - 1.5 * a + 0.5 * b) < 0.025 and abs(float(x.std()) - c) < 0.02)

    oracle = Plain(lambda x, t, cond: data, path, "data", Latent(1, 1, 100, 200))
    sample(oracle, begin, grid, Cond(), step=Universal(eta=1.0), noise=Fresh(1), y=end, callback=look)
    return all(right)


def oracle(model: CBB) -> bool:
    """A network that knows the middle's latent gives it, bit for bit."""
    data, end = torch.randn(2, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    knowing = Plain(lambda x, t, cond: data, SteppedBridge(), "data", Latent(3, 1, 8, 8))
    made = [
        sample(knowing, end, model.grid(steps), Cond(), step=Universal(eta=1.0), noise=Fresh(seed), y=end)[0]
        for steps, seed in ((3, 0), (50, 1), (200, 2))
    ]
    return all(torch.equal(x, data) for x in made)


def start(model: CBB) -> bool:
    """Two seeds begin at one place, the latent of the frame after, and part on the way."""
    before, after = torch.randn(2, 1, model.config.latent, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: list[Tensor] = []
    spy = copy.copy(model)
    spy.predict = lambda noisy, *rest: asked.append(noisy) or torch.zeros_like(noisy)
    for seed in (0, 1):
        spy.sample_latent(before, after, 3, seed)
    return torch.equal(asked[0], after) and torch.equal(asked[3], after) and not torch.equal(asked[1], asked[4])
