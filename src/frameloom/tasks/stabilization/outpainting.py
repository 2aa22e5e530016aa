"""The networks that continue a flow beyond a picture's edge, and the flows that they learn from."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.motion.similarity import fit_similarity, matrix, similarity_flow
from frameloom.tasks.stabilization.places import apply, inside, lattice


class Gated(nn.Module):
    """A convolution that says where it counts: elu(a) * sigmoid(b)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * outputs, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        value, gate = self.conv(x).chunk(2, 1)
        return F.elu(value) * torch.sigmoid(gate)


class Residual(nn.Module):
    """Two normalised convolutions beside a 1x1 skip."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.body(x) + self.skip(x))


class Hourglass(nn.Module):
    """Three levels down by max-pooling, three up with skips, a 5x5 convolution to a flow."""

    def __init__(self, inputs: int, width: int, block: type[nn.Module], pool: int):
        super().__init__()
        c = width
        self.down = nn.ModuleList([block(inputs, c), block(c, 2 * c), block(2 * c, 4 * c)])
        self.middle = block(4 * c, 4 * c)
        self.up = nn.ModuleList([block(8 * c, 2 * c), block(4 * c, 2 * c), block(3 * c, 2 * c)])
        self.pool = nn.MaxPool2d(pool, 2, pool // 2)
        self.head = nn.Conv2d(2 * c, 2, 5, padding=2)
        # Training starts from the similarity alone, which is what a flow of zero means here.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 h w"]:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([sized(x, skip.shape[-2:]), skip], 1))
        return self.head(x)


def sized(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """`x` at another size (rows, columns), bilinear."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Fields:
    """Endless flow fields of the synthetic world, seen through a picture that lies askew on them.

    Fields are rendered once, 64x96, and used again with other pictures, turned and scaled.
    """

    count, size = 640, (64, 96)

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._rendered: dict[int, Tensor] = {}

    def field(self, index: int) -> Float[Tensor, "2 h w"]:
        """Field `index` of the store, in pixels."""
        if index not in self._rendered:
            from frameloom.world import WorldDataset

            group = index - index % 8
            kind = ("motion", "flyover")[group // 8 % 2]
            data = WorldDataset(kind, 2, *self.size, self.seed, 2**48, ("flow",), motion=4.0)
            flows = data.batch(range(group, group + 8))["flow"][:, 0].clone()
            self._rendered |= dict(enumerate(flows, group))
        return self._rendered[index]

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """`flow` (b, 2, h, w) less the similarity of its known part, `given` with an estimator's errors, `known`."""
        flows, masks, noisy = [], [], []
        height, width = self.size
        for index in indices:
            rng = np.random.default_rng([self.seed, index])
            flow = self.field(int(rng.integers(self.count))) * float(np.exp(rng.normal(0, 0.7)))
            if rng.random() < 0.5:
                flow = flow.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None]
            if rng.random() < 0.5:
                flow = flow.flip(-2) * torch.tensor([1.0, -1.0])[:, None, None]
            askew = rng.uniform(-0.2, 0.2, 2) * (width, height), rng.normal(0, 0.05), rng.uniform(-0.15, 0.1)
            numbers = np.array([*askew[0], askew[1], askew[2]])
            known = inside(apply(matrix(numbers, height, width), lattice(self.size)), self.size)
            for _ in range(rng.integers(4)):
                cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(1, 8)
                known &= np.hypot(*np.moveaxis(lattice(self.size) - np.float32([cx, cy]), -1, 0)) > radius
            flows.append(flow)
            masks.append(torch.from_numpy(known)[None].float())
            noisy.append(torch.from_numpy(rng.normal(0, 0.05, (2, height, width))).float())
        flow, known = torch.stack(flows), torch.stack(masks)
        flow = flow - similarity_flow(fit_similarity(flow, known), height, width).float()
        return {"flow": flow, "given": flow + torch.stack(noisy), "known": known}
