"""The training loop: it learns, and after any stop it ends where it would have ended."""

import itertools
import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frameloom.cards import Card, cards
from frameloom.errors import InputError, Interrupted
from frameloom.training import loop
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized


class Line(nn.Module):
    """y = w x + b, with noise in its loss so that the seeding of steps matters."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(3, 1)

    @classmethod
    def preset(cls, size):
        return Settings()

    @classmethod
    def recipe(cls, size):
        return Recipe(steps=60, batch_size=8, lr=0.3, warmup=5, ema=0.5)

    @classmethod
    def dataset(cls, source, size, seed):
        return Points(seed)

    def loss(self, batch):
        noise = 0.01 * torch.randn_like(batch["y"])
        return (self.layer(batch["x"]) - batch["y"] - noise).square().mean()


@dataclass(frozen=True)
class Settings:
    width: int = 3


class Points:
    def __init__(self, seed):
        self.seed = seed

    def batch(self, indices, progress):
        assert 0 <= progress < 1
        x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(self.seed * 977 + i)) for i in indices])
        return {"x": x, "y": x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.25}


@pytest.fixture(autouse=True)
def line(monkeypatch):
    class LineCard(Card):
        def load_class(self):
            return Line

    found = LineCard(id="line", title="", verb="", entry="", summary="")
    monkeypatch.setattr(loop, "card", lambda method: found)


def stop_at(step):
    def tell(label, done, total):
        if done == step:
            raise KeyboardInterrupt

    return tell


def test_it_learns_and_leaves_a_described_folder(tmp_path):
    out = loop.train("line", tmp_path / "run", workers=0)
    weights = load_file(out / "model.safetensors")
    assert weights["layer.weight"].flatten().tolist() == pytest.approx([1, -2, 0.5], abs=0.1)
    assert json.loads((out / "config.json").read_text()) == {"method": "line", "config": {"width": 3}}
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 59
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert "frameloom train line" in (out / "README.md").read_text()


@pytest.mark.parametrize(("stop", "save_every"), [(1, 0.0), (23, 0.0), (59, 0.0), (55, 1e9)])
def test_a_run_that_was_stopped_ends_in_the_same_weights(tmp_path, stop, save_every):
    undisturbed = load_file(loop.train("line", tmp_path / "a", workers=0) / "model.safetensors")
    with pytest.raises(Interrupted):
        loop.train("line", tmp_path / "b", workers=0, save_every=save_every, progress=stop_at(stop))
    assert not (tmp_path / "b" / "model.safetensors").exists()
    resumed = load_file(loop.train("line", tmp_path / "b", workers=0) / "model.safetensors")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    steps = [json.loads(row)["step"] for row in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(tmp_path):
    loop.train("line", tmp_path / "a", steps=10, workers=0)
    before = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    loop.train("line", tmp_path / "a", steps=10, workers=0)
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="other settings"):
        loop.train("line", tmp_path / "a", steps=11, workers=0)


def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "loss", lambda self, batch: self.layer(batch["x"]).sum() * float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        loop.train("line", tmp_path / "a", workers=0)


def test_the_learning_rate_warms_up_and_falls_to_its_end():
    recipe = Recipe(steps=100, batch_size=1, lr=1.0, final_lr=0.1, warmup=10)
    rates = [recipe.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_runs_of_different_precision_follow_one_another_in_one_process(tmp_path, monkeypatch):
    loop.train("line", tmp_path / "whole", workers=0)
    recipe = Line.recipe("tiny")
    monkeypatch.setattr(Line, "recipe", classmethod(lambda cls, size: replace(recipe, bf16=True)))
    loop.train("line", tmp_path / "half", workers=0)
    assert (tmp_path / "half" / "model.safetensors").is_file()


def test_a_size_that_there_is_not_is_one_line():
    learners = [kind for kind in (one.load_class() for one in cards().values()) if hasattr(kind, "recipe")]
    assert len(learners) > 10
    for kind in learners:
        with pytest.raises(InputError, match="--size huge"):
            kind.preset("huge")


def test_every_size_has_its_own_recipe_and_data_that_are_not_there_are_named():
    recipes = {"tiny": Recipe(steps=3, batch_size=1, lr=0.1), "paper": Recipe(steps=7, batch_size=1, lr=0.1)}
    kind = type("Kind", (Sized,), {"id": "kind", "presets": {"tiny": 1, "paper": 2}, "recipes": recipes})
    assert [(kind.preset(size), kind.recipe(size)) for size in recipes] == [(1, recipes["tiny"]), (2, recipes["paper"])]
    kind.needs_world("world")
    with pytest.raises(InputError, match="--data sea: kind learns from depth; give --data world"):
        kind.needs_world("sea", "depth")
