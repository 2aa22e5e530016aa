"""What a scene is made of: parts (one primitive each), bodies (what a mask shows), and a camera, over time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from frameloom.world.geometry import Poses, Times, Vectors, pose

SPHERE, BOX, CAPSULE, PLANE = range(4)
PLAIN, NOISE, STRIPES, CHECKS, PHOTOGRAPH, SKY = range(6)

# Six hues far enough apart to be named from pixels whatever the shade.
COLOURS = {
    "red": (0.86, 0.13, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.95, 0.86, 0.14),
    "green": (0.16, 0.66, 0.22),
    "blue": (0.14, 0.36, 0.88),
    "purple": (0.56, 0.20, 0.80),
}

LIGHT = np.array([-0.45, 0.75, 0.55]) / np.linalg.norm([-0.45, 0.75, 0.55])


@dataclass(frozen=True)
class Surface:
    """A texture that is fixed to its part.

    Texture coordinates are `frequency * turn @ (point on the part, world units) + offset`; `colours` are its two
    ends. `light` 0 shows the texture as it is, 1 is fully shaded.
    """

    texture: int
    colours: tuple[tuple[float, ...], tuple[float, ...]]
    frequency: float = 1.0
    turn: np.ndarray = field(default_factory=lambda: np.eye(3))
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    photograph: int = 0
    light: float = 1.0


@dataclass(frozen=True)
class Part:
    """A unit primitive and the affine map that places it in the world at given instants (seconds).

    Unit primitives: sphere of radius 1; box and plane (z = 0) over [-1, 1]; capsule of radius 1 about the y axis
    with segment ends at y = -half and y = half.
    The light comes from `light`; a rolling ball is lit along its axis of rotation, so that its shade stays put.
    """

    shape: int
    body: int
    place: Callable[[Times], Poses]
    surface: Surface
    half: float = 0.0
    light: np.ndarray = field(default_factory=lambda: LIGHT)


@dataclass(frozen=True)
class Body:
    """Something with a mask. `word` is its noun; `moves` the direction word (None: still); times in seconds.

    `eased` bodies are seen to start and to stop; the others move from the first frame to the last.
    """

    word: str
    colour: str | None = None
    size: str | None = None
    centre: Callable[[Times], Vectors] = lambda times: np.zeros((len(times), 3))
    radius: float = 0.0
    moves: str | None = None
    start: float = 0.0
    stop: float = 0.0
    eased: bool = False

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.colour, self.word) if word)

    @property
    def full_name(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.word) if word)


@dataclass(frozen=True)
class Contact:
    """An impact: its instant in seconds, the bodies that meet, and its strength in (0, 1]."""

    time: float
    body: int
    other: str
    strength: float


@dataclass(frozen=True)
class Scene:
    """One seed's scene. `focal` is in units of the picture's shorter side; `pivot` is what the views turn about.

    `joints` gives a figure's joints in the world `(t, j, 3)`; `action` is what a person does, the colour of a talking
    person's eyes, or the way a flying camera turns; `material` what a bouncing ball sounds like.
    """

    kind: str
    parts: list[Part]
    bodies: list[Body]
    camera: Callable[[Times], Poses]
    focal: float
    duration: float
    pivot: np.ndarray = field(default_factory=lambda: np.zeros(3))
    contacts: list[Contact] = field(default_factory=list)
    joints: Callable[[Times], np.ndarray] | None = None
    action: str = ""
    material: str = ""
    voice: np.ndarray | None = None


def fixed(linear: np.ndarray, centre: np.ndarray) -> Callable[[Times], Poses]:
    """A placement that does not change."""
    matrix = pose(linear, centre)
    return lambda times: np.repeat(matrix, len(times), 0)


def moving(linear: np.ndarray, centre: Callable[[Times], Vectors]) -> Callable[[Times], Poses]:
    """A placement that is carried along without turning."""
    return lambda times: pose(linear, centre(times))


def shade(colour: tuple[float, ...], factor: float) -> tuple[float, ...]:
    """The same hue, darker (factor < 1) or mixed with white (factor > 1)."""
    if factor <= 1:
        return tuple(factor * value for value in colour)
    return tuple(1 - (1 - value) * (2 - factor) for value in colour)


def random_turn(rng: np.random.Generator) -> np.ndarray:
    """A uniformly random rotation."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)
