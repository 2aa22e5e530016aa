"""Flover: fused decoding against one request after another, batches that wait, and transformers' own batching.

All ways run on one thread, so that processor time is what a machine with nothing else to do would take: it is what is
measured, and the clock of the arrivals.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from frameloom.claims.base import Result
from frameloom.progress import Progress
from frameloom.scale.flover import FusedDecoder, Request
from frameloom.scale.probe import CommCounter
from frameloom.scale.ranks import local
from frameloom.scale.sampling import GREEDY, Sampling
from frameloom.scale.slots import minimal_moves
from frameloom.scale.split import split

PROMPT, SLOTS = 8, 16
VOCABULARY = 512
PATTERNS = 10_000
ROUNDS = 4

Asked = list[tuple[list[int], int]]


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Exactness, counts and moves on small models; throughput on one whose weights are larger than the cache."""
    rng = np.random.default_rng(seed)
    checks = {}
    small = llama(seed, width=256, depth=4).double()
    asked = requests(rng, 12, 16, 48)
    checks |= exactness(small, asked, rng)
    progress("checks", 1, 4)
    checks["moves are the fewest there are, 10,000 occupancies"] = fewest_moves(rng)
    progress("checks", 2, 4)
    checks |= ranks(seed)
    progress("checks", 3, 4)
    late = latency(small.float(), rng)
    progress("checks", 4, 4)
    rows, gain, over, same = throughput(llama(seed, width=512, depth=8), requests(rng, 40, 16, 48), progress)
    spec = llama(seed, width=256, depth=4)
    asked = requests(rng, 32, 16, 64)
    decoder = FusedDecoder(spec, SLOTS, 160)
    small_gain = max(fused(decoder, asked).crowded for _ in range(ROUNDS)) / sequential(spec, asked).pace
    return Result(
        "flover",
        paper="over 11 times (GPT-J) and 16 times (LLaMA) the throughput of FasterTransformer under random arrivals",
        setting=f"Llama of random weights, 8 layers of 512, 26M parameters in float32; 40 requests of {PROMPT} + 16 to "
        f"48 tokens, one thread, processor time; arrivals on 4 layers of 256; seed {seed}",
        rows=rows + late,
        checks=checks,
        holds=gain >= 5 and over > 1,
        summary=f"with {SLOTS} in flight {gain:.1f} times the throughput of one after another (needs >= 5); with all "
        f"{over:.2f} times that of transformers' generate_batch, its set-up not counted (needs > 1)",
        notes=[f"in float32, {same} of the answers are those of one after another",
               f"4 layers of 256, whose weights stay in the cache: {small_gain:.1f} times one after another",
               "one machine, no GPU; FasterTransformer, the paper's baseline, was not run"],
    )  # fmt: skip


def llama(seed: int, width: int, depth: int) -> LlamaForCausalLM:
    """Untrained, with weights large enough that it does not repeat one token."""
    torch.manual_seed(seed)
    heads = max(2, width // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=depth,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, initializer_range=0.1,
            eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip


def requests(rng: np.random.Generator, count: int, shortest: int, longest: int) -> Asked:
    """Prompts of random tokens, lengths uniform."""
    return [(rng.integers(VOCABULARY, size=PROMPT).tolist(), int(rng.integers(shortest, longest + 1)))
            for _ in range(count)]  # fmt: skip


@torch.inference_mode()
def batch(model: LlamaForCausalLM, asked: Asked, told: Callable[[int], None] = lambda step: None) -> list[list[int]]:
    """All in one batch until the longest is done; a bare loop, as fast as there is with transformers' own cache."""
    ids, cache = torch.tensor([prompt for prompt, _ in asked]), DynamicCache(config=model.config)
    columns = []
    for step in range(max(n for _, n in asked)):
        ids = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        columns.append(ids)
        told(step)
    made = torch.cat(columns, 1).tolist()
    return [row[:n] for row, (_, n) in zip(made, asked, strict=True)]


@dataclass
class Run:
    """Tokens of every request, processor time in all threads, forward passes, and the share of rows that were tokens.

    `crowded` is the pace, in tokens a second, while as many requests were active as there are slots.
    """

    tokens: list[list[int]]
    seconds: float
    passes: int = 0
    useful: float = 1.0
    crowded: float = 0.0

    @property
    def pace(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def sequential(model: LlamaForCausalLM, asked: Asked) -> Run:
    begun = time.process_time()
    made = [batch(model, [one])[0] for one in asked]
    return Run(made, time.process_time() - begun, sum(n for _, n in asked))


def static(model: LlamaForCausalLM, asked: Asked) -> Run:
    """Batches of as many as there are slots, in the order of arrival."""
    begun, made, passes, rows = time.process_time(), [], 0, 0
    for start in range(0, len(asked), SLOTS):
        part = asked[start : start + SLOTS]
        made += batch(model, part)
        longest = max(n for _, n in part)
        passes, rows = passes + longest, rows + longest * len(part)
    return Run(made, time.process_time() - begun, passes, sum(n for _, n in asked) / rows)


def fused(decoder: FusedDecoder, asked: Asked) -> Run:
    passes, rows, begun = decoder.iterations + decoder.prefills, decoder.rows, time.process_time()
    found = [decoder.submit(prompt, n) for prompt, n in asked]
    decoder.step()
    while decoder.waiting:
        decoder.step()
    crowded = sum(len(one.tokens) for one in found) / (time.process_time() - begun)
    decoder.run()
    spent = time.process_time() - begun
    useful = sum(n - 1 for _, n in asked) / (decoder.rows - rows)
    return Run([one.tokens for one in found], spent, decoder.iterations + decoder.prefills - passes, useful, crowded)


@contextmanager
def transformers_batching(model: LlamaForCausalLM) -> Iterator[Callable[[Asked], list[list[int]]]]:
    """transformers' continuous batching, set up once; it may decode all at once."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation_config=settings, block=True, timeout=5) as manager:

        def answer(asked: Asked) -> list[list[int]]:
            names = [manager.add_request(prompt, max_new_tokens=n) for prompt, n in asked]
            found: dict[str, list[int]] = {}
            while len(found) < len(names):
                one = manager.get_result(timeout=1)
                if one is not None and one.is_finished():
                    found[one.request_id] = list(one.generated_tokens)
                elif one is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended early")
            return [found[name] for name in names]

        yield answer


# --- what is compared -------------------------------------------------------------------------------------------------


def throughput(model: LlamaForCausalLM, asked: Asked, progress: Progress) -> tuple[list[dict], float, float, str]:
    """Rows of the table, the gain over one after another, that over transformers, and how many answers are alike.

    What is compared runs in several rounds, by turns, on what was set up once, and the best of each way counts: other
    work on the machine slows some rounds down. One after another answers its share of the requests in each round.
    """
    count, decoders = len(asked), {slots: FusedDecoder(model, slots, 160) for slots in (SLOTS, len(asked))}
    ways: dict[str, Callable[[Asked], Run]] = {
        "one after another": lambda own: sequential(model, own),
        f"flover, {SLOTS} slots": lambda own: fused(decoders[SLOTS], own),
        f"flover, {count} slots": lambda own: fused(decoders[count], own),
        f"batches of {SLOTS}": lambda own: static(model, own),
        f"flover, {SLOTS} slots, gaps left": lambda own: fused(FusedDecoder(model, SLOTS, 160, compact=False), own),
    }
    found: dict[str, list[Run]] = {name: [] for name in ways}
    peer: list[Run] = []
    begun = time.process_time()
    with transformers_batching(model) as answer:
        answer(asked[:2])
        ready = time.process_time() - begun
        for turn in range(ROUNDS):
            for name, way in list(ways.items())[: None if turn == 0 else 3]:  # one round of what is not compared
                found[name].append(way(asked[turn::ROUNDS] if name == "one after another" else asked))
            begun = time.process_time()
            made = answer(asked)
            peer.append(Run(made, time.process_time() - begun))
            progress("throughput", turn + 1, ROUNDS)
    rows = []
    for name, runs in found.items():
        row = {"name": name, "tokens/s": round(max(run.pace for run in runs))}
        if name == f"flover, {SLOTS} slots":
            row["while all slots are taken"] = round(max(run.crowded for run in runs))
        passes = sum(run.passes for run in runs) if name == "one after another" else runs[0].passes
        rows.append(row | {"passes": passes, "useful rows": f"{runs[0].useful:.0%}"})
    theirs = max(run.pace for run in peer)
    rows.append({"name": f"generate_batch, {count} at once", "tokens/s": round(theirs),
                 "set-up": f"{ready:.1f} s before"})  # fmt: skip
    alone, mine, wide = (found[name] for name in list(ways)[:3])
    answers = [alone[i % ROUNDS].tokens[i // ROUNDS] for i in range(count)]
    same = sum(a == b for a, b in zip(mine[0].tokens, answers, strict=True))
    gain = max(run.crowded for run in mine) / max(run.pace for run in alone)
    return rows, gain, max(run.pace for run in wide) / theirs, f"{same} of {count}"


class Clock:
    """Seconds of processor time, and of waiting, which is skipped."""

    def __init__(self) -> None:
        self._zero = time.process_time()

    def __call__(self) -> float:
        return time.process_time() - self._zero

    def wait_until(self, when: float) -> None:
        self._zero -= max(0.0, when - self())


def latency(model: LlamaForCausalLM, rng: np.random.Generator) -> list[dict]:
    """Time to the first and the last token under Poisson arrivals; each way lives through the same ones."""
    asked, gaps = requests(rng, 32, 16, 128), rng.exponential(0.05, 32)
    arrivals = np.cumsum(gaps) - gaps[0]
    ways = {"flover": _live_fused, "batches that wait": _live_batches,
            "one after another": lambda *args: _live_batches(*args, most=1, patience=0.0)}  # fmt: skip
    rows = []
    for name, way in ways.items():
        first, last = way(model, asked, arrivals)
        rows.append({"name": f"arrivals: {name}",
                     "first token, mean and p95": f"{1e3 * first.mean():.0f}, {1e3 * np.quantile(first, 0.95):.0f} ms",
                     "last": f"{1e3 * last.mean():.0f}, {1e3 * np.quantile(last, 0.95):.0f} ms"})  # fmt: skip
    return rows


def _live_fused(model: LlamaForCausalLM, asked: Asked, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    decoder, clock, came = FusedDecoder(model, SLOTS, 160), Clock(), 0
    first, last = np.zeros(len(asked)), np.zeros(len(asked))

    def tell(i: int) -> Callable:
        def on_token(request: Request) -> None:
            last[i] = clock() - arrivals[i]
            if len(request.tokens) == 1:
                first[i] = last[i]

        return on_token

    while came < len(asked) or decoder.busy:
        if not decoder.busy:
            clock.wait_until(arrivals[came])
        while came < len(asked) and arrivals[came] <= clock():
            decoder.submit(*asked[came], on_token=tell(came))
            came += 1
        decoder.step()
    return first, last


def _live_batches(
    model: LlamaForCausalLM, asked: Asked, arrivals: np.ndarray, most: int = SLOTS, patience: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """A batch begins when it is full or its first member has waited `patience`; every token is given out at once."""
    clock, at = Clock(), 0
    first, last = np.zeros(len(asked)), np.zeros(len(asked))
    while at < len(asked):
        full = arrivals[min(at + most, len(asked)) - 1]
        clock.wait_until(min(full, arrivals[at] + patience))
        chosen = range(at, min(at + most, int(np.searchsorted(arrivals, clock(), side="right"))))

        def told(step: int, chosen: Sequence[int] = chosen) -> None:
            for i in chosen:
                if step == 0:
                    first[i] = clock() - arrivals[i]
                if step == asked[i][1] - 1:
                    last[i] = clock() - arrivals[i]

        batch(model, [asked[i] for i in chosen], told)
        at = chosen.stop
    return first, last


# --- exact properties -------------------------------------------------------------------------------------------------


def exactness(model: LlamaForCausalLM, asked: Asked, rng: np.random.Generator) -> dict[str, bool]:
    """In float64: tokens and counts, with arrivals at random iterations."""
    when = np.sort(rng.integers(0, 40, len(asked)))
    ways = [GREEDY if i % 2 else Sampling(0.8, top_p=0.95, seed=i) for i in range(len(asked))]
    decoder, found, at = FusedDecoder(model, 5, 64), [], 0
    busy = contiguous = 0
    while at < len(asked) or decoder.busy:
        while at < len(asked) and when[at] <= busy:
            found.append(decoder.submit(*asked[at], ways[at]))
            at += 1
        before = decoder.rows
        decoder.step()
        busy += 1
        contiguous += decoder.high - decoder.low == decoder.active and decoder.rows - before <= 5
    greedy, drawn = [], []
    for one, (prompt, n), way in zip(found, asked, ways, strict=True):
        if way is GREEDY:
            greedy.append(one.tokens == batch(model, [(prompt, n)])[0])
        else:
            single = FusedDecoder(model, 1, 64)
            alone = single.submit(prompt, n, way)
            single.run()
            drawn.append(one.tokens == alone.tokens)
    total = sum(n for _, n in asked)
    burst = FusedDecoder(model, len(asked), 64)
    for prompt, n in asked:
        burst.submit(prompt, n)
    burst.run()
    return {
        "greedy tokens are those of a request alone": all(greedy),
        "sampled tokens too, whatever the neighbours": all(drawn),
        "every row computed is a token": decoder.rows == burst.rows == total - len(asked),
        "as many iterations as the longest answer takes": burst.iterations == max(n for _, n in asked) - 1,
        "active slots are side by side": contiguous == busy,
    }


def fewest(slots: int) -> dict[tuple[bool, ...], int]:
    """By breadth-first search: the moves of one occupant to a free slot that make any occupancy contiguous."""
    patterns = itertools.product([False, True], repeat=slots)
    distance = {p: 0 for p in patterns if "0" not in "".join("01"[x] for x in p).strip("0")}
    frontier = list(distance)
    while frontier:
        following = []
        for p in frontier:
            for source, target in itertools.permutations(range(slots), 2):
                if p[source] and not p[target]:
                    q = tuple(target == i or (x and source != i) for i, x in enumerate(p))
                    if q not in distance:
                        distance[q] = distance[p] + 1
                        following.append(q)
        frontier = following
    return distance


def fewest_moves(rng: np.random.Generator) -> bool:
    """Whether the plans of random occupancies end contiguous, after as many moves as the search found to be fewest."""
    least = {slots: fewest(slots) for slots in range(1, 11)}
    for _ in range(PATTERNS):
        occupied = (rng.random(rng.integers(1, 11)) < rng.random()).tolist()
        moves, after = minimal_moves(occupied), list(occupied)
        for source, target in moves:
            if not after[source] or after[target]:
                return False
            after[source], after[target] = False, True
        table = least[len(occupied)]
        if len(moves) != table[tuple(occupied)] or table[tuple(after)]:
            return False
    return True


def _rank(rank: int, seed: int) -> tuple:
    """One of two ranks, each late at random."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = llama(seed, width=64, depth=2).double()
    decoder = FusedDecoder(split(model, mesh), 4, 64, ranks=mesh.get_group())
    rng, late = np.random.default_rng(seed), np.random.default_rng(rank)
    found = []
    with CommCounter(mesh) as counter:
        if rank == 0:
            for i, (prompt, n) in enumerate(requests(rng, 8, 4, 12)):
                found.append(decoder.submit(prompt, n, Sampling(0.8 * (i % 2), seed=i)))
                if i % 3 == 2:  # three come between two iterations
                    time.sleep(0.01 * late.random())
                    decoder.step()
            decoder.run()
            decoder.close()
        while not decoder.closed:
            time.sleep(0.01 * late.random())
            decoder.step()
    traffic = {kind: counter[kind, "tp"].calls for kind in ("all_reduce", "all_gather")}
    return [one.tokens for one in found], list(decoder.admitted), decoder.iterations + decoder.prefills, traffic


def ranks(seed: int) -> dict[str, bool]:
    (tokens, order, passes, traffic), (_, other, _, _) = local(_rank, 2, seed)
    decoder = FusedDecoder(llama(seed, width=64, depth=2).double(), 4, 64)
    asked = requests(np.random.default_rng(seed), 8, 4, 12)
    found = [decoder.submit(*one, Sampling(0.8 * (i % 2), seed=i)) for i, one in enumerate(asked)]
    decoder.run()
    return {
        "two ranks: the same tokens": tokens == [one.tokens for one in found],
        "two ranks: admitted in one order": order == other and len(order) == len(asked),
        "two ranks: 2 all-reduces a layer and a gather": traffic == {"all_reduce": 4 * passes, "all_gather": passes},
    }
