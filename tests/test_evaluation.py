"""evaluation/: metrics against float64 arithmetic, statistics against closed forms, the scripts on the demo."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, rows_of, start
from PIL import Image
from safetensors.torch import save_file
from scipy.special import erf

from evaluation import common, compare, export_layouts, generate, metrics, reference_mismatch, score


pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, TEST_PAIRS = str(REPO / "demo" / "sdxl-tiny-twemoji"), str(REPO / "demo" / "pairs")
PROMPTS = ["a red apple", "rocket", "grinning face with smiling eyes"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def run(script, *flags) -> None:
    script.main(script.parse_args([str(flag) for flag in flags]))


def error_line(process: subprocess.Popen) -> str:
    """The last line that a run which failed has to say; no traceback before it."""
    _, said = process.communicate(timeout=120)
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


def crop_shorter_side(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """What CLIP's, PickScore's and DINOv2's pages state, by hand. (crop, crop, 3) in [0, 1]"""
    shorter, longer = sorted(image.size)
    sides = [resize if side == shorter else int(resize * longer / shorter) for side in image.size]
    resized = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - crop) // 2, (resized.shape[1] - crop) // 2
    return resized[top : top + crop, left : left + crop] / 255


def to_input(pixels: list[np.ndarray], mean=MEAN, std=STD) -> np.ndarray:
    return ((np.stack(pixels) - mean) / std).transpose(0, 3, 1, 2)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a, b = a.detach().double().numpy(), b.detach().double().numpy()
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def raw_features(model, metric) -> tuple[torch.Tensor, torch.Tensor]:
    """From pixels and tokens that were prepared here, one by one, without padding."""
    pixels = to_input([crop_shorter_side(image, 28, 28) for image in random_images()])
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

    for sign in (1, -1):  # CLIP score cuts at 0, PickScore doesn't
        metric.model.visual_projection.weight *= sign
        cos = cosines(*raw_features(metric.model, metric))
        assert np.ptp(cos) > 0.05 and (np.sign(cos) == sign).all()
        expected = 100 * np.maximum(cos, 0) if name == "clip" else np.exp(np.log(100)) * cos
        np.testing.assert_allclose(metric.score(random_images(), PROMPTS), expected, atol=2e-3)

    pixels = to_input([crop_shorter_side(image, 28, 28) for image in random_images()])
    np.testing.assert_allclose(metric.prepare(random_images()), pixels, atol=1e-5)


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


def black_bars(image: Image.Image, side: int) -> np.ndarray:
    """HPS: the longer side to `side`, zeros around. (side, side, 3) in [0, 1]"""
    width, height = (round(length * side / max(image.size)) for length in image.size)
    canvas = np.zeros((side, side, 3))
    top, left = (side - height) // 2, (side - width) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas[top : top + height, left : left + width] = np.asarray(resized) / 255
    return canvas


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
    pixels = to_input([crop_shorter_side(image, 28, 28)])[0]
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


@pytest.mark.skipif("MAPO_ONLINE_IMAGES" not in os.environ, reason="needs the hub and ImageReward's README images")
def test_known_values_of_image_reward():
    folder = Path(os.environ["MAPO_ONLINE_IMAGES"])  # assets/images of ImageReward's repository: 1.webp to 4.webp
    images = [Image.open(folder / f"{n}.webp").convert("RGB") for n in (1, 2, 3, 4)]
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    with torch.no_grad():
        rewards = metrics.load_metric("imagereward", metric_args()).score(images, [prompt] * 4)
    np.testing.assert_allclose(rewards, (0.5812, 0.2745, -1.4132, -2.0296), atol=5e-3)


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
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

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
    deadline = time.monotonic() + 120
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

    def limit() -> None:  # a file can't grow beyond 2 kB: less than a image, more than the manifest
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
    assert len(rows) == 288
    by_side = {name: np.array([r["score"] for r in rows if r["model"] == name]) for name in ("chosen", "rejected")}
    share = np.mean(by_side["chosen"] > by_side["rejected"])
    report = json.loads((tmp_path / "pairs.agreement.json").read_text())["style"]
    assert report["pairs"] == 144 and report["agreement"] == pytest.approx(share) and share > 0.9
    assert report["low"] <= share <= report["high"]
    assert f"style: agrees with {share:.1%} of 144 labels" in capsys.readouterr().out


def test_score_takes_a_table_and_names_what_it_cannot_read(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:30])
    table = tmp_path / "table.csv"
    table.write_text("caption,image\nred square,red.png\n")
    run(score, table, "--metrics", "style", f"--output={tmp_path / 's.jsonl'}")
    (row,) = rows_of(tmp_path / "s.jsonl")
    from demo.style_judge import StyleJudge, to_batch

    expected = StyleJudge.from_pretrained()(to_batch([Image.open(tmp_path / "red.png")])).item()
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
        a, b = metric.embed_images([generated, pairs.pictures(row["row"])[0]]).double().numpy()
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
    answers = [judge.ask("red apple", image, max_tokens=12) for image in random_images()]
    assert len(set(answers)) > 1 and answers[0] == judge.ask("red apple", random_images()[0], max_tokens=12)

    args = metric_args(judge=tmp_path)
    args.judge_endpoint, args.judge_criterion, args.judge_tries = None, "it is red", 2
    metric = metrics.load_metric("judge", args)
    ask = metric.model.ask
    asked = []
    metric.model.ask = lambda text, image, temperature: asked.append(text) or ask(text, image, temperature, 12)
    assert np.isnan(metric.score(random_images()[:1], ["red apple"])).all()
    assert len(asked) == 2 and "asked for: red apple" in asked[0] and "criterion only: it is red" in asked[0]
