"""The distillation task: its recipes' protocol, its public function, and the folder that a run goes on from.

A *recipe* says in which stages a student is made of a teacher; a `Job` gives it the stages: frozen pairs, a training
run on them, each in a folder of its own below the run's, each resumable to the same result. No data is needed: the
teacher makes it.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from frameloom.cards import card, cards, chosen
from frameloom.device import check_device
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.distill import Pairs, check_ode, make_pairs, ode
from frameloom.diffusion.generator import open_generator
from frameloom.diffusion.guide import Unguided
from frameloom.diffusion.step import step
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.training.loop import claim_folder, fit
from frameloom.training.pretrained import digest, save_pretrained
from frameloom.training.recipe import Recipe

log = logging.getLogger("frameloom")

# What a recipe is called on the command line, where that is not the id of its card.
NAMES = {"reflow": "instaflow"}

# What a small student is trained with, where nothing else is said.
SMALL = Recipe(steps=4000, batch_size=64, lr=1e-3, final_lr=1e-5, warmup=100, hold=0.3, ema=0.998)

# Of a student and the noise, data and condition of a batch to a number.
Loss = Callable[[Any, Tensor, Tensor, Cond], Tensor]


@dataclass(frozen=True)
class Job:
    """One run: the teacher, what it is asked, how much of everything, and where it is kept.

    Attributes:
        teacher: a generator that is a module and has `student(steps, exact)`.
        cond: a row for every prompt. guidance: of the teacher, to be baked in. solver, grid_steps: how it is sampled.
        training: how a stage is trained; the recipe divides `training.steps` among its stages.
    """

    teacher: Any
    cond: Cond
    folder: Path
    guidance: float
    solver: str
    grid_steps: int
    count: int
    training: Recipe
    seed: int = 0
    device: str = "cpu"
    save_every: float = 60.0
    progress: Progress = silent

    def pairs(self, name: str, model: Any, guided: bool) -> Pairs:
        """The frozen pairs of a model, drawn into the folder `name`: a teacher's guided, a student's as it is."""
        guidance = self.guidance if guided else 1.0
        draw = ode(model.denoiser, model.grid(self.grid_steps), step(self.solver),
                   model.guided(guidance) if guidance > 1 else Unguided())  # fmt: skip
        note = {"teacher": digest(model), "solver": self.solver, "steps": self.grid_steps, "guidance": guidance,
                "conditions": _sum(self.cond)}  # fmt: skip
        seed = 2 * self.seed + (not guided)  # a student's own pairs are of other noises than its teacher's
        return make_pairs(self.folder / name, draw, self.cond, self.count, model.denoiser.latent.shape(1)[1:], note,
                          seed=seed, device=self.device, label=f"{name} of {model.name}",
                          progress=self.progress)  # fmt: skip

    def learn(
        self, name: str, student: nn.Module, pairs: Pairs, loss: Loss, steps: int, cond: Cond | None = None
    ) -> Any:
        """Train a student on pairs, in the folder `name`; what comes back is a model in evaluation mode.

        `cond` holds a row for every condition, where it is not what the teacher is told.
        """
        cond = cond or self.cond
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        training = replace(self.training, steps=steps, warmup=min(self.training.warmup, max(1, steps // 10)))

        def of_batch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return loss(model, batch["noise"], batch["data"], cond.rows(batch["which"])).mean()

        kept, _ = fit(copy.deepcopy(student), pairs, training, folder, loss=of_batch, label=name, seed=self.seed,
                      device=self.device, save_every=self.save_every, progress=self.progress)  # fmt: skip
        return kept.eval()


@runtime_checkable
class Distiller(Protocol):
    """A recipe: the stages of a job, in their order. `defaults` are the pairs and training of a small model."""

    pairs: int
    training: Recipe

    def run(self, job: Job) -> Any: ...


def distill(
    recipe: str,
    teacher: str | Any,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    pairs: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str = "euler",
    sampling: int = 50,
    batch: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    save_every: float = 60.0,
    progress: Progress = silent,
    **options: Any,
) -> Path:
    """Make a student of few steps into the folder `out`; call it again after a stop to go on to the same weights.

    Args:
        recipe: `"reflow"` (InstaFlow: one step), `"rfpp"` (2-rectified flow++: one to five) or `"auto"`.
        teacher: a shipped model's name, a folder, a hub id; or an open model.
        prompts: what the teacher is asked to draw; may be left out for a model of a few classes.
        pairs: how many pairs are drawn. steps: updates of the student in all.
        guidance: of the teacher, the model's own when None; it ends up in the student's weights.
        solver, sampling: the teacher's ODE solver and its steps.
        options: settings of the recipe (see its class).

    Raises:
        InputError: whatever in this cannot be done, before anything is computed.
    """
    check_device(device)
    maker = _recipe(recipe, options)
    name = teacher if isinstance(teacher, str) else getattr(teacher, "name", "the teacher")
    model = open_generator(teacher, device) if isinstance(teacher, str) else teacher
    if not isinstance(model, nn.Module) or not hasattr(model, "student"):
        raise InputError(f"--teacher {name}: students are made of frameloom's own models "
                         "(a folder of frameloom train, or a shipped one), not of a diffusers pipeline")  # fmt: skip
    if model.needs_image:
        raise InputError(f"--teacher {name}: makes video from a picture; pairs are drawn from words or classes alone")
    check_ode(step(solver))
    for flag, value in (("--pairs", pairs), ("--steps", steps), ("--sampling", sampling)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: must be 1 or more")
    asked = _prompts(model, name, prompts)
    model = model.eval()
    cond = model.text(asked)
    training = maker.training
    if steps is not None:
        training = replace(training, steps=steps)
    if batch is not None:
        training = replace(training, batch_size=batch)
    guidance = float(model.defaults.guidance if guidance is None else guidance)
    count = maker.pairs if pairs is None else pairs
    parameters = sum(value.numel() for value in model.parameters())
    if count < parameters / 1000:
        log.warning("%d pairs for %s parameters: the student may learn them by heart", count, f"{parameters:,}")
    run = {"recipe": recipe, "settings": _facts(maker), "teacher": digest(model), "pairs": count, "guidance": guidance,
           "solver": solver, "sampling": sampling, "training": _facts(training), "seed": seed,
           "prompts": list(asked)}  # fmt: skip
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _same_teacher(out, run)
    claim_folder(out, json.loads(json.dumps(run)))
    if (out / "model.safetensors").is_file():
        progress("distilled", 1, 1)
        return out
    job = Job(model, cond, out, guidance, solver, sampling, count, training, seed, device, save_every,
              progress)  # fmt: skip
    student = maker.run(job)
    (out / "README.md").write_text(_readme(recipe, name, run, student))
    return save_pretrained(student, model.id if hasattr(model, "id") else model.name, out)


def _same_teacher(out: Path, run: dict) -> None:
    note = out / "run.json"
    if note.is_file() and (found := json.loads(note.read_text())).get("teacher", run["teacher"]) != run["teacher"]:
        raise InputError(f"{out}: made with another teacher ({found['teacher']}, not {run['teacher']}); pairs of two "
                         "teachers do not mix, choose another -o")  # fmt: skip


def _recipe(name: str, options: dict[str, Any]) -> Distiller:
    """A recipe by its name or the id of its card, with its settings."""
    method = chosen(NAMES.get(name, name), "distill")
    known = [found.id for found in cards().values() if found.verb == "distill"]
    if method not in known:
        raise InputError(f"--recipe {name}: there are {', '.join([*NAMES, *known, 'auto'])}")
    kind = card(method).load_class()
    try:
        return kind(**options)
    except TypeError:
        settings = [key for key in kind.__dataclass_fields__ if key not in ("pairs", "training")]
        extra = [key for key in options if key not in settings]
        raise InputError(f"{name} has no setting {', '.join(extra)}; it has {', '.join(settings)}") from None


def _prompts(model: Any, name: str, prompts: Sequence[str] | None) -> list[str]:
    if prompts is None:
        if found := list(getattr(model, "classes", [])):
            return found
        raise InputError(f"--teacher {name}: makes video of sentences; give it some with --prompts FILE, one a line")
    found = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not found:
        raise InputError("--prompts: holds no sentence; one a line is wanted")
    return found


def _facts(thing: Any) -> dict:
    return {key: value if isinstance(value, int | float | str | bool) else repr(value)
            for key, value in vars(thing).items()}  # fmt: skip


def _sum(cond: Cond) -> str:
    """A short name of some conditions, equal when they are."""
    holder = nn.Module()
    for name, value in cond.values.items():
        holder.register_buffer(name, value)
    return digest(holder)


def _readme(recipe: str, teacher: str, run: dict, student: nn.Module) -> str:
    count = sum(value.numel() for value in student.parameters())
    return (
        f"# A student of {teacher} ({recipe})\n\n{count:,} parameters, made of {run['pairs']:,} pairs of the teacher "
        f"(guidance {run['guidance']:g}, {run['sampling']} steps of {run['solver']}) in "
        f"{run['training']['steps']:,} updates. The guidance is in the weights: sample without.\n\n"
        f"Settings are in `run.json`; every stage has a folder with its `metrics.jsonl`.\n"
    )
