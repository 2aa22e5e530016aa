"""Training over many ranks: the loop of `frameloom.training`, with the model in stages, matrices in parts, or copies.

A run started on one mesh goes on upon any other, and ends in the folder that one device would have made. What it hangs
on is the seed and the number of micro-batches in a step, and not how many ranks shared them. A world of one runs the
same path.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from frameloom.cards import card
from frameloom.errors import InputError, Interrupted
from frameloom.progress import Progress, silent
from frameloom.scale import expert_states, megatron, moe
from frameloom.scale.adapt import Shape
from frameloom.scale.gpipe import Pipeline, defer
from frameloom.scale.mesh import Parallel, agree, join, lost, parse
from frameloom.scale.partition import Block, Pipelined, balance, cuts, profile
from frameloom.training.loop import Steps, changed, claim_folder, forget_after, optimisers_of, readme
from frameloom.training.pretrained import save_pretrained
from frameloom.training.recipe import Recipe


def costs(method: str, size: str, examples: int) -> list[Block]:
    """What every pipeline block of a method costs on `examples` examples; counted on the meta device.

    Raises InputError for a method whose training step is no row of blocks.
    """
    kind = card(method).load_class()
    if not issubclass(kind, Pipelined):
        raise InputError(f"{method}: its training step is not a row of blocks; stiv's is")
    with torch.device("meta"):
        model = kind(kind.preset(size)).train()
        carry, given = model.pipeline_batch(model.pipeline_example(examples))
        return profile(model.pipeline_blocks(), carry, given)


class Run:
    """One training run as one rank sees it: its part of the model, of the batch, and of the state.

    `model` comes whole and untrained, the same on every rank; what other stages hold is freed. `begins` are the first
    blocks of the stages.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, parallel: Parallel, mesh: "dist.DeviceMesh", begins: list[int],
                 device: torch.device, r: int | str = "auto") -> None:  # fmt: skip
        self.model, self.recipe, self.parallel, self.mesh, self.device = model, recipe, parallel, mesh, device
        defer(model)
        self.names = [name for name, _ in model.named_parameters()]
        self.whole = {name: value.shape for name, value in model.state_dict().items()}
        model.to(device)
        self.shared = set(megatron.split(model, model.tensor_plan() if parallel.tp > 1 else {}, mesh))
        blocks = model.pipeline_blocks()
        self.pipeline = Pipeline(blocks, begins, parallel, mesh, device)
        self._keep_mine(blocks, begins)
        self.experts = self._spread_experts(r)
        if parallel.shard:
            for stage in self.pipeline.stages:
                for block in stage.blocks:
                    for module in block.own:
                        fully_shard(module, mesh=mesh["dp"])
        self.optimisers = optimisers_of(model, recipe)
        self.average = {name: value.detach().clone() for name, value in self.mine.items()} if recipe.ema else {}

    def _keep_mine(self, blocks: list[nn.Module], begins: list[int]) -> None:
        """Find the parameters of this rank and free those of other stages.

        What no block holds (the frozen numbers of a codec) stays everywhere. A parameter that two ranks hold is tied:
        its gradient is added up over the pipeline.
        """
        p, count = self.parallel.pp, len(begins)
        ends = [*begins[1:], len(blocks)]
        holders: dict[int, set[int]] = {}
        for stage in range(count):
            for block in blocks[begins[stage] : ends[stage]]:
                for value in block.parameters():
                    holders.setdefault(id(value), set()).add(stage % p)
        rank = self.pipeline.rank
        self.tied: set[str] = set()
        self.owner: dict[str, int] = {}
        for name, value in self.model.named_parameters():
            where = holders.get(id(value), set(range(p)))
            self.owner[name] = min(where)
            if rank not in where:
                value.requires_grad_(False)
                value.data = value.data.new_empty(0)
            elif len(where) > 1:
                self.tied.add(name)

    def _spread_experts(self, r: int | str) -> set[str]:
        """Copies of a model with mixtures of experts share the experts: the names of what differs from rank to rank."""
        layers = list(moe.layers(self.model))
        if not layers or self.parallel.dp == 1:
            return set()
        expert_states.distribute(self.model, self.mesh["dp"])
        for layer in layers:
            layer.r = r if r == "auto" else layer.shape.check(int(r))
        own = {id(value) for value in moe.expert_parameters(self.model)}
        return {name for name, value in self.model.named_parameters() if id(value) in own}

    @property
    def mine(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def step(self, batch: dict[str, Tensor], step: int, seed: int) -> tuple[float, float]:
        """One update from a whole batch, of which every copy takes its share; the loss and the gradients' norm."""
        torch.manual_seed(seed * 1_000_003 + step)
        carry, given = self.model.pipeline_batch(batch)
        copies, which = self.parallel.dp, self.mesh["dp"].get_local_rank()
        carry = tuple(part.tensor_split(copies)[which] for part in carry)
        given = {name: part.tensor_split(copies)[which] for name, part in given.items()}
        half = self.recipe.bf16
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            loss = self.pipeline.step(carry, given, step)
        dist.all_reduce(loss, group=self.mesh.get_group("dp"))
        loss /= copies
        mine = self.mine
        megatron.add_up([mine[name] for name in mine if name in self.shared], self.mesh.get_group("tp"))
        megatron.add_up([mine[name] for name in self.names if name in self.tied], self.mesh.get_group("pp"))
        copied = [value for name, value in mine.items() if name not in self.experts and not _sharded(value)]
        megatron.average(copied, self.mesh.get_group("dp"))
        for name in self.experts:  # which have gathered the gradients of all copies' tokens already
            if mine[name].grad is not None:
                mine[name].grad /= copies
        rank = self.pipeline.rank
        own = {name: value for name, value in mine.items() if self.owner[name] == rank}
        norm = megatron.clip(mine, own, self.names, self.recipe.clip_norm, self.mesh.get_group("pp"), self.experts,
                             self.mesh.get_group("dp"))  # fmt: skip
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.lr_at(step) * group["share"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if self.average:
            weight = min(self.recipe.ema, (1 + step) / (10 + step))
            for name, value in self.mine.items():
                with torch.no_grad():
                    self.average[name].lerp_(value.detach(), 1 - weight)
        return float(loss), float(norm)

    # --- state -------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """Everything that the run hangs on, by names of the whole model: any mesh can read what another wrote.

        Parts of experts go by the number of their copy: they are read by as many copies again.
        """
        part = f"#{self.mesh['dp'].get_local_rank()}"
        called = {name: name + part * (name in self.experts) for name in self.mine}
        found: dict[str, Any] = {f"model/{called[name]}": value.detach() for name, value in self.mine.items()}
        found |= {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        found |= {f"average/{called[name]}": value for name, value in self.average.items()}
        names = {id(value): called[name] for name, value in self.mine.items()}
        for number, optimiser in enumerate(self.optimisers):
            for value, slots in optimiser.state.items():
                found |= {f"optimiser/{number}/{names[id(value)]}/{slot}": entry for slot, entry in slots.items()}
        return found

    def save(self, out: Path, step: int) -> None:
        """Write the state of all ranks; the one before is replaced when the new one is whole."""
        draft = out / "state.part"
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        dist.barrier()
        dcp.save(self._state() | {"step": torch.tensor(step)}, checkpoint_id=str(draft))
        if dist.get_rank() == 0:
            shutil.rmtree(out / "state.old", ignore_errors=True)
            if (out / "state").exists():
                os.replace(out / "state", out / "state.old")
            os.replace(draft, out / "state")
            shutil.rmtree(out / "state.old", ignore_errors=True)
        dist.barrier()

    def restore(self, out: Path) -> int:
        """Load the last state, whatever mesh wrote it; the number of steps done."""
        folder = out / "state"
        if not folder.is_dir() and (out / "state.old").is_dir():
            folder = out / "state.old"
        if not folder.is_dir():
            return 0
        for optimiser in self.optimisers:  # its slots must be there before they can be filled
            for group in optimiser.param_groups:
                for value in group["params"]:
                    value.grad = torch.zeros_like(value)
                group["lr"] = 0.0
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        state = self._state() | {"step": torch.tensor(0)}
        try:
            kept = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
            # A parameter that no step has used yet has no slots of its optimiser, there or here.
            absent = {name for name in state if name.startswith("optimiser/") and name not in kept}
            state = {name: value for name, value in state.items() if name not in absent}
            dcp.load(state, checkpoint_id=str(folder))
        except Exception as error:  # noqa: BLE001 - whatever a damaged or foreign state raises
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{folder}: is no state of this run ({reason}); remove it to begin anew") from None
        names = {id(value): name for name, value in self.mine.items()}
        for number, optimiser in enumerate(self.optimisers):
            for value in list(optimiser.state):
                start = f"optimiser/{number}/{names[id(value)]}"
                if any(name.startswith((f"{start}/", f"{start}#")) for name in absent):
                    del optimiser.state[value]
        return int(state["step"])

    def collect(self) -> nn.Module | None:
        """The whole trained model on rank 0 (the averaged one, if the recipe averages); None elsewhere."""
        if self.experts:
            return self._collect_experts()
        kept = self.average or {name: value.detach() for name, value in self.mine.items()}
        stage, copy = self.mesh["pp"].get_local_rank(), self.mesh["dp"].get_local_rank()
        talks = copy == 0 and self.mesh["tp"].get_local_rank() == 0
        group = self.mesh.get_group("pp")
        tensors = {}
        for name in self.names:
            value = kept.get(name) if self.owner[name] == stage else None
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if not talks:
                continue
            if value is None or self.owner[name] != stage:
                value = torch.empty(self.whole[name], dtype=self._kind(name), device=self.device)
            value = value.contiguous()
            if self.owner[name] == 0:
                pass
            elif stage == 0:
                dist.recv(value, group_src=self.owner[name], group=group)
            elif stage == self.owner[name]:
                dist.send(value, group_dst=0, group=group)
            tensors[name] = value.cpu()
        if dist.get_rank() != 0:
            return None
        model = type(self.model)(self.model.config)
        model.load_state_dict(tensors | {name: value.cpu() for name, value in self.model.named_buffers()})
        return model.eval()

    @torch.no_grad()
    def _collect_experts(self) -> nn.Module | None:
        for name, value in self.average.items():
            self.model.get_parameter(name).copy_(value)
        state = expert_states.whole(self.model)
        if dist.get_rank() != 0:
            return None
        model = type(self.model)(self.model.config)
        model.load_state_dict({name: value.cpu() for name, value in state.items()})
        return model.eval()

    def _kind(self, name: str) -> torch.dtype:
        return self.model.get_parameter(name).dtype


def _sharded(value: nn.Parameter) -> bool:
    return isinstance(value, DTensor) and "dp" in (value.device_mesh.mesh_dim_names or ())


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
