#!/usr/bin/env python
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

# /// script
# dependencies = [
#     "accelerate>=1.15.0",
#     "bitsandbytes>=0.50.2",
#     "datasets>=5.2.0",
#     "diffusers>=0.42.0",
#     "jinja2>=3.1.6",
#     "matplotlib>=3.11.2",
#     "peft>=0.21.2",
#     "torch>=2.13.0",
#     "transformers>=5.23.0",
# ]
# ///
"""
Fine-tune SDXL on preference pairs with MaPO (arXiv 2406.06424), which needs no reference model:

    accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8

This trains the tiny model in `demo/`. Name a model and a data set to train your own:

    accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dataset_name my_pairs/ \\
        --use_lora --mixed_precision bf16 --gradient_checkpointing

A pair is a caption, the image that people chose (the winner, `_w`) and the image that they rejected (the loser, `_l`).
All images and captions are encoded once and cached on disk. A training step adds the same noise at the same timestep to
winner and loser, predicts it in one UNet pass, and minimizes the loss of `mapo_loss.py`.

What differs from the authors' code, and why:
1. The loss is the paper's (eq. 5-7). The code of 2024 has another one, whose `--beta_mapo 0.1` means something else.
2. Every image is resized from its own original. The authors' code stretches the second image to the size of the first.
3. Ties and rows without a label are dropped. There, a tie counts as a win of the first image.
4. Images are encoded once, to the mode of the VAE's posterior. There, every step samples a new encoding.
5. SDXL's size and crop conditioning stays in fp32, because bf16 can't hold a number like 1153.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import textwrap
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from huggingface_hub import ModelCard, ModelCardData, cached_assets_path, create_repo, snapshot_download, upload_folder
from mapo_loss import MaPOLoss, mapo_loss
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm


# Warnings about packages that aren't needed here, which are printed while the next lines import them.
transformers.utils.logging.set_verbosity_error()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402

import diffusers  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import SchedulerType, get_scheduler  # noqa: E402
from diffusers.training_utils import (  # noqa: E402
    EMAModel,
    cast_training_params,
    find_nearest_bucket,
    generate_aspect_ratio_buckets,
    offload_models,
    parse_buckets_string,
)
from diffusers.utils import (  # noqa: E402
    check_min_version,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
    is_wandb_available,
)
from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH, populate_model_card  # noqa: E402


check_min_version("0.42.0")

logger = logging.getLogger(__name__)

# Pillow refuses images that could be attacks: over 179 megapixels, or with more than 1 MB of text, as ComfyUI writes
# them. Training images are your own. Raise these limits if a file is still refused.
Image.MAX_IMAGE_PIXELS = 1_000_000_000
PngImagePlugin.MAX_TEXT_CHUNK = 256 * 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2**20

# Columns of published data sets: caption, image 0, image 1, label 0, label 1. Where there is no label, image 0 is the
# chosen one. A single label is the preference for image 0, from 0 to 1; two labels are votes or scores.
DATASET_COLUMNS = [
    ("caption", "jpg_0", "jpg_1", "label_0", None),  # Pick-a-Pic and the data sets derived from it
    ("original_prompt.txt", "jpg_0.jpg", "jpg_1.jpg", "label_0.txt", None),  # Pick-a-Pic as webdataset
    ("prompt", "image1", "image2", "votes_image1", "votes_image2"),  # Rapidata
    ("prompt", "chosen", "rejected", None, None),  # open-image-preferences
    ("caption", "chosen", "rejected", None, None),
    ("prompt", "path1", "path2", None, None),  # HPDv3
]

DATASET_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".tar": "webdataset",
}

# Pairs in a cache file. A run that is killed while it encodes starts again with the next file.
PAIRS_PER_CACHE_FILE = 256

# Part of every cache file's key. Change it when images are loaded, resized or encoded in another way.
ENCODING_VERSION = 1

# Settings that a resumed run may change without changing what it trains.
SETTINGS_THAT_MAY_CHANGE = {
    "allow_tf32",
    "cache_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "compile",
    "dataloader_num_workers",
    "dataset_name",  # the pairs themselves are compared
    "enable_xformers_memory_efficient_attention",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "guidance_scale",
    "hub_model_id",
    "hub_token",
    "image_root",
    "is_demo",
    "logging_dir",
    "lora_weights",  # are in the checkpoint
    "max_train_steps",
    "num_inference_steps",
    "num_train_epochs",
    "num_validation_images",
    "output_dir",
    "output_kohya_format",
    "overwrite_output_dir",
    "pretrained_model_name_or_path",  # the weights themselves are compared
    "pretrained_vae_model_name_or_path",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "save_dtype",
    "single_file_config",
    "skip_final_inference",
    "train_batch_size",  # the pairs in a step are compared
    "validation_prompts",
    "validation_steps",
}

# What a result consists of. Nothing else is uploaded.
RESULT_FILES = [
    "README.md",
    "before_after.png",
    "curves.png",
    "metrics.jsonl",
    "model_index.json",
    "pytorch_lora_weights*.safetensors",
    "scheduler/*",
    "text_encoder/*",
    "text_encoder_2/*",
    "tokenizer/*",
    "tokenizer_2/*",
    "unet/*",
    "vae/*",
    "validation/*.png",
]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    # Model
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=str,
        default=None,
        help="The SDXL model to train: a repository on the hub, a folder in diffusers' format or a .safetensors file.",
    )
    parser.add_argument(
        "--pretrained_vae_model_name_or_path",
        type=str,
        default=None,
        help="Use this VAE instead of the model's own. Takes the same three forms as the model.",
    )
    parser.add_argument(
        "--single_file_config",
        type=str,
        default="stabilityai/stable-diffusion-xl-base-1.0",
        help="Where the configs and tokenizers for a .safetensors model come from: a repository or a folder.",
    )
    parser.add_argument("--revision", type=str, default=None, help="Revision of the model on the hub.")
    parser.add_argument("--variant", type=str, default=None, help="Variant of the model's files, such as fp16.")
    parser.add_argument(
        "--prediction_type",
        type=str,
        default=None,
        choices=["epsilon", "v_prediction"],
        help="What the UNet predicts. Pass this only if the model's config is missing or wrong.",
    )
    parser.add_argument(
        "--rescale_betas_zero_snr",
        action="store_true",
        help="Use a noise schedule with zero terminal SNR. Pass this only if the model's config lacks it.",
    )

    # Data
    parser.add_argument(
        "--dataset_name",
        type=str,
        default=None,
        help="Preference pairs: a data set on the hub, a local file, or a folder. See docs/training.md for layouts.",
    )
    parser.add_argument("--dataset_config_name", type=str, default=None, help="Configuration of the data set.")
    parser.add_argument(
        "--dataset_split_name",
        type=str,
        default="train",
        help="Split to train on. Join several with a plus: train+validation.",
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="Stream the data set and download only what the run needs.",
    )
    parser.add_argument(
        "--image_root",
        type=str,
        default=None,
        help="Folder for image paths in the data set. Defaults to the folder of the data set.",
    )
    parser.add_argument("--caption_column", type=str, default=None, help="Column with the captions.")
    parser.add_argument("--chosen_column", type=str, default=None, help="Column with the chosen images.")
    parser.add_argument("--rejected_column", type=str, default=None, help="Column with the rejected images.")
    parser.add_argument(
        "--image_0_column",
        type=str,
        default=None,
        help="Column with image 0 of each pair, for data sets whose labels say which image won.",
    )
    parser.add_argument("--image_1_column", type=str, default=None, help="Column with image 1 of each pair.")
    parser.add_argument(
        "--label_0_column",
        type=str,
        default=None,
        help="Column with the preference for image 0, from 0 to 1, or with its votes or score.",
    )
    parser.add_argument("--label_1_column", type=str, default=None, help="Column with the votes or score of image 1.")
    parser.add_argument("--max_train_samples", type=int, default=None, help="Train on the first N pairs only.")
    parser.add_argument("--resolution", type=int, default=1024, help="Size of the training images, in pixels.")
    parser.add_argument(
        "--use_aspect_ratio_buckets",
        action="store_true",
        help="Crop images to the nearest of several shapes, each with about resolution x resolution pixels, instead of to squares.",
    )
    parser.add_argument(
        "--aspect_ratio_buckets",
        type=str,
        default=None,
        help="The shapes to train on, as height,width;height,width;... Defaults to 11 shapes from 1:2 to 2:1.",
    )
    parser.add_argument("--random_crop", action="store_true", help="Crop at a random place instead of the center.")
    parser.add_argument(
        "--random_flip",
        action="store_true",
        help="Mirror a random half of the pairs. Both images of a pair are mirrored together.",
    )
    parser.add_argument(
        "--proportion_empty_prompts",
        type=float,
        default=0.0,
        help="Fraction of the pairs to train without their caption.",
    )
    parser.add_argument(
        "--cache_dir",
        type=str,
        default=None,
        help="Folder for downloads and for encoded pairs. Defaults to the hub's own cache.",
    )
    parser.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Number of worker processes that load the encoded pairs."
    )

    # Method
    parser.add_argument(
        "--beta_mapo",
        type=float,
        default=8.0,
        help="beta of eq. 5-7. The paper uses 8 for general preferences and up to 1024 for a single subject.",
    )
    parser.add_argument(
        "--snr_value", type=float, default=0.5, help="Factor on the errors in the score (s in the paper's Appendix A)."
    )
    parser.add_argument(
        "--safeguard",
        type=float,
        default=None,
        help="Damp the loser's gradient where it would make the winner worse, by this strength from 0 to 1. Not part "
        "of the paper, and off by default.",
    )
    parser.add_argument(
        "--no_safeguard",
        action="store_const",
        dest="safeguard",
        const=None,
        help="Train the demo with the paper's own loss.",
    )
    parser.add_argument(
        "--noise_offset", type=float, default=0.0, help="Strength of the noise offset. 0 turns it off."
    )

    # LoRA
    parser.add_argument("--use_lora", action="store_true", help="Train a LoRA instead of all weights.")
    parser.add_argument(
        "--lora_weights",
        type=str,
        default=None,
        help="Continue training this LoRA, a file in diffusers' or kohya's format. Its rank and layers are kept.",
    )
    parser.add_argument("--rank", type=int, default=32, help="Rank of the LoRA matrices.")
    parser.add_argument(
        "--lora_alpha", type=float, default=None, help="The LoRA is scaled by alpha / rank. Defaults to the rank."
    )
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="Dropout probability in the LoRA layers.")
    parser.add_argument(
        "--lora_layers", type=str, default="to_k,to_q,to_v,to_out.0", help="The UNet's layers that get a LoRA."
    )
    parser.add_argument(
        "--output_kohya_format",
        action="store_true",
        help="Save the LoRA a second time in kohya's format, for ComfyUI and A1111.",
    )

    # Optimization
    parser.add_argument("--train_batch_size", type=int, default=4, help="Pairs per device and forward pass.")
    parser.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Forward passes for each optimizer step."
    )
    parser.add_argument(
        "--num_train_epochs", type=int, default=None, help="Passes over the pairs, instead of --max_train_steps."
    )
    parser.add_argument(
        "--max_train_steps",
        type=int,
        default=None,
        help="Number of optimizer steps. Defaults to 2000, unless --num_train_epochs is given.",
    )
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=None,
        help="Peak learning rate. Defaults to 1e-7 for all weights, 1e-5 for a LoRA and 1 for prodigy.",
    )
    parser.add_argument(
        "--scale_lr", action="store_true", help="Multiply the learning rate by the number of pairs in a step."
    )
    parser.add_argument(
        "--lr_scheduler",
        type=str,
        default="cosine",
        choices=[schedule.value for schedule in SchedulerType if schedule != SchedulerType.PIECEWISE_CONSTANT],
        help="Learning rate schedule.",
    )
    parser.add_argument(
        "--lr_warmup_steps", type=int, default=0, help="Number of warmup steps, during which the learning rate rises."
    )
    parser.add_argument("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    parser.add_argument(
        "--optimizer", type=str, default="adamw", choices=["adamw", "prodigy"], help="Optimizer to train with."
    )
    parser.add_argument(
        "--use_8bit_adam",
        action="store_true",
        help="Use 8-bit AdamW, which needs two bytes of state per weight instead of eight.",
    )
    parser.add_argument("--adam_beta1", type=float, default=0.9, help="Adam's beta1.")
    parser.add_argument("--adam_beta2", type=float, default=0.999, help="Adam's beta2.")
    parser.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Weight decay.")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="Clip gradients to this norm.")
    parser.add_argument("--use_ema", action="store_true", help="Average the weights, and save the average.")
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="Maximum decay of the weight average.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for everything that is random.")

    # Speed and memory
    parser.add_argument(
        "--mixed_precision",
        type=str,
        default=None,
        choices=["no", "fp16", "bf16"],
        help="Precision of the computation. Defaults to that of accelerate's config.",
    )
    parser.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Save most of the memory for activations, at the cost of a third more computation.",
    )
    parser.add_argument("--compile", action="store_true", help="Compile the UNet's blocks with torch.compile.")
    parser.add_argument("--allow_tf32", action="store_true", help="Use TF32 for fp32 matrix products.")
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="Use xformers' attention instead of torch's.",
    )

    # Output, checkpoints and validation
    parser.add_argument(
        "--output_dir", type=str, default="diffusion-mapo-sdxl", help="Folder for the results and the checkpoints."
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the result of an earlier run in --output_dir."
    )
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between two checkpoints.")
    parser.add_argument(
        "--checkpoints_total_limit", type=int, default=2, help="Keep only the newest N checkpoints of this run."
    )
    parser.add_argument(
        "--resume_from_checkpoint",
        type=str,
        default=None,
        help='Resume from a checkpoint: its path, its name in --output_dir, or "latest".',
    )
    parser.add_argument("--validation_steps", type=int, default=500, help="Steps between two validations.")
    parser.add_argument(
        "--num_validation_pairs",
        type=int,
        default=0,
        help="Number of pairs to hold out of training, to measure errors and accuracy on.",
    )
    parser.add_argument(
        "--validation_split_name",
        type=str,
        default=None,
        help="Split to take the held-out pairs from. Defaults to the split to train on.",
    )
    parser.add_argument(
        "--validation_prompts",
        type=str,
        nargs="+",
        default=None,
        help="Prompts to generate images for in every validation. Defaults to 8 captions, after training only.",
    )
    parser.add_argument("--num_validation_images", type=int, default=1, help="Images for each prompt.")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="Guidance scale of the generated images.")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Denoising steps of the generated images.")
    parser.add_argument("--skip_final_inference", action="store_true", help="Don't generate before_after.png.")
    parser.add_argument(
        "--save_dtype",
        type=str,
        default="fp32",
        choices=["fp32", "fp16", "bf16"],
        help="Precision of the saved pipeline. fp16 can round away the small changes of a low learning rate.",
    )
    parser.add_argument(
        "--logging_dir", type=str, default="logs", help="Folder for the tracker's files, inside --output_dir."
    )
    parser.add_argument(
        "--report_to",
        type=str,
        default="none",
        choices=["none", "tensorboard", "wandb", "trackio"],
        help="Tracker to log to. Metrics always go to metrics.jsonl.",
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the result to the hub.")
    parser.add_argument("--hub_model_id", type=str, default=None, help="Repository to upload to.")
    parser.add_argument("--hub_token", type=str, default=None, help="Token for the hub.")

    args = parser.parse_args(input_args)
    args.is_demo = args.pretrained_model_name_or_path is None and args.dataset_name is None
    if args.is_demo:
        demo_defaults = Path(__file__).resolve().parent / "demo" / "train_pairs.json"
        if not demo_defaults.is_file():
            parser.error("pass --pretrained_model_name_or_path with an SDXL model and --dataset_name with your pairs")
        parser.set_defaults(is_demo=True, **json.loads(demo_defaults.read_text()))
        args = parser.parse_args(input_args)
        args.pretrained_model_name_or_path = str(demo_defaults.parent / args.pretrained_model_name_or_path)
        args.dataset_name = str(demo_defaults.parent / args.dataset_name)
    check_args(parser, args)

    if args.lora_weights is not None:
        args.use_lora = True
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.learning_rate is None:
        args.learning_rate = 1e-5 if args.use_lora else 1e-7
        if args.optimizer == "prodigy":
            args.learning_rate = 1.0
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 2000
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse arguments that would be ignored, or that wouldn't do what the user expects."""
    if args.pretrained_model_name_or_path is None or args.dataset_name is None:
        parser.error("pass both --pretrained_model_name_or_path and --dataset_name")
    for name in ("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "validation_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.checkpoints_total_limit < 1:
        parser.error(f"--checkpoints_total_limit {args.checkpoints_total_limit}: must be at least 1")
    if not 1e-6 <= args.beta_mapo <= 1e6:
        parser.error(f"--beta_mapo {args.beta_mapo}: must be between 1e-6 and 1e6; the paper uses 8 to 1024")
    if args.safeguard is not None and not 0 <= args.safeguard < 1:
        parser.error(f"--safeguard {args.safeguard}: must be at least 0 and below 1")
    if args.resolution < 8 or args.resolution % 8 != 0:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8")
    if args.aspect_ratio_buckets is not None and not args.use_aspect_ratio_buckets:
        parser.error("--aspect_ratio_buckets needs --use_aspect_ratio_buckets")
    if args.validation_split_name is not None and args.validation_split_name == args.dataset_split_name:
        parser.error("--validation_split_name names the split to train on; leave it out to hold out some of its pairs")
    if args.validation_split_name is not None and args.num_validation_pairs == 0 and not args.is_demo:
        parser.error("--validation_split_name needs --num_validation_pairs")
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error(f"--use_8bit_adam: works only with --optimizer adamw, not {args.optimizer}")
    if args.output_kohya_format and not (args.use_lora or args.lora_weights):
        parser.error("--output_kohya_format needs --use_lora")
    if args.streaming and args.max_train_steps is None and args.num_train_epochs is not None:
        parser.error("--streaming: a stream has no known length; pass --max_train_steps instead of --num_train_epochs")
    if args.report_to == "wandb" and not is_wandb_available():
        parser.error("--report_to wandb: pip install wandb")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--hub_token: wandb would store it; log in with `hf auth login` instead")


# ---- Models ---------------------------------------------------------------------------------------------------------
def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    single_file_config: str = "stabilityai/stable-diffusion-xl-base-1.0",
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> StableDiffusionXLPipeline:
    """Load SDXL from the hub, from a folder in diffusers' format or from one .safetensors file.

    The VAE is in fp32, because SDXL's own gives NaN in fp16; the rest is in `dtype`. The scheduler matches the model: a
    single file says that it predicts v or has zero terminal SNR with the keys `v_pred` and `ztsnr`, as in ComfyUI.

    Raises:
        ValueError: the model isn't an SDXL base model, or has a scheduler or VAE that this method can't train.
    """
    for path in (model, vae):
        if path is not None and Path(path).is_file() and Path(path).suffix != ".safetensors":
            raise ValueError(
                f"{path}: convert it to .safetensors; other files can hold code that runs when they are loaded"
            )
    single_file = Path(model).suffix == ".safetensors"
    if single_file:
        keys = read_single_file_keys(model)
        if "v_pred" in keys and prediction_type is None:
            prediction_type = "v_prediction"
        if "ztsnr" in keys:
            rescale_betas_zero_snr = True
        if vae is None:
            vae = model
            if not any(key.startswith("first_stage_model.") for key in keys):
                raise ValueError(f"{model}: has no VAE; name one with --pretrained_vae_model_name_or_path")
    unet_files = [path.name for path in Path(model, "unet").glob("diffusion_pytorch_model*")]
    if variant is None and unet_files and all(".fp16" in name for name in unet_files):
        raise ValueError(f"{model}: has only its fp16 variant; pass --variant fp16")

    # The configs come first: they are small, and show whether the model can be trained.
    configs = single_file_config if single_file else model
    if not Path(configs).is_dir():
        try:
            configs = snapshot_download(
                configs,
                revision=None if single_file else revision,
                cache_dir=cache_dir,
                allow_patterns=["model_index.json", "*/*.json", "*/*.txt"],
            )
        except (OSError, ValueError) as error:
            flag = "--single_file_config" if single_file else "--pretrained_model_name_or_path"
            raise FileNotFoundError(
                f"{flag} {configs}: isn't a folder and can't be downloaded; name a folder with an SDXL model in "
                f"diffusers' format ({error})"
            ) from error
    check_model_configs(single_file_config if single_file else model, configs, vae, prediction_type, cache_dir)

    components = {}
    try:
        if vae is not None and Path(vae).is_file():
            components["vae"] = AutoencoderKL.from_single_file(
                vae, config=configs, subfolder="vae", dtype=torch.float32, local_files_only=True
            )
        elif vae is not None:
            components["vae"] = AutoencoderKL.from_pretrained(vae, dtype=torch.float32, cache_dir=cache_dir)
        if single_file:
            pipeline = StableDiffusionXLPipeline.from_single_file(
                model, config=configs, dtype=dtype, local_files_only=True, add_watermarker=False, **components
            )
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                model,
                dtype={"vae": torch.float32, "default": dtype},
                revision=revision,
                variant=variant,
                cache_dir=cache_dir,
                add_watermarker=False,
                **components,
            )
    except NotImplementedError as error:  # a tensor that isn't in the file stays on the meta device
        raise ValueError(f"{model}: lacks weights of SDXL's UNet or VAE; it may be incomplete") from error
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
            component.eval()
            for tensor_name, tensor in component.state_dict().items():
                if tensor.device.type == "meta":
                    raise ValueError(f"{model}: holds no weights for {name}.{tensor_name}; it may be incomplete")

    changes = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if rescale_betas_zero_snr:
        changes["rescale_betas_zero_snr"] = True
        changes["timestep_spacing"] = "trailing"  # else sampling never starts at the timestep with zero SNR
    if changes:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def check_model_configs(
    model: str, configs: str, vae: str | None, prediction_type: str | None, cache_dir: str | None
) -> None:
    """Raise a ValueError if a model can't be trained. `configs` is the folder with its configs."""
    index = DiffusionPipeline.load_config(configs)
    if index.get("text_encoder_2") is None or index.get("text_encoder", [None, None])[1] is None:
        raise ValueError(
            f"{model}: is a {index['_class_name']} without SDXL's two text encoders; name an SDXL base model"
        )
    unet_config = UNet2DConditionModel.load_config(configs, subfolder="unet")
    if unet_config["in_channels"] != 4:
        raise ValueError(f"{model}: its UNet takes {unet_config['in_channels']} channels, as for inpainting; needs 4")
    if vae is None or Path(vae).is_file():
        vae_config = AutoencoderKL.load_config(configs, subfolder="vae")
    else:
        vae_config = AutoencoderKL.load_config(vae, cache_dir=cache_dir)
    if vae_config.get("latents_mean") is not None or vae_config.get("latents_std") is not None:
        raise ValueError(f"{vae or model}: its VAE normalizes latents (latents_mean, latents_std); SDXL's VAE doesn't")
    scheduler_config = DDPMScheduler.load_config(configs, subfolder="scheduler")
    name = scheduler_config["_class_name"]
    if name.startswith(("FlowMatch", "EDM")) or scheduler_config.get("use_flow_sigmas"):
        raise ValueError(f"{model}: has a {name}; this script trains models with a DDPM noise schedule, like SDXL's")
    prediction_type = prediction_type or scheduler_config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"{model}: predicts {prediction_type}; MaPO is implemented for epsilon and v_prediction")


def read_single_file_keys(path: str) -> set[str]:
    """Return the names of the tensors in a .safetensors file after checking that they are those of an SDXL model."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: isn't a whole .safetensors file ({error}); download it again") from error
    keys = set(file.keys())
    first_layer = "model.diffusion_model.input_blocks.0.0.weight"
    if first_layer not in keys or not any(key.startswith("conditioner.embedders.1.") for key in keys):
        raise ValueError(
            f"{path}: isn't an SDXL base model with UNet and two text encoders (refiners, SD 1.5 and LoRA files can't "
            "be trained here)"
        )
    in_channels = file.get_slice(first_layer).get_shape()[1]
    if in_channels != 4:
        raise ValueError(f"{path}: its UNet takes {in_channels} channels, as for inpainting; needs 4")
    if "edm_mean" in keys or "edm_vpred.sigma_max" in keys:
        raise ValueError(f"{path}: has an EDM noise schedule; this script trains models with a DDPM one, like SDXL's")
    return keys


def add_lora(model: torch.nn.Module, config: LoraConfig) -> None:
    """Add a LoRA to a frozen model. Its weights are trained in fp32, whatever the model's precision."""
    for layer in config.target_modules:
        if not any(f".{name}".endswith(f".{layer}") for name, _ in model.named_modules()):
            raise ValueError(f"--lora_layers: {type(model).__name__} has no layer {layer!r}")  # peft would ignore it
    model.add_adapter(config)
    cast_training_params(model, dtype=torch.float32)


def load_lora(pipeline: StableDiffusionXLPipeline, path: str) -> None:
    """Load a LoRA in diffusers' or kohya's format and make its UNet layers trainable, in fp32."""
    file = Path(path)
    if file.is_dir():
        file = file / "pytorch_lora_weights.safetensors"  # the folder of a run may have kohya's file too
    if not file.is_file():
        raise FileNotFoundError(f"--lora_weights {path}: {file} doesn't exist")
    pipeline.load_lora_weights(str(file), adapter_name="default")
    if not getattr(pipeline.unet, "peft_config", None):
        raise ValueError(f"--lora_weights {path}: has no layers for SDXL's UNet")
    if pipeline.unet.peft_config["default"].use_dora:
        raise ValueError(f"--lora_weights {path}: is a DoRA; only a plain LoRA can be trained here")
    for name, parameter in pipeline.unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    cast_training_params(pipeline.unet, dtype=torch.float32)
    # peft has rounded the weights to the UNet's precision; load them again.
    state_dict, _ = pipeline.lora_state_dict(str(file), unet_config=pipeline.unet.config)
    layers = {key.removeprefix("unet."): value for key, value in state_dict.items() if key.startswith("unet.")}
    set_peft_model_state_dict(pipeline.unet, convert_unet_state_dict_to_peft(layers))


def hash_components(*components) -> str:
    """Hash models, tokenizers and schedulers by their content: weights, configs and vocabularies, but no paths."""
    digest = hashlib.sha256()
    for component in components:
        config = getattr(component, "config", {})
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        for key in sorted(config):
            if not key.startswith("_") and key not in ("transformers_version", "dtype", "torch_dtype"):
                digest.update(f"{key}={config[key]!r}\n".encode())
        if isinstance(component, torch.nn.Module):
            for name, tensor in component.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            for name, module in component.named_modules():
                if hasattr(module, "scaling"):  # of a LoRA; it isn't among the weights
                    digest.update(f"{name} {module.scaling!r}\n".encode())
        if isinstance(component, transformers.PreTrainedTokenizerBase):
            tokenizer = json.loads(component.backend_tokenizer.to_str())
            del tokenizer["truncation"]  # changes from call to call, like the next
            del tokenizer["padding"]
            digest.update(json.dumps(tokenizer).encode())
            digest.update(str(component.model_max_length).encode())
    return digest.hexdigest()


def hash_pipeline(pipeline: DiffusionPipeline) -> str:
    """Hash everything that a pipeline's images depend on, apart from the call's own arguments."""
    settings = [pipeline.config.get("force_zeros_for_empty_prompt")]
    components = [pipeline.components[name] for name in sorted(pipeline.components)]
    return hashlib.sha256(f"{settings} {hash_components(*components)}".encode()).hexdigest()


# ---- Data -----------------------------------------------------------------------------------------------------------
def load_pairs(
    dataset_name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_root: str | None = None,
    caption_column: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    image_0_column: str | None = None,
    image_1_column: str | None = None,
    label_0_column: str | None = None,
    label_1_column: str | None = None,
    streaming: bool = False,
    stream_file: Path | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Load preference pairs from the hub or from disk.

    A stream is read, in an order shuffled by `seed`, until it has given `max_pairs` pairs; they are written to
    `stream_file`.

    Returns:
        A data set with the columns `caption`, `image_w` and `image_l`, in the order of the source. Images are bytes,
        paths or `{"bytes", "path"}`, as `load_image` reads them. Ties and rows without a label are left out.

    Raises:
        ValueError: columns, labels or captions aren't those of preference pairs.
    """
    path = Path(dataset_name)
    is_pair_folder = (path / "w").is_dir() and (path / "l").is_dir()
    is_saved_dataset = (path / "dataset_info.json").is_file()
    if (path.is_file() or is_pair_folder or is_saved_dataset) and re.split(r"[\[+]", split)[0] != "train":
        raise ValueError(f"--dataset_name {dataset_name}: has a single split, 'train', and no {split!r}")
    if is_pair_folder:
        dataset = load_pair_folders(path)
    elif is_saved_dataset:
        dataset = datasets.load_from_disk(dataset_name)
    elif (path / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(dataset_name)[split]
    elif path.is_file():
        if path.suffix not in DATASET_BUILDERS:
            raise ValueError(
                f"--dataset_name {dataset_name}: must be one of {', '.join(DATASET_BUILDERS)}, or a folder"
            )
        options = {}
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                header = next(csv.reader(file))
            # Everything stays text, or the captions "None" and "0123" would change.
            options["keep_default_na"] = False
            options["features"] = datasets.Features({name: datasets.Value("string") for name in header})
        dataset = datasets.load_dataset(
            DATASET_BUILDERS[path.suffix],
            data_files={"train": dataset_name},
            split=split,
            streaming=streaming,
            cache_dir=cache_dir,
            **options,
        )
    else:
        dataset = datasets.load_dataset(
            dataset_name, config_name, split=split, streaming=streaming, cache_dir=cache_dir
        )

    # Which columns are the caption, the images and the labels?
    column_names = dataset.column_names or list(next(iter(dataset)))
    if chosen_column is not None or image_0_column is not None:
        columns = (
            caption_column or find_caption_column(column_names),
            chosen_column or image_0_column,
            rejected_column or image_1_column,
            label_0_column,
            label_1_column,
        )
    else:
        columns = find_known_columns(column_names)
        if columns is None:
            raise ValueError(
                f"--dataset_name {dataset_name}: the columns {', '.join(column_names)} don't match any known data set. "
                "Pass --caption_column with --chosen_column and --rejected_column, or with --image_0_column, "
                "--image_1_column and --label_0_column. A folder of images needs the folders w/ and l/."
            )
        if caption_column is not None:
            columns = (caption_column, *columns[1:])
    caption, image_0, image_1, label_0, label_1 = columns
    for column in columns:
        if column is not None and column not in column_names:
            raise ValueError(
                f"--dataset_name {dataset_name}: has no column {column!r}, only {', '.join(column_names)}"
            )
    if image_0 == image_1 or image_1 is None:
        raise ValueError(f"--dataset_name {dataset_name}: pass two different columns for the two images of a pair")
    for column in (image_0, image_1):
        if dataset.features is not None and isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))

    if image_root is None and path.exists():
        folder = path if path.is_dir() else path.parent
    else:
        folder = Path(image_root or ".")
    if streaming and isinstance(dataset, datasets.IterableDataset):
        rows = dataset.shuffle(seed=seed, buffer_size=1000)
        pairs = read_stream(rows, columns, folder, max_pairs, stream_file)
    else:
        preferences = read_preferences(dataset, label_0, label_1)
        first_won = np.flatnonzero(preferences > 0.5)
        second_won = np.flatnonzero(preferences < 0.5)
        logger.info(
            f"{dataset_name}, {split}: {len(first_won) + len(second_won)} pairs, {np.sum(preferences == 0.5)} ties, "
            f"{np.sum(np.isnan(preferences))} rows without a label."
        )
        # No image is copied: rows are selected, and their columns get other names.
        dataset = dataset.select_columns([caption, image_0, image_1])
        dataset = dataset.rename_columns({caption: "caption", image_0: "image_0", image_1: "image_1"})
        first = dataset.select(first_won).rename_columns({"image_0": "image_w", "image_1": "image_l"})
        second = dataset.select(second_won).rename_columns({"image_1": "image_w", "image_0": "image_l"})
        pairs = datasets.concatenate_datasets([first, second.select_columns(["caption", "image_w", "image_l"])])
        pairs = pairs.select(np.argsort(np.concatenate([first_won, second_won])))
    if len(pairs) == 0:
        raise ValueError(
            f"--dataset_name {dataset_name}: no row of {split!r} has a label that decides which image won"
        )
    if max_pairs is not None:
        pairs = pairs.select(range(min(max_pairs, len(pairs))))

    for index, text in enumerate(pairs["caption"]):
        if not isinstance(text, str):
            raise ValueError(f"--dataset_name {dataset_name}: a caption is {text!r}, in pair {index}; it must be text")
    for column in ("image_w", "image_l"):
        if pairs.features[column].dtype in ("string", "large_string"):
            # Not from the cache of `datasets`, whose fingerprints don't always change with the content.
            pairs = pairs.map(
                resolve_image_path,
                fn_kwargs={"column": column, "folder": folder, "root": image_root},
                keep_in_memory=True,
                load_from_cache_file=False,
            )
    return pairs


def load_pair_folders(path: Path) -> datasets.Dataset:
    """List the pairs in a folder: w/NAME.png was chosen over l/NAME.png, and NAME.txt is the caption.

    The caption may also be w/NAME.txt, or end in .caption, as other trainers write it.
    """
    suffixes = set(Image.registered_extensions())
    images = {"w": {}, "l": {}}
    passed_over = []
    for side, files in images.items():
        for file in sorted((path / side).iterdir()):
            if file.name.startswith(".") or file.suffix.lower() in (".txt", ".caption"):
                continue
            if file.suffix.lower() not in suffixes:
                passed_over.append(f"{side}/{file.name}")
            elif file.stem in files:
                raise ValueError(f"{file}: {files[file.stem].name} has the same name; delete or rename one of the two")
            else:
                files[file.stem] = file
    if passed_over:
        logger.warning(f"{path}: {len(passed_over)} files aren't images that can be read: {shorten(passed_over)}")
    unpaired = sorted(images["w"].keys() ^ images["l"].keys())
    if unpaired:
        raise ValueError(f"{path}: {len(unpaired)} images have no partner in the other folder: {shorten(unpaired)}")

    rows = []
    for name, file in images["w"].items():
        candidates = [
            path / f"{name}.txt",
            path / f"{name}.caption",
            file.with_suffix(".txt"),
            file.with_suffix(".caption"),
        ]
        caption_files = [candidate for candidate in candidates if candidate.is_file()]
        if not caption_files:
            raise FileNotFoundError(f"{path}: {name} has no caption; write it to {candidates[0]}")
        row = {"caption": read_text(caption_files[0]).strip()}
        row["chosen"] = str(file.resolve())
        row["rejected"] = str(images["l"][name].resolve())
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 or, with a byte order mark, in UTF-16."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: isn't UTF-8 ({error}); save it as UTF-8") from error


def shorten(names: list[str], limit: int = 5) -> str:
    """Join the first names of a list for a message."""
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text}, ..."


def find_caption_column(column_names: list[str]) -> str:
    for name in ("caption", "prompt", "text"):
        if name in column_names:
            return name
    raise ValueError(
        f"--caption_column: none of the columns {', '.join(column_names)} is named caption, prompt or text"
    )


def find_known_columns(column_names: list[str]) -> tuple | None:
    """Return the columns of the published data set that these belong to, as in DATASET_COLUMNS."""
    for columns in DATASET_COLUMNS:
        if all(column is None or column in column_names for column in columns):
            return columns
    return None


def read_preferences(dataset: datasets.Dataset, label_0: str | None, label_1: str | None) -> np.ndarray:
    """Return for each row 1 if image 0 is preferred, 0 if image 1 is, 0.5 for a tie and NaN without a label."""
    if label_0 is None:
        return np.ones(len(dataset))
    preferences = np.array([parse_label(value, label_0) for value in dataset[label_0]])
    if label_1 is not None:
        other = np.array([parse_label(value, label_1) for value in dataset[label_1]])
        preferences = (np.sign(preferences - other) + 1) / 2
    elif np.any((preferences < 0) | (preferences > 1)):
        raise ValueError(
            f"--label_0_column {label_0}: has values outside 0 to 1, so it can't be a preference; if it has votes or "
            "scores, name those of the second image with --label_1_column"
        )
    if "has_label" in dataset.column_names:
        preferences[[not value for value in dataset["has_label"]]] = math.nan
    return preferences


def parse_label(value, column: str) -> float:
    """Parse a label, which webdataset and CSV store as text. None and empty text become NaN."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"column {column}: {str(value)[:100]!r} isn't a label; expected a number") from error


def read_stream(
    rows: datasets.IterableDataset, columns: tuple, folder: Path, max_pairs: int, stream_file: Path
) -> datasets.Dataset:
    """Read pairs from a stream until there are `max_pairs`, and store them with their images' bytes in a file."""
    caption, image_0, image_1, label_0, label_1 = columns
    binary = datasets.Value("binary")
    features = datasets.Features({"caption": datasets.Value("string"), "image_w": binary, "image_l": binary})
    progress_bar = tqdm(total=max_pairs, desc="Reading the stream")
    with datasets.arrow_writer.ArrowWriter(path=str(stream_file), features=features) as writer:
        for row in rows:
            table = datasets.Dataset.from_list([{k: v for k, v in row.items() if k not in (image_0, image_1)}])
            preference = read_preferences(table, label_0, label_1)[0]
            if preference == 0.5 or math.isnan(preference):
                continue
            images = [row[image_0], row[image_1]]
            if preference < 0.5:
                images.reverse()
            writer.write(
                {
                    "caption": row[caption],
                    "image_w": read_image_bytes(images[0], folder),
                    "image_l": read_image_bytes(images[1], folder),
                }
            )
            progress_bar.update(1)
            if progress_bar.n == max_pairs:
                break
        writer.finalize()
    progress_bar.close()
    return datasets.Dataset.from_file(str(stream_file))


def resolve_image_path(row: dict, column: str, folder: Path, root: str | None) -> dict:
    """Make an image's path absolute. A path inside --image_root must not lead out of it."""
    path = Path(os.path.normpath(folder.absolute() / row[column]))
    if root is not None and not path.is_relative_to(Path(root).absolute()):
        raise ValueError(f"{row[column][:100]}: is a path outside --image_root {root}")
    return {column: str(path)}


def read_image_bytes(value: bytes | str | dict, folder: Path = Path()) -> bytes:
    """Return an image's file. `value` is the file itself, its path, or `datasets`' dictionary of both."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"expected an image's bytes or path, not {str(value)[:100]!r}")
    return (folder / value).read_bytes()


def load_image(file: bytes | str | Path | dict) -> Image.Image:
    """Load an image as people see it: upright, in sRGB, and on white where it is transparent.

    `file` is the image's bytes, its path, or `datasets`' dictionary of both. Returns an RGB image.
    """
    if isinstance(file, dict):
        file = file["bytes"] if file["bytes"] is not None else file["path"]
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    icc_profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("has 32 bits per channel, so its white level is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    opacity = image.getchannel("A") if image.mode == "RGBA" else None

    if icc_profile:
        source = image.convert("RGB") if opacity else image
        try:
            image = ImageCms.profileToProfile(
                source, io.BytesIO(icc_profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except ImageCms.PyCMSError:
            logger.warning("An image has a color profile that can't be read. Its colors are taken as sRGB.")
    image = image.convert("RGB")
    if opacity:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), opacity)
    return image


def resize_and_crop(
    image: Image.Image, height: int, width: int, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Resize an image so that it covers height x width, crop what sticks out, and mirror it if `flip`.

    `crop` is the position of the crop, from top left (0, 0) to bottom right (1, 1).

    Returns:
        The pixels in [-1, 1], shape (3, height, width), and SDXL's micro-conditioning: original size, top left corner of
        the crop, target size.
    """
    scale = max(height / image.height, width / image.width)
    resized_height = max(height, round(image.height * scale))
    resized_width = max(width, round(image.width * scale))
    top = int((resized_height - height) * crop[0])
    left = int((resized_width - width) * crop[1])
    # Only the part inside the crop is resized. Resizing a thin panorama as a whole would take gigabytes.
    x_scale = image.width / resized_width
    y_scale = image.height / resized_height
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # rounding may go past the edge
    cropped = image.resize((width, height), Image.Resampling.LANCZOS, box)
    if flip:
        cropped = ImageOps.mirror(cropped)
        left = resized_width - width - left
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1) / 127.5 - 1
    return pixels, [image.height, image.width, top, left, height, width]


# ---- Encoding -------------------------------------------------------------------------------------------------------
def hash_pairs(pairs: datasets.Dataset, accelerator: Accelerator) -> list[list[str]]:
    """Hash each pair by its content: three hashes for each, of the caption, the winner and the loser.

    The processes share the work.
    """

    def hash_image(value: bytes | str | dict) -> str:
        try:
            return hashlib.sha256(read_image_bytes(value)).hexdigest()
        except (OSError, ValueError):
            return "missing"  # encode_pairs says what is wrong with it

    starts = range(0, len(pairs), PAIRS_PER_CACHE_FILE)
    own_starts = starts[accelerator.process_index :: accelerator.num_processes]
    hashed = []
    with ThreadPoolExecutor() as pool:
        for start in tqdm(own_starts, desc="Hashing", leave=False, disable=not accelerator.is_main_process):
            rows = pairs[start : start + PAIRS_PER_CACHE_FILE]
            hashes_w = pool.map(hash_image, rows["image_w"])
            hashes_l = pool.map(hash_image, rows["image_l"])
            for i, (caption, hash_w, hash_l) in enumerate(zip(rows["caption"], hashes_w, hashes_l)):
                hashed.append((start + i, [hashlib.sha256(caption.encode()).hexdigest(), hash_w, hash_l]))
    return [hashes for _, hashes in sorted(gather_object(hashed))]


def encode_prompts(
    pipeline: StableDiffusionXLPipeline, prompts: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompt embeddings, shape (B, 77, 2048) for SDXL, and pooled ones, (B, 1280).

    Those of an empty prompt are zeros if the pipeline uses zeros for it when it generates images.
    """
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=False
    )
    if pipeline.config.force_zeros_for_empty_prompt:
        is_empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
        prompt_embeds = prompt_embeds.masked_fill(is_empty[:, None, None], 0)
        pooled_prompt_embeds = pooled_prompt_embeds.masked_fill(is_empty[:, None], 0)
    return prompt_embeds, pooled_prompt_embeds


def encode_image(pixels: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Encode one image, shape (3, H, W) in [-1, 1], to the latents that the UNet sees, shape (C, H / 8, W / 8).

    Images are encoded alone: results depend a little on what else is in a batch, and one takes 2.7 GB at 1024 pixels.
    """
    latents = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
    if vae.config.shift_factor is not None:
        latents = latents - vae.config.shift_factor
    latents = latents * vae.config.scaling_factor
    if not latents.isfinite().all():
        raise ValueError("the VAE returns values that aren't finite; try another --pretrained_vae_model_name_or_path")
    return latents


@torch.no_grad()
def encode_pairs(
    pairs: datasets.Dataset,
    pair_hashes: list[list[str]],
    pipeline: StableDiffusionXLPipeline,
    buckets: list[tuple[int, int]],
    random_crop: bool,
    random_flip: bool,
    seed: int,
    cache_dir: Path,
    models_hash: str,
    accelerator: Accelerator,
) -> datasets.Dataset:
    """Encode pairs with the VAE and the text encoders, which are on their device already, or read them from the cache.

    A cache file holds a few hundred pairs. Its name is a hash of everything that it depends on: captions and images,
    weights, configs and vocabularies of the models, and the settings. Each process encodes its share of the files.

    Returns:
        A row for each pair, with `latents_w`, `latents_l`, `prompt_embeds` and `pooled_prompt_embeds` (fp16, flattened),
        `time_ids`, the index of its `bucket`, and `crop_w` and `crop_l`, the fractions of the images that are cropped
        away. A pair that can't be read has the bucket -1 and an `error`.
    """
    half_list = datasets.List(datasets.Value("float16"))
    features = datasets.Features(
        {
            "latents_w": half_list,
            "latents_l": half_list,
            "prompt_embeds": half_list,
            "pooled_prompt_embeds": half_list,
            "time_ids": datasets.List(datasets.Value("int32")),
            "bucket": datasets.Value("int32"),
            "crop_w": datasets.Value("float32"),
            "crop_l": datasets.Value("float32"),
            "error": datasets.Value("string"),
        }
    )
    pool = ThreadPoolExecutor()
    progress_bar = tqdm(total=len(pairs), desc="Encoding pairs", disable=not accelerator.is_main_process)

    def try_to_load_image(value: bytes | str | dict) -> Image.Image | str:
        """Return the image, or what is wrong with it: decoders raise all kinds of errors."""
        try:
            return load_image(value)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def encode_rows(rows: dict, hashes: list[list[str]]) -> dict:
        images_w = list(pool.map(try_to_load_image, rows["image_w"]))
        images_l = list(pool.map(try_to_load_image, rows["image_l"]))
        encoded = {name: [] for name in features}
        for image_w, image_l, row_hashes in zip(images_w, images_l, hashes):
            nothing = np.empty(0, dtype=np.float16)
            row = {"latents_w": nothing, "latents_l": nothing, "time_ids": [], "bucket": -1, "crop_w": 0, "crop_l": 0}
            errors = [image for image in (image_w, image_l) if isinstance(image, str)]
            row["error"] = errors[0] if errors else ""
            if not errors:
                # The winner's shape decides. Its conditioning is the pair's, so that only the images differ.
                random = np.random.default_rng([seed, int(row_hashes[1][:8], 16), int(row_hashes[2][:8], 16)])
                crop = tuple(random.random(2)) if random_crop else (0.5, 0.5)
                flip = random_flip and random.random() < 0.5
                row["bucket"] = find_nearest_bucket(image_w.height, image_w.width, buckets)
                height, width = buckets[row["bucket"]]
                pixels_w, row["time_ids"] = resize_and_crop(image_w, height, width, crop, flip)
                pixels_l, _ = resize_and_crop(image_l, height, width, crop, flip)
                row["latents_w"] = encode_image(pixels_w, pipeline.vae).flatten().half().cpu().numpy()
                row["latents_l"] = encode_image(pixels_l, pipeline.vae).flatten().half().cpu().numpy()
                row["crop_w"] = fraction_cropped(image_w, height, width)
                row["crop_l"] = fraction_cropped(image_l, height, width)
            for name, value in row.items():
                encoded[name].append(value)
        prompt_embeds, pooled_prompt_embeds = encode_prompts(pipeline, rows["caption"], pipeline.vae.device)
        encoded["prompt_embeds"] = list(prompt_embeds.flatten(1).half().cpu().numpy())
        encoded["pooled_prompt_embeds"] = list(pooled_prompt_embeds.half().cpu().numpy())
        progress_bar.update(len(images_w) * accelerator.num_processes)
        return encoded

    settings = [
        ENCODING_VERSION,
        models_hash,
        pipeline.config.force_zeros_for_empty_prompt,
        buckets,
        random_crop,
        random_flip,
    ]
    if random_crop or random_flip:
        settings.append(seed)
    starts = range(0, len(pairs), PAIRS_PER_CACHE_FILE)
    files = []
    for start in starts:
        content = json.dumps([settings, pair_hashes[start : start + PAIRS_PER_CACHE_FILE]])
        files.append(cache_dir / f"{hashlib.sha256(content.encode()).hexdigest()}.arrow")
    datasets.disable_progress_bars()
    for i in range(accelerator.process_index, len(files), accelerator.num_processes):
        chunk = pairs.select(range(starts[i], min(starts[i] + PAIRS_PER_CACHE_FILE, len(pairs))))
        if is_complete_cache_file(files[i], len(chunk)):
            progress_bar.update(len(chunk) * accelerator.num_processes)
            continue
        chunk.map(
            lambda rows, indices: encode_rows(rows, [pair_hashes[starts[i] + index] for index in indices]),
            with_indices=True,
            batched=True,
            batch_size=16,
            features=features,
            remove_columns=chunk.column_names,
            cache_file_name=str(files[i]),  # `map` writes to another name and renames the file when it is complete
            new_fingerprint=files[i].stem,
        )
    datasets.enable_progress_bars()
    progress_bar.close()
    pool.shutdown()
    accelerator.wait_for_everyone()
    encoded = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])

    unreadable = np.flatnonzero(np.array(encoded["bucket"]) < 0)
    for index in unreadable[:5].tolist():
        logger.warning(
            f"The pair with the caption {pairs[index]['caption'][:100]!r} is left out: {encoded[index]['error']}"
        )
    if len(unreadable) > 0:
        message = f"{len(unreadable)} of {len(pairs)} pairs have an image that can't be read"
        if len(unreadable) > 0.01 * len(pairs):
            raise ValueError(
                f"{message}, which is more than 1 %; the first one: {encoded[int(unreadable[0])]['error']}"
            )
        logger.warning(f"{message}; they are left out.")
    return encoded


def is_complete_cache_file(file: Path, num_rows: int) -> bool:
    """Say whether a cache file can be read. One that is damaged is deleted, so that it is encoded again."""
    if not file.exists():
        return False
    try:
        if len(datasets.Dataset.from_file(str(file))) == num_rows:
            return True
    except Exception as error:  # pyarrow raises errors of several kinds
        logger.warning(f"{file}: is damaged ({error}) and will be encoded again.")
    file.unlink()
    return False


def fraction_cropped(image: Image.Image, height: int, width: int) -> float:
    """Return the fraction of an image that is lost when it is cropped to the shape height x width."""
    scale = max(height / image.height, width / image.width)
    return 1 - (height * width) / (image.height * image.width * scale**2)


def draw_batches(
    first_epoch: np.ndarray, buckets: np.ndarray, batch_size: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield batches without end. Each is a list of (position in the run, index of the pair), all of one bucket.

    Pairs are drawn in the order of `first_epoch`, then in a new order for each epoch. Each joins the pairs of its bucket
    that wait, and a batch is yielded when it is full, so that every pair is drawn once before any is drawn again. Which
    batches there are doesn't depend on the number of processes. Pairs with a bucket below 0 are left out.
    """
    waiting = {bucket: [] for bucket in np.unique(buckets).tolist()}
    position = 0
    for epoch in itertools.count():
        order = first_epoch
        if epoch > 0:
            order = np.random.default_rng((seed, 3, epoch)).permutation(len(buckets))
        for index in order.tolist():
            bucket = int(buckets[index])
            if bucket < 0:
                continue
            waiting[bucket].append((position, index))
            position += 1
            if len(waiting[bucket]) == batch_size:
                yield waiting[bucket]
                waiting[bucket] = []


def hash_drawn_pairs(batches: Iterable[list[tuple[int, int]]], pair_hashes: list[list[str]]) -> str:
    """Hash the content of the pairs in some batches, so that a resumed run can tell whether it draws the same."""
    digest = hashlib.sha256()
    for batch in batches:
        for _, index in batch:
            digest.update("".join(pair_hashes[index]).encode())
    return digest.hexdigest()


class EncodedPairs(torch.utils.data.Dataset):
    """Encoded pairs as tensors, by (position in the run, index of the pair).

    Args:
        encoded: what `encode_pairs` returns.
        vae_scale_factor, latent_channels: of the VAE.
        empty_prompt: the embeddings of "", each with a batch dimension of 1.
        proportion_empty_prompts: fraction of the positions whose caption is left out. The seed decides which.
    """

    def __init__(
        self,
        encoded: datasets.Dataset,
        vae_scale_factor: int,
        latent_channels: int,
        empty_prompt: tuple[torch.Tensor, torch.Tensor],
        proportion_empty_prompts: float,
        seed: int,
    ) -> None:
        names = ["latents_w", "latents_l", "prompt_embeds", "pooled_prompt_embeds", "time_ids"]
        self.encoded = encoded.select_columns(names).with_format("torch")
        self.vae_scale_factor = vae_scale_factor
        self.latent_channels = latent_channels
        self.prompt_embeds = empty_prompt[0][0].half().cpu()
        self.pooled_prompt_embeds = empty_prompt[1][0].half().cpu()
        self.proportion_empty_prompts = proportion_empty_prompts
        self.seed = seed

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, torch.Tensor]:
        position, index = draw
        row = self.encoded[index]
        height, width = row["time_ids"][4:].tolist()
        shape = (self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        row["latents_w"] = row["latents_w"].reshape(shape)
        row["latents_l"] = row["latents_l"].reshape(shape)
        row["prompt_embeds"] = row["prompt_embeds"].reshape(self.prompt_embeds.shape)
        if np.random.default_rng((self.seed, 2, position)).random() < self.proportion_empty_prompts:
            row["prompt_embeds"] = self.prompt_embeds
            row["pooled_prompt_embeds"] = self.pooled_prompt_embeds
        row["position"] = position
        return row


# ---- Training -------------------------------------------------------------------------------------------------------
def sample_noise(
    positions: list[int],
    shape: tuple[int, int, int],
    num_train_timesteps: int,
    noise_offset: float,
    seed: int,
    stream: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noise, shape (B, *shape), and timesteps, (B,).

    Those of a pair depend on the seed and on its position in the run alone, so they don't change with the number of
    processes, and a resumed run repeats them. Training is stream 0, held-out pairs are stream 1.
    """
    generator = torch.Generator()  # on the CPU, so that the numbers don't depend on the device
    noise = torch.empty((len(positions), *shape))
    timesteps = torch.empty(len(positions), dtype=torch.long)
    for i, position in enumerate(positions):
        # On a CPU, torch uses only 32 bits of a seed, so the numbers must be mixed and not just added.
        generator.manual_seed(int(np.random.SeedSequence((seed, stream, position)).generate_state(1)[0]))
        noise[i] = torch.randn(shape, generator=generator)
        timesteps[i] = torch.randint(num_train_timesteps, (), generator=generator)
        if noise_offset > 0:
            noise[i] += noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    return noise.to(device), timesteps.to(device)


def compute_loss(
    unet: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    noise_scheduler: DDPMScheduler,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    beta: float,
    snr_value: float = 0.5,
    safeguard: float | None = None,
) -> MaPOLoss:
    """Compute the MaPO loss of B pairs in one UNet pass over winners and losers.

    Args:
        batch: `latents_w` and `latents_l`, shape (B, C, h, w), `prompt_embeds`, (B, 77, 2048), `pooled_prompt_embeds`,
            (B, 1280), and `time_ids`, (B, 6).
        noise, timesteps: shapes (B, C, h, w) and (B,). Winner and loser of a pair share them.
    """
    # Winners first, then losers. They share everything but the image.
    latents = torch.cat([batch["latents_w"], batch["latents_l"]]).to(noise.device, torch.float32)
    noise = noise.repeat(2, 1, 1, 1)
    timesteps = timesteps.repeat(2)
    prompt_embeds = batch["prompt_embeds"].to(noise.device, torch.float32).repeat(2, 1, 1)
    added_cond_kwargs = {
        "text_embeds": batch["pooled_prompt_embeds"].to(noise.device, torch.float32).repeat(2, 1),
        "time_ids": batch["time_ids"].to(noise.device, torch.float32).repeat(2, 1),
    }

    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    return mapo_loss(model_pred, target, beta, snr_value, num_train_timesteps, safeguard)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other shapes than in training aren't worth compiling for
def measure_held_out_pairs(
    unet: torch.nn.Module,
    held_out: EncodedPairs,
    buckets: np.ndarray,
    noise_scheduler: DDPMScheduler,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return mean errors, margin and accuracy on the held-out pairs. Their noise is the same at every call."""
    batches = []
    for bucket in np.unique(buckets[buckets >= 0]):
        indices = np.flatnonzero(buckets == bucket).tolist()
        for start in range(0, len(indices), args.train_batch_size):
            batches.append(indices[start : start + args.train_batch_size])
    unet.eval()
    measured = []
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = torch.utils.data.default_collate([held_out[(index, index)] for index in indices])
        noise, timesteps = sample_noise(
            indices,
            batch["latents_w"].shape[1:],
            noise_scheduler.config.num_train_timesteps,
            args.noise_offset,
            args.seed,
            1,
            accelerator.device,
        )
        with accelerator.autocast():
            result = compute_loss(
                unet, batch, noise_scheduler, noise, timesteps, args.beta_mapo, args.snr_value, args.safeguard
            )
        values = torch.stack([result.mse_w, result.mse_l, result.margin, result.accuracy], dim=1)
        measured.extend(zip(indices, values.tolist()))
    unet.train()
    measured = [values for _, values in sorted(gather_object(measured))]
    means = np.mean(measured, axis=0).tolist()
    return dict(zip(["val_mse_w", "val_mse_l", "val_margin", "val_accuracy"], means))


# ---- Checkpoints ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def averaged_weights(ema: EMAModel | None, parameters: list[torch.nn.Parameter]):
    """Give the parameters their averages, if there are any, for the length of a `with` block."""
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema is not None:
        ema.restore(parameters)


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path, overwrite_output_dir: bool) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run.

    Raises:
        ValueError: the run would overwrite or mix with what is in the output folder.
        FileNotFoundError: there is no such checkpoint.
    """
    checkpoints = list_checkpoints(output_dir)
    results = [
        name for name in ("model_index.json", "pytorch_lora_weights.safetensors") if (output_dir / name).exists()
    ]
    if resume_from_checkpoint is None:
        if checkpoints:
            raise ValueError(
                f"--output_dir {output_dir}: has {checkpoints[-1].name} of an earlier run. Resume it with "
                "--resume_from_checkpoint latest, name another folder, or delete its checkpoints."
            )
        if results and not overwrite_output_dir:
            raise ValueError(
                f"--output_dir {output_dir}: has {results[0]} of a finished run. Name another folder, or pass "
                "--overwrite_output_dir to replace it."
            )
        return None

    if resume_from_checkpoint == "latest":
        if checkpoints:
            return checkpoints[-1]
        if results:
            raise ValueError(
                f"--resume_from_checkpoint latest: {output_dir} has {results[0]} of a finished run, but no checkpoint. "
                "Name another --output_dir to train again."
            )
        logger.info(f"No checkpoint in {output_dir}: training starts from the beginning.")
        return None

    checkpoint = Path(resume_from_checkpoint)
    if not checkpoint.is_dir():
        checkpoint = output_dir / resume_from_checkpoint
    if not (checkpoint / "state.json").is_file():
        names = [path.name for path in checkpoints]
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from_checkpoint}: isn't a complete checkpoint. {output_dir} has "
            f"{', '.join(names) or 'none'}."
        )
    in_the_way = [path.name for path in checkpoints]
    if not overwrite_output_dir:
        in_the_way = in_the_way + results
    if checkpoint.resolve().parent == output_dir.resolve():
        step = read_state(checkpoint)["global_step"]
        in_the_way = [path.name for path in checkpoints if step_of(path) > step]
    if in_the_way:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from_checkpoint}: the resumed run would replace what {output_dir} has: "
            f"{', '.join(in_the_way)}. Name another --output_dir, or delete or move what is there."
        )
    return checkpoint


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List complete checkpoints, oldest first. Others have names that begin with `tmp-`."""
    checkpoints = []
    for file in output_dir.glob("checkpoint-*/state.json"):
        if re.fullmatch(r"checkpoint-\d+", file.parent.name):
            checkpoints.append(file.parent)
    return sorted(checkpoints, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_state(checkpoint: Path) -> dict:
    """Read what a checkpoint says about its run."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except ValueError as error:
        raise damaged_checkpoint(checkpoint, error) from error


def damaged_checkpoint(checkpoint: Path, error: Exception) -> ValueError:
    """Return the error for a checkpoint that can't be read. It names the one to go back to."""
    others = [path.name for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    return ValueError(
        f"{checkpoint}: can't be read ({type(error).__name__}: {error}). Delete it to resume from "
        f"{others[-1] if others else 'the beginning'}."
    )


def check_run(run: dict, checkpoint: Path, state: dict) -> None:
    """Raise a ValueError if the checkpoint's run isn't the one that the arguments describe."""
    for name, value in run.items():
        saved = state["run"].get(name)
        if saved != value:
            raise ValueError(
                f"{name} is {value}, but {checkpoint} was trained with {saved}. Use the same, or start a new run in "
                "another --output_dir."
            )


def load_checkpoint(checkpoint: Path, accelerator: Accelerator) -> None:
    random_states = checkpoint / f"random_states_{accelerator.process_index}.pkl"
    try:
        accelerator.load_state(str(checkpoint), map_location="cpu")  # else the optimizer is on the device twice
        if random_states.exists() and accelerator.step == 0:  # accelerate ignores it
            raise ValueError(f"{random_states.name} is damaged")
    except Exception as error:  # torch and safetensors raise errors of many kinds for damaged files
        raise damaged_checkpoint(checkpoint, error) from error
    accelerator.step = 0  # of forward passes; the checkpoint is from the end of an optimizer step


def save_checkpoint(state: dict, output_dir: Path, total_limit: int, accelerator: Accelerator) -> Path:
    """Save weights, optimizer, schedule and random states under another name, then rename the folder.

    Of the run's older checkpoints, only the newest stay, `total_limit` in all. Those of other runs are left alone.
    """
    checkpoint = output_dir / f"checkpoint-{state['global_step']}"
    temporary = output_dir / f"tmp-{checkpoint.name}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(json.dumps(state))
        move_into_place(temporary, checkpoint)
        own = []
        for path in list_checkpoints(output_dir):
            saved = read_state(path)
            if saved["run_id"] == state["run_id"] and saved["global_step"] == step_of(path):
                own.append(path)
        for path in own[:-total_limit]:
            shutil.rmtree(path.rename(output_dir / f"tmp-{path.name}"))  # a kill must not leave half of a checkpoint
    accelerator.wait_for_everyone()
    return checkpoint


def move_into_place(source: Path, target: Path) -> None:
    """Rename a finished file or folder, replacing what is there, so that a kill never leaves half of it.

    Its files get the permissions that the umask asks for; safetensors makes them readable by their owner only.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [source, *source.rglob("*")]:
        if path.is_file():
            path.chmod(0o666 & ~umask)
    if target.is_dir():
        (target / "state.json").unlink(missing_ok=True)  # what is left of a checkpoint must not look complete
        shutil.rmtree(target)
    os.replace(source, target)


# ---- Images and results ---------------------------------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other shapes than in training aren't worth compiling for
def generate_images(
    pipeline: StableDiffusionXLPipeline,
    unet: torch.nn.Module,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """Generate an image for each prompt but the last, which is the empty one. Prompt i starts from seed i.

    The processes share the work. The VAE is on the device only here, and decodes in tiles, to save memory.
    """
    scheduler_config = dict(pipeline.scheduler.config)
    guidance_rescale = 0.0
    if scheduler_config.get("rescale_betas_zero_snr"):
        scheduler_config["timestep_spacing"] = "trailing"
        guidance_rescale = 0.7  # arXiv 2305.08891: without it, images of such models are overexposed
    generator_pipeline = StableDiffusionXLPipeline(
        vae=pipeline.vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=type(pipeline.scheduler).from_config(scheduler_config),
        add_watermarker=False,
    )
    generator_pipeline.set_progress_bar_config(disable=True)
    vae = pipeline.vae.to(accelerator.device)
    vae.enable_slicing()
    vae.tile_sample_min_size = 512
    vae.tile_latent_min_size = 64
    vae.enable_tiling()
    unet.eval()

    num_images = len(prompt_embeds) - 1
    own = list(range(accelerator.process_index, num_images, accelerator.num_processes))
    images = []
    progress_bar = tqdm(total=num_images, desc="Images", leave=False, disable=not accelerator.is_main_process)
    for start in range(0, len(own), args.train_batch_size):
        indices = own[start : start + args.train_batch_size]
        empty = [num_images] * len(indices)
        with accelerator.autocast():
            latents = generator_pipeline(
                prompt_embeds=prompt_embeds[indices].to(accelerator.device),
                pooled_prompt_embeds=pooled_prompt_embeds[indices].to(accelerator.device),
                negative_prompt_embeds=prompt_embeds[empty].to(accelerator.device),
                negative_pooled_prompt_embeds=pooled_prompt_embeds[empty].to(accelerator.device),
                height=args.resolution,
                width=args.resolution,
                guidance_scale=args.guidance_scale,
                guidance_rescale=guidance_rescale,
                num_inference_steps=args.num_inference_steps,
                generator=[torch.Generator("cpu").manual_seed(index) for index in indices],
                output_type="latent",
            ).images
        latents = latents.float() / vae.config.scaling_factor
        if vae.config.shift_factor is not None:
            latents = latents + vae.config.shift_factor
        decoded = generator_pipeline.image_processor.postprocess(vae.decode(latents).sample)
        images.extend(zip(indices, decoded))
        progress_bar.update(len(indices) * accelerator.num_processes)
    progress_bar.close()
    vae.disable_tiling()  # it would change what the VAE encodes
    vae.to("cpu")
    unet.train()
    return [image for _, image in sorted(gather_object(images), key=lambda item: item[0])]


def draw_image_rows(rows: list[tuple[str, list[str], list[Image.Image]]], columns: int = 8) -> Image.Image:
    """Draw images in labeled rows. Each row is (label, captions, images); captions stand above the images.

    Rows that are longer than `columns` continue in a second block below.
    """
    from matplotlib.figure import Figure

    columns = min(columns, max(len(images) for _, _, images in rows))
    side = max(1.4, min(2.5, max(image.width for _, _, images in rows for image in images) / 100))  # in inches
    caption_height = 0.45
    gap = 0.1
    strips = []  # (label, captions, images) of at most `columns` images each
    for start in range(0, max(len(images) for _, _, images in rows), columns):
        for label, captions, images in rows:
            if images[start : start + columns]:
                strips.append((label, captions[start : start + columns], images[start : start + columns]))
    width = 0.3 + columns * (side + gap)
    height = gap
    for _, captions, _ in strips:
        height += side + gap + (caption_height if captions else 0)

    figure = Figure(figsize=(width, height), dpi=100)
    top = height - gap
    for label, captions, images in strips:
        top -= side + (caption_height if captions else 0)
        for column, image in enumerate(images):
            left = 0.3 + column * (side + gap)
            axis = figure.add_axes((left / width, top / height, side / width, side / height))
            axis.imshow(image, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(label, fontsize=9)
            if captions:
                lines = textwrap.wrap(keep_drawable(captions[column]), int(16 * side), max_lines=2, placeholder=" ...")
                axis.set_title("\n".join(lines), fontsize=8, pad=4)
        top -= gap
    return figure_to_image(figure)


def keep_drawable(text: str) -> str:
    """Leave out the characters that matplotlib's font doesn't have, such as emoji, and its markup."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    drawable = [character for character in text if font.get_char_index(ord(character)) != 0]
    return "".join(drawable).replace("$", r"\$")


def figure_to_image(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def plot_curves(history: list[dict], names: list[str], path: Path) -> None:
    """Plot the metrics of a run, each with that of the held-out pairs where there is one."""
    from matplotlib.figure import Figure

    names = [name for name in names if any(record.get(name) is not None for record in history)]
    columns = math.ceil(len(names) / 2)
    figure = Figure(figsize=(4.5 * columns, 6), layout="constrained")
    labels = {}
    for axis, name in zip(figure.subplots(2, columns, squeeze=False).flat, names):
        axis.set(title=name, xlabel="step")
        axis.locator_params("x", integer=True)
        for key, label, color in ((name, "training", "tab:blue"), (f"val_{name}", "held-out pairs", "tab:orange")):
            points = [(record["step"], record[key]) for record in history if record.get(key) is not None]
            if not points:
                continue
            steps, values = np.array(points).T
            window = max(1, len(steps) // 20)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            labels[label] = axis.plot(steps[window - 1 :], smooth, color=color)[0]
    figure.legend(labels.values(), labels.keys(), loc="outside upper right", ncols=2, frameon=False)
    figure_to_image(figure).save(path)


def save_lora(
    pipeline: StableDiffusionXLPipeline, modules: dict[str, torch.nn.Module], output_dir: Path, kohya_format: bool
) -> None:
    """Save the LoRA of some of the pipeline's models, for `load_lora_weights` and, if asked, for ComfyUI and A1111."""
    layers = {}
    metadata = {}
    kohya = {}
    for name, module in modules.items():
        # transformers 5 has dropped `text_model.` from the first encoder's names, but other loaders expect it.
        prefix = "text_model." if name == "text_encoder" and not hasattr(module, "text_model") else ""
        state_dict = get_peft_model_state_dict(module)
        layers[f"{name}_lora_layers"] = {f"{prefix}{key}": value.contiguous() for key, value in state_dict.items()}
        metadata[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
        if kohya_format:
            kohya.update(lora_to_kohya(module, state_dict, f"{name}.{prefix}"))
    temporary = output_dir / "tmp-lora.safetensors"
    pipeline.save_lora_weights(output_dir, weight_name=temporary.name, **layers, **metadata)
    move_into_place(temporary, output_dir / "pytorch_lora_weights.safetensors")
    if kohya_format:
        save_file(kohya, temporary)
        move_into_place(temporary, output_dir / "pytorch_lora_weights_kohya.safetensors")


def lora_to_kohya(
    module: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """Convert a model's LoRA to kohya's names. diffusers' conversion writes the rank where the alpha belongs."""
    kohya = convert_state_dict_to_kohya({f"{prefix}{key}": value for key, value in state_dict.items()})
    for key, value in state_dict.items():
        if key.endswith(".lora_A.weight"):
            scaling = module.get_submodule(key.removesuffix(".lora_A.weight")).scaling["default"]
            kohya_key = next(iter(convert_state_dict_to_kohya({f"{prefix}{key}": value})))
            kohya[kohya_key.split(".")[0] + ".alpha"] = torch.tensor(scaling * len(value))
    return {key: value.contiguous() for key, value in kohya.items()}


def save_pipeline(pipeline: StableDiffusionXLPipeline, output_dir: Path) -> None:
    """Save a pipeline under another name, then move its parts into place."""
    temporary = output_dir / "tmp-pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    for part in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):  # the index last
        move_into_place(part, output_dir / part.name)
    temporary.rmdir()


def save_model_card(
    output_dir: Path, base_model: str, description: str, prompt: str, settings: dict, tags: list[str]
) -> None:
    """Write README.md: the description, how the model was trained, and diffusers' own fields and tags."""
    table = "\n".join(f"| {name} | `{value}` |" for name, value in settings.items())
    is_local = Path(base_model).exists()
    # Not by load_or_create_model_card, which would ask the hub for a repository with the folder's name.
    card = ModelCard.from_template(
        card_data=ModelCardData(
            base_model=None if is_local else base_model,  # the hub refuses a local path
            license="openrail++" if base_model.startswith("stabilityai/stable-diffusion-xl") else None,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            widget=[{"text": prompt, "output": {"url": "before_after.png"}}],
        ),
        template_path=MODEL_CARD_TEMPLATE_PATH,
        model_description=f"{description}\n## Settings\n\n| setting | value |\n|---|---|\n{table}\n",
    )
    populate_model_card(card, tags=tags).save(output_dir / "README.md")


def save_weights(pipeline: StableDiffusionXLPipeline, unet: torch.nn.Module, args: argparse.Namespace) -> None:
    """Save the LoRA, or the pipeline with the trained UNet."""
    output_dir = Path(args.output_dir)
    if args.use_lora:
        modules = {"unet": unet}
        for name in ("text_encoder", "text_encoder_2"):  # --lora_weights may have layers for them, too
            if getattr(getattr(pipeline, name), "peft_config", None):
                modules[name] = getattr(pipeline, name)
        save_lora(pipeline, modules, output_dir, args.output_kohya_format)
    else:
        pipeline.register_modules(unet=unet)
        pipeline.to(dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.save_dtype])
        save_pipeline(pipeline, output_dir)
        pipeline.to(dtype=torch.float32)  # SDXL's VAE gives NaN in fp16
        pipeline.unet = None


def write_card(prompt: str, pairs_per_step: int, mixed_precision: str, args: argparse.Namespace) -> None:
    """Write the model card: what the model is, how to load it and how it was trained."""
    base = args.pretrained_model_name_or_path
    result = args.hub_model_id or Path(args.output_dir).name
    load_base = "from_single_file" if Path(base).is_file() else "from_pretrained"
    shown_base = Path(base).name if Path(base).exists() else base  # a path on this machine is nobody else's
    if args.use_lora:
        load = f"pipeline = StableDiffusionXLPipeline.{load_base}({shown_base!r}, dtype=torch.float16)\n"
        load += f"pipeline.load_lora_weights({result!r})"
    else:
        load = f"pipeline = StableDiffusionXLPipeline.from_pretrained({result!r}, dtype=torch.float16)"
    shown_prompt = prompt.replace("`", "'")
    images = "" if args.skip_final_inference else "![images before and after training](before_after.png)\n"
    description = f"""
# {Path(result).name}

{"A LoRA for SDXL" if args.use_lora else "SDXL"}, trained on preference pairs with
[MaPO](https://huggingface.co/papers/2406.06424), which needs no reference model.

{images}![metrics](curves.png)

```python
import torch
from diffusers import StableDiffusionXLPipeline

{load}
pipeline.to("cuda")
image = pipeline({shown_prompt!r}, height={args.resolution}, width={args.resolution}).images[0]
```
"""
    settings = {
        "beta_mapo": args.beta_mapo,
        "snr_value": args.snr_value,
        "safeguard": args.safeguard,
        "resolution": args.resolution,
        "learning_rate": args.learning_rate,
        "lr_scheduler": args.lr_scheduler,
        "optimizer": "8-bit adamw" if args.use_8bit_adam else args.optimizer,
        "mixed_precision": mixed_precision,
        "pairs in a step": pairs_per_step,
        "steps": args.max_train_steps,
        "seed": args.seed,
    }
    tags = ["stable-diffusion-xl", "text-to-image", "diffusers", "diffusers-training", "mapo"]
    if args.use_lora:
        tags.append("lora")
    save_model_card(Path(args.output_dir), base, description, prompt, settings, tags)


# ---- Main -----------------------------------------------------------------------------------------------------------
def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Create the accelerator, and set up logging, threads and the seed."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # one process may encode for longer than another
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else DDP copies the gradients
            AutocastKwargs(cache_enabled=False),  # else half-precision copies of all weights stay in memory
        ],
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which the line above turns off, but downloads should show

    launched_processes = int(os.environ.get("WORLD_SIZE", 1))
    if launched_processes != accelerator.num_processes:
        raise ValueError(
            f"{launched_processes} processes were launched, but this one sees {accelerator.num_processes}, so each "
            "would train alone. On CPUs, set ACCELERATE_USE_CPU=true."
        )
    if accelerator.device.type == "cpu":
        # The launcher leaves one thread to each process. Once a pair is won, its gradients are subnormal numbers,
        # which are ten times slower.
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, num_cores // accelerator.num_processes))
        torch.set_flush_denormal(True)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("FSDP isn't supported; use configs/ddp.yaml")
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    set_seed(args.seed)
    return accelerator


def make_optimizer(parameter_groups: list, args: argparse.Namespace) -> torch.optim.Optimizer:
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
    }
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameter_groups, **options, use_bias_correction=True, safeguard_warmup=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameter_groups, **options)
    return torch.optim.AdamW(parameter_groups, **options, fused=True)


class StopSignal:
    """Notice SIGTERM and Ctrl-C, so that a checkpoint can be written first. A second signal ends the run at once.

    `accelerate launch` dies of SIGTERM without passing it on, so the end of the launcher counts as a signal, too.
    `torchrun` passes on what the terminal or Slurm has sent to all processes already, so signals that come together
    count as one.
    """

    def __init__(self, parent: int) -> None:
        self.name = None
        self.received_at = None
        self.parent = parent
        self.is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number: int, frame) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            self.received_at = time.monotonic()
        elif time.monotonic() - self.received_at > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def came(self) -> bool:
        if self.is_launched and os.getppid() != self.parent:
            self.name = self.name or "The launcher ended"
        return self.name is not None


def ignore_signals(worker_id: int) -> None:
    """Let a worker of the data loader live until the main process ends it, so that a checkpoint can be written first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def warn_if_errors_rise(history: list[dict], pairs_per_step: int) -> bool:
    """Warn once if the winners' error rises, on held-out pairs or in training. Returns whether it did.

    In training, the error also depends on the timesteps that were drawn, so only a large rise counts: the mean of the last
    10 steps against that of the first 8 pairs.
    """
    held_out = [record["val_mse_w"] for record in history if "val_mse_w" in record]
    training = [record["mse_w"] for record in history if record.get("mse_w") is not None]
    first = np.mean(training[: math.ceil(8 / pairs_per_step)])
    last = np.mean(training[-10:])
    if len(held_out) > 1 and held_out[-1] > 1.05 * held_out[0]:
        message = f"The error on held-out chosen images rose from {held_out[0]:.4g} to {held_out[-1]:.4g}"
    elif len(training) > 10 and last > 4 * first:
        message = f"The error on chosen images rose from {first:.4g} to {last:.4g}, the mean of 10 steps"
    else:
        return False
    logger.warning(
        f"Step {history[-1]['step']}: {message}. The model is getting worse at what it should prefer, and its images may be damaged. "
        "Try a lower --learning_rate, a larger --beta_mapo, or --safeguard 0.8."
    )
    return True


def write_metrics(record: dict, history: list[dict], path: Path, accelerator: Accelerator) -> None:
    """Append a record to the history and to metrics.jsonl, and send it to the tracker."""
    record = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
    history.append(record)
    if accelerator.is_main_process:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    values = {name: value for name, value in record.items() if value is not None and name != "step"}
    accelerator.log(values, step=record["step"])


def log_image(image: Image.Image, step: int, accelerator: Accelerator) -> None:
    """Send an image to the tracker, if it takes images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"before_after": np.array(image)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"before_after": [image]}, step)


def warn_of_long_captions(captions: list[str], tokenizer: transformers.CLIPTokenizer) -> None:
    limit = tokenizer.model_max_length
    long = [caption for caption in captions if len(tokenizer(caption).input_ids) > limit]
    if long:
        logger.warning(
            f"{len(long)} of {len(captions)} captions have more than {limit - 2} tokens and are cut off there. "
            f"The first one: {long[0][:100]!r}"
        )


def load_run_pairs(
    args: argparse.Namespace, num_needed: int | None, stream_folder: Path, process_index: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Load the pairs to train on and, if any are held out, the held-out ones.

    `num_needed` is how many the run can draw, held-out pairs apart. It decides how much of a stream is read.
    """
    options = {
        "config_name": args.dataset_config_name,
        "image_root": args.image_root,
        "caption_column": args.caption_column,
        "chosen_column": args.chosen_column,
        "rejected_column": args.rejected_column,
        "image_0_column": args.image_0_column,
        "image_1_column": args.image_1_column,
        "label_0_column": args.label_0_column,
        "label_1_column": args.label_1_column,
        "streaming": args.streaming,
        "stream_file": stream_folder / f"stream-{process_index}.arrow",
        "seed": args.seed,
        "cache_dir": args.cache_dir,
    }
    max_pairs = args.max_train_samples
    if args.streaming and max_pairs is None:
        max_pairs = num_needed + args.num_validation_pairs
    pairs = load_pairs(args.dataset_name, args.dataset_split_name, max_pairs=max_pairs, **options)
    if args.num_validation_pairs == 0:
        return pairs, None

    if args.validation_split_name is not None:
        options["stream_file"] = stream_folder / f"held-out-stream-{process_index}.arrow"
        max_pairs = args.num_validation_pairs if args.streaming else None
        held_out_pairs = load_pairs(args.dataset_name, args.validation_split_name, max_pairs=max_pairs, **options)
        order = np.random.default_rng((args.seed, 4)).permutation(len(held_out_pairs))
        return pairs, held_out_pairs.select(order[: args.num_validation_pairs])

    if len(pairs) <= args.num_validation_pairs:
        raise ValueError(f"--num_validation_pairs {args.num_validation_pairs}: there are only {len(pairs)} pairs")
    order = np.random.default_rng((args.seed, 4)).permutation(len(pairs))
    if args.streaming:
        order = np.arange(len(pairs))
    held_out_pairs = pairs.select(order[: args.num_validation_pairs])
    return pairs.select(np.sort(order[args.num_validation_pairs :])), held_out_pairs


def log_shapes(encoded: datasets.Dataset, buckets: list[tuple[int, int]]) -> None:
    """Log how many pairs each bucket has, and how much of the images is cropped away."""
    bucket_of_pair = np.array(encoded["bucket"])
    for bucket, (height, width) in enumerate(buckets):
        if len(buckets) > 1 and np.any(bucket_of_pair == bucket):
            logger.info(f"Bucket {height} x {width}: {np.sum(bucket_of_pair == bucket)} pairs")
    cropped_w = np.mean(np.array(encoded["crop_w"])[bucket_of_pair >= 0])
    cropped_l = np.mean(np.array(encoded["crop_l"])[bucket_of_pair >= 0])
    logger.info(f"Cropping removes {cropped_w:.1%} of the chosen images and {cropped_l:.1%} of the rejected ones.")


def warn_of_shared_images(pair_hashes: list[list[str]], held_out_hashes: list[list[str]]) -> None:
    """Warn if images of held-out pairs are trained on."""
    trained_images = set()
    for _, hash_w, hash_l in pair_hashes:
        trained_images.update([hash_w, hash_l])
    shared = 0
    for _, hash_w, hash_l in held_out_hashes:
        shared += hash_w in trained_images or hash_l in trained_images
    if shared > 0:
        logger.warning(f"{shared} of {len(held_out_hashes)} held-out pairs share an image with a training pair.")


def configure_deepspeed(
    unet: torch.nn.Module, weight_dtype: torch.dtype, args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Give DeepSpeed the script's settings.

    The weights stay in fp32 and the computation is autocast, as without DeepSpeed: a bf16 weight would lose an update of
    1e-7.
    """
    if weight_dtype == torch.float16:
        raise ValueError("--mixed_precision fp16: there is no loss scaling with DeepSpeed; use bf16")
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if config["zero_optimization"]["stage"] > 2:
        raise ValueError("DeepSpeed: ZeRO-3 isn't supported; use configs/zero2.yaml")
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    config["gradient_clipping"] = args.max_grad_norm
    config["bf16"]["enabled"] = False
    config["fp16"]["enabled"] = False
    if weight_dtype != torch.float32:
        unet.forward = torch.autocast(accelerator.device.type, weight_dtype, cache_enabled=False)(unet.forward)


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    parent = os.getppid()
    if args.is_demo and os.environ.get("RANK", "0") == "0":
        print(
            "No model and no data set are named, so this trains the tiny model in demo/, with the settings in "
            f"demo/train_pairs.json (--safeguard {args.safeguard} isn't part of the paper; --no_safeguard turns it off).",
            flush=True,
        )
    accelerator = make_accelerator(args)
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps  # a config of accelerate may differ
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir, args.overwrite_output_dir)
    state = {"global_step": 0, "run_id": uuid.uuid4().hex, "history": []}
    if checkpoint is not None:
        state = read_state(checkpoint)
    if accelerator.is_main_process:
        for path in output_dir.glob("tmp-checkpoint-*"):  # of a run that was killed
            shutil.rmtree(path)
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = args.hub_model_id or output_dir.resolve().name
        repo_id = create_repo(repo_id, exist_ok=True, token=args.hub_token).repo_id

    # Data. Which pairs will the run draw?
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    buckets = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets is not None:
        buckets = parse_buckets_string(args.aspect_ratio_buckets)
    elif args.use_aspect_ratio_buckets:
        buckets = generate_aspect_ratio_buckets(args.resolution, divisibility=64 if args.resolution >= 512 else 8)
    num_drawn = None
    if args.max_train_steps is not None:
        # When the run ends, some pairs of each bucket may still wait for a full batch.
        num_drawn = args.max_train_steps * pairs_per_step + (len(buckets) - 1) * (args.train_batch_size - 1)
    pairs, held_out_pairs = load_run_pairs(args, num_drawn, output_dir, accelerator.process_index)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(pairs) / pairs_per_step)
    if state["global_step"] > args.max_train_steps:
        raise ValueError(f"--max_train_steps {args.max_train_steps}: {checkpoint} is from step {state['global_step']}")
    if args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(
            f"--lr_warmup_steps {args.lr_warmup_steps}: the learning rate won't reach {args.learning_rate:g} in "
            f"{args.max_train_steps} steps."
        )
    first_epoch = np.random.default_rng((args.seed, 3, 0)).permutation(len(pairs))
    if args.streaming:
        first_epoch = np.arange(len(pairs))  # shuffled already, and in the same order if the run is extended
    if num_drawn is not None and num_drawn < len(pairs):
        pairs = pairs.select(first_epoch[:num_drawn])
        first_epoch = np.arange(num_drawn)

    # Models. Only the UNet or its LoRA is trained; the rest is needed to encode pairs and to generate images.
    weight_dtype = torch.float32
    if accelerator.mixed_precision == "fp16":
        weight_dtype = torch.float16
    elif accelerator.mixed_precision == "bf16":
        weight_dtype = torch.bfloat16
    pipeline = load_pipeline(
        args.pretrained_model_name_or_path,
        dtype=weight_dtype if args.use_lora else torch.float32,  # weights that are trained need fp32
        vae=args.pretrained_vae_model_name_or_path,
        single_file_config=args.single_file_config,
        prediction_type=args.prediction_type,
        rescale_betas_zero_snr=args.rescale_betas_zero_snr,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
    )
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    base_model_hash = hash_pipeline(pipeline) if args.use_lora else None
    if args.lora_weights is not None:
        load_lora(pipeline, args.lora_weights)
    elif args.use_lora:
        add_lora(
            pipeline.unet,
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=args.lora_layers.split(","),
            ),
        )
    else:
        pipeline.unet.requires_grad_(True)
    unet = pipeline.unet
    pipeline.unet = None
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()

    # A resumed run must be the run that the checkpoint belongs to.
    encoders = [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    run = {f"--{name}": value for name, value in vars(args).items() if name not in SETTINGS_THAT_MAY_CHANGE}
    run["--mixed_precision"] = accelerator.mixed_precision
    run["pairs in a step"] = pairs_per_step
    run["the hash of VAE and text encoders"] = hash_components(*encoders, pipeline.tokenizer, pipeline.tokenizer_2)
    run["the hash of the base model"] = base_model_hash
    run["the kind of checkpoint"] = "deepspeed" if accelerator.distributed_type == DistributedType.DEEPSPEED else "ddp"
    if len(buckets) > 1:
        run["--train_batch_size"] = args.train_batch_size  # decides which pairs are in a batch
    if checkpoint is not None:
        check_run(run, checkpoint, state)
    state["run"] = run

    # Encode the pairs and the prompts for validation, once. Then the VAE and the text encoders leave the device.
    if args.validation_prompts is None:
        captions = sorted({caption for caption in (held_out_pairs or pairs)["caption"] if caption != ""})
        prompts = np.random.default_rng(args.seed).permutation(captions or [""])[:8].tolist()
    else:
        prompts = args.validation_prompts
    prompts = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
    warn_of_long_captions(pairs["caption"], pipeline.tokenizer)
    pair_hashes = hash_pairs(pairs, accelerator)
    encode_options = {
        "pipeline": pipeline,
        "buckets": buckets,
        "random_crop": args.random_crop,
        "random_flip": args.random_flip,
        "seed": args.seed,
        "cache_dir": cached_assets_path("mapo", "encoded-pairs", assets_dir=args.cache_dir),
        "models_hash": run["the hash of VAE and text encoders"],
        "accelerator": accelerator,
    }
    with offload_models(*encoders, device=accelerator.device), torch.no_grad():
        encoded = encode_pairs(pairs, pair_hashes, **encode_options)
        if held_out_pairs is not None:
            held_out_hashes = hash_pairs(held_out_pairs, accelerator)
            encoded_held_out = encode_pairs(held_out_pairs, held_out_hashes, **encode_options)
        embeddings = [encode_prompts(pipeline, [prompt], accelerator.device) for prompt in [*prompts, ""]]
    prompt_embeds = torch.cat([embeds for embeds, _ in embeddings]).cpu()
    pooled_prompt_embeds = torch.cat([pooled for _, pooled in embeddings]).cpu()
    for stream_file in output_dir.glob(f"*stream-{accelerator.process_index}.arrow"):
        stream_file.unlink()

    log_shapes(encoded, buckets)
    if held_out_pairs is not None:
        warn_of_shared_images(pair_hashes, held_out_hashes)

    latent_options = {
        "vae_scale_factor": pipeline.vae_scale_factor,
        "latent_channels": pipeline.vae.config.latent_channels,
        "empty_prompt": embeddings[-1],
        "seed": args.seed,
    }
    bucket_of_pair = np.array(encoded["bucket"])
    train_dataset = EncodedPairs(encoded, proportion_empty_prompts=args.proportion_empty_prompts, **latent_options)
    held_out = None
    if held_out_pairs is not None:
        held_out = EncodedPairs(encoded_held_out, proportion_empty_prompts=0.0, **latent_options)
        held_out_buckets = np.array(encoded_held_out["bucket"])

    batches_per_step = args.gradient_accumulation_steps * accelerator.num_processes
    draw = functools.partial(draw_batches, first_epoch, bucket_of_pair, args.train_batch_size, args.seed)
    if checkpoint is not None and state["drawn_pairs"] != hash_drawn_pairs(
        itertools.islice(draw(), state["global_step"] * batches_per_step), pair_hashes
    ):
        raise ValueError(
            f"--dataset_name {args.dataset_name}: its pairs aren't those that {checkpoint} was trained on"
        )

    # Optimizer
    unet.to(accelerator.device)
    unet.train()
    if args.compile:
        unet.compile_repeated_blocks(fullgraph=True, dynamic=True if len(buckets) > 1 else None)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if args.scale_lr:
        args.learning_rate = args.learning_rate * pairs_per_step
    optimizer = make_optimizer(parameters, args)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(unet, weight_dtype, args, accelerator)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    unwrapped_unet = accelerator.unwrap_model(unet)

    # Images of the model before it is trained.
    images_before = []
    if args.validation_prompts is not None or not args.skip_final_inference:
        logger.info(f"Generating {len(prompts)} images before training.")
        images_before = generate_images(
            pipeline, unwrapped_unet, prompt_embeds, pooled_prompt_embeds, args, accelerator
        )

    # Checkpoints also hold the learning rate schedule and the averaged weights.
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared, or it would step once per process
    ema_unet = None
    if args.use_ema:
        ema_unet = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        accelerator.register_for_checkpointing(ema_unet)
    if args.use_lora and accelerator.distributed_type != DistributedType.DEEPSPEED:
        # Checkpoints hold the LoRA instead of the whole UNet.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        accelerator.register_for_checkpointing(torch.nn.ParameterList(parameters))
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator)
        if ema_unet is not None:
            ema_unet.to(accelerator.device)  # accelerate has loaded it to the CPU
        logger.info(f"Resumed from {checkpoint}.")

    # Training
    global_step = state["global_step"]
    history = state["history"]
    metrics_file = output_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        metrics_file.write_text("".join(json.dumps(record) + "\n" for record in history))
    accelerator.init_trackers("mapo", config={k: str(v) for k, v in vars(args).items() if k != "hub_token"})
    batches = itertools.islice(
        draw(),
        global_step * batches_per_step + accelerator.process_index,
        args.max_train_steps * batches_per_step,
        accelerator.num_processes,
    )
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_sampler=batches,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else it takes from the random numbers that --lora_dropout uses
    )

    def log_held_out_metrics() -> None:
        if held_out is None:
            return
        with averaged_weights(ema_unet, parameters):
            measured = measure_held_out_pairs(
                unwrapped_unet, held_out, held_out_buckets, noise_scheduler, args, accelerator
            )
        write_metrics({"step": global_step, **measured}, history, metrics_file, accelerator)

    if global_step == 0:
        log_held_out_metrics()
    logger.info(f"Training starts after {time.perf_counter() - started:.0f} s.")
    progress_bar = tqdm(
        total=args.max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_main_process
    )
    stop_signal = StopSignal(parent)
    stopped = False
    warned = False
    step_metrics = []
    step_started = time.perf_counter()
    for batch in train_dataloader:
        with accelerator.accumulate(unet):
            noise, timesteps = sample_noise(
                batch["position"].tolist(),
                batch["latents_w"].shape[1:],
                noise_scheduler.config.num_train_timesteps,
                args.noise_offset,
                args.seed,
                0,
                accelerator.device,
            )
            result = compute_loss(
                unet, batch, noise_scheduler, noise, timesteps, args.beta_mapo, args.snr_value, args.safeguard
            )
            accelerator.backward(result.loss)
            step_metrics.append(torch.stack([value.detach().float().mean() for value in result]))
            is_finite = True
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                grad_norm = torch.as_tensor(grad_norm, device=accelerator.device).float()
                is_finite = bool(grad_norm.isfinite())
            if is_finite or accelerator.scaler is not None:  # fp16's scaler skips such a step by itself
                optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        global_step += 1
        lr_scheduler.step()
        if ema_unet is not None and is_finite:
            ema_unet.step(parameters)
        if not is_finite:
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise ValueError(
                    f"Step {global_step} isn't finite, and DeepSpeed has applied it. Resume from a checkpoint."
                )
            logger.warning(f"Step {global_step} is skipped: its gradient isn't finite.")

        # Log means over the step's batches and all processes.
        means = dict(zip(MaPOLoss._fields, torch.stack(step_metrics).mean(dim=0)))
        means["grad_norm"] = grad_norm
        means["stop"] = torch.tensor(float(stop_signal.came()), device=accelerator.device)
        values = accelerator.reduce(torch.stack(list(means.values())), reduction="mean").tolist()
        record = {"step": global_step, **dict(zip(means, values))}
        stopped = record.pop("stop") > 0
        record["learning_rate"] = lr_scheduler.get_last_lr()[0]
        record["pairs_per_second"] = pairs_per_step / (time.perf_counter() - step_started)
        if accelerator.device.type == "cuda":
            record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        write_metrics(record, history, metrics_file, accelerator)
        shown = {name: f"{record[name]:.3g}" for name in ("loss", "mse_w", "margin", "accuracy", "margin_weight")}
        progress_bar.update(1)
        progress_bar.set_postfix(shown)
        step_metrics = []

        is_validation_step = global_step % args.validation_steps == 0 or global_step == args.max_train_steps
        if is_validation_step:
            log_held_out_metrics()
        if not warned:
            warned = warn_if_errors_rise(history, pairs_per_step)
        if global_step % args.checkpointing_steps == 0 or stopped:
            state["global_step"] = global_step
            drawn = itertools.islice(draw(), global_step * batches_per_step)
            state["drawn_pairs"] = hash_drawn_pairs(drawn, pair_hashes)
            saved = save_checkpoint(state, output_dir, args.checkpoints_total_limit, accelerator)
        if stopped:
            progress_bar.close()
            logger.info(
                f"{stop_signal.name or 'Stopped'}: {saved} is written. Resume with --resume_from_checkpoint latest."
            )
            break
        if is_validation_step and args.validation_prompts is not None and global_step < args.max_train_steps:
            with averaged_weights(ema_unet, parameters):
                images = generate_images(
                    pipeline, unwrapped_unet, prompt_embeds, pooled_prompt_embeds, args, accelerator
                )
            if accelerator.is_main_process:
                (output_dir / "validation").mkdir(exist_ok=True)
                grid = draw_image_rows([("before", prompts, images_before), (f"step {global_step}", [], images)])
                grid.save(output_dir / "validation" / f"{global_step}.png")
                log_image(grid, global_step, accelerator)
        step_started = time.perf_counter()
    progress_bar.close()

    # Results
    if not stopped:
        if ema_unet is not None:
            ema_unet.copy_to(parameters)
        if accelerator.is_main_process:
            save_weights(pipeline, unwrapped_unet, args)
        accelerator.wait_for_everyone()
        images_after = []
        if not args.skip_final_inference:
            logger.info(f"Generating {len(prompts)} images after training.")
            images_after = generate_images(
                pipeline, unwrapped_unet, prompt_embeds, pooled_prompt_embeds, args, accelerator
            )
        if accelerator.is_main_process:
            if images_after:
                grid = draw_image_rows([("before", prompts, images_before), ("after", [], images_after)])
                grid.save(output_dir / "before_after.png")
                log_image(grid, global_step, accelerator)
            names = ["loss", "margin", "accuracy", "margin_weight", "mse_w", "mse_l"]
            plot_curves(history, names, output_dir / "curves.png")
            write_card(prompts[0], pairs_per_step, accelerator.mixed_precision, args)
            if args.push_to_hub:
                upload_folder(
                    repo_id=repo_id, folder_path=output_dir, allow_patterns=RESULT_FILES, token=args.hub_token
                )
            print(f"Done in {time.perf_counter() - started:.0f} s. The result is in {output_dir}.")
            if args.is_demo:
                print(f"What has changed? python demo/report.py {output_dir}")
    accelerator.wait_for_everyone()
    del unet, optimizer  # DDP must be freed before its process group, or it can wait for it forever
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
