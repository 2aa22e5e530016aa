"""The steps of a frame one after the other, then those of the next: what StreamDiffusion is measured against.

For whom: when the first frame must come at once. Same times, same noises, same guidance; n launches a frame, no delay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import Ctx
from frameloom.diffusion.generator import Generator
from frameloom.diffusion.guide import CFG, RCFG, Guide, Unguided
from frameloom.diffusion.paths import spread
from frameloom.diffusion.predict import Prediction
from frameloom.diffusion.run import Edit, sample
from frameloom.diffusion.step import Slots, Universal
from frameloom.errors import InputError
from frameloom.tasks.editing.base import Live, Settings, scalings


class Boundary(Edit):
    """LCM's boundary scalings, after the guidance."""

    def on_x0(self, p: Prediction, x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        skip, out = (spread(value, x) for value in scalings(ctx.path, t))
        return Prediction(out * p.x0 + skip * x, p.eps)


class Sequential(Live):
    """`push(frame)` gives that frame back, restyled, after n launches."""

    def __init__(self, model: Generator, prompt: str | Mapping[int, str], settings: Settings | None = None) -> None:
        super().__init__(model, prompt, settings)
        if self.settings.similar:
            raise InputError("--similar: sequential skips no frames; streamdiffusion does")
        noises = self.noises if self.settings.noise == "fixed" else torch.zeros_like(self.noises)
        self._noise = Slots([*noises[1:, None], torch.zeros_like(noises[:1])])
        self._step = Universal() if self.settings.noise == "ddim" else Universal(r=1.0)
        self._grid = torch.cat([self.times, self.times.new_zeros(1)])

    def _guide(self, reference: Tensor) -> Guide:
        s = self.settings
        if s.guidance in ("none", "full"):
            return CFG(s.w) if s.guidance == "full" else Unguided()
        return RCFG(s.w, s.delta, s.guidance, reference)

    def steps(self, x: Tensor, reference: Tensor, cond: Cond) -> list[Tensor]:
        found, report = sample(
            self.model.denoiser, x, self._grid, cond, guide=self._guide(reference), step=self._step,
            noise=self._noise, edits=[Boundary()] if self.boundary else [],
        )  # fmt: skip
        self.report.launches += report.launches
        self.report.evaluations += report.nfe
        return [found]
