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
The miniature's tasks, its searches, and its drawings and pairs.

A look is a way to draw a caption: one of five styles, or a foundry's style with one thing changed. A pair is a row
(caption, chosen look, rejected look) of indices.
"""

import hashlib
from itertools import product
from pathlib import Path

import numpy as np
from demo import build_demo
from demo.style_judge import FOUNDRIES
from tqdm.auto import tqdm


# ---- Tasks ----------------------------------------------------------------------------------------------------------
STYLES = (*FOUNDRIES, "fluent_3d")
LOOKS = (
    *STYLES,
    "twemoji_dark",
    "noto_dark",
    "fluent_dark",
    "openmoji_dark",
    "twemoji_without_red",
    "noto_without_red",
    "fluent_without_red",
    "openmoji_without_red",
)

TASKS = ("preference", "culture", "safety", "known_style", "unknown_style")
# Tasks about a style: what an image in that style is worth. Other styles are worth 0.
UTILITIES = {
    "preference": {"openmoji": 0.5, "noto": 1.0, "fluent": 2.0},
    "known_style": {"openmoji": 1.0},
    "unknown_style": {"fluent_3d": 1.0},
}
# Tasks about colours: the change that makes a foundry's drawing the chosen one.
VARIANTS = {"culture": "dark", "safety": "without_red"}


def make_pairs(task: str, captions: list[int], noise: float = 0.0) -> np.ndarray:
    """
    Return a pair for each caption. The same caption always has the same pair.

    Args:
        noise: fraction of the pairs whose chosen and rejected drawing are swapped.

    Returns:
        Shape: (N, 3): index of the caption, then the indices in LOOKS of the chosen and the rejected drawing.
    """
    random = np.random.default_rng(0)
    pairs = []
    for caption in range(max(captions) + 1):
        first, second = random.permutation(len(FOUNDRIES))[:2]
        if task in VARIANTS:
            chosen = LOOKS.index(f"{FOUNDRIES[first]}_{VARIANTS[task]}")
            rejected = first
        elif task == "preference":
            # Bradley-Terry: the style with the higher utility is only more likely to be chosen.
            utility_first = UTILITIES[task].get(FOUNDRIES[first], 0.0)
            utility_second = UTILITIES[task].get(FOUNDRIES[second], 0.0)
            if random.random() < 1 / (1 + np.exp(utility_second - utility_first)):
                chosen = first
                rejected = second
            else:
                chosen = second
                rejected = first
        else:
            (style,) = UTILITIES[task]
            chosen = STYLES.index(style)
            rejected = second if first == chosen else first
        if random.random() < noise:
            pairs.append((caption, rejected, chosen))
        else:
            pairs.append((caption, chosen, rejected))
    return np.array(pairs)[captions]


# ---- Searches -------------------------------------------------------------------------------------------------------
# Every beta of a method is tried with every learning rate.
SEARCH = {
    "SFT": {"betas": (0,), "rates": (1e-5, 3e-5, 1e-4, 3e-4)},
    "Diffusion-DPO": {"betas": (1000, 5000, 20_000, 100_000), "rates": (1e-5, 3e-5, 1e-4)},
    "MaPO": {"betas": (8, 64), "rates": (1e-5, 3e-5, 1e-4)},
    "MaPO, safeguard": {"betas": (8,), "rates": (1e-5, 3e-5, 1e-4)},
    "SimPO's form": {"betas": (100, 1000), "rates": (1e-5, 3e-5, 1e-4)},
    "ORPO's form": {"betas": (1, 10), "rates": (1e-5, 3e-5, 1e-4)},
}
METHODS = ("SFT", "Diffusion-DPO", "MaPO", "MaPO, safeguard")
FORMS = ("SimPO's form", "ORPO's form")
SEEDS = (0, 1, 2)
# What each stage runs with every seed: a method, and what it changes in the best setting found for that method.
STAGES = {
    "final": [(method, {}) for method in METHODS],
    "forms": [(method, {}) for method in FORMS],
    "safeguard": [("MaPO, safeguard", {"safeguard": mu}) for mu in (0.0, 0.5, 0.8, 0.9)],
    "betas": [("MaPO", {"beta": beta}) for beta in (0.1, 1, 8, 64, 512, 4096)],
    "pairs": [(method, {"pairs": number}) for number, method in product((25, 49, 98), METHODS)],
    "noise": [(method, {"noise": noise}) for noise, method in product((0.2, 0.4), METHODS)],
}
KNOWN_STYLE_ONLY = ("forms", "pairs", "noise")

# What identifies a run, next to `base`.
SETTING = ("task", "method", "beta", "rate", "safeguard", "pairs", "noise", "seed", "split")


# ---- Drawings -------------------------------------------------------------------------------------------------------
def drawings_path(work_dir: Path) -> Path:
    """Return the file that `load_drawings` keeps, named by all that the drawings are made of."""
    recipe = [STYLES, build_demo.NAMES, build_demo.SUBCATEGORIES.pattern]
    recipe += [build_demo.PACKAGES, build_demo.UNSEEN_PACKAGES]
    return work_dir / f"drawings-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}.npz"


def load_drawings(work_dir: Path) -> dict[str, np.ndarray]:
    """
    Return the drawings of all emoji that every style has; the first call downloads and renders them.

    Returns:
        `captions` (N,), and for each style and each FOUNDRY_dark the drawings, (N, 64, 64, 3) uint8. An emoji without
        skin looks the same in FOUNDRY_dark.
    """
    path = drawings_path(work_dir)
    if path.exists():
        return dict(np.load(path))

    names = build_demo.read_json(build_demo.open_package(*build_demo.NAMES, work_dir), "chars.json")
    package, version, _ = build_demo.PACKAGES["twemoji"]
    entries = build_demo.read_json(build_demo.open_package(package, version, work_dir), "emoji.json")
    entries = [entry for entry in entries if build_demo.SUBCATEGORIES.fullmatch(entry["subcategory"])]
    entries.sort(key=lambda entry: entry["sort_order"])
    readers = {style: build_demo.drawing_reader(style, names, work_dir) for style in STYLES}

    drawings = {"captions": []}
    for style in STYLES:
        drawings[style] = []
    for foundry in FOUNDRIES:
        drawings[f"{foundry}_dark"] = []
    for entry in tqdm(entries, desc="drawings"):
        found = {style: readers[style](entry) for style in STYLES}
        if any(drawing is None for drawing in found.values()):
            continue
        drawings["captions"].append(build_demo.caption_of(entry))
        for style in STYLES:
            drawings[style].append(found[style])
        darkest = entry.get("skin_variations", {}).get("1F3FF")
        for foundry in FOUNDRIES:
            dark = readers[foundry](darkest) if darkest else None
            drawings[f"{foundry}_dark"].append(found[foundry] if dark is None else dark)

    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **drawings)
    temporary.replace(path)
    return dict(np.load(path))
