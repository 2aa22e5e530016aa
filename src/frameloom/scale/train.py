"""Training over many ranks: the loop of `frameloom.training`, with the model in stages, matrices in parts, or copies.

A run started on one mesh goes on upon any other, and ends in the folder that one device would have made. What it hangs
on is the seed and the number of micro-batches in a step, and not how many ranks shared them. A world of one runs the
same path.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from frameloom.cards import card
from frameloom.device import check_device
from frameloom.errors import InputError, Interrupted
from frameloom.progress import Progress, silent
from frameloom.scale.adapt import Shape
from frameloom.scale.job import Run
from frameloom.scale.mesh import Parallel, agree, join, lost, parse
from frameloom.scale.partition import balance, costs, cuts
from frameloom.training.loop import Steps, changed, claim_folder, forget_after, readme
from frameloom.training.pretrained import save_pretrained
from frameloom.training.recipe import Recipe


def train(
    method: str,
    out: str | Path,
    *,
    parallel: Parallel | str,
    size: str = "tiny",
    data: str = "world",
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    recipe: Recipe | None = None,
    config: Mapping[str, Any] | None = None,
    r: int | str = "auto",
    save_every: float = 60.0,
    progress: Progress = silent,
) -> Path:
    """Train a method over the ranks that torchrun started, each of which calls this with the same arguments.

    Writes what `frameloom.training.train` writes, and while it is under way the folder `state`, which a run on any
    other mesh of the same number of micro-batches goes on from.

    Args:
        parallel: a `Parallel` or its words, such as `"pp=2,schedule=interleaved,v=2"`.
        recipe: in place of the method's own for this size.
        config: fields of the method's configuration that shall differ from the preset's, such as `{"experts": 8}`.
        r: how the tokens of copies meet the experts that they share (see `frameloom.scale.moe`).

    Raises:
        InputError: as `frameloom.training.train`; also for ranks, batches, heads or blocks that do not divide, ranks
            that were asked for different things, and a rank that is gone (it is named).
        Interrupted: Ctrl-C; the state of the last save is there.
    """
    check_device(device)
    parallel = parse(parallel) if isinstance(parallel, str) else parallel
    kind = card(method).load_class()
    if not hasattr(kind, "recipe"):
        raise InputError(f"{method} has nothing to train")
    recipe = recipe or kind.recipe(size)
    if steps is not None:
        recipe = replace(recipe, steps=steps, warmup=min(recipe.warmup, max(1, steps // 10)))
    parallel.check_batch(recipe.batch_size)
    settings = changed(method, kind.preset(size), config)
    if parallel.tp > 1:
        parallel.check_heads(settings.heads)
    begins = [0]
    if getattr(settings, "experts", 0):
        _check_experts(parallel, settings.experts)
    else:
        found = costs(method, size, recipe.batch_size // (parallel.dp * parallel.m))
        begins = cuts(balance(found, parallel.balance), parallel.pp * parallel.v)
    mesh = join(parallel, device)
    run = {"method": method, "size": size, "data": data, "seed": seed, "recipe": asdict(recipe),
           "microbatches": parallel.dp * parallel.m}  # fmt: skip
    if config:
        run |= {"config": dict(config), "copies": parallel.dp}
    agree({"command": json.dumps([run, asdict(parallel)])})
    out = Path(out)
    _together(lambda: (out.mkdir(parents=True, exist_ok=True), claim_folder(out, run)))
    torch.manual_seed(seed)
    model = kind(settings).train()
    dataset = kind.dataset(data, size, seed)
    if hasattr(model, "prepare"):
        model.prepare(dataset)
    begun = time.monotonic()
    at = _device(device)
    try:
        job = Run(model, recipe, parallel, mesh, begins, at, r)
        _loop(job, dataset, out, seed, save_every, progress if dist.get_rank() == 0 else silent)
        whole = job.collect()
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not _about_ranks(error):
            raise
        raise lost(error) from None
    if whole is not None:
        save_pretrained(whole, method, out)
        (out / "README.md").write_text(readme(run, time.monotonic() - begun, whole))
    dist.barrier()
    return out


def _loop(job: Run, dataset: Any, out: Path, seed: int, save_every: float, progress: Progress) -> None:
    recipe, chief = job.recipe, dist.get_rank() == 0
    start = job.restore(out)
    if chief:
        forget_after(out / "metrics.jsonl", start)
    saved = begun = time.monotonic()
    step = start
    try:
        for step, batch in enumerate(_batches(dataset, recipe, start, job.device), start):
            loss, norm = job.step(batch, step, seed)
            if loss != loss or abs(loss) == float("inf"):
                raise InputError(f"{out}: the loss is {loss} at step {step}; try a lower learning rate")
            if chief and (step % 50 == 0 or step + 1 == recipe.steps):
                row = {"step": step, "loss": round(loss, 6), "lr": recipe.lr_at(step), "norm": round(norm, 4),
                       "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip
                with (out / "metrics.jsonl").open("a") as metrics:
                    metrics.write(json.dumps(row) + "\n")
            late = torch.tensor(float(time.monotonic() - saved > save_every))
            dist.broadcast(late, 0)  # all save, or none
            if late:
                job.save(out, step + 1)
                saved = time.monotonic()
            progress("training", step + 1, recipe.steps)
    except KeyboardInterrupt:
        raise Interrupted(f"{out}: stopped at step {step}; the same command goes on from the last save") from None
    if start < recipe.steps:
        job.save(out, recipe.steps)


def _batches(dataset: Any, recipe: Recipe, start: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batch of every step, prepared by rank 0 (in a process of its own) and told to all."""
    chief = dist.get_rank() == 0
    loader = iter(())
    if chief and start < recipe.steps:
        loader = iter(DataLoader(Steps(dataset, recipe), batch_size=None, sampler=range(start, recipe.steps),
                                 num_workers=1, prefetch_factor=4))  # fmt: skip
    for _ in range(start, recipe.steps):
        batch = {name: value.to(device) for name, value in next(loader).items()} if chief else {}
        told = [{name: (tuple(value.shape), value.dtype) for name, value in batch.items()}]
        dist.broadcast_object_list(told, 0)
        for name, (shape, kind) in told[0].items():
            value = batch[name].contiguous() if chief else torch.empty(shape, dtype=kind, device=device)
            dist.broadcast(value.view(torch.uint8) if kind == torch.bool else value, 0)
            batch[name] = value
        yield batch


def _together(work: Callable[[], Any]) -> None:
    """Rank 0 does it; if it may not, every rank says why."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except InputError as error:
            told = [str(error)]
    dist.broadcast_object_list(told, 0)
    if told[0] is not None:
        raise InputError(told[0])


def _check_experts(parallel: Parallel, experts: int) -> None:
    """Experts are shared by copies of the model; stages and split matrices are for models without."""
    if parallel.pp > 1 or parallel.tp > 1 or parallel.shard:
        raise InputError("--parallel: a model with mixtures of experts takes dp alone, whose copies share the experts; "
                         f"dp={parallel.world} would do")  # fmt: skip
    Shape(parallel.dp, experts, 1, parallel.dp)


def _device(device: str) -> torch.device:
    if device == "cuda":  # one rank, one card
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return torch.device(device)


def _about_ranks(error: Exception) -> bool:
    text = str(error)
    return any(word in text for word in ("Connection", "gloo", "NCCL", "closed by peer", "Timed out", "timed out"))
