"""Where flow methods learn: the synthetic world, rendered once, or a published data set in its usual folders.

An example is a clip with its flows: `video` `(t, 3, h, w)` in [0, 1]; `flow` and `backward` `(t-1, 2, h, w)` in
pixels, from frame k to k + 1 and back; `valid` and `backward_valid` `(t-1, h, w)`, false where a data set has no
label.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from frameloom.errors import InputError
from frameloom.motion.consistency import occlusion
from frameloom.motion.flowio import read_flow, read_kitti_png
from frameloom.world.pool import Pool


@dataclass(frozen=True)
class Sample:
    """Files of a labelled clip: pictures, then for every gap the flow file or None, and the same backwards."""

    pictures: tuple[Path, ...]
    flows: tuple[Path | None, ...]
    backward: tuple[Path | None, ...]


class Files:
    """Clips of a published data set; a gap without a label is all invalid."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        video = torch.stack([_picture(path) for path in sample.pictures])
        made = {"video": video}
        for name, mask, paths in (("flow", "valid", sample.flows), ("backward", "backward_valid", sample.backward)):
            labels = [_label(path, video.shape[-2:]) for path in paths]
            made[name] = torch.stack([flow for flow, _ in labels])
            made[mask] = torch.stack([valid for _, valid in labels])
        return made


def _picture(path: Path) -> Tensor:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise InputError(f"{path}: not a picture that can be read")
    return torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1).float() / 255


def _label(path: Path | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if path is None:
        return torch.zeros(2, *size), torch.zeros(*size, dtype=torch.bool)
    flow, valid = read_kitti_png(path) if path.suffix == ".png" else read_flow(path)
    if tuple(flow.shape[-2:]) != tuple(size):
        raise InputError(f"{path}: {flow.shape[-1]}x{flow.shape[-2]}, but its pictures are {size[1]}x{size[0]}")
    return flow, valid


def chairs(folder: Path, frames: int) -> list[Sample]:
    """FlyingChairs: `NNNNN_img1.ppm`, `NNNNN_img2.ppm`, `NNNNN_flow.flo`, in `folder` or `folder/data`. Pairs only."""
    if frames > 2:
        raise InputError(f"--data chairs:{folder}: FlyingChairs has pairs, this method learns from {frames} frames; "
                         "things, sintel, kitti and world have longer clips")  # fmt: skip
    base = folder / "data" if (folder / "data").is_dir() else folder
    return [Sample((flow.with_name(flow.name[:5] + "_img1.ppm"), flow.with_name(flow.name[:5] + "_img2.ppm")),
                   (flow,), (None,)) for flow in sorted(base.glob("*_flow.flo"))]  # fmt: skip


def things(folder: Path, frames: int) -> list[Sample]:
    """FlyingThings3D: `frames_cleanpass/TRAIN/*/*/left/*.png`,
    `optical_flow/TRAIN/*/*/into_{future,past}/left/*.pfm`."""
    made = []
    for scene in sorted((folder / "frames_cleanpass" / "TRAIN").glob("*/*/left")):
        flow = folder / "optical_flow" / "TRAIN" / scene.parent.parent.name / scene.parent.name
        ahead = {path.stem.split("_")[1]: path for path in (flow / "into_future" / "left").glob("*.pfm")}
        back = {path.stem.split("_")[1]: path for path in (flow / "into_past" / "left").glob("*.pfm")}
        pictures = sorted(scene.glob("*.png"))
        for window in _windows(pictures, frames):
            made.append(Sample(window, tuple(ahead.get(path.stem) for path in window[:-1]),
                               tuple(back.get(path.stem) for path in window[1:])))  # fmt: skip
    return made


def sintel(folder: Path, frames: int) -> list[Sample]:
    """MPI Sintel: `training/{clean,final}/SCENE/frame_NNNN.png` and `training/flow/SCENE/frame_NNNN.flo`."""
    made = []
    for scene in sorted(path for kind in ("clean", "final") for path in (folder / "training" / kind).glob("*")):
        for window in _windows(sorted(scene.glob("*.png")), frames):
            flows = [folder / "training" / "flow" / scene.name / f"{path.stem}.flo" for path in window[:-1]]
            made.append(Sample(window, tuple(path if path.is_file() else None for path in flows), (None,) * len(flows)))
    return made


def kitti(folder: Path, frames: int) -> list[Sample]:
    """KITTI 2015: `training/image_2/NNNNNN_FF.png`, `training/flow_occ/NNNNNN_10.png` for frames 10 to 11.

    The multi-view extension brings the frames before. The labelled gap is the last of a clip; without those frames
    the first one is repeated.
    """
    made = []
    for flow in sorted((folder / "training" / "flow_occ").glob("*_10.png")):
        pictures = [folder / "training" / "image_2" / f"{flow.stem[:-2]}{k:02}.png" for k in range(13 - frames - 1, 12)]
        first = next(path for path in pictures if path.is_file() or path == pictures[-2])
        pictures = [path if path.is_file() else first for path in pictures]
        made.append(Sample(tuple(pictures), (None,) * (frames - 2) + (flow,), (None,) * (frames - 1)))
    return made


def hd1k(folder: Path, frames: int) -> list[Sample]:
    """HD1K: `hd1k_input/image_2/SSSSSS_FFFF.png`, `hd1k_flow_gt/flow_occ/SSSSSS_FFFF.png`."""
    scenes: dict[str, list[Path]] = {}
    for path in sorted((folder / "hd1k_input" / "image_2").glob("*.png")):
        scenes.setdefault(path.stem.split("_")[0], []).append(path)
    made = []
    for pictures in scenes.values():
        for window in _windows(pictures, frames):
            flows = [folder / "hd1k_flow_gt" / "flow_occ" / path.name for path in window[:-1]]
            made.append(Sample(window, tuple(path if path.is_file() else None for path in flows), (None,) * len(flows)))
    return made


def _windows(pictures: list[Path], frames: int) -> list[tuple[Path, ...]]:
    return [tuple(pictures[k : k + frames]) for k in range(len(pictures) - frames + 1)]


LAYOUTS = {"chairs": chairs, "things": things, "sintel": sintel, "kitti": kitti, "hd1k": hd1k}


class FlowBatches:
    """Endless augmented crops of labelled clips: the `Batches` of every flow method.

    Crops, mirror images, the clip in reverse, other colours, sensor noise, JPEG; now and then a clip that stands
    still, of zero flow.
    """

    def __init__(self, clips: Pool | Files, frames: int, crop: tuple[int, int], seed: int) -> None:
        self.clips, self.frames, self.crop, self.seed = clips, frames, crop, seed

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """Crops stacked; shapes as in the module's docstring with a leading dimension b, and two masks more: `hidden`
        and `backward_hidden` `(b, t-1, h, w)`, the pixels that the other frame does not show.
        """
        made = [self._example(np.random.default_rng([self.seed, index])) for index in indices]
        return {name: torch.stack([example[name] for example in made]) for name in made[0]}

    def _example(self, rng: np.random.Generator) -> dict[str, Tensor]:
        clip = self.clips[int(rng.integers(len(self.clips)))]
        spare = len(clip["video"]) - self.frames
        begin = int(rng.integers(spare + 1))
        clip = {name: value[begin : begin + self.frames - (name != "video")] for name, value in clip.items()}
        if rng.random() < 0.5 and bool(clip["backward_valid"].any()):
            clip = {name: value.flip(0) for name, value in clip.items()}
            clip["flow"], clip["backward"] = clip["backward"], clip["flow"]
            clip["valid"], clip["backward_valid"] = clip["backward_valid"], clip["valid"]
        clip = _cropped(clip, self.crop, rng)
        for axis, component in ((-1, 0), (-2, 1)):
            if rng.random() < 0.5:
                clip = {name: value.flip(axis) for name, value in clip.items()}
                for name in ("flow", "backward"):
                    clip[name][:, component] *= -1
        if rng.random() < 0.03:
            clip["video"] = clip["video"][:1].repeat(self.frames, 1, 1, 1)
            clip["flow"], clip["backward"] = torch.zeros_like(clip["flow"]), torch.zeros_like(clip["flow"])
            clip["valid"] = clip["backward_valid"] = torch.ones_like(clip["valid"])
        clip["video"] = _recorded(clip["video"], rng)
        clip["hidden"] = _hidden(clip["flow"], clip["backward"], clip["backward_valid"])
        clip["backward_hidden"] = _hidden(clip["backward"], clip["flow"], clip["valid"])
        return clip


def _hidden(flow: Tensor, back: Tensor, known: Tensor) -> Tensor:
    """Which pixels the other frame does not show; none where a gap has no flow back."""
    return occlusion(flow, back)[:, 0] & known.flatten(1).any(1)[:, None, None]


def _cropped(clip: dict[str, Tensor], crop: tuple[int, int], rng: np.random.Generator) -> dict[str, Tensor]:
    height, width = clip["video"].shape[-2:]
    if height < crop[0] or width < crop[1]:
        raise InputError(f"--data: a clip of {width}x{height} is smaller than the crop of {crop[1]}x{crop[0]}")
    top, left = int(rng.integers(height - crop[0] + 1)), int(rng.integers(width - crop[1] + 1))
    return {name: value[..., top : top + crop[0], left : left + crop[1]].clone() for name, value in clip.items()}


def _recorded(video: Tensor, rng: np.random.Generator) -> Tensor:
    """As a camera might have seen it: colours, exposure that wavers, noise, compression."""
    gain = torch.from_numpy(rng.uniform(0.7, 1.3, (1, 3, 1, 1)) * rng.uniform(0.97, 1.03, (len(video), 1, 1, 1)))
    video = ((video - 0.5) * gain.float() + 0.5 + float(rng.uniform(-0.1, 0.1))).clamp(0, 1)
    video = video ** float(rng.uniform(0.75, 1.35))
    if rng.random() < 0.4:
        grain = torch.from_numpy(rng.standard_normal(video.shape, dtype=np.float32))
        video = video + float(rng.uniform(0, 0.04)) * grain
    if rng.random() < 0.3:
        quality = [int(cv2.IMWRITE_JPEG_QUALITY), int(rng.integers(30, 95))]
        pictures = (video.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
        packed = [cv2.imdecode(cv2.imencode(".jpg", picture, quality)[1], cv2.IMREAD_COLOR) for picture in pictures]
        video = torch.from_numpy(np.stack(packed)).permute(0, 3, 1, 2).float() / 255
    return video.clamp(0, 1)


def batches(source: str, frames: int, crop: tuple[int, int], seed: int) -> FlowBatches:
    """The training data of `source`: `world`, or one of `LAYOUTS` with its folder, such as `sintel:DIR`.

    Raises InputError for an unknown source, and for a folder that does not hold what its layout says.
    """
    kind, _, folder = source.partition(":")
    if kind == "world":
        return FlowBatches(Pool(seed), frames, crop, seed)
    if kind not in LAYOUTS or not folder:
        wanted = ", ".join(f"{name}:DIR" for name in LAYOUTS)
        raise InputError(f"--data {source}: flow is learnt from world, {wanted}")
    samples = LAYOUTS[kind](Path(folder), frames)
    if not samples:
        raise InputError(f"--data {source}: no clip of {frames} frames in the layout that "
                         f"`frameloom.tasks.flow.data.{kind}` describes")  # fmt: skip
    return FlowBatches(Files(samples), frames, crop, seed)
