"""A small network that names what moves in a toys clip; its features are what `fd_probe` compares.

`python -m frameloom.world.probe OUT` trains it again on one core in about four minutes, from the pools of captioned
clips that the small generators learn from, and prints the accuracy of its heads on clips it has not seen.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from frameloom.atomic import save_tensors
from frameloom.errors import InputError
from frameloom.metrics.frechet import frechet_distance
from frameloom.world.captions import CaptionedClips
from frameloom.world.dataset import WorldDataset
from frameloom.world.detector import COLOUR_NAMES, SIZE_NAMES, WAYS, WORDS, parse_caption

# Each head and its classes; all but `beside` (the colour of what stands still, if anything does) are of what moves.
HEADS = {"colour": COLOUR_NAMES, "word": WORDS, "size": SIZE_NAMES, "direction": WAYS, "beside": (*COLOUR_NAMES, "-")}
SIDE = 32


@dataclass(frozen=True)
class Config:
    """Channels of the convolutions that a frame passes through, of its vector, over time, and of a clip's story."""

    channels: tuple[int, ...] = (24, 48, 64)
    frame: int = 48
    time: int = 64
    story: int = 16


class Probe(nn.Module):
    """Frames through strided convolutions, their vectors through one over time: the story, from which heads read.

    Positions are kept until a frame is a vector, so that its differences over time tell a direction.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        layers: list[nn.Module] = []
        for before, after in zip((3, *config.channels), config.channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.shallow, self.deep = nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])
        self.frame = nn.Sequential(nn.Flatten(), nn.Linear(16 * config.channels[-1], config.frame), nn.SiLU())
        self.time = nn.Sequential(nn.Conv1d(config.frame, config.time, 3, padding=1), nn.SiLU())
        self.story = nn.Linear(2 * config.time, config.story)
        self.heads = nn.ModuleDict({name: nn.Linear(config.story, len(kinds)) for name, kinds in HEADS.items()})
        size = 2 * config.channels[0] + config.story
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))

    def measure(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b d"]:
        """Look (mean of the shallow channels: 24), pace (how much they change between frames: 24), story (16).

        The pace is a logarithm, and of 8x8 pixels of the picture at once, or a little grain would outweigh all else.
        """
        frames = video.flatten(0, 1)
        if frames.shape[-2:] != (SIDE, SIDE):
            frames = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", antialias=True)
        shallow = self.shallow(2 * frames - 1)
        coarse = F.avg_pool2d(shallow, 4).unflatten(0, video.shape[:2])
        pace = coarse.diff(dim=1).abs().sum(1).mean((-2, -1)) / max(1, video.shape[1] - 1)
        over_time = self.time(self.frame(self.deep(shallow)).unflatten(0, video.shape[:2]).transpose(1, 2))
        story = self.story(torch.cat([over_time.mean(-1), over_time.amax(-1)], -1))
        return torch.cat([coarse.mean((1, 3, 4)), (pace + 0.01).log(), story], -1)

    def features(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b d"]:
        """64 numbers a clip, of mean 0 and deviation 1 over true clips; other sizes are brought to 32x32 pixels."""
        return (self.measure(video) - self.centre) / self.spread

    def forward(self, video: Float[Tensor, "b t 3 h w"]) -> dict[str, Tensor]:
        """Logits `(b, classes)` of each of `HEADS`."""
        story = F.silu(self.measure(video)[:, -self.config.story :])
        return {name: head(story) for name, head in self.heads.items()}

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Sum of the heads' cross entropies; `batch` has `video` `(b t 3 h w)` and `labels` `(b, heads)`."""
        logits = self(batch["video"])
        return sum(F.cross_entropy(logits[name], batch["labels"][:, k]) for k, name in enumerate(HEADS))


def labels(captions: list[str]) -> Int[Tensor, "b heads"]:
    """The true class of each of `HEADS`, read off the captions of toys."""
    rows = []
    for text in captions:
        mover, *others = parse_caption(text)
        names = (mover.colour, mover.word, mover.size, mover.moves, others[0].colour if others else "-")
        rows.append([kinds.index(name) for kinds, name in zip(HEADS.values(), names, strict=True)])
    return torch.tensor(rows)


def load_probe(folder: str | Path | None = None) -> Probe:
    """The probe that ships with the package, or the one that a training left in `folder`; in evaluation mode."""
    path = Path(str(folder or files("frameloom") / "weights" / "probe"))
    if not (path / "model.safetensors").is_file():
        raise InputError(f"{path}: holds no model.safetensors; python -m frameloom.world.probe {path} makes it")
    note = json.loads((path / "config.json").read_text())["config"]
    probe = Probe(Config(**note | {"channels": tuple(note["channels"])}))
    probe.load_state_dict({name: value.float() for name, value in load_file(path / "model.safetensors").items()})
    return probe.eval()


@torch.no_grad()
def features(probe: Probe, video: Float[Tensor, "b t 3 h w"], at_once: int = 64) -> Float[Tensor, "b d"]:
    """The probe's features, some clips at a time."""
    return torch.cat([probe.features(part) for part in video.split(at_once)])


def fd_probe(
    made: Float[Tensor, "b t 3 h w"], true: Float[Tensor, "c t2 3 h2 w2"], probe: Probe | None = None
) -> float:
    """Fréchet distance of two sets of clips over the probe's features; 0 for equal sets, lower is better.

    It falls with the number of clips, so compare only figures from equally many: a hundred or more.
    """
    probe = load_probe().to(made.device) if probe is None else probe
    return frechet_distance(features(probe, made), features(probe, true.to(made.device)))


def pool(seed: int, count: int, length: int) -> CaptionedClips:
    """Toys clips with one shape or two, 16 frames of 32x32 pixels."""
    return CaptionedClips(WorldDataset("toys", 16, SIDE, SIDE, seed, length, count=count, supersample=2))


@torch.no_grad()
def accuracy(probe: Probe, video: Float[Tensor, "b t 3 h w"], captions: list[str]) -> dict[str, float]:
    """Share of clips that each head gets right."""
    truth = labels(captions)
    parts = [probe(part) for part in video.split(64)]
    return {name: float((torch.cat([part[name] for part in parts]).argmax(-1) == truth[:, k]).float().mean())
            for k, name in enumerate(HEADS)}  # fmt: skip


@torch.no_grad()
def _standardise(probe: Probe, pools: list[CaptionedClips]) -> None:
    """Give each feature mean 0 and deviation 1 over the first clips of the pools."""
    true = torch.cat([probe.measure(part.read(range(256))[0]) for part in pools])
    probe.centre.copy_(true.mean(0))
    probe.spread.copy_(true.std(0).clamp(min=1e-3))


def fit(out: Path, steps: int = 1400, size: int = 32, lr: float = 2e-3, seed: int = 0) -> Probe:
    """Train on the generators' own pools (AdamW, one cycle of the learning rate) and write the weights in float16."""
    pools = [pool(1, 1, 12_288), pool(2, 2, 12_288)]
    torch.manual_seed(seed)
    probe, draw = Probe(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(probe.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    begun = time.monotonic()
    for step in range(steps):
        read = [part.read(torch.randint(len(part), (size // 2,), generator=draw).tolist()) for part in pools]
        video, captions = torch.cat([clips for clips, _ in read]), [text for _, texts in read for text in texts]
        loss = probe.loss({"video": video, "labels": labels(captions)})
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"step {step}  loss {loss.item():.3f}  {time.monotonic() - begun:.0f} s", flush=True)
    _standardise(probe, pools)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in probe.state_dict().items()}
    save_tensors(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"method": "probe", "config": asdict(probe.config)}, indent=2) + "\n")
    return load_probe(out)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/probe")
    probe = fit(out)
    for count in (1, 2):
        found = accuracy(probe, *pool(900_000 + count, count, 256).read(range(256)))
        print(f"{count} shown:", "  ".join(f"{name} {share:.3f}" for name, share in found.items()))


if __name__ == "__main__":
    main()
