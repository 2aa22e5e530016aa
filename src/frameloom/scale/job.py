"""One rank's part of a training run: of the model, of a batch, of the state, and what it adds up with the others.

A model in stages is cut between its blocks (`frameloom.scale.gpipe`), its matrices are shared (`megatron`), copies
average their gradients or keep the blocks in shards, and mixtures of experts are shared by copies (`moe`).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from frameloom.errors import InputError
from frameloom.scale import expert_states, megatron, moe
from frameloom.scale.gpipe import Pipeline, defer
from frameloom.scale.mesh import Parallel
from frameloom.training.loop import optimisers_of
from frameloom.training.recipe import Recipe


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
        with _in_one_line(draft, "cannot be written", "the last whole state is kept; the same command goes on from it"):
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
        with _in_one_line(folder, "is no state of this run, or a damaged one", "remove it to begin anew"):
            kept = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
            # A parameter that no step has used yet has no slots of its optimiser, there or here.
            absent = {name for name in state if name.startswith("optimiser/") and name not in kept}
            state = {name: value for name, value in state.items() if name not in absent}
            dcp.load(state, checkpoint_id=str(folder))
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


@contextmanager
def _in_one_line(folder: Path, wrong: str, right: str) -> Iterator[None]:
    """InputError on every rank for whatever a state raises that is damaged, foreign, or cannot be written."""
    try:
        yield
    except CheckpointException as error:  # it is no Exception, and holds what each rank met
        cause = error.failures[min(error.failures)][0]
    except Exception as error:  # noqa: BLE001 - whatever the damage provokes
        cause = error
    else:
        return
    if not isinstance(cause, Exception):  # Ctrl-C, which came in the midst of it
        raise cause
    reason = " ".join(str(cause).split())[:160] or type(cause).__name__
    raise InputError(f"{folder}: {wrong} ({reason}); {right}") from None


def _sharded(value: nn.Parameter) -> bool:
    return isinstance(value, DTensor) and "dp" in (value.device_mesh.mesh_dim_names or ())
