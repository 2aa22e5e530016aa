"""Compressing mixtures of experts: GPTQ, the stream through a model, the folder, and the way back."""

import hashlib
import json
import logging
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import frameloom
from frameloom.claims.mixture import tokenizer
from frameloom.cli.app import main
from frameloom.errors import InputError
from frameloom.memory import peak
from frameloom.scale import qmoe
from frameloom.scale.calibration import Sample, hide_spans, read
from frameloom.scale.experts import Checkpoint, experts_of, host_of
from frameloom.scale.gptq import GRIDS, gptq, nearest
from frameloom.scale.packed import is_compressed, load

VOCABULARY = 104
SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "hidden_size": 32, "num_experts_per_tok": 2}  # fmt: skip


def build(kind: str, experts: int = 6) -> nn.Module:
    torch.manual_seed(0)
    if kind == "switch":
        config = transformers.SwitchTransformersConfig(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_sparse_encoder_layers=1, num_heads=2,
            num_decoder_layers=2, num_sparse_decoder_layers=1, num_experts=experts, decoder_start_token_id=0,
            pad_token_id=0, dropout_rate=0.0)  # fmt: skip
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    elif kind == "mixtral":
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=experts))  # fmt: skip
    else:
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
            **SMALL, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=24,
            num_experts=experts))  # fmt: skip
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.bfloat16())  # so that nothing but the experts changes on the way
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("switch", "mixtral", "qwen"):
        made[kind] = tmp_path_factory.mktemp(kind) / "model"
        build(kind).save_pretrained(made[kind])
        tokenizer().save_pretrained(made[kind])
    return made


def samples(count: int, seed: int = 0) -> list[Sample]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count, 2), generator=draw).tolist()
    return [Sample(*(torch.randint(3, VOCABULARY, (n,), generator=draw) for n in pair)) for pair in lengths]


def logits(model: nn.Module, sample: Sample) -> torch.Tensor:
    extra = {}
    if model.config.is_encoder_decoder:
        extra = {"decoder_input_ids": nn.functional.pad(sample.target[:-1], (1, 0))[None]}
    with torch.no_grad():
        return model(input_ids=sample.ids[None], **extra).logits[0]


def correlated(count: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 8, width, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, width // 8, generator=draw) @ mix
    return x + 0.3 * torch.randn(count, width, generator=draw)


@pytest.mark.parametrize("bits", GRIDS)
def test_gptq_changes_the_output_less_than_rounding_to_nearest(bits):
    grid = GRIDS[bits]
    w = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    x, other = correlated(600, 96, 1), correlated(600, 96, 2)
    hessian = (x.t() @ x).expand(3, -1, -1)
    plain, rows = nearest(w, grid)
    chosen, same, failed = gptq(w, hessian, grid)
    assert not failed.any()
    assert torch.equal(rows, same)
    errors = [((grid.spread(symbols, rows) - w) @ other.t()).square().sum((1, 2)) for symbols in (plain, chosen)]
    assert bool((errors[1] < 0.6 * errors[0]).all())


def test_gptq_does_each_expert_and_each_block_size_the_same():
    w = torch.randn(3, 10, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([correlated(200, 50, seed) for seed in range(3)]).double()
    hessian = x.transpose(1, 2) @ x
    together = gptq(w, hessian, GRIDS["ternary"])[0]
    for block in (1, 7, 50):
        assert torch.equal(gptq(w, hessian, GRIDS["ternary"], block=block)[0], together)
    for index in range(3):
        alone = gptq(w[index : index + 1], hessian[index : index + 1], GRIDS["ternary"])[0]
        assert torch.equal(alone[0], together[index])


def test_an_expert_without_inputs_or_with_a_broken_h_rounds_to_nearest():
    w = torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0))
    hessian = torch.stack([torch.zeros(20, 20), -torch.eye(20), torch.eye(20) + 0.5])
    symbols, rows, failed = gptq(w, hessian, GRIDS["ternary"])
    assert failed.tolist() == [False, True, False]
    assert torch.equal(symbols[:2], nearest(w, GRIDS["ternary"])[0][:2])
    assert not torch.equal(symbols[2], nearest(w, GRIDS["ternary"])[0][2])
    assert rows.shape == (3, 10, 2)


def test_two_bits_keep_zero_and_the_ends_of_a_row():
    w = torch.tensor([[[-1.0, 0.0, 2.0], [0.0, 0.5, 3.0], [0.0, 0.0, 0.0]]])
    symbols, rows = nearest(w, GRIDS["2"])
    assert torch.equal(GRIDS["2"].spread(symbols, rows), torch.tensor([[[-1.0, 0, 2], [0, 0, 3], [0, 0, 0]]]))


@pytest.mark.parametrize("kind", ["switch", "mixtral", "qwen"])
def test_the_stream_computes_what_the_compressed_model_computes(folders, kind, tmp_path, monkeypatch):
    streams = []
    answer = qmoe._Work.layer

    def noted(self, path, tokens):
        answer(self, path, tokens)
        streams.append(tokens.out.clone())

    monkeypatch.setattr(qmoe._Work, "layer", noted)
    shown = samples(7)
    qmoe.quantize(folders[kind], tmp_path / "out", calib=shown, held_out=2, group=4)
    model = load(tmp_path / "out")
    last = (model.decoder.block if kind == "switch" else model.model.layers)[-1]
    seen = []
    last.register_forward_hook(lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
    for sample in shown:
        logits(model, sample)
    assert torch.allclose(torch.cat(seen), streams[-1], atol=2e-5)


@pytest.mark.parametrize("kind", ["switch", "mixtral", "qwen"])
def test_the_loaded_model_is_the_original_with_rounded_experts(folders, kind, tmp_path):
    report = qmoe.quantize(folders[kind], tmp_path / "out", "rtn")
    model, plain = load(tmp_path / "out"), type(build(kind)).from_pretrained(folders[kind])
    host, source = host_of(model.config.model_type), Checkpoint(folders[kind])
    count = 0
    for path, module in experts_of(plain).items():
        for number in range(6):
            expert = getattr(model.get_submodule(path), f"expert_{number}")
            for name, w in zip(("wi", "wo"), source.expert(host, path, number), strict=True):
                rounded = GRIDS["ternary"].spread(*nearest(w[None], GRIDS["ternary"]))[0]
                assert torch.equal(expert[name].dense(), rounded)
                count += w.numel()
                if kind == "switch":
                    module[f"expert_{number}"].get_submodule(name).weight.data = rounded
                else:
                    {"wi": module.gate_up_proj, "wo": module.down_proj}[name].data[number] = rounded
    assert report.weights == count
    assert report.bytes * 8 / count == report.bits
    for sample in samples(3):
        assert torch.allclose(logits(model, sample), logits(plain, sample), atol=1e-5)


def test_rounding_to_nearest_can_be_measured_too_and_errs_more(folders, tmp_path):
    shown = samples(60)
    plain = qmoe.quantize(folders["switch"], tmp_path / "plain", "rtn", calib=shown)
    near = qmoe.quantize(folders["switch"], tmp_path / "near", "rtn", calib=shown, samples=50, held_out=10)
    best = qmoe.quantize(folders["switch"], tmp_path / "best", calib=shown, samples=50, held_out=10)
    files = [json.loads((tmp_path / name / "config.json").read_text())["files"] for name in ("plain", "near", "best")]
    assert files[0] == files[1] != files[2]
    assert not plain.error
    assert len(near.error) == len(best.error) == 2
    assert best.error[0] < near.error[0]


def test_every_way_to_pack_gives_the_same_model_and_range_coding_the_smaller_file(folders, tmp_path):
    sample = samples(1)[0]
    for bits in GRIDS:
        sizes, answers = [], []
        for pack in ("auto", "range"):
            out = tmp_path / f"{bits}-{pack}"
            report = qmoe.quantize(folders["mixtral"], out, bits=bits, pack=pack, calib=samples(9))
            sizes.append(report.bytes)
            answers.append(logits(load(out), sample))
        assert torch.equal(*answers)
        assert sizes[1] < sizes[0]
        kept = load(out, decoded=2)
        assert torch.allclose(logits(kept, sample), answers[0], atol=1e-5)
        assert all(len(module._recent) <= 2 for module in kept.modules() if hasattr(module, "_recent"))
        assert any(module._recent for module in kept.modules() if hasattr(module, "_recent"))


@pytest.mark.parametrize("kind", ["switch", "mixtral"])
def test_what_is_held_out_leaves_no_trace_in_the_weights(folders, kind, tmp_path, monkeypatch):
    streams, answer = [], qmoe._Work.layer

    def noted(self, path, tokens):
        answer(self, path, tokens)
        streams.append(tokens.out[: tokens.kept_from].clone())

    monkeypatch.setattr(qmoe._Work, "layer", noted)
    shown, others = samples(2), samples(5, seed=1)  # few, since small products are rounded in ways of their own
    shuffled = [Sample(one.ids[torch.randperm(len(one.ids))], one.target.flip(0)) for one in others]
    for name, tail in (("a", others), ("b", shuffled), ("c", samples(9, seed=2))):
        qmoe.quantize(folders[kind], tmp_path / name, calib=shown + tail, samples=2, held_out=len(tail))
    files = [json.loads((tmp_path / name / "config.json").read_text())["files"] for name in "abc"]
    assert files[0] == files[1] == files[2]
    first, second, third = (streams[2 * turn : 2 * turn + 2] for turn in range(3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))
    qmoe.quantize(folders[kind], tmp_path / "d", calib=shown[:-1] + others[:1])
    assert json.loads((tmp_path / "d" / "config.json").read_text())["files"] != files[0]


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path):
    shown, most = samples(24), {}
    for experts in (4, 32):
        build("mixtral", experts).save_pretrained(tmp_path / f"{experts}")
        most[experts] = peak(lambda n=experts: qmoe.quantize(tmp_path / f"{n}", tmp_path / f"{n}-out",
                                                             calib=shown, group=4))  # fmt: skip
    assert most[32] < 1.1 * most[4]
    assert peak(lambda: torch.empty(1 << 20, device="meta") + 1) == 0  # a shape alone takes no memory


def test_a_published_checkpoint_is_read_and_nothing_in_it_is_run(folders, tmp_path):
    qmoe.quantize(folders["switch"], tmp_path / "mine", calib=samples(9))
    values: dict = {}
    for path in (tmp_path / "mine").glob("*.safetensors"):
        values |= load_file(path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shutil.copyfile(folders["switch"] / "config.json", theirs / "config.json")
    expert = {name: value for name, value in values.items() if ".expert_" in name}
    expert |= {name.replace("w_comp", "weight"): torch.zeros(0) for name in expert if name.endswith("w_comp")}
    torch.save({name: value for name, value in values.items() if ".expert_" not in name}, theirs / "noexp.pt")
    for part in (0, 1):
        torch.save({name: value for name, value in expert.items() if f"coder.block.{part}" in name or not part},
                   theirs / f"exp{part:02d}.pt")  # fmt: skip
    torch.save({"sizes": 3}, theirs / "sizes.pt")
    assert is_compressed(theirs)
    assert is_compressed(tmp_path / "mine")
    assert not is_compressed(folders["switch"])
    assert not is_compressed(tmp_path)
    sample = samples(1)[0]
    assert torch.equal(logits(load(theirs), sample), logits(load(tmp_path / "mine"), sample))
    torch.save({"x": print}, theirs / "exp02.pt")
    with pytest.raises(InputError, match=r"exp02.pt: holds no flat table of tensors"):
        load(theirs)


def test_a_loaded_model_generates(folders, tmp_path):
    qmoe.quantize(folders["mixtral"], tmp_path / "out", calib=samples(5))
    ids = load(tmp_path / "out").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4,
                                          do_sample=False)  # fmt: skip
    assert ids.shape == (1, 7)


def test_spans_are_hidden_once_and_can_be_put_back():
    draw = torch.Generator().manual_seed(0)
    sentinels = torch.arange(90, 100)
    for length in range(2, 60):
        ids = torch.arange(length)
        sample = hide_spans(ids, sentinels, draw)
        spans, current = {}, None
        for token in sample.target.tolist():
            if token >= 90:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        back = [t for token in sample.ids.tolist() for t in (spans[token] if token >= 90 else [token])]
        assert back == ids.tolist()
        assert not (sample.ids[sample.shown] >= 90).any()
        assert sample.said.sum() == (sample.target < 90).sum() > 0


def test_experts_without_tokens_are_told(folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "frameloom"):
        report = qmoe.quantize(folders["switch"], tmp_path / "out", calib=samples(1))
    assert report.starved
    assert f"{len(report.starved)} experts were rounded to nearest, since no calibration token" in caplog.text


def _broken(folder, kind):
    """A copy of a model's folder with infinite embeddings, or with an infinite expert."""
    values = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight" if kind == "dense" else "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    values[name][3:] = float("inf")
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def test_bad_input_is_one_line_and_leaves_nothing(folders, tmp_path):
    plain = tmp_path / "plain"
    transformers.LlamaConfig().save_pretrained(plain)
    copies = {}
    for kind in ("dense", "expert", "cut", "lacking"):
        copies[kind] = tmp_path / kind
        shutil.copytree(folders["mixtral"], copies[kind])
    _broken(copies["dense"], "dense")
    _broken(copies["expert"], "expert")
    (copies["cut"] / "model.safetensors").write_bytes(b"nothing")
    values = load_file(copies["lacking"] / "model.safetensors")
    del values["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    save_file(values, copies["lacking"] / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "bare").mkdir()
    shutil.copyfile(folders["mixtral"] / "config.json", tmp_path / "bare" / "config.json")
    (tmp_path / "empty.txt").write_text("\n\n")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    out, good, shown = tmp_path / "out", folders["mixtral"], samples(5)
    (tmp_path / "there").mkdir()
    made = tmp_path / "made"
    qmoe.quantize(good, made, "rtn")
    for call, what in (
        (lambda: qmoe.quantize(plain, out), "no experts are known in llama.*4-bit tool"),
        (lambda: qmoe.quantize(tmp_path / "none", out), "holds no config.json"),
        (lambda: qmoe.quantize(made, out), "compressed already"),
        (lambda: qmoe.quantize(tmp_path / "bare", out, calib=shown), "holds no model.safetensors"),
        (lambda: qmoe.quantize(copies["cut"], out, calib=shown), "weights cannot be read"),
        (lambda: qmoe.quantize(copies["lacking"], out, calib=shown), "the weights lack .*experts.5.w2"),
        (lambda: qmoe.quantize(copies["dense"], out, calib=shown), "activations are not finite"),
        (lambda: qmoe.quantize(copies["expert"], out, "rtn"), "weights that are not finite"),
        (lambda: qmoe.quantize(good, tmp_path / "there", calib=shown), "is there already"),
        (lambda: qmoe.quantize(good, out, bits="3"), "--bits 3: there are ternary and 2"),
        (lambda: qmoe.quantize(good, out, pack="zip"), "--pack zip"),
        (lambda: qmoe.quantize(good, out, samples=0), "--samples 0"),
        (lambda: qmoe.quantize(good, out, calib=shown, held_out=9), "none is left to calibrate on"),
        (lambda: qmoe.quantize(good, out, calib=[]), "no calibration samples"),
        (lambda: qmoe.quantize(good, out, calib=tmp_path / "no.txt"), "--calib .*cannot be read"),
        (lambda: qmoe.quantize(good, out, calib=tmp_path / "empty.txt"), "holds no sentence"),
        (lambda: qmoe.quantize(good, out, calib=tmp_path / "other.safetensors"), "holds no input_ids"),
        (lambda: qmoe.quantize(good, out, calib=[Sample(torch.tensor([VOCABULARY + 3]))]), "beyond the model's"),
        (lambda: qmoe.quantize(folders["switch"], out, calib=[Sample(torch.tensor([5]))]), "with a target each"),
        (lambda: qmoe.quantize(good, out, method="qmeo"), "did you mean qmoe"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_damaged_folder_is_one_line(folders, tmp_path):
    made = tmp_path / "made"
    qmoe.quantize(folders["mixtral"], made, calib=samples(5))
    text = (made / "config.json").read_text()
    note = json.loads(text)

    def with_note(**changes):
        (made / "config.json").write_text(json.dumps(note | changes))

    for change, what in (
        ({"method": "other"}, "no model with compressed experts"),
        ({"version": 9}, "is of version 9"),
        ({"dictionary": 3}, "another dictionary"),
        ({"dictionary": note["dictionary"] | {"zero": 0.9, "sha256": "0" * 64}}, "another dictionary .*p\\(0\\) = 0.9"),
        ({"files": {"../x.safetensors": "0", "dense.safetensors": "0"}}, "holds no ../x.safetensors"),
        ({"files": note["files"] | {"dense.safetensors": "0"}}, "another SHA-256"),
        ({"files": {"dense.safetensors": note["files"]["dense.safetensors"]}}, "expert_0: an expert lacks w_comp"),
        ({"host": note["host"] | {"model_type": "llama"}}, "no experts are known in llama"),
        ({"host": note["host"] | {"hidden_size": 64, "head_dim": 16}}, "expert_0"),
    ):  # fmt: skip
        with_note(**change)
        with pytest.raises(InputError, match=what) as caught:
            load(made)
        assert "\n" not in str(caught.value)
    (made / "config.json").write_text(text)
    load(made)
    name = "model.layers.0.mlp.experts.expert_0.wi.row_off"
    values = load_file(made / "experts-00-00.safetensors")
    save_file(values | {name: values[name].long()}, made / "experts-00-00.safetensors")
    digest = hashlib.sha256((made / "experts-00-00.safetensors").read_bytes()).hexdigest()
    with_note(files=note["files"] | {"experts-00-00.safetensors": digest})
    with pytest.raises(InputError, match=r"expert_0: row_off is torch.int64 .*torch.int32 in one dimension"):
        load(made)


def test_texts_are_read_with_the_models_tokenizer(folders, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a red ball rolls left\n\na small blue box sinks\n")
    rows = read(path, folders["mixtral"], 9, seq2seq=False)
    assert [len(row.ids) for row in rows] == [5, 5]
    assert all(row.target is not None for row in read("world", folders["switch"], 3, seq2seq=True))
    save_file({"input_ids": torch.tensor([[5, 6, -100], [7, 8, 9]])}, tmp_path / "t.safetensors")
    assert [row.ids.tolist() for row in read(tmp_path / "t.safetensors", tmp_path, 9, seq2seq=False)] == [
        [5, 6],
        [7, 8, 9],
    ]
    with pytest.raises(InputError, match="holds no tokenizer that reads text"):
        read(path, tmp_path, 9, seq2seq=False)


def test_from_the_shell(folders, tmp_path, capsys, monkeypatch):
    words = ["frameloom", "quantize", str(folders["mixtral"]), str(tmp_path / "out"), "--samples", "20",
             "--held-out", "4", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["expert_weights"] == 2 * 6 * (96 * 32 + 32 * 48)
    assert len(found["error"]) == 2
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    said = f"frameloom: {tmp_path / 'out'}: is there already; name a folder that is not"
    assert capsys.readouterr().err.strip() == said
    assert callable(frameloom.quantize)
