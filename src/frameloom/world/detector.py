import re
from dataclasses import dataclass

from frameloom.errors import InputError
from frameloom.world.kinds import TOY_SIZES
from frameloom.world.scene import COLOURS

COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = tuple(TOY_SIZES)
WORDS = ("ball", "box", "capsule")
WAYS = ("left", "right", "up", "down")

_CLAUSES = {
    "rolls left": "left", "rolls right": "right", "slides left": "left", "slides right": "right",
    "rises": "up", "sinks": "down", "stands still": None,
}  # fmt: skip
_NAME = rf"a (?P<size>{'|'.join(SIZE_NAMES)}) (?P<colour>{'|'.join(COLOUR_NAMES)}) (?P<word>{'|'.join(WORDS)})"
_FORM = re.compile(rf"{_NAME}(?: (?:that )?(?P<clause>{'|'.join(_CLAUSES)}))?(?: (?P<relation>behind|in front of))?")


@dataclass(frozen=True)
class Wanted:
    """An object that a caption asks for. `moves` is None for what stands still.

    `relation` is "behind" or "in front of" when it passes the object that is named next, else None.
    """

    size: str
    colour: str
    word: str
    moves: str | None = None
    relation: str | None = None


def parse_caption(text: str) -> list[Wanted]:
    """What a caption of toys asks for, in its order. Raises InputError for sentences that the world does not say."""
    unknown = InputError(f"caption {text!r}: not a sentence about toys, such as 'a small red ball rolls left'")
    wanted: list[Wanted] = []
    for part in re.split(r" and | (?=(?<=behind )a )| (?=(?<=in front of )a )", text):
        found = _FORM.fullmatch(part.strip())
        passed = bool(wanted) and wanted[-1].relation is not None
        # Only what is passed may be named without a word on what it does: it stands still.
        if found is None or (found["clause"] is None and not passed):
            raise unknown
        way = _CLAUSES[found["clause"]] if found["clause"] else None
        wanted.append(Wanted(found["size"], found["colour"], found["word"], way, found["relation"]))
    if wanted[-1].relation is not None:
        raise unknown
    return wanted
