"""Published pipelines, saved by diffusers and loaded by us: the same latents as theirs, and clear refusals."""

import json
import shutil

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from frameloom.diffusion.guide import CFG
from frameloom.diffusion.pipeline import load_pipeline
from frameloom.diffusion.run import sample
from frameloom.errors import InputError
from tiny_pipelines import MAKERS, PROMPTS, run_ours, run_theirs, saved, start


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines by name, each made when first asked for."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def get(name):
        if name not in made:
            made[name] = saved(name, folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def loaded(folders):
    made = {}

    def get(name):
        if name not in made:
            made[name] = load_pipeline(str(folders(name)), **MAKERS[name][1])
        return made[name]

    return get


@pytest.mark.parametrize("name", MAKERS)
def test_our_loop_gives_the_latents_of_the_published_pipeline(name, loaded):
    made = loaded(name)
    noise, picture = start(made)
    ours, expected = run_ours(made, noise, picture), run_theirs(made, noise, picture)
    assert ours.shape == expected.shape
    error = ((ours - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", MAKERS)
def test_the_video_is_that_of_the_published_pipeline(name, loaded):
    made = loaded(name)
    noise, picture = start(made)
    video = made.decode(run_ours(made, noise, picture), chunk=2 if name in ("latte", "animatediff") else 8)
    assert video.shape == (2, made.frames, 3, made.height, made.width)
    torch.testing.assert_close(video, run_theirs(made, noise, picture, output="pt").float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["latte", "cogvideox", "wan", "ltx"])
def test_encode_is_the_inverse_of_decodes_scale(name, loaded):
    made = loaded(name)
    torch.manual_seed(0)
    video, vae = torch.rand(1, made.frames, 3, made.height, made.width), made.pipe.vae
    with torch.no_grad():
        seen = (video * 2 - 1).transpose(1, 2) if made.family.video_vae else (video * 2 - 1)[0]
        there = vae.decode(vae.encode(seen).latent_dist.mode()).sample
    there = there.transpose(1, 2) if made.family.video_vae else there[None]
    torch.testing.assert_close(made.decode(made.encode(video)), (there / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision(name, folders):
    made = load_pipeline(str(folders(name)), dtype=torch.bfloat16, **MAKERS[name][1])
    noise, picture = start(made, 1)
    found = run_ours(made, noise, picture, steps=2)
    assert found.dtype == torch.float32
    assert torch.isfinite(made.decode(found.to(torch.bfloat16))).all()


def test_sizes_and_words(loaded):
    made = loaded("cogvideox")
    assert (made.frames, made.height, made.width, made.fps, made.needs_image) == (9, 64, 64, 8, False)
    cond = made.text(["a red circle", ""])
    assert torch.equal(cond.null()["text"][0], cond["text"][1]), "no words are the empty prompt"
    assert made.grid(4).tolist() == [1000, 750, 500, 250, 0]
    assert loaded("svd").text(["words"]).values == {}
    with pytest.raises(InputError, match="takes no picture"):
        made.image(torch.rand(1, 3, 64, 64), cond)


class Counter:
    def __init__(self):
        self.calls = 0

    def wrap(self, site, forward, args, kwargs):
        self.calls += 1
        return forward(*args, **kwargs)


def test_caches_of_diffusers_work_beside_our_hooks(loaded):
    made = loaded("wan")
    (noise, _), host, cond = start(made, 1), made.denoiser.host, made.text(PROMPTS[:1])

    def run(together=True):
        outer, inner = Counter(), Counter()
        found, _ = sample(made.denoiser, noise, made.grid(6), cond, guide=CFG(4.0), together=together,
                          hooks=[("block", outer), ("mlp", inner)])  # fmt: skip
        return found, outer.calls, inner.calls

    plain, outer, inner = run()
    assert outer == inner == 2 * 6
    for together in (True, False):
        host.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        try:
            before = [module.__dict__.get("forward") for module in host.modules()]
            first, outer, inner = run(together)
            second, _, _ = run(together)
            assert before == [module.__dict__.get("forward") for module in host.modules()]
        finally:
            host.disable_cache()
        branches = 1 if together else 2
        # All blocks are asked on every step, but after the first step only the first block computes.
        assert (outer, inner) == (12 * branches, 7 * branches)
        assert torch.equal(first, second), "a run starts from an empty cache"
        assert not torch.equal(first, plain)
    after, outer, inner = run()
    assert torch.equal(after, plain)
    assert outer == inner == 12


def test_an_attention_cache_of_diffusers_on_a_spatial_and_temporal_model(loaded):
    made = loaded("latte")
    (noise, _), host = start(made, 1), made.denoiser.host
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("transformer_blocks",),
        spatial_attention_timestep_skip_range=(-1, 1001), current_timestep_callback=lambda: 500)  # fmt: skip
    host.enable_cache(config)
    try:
        counter = Counter()
        sample(made.denoiser, noise, made.grid(4), made.text(PROMPTS[:1]), hooks=[("spatial_self", counter)])
    finally:
        host.disable_cache()
    assert counter.calls == 8


def test_what_is_no_pipeline_is_refused(folders, tmp_path):
    def refused(match, where, **sizes):
        with pytest.raises(InputError, match=match) as caught:
            load_pipeline(str(where), **sizes)
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused(r"--weights .*empty: not a diffusers pipeline \(no model_index.json\)", tmp_path / "empty")
    refused("no such folder", tmp_path / "absent")
    (tmp_path / "empty" / "model_index.json").write_text("{")
    refused("not valid JSON", tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refused("FluxPipeline cannot be driven.*LattePipeline", tmp_path / "empty")
    lacking = shutil.copytree(folders("latte"), tmp_path / "lacking")
    shutil.rmtree(lacking / "text_encoder")
    refused(r"its text_encoder \(T5EncoderModel\) is missing", lacking)
    broken = shutil.copytree(folders("latte"), tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    refused("--weights .*broken", broken)
    damaged = shutil.copytree(folders("latte"), tmp_path / "damaged")
    (damaged / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    refused("--weights .*damaged", damaged)
    refused("--size 60x64: both must be multiples of 16", folders("cogvideox"), width=60)
    refused("--frames 8: must be one more than a multiple of 4", folders("cogvideox"), frames=8)
