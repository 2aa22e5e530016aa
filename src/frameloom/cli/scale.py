"""Verbs about running over many devices: planning it, and finding out whether a machine is ready for it."""

from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import options

scale = typer.Typer(help="Find out whether this machine can run over many ranks.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.add_typer(scale, name="scale")


def plan(
    model: Annotated[str, typer.Argument(help="a method, or gpt:width=12288,layers=96,heads=96")],
    devices: Annotated[int, typer.Option(help="how many there are")],
    size: Annotated[str, typer.Option(help="tiny or paper")] = "paper",
    device: Annotated[str, typer.Option(help="a100, h100 or h200 (makers' figures)")] = "h100",
    memory: Annotated[str | None, typer.Option(help="of a device, such as 80GB, in place of the maker's")] = None,
    per_node: Annotated[int | None, typer.Option(help="devices in a node, in place of 8")] = None,
    link: Annotated[str | None, typer.Option(help="bytes a second within a node, such as 300GB")] = None,
    net: Annotated[str | None, typer.Option(help="bytes a second between nodes, such as 25GB")] = None,
    batch: Annotated[int | None, typer.Option(help="examples of a step; the recipe's if absent")] = None,
    efficiency: Annotated[float, typer.Option(help="share of the maker's FLOP/s that is reached")] = 0.45,
    tokens: Annotated[float | None, typer.Option(help="of a gpt's training, such as 300e9: gives days")] = None,
    top: Annotated[int, typer.Option(help="how many plans to show")] = 10,
    trace: Annotated[Path | None, typer.Option(help="write the best plan's step as a Chrome trace")] = None,
    json: options.Json = False,
) -> None:
    """Say how to spread a model over devices: memory, bubble and days of every way that fits, the fastest first."""
    from dataclasses import replace

    from frameloom.cli import terminal
    from frameloom.cli.make import parse_bytes
    from frameloom.errors import InputError
    from frameloom.scale.plan import DEVICES, blocks_of
    from frameloom.scale.plan import plan as verb

    if device not in DEVICES:
        raise InputError(f"--device {device}: there are {', '.join(DEVICES)}")
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency {efficiency:g}: a share between 0 and 1")
    changes = {"memory": memory, "link": link, "net": net}
    kind = replace(DEVICES[device], **{name: float(parse_bytes(text, f"--{name} ")) for name, text in changes.items()
                                       if text is not None})  # fmt: skip
    if per_node is not None:
        kind = replace(kind, per_node=per_node)
    found = verb(model, size=size, devices=devices, device=kind, batch=batch, efficiency=efficiency, trace=trace)
    blocks, _, usual, steps, shape = blocks_of(model, size)
    count = shape.parameters if shape else float(sum(block.parameters for block in blocks))
    examples = batch or usual
    if shape and tokens:
        steps = tokens / (examples * shape.sequence)
    rows = [{"parallel": one.words(), "p": one.p, "t": one.t, "d": one.d, "b": one.b, "v": one.v, "m": one.m,
             "memory_gb": round(one.memory / 1e9, 2), "bubble": round(one.share, 4), "seconds": round(one.seconds, 4),
             "days": round(one.seconds * steps / 86400, 2) if steps else None} for one in found[:top]]  # fmt: skip
    if json:
        terminal.emit({"model": model, "parameters": round(count), "devices": devices, "batch": examples,
                       "steps": round(steps) or None, "plans": rows, "trace": trace and str(trace)})  # fmt: skip
        return
    terminal.say(f"{model}  {count / 1e9:.4g} billion parameters  batch {examples}  {devices} x {device}"
                 f"  {f'{steps:,.0f} steps' if steps else ''}")  # fmt: skip
    terminal.say(f"{'memory':>9} {'bubble':>7} {'step':>9} {'days':>8}  --parallel")
    for row in rows:
        days = "" if row["days"] is None else f"{row['days']:.1f}"
        terminal.say(f"{row['memory_gb']:6.1f} GB {row['bubble']:7.1%} {row['seconds']:7.3g} s {days:>8}  "
                     f"{row['parallel']}")  # fmt: skip
    terminal.say("computed from makers' figures, not measured on such devices")
    if trace is not None:
        terminal.say(f"{trace}  the first plan's step, for chrome://tracing or Perfetto")


@scale.command()
def selftest(
    ranks: Annotated[int, typer.Option(help="2 or 4 local ranks")] = 2,
    json: options.Json = False,
) -> None:
    """Start local ranks and prove that collectives, pipelines, split matrices and copies give one process's result."""
    from frameloom.cli import terminal
    from frameloom.errors import InputError
    from frameloom.scale.selftest import selftest as run

    if ranks not in (2, 4):
        raise InputError(f"--ranks {ranks}: 2 or 4")
    with terminal.bar("checks") as progress:
        found = run(ranks, progress)
    if json:
        terminal.emit({"ranks": ranks, "checks": [{"name": c.name, "good": c.good, "seen": c.seen} for c in found]})
    else:
        for check in found:
            terminal.say(f"{'ok    ' if check.good else 'FAILED'}  {check.name}  {check.seen}")
    if not all(check.good for check in found):
        raise typer.Exit(1)
