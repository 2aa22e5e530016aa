"""What the claims about distillation measure handwritten digits with: a judge that is trained on the spot.

The judge learns on real digits and looks with kernels of five pixels; the feature metric of a recipe learns on the
teacher's pairs with kernels of three. They are different networks of different data, as a fair comparison asks for.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.metrics.frechet import frechet_distance
from frameloom.tasks.generation.data import digits


class Judge(nn.Module):
    """A classifier of 16x16 digits, and the 48 features that it decides by."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(512, 48), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(48, 10)

    @classmethod
    def trained(cls, seed: int, steps: int = 400) -> "Judge":
        torch.manual_seed(seed + 5)
        judge, data = cls(), digits("digits", 16, seed)
        optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3)
        for step in range(steps):
            batch = data.batch(list(range(step * 128, (step + 1) * 128)), 0.0)
            loss = F.cross_entropy(judge.head(judge.body(batch["video"][:, 0, :1])), batch["label"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return judge.eval()

    @torch.no_grad()
    def features(self, video: Float[Tensor, "n 1 3 h w"]) -> Float[Tensor, "n 48"]:
        return self.body(video[:, 0, :1].clamp(0, 1))

    def distance(self, a: Tensor, b: Tensor) -> float:
        """The Frechet distance of two sets of pictures."""
        return frechet_distance(self.features(a), self.features(b))

    @torch.no_grad()
    def accuracy(self, video: Tensor, which: Tensor) -> float:
        return float((self.head(self.features(video)).argmax(1) == which).float().mean())
