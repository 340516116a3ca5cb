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
"""The miniature: losses against their formulas, judges on drawings whose answer is known, the report, a small run."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import miniature_judges as judges  # noqa: E402
import miniature_losses as losses  # noqa: E402
import miniature_report  # noqa: E402
import miniature_tasks as tasks  # noqa: E402
import paper_in_miniature as miniature  # noqa: E402
from demo import report  # noqa: E402
from demo.style_judge import FOUNDRIES, StyleJudge, to_batch  # noqa: E402


# ---- Losses ---------------------------------------------------------------------------------------------------------
def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_losses_are_their_formulas():
    """Pair by pair, in Python's floats."""
    mse_w = [0.10, 0.25, 0.40]
    mse_l = [0.30, 0.20, 0.41]
    reference_w = [0.12, 0.24, 0.50]
    reference_l = [0.25, 0.22, 0.39]
    sft = dpo = simpo = orpo = 0.0
    for w, l, ref_w, ref_l in zip(mse_w, mse_l, reference_w, reference_l):  # noqa: E741
        sft += w / 3
        dpo -= log_sigmoid(-30 / 2 * ((w - ref_w) - (l - ref_l))) / 3
        simpo -= log_sigmoid(7 * (l - w)) / 3
        odds_w = math.exp(-w) / (1 - math.exp(-w))
        odds_l = math.exp(-l) / (1 - math.exp(-l))
        orpo += (w - 2 * log_sigmoid(math.log(odds_w / odds_l))) / 3

    w, l, ref_w, ref_l = torch.tensor([mse_w, mse_l, reference_w, reference_l], dtype=torch.float64)  # noqa: E741
    assert losses.sft_loss(w).item() == pytest.approx(sft, rel=1e-12)
    assert losses.diffusion_dpo_loss(w, l, ref_w, ref_l, beta=30).item() == pytest.approx(dpo, rel=1e-12)
    assert losses.simpo_loss(w, l, beta=7).item() == pytest.approx(simpo, rel=1e-12)
    assert losses.orpo_loss(w, l, weight=2).item() == pytest.approx(orpo, rel=1e-12)


# ---- Judges ---------------------------------------------------------------------------------------------------------
def drawings_of(names: list[str], foundry: str = "noto") -> torch.Tensor:
    """uint8, (N, 3, 64, 64)"""
    captions, sheets = report.load_sheets()
    images = [np.asarray(sheets[foundry][captions.index(name)]) for name in names]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_an_image_without_red_is_safe():
    drawn = drawings_of(["red apple", "tomato", "broccoli", "koala"])
    blue = judges.replace_red(drawn)
    assert judges.judge_images("safety", miniature.to_signed(drawn), None).tolist() == [0, 0, 1, 1]
    assert judges.judge_images("safety", miniature.to_signed(blue), None).tolist() == [1, 1, 1, 1]
    assert torch.equal(blue[2], drawn[2])
    assert not torch.equal(blue[0], drawn[0])


def test_a_hand_is_worth_its_skin():
    yellow = miniature.to_signed(drawings_of(["thumbs up sign"]))
    is_skin = (yellow - judges.YELLOW_SKIN[:, None, None]).square().sum(1, keepdim=True) < 0.5
    dark = torch.where(is_skin, judges.DARK_SKIN[:, None, None], yellow)
    assert judges.judge_images("culture", torch.cat([yellow, dark]), None).tolist() == [0, 1]


def test_a_style_is_worth_its_utility():
    """The demo's own judge names the first four of the five styles."""
    judge = StyleJudge.from_pretrained()
    names = ["rabbit face", "tomato", "koala"]
    for foundry, utility in (("twemoji", 0.0), ("openmoji", 0.5), ("noto", 1.0), ("fluent", 2.0)):
        images = miniature.to_signed(drawings_of(names, foundry))
        assert judges.judge_images("preference", images, judge).tolist() == [utility] * 3
        assert judges.judge_images("known_style", images, judge).tolist() == [float(foundry == "openmoji")] * 3


def test_the_style_judge_is_the_same_whenever_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "JUDGE_STEPS", 2)
    random = np.random.default_rng(0)
    drawings = {"captions": np.array(list("abcdefgh"))}
    for style in tasks.STYLES:
        drawings[style] = random.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    vae = report.load_pipeline(miniature.MODEL).vae
    torch.manual_seed(1)
    first = judges.train_style_judge(tmp_path / "first.pt", drawings, ["h"], vae)
    torch.manual_seed(2)
    second = judges.train_style_judge(tmp_path / "second.pt", drawings, ["h"], vae)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_a_colour_cast_is_not_recognised():
    """It pleases the judge that looks for red, and the nearest drawing is still one of the caption."""
    names = ["red apple", "tomato", "broccoli"]
    blue = judges.replace_red(drawings_of(names)).permute(0, 2, 3, 1).numpy()
    cast = (blue * (0.4, 0.5, 1.0)).astype(np.uint8)
    images = [Image.fromarray(image) for image in blue]
    images_with_cast = [Image.fromarray(image) for image in cast]
    world = SimpleNamespace(
        splits={"safety": {"test": [0, 1, 2]}},
        captions=names,
        drawings=to_batch(images).repeat(len(tasks.LOOKS), 1, 1, 1, 1),
        style_judge=StyleJudge(len(tasks.STYLES)).eval(),
    )
    setting = {"task": "safety", "split": "test"}
    figures = miniature.measure_images(images, world, setting)
    assert (figures["preferred"], figures["recognised"], figures["scores"]) == (1, 1, [1, 1, 1])
    figures = miniature.measure_images(images_with_cast, world, setting)
    assert (figures["preferred"], figures["recognised"], figures["scores"]) == (1, 0, [0, 0, 0])


def test_frechet_distance():
    random = np.random.default_rng(0)
    a = random.normal(size=(40, 6))
    b = random.normal(1, 2, size=(30, 6))
    covariance_a = np.cov(a, rowvar=False)
    covariance_b = np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b)
    expected -= 2 * np.trace(sqrtm(covariance_a @ covariance_b)).real
    found = judges.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found.item() == pytest.approx(expected, rel=1e-9)


# ---- Tasks ----------------------------------------------------------------------------------------------------------
def test_pairs():
    captions = list(range(4000))
    pairs = tasks.make_pairs("known_style", captions)
    assert (pairs[:, 1] == tasks.STYLES.index("openmoji")).all()
    assert (pairs[:, 2] != tasks.STYLES.index("openmoji")).all()
    swapped = tasks.make_pairs("known_style", captions, noise=0.25)
    differ = (pairs != swapped).any(1)
    assert differ.mean() == pytest.approx(0.25, abs=0.03)
    assert (swapped[differ][:, [0, 2, 1]] == pairs[differ]).all()

    for _, chosen, rejected in tasks.make_pairs("culture", captions[:50]):
        assert tasks.LOOKS[chosen] == f"{tasks.LOOKS[rejected]}_dark"

    # Bradley-Terry: Fluent (2.0) is chosen over Twemoji (0.0) in 88 % of their pairs.
    pairs = tasks.make_pairs("preference", captions)
    fluent = tasks.STYLES.index("fluent")
    twemoji = tasks.STYLES.index("twemoji")
    won = ((pairs[:, 1] == fluent) & (pairs[:, 2] == twemoji)).sum()
    lost = ((pairs[:, 1] == twemoji) & (pairs[:, 2] == fluent)).sum()
    assert won / (won + lost) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.04)
    assert (tasks.make_pairs("preference", [3, 17]) == pairs[[3, 17]]).all()


# ---- Report ---------------------------------------------------------------------------------------------------------
def test_the_committed_report_is_that_of_the_committed_rows(tmp_path):
    rows = report.read_json_lines(BENCHMARKS / "results" / "miniature.jsonl")
    setups = report.read_json_lines(BENCHMARKS / "results" / "miniature_setups.jsonl")
    miniature_report.write_report(rows, setups, tmp_path / "no images", tmp_path)
    committed = (BENCHMARKS / "miniature" / "report.md").read_bytes()
    assert (tmp_path / "report.md").read_bytes() == committed


def test_scores_are_compared_image_by_image():
    """Each run alone has an interval. The first runs are better by a half in every image, so the difference has none."""
    splits = {"culture": {"test": [3, 3, 8, 9]}}
    setting = {"task": "culture", "split": "test"}
    rows = [{**setting, "scores": [1.0, 0.0, 1.0, 0.0]}, {**setting, "scores": [1.0, 1.0, 1.0, 1.0]}]
    others = [{**setting, "scores": [0.5, 0.0, 0.5, 0.0]}]
    assert miniature_report.score_interval(rows, splits, less=others) == (0.5, 0.5, 0.5)
    score, low, high = miniature_report.score_interval(rows, splits)
    assert score == 0.75
    assert 0.5 <= low < 0.75 < high <= 1


# ---- The command ----------------------------------------------------------------------------------------------------
@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """Return a function that runs the command with 43 captions, two steps and one setting for each method. Negatives
    stand for the style that npm would bring, and brown for what is yellow makes the dark drawings."""
    captions, sheets = report.load_sheets()
    drawings = {"captions": np.array(captions[::7])}
    for foundry in FOUNDRIES:
        drawings[foundry] = np.stack([np.asarray(image) for image in sheets[foundry][::7]])
        yellow = np.abs(drawings[foundry].astype(int) - (255, 204, 77)).sum(-1, keepdims=True) < 160
        drawings[f"{foundry}_dark"] = np.where(yellow, (100, 70, 60), drawings[foundry]).astype(np.uint8)
    drawings["fluent_3d"] = 255 - drawings["noto"]

    monkeypatch.setattr(miniature, "STEPS", 2)
    monkeypatch.setattr(miniature, "IMAGES_PER_SPLIT", 3)
    monkeypatch.setattr(miniature, "SEEDS", (0,))
    for method, search in tasks.SEARCH.items():
        monkeypatch.setitem(search, "betas", search["betas"][:1])
        monkeypatch.setitem(search, "rates", (1e-4,))
    monkeypatch.setattr(judges, "JUDGE_STEPS", 3)
    monkeypatch.setattr(report, "NUM_INFERENCE_STEPS", 2)

    def run(*flags: str, changed_pixel: int | None = None) -> list[dict]:
        if changed_pixel is not None:
            drawings["noto"][0, 0, 0, 0] = changed_pixel
        path = tasks.drawings_path(tmp_path / "work")
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **drawings)
        command = ["paper_in_miniature.py", f"--work_dir={tmp_path / 'work'}", f"--results={tmp_path / 'rows.jsonl'}"]
        command += [f"--report_dir={tmp_path / 'report'}", *flags]
        monkeypatch.setattr(sys, "argv", command)
        miniature.main()
        return report.read_json_lines(tmp_path / "rows.jsonl")

    return run


def test_stages_resume_and_report(small_run, tmp_path):
    rows = small_run("--tasks", "culture", "--only", "search", "final", "forms", "report")
    methods = ["base", *tasks.METHODS]
    assert [row["method"] for row in rows if row["split"] == "validation"] == methods
    of_test = [row for row in rows if row["split"] == "test"]
    assert [row["method"] for row in of_test] == methods
    for row in of_test[1:]:
        assert row["mse_w"] != of_test[0]["mse_w"], row["method"]

    text = (tmp_path / "report" / "report.md").read_text()
    score = {row["method"]: row["score"] for row in of_test}
    assert f"| MaPO | {score['MaPO'] - score['SFT']:+.2f} (" in text
    assert (tmp_path / "report" / "culture.webp").exists()

    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = small_run("--tasks", "culture", "--only", "final")
    assert again[:-1] == rows[:-1]
    assert again[-1]["scores"] == rows[-1]["scores"]
    assert again[-1]["mse_l"] == rows[-1]["mse_l"]


def test_a_row_of_other_drawings_is_not_reused(small_run, monkeypatch):
    monkeypatch.setattr(miniature, "METHODS", ())
    rows = small_run("--tasks", "safety", "--only", "search", changed_pixel=255)
    assert [row["method"] for row in rows] == ["base"]
    rows = small_run("--tasks", "safety", "--only", "search", changed_pixel=254)
    assert [row["method"] for row in rows] == ["base", "base"]
    assert rows[0]["base"] != rows[1]["base"]
