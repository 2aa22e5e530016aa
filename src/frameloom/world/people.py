"""Scenes of people: `figure`, capsules with named joints, and `talk`, a mouth that follows a sound."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from frameloom.world.geometry import Times, pose, rotation
from frameloom.world.kinds import dome, fixed_camera, ground, painted, still_at
from frameloom.world.scene import (
    CAPSULE,
    COLOURS,
    NOISE,
    PLAIN,
    SPHERE,
    Body,
    Part,
    Scene,
    Surface,
    fixed,
    random_turn,
    shade,
)
from frameloom.world.sound import RATE, envelope, speech

JOINTS = (
    "pelvis", "neck", "head",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
)  # fmt: skip
BONES = (
    ("pelvis", "neck"), ("neck", "head"),
    ("neck", "right_shoulder"), ("right_shoulder", "right_elbow"), ("right_elbow", "right_wrist"),
    ("neck", "left_shoulder"), ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"),
    ("pelvis", "right_hip"), ("right_hip", "right_knee"), ("right_knee", "right_ankle"),
    ("pelvis", "left_hip"), ("left_hip", "left_knee"), ("left_knee", "left_ankle"),
)  # fmt: skip
ACTIONS = ("walks", "waves", "squats")
SKIN = ((0.93, 0.76, 0.62), (0.80, 0.60, 0.44), (0.58, 0.40, 0.28), (0.97, 0.83, 0.72))


def _skeleton(rng: np.random.Generator, action: str, sign: float, duration: float) -> Callable[[Times], np.ndarray]:
    """Joints `(t, 15, 3)` by forward kinematics; a walk goes along x, the other actions face the camera."""
    trunk, arm, leg = rng.uniform(0.52, 0.6), rng.uniform(0.28, 0.32), rng.uniform(0.42, 0.48)
    shoulder, hip, tempo = rng.uniform(0.2, 0.25), rng.uniform(0.11, 0.14), rng.uniform(0.8, 1.2)
    phase, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.8)
    depth = rng.uniform(-0.4, 0.4)

    def joints(times: Times) -> np.ndarray:
        cycle = 2 * np.pi * tempo * times + phase
        sine, zero = np.sin(cycle), np.zeros_like(times)
        walks = action == "walks"
        # Angles from straight down about the body's sideways axis, forwards positive; then out to the side.
        thigh = {"right": zero, "left": zero}
        bend, swing, out, elbow = dict(thigh), dict(thigh), dict(thigh), dict(thigh)
        lean = zero
        for side, way in (("right", 1.0), ("left", -1.0)):
            out[side] = zero + 0.12
            if walks:
                thigh[side] = 0.45 * way * sine
                bend[side] = 0.45 * (1 - way * np.cos(cycle)) * 0.6
                swing[side], elbow[side] = -0.45 * way * sine, zero + 0.35
        if action == "waves":
            out["right"], elbow["right"] = zero + 1.75, 0.85 + 0.5 * sine
        if action == "squats":
            depth_ = 0.5 - 0.5 * np.cos(cycle)
            for side in ("right", "left"):
                thigh[side], bend[side] = 1.15 * depth_, 2.0 * depth_
                swing[side] = 1.2 * depth_
            lean = 0.4 * depth_

        def along(forward: np.ndarray, outward: np.ndarray, way: float) -> np.ndarray:
            """A unit vector in body axes (side, up, forward)."""
            return np.stack([way * np.sin(outward), -np.cos(outward) * np.cos(forward),
                             np.cos(outward) * np.sin(forward)], -1)  # fmt: skip

        at = {"pelvis": np.zeros((len(times), 3))}
        spine = np.stack([zero, np.cos(lean), np.sin(lean)], -1)
        at["neck"] = trunk * spine
        at["head"] = at["neck"] + 0.24 * spine
        # The body's right is towards -side when it faces the camera.
        for side, way in (("right", -1.0), ("left", 1.0)):
            across = np.array([way, 0.0, 0.0])
            at[f"{side}_shoulder"] = at["neck"] + shoulder * across - 0.05 * spine
            upper = along(swing[side], out[side], way)
            at[f"{side}_elbow"] = at[f"{side}_shoulder"] + arm * upper
            if action == "waves" and side == "right":
                lower = along(zero, out[side] + elbow[side], way)
            else:
                lower = along(swing[side] + elbow[side], out[side] * 0.5, way)
            at[f"{side}_wrist"] = at[f"{side}_elbow"] + 0.9 * arm * lower
            at[f"{side}_hip"] = hip * across - np.array([0.0, 0.04, 0.0]) + at["pelvis"]
            at[f"{side}_knee"] = at[f"{side}_hip"] + leg * along(thigh[side], 0.06 + zero, way)
            shin = along(thigh[side] - bend[side], 0.03 + zero, way)
            at[f"{side}_ankle"] = at[f"{side}_knee"] + leg * shin
        body = np.stack([at[name] for name in JOINTS], 1)
        body[..., 1] += 0.08 - body[..., 1].min(1, keepdims=True)  # the lower foot stands on the ground
        if walks:
            side, up, forward = body[..., 0].copy(), body[..., 1], body[..., 2].copy()
            travel = sign * pace * tempo * (times - duration / 2)
            return np.stack([travel[:, None] + sign * forward, up, depth + sign * -side], -1)
        return body + np.array([0, 0, depth])

    return _remember(joints)


def _remember(joints: Callable[[Times], np.ndarray]) -> Callable[[Times], np.ndarray]:
    """The same function, evaluated once for all the bones that ask for the same instants."""

    @lru_cache(maxsize=2)
    def at(times: bytes) -> np.ndarray:
        return joints(np.frombuffer(times))

    return lambda times: at(np.asarray(times, dtype=float).tobytes())


def _bone(joints: Callable[[Times], np.ndarray], start: int, stop: int, radius: float) -> tuple[Callable, float]:
    """Placement and half length of the capsule between two joints."""
    ends = joints(np.zeros(1))[0]
    half = np.linalg.norm(ends[stop] - ends[start]) / 2 / radius

    def place(times: Times) -> np.ndarray:
        at = joints(times)
        a, b = at[:, start], at[:, stop]
        y = (b - a) / np.linalg.norm(b - a, axis=-1, keepdims=True)
        # Any direction across the bone that turns with it: away from world z, or x for bones along z.
        x = np.cross(y, [0.31, 0.17, 0.93])
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return pose(np.stack([x, y, np.cross(x, y)], -1) * radius, (a + b) / 2)

    return place, float(half)


def figure(rng: np.random.Generator, duration: float, fps: float, motion: float) -> Scene:
    """A person who walks across, waves or squats."""
    action, sign = str(rng.choice(ACTIONS)), float(rng.choice((-1.0, 1.0)))
    joints = _skeleton(rng, action, sign, duration)
    shirt, trousers = rng.choice(list(COLOURS), 2, replace=False)
    skin = SKIN[rng.integers(len(SKIN))]
    cloth = {
        "shirt": painted(rng, str(shirt), 0.5, NOISE),
        "trousers": painted(rng, str(trousers), 0.5, NOISE),
        "skin": Surface(PLAIN, (skin, skin)),
    }
    wears = {"neck": "shirt", "shoulder": "shirt", "elbow": "shirt", "wrist": "skin", "head": "skin",
             "hip": "trousers", "knee": "trousers", "ankle": "trousers"}  # fmt: skip
    thick = {"neck": 0.17, "shoulder": 0.1, "elbow": 0.085, "wrist": 0.065, "head": 0.07,
             "hip": 0.12, "knee": 0.105, "ankle": 0.085}  # fmt: skip
    parts = [dome(rng), ground(rng)]
    for a, b in BONES:
        end = b.split("_")[-1]
        place, half = _bone(joints, JOINTS.index(a), JOINTS.index(b), thick[end])
        parts.append(Part(CAPSULE, 1, place, cloth[wears[end]], half=half))

    def head(times: Times) -> np.ndarray:
        return pose(np.diag([0.15, 0.19, 0.16]), joints(times)[:, JOINTS.index("head")] + (0, 0.06, 0))

    parts.append(Part(SPHERE, 1, head, cloth["skin"]))
    moves = ("right" if sign > 0 else "left") if action == "walks" else None
    person = Body("person", str(shirt), None, lambda times: joints(times)[:, 0], 0.9, moves, 0.0, duration)
    camera = fixed_camera(np.array([0.0, 1.25, 4.6]), np.array([0.0, 0.95, 0.0]))
    return Scene("figure", parts, [Body("background"), person], camera, 1.5, duration,
                 pivot=np.array([0.0, 0.95, 0.0]), joints=joints, action=action)  # fmt: skip


def talk(
    rng: np.random.Generator, duration: float, fps: float, motion: float, voice: np.ndarray | None = None
) -> Scene:
    """A head whose mouth is open as far as the voice is loud. `voice` is at 16 kHz; None makes one up."""
    made = speech(rng, duration)
    sound = made if voice is None else voice
    loudness = envelope(sound)
    skin, iris = SKIN[rng.integers(len(SKIN))], str(rng.choice(("green", "blue")))
    hair = tuple(np.array([0.25, 0.17, 0.1]) * rng.uniform(0.4, 2.2))
    nod, turn, tempo = rng.uniform(0.03, 0.08), rng.uniform(0.06, 0.2), rng.uniform(0.2, 0.45)
    phases = rng.uniform(0, 2 * np.pi, 2)
    blink = rng.uniform(0.2, 1.0) + np.cumsum(rng.uniform(1.5, 4.0, 64))
    centre = np.array([0.0, 1.5, 0.0])

    def opening(times: Times) -> np.ndarray:
        return np.interp(times * RATE, np.arange(len(loudness)), loudness)

    def pose_of_head(times: Times) -> np.ndarray:
        yaw = turn * np.sin(2 * np.pi * tempo * times + phases[0])
        pitch = nod * np.sin(2 * np.pi * 1.7 * tempo * times + phases[1])
        return pose(rotation((0, 1, 0), yaw) @ rotation((1, 0, 0), pitch), centre)

    def on_head(linear: np.ndarray, at: tuple[float | int, ...]) -> Callable:
        return lambda times: pose_of_head(times) @ pose(linear, np.array(at))

    def plain(colour: tuple[float, ...], light: float = 1.0) -> Surface:
        return Surface(PLAIN, (colour, colour), light=light)

    def mouth(times: Times) -> np.ndarray:
        gape = opening(times)
        scale = np.zeros((len(times), 3, 3))
        scale[:, 0, 0], scale[:, 1, 1], scale[:, 2, 2] = 0.27 - 0.05 * gape, 0.025 + 0.2 * gape, 0.12
        return pose_of_head(times) @ pose(scale, np.array([0.0, -0.45, 0.76]))

    def lid(times: Times) -> np.ndarray:
        since = np.abs(times[:, None] - blink[None]).min(1)
        return np.clip(1 - since / 0.12, 0, 1)

    face = Surface(NOISE, (shade(skin, 0.86), skin), 0.3, random_turn(rng))
    shirt = str(rng.choice(list(COLOURS)))
    parts = [dome(rng), Part(SPHERE, 1, on_head(np.diag([0.82, 1.08, 0.88]), (0.0, 0.0, 0.0)), face)]
    parts.append(Part(SPHERE, 1, on_head(np.diag([0.9, 0.92, 0.9]), (0, 0.36, -0.2)), plain(hair)))
    parts.append(Part(SPHERE, 1, on_head(np.diag([0.11, 0.18, 0.16]), (0, -0.1, 0.86)), plain(shade(skin, 0.95))))
    for x in (-0.31, 0.31):
        parts.append(Part(SPHERE, 1, on_head(np.eye(3) * 0.17, (x, 0.14, 0.72)), plain((0.96, 0.96, 0.95), 0.5)))
        parts.append(Part(SPHERE, 1, on_head(np.eye(3) * 0.09, (x, 0.13, 0.825)), plain(COLOURS[iris], 0.5)))
        parts.append(Part(SPHERE, 1, on_head(np.eye(3) * 0.045, (x, 0.13, 0.882)), plain((0.03,) * 3, 0.0)))

        def eyelid(times: Times, x: float = x) -> np.ndarray:
            shut = np.eye(3) * (0.05 + 0.16 * lid(times))[:, None, None]
            return pose_of_head(times) @ pose(shut, np.array([x, 0.14, 0.74]))

        parts.append(Part(SPHERE, 1, eyelid, plain(shade(skin, 0.9))))
        brow = rotation((0, 0, 1), np.array([np.pi / 2 + 0.12 * np.sign(x)]))[0] * 0.035
        parts.append(Part(CAPSULE, 1, on_head(brow, (x, 0.4, 0.8)), plain(hair), half=4.0))
    parts.append(
        Part(
            CAPSULE,
            0,
            fixed(np.eye(3) * 0.38, np.array([0.0, 0.2, -0.15])),
            plain(shade(skin, 0.92)),
            half=1.5,
        )
    )
    parts.append(
        Part(
            SPHERE,
            0,
            fixed(np.diag([1.5, 0.8, 0.75]), np.array([0.0, -0.45, -0.2])),
            painted(rng, shirt, 0.8, NOISE),
        )
    )
    parts.append(Part(SPHERE, 2, mouth, plain((0.34, 0.06, 0.08), 0.3)))
    bodies = [Body("background"), Body("head", None, None, still_at(centre), 1.0),
              Body("mouth", "red", None, lambda times: mouth(times)[:, :3, 3], 0.27)]  # fmt: skip
    camera = fixed_camera(np.array([0.0, 1.4, 5.4]), np.array([0.0, 1.25, 0.0]))
    return Scene("talk", parts, bodies, camera, 1.35, duration, pivot=centre, voice=sound, action=iris)
