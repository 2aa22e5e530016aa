"""Says exactly what a toys clip shows, so that small text-to-video models can be measured against their captions.

Every pixel is unmixed: p = (1 - a) ground + a s colour, where `ground` is its row's background, s a shade that the
light can give and a the soft coverage by one of the six colours. What is covered is compared with the silhouettes of
the three shapes, traced by the world's own camera at the quarter pixel of the centroid: the shape is the one of most
overlap. Hard masks lose the shapes of the small ones; nothing here is learned.
"""

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from frameloom.errors import InputError
from frameloom.world.kinds import (
    STUDIOS,
    TOY_EYE,
    TOY_FOCAL,
    TOY_LANES,
    TOY_SIZES,
    TOY_TARGET,
    fixed_camera,
    studio,
    toy_form,
)
from frameloom.world.render import AMBIENT, Parts, Renderer, gather, place
from frameloom.world.scene import COLOURS, PLAIN, Body, Part, Scene, Surface, fixed

COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = tuple(TOY_SIZES)
WORDS = ("ball", "box", "capsule")
WAYS = ("left", "right", "up", "down")

OVERLAP = 0.6  # of a shape with its template, at least
STILL = 0.1 / 32  # sides of the picture a frame: what moves is faster, what stands still is slower
HIDDEN = 0.95  # of an object's own area: what shows less while another object touches it is not judged
TOLERANCE = 0.04  # mean difference of a background from a studio's
_AXES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
_FINE = 4  # templates are traced so many times finer: the places within a pixel that they are kept for
_SPREAD = 8 / 32  # half a template, in sides of the picture
_PLACES = (0.25, 0.5, 0.75)  # where in the picture templates are traced; perspective changes them little between
_WINDOW = 16  # frames that share a background
_REACH = 0.5 * (1.5 + 2.6)  # mean way of a toy over a clip, in the world; half of it for up and down

_CLAUSES = {
    "rolls left": "left", "rolls right": "right", "slides left": "left", "slides right": "right",
    "rises": "up", "sinks": "down", "stands still": None,
}  # fmt: skip
_NAME = rf"a (?P<size>{'|'.join(SIZE_NAMES)}) (?P<colour>{'|'.join(COLOUR_NAMES)}) (?P<word>{'|'.join(WORDS)})"
_FORM = re.compile(rf"{_NAME}(?: (?:that )?(?P<clause>{'|'.join(_CLAUSES)}))?(?: (?P<relation>behind|in front of))?")


@dataclass(frozen=True)
class Wanted:
    """An object that a caption asks for. `moves` is None for what stands still.

    `relation` is "behind" or "in front of" when it passes the object that is named next, else None.
    """

    size: str
    colour: str
    word: str
    moves: str | None = None
    relation: str | None = None


def parse_caption(text: str) -> list[Wanted]:
    """What a caption of toys asks for, in its order. Raises InputError for sentences that the world does not say."""
    unknown = InputError(f"caption {text!r}: not a sentence about toys, such as 'a small red ball rolls left'")
    wanted: list[Wanted] = []
    for part in re.split(r" and | (?=(?<=behind )a )| (?=(?<=in front of )a )", text):
        found = _FORM.fullmatch(part.strip())
        passed = bool(wanted) and wanted[-1].relation is not None
        # Only what is passed may be named without a word on what it does: it stands still.
        if found is None or (found["clause"] is None and not passed):
            raise unknown
        way = _CLAUSES[found["clause"]] if found["clause"] else None
        wanted.append(Wanted(found["size"], found["colour"], found["word"], way, found["relation"]))
    if wanted[-1].relation is not None:
        raise unknown
    return wanted


@dataclass(frozen=True)
class Found:
    """What `detect` finds, colours in the order of `COLOUR_NAMES` and shapes in that of `WORDS`.

    `coverage` `(b t 6 h w)` in [0, 1]; `area` `(b t 6)` in pixels; `centroid` `(b t 6 2)` in pixels, x first (pixel j
    covers [j, j + 1); NaN where there is nothing); `overlap` `(b t 6 3)`, intersection over union with the best
    template of each shape, over pixels that no other colour covers; `present` `(b t 6)`: enough of it to be an object.
    """

    coverage: Float[Tensor, "b t 6 h w"]
    area: Float[Tensor, "b t 6"]
    centroid: Float[Tensor, "b t 6 2"]
    overlap: Float[Tensor, "b t 6 3"]
    present: Bool[Tensor, "b t 6"]


def detect(video: Float[Tensor, "b t 3 h w"]) -> Found:
    """Coverage, place and shape of each colour in every frame of clips in [0, 1], of any length."""
    parts = [_detect(few) for few in video.split(16)]
    return Found(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Found)})


def _legal(video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """A generator may give anything: floats in [0, 1], grey where there is no number."""
    return video.float().nan_to_num(0.5).clamp(0, 1)


def _detect(video: Float[Tensor, "b t 3 h w"]) -> Found:
    video = _legal(video)
    height, width = video.shape[-2:]
    bank, least = _templates(min(height, width))
    bank = bank.to(video.device)
    cover, error = _unmix(video)
    every = _kept(cover, error, bank.shape[-1])
    present = every.sum((-2, -1)) > least
    # Only colours that are there may share the pixels at the rims, where all colours fit.
    coverage = _kept(cover, error.masked_fill(~present[..., None, None], torch.inf), bank.shape[-1])
    area = coverage.sum((-2, -1))
    present = present & (area > least)
    x, y = (torch.arange(size, device=video.device) + 0.5 for size in (width, height))
    centroid = torch.stack([(coverage.sum(-2) * x).sum(-1), (coverage.sum(-1) * y).sum(-1)], -1)
    centroid = (centroid / area[..., None]).masked_fill(~present[..., None], torch.nan)
    overlap = torch.zeros(*present.shape, len(WORDS), device=video.device)
    overlap[present] = _overlap(coverage, centroid, present, bank)
    return Found(coverage, area, centroid, overlap, present)


def _ground(video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """The background: in each row the median of its least colourful third, over a window of frames."""
    grounds = []
    for window in video.split(_WINDOW, dim=1):
        rows = window.permute(0, 3, 2, 1, 4).flatten(3)  # b h 3 (t w)
        pale = (rows.amax(2) - rows.amin(2)).argsort(-1)[:, :, None, : max(1, rows.shape[-1] // 3)]
        ground = rows.gather(-1, pale.expand(-1, -1, 3, -1)).median(-1).values
        grounds.append(ground.transpose(1, 2)[:, None, ..., None].expand(window.shape))
    return torch.cat(grounds, 1)


def _unmix(video: Float[Tensor, "b t 3 h w"]) -> tuple[Float[Tensor, "b t 6 h w"], Float[Tensor, "b t 6 h w"]]:
    """Coverage by each colour if it alone lay over the background, and the distance in RGB that remains."""
    ground = _ground(video)
    covers, errors = [], []
    pg, gg = _dot(video, ground), _dot(ground, ground)
    for colour in COLOURS.values():
        paint = video.new_tensor(colour)[:, None, None]
        pc, gc, cc = _dot(video, paint), _dot(ground, paint), (paint * paint).sum()
        # Least squares for p = u ground + v colour; the shade v / (1 - u) is then kept to what the light can do.
        scale = (gg * cc - gc * gc).clamp(min=1e-6)
        u, v = (pg * cc - pc * gc) / scale, (pc * gg - pg * gc) / scale
        shade = (v / (1 - u).clamp(min=0.05)).clamp(AMBIENT, 1.05)
        over = shade[:, :, None] * paint - ground
        cover = (_dot(video - ground, over) / _dot(over, over).clamp(min=1e-6)).clamp(0, 1)
        covers.append(cover)
        errors.append((video - ground - cover[:, :, None] * over).norm(dim=2))
    return torch.stack(covers, 2), torch.stack(errors, 2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(2)


def _kept(
    cover: Float[Tensor, "b t 6 h w"], error: Float[Tensor, "b t 6 h w"], size: int
) -> Float[Tensor, "b t 6 h w"]:
    """Coverage by the colour that fits best: in the window of `size` pixels that holds most of it, without specks."""
    best = error.argmin(2, keepdim=True)
    one = torch.zeros_like(cover).scatter_(2, best, 1.0) * (error < 0.25) * cover
    one = one * (_box(one, 3) > 0.2)
    height, width = one.shape[-2:]
    top = _box(one, size // 4 * 2 + 1).flatten(-2).argmax(-1)[..., None, None]
    y, x = torch.arange(height, device=one.device)[:, None], torch.arange(width, device=one.device)
    return one * (((y - top // width).abs() <= size // 2) & ((x - top % width).abs() <= size // 2))


def _box(images: Float[Tensor, "b t 6 h w"], size: int) -> Float[Tensor, "b t 6 h w"]:
    """Mean over `size` x `size` pixels, zeros beyond the picture."""
    flat = F.avg_pool2d(images.flatten(0, 1), (1, size), 1, (0, size // 2))
    return F.avg_pool2d(flat, (size, 1), 1, (size // 2, 0)).view_as(images)


def _overlap(
    coverage: Float[Tensor, "b t 6 h w"], centroid: Float[Tensor, "b t 6 2"], present: Bool[Tensor, "b t 6"],
    bank: Float[Tensor, "places kinds phases k k"],
) -> Float[Tensor, "n words"]:  # fmt: skip
    """Intersection over union of what is present with its templates, the best of each word."""
    height, width = coverage.shape[-2:]
    size = bank.shape[-1]
    reach = size // 2
    b, t, colour = present.nonzero(as_tuple=True)
    at = centroid[b, t, colour]
    fine = torch.round((at - 0.5) * _FINE).long()  # in quarters of a pixel, from the middle of pixel 0
    base, phase = fine.div(_FINE, rounding_mode="floor"), fine % _FINE
    side = min(height, width)
    column, row = ((at - at.new_tensor([width, height]) / 2) / side * 4).round().clamp(-1, 1).long().unbind(-1)
    where = (row + 1) * len(_PLACES) + column + 1
    # Beyond the picture, and where another colour lies, nothing can be said.
    free = F.pad(coverage.sum(2), (reach,) * 4, value=1.0)
    own = F.pad(coverage, (reach,) * 4)
    steps = torch.arange(size, device=coverage.device)
    rows, columns = (base[:, 1, None] + steps)[:, :, None], (base[:, 0, None] + steps)[:, None, :]
    b, t, colour = b[:, None, None], t[:, None, None], colour[:, None, None]
    mine = own[b, t, colour, rows, columns]
    weight = 1 - (free[b, t, rows, columns] - mine).clamp(0, 1)
    found = []
    for begin in range(0, len(at), 512):
        part = slice(begin, begin + 512)
        template = bank[where[part], :, phase[part, 1] * _FINE + phase[part, 0]]
        seen, w = mine[part, None], weight[part, None]
        both = (torch.minimum(seen, template) * w).sum((-2, -1))
        either = (torch.maximum(seen, template) * w).sum((-2, -1))
        found.append((both / either.clamp(min=1e-6)).unflatten(1, (len(WORDS), -1)).amax(-1))
    return torch.cat(found) if found else coverage.new_zeros(0, len(WORDS))


def _trace(scenes: list[Scene], output: str, height: int, width: int, supersample: int = 1) -> Tensor:
    """One frame of each scene, `(n, h, w)` or `(n, 3, h, w)`."""
    times = np.zeros(1)
    camera = np.stack([scene.camera(times) for scene in scenes])[:, None]
    parts = gather(scenes)
    made = []
    for n in range(len(scenes)):
        one = Parts(*(getattr(parts, field.name)[n : n + 1] for field in fields(Parts)))
        matrices = place(scenes[n : n + 1], camera[n : n + 1], times, one.shapes.shape[1])[0, 0]
        renderer = Renderer(matrices, one, np.array([TOY_FOCAL]), height, width, torch.device("cpu"))
        made.append(renderer.rows(slice(0, 1), {output}, supersample, np.zeros(1, int), np.zeros(1, int))[output])
    return torch.cat(made)


def _alone(parts: list[Part]) -> Scene:
    return Scene("toys", parts, [Body("background")], fixed_camera(TOY_EYE, TOY_TARGET), TOY_FOCAL, 1.0)


@lru_cache
def _templates(side: int) -> tuple[Float[Tensor, "places kinds phases k k"], float]:
    """Soft silhouettes about their centroid, which lies at `phase` quarters of a pixel (y, then x) from the middle
    of the middle pixel; kinds are word by word, each in both sizes and all lanes. And the least area of an object.
    """
    pose = fixed_camera(TOY_EYE, TOY_TARGET)(np.zeros(1))[0]
    scenes = []
    for y, x, word, size, lane in product(_PLACES, _PLACES, WORDS, TOY_SIZES.values(), TOY_LANES):
        ray = pose[:3, :3] @ [(x - 0.5) / TOY_FOCAL, (y - 0.5) / TOY_FOCAL, 1.0]
        centre = TOY_EYE + ray * (lane - TOY_EYE[2]) / ray[2]
        shape, linear, half = toy_form(word, size)
        toy = Part(shape, 1, fixed(linear, centre), Surface(PLAIN, ((1.0,) * 3,) * 2), half=half)
        scenes.append(_alone([studio(0)[0], toy]))
    reach = round(_SPREAD * side) + 1
    size, fine = 2 * reach + 1, side * _FINE
    masks = F.pad((_trace(scenes, "masks", fine, fine) == 1).float(), (size * _FINE,) * 4)
    found = []
    for mask in masks:
        middle = mask.nonzero().double().mean(0) + 0.5
        phases = []
        for phase in product(range(_FINE), repeat=2):
            y, x = ((m - _FINE * (reach + 0.5) - p).round().int() for m, p in zip(middle, phase, strict=True))
            crop = mask[y : y + size * _FINE, x : x + size * _FINE]
            phases.append(F.avg_pool2d(crop[None], _FINE)[0])
        found.append(torch.stack(phases))
    bank = torch.stack(found).unflatten(0, (len(_PLACES) ** 2, -1))
    return bank, 0.6 * float(bank.sum((-2, -1)).min())


@lru_cache
def _studios(height: int, width: int) -> Float[Tensor, "studios 3 h w"]:
    """The studios without toys."""
    return _trace([_alone(studio(number)) for number in range(len(STUDIOS))], "rgb", height, width, 2)


def score(video: Float[Tensor, "b t 3 h w"], captions: list[str], frames: int = 16) -> dict[str, float]:
    """How well clips in [0, 1] show what their captions say, by `detect`; shares are of 1, higher is better.

    identity: share of frames in which every named object is there in its colour and its shape (overlap with a
        template above 0.6). A frame in which another named object hides more than a twentieth of it is not judged.
    identity_clip: share of clips that are right in three quarters of their judged frames.
    shape: as identity, but a share of the named objects that are seen.
    colour_set: share of clips that show the named colours and no other.
    direction: share of clips in which each object moves its way, or less than 0.1 pixels of 32 a frame if it is still.
    speed_ratio: mean speed of what should move over that of the world's toys, which cross in `frames` frames.
    jitter: mean length of the centroids' second difference, in pixels; 0 for an even pace.
    flicker: mean absolute difference between frames where there is only background.
    background: share of clips whose background is that of one of the studios, within 0.04 on average.
    drift: identity of the last quarter of the frames less that of the first; below 0 when objects are lost.

    What cannot be measured, since nothing was found, is 0. On 256 true clips (seeds from 5,000,000) of each kind:

    pixels  shapes  identity  identity_clip  colour_set  direction  speed_ratio  jitter
    32x32   one     1.000     1.000          1.000       1.000      1.04         0.14
    32x32   two     0.997     1.000          1.000       1.000      1.07         0.06
    16x16   one     0.992     1.000          1.000       1.000      1.04         0.18
    16x16   two     0.954     0.961          0.996       0.992      1.06         0.08

    The jitter of true clips is that of their 2x2 samples a pixel.
    """
    if not captions or len(video) != len(captions):
        raise InputError(f"{len(video)} clips need as many captions, not {len(captions)}")
    wanted = [parse_caption(text) for text in captions]
    video = _legal(video)
    found = detect(video)
    side = min(video.shape[-2:])
    clips = [_clip(found, b, wanted[b], side, frames) for b in range(len(video))]
    per = {name: np.concatenate([np.atleast_1d(clip[name]) for clip in clips]) for name in clips[0]}
    flicker, background = _backdrop(video, found)
    quarter = max(1, video.shape[1] // 4)
    identity = per["identity"].reshape(len(video), -1)
    return {
        **{name: _mean(per[name]) for name in ("identity", "identity_clip", "shape", "colour_set", "direction")},
        "speed_ratio": float(np.nansum(per["speed"]) / max(per["pace"].sum(), 1e-9)),
        "jitter": _mean(per["jitter"]),
        "flicker": flicker,
        "background": background,
        "drift": _mean(identity[:, -quarter:]) - _mean(identity[:, :quarter]),
    }


def _mean(values: np.ndarray) -> float:
    """Mean of what is no NaN; 0 of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def _clip(found: Found, b: int, wanted: list[Wanted], side: int, frames: int) -> dict[str, np.ndarray | float]:
    """The measures of one clip; frames that are not judged are NaN."""
    index = [COLOUR_NAMES.index(want.colour) for want in wanted]
    area, centroid, overlap, present = (
        getattr(found, name)[b][:, index].cpu().numpy() for name in ("area", "centroid", "overlap", "present")
    )
    word = np.array([WORDS.index(want.word) for want in wanted])
    fits = present & (overlap.argmax(-1) == word) & (overlap.max(-1) > OVERLAP)
    judged = ~_hidden(area, centroid, present)
    right = np.where(judged, fits, True).all(1)
    identity = np.where(judged.any(1), right, np.nan).astype(float)
    # An object that is never judged was never seen.
    if not judged.any(0).all():
        identity[:] = 0.0
    shown = found.present[b].float().mean(0).cpu().numpy() >= 1 / 3
    named = np.isin(np.arange(len(COLOUR_NAMES)), index)
    moves, speeds, paces, jitters = [], [], [], []
    for k, want in enumerate(wanted):
        track = np.where((present & judged)[:, k, None], centroid[:, k], np.nan)
        velocity = _velocity(track)
        moves.append(_moves(velocity, want.moves, STILL * side))
        jitters.append(np.linalg.norm(track[2:] - 2 * track[1:-1] + track[:-2], axis=-1))
        if want.moves is not None:
            axis, _ = _AXES[want.moves]
            speeds.append(np.linalg.norm(velocity))
            paces.append(
                _REACH / frames * (0.5 if axis else 1.0) * side * TOY_FOCAL / np.linalg.norm(TOY_EYE - TOY_TARGET)
            )
    return {
        "identity": identity,
        "identity_clip": float(_mean(identity) >= 0.75),
        "shape": np.where(judged, fits, np.nan).astype(float).ravel(),
        "colour_set": float((shown == named).all()),
        "direction": float(all(moves)),
        "speed": np.array(speeds),
        "pace": np.array(paces),
        "jitter": np.concatenate(jitters),
    }


def _hidden(area: np.ndarray, centroid: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Where an object `(t, k)` shows less than `HIDDEN` of its own area because another named one touches it."""
    hidden = np.zeros_like(present)
    full = np.array([np.quantile(a[p], 0.9) if p.any() else 0.0 for a, p in zip(area.T, present.T, strict=True)])
    times = np.arange(len(area))
    for k in range(area.shape[1]):
        less = ~present[:, k] | (area[:, k] < HIDDEN * full[k])
        whole = ~less
        if not whole.any():
            continue
        # Where it would be, from the frames in which it is whole.
        at = np.stack([np.interp(times, times[whole], centroid[whole, k, i]) for i in range(2)], -1)
        for j in range(area.shape[1]):
            if j != k:
                apart = np.linalg.norm(at - centroid[:, j], axis=-1)
                touches = apart < 0.75 * (np.sqrt(full[k]) + np.sqrt(full[j]))  # False for NaN
                hidden[:, k] |= less & present[:, j] & touches
    return hidden


def _velocity(track: np.ndarray) -> np.ndarray:
    """Pixels a frame, x first, by least squares over the frames `(t, 2)` that are no NaN; NaN for fewer than two."""
    seen = np.flatnonzero(~np.isnan(track[:, 0]))
    if len(seen) < 2:
        return np.full(2, np.nan)
    times = seen - seen.mean()
    return times @ track[seen] / (times @ times)


def _moves(velocity: np.ndarray, way: str | None, still: float) -> bool:
    """Whether a velocity is that way, or that of something still. Never for NaN."""
    speed = np.linalg.norm(velocity)
    if way is None:
        return bool(speed < still)
    axis, sign = _AXES[way]
    return bool(speed > still and abs(velocity[axis]) > abs(velocity[1 - axis]) and velocity[axis] * sign > 0)


def _backdrop(video: Float[Tensor, "b t 3 h w"], found: Found) -> tuple[float, float]:
    """Mean absolute difference of the background's pixels between frames, and the share of clips with a true one."""
    cover = F.max_pool2d(found.coverage.amax(2).flatten(0, 1)[:, None], 3, 1, 1).unflatten(0, video.shape[:2])
    free = (cover < 0.05).float()
    both = free[:, 1:] * free[:, :-1]
    flicker = ((video[:, 1:] - video[:, :-1]).abs() * both).sum() / (3 * both.sum()).clamp(min=1)
    studios = _studios(*video.shape[-2:]).to(video.device)
    # The mean over time, so that noise is flicker and not another place.
    weight = free.sum(1)
    apart = [((video - picture) * free).sum(1).abs().sum((1, 2, 3)) / (3 * weight.sum((1, 2, 3))).clamp(min=1)
             for picture in studios]  # fmt: skip
    true = (torch.stack(apart).amin(0) < TOLERANCE) & (weight.sum((1, 2, 3)) > 0)
    return float(flicker), float(true.float().mean())


def seam(video: Float[Tensor, "b t 3 h w"], borders: list[int]) -> float:
    """Mean difference of frames across borders over the median one elsewhere; 1 when no border can be seen.

    A border is the number of the frame that begins a new part, from 1 to t - 1.
    """
    count = video.shape[1]
    if not borders or not all(0 < border < count for border in borders):
        raise InputError(f"borders {borders}: give one or more between 1 and {count - 1}")
    steps = (video[:, 1:] - video[:, :-1]).abs().mean((0, 2, 3, 4))
    inside = torch.ones(count - 1, dtype=torch.bool)
    inside[[border - 1 for border in borders]] = False
    if not inside.any():
        raise InputError(f"{count} frames: none but borders between them; there is nothing to compare with")
    return float(steps[~inside].mean() / steps[inside].median().clamp(min=1e-6))


def period(video: Float[Tensor, "b t 3 h w"], lag: int) -> float:
    """Mean over clips of the correlation of an object's velocity with itself `lag` frames later, in [-1, 1].

    Of the object that is seen in most frames and moves most. 1 for what repeats every `lag` frames, about 0 or below
    for what does not, and 0 where the velocity does not change.
    """
    count = video.shape[1]
    if not 0 < lag < count - 2:
        raise InputError(f"lag {lag}: choose one between 1 and {count - 3} for {count} frames")
    found = detect(video)
    times, values = np.arange(count), []
    for centroid, present in zip(found.centroid.cpu().numpy(), found.present.cpu().numpy(), strict=True):
        best, value = 0.0, 0.0
        for k in np.flatnonzero(present.mean(0) > 0.5):
            seen = present[:, k]
            track = np.stack([np.interp(times, times[seen], centroid[seen, k, i]) for i in range(2)], -1)
            velocity = np.diff(track, axis=0)
            way = np.abs(velocity).sum()
            velocity = velocity - velocity.mean(0)
            if way > best and np.square(velocity).mean() > 1e-3:
                before, after = velocity[:-lag], velocity[lag:]
                size = np.linalg.norm(before) * np.linalg.norm(after)
                best, value = way, float((before * after).sum() / size) if size > 0 else 0.0
        values.append(value)
    return float(np.mean(values))
