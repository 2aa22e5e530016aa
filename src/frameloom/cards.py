"""The table of methods: one card per method, read from `methods/*.toml`.

A card is data. The command line's help, the docs, the table of claims and the test that walks every method
are all made from it, so that adding a method is adding one method file and one card. Importing this module
imports nothing heavier than a TOML parser.
"""

import difflib
import importlib
import json
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from frameloom.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tiny weights that ship with a method: what they are and the command that makes them again."""

    trained_on: str
    time: str
    command: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """One method: who published it, what it is for, where it lives, what it needs.

    `kind` is `"method"` for a published method and `"baseline"` for the classical or naive answer that a task
    keeps under the same protocol. `auto` marks the one that `--method auto` takes: what measures best, on real footage,
    of all that is installed. `entry` is `"module:Class"` of the method file. `paper_parameters` is the
    published size that the `paper` preset must reproduce, to `paper_tolerance` of itself. `also` are further verbs
    that it serves. `parity` says with what of the authors' own code, and how nearly, published weights agree here.
    A model that strategies sample from has `makes_video`; `base` is then the name of its shipped
    weights, and for a strategy the name of the model that it takes when none is given.
    """

    id: str
    title: str
    verb: str
    entry: str
    summary: str
    kind: str = "method"
    auto: bool = False
    authors: tuple[str, ...] = ()
    venue: str = ""
    year: int = 0
    arxiv: str = ""
    sizes: tuple[str, ...] = ()
    paper_parameters: int | None = None
    paper_tolerance: float = 0.02
    streams: bool = True
    also: tuple[str, ...] = ()
    base: str = ""
    makes_video: bool = False
    claim: str = ""
    limits: str = ""
    published_weights: str = ""
    published_licence: str = ""
    parity: str = ""
    weights: Weights | None = field(default=None)

    @property
    def ready(self) -> str:
        """What it takes before the method can be used, in three words."""
        if self.weights:
            return "shipped weights"
        if not self.sizes:
            return "no weights needed"
        return "fitted per video" if self.verb == "compress" else "train it first"

    @property
    def module(self) -> str:
        return self.entry.partition(":")[0]

    def load_class(self) -> Any:
        """Import the method file and return its class."""
        module, _, name = self.entry.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def result(self) -> dict[str, Any] | None:
        """The last saved run of this method's claim (see `frameloom claim ID --save`), or None."""
        path = files("frameloom") / "methods" / "results" / f"{self.id}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def bibtex(self) -> str:
        """A BibTeX entry; empty for a baseline without a publication."""
        if not self.authors:
            return ""
        rows = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "year": str(self.year),
            "booktitle" if not self.venue.startswith("arXiv") else "journal": self.venue,
        }
        if self.arxiv:
            rows |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in rows.items() if value)
        kind = "article" if self.venue.startswith("arXiv") else "inproceedings"
        return f"@{kind}{{{self.id},\n{body}\n}}"


def _parse(text: str) -> Card:
    data = tomllib.loads(text)
    if weights := data.pop("weights", None):
        data["weights"] = Weights(**weights)
    return Card(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


@cache
def cards() -> dict[str, Card]:
    """Every card by id, methods before baselines, each group in alphabetical order."""
    folder = files("frameloom") / "methods"
    found = [_parse(path.read_text()) for path in folder.iterdir() if path.name.endswith(".toml")]
    return {card.id: card for card in sorted(found, key=lambda card: (card.kind != "method", card.id))}


def chosen(method: str, verb: str) -> str:
    """`method` itself, or for `"auto"` the method of `verb` whose card says so."""
    if method != "auto":
        return method
    own = [card.id for card in cards().values() if card.verb == verb and card.auto]
    return next(iter(own + [card.id for card in cards().values() if verb in card.also and card.auto]))


def card(method: str, verb: str | None = None) -> Card:
    """The card of `method`; with `verb`, only if it serves that verb.

    Raises InputError that suggests the nearest name.
    """
    known = {key: value for key, value in cards().items() if verb is None or verb in (value.verb, *value.also)}
    if method in known:
        return known[method]
    if verb and method in cards():
        raise InputError(
            f"--method {method}: {method} is a method for {cards()[method].verb}, not for {verb}; "
            f"{verb} has {', '.join(known)}"
        )
    near = difflib.get_close_matches(method, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise InputError(f"--method {method}: no such method{f' for {verb}' if verb else ''}; {hint}")
