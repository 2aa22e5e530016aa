"""Blocks that come and go: nothing about a model changes but its memory."""

import json
import tempfile
import threading
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import frameloom as fl
import tiny_pipelines
from frameloom.claims import superpipeline as claim
from frameloom.cli.make import parse_stream
from frameloom.errors import InputError
from frameloom.memory import PeakMemory
from frameloom.scale import store as stores
from frameloom.scale.blocks import take_apart
from frameloom.scale.store import Checkpoint, DiskStore, RamStore
from frameloom.scale.stream import pass_time, stream
from frameloom.scale.window import Layout

N = 6


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, n: int = N, width: int = 16) -> None:
        super().__init__()
        self.inlet = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n))
        self.head = nn.Linear(width, width)

    def forward(self, x, order=None):
        x = self.inlet(x)
        for block in self.blocks if order is None else [self.blocks[i] for i in order]:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def x() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


# --- inference -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 7), k_prime=st.integers(1, 7), pin=st.integers(0, 6), disk=st.booleans(),
       strict=st.booleans())  # fmt: skip
@example(k=3, k_prime=2, pin=0, disk=True, strict=True)
@example(k=4, k_prime=2, pin=1, disk=False, strict=True)
def test_output_is_equal_and_loads_are_counted_for_every_window(k, k_prime, pin, disk, strict):
    if pin >= k or k_prime > k - pin:
        return
    n = 7  # a prime: groups of k' never come out even
    model = Stack(n)
    with torch.no_grad():
        want = model(x())
        with stream(model, k, k_prime, pin=pin, store="disk" if disk else "ram", strict=strict) as streamed:
            for _ in range(3):
                before = streamed.loads
                assert torch.equal(model(x()), want)
                loads = streamed.loads - before
                # A window that reaches around the whole circle finds some blocks still there.
                most = n - pin if k < n else 0
                assert loads == most if strict and k + k_prime <= n else loads <= most
            assert streamed.window.misses == 0
            block = sum(value.numel() * 4 for value in model.blocks[0].parameters())
            assert streamed.window.bytes == (k if strict else min(n, k + k_prime)) * block
        assert torch.equal(model(x()), want)


def test_peak_is_k_blocks_and_the_rest_and_a_pass_adds_no_byte(tmp_path):
    assert claim.peak_is_exact(tmp_path)


def test_weights_do_not_stay_referenced_by_anything():
    model = Stack()
    gone = [weakref.ref(value.untyped_storage()) for value in model.blocks.parameters()]
    stays = [weakref.ref(value.untyped_storage()) for value in model.head.parameters()]
    with stream(model, 2, store="disk"), torch.no_grad():
        model(x())
        assert not any(ref() for ref in gone)
        assert all(ref() for ref in stays)


def test_the_tail_of_a_pass_loads_the_head_of_the_next():
    model = Stack()
    with stream(model, 2, 1, store="disk") as streamed, torch.no_grad():
        model(x())
        # Blocks 0 and 1 are there or on their way before anybody asks.
        assert sorted(streamed.window._where) == [0, 1]


def test_another_order_than_that_of_definition_is_learned():
    model, order = Stack(), [3, 1, 5, 0, 4, 2]
    with torch.no_grad():
        want = model(x(), order)
        with stream(model, 2, 1, store="ram") as streamed:
            assert torch.equal(model(x(), order), want)
            assert streamed.window.misses > 0
            model(x(), order)
            before, missed = streamed.loads, streamed.window.misses
            assert torch.equal(model(x(), order), want)
            assert (streamed.loads - before, streamed.window.misses - missed) == (N, 0)
            some = model(x(), [0, 0, 1, 0, 5])
        assert torch.equal(model(x(), [0, 0, 1, 0, 5]), some)


def test_blocks_that_a_pass_leaves_out_are_not_loaded_for_it():
    model, part = Stack(), [2, 3, 4, 5]
    with stream(model, 2, 1, store="ram") as streamed, torch.no_grad():
        model(x())
        for _ in range(3):
            before, missed = streamed.loads, streamed.window.misses
            model(x(), part)
        assert (streamed.loads - before, streamed.window.misses - missed) == (len(part), 0)


def test_pinned_blocks_are_spread_and_never_leave():
    model = Stack()
    with stream(model, 4, 1, pin=2, store="disk") as streamed, torch.no_grad():
        assert sorted(streamed.plan.kept) == [1, 4]
        slots = {i: streamed.window._where[i] for i in (1, 4)}
        for _ in range(2):
            model(x())
        assert {i: streamed.window._where[i] for i in (1, 4)} == slots


def test_a_block_that_returns_its_own_weight_keeps_it():
    class Giver(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), value))

        def forward(self):
            return self.weight.view(2, 2)

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.givers = nn.ModuleList(Giver(float(i)) for i in range(5))

        def forward(self):
            return [giver() for giver in self.givers]

    model = Asks()
    with stream(model, 1, store="ram"), torch.no_grad():
        assert [float(value[0, 0]) for value in model()] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_every_parameter_in_a_slot_is_aligned_as_an_allocation_would_be():
    odd = nn.Sequential(*(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)) for _ in range(3)))
    for block in take_apart(odd).blocks:
        layout = Layout.of(block)
        assert [place.begin for place in layout.places.values()] == [0, 64, 128, 192]
        assert layout.bytes == 256


# --- training ------------------------------------------------------------------------------------------------------


def pair() -> tuple[nn.Module, nn.Module]:
    first, second = Stack(), Stack()
    second.load_state_dict(first.state_dict())
    return first, second


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, N), k_prime=st.integers(1, N), disk=st.booleans(), again=st.booleans())
def test_gradients_and_trained_weights_are_equal(k, k_prime, disk, again):
    if k_prime > k:
        return
    model, plain = pair()

    def loss(one):
        if not again:
            return one(x()).square().mean()
        out = one.inlet(x())
        for block in one.blocks:
            out = checkpoint(block, out, use_reentrant=False)
        return one.head(out).square().mean()

    optimisers = [torch.optim.AdamW(one.parameters(), 1e-2) for one in (model, plain)]
    with stream(model, k, k_prime, store="disk" if disk else "ram") as streamed:
        for _ in range(2):
            before = streamed.loads
            for one, optimiser in zip((model, plain), optimisers, strict=True):
                optimiser.zero_grad()
                (0.5 * loss(one)).backward()
                loss(one).backward()  # gradients add up
            for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(mine.grad, other.grad)
            for optimiser in optimisers:
                optimiser.step()
            assert streamed.loads - before == 2 * 2 * (N - k)
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_two_passes_before_one_backward_and_inference_mode_in_between():
    model, plain = pair()
    with stream(model, 2, 1, store="disk"):
        for one in (model, plain):
            first, second = one(x()), one(x() + 1)
            with torch.inference_mode():
                between = one(x())
            assert torch.equal(between, first)
            (first * second).sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_checkpointing_around_a_block_still_drops_its_activations():
    model, kept = Stack(), []
    with stream(model, 2, store="disk"):
        for again in (False, True):
            with PeakMemory() as meter:
                out = x()
                for block in model.blocks:
                    out = checkpoint(block, out, use_reentrant=False) if again else block(out)
                kept.append(meter.alive)
            out.sum().backward()
    assert kept[1] < 0.5 * kept[0]


def test_new_weights_reach_blocks_that_are_in_the_window_or_on_their_way():
    model, other = Stack(), Stack()
    with torch.no_grad(), stream(model, 3, 1, store="disk"):
        model(x())
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x()), other(x()))
        assert torch.equal(model(x()), other(x()))


# --- real models ---------------------------------------------------------------------------------------------------


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=50)  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.arange(7)[None]}


def gpt():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=5, n_head=4, vocab_size=50, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(7)[None]}


def unet():
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
                                 cross_attention_dim=16, layers_per_block=1,
                                 down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                                 up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))  # fmt: skip
    return model, {"sample": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([7]),
                   "encoder_hidden_states": torch.randn(1, 2, 16)}  # fmt: skip


def stiv():
    from frameloom.tasks.generation.models.stiv import STIV, Config

    model = STIV(Config(width=192, depth=5, heads=2, channels=4, text_width=8))
    for value in model.parameters():
        nn.init.normal_(value, std=0.05)
    return model, {"x": torch.randn(1, 3, 4, 2, 2), "t": torch.rand(1), "text": torch.randn(1, 2, 8),
                   "known": torch.ones(1, 2, dtype=torch.bool)}  # fmt: skip


def ltx():
    return claim.small(5), claim.inputs(1)


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("make", [llama, gpt, unet, stiv, ltx])
def test_it_streams_models_of_transformers_diffusers_and_ours(make):
    model, inputs = make()
    model.eval()
    want = first(model(**inputs))
    want.square().mean().backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    with stream(model, 2, 1, store="disk") as streamed:
        with torch.no_grad():
            for _ in range(3):
                before, missed = streamed.loads, streamed.window.misses
                assert torch.equal(first(model(**inputs)), want)
            assert (streamed.loads - before, streamed.window.misses - missed) == (streamed.plan.n, 0)
        first(model(**inputs)).square().mean().backward()
        assert streamed.plan.bytes < 0.75 * streamed.plan.whole
    for name, value in model.named_parameters():
        assert name not in grads or torch.equal(value.grad, grads[name]), name
    assert torch.equal(first(model(**inputs)), want)


def test_the_blocks_that_are_found():
    names = [block.name for block in take_apart(gpt()[0]).blocks]
    assert names == [f"transformer.h.{i}" for i in range(5)]
    names = [block.name for block in take_apart(stiv()[0]).blocks]
    assert names == [f"blocks.{i}" for i in range(5)]  # and not the six little networks of the micro-conditions
    names = [block.name for block in take_apart(unet()[0]).blocks]
    assert "up_blocks.1.resnets.0" in names  # the levels differ, and are opened


def test_tokens_of_a_language_model_are_the_same():
    model, inputs = llama()
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with stream(model, 2, store="disk"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)


def test_tied_parameters_stay_and_are_listed():
    model = Stack()
    model.blocks[3].up.weight = model.blocks[1].up.weight
    model.head.weight = model.blocks[2].down.weight = nn.Parameter(torch.randn(16, 32))
    model.head.forward = lambda y: y
    want = model(x())
    want.sum().backward()
    grad = model.blocks[1].up.weight.grad.clone()
    model.zero_grad()
    with stream(model, 2, store="disk") as streamed:
        assert set(streamed.tied) == {"blocks.1.up.weight", "blocks.3.up.weight", "blocks.2.down.weight", "head.weight"}
        out = model(x())
        out.sum().backward()
    assert torch.equal(out, want)
    assert torch.equal(model.blocks[1].up.weight.grad, grad)


@pytest.mark.parametrize("name", ["cogvideox", "text-to-video", "animatediff"])
def test_a_pipeline_in_a_folder_makes_the_same_video_from_less_memory(name, tmp_path):
    folder = tiny_pipelines.saved(name, tmp_path)
    given = {"weights": str(folder), "steps": 2, "frames": 5 if name == "cogvideox" else 4, "seed": 3}
    whole = fl.generate("a red ball", **given)
    clip = fl.generate("a red ball", stream={"k": 1}, **given)
    (streamed,) = clip.source.streams
    assert streamed.plan.bytes < streamed.plan.whole
    for mine, other in zip(clip.source.frames(), whole.source.frames(), strict=True):
        assert torch.equal(mine.rgb, other.rgb)
    assert streamed.loads > streamed.plan.n


@pytest.mark.parametrize("name", ["stiv", "world-unet3d", "digits-16"])
def test_shipped_models_make_the_same_video_streamed(name):
    given = {"weights": name, "steps": 2, "seed": 1}
    prompt = "3" if name.startswith("digits") else "a red ball rolls left"
    whole = fl.generate(prompt, **given)
    clip = fl.generate(prompt, stream={"k": 3, "k2": 1, "keep": 1, "store": "disk"}, **given)
    for mine, other in zip(clip.source.frames(), whole.source.frames(), strict=True):
        assert torch.equal(mine.rgb, other.rgb)


def test_the_flag_is_read_and_its_mistakes_are_one_line():
    assert parse_stream("k=4, k2=2,keep=1,store=ram") == {"k": 4, "k2": 2, "keep": 1, "store": "ram"}
    assert parse_stream("auto,budget=2GB") == {"budget": 2_000_000_000}
    assert parse_stream(None) is None
    for text, line in (("k", "--stream k: is none of"), ("k=-1", "--stream k=-1"), ("budget=much", "budget=much: an"),
                       ("store=tape", "store=tape: is none of")):  # fmt: skip
        with pytest.raises(InputError, match=line):
            parse_stream(text)
    with pytest.raises(InputError, match="--stream window: has k, k2, keep, store, budget"):
        fl.generate("a red ball", stream={"window": 3})
    with pytest.raises(InputError, match=r"k2 3: between 1 and 2"):
        fl.generate("a red ball", stream={"k": 2, "k2": 3})


# --- stores --------------------------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_takes_its_weights_from_a_checkpoint(tmp_path):
    model = Stack()
    want = model(x())
    save_file(
        {name: value.to(torch.float16) for name, value in model.state_dict().items()}, tmp_path / "half.safetensors"
    )
    save_file(model.state_dict(), tmp_path / "full.safetensors")
    for file, exact in (("full", True), ("half", False)):
        with torch.device("meta"):
            empty = Stack().requires_grad_(False)
        with stream(empty, 2, store=tmp_path / f"{file}.safetensors") as streamed:
            out = empty(x())
            assert torch.equal(out, want) if exact else torch.allclose(out, want, atol=1e-2)
            assert bool(empty.blocks[4].up.weight.isnan().all())  # not there, and says so
            assert "from disk" in str(streamed)
        assert not any(value.is_meta for value in empty.parameters())
        assert torch.equal(empty(x()), out)


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path):
    model = Stack()
    tensors = model.state_dict()
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: value for name, value in tensors.items() if names[name] == file}, tmp_path / file)
    with pytest.raises(InputError, match=r"holds 2 \.safetensors files"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with torch.no_grad():
        want = model(x())
        with stream(model, 2, store=tmp_path):
            assert torch.equal(model(x()), want)


def test_training_from_a_checkpoint_is_refused_and_running_is_not(tmp_path):
    model = Stack()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    with stream(model, 2, store=str(tmp_path / "m.safetensors")):
        with pytest.raises(InputError, match=r"blocks.0: .* cannot be trained; use store ram or disk"):
            model(x())
        with torch.no_grad():
            model(x())
    assert (tmp_path / "m.safetensors").read_bytes() == before


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_is_one_line(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / "m.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int64)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(150, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    path.write_bytes(raw)
    try:
        found = Checkpoint(path)
    except InputError:
        return
    for entry in found._entries.values():
        entry.read(torch.empty(entry.shape, dtype=entry.dtype))


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path):
    model = Stack()
    save_file({"blocks.0.up.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"holds no blocks.0.norm.weight"):
        stream(model, 2, store=tmp_path / "m.safetensors")
    save_file({name: value.flatten() for name, value in model.state_dict().items()}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"blocks.0.up.weight is \[512\], and the model's is \[32, 16\]"):
        stream(model, 2, store=tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="no such checkpoint"):
        stream(model, 2, store=tmp_path / "nothing")
    assert "forward" not in model.blocks[0].__dict__
    model(x())


def test_any_object_with_fetch_and_homes_is_a_store():
    model = Stack()
    with torch.no_grad():
        want = model(x())
    halves = [{name: value.detach().half() for name, value in block.parameters.items()}
              for block in take_apart(model).blocks]  # fmt: skip

    class Halves:
        def fetch(self, block, into):
            for name, value in halves[block].items():
                into[name].copy_(value)

        def homes(self, block):
            return None

    with torch.no_grad(), stream(model, 2, store=Halves()):
        assert torch.allclose(model(x()), want, atol=1e-2)


def test_the_scratch_file_has_no_name_and_goes_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    model = Stack()
    with stream(model, 2, store="disk"):
        assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"store disk: .* cannot take the blocks"):
        DiskStore.written([dict(model.blocks[0].named_parameters())], folder=tmp_path / "nowhere")


# --- when things go wrong ------------------------------------------------------------------------------------------


def test_an_exception_inside_a_block_leaves_the_model_whole():
    model = Stack()
    with torch.no_grad():
        want = model(x())
        with stream(model, 2, store="disk"):
            for _ in range(3):
                with pytest.raises(RuntimeError):
                    model.blocks[0](torch.zeros(3, 5))
                with pytest.raises(RuntimeError):
                    model.blocks[4](torch.zeros(3, 5))
            assert torch.equal(model(x()), want)
        assert torch.equal(model(x()), want)
        with pytest.raises(ZeroDivisionError), stream(model, 2, store="disk"):
            raise ZeroDivisionError
        assert torch.equal(model(x()), want)
        assert "forward" not in model.blocks[0].__dict__


def test_a_load_that_fails_is_told_where_it_is_needed_and_the_model_comes_back():
    model = Stack()
    store = RamStore([block.parameters for block in take_apart(model).blocks])
    with torch.no_grad():
        want = model(x())

        def broken(block, into):
            raise OSError("the disk is gone")

        streamed = stream(model, 2, store=store)
        store.fetch = broken
        with pytest.raises(OSError, match="the disk is gone"):
            model(x())
        del store.fetch
        streamed.restore()
        streamed.restore()
        assert torch.equal(model(x()), want)


def test_a_file_that_shrinks_is_not_read_as_noise(tmp_path):
    model = Stack()
    path = tmp_path / "m.safetensors"
    save_file(model.state_dict(), path)
    streamed = stream(model, 2, store=path)
    with open(path, "r+b") as file:
        file.truncate(2000)
    with torch.no_grad(), pytest.raises(OSError, match="became shorter"):
        model(x())
    streamed.window.close()


@pytest.mark.parametrize(("options", "line"), [
    ({"k": 0}, r"k 0: the window holds 1 block or more; this model has 6"),
    ({"k": 2, "k_prime": 3}, r"k2 3: between 1 and 2 of the 2 blocks"),
    ({"k": 3, "k_prime": 2, "pin": 2}, r"k2 2: between 1 and 1"),
    ({"k": 2, "pin": 2}, r"pin 2: of the 2 blocks in the window 0 to 1 can stay"),
    ({"k": 5, "budget": 16000}, r"16 kB: 5 blocks of 4.42 kB and 2.18 kB that always stay are 24.3 kB; k 3 fits"),
    ({"k": None, "budget": 3000}, r"budget 3 kB: .* not even one block"),
    ({"k": 1, "budget": 3000}, r"not even one block"),
    ({"device": "mps"}, r"device mps: this machine has no such device; here there is cpu"),
    ({"blocks": ["nothing"]}, r"blocks nothing: the model has no such module; it has inlet, blocks, head"),
    ({"blocks": ["blocks.0"]}, r"two or more"),
    ({"blocks": ["blocks", "blocks.0.up"]}, r"blocks.0: holds blocks.0.up"),
])  # fmt: skip
def test_bad_numbers_are_one_line(options, line):
    model = Stack()
    with pytest.raises(InputError, match=line) as told:
        stream(model, **options)
    assert "\n" not in str(told.value)
    model(x())


def test_models_that_cannot_be_streamed_say_why():
    with pytest.raises(InputError, match=r"Bilinear: no repeated list of blocks .* it is made of nothing at all"):
        stream(nn.Bilinear(2, 2, 2))
    mixed = nn.Sequential(nn.Linear(16, 800), nn.ReLU(), nn.LayerNorm(800))
    with pytest.raises(InputError, match=r"made of 0 \(54.4 kB\), 2 \(6.4 kB\)"):
        stream(mixed)
    with stream(mixed, 1, blocks=["0", "2"], store="ram"), torch.no_grad():
        mixed(x())
    model = Stack()
    model.blocks[1]._compiled_call_impl = print  # what compile() leaves
    with pytest.raises(InputError, match=r"blocks.1: is compiled"):
        stream(model)
    model = Stack()
    model.blocks[1].up.weight = nn.Parameter(torch.ones(16).expand(32, 16))
    with pytest.raises(InputError, match=r"blocks.1.up.weight: its elements lie apart or on top"):
        stream(model)
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(InputError, match=r"store None: inlet.weight has no values yet"):
        stream(model)
    model = Stack()
    with stream(model, 2, store="ram"), pytest.raises(InputError, match="is streamed already"):
        stream(model, 2)


def test_a_window_as_large_as_the_model_says_that_nothing_is_streamed(caplog):
    model = Stack()
    with stream(model, 9, store="ram") as streamed, torch.no_grad():
        model(x())
        loads = streamed.loads
        model(x())
        assert streamed.loads == loads == N
    assert "k 9: the model has 6 blocks, so that all of them are there" in caplog.text
    assert "saves nothing" in caplog.text


def test_a_budget_alone_takes_as_many_blocks_as_fit():
    model = Stack()
    with stream(model, None, budget=2176 + 3 * 4416 + 100, store="disk") as streamed:
        assert (streamed.plan.k, streamed.plan.k_prime, streamed.plan.bytes) == (3, 1, 2176 + 3 * 4416)
    with stream(model, None, budget=10**6, store="disk") as streamed:
        assert streamed.plan.k == N


# --- the time model ------------------------------------------------------------------------------------------------


def test_the_time_model_has_the_closed_forms_of_its_ends():
    for c, load in ((2.0, 1.0), (1.0, 1.0), (1.0, 3.0)):
        assert pass_time(12, 4, 4, c, load) >= 12 * max(c, load)
        assert pass_time(12, 1, 1, c, load) == pytest.approx(12 * (c + load))
        assert pass_time(12, 4, 2, c, load, passes=9) == pytest.approx(12 * max(c, load), rel=0.02)
        assert pass_time(12, 12, 1, c, load) == 12 * c


def test_pinned_blocks_hide_loads_that_are_slower_than_a_block():
    assert pass_time(12, 8, 1, 1.0, 2.0, pin=6) == pytest.approx(12.0, rel=0.1)
    assert pass_time(12, 8, 1, 1.0, 2.0) == pytest.approx(24.0)


def test_computing_and_loading_overlap_as_the_time_model_says():
    took, said = claim.timed(3, 1, 0.01, 0.01, n=4, passes=3)
    assert took >= 0.99 * said  # how much more depends on who else is here; the claim looks at that


def test_loads_happen_in_a_thread_of_their_own():
    where: set[str] = set()

    class Noted(RamStore):
        def fetch(self, block, into):
            where.add(threading.current_thread().name)
            super().fetch(block, into)

    model = Stack()
    with stream(model, 2, 1, store=Noted([block.parameters for block in take_apart(model).blocks])), torch.no_grad():
        model(x())
    assert where == {"frameloom-stream_0"}


def test_it_is_a_verb_of_the_package():
    assert fl.stream is stream
    assert isinstance(RamStore([]), stores.Store)
