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
What the scripts of `pairs/` and `evaluation/` share: one-line errors, files that survive a kill, tables of images,
and a client for chat endpoints.

Between the stages lie JSON lines that only grow and images that appear whole or not at all, so a stage that was
killed looks at what is there and does the rest.
"""

import argparse
import base64
import contextlib
import csv
import errno
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from PIL import Image


REPO = Path(__file__).resolve().parents[1]
TABLE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CAPTION_COLUMNS = ("caption", "prompt", "text", "Prompt", "original_prompt.txt")
IMAGE_COLUMNS = ("image", "picture", "path", "file_name", "jpg", "png")
CLIP_WORDS = 75  # CLIP's text encoders read 77 tokens, two of them marks: more words than this never fit


def fail(message: str) -> None:
    """Ends the run with one line; exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def warn(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)


def run_script(main, args: argparse.Namespace) -> None:
    """`main(args)` with a quiet console; a full disk and Ctrl-C end in one line, since a rerun goes on from there."""
    import logging

    logging.getLogger("xformers").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's script starts jobs with it ignored
    try:
        main(args)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"can't write ({error.strerror}): make room, then the same command goes on from here")


def quiet_libraries() -> None:
    """From diffusers and transformers, only errors and the progress of downloads."""
    import huggingface_hub
    import transformers

    import diffusers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which transformers silences with its own


# ---------------------------------------------------------------------------------------------------------------------
# Files that survive a kill
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path):
    """A temporary path that takes the place of `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class JsonLines:
    """A file of JSON rows that only grows: a row is in the file when `add` returns.

    Attributes:
        rows: all rows of the file, those of earlier runs first.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = Path(path), []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = data.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                fail(f"{self.path}: line {number} is no JSON: mend it or remove it")
        self.file = open(self.path, "ab")
        if torn:  # what a kill left of a row
            self.file.truncate(len(data) - len(torn))

    def add(self, *rows: dict) -> None:
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.file.flush()
        self.rows += rows


def markdown_table(head, rows) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def check_output_dir(path: Path) -> None:
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            fail(f"--output_dir {path}: {place} is a file; name a folder")


def keep_settings(path: Path, settings: dict, where: str) -> None:
    """Writes the settings of a folder, or ends the run where it was begun with others."""
    settings = json.loads(json.dumps(settings))
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(settings.keys() | begun.keys()):
            if settings.get(name) != begun.get(name):
                before, now = begun.get(name), settings.get(name)
                fail(f"{where} was begun with {name} {before!r}, now {now!r}: name another folder")
    else:
        write_json(path, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def load_rows(source: str, flag: str, split: str = "train"):
    """Rows of a table as dicts, by position.

    Args:
        source: .txt (a prompt a line), .jsonl, .json, .csv, .tsv, .parquet; a folder of images with NAME.txt beside
            NAME.png, of `generate.py`, or of a data set; else an id on the hub.
        flag: name of the flag for errors.

    Returns:
        The rows, and the folder that relative paths start from.
    """
    path, root = Path(source), Path(source) if Path(source).is_dir() else Path(source).parent
    try:
        if path.is_dir():
            for name in ("images.jsonl", "metadata.jsonl", "metadata.csv"):
                if (path / name).exists():
                    return read_table(path / name), root
            files = sorted(path.rglob("*"))
            images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            if images and not any(file.suffix in (".parquet", ".arrow", ".tar") for file in files):
                return read_captioned_images(images, root, flag), root
        elif path.suffix in TABLE_SUFFIXES and path.suffix != ".parquet":
            return read_table(path), root
        return load_dataset_rows(source, split), root
    except (OSError, ValueError) as error:
        where = "" if path.exists() else ", no file or folder here"
        fail(f"{flag} {source}{where}: {str(error).splitlines()[0]}")


def read_captioned_images(images: list[Path], root: Path, flag: str) -> list[dict]:
    """NAME.png with its caption in NAME.txt, in the folder itself and in those within it."""
    if lonely := [image for image in images if not image.with_suffix(".txt").exists()]:
        name = lonely[0].relative_to(root)
        fail(f"{flag} {root}: no {name.with_suffix('.txt')} with the caption beside {name.name}")
    return [{"caption": read_text(p.with_suffix(".txt")).strip(), "image": str(p.relative_to(root))} for p in images]


def read_text(path: Path) -> str:
    """UTF-8 with or without the byte order mark of Windows' editors, which would be three tokens of the caption."""
    return path.read_text(encoding="utf-8-sig")


def read_table(path: Path) -> list[dict]:
    text = read_text(path)
    if path.suffix == ".txt":
        rows = [line.split("\t")[0].strip() for line in text.splitlines()]  # T2I-CompBench has more after a tab
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(text)
    else:
        rows = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]


def load_dataset_rows(source: str, split: str):
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.endswith(".parquet"):
            data = datasets.load_dataset("parquet", data_files={split: source}, split=split)
        else:
            data = datasets.load_dataset(source, split=split)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error)) from error
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def find_column(rows, named: str | None, known: tuple[str, ...], flag: str, source: str) -> str:
    """The column that a flag names, else the first known one."""
    columns = rows.column_names if hasattr(rows, "column_names") else list(rows[0]) if len(rows) else []
    for name in (named,) if named else known:
        if name in columns:
            return name
    fail(f"{source}: no column {named or ' or '.join(known)} among {', '.join(columns)}: name it with {flag}")


def check_captions(captions: list, source: str) -> None:
    """Ends the run at a caption that is empty or no text; warns once of those that text encoders cut."""
    if not captions:
        fail(f"{source}: no rows")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            fail(f"{source}: row {i}: the caption is {caption!r}: write one or remove the row")
    if long := [i for i, caption in enumerate(captions) if len(caption.split()) > CLIP_WORDS]:
        words = len(captions[long[0]].split())
        warn(
            f"{source}: {len(long)} captions have more than {CLIP_WORDS} words (row {long[0]}: {words}); "
            "CLIP's text encoders read 77 tokens and ignore the rest"
        )


def load_prompts(source: str, column: str | None = None, split: str = "train") -> list[dict]:
    """Rows with a `prompt`; whatever else a row holds stays with it."""
    rows, _ = load_rows(source, "--prompts", split)
    if len(rows) == 0:
        fail(f"{source}: has no prompts; write some into it")
    column = find_column(rows, column, ("prompt", "Prompt", "caption", "text"), "--prompt_column", source)
    rows = [{**{k: v for k, v in row.items() if not isinstance(v, bytes)}, "prompt": row[column]} for row in rows]
    check_captions([row["prompt"] for row in rows], f"--prompts {source}")
    return rows


def open_image(value, root: Path, where: str) -> Image.Image:
    """RGB, upright, transparency on white, as training sees it."""
    from train_diffusion_mapo_sdxl import decode_image

    try:
        return decode_image(file_bytes(value, root))
    except Exception as error:
        fail(f"{where}: no readable image ({error}): mend it or remove the row")


def file_bytes(value, root: Path) -> bytes:
    """The image's file as it is: bytes, a path, or what `datasets` has of an image."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    return value if isinstance(value, bytes) else (root / value).read_bytes()


def load_pairs(source: str, flag: str, split: str = "train"):
    """The pairs of any data set that the training scripts read: `captions`, `rows`, `images(i)` -> chosen, rejected.

    Unlike in training, an image is read only when it is asked for.
    """
    import train_diffusion_mapo_sdxl as training

    if split != "train" and (Path(source) / "w").is_dir():
        fail(f"--split {split}: {source} has w/ and l/, which belong to no split")
    settings = training.parse_args(["--pretrained_model_name_or_path=none", f"--dataset_name={source}"])
    try:
        pairs = training.PreferencePairs(training.load_dataset(settings, split)[0], settings)
    except SystemExit as stop:  # its line names a flag of the training script
        fail(stop.code.partition("error: ")[2].replace("--dataset_name", flag))
    if not pairs.captions:
        fail(f"{flag} {source}: no row has a label that decides")
    check_captions(list(pairs.captions), f"{flag} {source}")
    return pairs


def open_pair(pairs, i: int, flag: str) -> tuple[Image.Image, Image.Image]:
    try:
        return pairs.images(i)
    except ValueError as error:
        fail(f"{str(error).splitlines()[0].replace('--dataset_name', flag)}: mend it or remove the row")


# ---------------------------------------------------------------------------------------------------------------------
# Chat endpoints
# ---------------------------------------------------------------------------------------------------------------------


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api_key_env", default="OPENAI_API_KEY", help="Environment variable with the endpoint's key."
    )
    parser.add_argument("--endpoint_timeout", type=float, default=120.0, help="Seconds before a request is repeated.")
    parser.add_argument("--endpoint_tries", type=int, default=6, help="Tries of a request before the run ends.")
    parser.add_argument("--endpoint_backoff", type=float, default=1.0, help="Seconds before the second try; doubles.")
    parser.add_argument("--endpoint_workers", type=int, default=8, help="Requests at a time.")
    parser.add_argument(
        "--endpoint_fields",
        type=json.loads,
        default={},
        metavar="JSON",
        help='More fields for each request, such as \'{"chat_template_kwargs": {"enable_thinking": false}}\'.',
    )


class Answer(NamedTuple):
    """What a model says.

    Attributes:
        text: without the reasoning that some models put before it.
        tokens: every token with the likeliest ones at its place and their probabilities; empty where they are unknown.
        complete: False where the answer was cut off at the limit of tokens.
    """

    text: str
    tokens: list[tuple[str, dict[str, float]]] = []
    complete: bool = True


def drop_reasoning(text: str) -> str:
    """What follows </think>; nothing where the reasoning never ended."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def read_completion(choice: dict) -> Answer:
    content = choice["message"]["content"] or ""
    if not isinstance(content, str):  # parts, of which servers name the text ones alike
        content = "".join(part.get("text") or "" for part in content)
    tokens = [
        (token["token"], {other["token"]: math.exp(other["logprob"]) for other in token["top_logprobs"]})
        for token in (choice.get("logprobs") or {}).get("content") or ()
    ]
    return Answer(drop_reasoning(content), tokens, choice.get("finish_reason") != "length")


class Endpoint:
    """Chat completions of an OpenAI-compatible server.

    Busy (429), failing (5xx), silent and garbled answers are asked again after 1, 2, 4, ... seconds or after the
    server's Retry-After. A parameter that the server refuses by name (400) is left out from then on; any other
    refusal, and the last of the tries, ends the run. The key stands in no message.

    Args:
        url: base address, such as https://api.openai.com/v1 or http://localhost:8000/v1.
        flag: name of the flag that gave it, for errors.
    """

    refusable = ("max_tokens", "temperature", "top_logprobs", "logprobs")

    def __init__(self, url: str, model: str, args: argparse.Namespace, flag: str) -> None:
        self.url, self.model, self.args, self.flag = url.rstrip("/"), model, args, flag
        self.key = os.environ.get(args.api_key_env, "")
        self.workers = args.endpoint_workers
        self.refused = set()

    def ask(self, text: str, images=(), temperature: float = 0.0, max_tokens=512, probabilities=False) -> Answer:
        """The assistant's answer; empty where it refused."""
        import requests

        body = {"model": self.model, "temperature": temperature, "max_tokens": max_tokens}
        if probabilities:
            body |= {"logprobs": True, "top_logprobs": 20}
        parts = [{"type": "image_url", "image_url": {"url": to_data_url(image)}} for image in images]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        body["messages"] = [{"role": "user", "content": content}]
        body |= self.args.endpoint_fields
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        attempt = 0
        while attempt < self.args.endpoint_tries:
            wait = self.args.endpoint_backoff * 2**attempt * random.uniform(0.75, 1.25)
            request = {name: value for name, value in body.items() if name not in self.refused}
            if "max_tokens" in self.refused:
                request["max_completion_tokens"] = max_tokens
            try:
                answer = requests.post(
                    f"{self.url}/chat/completions", json=request, headers=headers, timeout=self.args.endpoint_timeout
                )
                if answer.status_code == 200:
                    return read_completion(answer.json()["choices"][0])
                trouble = f"status {answer.status_code}"
                named = [name for name in self.refusable if name in request and re.search(rf"\b{name}\b", answer.text)]
                if answer.status_code == 400 and named:
                    self.refused.add(named[0])
                    continue
                if answer.status_code not in (408, 409, 429) and answer.status_code < 500:
                    said = " ".join(answer.text.split())[:200]
                    fail(self.hide_key(f"{self.flag} {self.url}: {trouble}: {said}"))
                with contextlib.suppress(ValueError):  # Retry-After may be a date
                    wait = max(wait, float(answer.headers.get("Retry-After", 0)))
            except requests.Timeout:
                trouble = f"no answer in {self.args.endpoint_timeout:g} s"
            except requests.ConnectionError:
                trouble = "no connection"
            except (ValueError, LookupError, TypeError, AttributeError):
                trouble = "an answer that is no chat completion"
            attempt += 1
            if attempt < self.args.endpoint_tries:
                time.sleep(wait)
        fail(
            f"{self.flag} {self.url}: {trouble}, {self.args.endpoint_tries} times: see that the server runs; "
            "the same command goes on from here"
        )

    def hide_key(self, text: str) -> str:
        text = text.replace(self.key, "***") if self.key else text
        return re.sub(r"\bsk-\S+", "***", text)  # servers quote parts of a key that they refuse


def to_data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def do_all(work, items: list, workers: int):
    """Yields `work(item)` as each gets done, so that each can be written at once; one error ends all."""
    if workers <= 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
