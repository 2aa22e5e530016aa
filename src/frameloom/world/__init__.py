"""Labelled synthetic video, exact by construction: scenes of analytic shapes traced in PyTorch, a seed each."""

from frameloom.world.dataset import WorldDataset, clip
from frameloom.world.world import KINDS, World

__all__ = ["KINDS", "World", "WorldDataset", "clip"]
