"""Where things are in a diffusers model: its modules in the order in which they run, told apart by kind and stage."""

import re
from collections.abc import Iterator

from torch import nn

from frameloom.diffusion.denoiser import Site

KINDS = ("spatial_self", "spatial_cross", "temporal_self", "temporal_cross", "full_self", "temporal_conv", "conv",
         "norm", "mlp", "block", "temporal_block", "resnet")  # fmt: skip

# Lists of one parent that run in turn: first of each, then second of each.
_WOVEN = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules", "transformer_blocks",
          "temporal_transformer_blocks")  # fmt: skip
# Children that run after those registered behind them, in this order.
_LATE = {
    "WanTransformerBlock": ("norm2", "attn2", "norm3", "ffn"),
    "LTXVideoTransformerBlock": ("attn2", "norm2", "ff"),
    "*": ("mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"),
}
_TEMPORAL = re.compile(r"\b(temp_attentions|motion_modules|temporal_transformer_blocks|transformer_in)\b")
_BLOCK = re.compile(r"((down|up)_blocks\.\d+|mid_block|(temporal_)?transformer_blocks\.\d+|blocks\.\d+)")
_TEMPORAL_CONVS = ("TemporalConvLayer", "TemporalResnetBlock")
_RESNETS = ("ResnetBlock2D", "SpatioTemporalResBlock")


def running_order(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`module` and all below it by name: as `named_modules`, but in the order of a forward pass."""
    yield name, module
    children = dict(module.named_children())
    for late in _LATE.get(type(module).__name__, _LATE["*"]):
        if late in children:
            children[late] = children.pop(late)
    woven = [key for key in _WOVEN if key in children and isinstance(children[key], nn.ModuleList)]
    done = False
    for key, child in children.items():
        path = f"{name}.{key}" if name else key
        if key not in woven:
            yield from running_order(child, path)
        elif not done:
            done = True
            yield from _weave(children, woven, name)


def _weave(children: dict[str, nn.Module], woven: list[str], name: str) -> Iterator[tuple[str, nn.Module]]:
    def turn(key: str, i: int) -> Iterator[tuple[str, nn.Module]]:
        if 0 <= i < len(children[key]) and children[key][i] is not None:
            yield from running_order(children[key][i], f"{name}.{key}.{i}" if name else f"{key}.{i}")

    # The middle of a U-Net is a resnet, then attention and a resnet by turns.
    middle = name.endswith("mid_block")
    convolutions = [key for key in woven if middle and key in ("resnets", "temp_convs")]
    others = [key for key in woven if key not in convolutions]
    for key in convolutions:
        yield from turn(key, 0)
    for i in range(max(len(children[key]) for key in woven)):
        for key in others:
            yield from turn(key, i)
        for key in convolutions:
            yield from turn(key, i + 1)


def kind_of(name: str, module: nn.Module, flat: bool) -> str | None:
    """The kind of a module, or None; `flat` where there are no temporal layers beside the spatial ones."""
    label, temporal = type(module).__name__, _TEMPORAL.search(name) is not None
    if _BLOCK.fullmatch(name):
        return "block"
    if label in _TEMPORAL_CONVS:
        return "temporal_conv"
    if label in _RESNETS and not name.endswith("spatial_res_block"):
        return "resnet"
    if label == "FeedForward":
        return "mlp"
    if hasattr(module, "to_q"):
        cross = name.endswith("attn2") and getattr(module, "is_cross_attention", True)
        if temporal:
            return "temporal_cross" if cross else "temporal_self"
        return "spatial_cross" if cross else "full_self" if flat else "spatial_self"
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return None if re.search(r"\b(temp_convs|temporal_res_block)\b", name) else "conv"
    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm) or label == "RMSNorm":
        return "norm"
    return None


def places(host: nn.Module) -> Iterator[Site]:
    """All sites of a host, in the order in which they run."""
    flat = not hasattr(host, "down_blocks") and not hasattr(host, "temporal_transformer_blocks")
    deepest = len(getattr(host, "down_blocks", [0])) - 1
    for name, module in running_order(host):
        kinds = [kind_of(name, module, flat)]
        if type(module).__name__.endswith("BasicTransformerBlock") and _TEMPORAL.search(name):
            kinds.append("temporal_block")
        if not any(kinds):
            continue
        stage, level = "mid", 0
        if found := re.match(r"(down|up)_blocks\.(\d+)", name):
            stage = found[1]
            level = int(found[2]) if stage == "down" else deepest - int(found[2])
        elif name.startswith("mid_block"):
            level = deepest
        elif hasattr(host, "down_blocks"):
            stage = "up" if name.startswith(("conv_out", "conv_norm_out")) else "down"
        yield from (Site(name, module, kind, stage, level) for kind in kinds if kind)
