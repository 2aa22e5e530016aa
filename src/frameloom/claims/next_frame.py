"""A small transformer that foresees the next frame: dense, and with a mixture of experts of equal operations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.layers.attention import Attention
from frameloom.progress import Progress
from frameloom.scale.moe import MoE, auxiliary, layers
from frameloom.world import WorldDataset

STEPS = 800
RATE = 3e-3


class NextFrame(nn.Module):
    """Patches of two frames to what changes in the next: two blocks, the second one dense or a mixture."""

    def __init__(self, experts: int, width: int = 64, patch: int = 192) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2 * patch, width), nn.Linear(width, patch)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.mix = nn.ModuleList(Attention(width, 4) for _ in range(2))
        self.feed = nn.ModuleList([self.dense(width), MoE(width, 4 * width, experts) if experts else self.dense(width)])
        nn.init.zeros_(self.leave.weight)

    @staticmethod
    def dense(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.places
        for mix, feed in zip(self.mix, self.feed, strict=True):
            x = x + mix(F.layer_norm(x, x.shape[-1:]))
            x = x + feed(F.layer_norm(x, x.shape[-1:]))
        return self.leave(F.layer_norm(x, x.shape[-1:]))


def triples(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Patches of two frames `(n, 16, 384)` and the change to the third `(n, 16, 192)`."""
    data = WorldDataset("toys", 8, 32, 32, seed, count, count=2)
    video = torch.cat([data.batch(range(i, min(i + 64, count)))["rgb"] for i in range(0, count, 64)])
    cut = video.unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
    first, second, third = cut[:, :-2], cut[:, 1:-1], cut[:, 2:]
    return torch.cat([first, second], -1).flatten(0, 1), (third - second).flatten(0, 1)


def quality(seed: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Held-out error of the next frame over that of copying the last, and how evenly experts are used."""
    (x, y), (held, wanted) = triples(7_000 + seed, 768), triples(970_000 + seed, 96)
    arms = {"dense": (0, 0.0), "8 experts": (8, 0.01), "8 experts, no auxiliary loss": (8, 0.0)}
    found = {}
    for name, (experts, weight) in arms.items():
        torch.manual_seed(seed)
        model = NextFrame(experts)
        optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
        rng = torch.Generator().manual_seed(seed)
        for step in range(STEPS):
            chosen = torch.randint(len(x), (32,), generator=rng)
            loss = (model(x[chosen]) - y[chosen]).square().mean() / 0.01 + weight * auxiliary(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
            progress(f"next frame, {name}", step + 1, STEPS)
        with torch.no_grad():
            for layer in layers(model.eval()):
                layer.capacity = 0.0
            error = (model(held) - wanted).square().mean() / wanted.square().mean()
        found[name] = {"error": float(error)}
        for layer in layers(model):
            share = layer.routing.counts / layer.routing.counts.sum()
            found[name]["entropy"] = float(torch.special.entr(share).sum() / torch.tensor(8.0).log())
    return found
