"""How long `frameloom --help` takes, beside a bare Typer app and `python -c pass`; the bar is 0.35 s.

python benchmarks/startup.py [--rounds 9] [--json]
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

BARE = """
import typer
app = typer.Typer()
@app.command()
def one(x: str): pass
@app.command()
def two(x: str): pass
app(args=['--help'])
"""


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    commands = {"python -c pass": ["-c", "pass"], "bare typer --help": ["-c", BARE],
                "frameloom --help": ["-m", "frameloom", "--help"]}  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, arguments in commands.items():
            found[name].append(seconds([sys.executable, *arguments]))
    report = {name: round(median(values), 3) for name, values in found.items()}
    print(json.dumps(report) if options.json else "\n".join(f"{name:20} {value} s" for name, value in report.items()))


if __name__ == "__main__":
    main()
