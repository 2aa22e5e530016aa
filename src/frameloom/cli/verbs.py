"""Verbs that take a video."""

import time
from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import options
from frameloom.errors import InputError
from frameloom.units import in_bytes


def register(app: typer.Typer) -> None:
    for command in (flow, interpolate, stabilize, live, compress, decompress, inspect, rd, run):
        app.command()(options.grouped(command))


def finish(
    clip, output: Path, encoding: options.Encoding, *, resume: bool, json: bool, extra: dict | None = None
) -> None:
    """Encode a lazy clip under a bar and say what came out."""
    from frameloom.cli import terminal
    from frameloom.video.writer import write

    begun = time.perf_counter()
    with terminal.bar() as progress:
        write(clip, output, **vars(encoding), resume=resume, progress=progress)
    seconds = time.perf_counter() - begun
    report = getattr(clip.source, "report", None)
    facts = {"output": str(output), "frames": len(clip), "fps": str(clip.rate), "bytes": output.stat().st_size,
             "seconds": round(seconds, 2)} | (extra or {}) | (vars(report) if report else {})  # fmt: skip
    if json:
        terminal.emit(facts)
        return
    if hasattr(report, "duplicates") and (report.cuts or report.duplicates):
        terminal.say(f"{report.cuts} scene cuts held, {report.duplicates} repeated frames kept")
    terminal.say(terminal.describe_result(output, len(clip), clip.rate, seconds, float(clip.duration)))


def flow(
    input: options.Input,
    folder: Annotated[Path, typer.Argument(help="the folder to make")],
    method: options.Method = "auto",
    format: Annotated[str, typer.Option(help="flo, npz or png (KITTI's 16 bit)")] = "flo",
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="also from each frame back")] = False,
    tile: Annotated[
        int | None, typer.Option(help="look at squares of so many pixels: large pictures, little memory")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="refinements of a flow, for methods that refine; the weights' own number if absent"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that is not empty")] = False,
    weights: options.Weights = None,
    device: options.Device = "cpu",
    *,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Find the motion of every pixel from frame to frame: flow files, and a video of it in colours."""
    from frameloom.cards import chosen
    from frameloom.cli import terminal
    from frameloom.tasks.flow import flow as verb
    from frameloom.tasks.flow.files import check

    terminal.listen()
    check(folder, format, overwrite)
    clip = reading.open(input)
    terminal.say(terminal.describe(clip, Path(input).name))
    name = chosen(method, "flow")
    made = verb(clip, name, bidirectional=bidirectional, weights=weights, tile=tile, steps=steps, device=device)
    begun = time.perf_counter()
    with terminal.bar("gaps") as progress:
        made.save(folder, format, overwrite=overwrite, progress=progress)
    seconds = round(time.perf_counter() - begun, 2)
    if json:
        terminal.emit({"output": str(folder), "method": name, "flows": len(made), "format": format, "seconds": seconds})
    else:
        terminal.say(f"{folder}  {len(made):,} flows by {name}  {seconds} s")


def interpolate(
    input: options.Input,
    output: options.Output,
    fps: Annotated[str, typer.Option(help="the new rate: 60, 23.976, 30000/1001, or 2x for twice the source's")] = "60",
    slow: Annotated[float | None, typer.Option(help="slow motion: so many times slower, at the source's rate")] = None,
    method: options.Method = "auto",
    weights: options.Weights = None,
    device: options.Device = "cpu",
    tile: Annotated[int | None, typer.Option(help="longest side in pixels that a method is given at once")] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="drop repeated frames and re-time the motion")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="stop rather than round an instant")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the picture, or of a model the video, between two pictures")
    ] = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    flow_scale: options.FlowScale = None,
    turned: options.Turned = None,
    *,
    encoding: options.Encoding,
    resume: options.Resume = False,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Change the frame rate: pictures at instants nobody recorded, sound untouched.

    With --out INPUT and OUTPUT are two pictures, and --out is the picture halfway between them, or with a model such as
    --method stiv the video.
    """
    from frameloom.cards import card, chosen
    from frameloom.cli import terminal
    from frameloom.errors import InputError
    from frameloom.tasks.interpolation import interpolate as verb

    terminal.listen()
    name = chosen(method, "interpolate")
    if card(name, "interpolate").makes_video:
        from frameloom.cli.make import between

        if out is None:
            raise InputError(f"--method {name}: makes the frames between two pictures: interpolate A.png B.png "
                             f"--method {name} -o OUT.mp4")  # fmt: skip
        between(Path(input), output, out, name, weights, steps, seed, device, None, encoding, json)
        return
    if out is not None:
        from frameloom.cli.make import middle

        middle(Path(input), output, out, name, weights, steps, seed, flow_scale, turned, device, json)
        return
    clip = reading.open(input)
    terminal.say(terminal.describe(clip, Path(input).name))
    made = verb(clip, fps, name, slow=slow, weights=weights, device=device, tile=tile, dedupe=dedupe, strict=strict,
                steps=steps, seed=seed, flow_scale=flow_scale, turned=turned)  # fmt: skip
    terminal.say(f"{name} on {device}, {len(clip):,} frames to {len(made):,}")
    finish(made, output, encoding, resume=resume, json=json, extra={"method": name})


def stabilize(
    input: options.Input,
    output: options.Output,
    method: options.Method = "auto",
    smoothness: Annotated[float, typer.Option(help="0 (as recorded) to 1; slow pans stay")] = 0.5,
    weights: options.Weights = None,
    device: options.Device = "cpu",
    *,
    encoding: options.Encoding,
    resume: options.Resume = False,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Take the shake out of a handheld video; with fast-stab the whole field of view stays."""
    from frameloom.cards import chosen
    from frameloom.cli import terminal
    from frameloom.tasks.stabilization import stabilize as verb
    from frameloom.tasks.stabilization.base import StabilizedSource
    from frameloom.video.writer import check_output

    terminal.listen()
    clip = reading.open(input)
    terminal.say(terminal.describe(clip, Path(input).name))
    name = chosen(method, "stabilize")
    made = verb(clip, name, smoothness, weights=weights, device=device)
    check_output(made, output)
    if isinstance(made.source, StabilizedSource):
        with terminal.bar() as progress:
            made.source.analyse(progress)
        report = made.source.report
        shots = f"{report.shots} shot{'s' if report.shots > 1 else ''}"
        steady = f", {report.still} of them left as they are" if report.still else ""
        rounds = ", ".join(f"{value:.1f}" for value in report.residuals)
        terminal.say(f"{name} on {device}, {shots}{steady}; corrections of {rounds or 'no'} pixels, round by round")
    finish(made, output, encoding, resume=resume, json=json, extra={"method": name})


def live(
    input: options.Input,
    output: options.Output,
    prompt: Annotated[str, typer.Option(help="what the video is to show")],
    then: Annotated[list[str] | None, typer.Option(help='another prompt from a frame on: "120: a blue ball"')] = None,
    prompt_ramp: Annotated[int, typer.Option(help="frames over which a new prompt is faded in")] = 0,
    negative: Annotated[str, typer.Option(help="what it is not to show, for --guidance full and onetime")] = "",
    t_index: Annotated[str | None, typer.Option(help="steps of a grid of 50 to take; low changes more")] = None,
    strength: Annotated[float | None, typer.Option(help="instead: how much is to change, up to 1")] = None,
    steps: Annotated[int, typer.Option(help="how many, with --strength")] = 2,
    guidance: Annotated[str, typer.Option(help="none, self, onetime (one evaluation more) or full (twice)")] = "none",
    w: Annotated[float, typer.Option("--w", help="strength of the guidance")] = 1.2,
    delta: Annotated[float, typer.Option(help="strength of the reference in self and onetime guidance")] = 1.0,
    noise: Annotated[str, typer.Option(help="between steps: fixed, ddim (the estimated one) or none")] = "fixed",
    similar: Annotated[float | None, typer.Option(help="skip frames as alike as this, such as 0.98")] = None,
    temporal_blend: Annotated[float, typer.Option(help="share of the output before in the next frame")] = 0.0,
    from_noise: Annotated[bool, typer.Option("--from-noise", help="text to image: the input only beats time")] = False,
    drop: Annotated[bool, typer.Option("--drop", help="keep the pace of the input; frames may be dropped")] = False,
    method: options.Method = "auto",
    weights: options.Weights = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    *,
    encoding: options.Encoding,
    resume: options.Resume = False,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Restyle a video by words as it comes, frame by frame, in a few steps."""
    from frameloom.cards import chosen
    from frameloom.cli import terminal
    from frameloom.cli.chain import parse_numbers, parse_prompts
    from frameloom.errors import InputError
    from frameloom.tasks.editing import live as verb
    from frameloom.video.writer import check_output

    terminal.listen()
    if drop and resume:
        raise InputError("--resume: what --drop leaves out depends on the clock; such a run cannot be taken up again")
    clip = reading.open(input)
    terminal.say(terminal.describe(clip, Path(input).name))
    name = chosen(method, "live")
    made = verb(clip, parse_prompts(prompt, then or []), name, t_index=parse_numbers(t_index, "--t-index"),
                strength=strength, steps=steps, weights=weights, device=device, drop=drop, guidance=guidance, w=w,
                delta=delta, negative=negative, noise=noise, similar=similar, blend=temporal_blend, ramp=prompt_ramp,
                from_noise=from_noise, seed=seed)  # fmt: skip
    check_output(made, output)
    source = made.source
    taken = ",".join(map(str, source.live.settings.t_index))
    terminal.say(f"{name} with {source.live.model.name} on {device}, steps {taken} of 50, guidance {guidance}, "
                 f"{source.live.delay} frames behind, {made.info.width}x{made.info.height}")  # fmt: skip
    finish(made, output, encoding, resume=resume, json=json, extra={"method": name})
    report = source.report
    spared = f", {report.skipped} skipped, {report.dropped} dropped" if report.skipped or report.dropped else ""
    terminal.say(f"{report.live_fps:g} frames a second, {report.launches} launches, {report.evaluations} evaluations"
                 f"{spared}")  # fmt: skip


def compress(
    input: options.Input,
    output: Annotated[Path, typer.Argument(help="the file to make: .flm")],
    method: options.Method = "auto",
    size: Annotated[str | None, typer.Option(help="bytes at most: 60000, 250k, 1.5M")] = None,
    bpp: Annotated[float | None, typer.Option(help="bits a pixel at most, in place of a size")] = None,
    quality: Annotated[str | None, typer.Option(help="a PSNR to reach, 35dB; or a conventional codec's crf")] = None,
    minutes: Annotated[float | None, typer.Option(help="by the clock, for a codec that learns the video")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the video, for codecs that learn it")] = None,
    base: Annotated[str | None, typer.Option(help="the network that boost-nerv boosts: hnerv or nerv")] = None,
    strides: Annotated[str | None, typer.Option(help="upsampling of a learned codec, such as 5,4,4,2,2")] = None,
    fit: Annotated[str | None, typer.Option(help="pad or crop frames that the strides do not divide")] = None,
    preset: options.Preset = None,
    weights: options.Weights = None,
    set: Annotated[list[str] | None, typer.Option(help="a setting of the method's own, such as gop=24")] = None,
    segment: Annotated[int | None, typer.Option(help="frames of each fit, for clips longer than memory")] = None,
    resume: options.Resume = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    *,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Store a video in one .flm file, by a neural codec or a conventional one."""
    from frameloom.cli import terminal
    from frameloom.cli.chain import parse_numbers, parse_settings, parse_size
    from frameloom.tasks.compression import compress as verb
    from frameloom.video.writer import check_target

    terminal.listen()
    clip = reading.open(input)
    check_target(output, clip.source.inputs())
    terminal.say(terminal.describe(clip, Path(input).name))
    own = {"epochs": epochs, "minutes": minutes, "base": base, "strides": parse_numbers(strides, "--strides"),
           "fit": fit, "preset": preset, "weights": weights} | parse_settings(set or [])  # fmt: skip
    with terminal.bar("steps") as progress:
        report = verb(clip, output, method, size=parse_size(size), bpp=bpp, quality=quality, segment=segment,
                      resume=resume, seed=seed, device=device, progress=progress, **own)  # fmt: skip
    if json:
        terminal.emit(vars(report))
        return
    terminal.say(f"{output}  {report.method}  {in_bytes(report.bytes)}  {report.bits_per_pixel:.4f} bits a pixel  "
                 f"{report.seconds:.1f} s")  # fmt: skip


def decompress(
    input: Annotated[Path, typer.Argument(help="a .flm file, or a published quant_vid.pth of HNeRV")],
    output: options.Output,
    frames: Annotated[str | None, typer.Option(help="only these, in this order: 17, 10:40, 0,10:20")] = None,
    region: Annotated[str | None, typer.Option(help="only this part of every frame: x,y,width,height")] = None,
    weights: options.Weights = None,
    *,
    encoding: options.Encoding,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Make a video of a .flm file, or of any frames of it."""
    from frameloom.cli import terminal
    from frameloom.tasks.compression import decompress as verb
    from frameloom.tasks.compression.base import parse_frames, parse_region

    terminal.listen()
    clip = verb(input, region=parse_region(region), weights=weights)
    terminal.say(terminal.describe(clip, input.name))
    if frames is not None:
        clip = verb(input, parse_frames(frames, len(clip)), parse_region(region), weights)
    finish(clip, output, encoding, resume=resume, json=json)


def inspect(
    input: Annotated[Path, typer.Argument(help="a .flm file, or a published .pth of HNeRV")],
    json: options.Json = False,
) -> None:
    """Show what is in a .flm file: every section's bytes and bits per pixel."""
    from frameloom.cli import terminal
    from frameloom.tasks.compression import inspect as verb

    found = verb(input)
    if json:
        terminal.emit(found)
        return
    if "needs" in found:
        print(
            f"{input}  {found['method']}  {found['parameters']:,} parameters, strides "
            f"{','.join(map(str, found['strides']))}, channels {','.join(map(str, found['channels']))}; "
            f"needs {found['needs']}: frameloom compress VIDEO OUT.flm --method {found['method']} --weights {input}"
        )
        return
    size = f"{found['width']}x{found['height']}"
    print(f"{input}  {found['method']}  {size}  {found['frames']} frames at {found['rate']} a second")
    for name, part in found["sections"].items():
        print(f"  {name:28} {part['bytes']:>10,} bytes  {part['bits_per_pixel']:.5f} bits a pixel")
    print(f"  {'in all':28} {found['bytes']:>10,} bytes  {found['bits_per_pixel']:.5f} bits a pixel")


def rd(
    input: options.Input,
    output: Annotated[Path, typer.Option("-o", "--output", help="the page to make: .html")],
    methods: Annotated[str | None, typer.Option(help="such as hnerv,sem; x264, x265, av1 always")] = None,
    bpp: Annotated[str, typer.Option(help="bits a pixel to compare at")] = "0.05,0.1,0.2,0.4",
    minutes: Annotated[float | None, typer.Option(help="by the clock, of every fit; 1 if no epochs are given")] = None,
    epochs: Annotated[int | None, typer.Option(help="of every fit of a network")] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    *,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Compare codecs on a video at the same sizes: curves of PSNR and MS-SSIM, BD-rate, times."""
    from frameloom.cli import terminal
    from frameloom.cli.chain import parse_bits
    from frameloom.tasks.compression.base import write_whole
    from frameloom.tasks.compression.rd import against, page, rate_distortion, report

    terminal.listen()
    clip = reading.open(input)
    if output.suffix != ".html" or not output.parent.is_dir():
        raise InputError(f"{output}: the page is an .html file in a folder that is there")
    terminal.say(terminal.describe(clip, Path(input).name))
    names = methods.split(",") if methods else None
    with terminal.bar("steps") as progress:
        points = rate_distortion(clip, names, parse_bits(bpp), minutes=minutes, epochs=epochs, seed=seed, device=device,
                                 progress=progress)  # fmt: skip
    write_whole(output, page(points, clip).encode())
    if json:
        terminal.emit(report(points, clip))
        return
    for point in points:
        quality = f"{point.psnr:6.2f} dB  MS-SSIM {point.ms_ssim:.4f}"
        speed = f"encode {point.encode_seconds:7.1f} s  decode {point.decode_fps:6.0f} frames/s"
        print(f"{point.method:10} {point.bits_per_pixel:.4f} bits a pixel  {quality}  {speed}")
    for method, value in against(points).items():
        print(f"{method:10} BD-rate against x264: {'no quality in common' if value is None else f'{value:+.1f}%'}")
    terminal.say(str(output))


def run(
    input: options.Input,
    output: Annotated[Path, typer.Argument(help="a video, or a .flm file if the last verb is compress")],
    do: Annotated[str, typer.Option(help='verbs in a chain, such as "interpolate 60fps | compress hnerv"')],
    *,
    encoding: options.Encoding,
    resume: options.Resume = False,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Apply several verbs in one go, window by window, with nothing in between on disk.

    A chain that ends in compress writes the compressed file to a .flm output; to a video output it writes what
    that file would show.
    """
    from frameloom.cli import terminal
    from frameloom.cli.chain import apply, parse
    from frameloom.video.writer import check_output, check_target

    terminal.listen()
    steps = parse(do)
    clip = reading.open(input)
    as_file = output.suffix == ".flm"
    if as_file:
        check_target(output, clip.source.inputs())
    else:
        check_output(clip, output)
    terminal.say(terminal.describe(clip, Path(input).name))
    with terminal.bar("steps") as progress:
        made = apply(clip, steps, output if as_file else None, progress)
    if made is not None:
        finish(made, output, encoding, resume=resume, json=json, extra={"do": do})
    elif json:
        terminal.emit({"output": str(output), "bytes": output.stat().st_size, "do": do})
    else:
        terminal.say(f"{output}  {in_bytes(output.stat().st_size)}")
