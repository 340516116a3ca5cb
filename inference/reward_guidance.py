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
Reward guidance (DCO, arXiv 2402.12004): generates images with a LoRA and tokens of train_dreambooth_lora_mapo_sdxl.py;
one scale says how closely they follow the prompt, another how closely the subject.

    python inference/reward_guidance.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --lora_dir dreambooth-lora-mapo-sdxl --placeholder_token "<dog>" --initializer_token dog \\
        --prompt "a <dog> in the snow"

In each step, with the LoRA disabled for eps_u and eps_base and enabled for eps_theta,

    eps = eps_u + w * (eps_base - eps_u) + s * (eps_theta(c_token) - eps_base(c_base))

c_token is the prompt with the tokens, c_base the one with their initializers, eps_u takes the empty prompt. w is
`guidance_scale`; s is `reward_scale`: 0 is the starting model, larger is closer to the subject. w = s = 1 is the tuned
model without guidance.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def fail(message: str) -> None:
    """Ends the run with one line; exit code 2, as argparse's errors."""
    print(f"reward_guidance.py: error: {message}", file=sys.stderr)
    sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """Its errors come without the usage."""

    def error(self, message: str) -> None:
        fail(message)


def load_personalized_pipeline(model: str, lora_dir: str, tokens: list[str] | None = None, **options):
    """A StableDiffusionXLPipeline with the LoRA of `lora_dir` and its tokens, in the order in which they were trained.
    `options` go to `from_pretrained`."""
    from safetensors.torch import load_file

    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, **options)
    pipeline.load_lora_weights(lora_dir, weight_name="pytorch_lora_weights.safetensors")
    if tokens:
        embeds = load_file(Path(lora_dir) / "learned_embeds.safetensors")
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            parts = {name: getattr(pipeline, name + suffix) for name in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(list(embeds[key]), token=tokens, **parts)
    return pipeline


@torch.no_grad()
def generate_with_reward_guidance(
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
    """One PIL image.

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
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="SDXL that the LoRA was trained on, on the hub or in a folder.",
    )
    parser.add_argument("--lora_dir", required=True, help="Folder named by --output_dir in training.")
    parser.add_argument("--placeholder_token", nargs="+", default=[], help="Those of the training, in the same order.")
    parser.add_argument("--initializer_token", nargs="+", default=[], help="Those of the training, in the same order.")
    parser.add_argument("--prompt", required=True, help="Prompt with the tokens.")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="w of the equation above.")
    parser.add_argument(
        "--reward_scale", type=float, default=3.0, help="s of the equation above; 0 is the starting model."
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the image, in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--output", default="reward_guidance.png", help="File for the image.")
    args = parser.parse_args(input_args)
    check_numbers(args)
    check_output(Path(args.output))
    check_tokens(args)
    return args


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("guidance_scale", "reward_scale"):
        if not math.isfinite(getattr(args, name)):
            fail(f"--{name} {getattr(args, name)}: must be finite")
    if args.num_inference_steps < 1:
        fail(f"--num_inference_steps {args.num_inference_steps}: must be at least 1")
    if args.resolution < 8 or args.resolution % 8:
        fail(f"--resolution {args.resolution}: must be a positive multiple of 8")
    if not 0 <= args.seed < 2**64:
        fail(f"--seed {args.seed}: must be at least 0 and less than 2**64")


def check_output(path: Path) -> None:
    if path.is_dir():
        fail(f"--output {path}: is a folder; name a file in it, such as {path / 'image.png'}")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        fail(f"--output {path}: must end in {' or '.join(IMAGE_SUFFIXES)}")
    if not path.parent.is_dir():
        fail(f"--output {path}: no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        fail(f"--output {path}: may not be written; name another")


def check_tokens(args: argparse.Namespace) -> None:
    """That the tokens are those of `lora_dir` and that the prompt has one."""
    tokens, folder = args.placeholder_token, Path(args.lora_dir)
    count = len(args.initializer_token)
    if count != len(tokens):
        fail(f"--initializer_token: {count} for {len(tokens)} of --placeholder_token; each needs one")
    if not (folder / "pytorch_lora_weights.safetensors").is_file():
        fail(f"--lora_dir {folder}: no pytorch_lora_weights.safetensors in it; name the training's --output_dir")
    if not all(token.strip() for token in tokens) or len(set(tokens)) < len(tokens):
        fail(f"--placeholder_token {' '.join(tokens)}: one is empty or named twice; name the training's")
    path = folder / "learned_embeds.safetensors"
    if tokens and not path.is_file():
        fail(f"--lora_dir {folder}: no learned_embeds.safetensors in it; leave out --placeholder_token")
    rows = count_learned_tokens(path) if path.is_file() else 0
    if rows != len(tokens):
        fail(
            f"--placeholder_token: {len(tokens)} named, but {path} has {rows}; name the training's, in the same order"
        )
    if tokens and not any(token in args.prompt for token in tokens):
        fail(
            f"--prompt {args.prompt!r}: holds no --placeholder_token; write {' or '.join(tokens)} where the subject is"
        )


def count_learned_tokens(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return min(file.get_slice(key).get_shape()[0] for key in ("clip_l", "clip_g"))
    except (OSError, SafetensorError) as error:
        fail(f"--lora_dir: can't read {path} ({first_line(error)}); copy it from the training again")


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_new_to_tokenizers(args: argparse.Namespace) -> None:
    """Also finds a missing model before its weights are loaded."""
    from transformers import CLIPTokenizer

    from diffusers import StableDiffusionXLPipeline

    model = args.pretrained_model_name_or_path
    try:
        StableDiffusionXLPipeline.load_config(model)  # for a missing model, tokenizers come empty and without an error
        tokenizers = {
            name: CLIPTokenizer.from_pretrained(model, subfolder=name) for name in ("tokenizer", "tokenizer_2")
        }
    except (OSError, ValueError) as error:
        fail(
            f"--pretrained_model_name_or_path {model}: no SDXL pipeline there; name its folder or its id on the hub "
            f"({first_line(error)})"
        )
    for name, tokenizer in tokenizers.items():
        for token in args.placeholder_token:
            if token in tokenizer.get_vocab():
                fail(f"--placeholder_token {token}: the {name} has it already; name the training's, such as <{token}>")


def quiet_libraries() -> None:
    """From diffusers and transformers, only errors."""
    import warnings

    import transformers

    import diffusers

    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' own call of the hub's client

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    quiet_libraries()
    check_new_to_tokenizers(args)
    try:
        model = args.pretrained_model_name_or_path
        pipeline = load_personalized_pipeline(model, args.lora_dir, args.placeholder_token, dtype=dtype)
    except Exception as error:  # each library raises its own for files that are missing, torn or of another model
        fail(f"--pretrained_model_name_or_path {model} with --lora_dir {args.lora_dir}: {first_line(error)}")
    base_prompt = args.prompt
    for token, word in zip(args.placeholder_token, args.initializer_token):
        base_prompt = base_prompt.replace(token, word)
    image = generate_with_reward_guidance(
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
    image.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main(parse_args())
