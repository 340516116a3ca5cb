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
Asks a vision-language model about images, through any server that speaks OpenAI's chat completions: vLLM, Ollama,
llama.cpp, `transformers serve`, or OpenAI itself.

    judge = Judge("http://localhost:8000/v1", "Qwen/Qwen3-VL-8B-Instruct")
    judge.rate(image, "a red fox")  # 1 to 10
    judge.compare(image_a, image_b, "a red fox")  # probability that image_a is the better one
"""

import base64
import io
import math
import os
import re

import openai
from PIL import Image


RATE_PROMPT = """You rate an image that a computer made.

It was asked for: {caption}

Judge by this criterion only: {criterion}

Rate from 1 to 10, where 1-2 is extremely poor, 3-4 poor, 5-6 average, 7-8 good and 9-10 outstanding. Answer in exactly
this form, with nothing before or after it:

ANALYSIS: one or two sentences on how the image meets the criterion
RATING: a number from 1 to 10"""
COMPARE_PROMPT = """You compare two images that computers made. The first one is A, the second one is B.

Both were asked for: {caption}

Judge by this criterion only: {criterion}

Answer in exactly this form, with nothing before or after it:

ANALYSIS: one or two sentences on how the images differ by the criterion
CHOICE: A or B, whichever is better"""
VQA_PROMPT = 'Does this figure show "{caption}"? Please answer yes or no.'
DEFAULT_CRITERION = "the image shows what was asked for, without faults"

# Every token comes with its 20 likeliest alternatives and their probabilities. Some servers ignore this.
DEFAULT_FIELDS = {"temperature": 0, "logprobs": True, "top_logprobs": 20}


class Judge:
    """A model behind an OpenAI-compatible server. Its methods may be called from several threads at once.

    Args:
        api_base_url: Address of the server, such as http://localhost:8000/v1.
        model: Name of the model on that server.
        api_key: Key for the server. The default is the environment variable OPENAI_API_KEY.
        criterion: What `rate` and `compare` go by, such as "the image is a cartoon".
        fields: Fields for each request besides `DEFAULT_FIELDS`. None removes a default that a server refuses.
    """

    def __init__(
        self,
        api_base_url: str,
        model: str,
        api_key: str | None = None,
        criterion: str = DEFAULT_CRITERION,
        fields: dict | None = None,
    ):
        if api_key is None:
            api_key = os.environ.get("OPENAI_API_KEY", "none")  # the client wants a key, local servers don't
        self.client = openai.OpenAI(base_url=api_base_url, api_key=api_key, max_retries=5)
        self.api_base_url = api_base_url
        self.model = model
        self.criterion = criterion
        merged = DEFAULT_FIELDS | (fields or {})
        self.fields = {name: value for name, value in merged.items() if value is not None}

    def ask(self, text: str, images=()) -> str:
        """Return the model's answer to a text and any number of images, without the reasoning before it."""
        return read_text(self.complete(text, images))

    def rate(self, image: Image.Image, caption: str) -> float:
        """Return a rating from 1 to 10, or NaN if the model gave none.

        It is the mean over the ratings that the model could have given, weighted by their probabilities, where the
        server reports probabilities. Otherwise it is the number in the answer.
        """
        choice = self.complete(RATE_PROMPT.format(caption=caption, criterion=self.criterion), [image])
        pattern = r"RATING[^\w-]*(\d+(?:\.\d+)?)"
        answer = find_answer(pattern, read_text(choice))
        if answer is None or not 1 <= float(answer) <= 10:
            return math.nan
        return expected_rating(float(answer), read_probabilities(choice, pattern))

    def compare(self, image_a: Image.Image, image_b: Image.Image, caption: str) -> float:
        """Return the probability that A is better than B, or NaN if the model didn't choose.

        Models favor one of the two places, so they are asked in both orders.
        """
        first = self.prefer_first(image_a, image_b, caption)
        second = self.prefer_first(image_b, image_a, caption)
        return (first + 1 - second) / 2

    def prefer_first(self, first: Image.Image, second: Image.Image, caption: str) -> float:
        """Return the probability that the model chooses the first image when asked in this order."""
        choice = self.complete(COMPARE_PROMPT.format(caption=caption, criterion=self.criterion), [first, second])
        pattern = r"CHOICE\W*([AB])\b"
        answer = find_answer(pattern, read_text(choice))
        if answer is None:
            return math.nan
        probabilities = read_probabilities(choice, pattern)
        a = probabilities.get("A", 0.0)
        b = probabilities.get("B", 0.0)
        if a + b == 0:
            return float(answer.upper() == "A")
        return a / (a + b)

    def vqa_score(self, image: Image.Image, caption: str) -> float:
        """Return the probability that the model says the image shows the caption (VQAScore), or NaN if unknown."""
        choice = self.complete(VQA_PROMPT.format(caption=caption), [image])
        probabilities = read_probabilities(choice, r"^\W*(yes|no)\b")
        if not probabilities:
            return math.nan
        return probabilities.get("Yes", 0.0) + probabilities.get("yes", 0.0)

    def complete(self, text: str, images=()):
        """Return the server's first choice. Busy and failing servers are asked again by the client."""
        content = []
        for image in images:
            content.append({"type": "image_url", "image_url": {"url": to_data_url(image)}})
        content.append({"type": "text", "text": text})
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}], extra_body=self.fields
            )
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{self.api_base_url} doesn't answer ({error}). Is the server running?") from None
        return completion.choices[0]


def to_data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_text(choice) -> str:
    """Return what follows the reasoning. An answer that was cut off is empty."""
    text = choice.message.content or ""
    if choice.finish_reason == "length":
        return ""
    return text.rpartition("</think>")[2]


def find_answer(pattern: str, text: str) -> str | None:
    """Return the last match of the pattern's group. Models like to repeat the form before they fill it in."""
    matches = re.findall(pattern, text, re.IGNORECASE)
    return matches[-1] if matches else None


def read_probabilities(choice, pattern: str) -> dict[str, float]:
    """Return the tokens that could have stood where the pattern's group begins, with their probabilities.

    The dictionary is empty if the server doesn't report them.
    """
    if choice.logprobs is None or not choice.logprobs.content:
        return {}
    text = "".join(token.token for token in choice.logprobs.content)
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    if not matches:
        return {}
    position = matches[-1].start(1)
    for token in choice.logprobs.content:
        if position < len(token.token):
            break
        position -= len(token.token)
    probabilities = {}
    for alternative in token.top_logprobs:
        name = alternative.token.strip(" :*\n")
        probabilities[name] = probabilities.get(name, 0.0) + math.exp(alternative.logprob)
    return probabilities


def expected_rating(rating: float, probabilities: dict[str, float]) -> float:
    """Return the mean rating, or the rating itself if it is no whole number or probabilities are unknown."""
    weights = {}
    for token, probability in probabilities.items():
        if token.isdecimal() and 1 <= int(token) <= 10:
            weights[int(token)] = probability
    if rating > 5 and 1 in weights and 10 not in weights:
        weights[10] = weights.pop(1)  # some tokenizers write 10 as 1 and 0; beside a high rating, 1 begins a 10
    if rating != int(rating) or not weights:
        return rating
    return sum(value * weight for value, weight in weights.items()) / sum(weights.values())
