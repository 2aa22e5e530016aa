"""Two hundred clients at once on `frameloom serve`, half of whom leave early: what is lost, mixed or kept in memory.

    python benchmarks/serve.py [--clients 200] [--tokens 48] [--rounds 3] [--json]

The server is a process of its own on the small model that ships; every client that stays checks its tokens against
those of the same request decoded alone here. A client that is told to come again (429) does, after a while.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time

import httpx
import numpy as np
import psutil
import torch

from frameloom.scale.flover import FusedDecoder
from frameloom.scale.sampling import Sampling
from frameloom.scale.serve import open_served

BEGINNINGS = ("a small red", "a large", "the camera", "a person", "a small blue ball", "a large green box slides")


def asked(number: int, tokens: int) -> dict:
    return {"prompt": BEGINNINGS[number % len(BEGINNINGS)], "max_tokens": tokens, "temperature": 1.5, "seed": number}


def alone(clients: int, tokens: int) -> list[list[int]]:
    """What every client must be answered, one after another."""
    model, found = open_served(None), []
    decoder = FusedDecoder(model.model, 1, 64, eos=model.eos)
    for number in range(clients):
        request = decoder.submit(model.text.encode(asked(number, tokens)["prompt"]), tokens, Sampling(1.5, seed=number))
        decoder.run()
        found.append(request.tokens)
    return found


async def client(http: httpx.AsyncClient, number: int, tokens: int, leaves: bool) -> tuple:
    """(tokens or None for who left, seconds to the first token, seconds in all, times refused)"""
    begun, first, refused = time.perf_counter(), None, 0
    while True:
        got: list[int] = []
        async with http.stream("POST", "/v1/completions", json=asked(number, tokens) | {"stream": True}) as answer:
            if answer.status_code == 429:
                refused += 1
                await asyncio.sleep(random.random() * float(answer.headers["retry-after"]))
                continue
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    got += json.loads(line[6:])["choices"][0]["token_ids"]
                    first = first or time.perf_counter() - begun
                    if leaves:
                        return None, first, 0.0, refused
        return got, first, time.perf_counter() - begun, refused


async def crowd(url: str, clients: int, tokens: int) -> list[tuple]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300.0) as http:
        return await asyncio.gather(*(client(http, i, tokens, bool(i % 2)) for i in range(clients)))


def count(text: str, name: str) -> int:
    return int(re.search(rf"^{re.escape(name)} (\d+)$", text, re.MULTILINE)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = alone(options.clients, options.tokens)
    command = [sys.executable, "-m", "frameloom", "serve", "--port", "0", "--queue", str(options.clients)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    rows = []
    try:
        url = next(line for line in server.stderr if " at http" in line).split(" at ")[1].split("/v1")[0]
        for turn in range(options.rounds):
            found = asyncio.run(crowd(url, options.clients, options.tokens))
            until = time.monotonic() + 10
            while count(text := httpx.get(f"{url}/metrics").text, "frameloom_answers_open"):
                if time.monotonic() > until:
                    raise SystemExit("answers stay open after all clients are gone")
                time.sleep(0.05)
            stayed = [i for i, row in enumerate(found) if row[0] is not None]
            firsts, lasts = ([found[i][k] for i in stayed] for k in (1, 2))
            rows.append({
                "round": turn + 1, "clients": options.clients, "left early": options.clients - len(stayed),
                "wrong answers": sum(found[i][0] != wanted[i] for i in stayed),
                "refused": sum(row[3] for row in found),
                "first token p50, p95 (s)": [round(float(np.quantile(firsts, q)), 2) for q in (0.5, 0.95)],
                "whole answer p50, p95 (s)": [round(float(np.quantile(lasts, q)), 2) for q in (0.5, 0.95)],
                "cache (MB)": round(count(text, "frameloom_cache_bytes") / 1e6, 1),
                "resident (MB)": round(psutil.Process(server.pid).memory_info().rss / 1e6),
            })  # fmt: skip
    finally:
        server.terminate()
        server.wait(60)
    print(json.dumps(rows, indent=2) if options.json else "\n".join(str(row) for row in rows))
    if any(row["wrong answers"] for row in rows):
        raise SystemExit("answers were lost or mixed")


if __name__ == "__main__":
    main()
