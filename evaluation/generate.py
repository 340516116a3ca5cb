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
Generate images of every prompt with every model, from the same noise:

    python evaluation/generate.py --prompts prompts.txt --models base=stabilityai/stable-diffusion-xl-base-1.0 \\
        tuned=sdxl-mapo --seeds 0 1 --output_dir eval

A model is NAME=PIPELINE, where PIPELINE is a diffusers folder, an id on the hub or one .safetensors file of SDXL.
These may follow, separated by commas:

    unet=PATH          another UNet, for a full fine-tune that saved nothing else
    lora=PATH[@SCALE]  LoRA weights
    embeddings=FILE    learned_embeds.safetensors of textual inversion
    tokens=<a>+<b>     the words that these embeddings stand for, in their order

For example `dog=sdxl,lora=run,embeddings=run/learned_embeds.safetensors,tokens=<dog>`. If a row of the prompts has a
`base_prompt`, such as "a dog in the snow" beside "a <dog> in the snow", models without embeddings are asked for the
base prompt, and the images of all models are scored against it.

Prompts are a file (.txt, .jsonl, .json, .csv, .tsv, .parquet), a data set on the hub, or one of: hpdv2, parti.
`--output_dir` gets images/NAME/*.png, images.jsonl (a row per image) and manifest.json (settings and versions). The
same command after an interruption generates what is missing. Models, seeds and prompts at the end of the list can be
added later. A model that has been trained again since then gets new images.
"""

import argparse
import gc
import io
import json
import logging
import platform
import re
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from tqdm.auto import tqdm

import diffusers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import JsonLines, hash_content, load_prompts, write_json, write_whole
from train_diffusion_mapo_sdxl import hash_pipeline, load_pipeline


logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="A file, a data set on the hub, hpdv2 or parti.")
    parser.add_argument("--prompt_column", help="The column of the prompts, if it isn't prompt, caption or text.")
    parser.add_argument("--prompt_split", default="train", help="The split of a data set.")
    parser.add_argument("--max_prompts", type=int, help="Use only the first N prompts.")
    parser.add_argument("--models", nargs="+", required=True, type=parse_named_model, metavar="NAME=PIPELINE[,...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="One image per prompt and seed.")
    add_generation_flags(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the images.")
    return parser.parse_args(argv)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, help="Side of the images in pixels. The default is the model's.")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="Number of denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="Scale of classifier-free guidance.")
    parser.add_argument("--negative_prompt", help="What the images should not show.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images generated at a time.")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="The default is fp16 on a GPU, else fp32.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu.")


def generation_settings(args: argparse.Namespace) -> dict:
    """Return the flags of `add_generation_flags` that decide what an image looks like."""
    names = ("resolution", "num_inference_steps", "guidance_scale", "negative_prompt")
    return {name: getattr(args, name) for name in names}


def parse_named_model(text: str) -> tuple[str, dict[str, str]]:
    name, _, model = text.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not model:
        raise argparse.ArgumentTypeError(
            f"{text!r} isn't NAME=PIPELINE[,unet=...][,lora=...][,embeddings=...,tokens=...]"
        )
    return name, parse_model(model)


def parse_model(text: str) -> dict[str, str]:
    """Read "PIPELINE,lora=PATH" into {"base": "PIPELINE", "lora": "PATH"} and check that local files exist."""
    base, *parts = text.split(",")
    spec = {"base": base}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in ("unet", "lora", "embeddings", "tokens") or not value:
            raise argparse.ArgumentTypeError(f"{part!r} is none of unet=, lora=, embeddings=, tokens=")
        spec[key] = value
    if ("embeddings" in spec) != ("tokens" in spec):
        raise argparse.ArgumentTypeError(f"{text!r}: embeddings= and tokens= need each other")
    for key in ("base", "unet", "lora", "embeddings"):
        path = spec.get(key, ".").partition("@")[0]
        if not Path(path).exists() and path.count("/") != 1:  # an id on the hub has one slash
            raise argparse.ArgumentTypeError(f"{path} doesn't exist")
    return spec


# ---- Models ---------------------------------------------------------------------------------------------------------
def load_model(spec: dict[str, str], device: str, dtype: str | None = None) -> diffusers.StableDiffusionXLPipeline:
    """Load what `parse_model` describes. `dtype` is a choice of --dtype."""
    if dtype is None:
        dtype = "fp32" if device == "cpu" else "fp16"
    weight_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    pipeline = load_pipeline(spec["base"], dtype=weight_dtype)
    if "unet" in spec:
        pipeline.unet = diffusers.UNet2DConditionModel.from_pretrained(spec["unet"], dtype=weight_dtype)
    if "embeddings" in spec:
        load_embeddings(pipeline, spec["embeddings"], spec["tokens"].split("+"))
    if "lora" in spec:
        path, _, scale = spec["lora"].partition("@")
        pipeline.load_lora_weights(path, adapter_name="lora")
        pipeline.set_adapters("lora", float(scale or 1))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.watermark = None
    return pipeline.to(device)


def load_embeddings(pipeline, path: str, tokens: list[str]) -> None:
    """Add the words of a textual inversion: one row of clip_l and of clip_g for each token."""
    embeddings = load_file(path)
    count = len(embeddings["clip_l"])
    if count != len(tokens):
        raise ValueError(
            f"{path} has embeddings of {count} tokens, but tokens={'+'.join(tokens)} names {len(tokens)}."
        )
    pipeline.load_textual_inversion(
        list(embeddings["clip_l"]), token=tokens, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
    )
    pipeline.load_textual_inversion(
        list(embeddings["clip_g"]), token=tokens, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
    )


def hash_model(pipeline) -> str:
    """Hash everything in a pipeline that its images depend on, the scales of a LoRA included."""
    scales = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipeline, part).named_modules():
            if hasattr(module, "lora_A"):
                scales[f"{part}.{name}"] = module.scaling
    return hash_content(hash_pipeline(pipeline), scales)


# ---- Images ---------------------------------------------------------------------------------------------------------
def noise_seed(prompt: str, seed: int) -> int:
    """Return a seed for torch, whose CPU generator takes 32 bits. It doesn't depend on where the prompt stands."""
    return int(hash_content(prompt, seed)[:8], 16)


@torch.no_grad()
def generate_images(
    pipeline, jobs: list[dict], log: JsonLines, folder: Path, settings: dict, batch_size: int, desc: str
) -> None:
    """Generate the images that aren't there yet.

    An image counts as there if its row in the log has the same `key`, a hash of the model, the settings, the prompt
    and the noise. Other rows and images of the same path are replaced.

    Args:
        jobs: Rows for the log with `path` (inside `folder`), `model_prompt`, `noise_seed` and anything else. They get
            their `key` here.
        settings: As from `generation_settings`.
    """
    model = hash_model(pipeline)
    keys = {row["path"]: row.get("key") for row in log.rows}
    missing = []
    replaced = set()
    for job in jobs:
        job["key"] = hash_content(model, settings, job["model_prompt"], job["noise_seed"])
        if keys.get(job["path"]) == job["key"] and (folder / job["path"]).exists():
            continue
        missing.append(job)
        if job["path"] in keys:
            replaced.add(job["path"])
    if replaced:
        logger.warning(f"{desc}: replacing {len(replaced)} images of another model or prompt in {folder}.")
        log.rewrite([row for row in log.rows if row["path"] not in replaced])

    limit = pipeline.tokenizer.model_max_length
    too_long = [job for job in missing if len(pipeline.tokenizer(job["model_prompt"]).input_ids) > limit]
    if too_long:
        example = too_long[0]["model_prompt"][:100]
        logger.warning(
            f"{desc}: {len(too_long)} prompts have more than {limit} tokens and are cut off, such as {example!r}."
        )

    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=desc, unit="image")
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        negative_prompt = settings["negative_prompt"]
        # The CPU's generator gives the same noise on every device and in batches of every size.
        generators = [torch.Generator("cpu").manual_seed(job["noise_seed"]) for job in batch]
        latents = pipeline(
            [job["model_prompt"] for job in batch],
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
            height=settings["resolution"],
            width=settings["resolution"],
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            generator=generators,
            output_type="latent",
        ).images
        for job, latent in zip(batch, latents):
            # One at a time, to save memory, and in the VAE's own fp32.
            latent = latent[None].to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
            image = pipeline.image_processor.postprocess(pipeline.vae.decode(latent).sample)[0]
            write_whole(folder / job["path"], encode_png(image))
            log.add(job)
            bar.update()
    bar.close()


def encode_png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ---- Main -----------------------------------------------------------------------------------------------------------
def load_prompt_set(name: str, column: str | None, split: str) -> list[dict]:
    if name == "parti":
        return load_prompts("nateraw/parti-prompts", "Prompt")
    if name != "hpdv2":
        return load_prompts(name, column, split)
    rows = []
    for style in ("anime", "concept-art", "paintings", "photo"):
        file = hf_hub_download("zhwang/HPDv2", f"benchmark/{style}.json", repo_type="dataset")
        for prompt in json.loads(Path(file).read_text()):
            rows.append({"prompt": prompt, "style": style})
    return rows


def check_output_dir(output_dir: Path, log: JsonLines, prompts: list[dict], settings: dict) -> None:
    """Raise ValueError if the folder holds images of other prompts or settings, which nobody wants to lose."""
    if not log.rows:
        return
    before = json.loads((output_dir / "manifest.json").read_text())["settings"]
    for name, value in settings.items():
        if before[name] != value:
            raise ValueError(
                f"--output_dir {output_dir} holds images with {name} {before[name]}, not {value}. Name another folder."
            )
    for row in log.rows:
        number = row["prompt_id"]
        if number >= len(prompts) or row["prompt"] != scored_prompt(prompts[number]):
            raise ValueError(
                f"--output_dir {output_dir} holds images of other prompts, such as {row['prompt'][:100]!r} in place "
                f"{number}. Name another folder."
            )


def scored_prompt(row: dict) -> str:
    """Return the prompt that images are scored against. No metric knows the words of a textual inversion."""
    return row.get("base_prompt") or row["prompt"]


def main(args: argparse.Namespace) -> None:
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    prompts = load_prompt_set(args.prompts, args.prompt_column, args.prompt_split)[: args.max_prompts]
    settings = generation_settings(args) | {"dtype": args.dtype}
    log = JsonLines(args.output_dir / "images.jsonl")
    check_output_dir(args.output_dir, log, prompts, settings)

    manifest_path = args.output_dir / "manifest.json"
    models = json.loads(manifest_path.read_text())["models"] if manifest_path.exists() else {}
    manifest = {
        "settings": settings,
        "models": models | dict(args.models),
        "prompts": args.prompts,
        "device": args.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    write_json(manifest_path, manifest)

    for name, spec in args.models:
        # Images of earlier seeds are checked too: they are replaced if the model has changed.
        seeds = set(args.seeds)
        for row in log.rows:
            if row["model"] == name:
                seeds.add(row["seed"])
        jobs = []
        for seed in sorted(seeds):
            for number, row in enumerate(prompts):
                prompt = scored_prompt(row)
                job = {
                    "model": name,
                    "prompt_id": number,
                    "prompt": prompt,
                    "model_prompt": row["prompt"] if "embeddings" in spec else prompt,
                    "seed": seed,
                    "noise_seed": noise_seed(prompt, seed),
                    "path": f"images/{name}/{number:05d}-{seed}.png",
                }
                jobs.append({key: value for key, value in row.items() if key != "base_prompt"} | job)
        pipeline = load_model(spec, args.device, args.dtype)
        generate_images(pipeline, jobs, log, args.output_dir, settings, args.batch_size, f"Generating {name}")
        del pipeline
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{len(log.rows)} images in {args.output_dir}. Next: python evaluation/score.py {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
