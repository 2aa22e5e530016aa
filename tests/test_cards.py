"""Every card, walked: what it says must be there and must be so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import frameloom
from frameloom.cards import card, cards, chosen
from frameloom.claims import base as claims
from frameloom.errors import InputError
from frameloom.training.pretrained import load, save_pretrained, shipped

ROOT = Path(__file__).parents[1]
METHODS = [found.id for found in cards().values() if found.kind == "method"]
NETWORKS = [found.id for found in cards().values() if found.sizes]
PAPER = [found.id for found in cards().values() if "paper" in found.sizes]


@pytest.mark.parametrize("method", cards())
def test_its_verb_is_a_function_and_a_page_and_its_class_loads(method):
    found = card(method)
    assert callable(getattr(frameloom, found.verb))
    page = ROOT / "docs" / "verbs" / f"{found.verb}.md"
    assert f"`{method}`" in page.read_text()
    assert found.load_class().__doc__
    assert found.module.startswith(("frameloom.tasks.", "frameloom.scale."))


@pytest.mark.parametrize("method", METHODS)
def test_a_published_method_has_a_citation_a_claim_and_limits(method):
    found = card(method)
    entry = found.bibtex()
    assert found.title in entry
    assert found.arxiv in entry
    assert all(author in entry for author in found.authors)
    assert found.limits
    module = f"frameloom.claims.{method.replace('-', '_')}"
    assert callable(__import__(module, fromlist=["run"]).run)


@pytest.mark.parametrize("method", NETWORKS)
def test_tiny_is_built_saved_and_loaded_with_the_same_weights(method, tmp_path):
    kind = card(method).load_class()
    torch.manual_seed(0)
    model = kind(kind.preset("tiny"))
    save_pretrained(model, method, tmp_path)
    again = load(method, tmp_path)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("method", PAPER)
def test_paper_size_has_the_published_number_of_parameters(method):
    found = card(method)
    kind = found.load_class()
    with torch.device("meta"):
        model = kind(kind.preset("paper"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(found.paper_parameters, rel=found.paper_tolerance or 1e-12)


@pytest.mark.parametrize("method", [found.id for found in cards().values() if found.weights])
def test_shipped_weights_are_what_the_card_says(method):
    weights = card(method).weights
    folder = shipped(method)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 13_000_000
    model = load(method)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == weights.parameters
    assert weights.command.startswith(f"frameloom train {method} ")


def test_the_shipped_generators_fit_in_25_megabytes_together():
    shipping = [found.id for found in cards().values() if found.makes_video and found.weights]
    assert len(shipping) == 7
    assert sum(path.stat().st_size for method in shipping for path in shipped(method).iterdir()) < 25_000_000


def test_weights_of_another_method_are_refused_by_both_names(tmp_path):
    first, second = NETWORKS[:2]
    kind = card(first).load_class()
    save_pretrained(kind(kind.preset("tiny")), first, tmp_path)
    with pytest.raises(InputError, match=f"these are weights of {first}, not of {second}"):
        load(second, tmp_path)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_damaged_weights_are_one_line(tmp_path, damage):
    kind = card("vfimamba").load_class()
    save_pretrained(kind(kind.preset("tiny")), "vfimamba", tmp_path)
    data = bytearray((tmp_path / damage).read_bytes())
    (tmp_path / damage).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not weights of a frameloom method"):
        load("vfimamba", tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(InputError, match=f"holds no {damage}"):
        load("vfimamba", tmp_path)


def test_the_readme_lists_every_method_and_every_claim_that_was_run():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    for one in cards().values():
        assert f"`{one.id}`" in text
        assert not one.result or one.result["summary"] in text


def test_every_verb_has_one_method_for_auto():
    for verb in {found.verb for found in cards().values()}:
        own = [found for found in cards().values() if found.verb == verb and found.auto]
        lent = [found for found in cards().values() if verb in found.also and found.auto]
        assert len(own or lent) == 1
        assert chosen("auto", verb) in cards()


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(InputError, match=r"did you mean vfimamba\?"):
        card("vfimaba", "interpolate")
    with pytest.raises(InputError, match="x264 is a method for compress, not for interpolate"):
        card("x264", "interpolate")


def test_a_claim_whose_check_fails_does_not_hold():
    result = claims.Result("m", "p", "s", [{"name": "a"}], {"exact": False}, holds=True, summary="+9 dB")
    assert not result.holds
    assert "exact FAILED" in "\n".join(result.lines())
    with pytest.raises(InputError, match="a baseline has no claim"):
        claims.run_claim("blend")


def test_importing_the_package_and_its_help_imports_nothing_heavy():
    for code in ("import frameloom, frameloom.cards; frameloom.cards.cards()",
                 "import sys; sys.argv = ['frameloom', '--help']\n"
                 "from frameloom.cli.app import app\n"
                 "try: app()\nexcept SystemExit: pass"):  # fmt: skip
        check = f"{code}\nimport sys\nprint([m for m in ('torch', 'numpy', 'av', 'cv2') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("[]")
