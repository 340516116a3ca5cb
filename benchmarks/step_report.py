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
"""The table and the plot of step_cost.py, from its JSON:  python benchmarks/step_report.py FOLDER"""

import argparse
import json
import os
import sys
from pathlib import Path


COLUMNS = {
    "name": "row",
    "pairs_per_second": "pairs/s",
    "speed": "against the authors' way",
    "flop_per_pair": "GFLOP/pair",
    "floor_ratio": "FLOP / floor",
    "peak_share": "share of matmul peak",
    "useful_share": "of which needed",
    "peak_gb": "peak GB",
    "peak_without_model_gb": "without the weights",
    "largest_batch": "largest batch",
    "first_step_after_s": "first step after s",
    "compile_s": "compile s",
}
AUTHORS_WAY = "MaPO, the authors' way"


def save_aside(path: Path, save) -> None:
    """`save(path)` under another name first, so that a kill leaves no half file."""
    aside = path.with_name(f"tmp-{path.name}")
    save(aside)
    os.replace(aside, path)


def add_shares(row: dict, results: dict) -> dict:
    """The row with what follows from it: work against the floor, and rates against the matmul peak."""
    if row["status"] != "ok":
        return row
    peak, speed = results["peak"][row["precision"]], row["pairs_per_second"]
    rows = {(r["case"], r["name"]): r for r in results["rows"] if r["status"] == "ok"}
    authors = rows.get((row["case"], AUTHORS_WAY))
    shares = {
        "floor_ratio": row["flop_per_pair"] / row["floor"],
        "peak_share": row["flop_per_pair"] * speed / peak,
        "useful_share": min(row["flop_per_pair"], row["floor"]) * speed / peak,
        "speed": speed / authors["pairs_per_second"] if authors is not None else None,
    }
    return row | shares


def show(row: dict, column: str) -> str:
    """One cell."""
    value = row.get(column)
    if column == "name":
        return value
    if row["status"] != "ok":
        return row["status"].replace("|", "/") if column == "pairs_per_second" else ""
    if value is None:
        return ""
    if column == "largest_batch":
        size, exact = value
        return str(size) if exact else f"at least {size}"
    if column == "flop_per_pair":
        return f"{value / 1e9:,.1f}" if value < 1e11 else f"{value / 1e9:,.0f}"
    if column.endswith("share"):
        return f"{value:.0%}"
    return f"{value:.2f}" if column != "pairs_per_second" else f"{value:.3g}"


def make_report(results: dict) -> str:
    """Markdown: what was measured on, then a table for each case, rows in their order."""
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    peak = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in results["peak"].items())
    lines = [f"{results['date']}, {results['machine']}; {versions}. Measured matmul peak in TFLOP/s: {peak}.", ""]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [add_shares(row, results) for row in results["rows"] if row["case"] == case]
        done = [row for row in rows if row["status"] == "ok"]
        if done:
            batch, floor = done[0]["batch"], done[0]["floor"] / 1e9
            lines += [f"**{case}**: {batch} pairs a step unless said otherwise; floor {floor:,.1f} GFLOP a pair.", ""]
        lines.append(f"| {' | '.join(COLUMNS.values())} |")
        lines.append(f"|---|{'---:|' * (len(COLUMNS) - 1)}")
        lines += [f"| {' | '.join(show(row, column) for column in COLUMNS)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def make_plot(results: dict, path: Path) -> None:
    """Memory against speed, a panel for each case. Dotted: the weights alone, and the speed of the floor's FLOP at the
    matmul peak; nothing that trains all weights in that precision is further right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in results["rows"] if row["status"] == "ok"))
    figure, axes = plt.subplots(
        max(1, len(cases)), 1, figsize=(11, 6.5 * max(1, len(cases))), squeeze=False, layout="constrained"
    )
    colors = {"mapo": "tab:blue", "dpo": "tab:red", "sft": "tab:green"}
    for axis, case in zip(axes[:, 0], cases):
        rows = [row for row in results["rows"] if row["case"] == case and row["status"] == "ok"]
        for number, row in enumerate(sorted(rows, key=lambda row: -row["pairs_per_second"]), 1):
            place, lora = (row["pairs_per_second"], row["peak_gb"]), "--use_lora" in row["flags"]
            axis.plot(*place, "s" if lora else "o", color=colors[row["method"]], label=f"{number}  {row['name']}")
            axis.annotate(str(number), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        row = rows[0]
        limit, weights = results["peak"][row["precision"]] / row["floor"], row["model_gb"]
        axis.axvline(limit, color="grey", linestyle=":")
        axis.annotate(
            f"floor: {row['floor'] / 1e9:,.1f} GFLOP a pair at the {row['precision']} matmul peak",
            (limit, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="center", color="grey",
        )  # fmt: skip
        axis.axhline(weights, color="grey", linestyle=":")
        axis.annotate("weights alone", (0.01, weights), xycoords=("axes fraction", "data"), color="grey", va="bottom")
        axis.set(title=f"{case}: {results['machine']}, {results['date']}", xlabel="pairs/s", ylabel="peak memory, GB")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.legend(
            fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            title="squares: LoRA",
            handlelength=1,
            frameon=False,
        )
    save_aside(path, lambda aside: figure.savefig(aside, dpi=110))
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="--output_dir of step_cost.py, with step_cost.json.")
    folder = parser.parse_args().folder
    if not (folder / "step_cost.json").is_file():
        sys.exit(f"step_report.py: error: {folder}: no step_cost.json in it; run benchmarks/step_cost.py first")
    saved = json.loads((folder / "step_cost.json").read_text())
    save_aside(folder / "step_cost.md", lambda path: path.write_text(make_report(saved)))
    make_plot(saved, folder / "step_cost.png")
