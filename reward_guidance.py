# Copyright 2026 The MaPO reference implementation authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Reward guidance (DCO, arXiv 2402.12004): draws with a LoRA and tokens of train_dreambooth_lora_mapo_sdxl.py, and says
how far the picture follows the prompt and how far the subject.

    python reward_guidance.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --lora_dir dreambooth-lora-mapo-sdxl --token "<dog>" --initializer_token dog --prompt "a <dog> in the snow"

In each step, with the adapters off for eps_u and eps_base and on for eps_theta,

    eps = eps_u + w * (eps_base - eps_u) + s * (eps_theta(c_token) - eps_base(c_base))

c_token is the prompt with the tokens, c_base the one with their initializers, eps_u takes the empty prompt. w is
`guidance_scale`; s is `reward_scale`: 0 is the starting model, larger is closer to the subject. w = s = 1 is the tuned
model without guidance.
"""

import argparse
from pathlib import Path

import torch


def load_personalized_pipeline(model: str, lora_dir: str, tokens: list[str] | None = None, **options):
    """A StableDiffusionXLPipeline with the LoRA of `lora_dir` and its tokens, in the order in which they were trained.
    `options` go to `from_pretrained`."""
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, **options)
    pipeline.load_lora_weights(lora_dir, weight_name="pytorch_lora_weights.safetensors")
    if tokens:
        embeds = load_file(Path(lora_dir) / "learned_embeds.safetensors")
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            parts = {name: getattr(pipeline, name + suffix) for name in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(list(embeds[key]), token=tokens, **parts)
    return pipeline


@torch.no_grad()
def draw_with_reward_guidance(
    pipeline,
    prompt: str,
    base_prompt: str,
    guidance_scale: float = 7.5,
    reward_scale: float = 3.0,
    num_inference_steps: int = 50,
    height: int = 1024,
    width: int = 1024,
    generator: torch.Generator | None = None,
):
    """One PIL picture.

    Args:
        pipeline: StableDiffusionXLPipeline with the LoRA and the tokens.
        prompt, base_prompt: with the tokens, and with their initializers.
        guidance_scale, reward_scale: w and s.
        height, width: in pixels.
        generator: as the pipeline takes it; the same seed starts from the same noise as in a plain call.
    """
    device, unet, scheduler = pipeline._execution_device, pipeline.unet, pipeline.scheduler

    def encode(text: str) -> tuple[torch.Tensor, ...]:
        return pipeline.encode_prompt(text, device=device, do_classifier_free_guidance=True)

    tuned, _, tuned_pooled, _ = encode(prompt)
    pipeline.disable_lora()
    base, empty, base_pooled, empty_pooled = encode(base_prompt)
    plain = {
        "text_embeds": torch.cat([empty_pooled, base_pooled]),
        "time_ids": torch.tensor([[height, width, 0, 0, height, width]], device=device).float().repeat(2, 1),
    }
    named = {"text_embeds": tuned_pooled, "time_ids": plain["time_ids"][:1]}

    scheduler.set_timesteps(num_inference_steps, device=device)
    channels = unet.config.in_channels
    latents = pipeline.prepare_latents(1, channels, height, width, tuned.dtype, device, generator)
    step_options = pipeline.prepare_extra_step_kwargs(generator, 0.0)
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, t)
        pipeline.disable_lora()
        both = unet(noisy.repeat(2, 1, 1, 1), t, torch.cat([empty, base]), added_cond_kwargs=plain).sample
        eps_u, eps_base = both.chunk(2)
        pipeline.enable_lora()
        eps_theta = unet(noisy, t, tuned, added_cond_kwargs=named).sample
        eps = eps_u + guidance_scale * (eps_base - eps_u) + reward_scale * (eps_theta - eps_base)
        latents = scheduler.step(eps, t, latents, **step_options).prev_sample

    vae = pipeline.vae.float()  # SDXL's own VAE overflows in fp16
    latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return pipeline.image_processor.postprocess(vae.decode(latents).sample)[0]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--lora_dir", required=True, help="--output_dir of the training.")
    parser.add_argument("--token", nargs="+", default=[], help="As in the training, in the same order.")
    parser.add_argument("--initializer_token", nargs="+", default=[], help="As in the training, in the same order.")
    parser.add_argument("--prompt", required=True, help="With the tokens.")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="w")
    parser.add_argument("--reward_scale", type=float, default=3.0, help="s; 0 is the starting model.")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="reward_guidance.png")
    args = parser.parse_args(input_args)
    if len(args.token) != len(args.initializer_token):
        parser.error(f"--initializer_token: {len(args.initializer_token)} for {len(args.token)} of --token")
    if not (Path(args.lora_dir) / "pytorch_lora_weights.safetensors").is_file():
        parser.error(f"--lora_dir {args.lora_dir}: no pytorch_lora_weights.safetensors in it")
    return args


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipeline = load_personalized_pipeline(args.pretrained_model_name_or_path, args.lora_dir, args.token, dtype=dtype)
    base_prompt = args.prompt
    for token, word in zip(args.token, args.initializer_token):
        base_prompt = base_prompt.replace(token, word)
    picture = draw_with_reward_guidance(
        pipeline.to(device),
        args.prompt,
        base_prompt,
        guidance_scale=args.guidance_scale,
        reward_scale=args.reward_scale,
        num_inference_steps=args.num_inference_steps,
        height=args.resolution,
        width=args.resolution,
        generator=torch.Generator("cpu").manual_seed(args.seed),
    )
    picture.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main(parse_args())
