"""The flag `--moe experts=8,top=1,capacity=1.25,r=auto`: feed-forward networks become mixtures of experts."""

import math
from dataclasses import fields
from typing import Any

HELP = "mixtures of experts, such as experts=8,top=1,capacity=1.25,r=auto"

_NAMES = {"experts": int, "top": int, "capacity": float, "r": str}


def config(method: str, text: str, ranks: bool = False) -> tuple[dict[str, Any], int | str]:
    """What the flag asks of a method's configuration (`experts`, `top_k` and `capacity`), and r.

    r is no part of a model: it says how the experts of many ranks meet their tokens. One process has them all; if `r`
    was said without `ranks`, a note says so. Raises InputError for what it does not understand, and for a method
    without such layers.
    """
    from frameloom.cards import card
    from frameloom.errors import InputError

    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _NAMES:
            raise InputError(f"--moe {part}: no such setting; there are {', '.join(_NAMES)}")
        if name in found:
            raise InputError(f"--moe {text}: {name} is said twice; once would do")
        try:
            found[name] = _NAMES[name](value)
        except ValueError:
            raise InputError(f"--moe {part}: {value!r} is not a number, such as {name}=4") from None
    experts, top, capacity = found.get("experts", 0), found.get("top", 1), found.get("capacity", 1.25)
    if experts < 1:
        raise InputError(f"--moe {text}: the number of experts is missing, such as experts=8")
    if not 1 <= top <= experts:
        raise InputError(f"--moe top={top}: a token goes to between 1 and all {experts} experts")
    if not math.isfinite(capacity):
        raise InputError(f"--moe capacity={capacity}: a factor such as 1.25, or 0 for no limit")
    r = _check_r(found.get("r", "auto"), "r" in found and not ranks)
    kind = card(method).load_class()
    known = {one.name for one in fields(kind.preset("tiny"))} if hasattr(kind, "recipe") else set()
    if not {"experts", "top_k", "capacity"} <= known:
        raise InputError(f"--moe: {method} has no layers that could be mixtures of experts; stiv has")
    return {"experts": experts, "top_k": top, "capacity": capacity}, r


def _check_r(r: str, in_vain: bool) -> int | str:
    from frameloom.cli import terminal
    from frameloom.errors import InputError

    if r != "auto" and not r.isdecimal():
        raise InputError(f"--moe r={r}: 0 for data parallel, 1 and up for copies of an expert, or auto")
    if in_vain:
        terminal.say(f"note: r={r}: one process holds all experts, where every r is the same")
    return r if r == "auto" else int(r)
