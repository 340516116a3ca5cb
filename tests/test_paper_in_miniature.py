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
"""The baselines of benchmarks/paper_in_miniature.py against their papers, and a small run of all its stages."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import paper_in_miniature as miniature  # noqa: E402


def test_diffusion_dpo_is_its_papers_loss():
    """Eq. 14 of arXiv 2311.12908, pair by pair in Python's floats, which are float64."""
    mse_w, mse_l, ref_w, ref_l = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta, total = 30.0, 0.0
    for won, lost, ref_won, ref_lost in zip(*(x.tolist() for x in (mse_w, mse_l, ref_w, ref_l))):
        inside = -(beta / 2) * (won - ref_won - (lost - ref_lost))
        total += -math.log(1 / (1 + math.exp(-inside)))
    assert miniature.diffusion_dpo_loss(mse_w, mse_l, ref_w, ref_l, beta).item() == pytest.approx(total / 5, rel=1e-12)


def test_the_forms_of_simpo_and_orpo():
    mse_w, mse_l = torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    simpo = -math.log(1 / (1 + math.exp(-7 * (0.3 - 0.1))))
    assert miniature.simpo_loss(mse_w, mse_l, 7).item() == pytest.approx(simpo, rel=1e-12)
    odds_w, odds_l = (math.exp(-x) / (1 - math.exp(-x)) for x in (0.1, 0.3))
    orpo = 0.1 - 2 * math.log(1 / (1 + odds_l / odds_w))
    assert miniature.orpo_loss(mse_w, mse_l, 2).item() == pytest.approx(orpo, rel=1e-12)


def test_frechet_distance_is_that_of_the_gaussians():
    from scipy.linalg import sqrtm

    random = np.random.default_rng(0)
    a, b = random.normal(size=(40, 6)), random.normal(1, 2, size=(30, 6))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * np.trace(sqrtm(
        covariances[0] @ covariances[1])).real  # fmt: skip
    found = miniature.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_pairs_follow_the_tasks():
    captions = list(range(400))
    known = miniature.make_pairs("known_style", captions)
    assert (known[:, 1] == miniature.STYLES.index("openmoji")).all() and (known[:, 1] != known[:, 2]).all()
    swapped = miniature.make_pairs("known_style", captions, noise=0.25)
    differ = (known != swapped).any(1)
    assert 70 < differ.sum() < 130 and (swapped[differ][:, [0, 2, 1]] == known[differ]).all()
    # Bradley-Terry: fluent (2.0) over twemoji (0.0) in 88 of 100
    labels = miniature.make_pairs("preference", list(range(4000)))
    fluent, twemoji = miniature.STYLES.index("fluent"), miniature.STYLES.index("twemoji")
    met = labels[(np.sort(labels[:, 1:], 1) == sorted((fluent, twemoji))).all(1)]
    assert (met[:, 1] == fluent).mean() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.04)
    culture = miniature.make_pairs("culture", captions)
    looks = np.array(miniature.LOOKS)
    assert all(winner == f"{loser}_dark" for winner, loser in zip(looks[culture[:, 1]], looks[culture[:, 2]]))
    # a selection has the same pairs
    assert (miniature.make_pairs("preference", [3, 17]) == labels[[3, 17]]).all()


def test_what_a_drawing_is_worth():
    captions, sheets = miniature.load_sheets()
    names = ("red apple", "tomato", "broccoli", "koala", "thumbs up sign")
    drawn = np.stack([np.asarray(sheets["noto"][captions.index(name)]) for name in names])
    drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    blue = miniature.without_red(drawn)
    worths = [miniature.worth("safety", images.float() / 127.5 - 1, None).tolist() for images in (drawn[:4], blue[:4])]
    assert worths == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert (blue[2] == drawn[2]).all() and (blue[0] != drawn[0]).any()
    hand = drawn[4:].float() / 127.5 - 1
    yellow = (hand - miniature.HAND_COLOURS[0, :, None, None]).square().sum(1, keepdim=True) < 0.5
    dark = torch.where(yellow, miniature.HAND_COLOURS[1, :, None, None], hand)
    assert miniature.worth("culture", torch.cat([hand, dark]), None).tolist() == [0, 1]


def test_a_cast_over_the_whole_image_is_not_recognised():
    """It pleases a judge that looks for red, and the nearest drawing is still one of the caption."""
    captions, sheets = miniature.load_sheets()
    names = ["red apple", "tomato", "broccoli"]
    drawn = torch.from_numpy(np.stack([np.asarray(sheets["noto"][captions.index(name)]) for name in names]))
    blue = miniature.without_red(drawn.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    cast = (blue * (0.4, 0.5, 1.0)).astype(np.uint8)
    shape = (len(miniature.LOOKS), 1, 1, 1, 1)
    drawings = miniature.to_batch([Image.fromarray(image) for image in blue])[None].repeat(shape)
    splits = {"safety": {"test": [0, 1, 2]}}
    judge = miniature.StyleJudge(len(miniature.STYLES)).eval()
    world = SimpleNamespace(splits=splits, captions=names, drawings=drawings, judge=judge)
    setting = {"task": "safety", "split": "test"}
    for images, recognised in ((blue, 1), (cast, 0)):
        figures = miniature.image_figures([Image.fromarray(image) for image in images], world, setting)
        assert (figures["preferred"], figures["recognised"], figures["score"]) == (1, recognised, recognised)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """60 captions, two steps, a judge of three; made on the spot: negatives for the style that npm would bring, and
    what is yellow in brown for skin."""
    captions, sheets = miniature.load_sheets()
    arrays = {style: np.stack([np.asarray(image) for image in images[:60]]) for style, images in sheets.items()}
    for style in sheets:
        brown = np.abs(arrays[style].astype(int) - (255, 204, 77)).sum(-1, keepdims=True) < 160
        arrays[f"{style}_dark"] = np.where(brown, (100, 70, 60), arrays[style]).astype(np.uint8)
    arrays |= {"fluent_3d": 255 - arrays["noto"], "captions": np.array(captions[:60])}
    monkeypatch.setattr(miniature, "render_styles", lambda work_dir: arrays)
    monkeypatch.setattr(miniature, "STEPS", 2)
    monkeypatch.setattr(miniature, "JUDGE_STEPS", 3)
    grid = {method: ((beta,), (1e-4,)) for method, beta in (("SFT", 0), ("Diffusion-DPO", 100), ("MaPO", 8))}
    monkeypatch.setattr(miniature, "GRID", grid)
    monkeypatch.setattr(miniature, "FORMS", {})
    monkeypatch.setattr(miniature, "SEEDS", (0,))
    monkeypatch.setattr(miniature, "MAX_CAPTIONS", 3)
    monkeypatch.setattr("demo.report.NUM_INFERENCE_STEPS", 2)
    return tmp_path


def test_stages_and_report(small, monkeypatch, capsys):
    flags = [f"--work_dir={small / 'work'}", f"--results={small / 'runs.jsonl'}", f"--report_dir={small / 'report'}"]
    flags += ["--tasks", "known_style", "culture", "--only", "search", "final", "report"]
    monkeypatch.setattr(sys, "argv", ["paper_in_miniature.py", *flags])
    miniature.main()
    rows = [json.loads(line) for line in (small / "runs.jsonl").open()]
    assert [row["split"] for row in rows].count("validation") == 2 * (1 + 3)
    assert [row["split"] for row in rows].count("test") == 2 * (1 + 3)
    base, *runs = [row for row in rows if row["split"] == "test" and row["task"] == "culture"]
    assert base["method"] == "base" and all(row["mse_w"] != base["mse_w"] for row in runs)
    report = (small / "report" / "report.md").read_text()
    assert "| Diffusion-DPO | beta 100, " in report and (small / "report" / "culture.webp").exists()
    sft, _, mapo = ([row["score"] for row in runs if row["method"] == name] for name in miniature.GRID)
    assert f"| MaPO | {mapo[0] - sft[0]:+.2f} (" in report.partition("## culture")[2]
    capsys.readouterr()
    miniature.main()  # everything is there: nothing is run
    assert "method=" not in capsys.readouterr().out
    assert len((small / "runs.jsonl").read_text().splitlines()) == len(rows)


def test_scores_are_compared_image_by_image():
    """Each run alone has an interval; the first ones' images are all better by a half, so the difference has none."""
    world = SimpleNamespace(splits={"culture": {"test": [3, 3, 8, 9]}})
    setting = {"task": "culture", "split": "test"}
    rows = [setting | {"scores": scores} for scores in ([1.0, 0, 1, 0], [1.0, 1, 1, 1])]
    others = [setting | {"scores": [0.5, 0, 0.5, 0]}]
    assert miniature.interval(rows, world, less=others) == (0.5, 0.5, 0.5)
    mean, low, high = miniature.interval(rows, world)
    assert mean == 0.75 and 0.5 <= low < 0.75 < high <= 1


def test_a_stage_runs_only_the_tasks_that_are_asked_for():
    asked = []
    runs = SimpleNamespace(get=lambda task, *_, **__: asked.append(task), best=lambda *_: {"beta": 8, "rate": 1e-4})
    for name in ("final", "forms", "safeguard", "betas", "pairs", "noise"):
        miniature.STAGES[name](runs, ["culture"])
    assert set(asked) == {"culture"}


def test_seeds_are_averaged_a_setting():
    rows = [
        {"safeguard": safeguard, "score": score} for safeguard, score in ((0.9, 1), (None, 2), (0.0, 4), (None, 5))
    ]
    groups = miniature.group(rows, "safeguard")
    assert [(key, miniature.mean(found, "score")) for (key,), found in groups.items()] == [
        (None, 3.5),
        (0.0, 4),
        (0.9, 1),
    ]
