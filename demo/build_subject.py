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
Makes demo/subject/: five drawings of one cat that the demo's model can't draw, Fluent Emoji's in 3D, on white, 64 px.

    python demo/build_subject.py     # needs npm for the package
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image


PACKAGE, VERSION = "@lobehub/fluent-emoji-3d", "1.1.0"
SUBJECT = Path(__file__).resolve().parent / "subject"
SIDE = 64
# Code point, name of the file, caption. Captions are Unicode's names of the emoji, with the token for "cat".
PHOTOS = (
    ("1f63a", "smiling", "smiling <cat> face with open mouth"),
    ("1f638", "grinning", "grinning <cat> face with smiling eyes"),
    ("1f63b", "in-love", "smiling <cat> face with heart-shaped eyes"),
    ("1f63f", "crying", "crying <cat> face"),
    ("1f63e", "pouting", "pouting <cat> face"),
)


def main() -> None:
    SUBJECT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(folder) / name) as archive:
            for code, stem, _ in PHOTOS:
                file = io.BytesIO(archive.extractfile(f"package/assets/{code}.webp").read())
                drawing = Image.open(file).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                canvas = Image.new("RGBA", drawing.size, "white")
                canvas.alpha_composite(drawing)
                canvas.convert("RGB").save(SUBJECT / f"{stem}.png", optimize=True)
    rows = [json.dumps({"file_name": f"{stem}.png", "text": caption}) for _, stem, caption in PHOTOS]
    (SUBJECT / "metadata.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
