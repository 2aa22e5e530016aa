"""Tiny random pipelines of diffusers' real classes, made without a network; run by diffusers and by us."""

import string
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from frameloom.diffusion.guide import CFG
from frameloom.diffusion.run import sample

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def clip_text():
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    config = CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
                            vocab_size=len(vocab), max_position_embeddings=16, bos_token_id=vocab["<|startoftext|>"],
                            eos_token_id=vocab["<|endoftext|>"])  # fmt: skip
    return {"text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}


def t5_text(make=T5EncoderModel, config=T5Config):
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((x, -3.0) for x in string.ascii_lowercase)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    encoder = make(config(vocab_size=len(vocab), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
                          tie_word_embeddings=False))  # fmt: skip
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def image_vae(make=AutoencoderKL, **options):
    return make(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), sample_size=16,
                down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, **options)  # fmt: skip


def picture_unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


def text_to_video():
    unet = UNet3DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    vae = image_vae(up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.DDIMScheduler(**SD, set_alpha_to_one=False, steps_offset=1)
    return diffusers.TextToVideoSDPipeline(vae=vae, unet=unet, scheduler=scheduler, **clip_text())


def animate_diff():
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
                            motion_num_attention_heads=2)  # fmt: skip
    vae = image_vae(up_block_types=("UpDecoderBlock2D",) * 2)
    return diffusers.AnimateDiffPipeline(vae=vae, unet=picture_unet(), motion_adapter=adapter,
                                         scheduler=diffusers.DDIMScheduler(**SD), **clip_text())  # fmt: skip


def stable_diffusion():
    vae = image_vae(up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.EulerDiscreteScheduler(**{key: SD[key] for key in list(SD)[:3]}, timestep_spacing="leading",
                                                 steps_offset=1)  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, unet=picture_unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **clip_text())  # fmt: skip


def latte():
    transformer = LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, caption_channels=32, video_length=4, cross_attention_dim=32, norm_type="ada_norm_single",
        norm_elementwise_affine=False, num_embeds_ada_norm=1000, attention_bias=True,
    )  # fmt: skip
    vae = image_vae(up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.LattePipeline(vae=vae, transformer=transformer, scheduler=scheduler, **t5_text())


def svd():
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(2, 4), addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4,
                              image_size=224, intermediate_size=37, patch_size=32)  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, timestep_spacing="leading", steps_offset=1, interpolation_type="linear")  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        vae=image_vae(AutoencoderKLTemporalDecoder), unet=unet, scheduler=scheduler,
        image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224))  # fmt: skip


def cogvideox(image=False, frames_by_two=False):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=8 if image else 4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        patch_size_t=2 if frames_by_two else None, patch_bias=not frames_by_two,
        temporal_compression_ratio=4, max_text_seq_length=226, use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=image,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4, latent_channels=4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    make = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    scheduler = diffusers.CogVideoXDDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return make(vae=vae, transformer=transformer, scheduler=scheduler, **t5_text())


def cogvideox_image():
    return cogvideox(image=True)


def cogvideox_by_two():
    return cogvideox(frames_by_two=True)


def wan_transformer():
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
                                 out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
                                 rope_max_seq_len=32)  # fmt: skip


def wan(**options):
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.WanPipeline(vae=vae, transformer=wan_transformer(), scheduler=scheduler, **options,
                                 **t5_text(UMT5EncoderModel, UMT5Config))  # fmt: skip


def wan_two():
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.9)


def ltx():
    transformer = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
                                             cross_attention_dim=32, num_layers=2, caption_channels=32)  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1)  # fmt: skip
    return diffusers.LTXPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **t5_text())


# The sizes that `load_pipeline` is asked for where a pipeline does not say them itself, or says too much.
MAKERS = {
    "text-to-video": (text_to_video, {"frames": 4}),
    "animatediff": (animate_diff, {"frames": 4}),
    "stable-diffusion": (stable_diffusion, {}),
    "latte": (latte, {}),
    "svd": (svd, {}),
    "cogvideox": (cogvideox, {}),
    "cogvideox-image": (cogvideox_image, {}),
    "cogvideox-1.5": (cogvideox_by_two, {}),
    "wan": (wan, {"frames": 9, "height": 64, "width": 64}),
    "wan-2.2": (wan_two, {"frames": 9, "height": 64, "width": 64}),
    "ltx": (ltx, {"frames": 9, "height": 32, "width": 32}),
}


def saved(name: str, folder: Path) -> Path:
    """A tiny pipeline in a new folder, its weights scattered so that no output is a constant."""
    torch.manual_seed(0)
    pipe = MAKERS[name][0]()
    for part in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        for parameter in () if part is None else part.parameters():
            if not parameter.abs().sum():
                torch.nn.init.normal_(parameter, std=0.1)
    pipe.save_pretrained(folder / name)
    return folder / name


PROMPTS = ["a red circle moves", "blue"]
W = 4.0
# diffusers' pipelines with channels before frames.
CHANNELS_FIRST = ("TextToVideoSDPipeline", "AnimateDiffPipeline", "LattePipeline", "WanPipeline")


def start(made, batch=2):
    """Noise, and a picture of 8 bits where the model wants one."""
    torch.manual_seed(7)
    noise = torch.randn(made.denoiser.latent.shape(batch))
    return noise, torch.randint(256, (batch, 3, made.height, made.width)) / 255 if made.needs_image else None


def as_pictures(pictures):
    """What their pipeline resizes for CLIP as it does for everybody."""
    return [Image.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()) for one in pictures]


def run_theirs(made, noise, picture, steps=5, seed=3, output="latent"):
    """diffusers' own pipeline, from the same noise, to latents (or "pt", a video) in our order."""
    name, pipe = made.name, made.pipe
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": steps, "output_type": output, "height": made.height, "width": made.width}
    if name == "StableVideoDiffusionPipeline":
        given |= {"image": as_pictures(picture), "max_guidance_scale": 3.0}
    else:
        given |= {"prompt": PROMPTS[: len(noise)], "guidance_scale": W}
    if name == "CogVideoXImageToVideoPipeline":
        given["image"] = picture
    if name == "LattePipeline":
        given["video_length"] = made.frames
    elif name != "StableDiffusionPipeline":
        given["num_frames"] = made.frames
    if picture is not None:
        given["generator"] = torch.Generator().manual_seed(seed)
    arrange = {
        "StableDiffusionPipeline": lambda x: x[:, 0],
        "LTXPipeline": lambda x: x.permute(0, 1, 3, 4, 2).flatten(1, 3),
    } | dict.fromkeys(CHANNELS_FIRST, lambda x: x.transpose(1, 2))
    found = pipe(latents=arrange.get(name, lambda x: x)(noise), **given)
    if name == "StableDiffusionPipeline":
        return found.images[:, None]
    if output == "pt":
        return found.frames
    if name == "LTXPipeline":
        return found.frames.unflatten(1, noise.shape[1:2] + noise.shape[3:]).permute(0, 1, 4, 2, 3)
    return found.frames.transpose(1, 2) if name in CHANNELS_FIRST else found.frames


def run_ours(made, noise, picture, steps=5, seed=3):
    cond = made.text(PROMPTS[: len(noise)])
    if made.needs_image:
        cond = made.image(picture, cond, seed=seed)
    guide = made.guide if made.name == "StableVideoDiffusionPipeline" else CFG(W)
    # diffusers runs the two branches of Wan one after the other.
    return sample(made.denoiser, made.start(noise, steps), made.grid(steps), cond, guide=guide, step=made.step,
                  together=made.name != "WanPipeline")[0]  # fmt: skip
