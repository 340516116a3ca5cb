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
"""evaluation/: metrics against float64 arithmetic, statistics against closed forms, the tools on the demo's model."""

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO
from evaluation import common, compare, export_layouts, generate, metrics, reference_mismatch, score
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from scipy.special import erf
from scipy.stats import ttest_1samp
from transformers import (
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers


MODEL = REPO / "demo" / "sdxl-tiny-emoji"
PAIRS = REPO / "demo" / "pairs"
PROMPTS = ["a red apple", "rocket", "grinning face with smiling eyes"]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GENERATE = ["--num_inference_steps=2", "--guidance_scale=3", "--device=cpu"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(script, *flags) -> None:
    script.main(script.parse_args([str(flag) for flag in flags]))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def random_images(seed: int = 0) -> list[Image.Image]:
    """A wide, a tall and a square image."""
    noise = np.random.default_rng(seed)
    images = []
    for size in ((71, 40), (53, 90), (64, 64)):
        image = Image.fromarray(noise.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        images.append(image.resize(size, Image.Resampling.BICUBIC))
    return images


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give a model weights at which each of its parts shows in the output. Its default ones are too small for that."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=noise) + norm
    return model


# ---- Metrics against float64 arithmetic, on small models in the published file formats ------------------------------
def load_metric(name: str, **weights):
    weights = {key: str(place) for key, place in weights.items()}
    return metrics.load_metric(name, weights=metrics.WEIGHTS | weights)


def save_tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_clip(folder: Path, **changes) -> CLIPModel:
    tokenizer = save_tokenizer(folder)
    text = SIZES | changes | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text["eos_token_id"] = tokenizer.eos_token_id
    vision = SIZES | changes | {"image_size": 28, "patch_size": 14}
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), seed=3)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    randomise(Dinov2Model(config)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    ).save_pretrained(folder)
    return folder


def crop_shorter_side(image: Image.Image, resize: int, crop: int, half=math.floor) -> np.ndarray:
    """Return (crop, crop, 3) in [0, 1]. `half` rounds half of the surplus: transformers down (PickScore, DINOv2),
    torchvision to the even number (OpenAI's CLIP, the Aesthetic predictor, ImageReward)."""
    shorter, longer = sorted(image.size)
    sides = [resize if side == shorter else int(resize * longer / shorter) for side in image.size]
    resized = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
    top = half((resized.shape[0] - crop) / 2)
    left = half((resized.shape[1] - crop) / 2)
    return resized[top : top + crop, left : left + crop] / 255


def to_input(pixels: list[np.ndarray], mean=MEAN, std=STD) -> np.ndarray:
    return ((np.stack(pixels) - mean) / std).transpose(0, 3, 1, 2)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a = a.detach().double().numpy()
    b = b.detach().double().numpy()
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def raw_features(model, tokenizer, half=round) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of images and prompts that were prepared here, one by one and without padding."""
    pixels = to_input([crop_shorter_side(image, 28, 28, half) for image in random_images()])
    image_features = model.get_image_features(pixel_values=torch.from_numpy(pixels).float()).pooler_output
    text_features = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        text_features.append(model.get_text_features(input_ids=ids).pooler_output)
    return image_features, torch.cat(text_features)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
@torch.no_grad()
def test_clip_score_and_pickscore(clip_folder, name):
    metric = load_metric(name, **{name: clip_folder, "pickscore.processor": clip_folder})
    half = round if name == "clip" else math.floor
    for sign in (1, -1):  # the CLIP score is cut off at 0, PickScore isn't
        metric.model.visual_projection.weight *= sign
        cos = cosines(*raw_features(metric.model, metric.tokenizer, half))
        assert np.ptp(cos) > 0.05 and (np.sign(cos) == sign).all()
        expected = 100 * np.maximum(cos, 0) if name == "clip" else 100 * cos
        np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=2e-3)
    pixels = to_input([crop_shorter_side(image, 28, 28, half) for image in random_images()])
    np.testing.assert_allclose(metric.prepare(random_images()), pixels, atol=1e-5)


def test_half_a_surplus_of_the_center_crop_is_rounded_as_in_torchvision():
    """832 x 1216 becomes 224 x 327. Half of the surplus of 103 is 52 in torchvision and 51 in transformers."""
    stripes = np.repeat(np.repeat(np.arange(1216)[:, None, None] % 256, 832, 1), 3, 2).astype(np.uint8)
    for image in (Image.fromarray(stripes), Image.fromarray(stripes.transpose(1, 0, 2))):
        expected = crop_shorter_side(image, 224, 224, round)
        np.testing.assert_allclose(metrics.crop_to_square(image, 224).permute(1, 2, 0), expected, atol=1e-6)
        assert np.abs(expected - crop_shorter_side(image, 224, 224)).max() > 0.003


@pytest.mark.parametrize("name", ["clip", "hps"])
@torch.no_grad()
def test_text_is_cleaned_as_in_openais_code(clip_folder, name):
    """OpenAI's CLIP and open_clip use ftfy and html.unescape. PickScore's authors use transformers, which doesn't."""
    dirty = ["the corgi’s “ball”", "salt &amp;amp; pepper"]
    clean = ['the corgi\'s "ball"', "salt & pepper"]
    metric = load_metric("clip", clip=clip_folder)
    if name == "hps":  # the same method on a model that doesn't need the checkpoint's renaming
        metric.__class__ = metrics.Hps
    assert torch.equal(metric.embed_prompts(dirty), metric.embed_prompts(clean))
    pickscore = load_metric("pickscore", **{"pickscore": clip_folder, "pickscore.processor": clip_folder})
    assert not torch.allclose(pickscore.embed_prompts(dirty), pickscore.embed_prompts(clean))


@torch.no_grad()
def test_aesthetic(clip_folder, tmp_path):
    sizes = (16, 12, 8, 6, 4, 1)
    noise = torch.Generator().manual_seed(1)
    state = {}
    for place, fan_in, fan_out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):  # dropout has the other numbers
        state[f"layers.{place}.weight"] = torch.randn(fan_out, fan_in, generator=noise)
        state[f"layers.{place}.bias"] = torch.randn(fan_out, generator=noise)
    torch.save(state, tmp_path / "head.pth")
    metric = load_metric("aesthetic", **{"aesthetic": tmp_path / "head.pth", "aesthetic.clip": clip_folder})

    x = raw_features(metric.model, metric.tokenizer)[0].double().numpy()
    x /= np.sqrt((x**2).sum(1, keepdims=True))
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{place}.weight"].double().numpy().T + state[f"layers.{place}.bias"].double().numpy()
    assert np.ptp(x) > 0.1
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), x[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_siglip(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    text = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = SIZES | {"image_size": 28, "patch_size": 14}
    model = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    model.logit_scale.data.fill_(1.0)
    model.logit_bias.data.fill_(-0.5)
    model.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    metric = load_metric("siglip", siglip=tmp_path)

    squeezed = [np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)) / 255 for image in random_images()]
    pixels = to_input(squeezed, 0.5, 0.5)
    np.testing.assert_allclose(metric.prepare(random_images()), pixels, atol=1e-5)
    padded = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        padded.append(ids + [tokenizer.pad_token_id] * (16 - len(ids)))
    seen = model.eval().get_image_features(pixel_values=torch.from_numpy(pixels).float()).pooler_output
    cos = cosines(seen, model.get_text_features(input_ids=torch.tensor(padded)).pooler_output)
    expected = 100 / (1 + np.exp(-(math.e * cos - 0.5)))
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=1e-3)


@torch.no_grad()
def test_dinov2(dino_folder):
    references = random_images(seed=7)[:2]
    weights = metrics.WEIGHTS | {"dinov2": str(dino_folder)}
    metric = metrics.load_metric("dinov2", weights=weights, references=references)

    def embed(images: list[Image.Image]) -> np.ndarray:
        crops = [crop_shorter_side(image, 32, 28) for image in images]
        pixels = to_input(crops, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        np.testing.assert_allclose(metric.prepare(images), pixels, atol=1e-5)
        features = metric.model(pixel_values=torch.from_numpy(pixels).float()).last_hidden_state[:, 0].double().numpy()
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    expected = (embed(random_images()) @ embed(references).T).mean(1)
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=1e-5)


# open_clip's and BLIP's networks in float64, written from the names in their checkpoints alone.
def layer_norm(x: np.ndarray, state: dict, name: str, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, mask=0.0) -> np.ndarray:
    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), heads, -1).transpose(1, 0, 2)

    width = q.shape[-1] // heads
    logits = split(q) @ split(k).transpose(0, 2, 1) / math.sqrt(width) + mask
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    attended = weights / weights.sum(-1, keepdims=True) @ split(v)
    return attended.transpose(1, 0, 2).reshape(q.shape)


def patches_of(pixels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Shape: (3, H, W), (D, 3, p, p) -> (patches, D)."""
    p = weight.shape[-1]
    _, height, width = pixels.shape
    boxes = pixels.reshape(3, height // p, p, width // p, p).transpose(1, 3, 0, 2, 4)
    return boxes.reshape(-1, 3 * p * p) @ weight.reshape(len(weight), -1).T


def open_clip_blocks(x: np.ndarray, state: dict, prefix: str, layers: int, mask=0.0) -> np.ndarray:
    for n in range(layers):
        block = f"{prefix}transformer.resblocks.{n}"
        weight = state[f"{block}.attn.in_proj_weight"]
        normed = layer_norm(x, state, f"{block}.ln_1", 1e-5)
        q, k, v = np.split(normed @ weight.T + state[f"{block}.attn.in_proj_bias"], 3, axis=-1)
        x = x + linear(attend(q, k, v, 16, mask), state, f"{block}.attn.out_proj")
        hidden = gelu(linear(layer_norm(x, state, f"{block}.ln_2", 1e-5), state, f"{block}.mlp.c_fc"))
        x = x + linear(hidden, state, f"{block}.mlp.c_proj")
    return x


def random_state(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        state[name] = 0.3 * torch.randn(shape, generator=noise) + (len(shape) == 1) * 0.5
    return state


def bicubic_weights(before: int, after: int) -> np.ndarray:
    """Return Keys' kernel with a = -1/2, widened by the scale where it shrinks. Shape: (after, before)."""
    scale = before / after
    centers = (np.arange(after) + 0.5) * scale - 0.5
    x = np.abs(np.arange(before) - centers[:, None]) / max(scale, 1)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


def black_bars(image: Image.Image, side: int) -> np.ndarray:
    """Return HPS's input: the longer side resized to `side` in floats that nothing cuts off, (side, side, 3)."""
    width, height = (round(length * side / max(image.size)) for length in image.size)
    canvas = np.zeros((side, side, 3))
    top = (side - height) // 2
    left = (side - width) // 2
    channels = np.asarray(image).transpose(2, 0, 1) / 255
    resized = bicubic_weights(image.height, height) @ channels @ bicubic_weights(image.width, width).T
    canvas[top : top + height, left : left + width] = resized.transpose(1, 2, 0)
    return canvas


def test_hps_resizes_floats():
    checks = Image.fromarray(((np.indices((300, 448)) // 20).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    for image in (*random_images(), checks, checks.resize((224, 100)), checks.resize((100, 90))):
        expected = black_bars(image, 224)
        np.testing.assert_allclose(metrics.pad_to_square(image, 224).permute(1, 2, 0), expected, atol=2e-5)
    assert black_bars(checks, 224).min() < -0.02 and black_bars(checks, 224).max() > 1.02


@torch.no_grad()
def test_hps_reads_open_clips_checkpoint(tmp_path):
    save_clip(tmp_path, num_attention_heads=16, hidden_act="gelu")  # sizes and tokenizer, as on the hub
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    block = {
        "ln_1.weight": (32,),
        "ln_1.bias": (32,),
        "attn.in_proj_weight": (96, 32),
        "attn.in_proj_bias": (96,),
        "attn.out_proj.weight": (32, 32),
        "attn.out_proj.bias": (32,),
        "ln_2.weight": (32,),
        "ln_2.bias": (32,),
        "mlp.c_fc.weight": (64, 32),
        "mlp.c_fc.bias": (64,),
        "mlp.c_proj.weight": (32, 64),
        "mlp.c_proj.bias": (32,),
    }
    shapes = {
        "positional_embedding": (24, 32),
        "text_projection": (32, 16),
        "logit_scale": (),
        "visual.class_embedding": (32,),
        "visual.positional_embedding": (5, 32),
        "visual.proj": (32, 16),
        "visual.conv1.weight": (32, 3, 14, 14),
        "token_embedding.weight": (len(tokenizer), 32),
    }
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        shapes[f"{name}.weight"] = (32,)
        shapes[f"{name}.bias"] = (32,)
    for prefix in ("", "visual."):
        for n in range(2):
            for name, shape in block.items():
                shapes[f"{prefix}transformer.resblocks.{n}.{name}"] = shape
    state = random_state(shapes)
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    metric = load_metric("hps", **{"hps": tmp_path / "HPS_v2.1_compressed.pt", "hps.processor": tmp_path})

    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    expected = []
    for image, prompt in zip(random_images(), PROMPTS):
        pixels = to_input([black_bars(image, 28)])
        np.testing.assert_allclose(metric.prepare([image]), pixels, atol=1e-5)
        x = np.concatenate([w["visual.class_embedding"][None], patches_of(pixels[0], w["visual.conv1.weight"])])
        x = layer_norm(x + w["visual.positional_embedding"], w, "visual.ln_pre", 1e-5)
        seen = layer_norm(open_clip_blocks(x, w, "visual.", 2)[0], w, "visual.ln_post", 1e-5) @ w["visual.proj"]
        ids = tokenizer(prompt).input_ids
        x = w["token_embedding.weight"][ids] + w["positional_embedding"][: len(ids)]
        x = open_clip_blocks(x, w, "", 2, np.triu(np.full((len(ids), len(ids)), -np.inf), 1))
        read = layer_norm(x[np.argmax(ids)], w, "ln_final", 1e-5) @ w["text_projection"]
        expected.append(100 * seen @ read / np.linalg.norm(seen) / np.linalg.norm(read))
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=1e-3)


@torch.no_grad()
def test_image_reward_reads_its_own_checkpoint(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    seen = 32  # width of the vision model, a multiple of BLIP L's 16 heads
    read = 24  # width of the text model, a multiple of BERT's 12 heads
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, seen),
        "blip.visual_encoder.pos_embed": (1, 5, seen),
        "blip.visual_encoder.patch_embed.proj.weight": (seen, 3, 14, 14),
        "blip.visual_encoder.patch_embed.proj.bias": (seen,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(tokenizer), read),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, read),
    }

    def add(name: str, fan_in: int, fan_out: int) -> None:
        shapes[f"{name}.weight"] = (fan_out, fan_in)
        shapes[f"{name}.bias"] = (fan_out,)

    def add_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    for n in range(2):
        block = f"blip.visual_encoder.blocks.{n}"
        add(f"{block}.attn.qkv", seen, 3 * seen)
        add(f"{block}.attn.proj", seen, seen)
        add(f"{block}.mlp.fc1", seen, 64)
        add(f"{block}.mlp.fc2", 64, seen)
        add_norm(f"{block}.norm1", seen)
        add_norm(f"{block}.norm2", seen)
        layer = f"blip.text_encoder.encoder.layer.{n}"
        for kind, source in (("attention", read), ("crossattention", seen)):
            add(f"{layer}.{kind}.self.query", read, read)
            add(f"{layer}.{kind}.self.key", source, read)
            add(f"{layer}.{kind}.self.value", source, read)
            add(f"{layer}.{kind}.output.dense", read, read)
            add_norm(f"{layer}.{kind}.output.LayerNorm", read)
        add(f"{layer}.intermediate.dense", read, 48)
        add(f"{layer}.output.dense", 48, read)
        add_norm(f"{layer}.output.LayerNorm", read)
    add_norm("blip.visual_encoder.norm", seen)
    add_norm("blip.text_encoder.embeddings.LayerNorm", read)
    for place, fan_in, fan_out in ((0, read, 16), (2, 16, 8), (4, 8, 6), (6, 6, 4), (7, 4, 1)):
        add(f"mlp.layers.{place}", fan_in, fan_out)
    state = random_state(shapes)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, tmp_path / "ImageReward.pt")
    weights = {"imagereward": tmp_path / "ImageReward.pt", "imagereward.tokenizer": tmp_path}
    metric = load_metric("imagereward", **weights)

    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    expected = [image_reward(w, image, tokenizer(prompt).input_ids) for image, prompt in zip(random_images(), PROMPTS)]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, rtol=1e-3, atol=1e-3)


def image_reward(w: dict, image: Image.Image, ids: list[int]) -> float:
    """Compute the reward without padding, whose part the attention mask has to remove."""
    pixels = to_input([crop_shorter_side(image, 28, 28, round)])[0]
    vision = "blip.visual_encoder."
    x = patches_of(pixels, w[f"{vision}patch_embed.proj.weight"]) + w[f"{vision}patch_embed.proj.bias"]
    x = np.concatenate([w[f"{vision}cls_token"][0], x]) + w[f"{vision}pos_embed"][0]
    for n in range(2):
        block = f"{vision}blocks.{n}"
        q, k, v = np.split(linear(layer_norm(x, w, f"{block}.norm1", 1e-6), w, f"{block}.attn.qkv"), 3, axis=-1)
        x = x + linear(attend(q, k, v, 16), w, f"{block}.attn.proj")
        hidden = gelu(linear(layer_norm(x, w, f"{block}.norm2", 1e-6), w, f"{block}.mlp.fc1"))
        x = x + linear(hidden, w, f"{block}.mlp.fc2")
    seen = layer_norm(x, w, f"{vision}norm", 1e-6)

    text = "blip.text_encoder."
    x = w[f"{text}embeddings.word_embeddings.weight"][ids]
    x = x + w[f"{text}embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(x, w, f"{text}embeddings.LayerNorm", 1e-12)
    for n in range(2):
        layer = f"{text}encoder.layer.{n}"
        for kind in ("attention", "crossattention"):
            source = x if kind == "attention" else seen
            q = linear(x, w, f"{layer}.{kind}.self.query")
            k = linear(source, w, f"{layer}.{kind}.self.key")
            v = linear(source, w, f"{layer}.{kind}.self.value")
            attended = linear(attend(q, k, v, 12), w, f"{layer}.{kind}.output.dense")
            x = layer_norm(x + attended, w, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        hidden = linear(gelu(linear(x, w, f"{layer}.intermediate.dense")), w, f"{layer}.output.dense")
        x = layer_norm(x + hidden, w, f"{layer}.output.LayerNorm", 1e-12)
    x = x[0]
    for place in (0, 2, 4, 6, 7):
        x = linear(x, w, f"mlp.layers.{place}")
    return (x[0] - 0.16717362830052426) / 1.0333394966054072


def test_code_in_a_weights_file_is_not_run(clip_folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"layers.0.weight": Trap()}, tmp_path / "head.pth")
    with pytest.raises(Exception, match="(?i)weights"):
        load_metric("aesthetic", **{"aesthetic": tmp_path / "head.pth", "aesthetic.clip": clip_folder})
    assert not (tmp_path / "trapped").exists()


class Brightness:
    """A metric of the user's own, for `--metrics test_evaluation:Brightness`: the mean red value."""

    scored = 0  # images, in all runs

    def __init__(self, device: str):
        assert device == "cpu"

    def score(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        Brightness.scored += len(images)
        return [float(np.asarray(image)[..., 0].mean()) for image in images]


class Short(Brightness):
    def score(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [1.0]


BRIGHTNESS = ["--metrics", "test_evaluation:Brightness", "--device=cpu"]


def save_square(path: Path, level: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, 0, 0)).save(path, **options)


def write_table(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_metric_of_the_users_own(tmp_path):
    for level in (10, 200):
        save_square(tmp_path / f"{level}.png", level)
        (tmp_path / f"{level}.txt").write_text("a red square\n")
    run(score, tmp_path, *BRIGHTNESS)
    rows = rows_of(tmp_path / "scores.jsonl")
    assert {row["path"]: row["score"] for row in rows} == {"10.png": 10.0, "200.png": 200.0}
    with pytest.raises(ValueError, match="test_evaluation:Short gave 1 scores for 2 images"):
        run(score, tmp_path, "--metrics", "test_evaluation:Short", "--device=cpu")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run(score, tmp_path, "--metrics", "no_such_module:Metric")


def test_check_prints_published_values_beside_ours(clip_folder, dino_folder, tmp_path, capsys):
    images = [*random_images(), *random_images(1)][:4]
    for number, image in enumerate(images, 1):
        image.save(tmp_path / f"{number}.webp", lossless=True)
    random_images(2)[0].save(tmp_path / "000000039769.jpg")
    weights = [f"clip={clip_folder}", f"dinov2={dino_folder}", f"siglip={tmp_path / 'nowhere'}"]
    with pytest.raises(ValueError, match="--check: clip, siglip, dinov2"):
        run(score, "--check", tmp_path, "--metrics", "clip", "siglip", "dinov2", "--device=cpu", "--weights", *weights)

    printed = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        printed[cells[1]] = cells[2:5]
    with torch.no_grad():
        ours = load_metric("clip", clip=clip_folder).score(images, [score.CHECK_PROMPT] * 4)
    assert printed["clip"][0] == ", ".join(f"{value:.4f}" for value in ours.tolist())
    assert printed["clip"][2] == "differs"  # it is a random model
    assert "nowhere" in printed["siglip"][0] and printed["siglip"][2] == "not loaded"
    assert printed["dinov2"][1:] == ["-2.1747, -0.4729, 1.0936", "differs"]


def test_check_without_a_network_says_what_to_download(clip_folder):
    with pytest.raises(ConnectionError, match="Download https://raw.*1.webp, .* pass their folder to --check"):
        run(score, "--check", "--metrics", "clip", "--device=cpu", "--weights", f"clip={clip_folder}")


class RedJudge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that rates an image by its red value, and prefers the redder one of two."""

    requests = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        RedJudge.requests.append(body)
        reds = []
        for part in body["messages"][0]["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                reds.append(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0])
        text = body["messages"][0]["content"][-1]["text"]
        tokens = []
        if len(reds) == 2:
            answer = "CHOICE: A" if reds[0] > reds[1] else "CHOICE: B"
        elif "yes or no" in text:
            answer = "Yes"
            likely = [("Yes", reds[0] / 255 + 1e-9), ("No", 1 - reds[0] / 255 + 1e-9)]
            tokens = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in likely]
            tokens = [tokens[0] | {"top_logprobs": tokens}]
        else:
            answer = f"RATING: {reds[0] // 25}" if reds[0] < 250 else "I refuse."
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": tokens}}
        reply = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def judge_flags():
    server = ThreadingHTTPServer(("127.0.0.1", 0), RedJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    RedJudge.requests.clear()
    yield [f"--api_base_url=http://127.0.0.1:{server.server_port}/v1", "--judge_model=red"]
    server.shutdown()
    server.server_close()


def test_judges_are_asked_once_and_refusals_again(tmp_path, judge_flags):
    rows = []
    for model, level in (("base", 100), ("tuned", 200), ("refused", 255)):
        save_square(tmp_path / f"{model}.png", level)
        rows.append({"model": model, "prompt": "a red square", "path": f"{model}.png"})
    write_table(tmp_path / "images.jsonl", rows)
    metrics_flags = ["--metrics", "judge", "pairwise", "vqa", "--base=base", "--judge_criterion=it is red"]
    run(score, tmp_path, *metrics_flags, *judge_flags)

    scores = {}
    for row in rows_of(tmp_path / "scores.jsonl"):
        scores.setdefault(row["metric"], {})[row["model"]] = row["score"]
    assert scores["judge"] == {"base": 4.0, "tuned": 8.0, "refused": None}
    assert scores["pairwise"] == {"base": 0.5, "tuned": 1.0, "refused": 1.0}
    assert scores["vqa"] == pytest.approx({"base": 100 / 255, "tuned": 200 / 255, "refused": 1.0})
    rating = next(body for body in RedJudge.requests if "RATING" in body["messages"][0]["content"][-1]["text"])
    text = rating["messages"][0]["content"][-1]["text"]
    assert "asked for: a red square" in text and "criterion only: it is red" in text
    assert len(RedJudge.requests) == 3 + 2 * 2 + 3  # both orders, and never the base with itself

    run(score, tmp_path, *metrics_flags, *judge_flags)
    assert len(RedJudge.requests) == 10 + 1


# ---- Statistics -----------------------------------------------------------------------------------------------------
def test_interval_of_single_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 900)
    low, high = compare.bootstrap_interval(values, range(900))
    error = values.std() / 30
    assert abs(low - (values.mean() - 1.96 * error)) < 0.1 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.1 * error


def test_interval_covers_as_often_as_it_says(monkeypatch):
    """It resamples whole prompts. Taking the seeds of a prompt as independent gives intervals that are too narrow."""
    monkeypatch.setattr(compare, "RESAMPLES", 999)
    random = np.random.default_rng(0)
    prompts = np.repeat(range(40), 4)
    covered = 0
    covered_by_seeds = 0
    for _ in range(400):
        values = 0.5 + np.repeat(random.standard_exponential(40) - 1, 4) + 0.3 * random.normal(size=160)
        low, high = compare.bootstrap_interval(values, prompts)
        covered += low <= 0.5 <= high
        low, high = compare.bootstrap_interval(values, range(160))
        covered_by_seeds += low <= 0.5 <= high
    assert 0.90 < covered / 400 < 0.98
    assert covered_by_seeds / 400 < 0.8


def test_interval_of_a_win_rate_of_100_percent_has_a_width():
    prompts = list(range(20)) * 2
    low, high = compare.win_rate_interval(np.ones(40), prompts)
    assert (low, high) == pytest.approx((0.025 ** (1 / 20), 1.0))
    low, high = compare.win_rate_interval(np.zeros(40), prompts)
    assert (low, high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))


def test_sign_flips_are_exact_for_few_prompts():
    differences = np.array([0.5, 1.5, -0.2, 0.4, 0.9, 0.1, 0.3])
    sums = np.array([2.0, -0.2, 0.4, 0.9, 0.1, 0.3])
    flipped = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean(np.array(flipped) >= abs(sums.sum()) - 1e-12)
    assert compare.sign_flip_p(differences, [0, 0, 1, 2, 3, 4, 5]) == pytest.approx(expected)
    assert compare.sign_flip_p(np.zeros(5), range(5)) == 1.0


def test_sign_flips_agree_with_the_t_test_on_many_prompts():
    differences = np.random.default_rng(1).normal(0.15, 1, 200)
    assert compare.sign_flip_p(differences, range(200)) == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.01)


# ---- compare.py -----------------------------------------------------------------------------------------------------
def write_scores(folder: Path, scores: dict[str, list[float | None]], metric: str = "style") -> None:
    """Write a folder as generate.py and score.py leave it, with two seeds of each prompt."""
    rows = common.JsonLines(folder / "scores.jsonl")
    for model, values in scores.items():
        for i, value in enumerate(values):
            path = f"images/{model}/{i}.png"
            save_square(folder / path, 20 * i)
            image = common.hash_content((folder / path).read_bytes())
            described = {"model": model, "prompt_id": i // 2, "seed": i % 2, "prompt": f"prompt {i // 2}"}
            rows.add({"metric": metric, **described, "path": path, "image": image, "score": value})


def read_results(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)["results"]


def test_report_by_hand(tmp_path):
    write_scores(tmp_path, {"base": [1, 2, 3, 4, 5, 6], "tuned": [2, 2, 5, 3, 6, None]})
    run(compare, tmp_path, "--base", "base")

    (result,) = read_results(tmp_path)
    assert (result["images"], result["prompts"], result["left_out"]) == (5, 3, 1)
    assert result["base_mean"] == 3.0 and result["mean"] == 3.6
    assert result["difference"] == pytest.approx(0.6)
    assert result["win_rate"] == pytest.approx((1 + 0.5 + 1 + 0 + 1) / 5)
    assert result["p"] == result["p_holm"] == pytest.approx(0.25)  # sums 1, 1, 1: 2 of 8 flips are as far out
    report = (tmp_path / "report.md").read_text()
    assert "| metric | base | tuned | difference (95 %) | tuned wins (95 %) | p |" in report
    assert "| style | 3 | 3.6 | +0.6 (" in report and "| 3 prompts x 1.67 seeds |" in report


def test_p_is_corrected_for_all_tests_of_the_report(tmp_path):
    write_scores(tmp_path, {"base": [0] * 12, "a": [1, 2, 3, 4] * 3, "b": [1, -1, 2, 0, 1, 1] * 2, "c": [-1, 1] * 6})
    run(compare, tmp_path, "--base", "base")
    by_model = {result["model"]: result for result in read_results(tmp_path)}
    p = {model: result["p"] for model, result in by_model.items()}
    assert p["a"] < p["b"] < p["c"] == 1
    assert by_model["a"]["p_holm"] == pytest.approx(3 * p["a"])
    assert by_model["b"]["p_holm"] == pytest.approx(max(3 * p["a"], 2 * p["b"]))
    assert by_model["c"]["p_holm"] == 1


def test_one_prompt_has_no_interval(tmp_path):
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    run(compare, tmp_path, "--base", "base")
    (result,) = read_results(tmp_path)
    assert result["difference_interval"] is None and result["p"] == 1.0 and result["win_rate"] == 0.5


def test_page_is_self_contained_and_takes_prompts_as_text(tmp_path):
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    path = tmp_path / "scores.jsonl"
    path.write_text(path.read_text().replace('"prompt 0"', json.dumps(evil)))
    run(compare, tmp_path, "--base", "base")

    page = (tmp_path / "report.html").read_text()
    assert evil not in page and page.count("<script") == 2
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|images/)""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    (row,) = [row for row in data["rows"] if row["seed"] == 0]
    assert row["prompt"] == evil and row["images"]["tuned"].startswith("data:image/webp;base64,")
    assert row["scores"]["style"] == {"base": 1, "tuned": 3}


def test_compare_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="scores.jsonl doesn't exist. Run score.py first"):
        run(compare, tmp_path, "--base", "base")
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    with pytest.raises(ValueError, match="--base nobody: there are only scores of base, tuned"):
        run(compare, tmp_path, "--base", "nobody")
    with pytest.raises(ValueError, match="--metrics clip: there are only scores of style"):
        run(compare, tmp_path, "--base", "base", "--metrics", "clip")


def test_compare_refuses_scores_of_other_images(tmp_path):
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    save_square(tmp_path / "images" / "tuned" / "0.png", 99)
    with pytest.raises(ValueError, match="tuned/0.png isn't the image that was scored. Run score.py again"):
        run(compare, tmp_path, "--base", "base")


# ---- generate.py ----------------------------------------------------------------------------------------------------
def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def write_prompts(path: Path, *prompts: str) -> str:
    path.write_text("".join(prompt + "\n" for prompt in prompts))
    return f"--prompts={path}"


def shift_unet(model: Path) -> None:
    """Change the weights of a model's UNet, as training does, without a change of a name or a config."""
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"] += 0.3
    save_file(state, path)


def test_same_noise_for_every_model_batch_and_run(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt", "rocket", "red apple", "grinning face")
    flags = [prompts, "--seeds", 0, 1, *GENERATE]
    run(generate, *flags, "--models", f"a={MODEL}", f"b={MODEL}", f"--output_dir={tmp_path / 'x'}")
    moved = write_prompts(tmp_path / "moved.txt", "red apple", "rocket")
    run(generate, moved, *GENERATE, "--models", f"a={MODEL}", "--batch_size=1", f"--output_dir={tmp_path / 'y'}")

    first = pixels_of(tmp_path / "x" / "images" / "a" / "00001-0.png")
    assert first.shape == (64, 64, 3) and first.std() > 10  # the model's own size
    assert (first == pixels_of(tmp_path / "x" / "images" / "b" / "00001-0.png")).all()
    assert np.abs(first - pixels_of(tmp_path / "y" / "images" / "a" / "00000-0.png")).max() <= 1
    assert np.abs(first - pixels_of(tmp_path / "x" / "images" / "a" / "00001-1.png")).mean() > 5
    rows = rows_of(tmp_path / "x" / "images.jsonl")
    assert len(rows) == len({row["path"] for row in rows}) == 12
    expected = {"prompt": "red apple", "model": "a", "prompt_id": 1, "seed": 1, "path": "images/a/00001-1.png"}
    assert expected.items() <= rows[4].items()
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["torch"] == torch.__version__ and manifest["models"]["b"] == {"base": str(MODEL)}

    more = [*flags, "--models", f"a={MODEL}", f"--output_dir={tmp_path / 'x'}"]
    with pytest.raises(ValueError, match="holds images with num_inference_steps 2, not 3. Name another folder"):
        run(generate, *more, "--num_inference_steps=3")
    with pytest.raises(ValueError, match="holds images of other prompts, such as 'rocket' in place 0"):
        run(generate, *more, moved)


def test_lora_unet_and_embeddings_reach_the_images(tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.3
    pipeline.unet.save_pretrained(tmp_path / "unet")
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    embeddings = {
        "clip_l": torch.randn(2, pipeline.text_encoder.config.hidden_size),
        "clip_g": torch.randn(2, pipeline.text_encoder_2.config.hidden_size),
    }
    save_file(embeddings, tmp_path / "embeds.safetensors")

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "<a> beside <b>", "base_prompt": "dog beside cat"}\n')
    lora = f"{MODEL},lora={tmp_path / 'lora'}"
    words = f"embeddings={tmp_path / 'embeds.safetensors'}"
    models = {
        "base": MODEL,
        "full": f"{MODEL},unet={tmp_path / 'unet'}",
        "lora": lora,
        "none": f"{lora}@0",
        "both": f"{lora},{words},tokens=<a>+<b>",
    }
    flags = [f"--prompts={tmp_path / 'prompts.jsonl'}", *GENERATE, f"--output_dir={tmp_path}", "--models"]
    run(generate, *flags, *[f"{name}={model}" for name, model in models.items()])

    generated = {name: pixels_of(tmp_path / "images" / name / "00000-0.png") for name in models}
    assert (generated["none"] == generated["base"]).all()
    for a, b in itertools.combinations(("base", "full", "lora", "both"), 2):
        assert np.abs(generated[a] - generated[b]).mean() > 1, (a, b)
    rows = {row["model"]: row for row in rows_of(tmp_path / "images.jsonl")}
    assert rows["both"]["model_prompt"] == "<a> beside <b>" and rows["lora"]["model_prompt"] == "dog beside cat"
    # All are scored against the same text.
    assert {row["prompt"] for row in rows.values()} == {"dog beside cat"}

    # Only the scale changes, which no file knows.
    run(generate, *flags, f"lora={lora}@0.2")
    rescaled = pixels_of(tmp_path / "images" / "lora" / "00000-0.png")
    assert (rescaled != generated["lora"]).any()

    with pytest.raises(ValueError, match="embeddings of 2 tokens, but tokens=<a> names 1"):
        run(generate, *flags, f"bad={MODEL},{words},tokens=<a>")


def test_a_retrained_model_gives_new_images_and_scores(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.txt", "rocket", "red apple")
    flags = [prompts, *GENERATE, f"--output_dir={out}", "--models", f"tuned={model}"]
    run(generate, *flags, "--seeds", 0, 1)
    run(score, out, *BRIGHTNESS)
    before = {path.name: path.read_bytes() for path in (out / "images" / "tuned").iterdir()}
    scores_before = {row["path"]: row["score"] for row in rows_of(out / "scores.jsonl")}

    run(generate, *flags, "--seeds", 0, 1)
    assert all((out / "images" / "tuned" / name).read_bytes() == data for name, data in before.items())
    scored = Brightness.scored
    run(score, out, *BRIGHTNESS)
    assert Brightness.scored == scored

    shift_unet(model)
    run(generate, *flags, "--seeds", 0)  # the images of seed 1 must not stay those of the old model
    assert all((out / "images" / "tuned" / name).read_bytes() != data for name, data in before.items())
    assert len(rows_of(out / "images.jsonl")) == 4
    run(score, out, *BRIGHTNESS)
    rows = rows_of(out / "scores.jsonl")
    assert len(rows) == 4 and all(row["score"] != scores_before[row["path"]] for row in rows)


def test_models_that_make_no_sense_are_refused(tmp_path, capsys):
    for model, message in {
        str(MODEL): "isn't NAME=PIPELINE",
        "a=no/such/folder/at/all": "no/such/folder/at/all doesn't exist",
        f"a={MODEL},lora": "'lora' is none of unet=, lora=",
        f"a={MODEL},tokens=<a>": "embeddings= and tokens= need each other",
    }.items():
        with pytest.raises(SystemExit):
            run(generate, "--prompts=p.txt", f"--output_dir={tmp_path}", "--models", model)
        assert message in capsys.readouterr().err


def test_a_prompt_of_300_words_is_warned_about_and_generated(tmp_path, caplog):
    prompts = write_prompts(tmp_path / "prompts.txt", "rocket", "very " * 299 + "long")
    run(generate, prompts, *GENERATE, f"--output_dir={tmp_path}", "--models", f"a={MODEL}")
    assert "1 prompts have more than 24 tokens" in caplog.text
    assert len(rows_of(tmp_path / "images.jsonl")) == 2


def test_line_separators_of_unicode_are_part_of_a_prompt(tmp_path):
    """str.splitlines splits at U+2028 and U+0085, and json.dumps leaves them in a row."""
    prompts = ["red\u2028apple", "rock\u0085et"]
    flag = write_prompts(tmp_path / "prompts.txt", *prompts)
    run(generate, flag, *GENERATE, f"--output_dir={tmp_path}", "--models", f"a={MODEL}")
    run(score, tmp_path, *BRIGHTNESS)
    assert [row["prompt"] for row in rows_of(tmp_path / "scores.jsonl")] == prompts


def test_killed_generate_and_score_lose_and_repeat_nothing(tmp_path):
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.txt", *[f"red apple {i}" for i in range(12)])
    flags = [prompts, "--num_inference_steps=8", "--batch_size=1", "--device=cpu", f"--output_dir={out}"]
    flags += ["--models", f"base={MODEL}"]
    command = [sys.executable, str(REPO / "evaluation" / "generate.py"), *flags]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = out / "images.jsonl"
    deadline = time.monotonic() + 300
    while not log.exists() or len(log.read_bytes().split(b"\n")) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (out / "images" / "base").glob("[0-9]*.png")}
    logged = len(log.read_bytes().split(b"\n")) - 1
    assert 3 <= logged < 12
    with open(log, "a") as file:
        file.write('{"prompt": "red ap')  # what a kill within a write leaves

    run(generate, *flags)
    assert sorted(row["prompt_id"] for row in rows_of(log)) == list(range(12))
    unchanged = [path for path, time_ns in before.items() if path.stat().st_mtime_ns == time_ns]
    assert len(unchanged) >= logged  # an image that wasn't logged yet is generated again

    run(score, out, *BRIGHTNESS)
    whole = (out / "scores.jsonl").read_bytes()
    (out / "scores.jsonl").unlink()
    cache = out / "scores.cache.jsonl"
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:5]) + lines[5][:40])
    scored = Brightness.scored
    run(score, out, *BRIGHTNESS)
    assert (out / "scores.jsonl").read_bytes() == whole and Brightness.scored == scored + 7


# ---- score.py -------------------------------------------------------------------------------------------------------
def agreement_of(output: Path) -> dict:
    (result,) = json.loads(output.with_suffix(".agreement.json").read_text()).values()
    return result


def test_score_agrees_with_the_labels_of_the_demo(tmp_path, capsys, monkeypatch):
    # The working folder holds an unfinished training run in the default --output_dir.
    (tmp_path / "diffusion-mapo-sdxl" / "checkpoint-2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "pairs.jsonl"
    run(score, f"--pairs={PAIRS}", "--split=test", "--metrics", "style", f"--output={output}", "--device=cpu")

    rows = rows_of(output)
    chosen = np.array([row["score"] for row in rows if row["model"] == "chosen"])
    rejected = np.array([row["score"] for row in rows if row["model"] == "rejected"])
    share = np.mean(chosen > rejected)
    result = agreement_of(output)
    assert result["pairs"] == len(chosen) == 49 and result["agreement"] == pytest.approx(share) and share > 0.9
    assert result["low"] <= share <= result["high"]
    assert f"style: agrees with {share:.1%} of 49 labels" in capsys.readouterr().out


def test_scores_belong_to_images_not_to_rows_or_paths(tmp_path):
    """Swapped labels, a row put in front, and another split, all with the same --output."""
    table = pq.read_table(PAIRS / "train.parquet").slice(0, 6)
    path = tmp_path / "pairs.parquet"
    output = tmp_path / "scores.jsonl"
    flags = [f"--pairs={path}", "--metrics", "style", f"--output={output}", "--device=cpu"]
    pq.write_table(table, path)
    run(score, *flags)
    by_image = {row["image"]: row["score"] for row in rows_of(output)}
    right = agreement_of(output)["agreement"]

    swapped = table.to_pydict()
    swapped["label_0"], swapped["label_1"] = swapped["label_1"], swapped["label_0"]
    pq.write_table(type(table).from_pydict(swapped), path)
    run(score, *flags)
    assert agreement_of(output)["agreement"] == pytest.approx(1 - right) and right != 0.5

    pq.write_table(pq.read_table(PAIRS / "train.parquet").slice(6, 7), path)
    run(score, *flags)
    rows = rows_of(output)
    assert len(rows) == 14 and not {row["image"] for row in rows} & by_image.keys()

    for level in (50, 100):
        save_square(tmp_path / f"{level}.png", level)
    images = tmp_path / "images.csv"
    flags = [images, *BRIGHTNESS, f"--output={tmp_path / 'images.scores.jsonl'}"]
    images.write_text("caption,image\nred square,50.png\n")
    run(score, *flags)
    images.write_text("caption,image\nred square,100.png\nred square,50.png\n")
    run(score, *flags)
    assert [row["score"] for row in rows_of(tmp_path / "images.scores.jsonl")] == [100.0, 50.0]
    save_square(tmp_path / "50.png", 70)
    run(score, *flags)
    assert [row["score"] for row in rows_of(tmp_path / "images.scores.jsonl")] == [100.0, 70.0]


def test_other_weights_at_the_same_path_give_other_scores(tmp_path):
    weights = tmp_path / "judge.safetensors"
    state = load_file(REPO / "demo" / "style_judge.safetensors")
    save_file(state, weights)
    save_square(tmp_path / "0.png", 200)
    (tmp_path / "0.txt").write_text("red square")
    flags = [tmp_path, "--metrics", "style", "--weights", f"style={weights}", "--device=cpu"]
    run(score, *flags)
    (before,) = rows_of(tmp_path / "scores.jsonl")
    state["head.1.bias"] += torch.arange(4).to(state["head.1.bias"].dtype)
    save_file(state, weights)
    run(score, *flags)
    (after,) = rows_of(tmp_path / "scores.jsonl")
    assert after["score"] != before["score"]


def test_metrics_can_be_added_later(tmp_path):
    save_square(tmp_path / "0.png", 200)
    (tmp_path / "0.txt").write_text("red square")
    run(score, tmp_path, *BRIGHTNESS)
    run(score, tmp_path, "--metrics", "style", "--device=cpu")
    assert [row["metric"] for row in rows_of(tmp_path / "scores.jsonl")] == ["test_evaluation:Brightness", "style"]


def test_score_names_the_image_that_it_cannot_read(tmp_path):
    save_square(tmp_path / "red.png", 200)
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:30])
    table = tmp_path / "table.csv"
    table.write_text("caption,image\nred square,red.png\nred square,torn.png\n")
    with pytest.raises(ValueError, match="torn.png: the image can't be read"):
        run(score, table, *BRIGHTNESS, f"--output={tmp_path / 's.jsonl'}")


def test_colors_are_read_as_training_reads_them(tmp_path):
    """A photo's profile says which red (200, 60, 50) is. Without it, the red would score 200."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    swapped = bytearray(profile.tobytes())
    # Exchange the red and the green primary of sRGB: rXYZ and gXYZ name their tags in the profile.
    swapped = bytes(swapped).replace(b"rXYZ", b"tmp!").replace(b"gXYZ", b"rXYZ").replace(b"tmp!", b"gXYZ")
    image = Image.new("RGB", (16, 16), (200, 0, 0))
    image.save(tmp_path / "0.png", icc_profile=swapped)
    (tmp_path / "0.txt").write_text("a green square")
    run(score, tmp_path, *BRIGHTNESS)
    (row,) = rows_of(tmp_path / "scores.jsonl")
    assert row["score"] < 10


def test_folders_of_images(tmp_path, capsys):
    save_square(tmp_path / "within" / "0.JPG", 200)
    (tmp_path / "within" / "0.caption").write_text("red square", encoding="utf-16")
    save_square(tmp_path / ".ipynb_checkpoints" / "0.png", 200)
    (tmp_path / "phone.heic").write_bytes(b"not an image that Pillow reads")
    run(score, tmp_path, *BRIGHTNESS)
    (row,) = rows_of(tmp_path / "scores.jsonl")
    assert row["path"] == "within/0.JPG" and row["prompt"] == "red square"
    assert "phone.heic" in capsys.readouterr().out  # what is left out is named

    (tmp_path / "within" / "0.caption").write_text("Äpfel", encoding="cp1252")
    with pytest.raises(ValueError, match="0.caption"):
        run(score, tmp_path, *BRIGHTNESS)


def test_prompts_of_every_kind_of_table(tmp_path):
    """A byte order mark is no part of a prompt, and what looks like a number or like nothing stays text."""
    for name, text in {
        "p.txt": "red square\nNA\n0123\n",
        "p.csv": "prompt\nred square\nNA\n0123\n",
        "p.jsonl": '{"prompt": "red square"}\n{"prompt": "NA"}\n{"prompt": "0123"}\n',
        "p.json": '["red square", "NA", "0123"]',
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        prompts = common.load_prompts(str(tmp_path / name))
        assert [row["prompt"] for row in prompts] == ["red square", "NA", "0123"]


def test_bad_prompts_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for text, message in {
        '{"prompt": "rocket"}\n{"prompt": " "}\n': "row 1",
        '{"prompt": "rocket"}\n{"prompt": null}\n': "row 1",
        '{"prompt": "rocket \\ud83d"}\n': "row 0",
        '{"words": "rocket"}\n': "words",
        "": "prompts.jsonl",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            common.load_prompts(str(path))


# ---- reference_mismatch.py ------------------------------------------------------------------------------------------
def test_mismatch_is_measured_from_images_not_from_paths(tmp_path, dino_folder):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    out = tmp_path / "out"
    pq.write_table(pq.read_table(PAIRS / "test.parquet").slice(0, 3), tmp_path / "pairs.parquet")
    flags = [f"--model={model}", *GENERATE, f"--dinov2={dino_folder}", f"--output_dir={out}"]
    flags += ["--tasks", f"style={tmp_path / 'pairs.parquet'}"]
    run(reference_mismatch, *flags)
    (first,) = read_results(out)

    metric = load_metric("dinov2", dinov2=dino_folder)
    similarities = []
    chosen = {}
    for row in pq.read_table(tmp_path / "pairs.parquet").to_pylist():
        chosen[row["caption"]] = row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"]
    for row in rows_of(out / "images.jsonl"):
        images = [Image.open(out / row["path"]), Image.open(io.BytesIO(chosen[row["caption"]])).convert("RGB")]
        a, b = metric.embed_images(images).double().numpy()
        similarities.append(a @ b)
    assert len(similarities) == 3 and first["similarity"] == pytest.approx(np.mean(similarities), abs=1e-5)

    before = (out / "similarities.jsonl").read_bytes()
    run(reference_mismatch, *flags)
    assert (out / "similarities.jsonl").read_bytes() == before

    shift_unet(model)
    run(reference_mismatch, *flags)
    (second,) = read_results(out)
    assert second["similarity"] != first["similarity"]


def test_mismatch_loads_its_feature_extractor_before_it_generates(tmp_path):
    flags = [f"--model={MODEL}", *GENERATE, f"--dinov2={tmp_path / 'nowhere'}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(OSError, match="nowhere"):
        run(reference_mismatch, *flags, "--tasks", f"style={PAIRS}:test")
    assert not (tmp_path / "out").exists()


def test_beta_is_placed_between_the_papers_tasks():
    measured = [{"task": "preference", "similarity": 0.8}, {"task": "style", "similarity": 0.5}]
    assert reference_mismatch.hint_beta(0.6, measured) == "8 (preference) to 64 (style)"
    assert reference_mismatch.hint_beta(0.9, measured) == "8 (preference) or less"
    assert reference_mismatch.hint_beta(0.1, measured) == "64 (style) or more"
    assert reference_mismatch.hint_beta(0.5, measured) == "64 (style)"
    assert reference_mismatch.hint_beta(0.1, []) == "none of the paper's tasks was measured"


# ---- export_layouts.py ----------------------------------------------------------------------------------------------
def test_geneval_layout(tmp_path):
    """The layout is the one that GenEval's README documents and its evaluate_images.py reads."""
    metadata = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "colors",
            "include": [{"class": "bowl", "count": 1, "color": "red"}],
            "prompt": "a photo of a red bowl",
        },
    ]
    write_table(tmp_path / "evaluation_metadata.jsonl", metadata)
    flags = [f"--prompts={tmp_path / 'evaluation_metadata.jsonl'}", *GENERATE, f"--output_dir={tmp_path / 'g'}"]
    run(generate, *flags, "--seeds", 0, 1, 2, "--models", f"m={MODEL}")
    run(export_layouts, tmp_path / "g", "--model=m", "--layout=geneval", f"--output_dir={tmp_path / 'out'}")

    assert sorted(os.listdir(tmp_path / "out")) == ["00000", "00001"]
    for i, row in enumerate(metadata):
        folder = tmp_path / "out" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        assert sorted(os.listdir(folder / "samples")) == ["0000.png", "0001.png", "0002.png"]
        for seed in range(3):
            source = tmp_path / "g" / "images" / "m" / f"{i:05d}-{seed}.png"
            assert (folder / "samples" / f"{seed:04d}.png").read_bytes() == source.read_bytes()


def test_compbench_layout(tmp_path):
    """A name is the prompt, an underscore and a number over all prompts in six digits."""
    prompts = ["a green bench and a blue bowl", "The red hat was on top of the brown coat."]
    flag = write_prompts(tmp_path / "color_val.txt", f"{prompts[0]}\tgreen bench", prompts[1])
    run(generate, flag, *GENERATE, "--seeds", 0, 1, "--models", f"m={MODEL}", f"--output_dir={tmp_path / 'g'}")
    export = [tmp_path / "g", f"--output_dir={tmp_path / 'out'}"]
    run(export_layouts, *export, "--model=m", "--layout=t2i-compbench")

    expected = []
    for number, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        expected.append(f"{prompt}_{number:06d}.png")
    assert sorted(os.listdir(tmp_path / "out" / "samples")) == sorted(expected)
    with pytest.raises(FileExistsError, match="Name a new folder"):
        run(export_layouts, *export, "--model=m", "--layout=t2i-compbench")
    other = [tmp_path / "g", f"--output_dir={tmp_path / 'other'}", "--layout=geneval"]
    with pytest.raises(ValueError, match="has no tag. Generate from the prompts in GenEval's"):
        run(export_layouts, *other, "--model=m")
    with pytest.raises(ValueError, match="--model x: .* has images of m"):
        run(export_layouts, *other, "--model=x")
    assert not (tmp_path / "other").exists()
