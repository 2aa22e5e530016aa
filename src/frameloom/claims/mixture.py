"""A small mixture of experts that is trained on the spot, for claims about large ones."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from frameloom.progress import Progress, silent
from frameloom.scale.calibration import Sample, captions, hide_spans
from frameloom.world.language import VOCABULARY

SENTINELS = [f"<extra_id_{number}>" for number in range(8)]


def tokenizer():
    """The words of captions, one token each, as a tokenizer of transformers; 0 pads and begins, 1 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *VOCABULARY, *SENTINELS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   additional_special_tokens=SENTINELS)  # fmt: skip


def texts(count: int, seed: int) -> list[torch.Tensor]:
    """Captions as tokens."""
    reader = tokenizer()
    return [torch.tensor(reader(text)["input_ids"]) for text in captions(count, seed)]


def hidden(rows: list[torch.Tensor], seed: int) -> list[Sample]:
    """Each with spans hidden at random."""
    sentinels = torch.tensor(tokenizer().convert_tokens_to_ids(SENTINELS))
    generator = torch.Generator().manual_seed(seed)
    return [hide_spans(row, sentinels, generator) for row in rows]


def batch(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Padded, as Switch Transformers take it. Sentinels are not asked for."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([sample.ids for sample in samples], batch_first=True)
    said = [torch.where(sample.said, sample.target, -100) for sample in samples]
    given = [F.pad(sample.target[:-1], (1, 0)) for sample in samples]
    return {"input_ids": ids, "attention_mask": (ids > 0).long(),
            "decoder_input_ids": pad_sequence(given, batch_first=True),
            "labels": pad_sequence(said, batch_first=True, padding_value=-100)}  # fmt: skip


def switch(folder: Path, seed: int, *, width: int = 256, inner: int = 512, experts: int = 16, steps: int = 400,
           sentences: int = 8192, progress: Progress = silent) -> Path:  # fmt: skip
    """Train a Switch Transformer of two blocks a side on captions of the world, and save it with its tokenizer."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

    torch.manual_seed(seed)
    reader = tokenizer()
    config = SwitchTransformersConfig(
        vocab_size=len(reader), d_model=width, d_kv=32, d_ff=inner, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=4, num_experts=experts, expert_capacity=64,
        dropout_rate=0.0, router_jitter_noise=0.01, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    rows = texts(sentences, seed + 10)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    order, asked = torch.Generator().manual_seed(seed), []
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.register_forward_hook(lambda module, args, answer: asked.append(answer[2]))
    for step in range(steps):
        chosen = torch.randint(0, len(rows), (32,), generator=order).tolist()
        given = batch(hidden([rows[index] for index in chosen], seed + step))
        asked.clear()
        loss = model(**given).loss
        loss += 0.1 * sum(load_balancing_loss_func(row.softmax(-1), row.argmax(-1)) for row in asked)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress("steps", step + 1, steps)
    model.eval().save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


@torch.no_grad()
def loss(model: nn.Module, samples: list[Sample]) -> float:
    """Mean cross-entropy of the hidden words, in nats."""
    total = count = 0.0
    for begin in range(0, len(samples), 64):
        given = batch(samples[begin : begin + 64])
        logits, labels = model(**given).logits, given["labels"]
        total += float(F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum"))
        count += int((labels >= 0).sum())
    return total / count
