"""`World`: a batch of synthetic scenes, one a seed, that renders itself with every label."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.errors import InputError
from frameloom.world import kinds, language, people
from frameloom.world.geometry import orbit, project
from frameloom.world.language import Event, Question
from frameloom.world.render import OUTPUTS, Parts, Renderer, gather, place
from frameloom.world.scene import Scene
from frameloom.world.sound import RATE, impacts
from frameloom.world.tracer import bounds

KINDS = {
    "objects": kinds.objects,
    "flyover": kinds.flyover,
    "motion": kinds.motion,
    "bounce": kinds.bounce,
    "figure": people.figure,
    "talk": people.talk,
    "toys": kinds.toys,
}
# Masks a scene of each kind has, the background first; fixed, so that items of a data set stack.
BODIES = {"objects": 4, "flyover": 15, "motion": 7, "bounce": 3, "figure": 2, "talk": 3, "toys": 3}
# Pixels a frame in a picture whose shorter side is 64.
MOTION = {"flyover": 1.0, "motion": 4.0}
# Pixels traced at once: what keeps intermediates in the cache of a processor, and a GPU busy.
_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 23}


class World:
    """`len(seeds)` scenes of one kind over `frames` frames at `fps` frames a second.

    A seed's scene is the same whatever is beside it and at any resolution.

    Args:
        kind: `"objects"` (one to three coloured shapes that move), `"flyover"` (a camera over photographs),
            `"motion"` (textured shapes and photographs in any motion), `"bounce"` (a ball and its impacts),
            `"figure"` (a person of capsules with joints), `"talk"` (a head whose mouth follows a voice),
            `"toys"` (one plain shape that moves, or two, for pictures of 32 pixels).
        motion: for `"flyover"` the typical flow, for `"motion"` the highest speed of a body, in pixels a
        frame of a
            picture whose shorter side is `size`. The other kinds have their own pace.
        count: for `"toys"`, how many shapes; None takes one or two.
        voice: for `"talk"`, one waveform at 16 kHz a scene; None makes voices up.

    Raises:
        InputError: an unknown kind, fewer than 1 frame, no seed.
    """

    def __init__(
        self,
        kind: str,
        seeds: Sequence[int],
        frames: int = 16,
        fps: float | int = 8,
        motion: float | int | None = None,
        size: int = 64,
        device: str | torch.device = "cpu",
        voice: Sequence[np.ndarray] | None = None,
        count: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"kind of world {kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if frames < 1 or fps <= 0 or not len(seeds):
            raise InputError(f"a world needs 1 frame or more, a rate above 0 and a seed, not {frames} at {fps} fps")
        if voice is not None and (kind != "talk" or len(voice) != len(seeds)):
            raise InputError(f"voices belong to kind 'talk', one a seed; got {len(voice)} for kind {kind!r}")
        if count is not None and (kind != "toys" or count not in (1, 2)):
            raise InputError(f"a count of 1 or 2 belongs to kind 'toys'; got {count} for kind {kind!r}")
        self.kind, self.seeds, self.frames, self.fps = kind, list(seeds), frames, float(fps)
        self.device = torch.device(device)
        pace = (motion if motion is not None else MOTION.get(kind, 0.0) * size / 64) / size
        self.scenes: list[Scene] = []
        for b, seed in enumerate(self.seeds):
            rng = np.random.default_rng([seed, list(KINDS).index(kind)])
            extra = {} if voice is None else {"voice": np.asarray(voice[b], dtype=float)}
            if count is not None:
                extra["count"] = count
            self.scenes.append(KINDS[kind](rng, frames / self.fps, self.fps, pace, **extra))
        self.parts = gather(self.scenes)

    @property
    def times(self) -> Float[np.ndarray, "t"]:
        """The instants of the frames in seconds."""
        return np.arange(self.frames) / self.fps

    def poses(self, times: np.ndarray, views: int | None = None, arc: float | int = 360.0) -> np.ndarray:
        """World-from-camera matrices `(b, v, t, 4, 4)` at any instants; v is 1 when `views` is None."""
        turns = [np.deg2rad(arc) * v / (views or 1) for v in range(views or 1)]
        return np.stack([
            np.stack([orbit(scene.camera(times), scene.pivot, turn) for turn in turns]) for scene in
            self.scenes
        ])  # fmt: skip

    def cameras(
        self, height: int, width: int, views: int | None = None, arc: float | int = 360.0
    ) -> tuple[Float[Tensor, "b 3 3"], Tensor]:
        """Intrinsics `(b, 3, 3)` and world-from-camera poses `(b, t, 4, 4)`, or `(b, v, t, 4, 4)` with
        `views`.

        Pixel j covers [j, j + 1); camera axes are x right, y down, z forward.
        """
        intrinsics = torch.zeros(len(self.scenes), 3, 3)
        focal = torch.from_numpy(self._focal(height, width))
        intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal.float()
        intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1
        poses = torch.from_numpy(self.poses(self.times, views, arc)).float()
        return intrinsics.to(self.device), (poses if views else poses[:, 0]).to(self.device)

    def trajectories(
        self, height: int, width: int, views: int | None = None, arc: float | int = 360.0
    ) -> dict[str, Tensor]:
        """Where the bodies are, the background (all zeros but its box) first; k as in the masks.

        Returns `centres` `(b, t, k, 3)` in the world; `points` `(b, t, k, 2)`, their pictures in pixels;
        `depths` `(b, t, k)`; `boxes` `(b, t, k, 4)` (x0, y0, x1, y1) in pixels, cut at the picture's edges,
        whether or not the body is hidden; `present` `(b, k)`. With `views`, points, depths and boxes have a
        dimension v after b.
        """
        count, times = BODIES[self.kind], self.times
        poses = self.poses(times, views, arc)
        centres = np.zeros((len(self.scenes), len(times), count, 3))
        present = torch.zeros(len(self.scenes), count, dtype=torch.bool)
        for b, scene in enumerate(self.scenes):
            present[b, : len(scene.bodies)] = True
            for k, body in enumerate(scene.bodies[1:], 1):
                centres[b, :, k] = body.centre(times)
        focal = self._focal(height, width)[:, None, None, None, None]
        seen, depths = project(centres[:, None], poses[:, :, :, None])
        points = seen * focal + (width / 2, height / 2)
        there = present.numpy()[:, None, None, :] & (np.arange(count) > 0)

        matrices = place(self.scenes, poses, times, self.parts.shapes.shape[1])
        shapes, half = (
            np.broadcast_to(array[:, None, None], matrices.shape[:4]) for array in (self.parts.shapes, self.parts.half)
        )
        of_parts = bounds(np.linalg.inv(matrices), shapes, half) * focal + (width / 2, height / 2) * 2
        size = np.array([width, height], dtype=float)
        boxes = np.zeros((*matrices.shape[:3], count, 4))
        boxes[..., 0, :] = (0, 0, width, height)
        for b, scene in enumerate(self.scenes):
            for k in range(1, len(scene.bodies)):
                own = of_parts[b][:, :, [i for i, part in enumerate(scene.parts) if part.body == k]]
                boxes[b, :, :, k, :2] = np.clip(own[..., :2].min(2), 0, size)
                boxes[b, :, :, k, 2:] = np.clip(own[..., 2:].max(2), 0, size)
        points, depths = np.where(there[..., None], points, 0), np.where(there, depths, 0)
        pictures = {"points": points, "depths": depths, "boxes": boxes}
        found = {name: torch.from_numpy(array if views else array[:, 0]) for name, array in pictures.items()}
        found["centres"] = torch.from_numpy(centres)
        found = {name: value.to(self.device, torch.float32) for name, value in found.items()}
        return found | {"present": present.to(self.device)}

    def joints(
        self, height: int, width: int, views: int | None = None, arc: float | int = 360.0
    ) -> tuple[Float[Tensor, "b t j 3"], Tensor]:
        """A figure's joints (named by `JOINTS`) in the world and in pixels, `(b, t, j, 2)` or `(b, v, t, j,
        2)`.

        Raises:
            InputError: another kind than `"figure"`.
        """
        if self.kind != "figure":
            raise InputError(f"joints belong to kind 'figure', not {self.kind!r}")
        world = np.stack([scene.joints(self.times) for scene in self.scenes])
        focal = self._focal(height, width)[:, None, None, None, None]
        seen, _ = project(world[:, None], self.poses(self.times, views, arc)[:, :, :, None])
        pixels = torch.from_numpy(seen * focal + (width / 2, height / 2)).to(self.device, torch.float32)
        return torch.from_numpy(world).to(self.device, torch.float32), pixels if views else pixels[:, 0]

    def sound(self) -> tuple[Float[Tensor, "b n"], list[list[int]]]:
        """Waveforms in [-1, 1] at 16 kHz as long as the clip, and the frames nearest to the impacts.

        Impacts sound in `"bounce"`, a voice in `"talk"`; the other kinds are silent.
        """
        length = round(self.frames / self.fps * RATE)
        waves, frames = torch.zeros(len(self.scenes), length), []
        for b, scene in enumerate(self.scenes):
            if scene.contacts:
                wave = impacts(scene.contacts, scene.material, scene.bodies[1].radius, scene.duration)
                waves[b] = torch.from_numpy(wave).float()
            if scene.voice is not None:
                wave = torch.from_numpy(scene.voice[:length]).float()
                waves[b, : len(wave)] = wave
            nearest = [round(contact.time * self.fps) for contact in scene.contacts]
            frames.append([frame for frame in nearest if frame < self.frames])
        return waves.to(self.device), frames

    def captions(self) -> list[str]:
        """One sentence a scene, in words of `VOCABULARY`."""
        return [language.caption(scene, self.fps) for scene in self.scenes]

    def events(self) -> list[list[Event]]:
        """For each scene what happens in it, with its frames."""
        return [language.events(scene, self.frames, self.fps) for scene in self.scenes]

    def questions(self) -> list[list[Question]]:
        """For each scene questions with their true answers."""
        return [language.questions(scene, self.fps) for scene in self.scenes]

    def _focal(self, height: int, width: int) -> np.ndarray:
        """Focal lengths in pixels."""
        return np.array([scene.focal for scene in self.scenes]) * min(height, width)

    def _renderer(self, times: np.ndarray, height: int, width: int, views: int | None, arc: float | int) -> Renderer:
        matrices = place(self.scenes, self.poses(times, views, arc), times, self.parts.shapes.shape[1])
        scene = np.repeat(np.arange(len(self.scenes)), (views or 1) * len(times))
        parts = Parts(*(array[scene] for array in vars(self.parts).values()))
        focal = np.array([s.focal for s in self.scenes])[scene]
        return Renderer(matrices.reshape(-1, *matrices.shape[3:]), parts, focal, height, width, self.device)

    @torch.inference_mode()
    def render(
        self,
        height: int = 64,
        width: int = 64,
        outputs: Sequence[str] = ("rgb",),
        supersample: int = 1,
        blur: int = 1,
        noise: float | int = 0.0,
        views: int | None = None,
        arc: float | int = 360.0,
        start: int = 0,
        stop: int | None = None,
    ) -> dict[str, Tensor]:
        """Pictures and dense labels of frames `start` to `stop`; only what is asked for is computed.

        Args:
            outputs: of
                `rgb` `(b, t, 3, h, w)` in [0, 1];
                `depth` `(b, t, 1, h, w)` along the optical axis;
                `flow` `(b, t-1, 2, h, w)` from frame k to k + 1 and `backward_flow` from k + 1 to k, pixels,
                x first; `occlusion`, `backward_occlusion` `(b, t-1, 1, h, w)`: 1 where the point of the flow
                is hidden or out of the picture in the other frame, else 0;
                `masks` `(b, t, k, h, w)`: one-hot, the background first.
                Labels hold at pixel centres.
            supersample: pictures are rendered so many times as high and wide and averaged.
            blur: number of instants averaged into a picture over half a frame's time (a 180 degree shutter).
            noise: standard deviation of the sensor's noise; it differs from frame to frame and view to view.
            views: None, or the number v of cameras; then every output has a dimension v after b. View i is
            the first
                one carried round the scene by `arc * i / v` degrees.

        Raises:
            InputError: an unknown output, or a size below 1.
        """
        wanted = set(outputs)
        if unknown := wanted - set(OUTPUTS):
            raise InputError(f"output {sorted(unknown)[0]!r} is unknown; choose from {', '.join(OUTPUTS)}")
        if min(height, width, supersample, blur) < 1 or (views is not None and views < 1):
            raise InputError(f"sizes and counts are 1 or more, not {height}x{width}, {supersample=}, {blur=}, {views=}")
        times = self.times[start:stop]
        lead = (len(self.scenes), views or 1, len(times))
        made: dict[str, Tensor] = {}
        sharp = wanted - {"rgb"} if blur > 1 else wanted
        if sharp:
            renderer = self._renderer(times, height, width, views, arc)
            made = self._rows(renderer, len(times), sharp, supersample)
        if blur > 1 and "rgb" in wanted:
            instants = times[:, None] + ((np.arange(blur) + 0.5) / blur - 0.5) * 0.5 / self.fps
            renderer = self._renderer(instants.ravel(), height, width, views, arc)
            made["rgb"] = self._rows(renderer, 1, {"rgb"}, supersample)["rgb"].unflatten(0, (-1, blur)).mean(1)
        result = {}
        for name in OUTPUTS:
            if name in wanted:
                value = made[name].unflatten(0, lead)
                if name in ("flow", "occlusion"):
                    value = value[:, :, :-1]
                elif name in ("backward_flow", "backward_occlusion"):
                    value = value[:, :, 1:]
                result[name] = value
        if noise > 0 and "rgb" in wanted:
            result["rgb"] = self._noisy(result["rgb"], noise, start)
        return result if views else {name: value[:, 0] for name, value in result.items()}

    def _rows(self, renderer: Renderer, frames: int, outputs: set[str], supersample: int) -> dict[str, Tensor]:
        """All rows of a renderer, a few at a time; labels of a row look at its clip's rows beside it."""
        count = len(renderer.focal)
        index = np.arange(count)
        forward = np.where((index + 1) % frames == 0, index, index + 1)
        backward = np.where(index % frames == 0, index, index - 1)
        area = renderer.height * renderer.width * supersample**2
        step = max(1, _PIXELS.get(self.device.type, 1 << 20) // area)
        pieces: dict[str, list[Tensor]] = {}
        bodies = torch.arange(BODIES[self.kind], device=self.device)[:, None, None]
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            for name, value in renderer.rows(rows, outputs, supersample, forward, backward).items():
                value = (value[:, None] == bodies).float() if name == "masks" else value
                pieces.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in pieces.items()}

    def _noisy(self, rgb: Tensor, noise: float | int, start: int) -> Tensor:
        """Gaussian noise, a generator a frame: a frame has the same noise in any window."""
        grain = torch.empty_like(rgb, device="cpu")
        for b, seed in enumerate(self.seeds):
            for v in range(rgb.shape[1]):
                for t in range(rgb.shape[2]):
                    state = np.random.SeedSequence([seed, v, start + t]).generate_state(1, np.uint64)[0]
                    generator = torch.Generator().manual_seed(int(state >> 1))
                    grain[b, v, t] = torch.randn(rgb.shape[3:], generator=generator)
        return (rgb + noise * grain.to(rgb.device)).clamp_(0, 1)
