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
Compare models by the scores of the same prompts and seeds:

    python evaluation/compare.py eval --base base

writes report.md, report.json and report.html into `eval/`. The page shows the images side by side, sorted by
difference, and needs no other file. For every metric and every model against the base:

- the means, the mean difference, and the win rate, in which a tie is half a win, over all prompts and seeds,
- 95 % bootstrap intervals that resample whole prompts, because the seeds of a prompt resemble each other. If every
  image wins, or none, resampling shows nothing, and the interval is Clopper and Pearson's for that many prompts,
- p of the two-sided sign-flip test: if the models were alike, the difference of a prompt would be as likely to be
  positive as negative. It is exact up to 13 prompts and uses 9,999 random flips above that,
- the same p after Holm's correction for all tests in the report.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import JsonLines, hash_content, markdown_table, open_image, write_json, write_whole


RESAMPLES = 9999
PAGE = Path(__file__).with_name("compare.html")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="Folder of generate.py and score.py.")
    parser.add_argument("--scores", type=Path, help="The default is scores.jsonl in that folder.")
    parser.add_argument("--base", required=True, help="The model with which the others are compared.")
    parser.add_argument("--models", nargs="+", help="The models to compare. The default is all others.")
    parser.add_argument("--metrics", nargs="+", help="The default is all that were scored.")
    parser.add_argument("--html_rows", type=int, default=100, help="Prompts on the page: those that differ most.")
    parser.add_argument("--html_pixels", type=int, default=256, help="Longer side of the images on the page.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstrap and of the sign flips.")
    parser.add_argument("--output_dir", type=Path, help="The default is the folder of the images.")
    return parser.parse_args(argv)


# ---- Statistics -----------------------------------------------------------------------------------------------------
def cluster_sums(values: np.ndarray, clusters: list) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values in each cluster. Shape: (N,), (N,) -> (C,), (C,)."""
    _, index = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / counts.sum(axis)


def bootstrap_interval(values: np.ndarray, clusters: list, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, resampling whole clusters; NaN for one cluster."""
    sums, counts = cluster_sums(values, clusters)
    if len(sums) < 2:
        return float("nan"), float("nan")
    interval = bootstrap(
        (sums, counts),
        ratio_of_sums,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def win_rate_interval(wins: np.ndarray, clusters: list, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a win rate, given the wins as 0, 0.5 or 1."""
    count = len(set(clusters))
    if count >= 2 and wins.min() == wins.max() and wins[0] != 0.5:
        low, high = proportion_confint(count * wins[0], count, method="beta")
        return float(low), float(high)
    return bootstrap_interval(wins, clusters, seed)


def sign_flip_p(differences: np.ndarray, clusters: list, seed: int = 0) -> float:
    """Return the two-sided p of the hypothesis that the clusters' sums are symmetric around 0."""
    sums, _ = cluster_sums(differences, clusters)
    if len(sums) < 2 or not sums.any():
        return 1.0
    test = permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


# ---- Comparison -----------------------------------------------------------------------------------------------------
def read_scores(path: Path, root: Path) -> dict:
    """Return the rows as scores[metric][model][prompt_id, seed]. Raise ValueError if an image has changed since."""
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist. Run score.py first.")
    scores = {}
    hashes = {}
    for row in tqdm(JsonLines(path).rows, desc="Reading scores", unit="score"):
        if "path" in row:
            if row["path"] not in hashes:
                hashes[row["path"]] = hash_content((root / row["path"]).read_bytes())
            if hashes[row["path"]] != row["image"]:
                raise ValueError(f"{root / row['path']} isn't the image that was scored. Run score.py again.")
        by_model = scores.setdefault(row["metric"], {})
        by_model.setdefault(row["model"], {})[row["prompt_id"], row["seed"]] = row
    return scores


def check_names(flag: str, names: list[str], available: list[str]) -> None:
    for name in names:
        if name not in available:
            raise ValueError(f"{flag} {name}: there are only scores of {', '.join(available)}.")


def shared_keys(base_rows: dict, rows: dict) -> list[tuple]:
    """Return prompt and seed of the images that have a score by both models."""
    keys = []
    for key, row in base_rows.items():
        if key in rows and row["score"] is not None and rows[key]["score"] is not None:
            keys.append(key)
    return keys


def compare(metric: str, model: str, base: str, base_rows: dict, rows: dict, seed: int) -> dict:
    """Return the statistics of one metric for a model against the base."""
    keys = shared_keys(base_rows, rows)
    if not keys:
        raise ValueError(f"{base} and {model} share no image with a score by {metric}.")
    base_scores = np.array([base_rows[key]["score"] for key in keys])
    scores = np.array([rows[key]["score"] for key in keys])
    prompts = [rows[key]["prompt"] for key in keys]
    difference = scores - base_scores
    wins = (difference > 0) + 0.5 * (difference == 0)
    return {
        "metric": metric,
        "model": model,
        "prompts": len(set(prompts)),
        "images": len(keys),
        "left_out": len(base_rows.keys() | rows.keys()) - len(keys),
        "base_mean": float(base_scores.mean()),
        "mean": float(scores.mean()),
        "difference": float(difference.mean()),
        "difference_interval": bootstrap_interval(difference, prompts, seed),
        "win_rate": float(wins.mean()),
        "win_rate_interval": win_rate_interval(wins, prompts, seed),
        "p": sign_flip_p(difference, prompts, seed),
    }


def build_table(results: list[dict], base: str, model: str) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of one model."""
    head = ["metric", base, model, "difference (95 %)", f"{model} wins (95 %)", "p", "p (Holm)", "images"]
    rows = []
    for result in results:
        if result["model"] != model:
            continue
        low, high = result["difference_interval"]
        wins_low, wins_high = result["win_rate_interval"]
        prompts = result["prompts"]
        seeds = result["images"] / prompts
        row = [
            result["metric"],
            f"{result['base_mean']:.4g}",
            f"{result['mean']:.4g}",
            f"{result['difference']:+.4g} ({low:+.4g} to {high:+.4g})",
            f"{result['win_rate']:.1%} ({wins_low:.1%} to {wins_high:.1%})",
            f"{result['p']:.2g}",
            f"{result['p_holm']:.2g}",
            f"{prompts} prompts x {seeds:.3g} seeds" if seeds > 1 else f"{prompts} prompts",
        ]
        rows.append(row)
    return head, rows


# ---- The page -------------------------------------------------------------------------------------------------------
def encode_image(path: Path, pixels: int) -> str:
    image = open_image(str(path), Path(), str(path))
    image.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def choose_rows(scores: dict, base: str, models: list[str], metrics: list[str], count: int) -> list[tuple]:
    """Return prompt and seed of the images with the largest differences, up and down, by every metric and model."""
    rankings = []
    for metric in metrics:
        base_rows = scores[metric].get(base, {})
        for model in models:
            rows = scores[metric].get(model, {})
            keys = shared_keys(base_rows, rows)
            keys.sort(key=lambda key: rows[key]["score"] - base_rows[key]["score"])
            rankings.append(keys)
            rankings.append(keys[::-1])
    chosen = {}
    for place in range(max(len(keys) for keys in rankings)):
        for keys in rankings:
            if place < len(keys):
                chosen[keys[place]] = True
    return list(chosen)[:count]


def build_page(
    tables: list[tuple], rows: list[dict], base: str, models: list[str], metrics: list[str], pixels: int
) -> str:
    """Return the page. Prompts and names are escaped, or reach it as JSON and are shown as text."""
    sections = ""
    for model, (head, lines) in zip(models, tables):
        table = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"
        for line in lines:
            table += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        title = f"<h2>{html.escape(model)} against {html.escape(base)}</h2>" if len(models) > 1 else ""
        sections += f'{title}<div class="table"><table>{table}</table></div>\n'
    data = {"base": base, "models": models, "metrics": metrics, "pixels": pixels, "rows": rows}
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("@TITLE@", html.escape(f"{', '.join(models)} against {base}"))
    page = page.replace("@TABLES@", sections)
    return page.replace("@DATA@", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


def main(args: argparse.Namespace) -> None:
    root = args.images if args.images.is_dir() else args.images.parent
    output_dir = args.output_dir or root
    scores = read_scores(args.scores or root / "scores.jsonl", root)
    all_models = list(dict.fromkeys(model for by_model in scores.values() for model in by_model))
    models = args.models or [model for model in all_models if model != args.base]
    metrics = args.metrics or list(scores)
    check_names("--base", [args.base], all_models)
    check_names("--models", models, all_models)
    check_names("--metrics", metrics, list(scores))
    if not models:
        raise ValueError(f"There are no scores of any model besides {args.base}.")

    results = []
    for model in models:
        for metric in metrics:
            base_rows = scores[metric].get(args.base, {})
            rows = scores[metric].get(model, {})
            results.append(compare(metric, model, args.base, base_rows, rows, args.seed))
    corrected = multipletests([result["p"] for result in results], method="holm")[1]
    for result, p in zip(results, corrected):
        result["p_holm"] = float(p)

    tables = [build_table(results, args.base, model) for model in models]
    report = f"# {', '.join(models)} against {args.base}\n\nHigher is better for every metric.\n"
    for head, lines in tables:
        report += "\n" + markdown_table(head, lines) + "\n"
    page_rows = []
    for key in tqdm(choose_rows(scores, args.base, models, metrics, args.html_rows), desc="Page", unit="row"):
        row = {"seed": key[1], "scores": {}, "images": {}}
        for metric in metrics:
            row["scores"][metric] = {}
            for model in [args.base, *models]:
                scored = scores[metric].get(model, {}).get(key)
                if scored is None:
                    continue
                row["prompt"] = scored["prompt"]
                row["scores"][metric][model] = scored["score"]
                if "path" in scored and model not in row["images"]:
                    row["images"][model] = encode_image(root / scored["path"], args.html_pixels)
        page_rows.append(row)

    for result in results:  # JSON has no NaN
        for name in ("difference_interval", "win_rate_interval"):
            if np.isnan(result[name]).any():
                result[name] = None
    write_json(output_dir / "report.json", {"base": args.base, "results": results})
    write_whole(output_dir / "report.md", report)
    write_whole(
        output_dir / "report.html", build_page(tables, page_rows, args.base, models, metrics, args.html_pixels)
    )
    print(report)
    print(f"Page with the images: {output_dir / 'report.html'}")


if __name__ == "__main__":
    main(parse_args())
