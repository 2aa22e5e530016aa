"""Adapters: every diffusers host looks alike. Tiny random models of the real classes."""

from functools import cache

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from frameloom.diffusion.adapters.cogvideox import CogVideoX
from frameloom.diffusion.adapters.latte import Latte
from frameloom.diffusion.adapters.ltx import LTX
from frameloom.diffusion.adapters.motion import UNetMotion
from frameloom.diffusion.adapters.places import KINDS
from frameloom.diffusion.adapters.svd import SVD
from frameloom.diffusion.adapters.unet2d import UNet2D
from frameloom.diffusion.adapters.unet3d import UNet3D
from frameloom.diffusion.adapters.wan import Wan
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.hooks import install
from frameloom.diffusion.paths import VP
from frameloom.diffusion.run import sample
from frameloom.errors import InputError

PATH = VP.of("scaled_linear", 1000, 0.00085, 0.012)


def unet3d():
    host = UNet3DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return UNet3D(host, PATH, "v", frames=4)


def picture_unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


def motion():
    modules = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
                            motion_num_attention_heads=2)  # fmt: skip
    return UNetMotion(UNetMotionModel.from_unet2d(picture_unet(), modules), PATH, frames=4)


def unet2d():
    return UNet2D(picture_unet(), PATH, frames=4)


def labelled():
    host = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                       norm_num_groups=8, num_class_embeds=5)  # fmt: skip
    return UNet2D(host, PATH, frames=4)


def latte():
    host = LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=2, caption_channels=32, video_length=4, cross_attention_dim=64, norm_type="ada_norm_single",
        norm_elementwise_affine=False, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return Latte(host, PATH)


def svd():
    host = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(2, 4), addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=4,
    )  # fmt: skip
    return SVD(host)


def cogvideox(rotary=True):
    host = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=13,
        patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=6, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    return CogVideoX(host, PATH)


def wan():
    host = WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
                                 out_channels=4, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
                                 rope_max_seq_len=32)  # fmt: skip
    return Wan(host, frames=4, height=8, width=8)


def ltx():
    host = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
                                      cross_attention_dim=32, num_layers=2, caption_channels=32)  # fmt: skip
    return LTX(host, frames=4, height=8, width=8)


MAKERS = {maker.__name__: maker
          for maker in (unet3d, motion, unet2d, labelled, latte, svd, cogvideox, wan, ltx)}  # fmt: skip
PER_FRAME = [name for name in MAKERS if name != "cogvideox"]
# What mixes frames, beside normalisation over them: with it silenced, a frame hears of its own time alone.
MIXERS = ("temporal_self", "temporal_cross", "temporal_conv", "full_self")


@cache
def made(name):
    torch.manual_seed(0)
    adapter = MAKERS[name]()
    for parameter in adapter.host.parameters():  # also those that start at zero
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.1)
    return adapter, adapter.host.eval().requires_grad_(False)


def inputs(name, b=2):
    adapter, _ = made(name)
    torch.manual_seed(1)
    latent = adapter.latent
    x = torch.randn(latent.shape(b))
    values = {"text": torch.randn(b, 6, 32)}
    if name == "labelled":
        values = {"label": torch.tensor([1, 4])}
    if name == "svd":
        values = {"image": torch.randn(b, 1, 4, 8, 8), "image_embeds": torch.randn(b, 1, 32),
                  "time_ids": torch.tensor([[6.0, 127, 0.02]] * b)}  # fmt: skip
    if name == "cogvideox":
        values["image"] = torch.randn(b, 1, 4, 8, 8)
    if name in ("latte", "ltx"):
        values["text_mask"] = torch.tensor([[1.0] * 6, [1, 1, 1, 0, 0, 0]])
    t = {"wan": [0.3, 0.8], "ltx": [0.3, 0.8], "svd": [0.5, 7.0]}.get(name, [301.0, 800.0])
    return x, torch.tensor(t), Cond(values)


def by_hand(name, host, x, t, cond):
    """The host's own call in its own layout."""
    text, folded = cond.get("text"), x.transpose(1, 2)
    if name == "unet3d":
        return host(folded, t.long() - 1, text).sample.transpose(1, 2)
    if name == "motion":
        return host(folded, t.long() - 1, text.repeat_interleave(4, 0)).sample.transpose(1, 2)
    if name == "unet2d":
        frames = [host(x[:, i], t.long() - 1, text).sample for i in range(x.shape[1])]
        return torch.stack(frames, 1)
    if name == "labelled":
        return torch.stack([host(x[:, i], t.long() - 1, cond["label"]).sample for i in range(x.shape[1])], 1)
    if name == "latte":
        # The second text is three tokens long: cut, not masked.
        parts = [
            host(folded[i : i + 1], t[i : i + 1].long() - 1, text[i : i + 1, : 6 - 3 * i]).sample for i in range(2)
        ]
        return torch.cat(parts).transpose(1, 2)
    if name == "svd":
        scaled = x / (t**2 + 1).sqrt()[:, None, None, None, None]
        both = torch.cat([scaled, cond["image"].repeat(1, 4, 1, 1, 1)], 2)
        return host(both, 0.25 * t.log(), cond["image_embeds"], cond["time_ids"]).sample
    if name == "cogvideox":
        both = torch.cat([x, torch.cat([cond["image"], torch.zeros(2, 3, 4, 8, 8)], 1)], 2)
        rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 4)
        return host(both, text, t.long() - 1, image_rotary_emb=rotary).sample
    if name == "wan":
        return host(folded, t * 1000, text).sample.transpose(1, 2)
    tokens = x.permute(0, 1, 3, 4, 2).flatten(1, 3)
    found = host(tokens, text, t * 1000, cond["text_mask"], 4, 8, 8, (8 / 25, 32, 32)).sample
    return found.reshape(2, 4, 8, 8, 4).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("name", MAKERS)
def test_the_raw_output_is_the_hosts_own(name):
    adapter, host = made(name)
    x, t, cond = inputs(name)
    torch.testing.assert_close(adapter.call(x, t, cond), by_hand(name, host, x, t, cond), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PER_FRAME)
def test_equal_times_per_frame_are_one_time(name):
    adapter, _ = made(name)
    x, t, cond = inputs(name)
    per_frame = t[:, None].expand(-1, x.shape[1])
    torch.testing.assert_close(adapter.call(x, per_frame, cond), adapter.call(x, t, cond), atol=1e-5, rtol=1e-5)
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in adapter.host.modules())


class Silent:
    """In place of a module: its own input (of a convolution), or nothing at all (of an attention)."""

    def wrap(self, site, forward, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        return torch.zeros_like(x) if "self" in site.kind or "cross" in site.kind else x


@pytest.mark.parametrize("name", PER_FRAME)
def test_a_frames_time_is_heard_by_that_frame_and_through_what_mixes_frames(name):
    adapter, _ = made(name)
    x, t, cond = inputs(name)
    times = t[:, None].repeat(1, x.shape[1])
    other = times.clone()
    other[:, 2] *= 0.6
    if name not in ("unet2d", "labelled"):
        moved = (adapter.call(x, times, cond) - adapter.call(x, other, cond)).abs().amax((0, 2, 3, 4))
        assert (moved > 1e-6).all(), "frames hear of each other"
    frame_norms = ("norm", lambda site: "temp_attentions" in site.name or "motion" in site.name
                   or "transformer_in" in site.name)  # fmt: skip
    hooks = [(kind, Silent()) for kind in MIXERS] + [(frame_norms, Silent())]
    with install(adapter, [hook for hook in hooks if _exists(adapter, hook[0])]):
        moved = (adapter.call(x, times, cond) - adapter.call(x, other, cond)).abs().amax((0, 2, 3, 4))
    assert moved[2] > 1e-4
    assert moved[[0, 1, 3]].max() < 1e-6


def _exists(adapter, where):
    kind, keep = (where, lambda site: True) if isinstance(where, str) else where
    return any(keep(site) for site in adapter.sites(kind))


EXPECTED = {
    "unet3d": {"spatial_self", "spatial_cross", "temporal_self", "temporal_conv", "conv", "norm", "mlp", "block",
               "temporal_block", "resnet"},
    "motion": {"spatial_self", "spatial_cross", "temporal_self", "conv", "norm", "mlp", "block", "temporal_block",
               "resnet"},
    "unet2d": {"spatial_self", "spatial_cross", "conv", "norm", "mlp", "block", "resnet"},
    "labelled": {"spatial_self", "conv", "norm", "block", "resnet"},
    "latte": {"spatial_self", "spatial_cross", "temporal_self", "conv", "norm", "mlp", "block", "temporal_block"},
    "svd": {"spatial_self", "spatial_cross", "temporal_self", "temporal_cross", "temporal_conv", "conv", "norm", "mlp",
            "block", "temporal_block", "resnet"},
    "cogvideox": {"full_self", "conv", "norm", "mlp", "block"},
    "wan": {"full_self", "spatial_cross", "conv", "norm", "mlp", "block"},
    "ltx": {"full_self", "spatial_cross", "norm", "mlp", "block"},
}  # fmt: skip


class Recorder:
    def __init__(self, fail=False):
        self.seen, self.fail = [], fail

    def wrap(self, site, forward, args, kwargs):
        self.seen.append(site.name)
        if self.fail:
            raise RuntimeError("on purpose")
        return forward(*args, **kwargs)


@pytest.mark.parametrize("name", MAKERS)
def test_sites_are_found_called_in_their_order_and_left_clean(name):
    adapter, host = made(name)
    x, t, cond = inputs(name)
    plain = adapter.call(x, t, cond)
    assert {kind for kind in KINDS if list(adapter.sites(kind))} == EXPECTED[name]
    for kind in EXPECTED[name]:
        recorder = Recorder()
        with install(adapter, [(kind, recorder)]):
            assert torch.equal(adapter.call(x, t, cond), plain)
        assert list(dict.fromkeys(recorder.seen)) == [site.name for site in adapter.sites(kind)], kind
        with pytest.raises(RuntimeError, match="on purpose"), install(adapter, [(kind, Recorder(fail=True))]):
            adapter.call(x, t, cond)
        assert not any("forward" in module.__dict__ for module in host.modules())
    assert torch.equal(adapter.call(x, t, cond), plain)


@pytest.mark.parametrize("name", ["unet3d", "svd"])
def test_stages_and_levels_of_a_u_net(name):
    adapter, _ = made(name)
    found = [(site.stage, site.level) for site in adapter.sites("resnet")]
    assert found == [("down", 0), ("down", 1), ("mid", 1), ("mid", 1), ("up", 1), ("up", 1), ("up", 0), ("up", 0)]


def test_an_error_inside_a_call_with_times_per_frame_leaves_no_trace():
    for name in ("unet3d", "latte"):
        adapter, host = made(name)
        x, t, cond = inputs(name)
        with pytest.raises(RuntimeError, match="on purpose"), install(adapter, [("mlp", Recorder(fail=True))]):
            adapter.call(x, t[:, None].expand(-1, 4), cond)
        assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in host.modules())


def test_clips_longer_than_the_positions_are_refused():
    adapter, _ = made("motion")
    x, t, cond = inputs("motion")
    with pytest.raises(InputError, match="32 latent frames at a time; 33 were asked for"):
        adapter(x[:, :1].repeat(1, 33, 1, 1, 1), t, cond)


def test_latte_goes_on_with_its_positions_for_longer_clips_and_leaves_its_table_as_it_was():
    adapter, host = made("latte")
    x, t, cond = inputs("latte")
    table = host.temp_pos_embed
    plain = adapter.call(x, t, cond)
    assert adapter.call(x[:, :1].repeat(1, 9, 1, 1, 1), t, cond).shape[1] == 9
    assert host.temp_pos_embed is table
    assert torch.equal(adapter.call(x, t, cond), plain)


def test_one_time_for_all_frames_is_said_before_any_work():
    adapter, _ = made("cogvideox")
    x, _, cond = inputs("cogvideox")
    with pytest.raises(InputError, match="one noise level"):
        sample(adapter, x, torch.ones(3, 4), cond)
