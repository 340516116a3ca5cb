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
Turns your own taste into preference pairs: a local page shows two images of one prompt, and you choose one.

    python pairs/vote.py --images outputs/ --output_dir my-taste
    python pairs/vote.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --output_dir my-taste

--images is a folder with several images of each prompt, a table or a data set. Prompts are read from NAME.txt beside
NAME.png, or from the metadata of ComfyUI and A1111. With --model, --candidates images of each prompt are generated
first.

Every voter sees the pairs in an order of their own, on random sides, and every prompt comes once before one comes
again. Some pairs come twice, with the sides swapped, which shows how sure a voter is. A vote is in votes.jsonl before
the next pair appears, so nothing is lost when the browser or the server is closed: the same command resumes. Several
people can vote at the same time, each under their own name.

The page's last screen, or the same command with --write, writes what the majority chose. --output_dir is then a data
set for `train_diffusion_mapo_sdxl.py --dataset_name`.

The server listens on this machine only. To vote on another one: ssh -L 7860:127.0.0.1:7860 HOST.
"""

import argparse
import io
import itertools
import json
import math
import re
import sys
import threading
import time
import unicodedata
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import hash_content
from pairs.build_preference_pairs import (
    Pair,
    PairImage,
    add_generation_arguments,
    generate_images,
    generation_settings,
    make_seeds,
    write_pairs,
)
from pairs.files import JsonLines, read_captions, read_images
from train_diffusion_mapo_sdxl import load_image


PAGE = Path(__file__).with_name("vote.html")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")
REPEAT_AFTER = 12  # pairs between the two showings of one
CHOICES = ("left", "right", "tie", "skip")
IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=str, help="Folder, table or data set with several images of each prompt.")
    parser.add_argument("--prompt_column", type=str, help="Column of the prompts in --images or --prompts.")
    parser.add_argument("--image_column", type=str, help="Column of the images in --images.")
    parser.add_argument("--model", type=str, help="Generates the images: hub id, folder or .safetensors file.")
    parser.add_argument("--prompts", type=str, help="Text file, table or data set of prompts for --model.")
    parser.add_argument("--max_prompts", type=int, help="Use only the first prompts.")
    parser.add_argument("--candidates", type=int, default=4, help="Number of images to generate for each prompt.")
    add_generation_arguments(parser)
    parser.add_argument("--repeat", type=float, default=0.1, help="Fraction of the pairs to show twice.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise, the order and the sides.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0 opens the page to your network.")
    parser.add_argument("--port", type=int, default=7860, help="Port of the page. 0 takes any free one.")
    parser.add_argument("--write", action="store_true", help="Write the pairs from the votes so far, without a page.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where votes and pairs are written.")
    args = parser.parse_args(argv)
    if (args.images is None) == (args.model is None):
        parser.error("pass either --images, or --model with --prompts")
    if args.model is not None and args.prompts is None:
        parser.error("--model needs --prompts")
    if args.candidates < 2:
        parser.error(f"--candidates {args.candidates}: must be at least 2")
    if not 0 <= args.repeat <= 1:
        parser.error(f"--repeat {args.repeat}: must be from 0 to 1")
    return args


class ImagePair(NamedTuple):
    """Two images of a prompt, named by the hashes of their files, in alphabetical order."""

    prompt: str
    first: str
    second: str


def make_pair(prompt: str, image: str, other: str) -> ImagePair:
    return ImagePair(prompt, min(image, other), max(image, other))


class Votes:
    """What there is to vote on and who chose what.

    Attributes:
        files: The images' files by their hashes.
        rounds: Each pair with its round. A round has at most one pair of each prompt.
        votes: By voter, the newest row of votes.jsonl for each pair and showing (False the first, True the second).
    """

    def __init__(self, images: list[tuple[str, Path]], log: JsonLines, repeat: float, seed: int):
        self.log = log
        self.repeat = repeat
        self.seed = seed
        self.lock = threading.Lock()
        self.files = {}
        groups = {}
        for prompt, path in images:
            name = hash_content(path.read_bytes())
            self.files[name] = path
            groups.setdefault(prompt, set()).add(name)
        self.rounds = {}
        for prompt, names in groups.items():
            pairs = [make_pair(prompt, *couple) for couple in itertools.combinations(names, 2)]
            for number, pair in enumerate(sorted(pairs, key=lambda pair: hash_content(seed, pair))):
                self.rounds[pair] = number
        if not self.rounds:
            raise ValueError("no prompt has two different images to choose from")
        single = sum(len(names) == 1 for names in groups.values())
        if single:
            print(f"Left out {single} of {len(groups)} prompts, which have only one image.")
        self.votes = {}
        for row in log.rows:
            self.count(row)

    def count(self, row: dict) -> None:
        votes = self.votes.setdefault(row["voter"], {})
        pair = make_pair(row["prompt"], row["left"], row["right"])
        key = (pair, row["again"])
        if row["choice"] == "undo":
            votes.pop(key, None)
        elif pair in self.rounds:  # else its images are no longer there
            votes[key] = row

    def schedule(self, voter: str) -> list[dict]:
        """Return what this voter is shown, in order."""
        keys = {pair: hash_content(self.seed, voter, pair) for pair in self.rounds}
        showings = []
        for place, pair in enumerate(sorted(keys, key=lambda pair: (self.rounds[pair], keys[pair]))):
            left = pair.first
            right = pair.second
            if keys[pair][-1] in "01234567":  # half of the hashes
                left = pair.second
                right = pair.first
            showing = {"prompt": pair.prompt, "left": left, "right": right, "again": False}
            showings.append((place, showing))
            if self.repeat and place % round(1 / self.repeat) == 0:
                swapped = {"prompt": pair.prompt, "left": right, "right": left, "again": True}
                showings.append((place + REPEAT_AFTER + 0.5, swapped))
        return [showing for _, showing in sorted(showings, key=lambda item: item[0])]

    def state(self, voter: str) -> dict:
        """Return what the page shows now, and what it may load in advance."""
        votes = self.votes.get(voter, {})
        schedule = self.schedule(voter)
        ahead = []
        for showing in schedule:
            pair = make_pair(showing["prompt"], showing["left"], showing["right"])
            if (pair, showing["again"]) not in votes:
                ahead.append(showing)
        return {
            "done": len(schedule) - len(ahead),
            "total": len(schedule),
            "show": ahead[:2],
            "undo": len(votes) > 0,
            "output_dir": str(self.log.path.parent),
        }

    def vote(self, voter: str, body: dict) -> None:
        """Write a vote to disk. A page that got no answer may send its vote again, which isn't counted twice."""
        texts = [body.get(name) for name in ("prompt", "left", "right", "choice")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a vote has prompt, left, right and choice")
        pair = make_pair(*texts[:3])
        if pair not in self.rounds or body["choice"] not in CHOICES:
            raise ValueError("there is no such pair or choice")
        again = bool(body.get("again"))
        with self.lock:
            if (pair, again) not in self.votes.get(voter, {}):
                row = {"voter": voter, "prompt": pair.prompt, "left": body["left"], "right": body["right"]}
                row["choice"] = body["choice"]
                row["again"] = again
                row["left_file"] = self.files[body["left"]].name
                row["right_file"] = self.files[body["right"]].name
                self.add(row)

    def undo(self, voter: str) -> None:
        with self.lock:
            if self.votes.get(voter):
                newest = list(self.votes[voter].values())[-1]
                self.add({**newest, "choice": "undo"})

    def add(self, row: dict) -> None:
        self.log.add({**row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        self.count(row)


# ---- Results --------------------------------------------------------------------------------------------------------
def describe_agreement(votes: Votes) -> str:
    """Say how often a voter chose alike in both showings of a pair, and how often two voters did."""
    sentences = []
    first = {}
    for voter, rows in votes.votes.items():
        chosen = {key: row[row["choice"]] for key, row in rows.items() if row["choice"] in ("left", "right")}
        first[voter] = {pair: image for (pair, again), image in chosen.items() if not again}
        alike = [chosen[pair, True] == image for pair, image in first[voter].items() if (pair, True) in chosen]
        if alike:
            sentences.append(f"{voter} chose the same image in {sum(alike)} of {len(alike)} pairs shown twice.")
    alike = []
    for one, other in itertools.combinations(first.values(), 2):
        alike += [one[pair] == other[pair] for pair in one.keys() & other.keys()]
    if alike:
        agreement = sum(alike) / len(alike)
        # Two voters who each follow the common taste with probability q agree with probability q^2 + (1 - q)^2.
        ceiling = (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2
        sentences.append(
            f"Two voters agree on {agreement:.0%} of {len(alike)} pairs, so even a model that knew the common taste "
            f"would predict only about {ceiling:.0%} of single votes."
        )
    return " ".join(sentences)


def write_votes(votes: Votes, output_dir: Path, model: str) -> dict:
    """Write the pairs that have a majority. Return what the page says about them and how to train `model` on them."""
    pairs = []
    left_out = Counter()
    for pair in votes.rounds:
        counts = Counter()
        for rows in votes.votes.values():
            row = rows.get((pair, False))
            if row is not None and row["choice"] in ("left", "right"):
                counts[row[row["choice"]]] += 1
        sides = []
        for name in (pair.first, pair.second):
            sides.append(PairImage(votes.files[name], score=float(counts[name])))
        sides.sort(key=lambda side: side.score, reverse=True)
        if not counts:
            left_out["pairs without a choice"] += 1
        elif sides[0].score == sides[1].score:
            left_out["pairs with as many votes for one as for the other"] += 1
        else:
            pairs.append(Pair(pair.prompt, sides[0], sides[1]))
    agreement = describe_agreement(votes)
    card = {"voters": ", ".join(votes.votes), "agreement": agreement or "unknown"}
    write_pairs(pairs, left_out, output_dir, votes.seed, card)
    return {
        "message": f"{len(pairs)} pairs are in {output_dir}. {agreement}",
        "command": "accelerate launch train_diffusion_mapo_sdxl.py \\\n"
        f"  --pretrained_model_name_or_path {model} \\\n  --dataset_name {output_dir}",
    }


# ---- The page and its server ----------------------------------------------------------------------------------------
class Server(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, votes: Votes, output_dir: Path, model: str):
        super().__init__((host, port), Handler)
        self.host = host
        self.votes = votes
        self.output_dir = output_dir
        self.model = model

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the browser was closed
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        files = self.server.votes.files
        name = url.path.removeprefix("/image/")
        if not self.is_local():
            self.send_error(403)
        elif url.path == "/":
            self.reply(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/state":
            voter = read_name(parse_qs(url.query).get("voter", [""])[0])
            if voter is None:
                self.reply_json({"error": "A name has 1 to 40 letters or other visible characters."}, status=400)
            else:
                self.reply_json(self.server.votes.state(voter))
        elif name in files:
            data = files[name].read_bytes()
            types = [image_type for start, image_type in IMAGE_TYPES.items() if data.startswith(start)]
            if not types:  # TIFF and other formats that browsers don't show
                buffer = io.BytesIO()
                load_image(data).save(buffer, "PNG")
                data = buffer.getvalue()
                types = ["image/png"]
            self.reply(data, types[0])
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        # Another site's page can't send JSON to this server without asking first, and nobody answers that.
        if not self.is_local() or self.headers.get("Content-Type") != "application/json":
            self.send_error(403)
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,5}", length):
            self.send_error(400)
            return
        votes = self.server.votes
        try:
            body = json.loads(self.rfile.read(int(length)))
            if not isinstance(body, dict):
                raise ValueError("the body must be a JSON object")
            if self.path == "/write":
                with votes.lock:
                    self.reply_json(write_votes(votes, self.server.output_dir, self.server.model))
                return
            voter = read_name(body.get("voter"))
            if voter is None or self.path not in ("/vote", "/undo"):
                raise ValueError("there is no such voter or action")
            if self.path == "/vote":
                votes.vote(voter, body)
            else:
                votes.undo(voter)
            self.reply_json(votes.state(voter))
        except (ValueError, RecursionError) as error:
            self.reply_json({"error": str(error)}, status=400)

    def is_local(self) -> bool:
        """Return False if another site's name points here, whose page could then read the images."""
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        return host in LOCAL_HOSTS or self.server.host not in LOCAL_HOSTS

    def reply_json(self, value: dict, status: int = 200) -> None:
        self.reply(json.dumps(value).encode(), "application/json", status)

    def reply(self, data: bytes, content_type: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' data:")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "max-age=3600" if content_type.startswith("image/") else "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def read_name(voter) -> str | None:
    """Return the voter's name in one spelling (é may be one character or two), or None if it isn't a name."""
    if not isinstance(voter, str):
        return None
    name = unicodedata.normalize("NFC", voter.strip())
    return name if name.isprintable() and 1 <= len(name) <= 40 else None


def main(args):
    if args.model is not None:
        prompts = []
        for prompt in dict.fromkeys(read_captions(args.prompts, args.prompt_column)[: args.max_prompts]):
            prompts += [prompt] * args.candidates
        seeds = make_seeds(prompts, args.seed)
        folder = args.output_dir / "work" / "generated"
        paths = generate_images(args.model, prompts, seeds, folder, **generation_settings(args))
        images = list(zip(prompts, paths))
    else:
        images = read_images(args.images, args.output_dir / "work" / "images", args.prompt_column, args.image_column)
    votes = Votes(images, JsonLines(args.output_dir / "votes.jsonl"), args.repeat, args.seed)
    model = (args.model or "stabilityai/stable-diffusion-xl-base-1.0").partition(",lora=")[0]
    if args.write:
        result = write_votes(votes, args.output_dir, model)
        print(f"{result['message']}\nTrain on them with:\n{result['command']}")
        return

    try:
        server = Server(args.host, args.port, votes, args.output_dir, model)
    except OSError as error:
        raise OSError(f"--host {args.host} --port {args.port}: {error}; --port 0 takes any free port") from error
    print(f"Vote at http://{args.host}:{server.server_port}/ (Ctrl-C ends, the same command resumes)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\nThe votes are in {votes.log.path}. The same command with --write writes the pairs.")


if __name__ == "__main__":
    main(parse_args())
