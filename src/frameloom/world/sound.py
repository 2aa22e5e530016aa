"""Sounds at 16 kHz: decaying tones at impacts, and a made-up voice of syllables and pauses."""

import numpy as np
from jaxtyping import Float

from frameloom.world.scene import Contact

RATE = 16_000
Waveform = Float[np.ndarray, "n"]

# (frequency ratio, loudness, seconds to decay to 1/e) of each tone of a struck body.
_TONES = {
    "wood": ((1.0, 1.0, 0.045), (2.57, 0.5, 0.025), (4.64, 0.25, 0.012)),
    "metal": ((1.0, 0.8, 0.22), (2.76, 0.6, 0.16), (5.4, 0.4, 0.1), (8.93, 0.2, 0.06)),
}


def impacts(contacts: list[Contact], material: str, radius: float, duration: float) -> Waveform:
    """A sound in [-1, 1] with a strike at each contact; small balls sound higher, boxes lower."""
    time = np.arange(round(duration * RATE)) / RATE
    wave = np.zeros_like(time)
    for contact in contacts:
        base = (180.0 if contact.other == "ground" else 120.0) / radius
        since = time - contact.time
        struck = since >= 0
        since = np.where(struck, since, 0.0)
        for ratio, loudness, decay in _TONES[material]:
            # An attack of 1 ms keeps the click below the top of the band.
            ring = np.sin(2 * np.pi * base * ratio * since) * np.exp(-since / decay) * np.minimum(since / 1e-3, 1)
            wave += np.where(struck, contact.strength * loudness * ring, 0.0)
    return wave / max(1.0, np.abs(wave).max())


def speech(rng: np.random.Generator, duration: float) -> Waveform:
    """A voice without words: syllables of 100 to 250 ms in groups, with pauses between the groups."""
    time = np.arange(round(duration * RATE)) / RATE
    loudness = np.zeros_like(time)
    pitch = np.full_like(time, rng.uniform(105, 210))
    brightness = np.zeros_like(time)
    at = rng.uniform(0.0, 0.15)
    while at < duration:
        for _ in range(int(rng.integers(2, 6))):
            length = rng.uniform(0.1, 0.25)
            u = (time - at) / length
            inside = (u >= 0) & (u < 1)
            loudness += np.where(inside, rng.uniform(0.45, 1.0) * np.sin(np.pi * np.clip(u, 0, 1)) ** 1.2, 0)
            brightness = np.where(inside, rng.uniform(0, 1), brightness)
            pitch = np.where(u >= 0, pitch * rng.uniform(0.94, 1.06), pitch)
            at += length * rng.uniform(0.85, 1.05)
        at += rng.uniform(0.15, 0.45)
    angle = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = sum(
        np.sin(n * angle) / n * (1 - brightness + brightness * np.exp(-(((n * pitch - 1400) / 600) ** 2)) * n)
        for n in range(1, 13)
    )
    wave = loudness * wave
    return wave / max(1e-6, np.abs(wave).max())


def envelope(wave: Waveform) -> Waveform:
    """Loudness in [0, 1]: root mean square over 50 ms, relative to the loudest instant."""
    width = RATE // 20
    kernel = np.hanning(width + 2)[1:-1]
    power = np.convolve(wave**2, kernel / kernel.sum(), mode="full")[(width - 1) // 2 :][: len(wave)]
    loudness = np.sqrt(np.maximum(power, 0))
    return loudness / max(1e-6, loudness.max())
