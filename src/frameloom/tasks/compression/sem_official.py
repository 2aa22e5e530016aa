"""The authors' checkpoints of `sem`: which of their variables is which parameter here."""

import re
from pathlib import Path

from torch import Tensor

from frameloom.errors import InputError
from frameloom.training.bundle import Bundle

_SCOPE = "IModel/"
# What training leaves beside the weights, and the filter after the decoder.
_LEFT_AWAY = re.compile(r"/Adam(_1)?$|beta[12]_power$|global_step$|post_unet/")
_LAYER = {"kernel": "weight", "weights": "weight", "biases": "bias", "bias": "bias"}
# The parts of the two entropy models, as they are called for first frames and for the others, and what they are here.
_PARTS = {"HE": "hyper_down", "HD": "hyper_up", "context_mask": "spatial", "entropy_para": "join",
          "base_z": "prior"}, {"Pmod_ResE": "hyper_down", "Pmod_ResD": "hyper_up", "Pmod_mask": "spatial",
          "Pmod_entropy": "join", "Pmod_z": "prior", "Pmod_trans": "temporal"}  # fmt: skip


def published(path: str | Path) -> dict[str, Tensor]:
    """The parameters of both of a published checkpoint's models, by the names that they have here.

    Raises InputError for other files, and where the model of first frames or that of the others is not to be found.
    """
    path = Path(path)
    state = _parameters(path)
    if not any(name.startswith("inter.") for name in state):
        raise InputError(f"{path}: holds the model of first frames alone; give the index in P_model/STPM_PSNR "
                         "(STPM_SSIM), which is that of the others")  # fmt: skip
    if not any(name.startswith("intra.") for name in state):
        folder = path.absolute().parents[2] / "I_model" / f"CM_{path.absolute().parent.name.rpartition('_')[2]}"
        found = sorted(folder.glob("*.index"), key=lambda one: (len(one.name), one.name))
        if not found:
            raise InputError(f"{path}: holds no model of first frames, and there is none in {folder}; put that of the "
                             "authors' download there")  # fmt: skip
        state = _parameters(found[-1]) | state
    return state


def _parameters(path: Path) -> dict[str, Tensor]:
    bundle = Bundle(path)
    found = {}
    for name in bundle.entries:
        if not _LEFT_AWAY.search(name):
            value = bundle.read(name).float()
            own = _own(name.removeprefix(_SCOPE))
            found[own] = _turned(own, value)
    return found


def _own(name: str) -> str:
    """What a variable is called here; its own name if it is none of ours."""
    part, *rest = name.split("/")
    number = next((int(found[1]) for one in rest if (found := re.fullmatch(r"(?:conv_|mask)(\d)", one))), None)
    kind = rest[-1].removeprefix("context_") if rest else ""
    if part in ("encoder", "decoder") and rest:
        way, norm = ("down", "norm") if part == "encoder" else ("up", "denorm")
        if "gdn" in rest:
            # The decoder's come before the convolution of the same number.
            stage = int(rest[0].removeprefix(way)) - (part == "decoder")
            return f"pictures.{norm}.{stage}.{kind.removeprefix('reparam_')}"
        return f"pictures.{way}.{number}." + ("log_gain" if "mask_w" in rest else f"conv.{_LAYER.get(kind, kind)}")
    for model, parts in zip(("intra", "inter"), _PARTS, strict=True):
        if part in parts:
            if parts[part] == "prior":
                return f"{model}.prior.{ {'mu_z': 'mean', 'sigma_z': 'log_scale'}.get(kind, kind) }"
            place = "" if number is None else f"{2 * number}."
            return f"{model}.{parts[part]}.{place}{_LAYER.get(kind, kind)}"
    return name


def _turned(own: str, value: Tensor) -> Tensor:
    """Kernels come as rows, columns, channels in (out, for transposed ones), channels out (in)."""
    if value.ndim == 4:
        value = value.permute(3, 2, 0, 1)
        return (value.flatten(1) if ".join." in own else value).contiguous()
    return value.T.contiguous() if own.endswith(".gamma") else value
