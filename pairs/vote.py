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
Your own taste as preference pairs: a local page shows two images of one prompt, you choose with the arrow keys.

    python pairs/vote.py --images eval --output_dir my-taste
    python pairs/vote.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --output_dir my-taste

--images is a folder of `evaluation/generate.py`, a folder of NAME.png with NAME.txt, a table or a data set, with
several images of a prompt; --model generates --candidates images of each prompt first. Each voter sees the pairs in
an order of their own and with random sides; every prompt comes once before one comes again. Some pairs come twice,
with the sides swapped, which tells how sure a voter is. A vote is in votes.jsonl before the next pair is shown; the
same command after a kill goes on, and several voters, by name, may vote at once.

The page's last button, or the same command with --write, writes what the majority chose in the columns of Pick-a-Pic:
--output_dir is then a data set for `train_diffusion_mapo_sdxl.py --dataset_name`.

The page is one file on Python's own server: a vote must be on disk before the next pair, keys must answer at once, and
nothing needs to be installed. It listens on this machine only; on another one: ssh -L 7860:127.0.0.1:7860 HOST.
"""

import argparse
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    JsonLines,
    check_captions,
    check_output_dir,
    fail,
    file_bytes,
    find_column,
    keep_settings,
    load_prompts,
    load_rows,
    open_image,
    run_script,
    write_json,
)
from evaluation.generate import (
    add_generation_flags,
    check_generation_flags,
    generate_images,
    noise_seed,
    parse_model,
)
from pairs.build_preference_pairs import side, write_pairs


LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")
AGAIN_AFTER = 12  # pairs between the two showings of one
CHOICES = ("left", "right", "tie", "skip")
PAPER = "The paper's tasks: style, culture and safety 1,250, 2,500 or 5,000 pairs each, Pick-a-Pic some 850,000."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="Images with their prompts: a folder, a table or a data set.")
    parser.add_argument("--prompt_column", help="Where it isn't prompt, caption or text.")
    parser.add_argument("--image_column", help="Where it isn't image, path or file_name.")
    parser.add_argument("--model", help="Generates the images: PIPELINE[,unet=...][,lora=...], as in generate.py.")
    parser.add_argument("--prompts", help="For --model: a file or a data set.")
    parser.add_argument("--max_prompts", type=int, help="Use the first N prompts only.")
    parser.add_argument("--candidates", type=int, default=4, help="Images that --model generates of each prompt.")
    add_generation_flags(parser)
    parser.add_argument("--repeat", type=float, default=0.1, help="Fraction of the pairs that are shown twice.")
    parser.add_argument("--seed", type=int, default=0, help="Of noise, order and sides.")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Others than this machine's own open the page to a network."
    )
    parser.add_argument("--port", type=int, default=7860, help="0 for any that is free.")
    parser.add_argument("--write", action="store_true", help="Write the pairs by the votes so far, and show no page.")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    check_output_dir(args.output_dir)
    if (args.images is None) == (args.model is None):
        fail("name either --images or --model with --prompts")
    if args.model is not None:
        if args.prompts is None:
            fail("--model needs --prompts to generate images of")
        check_generation_flags(args)
        args.model = parse_model(f"model={args.model}")[1]
    if args.candidates < 2 or not 0 <= args.repeat <= 1:
        fail("--candidates must be at least 2, and --repeat a number from 0 to 1")
    return args


def collect_images(args: argparse.Namespace) -> tuple[list[dict], Path]:
    """Rows with `prompt`, `name` and `image` (a path or bytes), and the folder that paths start from."""
    if args.model is not None:
        work = args.output_dir / "work"
        prompts = [row["prompt"] for row in load_prompts(args.prompts, args.prompt_column)[: args.max_prompts]]
        names = ("model", "resolution", "num_inference_steps", "guidance_scale", "negative_prompt", "dtype", "seed")
        keep_settings(work / "settings.json", {name: getattr(args, name) for name in names}, f"{args.output_dir}")
        jobs = [
            {
                "prompt": prompt,
                "noise_seed": noise_seed(i, args.seed + candidate),
                "path": f"images/{i:05d}-{candidate}.png",
            }
            for i, prompt in enumerate(prompts)
            for candidate in range(args.candidates)
        ]
        generate_images("candidates", args.model, jobs, JsonLines(work / "images.jsonl"), work, args)
        return [{"prompt": job["prompt"], "name": job["path"], "image": job["path"]} for job in jobs], work
    rows, root = load_rows(args.images, "--images")
    if len(rows) == 0:
        fail(f"--images {args.images}: no rows")
    prompt = find_column(rows, args.prompt_column, CAPTION_COLUMNS, "--prompt_column", f"--images {args.images}")
    image = find_column(rows, args.image_column, IMAGE_COLUMNS, "--image_column", f"--images {args.images}")
    found = []
    for i in tqdm(range(len(rows)), desc="Reading images", unit="image"):
        row = rows[i]
        open_image(row[image], root, f"--images {args.images}: row {i}")
        name = row[image] if isinstance(row[image], str) else f"row {i}"
        found.append({"prompt": row[prompt], "name": name, "image": row[image]})
    check_captions([row["prompt"] for row in found], f"--images {args.images}")
    return found, root


class Votes:
    """Who chose what.

    Attributes:
        rounds: pairs of positions in `images`; each round has at most one pair of a prompt.
        chosen: voter -> (pair, again) -> row of votes.jsonl, the latest last.
    """

    def __init__(self, images: list[dict], root: Path, args: argparse.Namespace) -> None:
        self.images, self.root, self.args, self.lock = images, root, args, threading.Lock()
        groups, random = {}, np.random.default_rng(args.seed)
        for i, image in enumerate(images):
            groups.setdefault(image["prompt"], []).append(i)
        pairs = [[*itertools.combinations(group, 2)] for group in groups.values() if len(group) > 1]
        if not pairs:
            fail("no prompt has two images to choose from")
        mixed = [[of_prompt[i] for i in random.permutation(len(of_prompt))] for of_prompt in pairs]
        self.rounds = [[pair for pair in row if pair] for row in itertools.zip_longest(*mixed)]
        self.pairs = {frozenset(images[i]["name"] for i in pair): pair for of_prompt in pairs for pair in of_prompt}
        self.log, self.chosen = JsonLines(args.output_dir / "votes.jsonl"), {}
        for row in self.log.rows:
            self.count(row)

    def count(self, row: dict) -> None:
        pair = self.pairs.get(frozenset((row["left"], row["right"])))  # None if its images are no longer there
        chosen = self.chosen.setdefault(row["voter"], {})
        if row["choice"] == "undo":
            chosen.pop((pair, row["again"]), None)
        elif pair is not None:
            chosen[pair, row["again"]] = row

    def schedule(self, voter: str) -> list[tuple[int, int, bool]]:
        """Left, right and whether it is shown again, in the order in which this voter sees them."""
        random = np.random.default_rng([self.args.seed, *voter.encode()])
        order = [pairs[i] for pairs in self.rounds for i in random.permutation(len(pairs))]
        sides = [pair[::-1] if swap else pair for pair, swap in zip(order, random.random(len(order)) < 0.5)]
        shown = [(place, *pair, False) for place, pair in enumerate(sides)]
        twice = range(0, len(sides), round(1 / self.args.repeat)) if self.args.repeat else ()
        shown += [(place + AGAIN_AFTER + 0.5, *sides[place][::-1], True) for place in twice]
        return [(left, right, again) for _, left, right, again in sorted(shown)]

    def state(self, voter: str) -> dict:
        """What the page shows now, and what it may load meanwhile."""
        chosen, shown = self.chosen.get(voter, {}), self.schedule(voter)
        ahead = [item for item in shown if (tuple(sorted(item[:2])), item[2]) not in chosen]
        show = [
            {"left": left, "right": right, "again": again, "prompt": self.images[left]["prompt"]}
            for left, right, again in ahead[:2]
        ]
        return {"done": len(shown) - len(ahead), "total": len(shown), "show": show, "undo": bool(chosen)}

    def add(self, row: dict) -> None:
        self.log.add(row | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        os.fsync(self.log.file.fileno())
        self.count(row)

    def vote(self, voter: str, left: int, right: int, again: bool, choice: str) -> None:
        """On disk when it returns. What this voter has answered isn't counted twice: a page that got no answer may
        send its vote again."""
        pair = tuple(sorted((left, right)))
        if pair not in self.pairs.values() or choice not in CHOICES:
            raise ValueError(f"no such vote: {left}, {right}, {choice}")
        with self.lock:
            if (pair, again) not in self.chosen.get(voter, {}):
                names = {"left": self.images[left]["name"], "right": self.images[right]["name"]}
                row = {"voter": voter, "prompt": self.images[left]["prompt"], **names, "choice": choice}
                self.add(row | {"again": bool(again)})

    def undo(self, voter: str) -> None:
        with self.lock:
            if chosen := self.chosen.get(voter):
                self.add([*chosen.values()][-1] | {"choice": "undo"})

    def winner(self, row: dict) -> str | None:
        """Name of the image that was chosen."""
        return row.get(row["choice"])


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def describe_agreement(votes: Votes) -> str:
    """How often two voters who both chose, chose alike; and a voter in both showings of a pair."""
    lines, first = [], {}
    for voter, chosen in votes.chosen.items():
        won = {key: votes.winner(row) for key, row in chosen.items() if votes.winner(row)}
        first[voter] = {pair: name for (pair, again), name in won.items() if not again}
        twice = [won[pair, True] == name for pair, name in first[voter].items() if (pair, True) in won]
        if twice:
            lines.append(f"{voter} chose alike in {sum(twice)} of {len(twice)} pairs that came twice.")
    alike = [a[p] == b[p] for a, b in itertools.combinations(first.values(), 2) for p in a.keys() & b.keys()]
    if alike:
        agreement = np.mean(alike)
        # Two voters who each follow the common taste with probability q agree with q^2 + (1 - q)^2.
        follow = (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2
        lines.append(
            f"Two voters agree on {agreement:.0%} of {len(alike)} pairs, so a model that knew the common taste would "
            f"be right about {follow:.0%} of single votes: expect no higher accuracy."
        )
    return " ".join(lines)


def write_votes(votes: Votes) -> str:
    """Writes the pairs with a majority; returns what there is to say."""
    args = votes.args
    pairs, counts = [], {"pairs without a choice": 0, "pairs as often one as the other": 0}
    for a, b in votes.pairs.values():
        rows = [chosen[(a, b), False] for chosen in votes.chosen.values() if ((a, b), False) in chosen]
        names = [votes.winner(row) for row in rows]
        won = [names.count(votes.images[i]["name"]) for i in (a, b)]
        if won[0] == won[1]:
            counts["pairs as often one as the other" if won[0] else "pairs without a choice"] += 1
            continue
        winner, loser = (a, b) if won[0] > won[1] else (b, a)
        counted = ((winner, max(won)), (loser, min(won)))
        sides = [side(votes.images[i]["image"], votes.root, score=float(number)) for i, number in counted]
        pairs.append((votes.images[a]["prompt"], *sides))
    settings = {"images": args.images or json.dumps(args.model), "voters": ", ".join(votes.chosen)}
    write_pairs(pairs, counts, "pairs/vote.py", settings, args.output_dir, args.seed)
    agreement = describe_agreement(votes)
    write_json(args.output_dir / "agreement.json", {"voters": [*votes.chosen], "agreement": agreement})
    train = f"Next: accelerate launch train_diffusion_mapo_sdxl.py --dataset_name {args.output_dir} ..."
    return " ".join(filter(None, (f"{len(pairs)} pairs in {args.output_dir}.", agreement, PAPER, train)))


# ---------------------------------------------------------------------------------------------------------------------
# The page and its server
# ---------------------------------------------------------------------------------------------------------------------


TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


class Handler(BaseHTTPRequestHandler):
    """Answers the page; `server.votes` holds what it asks for."""

    def do_GET(self) -> None:
        url, votes = urlsplit(self.path), self.server.votes
        if not self.is_local():
            self.send_error(403)
        elif url.path == "/":
            self.reply(Path(__file__).with_name("vote.html").read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/state":
            self.reply_state(parse_qs(url.query).get("voter", [""])[0])
        elif (match := re.fullmatch(r"/image/(\d+)", url.path)) and int(match[1]) < len(votes.images):
            data = file_bytes(votes.images[int(match[1])]["image"], votes.root)
            kind = next((kind for start, kind in TYPES.items() if data.startswith(start)), None)
            if kind is None:  # TIFF and others that browsers don't show
                data, kind = to_png(data), "image/png"
            self.reply(data, kind)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        # A page of another site can't send JSON here without asking first, and nobody answers that.
        if not self.is_local() or self.headers.get("Content-Type") != "application/json":
            return self.send_error(403)
        votes = self.server.votes
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/write":
                with votes.lock:
                    return self.reply(json.dumps({"message": write_votes(votes)}).encode())
            voter = body.pop("voter")
            if is_name(voter):
                {"/vote": votes.vote, "/undo": votes.undo}[self.path](voter, **body)
            self.reply_state(voter)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.send_error(400, str(error))
        except SystemExit as stop:
            self.reply(json.dumps({"message": str(stop.code).partition("error: ")[2]}).encode())

    def is_local(self) -> bool:
        """False where a foreign name was made to point here, so that its page could read the images."""
        name = self.headers.get("Host", "").rpartition(":")[0]
        return name in LOCAL or self.server.votes.args.host not in LOCAL

    def reply_state(self, voter: str) -> None:
        if is_name(voter):
            self.reply(json.dumps(self.server.votes.state(voter)).encode())
        else:
            self.send_error(400, "a name has letters, digits, spaces, dots and hyphens, 40 at most")

    def reply(self, data: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' data:")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "max-age=3600" if kind.startswith("image/") else "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def is_name(voter) -> bool:
    return isinstance(voter, str) and re.fullmatch(r"[\w .-]{1,40}", voter) is not None


def to_png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    open_image(data, Path("."), "image").save(buffer, "PNG")
    return buffer.getvalue()


def main(args: argparse.Namespace) -> None:
    votes = Votes(*collect_images(args), args)
    if args.write:
        print(write_votes(votes))
        return
    try:
        server = ThreadingHTTPServer((args.host, args.port), Handler)
    except OSError as error:
        fail(f"--host {args.host} --port {args.port}: {error.strerror}; --port 0 takes any that is free")
    server.votes = votes
    print(f"Vote at http://{args.host}:{server.server_port}/ ; Ctrl-C ends, the same command goes on.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\nVotes in {votes.log.path}; the same command with --write writes the pairs.")


if __name__ == "__main__":
    run_script(main, parse_args())
