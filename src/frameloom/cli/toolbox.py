"""Verbs about the toolbox itself: what is there, where it comes from, whether it holds, whether it works here."""

from typing import Annotated

import typer

from frameloom.cli import options


def register(app: typer.Typer) -> None:
    for command in (methods, card, cite, claim, doctor, demo):
        app.command()(command)


def methods(
    verb: Annotated[str | None, typer.Option(help="only the methods of this verb")] = None,
    json: options.Json = False,
) -> None:
    """List the methods: what each is, where it was published, what ships with it."""
    from frameloom.cards import cards
    from frameloom.cli.terminal import emit
    from frameloom.errors import InputError

    chosen = [card for card in cards().values() if verb is None or verb in (card.verb, *card.also)]
    if not chosen:
        verbs = sorted({name for card in cards().values() for name in (card.verb, *card.also)})
        raise InputError(f"--verb {verb}: no method serves it; there are {', '.join(verbs)}")
    if json:
        emit([_facts(card) for card in chosen])
        return
    width = max(len(card.id) for card in chosen)
    for name in sorted({card.verb for card in chosen}):
        print(f"\n{name}")
        for card in (card for card in chosen if card.verb == name):
            paper = f"{card.venue} {card.year}" if card.year else "no paper"
            print(f"  {card.id:{width}} {'●' if card.auto else ' '}  {paper:14}  {card.ready:17}  {card.summary}")
    print("\n● is what auto takes. card ID tells more, claim ID re-measures a paper's claim, cite ID prints BibTeX")


def _facts(card) -> dict:
    import dataclasses

    return dataclasses.asdict(card) | {"result": card.result}


def card(
    method: Annotated[str, typer.Argument(help="a method's id")],
    json: options.Json = False,
) -> None:
    """Show a method's card: what it is for, what it needs, its weights, its claim, its limits."""
    from frameloom.cards import card as find
    from frameloom.cli.terminal import emit

    found = find(method)
    if json:
        emit(_facts(found))
        return
    print("\n".join(card_lines(found)))


def card_lines(card) -> list[str]:
    """A card as text, one fact a line."""
    lines = [f"{card.id}: {card.title}", f"  {card.summary}"]
    if card.authors:
        lines.append(f"  {', '.join(card.authors)}. {card.venue} {card.year}"
                     f"{f', arXiv {card.arxiv}' if card.arxiv else ''}")  # fmt: skip
    whole = "" if card.streams else " (needs the whole clip, does not stream)"
    lines.append(f"  verb       {', '.join((card.verb, *card.also))}{whole}")
    if card.sizes:
        lines.append(f"  sizes      {', '.join(card.sizes)}")
    if card.weights:
        weights = card.weights
        lines += [f"  ships      {weights.parameters:,} parameters, trained on {weights.trained_on}, {weights.time}",
                  f"  again      {weights.command}"]  # fmt: skip
    if card.published_weights:
        licence = f" ({card.published_licence})" if card.published_licence else ""
        lines.append(f"  published  {card.published_weights}{licence}")
    if card.parity:
        lines.append(f"  parity     {card.parity}")
    if card.claim:
        lines.append(f"  claim      {card.claim}")
    if card.result:
        result = card.result
        lines.append(f"  measured   {result['date']}, {'holds' if result['holds'] else 'does not hold at this size'}: "
                     f"{result['summary']}")  # fmt: skip
    if card.limits:
        lines.append(f"  limits     {card.limits}")
    return lines


def cite(methods: Annotated[list[str], typer.Argument(help="ids of methods")]) -> None:
    """Print BibTeX entries."""
    from frameloom.cards import card as find
    from frameloom.errors import InputError

    for method in methods:
        entry = find(method).bibtex()
        if not entry:
            raise InputError(f"{method}: a baseline without a publication, there is nothing to cite")
        print(entry)


def claim(
    method: Annotated[str, typer.Argument(help="a method's id")],
    retrain: Annotated[bool, typer.Option("--retrain", help="train the weights anew instead of using shipped")] = False,
    save: Annotated[bool, typer.Option("--save", help="keep the figures for the card and the docs")] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Re-measure what the paper says, against its baseline; exit status 1 when it does not hold at this size."""
    from frameloom.claims.base import run_claim
    from frameloom.cli import terminal

    terminal.listen()
    with terminal.bar("steps") as progress:
        result = run_claim(method, seed=seed, retrain=retrain, save=save, progress=progress)
    if json:
        terminal.emit(result.as_dict())
    else:
        print("\n".join(result.lines()))
    if not result.holds:
        raise typer.Exit(1)


def doctor(json: options.Json = False) -> None:
    """Check that this machine has what frameloom needs: versions, encoders, weights, a round trip through a file."""
    from frameloom.cli import terminal
    from frameloom.cli.health import examine

    found = examine()
    if json:
        terminal.emit(found)
    else:
        for row in found["checks"]:
            print(f"  {'ok  ' if row['ok'] else 'FAIL'}  {row['name']:22} {row['detail']}")
    if not found["ok"]:
        raise typer.Exit(1)


def demo(
    out: Annotated[str, typer.Option("--out", "-o", help="the folder to write")] = "demo",
    quick: Annotated[bool, typer.Option("--quick", help="smaller and shorter, for a first look")] = False,
) -> None:
    """Slow down and compress two real clips, and write a page that shows all of it side by side."""
    from frameloom.cli import terminal
    from frameloom.cli.demo import run

    terminal.listen()
    with terminal.bar("steps") as progress:
        page = run(out, quick=quick, progress=progress)
    terminal.say(f"{page}  open it in a browser")
