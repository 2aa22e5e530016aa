"""Where the first noise of a long video comes from."""

import torch
from jaxtyping import Float
from torch import Tensor


def shuffled_windows(
    noise: Float[Tensor, "b t c h w"], window: int, stride: int, seed: int
) -> Float[Tensor, "b t c h w"]:
    """The first `window` frames of noise again and again, every block of `stride` in an order of its own.

    Block [i, i + stride) is a random permutation of block [i - window, i - window + stride): any window that starts at
    a multiple of the stride holds the same frames, and every frame stays Gaussian. FreeNoise, arXiv 2310.15169.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = noise.clone()
    frames = noise.shape[1]
    for start in range(window, frames, stride):
        order = torch.randperm(stride, generator=generator)[: frames - start]
        noise[:, start : start + stride] = noise[:, start - window + order]
    return noise


def low_pass(
    signal: Float[Tensor, "b t c h w"], noise: Float[Tensor, "b t c h w"], weight: Float[Tensor, "t h w"],
    preserve: bool = True,
) -> Float[Tensor, "b t c h w"]:  # fmt: skip
    """Low frequencies of one, high ones of the other: IFFT(L * FFT(signal) + H * FFT(noise)), real part.

    H is sqrt(1 - L^2), which keeps unit variance, or with `preserve` off 1 - L as FreeInit and Ouroboros-Diffusion have
    it, which does not. `weight` is L with frequency zero in the middle.
    """
    dims = (1, 3, 4)
    low = weight[None, :, None]
    high = torch.sqrt((1 - low**2).clamp(min=0)) if preserve else 1 - low
    mixed = low * torch.fft.fftshift(torch.fft.fftn(signal, dim=dims), dim=dims)
    mixed = mixed + high * torch.fft.fftshift(torch.fft.fftn(noise, dim=dims), dim=dims)
    return torch.fft.ifftn(torch.fft.ifftshift(mixed, dim=dims), dim=dims).real


def gaussian_filter(
    frames: int, height: int, width: int, space: float = 0.25, time: float = 1.0, with_time: bool = True
) -> Float[Tensor, "t h w"]:
    """exp(-d^2 / (2 space^2)) about frequency zero, d^2 = ((space / time) (2k/t - 1))^2 + (2i/h - 1)^2 + (2j/w - 1)^2.

    With one frame the time term of the published form is (-space / time)^2, so that its peak is not 1; `with_time` off
    leaves it out. The frequency zero of an axis of n numbers stands at n // 2, where 2k/n - 1 = 0.
    """
    k, i, j = torch.meshgrid(*(2 * torch.arange(n) / n - 1 for n in (frames, height, width)), indexing="ij")
    distance = i**2 + j**2 + ((space / time * k) ** 2 if with_time else 0)
    return torch.exp(-distance / (2 * space**2))
