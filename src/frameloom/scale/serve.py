"""A language model behind HTTP, in the shapes of OpenAI's API, decoded by `frameloom.scale.flover`.

    POST /v1/completions, /v1/chat/completions      "stream": true answers in server-sent events, token by token
    GET /v1/models, /v1/models/{id}                 what is served
    GET /health, /metrics                           the last in the text format of Prometheus

A client that leaves frees its slots at the next iteration. More requests than may wait get status 429 and a
Retry-After, and whatever is refused is refused in the JSON of OpenAI's errors. On SIGTERM no more connections are
taken, and answers under way are finished first.
"""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.language.tokens import TokenModel, open_folder, with_tokenizer
from frameloom.scale.engine import Answer, Broken, Engine, Wish
from frameloom.scale.flover import FusedDecoder, QueueFull
from frameloom.scale.flover import Request as Decoding
from frameloom.scale.messages import ChatAsk, CompletionAsk, Part, Shape, Writing
from frameloom.training.pretrained import load

LARGEST_BODY = 1 << 20
GRACE = 30  # seconds that answers under way have after SIGTERM
LOCAL = ("127.0.0.1", "localhost", "::1")


def open_served(weights: str | Path | None, device: str = "cpu", dtype: torch.dtype | None = None) -> TokenModel:
    """The model of a folder, or the one that ships.

    A folder in a format of frameloom's own says whose in its `config.json` under `method`; every such format has its
    line here. All others are opened by transformers.

    Raises:
        InputError: no such folder or device, or not of a language model.
    """
    check_device(device)
    if weights is None:
        return load("world-words", device=device).served()
    folder = Path(weights)
    if not folder.is_dir():
        raise InputError(f"--weights {weights}: no such folder; serve takes a folder with a causal language model")
    try:
        method = json.loads((folder / "config.json").read_text()).get("method")
    except (OSError, ValueError, AttributeError):
        method = None
    openers: dict[str | None, Callable[[], TokenModel]] = {
        None: lambda: open_folder(folder, device, dtype),
        "world-words": lambda: load("world-words", folder, device=device).served(),
        "qmoe": lambda: _compressed(folder, dtype),
    }
    if method not in openers:
        raise InputError(f"--weights {weights}: holds weights of {method}; serve takes a causal language model")
    return openers[method]()


def _compressed(folder: Path, dtype: torch.dtype | None) -> TokenModel:
    """A model whose experts stay in the code of `frameloom quantize`."""
    from frameloom.scale.qmoe import load as load_compressed

    model = load_compressed(folder, dtype=dtype or torch.float32)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder:
        raise InputError(f"--weights {folder}: {type(model).__name__} is compressed, but no causal language model, "
                         "which is what serve takes")  # fmt: skip
    return with_tokenizer(folder, model)


def serve(
    weights: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 32,
    max_len: int | None = None,
    queue: int = 256,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Under torchrun the model is split over all ranks, and rank 0 serves.

    Args:
        weights: a folder with a causal language model of transformers; the small model of captions when None.
        port: 0 takes a free one.
        slots: requests decoded together.
        max_len: tokens of a request, prompt and answer; 512 when None, or what the model knows if that is less.
        queue: requests that may wait.
        ready: called with the address once connections are taken.

    Raises:
        InputError: the port is in use, or the model cannot be opened or decoded so.
    """
    import uvicorn

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and device != "cpu":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    listener = _listen(host, port) if int(os.environ.get("RANK", "0")) == 0 else None
    model = open_served(weights, device, dtype)
    ranks = _split(model, world, device) if world > 1 else None
    known = getattr(model.model.config, "max_position_embeddings", 512)
    decoder = FusedDecoder(model.model, slots, max_len or min(512, known), queue=queue, eos=model.eos, ranks=ranks)
    main = threading.current_thread() is threading.main_thread()
    if listener is None:
        if main:  # torchrun tells all ranks to stop; these do when rank 0 has finished its answers
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return decoder.follow()
    settings = uvicorn.Config(application(model, Engine(decoder), host), log_level="warning", access_log=False,
                              timeout_graceful_shutdown=GRACE, lifespan="on")  # fmt: skip
    server = uvicorn.Server(settings)
    # Connections wait in the listener's backlog from here on, so that nobody is turned away.
    address = f"[{host}]" if ":" in host else host
    ready(f"http://{address}:{listener.getsockname()[1]}")
    if main:
        # uvicorn raises the signal again once it has shut down in order; then it means nothing any more.
        signal.signal(signal.SIGTERM, lambda *_: None)
    return server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(kind, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, socket.gaierror):
            raise InputError(
                f"--host {host}: no address of this machine; 127.0.0.1 serves this machine alone"
            ) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--port {port}: cannot be taken on {host} ({reason.lower()}); try another, such as "
                         f"--port {port % 60000 + 1}, or --port 0 for a free one") from None  # fmt: skip
    return listener


def _split(model: TokenModel, world: int, device: str) -> "torch.distributed.ProcessGroup":
    from torch.distributed.device_mesh import init_device_mesh

    from frameloom.scale.split import split

    mesh = init_device_mesh("cpu" if device == "cpu" else "cuda", (world,), mesh_dim_names=("tp",))
    split(model.model, mesh)
    return mesh.get_group()


class _Events(StreamingResponse):
    """Server-sent events; however they end, the answer is left."""

    def __init__(self, events: AsyncIterator[str], answer: Answer, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"} | headers)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.leave()


class _OwnNames:
    """Turns away requests to a name that is not this machine's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = named[1:].split("]")[0] if named.startswith("[") else named.split(":")[0]
            if name not in LOCAL:
                problem = _problem(400, f"the host {name[:80]!r} is not served here; {', '.join(LOCAL)} are, unless "
                                        "--host says otherwise")  # fmt: skip
                return await problem(scope, receive, send)
        return await self.app(scope, receive, send)


def _problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise InputError(f"the request is larger than {LARGEST_BODY:,} bytes, which is the most that is read")
    return bytes(body)


def application(model: TokenModel, engine: Engine, host: str = "127.0.0.1") -> FastAPI:
    """The ASGI application; it opens and closes the engine with itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.open()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="frameloom serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOCAL:  # else a web page could reach a server on this machine under a name of its own
        app.add_middleware(_OwnNames)
    one = {"id": model.name, "object": "model", "created": int(time.time()), "owned_by": "frameloom",
           "max_model_len": engine.decoder.max_len}  # fmt: skip
    reading = ["GET", "HEAD"]

    @app.exception_handler(HTTPException)
    async def nothing_there(request: Request, error: HTTPException) -> Response:
        return _problem(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}",
                        dict(error.headers or {}))  # fmt: skip

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return _problem(500, f"the server failed ({type(error).__name__}); its log says more")

    @app.api_route("/v1/models", methods=reading)
    async def models() -> dict:
        return {"object": "list", "data": [one]}

    @app.api_route("/v1/models/{name:path}", methods=reading)
    async def named(name: str) -> Response:
        return JSONResponse(one) if name == model.name else _unknown(name, model)

    @app.api_route("/health", methods=reading)
    async def health() -> Response:
        return _problem(503, engine.broken) if engine.broken else JSONResponse({"status": "ok"})

    @app.api_route("/metrics", methods=reading)
    async def metrics() -> Response:
        return PlainTextResponse(engine.metrics(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, model, engine, CompletionAsk)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, model, engine, ChatAsk)

    return app


def _unknown(name: str, model: TokenModel) -> JSONResponse:
    return _problem(404, f"the model {name!r} is not served here; {model.name!r} is")


async def _answer(request: Request, model: TokenModel, engine: Engine, kind: type[CompletionAsk | ChatAsk]) -> Response:
    try:
        ask = kind.model_validate_json(await _body(request))
        if ask.model not in (None, model.name):
            return _unknown(ask.model, model)
        if ask.texts > engine.decoder.queue:  # before anything is made of so many
            raise InputError(f"{ask.texts} texts are asked for at once; {engine.decoder.queue} may wait (--queue)")
        prompts = _prompts(model, ask)
        wishes = [
            Wish(prompt, max(1, engine.decoder.max_len - len(prompt)) if ask.limit is None else ask.limit,
                 ask.sampling(number), ask.likeliest) for prompt in prompts for number in range(ask.n)
        ]  # fmt: skip
        answer = engine.submit(wishes, request.headers.get("x-request-id"))
    except ValidationError as error:
        return _problem(400, _first(error))
    except QueueFull as error:
        return _problem(429, str(error), {"Retry-After": str(engine.retry_after)})
    except InputError as error:
        return _problem(400, str(error))
    except Broken as error:
        return _problem(503, str(error))
    told = ask.likeliest is not None
    shape = Shape(answer.requests[0].id, model.name, model.text, isinstance(ask, ChatAsk), told,
                  sum(len(prompt) for prompt in prompts))  # fmt: skip
    writings = [Writing(model.text, wish.prompt, ask.stops, told) for wish in wishes]
    note = ask.note if isinstance(ask, ChatAsk) else ""
    headers = {"X-Frameloom-Note": note} if note else {}
    if ask.stream:
        return _Events(_events(answer, writings, shape, ask.stream_options.include_usage), answer, headers)
    return await _whole(request, answer, writings, shape, headers)


def _first(error: ValidationError) -> str:
    """The first of what is wrong with a request, in one line."""
    first = error.errors(include_url=False)[0]
    own = first.get("ctx", {}).get("error")
    where = ".".join(str(part) for part in first["loc"])
    if isinstance(own, InputError):
        return f"{where}: {own}" if where else str(own)
    return f"{where or 'the request'}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _prompts(model: TokenModel, ask: CompletionAsk | ChatAsk) -> list[list[int]]:
    if isinstance(ask, ChatAsk):
        made = model.text.chat([message.model_dump() for message in ask.messages]) if model.text else None
        if made is None:
            raise InputError(f"{model.name} has no chat template; use /v1/completions")
        return [made]
    if model.text is None and any(isinstance(prompt, str) for prompt in ask.prompt):
        raise InputError(f"{model.name} has no tokenizer; give the prompt as a list of token numbers")
    return [model.text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in ask.prompt]


def _failure(request: Decoding) -> str:
    """Why there is no whole text, or nothing."""
    return request.error if request.finish == "failed" else "the server stops" if request.finish == "cancelled" else ""


async def _written(answer: Answer, writings: list[Writing]) -> AsyncIterator[Part | Decoding]:
    """What comes of the texts, each up to its end or its stop; or the first one that fails, and then no more."""
    async for which, tokens, last in answer.parts():
        request, writing = answer.requests[which], writings[which]
        if last and _failure(request):
            yield request
            return
        begin = len(writing.tokens)
        text = writing.add(tokens, last)
        if writing.stopped:
            answer.leave(which)
        yield Part(
            which, request, writing, text, begin, "stop" if writing.stopped else request.finish if last else None
        )


async def _events(answer: Answer, writings: list[Writing], shape: Shape, usage: bool) -> AsyncIterator[str]:
    begun: set[int] = set()
    async for part in _written(answer, writings):
        if isinstance(part, Decoding):
            problem = {"message": _failure(part), "type": "server_error", "param": None, "code": 500}
            yield f"data: {json.dumps({'error': problem})}\n\n"
            return
        event = shape.event(part, part.index not in begun) | ({"usage": None} if usage else {})
        begun.add(part.index)
        yield f"data: {json.dumps(event)}\n\n"
    if usage:
        yield f"data: {json.dumps(shape.totals(sum(len(writing.tokens) for writing in writings)))}\n\n"
    yield "data: [DONE]\n\n"


async def _whole(
    request: Request, answer: Answer, writings: list[Writing], shape: Shape, headers: dict[str, str]
) -> Response:
    texts, ends = [""] * len(writings), [""] * len(writings)

    async def collect() -> Decoding | None:
        async for part in _written(answer, writings):
            if isinstance(part, Decoding):
                return part
            texts[part.index] += part.text
            ends[part.index] = part.finish or ""
        return None

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=499)  # nobody reads it
        failed = reading.result()
    finally:
        answer.leave()
        for task in (reading, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    if failed:
        return _problem(503 if failed.finish == "cancelled" else 500, _failure(failed))
    parts = [Part(which, answer.requests[which], writing, texts[which], 0, ends[which])
             for which, writing in enumerate(writings)]  # fmt: skip
    return JSONResponse(shape.whole(parts), headers=headers)
