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
The metrics that `score.py` knows, each with the model class and the file format that it was published in.

Every metric takes images (PIL, RGB) and prompts and gives one number for each image; more is better.

| name | number | preprocessing |
|---|---|---|
| pickscore | exp(logit_scale) * cos(text, image), CLIP H/14 | shorter side to 224, centre crop as transformers' |
| hps | 100 * cos, HPS v2.1's CLIP H/14 | longer side to 224 in floats, black bars; text by ftfy |
| aesthetic | five linear layers on the L2-normalised embedding of CLIP L/14 | shorter side to 224, centre crop |
| imagereward | (BLIP L and five linear layers - 0.16717) / 1.03334 | shorter side to 224, centre crop; 35 tokens |
| clip | 100 * max(cos, 0), CLIP L/14 | shorter side to 224, centre crop; text by ftfy |
| siglip | 100 * sigmoid(exp(logit_scale) * cos + logit_bias) | squeezed to 384 x 384; 64 tokens, padded |
| dinov2 | mean cosine of CLS to the reference images' | shorter side to 256, centre crop of 224 |
| judge | 1 to 10: a vision-language model's rating by a criterion, the mean of its likely ones | the image as it is |
| pairwise | 0 to 1: probability that the judge prefers the image to `--base`'s, mean of both orders | the same |
| vqa | 0 to 1: probability that the judge answers Yes to whether the image shows the prompt (VQAScore) | the same |
| style | logit of the demo's style judge, positive for the preferred style | squeezed to 64 x 64 |

Any other metric is `--metrics MODULE:CLASS`, where the class is made with the device and has one method:

    class Brightness:
        def __init__(self, device: str) -> None: ...
        def score(self, images: list[PIL.Image.Image], prompts: list[str]): ...  # one number each

README.md has such classes for the metrics of pyiqa and imscore.

HPS and ImageReward need neither open_clip nor ImageReward's package, which are unmaintained or need torchvision: their
checkpoints are loaded into transformers' CLIPModel, BlipVisionModel and BlipTextModel under other names.
"""

import argparse
import html
import importlib
import math
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import REPO, Answer, Endpoint, drop_reasoning, fail


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# A folder or an id on the hub; for single files a path, or ID:FILE on the hub.
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
    "judge": "Qwen/Qwen3-VL-8B-Instruct",
    "style": str(REPO / "demo" / "style_judge.safetensors"),
}


def load_state(place: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pt/.pth file, by path or as ID:FILE on the hub; never unpickles code."""
    if not Path(place).exists():
        from huggingface_hub import hf_hub_download

        repository, _, file = place.partition(":")
        if not file:
            raise OSError(f"{place} isn't there, and is no ID:FILE on the hub")
        place = hf_hub_download(repository, file)
    if str(place).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(place)
    state = torch.load(place, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def load_image_processor(place: str):
    """The PIL implementation: torchvision's, which transformers prefers where it is installed, shifts scores."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(place, backend="pil")


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) in [0, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """By CLIP's mean and deviation. Shape: (N, 3, H, W)"""
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def crop_to_square(image: Image.Image, side: int) -> torch.Tensor:
    """The shorter side to `side`, bicubic, and the centre of the longer one, as torchvision's Resize and CenterCrop
    do: half a surplus is rounded to the even number there, where transformers rounds down."""
    scale = side / min(image.size)
    width, height = (side if length == min(image.size) else int(length * scale) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(resized.crop((left, top, left + side, top + side)))


def pad_to_square(image: Image.Image, side: int) -> torch.Tensor:
    """The longer side to `side`, bicubic, black bars beside the shorter one; an odd pixel goes to the end.

    Resized in floats: what overshoots 0 and 1 stays, where PIL's 8 bits would cut it off.
    """
    pixels = to_pixels(image)
    scale = side / max(image.size)
    if scale != 1:
        size = [round(length * scale) for length in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    above, before = (side - pixels.shape[1]) // 2, (side - pixels.shape[2]) // 2
    return F.pad(pixels, (before, side - pixels.shape[2] - before, above, side - pixels.shape[1] - above))


def clean_text(prompt: str) -> str:
    """As the tokenizers of OpenAI's CLIP and open_clip do before all else, and transformers' doesn't."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row by row. Shape: (N, D), (N, D) -> (N,)"""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


class LinearHead:
    """The linear layers of Aesthetic v2 and of ImageReward, in order, with nothing between them (dropout is off)."""

    def __init__(self, state: dict[str, torch.Tensor], prefix: str, device: str) -> None:
        numbers = sorted(int(m[1]) for key in state if (m := re.fullmatch(rf"{prefix}layers\.(\d+)\.weight", key)))
        if not numbers:
            raise ValueError(f"no {prefix}layers.N.weight in the file")
        parts = [[state[f"{prefix}layers.{n}.{kind}"] for kind in ("weight", "bias")] for n in numbers]
        self.layers = [[tensor.float().to(device) for tensor in part] for part in parts]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N,)"""
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# CLIP and its kin
# ---------------------------------------------------------------------------------------------------------------------


class PickScore:
    """exp(logit_scale) * cos, with transformers' processor and tokenizer as in its authors' code."""

    model_key, processor_key = "pickscore", "pickscore.processor"

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.device = args.device
        self.model = self.load_model(args.weights[self.model_key]).eval().to(self.device)
        self.processor = load_image_processor(args.weights[self.processor_key])
        self.tokenizer = AutoTokenizer.from_pretrained(args.weights[self.processor_key])

    def load_model(self, place: str):
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(place, dtype=torch.float32)

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, 3, H, W), normalised"""
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=self.prepare(images).to(self.device)).pooler_output

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return self.number(cosine(self.embed_images(images), self.embed_prompts(prompts)))

    def number(self, cos: torch.Tensor) -> torch.Tensor:
        return self.model.logit_scale.exp() * cos


class Clip(PickScore):
    """CLIP score, with the preprocessing of OpenAI's code."""

    model_key, processor_key = "clip", "clip"

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        return normalize(torch.stack([crop_to_square(image, side) for image in images]))

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        return super().embed_prompts([clean_text(prompt) for prompt in prompts])

    def number(self, cos: torch.Tensor) -> torch.Tensor:
        return 100 * cos.clamp(min=0)


class Hps(Clip):
    """HPS v2.1, whose checkpoint has open_clip's names."""

    model_key, processor_key = "hps", "hps.processor"

    def load_model(self, place: str):
        from transformers import CLIPModel

        config, state = read_open_clip(load_state(place))
        model = CLIPModel(config)
        model.load_state_dict(state)
        return model.float()

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        return normalize(torch.stack([pad_to_square(image, side) for image in images]))

    def number(self, cos: torch.Tensor) -> torch.Tensor:
        return 100 * cos


def read_open_clip(state: dict[str, torch.Tensor]):
    """open_clip's ViT-H/14 -> configuration and state of transformers' CLIPModel.

    All sizes are read from the tensors; only the number of heads isn't in them and is ViT-H/14's 16.
    """
    from transformers import CLIPConfig

    names = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    renamed, layers = {"logit_scale": state["logit_scale"]}, {"text": 0, "vision": 0}
    for key, value in state.items():
        if match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)((?:\.|_)(?:weight|bias))", key):
            tower = "vision" if match[1] else "text"
            layers[tower] = max(layers[tower], int(match[2]) + 1)
            prefix = f"{tower}_model.encoder.layers.{match[2]}."
            if match[3] == "attn.in_proj":
                for part, piece in zip("qkv", value.chunk(3)):
                    renamed[f"{prefix}self_attn.{part}_proj.{match[4][1:]}"] = piece
            else:
                renamed[f"{prefix}{names[match[3]]}{match[4]}"] = value
        elif key in ("text_projection", "visual.proj"):
            renamed[f"{'text' if key[0] == 't' else 'visual'}_projection.weight"] = value.T
        elif key in names:
            renamed[names[key]] = value
        elif (stem := key.rpartition(".")[0]) in names:
            renamed[f"{names[stem]}.{key.rpartition('.')[2]}"] = value
    patches, width = state["visual.positional_embedding"].shape
    patch = state["visual.conv1.weight"].shape[-1]
    text = {
        "vocab_size": len(state["token_embedding.weight"]),
        "hidden_size": state["text_projection"].shape[0],
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers["text"],
        "max_position_embeddings": len(state["positional_embedding"]),
        "eos_token_id": 2,  # transformers' mark for open_clip's rule: pool at the largest id
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers["vision"],
        "patch_size": patch,
        "image_size": math.isqrt(patches - 1) * patch,
    }
    common = {"num_attention_heads": 16, "hidden_act": "gelu"}
    projection = state["text_projection"].shape[1]
    config = CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=projection)
    return config, renamed


class Aesthetic(Clip):
    model_key, processor_key = "aesthetic.clip", "aesthetic.clip"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.head = LinearHead(load_state(args.weights["aesthetic"]), "", self.device)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return self.head(F.normalize(self.embed_images(images), dim=-1))


class Siglip(PickScore):
    model_key, processor_key = "siglip", "siglip"

    def load_model(self, place: str):
        from transformers import SiglipModel

        return SiglipModel.from_pretrained(place, dtype=torch.float32)

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(  # trained without a mask on padded text
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return self.model.get_text_features(input_ids=tokens["input_ids"].to(self.device)).pooler_output

    def number(self, cos: torch.Tensor) -> torch.Tensor:
        return 100 * torch.sigmoid(self.model.logit_scale.exp() * cos + self.model.logit_bias)


class ImageReward:
    """BLIP reads the prompt while it looks at the image; a linear head on [CLS] gives the reward."""

    mean, std, tokens = 0.16717362830052426, 1.0333394966054072, 35

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        self.device = args.device
        state = load_state(args.weights["imagereward"])
        vision_config, text_config, vision, text = read_image_reward(state)
        self.vision, self.text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
        self.vision.load_state_dict(vision)
        self.text.load_state_dict(text)
        for model in (self.vision, self.text):
            model.float().eval().to(self.device)
        self.head = LinearHead(state, "mlp.", self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(args.weights["imagereward.tokenizer"])

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        side = self.vision.config.image_size
        return normalize(torch.stack([crop_to_square(image, side) for image in images]))

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        seen = self.vision(pixel_values=self.prepare(images).to(self.device)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return (self.head(read[:, 0]) - self.mean) / self.std


def read_image_reward(state: dict[str, torch.Tensor]):
    """ImageReward.pt -> configurations and states of BlipVisionModel and BlipTextModel; heads are BLIP L's 16 and
    BERT's 12, all other sizes are read from the tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig

    names = (
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        ("blocks.", "encoder.layers."),
    )
    vision, text = {}, {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            key = re.sub(r"^norm\.", "post_layernorm.", key.removeprefix("blip.visual_encoder."))
            for old, new in names:
                key = key.replace(old, new)
            vision[key] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            text[key.removeprefix("blip.text_encoder.")] = value
    patch, width = (
        vision["embeddings.patch_embedding.weight"].shape[-1],
        vision["embeddings.class_embedding"].shape[-1],
    )
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len([key for key in vision if key.endswith("mlp.fc1.weight")]),
        num_attention_heads=16,
        patch_size=patch,
        image_size=math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1) * patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=len([key for key in text if key.endswith("intermediate.dense.weight")]),
        num_attention_heads=12,
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # transformers' word for "has cross-attention"; its forward stays bidirectional
    )
    return vision_config, text_config, vision, text


# ---------------------------------------------------------------------------------------------------------------------
# Images alone
# ---------------------------------------------------------------------------------------------------------------------


class Dinov2:
    """Mean cosine of an image's CLS to those of the reference images."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import Dinov2Model

        self.device = args.device
        self.model = Dinov2Model.from_pretrained(args.weights["dinov2"], dtype=torch.float32).eval().to(self.device)
        self.processor = load_image_processor(args.weights["dinov2"])
        self.references = None
        if getattr(args, "references", None):
            self.references = torch.cat([self.embed_images([image]) for image in args.references])

    def prepare(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def class_tokens(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model(pixel_values=self.prepare(images).to(self.device)).last_hidden_state[:, 0]

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, D), of length 1"""
        return F.normalize(self.class_tokens(images), dim=-1)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return (self.embed_images(images) @ self.references.T).mean(1)


class Style:
    """The demo's judge: logit of "this is in the preferred style"."""

    def __init__(self, args: argparse.Namespace) -> None:
        from demo.style_judge import StyleJudge

        self.model = StyleJudge.from_pretrained(args.weights["style"])

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        from demo.style_judge import to_batch

        return self.model.preference(to_batch(images))


# ---------------------------------------------------------------------------------------------------------------------
# A vision-language model as judge
# ---------------------------------------------------------------------------------------------------------------------


JUDGE_TEXT = """You rate an image that a computer made.

It was asked for: {prompt}

Judge by this criterion only: {criterion}

Rate from 1 to 10, where 1-2 is extremely poor, 3-4 poor, 5-6 average, 7-8 good and 9-10 outstanding. Answer in exactly
this form, with nothing before or after it:

ANALYSIS: one or two sentences on how the image meets the criterion
RATING: a number from 1 to 10"""
PAIRWISE_TEXT = """You compare two images that computers made. The first one is A, the second one is B.

Both were asked for: {prompt}

Judge by this criterion only: {criterion}

Answer in exactly this form, with nothing before or after it:

ANALYSIS: one or two sentences on how the images differ by the criterion
CHOICE: A or B, whichever is better"""
VQA_TEXT = 'Does this figure show "{prompt}"? Please answer yes or no.'  # VQAScore's question
RATING = r"RATING[^\w-]*(\d+(?:\.\d+)?)(?!\s*-\s*\d)"
CHOICE = r"CHOICE\W*([AB])\b"


def find_answer(pattern: str, text: str) -> re.Match | None:
    """The only match; None where there is none, or more than one."""
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    return matches[0] if len(matches) == 1 else None


def parse_rating(text: str) -> float | None:
    """The number after RATING, from 1 to 10."""
    match = find_answer(RATING, text)
    return float(match[1]) if match and 1 <= float(match[1]) <= 10 else None


def probabilities_at(pattern: str, answer: Answer) -> dict[str, float]:
    """Stripped tokens and their probabilities at the place where the pattern's group begins; empty where unknown."""
    text = "".join(token for token, _ in answer.tokens)
    start = text.rfind("</think>") + 1
    match, likely = find_answer(pattern, text[start:]), {}
    place = start + match.start(1) if match else len(text)
    for token, others in answer.tokens:
        if place < len(token):
            for other, probability in others.items():
                likely[other.strip(" :*\n")] = likely.get(other.strip(" :*\n"), 0.0) + probability
            break
        place -= len(token)
    return likely


def expected_rating(rating: float, likely: dict[str, float]) -> float:
    """Mean of the ratings that could have stood there; the rating itself where the probabilities are unknown."""
    weights = {int(token): p for token, p in likely.items() if token.isdecimal() and 1 <= int(token) <= 10}
    if rating > 5 and 10 not in weights and 1 in weights:
        weights[10] = weights.pop(1)  # where each digit is a token; with a rating this high 1 begins 10
    if rating % 1 or not weights:
        return rating
    return sum(value * p for value, p in weights.items()) / sum(weights.values())


def load_chat_processor(place: str):
    """Qwen's processors see videos too, and transformers' code for those needs torchvision, which the code for images
    doesn't: without torchvision the processor is put together without that part."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(place)
    except ImportError:
        parent = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(place))]

    class ImagesOnly(parent):
        def check_argument_for_proper_class(self, name, argument):
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    tokenizer = AutoTokenizer.from_pretrained(place)
    images = AutoImageProcessor.from_pretrained(place, backend="pil")
    return ImagesOnly(images, tokenizer, chat_template=tokenizer.chat_template)


@torch.no_grad()
def generate_answer(model, tokenizer, inputs, temperature: float, max_tokens: int, probabilities=False) -> Answer:
    # A model's own top_k of 1, such as Qwen's, would make all tries alike.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        output_logits=probabilities,
        return_dict_in_generate=True,
        **(sampling if temperature else {"do_sample": False}),
    )
    ids, tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), []
    for number, logits in zip(ids, output.logits or ()):
        likely = logits[0].float().softmax(-1).topk(20)
        others = Counter()  # several tokens may have one text
        for i, probability in zip(likely.indices.tolist(), likely.values.tolist()):
            others[tokenizer.decode([i])] += probability
        tokens.append((tokenizer.decode([number]), dict(others)))
    ends = model.generation_config.eos_token_id
    complete = len(ids) < max_tokens or ids[-1] in (ends if isinstance(ends, list) else [ends])
    return Answer(drop_reasoning(tokenizer.decode(ids, skip_special_tokens=True)), tokens, complete)


class LocalJudge:
    """A vision-language model of transformers. `ask` has Endpoint's signature."""

    workers = 1

    def __init__(self, place: str, device: str) -> None:
        from transformers import AutoModelForImageTextToText

        self.processor = load_chat_processor(place)  # first: it fails in seconds, the model in minutes
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype).eval().to(device)

    def ask(self, text: str, images=(), temperature: float = 0.0, max_tokens=512, probabilities=False) -> Answer:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        return generate_answer(self.model, self.processor.tokenizer, inputs, temperature, max_tokens, probabilities)


class Judge:
    """Ratings from 1 to 10; NaN where the model gave no rating in `--judge_tries` answers."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, place = args, args.weights["judge"]
        if args.judge_endpoint:
            self.model = Endpoint(args.judge_endpoint, place, args, "--judge_endpoint")
        else:
            self.model = LocalJudge(place, args.device)

    def ask(self, text: str, prompt: str, images: list[Image.Image], parse) -> tuple:
        """The first answer that `parse` makes something of, and what that is; the answer is None if there is none."""
        text = text.format(prompt=prompt, criterion=self.args.judge_criterion)
        for attempt in range(self.args.judge_tries):
            answer = self.model.ask(text, images, 0.7 if attempt else 0.0, self.args.judge_max_tokens, True)
            if answer.complete and (found := parse(answer.text)) is not None:
                return answer, found
        return None, math.nan

    def rate(self, image: Image.Image, prompt: str) -> float:
        answer, rating = self.ask(JUDGE_TEXT, prompt, [image], parse_rating)
        return expected_rating(rating, probabilities_at(RATING, answer)) if answer else math.nan

    def score(self, images: list, prompts: list[str]) -> torch.Tensor:
        with ThreadPoolExecutor(self.model.workers) as pool:
            return torch.tensor(list(pool.map(self.rate, images, prompts)))


class Pairwise(Judge):
    """Probability that the judge prefers an image to another; asked in both orders, since judges favour a place."""

    def prefer_first(self, images: list[Image.Image], prompt: str) -> float:
        answer, choice = self.ask(PAIRWISE_TEXT, prompt, images, lambda text: find_answer(CHOICE, text))
        likely = probabilities_at(CHOICE, answer) if answer else {}
        first, second = likely.get("A", 0.0), likely.get("B", 0.0)
        if first + second:
            return first / (first + second)
        return float(choice[1] in "Aa") if answer else math.nan

    def rate(self, images: tuple[Image.Image, Image.Image] | tuple[None, None], prompt: str) -> float:
        if images[1] is None:  # the base against itself
            return 0.5
        return (self.prefer_first([*images], prompt) + 1 - self.prefer_first([*images[::-1]], prompt)) / 2


class Vqa(Judge):
    """VQAScore's question; its own models need packages that are pinned to old ones, any judge answers it."""

    def rate(self, image: Image.Image, prompt: str) -> float:
        answer = self.model.ask(VQA_TEXT.format(prompt=prompt), [image], max_tokens=1, probabilities=True)
        return answer.tokens[0][1].get("Yes", 0.0) if answer.tokens else math.nan


METRICS = {
    "pickscore": PickScore,
    "hps": Hps,
    "aesthetic": Aesthetic,
    "imagereward": ImageReward,
    "clip": Clip,
    "siglip": Siglip,
    "dinov2": Dinov2,
    "judge": Judge,
    "pairwise": Pairwise,
    "vqa": Vqa,
    "style": Style,
}
JUDGES = ("judge", "pairwise", "vqa")


def metric_name(name: str) -> str:
    """A name of METRICS, or MODULE:CLASS; for argparse."""
    if name not in METRICS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(METRICS)}, nor MODULE:CLASS")
    return name


def places_of(name: str, args: argparse.Namespace) -> dict[str, str]:
    """Those of `args.weights` that a metric reads."""
    own = "judge" if name in JUDGES else name
    return {key: place for key, place in args.weights.items() if key.partition(".")[0] == own}


def load_metric(name: str, args: argparse.Namespace):
    """The metric, loaded; ends the run in one line where it can't be.

    Args:
        args: with `weights` (see WEIGHTS), `device`; for dinov2 `references`; for the judges the flags of
            `add_judge_flags`.
    """
    if name not in METRICS:
        return load_own_metric(name, args.device)
    try:
        return METRICS[name](args)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        places = ", ".join(f"{key}={place}" for key, place in places_of(name, args).items())
        fail(f"--weights {places}: {str(error).strip().splitlines()[0]}")


def load_own_metric(name: str, device: str):
    module, _, kind = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), kind)(device)
    except (ImportError, AttributeError) as error:
        fail(f"--metrics {name}: {str(error).splitlines()[0]}")


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge_endpoint", help="Base address of an OpenAI-compatible server, such as .../v1.")
    parser.add_argument(
        "--judge_criterion",
        default="the image shows what was asked for, without faults",
        help="What the judge goes by, such as 'the image is a cartoon'.",
    )
    parser.add_argument("--judge_tries", type=int, default=3, help="Answers to ask for until one has a rating.")
    parser.add_argument(
        "--judge_max_tokens", type=int, default=512, help="Of an answer; a reasoning model needs some thousands."
    )


def read_weights_flag(parts: list[str]) -> dict[str, str]:
    """`METRIC=PLACE` of the flag over the defaults."""
    weights = dict(WEIGHTS)
    for part in parts:
        name, _, place = part.partition("=")
        if name not in WEIGHTS or not place:
            fail(f"--weights {part}: must be NAME=PLACE with a name of {', '.join(WEIGHTS)}")
        weights[name] = place
    return weights


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
