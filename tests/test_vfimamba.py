"""VFIMamba: what must hold exactly, whatever the weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from frameloom.cards import card
from frameloom.errors import InputError
from frameloom.tasks.interpolation.vfimamba import PRESETS, Curriculum, FramePairScan, VFIMamba, _both


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VFIMamba(VFIMamba.preset("tiny")).eval()


def pairs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def silent(model):
    """The same network with its last convolutions at zero: no flow, no mask, no residual."""
    for head in model.block:
        torch.nn.init.zeros_(head.conv[-1][0].weight)
        torch.nn.init.zeros_(head.conv[-1][0].bias)
    for last in [*(block.lastconv for block in model.local_block), model.unet.conv]:
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    return model


def test_without_flow_mask_and_residual_the_frame_is_the_average():
    model = silent(VFIMamba(VFIMamba.preset("tiny")))
    pair = pairs(2, 2, 3, 64, 96)
    made = model(pair)
    assert made.flow.abs().max() == 0
    assert made.mask.abs().max() == 0
    assert torch.allclose(made.frame, pair.mean(1), atol=1e-5)


def test_a_flow_planted_in_the_second_head_moves_both_frames_exactly():
    model = silent(VFIMamba(VFIMamba.preset("tiny")))
    last = model.block[1].conv[-1][0]
    # Head 1 works at half size: its bias is half the flow in pixels.
    last.bias.data[:4] = torch.tensor([2.0, 1.0, 3.0, 0.5])
    pair = pairs(1, 2, 3, 64, 96)
    made = model(pair)
    assert torch.allclose(made.flow, torch.tensor([4.0, 2.0, 6.0, 1.0])[:, None, None].expand(1, 4, 64, 96))
    expected = (pair[:, 0].roll((-2, -4), (2, 3)) + pair[:, 1].roll((-1, -6), (2, 3))) / 2
    assert torch.allclose(made.frame[..., :-2, :-6], expected[..., :-2, :-6], atol=1e-5)


def places(config, height, width):
    """Where every pixel of both frames comes back from when each column scan does nothing, as one index."""
    scan = FramePairScan(4, config)
    index = torch.arange(2.0 * height * width).view(2, height, width, 1)
    tokens = scan.sequences(index)
    tokens[:, :, [0, 2]] = 0
    return index.flatten().long(), scan.frames(tokens, height).flatten().long() // 2


@pytest.mark.parametrize(("height", "width"), [(16, 16), (3, 4), (5, 8)])
@pytest.mark.parametrize("merge", ["interleaved", "sequential"])
def test_exact_unmerge_puts_every_pixel_back(height, width, merge):
    before, after = places(replace(PRESETS["tiny"], merge=merge), height, width)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("height", "width", "kept"), [(16, 16, 0.25), (3, 4, 1 / 3)])
def test_released_unmerge_permutes_and_keeps_few_pixels_in_place(height, width, kept):
    before, after = places(replace(PRESETS["tiny"], unmerge="released"), height, width)
    assert torch.equal(after.sort().values, before)
    assert (before == after).float().mean().item() == pytest.approx(kept, abs=0.005)


def test_released_unmerge_repeats_the_published_axis_mix_up():
    height, width = 3, 4
    _, after = places(replace(PRESETS["tiny"], unmerge="released"), height, width)
    frame, h, w = torch.meshgrid(torch.arange(2), torch.arange(height), torch.arange(width), indexing="ij")
    index = (frame * height + h) * width + w
    columns = index.permute(2, 1, 0).flatten()  # interleaved column by column
    mixed = columns.view(2, width, height).transpose(1, 2).reshape(height, width, 2)
    assert torch.equal(after, mixed.permute(2, 0, 1).flatten())


def test_corresponding_pixels_are_neighbours_in_the_interleaved_sequence():
    def distance(merge):
        tokens = FramePairScan(4, replace(PRESETS["tiny"], merge=merge)).sequences(
            torch.arange(2 * 30.0).view(2, 5, 6, 1)
        )
        place = tokens[:, 0, :, 0].argsort(0)
        return (place[30:] - place[:30]).abs()

    assert (distance("interleaved") == 1).all()
    assert (distance("sequential") == 30).all()


def test_impulse_reaches_the_same_pixel_of_the_other_frame_only_when_interleaved():
    height, width, spot = 4, 8, (2, 3)
    answers = {}
    for merge in ("interleaved", "sequential"):
        torch.manual_seed(0)
        scan = FramePairScan(4, replace(PRESETS["tiny"], merge=merge)).eval()
        with torch.no_grad():
            scan.dt_projs_weight.zero_()
            scan.dt_projs_bias.fill_(0.5)  # a fixed step: memory of a few tokens
            base = torch.ones(2, height, width, 8)
            struck = base.clone()
            struck[1, *spot] += 1
            answers[merge] = (scan.scan(struck) - scan.scan(base))[0, *spot].norm()
    assert answers["interleaved"] > 10 * answers["sequential"]


def test_both_frames_are_warped_by_their_own_flow():
    frames, flow = pairs(2, 1, 8, 8), torch.zeros(1, 4, 8, 8)
    flow[:, 0], flow[:, 3] = 1, 2
    warped = _both(frames, flow)
    assert torch.allclose(warped[0, 0, :, :-1], frames[0, 0, :, 1:], atol=1e-5)
    assert torch.allclose(warped[0, 1, :-2], frames[1, 0, 2:], atol=1e-5)


def test_twice_the_area_costs_twice_the_scan(tiny):
    assert tiny.scan_macs(256, 512) == 2 * tiny.scan_macs(256, 256) > 0


def test_paper_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        large, small = VFIMamba(VFIMamba.preset("paper")), VFIMamba(VFIMamba.preset("small"))
    count = lambda model: sum(value.numel() for value in model.parameters())  # noqa: E731
    assert count(large) == card("vfimamba").paper_parameters
    # Published files of float32: 264 MB and 67.3 MB.
    assert count(large) * 4 == pytest.approx(264e6, rel=0.005)
    assert count(small) * 4 == pytest.approx(67.3e6, rel=0.005)


@pytest.mark.parametrize("shape", [(3, 50, 71), (2, 3, 32, 64)])
def test_any_size_comes_back_at_its_size_and_in_range(tiny, shape):
    frame = tiny.at(pairs(*shape), pairs(*shape, seed=1))
    assert frame.shape == shape
    assert frame.min() >= 0
    assert frame.max() <= 1


def test_lower_flow_scale_and_rotation_give_frames_too(tiny):
    a, b = pairs(2, 3, 60, 70)
    assert tiny.at(a, b, scale=0.5).shape == (3, 60, 70)
    turned = tiny.at(a.flip(-1, -2), b.flip(-1, -2), rotate=True).flip(-1, -2)
    aligned = pairs(2, 3, 64, 64)
    once = tiny.at(*aligned, rotate=True)
    again = tiny.at(*aligned.flip(-1, -2), rotate=True).flip(-1, -2)
    assert turned.shape == a.shape
    assert torch.allclose(once, again, atol=1e-5)


def test_flow_scale_keeps_planted_flow_in_full_pixels():
    model = silent(VFIMamba(VFIMamba.preset("tiny")))
    model.block[1].conv[-1][0].bias.data[:4] = 1.0
    assert torch.allclose(model(pairs(1, 2, 3, 64, 64), scale=0.5).flow, torch.tensor(4.0), atol=1e-5)


def test_time_reaches_the_flow(tiny):
    pair = pairs(1, 2, 3, 32, 32)
    assert not torch.allclose(tiny(pair, 0.25).flow, tiny(pair, 0.75).flow)
    both = tiny(pair.expand(2, -1, -1, -1, -1), torch.tensor([0.25, 0.75])).flow
    assert torch.allclose(both, torch.cat([tiny(pair, t).flow for t in (0.25, 0.75)]), atol=1e-5)


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    model = VFIMamba(VFIMamba.preset("tiny"))
    clip = F.interpolate(pairs(2, 3, 16, 24), scale_factor=8, mode="bicubic").clamp(0, 1)
    batch = {
        "pair": torch.stack([clip[..., :64, :64], clip[..., :64, 8:72]], 1),
        "middle": clip[..., :64, 4:68],
        "t": torch.full((2,), 0.5),
    }
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        loss = model.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(value.grad is not None for value in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_loss_is_float32_under_autocast(tiny):
    batch = {
        "pair": pairs(1, 2, 3, 64, 64),
        "middle": pairs(1, 3, 64, 64, seed=1),
        "t": torch.full((1,), 0.5),
    }
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny.loss(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(tiny.loss(batch).item(), rel=0.05)


def published(model):
    """A state dict in the shape of the published files."""
    state = {f"module.{key}": value.clone() for key, value in model.state_dict().items()}
    return state | {"module.feature_bone.block3.attn_mask": torch.ones(2), "module.block.0.HW": torch.ones(1)}


def test_published_checkpoint_loads_strictly_and_sets_the_size(tmp_path):
    config = replace(
        PRESETS["small"], depths=(2, 2, 2, 3, 1), unmerge="released", shuffle="twice", bgr=True, centred=True
    )
    model = VFIMamba(config)
    torch.save(published(model), tmp_path / "VFIMamba_S.pkl")
    loaded = VFIMamba.load_official(tmp_path / "VFIMamba_S.pkl")
    assert loaded.config == config
    assert loaded.fixed_t
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def _lacking(state):
    del state["module.unet.conv.bias"]
    return state


BROKEN = {
    "lacking": (_lacking, "it has no unet.conv.bias"),
    "unknown": (lambda state: state | {"module.extra": torch.ones(1)}, "it has an unknown extra"),
    "shape": (
        lambda state: state | {"module.unet.conv.bias": torch.ones(4)},
        r"unet.conv.bias is \[4\] there and \[3\] here",
    ),
    "other": (lambda state: {"weight": torch.ones(2)}, "not a VFIMamba checkpoint"),
    "number": (lambda state: state | {"module.feature_bone.block0.conv.0.weight": torch.ones(())}, "not a VFIMamba"),
    "list": (lambda state: list(state.values()), "no flat table of tensors"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_wrong_checkpoint_is_named_with_what_does_not_fit(tmp_path, tiny, fault):
    change, message = BROKEN[fault]
    torch.save(change(published(tiny)), tmp_path / "wrong.pkl")
    with pytest.raises(InputError, match=message) as caught:
        VFIMamba.load_official(tmp_path / "wrong.pkl")
    assert "wrong.pkl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pkl: not a file of tensors") as caught:
        VFIMamba.load_official(tmp_path / "x.pkl")
    assert "\n" not in str(caught.value)


def test_missing_checkpoint_and_unknown_size_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        VFIMamba.load_official(tmp_path / "none.pkl")
    with pytest.raises(InputError, match="there are tiny, small, paper"):
        VFIMamba.preset("huge")


def test_curriculum_raises_motion_to_its_end():
    course = Curriculum(start=4.0, end=16.0, ramp=0.5)
    assert [course.motion(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([4, 8, 16, 16])


def test_recipes_exist_for_every_size_and_other_data_is_refused():
    assert {VFIMamba.recipe(size).final_lr for size in PRESETS} == {2e-5}
    with pytest.raises(InputError, match="--data kitti: vfimamba learns from world"):
        VFIMamba.dataset("kitti", "tiny", 0)


def test_triplets_of_the_world_repeat_and_grow_in_motion():
    data = VFIMamba.dataset("world", "tiny", 7)
    batch = data.batch([3, 4], 0.0)
    assert batch["pair"].shape == (2, 2, 3, 96, 96)
    assert batch["middle"].shape == (2, 3, 96, 96)
    assert torch.equal(batch["t"], torch.full((2,), 0.5))
    assert torch.equal(batch["middle"][1:], data.batch([4], 0.0)["middle"])
    difference = lambda made: (made["pair"][:, 0] - made["pair"][:, 1]).abs().mean()  # noqa: E731
    assert difference(data.batch([3, 4], 1.0)) > 1.3 * difference(batch)


def test_any_time_comes_as_a_function_of_the_pair(tiny):
    a, b = pairs(2, 3, 32, 32)
    assert torch.equal(tiny.between(a, b)(0.5), tiny.at(a, b, 0.5))
    assert tiny.fixed_t


def test_flow_and_frame_keep_float32_under_autocast(tiny):
    with torch.autocast("cpu", torch.bfloat16):
        made = tiny(pairs(1, 2, 3, 32, 32))
    assert {made.frame.dtype, made.flow.dtype, made.mask.dtype} == {torch.float32}
