"""Layer streaming: the same output, in every bit, in a third of the memory; against peers that offload to disk."""

import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from frameloom.claims.base import Result
from frameloom.memory import PeakMemory, peak, weight_bytes
from frameloom.progress import Progress
from frameloom.scale.store import RamStore
from frameloom.scale.stream import pass_time, stream
from frameloom.scale.window import placeholder

# A text-to-video transformer of diffusers' LTX class with 24 blocks of 4.2 million parameters: 405 MB in float32.
CONFIG = {"in_channels": 64, "out_channels": 64, "num_attention_heads": 8, "attention_head_dim": 64,
          "cross_attention_dim": 512, "num_layers": 24, "caption_channels": 256}  # fmt: skip
BLOCKS, K, K_PRIME = 24, 6, 3
FRAMES, SIDE, WORDS = 2, 8, 16


def transformer(seed: int):
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(seed)
    return LTXVideoTransformer3DModel(**CONFIG).eval().requires_grad_(False)


def inputs(frames: int = FRAMES) -> dict[str, Any]:
    fixed = torch.Generator().manual_seed(1)
    tokens = frames * SIDE * SIDE
    return {"hidden_states": torch.randn(1, tokens, 64, generator=fixed),
            "encoder_hidden_states": torch.randn(1, WORDS, 256, generator=fixed),
            "timestep": torch.full((1, tokens), 500.0), "encoder_attention_mask": torch.ones(1, WORDS),
            "num_frames": frames, "height": SIDE, "width": SIDE, "return_dict": False}  # fmt: skip


# --- one way of running it, in a process of its own ------------------------------------------------------------------


def opened(way: str, folder: Path, scratch: Path, k: int, k_prime: int, pin: int) -> tuple[torch.nn.Module, list[Path]]:
    """The model, its weights where `way` has them, and the files that they are in."""
    from diffusers import LTXVideoTransformer3DModel as Kind

    if way == "stream":
        from accelerate import init_empty_weights

        # A copy of its own: the system keeps a file in its cache as long as another process has it mapped.
        own = Path(shutil.copytree(folder, scratch / "own"))
        with init_empty_weights(include_buffers=False):
            model = Kind.from_config(Kind.load_config(own)).eval().requires_grad_(False)
        stream(model, k, k_prime, pin=pin, store=own)
        return model, [*own.glob("*.safetensors")]
    model = Kind.from_pretrained(folder).eval().requires_grad_(False)
    if way == "accelerate":
        from accelerate import disk_offload

        disk_offload(model, str(scratch), execution_device=torch.device("cpu"))
    if way == "groups":
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
                               offload_type="block_level", num_blocks_per_group=k,
                               offload_to_disk_path=str(scratch))  # fmt: skip
    return model, [path for path in scratch.rglob("*") if path.is_file()]


def forget(files: list[Path]) -> None:
    """Have the system read these files from the disk again, as it has to for a model that is larger than the RAM."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def status(key: str) -> int:
    """Bytes of a row of /proc/self/status."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[key].split()[0]) * 1024


def read_bytes() -> int:
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


@torch.no_grad()
def worker(way: str, folder: str, k: int, k_prime: int, pin: int, frames: int) -> None:
    """Open the model one way, then make a pass at every line on standard input, which says how its files are cached.

    A line of JSON answers each: the memory that opening took, then what a pass took.
    """
    import accelerate  # noqa: F401
    from diffusers import LTXVideoTransformer3DModel  # noqa: F401

    torch.set_num_threads(1)
    given = inputs(frames)
    before = status("VmRSS")
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        model, files = opened(way, Path(folder), Path(scratch), k, k_prime, pin)
        model(**given)
        print(json.dumps({"peak": status("VmHWM") - before}), flush=True)
        for line in sys.stdin:
            if line.strip() == "cold":
                forget(files)
            read, begun = read_bytes(), time.perf_counter()
            out = model(**given)[0]
            seconds = time.perf_counter() - begun
            print(json.dumps({"seconds": seconds, "read": read_bytes() - read,
                              "digest": hashlib.sha256(out.numpy().tobytes()).hexdigest()}), flush=True)  # fmt: skip


class Way:
    """A way of running the model, in a process of its own that waits between passes."""

    def __init__(self, name: str, folder: Path, k: int = K, k_prime: int = K_PRIME, pin: int = 0,
                 frames: int = FRAMES) -> None:  # fmt: skip
        given = (name, str(folder), k, k_prime, pin, frames)
        code = f"from frameloom.claims.superpipeline import worker; worker(*{given!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)  # fmt: skip
        self.peak = 0
        self.passes: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}

    def open(self) -> None:
        """Wait until the model is there; many may be on their way at once."""
        self.peak = self._answer()["peak"]

    def run(self, cache: str) -> None:
        assert self.process.stdin
        print(cache, file=self.process.stdin, flush=True)
        self.passes[cache].append(self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a pass failed; the process left with status {self.process.wait()}")
        return json.loads(line)

    def seconds(self, cache: str) -> float:
        return statistics.median(one["seconds"] for one in self.passes[cache])

    @property
    def read(self) -> float:
        """Bytes that a cold pass read from the disk, on average."""
        return statistics.mean(one["read"] for one in self.passes["cold"])

    @property
    def digests(self) -> set[str]:
        return {one["digest"] for passes in self.passes.values() for one in passes}

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def checkpoint(seed: int) -> Iterator[Path]:
    """The large transformer's weights in a folder on a disk, for the length of a block."""
    disk = "/var/tmp" if Path("/var/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(dir=disk, prefix="frameloom") as folder:
        transformer(seed).save_pretrained(Path(folder) / "model", max_shard_size="10GB")
        yield Path(folder) / "model"


def measured(ways: dict[str, Way], rounds: int, progress: Progress) -> None:
    """One pass of each way in turn, and that `rounds` times: whatever else the machine does hits all of them."""
    for number, way in enumerate(ways.values()):
        way.open()
        progress("opening", number + 1, len(ways))
    for cache in ("cold", "warm"):
        for number in range(rounds):
            for way in ways.values():
                way.run(cache)
            progress(f"passes, {cache} files", number + 1, rounds)


# --- exact properties, on a small model of the same kind -------------------------------------------------------------


def small(depth: int = BLOCKS):
    from diffusers import LTXVideoTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": depth}
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(**CONFIG | sizes).eval()


@torch.no_grad()
def same_output() -> tuple[bool, bool]:
    """Whether the output is equal for many windows, and n (or n - pin) blocks were loaded a pass."""
    model, given = small(), inputs(1)
    want = model(**given)[0]
    equal = counted = True
    for k, k_prime, pin in ((1, 1, 0), (2, 1, 0), (6, 1, 0), (6, 3, 0), (6, 6, 0), (6, 1, 4), (12, 6, 0), (24, 1, 0)):
        with stream(model, k, k_prime, pin=pin, store="disk") as streamed:
            for _ in range(2):
                before = streamed.loads
                equal &= torch.equal(model(**given)[0], want)
                counted &= streamed.loads - before == (BLOCKS - pin if k < BLOCKS else 0)
    return equal & torch.equal(model(**given)[0], want), counted


def same_training(steps: int = 3) -> tuple[bool, bool]:
    """Whether weights and gradients stay equal over steps of AdamW, and 2 (n - k) blocks were loaded a step."""
    model, plain, given, n, k = small(12), small(12), inputs(1), 12, 4
    optimisers = [torch.optim.AdamW(one.parameters(), 1e-3) for one in (model, plain)]
    equal = counted = True
    with stream(model, k, 2, store="disk") as streamed:
        for _ in range(steps):
            before = streamed.loads
            for one, optimiser in zip((model, plain), optimisers, strict=True):
                optimiser.zero_grad()
                one(**given)[0].square().mean().backward()
            pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
            equal &= all(torch.equal(a.grad, b.grad) for a, b in pairs)
            for optimiser in optimisers:
                optimiser.step()
            equal &= all(torch.equal(a, b) for a, b in pairs)
            counted &= streamed.loads - before == 2 * (n - k)
    return equal & all(torch.equal(a, b) for a, b in pairs), counted


@torch.no_grad()
def peak_is_exact(folder: Path) -> bool:
    """Whether opening a model from its checkpoint makes k blocks, the rest, and no byte more, and a pass adds none."""
    from accelerate import init_empty_weights

    model, given = small(), inputs(1)
    model.save_pretrained(folder)
    activations = peak(lambda: model(**given))
    rest = weight_bytes(model) - BLOCKS * weight_bytes(model.transformer_blocks[0])
    kind = type(model)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(kind.load_config(folder)).eval()
    placeholder(torch.empty(1))  # the one number that all placeholders share
    with PeakMemory() as meter:
        stream(model, K, K_PRIME, store=folder)
    want = rest + K * weight_bytes(small(1).transformer_blocks[0])
    return meter.most == want and peak(lambda: model(**given)) == activations


# --- the time model ------------------------------------------------------------------------------------------------


class Sleeping(RamStore):
    """A store of which a load takes `seconds`, and no processor."""

    seconds = 0.0

    def fetch(self, block: int, into: Mapping[str, torch.Tensor]) -> None:
        time.sleep(self.seconds)
        super().fetch(block, into)


class Sleeper(torch.nn.Linear):
    """A block that takes `seconds`, and no processor."""

    def __init__(self, seconds: float) -> None:
        super().__init__(4, 4)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


@torch.no_grad()
def timed(k: int, k_prime: int, compute: float, load: float, n: int = 12, passes: int = 4) -> tuple[float, float]:
    """Seconds of a pass over sleeping blocks, the best of some, and what the time model says."""
    model = torch.nn.Sequential(*(Sleeper(compute) for _ in range(n)))
    store = Sleeping([dict(block.named_parameters(prefix=name)) for name, block in model.named_children()])
    store.seconds = load
    found = []
    with stream(model, k, k_prime, store=store):
        for _ in range(passes):
            begun = time.perf_counter()
            model(torch.zeros(1, 4))
            found.append(time.perf_counter() - begun)
    return min(found[1:]), pass_time(n, k, k_prime, compute, load)


WINDOWS = ((2, 1, 0.04, 0.02), (4, 2, 0.04, 0.04), (4, 4, 0.04, 0.02), (4, 2, 0.02, 0.04), (3, 2, 0.03, 0.03))


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """A 24-block transformer of 414 MB with a window of 6, against the whole model, accelerate and diffusers."""
    logging.getLogger("frameloom").setLevel(logging.ERROR)  # windows as large as the model are meant here
    equal, loads = same_output()
    trained, steps = same_training()
    predictions = []
    for number, window in enumerate(WINDOWS):
        predictions.append(timed(*window))
        progress("time model", number + 1, len(WINDOWS))
    error = max(abs(took / said - 1) for took, said in predictions)
    with checkpoint(seed) as folder:
        exact = peak_is_exact(folder.parent / "small")
        names = {"whole": "whole", "stream": f"streamed, k {K}, k' {K_PRIME}", "groups": f"diffusers, groups of {K}",
                 "accelerate": "accelerate, disk_offload"}  # fmt: skip
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        ways = {name: Way(name, folder) for name in names}
        try:
            measured(ways, 5, progress)
        finally:
            for way in ways.values():
                way.close()
    cold = {name: way.seconds("cold") for name, way in ways.items()}
    warm = {name: way.seconds("warm") for name, way in ways.items()}
    less = 1 - ways["stream"].peak / ways["whole"].peak
    rows = [{"name": label, "resident": f"{ways[name].peak / 1e6:.0f} MB", "cold": f"{1e3 * cold[name]:.0f} ms",
             "of streamed": f"{cold[name] / cold['stream']:.2f}", "read": f"{ways[name].read / 1e6:.0f} MB",
            "warm": f"{1e3 * warm[name]:.0f} ms"}
            for name, label in names.items()]  # fmt: skip
    rows += [{"name": f"time model, k {k}, k' {k_prime}", "compute, load": f"{1e3 * c:.0f}, {1e3 * x:.0f} ms",
              "pass": f"{1e3 * took:.0f} ms", "predicted": f"{1e3 * said:.0f} ms"}
             for (k, k_prime, c, x), (took, said) in zip(WINDOWS, predictions, strict=True)]  # fmt: skip
    faster = min(cold["groups"], cold["accelerate"]) / cold["stream"]
    return Result(
        "superpipeline",
        paper="up to 60% less GPU memory at the same output, in inference and training",
        setting=f"a transformer of 24 blocks, 414 MB, in RAM of a process of its own; files read from disk anew each "
        f"pass; median of 5 passes in turn, seed {seed}",
        rows=rows,
        checks={
            "output equal for every window": equal,
            "the large model's output equal in every way": len(set().union(*(w.digests for w in ways.values()))) == 1,
            "cold passes read the blocks from the disk": all(
                ways[name].read > 0.7 * weights for name in ("stream", "groups", "accelerate")),
            "n or n - pin loads a pass": loads,
            "peak is k blocks and the rest": exact,
            "gradients and weights equal in training": trained,
            "2 (n - k) loads a training step": steps,
            "time model within 5%": error < 0.05,
        },
        holds=less >= 0.6 and faster > 1,
        summary=f"{less:.0%} less resident memory (needs >= 60%), {faster:.2f} times as fast as the faster peer "
        "(needs > 1)",
        notes=["the end of a streamed pass reads the beginning of the next, which here falls between passes and out "
               f"of the time: {(weights - ways['stream'].read) / 1e6:.0f} MB, what always stays among them",
               f"the whole model takes {cold['whole'] / cold['stream']:.2f} of the streamed one's time",
               "the peers load the whole model before they offload it; their resident memory is the peak of that",
               "with files in the system's cache the faster peer takes "
               f"{min(warm['groups'], warm['accelerate']) / warm['stream']:.2f} of the streamed one's time"],
    )  # fmt: skip
