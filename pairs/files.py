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
What the tools of this folder read: captions and images in text files, tables, folders and data sets.
"""

import csv
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

import datasets
from PIL import Image
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_diffusion_mapo_sdxl import load_image, read_text


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_COLUMNS = ("caption", "prompt", "text", "Prompt", "original_prompt.txt")
IMAGE_COLUMNS = ("image", "picture", "path", "file_name", "jpg", "png")
CLIP_WORDS = 75  # more words than this never fit into the 77 tokens of CLIP's text encoders


class JsonLines:
    """A file of JSON rows that only grows. A row is on disk when `add` returns.

    Attributes:
        rows: All rows of the file, those of earlier runs first.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab+")
        self.file.seek(0)
        *lines, torn = self.file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} isn't JSON ({error}); fix it or delete it") from error
        self.file.truncate(self.file.tell() - len(torn))  # what a killed run left of a row

    def add(self, row: dict) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows.append(row)


# ---- Captions -------------------------------------------------------------------------------------------------------
def read_rows(source: str):
    """Return the rows of a table as dictionaries: a list, or a `datasets.Dataset` whose images aren't decoded."""
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        # Only \n ends a line: captions may contain U+2028 and the like. T2I-CompBench's files have more after a tab.
        return [{"caption": line.split("\t")[0].strip()} for line in read_text(path).strip().split("\n")]
    if path.suffix in (".csv", ".tsv") and path.is_file():
        # Not with pandas, as `datasets` does: it reads the captions NA as nothing and 0123 as a number.
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter))
    if path.suffix in (".jsonl", ".json") and path.is_file():
        if path.suffix == ".json":
            rows = json.loads(read_text(path))
        else:
            rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        return [{"caption": row} if isinstance(row, str) else row for row in rows]

    if path.suffix == ".parquet":
        dataset = datasets.load_dataset("parquet", data_files=source, split="train")
    else:
        dataset = datasets.load_dataset(source, split="train")
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def find_column(rows, column: str | None, known: tuple[str, ...], flag: str, source: str) -> str:
    """Return the named column, or else the first known one."""
    if len(rows) == 0:
        raise ValueError(f"{source}: has no rows")
    for name in [column] if column else known:
        if name in rows[0]:
            return name
    raise ValueError(f"{source}: has the columns {', '.join(rows[0])}; name one of them with {flag}")


def check_captions(captions: list, source: str) -> None:
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{source}: the caption of row {number} is {str(caption)[:100]!r}; it must be a text")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{source}: the caption of row {number} has half a character ({error})") from error
    long = sum(len(caption.split()) > CLIP_WORDS for caption in captions)
    if long:
        print(f"{source}: {long} of {len(captions)} captions have over {CLIP_WORDS} words; SDXL reads only 77 tokens.")


def read_captions(source: str, caption_column: str | None = None) -> list[str]:
    """Return the captions of a .txt file with one on each line, of a table, or of a data set."""
    rows = read_rows(source)
    column = find_column(rows, caption_column, CAPTION_COLUMNS, "--caption_column", source)
    captions = [row[column] for row in rows]
    check_captions(captions, source)
    return captions


# ---- Images ---------------------------------------------------------------------------------------------------------
def read_images(
    source: str,
    extract_to: Path,
    caption_column: str | None = None,
    image_column: str | None = None,
    max_rows: int | None = None,
) -> list[tuple[str, Path]]:
    """Return captions and image files of a folder, a table, or a data set. Every image has been decoded once.

    Images that are stored inside a data set are written to the folder `extract_to`, named by a hash of their bytes.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        tables = [path / name for name in ("images.jsonl", "metadata.jsonl", "metadata.csv")]
        tables = [table for table in tables if table.exists()]
        if tables:
            source = str(tables[0])
        elif not any(path.rglob("*.parquet")) and not any(path.rglob("*.arrow")):
            return read_image_folder(path)[:max_rows]

    rows = read_rows(source)
    caption_column = find_column(rows, caption_column, CAPTION_COLUMNS, "--caption_column", source)
    image_column = find_column(rows, image_column, IMAGE_COLUMNS, "--image_column", source)
    extract_to.mkdir(parents=True, exist_ok=True)
    pairs = []
    for number in tqdm(range(len(rows))[:max_rows], desc="Reading images", unit="image"):
        row = rows[number]
        image = row[image_column]
        if isinstance(image, dict):
            image = image["path"] if image["bytes"] is None else image["bytes"]
        if isinstance(image, bytes):
            file = extract_to / hashlib.sha256(image).hexdigest()[:32]
            file.write_bytes(image)
        else:
            file = folder / image
        check_image(file, f"{source}: row {number}")
        pairs.append((row[caption_column], file))
    check_captions([caption for caption, _ in pairs], source)
    return pairs


def read_image_folder(folder: Path) -> list[tuple[str, Path]]:
    """Read images with captions in NAME.txt, NAME.caption, or the metadata that ComfyUI and A1111 write into a PNG.

    Hidden files aren't data. Other files that aren't used are counted and named.
    """
    visible = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            visible.append(file)
    pairs = []
    used = set()
    for file in tqdm(visible, desc="Reading images", unit="file"):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        check_image(file, str(file))
        texts = [file.with_suffix(".txt"), file.with_suffix(".caption")]
        texts = [text for text in texts if text.is_file()]
        caption = read_text(texts[0]).strip() if texts else read_prompt(file)
        if caption:
            used.update([file, *texts])
            pairs.append((caption, file))
    unused = [str(file.relative_to(folder)) for file in visible if file not in used]
    if not pairs:
        raise ValueError(
            f"{folder}: none of its {len(visible)} files is an image with a caption. Captions are read from NAME.txt or "
            "NAME.caption beside NAME.png, from ComfyUI's or A1111's metadata, or from metadata.jsonl."
        )
    if unused:
        names = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        print(
            f"{folder}: left out {len(unused)} of {len(visible)} files, which aren't an image with a caption: {names}"
        )
    check_captions([caption for caption, _ in pairs], str(folder))
    return pairs


def check_image(file: Path, where: str) -> None:
    try:
        load_image(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: the image can't be read ({str(error)[:100]}); replace it or remove it") from error


def read_prompt(path: Path) -> str | None:
    """Return the prompt that A1111 (in `parameters`) or ComfyUI (in `prompt`) wrote into the image."""
    with Image.open(path) as image:
        parameters = image.info.get("parameters")
        graph = image.info.get("prompt")
    if parameters:
        prompt = re.split(r"^(?:Negative prompt: |Steps: )", parameters, maxsplit=1, flags=re.MULTILINE)[0]
        prompt = re.sub(r"<\w+:[^>]*>", "", prompt)  # <lora:name:1> names a file
        return " ".join(prompt.split()).strip(" ,")
    if graph:
        return find_comfyui_prompt(json.loads(graph))
    return None


def find_comfyui_prompt(graph: dict) -> str | None:
    """Follow the sampler's positive conditioning back to a text. A link is [name of a node, number of its output]."""
    names = []
    for key in ("positive", "conditioning"):
        for node in graph.values():
            if isinstance(node["inputs"].get(key), list):
                names.append(node["inputs"][key][0])
    seen = set()
    while names:
        name = names.pop(0)
        if name in seen or name not in graph:
            continue
        seen.add(name)
        inputs = graph[name]["inputs"]
        for key in ("text", "text_g", "t5xxl", "prompt", "value", "string"):
            if isinstance(inputs.get(key), str):
                return inputs[key].strip()
        for key, value in inputs.items():
            if isinstance(value, list) and key not in ("negative", "model", "clip", "vae"):
                names.insert(0, value[0])
    return None
