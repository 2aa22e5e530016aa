"""The sizes of a RAFT core and where it begins: what a flow method that is built on it chooses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RaftConfig:
    """Sizes of a core; the defaults are RAFT's.

    `stem`: widths of the encoder's stages (three for `basic`, two for `twins`), at `stride` pixels a cell. `motion`:
    widths of the motion encoder: correlations first and then, flow first and then, and what comes out. `radius`,
    `levels`: of the correlation lookup. `kernels`, `cell_kernels`: depthwise sizes of SK blocks. `iterations`: in
    training; `refinements`: in use. `centred`: in use, edges that make the sides of a picture fit are repeated on both
    sides, as the published code does it, and not to the right and below alone. `mask_scale` softens the upsampling
    weights. `begins`: the flow before the first refinement; the papers begin at zero, but what `dis` finds needs no
    learning; a network of this size learns in minutes to mend it. In use, not in training, `frameloom.motion.mend` does
    its part first, and `trust` counts: what `dis` finds there and back within so many pixels is kept as it is (0:
    nothing is), for such a network blurs what is right. `stress`: how much more a pixel counts in training that the
    next frame hides; they are few, and methods differ in nothing else.
    """

    encoder: Literal["basic", "twins"] = "basic"
    cell: Literal["gru", "sk"] = "gru"
    attention: bool = False
    stride: Literal[4, 8] = 8
    stem: tuple[int, ...] = (64, 96, 128)
    heads: tuple[int, int] = (4, 8)
    context_norm: Literal["batch", "instance"] = "batch"
    features: int = 256
    hidden: int = 128
    context: int = 128
    motion: tuple[int, int, int, int, int] = (256, 192, 128, 64, 128)
    mask: int = 256
    radius: int = 4
    levels: int = 4
    kernels: tuple[int, ...] = (1, 15)
    cell_kernels: tuple[int, ...] = (1, 7)
    iterations: int = 12
    refinements: int = 12
    centred: bool = False
    mask_scale: float = 0.25
    begins: Literal["zero", "dis"] = "zero"
    trust: float = 0.0
    stress: float = 0.0
    gamma: float = 0.8

    @property
    def lookups(self) -> int:
        """Channels that a correlation lookup gives."""
        return self.levels * (2 * self.radius + 1) ** 2

    @property
    def least(self) -> int:
        """The shortest side in pixels: the coarsest correlations must keep a cell."""
        return self.stride * 2 ** (self.levels - 1)
