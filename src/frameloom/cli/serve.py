"""The verb that answers other programs."""

from typing import Annotated

import typer

from frameloom.cli import options


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    weights: Annotated[
        str | None, typer.Option(help="a folder with a causal language model; a small one of captions if absent")
    ] = None,
    host: Annotated[str, typer.Option(help="whom to listen to: this machine alone, or 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    slots: Annotated[int, typer.Option(help="requests decoded together")] = 32,
    max_len: Annotated[
        int | None, typer.Option(help="tokens of a request, prompt and answer; 512 or what the model knows if absent")
    ] = None,
    queue: Annotated[int, typer.Option(help="requests that may wait; more are told to come again")] = 256,
    device: options.Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own if absent")] = None,
) -> None:
    """Serve a language model over HTTP: OpenAI's completions, with streaming; requests are decoded together."""
    import torch

    from frameloom.cli import terminal
    from frameloom.errors import InputError
    from frameloom.scale.serve import serve as run

    kinds = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise InputError(f"--dtype {dtype}: float32, bfloat16 or float16 is wanted")
    terminal.listen()
    if host not in ("127.0.0.1", "localhost", "::1"):
        terminal.say(f"note: --host {host}: whoever reaches this machine can use the model; there is no password")
    name = weights or "world-words"
    run(weights, host=host, port=port, slots=slots, max_len=max_len, queue=queue, device=device, dtype=kinds[dtype],
        ready=lambda url: terminal.say(f"{name} at {url}/v1/completions  (Ctrl-C stops)"))  # fmt: skip
