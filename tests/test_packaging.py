"""What pyproject.toml asks for goes together with what constraints.txt pins, extras and all."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {canonicalize_name(name): version for name, _, version in
        (line.partition("==") for line in CONSTRAINTS.read_text().splitlines())}  # fmt: skip


def wants(text: str) -> Requirement | None:
    """A requirement, if it is one of this platform without extras."""
    requirement = Requirement(text)
    marker = requirement.marker
    return requirement if marker is None or marker.evaluate({"extra": ""}) else None


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_everything_that_is_asked_for_by_name_is_pinned_to_a_version_that_will_do(extra):
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin, prereleases=True), f"{text} is pinned to {pin}"


def test_what_is_installed_as_pinned_takes_the_other_pins():
    for name, version in PINS.items():
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra, or of another platform
        for requirement in filter(None, map(wants, found.requires or [])) if found.version == version else ():
            pin = PINS.get(canonicalize_name(requirement.name))
            assert pin is None or requirement.specifier.contains(pin, prereleases=True), f"{name}: {requirement}, {pin}"


def pip(*words: str, seconds: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no package index answers."""
    probe = f"packaging=={PINS['packaging']}"
    try:
        found = pip("--no-deps", "--ignore-installed", "--retries", "0", "--timeout", "5", probe, seconds=20)
    except subprocess.TimeoutExpired:
        pytest.skip("no package index answers in time")
    if found.returncode:
        pytest.skip("no package index can be reached")


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_can_be_installed_under_the_constraints(index, extra):
    done = pip("-c", str(CONSTRAINTS), *PROJECT["dependencies"], *EXTRAS[extra], seconds=90)
    assert done.returncode == 0, done.stderr
