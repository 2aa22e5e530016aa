"""StreamDiffusion: requests at different stages of denoising share one launch of the network.

For whom: video to video while it is being filmed. A frame needs n steps, and they must follow each other; but step i
of this frame, step i + 1 of the one before it and so on are independent. So n frames are in flight at n slots, and for
every frame that comes the network is launched once, on a batch of n rows with a time for each:

    batch [a_0 E(frame) + c_0 z_0,  buf_1, ..., buf_{n-1}]   at times   [tau_0, ..., tau_{n-1}]
    out = x0_{n-1},    buf_{i+1} = a_{i+1} x0_i + c_{i+1} z_{i+1}

The noises z_i belong to slots, not to frames, which keeps neighbouring frames alike; and frame k's result is, to the
rounding of a batch, that of n steps for it alone. It comes n - 1 frames later.

Residual guidance replaces the unconditional branch: with r = (x - a x_ref) / c, the noise that leads to a reference,

    eps = delta r + w (eps_c - delta r)

`self` takes the clean input as x_ref (n evaluations a frame), `onetime` what the network says under the negative prompt
at the first slot (n + 1), `full` is classifier-free guidance (2 n). x_ref travels with its request from slot to slot.

A gate looks at the input: with cos the cosine similarity, in [-1, 1], to the last frame let through, a frame is skipped
with probability max(0, (cos - eta) / (1 - eta)), at most ten in a row. By chance and not by a threshold, so that slow
motion is not held and let go by turns.

Akio Kodaira, Chenfeng Xu, Toshiki Hazama, Takanori Yoshimoto, Kohei Ohno, Shogo Mitsuhori, Soichi Sugano, Hanying Cho,
Zhijian Liu, Masayoshi Tomizuka, Kurt Keutzer. StreamDiffusion: A Pipeline-level Solution for Real-time Interactive
Generation. 2023, arXiv 2312.12491.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.cond import Cond, cat
from frameloom.diffusion.context import Ctx
from frameloom.diffusion.generator import Generator
from frameloom.diffusion.guide import mix, residual
from frameloom.diffusion.paths import spread
from frameloom.diffusion.predict import Prediction
from frameloom.tasks.editing.base import Live, Picture, Settings, scalings


class Gate:
    """Skips frames that are like the last one that was not skipped.

    Args:
        eta: similarity at which skipping begins. most: frames skipped in a row. seed: of the chances.
    """

    def __init__(self, eta: float = 0.98, most: int = 10, seed: int = 0) -> None:
        self.eta, self.most = eta, most
        self.reference: Picture | None = None
        self._row = 0
        self._chance = torch.Generator().manual_seed(seed)

    def probability(self, picture: Picture) -> float:
        if self.reference is None or self.reference.shape != picture.shape:
            return 0.0
        # Of values around 0, as networks see them: in [0, 1] any two pictures are alike.
        first, second = (2 * one.double().flatten() - 1 for one in (self.reference, picture))
        alike = F.cosine_similarity(first, second, 0)
        return max(0.0, (float(alike) - self.eta) / (1 - self.eta))

    def skips(self, picture: Picture) -> bool:
        drawn = float(torch.rand((), generator=self._chance))
        if drawn < self.probability(picture) and self._row < self.most:
            self._row += 1
            return True
        self._row, self.reference = 0, picture
        return False


class Stream(Live):
    """n requests in flight: `stream.push(frame)` gives the frame that went in n - 1 pushes before, or None at first."""

    def __init__(self, model: Generator, prompt: str | Mapping[int, str], settings: Settings | None = None) -> None:
        super().__init__(model, prompt, settings)
        s = self.settings
        self.delay = len(s.t_index) - 1
        self.gate = Gate(s.similar, seed=s.seed) if s.similar else None
        # The requests in flight, newest first; slots that are not taken have no row.
        self._x = self._references = self.noises[:0]
        self._entered = 0

    def restart(self) -> None:
        self._entered = 0

    def skips(self, picture: Picture) -> bool:
        # While the slots fill there is no output yet that could be shown again.
        self._entered += 1
        if self.gate is None:
            return False
        if self._entered <= self.delay + 1:
            self.gate.reference = picture
            return False
        return self.gate.skips(picture)

    def steps(self, x: Tensor, reference: Tensor, cond: Cond) -> list[Tensor]:
        self._x, self._references = torch.cat([x, self._x]), torch.cat([reference, self._references])
        return self._launch(0, cond)

    def drain(self) -> Iterator[Tensor]:
        first = 1
        while len(self._x):
            self._at += 1
            yield from self._launch(first, self.prompts.at(self._at))
            first += 1

    def _launch(self, first: int, cond: Cond) -> list[Tensor]:
        """One step for every request, of which the newest is at slot `first`; the result of the one at the last."""
        s, x, m = self.settings, self._x, len(self._x)
        t = self.times[first : first + m]
        p = self._guided(x, t, first, cond)
        x0 = p.x0
        if self.boundary:
            skip, out = (spread(value, x) for value in scalings(self.path, t))
            x0 = out * x0 + skip * x
        staying = m - (first + m == len(self.times))
        later = slice(first + 1, first + 1 + staying)
        noise = {"fixed": self.noises[later], "ddim": p.eps[:staying], "none": torch.zeros_like(x[:staying])}[s.noise]
        self._x = self.path.add_noise(x0[:staying], self.times[later], noise)
        self._references = self._references[:staying]
        return [x0[staying:]] if staying < m else []

    def _guided(self, x: Float[Tensor, "m 1 c h w"], t: Float[Tensor, "m"], first: int, cond: Cond) -> Prediction:
        """What the network says of all requests, in one launch, guided away from each one's own reference."""
        s, m = self.settings, len(x)
        nulls = {"full": m, "onetime": int(first == 0)}.get(s.guidance, 0)
        told = cat([cond] * m + [cond.null()] * nulls)
        found = self.model.denoiser(torch.cat([x, x[:nulls]]), torch.cat([t, t[:nulls]]), told)
        self.report.launches += 1
        self.report.evaluations += m + nulls
        p, null = (Prediction(found.x0[part], found.eps[part]) for part in (slice(m), slice(m, None)))
        if s.guidance == "none":
            return p
        if s.guidance == "full":
            return mix(null, p, s.w)
        if nulls:
            self._references = torch.cat([null.x0, self._references[1:]])
        return residual(p, self._references, x, t, Ctx(self.path, len(self.times)), s.w, s.delta)
