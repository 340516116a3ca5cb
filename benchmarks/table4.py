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
Measure what a training step of MaPO and of Diffusion-DPO costs on one GPU, as Table 4 of the paper does.

    python benchmarks/table4.py              # SDXL at 1024 px with random weights, on a GPU
    python benchmarks/table4.py --dry_run    # the shapes of the demo's model, on the CPU, to see that everything runs
    python benchmarks/table4.py --count      # only the work of SDXL's steps, which needs no GPU

Each measurement is one JSON line in `--output`, and a second call measures only what is missing there. The table is
printed as Markdown. It has, per way of training: pairs per second, peak memory, the largest batch that fits, the
floating-point operations (FLOP) of a pair, and which share of the device's matmul peak they make.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import bitsandbytes
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params


BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS.parent))
from train_diffusion_mapo_sdxl import compute_loss  # noqa: E402


WORK = BENCHMARKS / "results" / "flop.json"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
LONGEST_MEASUREMENT_S = 120
ENCODED_AT_ONCE = 8  # images, as in diffusers' train_diffusion_dpo_sdxl.py
DPO_BETA = 5000  # of the Diffusion-DPO paper; no figure here depends on it


@dataclass(frozen=True)
class Settings:
    """One row of the table.

    Args:
        method: "MaPO" or "Diffusion-DPO".
        weights: "full" for all weights of the UNet, or "LoRA" of rank 32 on its attention layers.
        optimizer: "AdamW" or "8-bit AdamW".
        encoding: "beforehand", or "in every step" for images and captions.
    """

    method: str
    weights: str = "full"
    optimizer: str = "8-bit AdamW"
    checkpointing: bool = True
    encoding: str = "beforehand"
    compiled: bool = False

    def describe_work(self) -> str:
        """Return what decides how much work a step is."""
        checkpointing = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{self.method}, {self.weights}, {checkpointing}, encoded {self.encoding}"


# The most valuable first: the script as it is run, and both methods as the paper compares them.
ROWS = [
    Settings("MaPO"),
    Settings("Diffusion-DPO", encoding="in every step"),
    Settings("MaPO", encoding="in every step"),
    Settings("Diffusion-DPO"),
    Settings("MaPO", "LoRA"),
    Settings("Diffusion-DPO", "LoRA"),
    Settings("MaPO", checkpointing=False),
    Settings("MaPO", checkpointing=False, compiled=True),
    Settings("Diffusion-DPO", checkpointing=False),
    Settings("MaPO", optimizer="AdamW"),
    Settings("MaPO", "LoRA", checkpointing=False),
    Settings("Diffusion-DPO", "LoRA", encoding="in every step"),
]


# ---- Methods --------------------------------------------------------------------------------------------------------
def mapo_loss(unet, batch: dict, noise_scheduler, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return compute_loss(unet, batch, noise_scheduler, noise, timesteps, beta=8.0, snr_value=0.5, safeguard=None).loss


def dpo_loss(
    unet, reference, batch: dict, noise_scheduler, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Compute the loss of Diffusion-DPO (arXiv 2311.12908, eq. 14) as diffusers' train_diffusion_dpo_sdxl.py does:

        loss = -logsigmoid(-beta / 2 * ((mse_w - mse_l) - (mse_ref_w - mse_ref_l)))

    Args:
        reference: a frozen copy of the UNet. None: the UNet with its LoRA disabled.
    """
    latents = torch.cat([batch["latents_w"], batch["latents_l"]])  # (2B, C, h, w)
    noise = noise.repeat(2, 1, 1, 1)
    timesteps = timesteps.repeat(2)
    inputs = {
        "sample": noise_scheduler.add_noise(latents, noise, timesteps),
        "timestep": timesteps,
        "encoder_hidden_states": batch["prompt_embeds"].repeat(2, 1, 1),
        "added_cond_kwargs": {
            "text_embeds": batch["pooled_prompt_embeds"].repeat(2, 1),
            "time_ids": batch["time_ids"].repeat(2, 1),
        },
    }
    mse_w, mse_l = mse_per_sample(unet(**inputs).sample, noise).chunk(2)
    with torch.no_grad():
        if reference is None:
            unet.disable_adapters()
            reference_pred = unet(**inputs).sample
            unet.enable_adapters()
        else:
            reference_pred = reference(**inputs).sample
    reference_w, reference_l = mse_per_sample(reference_pred, noise).chunk(2)
    difference = (mse_w - mse_l) - (reference_w - reference_l)
    return -F.logsigmoid(-DPO_BETA / 2 * difference).mean()


def mse_per_sample(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])


# ---- Training -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    """Where the configs of a model are, and its training data. Its weights are random, which costs the same."""

    folder: Path
    resolution: int
    pairs: int  # in a batch

    def load_config(self, name: str) -> dict:
        return json.loads((self.folder / name / "config.json").read_text())


SDXL = Model(BENCHMARKS / "sdxl", resolution=1024, pairs=4)
DEMO = Model(BENCHMARKS.parent / "demo" / "sdxl-tiny-emoji", resolution=64, pairs=4)


class Training:
    """Train on random latents and embeddings, or on random pixels and tokens if these are encoded in every step."""

    def __init__(self, settings: Settings, model: Model, device: torch.device) -> None:
        self.settings = settings
        self.model = model
        self.device = device
        self.half_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.noise_scheduler = DDPMScheduler.from_pretrained(model.folder, subfolder="scheduler")

        self.unet = self.make_unet()
        if settings.weights == "LoRA":
            self.unet.to(dtype=self.half_dtype).requires_grad_(False)
            self.unet.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
            cast_training_params(self.unet, dtype=torch.float32)
        if settings.checkpointing:
            self.unet.enable_gradient_checkpointing()
        if settings.compiled:
            self.unet.compile_repeated_blocks(fullgraph=True)
        self.unet.train()
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        if settings.optimizer == "8-bit AdamW":
            self.optimizer = bitsandbytes.optim.AdamW8bit(self.parameters, lr=1e-7)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-7, fused=device.type == "cuda")

        self.reference = None
        if settings.method == "Diffusion-DPO" and settings.weights == "full":
            self.reference = self.make_unet().to(dtype=self.half_dtype).requires_grad_(False)
        text_config = CLIPTextConfig.from_pretrained(model.folder / "text_encoder")
        text_config_2 = CLIPTextConfig.from_pretrained(model.folder / "text_encoder_2")
        self.embedding_size = text_config.hidden_size + text_config_2.hidden_size
        self.pooled_size = text_config_2.projection_dim
        self.num_tokens = text_config.max_position_embeddings
        if settings.encoding == "in every step":
            with device:
                self.vae = AutoencoderKL.from_config(model.load_config("vae")).requires_grad_(False)
                self.text_encoder = CLIPTextModel(text_config).requires_grad_(False)
                self.text_encoder_2 = CLIPTextModelWithProjection(text_config_2).requires_grad_(False)
            self.text_encoder.to(self.half_dtype)
            self.text_encoder_2.to(self.half_dtype)

    def make_unet(self) -> UNet2DConditionModel:
        with self.device:
            return UNet2DConditionModel.from_config(self.model.load_config("unet"))

    def make_batch(self, pairs: int) -> dict[str, torch.Tensor]:
        vae_config = self.model.load_config("vae")
        side = self.model.resolution // 2 ** (len(vae_config["block_out_channels"]) - 1)
        shape = (pairs, vae_config["latent_channels"], side, side)
        return {
            "latents_w": torch.randn(shape, device=self.device),
            "latents_l": torch.randn(shape, device=self.device),
            "prompt_embeds": torch.randn(pairs, self.num_tokens, self.embedding_size, device=self.device),
            "pooled_prompt_embeds": torch.randn(pairs, self.pooled_size, device=self.device),
            "time_ids": torch.full((pairs, 6), float(self.model.resolution), device=self.device),
        }

    @torch.no_grad()
    def encode(self, pairs: int) -> dict[str, torch.Tensor]:
        """Encode random images with the VAE in fp32, and random tokens, as a data loader would deliver them."""
        side = self.model.resolution
        pixels = torch.randn(2 * pairs, 3, side, side, device=self.device)
        tokens = torch.zeros(pairs, self.num_tokens, dtype=torch.long, device=self.device)
        latents = [self.vae.encode(part).latent_dist.mode() for part in pixels.split(ENCODED_AT_ONCE)]
        latents_w, latents_l = (torch.cat(latents) * self.vae.config.scaling_factor).chunk(2)
        output = self.text_encoder(tokens, output_hidden_states=True)
        output_2 = self.text_encoder_2(tokens, output_hidden_states=True)
        prompt_embeds = torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], dim=-1)
        return {
            "latents_w": latents_w,
            "latents_l": latents_l,
            "prompt_embeds": prompt_embeds.float(),
            "pooled_prompt_embeds": output_2.text_embeds.float(),
        }

    def compute_gradients(self, pairs: int) -> torch.Tensor:
        batch = self.make_batch(pairs)
        if self.settings.encoding == "in every step":
            batch.update(self.encode(pairs))
        noise = torch.randn_like(batch["latents_w"])
        timesteps = torch.randint(1000, (pairs,), device=self.device)
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            if self.settings.method == "MaPO":
                loss = mapo_loss(self.unet, batch, self.noise_scheduler, noise, timesteps)
            else:
                loss = dpo_loss(self.unet, self.reference, batch, self.noise_scheduler, noise, timesteps)
        loss.backward()
        return loss.detach()

    def step(self, pairs: int) -> torch.Tensor:
        loss = self.compute_gradients(pairs)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


# ---- Measurements ---------------------------------------------------------------------------------------------------
def count_flop(settings: Settings, model: Model) -> int:
    """Count the FLOP of one pair, without the optimizer's, on the meta device. One multiply-add is two FLOP."""
    training = Training(settings, model, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training.compute_gradients(1)
    return counter.get_total_flops()


def count_floor(model: Model) -> int:
    """Count the FLOP that a pair needs at least: a forward and a backward pass of the UNet over two images."""
    training = Training(Settings("MaPO", checkpointing=False), model, torch.device("meta"))
    batch = training.make_batch(2)
    conditions = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sample = training.unet(batch["latents_w"], 1, batch["prompt_embeds"], added_cond_kwargs=conditions).sample
        sample.sum().backward()
    return counter.get_total_flops()


def count_work(model: Model) -> dict[str, int]:
    work = {"floor": count_floor(model)}
    for settings in ROWS:
        if settings.describe_work() not in work:
            work[settings.describe_work()] = count_flop(replace(settings, compiled=False), model)
    return work


def measure_matmul_peak(device: torch.device) -> float:
    """Measure the FLOP per second of a large product of random matrices: in bf16 on a GPU, in fp32 on the CPU."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def measure(settings: Settings, model: Model, device: torch.device, seconds: float) -> dict[str, float | None]:
    """Time steps for so many seconds, and find the peak memory and the largest batch if the device is a GPU."""
    training = Training(settings, model, device)
    for _ in range(3):  # the optimizer makes its states, the compiler its kernels
        training.step(model.pairs)
    synchronize(device)
    step_seconds = []
    while sum(step_seconds) < seconds:
        began = time.perf_counter()
        training.step(model.pairs)
        synchronize(device)
        step_seconds.append(time.perf_counter() - began)
    figures = {"pairs_per_second": model.pairs / statistics.median(step_seconds)}
    if device.type == "cuda":
        figures["peak_gb"] = measure_peak(training, model.pairs) / 1e9
        if not settings.compiled:  # each batch size would be compiled anew
            total_memory = torch.cuda.get_device_properties(device).total_memory
            figures["largest_batch"] = find_largest_batch(partial(measure_peak, training), model.pairs, total_memory)
    return figures


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_peak(training: Training, pairs: int) -> int | None:
    """Take a step and return the peak of its memory in bytes, or None if there isn't enough."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        training.step(pairs)
    except torch.OutOfMemoryError:
        training.optimizer.zero_grad()
        return None
    return torch.cuda.max_memory_allocated()


def find_largest_batch(peak_of: Callable[[int], int | None], pairs: int, total_memory: int) -> int:
    """Estimate the largest batch from the peaks of two small ones, and try smaller ones until one fits.

    Args:
        peak_of: returns the peak of a step with so many pairs, or None if they don't fit.
        pairs: a batch that fits.
    """
    peak = peak_of(pairs)
    bytes_per_pair = (peak - peak_of(pairs // 2)) / (pairs - pairs // 2)
    largest = pairs + int((total_memory - peak) / bytes_per_pair)
    while largest > pairs and peak_of(largest) is None:
        largest -= max(1, largest // 32)
    return max(largest, pairs)


# ---- Command --------------------------------------------------------------------------------------------------------
def make_table(lines: list[dict]) -> str:
    """Write the measurements of one device as Markdown."""
    setup = lines[0]["setup"]
    versions = ", ".join(f"{package} {number}" for package, number in setup["versions"].items())
    text = [
        f"{lines[0]['date']}, {setup['device']}; {versions}. {setup['resolution']} px, {setup['pairs']} pairs a step, "
        f"matmul peak {lines[0]['matmul_peak'] / 1e12:.3g} TFLOP/s, floor {lines[0]['floor'] / 1e9:.4g} GFLOP a pair.",
        "",
        "| method | weights | optimizer | checkpointing | encoding | pairs/s | peak GB | largest batch | FLOP / floor "
        "| share of the matmul peak |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        settings = line["setup"]["settings"]
        figures = line["figures"]
        cells = [
            settings["method"] + (", compiled" if settings["compiled"] else ""),
            settings["weights"],
            settings["optimizer"],
            "yes" if settings["checkpointing"] else "no",
            settings["encoding"],
        ]
        if figures is None:
            cells += ["out of memory", "", "", "", ""]
        else:
            share = figures["pairs_per_second"] * line["flop_per_pair"] / line["matmul_peak"]
            cells += [
                f"{figures['pairs_per_second']:.3g}",
                f"{figures['peak_gb']:.1f}" if "peak_gb" in figures else "",
                str(figures.get("largest_batch", "")),
                f"{line['flop_per_pair'] / line['floor']:.2f}",
                f"{share:.0%}",
            ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("table4.jsonl"), help="File of the measurements.")
    parser.add_argument("--budget_s", type=float, default=540, help="Start no measurement that may end later.")
    parser.add_argument("--seconds", type=float, default=4, help="Time to spend on the steps of one measurement.")
    parser.add_argument("--dry_run", action="store_true", help="Use the demo's model and the CPU.")
    parser.add_argument("--count", action="store_true", help="Count the FLOP of SDXL's steps, without a GPU.")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if args.count:
        work = count_work(SDXL)
        WORK.write_text(json.dumps(work, indent=1) + "\n")
        print("| step | TFLOP a pair | of the floor |\n|---|---:|---:|")
        for name, flop in work.items():
            print(f"| {name} | {flop / 1e12:.1f} | {flop / work['floor']:.2f} |")
        return
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry_run uses the demo's model and the CPU, --count needs none")

    started = time.time()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.dry_run else "cuda")
    device_name = f"CPU with {torch.get_num_threads()} threads" if args.dry_run else torch.cuda.get_device_name()
    model = DEMO if args.dry_run else SDXL
    matmul_peak = measure_matmul_peak(device)
    work = count_work(model) if args.dry_run else json.loads(WORK.read_text())
    lines = []
    if args.output.exists():
        lines = [json.loads(line) for line in args.output.read_text().splitlines()]

    wanted = []
    for settings in ROWS:
        setup = {
            "settings": asdict(settings),
            "device": device_name,
            "versions": {package: version(package) for package in PACKAGES},
            "resolution": model.resolution,
            "pairs": model.pairs,
        }
        wanted.append(setup)
        if any(line["setup"] == setup for line in lines):
            continue
        if time.time() - started + LONGEST_MEASUREMENT_S > args.budget_s:
            print("The time of --budget_s is used up. Call again to measure the remaining rows.")
            break
        try:
            figures = measure(settings, model, device, args.seconds)
        except torch.OutOfMemoryError:
            figures = None
        gc.collect()
        torch.cuda.empty_cache()
        lines.append(
            {
                "setup": setup,
                "date": str(datetime.date.today()),
                "figures": figures,
                "flop_per_pair": work[settings.describe_work()],
                "floor": work["floor"],
                "matmul_peak": matmul_peak,
            }
        )
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, args.output)
    measured = [line for line in lines if line["setup"] in wanted]
    if measured:
        print(make_table(measured))


if __name__ == "__main__":
    main()
