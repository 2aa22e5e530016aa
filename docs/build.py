"""Make the pages under docs/ and the tables of the README from the cards, and the pictures from real runs.

python docs/build.py            everything (pictures too, about half a minute)
python docs/build.py --check    fail if a page is not what the cards say (pictures are left alone)
python docs/build.py --claims   print the ids of the methods that have a claim
"""

import argparse
import json
import re
import sys
from pathlib import Path

from frameloom.cards import Card, cards

HERE = Path(__file__).parent
ROOT = HERE.parent

ORDER = ("generate", "interpolate", "flow", "stabilize", "live", "compress", "distill",
         "train", "plan", "stream", "serve", "quantize", "batch")  # fmt: skip


def intros() -> dict[str, tuple[str, str]]:
    """What a hand wrote about every verb: the one line and the rest of `docs/intro/VERB.md`."""
    found = {}
    for verb in ORDER:
        path = HERE / "intro" / f"{verb}.md"
        if path.is_file():
            first, _, rest = path.read_text().partition("\n\n")
            found[verb] = first, rest
    return found


VERBS = intros()


def methods_table(chosen: list[Card]) -> str:
    rows = ["| id | paper | ships | what it is |", "|---|---|---|---|"]
    for card in chosen:
        paper = f"{card.venue} {card.year}" if card.year else "shipped model" if card.kind == "base" else "baseline"
        paper += f", [arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
        ships = f"weights, {card.weights.parameters:,} parameters" if card.weights else card.ready
        name = f"`{card.id}`" + (" (auto)" if card.auto else "")
        rows.append(f"| {name} | {paper} | {ships} | {card.summary} |")
    return "\n".join(rows)


def claims_table() -> str:
    rows = ["| method | the paper says | here | verdict | run |", "|---|---|---|---|---|"]
    for card in cards().values():
        if not card.claim:
            continue
        result = card.result
        if result is None:
            rows.append(f"| `{card.id}` | {card.claim} | not run yet | | |")
            continue
        verdict = "holds" if result["holds"] else "does not hold at this size"
        rows.append(f"| `{card.id}` | {result['paper']} | {result['summary']}; {result['setting']} | {verdict} | "
                    f"{result['date']}, {result['machine']}, {result['seconds']:.0f} s |")  # fmt: skip
    return "\n".join(rows)


def measured(verb: str) -> str:
    """What the verb's benchmark printed last, kept in `docs/measured/VERB.json`; nothing where there is none."""
    path = HERE / "measured" / f"{verb}.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())
    columns = list(found["rows"][0])
    rows = [f"| {' | '.join(str(row[name]) for name in columns)} |" for row in found["rows"]]
    table = "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows])
    return f"## Measured\n\n{found['note']}\n\n`{found['command']}`, {found['machine']}:\n\n{table}\n\n"


def card_section(card: Card) -> str:
    from frameloom.cli.toolbox import card_lines

    text = "\n".join(card_lines(card))
    cite = f"\n\n```bibtex\n{card.bibtex()}\n```" if card.authors else ""
    return f"### {card.title}\n\n```\n{text}\n```{cite}"


def verb_page(verb: str) -> str:
    summary, body = VERBS[verb]
    mine = [card for card in cards().values() if verb == card.verb or verb in card.also]
    page = f"# {verb}\n\n{summary}\n\n{body}\n{measured(verb)}"
    if not mine:
        return page
    sections = "\n\n".join(card_section(card) for card in mine)
    return f"{page}## Methods\n\n{methods_table(mine)}\n\n{sections}\n"


def verbs_table() -> str:
    rows = ["| verb | what it does | methods |", "|---|---|---|"]
    for verb, (summary, _) in VERBS.items():
        names = ", ".join(f"`{card.id}`" for card in cards().values() if card.verb == verb)
        rows.append(f"| [{verb}](docs/verbs/{verb}.md) | {summary} | {names} |")
    return "\n".join(rows)


def fill(text: str, tables: dict[str, str]) -> str:
    """Put tables between the markers <!-- name --> and <!-- /name -->."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL
        )
        if not found:
            raise SystemExit(f"the README has no place for the table of {name}")
    return text


def pages() -> dict[Path, str]:
    made = {HERE / "verbs" / f"{verb}.md": verb_page(verb) for verb in VERBS}
    made[HERE / "methods.md"] = f"# Methods\n\n{methods_table(list(cards().values()))}\n"
    made[HERE / "claims.md"] = (
        "# Claims\n\nEach line was printed by `frameloom claim ID --save` on the machine that is named; run it again "
        f"to check.\n\n{claims_table()}\n"
    )
    readme = ROOT / "README.md"
    made[readme] = fill(readme.read_text(), {"verbs": verbs_table(), "claims": claims_table()})
    return made


def pictures() -> None:
    """The strip of the README and the pictures of the interpolate page, from the demo's own clip."""
    import cv2
    import numpy as np

    from frameloom.cli.demo import flow_picture, photographs
    from frameloom.motion.dis import pixels
    from frameloom.tasks.interpolation import interpolate
    from frameloom.world import clip as world_clip

    folder = HERE / "pictures"
    folder.mkdir(exist_ok=True)
    photo = photographs(16)
    made = [pixels(frame.rgb)[..., ::-1] for frame in interpolate(photo[4:6], slow=4).frames(0, 5)]
    flow = flow_picture(photo)
    world = pixels(next(world_clip(seed=3, frames=12, height=216, width=384, fps=12).frames(6)).rgb)[..., ::-1]
    save = [int(cv2.IMWRITE_PNG_COMPRESSION), 9]
    cv2.imwrite(str(folder / "flow.png"), flow, save)
    small = [cv2.resize(picture, (288, 162), interpolation=cv2.INTER_AREA) for picture in made]
    cv2.imwrite(str(folder / "slow-motion.png"), np.concatenate(small, 1), save)
    cv2.imwrite(str(folder / "steady-path.png"), steady_path(), save)
    cv2.imwrite(str(folder / "steady-mean.png"), steady_means(), save)
    cv2.imwrite(str(folder / "flow-methods.png"), flow_panels(), save)
    (folder / "rd.svg").write_text(rd_curves())
    cv2.imwrite(str(folder / "strip.png"), np.concatenate([made[0], made[2], flow, world], 1)[::2, ::2], save)


def rd_curves() -> str:
    """PSNR over bits a pixel of the codecs in `docs/measured/compress.json`, its first clip."""
    from frameloom.tasks.compression.rd import Point, plot

    rows = json.loads((HERE / "measured" / "compress.json").read_text())["rows"]
    points = [Point(row["method"], row["bytes"], row["bits a pixel"], row["PSNR (dB)"], row["MS-SSIM"], 0.0, 0.0)
              for row in rows if row["clip"] == rows[0]["clip"]]  # fmt: skip
    return plot(points, "PSNR, dB", [point.psnr for point in points])


def flow_panels():
    """A frame of a held-out world scene, its true flow, that of dis, and that of splatflow."""
    import numpy as np

    from frameloom.claims.flow import held_out
    from frameloom.motion.dis import pixels
    from frameloom.motion.flowio import colours
    from frameloom.tasks.flow import estimate
    from frameloom.training import load

    scenes = held_out(0, clips=2)
    video, gap = scenes["rgb"][1:2].clone(), 3
    panels = [video[0, gap], colours(scenes["flow"][1, gap], 8)]
    panels += [colours(estimate(load(name), video).fwd[0, gap], 8) for name in ("dis", "splatflow")]
    joined = np.concatenate([pixels(panel)[..., ::-1] for panel in panels], 1)
    return joined.repeat(3, 0).repeat(3, 1)


def steady_means():
    """The mean of 32 frames of a photograph in an unsteady hand: as recorded, by similarity, by fast-stab."""
    import cv2
    import numpy as np
    import torch
    from skimage.data import astronaut

    from frameloom.claims.fast_stab import hand, steadied, view
    from frameloom.motion.dis import pixels
    from frameloom.training import load

    size, rate = (256, 384), 24
    photo = cv2.resize(astronaut()[:, :, :], (560, 560), interpolation=cv2.INTER_AREA)[60:440]
    wide = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    video = torch.stack([view(wide, s, size) for s in hand(32, rate, size[1], 0)])
    shown = [video, *(steadied(video, load(name), rate)[0] for name in ("similarity", "fast-stab"))]
    return np.concatenate([pixels(frames.mean(0))[..., ::-1] for frames in shown], 1)


def steady_path():
    """A shaken world flight's path: as recorded, without the shake, and steadied."""
    import cv2
    import numpy as np
    import torch

    from frameloom.claims.fast_stab import FRAMES, RATE, SIZE, WIDE, followed, hand, steadied, view
    from frameloom.training import load
    from frameloom.world import clip as world_clip

    wide = [frame.rgb for frame in world_clip(700_001, "flyover", FRAMES, *WIDE, RATE)]
    shake = hand(FRAMES, RATE, SIZE[1], 1)
    video, calm = (torch.stack([view(w, k * s, SIZE) for w, s in zip(wide, shake, strict=True)]) for k in (1, 0))
    paths = followed(video), followed(calm), followed(steadied(video, load("fast-stab"), RATE)[0])
    width, height = 384, 150
    panels = []
    for axis, name in enumerate(("x, pixels", "y, pixels", "angle, degrees")):
        curves = [path[:, axis] * (1 if axis < 2 else 180 / np.pi) for path in paths]
        low, high = min(map(np.min, curves)), max(map(np.max, curves))
        panel = np.full((height, width, 3), 255, np.uint8)
        for curve, colour in zip(curves, ((170, 170, 170), (60, 160, 60), (200, 90, 30)), strict=True):
            x = np.linspace(12, width - 12, FRAMES)
            y = 30 + (high - curve) / max(high - low, 1e-9) * (height - 42)
            line = np.round(np.stack([x, y], 1) * 16).astype(np.int32)
            cv2.polylines(panel, [line], False, colour, 2, cv2.LINE_AA, shift=4)
        label = f"{name}  {low:.1f} to {high:.1f}"
        cv2.putText(panel, label, (12, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (60, 60, 60), 1, cv2.LINE_AA)
        panels.append(panel)
    return np.concatenate(panels, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--claims", action="store_true")
    options = parser.parse_args()
    if options.claims:
        print(" ".join(card.id for card in cards().values() if card.claim))
        return
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    if options.check:
        sys.exit(f"not what the cards say, run make docs: {', '.join(map(str, stale))}" if stale else 0)
    for path, text in pages().items():
        path.write_text(text)
    pictures()


if __name__ == "__main__":
    main()
