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
Generates images of every prompt with every model, from the same seeds:

    python evaluation/generate.py --prompts prompts.txt --models base=stabilityai/stable-diffusion-xl-base-1.0 \\
        tuned=sdxl-mapo --seeds 0 1 --output_dir eval

A model is NAME=PIPELINE, a folder or an id on the hub of any text-to-image pipeline of diffusers, and then, by commas:

    unet=PATH          another UNet (a full fine-tune that saved nothing else)
    lora=PATH[@SCALE]  LoRA weights
    embeddings=FILE    learned_embeds.safetensors of textual inversion (clip_l, clip_g)
    tokens=<a>+<b>     the words that these embeddings stand for, in their order

such as `dog=stabilityai/stable-diffusion-xl-base-1.0,lora=run,embeddings=run/learned_embeds.safetensors,tokens=<dog>`.
Where a row of the prompts has a `base_prompt`, models without embeddings get that one.

Prompts are a file (.txt, .jsonl, .json, .csv, .tsv, .parquet), a data set on the hub, or one of: hpdv2, parti.
`--output_dir` gets images/NAME/*.png, images.jsonl (a row per image) and manifest.json (settings, versions). The
same command after a kill generates what is missing; models and seeds can be added later.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import platform
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import (
    JsonLines,
    check_output_dir,
    fail,
    load_prompts,
    quiet_libraries,
    run_script,
    whole_file,
    write_json,
)


HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the images, in pixels.")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--negative_prompt", help="For pipelines that take one.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images at a time.")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="Default: fp16 on a GPU, fp32 without.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="File, data set on the hub, hpdv2 or parti.")
    parser.add_argument("--prompt_column", help="Where it isn't prompt, caption or text.")
    parser.add_argument("--prompt_split", default="train", help="Split of a data set on the hub.")
    parser.add_argument("--max_prompts", type=int, help="Use the first N prompts only.")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PIPELINE[,...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="One image per prompt and seed.")
    add_generation_flags(parser)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    check_generation_flags(args)
    check_output_dir(args.output_dir)
    args.models = dict(parse_model(text) for text in args.models)
    return args


def check_generation_flags(args: argparse.Namespace) -> None:
    for name in ("num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.resolution < 8 or args.resolution % 8:
        fail(f"--resolution {args.resolution}: must be a positive multiple of 8")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {args.device}: torch sees no GPU: use --device cpu")


def parse_model(text: str) -> tuple[str, dict[str, str]]:
    """`NAME=PIPELINE,lora=PATH` -> name and parts, the pipeline under `base`; local paths are checked."""
    name, _, rest = text.partition("=")
    base, *parts = rest.split(",")
    if not base or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        fail(f"--models {text}: must be NAME=PIPELINE[,unet=...][,lora=...][,embeddings=...,tokens=...]")
    spec = {"base": base}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in ("unet", "lora", "embeddings", "tokens") or not value:
            fail(f"--models {text}: {part!r} is none of unet=, lora=, embeddings=, tokens=")
        spec[key] = value
    if ("embeddings" in spec) != ("tokens" in spec):
        fail(f"--models {text}: embeddings= and tokens= need each other")
    for key in ("base", "unet", "lora", "embeddings"):
        place = Path(spec.get(key, ".").partition("@")[0])
        if (place.is_absolute() or len(place.parts) > 2 or key == "embeddings") and not place.exists():
            fail(f"--models {text}: {place} isn't there")  # A/B may be an id on the hub
    return name, spec


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


def load_pipeline(spec: dict[str, str], args: argparse.Namespace):
    """The text-to-image pipeline that `parse_model` describes, on the device, without progress bars or watermark."""
    from diffusers import AutoPipelineForText2Image

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}[args.dtype]
    dtype = dtype or (torch.float32 if args.device == "cpu" else torch.float16)
    parts = {}
    if "unet" in spec:
        from diffusers import UNet2DConditionModel

        parts["unet"] = UNet2DConditionModel.from_pretrained(spec["unet"], dtype=dtype)
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(spec["base"], dtype=dtype, **parts)
    except (OSError, ValueError) as error:
        fail(f"model {spec['base']}: {str(error).splitlines()[0]}")
    if "embeddings" in spec:
        load_embeddings(pipeline, spec)
    if "lora" in spec:
        path, _, scale = spec["lora"].partition("@")
        pipeline.load_lora_weights(path, adapter_name="lora")
        pipeline.set_adapters("lora", float(scale or 1))
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "watermark"):
        pipeline.watermark = None  # SDXL's changes pixels where its package is installed
    return pipeline.to(args.device)


def load_embeddings(pipeline, spec: dict[str, str]) -> None:
    """Textual inversion for SDXL's two encoders: clip_l (n, 768) and clip_g (n, 1280), a row for each token."""
    from safetensors.torch import load_file

    state, tokens = load_file(spec["embeddings"]), spec["tokens"].split("+")
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        if key not in state or len(state[key]) != len(tokens):
            rows = len(state.get(key, ()))
            fail(f"{spec['embeddings']}: {rows} rows of {key} for {len(tokens)} tokens {spec['tokens']}")
        pipeline.load_textual_inversion(
            list(state[key][:, None]), token=tokens, text_encoder=encoder, tokenizer=tokenizer
        )


def generate_images(name: str, spec: dict[str, str], jobs: list[dict], log: JsonLines, folder: Path, args) -> None:
    """Generates the jobs' images that aren't there yet and logs each; the model is loaded only if there are any.

    Args:
        jobs: rows for the log with `path` (from `folder`), `prompt` and `noise_seed`.
        args: with the flags of `add_generation_flags`.
    """
    logged = {row["path"]: row["prompt"] for row in log.rows}
    for job in jobs:
        if logged.get(job["path"], job["prompt"]) != job["prompt"]:
            before, now = logged[job["path"]], job["prompt"]
            fail(f"{folder / job['path']} was generated for {before!r}, now {now!r}: name another folder")
    missing = [job for job in jobs if not (folder / job["path"]).exists()]
    log.add(*(job for job in jobs if job["path"] not in logged and (folder / job["path"]).exists()))
    if not missing:
        return
    quiet_libraries()
    pipeline = load_pipeline(spec, args)
    options = {"height": args.resolution, "width": args.resolution, "guidance_scale": args.guidance_scale}
    options["num_inference_steps"] = args.num_inference_steps
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=f"Generating {name}", unit="image") as bar:
        for start in range(0, len(missing), args.batch_size):
            chunk = missing[start : start + args.batch_size]
            if args.negative_prompt is not None:
                options["negative_prompt"] = [args.negative_prompt] * len(chunk)
            # Noise from the CPU's generator is the same on every device and in every batch.
            generators = [torch.Generator("cpu").manual_seed(job["noise_seed"]) for job in chunk]
            with torch.no_grad():
                images = pipeline([job["prompt"] for job in chunk], generator=generators, **options).images
            for job, image in zip(chunk, images):
                with whole_file(folder / job["path"]) as aside:
                    image.save(aside, "PNG")
                if job["path"] not in logged:
                    log.add(job)
                bar.update()
    del pipeline
    free_memory()


def free_memory() -> None:
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def noise_seed(index: int, seed: int) -> int:
    """Another noise for every prompt, the same one for every model."""
    return 100_003 * index + seed


def versions() -> dict[str, str]:
    import transformers

    import diffusers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def load_prompt_set(args: argparse.Namespace) -> list[dict]:
    if args.prompts == "hpdv2":
        from huggingface_hub import hf_hub_download

        rows = []
        for style in HPDV2_STYLES:
            file = hf_hub_download("zhwang/HPDv2", f"benchmark/{style}.json", repo_type="dataset")
            rows += [{"prompt": prompt, "style": style} for prompt in json.loads(Path(file).read_text())]
    elif args.prompts == "parti":
        rows = load_prompts("nateraw/parti-prompts", "Prompt")
    else:
        rows = load_prompts(args.prompts, args.prompt_column, args.prompt_split)
    return rows[: args.max_prompts]


def write_manifest(prompts: list[dict], args: argparse.Namespace) -> None:
    """Settings, models and versions; ends the run where the folder holds images of other ones."""
    path = args.output_dir / "manifest.json"
    texts = json.dumps([(row["prompt"], row.get("base_prompt")) for row in prompts])
    settings = {"prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(), "prompts": len(prompts)}
    for name in ("resolution", "num_inference_steps", "guidance_scale", "negative_prompt", "dtype"):
        settings[name] = getattr(args, name)
    models, seeds = {}, []
    if path.exists():
        begun = json.loads(path.read_text())
        models, seeds = begun["models"], begun["seeds"]
        for name, value in settings.items():
            if begun["settings"].get(name) != value:
                begun_value = begun["settings"].get(name)
                fail(f"--output_dir {args.output_dir} holds images of {name} {begun_value}, now {value}: name another")
        for name, spec in args.models.items():
            if models.get(name, spec) != spec:
                fail(f"--models {name}: {args.output_dir} holds images of {models[name]}: give another name")
    manifest = {"settings": settings, "models": models | args.models, "seeds": sorted({*seeds, *args.seeds})}
    write_json(path, manifest | {"source": args.prompts, "versions": versions(), "device": args.device})


def main(args: argparse.Namespace) -> None:
    prompts = load_prompt_set(args)
    write_manifest(prompts, args)
    log = JsonLines(args.output_dir / "images.jsonl")
    for name, spec in args.models.items():
        plain = "base_prompt" if "embeddings" not in spec else "prompt"
        jobs = [
            {
                **{key: value for key, value in row.items() if key != "base_prompt"},
                "model": name,
                "prompt_id": i,
                "prompt": row.get(plain) or row["prompt"],
                "seed": seed,
                "noise_seed": noise_seed(i, seed),
                "path": f"images/{name}/{i:05d}-{seed}.png",
            }
            for seed in args.seeds
            for i, row in enumerate(prompts)
        ]
        generate_images(name, spec, jobs, log, args.output_dir, args)
    print(f"{len(log.rows)} images in {args.output_dir}; next: python evaluation/score.py {args.output_dir} ...")


if __name__ == "__main__":
    run_script(main, parse_args())
