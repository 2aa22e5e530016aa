"""Where mixtures of experts keep their experts: one small adapter for every family of transformers' models.

All families meet in one shape. A layer has E experts of two matrices, `wi` into the hidden layer and `wo` out of it,
with a nonlinearity between them, and its module is called as `experts(tokens, selection, weights)`. An adapter says
what the matrices are called in a checkpoint, how a selection is read, and what the nonlinearity is. A new family is
one more entry of `HOSTS`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from frameloom.errors import InputError


@dataclass(frozen=True)
class Host:
    """How a family of models keeps its experts.

    Attributes:
        model: the class in transformers.
        experts: the name of the class of the module that holds a layer's experts.
        stacks: modules that hold blocks, in the order of their work, and the attribute that lists the blocks.
        expert: an expert's name in a checkpoint, below its layer.
        first: the matrices that `wi` is made of, one above the other.
        second: the matrix that is `wo`.
        fused: what the two are called where a checkpoint stacks all experts in one tensor.
        rename: a part of module names and how checkpoints spell it.
        onehot: a selection marks experts, rather than numbering them.
        activation: the field of the config that names the nonlinearity.
    """

    model: str
    experts: str
    stacks: tuple[tuple[str, str], ...] = (("model", "layers"),)
    expert: str = "{}"
    first: tuple[str, ...] = ("gate_proj", "up_proj")
    second: str = "down_proj"
    fused: tuple[str, str] = ("gate_up_proj", "down_proj")
    rename: tuple[str, str] = ("", "")
    onehot: bool = False
    activation: str = "hidden_act"

    @property
    def seq2seq(self) -> bool:
        return len(self.stacks) == 2

    def between(self, config: Any) -> Callable[[Tensor], Tensor]:
        """The nonlinearity from `wi` to `wo`; with two first matrices the one gates the other."""
        from transformers.activations import ACT2FN

        act = ACT2FN[getattr(config, self.activation)]
        if len(self.first) == 1:
            return act

        def gated(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, -1)
            return act(gate) * up

        return gated

    def routes(self, selection: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every visit of a token to an expert: the token's number, the expert's, and the weight of its answer."""
        if self.onehot:
            token, _, expert = selection.nonzero(as_tuple=True)
            return token, expert, weights[token, 0]
        token = torch.arange(len(selection)).repeat_interleave(selection.shape[1])
        expert, weight = selection.reshape(-1), weights.reshape(-1)
        kept = expert < count
        return token[kept], expert[kept], weight[kept]


_SWITCH = Host("SwitchTransformersForConditionalGeneration", "SwitchTransformersExperts",
               stacks=(("encoder", "block"), ("decoder", "block")), expert="expert_{}", first=("wi",), second="wo",
               fused=("wi", "wo"), onehot=True, activation="dense_act_fn")  # fmt: skip
HOSTS = {
    "switch_transformers": _SWITCH,
    "mixtral": Host("MixtralForCausalLM", "MixtralExperts", first=("w1", "w3"), second="w2",
                    rename=(".mlp.", ".block_sparse_moe.")),
    "qwen2_moe": Host("Qwen2MoeForCausalLM", "Qwen2MoeExperts"),
    "qwen3_moe": Host("Qwen3MoeForCausalLM", "Qwen3MoeExperts"),
}  # fmt: skip


def host_of(model_type: str, name: str = "the model") -> Host:
    """The adapter of a family; InputError for one without experts, or whose experts are not known here."""
    if model_type not in HOSTS:
        raise InputError(f"{name}: no experts are known in {model_type or 'a model without a type'} (known: "
                         f"{', '.join(HOSTS)}); for a dense model take a 4-bit tool, such as GPTQModel or "
                         "bitsandbytes")  # fmt: skip
    return HOSTS[model_type]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold experts, by their path in the model, in the order of the model's work.

    Raises InputError for a model that has none.
    """
    kind = host_of(model.config.model_type).experts
    found = {name: module for name, module in model.named_modules() if type(module).__name__ == kind}
    if not found:
        raise InputError(f"{type(model).__name__} was built without experts; for a dense model take a 4-bit tool")
    return found


def shapes(module: nn.Module) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """How many experts a module of transformers holds, and the shapes of their `wi` and `wo`."""
    if isinstance(module, nn.ModuleDict):
        one = next(iter(module.values()))
        return len(module), tuple(one.wi.weight.shape), tuple(one.wo.weight.shape)
    return len(module.down_proj), tuple(module.gate_up_proj.shape[1:]), tuple(module.down_proj.shape[1:])


def skeleton(config: Any, host: Host) -> nn.Module:
    """The model without its parameters (they are on the meta device and take no memory), in evaluation mode."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, host.model)(config).eval()
    # Tables of positions are in no checkpoint: their modules are made again, for real.
    for name, module in list(model.named_modules()):
        if any(value.is_meta for value in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config))
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; InputError when there is none that can be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: holds no config.json; a folder with a model of transformers is wanted")
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not the description of a model")
    return found


class Checkpoint:
    """Tensors of a folder in the Hugging Face layout, read one by one when they are asked for.

    Raises InputError for a folder without safetensors, and for a tensor that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        try:
            if index.is_file():
                self.where = dict(json.loads(index.read_text())["weight_map"])
            else:
                with safe_open(single, "pt") as file:
                    self.where = dict.fromkeys(file.keys(), single.name)
        except FileNotFoundError:
            raise InputError(f"{folder}: holds no model.safetensors; save_pretrained writes one") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: its weights cannot be read ({type(error).__name__}); "
                             "model.safetensors, or an index of its parts, is wanted") from None  # fmt: skip
        if any(Path(part).name != part for part in self.where.values()):
            raise InputError(f"{index}: names a file outside its own folder")

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def get(self, name: str, part: int | None = None) -> Tensor:
        """A tensor in float32; with `part`, that entry of its first dimension."""
        if name not in self.where:
            raise InputError(f"{self.folder}: the weights lack {name}")
        try:
            with safe_open(self.folder / self.where[name], "pt") as file:
                value = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder / self.where[name]}: damaged ({type(error).__name__})") from None
        # A copy always: what safetensors gives may be a window on the whole mapped file.
        return torch.empty(value.shape).copy_(value)

    def expert(self, host: Host, path: str, number: int) -> tuple[Float[Tensor, "h k"], Float[Tensor, "k h2"]]:
        """The two matrices of one expert of the layer at `path`."""
        if f"{path}.{host.fused[0]}" in self:
            return self.get(f"{path}.{host.fused[0]}", number), self.get(f"{path}.{host.fused[1]}", number)
        base = f"{path.replace(*host.rename) if host.rename[0] else path}.{host.expert.format(number)}"
        first = [self.get(f"{base}.{name}.weight") for name in host.first]
        return torch.cat(first) if len(first) > 1 else first[0], self.get(f"{base}.{host.second}.weight")

    def fill(self, model: nn.Module, host: Host) -> None:
        """Load all parameters that `model` has; tied ones may be missing."""
        names = {name: name.replace(*host.rename) if host.rename[0] else name for name in model.state_dict()}
        found = {name: self.get(spelt if spelt in self else name) for name, spelt in names.items()
                 if spelt in self or name in self}  # fmt: skip
        assign(model, found, self.folder)


def assign(model: nn.Module, values: dict[str, Tensor], folder: Path) -> None:
    """Put values in the place of a skeleton's parameters, and tie what is tied."""
    try:
        model.load_state_dict(values, strict=False, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder}: {str(error).splitlines()[-1].strip()}") from None
    model.tie_weights()
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    if empty:
        raise InputError(
            f"{folder}: the weights lack {empty[0]}" + (f" and {len(empty) - 1} more" if empty[1:] else "")
        )
    model.requires_grad_(False)


class Experts(nn.Module):
    """Experts whose matrices are compressed, in the place of a layer's own; called as those are.

    Args:
        layers: `wi` and `wo` of every expert: modules that map `(n, in)` to `(n, out)` and have `dense()`.
        host: the family.
        between: the nonlinearity.
        decoded: how many experts are kept as plain matrices after use, the last used ones; 0 multiplies from the code.
    """

    def __init__(self, layers: list[tuple[nn.Module, nn.Module]], host: Host, between: Callable[[Tensor], Tensor],
                 decoded: int = 0) -> None:  # fmt: skip
        super().__init__()
        for number, (wi, wo) in enumerate(layers):
            self.add_module(f"expert_{number}", nn.ModuleDict({"wi": wi, "wo": wo}))
        self.num_experts, self.decoded = len(layers), decoded
        self._host, self._between = host, between
        self._recent: dict[int, tuple[Tensor, Tensor]] = {}

    def expert(self, number: int, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What one expert says to tokens, in float32."""
        one = getattr(self, f"expert_{number}")
        if not self.decoded:
            return one["wo"](self._between(one["wi"](x)))
        pair = self._recent.pop(number, None) or (one["wi"].dense(), one["wo"].dense())
        self._recent[number] = pair  # a dict keeps the order of insertion, so that the first is the least recent
        if len(self._recent) > self.decoded:
            del self._recent[next(iter(self._recent))]
        return F.linear(self._between(F.linear(x, pair[0])), pair[1])

    def forward(self, hidden: Float[Tensor, "n d"], selection: Int[Tensor, "..."], weights: Float[Tensor, "n k"]
                ) -> Float[Tensor, "n d"]:  # fmt: skip
        token, expert, weight = self._host.routes(selection, weights, self.num_experts)
        out = torch.zeros_like(hidden)
        for number in expert.unique().tolist():
            mine = (expert == number).nonzero()[:, 0]
            at = token[mine]
            answer = self.expert(number, hidden[at].float()) * weight[mine, None]
            out.index_add_(0, at, answer.to(out.dtype))
        return out
