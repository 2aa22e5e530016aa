"""FIFO-Diffusion: the diagonal queue with fresh noise at its tail and nothing else; the baseline of Ouroboros.

J. Kim, J. Kang, J. Choi, B. Han, "FIFO-Diffusion: Generating Infinite Videos from Text without Training", NeurIPS 2024,
arXiv 2405.11473.
"""

from frameloom.tasks.generation.strategies.ouroboros import Ouroboros


def FIFO(queue: int | None = None, eta: float = 0.0) -> Ouroboros:
    """An endless queue of frames of `queue` levels; see `Ouroboros`, whose three parts are off."""
    return Ouroboros(queue, tail=False, attention=False, guidance=False, eta=eta)
