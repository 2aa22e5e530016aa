"""Find the motion of every pixel from frame to frame."""

from frameloom.tasks.flow.base import Flow, FlowClip, FlowEstimator, estimate, flow

__all__ = ["Flow", "FlowClip", "FlowEstimator", "estimate", "flow"]
