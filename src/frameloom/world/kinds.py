"""Scenes of shapes: `objects`, `flyover`, `motion` and `bounce`, each a function of a random generator."""

from collections.abc import Callable

import numpy as np

from frameloom.world.geometry import Times, Vectors, ease, look_at, pose, project, rotation
from frameloom.world.scene import (
    BOX,
    CAPSULE,
    CHECKS,
    COLOURS,
    NOISE,
    PHOTOGRAPH,
    PLAIN,
    PLANE,
    SKY,
    SPHERE,
    STRIPES,
    Body,
    Contact,
    Part,
    Scene,
    Surface,
    fixed,
    moving,
    random_turn,
    shade,
)
from frameloom.world.textures import GROUNDS, PICTURES

ALONG_Z = np.array([0.0, 0.0, 1.0])
LEVEL = rotation((1.0, 0.0, 0.0), np.array([-np.pi / 2]))[0]  # stands a plane's +z up
SKIES = (
    ((0.98, 0.90, 0.80), (0.42, 0.62, 0.86)),
    ((0.96, 0.84, 0.78), (0.50, 0.50, 0.76)),
    ((0.90, 0.95, 0.96), (0.36, 0.58, 0.80)),
    ((0.97, 0.93, 0.82), (0.48, 0.70, 0.74)),
)
SOILS = (
    ((0.52, 0.47, 0.42), (0.76, 0.70, 0.62)),
    ((0.42, 0.47, 0.44), (0.68, 0.72, 0.66)),
    ((0.46, 0.45, 0.52), (0.72, 0.70, 0.76)),
    ((0.60, 0.54, 0.46), (0.84, 0.78, 0.68)),
)
# The photographs of materials are grey.
TINTS = dict(zip(GROUNDS, ((1.15, 0.82, 0.66), (0.78, 1.05, 0.5), (1.05, 0.98, 0.88)), strict=True))
SIZES = {"small": 0.36, "large": 0.66}


def dome(rng: np.random.Generator, radius: float = 60.0) -> Part:
    """The sky: a sphere about everything."""
    surface = Surface(SKY, SKIES[rng.integers(len(SKIES))], 1 / radius, light=0.0)
    return Part(SPHERE, 0, fixed(np.eye(3) * radius, np.zeros(3)), surface)


def ground(rng: np.random.Generator, textures: tuple[int, ...] = (NOISE, CHECKS, PHOTOGRAPH)) -> Part:
    """A level plane at height 0."""
    texture = int(rng.choice(textures))
    low, high = SOILS[rng.integers(len(SOILS))]
    if texture == NOISE:
        surface = Surface(NOISE, (low, high), 0.22, random_turn(rng), tuple(rng.uniform(size=3)), light=0.0)
    elif texture == CHECKS:
        middle = tuple(0.5 * (a + b) for a, b in zip(low, high, strict=True))
        surface = Surface(CHECKS, (middle, high), 0.4, offset=(*rng.uniform(size=2), 0.5), light=0.0)
    else:
        number = int(rng.choice(GROUNDS))
        tint = TINTS[number]
        turn = rotation((0, 0, 1), rng.uniform(0.2, 1.3, 1))[0]  # keeps the mirrored edges out of line with the view
        surface = Surface(PHOTOGRAPH, ((0.1, 0.1, 0.1), tint), 0.3, turn, (*rng.uniform(size=2), 0.0), number, 0.0)
    return Part(PLANE, 0, fixed(LEVEL * 58.0, np.zeros(3)), surface)


def painted(rng: np.random.Generator, colour: str, size: float, texture: int | None = None) -> Surface:
    """A surface that reads as one named colour: plain, or textured with a darker shade of it."""
    base = COLOURS[colour]
    kind = int(rng.choice((PLAIN, NOISE, STRIPES, CHECKS))) if texture is None else texture
    frequency = {PLAIN: 1.0, NOISE: 0.35, STRIPES: 0.9, CHECKS: 0.7}[kind] / size
    return Surface(kind, (shade(base, 0.62), base) if kind != PLAIN else (base, base), frequency,
                   random_turn(rng) if kind == NOISE else np.eye(3), (0.1, 0.12, 0.13))  # fmt: skip


def objects(rng: np.random.Generator, duration: float, fps: float, motion: float) -> Scene:
    """One to three shapes of different colours, on or above a ground; at least one of them moves."""
    eye, target, focal = np.array([0.0, 1.9, 7.4]), np.array([0.0, 0.95, 0.0]), 1.25
    camera = fixed_camera(eye, target)
    while True:
        count = int(rng.integers(1, 4))
        colours = rng.choice(list(COLOURS), count, replace=False)
        lanes = rng.permutation([-1.7, 0.0, 1.7])
        bodies = [Body("background")]
        for i in range(count):
            bodies.append(_mover(rng, str(colours[i]), float(lanes[i]), duration, must_move=i == 0))
        if _clear(bodies[1:], camera, focal, duration):
            break
    parts = [dome(rng), ground(rng)]
    for index, body in enumerate(bodies[1:], 1):
        parts.append(_shape(rng, index, body))
    return Scene("objects", parts, bodies, camera, focal, duration, pivot=target)


def fixed_camera(eye: np.ndarray, target: np.ndarray) -> Callable[[Times], np.ndarray]:
    matrix = look_at(eye, target)
    return lambda times: np.repeat(matrix, len(times), 0)


def _mover(rng: np.random.Generator, colour: str, lane: float, duration: float, must_move: bool) -> Body:
    word = str(rng.choice(("ball", "box", "capsule")))
    size = str(rng.choice(tuple(SIZES)))
    radius = SIZES[size]
    moves = str(rng.choice(("left", "right", "left", "right", "closer", "away", "up", "down")))
    if not must_move and rng.random() < 0.35:
        moves = "still"
    begin, end = np.array([rng.uniform(-1.7, 1.7), radius, lane]), None
    reach = rng.uniform(1.6, 3.2)
    if moves in ("left", "right"):
        sign = 1 if moves == "right" else -1
        begin[0] = -sign * rng.uniform(0.6, 2.0)
        end = begin + np.array([sign * reach, 0, 0])
    elif moves in ("closer", "away"):
        sign = 1 if moves == "closer" else -1
        begin[2] = -sign * reach / 2
        end = begin + np.array([0, 0, sign * reach])
    elif moves in ("up", "down"):
        top = begin + np.array([0, rng.uniform(0.9, 1.5), 0])
        begin, end = (begin, top) if moves == "up" else (top, begin)
    if end is None:
        return Body(word, colour, size, lambda times, at=begin: np.repeat(at[None], len(times), 0), radius)
    start = float(rng.choice((0.0, rng.uniform(0.1, 0.35)))) * duration
    stop = float(rng.choice((1.0, rng.uniform(0.65, 0.9)))) * duration

    eased = start > 0.0 or stop < duration

    def centre(times: Times) -> Vectors:
        # A motion that fills the clip neither starts nor stops in it.
        u = (times - start) / (stop - start)
        return begin + (end - begin) * (ease(u) if eased else np.clip(u, 0, 1))[:, None]

    return Body(word, colour, size, centre, radius, moves, start, stop, eased)


def _clear(bodies: list[Body], camera: Callable, focal: float, duration: float) -> bool:
    """No two bodies ever touch, all stay in the picture, and each is once seen whole."""
    times = np.linspace(0, duration, 17)
    world = np.stack([body.centre(times) for body in bodies])
    seen, depth = project(world, camera(times))
    radius = np.array([body.radius for body in bodies])[:, None]
    spread = 1.25 * radius / depth
    if np.any(np.abs(seen) + spread[..., None] > 0.5 / focal):
        return False
    for i in range(len(bodies)):
        free = np.ones(len(times), dtype=bool)
        for j in range(len(bodies)):
            if i == j:
                continue
            # A box reaches sqrt(2) radii in the level, where bodies meet.
            if np.min(np.linalg.norm(world[i] - world[j], axis=-1)) < 1.42 * (radius[i, 0] + radius[j, 0]):
                return False
            apart = np.linalg.norm(seen[i] - seen[j], axis=-1) > spread[i] + spread[j]
            free &= apart | (depth[i] < depth[j])
        if not free.any():
            return False
    return True


def _shape(rng: np.random.Generator, index: int, body: Body) -> Part:
    """The part of a body of the objects kind; a ball that moves sideways rolls."""
    radius, centre = body.radius, body.centre
    if body.word == "ball":
        surface = painted(rng, str(body.colour), radius, int(rng.choice((NOISE, STRIPES, CHECKS))))
        if body.moves not in ("left", "right"):
            return Part(SPHERE, index, moving(np.eye(3) * radius, centre), surface)

        def roll(times: Times) -> np.ndarray:
            at = centre(times)
            return pose(rotation((0, 0, 1), -at[:, 0] / radius) * radius, at)

        return Part(SPHERE, index, roll, surface, light=ALONG_Z)
    turn = rotation((0.0, 1.0, 0.0), np.array([rng.uniform(-0.7, 0.7)]))[0]
    if body.word == "box":
        half = np.array([0.85, 1.0, 0.85]) * radius
        return Part(BOX, index, moving(turn * half, centre), painted(rng, str(body.colour), radius))
    thick = 0.5 * radius
    return Part(CAPSULE, index, moving(turn * thick, centre), painted(rng, str(body.colour), radius), half=1.0)


TOY_SIZES = {"small": 0.66, "large": 1.0}
STUDIOS = (
    (((0.96, 0.90, 0.82), (0.55, 0.72, 0.88)), (0.62, 0.58, 0.52)),
    (((0.86, 0.84, 0.92), (0.42, 0.46, 0.62)), (0.44, 0.47, 0.44)),
)
TOY_EYE, TOY_TARGET, TOY_FOCAL = np.array([0.0, 1.9, 7.4]), np.array([0.0, 1.15, 0.0]), 1.25
TOY_LANES = (-1.3, 0.0, 1.3)


def studio(number: int) -> list[Part]:
    """The sky and the level ground of one of `STUDIOS`."""
    sky, soil = STUDIOS[number]
    return [
        Part(SPHERE, 0, fixed(np.eye(3) * 60.0, np.zeros(3)), Surface(SKY, sky, 1 / 60.0, light=0.0)),
        Part(PLANE, 0, fixed(LEVEL * 58.0, np.zeros(3)), Surface(PLAIN, (soil, soil), light=0.0)),
    ]


def toy_form(word: str, radius: float) -> tuple[int, np.ndarray, float]:
    """Primitive, size and half length of a ball, box or capsule of toys that is `radius` high above its centre."""
    return {
        "ball": (SPHERE, np.eye(3) * radius, 0.0),
        "box": (BOX, np.eye(3) * 0.9 * radius, 0.0),
        "capsule": (CAPSULE, np.eye(3) * 0.5 * radius, 1.0),
    }[word]


def toys(rng: np.random.Generator, duration: float, fps: float, motion: float, count: int | None = None) -> Scene:
    """One plain shape that moves at an even pace all the time, or a second one that stands still beside it.

    Large in the picture and seen squarely, so that 32 pixels are enough to tell a ball from a box: what the small
    generators learn to draw from words. `count` is 1 or 2 (either, when None).
    """
    camera = fixed_camera(TOY_EYE, TOY_TARGET)
    number = int(rng.integers(1, 3)) if count is None else count
    parts = studio(int(rng.integers(len(STUDIOS))))
    while True:
        colours = rng.choice(list(COLOURS), number, replace=False)
        lanes = rng.permutation(TOY_LANES[::2])[:number] if number > 1 else [TOY_LANES[1]]
        bodies = [Body("background")]
        bodies += [_toy(rng, str(colours[i]), float(lanes[i]), duration, moves=i == 0) for i in range(number)]
        if _clear(bodies[1:], camera, TOY_FOCAL, duration):
            break
    for index, body in enumerate(bodies[1:], 1):
        plain = painted(rng, str(body.colour), body.radius, PLAIN)
        shape, linear, half = toy_form(body.word, body.radius)
        parts.append(Part(shape, index, moving(linear, body.centre), plain, half=half))
    return Scene("toys", parts, bodies, camera, TOY_FOCAL, duration, pivot=TOY_TARGET)


def _toy(rng: np.random.Generator, colour: str, lane: float, duration: float, moves: bool) -> Body:
    word = str(rng.choice(("ball", "box", "capsule")))
    size = str(rng.choice(tuple(TOY_SIZES)))
    radius = TOY_SIZES[size]
    reach = rng.uniform(1.5, 2.6)
    begin = np.array([rng.uniform(-1.5, 1.5), radius, lane])
    if not moves:
        return Body(word, colour, size, lambda times, at=begin: np.repeat(at[None], len(times), 0), radius)
    way = str(rng.choice(("left", "right", "up", "down")))
    if way in ("left", "right"):
        sign = 1 if way == "right" else -1
        begin[0] = sign * (rng.uniform(-0.5, 0.5) - reach / 2)
        end = begin + np.array([sign * reach, 0, 0])
    else:
        top = begin + np.array([0, 0.5 * reach, 0])
        begin, end = (begin, top) if way == "up" else (top, begin)
    return Body(word, colour, size, lambda times: begin + (end - begin) * (times / duration)[:, None], radius,
                way, 0.0, duration, False)  # fmt: skip


def flyover(rng: np.random.Generator, duration: float, fps: float, motion: float) -> Scene:
    """A camera that flies round a landscape of photographs, boxes and balls; nothing else moves.

    `motion` is the typical flow of the middle distance, a fraction of the picture a frame.
    """
    parts, bodies = [dome(rng), ground(rng, (NOISE, PHOTOGRAPH))], [Body("background")]
    ring, focal = 7.5, 1.0
    phase, clockwise = rng.uniform(0, 2 * np.pi), rng.choice((-1.0, 1.0))
    pictures = rng.permutation(PICTURES)
    slots = np.linspace(0, 2 * np.pi, 15)[:-1] + rng.uniform(-0.1, 0.1, 14)
    for i, angle in enumerate(slots):
        inside = i % 2 == 0
        distance = rng.uniform(4.2, 5.2) if inside else rng.uniform(9.6, 10.8)
        where = np.array([np.cos(angle), 0.0, np.sin(angle)]) * distance
        facing = rotation(
            (0, 1, 0), np.array([np.pi / 2 - angle + (0.0 if inside else np.pi) + rng.uniform(-0.4, 0.4)])
        )[0]
        form = ("panel", "box", "panel", "ball", "capsule")[i % 5]
        # Nothing reaches the ring that the camera flies along.
        size = rng.uniform(0.9, 1.4) * (0.7 if form == "box" else 1.0)
        colour = COLOURS[str(rng.choice(list(COLOURS)))]
        photo = Surface(PHOTOGRAPH, ((0.0,) * 3, (1.0,) * 3), 0.5 / size, offset=(0.5, 0.5, 0.5),
                        photograph=int(pictures[i % len(pictures)]), light=0.35)  # fmt: skip
        index = len(bodies)
        if form == "panel":
            bodies.append(Body("panel", None, None, still_at(where + np.array([0, size + 0.15, 0])), size))
            parts.append(
                Part(
                    BOX,
                    index,
                    fixed(facing * (size, size, 0.06), where + np.array([0, size + 0.15, 0])),
                    photo,
                )
            )
        elif form == "box":
            bodies.append(Body("box", None, None, still_at(where + np.array([0, size, 0])), size))
            parts.append(Part(BOX, index, fixed(facing * size, where + np.array([0, size, 0])), photo))
        else:
            texture = int(rng.choice((NOISE, STRIPES, CHECKS)))
            surface = Surface(texture, (shade(colour, 0.75), shade(colour, 1.25)), 0.5 / size, random_turn(rng))
            half = 1.2 if form == "capsule" else 0.0
            radius = size * (0.55 if form == "capsule" else 0.9)
            centre = where + np.array([0, radius * (1 + half), 0])
            bodies.append(Body(form, None, None, still_at(centre), radius))
            parts.append(Part(CAPSULE if half else SPHERE, index, fixed(facing * radius, centre), surface, half=half))

    for i, angle in enumerate(np.linspace(0, 2 * np.pi, 6)[:-1] + phase):
        where = np.array([np.cos(angle), 0.0, np.sin(angle)]) * ring + (0, 0.02, 0)
        facing = rotation((0, 1, 0), rng.uniform(0, 2 * np.pi, 1))[0] @ LEVEL
        photo = Surface(PHOTOGRAPH, ((0.0,) * 3, (1.0,) * 3), 0.36, offset=(0.5, 0.5, 0.5),
                        photograph=int(pictures[-1 - i]), light=0.0)  # fmt: skip
        parts.append(Part(PLANE, 0, fixed(facing * 1.4, where), photo))

    # Points 5 units away drift by `motion` of a picture a frame.
    speed = motion * fps * 5.0 / focal
    bob = rng.uniform(0, 2 * np.pi, 3)

    def camera(times: Times) -> np.ndarray:
        def path(seconds: np.ndarray) -> np.ndarray:
            turn = phase + clockwise * speed * seconds / ring
            radius = ring + 0.5 * np.sin(1.7 * turn + bob[0])
            height = 2.5 + 0.4 * np.sin(2.3 * turn + bob[1])
            return np.stack([radius * np.cos(turn), height, radius * np.sin(turn)], -1)

        ahead = path(times + 5.0 / speed)
        sway = 0.3 + 0.15 * np.sin(speed * times / 4 + bob[2])
        target = ahead * np.stack([1 - 0.3 * sway, 0.5 + 0 * sway, 1 - 0.3 * sway], -1)
        return look_at(path(times), target)

    return Scene("flyover", parts, bodies, camera, focal, duration, action="right" if clockwise > 0 else "left")


def still_at(where: np.ndarray) -> Callable[[Times], Vectors]:
    return lambda times: np.repeat(np.asarray(where, dtype=float)[None], len(times), 0)


def motion(rng: np.random.Generator, duration: float, fps: float, motion: float) -> Scene:
    """Two to six textured shapes and photographs that swing and turn before a backdrop; the camera moves too.

    Each peaks at a speed drawn up to `motion` (a fraction of the picture a frame), small speeds as often as
    large.
    """
    focal, distance = 1.2, 7.0
    parts, bodies = [], [Body("background")]
    wall = _anything(rng, 0.16)
    backdrop = fixed(np.diag([26.0, 26.0, 1.0]), np.array([0.0, 0.0, -4.0]))
    parts.append(Part(SPHERE, 0, fixed(np.eye(3) * 60.0, np.zeros(3)), _anything(rng, 0.02, photographs=False)))
    parts.append(Part(PLANE, 0, backdrop, wall))
    for index in range(1, int(rng.integers(3, 8))):
        shape = int(rng.choice((SPHERE, BOX, CAPSULE, PLANE)))
        depth = rng.uniform(-2.0, 2.0)
        size = rng.uniform(0.35, 1.1)
        view = 0.5 * (distance - depth) / focal
        home = np.array([*rng.uniform(-0.9, 0.9, 2) * view, depth])
        speed = motion * np.exp(rng.uniform(np.log(0.15), 0.0)) * (distance - depth) / focal * fps
        heading = rng.uniform(0, 2 * np.pi)
        reach = rng.uniform(0.3, 0.8) * view
        swing = reach * np.array([np.cos(heading), np.sin(heading), rng.uniform(-0.3, 0.3)])
        rate, phase = speed / reach, rng.uniform(0, 2 * np.pi)
        axis, spin = rng.normal(size=3), rng.uniform(-0.6, 0.6) * rate
        first = random_turn(rng) if shape != PLANE else np.eye(3)

        def centre(times: Times, home=home, swing=swing, rate=rate, phase=phase) -> Vectors:
            return home + swing * np.sin(rate * times + phase)[:, None]

        def place(times: Times, centre=centre, axis=axis, spin=spin, first=first, size=size, rate=rate, shape=shape):
            # Planes rock, lest they be seen edge on.
            angle = 0.35 * np.sin(spin * times) if shape == PLANE else spin * times
            return pose(rotation(axis, angle) @ first * size, centre(times))

        half = rng.uniform(0.5, 1.5) if shape == CAPSULE else 0.0
        bodies.append(Body(("ball", "box", "capsule", "panel")[shape], None, None, centre, size, "about"))
        parts.append(Part(shape, index, place, _anything(rng, 0.5 / size, shape in (BOX, PLANE)), half=half))

    pan = motion * fps * rng.uniform(0, 0.5) / focal
    rate = rng.uniform(1.0, 2.0, 3) * (pan / 0.35 + 1e-6)
    phases = rng.uniform(0, 2 * np.pi, 3)

    def camera(times: Times) -> np.ndarray:
        sway = np.sin(rate * times[:, None] + phases)
        eye = np.array([0.0, 0.0, distance]) + sway * (0.6, 0.4, 0.7)
        return look_at(eye, sway[:, [1, 2, 0]] * (0.9, 0.7, 0.0))

    return Scene("motion", parts, bodies, camera, focal, duration)


def _anything(rng: np.random.Generator, frequency: float, photographs: bool = True) -> Surface:
    """A texture in two random colours, or a photograph."""
    texture = int(rng.choice((NOISE, NOISE, STRIPES, CHECKS)))
    if photographs and rng.random() < 0.5:
        number = int(rng.choice((*PICTURES, *GROUNDS)))
        return Surface(PHOTOGRAPH, ((0.0,) * 3, (1.0,) * 3), frequency, offset=(0.5, 0.5, 0.5),
                       photograph=number, light=0.3)  # fmt: skip
    low = rng.uniform(0, 0.7, 3)
    high = np.clip(low + rng.uniform(0.15, 0.6, 3) * rng.choice((-1, 1, 1), 3), 0.02, 0.98)
    scale = {NOISE: 0.8, STRIPES: 1.6, CHECKS: 1.4}[texture]
    return Surface(texture, (tuple(low), tuple(high)), frequency * scale, random_turn(rng), tuple(rng.uniform(size=3)))


def bounce(rng: np.random.Generator, duration: float, fps: float, motion: float) -> Scene:
    """A ball falls and bounces along the ground; often it also meets a box. Every impact is a contact."""
    eye, target, focal = np.array([0.0, 1.5, 7.0]), np.array([0.0, 1.1, 0.0]), 1.2
    colours = rng.choice(list(COLOURS), 2, replace=False)
    size = str(rng.choice(tuple(SIZES)))
    radius = 0.7 * SIZES[size]
    sign = float(rng.choice((-1.0, 1.0)))
    flight = rng.uniform(0.28, 0.42) * duration
    fall = rng.uniform(0.35, 0.55) * flight
    lively = rng.uniform(0.7, 0.85)
    gravity = 8 * rng.uniform(1.0, 1.6) / flight**2
    lands = [fall]
    while lands[-1] + flight < 4 * duration and flight > 0.03 * duration:
        lands.append(lands[-1] + flight)
        flight *= lively
    lands = np.array(lands)
    wall = bool(rng.random() < 0.5)
    meets = rng.uniform(0.55, 0.75) * duration if wall else np.inf
    speed = rng.uniform(2.2, 3.2) / duration
    edge = sign * 1.5 if wall else None
    begin = (edge - sign * (radius + speed * meets)) if wall else -sign * speed * duration / 2

    def centre(times: Times) -> Vectors:
        after = np.searchsorted(lands, times, side="right")
        last = np.where(after > 0, lands[np.maximum(after - 1, 0)], -fall)
        following = np.where(after < len(lands), lands[np.minimum(after, len(lands) - 1)], last)
        height = 0.5 * gravity * np.maximum(times - last, 0) * np.maximum(following - times, 0)
        height = np.where(after == 0, 0.5 * gravity * (fall**2 - times**2), height)
        travel = times - 2 * np.maximum(times - meets, 0)
        return np.stack([begin + sign * speed * travel, radius + height, 0 * times], -1)

    def place(times: Times) -> np.ndarray:
        at = centre(times)
        return pose(rotation((0, 0, 1), -at[:, 0] / radius) * radius, at)

    material = str(rng.choice(("wood", "metal")))
    ball = Body("ball", str(colours[0]), size, centre, radius, "right" if sign > 0 else "left", 0.0, duration)
    bodies = [Body("background"), ball]
    parts = [dome(rng), ground(rng)]
    parts.append(Part(SPHERE, 1, place, painted(rng, ball.colour, radius, STRIPES), light=ALONG_Z))
    loud = gravity * fall
    contacts = [
        Contact(
            float(t),
            1,
            "ground",
            float(min(1.0, gravity * (fall if i == 0 else (t - lands[i - 1]) / 2) / loud)),
        )
        for i, t in enumerate(lands)
        if t < duration
    ]
    if wall:
        half = np.array([0.4, 1.5, 0.8])
        at = np.array([edge + sign * half[0], half[1], 0.0])
        bodies.append(Body("box", str(colours[1]), None, still_at(at), 1.5))
        parts.append(Part(BOX, 2, fixed(np.diag(half), at), painted(rng, str(colours[1]), 0.7)))
        contacts.append(Contact(float(meets), 1, "box", 0.7))
    contacts.sort(key=lambda contact: contact.time)
    return Scene("bounce", parts, bodies, fixed_camera(eye, target), focal, duration, pivot=target,
                 contacts=contacts, material=material)  # fmt: skip
