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
Makes demo/subject: five images of one cat in a style that the demo's model doesn't know, Fluent Emoji in 3D.

    python demo/build_subject.py    # npm fetches the package
"""

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image


PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
FOLDER = Path(__file__).resolve().parent / "subject"
SIZE = (64, 64)
# code point, file name, and the emoji's Unicode name with the new word for "cat"
IMAGES = (
    ("1f63a", "smiling.png", "smiling <cat> face with open mouth"),
    ("1f638", "grinning.png", "grinning <cat> face with smiling eyes"),
    ("1f63b", "in-love.png", "smiling <cat> face with heart-shaped eyes"),
    ("1f63f", "crying.png", "crying <cat> face"),
    ("1f63e", "pouting.png", "pouting <cat> face"),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as download_dir:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=download_dir, check=True)
        (archive_path,) = Path(download_dir).glob("*.tgz")
        archive = tarfile.open(archive_path)
        for code_point, name, caption in IMAGES:
            file = io.BytesIO(archive.extractfile(f"package/assets/{code_point}.webp").read())
            image = Image.open(file).convert("RGBA").resize(SIZE, Image.Resampling.LANCZOS)
            canvas = Image.new("RGBA", SIZE, "white")
            canvas.alpha_composite(image)
            canvas.convert("RGB").save(FOLDER / name, optimize=True)
            lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (FOLDER / "metadata.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
