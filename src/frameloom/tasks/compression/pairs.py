"""What codecs learn from: two consecutive frames, of the rendered world, of photographs that slide and zoom, or of a
folder of clips."""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from frameloom.errors import InputError
from frameloom.video.companions import CONTAINERS
from frameloom.video.reader import read
from frameloom.world.pool import Pool
from frameloom.world.textures import gallery

SUFFIXES = (*CONTAINERS, ".mpg", ".mpeg", ".ts", ".y4m")


class Pairs:
    """Endless crops of two frames. Half come from rendered clips, whose motion is quick; half are photographs.

    Those drift by up to 4 pixels a frame, most of them by less than 1 and some not at all, turn and zoom a little, and
    half of them have a patch of another photograph in front that goes its own way. Some pairs are noisy, as cameras
    are; one pair in 25 is a cut.
    """

    def __init__(self, crop: int, seed: int) -> None:
        self.crop, self.seed = crop, seed
        self.pool, self.pictures = Pool(seed), gallery()

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """`pair` (b, 2, 3, h, w) in [0, 1]; `progress` (b,)."""
        made = np.stack([self._example(np.random.default_rng([self.seed, index])) for index in indices])
        pair = torch.from_numpy(made).permute(0, 1, 4, 2, 3).contiguous()
        return {"pair": pair, "progress": torch.full((len(pair),), progress)}

    def _example(self, rng: np.random.Generator) -> np.ndarray:
        pair = self._rendered(rng) if rng.random() < 0.5 else self._photographed(rng)
        if rng.random() < 0.04:
            pair[0] = self._photographed(rng)[0]
        if rng.random() < 0.4:
            pair = pair + rng.uniform(0, 0.03) * rng.standard_normal(pair.shape)
        if rng.random() < 0.5:
            pair = pair[:, :, ::-1]
        return np.clip(pair * rng.uniform(0.7, 1.1), 0, 1).astype(np.float32)

    def _rendered(self, rng: np.random.Generator) -> np.ndarray:
        clip = self.pool.video(int(rng.integers(len(self.pool))))
        begin = int(rng.integers(len(clip) - 1))
        top, left = (int(rng.integers(side - self.crop + 1)) for side in clip.shape[-2:])
        pair = clip[begin : begin + 2, :, top : top + self.crop, left : left + self.crop].transpose(0, 2, 3, 1)
        return (pair[::-1] if rng.random() < 0.5 else pair).astype(np.float32) / 255

    def _photographed(self, rng: np.random.Generator) -> np.ndarray:
        pair = self._moved(rng)
        if rng.random() < 0.5:
            front, shift = self._moved(rng), self._drift(rng)
            at, size = rng.uniform(0.2, 0.8, 2) * self.crop, rng.uniform(0.1, 0.35, 2) * self.crop
            rows, columns = np.mgrid[: self.crop, : self.crop]
            for k in range(2):
                row, column = at + k * shift
                away = ((rows - row) / size[0]) ** 2 + ((columns - column) / size[1]) ** 2
                mask = np.clip((1 - away) * size.min() / 2 + 0.5, 0, 1)[..., None]
                pair[k] += mask * (front[k] - pair[k])
        return pair

    def _moved(self, rng: np.random.Generator) -> np.ndarray:
        """Two views of one photograph, 0.6 to 2.8 of its texels a pixel."""
        picture = self.pictures[int(rng.integers(len(self.pictures)))]
        scale = 2.0 ** rng.uniform(-0.7, 1.5)
        if scale > 1:
            picture = cv2.resize(picture, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_AREA)
        turn, step = rng.uniform(-np.pi, np.pi), min(scale, 1.0)
        centre, shift = rng.uniform(0, picture.shape[0], 2), self._drift(rng)
        still = rng.random() < 0.5
        spin, growth = (0.0, 1.0) if still else (rng.normal(0, 0.01), 1 + rng.normal(0, 0.01))
        views = []
        for k in range(2):
            angle, size = turn + k * spin, step * growth**k
            matrix = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            offset = centre + matrix @ (k * shift - self.crop / 2)
            affine = np.concatenate([matrix, offset[:, None]], 1)
            views.append(cv2.warpAffine(picture, affine, (self.crop, self.crop), borderMode=cv2.BORDER_REFLECT,
                                        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))  # fmt: skip
        return np.stack(views)

    @staticmethod
    def _drift(rng: np.random.Generator) -> np.ndarray:
        """Pixels a frame."""
        if rng.random() < 0.25:
            return np.zeros(2)
        angle = rng.uniform(-np.pi, np.pi)
        return 4 * rng.random() ** 3 * np.array([np.sin(angle), np.cos(angle)])


class Recorded:
    """Endless crops of two frames of the clips in a folder and the folders below it, long ones more often.

    Four examples in a row share their frames, for finding frames in a file is what takes the time; clips with many
    keyframes are found faster.
    """

    SHARED = 4

    def __init__(self, folder: Path, crop: int, seed: int) -> None:
        """Raises InputError for a folder without clips, and names a clip that cannot be read or is too small."""
        self.crop, self.seed = crop, seed
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise InputError(f"--data {folder}: no clips in this folder; their names end in {', '.join(SUFFIXES)}")
        self.clips = [self._checked(folder, path) for path in files]
        self.ends = np.cumsum([len(clip) - 1 for clip in self.clips])
        self._frames = lru_cache(2)(self._read)

    def _checked(self, folder: Path, path: Path):
        try:
            clip = read(path)
            first = clip[:1].tensor()
        except InputError as error:
            raise InputError(f"--data {folder}: {error}; mend this clip or take it away") from None
        height, width = first.shape[-2:]
        if len(clip) < 2 or min(height, width) < self.crop:
            raise InputError(f"--data {folder}: {path.name} has {len(clip)} frame(s) of {width}x{height}; this size "
                             f"learns from 2 frames or more, {self.crop} pixels a side or more")  # fmt: skip
        return clip

    def _read(self, number: int) -> np.ndarray:
        """Two consecutive frames `(2, h, w, 3)` as bytes, `number` counted through all clips."""
        which = int(np.searchsorted(self.ends, number, "right"))
        first = number - int(self.ends[which - 1]) if which else number
        return self.clips[which][first : first + 2].bytes_tensor().permute(0, 2, 3, 1).numpy()

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """`pair` (b, 2, 3, h, w) in [0, 1]; `progress` (b,)."""
        made = np.stack([self._example(index) for index in indices])
        pair = torch.from_numpy(made).permute(0, 1, 4, 2, 3).float() / 255
        return {"pair": pair, "progress": torch.full((len(pair),), progress)}

    def _example(self, index: int) -> np.ndarray:
        place = np.random.default_rng([self.seed, index // self.SHARED, 1])
        frames = self._frames(int(place.integers(self.ends[-1])))
        rng = np.random.default_rng([self.seed, index])
        top, left = (int(rng.integers(side - self.crop + 1)) for side in frames.shape[1:3])
        pair = frames[:, top : top + self.crop, left : left + self.crop]
        pair = pair[::-1] if rng.random() < 0.5 else pair
        return pair[:, :, ::-1] if rng.random() < 0.5 else pair


def pairs(source: str, crop: int, seed: int) -> Pairs | Recorded:
    """The training data of `source`, `world` or a folder of clips. Raises InputError for one that is neither."""
    if source == "world":
        return Pairs(crop, seed)
    if not Path(source).is_dir():
        raise InputError(f"--data {source}: codecs learn from world or from a folder of clips; no such folder")
    return Recorded(Path(source), crop, seed)
