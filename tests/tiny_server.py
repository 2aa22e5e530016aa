"""A small language model that never ends by itself, and a server around one on a free port."""

import contextlib
import threading
import time
from pathlib import Path

import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from frameloom.language.tokens import TokenModel
from frameloom.scale.engine import Engine
from frameloom.scale.flover import FusedDecoder
from frameloom.scale.serve import _listen, application

WORDS = 61

# As many published ones do, it insists on turns and knows no other roles.
TEMPLATE = """{% for m in messages %}
{%- if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('There is no role ' + m.role) }}{% endif %}
{%- if not loop.first and m.role == messages[loop.index0 - 1].role %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<s>' + m.role + ': ' + m.content }}{% endfor %}<s>assistant:"""


def llama(words: int = WORDS, length: int = 512, **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, initializer_range=0.3,
        **({"eos_token_id": None, "bos_token_id": None, "pad_token_id": None} | more),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def served(model: TokenModel, slots: int = 4, queue: int = 64, max_len: int = 64, pause: float = 0.0):
    """A server on a free port, whose model waits `pause` seconds before every forward pass: its address and engine."""
    hook = model.model.register_forward_pre_hook(lambda *_: time.sleep(pause)) if pause else None
    engine = Engine(FusedDecoder(model.model, slots, max_len, queue=queue, eos=model.eos))
    listener = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application(model, engine), log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        if hook:
            hook.remove()


def chatting(path: Path) -> Path:
    """A folder of transformers with a tokenizer that has a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<s>"], show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    llama(len(fast), 1024).save_pretrained(path)
    return path
