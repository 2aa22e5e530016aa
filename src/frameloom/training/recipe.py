"""How long, how fast and with what a method is trained: numbers, no code."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimiser steps with AdamW, linear warm-up, `lr` for the share `hold` of the run, a cosine to `final_lr`.

    With `muon` above 0 the matrices of the model's `blocks` are moved by Muon at that rate, on the same schedule.

    `ema` is the decay of the averaged weights that are kept (0 keeps the last ones); `bf16` runs the forward
    pass under bfloat16 autocast (losses that need float32 say so themselves).
    """

    steps: int
    batch_size: int
    lr: float
    final_lr: float = 0.0
    warmup: int = 100
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    ema: float = 0.0
    bf16: bool = False
    channels_last: bool = False
    muon: float = 0.0
    hold: float = 0.0

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        begin = max(self.warmup, round(self.hold * self.steps))
        u = max(0, step - begin) / max(1, self.steps - begin)
        return self.final_lr + 0.5 * (self.lr - self.final_lr) * (1 + math.cos(math.pi * min(1.0, u)))
