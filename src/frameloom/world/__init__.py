"""Labelled synthetic video, exact by construction: scenes of analytic shapes traced in PyTorch, a seed each."""

from frameloom.world.dataset import WorldDataset, clip
from frameloom.world.language import VOCABULARY, Event, Question
from frameloom.world.people import BONES, JOINTS
from frameloom.world.render import OUTPUTS
from frameloom.world.sound import RATE
from frameloom.world.world import KINDS, World

__all__ = [
    "BONES", "JOINTS", "KINDS", "OUTPUTS", "RATE", "VOCABULARY",
    "Event", "Question", "World", "WorldDataset", "clip",
]  # fmt: skip
