"""A small mixture of experts that is trained on the spot, for claims about large ones."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from frameloom.progress import Progress, silent
from frameloom.scale.calibration import Sample, captions
from frameloom.world.language import VOCABULARY

LENGTH = 40
BATCH = 8
SENTINELS = [f"<extra_id_{number}>" for number in range(8)]


def tokenizer():
    """The words of captions, one token each, as a tokenizer of transformers; 0 pads, 1 ends a sentence."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *VOCABULARY, *SENTINELS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   additional_special_tokens=SENTINELS)  # fmt: skip


def pieces(count: int, seed: int) -> list[Sample]:
    """Pieces of `LENGTH` tokens of captions, one caption after the other."""
    reader = tokenizer()
    stream = torch.tensor([token for text in captions(5 * count, seed) for token in (*reader(text)["input_ids"], 1)])
    return [Sample(row) for row in stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)[:count]]


def train(folder: Path, seed: int, *, width: int = 256, inner: int = 512, experts: int = 16, steps: int = 250,
          count: int = 2048, progress: Progress = silent) -> Path:  # fmt: skip
    """Train a Mixtral of two layers, two experts a token, on captions of the world, and save it with its tokenizer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    reader = tokenizer()
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=len(reader), hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=2, router_aux_loss_coef=0.02,
        max_position_embeddings=128, initializer_range=width**-0.5, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    shown = torch.stack([piece.ids for piece in pieces(count, seed + 10)])
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=steps + 2)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        ids = shown[torch.randint(0, len(shown), (BATCH,), generator=order)]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress("steps", step + 1, steps)
    model.eval().save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def plain(folder: Path) -> nn.Module:
    """The uncompressed model, its parameters as bfloat16 keeps them."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder).eval()
    for value in model.parameters():
        value.data = value.data.bfloat16().float()
    return model


@torch.no_grad()
def loss(model: nn.Module, samples: list[Sample]) -> float:
    """Mean cross-entropy of the next word, in nats."""
    ids = torch.stack([sample.ids for sample in samples])
    logits = torch.cat([model(input_ids=part).logits for part in ids.split(64)])
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
