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

VERBS = {
    "generate": (
        "Make a video from words, from a picture, or from any frames; `predict` goes on with one.",
        """```
frameloom generate "a small red ball rolls left behind a large blue box" -o out.mp4     # the shipped model, seconds
frameloom generate "a large red ball rolls right" --image first.png -o out.mp4           # begins with that picture
frameloom generate "a large red ball rolls left" --frames 64 --method freenoise -o long.mp4
frameloom generate "a large red ball rolls left" --frames 512 --method ouroboros -o endless.mp4
frameloom generate --prompts "20: a red ball rolls left; 20: a blue box rises" --method freenoise -o two.mp4
frameloom generate "..." --weights FOLDER-OR-HUB-ID -o out.mp4                            # a diffusers pipeline
frameloom generate "..." --memory-budget 2GB --method streamlined -o out.mp4
frameloom generate 7 --weights runs/one-step --steps 1 -o seven.mp4                       # see distill
frameloom predict in.mp4 more.mp4 --frames 8
frameloom interpolate a.png b.png --method stiv -o between.mp4
```

```python
import frameloom as fl

clip = fl.generate("a large red ball rolls left")        # lazy: sampled when frames are asked for
fl.predict(clip[:4], frames=8).save("more.mp4")
```

A *model* makes short clips, a *strategy* says how it is sampled; `--method` names either. Any strategy runs on any
model that has what it needs, and says what is missing where it does not. The shipped models know a closed vocabulary:
one or two of a small or large, red, orange, yellow, green, blue or purple ball, box or capsule that rolls or slides
left or right, rises, sinks or stands still, behind or in front of the other. Other words are named and left out
(`--strict` stops at them). Pictures smaller than 128 pixels are shown enlarged (`--zoom 1` for the bare pixels).

`--weights` takes a shipped model by name, the folder of a training or distillation, or a diffusers pipeline (a folder
or a hub id): TextToVideoSD, AnimateDiff, Latte, CogVideoX, Stable Video Diffusion, Wan, LTX and Stable Diffusion. The
loop is frameloom's own for all of them; `benchmarks/diffusion.py` compares it with diffusers' own, step for step.
""",
    ),
    "interpolate": (
        "Change the frame rate of a video, or slow it down: pictures at instants nobody recorded.",
        """```
frameloom interpolate holiday.mov smooth.mp4 --fps 60          # any rate to any rate: 24, 23.976, 30000/1001, 2x
frameloom interpolate holiday.mov slow.mp4 --slow 4            # four times slower, at the source's rate
frameloom interpolate holiday.mov smooth.mp4 --method vfimamba
frameloom interpolate holiday.mov smooth.mp4 --method cbb --steps 20 --seed 1
frameloom interpolate a.png b.png -o middle.png                # the picture halfway between two
frameloom interpolate padded.mp4 smooth.mp4 --fps 60 --dedupe  # footage with repeated frames
```

```python
import frameloom as fl

clip = fl.read("holiday.mov")                  # lazy: nothing is decoded but the first frame
smooth = fl.interpolate(clip, fps=60)          # lazy too
smooth[2.0:4.0].save("part.mp4")               # two seconds are computed
model = fl.load("vfimamba")
middle = model.at(frame0, frame1, t=0.5)       # the bare method, plain tensors (3, h, w) in [0, 1]
```

Output frame j is shown at j / rate exactly. A recorded frame that falls on such an instant (within a thousandth of the
gap) is passed on as the decoder made it. Across a scene cut the nearer frame is held. A cut is a change of the colour
histogram by more than 0.25 *and* more than half of the pixels without a trackable counterpart; a repeated frame is one
in which no 4x4 block differs by more than 1.5 of 255. The counts are printed at the end. Methods that only know the
middle are applied again to their own results, down to eighths of the gap; other instants are rounded with a note, or
refused under `--strict`. Frames too large for a method are cut into overlapping tiles (`--tile`). Memory holds two
frames and what lies between them, whatever the length. A target below the source's rate samples the same motion at
fewer instants.

![Motion between two frames: hue is direction, brightness is speed](../pictures/flow.png)

Source frames (first and last) and the three made between them:

![Five frames, three of them made](../pictures/slow-motion.png)
""",
    ),
    "flow": (
        "Find the motion of every pixel from frame to frame: flow files, and a video of it in colours.",
        """```
frameloom flow in.mp4 flow/                                    # .flo files and flow.mp4; dis, without weights
frameloom flow in.mp4 flow/ --format png --bidirectional       # KITTI's 16-bit pictures, both ways; or npz
frameloom flow in.mp4 flow/ --method splatflow                # remembers what things hide; slow
frameloom train splatflow --data sintel:DIR -o runs/splatflow  # or things:, kitti:, chairs:, hd1k:, world
```

```python
import frameloom as fl

for gap in fl.flow(fl.read("in.mp4"), "dis"):    # one gap in memory at a time
    gap.fwd, gap.valid                           # (2, h, w) in pixels, x first; False across a cut
```

`forward_00003.flo` is the flow from frame 3 to frame 4, `backward_00004.flo` the one back. Across a scene cut there is
no flow: it is zero and marked as unknown. `dis` also serves this verb and is what `auto` takes: on real footage its
flows match the next frame best, in a hundredth of the time. Take `splatflow` where it matters what happens behind
things that pass: on held-out world scenes its error is a third lower than that of dis where a pixel is hidden, and 15%
lower over all (`benchmarks/motion.py`).

A held-out scene, its true flow, that of `dis`, and that of `splatflow`:

![A frame and three pictures of flow](../pictures/flow-methods.png)

The shipped networks begin at the flow of `dis` and mend it; the published sizes begin at zero, as in their papers.
`stream` of a method in Python takes any iterable of frames: `splatflow` holds two of them, `streamflow` a group of
four, `videoflow` a window of ten. Above about 540p correlations are computed when they are looked up, in memory that
grows with the picture and not with its square.
""",
    ),
    "stabilize": (
        "Take the shake out of a handheld video, at the full field of view: no crop, no black border.",
        """```
frameloom stabilize shaky.mp4 steady.mp4
frameloom stabilize shaky.mp4 steady.mp4 --smoothness 0.8         # 0: as recorded, 1: as steady as it gets
frameloom stabilize shaky.mp4 steady.mp4 --method similarity      # classical, fast, crops
frameloom run shaky.mp4 smooth.mp4 --do "stabilize 0.6 | interpolate 60fps"
```

```python
import frameloom as fl

steady = fl.stabilize(fl.read("shaky.mp4"), smoothness=0.5)       # lazy; saved or sliced like any clip
steady.source.analyse()[0].shot.correction                        # (n, 4): x, y, angle, log scale of every frame
fl.stabilize(clip, flow=estimator)                                # any function (first, second) -> flow (2, h, w)
```

The video is read twice. The first pass keeps four numbers a frame: how the picture moved, turned and grew. Scene cuts
divide that path into shots, and each is smoothed by a Gaussian window, its sigma half a second at smoothness 1; slow
pans and zooms stay, even ones exactly. `fast-stab` repeats that until the path rests, evens out what a similarity
cannot express by warp fields over 20 frames, and takes what comes into view at the edges from up to 20 frames before
and after; what no frame saw is mirrored and counted. A shot in which nothing would move by a quarter of a pixel is
passed on untouched, and so are fewer than five frames. Frames in which nothing can be followed move as their neighbours
do, with a note. Rolling shutter is not modelled. Memory is that of a window of 41 frames in the decoder's form, besides
those four numbers.

The path of a camera flight through the synthetic world, shaken by a known hand (grey: as recorded, green: without the
shake, blue: `fast-stab`):

![Horizontal, vertical and turning motion over time](../pictures/steady-path.png)

The mean of 32 frames of a photograph in an unsteady hand, as recorded, by `similarity` and by `fast-stab`; what stands
still stays sharp:

![Three mean pictures, the first blurred](../pictures/steady-mean.png)
""",
    ),
    "live": (
        "Restyle a video by words as it comes: a few steps a frame, all frames in flight in one launch.",
        """```
frameloom live in.mp4 out.mp4 --prompt "a large blue ball" --strength 0.5          # how much may change
frameloom live in.mp4 out.mp4 --prompt "a blue ball" --t-index 16,32,45            # or where exactly, of 50 steps
frameloom live /dev/video0 out.mkv --prompt "a blue ball" --drop --similar 0.98    # keep pace; rest when nothing moves
frameloom live in.mp4 out.mp4 --prompt "a red ball" --then "60: a green ball" --prompt-ramp 12
frameloom live in.mp4 out.mp4 --prompt "a blue ball" --weights DIR                 # any model that generates
```

```python
import frameloom as fl
from frameloom.diffusion.generator import open_generator
from frameloom.tasks.editing import Settings
from frameloom.tasks.editing.streamdiffusion import Stream

restyled = fl.live(fl.read("in.mp4"), "a blue ball", strength=0.5)     # a lazy clip

stream = Stream(open_generator(), "a blue ball", Settings(t_index=(32, 45)))
for frame in camera:                              # (3, h, w) in [0, 1]
    shown = stream.push(frame)                    # None while the slots fill, then one frame for each
stream.say("a red ball")                          # from the next frame on; nothing is started anew
rest = stream.flush()
```

An input frame is fitted to the model's size, mixed with noise to the first of its steps, and comes out after the last;
one frame comes out for every frame that goes in. `--t-index` names steps of a grid of 50, the noisiest first: a low
first index changes more, `--strength` computes them. Guidance `self` costs nothing and is led by the input, `onetime`
costs one evaluation a frame, `full` doubles them. Reading, network and writing run in threads of their own; where the
network is slower the input waits, or under `--drop` the oldest waiting frame is left out and the output before stands
in its place.
Meant for models that were distilled to few steps (LCM): others blur, and say so.
""",
    ),
    "compress": (
        "Store a video in one `.flm` file that decodes on its own, any frame of it first.",
        """```
frameloom compress clip.mp4 clip.flm                               # the codec that measures best at equal size
frameloom compress clip.mp4 clip.flm --method hnerv --size 60k     # at most so many bytes; or --bpp 0.05
frameloom compress clip.mp4 clip.flm --method boost-nerv --quality 32dB   # as small as that quality allows
frameloom compress clip.mp4 clip.flm --method hnerv --minutes 10   # as good as ten minutes make it
frameloom compress clip.mp4 clip.flm --method hnerv --minutes 10 --resume   # after a kill
frameloom compress long.mp4 long.flm --method hnerv --segment 300  # a fit for every 300 frames
frameloom inspect clip.flm                                         # every section: bytes, bits a pixel
frameloom decompress clip.flm back.mp4 --frames 10:40 --region 0,0,320,180
frameloom rd clip.mp4 -o rd.html --methods hnerv,boost-nerv        # curves beside x264, x265 and AV1, BD-rate, times
frameloom edit inpaint clip.mp4 out.mp4 --mask hole.png            # by fitting only what is seen
frameloom run clip.mp4 small.flm --do "interpolate 60fps | compress hnerv"
```

```python
fl.compress(clip, "clip.flm", "hnerv", size=60_000)
fl.decompress("clip.flm", frames=[17, 3]).tensor()                 # (2, 3, h, w): only those two are decoded
```

The size is the length of the file, and bits a pixel are 8 times that over all pixels. `--size` and `--bpp` are met from
below: a fitted network is as large as the size allows, and its quantiser has as many levels as still fit; `sem` takes
the highest rate that fits; only the files of `nirvana` follow from the video. `--quality 32dB` is the mean PSNR of the
decoded frames: a fit ends when it is there, a network that does not get there is made larger, and the fewest levels
that keep it are stored; what cannot be reached is an error that says what was. A plain number after `--quality` is a
conventional codec's own rate factor. `--set NAME=VALUE` passes a method's own settings (`--set gop=24` of `sem`, `--set
key=8` of `nirvana`). Every number in a file is checked before it is believed: damage ends in one line that names the
section (`benchmarks/fuzz.py` tries ten thousand damaged files).

**When a neural codec is worth it:** any frame of `hnerv` or `boost-nerv` costs one forward pass and none before it, so
random access is even; the decoder is a few hundred lines; a fit to what is seen fills holes and leaves out noise; the
frames of `nirvana` come in parts, for a region only its patches are drawn; with `sem` nothing drifts, and how good a
frame is hangs on that frame alone. **When not:** to store a video in fewer bytes. At equal bytes x264, x265 and AV1
give decibels more on ordinary footage and encode a hundred times faster; every report here prints their line. Sound is
not stored in a `.flm` file.

![Rate and distortion on a real clip](../pictures/rd.svg)
""",
    ),
    "distill": (
        "Make a model of one or a few steps out of one of many, without data: the teacher draws it.",
        """```
frameloom distill --teacher digits-16 -o runs/one-step --recipe reflow       # InstaFlow: two stages, one step
frameloom distill --teacher digits-16 -o runs/few-steps --recipe rfpp        # 2-rectified flow++: one to five steps
frameloom distill --teacher runs/stiv --prompts captions.txt -o runs/fast    # a model of words: a sentence a line
frameloom generate 7 -o seven.mp4 --weights runs/one-step --steps 1
```

```python
import frameloom as fl

fl.distill("rfpp", "digits-16", "runs/few-steps", pairs=10_000, steps=4000)
```

The teacher's ODE ties every noise to one picture. Such pairs are drawn once, with the teacher's guidance baked in, and
kept in `OUT/pairs`: of the noise only its seed. The student starts from the teacher's weights and learns the straight
way between the two. Everything is resumable: pairs shard by shard, every stage of training from its last save; the
same command goes on and ends in the same weights. A folder belongs to one teacher: pairs of two do not mix.

A student is a model like any other (`--weights OUT`). It knows how many steps it was made for and that it needs no
guidance. `--solver rfpp` samples any nearly straight flow by going back to the initial noise after every step, which at
one step is Euler's.
""",
    ),
}


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
    sections = "\n\n".join(card_section(card) for card in mine)
    return f"# {verb}\n\n{summary}\n\n{body}\n{measured(verb)}## Methods\n\n{methods_table(mine)}\n\n{sections}\n"


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
