"""What the shipped generators make of held-out sentences, by the world's exact detector, beside true clips.

    python benchmarks/generation.py [--prompts 64] [--only loom,world-latte] [--save]

Models that begin with a picture get the first picture of the true clip; digits are told apart by the nearest neighbours
of scikit-learn's own digits. `--save` keeps the table for the docs.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from frameloom.claims.generation import HELD_OUT, captions, clips
from frameloom.diffusion.generator import open_generator, seeded, shipped_models
from frameloom.diffusion.run import sample
from frameloom.world import WorldDataset
from frameloom.world.detector import score

NAMES = ("identity", "colour_set", "direction", "speed_ratio", "flicker", "background")


def row(name: str, objects: int | str, found: dict[str, float], seconds: float | None) -> dict[str, str]:
    told = {key.replace("_", " "): f"{found[key]:.4f}" if key == "flicker" else f"{found[key]:.2f}" for key in NAMES}
    return {"model": name, "objects": str(objects)} | told | {"s a clip": "" if seconds is None else f"{seconds:.2f}"}


def pictured(model, texts: list[str], objects: int) -> torch.Tensor:
    """Clips that begin with the first picture of the scene that each sentence is about."""
    data = WorldDataset("toys", 16, 32, 32, HELD_OUT, len(texts), count=objects, supersample=2)
    made = []
    for start in range(0, len(texts), 16):
        part = range(start, min(start + 16, len(texts)))
        cond = model.image(data.batch(part)["rgb"][:, 0], model.text(texts[start : start + 16]))
        n = model.defaults.steps
        noise = model.start(seeded(model.denoiser.latent.shape(len(part)), start), n)
        latents, _ = sample(model.denoiser, noise, model.grid(n), cond, guide=model.guided(model.defaults.guidance))
        made.append(model.decode(latents).clamp(0, 1))
    return torch.cat(made)


def digits(model, count: int) -> float:
    """Share of made digits that look like the class that was asked for."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    found = load_digits()
    judge = KNeighborsClassifier(5).fit(found.images.reshape(-1, 64) / 16, found.target)
    wanted = torch.arange(count) % 10
    n = model.defaults.steps
    latents, _ = sample(model.denoiser, model.start(seeded(model.denoiser.latent.shape(count), 0), n), model.grid(n),
                        model.labels(wanted.tolist()), guide=model.guided(model.defaults.guidance))  # fmt: skip
    pictures = torch.nn.functional.avg_pool2d(model.decode(latents)[:, 0, :1].clamp(0, 1), 2)
    return float((torch.from_numpy(judge.predict(pictures.flatten(1).numpy())) == wanted).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--only", default="")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only.split(",") if options.only else list(shipped_models())
    rows = []
    for objects in (1, 2):
        data = WorldDataset("toys", 16, 32, 32, HELD_OUT, options.prompts, count=objects, supersample=2)
        rows.append(row("true clips", objects, score(data.batch(range(options.prompts))["rgb"],
                                                     captions(options.prompts, 0, objects)), None))  # fmt: skip
    note = ""
    for name in names:
        model = open_generator(name)
        if name == "digits-16":
            note = f" digits-16: {digits(model, 200):.3f} of 200 digits are the class that was asked for."
            continue
        for objects in (1, 2):
            texts = captions(options.prompts, 0, objects)
            begun = time.perf_counter()
            made = pictured(model, texts, objects) if model.needs_image else clips(model, texts, 0)
            spent = (time.perf_counter() - begun) / len(texts)
            rows.append(row(name, objects, score(made, texts), spent))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    for found in rows[:2]:
        print("  ".join(f"{key} {value}" for key, value in found.items()))
    print(note.strip())
    if options.save:
        page = {
            "note": f"{options.prompts} held-out sentences a row. identity: share of frames with the right colour and "
            "shape of every object; direction: share of clips that move as said; flicker: mean change of the "
            f"background from frame to frame. tiny-svd-world gets no words, but the first picture.{note}",
            "command": f"python benchmarks/generation.py --prompts {options.prompts} --save"
            + (f" --only {options.only}" if options.only else ""),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "rows": rows,
        }
        path = Path(__file__).parents[1] / "docs" / "measured" / "generate.json"
        path.write_text(json.dumps(page, indent=2) + "\n")


if __name__ == "__main__":
    main()
