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
Compares models by the scores of the same prompts and seeds:

    python evaluation/compare.py eval --base base

writes report.md, report.json and report.html into `eval/`. The page holds the images side by side, sorted by
difference, and needs no other file. For every metric and every model against the base:

- mean of both and of the difference, and the win rate (a tie is half a win), each over prompts and seeds,
- 95 % percentile bootstrap intervals that resample whole prompts, since seeds of one prompt resemble each other,
- p of the two-sided sign-flip test on the prompts' sums of differences: if both models were alike, a prompt's
  difference would be as likely to be positive as negative; exact up to 13 prompts, else 9,999 random flips,
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
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import JsonLines, fail, markdown_table, open_image, run_script, whole_file, write_json


RESAMPLES = 9999


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="Folder of generate.py and score.py.")
    parser.add_argument("--scores", type=Path, help="Default: scores.jsonl in that folder.")
    parser.add_argument("--base", required=True, help="Name of the model that the others are compared with.")
    parser.add_argument("--models", nargs="+", help="Default: all others.")
    parser.add_argument("--metrics", nargs="+", help="Default: all that were scored.")
    parser.add_argument("--html_rows", type=int, default=100, help="Prompts on the page: the extremes of differences.")
    parser.add_argument("--html_pixels", type=int, default=256, help="Side of the page's images.")
    parser.add_argument("--seed", type=int, default=0, help="Of bootstrap and sign flips.")
    parser.add_argument("--output_dir", type=Path, help="Default: the folder of the images.")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or args.images
    args.scores = args.scores or args.images / "scores.jsonl"
    if not args.scores.exists():
        fail(f"--scores {args.scores} isn't there: run score.py first")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def cluster_sums(values: np.ndarray, clusters: list) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the values in each cluster. Shape: (N,), (N,) -> (C,), (C,)"""
    _, index = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def bootstrap_interval(values: np.ndarray, clusters: list, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, resampling whole clusters; NaN with fewer than two."""
    from scipy.stats import bootstrap

    sums, counts = cluster_sums(values, clusters)
    if len(sums) < 2:
        return float("nan"), float("nan")
    interval = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def sign_flip_p(differences: np.ndarray, clusters: list, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that the clusters' sums are symmetric around 0."""
    from scipy.stats import permutation_test

    sums, _ = cluster_sums(differences, clusters)
    if len(sums) < 2 or not sums.any():
        return 1.0
    test = permutation_test(
        (sums,),
        lambda s, axis: s.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m is multiplied by m - k + 1, and never below a smaller one's.
    scipy has only the false discovery rates."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def read_scores(args: argparse.Namespace) -> dict:
    """metric -> model -> (prompt_id, seed) -> row; models and metrics that the flags name must be there."""
    scores = {}
    for row in JsonLines(args.scores).rows:
        scores.setdefault(row["metric"], {}).setdefault(row["model"], {})[row["prompt_id"], row["seed"]] = row
    models = list(dict.fromkeys(model for by_model in scores.values() for model in by_model))
    for flag, names, there in (
        ("--base", [args.base], models),
        ("--models", args.models or [], models),
        ("--metrics", args.metrics or [], list(scores)),
    ):
        for name in names:
            if name not in there:
                fail(f"{flag} {name}: {args.scores} has only {', '.join(there)}")
    args.models = args.models or [name for name in models if name != args.base]
    args.metrics = args.metrics or list(scores)
    if not args.models:
        fail(f"--base {args.base}: {args.scores} has no other model to compare with")
    return scores


def compare(scores: dict, args: argparse.Namespace) -> list[dict]:
    """One result for each metric and model."""
    results = []
    for metric in args.metrics:
        for model in args.models:
            base, other = (scores[metric].get(name, {}) for name in (args.base, model))
            keys = [key for key in base if key in other]
            scored = [key for key in keys if base[key]["score"] is not None and other[key]["score"] is not None]
            if not scored:
                fail(f"--scores {args.scores}: {args.base} and {model} share no image with a score by {metric}")
            before = np.array([base[key]["score"] for key in scored])
            after = np.array([other[key]["score"] for key in scored])
            difference = after - before
            wins = (difference > 0) + 0.5 * (difference == 0)
            clusters = [key[0] for key in scored]
            results.append(
                {
                    "metric": metric,
                    "model": model,
                    "prompts": len(set(clusters)),
                    "images": len(scored),
                    "left_out": len(base.keys() | other.keys()) - len(scored),
                    "base_mean": float(before.mean()),
                    "mean": float(after.mean()),
                    "difference": float(difference.mean()),
                    "difference_interval": bootstrap_interval(difference, clusters, args.seed),
                    "win_rate": float(wins.mean()),
                    "win_rate_interval": bootstrap_interval(wins, clusters, args.seed),
                    "p": sign_flip_p(difference, clusters, args.seed),
                }
            )
    for result, p in zip(results, holm([result["p"] for result in results])):
        result["p_holm"] = p
    return results


COLUMNS = ("metric", "model", "base", "model's", "difference (95 %)", "win rate (95 %)", "p", "p (Holm)", "prompts")


def table_rows(results: list[dict]) -> list[list[str]]:
    rows = []
    for r in results:
        (low, high), (worst, best) = r["difference_interval"], r["win_rate_interval"]
        difference = f"{r['difference']:+.4g} ({low:+.4g} to {high:+.4g})"
        win_rate = f"{r['win_rate']:.1%} ({worst:.1%} to {best:.1%})"
        numbers = [f"{r['base_mean']:.4g}", f"{r['mean']:.4g}", difference, win_rate, f"{r['p']:.2g}"]
        rows.append([r["metric"], r["model"], *numbers, f"{r['p_holm']:.2g}", f"{r['prompts']} x {r['seeds']}"])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@TITLE@</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:1rem;color:#1b1b1f;background:#fff}
h1{font-size:1.4rem} table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap} .wide{overflow-x:auto}
.bar{position:sticky;top:0;background:#fffffff2;padding:.6rem 0;border-bottom:1px solid #ddd;z-index:1}
select{font:inherit;margin:0 .8rem 0 .3rem} article{padding:1rem 0;border-bottom:1px solid #eee}
.prompt{margin:0 0 .5rem;overflow-wrap:anywhere} .images{display:flex;flex-wrap:wrap;gap:.7rem}
figure{margin:0;width:@PIXELS@px} img{width:100%;display:block;background:#f3f3f5;border-radius:4px}
figcaption{font-size:.85rem} .up{color:#0a6b2c} .down{color:#a3231b} small{color:#666}
</style>
<h1>@TITLE@</h1>
<div class="wide">@TABLE@</div>
<p><small>@NOTE@</small></p>
<div class="bar"><label>Sort by<select id="metric"></select></label><label>of<select id="model"></select></label>
<label>order<select id="order"><option value="-1">gains first</option><option value="1">losses first</option></select>
</label><small id="count"></small></div>
<main id="list"></main>
<script type="application/json" id="data">@DATA@</script>
<script>
const data=JSON.parse(document.getElementById('data').textContent), at=id=>document.getElementById(id);
const node=(tag,name,text)=>{
  const n=document.createElement(tag); if(name)n.className=name; if(text)n.textContent=text; return n};
for(const [id,names] of [['metric',data.metrics],['model',data.models]])
  for(const name of names){const o=node('option','',name);o.value=name;at(id).append(o)}
const gain=(row,metric,model)=>{const s=row.scores[metric]||{};
  return s[model]==null||s[data.base]==null?null:s[model]-s[data.base]};
function show(){
  const metric=at('metric').value, model=at('model').value, order=+at('order').value;
  const rows=data.rows.map(r=>[gain(r,metric,model),r]).filter(x=>x[0]!==null).sort((a,b)=>order*(a[0]-b[0]));
  at('count').textContent=rows.length+' images'; at('list').replaceChildren();
  for(const [difference,row] of rows){
    const article=node('article'), line=node('p','prompt');
    line.append(node('b',difference>0?'up':difference<0?'down':'',(difference>0?'+':'')+difference.toPrecision(3)),
      ' '+row.prompt+' ',node('small','','seed '+row.seed));
    const images=node('div','images');
    for(const name of [data.base,...data.models]){
      if(!row.images[name])continue;
      const figure=node('figure'), image=node('img'); image.src=row.images[name]; image.alt=name+': '+row.prompt;
      const caption=node('figcaption','',name); caption.append(node('br'));
      caption.append(node('small','',data.metrics.filter(m=>row.scores[m]&&row.scores[m][name]!=null)
        .map(m=>m+' '+row.scores[m][name].toPrecision(4)).join(', ')));
      figure.append(image,caption); images.append(figure)}
    article.append(line,images); at('list').append(article)}}
for(const id of ['metric','model','order'])at(id).addEventListener('change',show);
show();
</script>
</html>
"""


def encode_image(path: str, root: Path, pixels: int) -> str:
    image = open_image(path, root, f"{root / path}")
    image.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def choose_rows(scores: dict, args: argparse.Namespace) -> list[tuple]:
    """Prompt and seed of all images, or of the largest gains and losses by any metric and model, taking turns."""
    rankings = []
    for metric in args.metrics:
        base = scores[metric].get(args.base, {})
        for model in args.models:
            other = scores[metric].get(model, {})
            keys = [k for k in base if k in other and None not in (base[k]["score"], other[k]["score"])]
            keys.sort(key=lambda k: other[k]["score"] - base[k]["score"])
            rankings += [keys, keys[::-1]]
    longest = max(len(keys) for keys in rankings)
    turns = dict.fromkeys(keys[i] for i in range(longest) for keys in rankings if i < len(keys))
    return list(turns)[: args.html_rows]


def build_page(scores: dict, results: list[dict], args: argparse.Namespace) -> str:
    """The whole page; texts of prompts reach it as text only."""
    rows, names = [], [args.base, *args.models]
    for key in tqdm(choose_rows(scores, args), desc="Page", unit="prompt"):
        found = {m: {n: scores[m][n][key] for n in names if key in scores[m].get(n, {})} for m in args.metrics}
        some = {name: row for by_model in found.values() for name, row in by_model.items()}
        rows.append(
            {
                "prompt": next(iter(some.values()))["prompt"],
                "seed": key[1],
                "scores": {m: {n: row["score"] for n, row in by_model.items()} for m, by_model in found.items()},
                "images": {
                    n: encode_image(row["path"], args.images, args.html_pixels)
                    for n, row in some.items()
                    if "path" in row
                },
            }
        )
    data = {"base": args.base, "models": args.models, "metrics": args.metrics, "rows": rows}
    cells = "".join(f"<th>{html.escape(name)}" for name in COLUMNS)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}" for c in line) for line in table_rows(results))
    fill = {
        "@TITLE@": html.escape(f"{', '.join(args.models)} against {args.base}"),
        "@PIXELS@": str(args.html_pixels),
        "@TABLE@": f"<table><tr>{cells}{lines}</table>",
        "@NOTE@": "Intervals: bootstrap over prompts. p: sign flips of prompts' differences; Holm over all rows.",
        "@DATA@": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = PAGE
    for mark, text in fill.items():
        page = page.replace(mark, text)
    return page


def main(args: argparse.Namespace) -> None:
    scores = read_scores(args)
    results = compare(scores, args)
    for result in results:
        result["seeds"] = round(result["images"] / result["prompts"], 2)
    table = markdown_table(COLUMNS, table_rows(results))
    page = build_page(scores, results, args)
    for result in results:  # JSON has no NaN
        for name in ("difference_interval", "win_rate_interval"):
            result[name] = None if np.isnan(result[name]).any() else result[name]
    write_json(args.output_dir / "report.json", {"base": args.base, "results": results})
    for name, text in (("report.md", f"# Against {args.base}\n\n{table}\n"), ("report.html", page)):
        with whole_file(args.output_dir / name) as aside:
            aside.write_text(text, encoding="utf-8")
    print(table)
    print(f"Page with the images: {args.output_dir / 'report.html'}")


if __name__ == "__main__":
    run_script(main, parse_args())
