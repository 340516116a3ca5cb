"""evaluation/: metrics against float64 arithmetic, statistics against closed forms, the scripts on the demo."""

import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_model
import torch
from conftest import REPO, rows_of, start
from evaluation import common, compare, export_layouts, generate, metrics, reference_mismatch, score
from PIL import Image
from safetensors.torch import save_file
from scipy.special import erf


pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, TEST_PAIRS = str(small_model.MODEL), str(small_model.PAIRS)
PROMPTS = ["a red apple", "rocket", "grinning face with smiling eyes"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def run(script, *flags) -> None:
    script.main(script.parse_args([str(flag) for flag in flags]))


def error_line(process: subprocess.Popen) -> str:
    """The last line that a run which failed has to say; no traceback before it."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in said, said
    return said.strip().splitlines()[-1]


def random_images(seed: int = 0) -> list[Image.Image]:
    """Wide, tall and square."""
    noise = np.random.default_rng(seed)
    shapes = ((40, 71), (90, 53), (64, 64))
    images = [Image.fromarray(noise.integers(0, 256, (3, 3, 3), dtype=np.uint8)) for _ in shapes]
    return [image.resize(shape[::-1], Image.Resampling.BICUBIC) for image, shape in zip(images, shapes)]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights at which every part of the model shows in the output; default ones are too small for that."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=noise) + norm
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Small models in the files' real format
# ---------------------------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(MODEL) / "tokenizer")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = save_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = sizes | {"image_size": 28, "patch_size": 14}
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), seed=3)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def metric_args(**weights) -> SimpleNamespace:
    return SimpleNamespace(device="cpu", weights=metrics.WEIGHTS | {k: str(v) for k, v in weights.items()})


def crop_shorter_side(image: Image.Image, resize: int, crop: int, half=math.floor) -> np.ndarray:
    """(crop, crop, 3) in [0, 1]. `half` rounds half of the surplus: transformers down (PickScore, DINOv2), torchvision
    to the even number (OpenAI's CLIP, the Aesthetic predictor, ImageReward)."""
    shorter, longer = sorted(image.size)
    sides = [resize if side == shorter else int(resize * longer / shorter) for side in image.size]
    resized = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
    top, left = half((resized.shape[0] - crop) / 2), half((resized.shape[1] - crop) / 2)
    return resized[top : top + crop, left : left + crop] / 255


def to_input(pixels: list[np.ndarray], mean=MEAN, std=STD) -> np.ndarray:
    return ((np.stack(pixels) - mean) / std).transpose(0, 3, 1, 2)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a, b = a.detach().double().numpy(), b.detach().double().numpy()
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def raw_features(model, metric, half=round) -> tuple[torch.Tensor, torch.Tensor]:
    """From pixels and tokens that were prepared here, one by one, without padding."""
    pixels = to_input([crop_shorter_side(image, 28, 28, half) for image in random_images()])
    seen = model.get_image_features(pixel_values=torch.from_numpy(pixels).float()).pooler_output
    tokens = [torch.tensor([metric.tokenizer(prompt).input_ids]) for prompt in PROMPTS]
    return seen, torch.cat([model.get_text_features(input_ids=ids).pooler_output for ids in tokens])


# ---------------------------------------------------------------------------------------------------------------------
# The metrics
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "pickscore"])
@torch.no_grad()
def test_clip_score_and_pickscore(clip_folder, name):
    metric = metrics.load_metric(name, metric_args(**{name: clip_folder, "pickscore.processor": clip_folder}))

    half = round if name == "clip" else math.floor
    for sign in (1, -1):  # CLIP score cuts at 0, PickScore doesn't
        metric.model.visual_projection.weight *= sign
        cos = cosines(*raw_features(metric.model, metric, half))
        assert np.ptp(cos) > 0.05 and (np.sign(cos) == sign).all()
        expected = 100 * np.maximum(cos, 0) if name == "clip" else np.exp(np.log(100)) * cos
        np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=2e-3)

    pixels = to_input([crop_shorter_side(image, 28, 28, half) for image in random_images()])
    np.testing.assert_allclose(metric.prepare(random_images()), pixels, atol=1e-5)


def test_half_a_surplus_of_the_centre_crop_is_rounded_as_torchvision_does():
    """832 x 1216 becomes 224 x 327: a surplus of 103, whose half torchvision rounds to 52 and transformers to 51."""
    stripes = np.repeat(np.repeat(np.arange(1216)[:, None, None] % 256, 832, 1), 3, 2).astype(np.uint8)
    for image in (Image.fromarray(stripes), Image.fromarray(stripes.transpose(1, 0, 2))):
        expected = crop_shorter_side(image, 224, 224, round)
        np.testing.assert_allclose(metrics.crop_to_square(image, 224).permute(1, 2, 0), expected, atol=1e-6)
        assert np.abs(expected - crop_shorter_side(image, 224, 224)).max() > 0.003


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_text_is_cleaned_as_openais_code_does(clip_folder, name):
    """Whose steps are ftfy and html.unescape, twice; PickScore's authors use transformers, which has neither."""
    args = metric_args(clip=clip_folder, pickscore=clip_folder, **{"pickscore.processor": clip_folder})
    dirty, clean = ["the corgi’s “ball”", "salt &amp;amp; pepper"], ['the corgi\'s "ball"', "salt & pepper"]
    metric = metrics.load_metric("clip", args)
    if name == "hps":  # the same method on a model without the checkpoint's renaming
        metric.__class__ = metrics.Hps
    assert torch.equal(metric.embed_prompts(dirty), metric.embed_prompts(clean))
    pickscore = metrics.load_metric("pickscore", args)
    assert not torch.allclose(pickscore.embed_prompts(dirty), pickscore.embed_prompts(clean))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@torch.no_grad()
def test_aesthetic(clip_folder, tmp_path, suffix):
    sizes, noise = (16, 12, 8, 6, 4, 1), torch.Generator().manual_seed(1)
    state = {}
    for place, fan_in, fan_out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):  # dropout has the other numbers
        state[f"layers.{place}.weight"] = torch.randn(fan_out, fan_in, generator=noise)
        state[f"layers.{place}.bias"] = torch.randn(fan_out, generator=noise)
    path = tmp_path / f"head.{suffix}"
    (torch.save if suffix == "pth" else save_file)(state, path)
    metric = metrics.load_metric("aesthetic", metric_args(**{"aesthetic": path, "aesthetic.clip": clip_folder}))

    x = raw_features(metric.model, metric)[0].double().numpy()
    x /= np.sqrt((x**2).sum(1, keepdims=True))
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{place}.weight"].double().numpy().T + state[f"layers.{place}.bias"].double().numpy()
    assert np.ptp(x) > 0.1
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), x[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_siglip(tmp_path):
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tokenizer = save_tokenizer(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    model = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    model.logit_scale.data.fill_(1.0)
    model.logit_bias.data.fill_(-0.5)
    model.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    metric = metrics.load_metric("siglip", metric_args(siglip=tmp_path))

    squeezed = [np.asarray(p.resize((28, 28), Image.Resampling.BICUBIC)) / 255 for p in random_images()]
    pixels = to_input(squeezed, 0.5, 0.5)
    np.testing.assert_allclose(metric.prepare(random_images()), pixels, atol=1e-5)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (16 - len(row)) for row in ids])
    seen = model.eval().get_image_features(pixel_values=torch.from_numpy(pixels).float()).pooler_output
    cos = cosines(seen, model.get_text_features(input_ids=padded).pooler_output)
    expected = 100 / (1 + np.exp(-(math.e * cos - 0.5)))
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=1e-3)


@torch.no_grad()
def test_dinov2(dino_folder):
    args = metric_args(dinov2=dino_folder)
    args.references = random_images(seed=7)[:2]
    metric = metrics.load_metric("dinov2", args)

    def embed(images):
        pixels = to_input([crop_shorter_side(p, 32, 28) for p in images], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        np.testing.assert_allclose(metric.prepare(images), pixels, atol=1e-5)
        hidden = metric.model(pixel_values=torch.from_numpy(pixels).float()).last_hidden_state
        return hidden[:, 0].double().numpy()

    images, references = embed(random_images()), embed(args.references)
    expected = [np.mean([p @ r / np.linalg.norm(p) / np.linalg.norm(r) for r in references]) for p in images]
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=1e-5)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    randomise(Dinov2Model(Dinov2Config(**sizes))).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    ).save_pretrained(folder)
    return folder


# open_clip's and BLIP's networks in float64, written from their checkpoints' names alone.


def layer_norm(x: np.ndarray, state: dict, name: str, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, mask=0.0) -> np.ndarray:
    q, k, v = (x.reshape(len(x), heads, -1).transpose(1, 0, 2) for x in (q, k, v))
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]) + mask
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def patches_of(pixels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(3, H, W), (D, 3, p, p) -> (patches, D)"""
    p, (_, height, width) = weight.shape[-1], pixels.shape
    boxes = pixels.reshape(3, height // p, p, width // p, p).transpose(1, 3, 0, 2, 4)
    return boxes.reshape(-1, 3 * p * p) @ weight.reshape(len(weight), -1).T


def open_clip_blocks(x: np.ndarray, state: dict, prefix: str, layers: int, mask=0.0) -> np.ndarray:
    for n in range(layers):
        block = f"{prefix}transformer.resblocks.{n}"
        q, k, v = np.split(
            layer_norm(x, state, f"{block}.ln_1", 1e-5) @ state[f"{block}.attn.in_proj_weight"].T
            + state[f"{block}.attn.in_proj_bias"],
            3,
            axis=-1,
        )
        x = x + linear(attend(q, k, v, 16, mask), state, f"{block}.attn.out_proj")
        x = x + linear(
            gelu(linear(layer_norm(x, state, f"{block}.ln_2", 1e-5), state, f"{block}.mlp.c_fc")),
            state,
            f"{block}.mlp.c_proj",
        )
    return x


def random_state(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=noise) + (len(shape) == 1) * 0.5 for name, shape in shapes.items()
    }


def bicubic_weights(before: int, after: int) -> np.ndarray:
    """Keys' kernel with a = -1/2, widened by the scale where it shrinks. (after, before)"""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale - 0.5
    x = np.abs(np.arange(before) - centres[:, None]) / max(scale, 1)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


def black_bars(image: Image.Image, side: int) -> np.ndarray:
    """HPS: the longer side to `side` in floats that nothing cuts at 0 and 1, zeros around. (side, side, 3)"""
    width, height = (round(length * side / max(image.size)) for length in image.size)
    canvas = np.zeros((side, side, 3))
    top, left = (side - height) // 2, (side - width) // 2
    rows, columns = bicubic_weights(image.height, height), bicubic_weights(image.width, width)
    channels = np.asarray(image).transpose(2, 0, 1) / 255
    canvas[top : top + height, left : left + width] = (rows @ channels @ columns.T).transpose(1, 2, 0)
    return canvas


def test_hps_resizes_floats():
    checks = Image.fromarray(((np.indices((300, 448)) // 20).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    for image in (*random_images(), checks, checks.resize((224, 100)), checks.resize((100, 90))):
        expected = black_bars(image, 224)
        np.testing.assert_allclose(metrics.pad_to_square(image, 224).permute(1, 2, 0), expected, atol=2e-5)
    assert black_bars(checks, 224).min() < -0.02 and black_bars(checks, 224).max() > 1.02


@torch.no_grad()
def test_hps_reads_open_clips_checkpoint(clip_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
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
    shapes = {"positional_embedding": (24, 32), "text_projection": (32, 16), "logit_scale": ()}
    shapes |= {"visual.class_embedding": (32,), "visual.positional_embedding": (5, 32), "visual.proj": (32, 16)}
    shapes |= {"visual.conv1.weight": (32, 3, 14, 14), "token_embedding.weight": (len(tokenizer), 32)}
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    for prefix, layers in (("", 3), ("visual.", 2)):
        for n in range(layers):
            shapes |= {f"{prefix}transformer.resblocks.{n}.{name}": shape for name, shape in block.items()}
    state = random_state(shapes)
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    args = metric_args(**{"hps": tmp_path / "HPS_v2.1_compressed.pt", "hps.processor": clip_folder})
    metric = metrics.load_metric("hps", args)

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
        x = open_clip_blocks(x, w, "", 3, np.triu(np.full((len(ids), len(ids)), -np.inf), 1))
        read = layer_norm(x[np.argmax(ids)], w, "ln_final", 1e-5) @ w["text_projection"]
        expected.append(100 * seen @ read / np.linalg.norm(seen) / np.linalg.norm(read))
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=1e-3)


@torch.no_grad()
def test_image_reward_reads_its_own_checkpoint(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    seen, read = 32, 24  # widths, multiples of BLIP L's 16 heads and of BERT's 12
    shapes = {"blip.visual_encoder.cls_token": (1, 1, seen), "blip.visual_encoder.pos_embed": (1, 5, seen)}
    shapes |= {"blip.visual_encoder.patch_embed.proj.weight": (seen, 3, 14, 14)}

    def add(name: str, fan_in: int, fan_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (fan_out, fan_in), (fan_out,)

    def add_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    shapes["blip.visual_encoder.patch_embed.proj.bias"] = (seen,)
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
    shapes["blip.text_encoder.embeddings.word_embeddings.weight"] = (len(tokenizer), read)
    shapes["blip.text_encoder.embeddings.position_embeddings.weight"] = (40, read)
    for place, fan_in, fan_out in ((0, read, 16), (2, 16, 8), (4, 8, 6), (6, 6, 4), (7, 4, 1)):
        add(f"mlp.layers.{place}", fan_in, fan_out)
    state = random_state(shapes)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, tmp_path / "ImageReward.pt")
    args = metric_args(**{"imagereward": tmp_path / "ImageReward.pt", "imagereward.tokenizer": tmp_path})
    metric = metrics.load_metric("imagereward", args)

    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    expected = [image_reward(w, image, tokenizer(prompt).input_ids) for image, prompt in zip(random_images(), PROMPTS)]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, rtol=1e-3, atol=1e-3)


def image_reward(w: dict, image: Image.Image, ids: list[int]) -> float:
    """Without padding: the mask must take its part away."""
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
            k, v = (linear(source, w, f"{layer}.{kind}.self.{name}") for name in ("key", "value"))
            attended = linear(attend(q, k, v, 12), w, f"{layer}.{kind}.output.dense")
            x = layer_norm(x + attended, w, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        hidden = linear(gelu(linear(x, w, f"{layer}.intermediate.dense")), w, f"{layer}.output.dense")
        x = layer_norm(x + hidden, w, f"{layer}.output.LayerNorm", 1e-12)
    x = x[0]
    for place in (0, 2, 4, 6, 7):
        x = linear(x, w, f"mlp.layers.{place}")
    return (x[0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize(
    "answer, rating",
    [
        ("ANALYSIS: fine\nRATING: 7", 7),
        ("**ANALYSIS:** fine\n**RATING:** 8.5/10", 8.5),
        ("rating - 10", None),
        ("RATING: 10", 10),
        ("RATING: 11", None),
        ("RATING: 0", None),
        ("RATING: -3", None),
        ("RATING: 7-8", None),
        ("RATING: 3\nRATING: 9", None),
        ("RATING: a number from 1 to 10", None),
        ("I would give it 7", None),
        ("", None),
    ],
)
def test_rating_of_an_answer(answer, rating):
    assert metrics.parse_rating(answer) == rating


def test_weights_that_hold_code_are_not_run(clip_folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"layers.0.weight": Trap()}, tmp_path / "head.pth")

    args = metric_args(**{"aesthetic": tmp_path / "head.pth", "aesthetic.clip": clip_folder})
    with pytest.raises(BaseException, match="(?i)weights"):
        metrics.load_metric("aesthetic", args)
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_interval_of_single_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 900)
    low, high = compare.bootstrap_interval(values, range(900))
    error = values.std() / 30
    assert abs(low - (values.mean() - 1.96 * error)) < 0.1 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.1 * error


def test_interval_resamples_whole_prompts():
    """Seeds that repeat their prompt's value add nothing."""
    values = np.random.default_rng(0).normal(size=50)
    alone = compare.bootstrap_interval(values, range(50))
    assert compare.bootstrap_interval(np.repeat(values, 4), np.repeat(range(50), 4)) == pytest.approx(alone)


def test_interval_covers_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(compare, "RESAMPLES", 999)
    random, clusters, covered, naive = np.random.default_rng(0), np.repeat(range(40), 4), 0, 0
    for _ in range(400):
        values = 0.5 + np.repeat(random.standard_exponential(40) - 1, 4) + 0.3 * random.normal(size=160)
        low, high = compare.bootstrap_interval(values, clusters)
        covered += low <= 0.5 <= high
        low, high = compare.bootstrap_interval(values, range(160))
        naive += low <= 0.5 <= high
    assert 0.90 < covered / 400 < 0.98
    assert naive / 400 < 0.8


def test_sign_flips_are_exact_for_few_prompts():
    differences, clusters = np.array([0.5, 1.5, -0.2, 0.4, 0.9, 0.1, 0.3]), [0, 0, 1, 2, 3, 4, 5]
    sums = np.array([2.0, -0.2, 0.4, 0.9, 0.1, 0.3])
    flipped = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean(np.array(flipped) >= abs(sums.sum()) - 1e-12)
    assert compare.sign_flip_p(differences, clusters) == pytest.approx(expected)
    assert compare.sign_flip_p(np.zeros(5), range(5)) == 1.0


def test_sign_flips_agree_with_the_t_test_on_many_prompts():
    from scipy.stats import ttest_1samp

    differences = np.random.default_rng(1).normal(0.15, 1, 200)
    assert compare.sign_flip_p(differences, range(200)) == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.01)


def test_holm():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]


def write_scores(folder: Path, scores: dict[str, list[float | None]], metric: str = "style") -> None:
    """A folder as generate.py and score.py leave it, with the scores of each model; two seeds of a prompt."""
    images, rows = common.JsonLines(folder / "images.jsonl"), common.JsonLines(folder / "scores.jsonl")
    for model, values in scores.items():
        for i, value in enumerate(values):
            path = f"images/{model}/{i}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / path)
            row = {"model": model, "prompt_id": i // 2, "seed": i % 2, "prompt": f"prompt {i // 2}", "path": path}
            images.add(row)
            rows.add(row | {"metric": metric, "score": value, "how": "test"})


def test_report_by_hand(tmp_path):
    write_scores(tmp_path, {"base": [1, 2, 3, 4, 5, 6], "tuned": [2, 2, 5, 3, 6, None]})
    run(compare, tmp_path, "--base", "base")

    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert (result["images"], result["prompts"], result["left_out"]) == (5, 3, 1)
    assert result["base_mean"] == 3.0 and result["mean"] == 3.6
    assert result["difference"] == pytest.approx(0.6)
    assert result["win_rate"] == pytest.approx((1 + 0.5 + 1 + 0 + 1) / 5)
    assert result["p"] == result["p_holm"] == pytest.approx(0.25)  # sums 1, 1, 1: 2 of 8 flips are as far out
    assert "| style | tuned | 3 | 3.6 | +0.6 (" in (tmp_path / "report.md").read_text()


def test_one_prompt_has_no_interval(tmp_path):
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    run(compare, tmp_path, "--base", "base")

    (result,) = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["results"]
    assert result["difference_interval"] is None and result["p"] == 1.0 and result["win_rate"] == 0.5


def test_page_is_self_contained_and_takes_prompts_as_text(tmp_path):
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    for name in ("images", "scores"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"prompt 0"', json.dumps(evil)))
    run(compare, tmp_path, "--base", "base")

    page = (tmp_path / "report.html").read_text()
    assert evil not in page and page.count("<script") == 2
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|images/)""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    (row,) = (row for row in data["rows"] if row["seed"] == 0)
    assert row["prompt"] == evil and row["images"]["tuned"].startswith("data:image/webp;base64,")
    assert row["scores"]["style"] == {"base": 1, "tuned": 3}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--base", "nobody"], "--base nobody: .* has only base, tuned"),
        (["--base", "base", "--metrics", "clip"], "--metrics clip: .* has only style"),
        (["--base", "base", "--scores", "missing.jsonl"], "missing.jsonl isn't there: run score.py first"),
    ],
)
def test_compare_says_what_is_missing(tmp_path, flags, message):
    write_scores(tmp_path, {"base": [1, 2], "tuned": [3, 1]})
    with pytest.raises(SystemExit, match=message):
        run(compare, tmp_path, *flags)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts on the demo
# ---------------------------------------------------------------------------------------------------------------------


GENERATE = ("--resolution=64", "--num_inference_steps=2", "--guidance_scale=3", "--device=cpu")


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_same_noise_for_every_model_batch_and_run(tmp_path):
    (tmp_path / "prompts.txt").write_text("rocket\nred apple\ngrinning face\n")
    common_flags = (f"--prompts={tmp_path / 'prompts.txt'}", "--seeds", 0, 1, *GENERATE)
    run(generate, *common_flags, "--models", f"a={MODEL}", f"b={MODEL}", f"--output_dir={tmp_path / 'x'}")
    run(generate, *common_flags, "--models", f"a={MODEL}", "--batch_size=1", f"--output_dir={tmp_path / 'y'}")

    first = pixels_of(tmp_path / "x" / "images" / "a" / "00001-0.png")
    assert first.shape == (64, 64, 3) and first.std() > 10
    assert (first == pixels_of(tmp_path / "x" / "images" / "b" / "00001-0.png")).all()
    assert np.abs(first - pixels_of(tmp_path / "y" / "images" / "a" / "00001-0.png")).max() <= 1
    assert np.abs(first - pixels_of(tmp_path / "x" / "images" / "a" / "00001-1.png")).mean() > 5
    rows = rows_of(tmp_path / "x" / "images.jsonl")
    assert len(rows) == len({row["path"] for row in rows}) == 12
    assert rows[4] == {
        "prompt": "red apple",
        "model": "a",
        "prompt_id": 1,
        "seed": 1,
        "noise_seed": 100_004,
        "path": "images/a/00001-1.png",
    }
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["models"]["b"] == {"base": MODEL}

    with pytest.raises(SystemExit, match="holds images of num_inference_steps 2, now 3: name another"):
        run(
            generate,
            *common_flags,
            "--num_inference_steps=3",
            "--models",
            f"a={MODEL}",
            f"--output_dir={tmp_path / 'x'}",
        )


def test_lora_unet_and_embeddings_reach_the_images(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.3
    pipeline.unet.save_pretrained(tmp_path / "unet")
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    noise = torch.Generator().manual_seed(0)
    widths = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2}
    rows = {key: torch.randn(2, encoder.config.hidden_size, generator=noise) for key, encoder in widths.items()}
    save_file(rows, tmp_path / "embeds.safetensors")

    row = {"prompt": "<a> beside <b>", "base_prompt": "dog beside cat"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    lora, embeddings = f"{MODEL},lora={tmp_path / 'lora'}", f"embeddings={tmp_path / 'embeds.safetensors'}"
    models = {
        "base": MODEL,
        "full": f"{MODEL},unet={tmp_path / 'unet'}",
        "lora": lora,
        "none": f"{lora}@0",
        "both": f"{lora},{embeddings},tokens=<a>+<b>",
    }
    flags = [f"{name}={spec}" for name, spec in models.items()]
    run(generate, f"--prompts={tmp_path / 'prompts.jsonl'}", *GENERATE, f"--output_dir={tmp_path}", "--models", *flags)

    generated = {name: pixels_of(tmp_path / "images" / name / "00000-0.png") for name in models}
    assert (generated["none"] == generated["base"]).all()
    for a, b in itertools.combinations(("base", "full", "lora", "both"), 2):
        assert np.abs(generated[a] - generated[b]).mean() > 1, (a, b)
    prompts = {row["model"]: row["prompt"] for row in rows_of(tmp_path / "images.jsonl")}
    assert prompts["both"] == "<a> beside <b>" and prompts["lora"] == "dog beside cat"

    with pytest.raises(SystemExit, match="2 rows of clip_l for 1 tokens <a>"):
        flags = [f"bad={MODEL},{embeddings},tokens=<a>"]
        run(
            generate,
            f"--prompts={tmp_path / 'prompts.jsonl'}",
            *GENERATE,
            f"--output_dir={tmp_path}",
            "--models",
            *flags,
        )


@pytest.mark.parametrize(
    "models, message",
    [
        ("MODEL", "must be NAME=PIPELINE"),
        ("a=no/such/folder/at/all", "no/such/folder/at/all isn't there"),
        ("a=MODEL,lora", "'lora' is none of unet=, lora="),
        ("a=MODEL,tokens=<a>", "embeddings= and tokens= need each other"),
    ],
)
def test_models_that_cannot_be(tmp_path, models, message):
    with pytest.raises(SystemExit, match=message):
        run(generate, "--prompts=p.txt", f"--output_dir={tmp_path}", "--models", models)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "rocket"}\n{"prompt": " "}\n', "row 1: the caption is ' ': write one or remove the row"),
        ('{"prompt": "rocket"}\n{"prompt": null}\n', "row 1: the caption is None"),
        ('{"words": "rocket"}\n', "no column prompt or Prompt or caption or text among words"),
        ("rocket\n", "Expecting value"),
        ("", "prompts.jsonl: has no prompts; write some into it"),
    ],
)
def test_bad_prompts(tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        run(generate, f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output_dir={tmp_path}", "--models", f"a={MODEL}")


def test_an_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/folder"):
        with pytest.raises(SystemExit, match=f"--output_dir .*{path}: .*file is a file; name a folder"):
            run(generate, "--prompts=p.txt", f"--output_dir={tmp_path / path}", "--models", f"a={MODEL}")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nope"], "nope: no such folder"),
        (["nope", "--output=s.jsonl"], "nope: no such folder"),
        ([REPO / "README.md"], r"README.md: is no folder of generate.py and no table \(.txt, "),
        ([REPO / "README.md", "--output=s.jsonl"], "README.md: is no folder of generate.py and no table"),
    ],
)
def test_score_says_what_is_no_source_of_images(flags, message):
    with pytest.raises(SystemExit, match=message):
        run(score, *flags, "--metrics", "style")


def test_a_prompt_of_300_words_is_warned_of_and_generated(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("rocket\n" + "very " * 299 + "long\n")
    run(
        generate,
        f"--prompts={tmp_path / 'prompts.txt'}",
        *GENERATE,
        f"--output_dir={tmp_path}",
        "--models",
        f"a={MODEL}",
    )
    assert "1 captions have more than 75 words (row 1: 300)" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "images.jsonl")) == 2


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_generate_and_score_lose_and_repeat_nothing(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"red apple {i}\n" for i in range(12)))
    out = tmp_path / "out"
    flags = [f"--prompts={tmp_path / 'prompts.txt'}", *GENERATE[:1], "--num_inference_steps=8", "--batch_size=1"]
    flags += [f"--output_dir={out}", "--models", f"base={MODEL}"]
    process = start("evaluation/generate.py", *flags)
    wait_for(lambda: (out / "images.jsonl").exists() and len(rows_of(out / "images.jsonl")) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in (out / "images" / "base").glob("[0-9]*.png")}
    assert 3 <= len(before) < 12
    with open(out / "images.jsonl", "a") as file:
        file.write('{"prompt": "red ap')  # what a kill within a write leaves

    run(generate, *flags)
    rows = rows_of(out / "images.jsonl")
    assert sorted(row["prompt_id"] for row in rows) == list(range(12))
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())

    run(score, out, "--metrics", "style", "--batch_size=4")
    whole = rows_of(out / "scores.jsonl")
    assert len(whole) == 12
    lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    run(score, out, "--metrics", "style", "--batch_size=4")
    again = rows_of(out / "scores.jsonl")
    assert [row["path"] for row in again] == [row["path"] for row in whole]
    np.testing.assert_allclose([r["score"] for r in again], [r["score"] for r in whole], atol=1e-4)


def test_a_full_disk_ends_in_one_line_and_the_rerun_goes_on(tmp_path):
    import resource

    (tmp_path / "prompts.txt").write_text("rocket\nred apple\n")
    flags = [f"--prompts={tmp_path / 'prompts.txt'}", *GENERATE, f"--output_dir={tmp_path / 'out'}"]
    flags += ["--models", f"base={MODEL}"]

    def limit() -> None:  # a file can't grow beyond 2 kB: less than an image, more than the manifest
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    line = error_line(start("evaluation/generate.py", *flags, preexec_fn=limit))
    assert "error: can't write (File too large): make room" in line
    assert not list((tmp_path / "out" / "images" / "base").glob("*.png"))

    run(generate, *flags)
    assert len(rows_of(tmp_path / "out" / "images.jsonl")) == 2


def test_score_agrees_with_the_labels_of_the_demo(tmp_path, capsys):
    output = tmp_path / "pairs.jsonl"
    run(score, f"--pairs={TEST_PAIRS}", "--split=test", "--metrics", "style", f"--output={output}")

    rows = rows_of(output)
    assert len(rows) == 98
    by_side = {name: np.array([r["score"] for r in rows if r["model"] == name]) for name in ("chosen", "rejected")}
    share = np.mean(by_side["chosen"] > by_side["rejected"])
    report = json.loads((tmp_path / "pairs.agreement.json").read_text())["style"]
    assert report["pairs"] == 49 and report["agreement"] == pytest.approx(share) and share > 0.9
    assert report["low"] <= share <= report["high"]
    assert f"style: agrees with {share:.1%} of 49 labels" in capsys.readouterr().out


def test_folders_of_winners_and_losers_have_no_split(tmp_path):
    for side in "wl":
        (tmp_path / side).mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / side / "0.png")
    (tmp_path / "0.txt").write_text("red square")
    flags = [f"--pairs={tmp_path}", "--metrics=style", f"--output={tmp_path / 's.jsonl'}"]
    with pytest.raises(SystemExit, match="--split test: .* has w/ and l/, which belong to no split"):
        run(score, *flags, "--split=test")
    run(score, *flags)
    assert len(rows_of(tmp_path / "s.jsonl")) == 2


def test_score_takes_a_table_and_names_what_it_cannot_read(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:30])
    table = tmp_path / "table.csv"
    table.write_text("caption,image\nred square,red.png\n")
    run(score, table, "--metrics", "style", f"--output={tmp_path / 's.jsonl'}")
    (row,) = rows_of(tmp_path / "s.jsonl")
    from demo.style_judge import StyleJudge, to_batch

    expected = StyleJudge.from_pretrained().preference(to_batch([Image.open(tmp_path / "red.png")])).item()
    assert row["score"] == pytest.approx(expected) and row["prompt"] == "red square"

    table.write_text("caption,image\nred square,red.png\nred square,torn.png\n")
    with pytest.raises(SystemExit, match=r"table.csv: row 1: no readable image"):
        run(score, table, "--metrics", "style", f"--output={tmp_path / 's2.jsonl'}")
    other = f"style={tmp_path / 'other.safetensors'}"
    with pytest.raises(SystemExit, match="holds style by .* name another file"):
        run(score, table, "--metrics", "style", "--weights", other, f"--output={tmp_path / 's.jsonl'}")
    with pytest.raises(SystemExit, match="--weights style=.*other.safetensors"):
        run(score, table, "--metrics", "style", "--weights", other, f"--output={tmp_path / 's3.jsonl'}")


def test_mismatch_is_measured_and_placed_between_the_papers_tasks(tmp_path, dino_folder):
    flags = [f"--model={MODEL}", *GENERATE, "--max_pairs=3", "--split=test", "--weights", f"dinov2={dino_folder}"]
    flags += [f"--output_dir={tmp_path}", "--tasks", f"style={TEST_PAIRS}"]
    run(reference_mismatch, *flags)

    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    rows = rows_of(tmp_path / "style.similarities.jsonl")
    metric = metrics.load_metric("dinov2", metric_args(dinov2=dino_folder))
    pairs = common.load_pairs(TEST_PAIRS, "--tasks", "test")
    for row in rows:
        generated = Image.open(tmp_path / f"images/style/{row['row']:06d}.png")
        a, b = metric.embed_images([generated, pairs.images(row["row"])[0]]).double().numpy()
        assert row["cos"] == pytest.approx(a @ b, abs=1e-5)
    assert len(rows) == 3 and result["similarity"] == pytest.approx(np.mean([row["cos"] for row in rows]))
    before = (tmp_path / "style.similarities.jsonl").read_bytes()
    run(reference_mismatch, *flags)
    assert (tmp_path / "style.similarities.jsonl").read_bytes() == before

    measured = [{"task": "preference", "similarity": 0.8}, {"task": "style", "similarity": 0.5}]
    assert reference_mismatch.hint_beta(0.6, measured) == "8 (preference) to 64 (style)"
    assert reference_mismatch.hint_beta(0.9, measured) == "8 (preference) or less"
    assert reference_mismatch.hint_beta(0.1, measured) == "64 (style) or more"
    assert reference_mismatch.hint_beta(0.1, []) == "none of the paper's tasks was measured"


def test_geneval_layout(tmp_path):
    """As its README documents it, read as its evaluate_images.py reads it."""
    metadata = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "colors",
            "include": [{"class": "bowl", "count": 1, "color": "red"}],
            "prompt": "a photo of a red bowl",
        },
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metadata))
    prompts = f"--prompts={tmp_path / 'evaluation_metadata.jsonl'}"
    run(
        generate, prompts, *GENERATE, "--seeds", 0, 1, 2, 3, "--models", f"m={MODEL}", f"--output_dir={tmp_path / 'g'}"
    )
    run(export_layouts, tmp_path / "g", "--model=m", "--layout=geneval", f"--output_dir={tmp_path / 'out'}")

    folders = [name for name in sorted(os.listdir(tmp_path / "out")) if name.isdigit()]
    assert folders == ["00000", "00001"]
    for i, folder in enumerate(folders):
        assert json.loads((tmp_path / "out" / folder / "metadata.jsonl").read_text()) == metadata[i]
        names = sorted(os.listdir(tmp_path / "out" / folder / "samples"))
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
        for seed, name in enumerate(names):
            source = tmp_path / "g" / "images" / "m" / f"{i:05d}-{seed}.png"
            assert (tmp_path / "out" / folder / "samples" / name).read_bytes() == source.read_bytes()


def test_compbench_layout(tmp_path):
    """The prompt before the last underscore, numbers through all prompts in six digits."""
    prompts = ["a green bench and a blue bowl", "The red hat was on top of the brown coat."]
    (tmp_path / "color_val.txt").write_text(f"{prompts[0]}\tgreen bench\n{prompts[1]}\n")
    flags = (f"--prompts={tmp_path / 'color_val.txt'}", *GENERATE, "--seeds", 0, 1)
    run(generate, *flags, "--models", f"m={MODEL}", f"--output_dir={tmp_path / 'g'}")
    run(export_layouts, tmp_path / "g", "--model=m", "--layout=t2i-compbench", f"--output_dir={tmp_path / 'out'}")

    names = os.listdir(tmp_path / "out" / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert names[0] == "a green bench and a blue bowl_000000.png" and len(names) == 4
    assert [name.split("_")[0] for name in names] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    with pytest.raises(SystemExit, match="prompt 0 has no tag: generate from the prompts of GenEval's"):
        run(export_layouts, tmp_path / "g", "--model=m", "--layout=geneval", f"--output_dir={tmp_path / 'out2'}")
    with pytest.raises(SystemExit, match="--model x: .* has only m"):
        run(export_layouts, tmp_path / "g", "--model=x", "--layout=geneval", f"--output_dir={tmp_path / 'out3'}")


@pytest.mark.parametrize("name", ["generate", "score", "compare", "reference_mismatch", "export_layouts"])
def test_help_explains_itself(name, capsys):
    script = globals()[name]
    with pytest.raises(SystemExit) as done:
        script.parse_args(["--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and f"python evaluation/{name}.py" in said


def test_a_local_vision_language_model_is_asked_with_the_image(tmp_path):
    """A small random Llava: its answers are nonsense, which the judge must notice."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(Path(MODEL) / "tokenizer")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.model_max_length = 1024
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = sizes | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    randomise(LlavaForConditionalGeneration(config)).save_pretrained(tmp_path)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path)

    judge = metrics.LocalJudge(str(tmp_path), "cpu")
    answers = [judge.ask("red apple", [image], max_tokens=12).text for image in random_images()]
    assert len(set(answers)) > 1 and answers[0] == judge.ask("red apple", random_images()[:1], max_tokens=12).text

    metric = metrics.load_metric("judge", judge_args(tmp_path, criterion="it is red"))
    ask, asked = metric.model.ask, []
    metric.model.ask = lambda text, *others: asked.append(text) or ask(text, *others)
    assert np.isnan(metric.score(random_images()[:1], ["red apple"])).all()
    assert len(asked) == 2 and "asked for: red apple" in asked[0] and "criterion only: it is red" in asked[0]


def judge_args(place: Path, criterion: str = "it is red") -> SimpleNamespace:
    args = metric_args(judge=place)
    args.judge_endpoint, args.judge_criterion, args.judge_tries, args.judge_max_tokens = None, criterion, 2, 12
    return args


# Sizes of the three families' small models: text, vision, and the side of a patch.
QWEN = {
    "qwen2_vl": ({"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, 14, "Qwen2VLProcessor"),
    "qwen2_5_vl": (
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "fullatt_block_indexes": [1]},
        14,
        "Qwen2_5_VLProcessor",
    ),
    "qwen3_vl": (
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "deepstack_visual_indexes": [0]},
        16,
        "Qwen3VLProcessor",
    ),
}


@pytest.fixture(scope="module", params=QWEN)
def qwen_folder(request, tmp_path_factory) -> Path:
    """A small random model with the files of Qwen's repositories, which name a video processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    folder, (vision, patch, processor) = tmp_path_factory.mktemp(request.param), QWEN[request.param]
    tokenizer = AutoTokenizer.from_pretrained(Path(MODEL) / "tokenizer")
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.model_max_length = 4096
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text |= {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision |= {"depth": 2, "num_heads": 2, "patch_size": patch, "num_position_embeddings": 16, "window_size": 56}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(marks)))
    config = AutoConfig.for_model(request.param, text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.001, temperature=0.01)  # as Qwen's own
    model.save_pretrained(folder)
    images = {"min_pixels": 784, "max_pixels": 50176, "patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    images |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    video = images | {"video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def test_judges_of_the_qwen_family_load_see_and_answer(qwen_folder):
    judge = metrics.LocalJudge(str(qwen_folder), "cpu")
    image, other = random_images()[:2]
    answers = [judge.ask("red apple", [image], max_tokens=12, probabilities=True) for image in (image, other, image)]
    assert answers[0].text == answers[2].text and answers[0].tokens != answers[1].tokens
    assert judge.ask("red apple", [image, other], max_tokens=12).text

    # The likeliest tokens at each place are those of one pass over the whole answer.
    content = [{"type": "image", "image": image}, {"type": "text", "text": "red apple"}]
    inputs = judge.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        first = judge.model(**inputs).logits[0, -1].double().softmax(-1)
    token, likely = answers[0].tokens[0]
    decode = judge.processor.tokenizer.decode
    alike = sum(p for i, p in zip(*(x.tolist() for x in first.topk(20)[::-1])) if decode([i]) == token)
    assert token == decode([first.argmax().item()]) and len(likely) > 5
    assert likely[token] == pytest.approx(alike, rel=1e-4) and 0 < sum(likely.values()) <= 1

    # Its own settings allow one token only; another try must be able to say something else.
    assert len({judge.ask("red apple", [image], temperature=0.7, max_tokens=12).text for _ in range(4)}) > 1


def test_a_judges_processor_is_loaded_before_its_weights(qwen_folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen_folder / name).read_bytes())
    with pytest.raises(SystemExit, match="--weights judge=.*: .*preprocessor_config.json"):
        metrics.load_metric("judge", judge_args(tmp_path))


@pytest.mark.parametrize(
    "text, final",
    [
        ("RATING: 8", "RATING: 8"),
        ("<think>It might be RATING: 3, no.</think>\nANALYSIS: fine\nRATING: 8", "\nANALYSIS: fine\nRATING: 8"),
        ("It might be RATING: 3.\n</think>RATING: 8", "RATING: 8"),  # templates may put <think> into the question
        ("<think>It might be RATING: 3, or", ""),
    ],
)
def test_what_a_model_thinks_aloud_is_no_answer(text, final):
    assert common.drop_reasoning(text) == final


def answer_of(*tokens) -> common.Answer:
    """Each token a word, or a word and what else could have stood there."""
    pairs = [(token, {token: 1.0}) if isinstance(token, str) else token for token in tokens]
    return common.Answer(common.drop_reasoning("".join(token for token, _ in pairs)), pairs)


@pytest.mark.parametrize(
    "answer, expected",
    [
        (
            answer_of("RATING", ":", (" 7", {" 7": 0.6, " 8": 0.3, "9": 0.05, " good": 0.05})),
            (4.2 + 2.4 + 0.45) / 0.95,
        ),
        (answer_of("RATING: ", ("10", {"10": 0.5, "9": 0.5})), 9.5),
        (answer_of("RATING: ", ("9", {"9": 0.5, "1": 0.25, "8": 0.25})), 4.5 + 2.5 + 2),  # a token for each digit
        (answer_of("RATING: ", ("1", {"1": 0.75, "9": 0.25}), "0"), 7.5 + 2.25),
        (answer_of("RATING: ", ("2", {"2": 0.5, "1": 0.5})), 1.5),
        (answer_of("RATING: ", ("8", {"8": 0.5, "2": 0.5}), ".5"), 8.5),
        (answer_of("RATING: 3, no. </think>", "RATING: ", ("8", {"8": 0.5, "6": 0.5})), 7.0),
        (common.Answer("RATING: 7"), 7.0),
    ],
)
def test_rating_is_the_mean_of_the_likely_ones(answer, expected):
    rating = metrics.parse_rating(answer.text)
    likely = metrics.probabilities_at(metrics.RATING, answer)
    assert metrics.expected_rating(rating, likely) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Any other metric, and the check against published values
# ---------------------------------------------------------------------------------------------------------------------


def test_a_metric_of_the_users_own(tmp_path, monkeypatch):
    for i, level in enumerate((10, 200)):
        Image.new("L", (16, 16), level).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a grey square\n")
    (tmp_path / "my_metrics.py").write_text(
        "import numpy as np\n"
        "class Brightness:\n"
        "    def __init__(self, device): assert device == 'cpu'\n"
        "    def score(self, images, prompts): return [np.asarray(image).mean() for image in images]\n"
        "class Short(Brightness):\n"
        "    def score(self, images, prompts): return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    run(score, tmp_path, "--metrics", "my_metrics:Brightness", "--device=cpu")
    assert [(row["metric"], row["score"]) for row in rows_of(tmp_path / "scores.jsonl")] == [
        ("my_metrics:Brightness", 10.0),
        ("my_metrics:Brightness", 200.0),
    ]
    for name, message in (
        ("my_metrics:Short", "--metrics my_metrics:Short: 1 scores for 2 images"),
        ("my_metrics:Missing", "--metrics my_metrics:Missing: .*no attribute 'Missing'"),
        ("no_such_module:Missing", "--metrics no_such_module:Missing: No module named 'no_such_module'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(score, tmp_path, "--metrics", name, "--device=cpu", "--output", tmp_path / f"{name}.jsonl")
    with pytest.raises(SystemExit):
        run(score, tmp_path, "--metrics", "nonsense")


def test_check_puts_published_values_beside_ours(clip_folder, dino_folder, tmp_path, capsys):
    for name, image in zip(("1.webp", "2.webp", "3.webp", "4.webp"), [*random_images(), *random_images(1)]):
        image.save(tmp_path / name, lossless=True)
    random_images(2)[0].save(tmp_path / "000000039769.jpg")
    weights = [f"clip={clip_folder}", f"dinov2={dino_folder}", f"siglip={tmp_path / 'nowhere'}"]
    with pytest.raises(SystemExit, match="--check: clip, siglip, dinov2: not as published"):
        run(score, "--check", tmp_path, "--metrics", "clip", "siglip", "dinov2", "--device=cpu", "--weights", *weights)

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (clip,) = (row for row in rows if row[0] == "clip")
    metric = metrics.load_metric("clip", metric_args(clip=clip_folder))
    with torch.no_grad():
        ours = metric.score([*random_images(), random_images(1)[0]], [score.CHECK_PROMPT] * 4)
    assert clip[1] == ", ".join(f"{value:.4f}" for value in ours.tolist()) and clip[3] == "differs"  # a random model's
    assert "nowhere" in [row for row in rows if row[0] == "siglip"][0][1]
    dino = [row for row in rows if row[0] == "dinov2"][0]
    assert dino[2] == "-2.1747, -0.4729, 1.0936" and dino[3] == "differs"


def test_check_without_a_network_says_what_to_download(clip_folder, capsys):
    with pytest.raises(SystemExit, match="--check: no connection to https://raw.*1.webp: download .*, then --check"):
        run(score, "--check", "--metrics", "clip", "--device=cpu", "--weights", f"clip={clip_folder}")


# ---------------------------------------------------------------------------------------------------------------------
# What sources may be
# ---------------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("red square\n", encoding="utf-8-sig")
    (row,) = common.load_rows(str(tmp_path), "images")[0]
    assert row["caption"] == "red square"
    for name, text in (
        ("p.txt", "red square\n"),
        ("p.csv", "prompt\nred square\n"),
        ("p.jsonl", '{"prompt": "red square"}\n'),
        ("p.json", '["red square"]'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert common.load_prompts(str(tmp_path / name)) == [{"prompt": "red square"}]


def test_folders_of_images(tmp_path):
    """Captions stand beside images in folders within, too; what is missing is named."""
    (tmp_path / "a" / "within").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a" / "within" / "0.png")
    with pytest.raises(SystemExit, match="no within/0.txt with the caption beside 0.png"):
        run(score, tmp_path / "a", "--metrics", "style")
    (tmp_path / "a" / "within" / "0.txt").write_text("red square")
    run(score, tmp_path / "a", "--metrics", "style")
    assert rows_of(tmp_path / "a" / "scores.jsonl")[0]["path"] == "within/0.png"


def test_help_of_the_list_of_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metrics.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(REPO / "evaluation" / "metrics.py", run_name="__main__")
    said, errors = capsys.readouterr()
    assert done.value.code == 0 and "| pickscore |" in said and not errors, errors
