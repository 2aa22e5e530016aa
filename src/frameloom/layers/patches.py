"""A fixed linear picture codec: square patches through a principal component analysis, partly whitened.

The frozen autoencoder of the small generators. Every patch of p x p pixels becomes `channels` numbers of comparable
size, each divided by its deviation to the power `whiten`; with as many channels as a patch has numbers it is exact.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class PatchPCA(nn.Module):
    """`(b, t, 3, h, w)` in [0, 1] to latents `(b, t, channels, h / patch, w / patch)` and back."""

    def __init__(self, patch: int, channels: int, whiten: float = 0.7) -> None:
        super().__init__()
        self.patch, self.channels, self.whiten = patch, channels, whiten
        numbers = 3 * patch * patch
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("basis", torch.eye(numbers)[:channels].clone())
        self.register_buffer("scale", torch.ones(channels))

    @torch.no_grad()
    def fit(self, video: Float[Tensor, "b t 3 h w"]) -> None:
        """Take mean, principal axes and deviations from examples."""
        rows = self._cut(video).reshape(-1, self.mean.numel()).double()
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        basis = vectors.flip(1).T[: self.channels]
        # A sign for every axis that does not depend on the solver.
        basis = basis * torch.sign(basis.gather(1, basis.abs().argmax(1, keepdim=True)))
        deviations = values.flip(0)[: self.channels].clamp(min=1e-8).sqrt()
        scale = deviations**self.whiten
        # Unit variance on average, whatever the power.
        scale = scale * (deviations / scale).square().mean().sqrt()
        self.mean.copy_(mean), self.basis.copy_(basis), self.scale.copy_(scale)

    def encode(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        rows = (self._cut(video) - self.mean) @ self.basis.T / self.scale
        return rearrange(rows, "b t h w c -> b t c h w")

    def decode(self, latents: Float[Tensor, "b t c h2 w2"]) -> Float[Tensor, "b t 3 h w"]:
        rows = rearrange(latents, "b t c h w -> b t h w c").to(self.basis.dtype) * self.scale @ self.basis + self.mean
        return rearrange(rows, "b t h w (c p q) -> b t c (h p) (w q)", c=3, p=self.patch)

    def _cut(self, video: Tensor) -> Tensor:
        return rearrange(video, "b t c (h p) (w q) -> b t h w (c p q)", p=self.patch, q=self.patch)
