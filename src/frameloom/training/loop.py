"""The training loop: any method that has a loss and batches; stopped at any step, it goes on to the same end.

Batch k depends on nothing but the seed and k, and every step seeds its own randomness, so the state of a run is
its weights, its optimiser and its step number: one safetensors file, replaced in one step.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from frameloom.cards import card
from frameloom.device import check_device
from frameloom.errors import InputError, Interrupted
from frameloom.progress import Progress, silent
from frameloom.training.pretrained import digest, load, save_pretrained
from frameloom.training.recipe import Recipe
from frameloom.training.state import load_state, read_facts, save_state


@runtime_checkable
class Batches(Protocol):
    """Endless training data: `batch` gives the examples of those numbers; `progress` in [0, 1] serves curricula."""

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]: ...


@runtime_checkable
class Trainable(Protocol):
    """What a method's class offers to be trained.

    It may also have `prepare(batches)`, which takes statistics from the data before the first step.
    """

    config: Any

    @classmethod
    def preset(cls, size: str) -> Any: ...

    @classmethod
    def recipe(cls, size: str) -> Recipe: ...

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Batches: ...

    def loss(self, batch: dict[str, Tensor]) -> Tensor: ...


class Steps(Dataset):
    """The batch of every step, as a map-style data set, so that a worker process can render ahead."""

    def __init__(self, data: Batches, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        size = self.recipe.batch_size
        return self.data.batch(list(range(step * size, (step + 1) * size)), step / self.recipe.steps)


def train(
    method: str,
    out: str | Path,
    *,
    size: str = "tiny",
    data: str = "world",
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    config: Mapping[str, Any] | None = None,
    begin: str | Path | None = None,
    workers: int = 1,
    save_every: float = 60.0,
    progress: Progress = silent,
) -> Path:
    """Train a method into the folder `out`; call it again after a stop to go on.

    Writes `config.json`, `model.safetensors`, `metrics.jsonl`, TensorBoard events, `README.md`, and while it is
    under way `state.safetensors`.

    Args:
        data: `"world"`; for `sem` also a folder of clips; or `KIND:DIR` for a data set that the method knows.
        steps: another length than the recipe's.
        config: fields of the method's configuration that shall differ from the preset's, such as `{"experts": 8}`.
        begin: weights of another run to begin with, at half the recipe's rates; parameters that they lack begin fresh.
            So a model is grown in stages, or goes on after its schedule has ended.
        workers: processes that prepare batches ahead; 0 prepares them in this one.
        save_every: seconds between saves of the state.

    Raises:
        InputError: the method cannot be trained or has no such `config`, or `out` holds a run of other settings, or
            the loss is no number any more (the step is named).
        Interrupted: Ctrl-C; the state is saved.
    """
    check_device(device)
    kind = card(method).load_class()
    if not hasattr(kind, "recipe"):
        raise InputError(f"{method} has nothing to train")
    settings = changed(method, kind.preset(size), config)
    recipe = kind.recipe(size)
    if steps is not None:
        recipe = replace(recipe, steps=steps, warmup=min(recipe.warmup, max(1, steps // 10)))
    start = None
    if begin is not None:
        start = load(method, begin)
        recipe = replace(recipe, lr=recipe.lr / 2, muon=recipe.muon / 2)
    run = {"method": method, "size": size, "data": data, "seed": seed, "recipe": asdict(recipe)}
    if config:
        run["config"] = dict(config)
    if start is not None:
        run["begin"] = digest(start)
    dataset = kind.dataset(data, size, seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    claim_folder(out, run)

    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A rendering worker and a training thread on one core slow each other down tenfold: leave each its own.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - workers))
    torch.manual_seed(seed)
    model: nn.Module = kind(settings)
    if hasattr(model, "prepare") and not (out / "state.safetensors").is_file():
        model.prepare(dataset)
    if start is not None:
        adopt(model, start)
    begun = time.monotonic()
    kept, done = fit(model, dataset, recipe, out, seed=seed, device=device, workers=workers, save_every=save_every,
                     progress=progress)  # fmt: skip
    if done or not (out / "model.safetensors").is_file():
        save_pretrained(kept, method, out)
        (out / "README.md").write_text(readme(run, time.monotonic() - begun, kept))
    return out


def changed(method: str, settings: Any, config: Mapping[str, Any] | None) -> Any:
    """A preset with some fields changed. Raises InputError for one that it does not have."""
    if unknown := sorted(set(config or ()) - set(asdict(settings))):
        raise InputError(f"{method}: has no setting {', '.join(unknown)}; there are {', '.join(asdict(settings))}")
    return replace(settings, **(config or {}))


def adopt(model: nn.Module, start: nn.Module) -> None:
    """Take over every parameter and buffer that both have. Raises InputError where one has another shape."""
    given, own = start.state_dict(), model.state_dict()
    for name, value in given.items():
        if name in own and own[name].shape != value.shape:
            raise InputError(f"--begin: {name} is {list(value.shape)} there and {list(own[name].shape)} here")
    model.load_state_dict({name: value for name, value in given.items() if name in own}, strict=False)


def fit(
    model: nn.Module,
    dataset: Batches,
    recipe: Recipe,
    out: Path,
    *,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    label: str = "training",
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    save_every: float = 60.0,
    progress: Progress = silent,
) -> tuple[nn.Module, int]:
    """The loop itself, for a model that stands ready; `train` and every stage of a distillation run it.

    Keeps `metrics.jsonl`, TensorBoard events and `state.safetensors` in `out`, and goes on from what it finds there.

    Args:
        model: as it is before the first step; where a state is found, its weights are replaced.
        loss: of the model and a batch; the model's own `loss` when None.

    Returns:
        The model to keep (the averaged one, if the recipe averages) and the number of steps that this call made.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.tensorboard import SummaryWriter

    loss = loss or (lambda model, batch: model.loss(batch))
    half = "bf16" if recipe.bf16 else "no"
    AcceleratorState._reset_state()  # it is one for the process, and would insist on the precision of an earlier run
    accelerator = Accelerator(mixed_precision=half, cpu=device == "cpu")
    model.train()
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimisers = optimisers_of(model, recipe)
    average = copy.deepcopy(model).eval() if recipe.ema else None
    start = _restore(out, model, average, optimisers)
    if start >= recipe.steps:
        progress(label, recipe.steps, recipe.steps)
        return (average if average is not None else model.eval()), 0
    forget_after(out / "metrics.jsonl", start)
    model, *optimisers = accelerator.prepare(model, *optimisers)
    if average is not None:
        average.to(accelerator.device)
    batches = DataLoader(Steps(dataset, recipe), batch_size=None,
                         sampler=range(start, recipe.steps), num_workers=workers,
                         prefetch_factor=4 if workers else None, persistent_workers=workers > 0)  # fmt: skip

    def keep(model: nn.Module, step: int) -> None:
        parts = {"model": model, "average": average}
        save_state(out / "state.safetensors", parts, optimisers, {"step": str(step)})

    board = SummaryWriter(str(out / "events"), purge_step=start)
    saved = begun = time.monotonic()
    step = start
    try:
        with (out / "metrics.jsonl").open("a") as metrics:
            for step, batch in enumerate(batches, start):
                torch.manual_seed(seed * 1_000_003 + step)
                rate = recipe.lr_at(step)
                for optimiser in optimisers:
                    for group in optimiser.param_groups:
                        group["lr"] = rate * group["share"]
                batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                with accelerator.autocast():
                    error = loss(accelerator.unwrap_model(model), batch)
                if not torch.isfinite(error):
                    raise InputError(f"{out}: the loss is {error.item()} at step {step}; try a lower learning rate")
                accelerator.backward(error)
                norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                if average is not None:
                    blend(average, accelerator.unwrap_model(model), recipe.ema, step)
                if step % 50 == 0 or step + 1 == recipe.steps:
                    row = {"step": step, "loss": round(error.item(), 6), "lr": rate, "norm": round(float(norm), 4),
                           "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    board.add_scalar("loss", row["loss"], step)
                    board.add_scalar("lr", rate, step)
                if time.monotonic() - saved > save_every:
                    keep(accelerator.unwrap_model(model), step + 1)
                    saved = time.monotonic()
                progress(label, step + 1, recipe.steps)
    except KeyboardInterrupt:
        # The step that was under way may have changed some weights: the last whole state is the one on disk.
        raise Interrupted(f"{out}: stopped at step {step}; the same command goes on from the last save") from None
    finally:
        board.close()
    final = accelerator.unwrap_model(model)
    keep(final, recipe.steps)
    return (average if average is not None else final.eval()), recipe.steps - start


def claim_folder(out: Path, run: dict) -> None:
    """A folder is one run: the first call writes what it is, later calls must agree."""
    note = out / "run.json"
    text = json.dumps(run, indent=2) + "\n"
    if note.is_file():
        if note.read_text() != text:
            raise InputError(f"{out}: holds a run of other settings (see run.json); choose another -o")
    elif (out / "model.safetensors").exists():
        raise InputError(f"{out}: holds weights that another run made; choose another -o")
    else:
        note.write_text(text)


def optimisers_of(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything; with `recipe.muon`, Muon for the matrices of `model.blocks` in its place.

    `share` of a group is its rate over the recipe's. Muon: K. Jordan et al., kellerjordan.github.io/posts/muon, 2024.
    """
    matrices = []
    if recipe.muon:
        layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
        matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    taken = {id(matrix) for matrix in matrices}
    rest = [value for value in model.parameters() if value.requires_grad and id(value) not in taken]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([{"params": rest, "share": 1.0}], lr=recipe.lr, betas=recipe.betas,
                          weight_decay=recipe.weight_decay)
    ]  # fmt: skip
    if matrices:
        share = recipe.muon / recipe.lr
        made.append(torch.optim.Muon([{"params": matrices, "share": share}], lr=recipe.muon, weight_decay=0.0))
    return made


def _restore(out: Path, model: nn.Module, average: nn.Module | None, optimisers) -> int:
    """Load the last saved state, if there is one; the number of steps done."""
    path = out / "state.safetensors"
    facts = read_facts(path)
    if facts is None:
        return 0
    load_state(path, {"model": model, "average": average}, optimisers)
    return int(facts["step"])


def forget_after(log: Path, step: int) -> None:
    """Drop the rows of steps that will be run again."""
    if log.is_file():
        rows = [row for row in log.read_text().splitlines() if row and json.loads(row)["step"] < step]
        log.write_text("".join(row + "\n" for row in rows))


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential average; short while young, so that the first weights are soon forgotten."""
    weight = min(decay, (1 + step) / (10 + step))
    for kept, fresh in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(fresh.to(kept.dtype), 1 - weight)
        else:
            kept.copy_(fresh)


def readme(run: dict, seconds: float, model: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    changed = ", ".join(f"{name} = {value}" for name, value in run.get("config", {}).items())
    changed = f" with {changed}" if changed else ""
    return (
        f"# {run['method']} ({run['size']})\n\n{count:,} parameters, trained on `{run['data']}` for "
        f"{run['recipe']['steps']:,} steps of {run['recipe']['batch_size']} examples; the last stretch took "
        f"{seconds / 60:.1f} minutes on {torch.get_num_threads()} threads.\n\n"
        f"Made by `frameloom train {run['method']} --size {run['size']} --data {run['data']} "
        f"--seed {run['seed']}`{changed}; the settings are in `run.json`, the curve in `metrics.jsonl`.\n"
    )
