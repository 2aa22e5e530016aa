"""The generation task: its models, its strategies for long video and small memory, and what it refuses."""

import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import frameloom as fl
from frameloom.diffusion.attention_edits import (
    SharedKeys,
    WindowedAttention,
    attend_in_windows,
    finish,
    fused,
    project,
    triangle,
    windows,
)
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.generator import fitted, open_generator, seeded
from frameloom.diffusion.guide import Joint
from frameloom.diffusion.hooks import install
from frameloom.diffusion.noise import gaussian_filter, low_pass, shuffled_windows
from frameloom.diffusion.paths import VP, Flow
from frameloom.diffusion.plans import chunks, diagonal, prefix, staircase, together
from frameloom.diffusion.predict import Prediction
from frameloom.diffusion.run import sample
from frameloom.diffusion.slicing import Statistics, sliced, spans
from frameloom.diffusion.step import Universal
from frameloom.errors import InputError
from frameloom.language.words import Words
from frameloom.memory import peak, weight_bytes
from frameloom.progress import silent
from frameloom.tasks.generation.base import GeneratedSource, settle
from frameloom.tasks.generation.models import bases, stiv
from frameloom.tasks.generation.strategies.chunks import Chunks
from frameloom.tasks.generation.strategies.direct import Direct
from frameloom.tasks.generation.strategies.fifo import FIFO
from frameloom.tasks.generation.strategies.freenoise import FreeNoise, texts
from frameloom.tasks.generation.strategies.ouroboros import Ouroboros, _Run, _Subject, otsu
from frameloom.tasks.generation.strategies.streamlined import Streamlined, fit, plan, similar
from frameloom.tasks.generation.strategies.windows import Windows
from frameloom.training import save_pretrained

WORLD = {"unet3d": bases.WorldUNet3D, "latte": bases.WorldLatte, "motion": bases.WorldMotion}
BALL = "a large red ball rolls left"


def wake(module: torch.nn.Module) -> None:
    """Give what starts at zero a value, so that every path of a fresh network is felt."""
    generator = torch.Generator().manual_seed(1)
    for value in module.parameters():
        if value.ndim > 1 and not bool(value.any()):
            value.data = 0.05 * torch.randn(value.shape, generator=generator)


@pytest.fixture(scope="module")
def models():
    made = {}
    for name, kind in WORLD.items():
        torch.manual_seed(0)
        made[name] = kind(kind.preset("tiny")).eval()
        wake(made[name])
    return made


@pytest.fixture(scope="module")
def loom():
    torch.manual_seed(0)
    model = stiv.STIV(stiv.TINY).eval()
    wake(model)
    return model


def pictures(strategy, model, prompt=BALL, **settings):
    request = settle(model, prompt, **settings)
    strategy.check(model, request)
    with torch.no_grad():
        return torch.stack(list(strategy.frames(model, request, silent)))


# --- STIV ----------------------------------------------------------------------------------------------------------


def test_given_frames_come_out_bit_equal_in_the_latents(loom):
    picture = torch.rand(3, 32, 32)
    latents = loom.encode(picture[None, None])
    made = pictures(Direct(), loom, image=picture, steps=3)
    assert torch.equal(made[0], loom.decode(latents)[0, 0].clamp(0, 1))
    two = pictures(Direct(), loom, given={0: picture, 15: 1 - picture}, steps=3)
    assert torch.equal(two[0], made[0])
    assert torch.equal(two[15], loom.decode(loom.encode((1 - picture)[None, None]))[0, 0].clamp(0, 1))


def test_the_network_sees_a_given_frame_clean_and_the_null_pass_does_not(loom):
    x0, seen = torch.randn(1, 16, 128, 2, 2), []
    handle = loom.patch_in.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        pictures(Direct(), loom, image=torch.rand(3, 32, 32), steps=2)
    finally:
        handle.remove()
    for first in seen:  # conditional and null rows in one batch
        assert not torch.allclose(first[0, 0], first[1, 0])
        assert torch.equal(first[0, 1:], first[1, 1:])
    assert torch.equal(seen[0][0, 0], seen[1][0, 0])
    assert x0.shape[1] == 16


def test_another_given_frame_changes_the_others(loom):
    first, second = (pictures(Direct(), loom, image=torch.full((3, 32, 32), value), steps=2) for value in (0.2, 0.8))
    assert not torch.allclose(first[5], second[5], atol=1e-4)


def batch(n=3):
    return {
        "video": torch.rand(n, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "ids": stiv.WORDS.encode([BALL] * n),
        "given": torch.zeros(n, 16, dtype=torch.bool),
    }


def test_the_loss_does_not_look_at_given_frames(loom):
    model = stiv.STIV(replace(stiv.TINY, drop_image=0.0, drop_text=0.0))
    wake(model)
    data = batch()
    data["given"][:, 0] = True
    kept = []
    handle = model.patch_out.register_forward_hook(lambda module, args, out: (out.retain_grad(), kept.append(out))[0])
    torch.manual_seed(0)
    model.loss(data).backward()
    handle.remove()
    gradient = kept[0].grad
    assert float(gradient[:, 0].abs().max()) == 0
    assert float(gradient[:, 1:].abs().max()) > 0


def test_half_of_the_spatial_tokens_reach_the_main_blocks_when_masked():
    model = stiv.STIV(replace(stiv.TINY, mask_ratio=0.5, depth=4, restore=2))
    counts = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[2]))
    model.loss(batch(1))
    assert counts == [2, 2, 4, 4]
    counts.clear()
    model.eval()
    pictures(Direct(), model, steps=1, guidance=1.0)
    assert counts == [4, 4, 4, 4]


def test_temporal_attention_depends_on_distances_alone(loom):
    block = loom.blocks[0]
    from frameloom.layers.attention import rotary

    x = torch.randn(2, 5, 192)
    here, there = (rotary(torch.arange(start, start + 5.0)[:, None], 32) for start in (0, 7))
    assert torch.allclose(block.temporal(x, positions=here), block.temporal(x, positions=there), atol=1e-5)
    far = rotary(2 * torch.arange(5.0)[:, None], 32)
    assert not torch.allclose(block.temporal(x, positions=here), block.temporal(x, positions=far), atol=1e-3)


def test_longer_clips_draw_positions_together_instead_of_going_on(loom):
    (cos, _), (_, _) = loom._positions(2, 2, 16, "cpu")
    _, (time, _) = loom._positions(2, 2, 32, "cpu")
    _, (trained, _) = loom._positions(2, 2, 16, "cpu")
    assert torch.allclose(time[::2], trained, atol=1e-5)
    assert len(cos) == 4


def test_without_a_picture_joint_guidance_is_guidance_by_text(loom):
    cond = loom.text([BALL])
    grid, x = loom.grid(3), seeded((1, 16, 128, 2, 2), 0)
    _, report = sample(loom.denoiser, x, grid, cond, guide=Joint(4.0))
    assert report.evaluations == {"cond": 3, "null": 3}


def test_the_small_attention_is_the_fused_one():
    from frameloom.layers.attention import attend

    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind(0)
    mask = torch.rand(2, 1, 9, 9) > 0.3
    mask |= torch.eye(9, dtype=torch.bool)
    small = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert torch.allclose(small.float(), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=0.05)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_the_pixel_codec_is_exact_with_all_its_channels_and_whitened():
    from frameloom.layers.patches import PatchPCA

    video = torch.rand(4, 3, 3, 8, 8)
    codec = PatchPCA(4, 48)
    codec.fit(video)
    assert torch.allclose(codec.decode(codec.encode(video)), video, atol=1e-4)
    assert float(codec.encode(video).std()) == pytest.approx(1, abs=0.1)
    few = PatchPCA(4, 6)
    few.fit(video)
    assert float((few.decode(few.encode(video)) - video).square().mean()) < float(video.var())


# --- bases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bases.TinySVD, bases.TinyCogVideoX, bases.Digits, *WORLD.values()])
def test_a_base_encodes_exactly_learns_and_samples(kind):
    torch.manual_seed(0)
    model = kind(kind.preset("tiny"))
    c = model.config
    video = torch.rand(2, c.frames, 3, c.side, c.side)
    video = video[:, :, :1].expand(-1, -1, 3, -1, -1) if c.channels == 1 else video
    assert torch.allclose(model.decode(model.encode(video)), video, atol=1e-5)
    data = {"video": video, "ids": bases.WORDS.encode([BALL] * 2), "label": torch.tensor([3, 4])}
    if c.host != "unet2d":
        del data["label"]
    model.loss(data).backward()
    assert any(value.grad is not None and bool(value.grad.any()) for value in model.parameters())
    image = torch.rand(3, 40, 50) if model.needs_image else None
    prompt = "7" if c.host == "unet2d" else BALL
    made = pictures(Direct(), model.eval(), prompt, image=image, steps=2)
    assert made.shape == (c.frames, 3, c.side, c.side)
    assert bool(torch.isfinite(made).all())


# --- noise and windows ---------------------------------------------------------------------------------------------


def test_every_aligned_window_holds_the_same_noise_frames():
    noise = shuffled_windows(seeded((1, 32, 2, 4, 4), 0), 8, 4, seed=3)
    frames = [frame.double().sum().item() for frame in noise[0]]
    first = sorted(frames[:8])
    for start in range(0, 25, 4):
        assert sorted(frames[start : start + 8]) == first
    assert frames[8:16] != frames[:8]
    other = shuffled_windows(seeded((1, 32, 2, 4, 4), 0), 8, 4, seed=4)
    assert not torch.equal(noise, other)
    assert shuffled_windows(seeded((1, 10, 2, 4, 4), 0), 8, 4, seed=3).shape[1] == 10


def test_windows_cover_every_frame_and_triangles_weigh_them():
    assert windows(8, 8, 4) == [(0, 8)]
    assert windows(21, 8, 4) == [(0, 8), (4, 12), (8, 16), (12, 20), (13, 21)]
    assert triangle(8).tolist() == [1, 2, 3, 4, 4, 3, 2, 1]
    assert triangle(5).tolist() == [1, 2, 3, 2, 1]


def test_windowed_attention_is_the_average_of_its_windows(models):
    denoiser = models["unet3d"].denoiser
    site = next(iter(denoiser.sites("temporal_self")))
    x = torch.randn(5, 20, site.module.to_q.in_features)
    with install(denoiser, [("temporal_self", WindowedAttention(8, 4))]):
        made = site.module(x)
    q, k, v = project(site.module, x)
    total, count = torch.zeros_like(v), torch.zeros(20)
    for start, stop in windows(20, 8, 4):
        scores = torch.softmax(q[:, :, start:stop] @ k[:, :, start:stop].transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        total[:, :, start:stop] += triangle(8)[:, None] * (scores @ v[:, :, start:stop])
        count[start:stop] += triangle(8)
    assert torch.allclose(made, finish(site.module, total / count[:, None]), atol=1e-5)


@pytest.mark.parametrize("name", WORLD)
@pytest.mark.parametrize("fuse", [None, "attention", "block"])
def test_freenoise_of_one_window_is_direct_sampling(models, name, fuse):
    made, plain = (pictures(s, models[name], steps=2) for s in (FreeNoise(fuse=fuse), Direct()))
    assert torch.allclose(made, plain, atol=1e-5)


@pytest.mark.parametrize("name", WORLD)
def test_freenoise_restores_the_model_and_makes_longer_clips(models, name):
    model = models[name]
    before = pictures(Direct(), model, steps=1)
    assert pictures(FreeNoise(), model, frames=19, steps=1).shape[0] == 19
    assert torch.equal(pictures(Direct(), model, steps=1), before)


def test_freenoise_costs_every_frame_once_and_windows_each_of_theirs(models):
    from frameloom.tasks.generation.strategies.windows import Windowed

    model, frames = models["latte"], 32
    strategy, x = FreeNoise(), seeded((1, frames, 12, 8, 8), 0)
    request = settle(model, BALL, frames=frames, steps=2, guidance=1.0)
    from frameloom.tasks.generation.strategies.freenoise import positions

    with positions(model, 8, 2, frames):
        _, free = sample(model.denoiser, x, model.grid(2), model.text([BALL]), hooks=strategy.hooks(model, request))
    _, direct = sample(model.denoiser, x, model.grid(2), model.text([BALL]))
    _, co = sample(Windowed(model.denoiser, 8, 4), x, model.grid(2), model.text([BALL]))
    assert free.frames == direct.frames == 2 * frames
    assert co.frames == 2 * 7 * 8  # 1.75 times as many


def test_words_change_over_the_middle_half_and_only_in_the_conditional_branch(models):
    model = models["unet3d"]
    request = settle(model, [(BALL, 10), ("a small blue box rises", 10)], steps=1)
    own = texts(model, request)
    first, last = model.text([BALL, "a small blue box rises"])["text"]
    assert torch.equal(own[:5], first.expand(5, -1, -1))
    assert torch.equal(own[-5:], last.expand(5, -1, -1))
    assert torch.allclose(own[5 + 9], last)
    assert torch.allclose(own[5 + 3], torch.lerp(first, last, 3 / 9), atol=1e-6)
    for name in WORLD:
        two = pictures(FreeNoise(), models[name], [(BALL, 10), ("a small blue box rises", 10)], steps=2)
        one = pictures(FreeNoise(), models[name], [(BALL, 20)], steps=2)
        assert two.shape == one.shape
        assert not torch.allclose(two, one)


def test_freenoise_says_what_it_needs(models, loom):
    cogvideox = bases.TinyCogVideoX(bases.TinyCogVideoX.preset("tiny"))
    with pytest.raises(InputError, match="freenoise needs separate temporal attention"):
        pictures(FreeNoise(), cogvideox, frames=32, steps=1)
    with pytest.raises(InputError, match="leaves gaps"):
        pictures(FreeNoise(stride=9), models["latte"], frames=32, steps=1)


def test_chunks_and_windows_make_any_length(models):
    for strategy in (Chunks(), Windows()):
        for frames in (1, 8, 13):
            assert len(pictures(strategy, models["latte"], frames=frames, steps=1)) == frames


# --- plans and the queue -------------------------------------------------------------------------------------------


def test_plans_are_matrices_of_levels():
    grid = torch.tensor([1.0, 0.5, 0.0])
    assert together(grid, 2).tolist() == [[1, 1], [0.5, 0.5], [0, 0]]
    assert prefix(grid, 3, 1)[:, 0].tolist() == [0, 0, 0]
    assert staircase(grid, 2).tolist() == [[1, 1], [0.5, 1], [0, 0.5], [0, 0]]
    assert chunks(grid, 4, 2)[:, [0, 2]].tolist() == [[1, 1], [0.5, 1], [0, 1], [0, 0.5], [0, 0]]


def test_a_plan_runs_through_the_loop_and_ends_clean(models):
    model = models["unet3d"]
    grid = staircase(model.grid(3), 8)
    made, _ = sample(model.denoiser, seeded((1, 8, 12, 8, 8), 0), grid, model.text([BALL]))
    assert bool(torch.isfinite(made).all())


def test_every_frame_of_the_queue_goes_down_every_level_once():
    path, n, f = Flow(), 8, 4
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    born, steps = iter(range(100, 1000)), {}

    def estimate(x, t, block):
        assert bool((t.diff(dim=1) >= 0).all())
        for k in range(f // 2, f):  # the half that is kept
            name = round(float(x[0, k, 0, 0, 0]))
            steps.setdefault(name, []).append(round(float(t[0, k]) * n))
        # An estimate under which the step leaves a frame as it is.
        return Prediction(x, x)

    def tail(queue):
        return torch.full((1, 1, 1, 1, 1), float(next(born)))

    queue = torch.arange(n + f // 2, dtype=torch.float32).view(1, -1, 1, 1, 1)
    out = [round(float(frame)) for frame in islice(diagonal(path, times, f, queue, estimate, tail), 14)]
    assert out[:8] == list(range(2, 10))  # the queue, the head first; 0 and 1 were context
    assert out[8:] == [100, 101, 102, 103, 104, 105]
    for name in (100, 103, 105):
        assert steps[name] == list(range(n, 0, -1))
    assert 0 not in steps


def test_a_step_of_the_queue_ends_at_the_level_of_the_place_in_front():
    n, f = 8, 4
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    seen = []

    def estimate(x, t, block):
        seen.append((x[0, f // 2 :, 0, 0, 0].clone(), t[0, f // 2 :].clone()))
        return Prediction(torch.zeros_like(x), torch.ones_like(x))  # then a frame's value is its level

    queue = torch.cat([torch.zeros(f // 2), times.float()]).view(1, -1, 1, 1, 1)
    rounds = diagonal(Flow(), times, f, queue, estimate, lambda queue: torch.ones(1, 1, 1, 1, 1))
    assert [float(frame) for frame in islice(rounds, 5)] == [0.0] * 5
    for values, levels in seen:
        assert torch.allclose(values, levels.float())


def test_the_queue_calls_the_network_twice_per_window_of_levels_and_holds_no_more_for_longer_clips(models):
    model, calls = models["latte"], []
    handle = model.host.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        run = _Run(FIFO(queue=16), model, settle(model, BALL, frames=2, steps=1, guidance=1.0))
        latents = run.latents()
        next(latents)
        calls.clear()
        list(islice(latents, 3))
    finally:
        handle.remove()
    assert len(calls) == 3 * 2 * 16 // 8
    short, long = (
        peak(lambda frames=frames: [None for _ in FIFO(queue=8).frames(
            model, settle(model, BALL, frames=frames, steps=1, guidance=1.0), silent)]) for frames in (4, 24)
    )  # fmt: skip
    assert long <= short * 1.01


def test_fifo_is_ouroboros_with_everything_off(models):
    model = models["latte"]
    off = Ouroboros(queue=8, tail=False, attention=False, guidance=False)
    assert torch.equal(pictures(off, model, frames=3, steps=1), pictures(FIFO(queue=8), model, frames=3, steps=1))


def test_guidance_of_strength_zero_is_none(models):
    model = models["unet3d"]
    weak = Ouroboros(queue=8, tail=False, attention=False, strength=0.0)
    assert torch.equal(pictures(weak, model, frames=2, steps=1), pictures(FIFO(queue=8), model, frames=2, steps=1))
    strong = Ouroboros(queue=8, tail=False, attention=False, strength=500.0, guided=1.0)
    # The guided half of the queue takes some rounds to reach the head.
    plain = pictures(FIFO(queue=8), model, frames=7, steps=1)
    assert not torch.allclose(pictures(strong, model, frames=7, steps=1), plain, atol=1e-3)


def test_no_subject_in_the_sentence_leaves_attention_as_it_is(models):
    model = models["unet3d"]
    nothing = Ouroboros(queue=8, tail=False, subject="camera")
    plain = pictures(FIFO(queue=8), model, frames=2, steps=1)
    assert torch.equal(pictures(nothing, model, frames=2, steps=1), plain)
    assert not torch.equal(pictures(Ouroboros(queue=8, tail=False), model, frames=2, steps=1), plain)


def test_shared_keys_with_an_empty_mask_change_nothing_and_with_a_full_one_attend_to_all_frames(models):
    denoiser = models["unet3d"].denoiser
    site = next(site for site in denoiser.sites("spatial_self") if site.stage == "up")
    x = torch.randn(8, 64, site.module.to_q.in_features)
    plain = site.module(x)
    where = ("spatial_self", lambda other: other.name == site.name)
    for mask in (None, torch.zeros(8, 8, 8, dtype=torch.bool)):
        with install(denoiser, [(where, SharedKeys(mask))]):
            assert torch.equal(site.module(x), plain)
    with install(denoiser, [(where, SharedKeys(torch.ones(8, 8, 8, dtype=torch.bool)))]):
        made = site.module(x)
    q, k, v = project(site.module, x)
    flat = [part.transpose(0, 1).reshape(1, part.shape[1], -1, part.shape[3]).expand(8, -1, -1, -1) for part in (k, v)]
    every = [torch.cat(pair, 2) for pair in zip((k, v), flat, strict=True)]
    assert torch.allclose(made, finish(site.module, F.scaled_dot_product_attention(q, *every)), atol=1e-5)


def test_the_gradient_of_the_subjects_distance_is_right():
    torch.manual_seed(0)
    keys = torch.randn(4, 2, 9, 3, dtype=torch.float64)
    inside = torch.rand(4, 9) > 0.4
    memory = _Subject({"site": torch.randn(2, 3, dtype=torch.float64)})
    assert torch.autograd.gradcheck(lambda k: memory.distance([("site", k, inside)]), keys.requires_grad_())
    memory.update([("site", keys, inside)], 0.9)
    weight = inside[:, None, :, None].double()
    mean = (keys * weight).sum((0, 2)) / weight.sum((0, 2))
    assert memory.keys["site"].shape == mean.shape


def test_low_pass_mixing_has_its_ends_and_its_variance():
    signal, noise = seeded((1, 1, 4, 16, 16), 0), seeded((1, 1, 4, 16, 16), 1)
    ones = torch.ones(1, 16, 16)
    assert torch.allclose(low_pass(signal, noise, ones), signal, atol=1e-5)
    assert torch.allclose(low_pass(signal, noise, 0 * ones), noise, atol=1e-5)
    big, other = seeded((1, 1, 64, 16, 16), 2), seeded((1, 1, 64, 16, 16), 3)
    kept = low_pass(big, other, gaussian_filter(1, 16, 16, with_time=False), preserve=True)
    assert float(kept.var()) == pytest.approx(1, abs=0.03)
    official = gaussian_filter(1, 16, 16)
    assert float(official.max()) == pytest.approx(0.6065, abs=1e-3)
    lost = low_pass(big, other, official, preserve=False)
    assert float(lost.var()) == pytest.approx(0.917, abs=0.03)


def test_the_tail_has_the_variance_of_the_end_of_the_path(models):
    run = _Run(Ouroboros(queue=16, attention=False, guidance=False), models["latte"], settle(models["latte"], BALL))
    path = run.path
    x0 = torch.zeros(1, 20, 12, 8, 8)
    queue = path.add_noise(x0, torch.full((1, 20), float(run.times[-2]), dtype=torch.float64), seeded(x0.shape, 5))
    tails = torch.cat([run._tail(queue) for _ in range(20)])
    c = float(path.coef(run.times[-1])[2])
    assert float(tails.std()) == pytest.approx(c, rel=0.05)


def test_otsu_parts_two_groups():
    values = torch.cat([torch.randn(500) * 0.1, 3 + torch.randn(300) * 0.1])
    assert 0.3 < float(otsu(values)) < 2.7
    assert float(otsu(torch.ones(5))) == 1


def test_queues_refuse_what_cannot_be(models, loom):
    with pytest.raises(InputError, match="does not hold whole windows of 8 frames; 24 would"):
        pictures(FIFO(queue=25), models["latte"], steps=1)
    with pytest.raises(InputError, match="a noise level for every frame"):
        pictures(FIFO(), loom, steps=1)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """Hosts at a size at which activations matter, and an input for each."""
    import diffusers

    from frameloom.diffusion.adapters import motion, svd, unet3d

    torch.manual_seed(0)
    common = {"sample_size": 16, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
              "cross_attention_dim": 32}  # fmt: skip
    made = {
        "svd": svd.SVD(diffusers.UNetSpatioTemporalConditionModel(
            **common, in_channels=8, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(4, 4),
            num_frames=16, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96), frames=16),
        "motion": motion.UNetMotion(diffusers.UNetMotionModel(
            **common, in_channels=4, norm_num_groups=8, num_attention_heads=4, motion_num_attention_heads=4,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion")), VP.of(), "noise", 16),
        "unet3d": unet3d.UNet3D(diffusers.UNet3DConditionModel(
            **common, in_channels=4, norm_num_groups=8, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")), VP.of(), "noise", 16),
    }  # fmt: skip
    x = seeded((1, 16, 4, 24, 24), 0)
    out = {}
    for name, adapter in made.items():
        adapter.host.eval()
        wake(adapter.host)
        cond = Cond({"text": seeded((1, 8, 32), 1)})
        if name == "svd":
            cond = Cond({"image": x[:, :1], "image_embeds": seeded((1, 1, 32), 1),
                         "time_ids": torch.tensor([[7.0, 127.0, 0.0]])})  # fmt: skip
        time = torch.tensor([20.0 if name == "svd" else 500.0])
        with torch.no_grad():
            plain = adapter.call(x, time, cond)
            most = peak(lambda a=adapter, t=time, c=cond: a.call(x, t, c))
        out[name] = (adapter, x, time, cond, plain, most)
    return out


@pytest.mark.parametrize("name", ["svd", "motion", "unet3d"])
def test_slices_of_any_count_give_the_same_output_in_less_than_half_the_memory(wide, name):
    adapter, x, t, cond, plain, most = wide[name]
    peaks = []
    for frames, space in ((2, 2), (7, 5), (8, 8)):
        with torch.no_grad(), sliced(adapter.host, frames, space) as names:
            made = adapter.call(x, t, cond)
            peaks.append(peak(lambda: adapter.call(x, t, cond)) / most)
        assert torch.allclose(made, plain, atol=1e-5 * float(plain.abs().max()))
        assert len(names) > 10
    assert peaks[2] < 0.5
    assert peaks[0] >= peaks[2]
    assert not any("forward" in module.__dict__ for module in adapter.host.modules())
    with torch.no_grad(), sliced(adapter.host, 8, 8, official=True):
        official = adapter.call(x, t, cond)
    assert float((official - plain).abs().max() / plain.abs().max()) > 1e-3


def test_statistics_of_slices_are_those_of_the_whole():
    norm = torch.nn.GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    x = 100 + torch.randn(2, 8, 3, 5, 7)
    known = Statistics.of(x, norm, 3)
    for part in spans(7, 3):
        assert torch.allclose(known.apply(x[..., part], norm), norm(x)[..., part], atol=1e-4)
    assert spans(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_a_budget_is_met_or_said_to_be_too_small(models):
    model = models["unet3d"]
    request = settle(model, BALL, frames=16, steps=2)
    assert fit(model, request, 10**9) == (1, 1)
    weights = weight_bytes(model.host)
    counts, _ = fit(model, request, weights + int(0.7 * (peak_of(model, request))))
    assert counts > 1
    with pytest.raises(InputError, match=r"--memory-budget 1 MB: this needs at least .* weights"):
        fit(model, request, 10**6)


def test_more_frames_than_memory_holds_are_refused_with_the_number_that_fits(models, monkeypatch):
    model = models["latte"]
    from frameloom.tasks.generation.base import activations

    request = settle(model, BALL, frames=100, steps=2)
    took = activations(model, request, 8)
    monkeypatch.setattr("frameloom.memory.available", lambda: 5 * took)
    for strategy in (Direct(), FreeNoise()):
        with pytest.raises(InputError, match=r"--frames 100: takes about .* 40 frames fit, and --method ouroboros"):
            strategy.check(model, request)
    Direct().check(model, settle(model, BALL, frames=32, steps=2))


def peak_of(model, request):
    from frameloom.tasks.generation.strategies.streamlined import measure

    return measure(model, request, 1, 1)


def test_reused_steps_run_the_outer_blocks_alone_and_the_others_are_untouched(models):
    model = models["unet3d"]
    seen = []
    handles = [module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
               for name, module in (("outer", model.host.down_blocks[0]), ("mid", model.host.mid_block))]  # fmt: skip
    inner = []
    handles += [module.register_forward_hook(lambda module, args, out: inner.append(1))
                for module in model.host.mid_block.resnets[:1]]  # fmt: skip
    try:
        made = pictures(Streamlined(time=1, space=1, rehash=0.5), model, steps=10)
    finally:
        for handle in handles:
            handle.remove()
    assert seen.count("outer") == 10
    assert len(inner) == len(plan(10, 0.5)) == 5
    plain = pictures(Direct(), model, steps=10)
    assert not torch.equal(made, plain)
    # Without guidance, which makes four times of the rounding errors of an untrained network, step after step.
    whole, sliced = (pictures(way, model, steps=10, guidance=1.0) for way in (Direct(), Streamlined(time=1, space=1)))
    assert torch.allclose(sliced, whole, atol=1e-5)


def test_a_plan_of_full_steps_begins_with_three_and_skips_its_share():
    full = plan(25, 0.48)
    assert len(full) == 13
    assert {0, 1, 2} <= full
    assert plan(25, 0.0) == frozenset(range(25))
    features = [torch.tensor([1.0, 0.0])] * 4 + [torch.tensor([0.0, 1.0])] + [torch.tensor([0.0, 1.0])]
    assert similar(features, 0.1) == {0, 1, 2, 4}


# --- what the task settles and refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"frames": 0}, "--frames 0"),
    ({"steps": 0}, "--steps 0"),
    ({"solver": "magic"}, "--solver magic: there are"),
    ({"given": {16: torch.zeros(3, 8, 8)}}, "frame 16, but the video has frames 0 to 15"),
    ({"prompt": []}, "a scene is a sentence"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_computed(loom, settings, message):
    with pytest.raises(InputError, match=message):
        settle(loom, **({"prompt": BALL} | settings))


def test_unknown_words_are_named_with_what_the_model_knows(loom, caplog):
    with caplog.at_level("WARNING", logger="frameloom"):
        settle(loom, "a shiny red bal rolls left")
    assert "does not know shiny, bal (ball?)" in caplog.text
    assert "it knows" in caplog.text
    with pytest.raises(InputError, match=r"--strict: .*shiny"):
        settle(loom, "a shiny ball", strict=True)


def test_a_picture_model_wants_a_picture_and_a_picture_of_another_shape_is_cut():
    svd = bases.TinySVD(bases.TinySVD.preset("tiny"))
    with pytest.raises(InputError, match="give it one with --image"):
        settle(svd, "")
    picture = torch.zeros(3, 10, 30)
    picture[:, :, 10:20] = 1
    cut = fitted(picture, 32, 32)
    assert cut.shape == (3, 32, 32)
    assert float(cut[:, :, 8:24].mean()) > 0.95


def test_weights_that_are_no_model_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder and no shipped model; there are"):
        open_generator("nowhere")
    with pytest.raises(InputError, match=r"neither config\.json"):
        open_generator(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="neither a frameloom run nor a diffusers pipeline"):
        open_generator(str(tmp_path))


def test_a_run_of_another_size_is_opened_by_its_folder(tmp_path, models):
    save_pretrained(models["latte"], "world-latte", tmp_path)
    clip = fl.generate(BALL, weights=str(tmp_path), steps=1, frames=4)
    assert (len(clip), clip.info.width) == (4, 16)
    assert clip.tensor().shape == (4, 3, 16, 16)


def test_a_generated_clip_is_lazy_repeatable_and_seeded(models):
    model = models["latte"]

    def clip(seed):
        return fl.Clip(GeneratedSource(model, Direct(), settle(model, BALL, steps=1, seed=seed), "x"))

    first = clip(0)
    assert first.source._kept is None
    assert torch.equal(first[2:5].tensor(), clip(0).tensor()[2:5])
    assert not torch.equal(first.tensor(), clip(1).tensor())


def test_an_unknown_setting_of_a_strategy_is_named():
    with pytest.raises(InputError, match="fifo has no setting windw"):
        fl.generate(BALL, method="fifo", weights="digits-16", windw=3)


def test_words_are_numbers_and_back():
    words = Words(["ball", "red"], length=4)
    assert words.encode(["red ball"]).tolist() == [[3, 2, 1, 0]]
    assert words.encode(["Red, BALL!"]).tolist() == [[3, 2, 1, 0]]
    assert words.unknown("red cube") == ["cube"]
    with pytest.raises(InputError, match="4 words; this model reads 3"):
        words.encode(["red red red red"])


def test_the_solver_names_reach_the_loop(models):
    request = settle(models["latte"], BALL, solver="ancestral")
    assert request.step(models["latte"]) == Universal(eta=1.0)


# --- the command line ----------------------------------------------------------------------------------------------


def frameloom(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "frameloom", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def test_generate_predict_and_inbetween_from_the_shell(tmp_path, loom):
    save_pretrained(loom, "stiv", tmp_path / "run")
    weights = ("--weights", "run", "--steps", "2")
    done = frameloom("generate", BALL, "-o", "ball.mp4", *weights, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"frames": 16' in done.stdout
    clip = fl.read(str(tmp_path / "ball.mp4"))
    assert (clip.info.width, len(clip)) == (256, 16)
    done = frameloom("predict", "ball.mp4", "next.mp4", "--frames", 14, *weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(fl.read(str(tmp_path / "next.mp4"))) == 18
    import cv2

    for name, value in (("a.png", 60), ("b.png", 200)):
        cv2.imwrite(str(tmp_path / name), torch.full((40, 40, 3), value, dtype=torch.uint8).numpy())
    done = frameloom(
        "interpolate", "a.png", "b.png", "--method", "stiv", "--weights", "run", "-o", "ab.mp4", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    made = fl.read(str(tmp_path / "ab.mp4")).tensor()
    assert made[0].mean() < made[-1].mean()


@pytest.mark.parametrize(("arguments", "message"), [
    (("generate",), "say what to show"),
    (("generate", "x", "--image", "no.png"), "no.png: no such picture"),
    (("generate", "x", "--image", "empty.txt"), "empty.txt"),
    (("generate", "--prompts", "empty.txt"), "holds no prompt"),
    (("generate", "--prompts", "no number"), "is not a scene"),
    (("generate", "7", "--memory-budget", "lots"), "an amount of memory"),
    (("generate", "7", "--weights", "digits-16", "--steps", "0"), "--steps 0"),
    (("generate", "7", "--method", "frenoise"), "did you mean freenoise"),
    (("generate", "7", "--set", "queue"), "a setting is name=value"),
])  # fmt: skip
def test_mistakes_are_one_line_with_status_two_and_leave_nothing(tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    done = frameloom(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize(("frames", "size", "stride"), [(32, 8, 2), (13, 4, 3), (40, 4, 1), (7, 5, 2)])
def test_attention_in_windows_is_the_average_of_attention_in_each(frames, size, stride):
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, 3, frames, 5) for _ in range(3))

    def part(start: int, stop: int) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*(x[:, :, start:stop] for x in (q, k, v)))

    assert torch.allclose(attend_in_windows(q, k, v, size, stride), fused(frames, size, stride, part, dim=2), atol=1e-5)
