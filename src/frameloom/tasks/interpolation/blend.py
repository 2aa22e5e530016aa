"""Blending: the two recorded pictures, weighted by how near they are. The floor that every method must beat."""

from jaxtyping import Float
from torch import Tensor


class Blend:
    """(1 - t) * frame0 + t * frame1. Right where nothing moves; a double exposure where something does."""

    fixed_t = False
    tile = None

    def between(self, frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]):
        """The function t -> picture `(3, h, w)`."""
        return lambda t: frame0.lerp(frame1, t)
