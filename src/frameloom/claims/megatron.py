"""Megatron's PTD-P: published sizes and days from closed forms, and three kinds of parallelism that change nothing."""

import time

import torch

from frameloom.claims import spread
from frameloom.claims.base import Result
from frameloom.progress import Progress
from frameloom.scale.plan import DEVICES, GPT, plans
from frameloom.scale.ranks import local
from frameloom.scale.schedule import schedule
from frameloom.scale.simulate import Costs, calibrate, idle_share, live, simulate, sleep_table
from frameloom.tasks.generation.models.stiv import WORDS

# width, layers, heads, t, p, devices, batch, published billions of parameters, published TFLOP/s of a device
PUBLISHED = [
    (2304, 24, 24, 1, 1, 32, 512, 1.7, 137), (3072, 30, 32, 2, 1, 64, 512, 3.6, 138),
    (4096, 36, 32, 4, 1, 128, 512, 7.5, 142), (6144, 40, 48, 8, 1, 256, 1024, 18.4, 135),
    (8192, 48, 64, 8, 2, 512, 1536, 39.1, 138), (10240, 60, 80, 8, 4, 1024, 1792, 76.1, 140),
    (12288, 80, 96, 8, 8, 1536, 2304, 145.6, 148), (16384, 96, 128, 8, 16, 1920, 2160, 310.1, 155),
    (20480, 105, 128, 8, 35, 2520, 2520, 529.6, 163), (25600, 128, 160, 8, 64, 3072, 3072, 1008.0, 163),
]  # fmt: skip
FORWARD, BACKWARD, UNITS = 0.02, 0.04, 8
WAYS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Closed forms against published figures, a simulator against closed forms and real steps, ranks against one."""
    torch.manual_seed(seed)
    rows, checks = [], {}
    counts = [round(GPT(width, layers, heads).parameters / 1e9, 1) for width, layers, heads, *_ in PUBLISHED]
    checks["all ten published sizes"] = counts == [row[7] for row in PUBLISHED]
    days = GPT(12288, 96, 96).days(300e9, 1024, 140e12), GPT(25600, 128, 160).days(450e9, 3072, 163e12)
    checks["34 and 84 days of training"] = [round(one) for one in days] == [34, 84]
    checks["the formula counts a real model"] = counted()
    checks["simulator is the closed forms"] = closed_forms()
    begun = time.perf_counter()
    for width, layers, heads, t, p, devices, batch, size, rate in (PUBLISHED[4], PUBLISHED[7], PUBLISHED[9]):
        best = plans(GPT(width, layers, heads).blocks(), heads, batch, devices, DEVICES["a100"], most=2)[0]
        rows.append({"name": f"plan for {size:g}B on {devices} A100", "best p, t, d": f"{best.p}, {best.t}, {best.d}",
                     "published p, t": f"{p}, {t}", "memory": f"{best.memory / 1e9:.0f} GB",
                     "days of 300B tokens": f"{best.seconds * 300e9 / (2048 * batch) / 86400:.0f}",
                     "by the rule": f"{GPT(width, layers, heads).days(300e9, devices, rate * 1e12):.0f}"})  # fmt: skip
    spent = time.perf_counter() - begun
    progress("plans", 1, 4)

    words = ["pp=2,tp=2,dp=2,microbatches=2", "pp=2,tp=2,dp=2,microbatches=2,remat=always"]
    (losses, weights), *_ = local(spread.steps_of_gpt, 1, ["microbatches=4"])[0]
    found = local(spread.steps_of_gpt, 8, words)
    worst = max(spread.same([one[index] for one in found], weights) for index in range(len(words)))
    apart = max(abs(a - b) for one in found for way in one for a, b in zip(way[0], losses, strict=True))
    checks["8 ranks (2 x 2 x 2) end in one process's weights to 1e-11"] = max(worst, apart) < 1e-11
    orders = ["pp=2,schedule=gpipe,microbatches=4", "pp=2,schedule=1f1b,microbatches=4",
              "pp=2,schedule=interleaved,v=2,microbatches=4"]  # fmt: skip
    ranks = local(spread.steps_of_gpt, 2, orders)
    whole = [{name: value for one in ranks for name, value in one[index][1].items()} for index in range(3)]
    checks["schedules agree bit for bit"] = all(torch.equal(whole[0][name], other[name])
                                                for other in whole[1:] for name in whole[0])  # fmt: skip
    progress("ranks", 2, 4)
    rows.append({"name": "8 ranks against 1, tied embeddings, dropout, 3 steps", "weights": f"{worst:.1e}",
                 "loss": f"{apart:.1e}"})  # fmt: skip
    exact, row = bytes_sent()
    checks |= exact
    rows.append(row)
    progress("bytes", 3, 4)

    overhead = calibrate(2)
    off, best = 0.0, True
    for p in (2, 4):
        took = [max(one) for one in zip(*local(sleep_table, p, p, [(UNITS, name, v) for name, v in WAYS], FORWARD,
                                               BACKWARD), strict=True)]  # fmt: skip
        said = [simulate(schedule(name, p, UNITS, v), Costs(FORWARD / v, BACKWARD / v, overhead=overhead)).length
                for name, v in WAYS]  # fmt: skip
        off = max(off, *(abs(a / b - 1) for a, b in zip(took, said, strict=True)))
        # The simulator's v must be the measured best, or within 2% of it: v = 2 and 4 differ by less at two stages.
        best &= took[said.index(min(said))] <= 1.02 * min(took)
        rows.append({"name": f"ms a step, {p} ranks"} | {f"{name} {v}": f"{1e3 * a:.0f} ({1e3 * b:.0f})"
                     for (name, v), a, b in zip(WAYS, took, said, strict=True)})  # fmt: skip
    progress("time", 4, 4)
    return Result(
        "megatron",
        paper="502 petaFLOP/s on 3,072 A100 (52% of peak) for a trillion parameters; interleaving gains 10% and more",
        setting=f"closed forms of the published table; gloo ranks on this machine; stages that sleep "
        f"{1e3 * FORWARD:.0f} and {1e3 * BACKWARD:.0f} ms, {1e3 * overhead:.2f} ms an action calibrated",
        rows=rows,
        checks=checks,
        holds=off <= 0.05 and best,
        summary=f"real steps within {100 * off:.1f}% of the simulator (needs <= 5), the v it names "
        f"{'is' if best else 'IS NOT'} the measured best; published sizes and days reproduced; three plans of up to "
        f"3,072 devices in {spent:.1f} s",
        notes=["in brackets what the simulator says; nothing here was run on the devices that plans name"],
    )


def counted() -> bool:
    """The closed form against the parameters of a real GPT-2 of transformers (which has one more norm at the end)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        shape = GPT2Config(vocab_size=640, n_positions=64, n_embd=48, n_layer=3, n_head=4, bos_token_id=None,
                           eos_token_id=None)  # fmt: skip
        model = GPT2LMHeadModel(shape)
    formula = GPT(48, 3, 4, sequence=64, vocabulary=640).parameters
    return sum(value.numel() for value in model.parameters()) == round(formula) + 2 * 48


def closed_forms() -> bool:
    """Idle share and live micro-batches of the simulator against the formulas, for small and large pipelines."""
    for p, m in ((2, 4), (4, 8), (8, 32), (16, 64), (64, 128)):
        for name, v in [*WAYS, ("interleaved", 8)]:
            made = schedule(name, p, m, v)
            idle = simulate(made, Costs(1.0 / v, 2.0 / v)).idle(0)
            if abs(idle - idle_share(name, p, m, v)) > 1e-9 or made.live(0) != live(name, p, m, v):
                return False
    return True


def bytes_sent() -> tuple[dict[str, bool], dict[str, str]]:
    """What split matrices and boundaries send, against the formulas."""
    m, layers = 2, spread.SMALL.depth // 2
    words = ["pp=2,tp=2,microbatches=2", "pp=2,tp=2,microbatches=2,scatter=off"]
    cut, uncut = local(spread.traffic, 4, words)[0]
    c = spread.SMALL
    tokens = spread.BATCH // m * c.frames * c.side**2 * c.width * 4
    sentence = spread.BATCH // m * WORDS.length * c.width * 4
    checks = {
        # Three attentions and a feed-forward network, a sum each way; the text's own gradient is one more.
        "all-reduces of split matrices are 8 a layer and the text's": cut["all_reduce", "tp"]
        == (9 * m * layers, m * layers * (8 * tokens + sentence)),
        "a boundary crosses once with scatter, t times without": uncut["send", "pp"][1] == 2 * cut["send", "pp"][1],
    }
    return checks, {"name": "sent to the next stage, a rank", "scatter=on": f"{cut['send', 'pp'][1]:,} bytes",
                    "scatter=off": f"{uncut['send', 'pp'][1]:,} bytes"}  # fmt: skip
