"""Fast full-frame stabilisation: a steady video at the recorded field of view, without crop and without black border.

For handheld footage. Every frame pair has a flow F and a confidence in it; three stages use the two.

    coarse   m_t    = argmin sum conf |F_t - (M(m) p - p)|^2, robustly; the path sum m is smoothed until it rests:
                      V_{k+1} = S(V_k), stop where the mean correction is below 0.5 px or falls by less than 5%
    fine     b      = argmin sum conf |acceleration of what is seen at q_t = C_t p + b_t(C_t p)|^2 + spread(b)
                      over 10x10 warp fields b_t of 20 frames, both ends held; windows overlap by half and cross-fade
    full     I(q)   = I_j(A_kj (p + f(p))), p = the recorded place of q; where p lies outside frame k, the flow f to
                      frame j is outpainted by a network: gated convolutions at 32x64, then residual ones at a quarter

The recorded frames are sampled once, through the composition of all warps. The published system regresses m and b by
networks too; here they are solved for, from the same losses, and the network that ships is the outpainting one.

W. Zhao, X. Li, Z. Peng, X. Luo, X. Ye, H. Lu, Z. Cao, Fast Full-frame Video Stabilization with Iterative Optimization,
ICCV 2023, arXiv 2307.12774.
"""

from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.motion.consistency import confidence
from frameloom.motion.similarity import (
    fit_similarity,
    matrix,
    path_of,
    rescaled,
    shift_of,
    similarity_flow,
    smooth,
)
from frameloom.motion.warp import backward_warp
from frameloom.tasks.stabilization.base import dis
from frameloom.tasks.stabilization.outpainting import Fields, Gated, Hourglass, Residual, sized
from frameloom.tasks.stabilization.places import apply, array, enlarged, inside, lattice, sample
from frameloom.tasks.stabilization.warps import solve_fields
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized

REST, SLOW, ROUNDS = 0.5, 0.95, 5  # of the fixed point: pixels, ratio of two rounds, rounds at most
ALIKE = 0.1  # brightness by which a pixel may change between two frames
TRUST = 0.05  # share of confident pixels below which a pair has no motion of its own
DISTANCES = (2, 5, 9, 14, 20)  # frames to either side that may fill a border
FEATHER = 8  # pixels over which the recorded picture fades into what fills its border


@dataclass(frozen=True, kw_only=True)
class Config:
    """`width`: channels of the outpainting networks' outer level. `side`: longest side at which flow is estimated.

    `window`, `grid`: frames and nodes a side of the fine stage. `spread`, `hold`: weights that keep a warp field even
    and small against accelerations of a pixel a frame squared.
    """

    width: int
    side: int = 384
    window: int = 20
    grid: int = 10
    spread: float = 0.05
    hold: float = 0.01


PRESETS = {"tiny": Config(width=8), "paper": Config(width=16, side=720)}
RECIPES = {
    "tiny": Recipe(steps=3000, batch_size=8, lr=2e-3, final_lr=2e-5, ema=0.998),
    "paper": Recipe(steps=200_000, batch_size=16, lr=1e-4, warmup=1000),
}


class FastStab(Sized, nn.Module):
    """The stabiliser; its parameters are those of the two outpainting networks. `flow` is its estimator of flow."""

    id, presets, recipes = "fast-stab", PRESETS, RECIPES

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.reach, self.flow = config, max(config.window, DISTANCES[-1]), dis
        self.low = Hourglass(3, config.width, Gated, pool=5)
        self.high = Hourglass(5, config.width, Residual, pool=7)

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Fields:
        """Training data; only the synthetic world has exact flow outside a picture."""
        cls.preset(size)
        cls.needs_world(source, "exact flow beyond a picture's edge")
        return Fields(seed)

    def stages(
        self, flow: Float[Tensor, "b 2 h w"], known: Float[Tensor, "b 1 h w"]
    ) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b 2 h w"], Float[Tensor, "b 1 1 1"]]:
        """The low and the full answer in units of the last thing returned, the root mean square of the known flow."""
        seen = flow * known
        unit = (seen.square().sum((1, 2, 3)) / known.sum((1, 2, 3)).clamp(min=1)).sqrt()[:, None, None, None] + 0.1
        given = torch.cat([seen / unit, known], 1)
        low = sized(self.low(sized(given, (32, 64))), flow.shape[-2:])
        return low, low + self.high(torch.cat([low, given], 1)), unit

    def outpaint(self, flow: Float[Tensor, "b 2 h w"], known: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 2 h w"]:
        """The flow where `known` is 1, continued to everywhere, in pixels: a similarity, and what the network adds."""
        base = similarity_flow(fit_similarity(flow, known), *flow.shape[-2:]).to(flow.dtype)
        _, full, unit = self.stages(flow - base, known)
        return known * flow + (1 - known) * (base + full * unit)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """End-point errors of the low and of the full answer, and of the full one outside once more.

        `batch`: `flow` (b, 2, h, w) true everywhere, `given` (b, 2, h, w) as an estimator would see it, `known`
        (b, 1, h, w) where it would.
        """
        low, full, unit = self.stages(batch["given"], batch["known"])
        errors = [torch.linalg.vector_norm(made - batch["flow"] / unit, dim=1) for made in (low, full)]
        outside = 1 - batch["known"][:, 0]
        return errors[0].mean() + errors[1].mean() + (errors[1] * outside).sum() / outside.sum().clamp(min=1)

    def small(self, picture: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h2 w2"]:
        """The picture at the size at which flow is estimated."""
        height, width = picture.shape[-2:]
        factor = self.config.side / max(height, width)
        if factor >= 1:
            return picture
        return F.interpolate(picture[None], size=(round(height * factor), round(width * factor)), mode="area")[0]

    def flows(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The flows (1, 2, h, w) there and back, and the confidence (1, 1, h, w) in each."""
        there, back = self.flow(first, second)[None], self.flow(second, first)[None]
        return there, back, confidence(there, back), confidence(back, there)

    def motion(self, first: Float[Tensor, "3 h w"], second: Float[Tensor, "3 h w"]) -> np.ndarray | None:
        """(x, y, angle, log scale) of what most of the picture does; None where nothing can be followed."""
        one, two = self.small(first), self.small(second)
        there, _, trust, _ = self.flows(one, two)
        # A flow into a blank or another picture is consistent by chance, but what it points at looks otherwise.
        error = (backward_warp(two[None], there)[0] - one).mean(1, keepdim=True)
        trust = trust * torch.exp(error.square() / (-2 * ALIKE**2))
        if float((trust > 0.5).float().mean()) < TRUST:
            return None
        fitted = _fit_lattice(there[..., ::4, ::4], trust[..., ::4, ::4], one.shape[-2:])
        return rescaled(fitted, first.shape[-1] / one.shape[-1])

    def shot(self, motions: Float[np.ndarray, "n 4"], sigma: float | int, height: int, width: int) -> "FastShot":
        """The shot with those motions, its path smoothed until it rests."""
        return FastShot(self, path_of(motions), sigma, height, width)


def _fit_lattice(flow: Tensor, weight: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The similarity about the centre of a picture of `size`, of its flow at every fourth pixel."""
    height, width = flow.shape[-2:]
    x, y, angle, scale = rescaled(fit_similarity(flow / 4, weight)[0].cpu().numpy(), 4)
    # From the lattice's centre to the picture's: the linear part moves the difference of the two.
    shift = np.array([(size[1] - 1) / 2 - 2 * (width - 1), (size[0] - 1) / 2 - 2 * (height - 1)])
    cos, sin = np.exp(scale) * np.cos(angle) - 1, np.exp(scale) * np.sin(angle)
    return np.array([x + cos * shift[0] - sin * shift[1], y + sin * shift[0] + cos * shift[1], angle, scale])


def settle(
    path: Float[np.ndarray, "n 4"], sigma: float | int, height: int, width: int
) -> tuple[Float[np.ndarray, "n 4"], list[float]]:
    """The path smoothed again and again until it rests, and the mean correction of every round in pixels."""
    residuals: list[float] = []
    while sigma > 0 and len(residuals) < ROUNDS:
        after = smooth(path, sigma)
        residuals.append(float(shift_of(after - path, height, width).mean()))
        path = after
        if residuals[-1] < REST or (len(residuals) > 1 and residuals[-1] > SLOW * residuals[-2]):
            break
    return path, residuals


class FastShot:
    """Frames between two cuts: their path, their warp fields as they are needed, and the frames drawn by both."""

    def __init__(
        self, model: FastStab, path: Float[np.ndarray, "n 4"], sigma: float | int, height: int, width: int
    ) -> None:
        self.model, self.path, self.size = model, path, (height, width)
        steady, self.residuals = settle(path, sigma, height, width)
        self.correction = steady - path
        self.counts: Counter[str] = Counter()
        self._small: dict[int, Tensor] = {}
        self._pairs: dict[int, tuple] = {}
        self._fields: dict[int, np.ndarray] = {}

    def draw(self, k: int, pictures) -> Float[Tensor, "3 h w"]:
        """Frame k, steady and whole."""
        config = self.model.config
        for store in (self._small, self._pairs):
            for old in [j for j in store if abs(j - k) > self.model.reach + 1]:
                del store[old]
        for old in [start for start in self._fields if not -config.window <= start - k <= config.window]:
            del self._fields[old]
        places = self.places(k, pictures)
        full = enlarged(places, self._place(k, pictures), self.size)
        made, seen = sample(array(pictures(k)), full), inside(full, self.size)
        if not seen.all():
            made = self._filled(k, pictures, places, made, seen)
        return torch.from_numpy(made).permute(2, 0, 1)

    def field(self, k: int, pictures) -> Float[np.ndarray, "g2 2"]:
        """The warp field of frame k: those of the windows it is in, each weighing less towards its ends."""
        config, count = self.model.config, len(self.path)
        hop = config.window // 2
        total, weight = 0.0, 0.0
        for start in range(0, max(1, count - hop), hop):
            stop = min(start + config.window, count)
            if not start <= k < stop or stop - start < 4:
                continue
            if start not in self._fields:
                tracks = [self._tracks(t, pictures) for t in range(start + 1, stop - 1)]
                self._fields[start], _ = solve_fields(
                    tracks, self._place(k, pictures), grid=config.grid, spread=config.spread, hold=config.hold
                )
            share = min(k - start if start else hop, stop - 1 - k if stop < count else hop, hop) + 1e-6
            total, weight = total + share * self._fields[start][k - start], weight + share
        return total / weight if weight else np.zeros((config.grid**2, 2))

    def places(self, k: int, pictures) -> Float[np.ndarray, "h w 2"]:
        """For every pixel of the steady frame, at the size of the flow, its place in the recorded frame k."""
        size, grid = self._place(k, pictures), self.model.config.grid
        field = self.field(k, pictures).astype(np.float32).reshape(grid, grid, 2)
        pixels = lattice(size)

        def bend(at: np.ndarray) -> np.ndarray:
            scaled = at * np.float32([(grid - 1) / (size[1] - 1), (grid - 1) / (size[0] - 1)])
            return cv2.remap(field, scaled, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

        unbent = pixels - bend(pixels - bend(pixels))
        return apply(np.linalg.inv(self._matrix(self.correction[k], size)), unbent)

    def _filled(self, k: int, pictures, places: np.ndarray, made: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """The picture with what lies outside frame k taken from its neighbours, nearest first."""
        size = self._place(k, pictures)
        edge = cv2.distanceTransform(seen.astype(np.uint8), cv2.DIST_L2, 5)
        wanted = edge < FEATHER
        layer, covered = np.zeros_like(made), np.zeros(seen.shape, bool)
        hole = ~inside(places, size)
        for distance in DISTANCES:
            for j in (k - distance, k + distance):
                if not 0 <= j < len(self.path) or not (wanted & ~covered).any():
                    continue
                # Is anything of what is missing in that frame at all, by the camera's motion alone?
                across = self._matrix(self.path[j] - self.path[k], size)
                sees = inside(apply(across, places), size)
                if hole.any() and (sees & hole).sum() < 0.05 * hole.sum():
                    continue
                there, shift = self._across(k, j, pictures, places, across)
                full = enlarged(there, size, self.size)
                fresh = wanted & ~covered & inside(full, self.size)
                layer[fresh] = (sample(array(pictures(j)), full) + shift)[fresh]
                covered |= fresh
                hole &= ~inside(there, size)
        own = np.clip((edge - 1) / FEATHER, 0, 1)
        own = np.where(covered, own, 1)[..., None].astype(np.float32)
        self.counts["filled"] += int((covered & ~seen).sum())
        self.counts["mirrored"] += int((~covered & ~seen).sum())
        return own * made + (1 - own) * layer

    def _across(self, k: int, j: int, pictures, places: np.ndarray, across: np.ndarray):
        """For every pixel of steady frame k its place in recorded frame j, and how much brighter frame k is."""
        one, two = self._at(k, pictures), self._at(j, pictures)
        size = tuple(one.shape[-2:])
        there = apply(across, lattice(size))
        moved = torch.from_numpy(sample(array(two), there)).permute(2, 0, 1).to(one.device)
        flow, _, trust, _ = self.model.flows(one, moved)
        known = inside(there + flow[0].permute(1, 2, 0).cpu().numpy(), size) * trust[0, 0].cpu().numpy()
        sampled = sample(np.dstack([flow[0].permute(1, 2, 0).cpu().numpy(), known]), places, cv2.INTER_LINEAR)
        known = (sampled[..., 2] > 0.5) & inside(places, size)
        quarter = (max(8, size[0] // 4), max(8, size[1] // 4))
        device = next(self.model.parameters()).device
        seen = torch.from_numpy(sampled[..., :2] * known[..., None]).permute(2, 0, 1)[None].to(device)
        mask = torch.from_numpy(known)[None, None].to(device).float()
        share = F.interpolate(mask, size=quarter, mode="area")
        mean = F.interpolate(seen, size=quarter, mode="area") / share.clamp(min=1e-6)
        with torch.inference_mode():
            wide = sized(self.model.outpaint(mean * (share > 0.5), (share > 0.5).float()), size)
        flow = torch.where(mask > 0, seen, wide)[0].permute(1, 2, 0).cpu().numpy()
        target = apply(across, places + flow)
        shift = np.zeros(3, np.float32)
        if known.any():
            gap = sample(array(one), places)[known] - sample(array(two), target)[known]
            shift = np.median(gap, axis=0).astype(np.float32)
        return target, shift

    def _tracks(self, t: int, pictures) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Points of frame t before, in and after it, on the coarse steady path, and the confidence in them."""
        size = self._place(t, pictures)
        step = max(4, min(size) // 16)
        pixels = lattice(size)[step // 2 :: step, step // 2 :: step].reshape(-1, 2)
        columns, rows = pixels.T.astype(int)
        ahead, _, trust_ahead, _ = self._pair(t, pictures)
        _, behind, _, trust_behind = self._pair(t - 1, pictures)
        found = []
        for frame, flow in ((t - 1, behind), (t, None), (t + 1, ahead)):
            moved = pixels if flow is None else pixels + flow[0, :, rows, columns].T.cpu().numpy()
            found.append(apply(self._matrix(self.correction[frame], size), moved).astype(np.float64))
        trust = (trust_ahead * trust_behind)[0, 0, rows, columns].cpu().numpy().astype(np.float64)
        return *found, trust

    def _pair(self, t: int, pictures) -> tuple:
        if t not in self._pairs:
            self._pairs[t] = self.model.flows(self._at(t, pictures), self._at(t + 1, pictures))
        return self._pairs[t]

    def _at(self, j: int, pictures) -> Tensor:
        if j not in self._small:
            self._small[j] = self.model.small(pictures(j))
        return self._small[j]

    def _place(self, k: int, pictures) -> tuple[int, int]:
        return tuple(self._at(k, pictures).shape[-2:])

    def _matrix(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A similarity in pixels of the recorded size as a matrix for pixels of `size`."""
        return matrix(rescaled(values, size[1] / self.size[1]), *size)
