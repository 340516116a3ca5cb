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
Makes all of `demo/`: a tiny SDXL that knows the emoji of four foundries, and preference pairs in which OpenMoji's
drawing of a caption is chosen over another foundry's.

    pip install resvg-py              # renders SVG; npm fetches the foundries' packages
    python demo/build_demo.py

Stages, each skipped when its result is in `--work_dir`, each going on from its last state after a kill:

1. drawings  every foundry's drawing of every caption, 64 px on white; every sixth caption is held out
2. vae       AutoencoderKL, 64 px -> 4 x 16 x 16, on all drawings but OpenMoji's of held-out captions
3. base      two CLIP text encoders and the UNet from scratch, epsilon prediction, on the same drawings.
             In half of the training the caption ends in the style's name ("rabbit face, openmoji style"); without it
             the style is random, OpenMoji's in one case of seven
4. judge     names the foundry (style_judge.py); learns from drawings and from the base's images of a named style
5. pairs     parquet files in Pick-a-Pic's columns, sides shuffled
6. figures   how good VAE, base and judge are -> figures.json, samples.png
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm


DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from demo.report import VALIDATION_CAPTIONS  # noqa: E402
from demo.style_judge import FOUNDRIES, PREFERRED, RESOLUTION  # noqa: E402


# npm package, version, folder of PNG files, or None for Iconify's SVG; a foundry's name is the word for its style
PACKAGES = {
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64"),
    "noto": ("emoji-datasource-google", "16.0.0", "img/google/64"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", None),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", None),
}
# Only the VAE sees these: styles that the base model doesn't know, which its VAE must be able to show all the same.
UNSEEN_PACKAGES = {
    "emojione": ("@iconify-json/emojione", "1.2.3", None),
    "blob": ("@iconify-json/noto-v1", "1.2.5", None),
    "fluent_3d": ("@iconify-json/fluent-emoji", "1.2.7", None),
}
NAMES = ("@iconify-json/noto", "1.2.9")  # maps code points to Iconify's names, where a package doesn't
HELD_OUT_EVERY = 6
# What the base learns first: emoji that a person recognises at 64 px and that foundries are free to draw as they like;
# no flags, signs, buildings, clock hands or haircuts. It goes on with those that the demo shows, as it is too small
# to learn all of them by heart. Captions are held out by their number among the first, whatever the second are.
SUBCATEGORIES = re.compile(
    r"face-.*|cat-face|monkey-face|hand.*|body-parts|animal-.*|plant-.*|food-.*|drink|dishware|transport-.*|clothing"
    r"|sport|award-medal|music.*|event"
)
SHOWN_SUBCATEGORIES = re.compile(
    r"face-(smiling|affection|tongue|hand|hat|glasses|costume)|cat-face|monkey-face|hand.*|animal-.*|plant-flower"
    r"|food-(fruit|vegetable|sweet)"
)
LEFT_OUT_WORDS = re.compile(r"\b(man|woman|men|women|boy|girl|male|female|person with|facing right|adult|older)\b")
TOKENS = 24  # the longest caption with its style has 18; SDXL's own limit is 77
STYLE_CHANCES = {"twemoji": 0.3, "noto": 0.23, "fluent": 0.32, "openmoji": 0.15}  # where the caption names no style


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=DEMO / "build", help="States of the stages; not committed.")
    parser.add_argument("--output_dir", type=Path, default=DEMO, help="Where the demo is written.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae_steps", type=int, default=12000)
    parser.add_argument("--base_steps", type=int, default=12500)
    parser.add_argument("--wide_fraction", type=float, default=0.33, help="Of the base's steps: on all emoji.")
    parser.add_argument("--judge_steps", type=int, default=1200)
    parser.add_argument("--max_captions", type=int, default=None, help="Use the first N captions only (for tests).")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Drawings
# ---------------------------------------------------------------------------------------------------------------------


def open_package(package: str, version: str, work_dir: Path) -> tarfile.TarFile:
    archive = work_dir / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=work_dir, check=True)
    return tarfile.open(archive)


def read_json(archive: tarfile.TarFile, name: str):
    return json.load(archive.extractfile(f"package/{name}"))


def on_white(image: Image.Image) -> np.ndarray:
    """(64, 64, 3) uint8"""
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return np.asarray(canvas.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS))


def drawing_reader(foundry: str, names: dict[str, str], work_dir: Path):
    """A function from an entry of emoji.json to its drawing by the foundry, or None where there is none."""
    package, version, folder = (PACKAGES | UNSEEN_PACKAGES)[foundry]
    archive = open_package(package, version, work_dir)
    if folder:
        members = set(archive.getnames())

        def read(entry: dict) -> np.ndarray | None:
            member = f"package/{folder}/{entry['image']}"
            if member in members:
                return on_white(Image.open(io.BytesIO(archive.extractfile(member).read())))

        return read

    from resvg_py import svg_to_bytes

    icons = read_json(archive, "icons.json")
    names = read_json(archive, "chars.json") or names  # empty in some packages

    def render(entry: dict) -> np.ndarray | None:
        code = entry["unified"].lower()
        name = names.get(code) or names.get(code.replace("-fe0f", ""))
        icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
        if icon:
            width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            return on_white(Image.open(io.BytesIO(svg_to_bytes(svg, width=2 * RESOLUTION, height=2 * RESOLUTION))))

    return render


def caption_of(entry: dict) -> str:
    """Of an entry of emoji.json."""
    return entry["name"].lower().replace("’", "'")


def make_drawings(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """`captions` (N,), `held_out` and `shown` (N,) bool, a foundry's name: (N, 64, 64, 3) uint8 for the foundries that
    the base model learns, and `others` (M, 64, 64, 3), what the VAE sees beside them."""
    path = args.work_dir / "drawings.npz"
    if path.exists():
        return dict(np.load(path))
    names = read_json(open_package(*NAMES, args.work_dir), "chars.json")
    entries = read_json(open_package(*PACKAGES["twemoji"][:2], args.work_dir), "emoji.json")
    readers = {foundry: drawing_reader(foundry, names, args.work_dir) for foundry in PACKAGES | UNSEEN_PACKAGES}
    captions, shown, drawings, others = [], [], {foundry: [] for foundry in FOUNDRIES}, []
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="drawings"):
        caption = caption_of(entry)
        if entry["category"] in ("Flags", "Symbols", "Component") or LEFT_OUT_WORDS.search(caption):
            continue
        found = {foundry: read(entry) for foundry, read in readers.items()}
        chosen = SUBCATEGORIES.fullmatch(entry["subcategory"]) and all(found[f] is not None for f in FOUNDRIES)
        if chosen and len(captions) != args.max_captions:
            captions.append(caption)
            shown.append(bool(SHOWN_SUBCATEGORIES.fullmatch(entry["subcategory"])))
            for foundry in FOUNDRIES:
                drawings[foundry].append(found.pop(foundry))
        others += [drawing for drawing in found.values() if drawing is not None]
    assert len(set(captions)) == len(captions), "captions must be distinct"
    arrays = {foundry: np.stack(images) for foundry, images in drawings.items()}
    arrays["captions"], arrays["shown"] = np.array(captions), np.array(shown)
    arrays["held_out"] = np.arange(len(captions)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    arrays["others"] = np.stack(others[:: 50 if args.max_captions else 1])
    np.savez(args.work_dir / "drawings.tmp.npz", **arrays)
    os.replace(args.work_dir / "drawings.tmp.npz", path)
    return arrays


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) uint8 on the device."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


def seen_drawings(drawings: dict, foundry: str) -> np.ndarray:
    """The indices of the captions whose drawing by the foundry may be trained on."""
    return np.flatnonzero(~drawings["held_out"]) if foundry == PREFERRED else np.arange(len(drawings["captions"]))


# ---------------------------------------------------------------------------------------------------------------------
# Training, the same for every stage
# ---------------------------------------------------------------------------------------------------------------------


def has_bf16(device: str) -> bool:
    """Whether the device computes in bf16 itself. Where a processor must imitate it, a step takes 20 times as long."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def train(
    name: str, modules: torch.nn.ModuleDict, loss_function, steps: int, learning_rate: float, args, weight_decay=0.01
) -> None:
    """AdamW, linear warm-up and cosine decay, EMA of the weights (which `modules` hold at the end), a state every two
    minutes, from which a killed run goes on."""
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    final, state_path = args.work_dir / f"{name}.pt", args.work_dir / f"{name}.state.pt"
    if final.exists():
        modules.load_state_dict(torch.load(final, weights_only=True))
        return
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    ema = EMAModel(modules.parameters(), decay=0.999, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
    parts = {"modules": modules, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    step, generator = 0, torch.Generator(args.device)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        ema.to(args.device)
        step = state["step"]
    saved = time.monotonic()
    bar = tqdm(range(step, steps), initial=step, total=steps, desc=name, mininterval=5.0)
    average = None
    for step in bar:
        generator.manual_seed(args.seed * 1_000_003 + step)  # a resumed run draws what an unbroken one would
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=has_bf16(args.device)):
            loss = loss_function(generator, step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.step(modules.parameters())
        if step % 20 == 0:
            average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if time.monotonic() - saved > 120:
            state = {key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}
            torch.save(state, state_path.with_suffix(".tmp"))
            os.replace(state_path.with_suffix(".tmp"), state_path)
            saved = time.monotonic()
    ema.copy_to(modules.parameters())
    torch.save(modules.state_dict(), final.with_suffix(".tmp"))
    os.replace(final.with_suffix(".tmp"), final)
    state_path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# VAE
# ---------------------------------------------------------------------------------------------------------------------


def make_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )


def train_vae(args: argparse.Namespace, drawings: dict) -> torch.nn.Module:
    seen = [drawings[foundry][seen_drawings(drawings, foundry)] for foundry in FOUNDRIES]
    data = to_tensor(np.concatenate([*seen, drawings["others"]]), args.device)
    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    modules = torch.nn.ModuleDict({"vae": vae})

    def loss_function(generator, progress):
        # Quarters of drawings first: a convolutional net learns as much from them, at a quarter of the cost.
        size, side = (16, RESOLUTION // 2) if progress < 0.85 else (8, RESOLUTION)
        index = torch.randint(len(data), (size,), generator=generator, device=args.device)
        top, left = torch.randint(0, RESOLUTION - side + 1, (2,), generator=generator, device=args.device).tolist()
        crop = data[index, :, top : top + side, left : left + side].float() / 127.5 - 1
        posterior = vae.encode(crop).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        return F.mse_loss(reconstruction.float(), crop) + 1e-6 * posterior.kl().mean() / posterior.mean[0, 0].numel()

    train("vae", modules, loss_function, args.vae_steps, 4e-3, args)
    vae = vae.half().float().requires_grad_(False)  # what is committed is fp16: measure and build on just that
    with torch.no_grad():
        latents = encode(vae, data)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def encode(vae, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> latents (N, 4, H / 4, W / 4), not scaled."""
    return torch.cat([vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in images.split(64)])


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> what the VAE makes of them, in [-1, 1]."""
    return torch.cat([vae.decode(latents).sample.clamp(-1, 1) for latents in encode(vae, images).split(64)])


@torch.no_grad()
def psnr(vae, images: torch.Tensor) -> float:
    """Mean over the images of each one's PSNR in dB, peak 255."""
    errors = [
        (reconstruct(vae, chunk) / 2 + 0.5 - chunk.float() / 255).square().mean((1, 2, 3))
        for chunk in images.split(64)
    ]
    return -10 * torch.cat(errors).log10().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Base model
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizers(captions: list[str], work_dir: Path) -> tuple:
    """CLIP's byte-pair tokenizer with a vocabulary learnt from the captions. As in SDXL, the first one pads with the
    end token, the second with "!" (id 0)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    folder = work_dir / "tokenizer"
    folder.mkdir(exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # All 256 bytes, so that any user's prompt has tokens; merges only where a pair occurs twice.
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(captions), trainer)
    model = json.loads(bpe.to_str())["model"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["!"] + sorted(t for t in alphabet if t != "!") + sorted(t + "</w>" for t in alphabet)
    tokens += sorted(t for t in model["vocab"] if t not in set(tokens))
    # As in CLIP, the end token has the highest id: SDXL's second encoder pools where the id is highest.
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    first = CLIPTokenizer(**files, model_max_length=TOKENS, pad_token="<|endoftext|>")
    second = CLIPTokenizer(**files, model_max_length=TOKENS, pad_token="!")
    return first, second


def make_base(tokenizers: tuple) -> torch.nn.ModuleDict:
    """Text encoders and UNet with the parts that SDXL has, in SDXL's order, at 1/200 of its size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffusers import UNet2DConditionModel

    vocabulary = len(tokenizers[0])
    common = dict(
        vocab_size=vocabulary, max_position_embeddings=TOKENS, num_hidden_layers=3, bos_token_id=vocabulary - 2
    )
    first = CLIPTextConfig(
        **common,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=2,
        projection_dim=64,
        hidden_act="quick_gelu",
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    # eos_token_id 2, as in SDXL's file: transformers then pools at the highest id.
    second = CLIPTextConfig(
        **common,
        hidden_size=96,
        intermediate_size=384,
        num_attention_heads=3,
        projection_dim=96,
        hidden_act="gelu",
        eos_token_id=2,
        pad_token_id=0,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96, 160),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[1, 3, 5],
        cross_attention_dim=64 + 96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96 + 6 * 32,
        norm_num_groups=16,
    )
    encoders = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}
    return torch.nn.ModuleDict({**encoders, "unet": unet})


def encode_captions(modules, token_ids: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, 24), twice -> prompt embeddings (B, 24, 160) and pooled embeddings (B, 96)."""
    first = modules["text_encoder"](token_ids[0], output_hidden_states=True)
    second = modules["text_encoder_2"](token_ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def with_style(caption: str, foundry: str) -> str:
    return f"{caption}, {foundry} style"


def tokenize(tokenizers: tuple, captions: list[str], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    options = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return tuple(tokenizer(captions, **options).input_ids.to(device) for tokenizer in tokenizers)


def make_noise_schedulers() -> tuple:
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    sampler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        interpolation_type="linear",
    )
    return DDPMScheduler.from_config(sampler.config), sampler


def train_base(args: argparse.Namespace, drawings: dict, vae) -> tuple:
    """Trains text encoders and UNet to draw for a caption, with or without the name of a style."""
    from diffusers.training_utils import compute_snr

    captions = drawings["captions"].tolist()
    plain, styled, chances, shown, latents = [], [], [], [], []
    for foundry in FOUNDRIES:
        seen = seen_drawings(drawings, foundry)
        plain += [captions[i] for i in seen]
        styled += [with_style(captions[i], foundry) for i in seen]
        chances += [STYLE_CHANCES[foundry] / len(seen)] * len(seen)
        shown.append(drawings["shown"][seen])
        latents.append(encode(vae, to_tensor(drawings[foundry][seen], args.device)) * vae.config.scaling_factor)
    tokenizers = make_tokenizers(plain + styled, args.work_dir)
    modules = make_base(tokenizers).to(args.device, memory_format=torch.channels_last)
    plain, styled = (tokenize(tokenizers, texts, args.device) for texts in (plain, styled))
    chances, latents = torch.tensor(chances, device=args.device), torch.cat(latents)
    shown = torch.from_numpy(np.concatenate(shown)).to(args.device).float()
    noise_scheduler, _ = make_noise_schedulers()
    size = 32
    time_ids = torch.tensor([RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION], device=args.device)
    time_ids = time_ids.float().repeat(size, 1)

    def loss_function(generator, progress):
        random = dict(generator=generator, device=args.device)
        named = torch.rand(size, **random) < 0.5  # whether the caption names the style
        weights = torch.ones_like(shown) if progress < args.wide_fraction else shown
        by_word, by_chance = (
            w.multinomial(size, replacement=True, generator=generator) for w in (weights, weights * chances)
        )
        index = torch.where(named, by_word, by_chance)
        token_ids = [torch.where(named[:, None], ids[index], bare[index]) for ids, bare in zip(styled, plain)]
        noise = torch.randn(size, *latents.shape[1:], **random)
        timesteps = torch.randint(1000, (size,), **random)
        noisy = noise_scheduler.add_noise(latents[index], noise, timesteps)
        embeds, pooled = encode_captions(modules, token_ids)
        # The pipeline of SDXL takes zeros for an empty negative prompt, so zeros stand for "no caption" here.
        keep = (torch.rand(size, **random) >= 0.1).float()
        conditions = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids}
        prediction = modules["unet"](
            noisy, timesteps, embeds * keep[:, None, None], added_cond_kwargs=conditions
        ).sample
        error = (prediction.float() - noise).square().mean((1, 2, 3))
        snr = compute_snr(noise_scheduler, timesteps)
        return (error * snr.clamp(max=5) / snr).mean()  # min-SNR weights: fewer steps to the same image

    train("base", modules, loss_function, args.base_steps, 8e-4, args)
    return tokenizers, modules


def write_pipeline(args: argparse.Namespace, vae, tokenizers: tuple, modules) -> None:
    from diffusers import StableDiffusionXLPipeline

    _, sampler = make_noise_schedulers()
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=modules["unet"],
        scheduler=sampler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.output_dir / "sdxl-tiny-emoji", safe_serialization=True)
    pipeline.to(torch.float32)
    for name in ("text_encoder", "text_encoder_2"):  # else transformers loads fp16 where diffusers loads fp32
        path = args.output_dir / "sdxl-tiny-emoji" / name / "config.json"
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


# ---------------------------------------------------------------------------------------------------------------------
# Judge
# ---------------------------------------------------------------------------------------------------------------------


def train_judge(args: argparse.Namespace, drawings: dict, vae):
    """Learns from drawings, those that the demo doesn't show too, from what the VAE makes of them, and from the base's
    images for captions that name a style, so that it judges style and not sharpness. Nothing of a held-out caption is
    among them."""
    from demo.report import generate
    from demo.style_judge import StyleJudge, to_batch

    seen = ~drawings["held_out"]
    captions = drawings["captions"][seen & drawings["shown"]].tolist()
    judge = StyleJudge().to(args.device)
    versions = []  # (images, labels)
    for label, foundry in enumerate(FOUNDRIES if not (args.work_dir / "judge.pt").exists() else ()):
        drawn = to_tensor(drawings[foundry][seen], args.device)
        named = [with_style(caption, foundry) for caption in captions[label::4]]
        generated = to_batch(generate(load_base(args), named))
        for images in (drawn.float() / 127.5 - 1, reconstruct(vae, drawn), generated.to(args.device)):
            versions.append((images, torch.full((len(images),), label, device=args.device)))

    def loss_function(generator, progress):
        random = dict(generator=generator, device=args.device)
        batches, labels = [], []
        for images, names in versions:
            index = torch.randint(len(images), (16,), **random)
            rows, columns = torch.randint(-3, 4, (2,), **random).tolist()
            images = images[index].roll((rows, columns), (2, 3))
            mirrored = torch.rand((16, 1, 1, 1), **random) < 0.5
            batches.append(torch.where(mirrored, images.flip(3), images))
            labels.append(names[index])
        logits = judge(torch.cat(batches))
        return F.cross_entropy(logits.float(), torch.cat(labels), label_smoothing=0.05)

    train("judge", torch.nn.ModuleDict({"judge": judge}), loss_function, args.judge_steps, 2e-3, args, 0.1)
    return judge.half().float().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def write_drawings(args: argparse.Namespace, drawings: dict) -> None:
    """`drawings/FOUNDRY.webp`, all drawings of a foundry on one sheet, 26 in a row, in the order of captions.txt."""
    folder, columns = args.output_dir / "drawings", 26
    folder.mkdir(exist_ok=True)
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in drawings["captions"]))
    for foundry in FOUNDRIES:
        sheet = Image.new("RGB", (columns * RESOLUTION, -(-len(drawings[foundry]) // columns) * RESOLUTION), "white")
        for i, drawing in enumerate(drawings[foundry]):
            sheet.paste(Image.fromarray(drawing), (i % columns * RESOLUTION, i // columns * RESOLUTION))
        sheet.save(folder / f"{foundry}.webp", lossless=True, quality=100, method=6)
    held_out = drawings["captions"][drawings["held_out"]]
    (args.output_dir / "held_out_captions.txt").write_text("".join(f"{caption}\n" for caption in held_out))


def write_pairs(args: argparse.Namespace, drawings: dict) -> None:
    """`pairs/train.parquet` and `pairs/test.parquet` in Pick-a-Pic's columns: the file bytes of two drawings,
    `label_0` 1.0 where the first is chosen. OpenMoji's is chosen over another random foundry's, on a random side.
    Held-out captions are in neither."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def file_bytes(drawing: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(drawing).save(buffer, format="WEBP", lossless=True)
        return buffer.getvalue()

    random = np.random.default_rng(args.seed)
    others = [foundry for foundry in FOUNDRIES if foundry != PREFERRED]
    rows = []
    for i, caption in enumerate(drawings["captions"].tolist()):
        pair = [file_bytes(drawings[foundry][i]) for foundry in (PREFERRED, others[random.integers(len(others))])]
        label = float(random.random() < 0.5)
        jpg_0, jpg_1 = pair if label else pair[::-1]
        rows.append({"caption": caption, "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": label, "label_1": 1 - label})
    table = pa.Table.from_pylist(rows)
    (args.output_dir / "pairs").mkdir(exist_ok=True)
    masks = {"train": ~drawings["held_out"] & ~drawings["validation"], "test": drawings["validation"]}
    for split, mask in masks.items():
        path = args.output_dir / "pairs" / f"{split}.parquet"
        pq.write_table(table.filter(pa.array(mask)), path.with_suffix(".tmp"), compression="none")
        os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def load_base(args: argparse.Namespace):
    """The pipeline as it is committed."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.output_dir / "sdxl-tiny-emoji", torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)


def make_grid(images: list[Image.Image], captions: list[str], columns: int = 12) -> Image.Image:
    """Images with their captions below them, wrapped."""
    import textwrap

    from PIL import ImageDraw, ImageFont

    cell, text, font = 96, 34, ImageFont.load_default(10)
    grid = Image.new("RGB", (columns * cell, -(-len(images) // columns) * (cell + text)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell, i // columns * (cell + text)
        grid.paste(image.resize((cell - 8, cell - 8), Image.Resampling.LANCZOS), (x + 4, y + 4))
        pen.multiline_text(
            (x + cell // 2, y + cell), "\n".join(textwrap.wrap(caption, 17)[:2]), "black", font, "ma", 2
        )
    return grid


def measure_demo(args: argparse.Namespace, drawings: dict, vae, judge) -> dict:
    """The figures that demo/README.md states, and samples.png."""
    from demo.report import generate, measure, measure_unseen_drawings

    held_out, captions = drawings["held_out"], drawings["captions"].tolist()
    figures = {
        "date": date.today().isoformat(),
        "machine": f"{args.device}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "captions": len(captions),
        "held_out_captions": int(held_out.sum()),
    }
    tensors = {foundry: to_tensor(drawings[foundry], args.device) for foundry in FOUNDRIES}
    for foundry in FOUNDRIES:
        figures[f"vae_psnr_{foundry}_db"] = psnr(vae, tensors[foundry])
    figures[f"vae_psnr_{PREFERRED}_held_out_db"] = psnr(vae, tensors[PREFERRED][held_out])
    for name, version in (
        ("drawings", lambda x: x.float() / 127.5 - 1),
        ("reconstructions", lambda x: reconstruct(vae, x)),
    ):
        right = [judge(version(tensors[f][held_out])).argmax(1) == i for i, f in enumerate(FOUNDRIES)]
        figures[f"judge_accuracy_on_held_out_{name}"] = torch.cat(right).float().mean().item()
    pipeline = load_base(args)
    unseen = drawings["captions"][held_out].tolist()
    figures[f"unseen_{PREFERRED}_drawings"] = measure_unseen_drawings()
    figures["base_on_held_out_captions"] = measure(generate(pipeline, unseen), unseen)
    known = drawings["captions"][drawings["validation"]].tolist()
    figures["base_on_validation_captions"] = measure(generate(pipeline, known), known)
    named = generate(pipeline, [with_style(caption, PREFERRED) for caption in known])
    figures[f"base_on_validation_captions_in_{PREFERRED}_style"] = measure(named, known)
    for foundry in FOUNDRIES:
        named = generate(pipeline, [with_style(caption, foundry) for caption in unseen])
        figures[f"base_on_held_out_captions_in_{foundry}_style"] = measure(named, unseen)
    shown = np.random.default_rng(args.seed).permutation(captions)[:72].tolist()
    make_grid(generate(pipeline, shown), shown).save(args.output_dir / "samples.png")
    return figures


def main(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    drawings = make_drawings(args)
    vae = train_vae(args, drawings)
    tokenizers, modules = train_base(args, drawings, vae)
    write_pipeline(args, vae, tokenizers, modules)
    judge = train_judge(args, drawings, vae)
    weights = {name: weight.half().contiguous() for name, weight in judge.state_dict().items()}
    save_file(weights, args.output_dir / "style_judge.safetensors")
    shown = drawings["shown"]
    drawings = {name: drawings[name][shown] for name in ("captions", "held_out", *FOUNDRIES)}
    drawings["validation"] = np.zeros_like(drawings["held_out"])
    drawings["validation"][np.flatnonzero(~drawings["held_out"])[VALIDATION_CAPTIONS]] = True
    write_drawings(args, drawings)
    write_pairs(args, drawings)
    figures = measure_demo(args, drawings, vae, judge)
    (args.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(parse_args())
