"""Hooks at the sites of a host: installed for the length of a block, gone without a trace after it.

A hook set is a list of `(kind or predicate, hook)`. `hook.wrap(site, forward, args, kwargs)` stands in for the call of
the site's module; `forward` is what was there before, so hooks stack, and those of other libraries stay inside.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import nn

from frameloom.diffusion.context import Ctx, current
from frameloom.diffusion.denoiser import Denoiser, Site
from frameloom.errors import InputError


@runtime_checkable
class Hook(Protocol):
    """Stands in for a module's call."""

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any: ...


# A kind of site, or a kind and a predicate over its sites.
Where = str | tuple[str, Callable[[Site], bool]]
HookSet = Sequence[tuple[Where, Hook]]


def find(denoiser: Denoiser, where: Where) -> list[Site]:
    """The sites that `where` means."""
    kind, keep = (where, None) if isinstance(where, str) else where
    return [site for site in denoiser.sites(kind) if keep is None or keep(site)]


@contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module.forward` replaced within the block; what was there, instance attribute or not, comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def install(denoiser: Denoiser, hooks: HookSet, needs: str = "") -> Iterator[None]:
    """Put hooks at all their sites; also after an exception everything is as before.

    Raises InputError when a hook finds no site: `needs` says what the host would have to have.
    """
    with ExitStack() as stack:
        for where, hook in hooks:
            sites = find(denoiser, where)
            if not sites:
                kind = where if isinstance(where, str) else where[0]
                raise InputError(needs or f"this model has no {kind.replace('_', ' ')} to put a hook at")
            for site in sites:
                before = site.module.forward
                stack.enter_context(patched(site.module, partial(_call, hook, site, before)))
        yield


def _call(hook: Hook, site: Site, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return hook.wrap(site, forward, args, kwargs)


# --- caches: when to compute, when to use again ---------------------------------------------------------------------

Policy = Callable[[Ctx], bool]


@dataclass
class Cached:
    """Uses a site's last output again on the steps where `fresh(ctx)` is false; one memory per branch."""

    fresh: Policy

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        ctx = current()
        if ctx is None:
            return forward(*args, **kwargs)
        memory = ctx.remember(self, site.name)
        if "output" not in memory or self.fresh(ctx):
            memory["output"] = forward(*args, **kwargs)
        else:
            ctx.report.cache_hits += 1
        return memory["output"]


def every(period: int, first: int = 1) -> Policy:
    """Compute on the `first` steps and on each `period`-th after them."""
    return lambda ctx: ctx.i < first or (ctx.i - first) % period == period - 1


def only(steps: Sequence[int]) -> Policy:
    """Compute on these steps."""
    chosen = frozenset(steps)
    return lambda ctx: ctx.i in chosen
