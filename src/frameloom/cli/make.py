"""Verbs that make a video: from words, from pictures, from the beginning of another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frameloom.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from frameloom.video.clip import Clip

Weights = Annotated[
    str | None, typer.Option(help="a shipped model, a run's folder, a folder or hub id of a diffusers pipeline")
]
Guidance = Annotated[float | None, typer.Option(help="how strongly words (and pictures) count; 1 is off")]
Solver = Annotated[str | None, typer.Option(help="ddim, ancestral, lcm, heun, dpmpp2m, ab2; the model's own if absent")]
Zoom = Annotated[int | None, typer.Option(help="show every pixel so many times as large; by itself for tiny models")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="a setting of the method, such as queue=16; may be repeated")
]
Strict = Annotated[bool, typer.Option("--strict", help="stop at words that the model does not know")]

Stream = Annotated[
    str | None,
    typer.Option(help="k blocks of the network take turns in memory: k=2[,keep=4][,store=ram|disk], or budget=2GB"),
]

VISIBLE = 256


def register(app: typer.Typer) -> None:
    for command in (generate, predict):
        app.command()(options.grouped(command))


def generate(
    prompt: Annotated[str, typer.Argument(help="what to show")] = "",
    output: Annotated[Path, typer.Option("--out", "-o", help="the video to make")] = Path("out.mp4"),
    image: Annotated[Path | None, typer.Option(help="a picture to begin with")] = None,
    prompts: Annotated[
        str | None, typer.Option(help='scenes, "40: a red ball ...; 24: ...", or a file of them')
    ] = None,
    frames: Annotated[int | None, typer.Option(help="how many; the model's own number if absent")] = None,
    method: options.Method = "auto",
    weights: Weights = None,
    steps: options.Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
    memory_budget: Annotated[str | None, typer.Option(help="most memory to use, such as 2GB; slices to fit")] = None,
    stream: Stream = None,
    set: Set = None,
    strict: Strict = False,
    zoom: Zoom = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    *,
    encoding: options.Encoding,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Make a video from words, from a picture, or from both."""
    from frameloom.cards import chosen
    from frameloom.cli import terminal
    from frameloom.errors import InputError
    from frameloom.tasks.generation import generate as verb

    terminal.listen()
    if not (prompt.strip() or prompts or image):
        raise InputError('PROMPT: say what to show, such as "a small red ball rolls left", or give --image')
    if prompt.strip() and prompts:
        raise InputError("--prompts: give one sentence or several scenes, not both")
    settings = parse_settings(set)
    if memory_budget is not None:
        method = "streamlined" if method == "auto" else method
        if method != "streamlined":
            raise InputError(f"--memory-budget: goes with --method streamlined, not with {method}")
        settings["budget"] = parse_bytes(memory_budget)
    with terminal.bar("steps") as progress:
        clip = verb(
            parse_scenes(prompts) if prompts else prompt, frames=frames, method=method, weights=weights,
            image=None if image is None else picture(image), steps=steps, guidance=guidance, solver=solver, seed=seed,
            device=device, strict=strict, stream=parse_stream(stream), progress=progress, **settings,
        )  # fmt: skip
        _told(clip, chosen(method, "generate"), device)
        _finish(clip, output, zoom, encoding, resume, json)


def predict(
    input: options.Input,
    output: options.Output,
    frames: Annotated[int, typer.Option(help="how many frames to add")] = 8,
    prompt: Annotated[str, typer.Option(help="what is seen, for models that read")] = "",
    method: options.Method = "auto",
    weights: Weights = None,
    steps: options.Steps = None,
    guidance: Guidance = None,
    zoom: Zoom = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    *,
    encoding: options.Encoding,
    json: options.Json = False,
) -> None:
    """Go on with a video: its last frames, and those that might come next."""
    from frameloom.cli import terminal
    from frameloom.tasks.generation import predict as verb
    from frameloom.video.reader import read
    from frameloom.video.writer import check_target

    terminal.listen()
    clip = read(input)
    check_target(output, clip.source.inputs())
    terminal.say(terminal.describe(clip, Path(input).name))
    with terminal.bar("steps") as progress:
        made = verb(clip, frames, method, prompt=prompt, weights=weights, steps=steps, guidance=guidance, seed=seed,
                    device=device, progress=progress)  # fmt: skip
        _finish(made, output, zoom, encoding, False, json)


def between(first: Path, last: Path, output: Path, method: str, weights: str | None, steps: int | None, seed: int,
            device: str, zoom: int | None, encoding: options.Encoding, json: bool) -> None:  # fmt: skip
    """Make the frames between two pictures with a model that takes given frames."""
    from frameloom.cli import terminal
    from frameloom.tasks.generation import inbetween

    with terminal.bar("steps") as progress:
        clip = inbetween(picture(first), picture(last), method, weights=weights, steps=steps, seed=seed, device=device,
                         progress=progress)  # fmt: skip
        _told(clip, method, device)
        _finish(clip, output, zoom, encoding, False, json)


def middle(first: Path, last: Path, output: Path, method: str, weights: str | None, steps: int | None, seed: int,
           flow_scale: float | int | None, turned: bool | None, device: str, json: bool) -> None:  # fmt: skip
    """Write the picture halfway between two pictures, under its name only when it is whole."""
    import os
    import time

    import cv2
    import torch

    from frameloom.cli import terminal
    from frameloom.errors import InputError
    from frameloom.motion.dis import pixels
    from frameloom.tasks.interpolation.base import sampling, tuned
    from frameloom.training.pretrained import load

    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out {output}: {method} makes the one picture between two; name a .png, .jpg or .webp")
    begun = time.perf_counter()
    made = tuned(sampling(load(method, weights, device=device), method, steps, seed), method, flow_scale, turned)
    if not hasattr(made, "between"):
        raise InputError(f"--method {method}: takes videos, not two pictures; take another")
    pair = [picture(path).to(device) for path in (first, last)]
    if pair[0].shape != pair[1].shape:
        sizes = [f"{path} is {x.shape[2]}x{x.shape[1]}" for path, x in zip((first, last), pair, strict=True)]
        raise InputError(f"{', '.join(sizes)}; both pictures must have one size")
    with torch.inference_mode():
        found = made.between(*pair)(0.5).clamp(0, 1)
    draft = output.with_name(f".{output.name}.part{output.suffix}")
    if not cv2.imwrite(str(draft), pixels(found)[..., ::-1]):
        raise InputError(f"{output}: cannot be written")
    os.replace(draft, output)
    seconds = round(time.perf_counter() - begun, 2)
    if json:
        terminal.emit({"output": str(output), "method": method, "seconds": seconds})
    else:
        terminal.say(f"{output}  halfway between {first} and {last} by {method}  {seconds} s")


def _told(clip: "Clip", method: str, device: str) -> None:
    from frameloom.cli import terminal

    request, model = clip.source.request, clip.source.model
    by = method if model.name == method else f"{method} with {model.name}"
    terminal.say(f"{by} on {device}, {request.frames:,} frames of {model.width}x{model.height}, "
                 f"{request.steps} steps, guidance {request.guidance:g}, seed {request.seed}")  # fmt: skip
    for streamed in clip.source.streams:
        terminal.say(f"streamed: {streamed}")


def _finish(clip: "Clip", output: Path, zoom: int | None, encoding: options.Encoding, resume: bool, json: bool) -> None:
    from frameloom.cli.verbs import finish
    from frameloom.errors import InputError

    side = min(clip.info.width, clip.info.height)
    if zoom is None:
        zoom = max(1, -(-VISIBLE // side)) if side < 128 else 1
    if zoom < 1:
        raise InputError(f"--zoom {zoom}: 1 or more")
    finish(clip.enlarged(zoom), output, encoding, resume=resume, json=json,
           extra={"width": clip.info.width, "height": clip.info.height, "zoom": zoom})  # fmt: skip


def picture(path: Path) -> "Tensor":
    """A picture file as `(3, h, w)` in [0, 1]. Raises InputError where it cannot be read."""
    from frameloom.errors import InputError
    from frameloom.video.reader import read

    if not path.is_file():
        raise InputError(f"{path}: no such picture")
    try:
        return next(iter(read(str(path)).frames(0, 1))).rgb
    except StopIteration:
        raise InputError(f"{path}: holds no picture") from None


def parse_settings(given: list[str] | None) -> dict[str, Any]:
    """`["queue=16", "tail=off"]` as keyword arguments: whole numbers, numbers, on and off, words."""
    from frameloom.errors import InputError

    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set {text}: a setting is name=value, such as queue=16")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    words = {"on": True, "true": True, "off": False, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_scenes(text: str) -> list[tuple[str, int]]:
    """`"40: a red ball rolls left; 24: a blue box rises"`, or a file with such scenes on its lines."""
    from frameloom.errors import InputError

    path = Path(text)
    name = "--prompts"
    try:
        is_file = path.is_file()
    except OSError:  # too long for a name
        is_file = False
    if is_file:
        try:
            name, text = str(path), path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{path}: not a text file") from None
        if not text:
            raise InputError(f"{path}: holds no prompt; a line is FRAMES: SENTENCE")
    scenes = []
    for part in text.replace("\n", ";").split(";"):
        if not part.strip():
            continue
        count, colon, sentence = part.partition(":")
        if not colon or not count.strip().isdigit() or int(count) < 1 or not sentence.strip():
            raise InputError(
                f'{name}: "{part.strip()}" is not a scene; write FRAMES: SENTENCE, such as 40: a ball rises'
            )
        scenes.append((sentence.strip(), int(count)))
    if not scenes:
        raise InputError(f"{name}: no scene; write FRAMES: SENTENCE; FRAMES: SENTENCE")
    return scenes


def parse_stream(text: str | None) -> dict[str, Any] | None:
    """`k=2,keep=4,k2=1,store=disk`, `budget=2GB` or `auto` as the options of streaming."""
    from frameloom.errors import InputError

    if text is None:
        return None
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in ("k", "k2", "keep") and value.isdigit():
            found[name] = int(value)
        elif name == "store" and value in ("ram", "disk"):
            found[name] = value
        elif name == "budget":
            found[name] = parse_bytes(value, "--stream budget=")
        elif part.strip() != "auto":
            raise InputError(f"--stream {part.strip()}: is none of k=4, k2=2, keep=1, store=ram, store=disk, "
                             "budget=2GB and auto")  # fmt: skip
    return found


def parse_bytes(text: str, flag: str = "--memory-budget ") -> int:
    """`2GB`, `500MB`, `1.5g` as bytes."""
    from frameloom.errors import InputError

    number = text.strip().lower().removesuffix("b")
    scale = {"k": 1e3, "m": 1e6, "g": 1e9}.get(number[-1:])
    try:
        value = int(float(number[:-1] if scale else number) * (scale or 1))
    except ValueError:
        value = 0
    if value <= 0:
        raise InputError(f"{flag}{text}: an amount of memory is such as 2GB or 500MB")
    return value
