"""Captions, events and questions of a scene, all read off its trajectories, in a closed vocabulary."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from frameloom.world.geometry import project
from frameloom.world.scene import COLOURS, Body, Scene
from frameloom.world.sound import RATE, envelope

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
# Kinds whose scenes are named shapes with motions.
SHAPES = ("objects", "toys")
_WAYS = {
    "left": "left",
    "right": "right",
    "closer": "towards the camera",
    "away": "away from the camera",
    "up": "up",
    "down": "down",
}
_SENTENCES = (
    "a small large ball box capsule person shapes objects balls boxes capsules",
    "rolls slides rises sinks stands still bounces hits hit ground starts to move moves stops it does not",
    "walks waves squats talks is silent in shirt with eyes camera flies forward and turns turn textured",
    "among that behind front of passes the",
    "how many are there times what colour shape object which way who nearer at start or first do pass yes no",
)
VOCABULARY = sorted(
    {word for text in (*_SENTENCES, *_WAYS.values()) for word in text.split()} | set(COLOURS) | set(NUMBERS)
)


class Event(NamedTuple):
    """What happens in the frames `start` to `stop - 1`."""

    text: str
    start: int
    stop: int


class Question(NamedTuple):
    question: str
    answer: str


class Pass(NamedTuple):
    """Body `mover` crosses body `other` in the picture, `where` being "behind" or "in front of"."""

    mover: int
    other: int
    where: str
    start: float
    stop: float


def passes(scene: Scene, fps: float) -> list[Pass]:
    """Every crossing of two bodies of an objects scene, with its instants in seconds."""
    times = np.linspace(0, scene.duration - 1 / fps, 129)
    bodies = scene.bodies
    seen, depth = project(np.stack([body.centre(times) for body in bodies]), scene.camera(times))
    spread = np.array([body.radius for body in bodies])[:, None] / depth
    found = []
    for i, body in enumerate(bodies):
        for j in range(1, len(bodies)):
            if i == j or body.moves not in ("left", "right"):
                continue
            apart = seen[i] - seen[j]
            reach = 0.9 * (spread[i] + spread[j])
            crossing = np.flatnonzero(np.diff(np.sign(apart[:, 0])))
            if len(crossing) != 1 or abs(apart[crossing[0], 1]) > 0.8 * reach[crossing[0]]:
                continue
            overlap = np.linalg.norm(apart, axis=-1) < reach
            # It must be seen free on both sides to have passed.
            if overlap[0] or overlap[-1] or not overlap[crossing[0]]:
                continue
            inside = np.flatnonzero(overlap)
            where = "behind" if depth[i, crossing[0]] > depth[j, crossing[0]] else "in front of"
            found.append(Pass(i, j, where, times[inside[0]], times[inside[-1]]))
    return found


def caption(scene: Scene, fps: float) -> str:
    """One sentence about the whole clip."""
    bodies = scene.bodies
    if scene.kind in SHAPES:
        return _objects(scene, fps)
    if scene.kind == "bounce":
        ball = bodies[1]
        hit = f" and hits a {bodies[2].name}" if len(bodies) > 2 else ""
        return f"a {ball.full_name} bounces {_WAYS[str(ball.moves)]}{hit}"
    if scene.kind == "figure":
        way = f" {bodies[1].moves}" if bodies[1].moves else ""
        return f"a person in a {bodies[1].colour} shirt {scene.action}{way}"
    if scene.kind == "talk":
        return f"a person with {scene.action} eyes talks"
    if scene.kind == "flyover":
        return f"the camera flies forward and turns {scene.action} among objects"
    return f"{NUMBERS[len(bodies) - 1]} textured shapes move"


def _clause(body: Body) -> str:
    """What a body does: "rolls left"."""
    if body.moves is None:
        return "stands still"
    if body.moves in ("up", "down"):
        return "rises" if body.moves == "up" else "sinks"
    rolls = body.word == "ball" and body.moves in ("left", "right")
    return f"{'rolls' if rolls else 'slides'} {_WAYS[body.moves]}"


def _objects(scene: Scene, fps: float) -> str:
    bodies, crossed = scene.bodies, passes(scene, fps)
    told: set[int] = set()
    clauses = []
    for i in sorted(range(1, len(bodies)), key=lambda i: bodies[i].moves is None):
        if i in told:
            continue
        told.add(i)
        clause = f"a {bodies[i].full_name} {_clause(bodies[i])}"
        for crossing in crossed:
            if crossing.mover == i and crossing.other not in told:
                other = bodies[crossing.other]
                told.add(crossing.other)
                clause += f" {crossing.where} a {other.full_name}"
                clause += f" that {_clause(other)}" if other.moves else ""
                break
        clauses.append(clause)
    return " and ".join(clauses)


def events(scene: Scene, frames: int, fps: float) -> list[Event]:
    """What happens when, in order of time; none for the kinds in which nothing begins or ends."""

    def event(text: str, start: float, stop: float | None = None) -> Event:
        first = min(round(start * fps), frames - 1)
        last = first if stop is None else min(round(stop * fps), frames - 1)
        return Event(text, first, last + 1)

    found = []
    for body in scene.bodies[1:] if scene.kind in SHAPES else ():
        if body.moves is None:
            continue
        found.append(event(f"the {body.name} {_clause(body)}", body.start, body.stop))
        if body.eased:
            if body.start > 0:
                found.append(event(f"the {body.name} starts to move", body.start))
            if body.stop < scene.duration:
                found.append(event(f"the {body.name} stops", body.stop))
    if scene.kind in SHAPES:
        for crossing in passes(scene, fps):
            mover, other = scene.bodies[crossing.mover], scene.bodies[crossing.other]
            text = f"the {mover.name} passes {crossing.where} the {other.name}"
            found.append(event(text, crossing.start, crossing.stop))
    for contact in scene.contacts:
        if contact.time * fps < frames - 0.5:
            found.append(event(f"the {scene.bodies[contact.body].name} hits the {contact.other}", contact.time))
    if scene.kind == "figure":
        found.append(event(f"the person {scene.action}", 0.0, scene.duration))
    if scene.kind == "talk":
        for start, stop, loud in bursts(scene):
            found.append(event("the person talks" if loud else "the person is silent", start, stop))
    return sorted(found, key=lambda event: (event.start, event.stop))


def bursts(scene: Scene) -> list[tuple[float, float, bool]]:
    """The clip cut into (start, stop, loud) in seconds; a silence lasts 0.15 s or more."""
    loud = envelope(scene.voice) > 0.1
    edges = np.flatnonzero(np.diff(loud.astype(int))) + 1
    cuts = [0, *edges.tolist(), len(loud)]
    runs: list[tuple[float, float, bool]] = []
    for begin, end in pairwise(cuts):
        sounding = bool(loud[begin]) or (end - begin) / RATE < 0.15
        if runs and runs[-1][2] == sounding:
            runs[-1] = (runs[-1][0], end / RATE, sounding)
        else:
            runs.append((begin / RATE, end / RATE, sounding))
    return runs


def questions(scene: Scene, fps: float) -> list[Question]:
    """Questions with one true answer each."""
    bodies = scene.bodies[1:]
    if scene.kind in SHAPES:
        return _about_objects(scene, bodies, fps)
    if scene.kind == "bounce":
        ball = bodies[0]
        last = scene.duration - 0.5 / fps
        hits = sum(contact.other == "ground" and contact.time < last for contact in scene.contacts)
        return [
            Question("what colour is the ball", str(ball.colour)),
            *([Question("how many times does the ball hit the ground", NUMBERS[hits])]
              if hits < len(NUMBERS) else []),
        ]  # fmt: skip
    if scene.kind == "figure":
        asked = [
            Question("what does the person do", scene.action),
            Question("what colour is the shirt", str(bodies[0].colour)),
        ]
        return asked + ([Question("which way does the person move", bodies[0].moves)] if bodies[0].moves else [])
    if scene.kind == "talk":
        return [Question("what colour are the eyes", scene.action)]
    if scene.kind == "flyover":
        return [Question("which way does the camera turn", scene.action)]
    return [Question("how many shapes are there", NUMBERS[len(bodies)])]


def _about_objects(scene: Scene, bodies: list[Body], fps: float) -> list[Question]:
    asked = [Question("how many objects are there", NUMBERS[len(bodies)])]
    words = [body.word for body in bodies]
    plural = {"ball": "balls", "box": "boxes", "capsule": "capsules"}
    asked += [Question(f"how many {plural[word]} are there", NUMBERS[words.count(word)]) for word in plural]
    asked += [Question(f"what shape is the {body.colour} object", body.word) for body in bodies]
    for body in bodies:
        if words.count(body.word) == 1:
            asked.append(Question(f"what colour is the {body.word}", str(body.colour)))
        answer = _WAYS[body.moves] if body.moves else "it does not move"
        asked.append(Question(f"which way does the {body.name} move", answer))
    start = np.zeros(1)
    _, depth = project(np.stack([body.centre(start) for body in bodies]), scene.camera(start))
    movers = [body for body in bodies if body.moves]
    for i in range(len(bodies)):
        for j in range(i):
            if abs(depth[i, 0] - depth[j, 0]) > 0.3:
                nearer = bodies[i] if depth[i, 0] < depth[j, 0] else bodies[j]
                text = f"which is nearer at the start the {bodies[j].name} or the {bodies[i].name}"
                asked.append(Question(text, f"the {nearer.name}"))
    begins = sorted(body.start for body in movers)
    if len(begins) > 1 and begins[1] - begins[0] > 1.5 / fps:
        first = min(movers, key=lambda body: body.start)
        asked.append(Question("what moves first", f"the {first.name}"))
    for crossing in passes(scene, fps):
        mover, other = scene.bodies[crossing.mover], scene.bodies[crossing.other]
        for where in ("behind", "in front of"):
            text = f"does the {mover.name} pass {where} the {other.name}"
            asked.append(Question(text, "yes" if crossing.where == where else "no"))
    return asked
