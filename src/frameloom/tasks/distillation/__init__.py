"""Make a model of one or a few steps out of one of many."""

from frameloom.tasks.distillation.base import distill

__all__ = ["distill"]
