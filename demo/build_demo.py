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
Makes all of `demo/`: a tiny SDXL that draws Twemoji, and preference pairs in which Noto's drawing of a caption is
chosen over Twemoji's.

    python demo/build_demo.py            # needs npm for the two picture packages

Stages, each skipped when its result is in `--work_dir`, each going on from its last state after a kill:

1. pictures  both foundries' 64 px drawings on white, one caption per drawing, captions held out
2. vae       AutoencoderKL, 64 px -> 4 x 16 x 16, on all pictures of the packages but Noto's of held-out captions
3. base      two CLIP text encoders and the UNet from scratch, epsilon prediction, on Twemoji's drawings
4. judge     tells the two foundries apart by palette and flatness (style_judge.py); learns from drawings and from
             samples of the base and of a twin of it that is tuned on Noto's drawings
5. pairs     parquet files in Pick-a-Pic columns, sides shuffled
6. figures   VAE PSNR, nearest-picture accuracy of the base model, accuracy of the judge -> figures.json, samples.png,
             and the held-out captions that the demo is measured on -> measured_captions.txt
"""

import argparse
import copy
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
sys.path.insert(0, str(DEMO))

FOUNDRIES = {
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64"),
    "noto": ("emoji-datasource-google", "img/google/64"),
}
PACKAGE_VERSION = "16.0.0"
RESOLUTION = 64
GUIDANCE_SCALE = 2.0
# Left out: what isn't drawn by foundries but prescribed (flags, signs), and drawings that differ by a clock hand or a
# haircut, which nobody tells apart at 64 px.
LEFT_OUT_CATEGORIES = {"Flags", "Symbols", "Component"}
LEFT_OUT_SUBCATEGORIES = {"family", "person-symbol"}
LEFT_OUT_WORDS = re.compile(
    r"\b(man|woman|men|women|boy|girl|male|female|person with|facing right|clock face|adult|older)\b"
)
HELD_OUT_EVERY = 8
TOKENS = 24  # the longest caption has 14; SDXL's own limit is 77


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=DEMO / "build", help="States of the stages; not committed.")
    parser.add_argument("--output_dir", type=Path, default=DEMO, help="Where the demo is written.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae_steps", type=int, default=12000)
    parser.add_argument("--base_steps", type=int, default=4000)
    parser.add_argument("--twin_steps", type=int, default=600)
    parser.add_argument("--judge_steps", type=int, default=1200)
    parser.add_argument("--max_captions", type=int, default=None, help="Use the first N captions only (for tests).")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def unpack(package: str, work_dir: Path) -> tarfile.TarFile:
    archive = work_dir / f"{package}-{PACKAGE_VERSION}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{PACKAGE_VERSION}"], cwd=work_dir, check=True)
    return tarfile.open(archive)


def read_picture(archive: tarfile.TarFile, member: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS))


def list_pictures(archives: dict, foundry: str) -> set[str]:
    prefix = f"package/{FOUNDRIES[foundry][1]}/"
    return {name.removeprefix(prefix) for name in archives[foundry].getnames() if name.startswith(prefix)}


def make_pictures(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Both foundries' drawings: `captions` (N,), `twemoji` and `noto` (N, 64, 64, 3) uint8, `held_out` (N,) bool,
    and every other picture of the packages, for the VAE and the judge: `more_twemoji`, `more_noto` (M, 64, 64, 3), and
    `more_held_out` (M,) bool, those that show a held-out caption's hand or person in another skin tone."""
    path = args.work_dir / "pictures.npz"
    if path.exists():
        return dict(np.load(path))
    archives = {foundry: unpack(package, args.work_dir) for foundry, (package, _) in FOUNDRIES.items()}
    entries = json.load(archives["twemoji"].extractfile("package/emoji.json"))
    in_both = {
        e["unified"] for e in json.load(archives["noto"].extractfile("package/emoji.json")) if e["has_img_google"]
    }
    chosen = [
        e
        for e in sorted(entries, key=lambda e: e["sort_order"])
        if e["has_img_twitter"]
        and e["unified"] in in_both
        and e["category"] not in LEFT_OUT_CATEGORIES
        and e["subcategory"] not in LEFT_OUT_SUBCATEGORIES
        and not LEFT_OUT_WORDS.search(e["name"].lower())
    ][: args.max_captions]
    pictures = {"captions": np.array([e["name"].lower().replace("’", "'") for e in chosen])}
    pictures["held_out"] = np.arange(len(chosen)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    files = {e["image"] for e in chosen}
    others = sorted(
        name for name in list_pictures(archives, "twemoji") & list_pictures(archives, "noto") if name not in files
    )
    others = others[: args.max_captions]
    held_out = {e["image"].split(".")[0].split("-")[0] for e, out in zip(chosen, pictures["held_out"]) if out}
    pictures["more_held_out"] = np.array([name.split(".")[0].split("-")[0] in held_out for name in others])
    for foundry, (_, folder) in FOUNDRIES.items():
        prefix = f"package/{folder}/"
        for key, names in ((foundry, [e["image"] for e in chosen]), (f"more_{foundry}", others)):
            pictures[key] = np.stack([read_picture(archives[foundry], prefix + name) for name in names])
    assert len(set(pictures["captions"])) == len(chosen), "captions must be distinct"
    temporary = args.work_dir / "pictures.tmp.npz"
    np.savez(temporary, **pictures)
    os.replace(temporary, path)
    return pictures


def to_tensor(pictures: np.ndarray, device: str) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) uint8 on the device."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Training, the same for every stage
# ---------------------------------------------------------------------------------------------------------------------


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
        with torch.autocast(args.device, dtype=torch.bfloat16):
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


def train_vae(args: argparse.Namespace, pictures: dict) -> torch.nn.Module:
    seen = [pictures["noto"][~pictures["held_out"]], *(pictures[k] for k in ("twemoji", "more_twemoji", "more_noto"))]
    data = to_tensor(np.concatenate(seen), args.device)
    vae = make_vae().to(args.device)
    modules = torch.nn.ModuleDict({"vae": vae})

    def loss_function(generator, progress):
        # Quarters of pictures first: a convolutional net learns as much from them, at a quarter of the cost.
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
        latents = encode(vae, to_tensor(pictures["twemoji"], args.device))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def encode(vae, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> latents (N, 4, H / 4, W / 4), not scaled."""
    return torch.cat([vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in pictures.split(64)])


@torch.no_grad()
def reconstruct(vae, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> what the VAE makes of them, in [-1, 1]."""
    return torch.cat([vae.decode(latents).sample.clamp(-1, 1) for latents in encode(vae, pictures).split(64)])


@torch.no_grad()
def psnr(vae, pictures: torch.Tensor) -> float:
    """Mean over the pictures of each one's PSNR in dB, peak 255."""
    errors = [
        (reconstruct(vae, chunk) / 2 + 0.5 - chunk.float() / 255).square().mean((1, 2, 3))
        for chunk in pictures.split(64)
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
    """Text encoders and UNet with the parts that SDXL has, in SDXL's order, at 1/380 of its size."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
        block_out_channels=(64, 96, 144),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[2, 3, 4],
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


def train_drawing(
    name: str, modules, tokenizers: tuple, captions: list[str], drawings, vae, steps, rate, args
) -> None:
    """Trains text encoders and UNet to draw `drawings` (N, 64, 64, 3) for `captions`."""
    from diffusers.training_utils import compute_snr

    token_ids = tokenize(tokenizers, captions, args.device)
    latents = encode(vae, to_tensor(drawings, args.device)) * vae.config.scaling_factor
    noise_scheduler, _ = make_noise_schedulers()
    size = 64
    time_ids = torch.tensor([RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION], device=args.device)
    time_ids = time_ids.float().repeat(size, 1)

    def loss_function(generator, progress):
        draw = dict(generator=generator, device=args.device)
        index = torch.randint(len(latents), (size,), **draw)
        noise = torch.randn(size, *latents.shape[1:], **draw)
        timesteps = torch.randint(1000, (size,), **draw)
        noisy = noise_scheduler.add_noise(latents[index], noise, timesteps)
        embeds, pooled = encode_captions(modules, tuple(ids[index] for ids in token_ids))
        # The pipeline of SDXL takes zeros for an empty negative prompt, so zeros stand for "no caption" here.
        keep = (torch.rand(size, **draw) >= 0.1).float()
        conditions = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids}
        prediction = modules["unet"](
            noisy, timesteps, embeds * keep[:, None, None], added_cond_kwargs=conditions
        ).sample
        error = (prediction.float() - noise).square().mean((1, 2, 3))
        snr = compute_snr(noise_scheduler, timesteps)
        return (error * snr.clamp(max=5) / snr).mean()  # min-SNR weights: fewer steps to the same picture

    train(name, modules, loss_function, steps, rate, args)


def train_base(args: argparse.Namespace, pictures: dict, vae) -> tuple:
    captions = pictures["captions"].tolist()
    tokenizers = make_tokenizers(captions, args.work_dir)
    modules = make_base(tokenizers).to(args.device)
    train_drawing("base", modules, tokenizers, captions, pictures["twemoji"], vae, args.base_steps, 1e-3, args)
    return tokenizers, modules


def train_twin(args: argparse.Namespace, pictures: dict, vae, tokenizers: tuple, modules) -> torch.nn.ModuleDict:
    """The base tuned on Noto's drawings: the judge learns from it how a model draws in Noto's style."""
    seen = ~pictures["held_out"]
    captions, drawings = pictures["captions"][seen].tolist(), pictures["noto"][seen]
    twin = copy.deepcopy(modules)
    train_drawing("twin", twin, tokenizers, captions, drawings, vae, args.twin_steps, 5e-4, args)
    return twin


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
    pipeline.to(torch.float16).save_pretrained(args.output_dir / "sdxl-tiny-twemoji", safe_serialization=True)
    pipeline.to(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Judge
# ---------------------------------------------------------------------------------------------------------------------


def train_judge(args: argparse.Namespace, pictures: dict, vae, twin) -> torch.nn.Module:
    """Learns from drawings, from what the VAE makes of them, and from samples of the base and its twin, so that it
    judges style and not sharpness. Neither held-out captions nor their skin-tone variants are among them."""
    from style_judge import BINS, StyleJudge, to_batch

    seen, more = ~pictures["held_out"], ~pictures["more_held_out"]
    captions = pictures["captions"][seen].tolist()
    judge = StyleJudge().to(args.device)
    groups = []  # (features, label, how many of them in a batch)
    for foundry in FOUNDRIES if not (args.work_dir / "judge.pt").exists() else ():
        drawn = np.concatenate([pictures[foundry][seen], pictures[f"more_{foundry}"][more]])
        drawn = to_tensor(drawn, args.device)
        samples = to_batch(sample(args, captions, twin if foundry == "noto" else None, seed=1_000_000))
        versions = (
            ([chunk.float() / 127.5 - 1 for chunk in drawn.split(256)], 64),
            ([reconstruct(vae, chunk) for chunk in drawn.split(256)], 32),
            (samples.to(args.device).split(256), 32),
        )
        for chunks, share in versions:
            groups.append((torch.cat([judge.features(chunk) for chunk in chunks]), float(foundry == "noto"), share))
    if groups:
        features = torch.cat([features for features, _, _ in groups])
        judge.mean.copy_(features.mean(0))
        judge.scale.copy_(1 / (features.std(0) + 0.01))
        judge.scale[BINS**3 :] *= 4  # 60 figures of flatness would drown in 4096 of colour

    def loss_function(generator, progress):
        batch, labels = [], []
        for features, label, share in groups:
            batch.append(features[torch.randint(len(features), (share,), generator=generator, device=args.device)])
            labels.append(torch.full((share,), label, device=args.device))
        logits = judge.judge_features(torch.cat(batch))
        return F.binary_cross_entropy_with_logits(logits.float(), torch.cat(labels))

    train("judge", torch.nn.ModuleDict({"judge": judge}), loss_function, args.judge_steps, 2e-3, args, 2.0)
    return judge.half().float().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def write_pairs(args: argparse.Namespace, pictures: dict) -> None:
    """`pairs/train.parquet` and `pairs/test.parquet` (the held-out captions) in Pick-a-Pic's columns: the file bytes
    of two pictures, `label_0` 1.0 where the first is chosen. Noto is chosen, on a side drawn by seed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def file_bytes(picture: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="WEBP", lossless=True)
        return buffer.getvalue()

    noto_first = np.random.default_rng(args.seed).random(len(pictures["captions"])) < 0.5
    columns = {"caption": [], "jpg_0": [], "jpg_1": [], "label_0": [], "label_1": []}
    for i, caption in enumerate(pictures["captions"].tolist()):
        noto, twemoji = file_bytes(pictures["noto"][i]), file_bytes(pictures["twemoji"][i])
        columns["caption"].append(caption)
        columns["jpg_0"].append(noto if noto_first[i] else twemoji)
        columns["jpg_1"].append(twemoji if noto_first[i] else noto)
        columns["label_0"].append(float(noto_first[i]))
        columns["label_1"].append(float(not noto_first[i]))
    table = pa.table(columns)
    (args.output_dir / "pairs").mkdir(exist_ok=True)
    for split, mask in (("train", ~pictures["held_out"]), ("test", pictures["held_out"])):
        path = args.output_dir / "pairs" / f"{split}.parquet"
        pq.write_table(table.filter(pa.array(mask)), path.with_suffix(".tmp"), compression="none")
        os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace, captions: list[str], modules=None, seed: int = 0) -> list[Image.Image]:
    """One picture per caption, caption i with seed `seed + i`, 25 steps; by the committed checkpoint or `modules`."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.output_dir / "sdxl-tiny-twemoji", **(modules or {}), dtype=torch.float32, add_watermarker=False
    )
    pipeline.to(args.device).set_progress_bar_config(disable=True)
    size, samples = 64, []
    for start in tqdm(range(0, len(captions), size), desc="samples"):
        chunk = captions[start : start + size]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(chunk))]
        with torch.autocast(args.device, dtype=torch.bfloat16):
            samples += pipeline(
                chunk, num_inference_steps=25, guidance_scale=GUIDANCE_SCALE, generator=generators
            ).images
    return samples


def draw_grid(pictures: list[Image.Image], captions: list[str], columns: int = 12) -> Image.Image:
    """Pictures with their captions below them, wrapped."""
    import textwrap

    from PIL import ImageDraw, ImageFont

    cell, text, font = 96, 34, ImageFont.load_default(10)
    grid = Image.new("RGB", (columns * cell, -(-len(pictures) // columns) * (cell + text)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * cell, i // columns * (cell + text)
        grid.paste(picture.resize((cell - 8, cell - 8), Image.Resampling.LANCZOS), (x + 4, y + 4))
        lines = textwrap.wrap(caption, 17)[:2]
        pen.multiline_text((x + cell // 2, y + cell), "\n".join(lines), "black", font, "ma", 2, "center")
    return grid


def measure(args: argparse.Namespace, pictures: dict, vae, judge, twin) -> dict:
    """The figures that demo/README.md states, and samples.png."""
    from style_judge import to_batch

    held_out, captions = pictures["held_out"], pictures["captions"].tolist()
    tensors = {foundry: to_tensor(pictures[foundry], args.device) for foundry in FOUNDRIES}
    figures = {
        "date": date.today().isoformat(),
        "machine": f"{args.device}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "captions": len(captions),
        "held_out_captions": int(held_out.sum()),
        "vae_psnr_twemoji_db": psnr(vae, tensors["twemoji"]),
        "vae_psnr_noto_held_out_db": psnr(vae, tensors["noto"][held_out]),
    }
    for name, version in (
        ("drawings", lambda x: x.float() / 127.5 - 1),
        ("reconstructions", lambda x: reconstruct(vae, x)),
    ):
        hits = [judge.is_noto(version(tensors[f][held_out])) == (f == "noto") for f in FOUNDRIES]
        figures[f"judge_accuracy_on_held_out_{name}"] = torch.cat(hits).float().mean().item()
    # The demo's figures are taken where the instrument works: captions of which it tells both reconstructions apart.
    told_apart = (hits[0] & hits[1]).cpu().numpy()
    chosen = np.random.default_rng(args.seed).permutation(np.flatnonzero(held_out)[told_apart])[:64]
    (args.output_dir / "measured_captions.txt").write_text("".join(captions[i] + "\n" for i in chosen))

    samples = sample(args, captions)
    arrays = np.stack([np.asarray(s) for s in samples])
    nearest = torch.cdist(
        to_tensor(arrays, args.device).float().flatten(1), tensors["twemoji"].float().flatten(1)
    ).argmin(1)
    right = nearest.cpu().numpy() == np.arange(len(captions))
    figures["base_nearest_drawing_is_the_caption's"] = float(right.mean())
    noto = judge.is_noto(to_tensor(arrays, args.device).float() / 127.5 - 1)
    figures["base_share_judged_noto"] = noto.float().mean().item()
    figures["base_share_judged_noto_held_out_captions"] = noto[held_out].float().mean().item()
    noto = judge.is_noto(to_batch(sample(args, pictures["captions"][held_out].tolist(), twin)).to(args.device))
    figures["twin_share_judged_noto_held_out_captions"] = noto.float().mean().item()
    shown = np.random.default_rng(args.seed).permutation(len(captions))[:72]
    draw_grid([samples[i] for i in shown], [captions[i] for i in shown]).save(args.output_dir / "samples.png")
    return figures


def main(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pictures = make_pictures(args)
    write_pairs(args, pictures)
    vae = train_vae(args, pictures)
    print(f"VAE: {psnr(vae, to_tensor(pictures['twemoji'], args.device)):.2f} dB PSNR on Twemoji's drawings")
    tokenizers, modules = train_base(args, pictures, vae)
    write_pipeline(args, vae, tokenizers, modules)
    twin = train_twin(args, pictures, vae, tokenizers, modules)
    judge = train_judge(args, pictures, vae, twin)
    save_file(
        {k: v.half().contiguous() for k, v in judge.state_dict().items()}, args.output_dir / "style_judge.safetensors"
    )
    figures = measure(args, pictures, vae, judge, twin)
    (args.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(parse_args())
