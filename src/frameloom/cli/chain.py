"""Verbs in a chain: `interpolate 60fps method=dis | compress hnerv size=60k` as functions from clip to clip."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from frameloom.errors import InputError
from frameloom.progress import Progress

if TYPE_CHECKING:
    from frameloom.video.clip import Clip

# What each verb of a chain takes: the name of its bare word, then its named settings with their readers.
VERBS = {
    "interpolate": ("fps", {"fps": str, "method": str, "weights": str, "tile": int, "steps": int, "seed": int,
                            "flow_scale": float}),
    "stabilize": ("smoothness", {"smoothness": float, "method": str, "weights": str}),
    "compress": ("method", {"method": str, "size": lambda text: parse_size(text), "bpp": float, "quality": str,
                            "epochs": int, "minutes": float, "base": str, "preset": str, "fit": str,
                            "strides": lambda text: parse_numbers(text, "strides")}),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One verb and its settings."""

    verb: str
    settings: dict = field(default_factory=dict)


def parse(text: str) -> list[Step]:
    """`"interpolate 60fps | compress hnerv"` as steps. Raises InputError that names the word at fault."""
    steps = []
    for part in text.split("|"):
        words = part.split()
        if not words:
            raise InputError(f'--do "{text}": there is an empty step; a chain is VERB ... | VERB ...')
        verb, *rest = words
        if verb not in VERBS:
            raise InputError(f"--do: {verb} is no verb of a chain; there are {', '.join(VERBS)}")
        bare, readers = VERBS[verb]
        settings = {}
        for word in rest:
            name, equals, value = word.partition("=")
            if not equals:
                name, value = bare, word
            if name not in readers or name in settings:
                raise InputError(f"--do: {verb} cannot take {word}; it takes {', '.join(readers)}")
            try:
                settings[name] = readers[name](value)
            except ValueError as error:
                raise InputError(f"--do: {word}: {error}") from None
        steps.append(Step(verb, settings))
    return steps


def apply(clip: "Clip", steps: list[Step], output: Path | None, progress: Progress) -> "Clip | None":
    """The clip after all steps; None when the last one wrote a compressed file to `output`."""
    import tempfile

    from frameloom.tasks.compression import compress, decompress
    from frameloom.tasks.interpolation import interpolate
    from frameloom.tasks.stabilization import stabilize

    for number, step in enumerate(steps):
        last = number + 1 == len(steps)
        if step.verb == "interpolate":
            clip = interpolate(clip, **step.settings)
        elif step.verb == "stabilize":
            clip = stabilize(clip, **step.settings)
        elif last and output is not None:
            compress(clip, output, progress=progress, **step.settings)
            return None
        else:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "part.flm"
                compress(clip, path, progress=progress, **step.settings)
                sound = clip.source.passthrough
                clip = decompress(path.read_bytes())
                clip.source.passthrough = sound
    if output is not None:
        raise InputError(f"{output}: only a chain that ends in compress makes a .flm file")
    return clip


def parse_size(text: str | None) -> int | None:
    """Bytes from `60000`, `250k`, `1.5M`."""
    if text is None:
        return None
    scale = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if scale != 1 else text) * scale)
    except ValueError:
        raise InputError(f"--size {text}: a size is bytes such as 60000, 250k or 1.5M") from None


def parse_numbers(text: str | None, flag: str) -> list[int] | None:
    """Whole numbers separated by commas."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text}: whole numbers separated by commas, such as 5,4,4,2,2") from None


def parse_bits(text: str) -> list[float]:
    """Bits a pixel separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--bpp {text}: bits a pixel are numbers such as 0.05,0.1,0.2") from None


def parse_settings(given: list[str]) -> dict[str, int | float | bool | str]:
    """Settings from `gop=24`, `spatial=true`, `rate=2.5`."""
    settings: dict[str, int | float | bool | str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier() and value):
            raise InputError(f"--set {text}: a setting is NAME=VALUE, such as gop=24")
        settings[name] = value
        if value.lower() in ("true", "false"):
            settings[name] = value.lower() == "true"
        for kind in (float, int):
            with contextlib.suppress(ValueError):
                settings[name] = kind(value)
    return settings


def parse_prompts(first: str, later: list[str]) -> dict[int, str]:
    """A prompt, and others of the form `FRAME: PROMPT`, by the frame at which each begins."""
    prompts = {0: first}
    for text in later:
        number, colon, prompt = text.partition(":")
        if not colon or not number.strip().isdecimal() or int(number) in prompts:
            raise InputError(f'--then "{text}": a frame after the first, a colon and a prompt, '
                             'such as "120: a blue ball"; each frame once')  # fmt: skip
        prompts[int(number)] = prompt.strip()
    return prompts
