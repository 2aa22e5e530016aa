"""One loop, one checkpoint layout and one recipe type for every method that learns."""

from frameloom.training.loop import Batches, Trainable, train
from frameloom.training.pretrained import load, save_pretrained
from frameloom.training.recipe import Recipe

__all__ = ["Batches", "Recipe", "Trainable", "load", "save_pretrained", "train"]
