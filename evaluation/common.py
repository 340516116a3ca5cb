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
What the tools of this folder share: files that survive a kill, tables of prompts and images, and hashes.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import datasets
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pairs.files import check_captions, find_column, read_image_folder, read_rows
from train_diffusion_mapo_sdxl import load_image


def hash_content(*parts) -> str:
    """Hash strings, bytes and values that JSON can hold. What is reused between runs is found by such a hash."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


# ---- Files ----------------------------------------------------------------------------------------------------------
def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that a killed run never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def to_json_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class JsonLines:
    """A file of JSON rows that grows. A row is on disk when `add` returns.

    Attributes:
        rows: All rows of the file, those of earlier runs first.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(self.path, end)  # a killed run wrote half a row
        self.rows = []
        for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):  # str.splitlines would also split at U+2028
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} isn't JSON ({error}); correct or remove it") from error

    def add(self, *rows: dict) -> None:
        with open(self.path, "ab") as file:
            file.write(to_json_lines(rows).encode())
        self.rows += rows

    def rewrite(self, rows: list[dict]) -> None:
        """Replace all rows."""
        write_whole(self.path, to_json_lines(rows))
        self.rows = list(rows)


def markdown_table(head, rows) -> str:
    lines = []
    for cells in [head, ["---"] * len(head), *rows]:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(escaped) + " |")
    return "\n".join(lines)


# ---- Tables ---------------------------------------------------------------------------------------------------------
def load_rows(source: str, split: str = "train"):
    """Load a table of prompts or images.

    Args:
        source: A file (.txt with a prompt on each line, .jsonl, .json, .csv, .tsv, .parquet), a folder of
            `generate.py`, a folder of images with captions as `pairs/` reads it, or a data set.
        split: The split of a data set.

    Returns:
        The rows (dicts, or a `datasets.Dataset`), and the folder at which relative paths in them start.
    """
    path = Path(source)
    if path.is_file():
        return read_rows(source), path.parent
    for name in ("images.jsonl", "metadata.jsonl", "metadata.csv"):
        if (path / name).exists():
            return read_rows(str(path / name)), path
    if path.is_dir() and not any(file.suffix in (".parquet", ".arrow", ".tar") for file in path.rglob("*")):
        rows = []
        for caption, file in read_image_folder(path):
            rows.append({"caption": caption, "image": str(file.relative_to(path))})
        return rows, path
    dataset = datasets.load_dataset(source, split=split)
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):  # left as a file, to be hashed and decoded here
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset, path


def load_prompts(source: str, column: str | None = None, split: str = "train") -> list[dict]:
    """Load rows with a `prompt`. Other columns of text, numbers or lists stay with it."""
    rows, _ = load_rows(source, split)
    column = find_column(rows, column, ("prompt", "Prompt", "caption", "text"), "--prompt_column", source)
    prompts = []
    for row in rows:
        kept = {}
        for name, value in row.items():
            if name != column and isinstance(value, (str, int, float, list)):
                kept[name] = value
        prompts.append({"prompt": row[column], **kept})
    check_captions([row["prompt"] for row in prompts], source)
    return prompts


def file_bytes(value: bytes | str | dict, root: Path) -> bytes:
    """Return the file of an image that a table holds as bytes, as a path, or as datasets' {"bytes", "path"}."""
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    return value if isinstance(value, bytes) else (root / value).read_bytes()


def open_image(value: bytes | str | dict, root: Path, where: str) -> Image.Image:
    """Decode an image as training does: RGB, upright, sRGB, transparency on white. `where` is named in errors."""
    try:
        return load_image(file_bytes(value, root))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: the image can't be read ({error}); replace it or remove it") from error
