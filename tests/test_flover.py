"""Fused decoding: what every request gets, how many forward passes that takes, and what becomes of bad ones."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from frameloom.claims.flover import fewest
from frameloom.errors import InputError
from frameloom.scale.flover import FusedDecoder, QueueFull
from frameloom.scale.probe import CommCounter
from frameloom.scale.ranks import RankFailed, local
from frameloom.scale.sampling import GREEDY, Sampling, sample
from frameloom.scale.slots import minimal_moves
from frameloom.scale.split import split

WORDS = 61


def llama(seed: int = 0, heads: int = 4) -> LlamaForCausalLM:
    """In float64; its weights are large, so that it does not say the same word again and again."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=64, initializer_range=0.3, eos_token_id=None,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@torch.no_grad()
def alone(model, prompt, n: int) -> list[int]:
    """Greedily, one at a time, everything computed anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


arrivals = st.lists(
    st.tuples(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 6),
              st.sampled_from([0.0, 0.7])),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(asked=arrivals, slots=st.integers(1, 4), admit=st.sampled_from([None, 1]), compact=st.booleans())
def test_every_request_gets_the_tokens_it_would_get_alone(model, asked, slots, admit, compact):
    decoder = FusedDecoder(model, slots, 16, admit=admit, compact=compact)
    requests = []
    for i in itertools.count():
        requests += [(decoder.submit(prompt, n, Sampling(heat, seed=len(prompt) + n)), prompt, n, heat)
                     for prompt, n, when, heat in asked if when == i]  # fmt: skip
        if i > 6 and not decoder.busy:
            break
        decoder.step()
        assert not compact or decoder.high - decoder.low == decoder.active
    for request, prompt, n, heat in requests:
        assert request.finish == "length"
        if heat:
            single = FusedDecoder(model, 1, 16)
            again = single.submit(prompt, n, request.sampling)
            single.run()
            assert request.tokens == again.tokens
        else:
            assert request.tokens == alone(model, prompt, n)


def test_learned_positions_work_as_well_as_rotary_ones():
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=32, n_layer=2, n_head=4,
                                     initializer_range=0.3)).double().eval()  # fmt: skip
    decoder = FusedDecoder(gpt, 3, 32)
    asked = [([5, 6, 7], 9), ([1], 4), ([9, 8], 12), ([3, 3, 3, 3], 5)]
    requests = [decoder.submit(prompt, n) for prompt, n in asked]
    decoder.run()
    assert [request.tokens for request in requests] == [alone(gpt, prompt, n) for prompt, n in asked]


def test_closing_gaps_takes_the_fewest_moves_there_are():
    rng, least = np.random.default_rng(0), {slots: fewest(slots) for slots in range(1, 11)}
    for _ in range(10_000):
        occupied = (rng.random(rng.integers(1, 11)) < rng.random()).tolist()
        moves, after = minimal_moves(occupied), list(occupied)
        for source, target in moves:
            assert after[source]
            assert not after[target]
            after[source], after[target] = False, True
        assert len(moves) == least[len(occupied)][tuple(occupied)]
        assert least[len(after)][tuple(after)] == 0
    assert minimal_moves([True, False, True]) == [(2, 1)]  # the first of two windows that cost the same


def test_forward_passes_are_counted_and_all_rows_are_useful(model):
    lengths = [16, 24, 8, 12, 20, 3, 1, 7]
    decoder = FusedDecoder(model, len(lengths), 32)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        for n in lengths:
            decoder.submit([n, 2], n)
        decoder.run()
    finally:
        hook.remove()
    # one pass over all prompts gives their first tokens; then an iteration is a token for each that is left
    assert decoder.prefills == 1
    assert decoder.iterations == max(lengths) - 1
    assert decoder.rows == sum(lengths) - len(lengths)
    assert len(seen) == decoder.prefills + decoder.iterations
    assert sum(rows for rows, tokens in seen if tokens == 1) == decoder.rows


def test_without_closing_gaps_rows_are_computed_in_vain(model):
    def rows(compact: bool) -> int:
        decoder = FusedDecoder(model, 3, 32, compact=compact)
        for n in (20, 2, 20):
            decoder.submit([1], n)
        decoder.run()
        return decoder.rows

    assert rows(True) == 39
    assert rows(False) == 57


def test_a_late_request_has_its_first_token_at_the_next_iteration(model):
    decoder = FusedDecoder(model, 4, 32)
    first = decoder.submit([1, 2], 10)
    for _ in range(4):
        decoder.step()
    late = decoder.submit([3], 3)
    decoder.step()
    assert len(late.tokens) == 2  # that of its prompt, and that of the iteration it joined
    decoder.step()
    assert late.done
    assert not first.done


def test_only_what_is_filled_is_moved(model):
    decoder = FusedDecoder(model, 3, 32)
    for n in (9, 2, 9):
        decoder.submit([1, 2, 3], n)
    decoder.step()
    assert decoder.moves == 1
    # after two tokens four columns are filled: of two layers, keys and values, 2 heads of 8 numbers of 8 bytes
    assert decoder.moved_bytes == 2 * 2 * (2 * 4 * 8) * 8
    assert decoder.cache.nbytes == 3 * 32 * 2 * 2 * (2 * 8) * 8


def test_a_request_that_is_cancelled_frees_its_slot_at_the_next_iteration(model):
    told = []
    decoder = FusedDecoder(model, 1, 32)
    first = decoder.submit([1], 20, on_token=lambda r: told.append(len(r.tokens)))
    second, third = decoder.submit([2], 3), decoder.submit([4], 3)
    decoder.step()
    assert decoder.waiting == 2
    decoder.cancel(first)
    decoder.cancel(second)
    decoder.step()
    assert (first.finish, second.finish, len(first.tokens), second.tokens) == ("cancelled", "cancelled", 2, [])
    assert len(third.tokens) == 2
    decoder.cancel(first)  # again, after its end: nothing
    decoder.run()
    assert third.tokens == alone(model, [4], 3)
    assert told == [1, 2, 2]


def test_a_request_ends_at_a_token_that_ends_texts(model):
    whole = alone(model, [7, 8], 9)
    decoder = FusedDecoder(model, 2, 32, eos=[whole[3]])
    request = decoder.submit([7, 8], 9)
    decoder.run()
    assert request.finish == "stop"
    assert request.tokens == whole[: whole.index(whole[3]) + 1]


def test_output_that_is_no_number_fails_its_own_request_only():
    broken = llama()
    start, whole = next((p, t) for p in range(WORDS) if (t := alone(broken, [p], 4))[2] not in (p, *t[:2]))
    with torch.no_grad():
        broken.model.embed_tokens.weight[whole[2]] = float("nan")
    other = next(p for p in range(WORDS) if whole[2] not in (p, *alone(broken, [p], 12)))
    decoder = FusedDecoder(broken, 2, 32)
    bad, good = decoder.submit([start], 9), decoder.submit([other], 12)
    later = decoder.submit([other], 6)  # takes the slot that held what is no number
    decoder.run()
    assert (bad.finish, bad.tokens) == ("failed", whole[:3])
    assert "no number at token 3" in bad.error
    assert good.tokens == alone(broken, [other], 12)
    assert later.tokens == good.tokens[:6]


def test_sampling_keeps_to_the_likeliest_and_follows_its_numbers():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).repeat(4, 1)
    ways = [Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5), Sampling(0.0)]
    for chance, wanted in ((0.05, [0, 1, 1, 1]), (0.45, [1, 1, 1, 1]), (0.65, [2, 3, 3, 1]), (0.999, [3, 3, 3, 1])):
        assert sample(logits, ways, [chance] * 4).tolist() == wanted
    counts = torch.zeros(4)
    for i in range(2000):
        counts[sample(logits[:1], ways[:1], [(i + 0.5) / 2000])] += 1
    assert torch.allclose(counts / 2000, torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=1e-3)
    assert sample(torch.tensor([[0.0, float("nan")]]), [Sampling(1.0)], [0.5]).shape == (1,)


@torch.no_grad()
def test_likelihoods_are_the_models_own_whoever_is_decoded_beside(model):
    decoder = FusedDecoder(model, 3, 32)
    asked = [
        ([5, 6, 7], 9, GREEDY, 3),
        ([1], 4, Sampling(1.5, top_k=5, seed=2), 0),
        ([9, 8], 12, GREEDY, None),
        ([3, 3, 3, 3], 5, Sampling(0.7, top_p=0.8, seed=1), WORDS + 7),
        ([2], 6, Sampling(2.0, seed=3), 1),
    ]
    requests = [decoder.submit(prompt, n, how, likeliest=count) for prompt, n, how, count in asked]
    decoder.run()
    for request, (prompt, n, _, count) in zip(requests, asked, strict=True):
        if count is None:
            assert request.likelihoods == []
            continue
        logits = model(torch.tensor([prompt + request.tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logs = logits.log_softmax(-1)
        assert len(request.likelihoods) == n
        for row, token, told in zip(logs, request.tokens, request.likelihoods, strict=True):
            best, ids = row.topk(min(count, WORDS))
            assert told.logprob == pytest.approx(float(row[token]), abs=1e-9)
            assert [one for one, _ in told.likeliest] == ids.tolist()
            assert [value for _, value in told.likeliest] == pytest.approx(best.tolist(), abs=1e-9)
    silent = FusedDecoder(model, 3, 32)
    plain = [silent.submit(prompt, n, how) for prompt, n, how, _ in asked]
    silent.run()
    assert [request.tokens for request in plain] == [request.tokens for request in requests]


def test_mistakes_are_one_line_with_the_numbers(model):
    decoder = FusedDecoder(model, 1, 16, queue=2)
    for prompt, n, said in (([], 1, "prompt is empty"), ([1], 0, "1 or more"), ([WORDS], 1, "outside 0 to 60"),
                            ([1] * 10, 7, "10 tokens and 7 new ones make 17; 16 fit")):  # fmt: skip
        with pytest.raises(InputError, match=said) as raised:
            decoder.submit(prompt, n)
        assert "\n" not in str(raised.value)
    decoder.submit([1], 3, id="a")
    with pytest.raises(InputError, match="id a: a request of that name is under way"):
        decoder.submit([1], 3, id="a")
    decoder.submit([1], 3)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        decoder.submit([1], 3)
    decoder.run()
    assert decoder.submit([1], 3, id="a").id == "a"
    for made, said in ((lambda: Sampling(-1.0), "temperature"), (lambda: Sampling(top_p=0.0), "top_p"),
                       (lambda: Sampling(top_k=-1), "top_k"), (lambda: Sampling(seed=-1), "seed"),
                       (lambda: FusedDecoder(model, 0), "--slots 0"),
                       (lambda: FusedDecoder(model, 4, 65), "--max-len 65: LlamaForCausalLM knows positions up to 64"),
                       (lambda: FusedDecoder(torch.nn.Linear(2, 2)), "Linear: not a causal language")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            made()


def test_models_that_would_be_decoded_wrongly_are_refused():
    tiny = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(InputError, match="without full attention"):
        FusedDecoder(MistralForCausalLM(MistralConfig(**tiny, sliding_window=8)), 2, 32)
    eager = LlamaForCausalLM(LlamaConfig(**tiny, attn_implementation="eager"))
    with pytest.raises(InputError, match='attn_implementation="sdpa"'):
        FusedDecoder(eager, 2, 32)


ASKED = [([1 + i, 2, 3], 5 + i, Sampling(0.8 * (i % 2), seed=i)) for i in range(8)]


def two_ranks(rank: int, kinds: tuple[int, int]) -> tuple:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    decoder = FusedDecoder(split(llama(kinds[rank]), mesh), 3, 32, ranks=mesh.get_group())
    slow, requests = np.random.default_rng(rank), []
    with CommCounter(mesh) as counter:
        if rank == 0:
            for i, asked in enumerate(ASKED):
                requests.append(decoder.submit(*asked))
                if i % 3 == 2:  # three come between two iterations
                    time.sleep(0.01 * slow.random())
                    decoder.step()
            decoder.cancel(requests[-1])
            decoder.run()
            decoder.close()
        while not decoder.closed:
            time.sleep(0.01 * slow.random())
            decoder.step()
    traffic = {kind: counter[kind, "tp"].calls for kind in ("all_reduce", "all_gather")}
    return [r.tokens for r in requests], list(decoder.admitted), decoder.iterations + decoder.prefills, traffic


def test_two_ranks_make_the_same_tokens_in_the_same_order_with_the_traffic_that_theory_says(model):
    (tokens, order, passes, traffic), (_, other, _, _) = local(two_ranks, 2, (0, 0))
    decoder = FusedDecoder(model, 3, 32)
    requests = [decoder.submit(*asked) for asked in ASKED]
    decoder.run()
    assert tokens[:-1] == [request.tokens for request in requests][:-1]
    assert tokens[-1] == requests[-1].tokens[: len(tokens[-1])]
    assert order == other
    assert traffic == {"all_reduce": 2 * 2 * passes, "all_gather": passes}


def test_ranks_with_different_models_are_told_which():
    with pytest.raises(RankFailed, match=r"--weights: rank 1 has \w+ and rank 0 has \w+; start all ranks alike"):
        local(two_ranks, 2, (0, 1))


def one_head(rank: int) -> None:
    split(llama(heads=2), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))


def test_heads_that_cannot_be_shared_out_are_an_error():
    with pytest.raises(RankFailed, match="1 key value heads cannot be split over 2 ranks"):
        local(one_head, 2)
