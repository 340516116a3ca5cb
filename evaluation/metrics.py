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
The metrics of `score.py`, each with the model and the file format in which it was published.

Every metric takes images (PIL, RGB) and prompts and gives one number for each image. Higher is better.

| name | number | preprocessing |
|---|---|---|
| pickscore | exp(logit_scale) * cos(text, image), CLIP H/14 | shorter side to 224, center crop as in transformers |
| hps | 100 * cos, CLIP H/14 of HPS v2.1 | longer side to 224 in floats, black bars; text by ftfy |
| aesthetic | five linear layers on the L2-normalized embedding of CLIP L/14 | shorter side to 224, center crop |
| imagereward | (BLIP L and five linear layers - 0.16717) / 1.03334 | shorter side to 224, center crop; 35 tokens |
| clip | 100 * max(cos, 0), CLIP L/14 | shorter side to 224, center crop; text by ftfy |
| siglip | 100 * sigmoid(exp(logit_scale) * cos + logit_bias) | squeezed to 384 x 384; text padded to 64 tokens |
| dinov2 | mean cosine with the reference images | shorter side to 256, center crop of 224 |
| judge | rating from 1 to 10 by a vision-language model | the image as it is |
| pairwise | probability that the judge prefers the image to the base model's | the image as it is |
| vqa | probability that the judge says the image shows the prompt (VQAScore) | the image as it is |
| style | logit of the demo's style judge, above 0 for the preferred style | squeezed to 64 x 64 |

Any other metric is `--metrics MODULE:CLASS`. Its class is made with the device and has one method:

    class Brightness:
        def __init__(self, device: str): ...
        def score(self, images: list[PIL.Image.Image], prompts: list[str]): ...  # one number each

HPS and ImageReward need neither open_clip nor the package of ImageReward, which need torchvision or are no longer
maintained: their checkpoints are loaded into CLIPModel, BlipVisionModel and BlipTextModel of transformers.
"""

import hashlib
import html
import importlib
import inspect
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Model,
    SiglipModel,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.style_judge import StyleJudge, to_batch
from evaluation.common import hash_content


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Folders or ids on the hub. A single file is a path, or ID:FILE on the hub.
WEIGHTS = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "pickscore.processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "hps": "xswu/HPSv2:HPS_v2.1_compressed.pt",
    "hps.processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
    "aesthetic.clip": "openai/clip-vit-large-patch14",
    "imagereward": "THUDM/ImageReward:ImageReward.pt",
    "imagereward.tokenizer": "google-bert/bert-base-uncased",
    "clip": "openai/clip-vit-large-patch14",
    "siglip": "google/siglip-so400m-patch14-384",
    "dinov2": "facebook/dinov2-base",
    "style": str(Path(__file__).resolve().parents[1] / "demo" / "style_judge.safetensors"),
}


# ---- Files ----------------------------------------------------------------------------------------------------------
def load_state(place: str) -> dict[str, torch.Tensor]:
    """Load a .safetensors or .pt file, given as a path or as ID:FILE on the hub. Code in it is never run."""
    if not Path(place).exists():
        repository, _, file = place.partition(":")
        if not file:
            raise FileNotFoundError(f"{place} doesn't exist. A file on the hub is written as ID:FILE.")
        place = hf_hub_download(repository, file)
    if place.endswith(".safetensors"):
        return load_file(place)
    state = torch.load(place, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def load_image_processor(place: str):
    """Load the PIL implementation. torchvision's, which transformers prefers if it is installed, shifts scores."""
    return AutoImageProcessor.from_pretrained(place, backend="pil")


def load_linear_layers(state: dict[str, torch.Tensor], prefix: str) -> torch.nn.Sequential:
    """Load the head of Aesthetic v2 or ImageReward. The missing numbers are dropout; there are no activations."""
    layers = []
    for number in (0, 2, 4, 6, 7):
        weight = state[f"{prefix}layers.{number}.weight"].float()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data = weight
        layer.bias.data = state[f"{prefix}layers.{number}.bias"].float()
        layers.append(layer)
    return torch.nn.Sequential(*layers)


# ---- Preprocessing --------------------------------------------------------------------------------------------------
def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return the pixels in [0, 1], shape (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Subtract CLIP's mean and divide by its standard deviation. Shape: (N, 3, H, W)."""
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def crop_to_square(image: Image.Image, side: int) -> torch.Tensor:
    """Resize the shorter side to `side` and crop the center, as torchvision's Resize and CenterCrop do.

    torchvision rounds half of an odd surplus to the even number, where transformers rounds down.
    """
    shorter = min(image.size)
    width = side if image.width == shorter else int(image.width * (side / shorter))
    height = side if image.height == shorter else int(image.height * (side / shorter))
    left = round((width - side) / 2)
    top = round((height - side) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(resized.crop((left, top, left + side, top + side)))


def pad_to_square(image: Image.Image, side: int) -> torch.Tensor:
    """Resize the longer side to `side` and pad the shorter one with black, as HPS v2 does.

    It resizes floats: values that overshoot 0 and 1 stay, where 8 bits would cut them off.
    """
    pixels = to_pixels(image)
    scale = side / max(image.size)
    if scale != 1:
        size = (round(image.height * scale), round(image.width * scale))
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    height, width = pixels.shape[1:]
    top = (side - height) // 2
    left = (side - width) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))


def clean_text(prompt: str) -> str:
    """Clean a prompt as the tokenizers of OpenAI's CLIP and of open_clip do, but not transformers'."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each row of a with the same row of b. Shape: (N, D), (N, D) -> (N,)."""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


# ---- CLIP and its relatives -----------------------------------------------------------------------------------------
class PickScore:
    """exp(logit_scale) * cos, with the processor and tokenizer of transformers, as in its authors' code."""

    weights_key = "pickscore"
    processor_key = "pickscore.processor"

    def __init__(self, device: str, weights: dict[str, str]):
        self.device = device
        self.model = self.load_model(weights).float().eval().to(device)
        self.processor = load_image_processor(weights[self.processor_key])
        self.tokenizer = AutoTokenizer.from_pretrained(weights[self.processor_key])

    def load_model(self, weights: dict[str, str]):
        return CLIPModel.from_pretrained(weights[self.weights_key], dtype=torch.float32)

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalized pixels, shape (N, 3, H, W)."""
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=self.prepare(images).to(self.device)).pooler_output

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return self.model.logit_scale.exp() * cosine(self.embed_images(images), self.embed_prompts(prompts))


class Clip(PickScore):
    """100 * max(cos, 0), with the preprocessing of OpenAI's code."""

    weights_key = "clip"
    processor_key = "clip"

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        return normalize(torch.stack([crop_to_square(image, side) for image in images]))

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        return super().embed_prompts([clean_text(prompt) for prompt in prompts])

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return 100 * cosine(self.embed_images(images), self.embed_prompts(prompts)).clamp(min=0)


class Aesthetic(Clip):
    """Five linear layers on the embedding of CLIP L/14. The prompt doesn't matter."""

    weights_key = "aesthetic.clip"
    processor_key = "aesthetic.clip"

    def __init__(self, device: str, weights: dict[str, str]):
        super().__init__(device, weights)
        self.head = load_linear_layers(load_state(weights["aesthetic"]), "").to(device)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return self.head(F.normalize(self.embed_images(images), dim=-1))[:, 0]


class Hps(Clip):
    """100 * cos by HPS v2.1, whose checkpoint has open_clip's names. Its sizes are those of the processor's CLIP."""

    weights_key = "hps"
    processor_key = "hps.processor"

    def load_model(self, weights: dict[str, str]):
        model = CLIPModel(CLIPConfig.from_pretrained(weights[self.processor_key]))
        model.load_state_dict(rename_open_clip(load_state(weights[self.weights_key])))
        return model

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        return normalize(torch.stack([pad_to_square(image, side) for image in images]))

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return 100 * cosine(self.embed_images(images), self.embed_prompts(prompts))


OPEN_CLIP_NAMES = {  # replaced in this order
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "ln_final.": "text_model.final_layer_norm.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}


def rename_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors of an open_clip checkpoint the names of transformers' CLIPModel."""
    renamed = {}
    for key, tensor in state.items():
        for old, new in OPEN_CLIP_NAMES.items():
            key = key.replace(old, new)
        if key in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        if ".in_proj_" in key:
            query, value_key, value = tensor.chunk(3)
            renamed[key.replace(".in_proj_", ".q_proj.")] = query
            renamed[key.replace(".in_proj_", ".k_proj.")] = value_key
            renamed[key.replace(".in_proj_", ".v_proj.")] = value
        else:
            renamed[key] = tensor
    return renamed


class Siglip(PickScore):
    """100 * sigmoid(exp(logit_scale) * cos + logit_bias)."""

    weights_key = "siglip"
    processor_key = "siglip"

    def load_model(self, weights: dict[str, str]):
        return SiglipModel.from_pretrained(weights[self.weights_key], dtype=torch.float32)

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        # SigLIP was trained on padded text without a mask.
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(input_ids=tokens["input_ids"].to(self.device)).pooler_output

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        cosines = cosine(self.embed_images(images), self.embed_prompts(prompts))
        return 100 * torch.sigmoid(self.model.logit_scale.exp() * cosines + self.model.logit_bias)


class ImageReward:
    """BLIP reads the prompt while it looks at the image, and linear layers on [CLS] give the reward."""

    def __init__(self, device: str, weights: dict[str, str]):
        self.device = device
        state = load_state(weights["imagereward"])
        self.vision, self.text = load_image_reward(state)
        self.vision.float().eval().to(device)
        self.text.float().eval().to(device)
        self.head = load_linear_layers(state, "mlp.").to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(weights["imagereward.tokenizer"])

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalized pixels, shape (N, 3, H, W)."""
        side = self.vision.config.image_size
        return normalize(torch.stack([crop_to_square(image, side) for image in images]))

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        image_embeds = self.vision(pixel_values=self.prepare(images).to(self.device)).last_hidden_state
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        hidden = self.text(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        mean = 0.16717362830052426
        std = 1.0333394966054072
        return (self.head(hidden[:, 0])[:, 0] - mean) / std


BLIP_NAMES = {  # replaced in this order
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    "blocks.": "encoder.layers.",
}


def load_image_reward(state: dict[str, torch.Tensor]) -> tuple[BlipVisionModel, BlipTextModel]:
    """Build BLIP from ImageReward.pt. All sizes are read from the tensors except the numbers of attention heads."""
    vision = {}
    text = {}
    for key, tensor in state.items():
        if key.startswith("blip.visual_encoder."):
            key = re.sub(r"^norm\.", "post_layernorm.", key.removeprefix("blip.visual_encoder."))
            for old, new in BLIP_NAMES.items():
                key = key.replace(old, new)
            vision[key] = tensor
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            text[key.removeprefix("blip.text_encoder.")] = tensor

    patch_size = vision["embeddings.patch_embedding.weight"].shape[-1]
    patches = vision["embeddings.position_embedding"].shape[1] - 1
    vision_width = vision["embeddings.class_embedding"].shape[-1]
    vision_model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=sum(key.endswith("mlp.fc1.weight") for key in vision),
            num_attention_heads=16,
            patch_size=patch_size,
            image_size=math.isqrt(patches) * patch_size,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
    )
    vision_model.load_state_dict(vision)
    vocab_size, text_width = text["embeddings.word_embeddings.weight"].shape
    text_model = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocab_size,
            hidden_size=text_width,
            encoder_hidden_size=vision_width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=sum(key.endswith("intermediate.dense.weight") for key in text),
            num_attention_heads=12,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            is_decoder=True,  # transformers' name for "has cross-attention"; its forward pass stays bidirectional
        ),
        add_pooling_layer=False,
    )
    text_model.load_state_dict(text)
    return vision_model, text_model


# ---- Images alone ---------------------------------------------------------------------------------------------------
class Dinov2:
    """Mean cosine of an image's CLS token with those of the reference images."""

    def __init__(self, device: str, weights: dict[str, str], references: list[Image.Image] = ()):
        self.device = device
        self.model = Dinov2Model.from_pretrained(weights["dinov2"], dtype=torch.float32).eval().to(device)
        self.processor = load_image_processor(weights["dinov2"])
        self.references = None
        if references:
            self.references = torch.cat([self.embed_images([image]) for image in references])

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalized pixels, shape (N, 3, H, W)."""
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def class_tokens(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the CLS tokens, shape (N, D)."""
        return self.model(pixel_values=self.prepare(images).to(self.device)).last_hidden_state[:, 0]

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the CLS tokens with length 1, shape (N, D)."""
        return F.normalize(self.class_tokens(images), dim=-1)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return (self.embed_images(images) @ self.references.T).mean(1)


class Style:
    """The logit of the demo's judge for the preferred style."""

    def __init__(self, device: str, weights: dict[str, str]):
        self.model = StyleJudge.from_pretrained(weights["style"])

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return self.model.preference(to_batch(images))


# ---- A vision-language model ----------------------------------------------------------------------------------------
class JudgeMetric:
    """A metric that asks a `pairs.judge.Judge`. NaN means that the judge gave no answer in the form asked for."""

    def __init__(self, judge, workers: int):
        self.judge = judge
        self.workers = workers

    def score(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.ask, images, prompts))


class Rating(JudgeMetric):
    def ask(self, image: Image.Image, prompt: str) -> float:
        return self.judge.rate(image, prompt)


class Vqa(JudgeMetric):
    def ask(self, image: Image.Image, prompt: str) -> float:
        return self.judge.vqa_score(image, prompt)


class Pairwise(JudgeMetric):
    """Takes pairs of an image and the base model's instead of single images."""

    def ask(self, images: tuple[Image.Image, Image.Image], prompt: str) -> float:
        return self.judge.compare(images[0], images[1], prompt)


# ---- Loading --------------------------------------------------------------------------------------------------------
JUDGE_METRICS = {"judge": Rating, "pairwise": Pairwise, "vqa": Vqa}
METRICS = {
    "pickscore": PickScore,
    "hps": Hps,
    "aesthetic": Aesthetic,
    "imagereward": ImageReward,
    "clip": Clip,
    "siglip": Siglip,
    "dinov2": Dinov2,
    "style": Style,
    **JUDGE_METRICS,
}


def load_metric(
    name: str, device: str = "cpu", weights: dict[str, str] = WEIGHTS, judge=None, workers=8, references=()
):
    """Load a metric of METRICS, or the class that MODULE:CLASS names.

    Args:
        weights: Where the weights are, with the keys of WEIGHTS.
        judge: A `pairs.judge.Judge`, for the metrics that ask one, and `workers`, the number of questions at a time.
        references: The images with which dinov2 compares.
    """
    if name in JUDGE_METRICS:
        return JUDGE_METRICS[name](judge, workers)
    if name == "dinov2":
        return Dinov2(device, weights, references)
    if name in METRICS:
        return METRICS[name](device, weights)
    module, _, class_name = name.partition(":")
    sys.path.append(os.getcwd())
    return getattr(importlib.import_module(module), class_name)(device)


def hash_metric(metric) -> str:
    """Hash what a metric's numbers depend on besides images and prompts: weights, configs, tokenizers, its own code.

    Of a metric of the user's, that is the module's source and the tensors that it holds.
    """
    if isinstance(metric, JudgeMetric):
        judge = metric.judge
        return hash_content(type(metric).__name__, judge.model, judge.criterion, judge.fields)
    digest = hashlib.sha256(type(metric).__name__.encode())
    if type(metric) not in METRICS.values():
        digest.update(inspect.getsource(inspect.getmodule(type(metric))).encode())
    for name, value in sorted(vars(metric).items()):
        digest.update(name.encode())
        if isinstance(value, torch.nn.Module):
            digest.update(repr(getattr(value, "config", "")).encode())
            for tensor in value.state_dict().values():
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, torch.Tensor):
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif hasattr(value, "backend_tokenizer"):
            digest.update(value.backend_tokenizer.to_str().encode())
        elif hasattr(value, "to_json_string"):
            digest.update(value.to_json_string().encode())
    return digest.hexdigest()[:32]
