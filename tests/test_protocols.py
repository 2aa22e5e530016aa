"""The protocols of diffusion can be checked at run time, as typed tests and users' `isinstance` do."""

from frameloom.diffusion.guide import CFG, Guide
from frameloom.diffusion.hooks import Cached, Hook, every
from frameloom.diffusion.step import Heun, Step


def test_protocols_know_their_own():
    for made, protocol in ((CFG(), Guide), (Cached(every(2)), Hook), (Heun(), Step)):
        assert isinstance(made, protocol)
    assert not isinstance(CFG(), Hook)
