"""Flover: one stream of decoding that requests join when they come and leave when they are done.

For whoever serves an autoregressive model (tokens of video, of pictures, of text) to requests that arrive at random.
Generating one request at a time reads all weights for every token of every request; waiting for a batch to form, and
then for its longest member, wastes time and rows. Here there is one persistent loop, and per iteration

    h[lo:hi] = model(last[lo:hi], position[lo:hi], cache[lo:hi])        one forward pass for all that are active

although the requests are at different steps. A request is prefilled into a slot beside the occupied ones, in one pass
with others that came at the same time, and takes part from the next iteration on. One that ends at a border of the
occupied range just moves the border; after one that ends in the middle, the fewest possible segments are copied to
close the gap (`frameloom.scale.slots`).

Every request samples with its own settings and numbers of its own seed, so that its tokens do not depend on its
neighbours. With several ranks (`split`) the order of arrival is rank 0's: before an iteration it broadcasts who came
and who left, and every rank replays that. Each rank's share of the logits is gathered to all, so that all sample from
the same bits.

Reference: Jinghan Yao, Nawras Alnaasan, Tian Chen, Aamir Shafi, Hari Subramoni, Dhabaleswar K. Panda: Flover: A
Temporal Fusion Framework for Efficient Autoregressive Model Parallel Inference. HiPC 2023, arXiv 2305.13484.
"""

import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.scale.sampling import GREEDY, Likelihood, Sampling, likelihoods, sample
from frameloom.scale.slots import SlotCache, minimal_moves
from frameloom.scale.split import same_everywhere


class QueueFull(InputError):
    """As many requests wait as may; later there is room again."""


@dataclass(eq=False)
class Request:
    """A request and what has become of it so far; `tokens` grows, and `finish` is set once.

    `finish` is `"length"`, `"stop"` (a token that ends the text, which is kept), `"cancelled"` or `"failed"`, and then
    `error` says why. `on_token` is called with the request after every token and at its end, by the thread that
    decodes. With `likeliest` not None, `likelihoods` grows along with `tokens` and tells that many likeliest of each.
    """

    id: str
    prompt: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    on_token: Callable[["Request"], None] | None = None
    likeliest: int | None = None
    tokens: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    slot: int = -1
    chances: Tensor | None = None

    @property
    def done(self) -> bool:
        return bool(self.finish)

    @property
    def filled(self) -> int:
        """Columns of its slot in use: all tokens but the newest, which the next forward pass writes."""
        return len(self.prompt) + len(self.tokens) - 1

    def chance(self) -> float:
        """The random number in [0, 1) of its next token."""
        if self.chances is None:
            dice = torch.Generator().manual_seed(self.sampling.seed)
            self.chances = torch.rand(self.limit, generator=dice, dtype=torch.float64)
        return float(self.chances[len(self.tokens)])


class FusedDecoder:
    """Decodes up to `slots` requests together; others wait.

    >>> decoder = FusedDecoder(model, slots=32, max_len=512)
    >>> request = decoder.submit([5, 8, 2], 20)
    >>> decoder.run()
    >>> request.tokens

    `submit` and `cancel` may be called by any thread, `step` and `run` by one.

    Args:
        model: a causal language model of transformers with full attention at positions that it is given.
        slots: requests decoded at once.
        max_len: tokens of a request, prompt and answer together. The cache takes slots x max_len of them, once.
        queue: requests that may wait for a slot.
        eos: tokens that end a request.
        admit: most requests that join between two iterations (the paper's is 1); as many as there are slots when None.
        compact: close gaps; without, finished rows in the middle are computed until a border reaches them.
        ranks: the group of ranks that the model is split over (`split`); rank 0 submits, the others `follow`.

    Raises:
        InputError: the model cannot be decoded so, or ranks disagree.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 32,
        max_len: int = 512,
        *,
        queue: int = 1024,
        eos: Collection[int] = (),
        admit: int | None = None,
        compact: bool = True,
        ranks: "dist.ProcessGroup | None" = None,
    ) -> None:
        for name, value in (("slots", slots), ("max-len", max_len), ("queue", queue), ("admit", admit or 1)):
            if value < 1:
                raise InputError(f"--{name} {value}: a whole number of 1 or more is wanted")
        self._keywords = _calling(model, max_len)
        self.model, self.slots, self.max_len, self.queue = model.eval(), slots, max_len, queue
        self.eos, self.admit, self.compact, self.ranks = frozenset(eos), admit, compact, ranks
        self.vocabulary: int = model.config.vocab_size
        self.device = next(model.parameters()).device
        if ranks is not None:
            same_everywhere(
                ranks, "--slots, --max-len and the like", (slots, max_len, sorted(self.eos), admit, compact)
            )
        self.rank = dist.get_rank(ranks) if ranks is not None else 0
        self.cache = SlotCache(model.config.num_hidden_layers, slots, max_len)
        self.low = self.high = 0
        self.iterations = self.prefills = self.rows = self.moves = self.moved_bytes = 0
        self.admitted: deque[str] = deque(maxlen=4096)
        self._slots: list[Request | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        self._ids: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._came: list[Request] = []
        self._left: list[str] = []
        self._closing = self.closed = False

    # --- what a caller does -------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling = GREEDY,
        *,
        id: str | None = None,
        on_token: Callable[[Request], None] | None = None,
        likeliest: int | None = None,
    ) -> Request:
        """Ask for `n` tokens after `prompt`, and how likely each was, with its `likeliest` rivals, unless that is None.

        Raises:
            QueueFull: too many wait already.
            InputError: the prompt is empty, has tokens that the model lacks, does not fit into a slot together with
                `n` tokens, or `id` is that of a request under way.
        """
        if not prompt:
            raise InputError("the prompt is empty; one token or more is wanted")
        if n < 1:
            raise InputError(f"{n} new tokens: a whole number of 1 or more is wanted")
        if len(prompt) + n > self.max_len:
            raise InputError(f"a prompt of {len(prompt)} tokens and {n} new ones make {len(prompt) + n}; "
                             f"{self.max_len} fit (--max-len)")  # fmt: skip
        if not all(0 <= token < self.vocabulary for token in prompt):
            raise InputError(f"the prompt has a token outside 0 to {self.vocabulary - 1}, which is all the model knows")
        with self._lock:
            if self._closing:
                raise QueueFull("the decoder is closing and takes no more requests")
            if len(self._came) + len(self._waiting) >= self.queue:
                raise QueueFull(f"{self.queue} requests are waiting, which is all that may; try again later")
            if id is None:
                id = next(name for number in self._numbers if (name := f"request-{number}") not in self._ids)
            if id in self._ids:
                raise InputError(f"id {id}: a request of that name is under way; choose another")
            request = Request(id, tuple(prompt), n, sampling, on_token, likeliest)
            self._ids[id] = request
            self._came.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Give up a request; its slot is free at the next iteration. One that has ended stays as it is."""
        with self._lock:
            if self._ids.get(request.id) is request:
                self._left.append(request.id)

    @property
    def active(self) -> int:
        return sum(request is not None for request in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._came) + len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._ids)

    def run(self, progress: Progress = silent) -> None:
        """Iterate until every request has ended."""
        total = self.active + self.waiting
        while self.busy:
            self.step()
            progress("decoding", max(0, total - len(self._ids)), total)

    def close(self) -> None:
        """On rank 0: end what is under way, and let the other ranks go."""
        with self._lock:
            self._closing = True
            self._left.extend(self._ids)
        self.step()

    def follow(self) -> None:
        """On every other rank: do as rank 0 says until it closes."""
        while not self.closed:
            self.step()

    def abandon(self, error: str) -> None:
        """Fail every request, without another iteration: for when an iteration raised."""
        with self._lock:
            self._closing = True
            self._came.clear()
        for request in list(self._ids.values()):
            request.error = error
            self._end(request, "failed")

    # --- an iteration -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Let requests go and come, then one token for each that is active."""
        left, closing = self._agree()
        for name in left:
            if name in self._ids:
                self._end(self._ids[name], "cancelled")
        self._close_ranks()
        self._admit()
        self._close_ranks()
        if self.high > self.low:
            self._iterate()
            self._close_ranks()
        self.closed = closing

    def _agree(self) -> tuple[list[str], bool]:
        """Take over who came and who left since the last iteration, the same on all ranks in the same order."""
        with self._lock:
            came, left, closing = self._came, self._left, self._closing
            self._came, self._left = [], []
            self._waiting.extend(came)
        if self.ranks is not None:
            told = [([(r.id, r.prompt, r.limit, r.sampling) for r in came], left, closing)]
            dist.broadcast_object_list(told, group_src=0, group=self.ranks)
            if self.rank:
                others, left, closing = told[0]
                came = [Request(*facts) for facts in others]
                self._ids |= {request.id: request for request in came}
                self._waiting.extend(came)
        return left, closing

    def _admit(self) -> None:
        """Give those who wait the slots beside the occupied ones, above while there are any, and prefill them."""
        if self.low == self.high:
            self.low = self.high = 0
        count = min(self.admit or self.slots, len(self._waiting), self.slots - (self.high - self.low))
        while count:
            above = self.slots - self.high
            group = [self._waiting.popleft()]
            while len(group) < min(count, above or self.low) and _alike([*group, self._waiting[0]]):
                group.append(self._waiting.popleft())
            first = self.high if above else self.low - len(group)
            self.low, self.high = min(self.low, first), max(self.high, first + len(group))
            for slot, request in enumerate(group, first):
                self._slots[slot], request.slot = request, slot
                self.admitted.append(request.id)
            self._prefill(group, first)
            count -= len(group)

    def _prefill(self, group: Sequence[Request], first: int) -> None:
        """Write prompts into their slots in one pass; the first token of each follows.

        Shorter ones are filled up with their own last token: what that writes is overwritten before it is seen.
        """
        lengths = [len(request.prompt) for request in group]
        ids = torch.tensor([r.prompt + r.prompt[-1:] * (max(lengths) - len(r.prompt)) for r in group])
        positions = torch.arange(max(lengths)).expand_as(ids)
        self.prefills += 1
        self._take(group, self._forward(ids, first, positions, torch.tensor(lengths) - 1))

    def _iterate(self) -> None:
        rows = self._slots[self.low : self.high]
        last = torch.tensor([[row.tokens[-1] if row else 0] for row in rows])
        positions = torch.tensor([[row.filled if row else 0] for row in rows])
        self.iterations += 1
        self.rows += len(rows)
        self._take(rows, self._forward(last, self.low, positions, torch.zeros(len(rows), dtype=torch.long)))

    def _forward(
        self, ids: Int[Tensor, "rows tokens"], first: int, positions: Int[Tensor, "rows tokens"],
        last: Int[Tensor, "rows"],
    ) -> Float[Tensor, "rows vocabulary"]:  # fmt: skip
        """Logits after the token `last` of each of the slots from `first` on."""
        ids, columns, at = ids.to(self.device), int(positions.max()) + 1, positions.to(self.device)
        mask = self.cache.look(slice(first, first + len(ids)), at, columns)
        kept, which = last.to(self.device).unique(return_inverse=True)
        named: dict = {self._keywords["cache"]: self.cache}
        if self._keywords["picks"]:
            named["logits_to_keep"] = kept
        else:
            which = last.to(self.device)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=True, **named).logits
        # Picking waits for the gather of a split model, whose result is a promise until something is computed of it.
        return logits[torch.arange(len(ids), device=self.device), which]

    def _take(self, rows: Sequence[Request | None], logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Sample a token for every row; whose logits are no numbers has failed, and nobody else."""
        good = torch.isfinite(logits.amax(-1)).tolist()
        chosen = sample(logits, [row.sampling if row else GREEDY for row in rows],
                        [row.chance() if row and row.sampling.temperature else 0.0 for row in rows])  # fmt: skip
        asked = [at for at, row in enumerate(rows) if row and row.likeliest is not None]
        told = likelihoods(logits[asked], chosen[asked], [rows[at].likeliest for at in asked]) if asked else []
        likely = dict(zip(asked, told, strict=True))
        for at, (row, fine, token) in enumerate(zip(rows, good, chosen.tolist(), strict=True)):
            if row is None:
                continue
            if not fine:
                row.error = f"the model's output is no number at token {len(row.tokens)} of the answer"
                self.cache.scrub(row.slot)
                self._end(row, "failed")
                continue
            if at in likely:
                row.likelihoods.append(likely[at])
            row.tokens.append(token)  # last: who reads along in another thread goes by it
            if token in self.eos:
                self._end(row, "stop")
            elif len(row.tokens) == row.limit:
                self._end(row, "length")
            elif row.on_token:
                row.on_token(row)

    def _end(self, request: Request, how: str) -> None:
        with self._lock:
            if request.slot < 0 and request in self._waiting:
                self._waiting.remove(request)
            del self._ids[request.id]
        if request.slot >= 0:
            self._slots[request.slot] = None
            request.slot = -1
        request.finish = how
        if request.on_token:
            request.on_token(request)

    def _close_ranks(self) -> None:
        """Draw the borders in over ended requests, and close gaps."""
        occupied = [request is not None for request in self._slots]
        if not any(occupied):
            self.low = self.high = 0
            return
        if self.compact:
            for source, target in minimal_moves(occupied):
                mover = self._slots[source]
                self.moved_bytes += self.cache.move(source, target, mover.filled)
                self.moves += 1
                self._slots[source], self._slots[target], mover.slot = None, mover, target
        places = [slot for slot, request in enumerate(self._slots) if request is not None]
        self.low, self.high = places[0], places[-1] + 1


def _calling(model: nn.Module, max_len: int) -> dict:
    """How the model wants to be called. Raises InputError for one that fused decoding would get wrong."""
    config = getattr(model, "config", None)
    if not hasattr(config, "vocab_size") or not hasattr(config, "num_hidden_layers"):
        raise InputError(f"{type(model).__name__}: not a causal language model of transformers")
    name = type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(config, "sliding_window", None) or max_len) < max_len:
        raise InputError(f"{name}: has layers without full attention; fused decoding needs full attention in all")
    if (known := getattr(config, "max_position_embeddings", None) or max_len) < max_len:
        raise InputError(f"--max-len {max_len}: {name} knows positions up to {known}")
    if getattr(config, "_attn_implementation", None) != "sdpa":
        raise InputError(f'{name}: open it with attn_implementation="sdpa"; its attention must take a mask per request')
    asked = inspect.signature(model.forward).parameters
    if "position_ids" not in asked:
        raise InputError(f"{name}: takes no positions; requests at different steps need their own")
    # The argument was renamed within transformers 5.
    return {"cache": "cache" if "cache" in asked else "past_key_values", "picks": "logits_to_keep" in asked}


def _alike(group: Sequence[Request]) -> bool:
    """Whether prompts are of lengths so much alike that filling the shorter ones up is no more than half the work."""
    lengths = [len(request.prompt) for request in group]
    return max(lengths) * len(lengths) <= 2 * sum(lengths)
