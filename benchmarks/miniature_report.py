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
The miniature's report: tables, curves and strips of images, made from the rows of miniature.jsonl.

It needs neither the model nor the drawings. A strip is drawn anew if the images of its runs are still there; otherwise
the one in the report's folder stays.
"""

from pathlib import Path

import numpy as np
from evaluation.common import markdown_table, write_whole
from evaluation.compare import bootstrap_interval
from matplotlib.figure import Figure
from miniature_tasks import FORMS, METHODS, SETTING, TASKS, make_pairs
from PIL import Image, ImageDraw, ImageFont


FIGURES = ("preferred", "recognised", "score", "distance", "frechet", "mse_w", "mse_l", "accuracy")
BASELINES = ("SFT", "Diffusion-DPO")


# ---- Rows -----------------------------------------------------------------------------------------------------------
def select_rows(rows: list[dict], wanted: dict) -> list[dict]:
    """Return the rows that have all wanted values."""
    return [row for row in rows if wanted.items() <= row.items()]


def best_searched_row(rows: list[dict], task: str, method: str) -> dict | None:
    """Return the row with the highest score on the validation captions; of equal ones, the most recognised images."""
    searched = select_rows(rows, {"task": task, "method": method, "split": "validation"})
    return max(searched, key=lambda row: (row["score"], row["recognised"]), default=None)


def final_rows(rows: list[dict], task: str, method: str) -> list[dict]:
    """Return the runs of the method's best setting on the test captions, one for each seed."""
    if method == "base":
        return select_rows(rows, {"task": task, "method": method, "split": "test"})
    best = best_searched_row(rows, task, method)
    if best is None:
        return []
    setting = {"task": task, "method": method, "split": "test", "pairs": 0, "noise": 0.0}
    for name in ("beta", "rate", "safeguard"):
        setting[name] = best[name]
    return select_rows(rows, setting)


def rows_like(rows: list[dict], row: dict, varied: tuple[str, ...]) -> list[dict]:
    """Return the runs that differ from one only in what is varied."""
    return select_rows(rows, {name: row[name] for name in SETTING if name not in varied})


def group_rows(rows: list[dict], name: str) -> dict:
    """Return the rows by their value of a setting, in ascending order; None comes first."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    values = sorted(groups, key=lambda value: -1 if value is None else value)
    return {value: groups[value] for value in values}


def mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def mean_scores(rows: list[dict]) -> np.ndarray:
    """Return each image's score, averaged over the seeds."""
    return np.mean([row["scores"] for row in rows], axis=0)


def score_interval(rows: list[dict], splits: dict, less: list[dict] | None = None) -> tuple[float, float, float]:
    """
    Return the runs' mean score and its 95% interval over the captions.

    Args:
        less: runs whose score is subtracted image by image, to see the difference.
    """
    scores = mean_scores(rows)
    if less is not None:
        scores = scores - mean_scores(less)
    captions = splits[rows[0]["task"]][rows[0]["split"]]
    low, high = bootstrap_interval(scores, captions)
    return float(scores.mean()), low, high


# ---- Tables ---------------------------------------------------------------------------------------------------------
def figure_cells(rows: list[dict], splits: dict) -> list[str]:
    """Return the mean of each figure over the runs, and the interval of the score."""
    cells = []
    for name in FIGURES:
        cell = f"{mean(rows, name):.3g}"
        if name == "score":
            _, low, high = score_interval(rows, splits)
            cell += f" ({low:.2f} to {high:.2f})"
        cells.append(cell)
    return cells


def setting_cell(row: dict) -> str:
    if row["beta"]:
        return f"beta {row['beta']:g}, {row['rate']:g}"
    return f"{row['rate']:g}"


def final_table(final: dict[str, list[dict]], splits: dict) -> str:
    lines = []
    for method, rows in final.items():
        setting = "" if method == "base" else setting_cell(rows[0])
        lines.append([method, setting, str(len(rows)), *figure_cells(rows, splits)])
    return markdown_table(["method", "best setting", "seeds", *FIGURES], lines)


def difference_table(final: dict[str, list[dict]], splits: dict) -> str:
    lines = []
    for method, rows in final.items():
        if method.startswith("MaPO") and all(baseline in final for baseline in BASELINES):
            line = [method]
            for baseline in BASELINES:
                difference, low, high = score_interval(rows, splits, less=final[baseline])
                line.append(f"{difference:+.2f} ({low:+.2f} to {high:+.2f})")
            lines.append(line)
    return markdown_table(["method", "less SFT", "less Diffusion-DPO"], lines)


def search_table(rows: list[dict], task: str, splits: dict) -> str:
    lines = []
    for row in select_rows(rows, {"task": task, "split": "validation"}):
        if row["method"] != "base":
            lines.append([row["method"], setting_cell(row), *figure_cells([row], splits)])
    return markdown_table(["method", "setting", *FIGURES], lines)


def mapo_table(rows: list[dict], task: str, splits: dict) -> str:
    runs = select_rows(rows, {"task": task, "split": "test", "pairs": 0, "noise": 0.0})
    runs = [row for row in runs if row["method"].startswith("MaPO")]
    lines = []
    for of_beta in group_rows(runs, "beta").values():
        for of_rate in group_rows(of_beta, "rate").values():
            for safeguard, seeds in group_rows(of_rate, "safeguard").items():
                line = [setting_cell(seeds[0]), str(safeguard), str(len(seeds)), f"{mean(seeds, 'margin_weight'):.3g}"]
                lines.append(line + figure_cells(seeds, splits))
    return markdown_table(["setting", "safeguard", "seeds", "margin's weight", *FIGURES], lines)


# ---- Pictures -------------------------------------------------------------------------------------------------------
def image_name(row: dict) -> str:
    values = [str(row[name]).replace(" ", "").replace("'", "") for name in SETTING]
    return "_".join(values) + ".png"


def save_row(images: list[Image.Image], path: Path) -> None:
    """Save twelve of a run's images side by side."""
    shown = [np.asarray(image) for image in images[2::4][:12]]
    Image.fromarray(np.concatenate(shown, axis=1)).save(path)


def save_chosen_rows(world, images_dir: Path) -> None:
    """Save each task's chosen drawings of the test captions, the last row of a strip."""
    images_dir.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        drawings = []
        for caption, chosen, _ in make_pairs(task, world.splits[task]["test"]):
            pixels = (world.drawings[chosen, caption] + 1) * 127.5
            drawings.append(Image.fromarray(pixels.permute(1, 2, 0).byte().numpy()))
        save_row(drawings, images_dir / f"chosen_{task}.png")


def save_strip(paths: dict[str, Path], path: Path) -> None:
    """Save rows of images, each with its name, if all of them are there."""
    if not all(image_path.exists() for image_path in paths.values()):
        return
    rows = {name: Image.open(image_path) for name, image_path in paths.items()}
    width, height = rows["chosen"].size
    strip = Image.new("RGB", (150 + width, (height + 6) * len(rows)), "white")
    pen = ImageDraw.Draw(strip)
    top = 0
    for name, row in rows.items():
        pen.text((6, top + height // 2), name, "black", ImageFont.load_default(13), "lm")
        strip.paste(row, (150, top))
        top += height + 6
    strip.save(path, quality=90)


def plot_means(axis, groups: dict, name: str, label: str) -> None:
    """Draw a line through the seeds' means, and a point for each seed."""
    if not groups:
        return
    (line,) = axis.plot(list(groups), [mean(rows, name) for rows in groups.values()], label=label)
    for x, rows in groups.items():
        axis.scatter([x] * len(rows), [row[name] for row in rows], color=line.get_color(), s=9)


def plot_curves(rows: list[dict], splits: dict, path: Path) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    lead, by_beta, weight_by_beta, by_pairs, by_noise, by_error = figure.subplots(2, 3).ravel()

    for task in TASKS:
        base = final_rows(rows, task, "base")
        mapo = final_rows(rows, task, "MaPO")
        dpo = final_rows(rows, task, "Diffusion-DPO")
        if base and mapo and dpo:
            difference, low, high = score_interval(mapo, splits, less=dpo)
            error = [[difference - low], [high - difference]]
            lead.errorbar(base[0]["similarity"], difference, error, fmt="o", label=task)
        if mapo:
            groups = group_rows(rows_like(rows, mapo[0], varied=("beta", "seed")), "beta")
            plot_means(by_beta, groups, "score", task)
            plot_means(weight_by_beta, groups, "margin_weight", task)
    lead.axhline(0, color="grey", linewidth=0.5)
    lead.set(xlabel="similarity of base and winners (right: less mismatch)", ylabel="score: MaPO - Diffusion-DPO")
    by_beta.set(xlabel="beta of MaPO", ylabel="score", xscale="log")
    label = "weight of the margin's gradient (SFT term: 1)"
    weight_by_beta.set(xlabel="beta of MaPO", ylabel=label, xscale="log", yscale="log")

    for method in METHODS:
        final = final_rows(rows, "known_style", method)
        if final:
            with_all_pairs = rows_like(rows, final[0], varied=("noise", "seed"))
            plot_means(by_noise, group_rows(with_all_pairs, "noise"), "score", method)
            groups = group_rows(rows_like(rows, final[0], varied=("pairs", "seed")), "pairs")
            all_pairs = groups.pop(0)
            groups[len(splits["known_style"]["train"])] = all_pairs
            plot_means(by_pairs, groups, "score", method)
    by_pairs.set(xlabel="pairs (known_style)", ylabel="score")
    by_noise.set(xlabel="fraction of swapped labels (known_style)", ylabel="score")

    for method in ("base", *METHODS, *FORMS):
        final = []
        for task in TASKS:
            final += final_rows(rows, task, method)
        by_error.scatter([row["mse_w"] for row in final], [row["score"] for row in final], label=method)
    by_error.set(xlabel="mse_w on held-out pairs", ylabel="score, all tasks")

    lead.legend(fontsize=7, loc="lower left")
    for axis in (by_beta, weight_by_beta, by_pairs, by_noise, by_error):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


# ---- Report ---------------------------------------------------------------------------------------------------------
def write_report(all_rows: list[dict], setups: list[dict], images_dir: Path, folder: Path) -> None:
    """Write report.md and its pictures for the setup of the last row. Tasks come in the order of their mismatch."""
    if not all_rows:
        raise ValueError("There are no runs to report on. Run the stages `search` and `final` first.")
    base = all_rows[-1]["base"]
    rows = select_rows(all_rows, {"base": base})
    (setup,) = select_rows(setups, {"base": base})
    splits = setup["splits"]
    folder.mkdir(parents=True, exist_ok=True)

    accuracy = ", ".join(f"{task} {value:.1%}" for task, value in setup["judge_accuracy"].items())
    text = f"# The paper in miniature\n\nBase {base}. Judges are right on drawings after the VAE: {accuracy}.\n"
    base_rows = []
    for task in TASKS:
        base_rows += final_rows(rows, task, "base")
    base_rows.sort(key=lambda row: -row["similarity"])
    for base_row in base_rows:
        text += "\n" + task_report(rows, base_row, splits, images_dir / base, folder)
    plot_curves(rows, splits, folder / "curves.png")
    text += "\n![curves](curves.png)\n"
    write_whole(folder / "report.md", text)


def task_report(rows: list[dict], base_row: dict, splits: dict, images_dir: Path, folder: Path) -> str:
    """Return a task's part of the report and save its strips."""
    task = base_row["task"]
    final = {}
    for method in ("base", *METHODS, *FORMS):
        found = final_rows(rows, task, method)
        if found:
            final[method] = found

    strips = {task: {method: images_dir / image_name(found[0]) for method, found in final.items()}}
    if "MaPO" in final:
        betas = group_rows(rows_like(rows, final["MaPO"][0], varied=("beta",)), "beta")
        if len(betas) > 1:
            strips[f"{task}_betas"] = {
                f"beta {beta:g}": images_dir / image_name(row) for beta, (row,) in betas.items()
            }

    text = f"## {task}\n\nSimilarity of the base's images and the winners: {base_row['similarity']:.2f}\n\n"
    text += final_table(final, splits) + "\n"
    text += "\nDifferences in score, images paired:\n\n" + difference_table(final, splits) + "\n"
    text += "\nAll settings that were tried, on the validation captions:\n\n"
    text += search_table(rows, task, splits) + "\n"
    text += "\nMaPO, on the test captions:\n\n" + mapo_table(rows, task, splits) + "\n"
    for name, paths in strips.items():
        paths["chosen"] = images_dir / f"chosen_{task}.png"
        save_strip(paths, folder / f"{name}.webp")
        text += f"\n![{name}]({name}.webp)\n"
    return text
