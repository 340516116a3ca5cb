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
What one way of training costs: one row of step_cost.py's table, measured in a process of its own.

A step here is the body of the training script's loop and calls the script's own functions: what is measured is what
users run. The two methods that the script doesn't have, Diffusion-DPO and SFT, take its `training_step` too; only the
call of the UNet and the loss are put in their place.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train_diffusion_mapo_sdxl as script  # noqa: E402
from mapo_loss import MaPOLoss  # noqa: E402


# Folders in diffusers' format. SDXL's has no weights and no tokenizer: cost doesn't depend on the former, and the
# demo's tokenizer fills SDXL's 77 places as well as its own does.
CASES = {
    "demo": {"folder": HERE.parent / "demo" / "sdxl-tiny-emoji", "resolution": 64, "batch": 16},
    "sdxl-512": {"folder": HERE / "sdxl", "resolution": 512, "batch": 4},
    "sdxl-1024": {"folder": HERE / "sdxl", "resolution": 1024, "batch": 4},
}
CAPTION = "a red fox in the snow"
DPO_BETA = 5000.0  # of the Diffusion-DPO paper for SDXL; the cost doesn't depend on it
BACKENDS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        flags: of train_diffusion_mapo_sdxl.py.
        encode_images, encode_captions: in every step, as the authors' script does.
        attention: backend of SDPA, a key of BACKENDS; None: torch chooses.
        keys_once: text keys and values are projected once per pair, not for winner and loser each.
        finite_check: ask in every step whether the gradient is finite, for which the host waits for the device.
        threads: of torch on a CPU; None: as the script sets them.
        largest_batch: look for it (on a GPU).
    """

    name: str
    case: str
    method: str = "mapo"
    flags: tuple[str, ...] = ()
    encode_images: bool = False
    encode_captions: bool = False
    channels_last: bool = False
    attention: str | None = None
    keys_once: bool = False
    finite_check: bool = True
    threads: int | None = None
    batch: int | None = None
    largest_batch: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Models and data
# ---------------------------------------------------------------------------------------------------------------------


def make_args(variant: Variant, device: str, output_dir: str):
    """The script's arguments, as if a user had given the variant's flags."""
    case = CASES[variant.case]
    flags = [f"--pretrained_model_name_or_path={case['folder']}", "--dataset_name=random"]
    flags += [f"--output_dir={output_dir}", f"--resolution={case['resolution']}", "--lr_scheduler=constant"]
    flags += [f"--train_batch_size={variant.batch or case['batch']}", "--max_train_steps=1000000"]
    precision = "bf16" if device == "cuda" else "no"
    return script.parse_args([*flags, f"--mixed_precision={precision}", *variant.flags])


@contextlib.contextmanager
def random_weights(folder: Path, device: torch.device):
    """Has `from_pretrained` build models with random weights on the device, where the folder holds configs only."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    if list(folder.glob("*/*.safetensors")) and device.type != "meta":
        yield
        return

    def unet(name, dtype=torch.float32, **options):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return UNet2DConditionModel.from_config(load_config(folder / "unet"))
        finally:
            torch.set_default_dtype(before)

    def pipeline(name, dtype=torch.float32, **options):
        parts = make_encoders(folder, device, dtype)
        vae = AutoencoderKL.from_config(load_config(folder / "vae"))
        return StableDiffusionXLPipeline(vae=vae.to(device), unet=None, **parts, add_watermarker=False)

    with (
        mock.patch.object(UNet2DConditionModel, "from_pretrained", unet),
        mock.patch.object(StableDiffusionXLPipeline, "from_pretrained", pipeline),
    ):
        yield


def load_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def make_encoders(folder: Path, device: torch.device, dtype: torch.dtype) -> dict:
    """SDXL's text encoders with random weights, and tokenizers that fill as many places."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffusers import EulerDiscreteScheduler

    parts = {"scheduler": EulerDiscreteScheduler()}
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = CLIPTextConfig.from_pretrained(folder / name)
        with torch.device(device):
            parts[name] = kind(config).to(dtype)
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[tokenizer] = CLIPTokenizer.from_pretrained(
            CASES["demo"]["folder"] / tokenizer, model_max_length=config.max_position_embeddings
        )
    return parts


class RandomPairs(script.EncodedPairs):
    """The script's data set over 64 pairs of random latents and embeddings, in files as its cache has them. What the
    variant encodes in every step, it yields as pixels and as the caption instead.

    Args:
        folder: where the files go.
    """

    def __init__(self, variant: Variant, args, folder: Path) -> None:
        sizes = load_sizes(CASES[variant.case]["folder"], args.resolution)
        draw, keys = np.random.default_rng(0), [f"{i:02}" for i in range(128)]
        time_ids = torch.tensor([[args.resolution, args.resolution, 0, 0, args.resolution, args.resolution]]).float()
        for key in keys:
            latents = torch.from_numpy(draw.standard_normal((1, *sizes["latents"]), dtype=np.float32)).half()
            entry = {"latents": latents, "time_ids": time_ids}
            script.save_aside(script.entry_path(folder, key), partial(save_file, entry))
        embeddings = {
            name: torch.from_numpy(draw.standard_normal(sizes[name], dtype=np.float32)).half()
            for name in ("prompt_embeds", "pooled_prompt_embeds")
        }
        script.save_aside(script.entry_path(folder, script.hash_of(CAPTION)), partial(save_file, embeddings))
        pairs = [script.Pair(*two, CAPTION) for two in zip(keys[::2], keys[1::2])]
        super().__init__(pairs, folder, folder, seed=args.seed, flip=0, drop=0)
        self.variant, self.resolution, self.file = variant, args.resolution, make_jpeg(args.resolution)

    def __getitem__(self, position: int) -> dict:
        row = super().__getitem__(position)
        if self.variant.encode_images:
            images = [script.decode_image(self.file) for _ in range(2)]
            row["pixels"] = torch.stack([script.prepare_image(image, self.resolution)[0] for image in images])
        return row | {"caption": CAPTION}


def load_sizes(folder: Path, resolution: int) -> dict[str, tuple]:
    """Shapes of one image's latents and of one caption's embeddings."""
    text, text_2, vae = (load_config(folder / name) for name in ("text_encoder", "text_encoder_2", "vae"))
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "latents": (vae["latent_channels"], side, side),
        "prompt_embeds": (text["max_position_embeddings"], text["hidden_size"] + text_2["hidden_size"]),
        "pooled_prompt_embeds": (text_2["projection_dim"],),
    }


def make_jpeg(resolution: int) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (resolution // 16, resolution // 16, 3), dtype=np.uint8)
    image, file = Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BICUBIC), io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------------------


class MaPO:
    """The script as it is."""

    def __init__(self, unet, reference=None) -> None:
        self.unet, self.loss = unet, script.mapo_loss

    def __call__(self, *inputs, **conditions):
        return self.unet(*inputs, **conditions)


def loss_and_errors(loss: torch.Tensor, mse_w: torch.Tensor, mse_l: torch.Tensor) -> MaPOLoss:
    """In the form that the script logs; what only MaPO has is 1."""
    return MaPOLoss(loss, mse_w, mse_l, *[torch.ones_like(mse_w)] * (len(MaPOLoss._fields) - 3))


class DiffusionDPO(MaPO):
    """Loss -log sigmoid(-beta/2 * ((mse_w - mse_l) - (ref_w - ref_l))) (Diffusion-DPO, arXiv 2311.12908, eq. 14).

    Args:
        reference: a frozen UNet; None: the UNet without its LoRA, as in diffusers' script.
    """

    def __init__(self, unet, reference=None) -> None:
        self.unet, self.reference = unet, reference

    def __call__(self, *inputs, **conditions):
        prediction = self.unet(*inputs, **conditions)
        with torch.no_grad():
            if self.reference is not None:
                self.reference_sample = self.reference(*inputs, **conditions).sample
            else:
                self.unet.disable_adapters()
                self.reference_sample = self.unet(*inputs, **conditions).sample
                self.unet.enable_adapters()
        return prediction

    def loss(self, model_pred, target, *settings) -> MaPOLoss:
        mse_w, mse_l = self.errors(model_pred, target)
        reference_w, reference_l = self.errors(self.reference_sample, target)
        lead = (mse_w - mse_l) - (reference_w - reference_l)
        return loss_and_errors(-F.logsigmoid(-0.5 * DPO_BETA * lead).mean(), mse_w, mse_l)

    @staticmethod
    def errors(prediction, target) -> torch.Tensor:
        """Mean squared errors of winners and losers. Shape: (2B, ...) -> (2, B)"""
        return (prediction.float() - target.float()).square().flatten(1).mean(1).unflatten(0, (2, -1))


class SFT(MaPO):
    """Plain fine-tuning on the winners: the losers are loaded, but the UNet doesn't see them."""

    def __init__(self, unet, reference=None) -> None:
        self.unet = unet

    def __call__(self, latents, timesteps, prompt_embeds, added_cond_kwargs):
        half = len(latents) // 2
        conditions = {key: value[:half] for key, value in added_cond_kwargs.items()}
        return self.unet(latents[:half], timesteps[:half], prompt_embeds[:half], added_cond_kwargs=conditions)

    def loss(self, model_pred, target, *settings) -> MaPOLoss:
        mse = (model_pred.float() - target[: len(model_pred)].float()).square().flatten(1).mean(1)
        return loss_and_errors(mse.mean(), mse, mse)


METHODS = {"mapo": MaPO, "dpo": DiffusionDPO, "sft": SFT}


def project_text_once(unet) -> None:
    """Keys and values of the caption for the winners only; the losers, the second half of the batch, share them."""

    def once(linear):
        forward = linear.forward
        return lambda text: forward(text[: len(text) // 2]).repeat(2, 1, 1)

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.to_k.forward, module.to_v.forward = once(module.to_k), once(module.to_v)


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """A variant, ready to take steps.

    Attributes:
        held: bytes of the weights of all models that are in memory, the reference model's too.
    """

    def __init__(self, variant: Variant, args, accelerator, device: torch.device, cache: Path) -> None:
        self.variant, self.args, self.accelerator, self.device = variant, args, accelerator, device
        folder = CASES[variant.case]["folder"]
        dtype = script.HALF_DTYPES.get(args.mixed_precision, torch.float32)
        self.pipeline, reference = None, None
        with random_weights(folder, device):
            if variant.encode_images or variant.encode_captions:
                self.pipeline = script.load_pipeline(args, dtype).to(device)
            if variant.method == "dpo" and not args.use_lora:
                reference = script.load_unet(args, accelerator)[0].to(device, dtype).eval().requires_grad_(False)
            unet, self.noise_scheduler = script.load_unet(args, accelerator)
        unet.to(device)
        if variant.channels_last:
            unet.to(memory_format=torch.channels_last)
        if variant.keys_once:
            project_text_once(unet)
        modules = [unet, reference]
        if self.pipeline is not None:
            modules += [self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2]
        self.held = sum(t.nbytes for m in modules if m is not None for t in m.state_dict().values())
        self.method = METHODS[variant.method](unet, reference)
        training = script.prepare_training(unet, None, args, accelerator)
        self.unet, self.optimizer, self.lr_scheduler = training.unet, training.optimizer, training.lr_scheduler
        self.log, self.done = script.MetricsLog({"step": 0, "history": []}, args, accelerator), 0
        self.dataset = RandomPairs(variant, args, cache)
        self.feed(args.train_batch_size)

    def feed(self, size: int) -> None:
        """Starts new batches of this many pairs."""
        self.args.train_batch_size = size
        self.batches = iter(script.make_batches(self.dataset, 0, self.args, self.accelerator))

    def encode(self, batch: dict) -> dict:
        """The batch with what the variant encodes in every step."""
        captions = batch.pop("caption")
        if self.variant.encode_images:
            latents = script.encode_pixels(batch.pop("pixels").flatten(0, 1), self.pipeline.vae)
            batch["latents"] = latents.unflatten(0, (-1, 2))
        if self.variant.encode_captions:
            options = {"device": self.device, "do_classifier_free_guidance": False}
            with torch.no_grad():
                embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, **options)
            batch |= {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}
        return batch

    def step(self, mark=lambda phase: None) -> float | torch.Tensor:
        """One step, as in the script's loop. Calls `mark` with the name of each phase at its end."""
        backend = BACKENDS.get(self.variant.attention)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return self._step(mark)

    def _step(self, mark) -> torch.Tensor:
        batch = next(self.batches)
        mark("data")
        batch = self.encode(batch)
        mark("encode")
        with self.accelerator.accumulate(self.unet), mock.patch.object(script, "mapo_loss", self.method.loss):
            loss, metrics = script.training_step(self.method, batch, self.noise_scheduler, self.args, self.device)
            mark("forward")
            self.accelerator.backward(loss)
            mark("backward")
            self.log.micro_steps.append(metrics)
            grad_norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.args.max_grad_norm)
            skip = self.variant.finite_check and not bool(grad_norm.isfinite())
            if not skip or self.accelerator.scaler is not None:
                self.optimizer.step()
            self.optimizer.zero_grad()
        self.done += 1
        self.lr_scheduler.step()
        self.log.end_step(self.done, grad_norm, self.lr_scheduler.get_last_lr()[0])
        mark("optimizer")
        return loss.detach()

    def close(self) -> None:
        self.log.bar.close()


@contextlib.contextmanager
def start(variant: Variant, device: str):
    """A `Training`, whose console output and files are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        args = make_args(variant, device, folder)
        with contextlib.redirect_stderr(io.StringIO()):
            accelerator = script.prepare_run(args)
            if variant.threads is not None:
                torch.set_num_threads(variant.threads)
            training = Training(variant, args, accelerator, accelerator.device, Path(folder) / "cache")
            yield training
            training.close()


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def count_flop(variant: Variant) -> float:
    """FLOP per pair of a step without its optimizer, counted on the meta device; 1 multiply-add = 2 FLOP.

    Attention is counted as its plain products, whichever kernel computes it.
    """
    unseen = ("--compile", "--activation_memory_budget", "--enable_xformers", "--mixed_precision", "--use_8bit_adam")
    kept = tuple(flag for flag in variant.flags if not flag.startswith((*unseen, "--optimizer", "--dataloader")))
    device, folder = torch.device("meta"), CASES[variant.case]["folder"]
    args = make_args(Variant("", variant.case, flags=kept, batch=1), "cpu", tempfile.gettempdir() + "/none")
    accelerator = mock.Mock(mixed_precision="no")
    with random_weights(folder, device), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet, noise_scheduler = script.load_unet(args, accelerator)
        reference = None
        if variant.method == "dpo" and not args.use_lora:
            reference = script.load_unet(args, accelerator)[0].eval().requires_grad_(False)
        if variant.keys_once:
            project_text_once(unet)
        method = METHODS[variant.method](unet, reference)
        with mock.patch.object(script, "mapo_loss", method.loss), no_noise():
            batch = make_meta_batch(folder, args.resolution, 1)
            loss, _ = script.training_step(method, batch, noise_scheduler, args, device)
        loss.backward()
        count_encoding(folder, args.resolution, variant.encode_images, variant.encode_captions)
    return counter.get_total_flops()


def make_meta_batch(folder: Path, resolution: int, size: int) -> dict[str, torch.Tensor]:
    """A batch of so many pairs, as `training_step` takes it, on the meta device."""
    shapes = load_sizes(folder, resolution) | {"time_ids": (6,)}
    shapes["latents"] = (2, *shapes["latents"])
    batch = {name: torch.empty(size, *shape, device="meta") for name, shape in shapes.items()}
    return batch | {"position": torch.arange(size)}


def no_noise():
    """In place of the script's `sample_noise`: meta has no generator."""

    def sample(positions, shape, num_timesteps, offset, seed, device) -> tuple:
        size = len(positions)
        return torch.empty(size, *shape, device=device), torch.empty(size, dtype=torch.long, device=device)

    return mock.patch.object(script, "sample_noise", sample)


@torch.no_grad()
def count_encoding(folder: Path, resolution: int, images: bool, captions: bool) -> None:
    """Runs the VAE on two images and the text encoders on a caption; on meta, for the counter that is open."""
    from diffusers import AutoencoderKL

    device = torch.device("meta")
    if images:
        with device:
            vae = AutoencoderKL.from_config(load_config(folder / "vae"))
        vae.encode(torch.empty(2, 3, resolution, resolution, device=device))
    if captions:
        for name, model in make_encoders(folder, device, torch.float32).items():
            if name.startswith("text_encoder"):
                model(torch.zeros(1, model.config.max_position_embeddings, dtype=torch.long, device=device))


def count_floor(case: str) -> float:
    """FLOP of the UNet's forward and backward pass over two samples: no way of training all weights needs fewer,
    but for what winner and loser can share."""
    variant = Variant("", case, batch=1)
    args = make_args(variant, "cpu", tempfile.gettempdir() + "/none")
    folder, device = CASES[case]["folder"], torch.device("meta")
    batch = make_meta_batch(folder, args.resolution, 2)
    with random_weights(folder, device):
        unet, _ = script.load_unet(args, mock.Mock(mixed_precision="no"))
    conditions = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
    latents, timesteps = batch["latents"][:, 0], torch.empty(2, device=device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(latents, timesteps, batch["prompt_embeds"], added_cond_kwargs=conditions).sample.sum().backward()
    return counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_matmul_peak(device: torch.device) -> dict[str, float]:
    """FLOP/s of large square matrix products of random numbers, the best of several, by precision."""
    side = 8192 if device.type == "cuda" else 2048
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        kinds |= {"tf32": torch.float32, "fp16": torch.float16}
    peak = {}
    for name, dtype in kinds.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        seconds = []
        for _ in range(12):
            synchronize(device)
            before = time.perf_counter()
            a @ b
            synchronize(device)
            seconds.append(time.perf_counter() - before)
        peak[name] = 2 * side**3 / min(seconds)
    torch.set_float32_matmul_precision("highest")
    return peak


def resident_gb(peak: bool) -> float:
    """Memory of this process in GB, as Linux counts it."""
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def largest_batch(fits, low: int, guess: int, deadline: float) -> tuple[int, bool]:
    """Largest batch for which `fits(batch)`, to within an eighth, and whether it was found before the deadline.

    Args:
        low: a batch that fits.
        guess: where to look first.
    """
    high = None
    while high is None or high - low > max(1, low // 8):
        if time.time() > deadline:
            return low, False
        batch = max(low + 1, min(guess, 4 * low)) if high is None else (low + high) // 2
        if fits(batch):
            low, guess = batch, 2 * batch
        else:
            high = batch
    return low, True


def fits(training: Training, batch: int) -> bool:
    """Whether a step with so many pairs finds memory."""
    try:
        training.feed(batch)
        training.step()
        synchronize(training.device)
        fitted = True
    except torch.OutOfMemoryError:
        fitted = False
    training.optimizer.zero_grad()  # outside of `except`, whose traceback holds the activations
    training.log.micro_steps = []
    gc.collect()
    torch.cuda.empty_cache()
    return fitted


def guess_largest_batch(training: Training, peak: int) -> int:
    """From the memory of the measured batch and of one pair, on a line."""
    total = torch.cuda.get_device_properties(training.device).total_memory * memory_fraction()
    batch = training.args.train_batch_size
    torch.cuda.reset_peak_memory_stats()
    training.feed(1)
    training.step()
    per_pair = (peak - torch.cuda.max_memory_allocated()) / max(1, batch - 1)
    return int(batch + 0.95 * (total - peak) / max(per_pair, 1))


def memory_fraction() -> float:
    """Share of the GPU that may be used, after --memory_gb."""
    limit = os.environ.get("STEP_COST_MEMORY_GB")
    return 1.0 if limit is None else min(1.0, float(limit) * 1e9 / torch.cuda.get_device_properties(0).total_memory)


def time_steps(training: Training, seconds: float) -> list[float]:
    """Seconds per step of blocks of steps, for about so many seconds: of one step on a CPU, of several on a GPU, so
    that the host may run ahead of it."""
    size, blocks = 4 if training.device.type == "cuda" and seconds > 0 else 1, []
    until = time.perf_counter() + seconds
    while not blocks or time.perf_counter() < until:
        before = time.perf_counter()
        for _ in range(size):
            training.step()
        synchronize(training.device)
        blocks.append((time.perf_counter() - before) / size)
    return blocks


def time_phases(training: Training, steps: int) -> dict[str, float]:
    """Seconds per step of data, encode, forward, backward and optimizer, with a halt of the device after each."""
    spent, clock = {}, [0.0]

    def mark(phase: str) -> None:
        synchronize(training.device)
        now = time.perf_counter()
        spent[phase] = spent.get(phase, 0.0) + (now - clock[0]) / steps
        clock[0] = now

    clock[0] = time.perf_counter()
    for _ in range(steps):
        training.step(mark)
    return spent


def measure(variant: Variant, device: str, seconds: float, deadline: float) -> dict:
    """What a row of the table holds, but for what the parent knows."""
    on_gpu, began = device == "cuda", time.perf_counter()
    resident_before = resident_gb(peak=False)
    with start(variant, device) as training:
        args = training.args
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(memory_fraction())
        built = time.perf_counter()
        training.step()
        synchronize(training.device)
        first = time.perf_counter()
        for _ in range(2):
            training.step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        blocks = time_steps(training, seconds)
        peak = torch.cuda.max_memory_allocated() if on_gpu else (resident_gb(peak=True) - resident_before) * 1e9
        batch, median = args.train_batch_size, float(np.median(blocks))
        row = {
            "batch": batch,
            "pairs_per_second": batch / median,
            "seconds_per_step": median,
            "spread": [min(blocks), max(blocks)],
            "steps_timed": len(blocks),
            "peak_gb": peak / 1e9,
            "peak_without_model_gb": (peak - training.held) / 1e9,
            "model_gb": training.held / 1e9,
            "first_step_after_s": first - began,
            "compile_s": first - built - median if args.compile else None,
            "phases": time_phases(training, 2 if seconds == 0 else 4),
            "optimizer": args.optimizer,
            "precision": "tf32" if args.allow_tf32 else args.mixed_precision.replace("no", "fp32"),
        }
        if variant.largest_batch and on_gpu:
            guess = guess_largest_batch(training, peak)
            row["largest_batch"] = largest_batch(lambda size: fits(training, size), batch, guess, deadline)
    return row


def describe(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]


def main() -> None:
    """Reads the task, gets ready, waits for `go` and a deadline, and answers with one line of JSON."""
    answer_to, sys.stdout = sys.stdout, sys.stderr
    task = json.loads(sys.stdin.readline())
    answer = {"status": "ok"}
    try:
        if task["variant"] is not None:
            variant = Variant(**task["variant"] | {"flags": tuple(task["variant"]["flags"])})
            answer["flop_per_pair"], answer["floor"] = count_flop(variant), count_floor(variant.case)
        deadline = float(sys.stdin.readline())
        if task["variant"] is None:
            answer["peak"] = measure_matmul_peak(torch.device(task["device"]))
            answer |= describe_machine(task["device"])
        else:
            answer |= measure(variant, task["device"], task["seconds"], deadline)
    except (Exception, SystemExit) as error:  # a variant that fails is a row of the table, not the end of the run
        answer["status"] = describe(error)
    print(json.dumps(answer), file=answer_to, flush=True)


def describe_machine(device: str) -> dict:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "xformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return {"machine": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"} | {
            "versions": versions
        }
    return {"machine": f"{len(os.sched_getaffinity(0))} CPU cores", "versions": versions}


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__ + "\nstep_cost.py starts it and sends the task to its standard input.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    main()
