"""pairs/build_preference_pairs.py on the demo's model, with a chat server on loopback that speaks the protocol."""

import base64
import io
import json
import math
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_model
import torch
from conftest import REPO, rows_of, start
from evaluation import compare, generate, score
from pairs import build_preference_pairs as pairs
from PIL import Image


pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = str(small_model.MODEL)
GENERATE = ("--resolution=64", "--num_inference_steps=2", "--guidance_scale=3", "--device=cpu")
KEY = "sk-a-secret-of-the-user"
CONTEXT = "A small {} stands on a wooden table beside an open window while the morning sun falls on the floor."


def build(*flags) -> None:
    pairs.main(pairs.parse_args([str(flag) for flag in flags]))


def read_pairs(folder: Path) -> list[dict]:
    """As the training script finds them: with the folder's name alone."""
    import datasets

    return datasets.load_dataset(str(folder), split="train").to_list()


@pytest.fixture
def images(tmp_path) -> Path:
    """Six of the chosen drawings with their captions, as NAME.png and NAME.txt."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, row in enumerate(pq.read_table(REPO / "demo" / "pairs" / "train.parquet").slice(0, 6).to_pylist()):
        (folder / f"{i}.png").write_bytes(row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"])
        (folder / f"{i}.txt").write_text(row["caption"] + "\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# From images, and the whole way: train, generate, score, compare, and from scores
# ---------------------------------------------------------------------------------------------------------------------


def test_from_images_to_training_to_comparison_to_pairs_again(images, train, tmp_path):
    out = tmp_path / "pairs"
    build("from-images", f"--images={images}", f"--model={MODEL}", *GENERATE, f"--output_dir={out}")

    rows = read_pairs(out)
    assert [row["caption"] for row in rows] == [(images / f"{i}.txt").read_text().strip() for i in range(6)]
    for i, row in enumerate(rows):
        winner, loser = (0, 1) if row["label_0"] == 1 else (1, 0)
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        assert row[f"jpg_{winner}"] == (images / f"{i}.png").read_bytes()
        assert row[f"jpg_{loser}"] == (out / "work" / "losers" / f"{i:06d}.png").read_bytes()
        assert row[f"model_{winner}"] == "data" and row[f"model_{loser}"] == MODEL
        assert row[f"seed_{loser}"] == 100_003 * i and row[f"prompt_{loser}"] == row["caption"]
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    statistics = json.loads((out / "statistics.json").read_text())
    assert statistics["pairs"] == 6 and statistics["winner is jpg_0"] == np.mean([r["label_0"] for r in rows]).round(4)
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.size == (4 * 340, 2 * 212)
    for column, row in enumerate(rows[:4]):  # the chosen one on the left
        winner, loser = (0, 1) if row["label_0"] == 1 else (1, 0)
        for i, left in ((winner, 0), (loser, 164)):
            expected = (
                Image.open(io.BytesIO(row[f"jpg_{i}"])).convert("RGB").resize((160, 160), Image.Resampling.LANCZOS)
            )
            x = column * 340 + 8 + left
            shown = np.asarray(sheet.crop((x, 40, x + 160, 200))).astype(int)
            assert np.abs(shown - np.asarray(expected)).mean() < 25  # transparency is white there

    flags = ["--learning_rate=1e-3", "--max_train_steps=2", "--num_validation_pairs=0"]
    tuned = train(f"--pretrained_model_name_or_path={MODEL}", f"--dataset_name={out}", *flags)

    (tmp_path / "prompts.txt").write_text("rocket\nred apple\ngrinning face\n")
    flags = [
        f"--prompts={tmp_path / 'prompts.txt'}",
        "--seeds",
        "0",
        "1",
        *GENERATE,
        f"--output_dir={tmp_path / 'eval'}",
    ]
    generate.main(generate.parse_args([*flags, "--models", f"base={MODEL}", f"tuned={tuned}"]))
    score.main(score.parse_args([str(tmp_path / "eval"), "--metrics", "style"]))
    compare.main(compare.parse_args([str(tmp_path / "eval"), "--base", "base"]))
    scored = rows_of(tmp_path / "eval" / "scores.jsonl")
    means = {name: np.mean([row["score"] for row in scored if row["model"] == name]) for name in ("base", "tuned")}
    (result,) = json.loads((tmp_path / "eval" / "report.json").read_text())["results"]
    assert len(scored) == 12 and result["images"] == 6 and result["prompts"] == 3
    assert result["difference"] == pytest.approx(means["tuned"] - means["base"]) and result["difference"] != 0
    assert result["difference_interval"][0] <= result["difference"] <= result["difference_interval"][1]

    best = tmp_path / "best"
    build("from-scores", f"--images={tmp_path / 'eval'}", "--metric=style", f"--output_dir={best}")
    rows = read_pairs(best)
    assert [row["caption"] for row in rows] == ["rocket", "red apple", "grinning face"]
    for row in rows:
        group = [r for r in scored if r["prompt"] == row["caption"]]
        best_one, worst = max(group, key=lambda r: r["score"]), min(group, key=lambda r: r["score"])
        winner, loser = (0, 1) if row["label_0"] == 1 else (1, 0)
        for i, expected in ((winner, best_one), (loser, worst)):
            assert row[f"score_{i}"] == expected["score"] and row[f"model_{i}"] == expected["model"]
            assert row[f"jpg_{i}"] == (tmp_path / "eval" / expected["path"]).read_bytes()

    every, margin = tmp_path / "every", 0.2
    flags = ["--metric=style", "--mode=all", f"--min_margin={margin}", f"--output_dir={every}"]
    build("from-scores", f"--images={tmp_path / 'eval'}", *flags)
    count = 0
    for prompt in ("rocket", "red apple", "grinning face"):
        values = [r["score"] for r in scored if r["prompt"] == prompt]
        count += sum(a - b > margin for a in values for b in values)
    assert len(read_pairs(every)) == count > 3
    with pytest.raises(SystemExit, match=r"no pair is left \(3 captions without a pair beyond the margin\)"):
        build(
            *[
                "from-scores",
                f"--images={tmp_path / 'eval'}",
                "--min_margin=1000",
                *flags[:2],
                f"--output_dir={best}2",
            ]
        )


def test_broken_images_and_captions_end_the_run_before_the_model_is_loaded(images, tmp_path):
    flags = ["from-images", f"--images={images}", "--model=a/b", *GENERATE, f"--output_dir={tmp_path / 'x'}"]
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:200])
    with pytest.raises(SystemExit, match="row 3: no readable image .*: mend it or remove the row"):
        build(*flags)
    (images / "2.txt").write_text(" \n")
    with pytest.raises(SystemExit, match="row 2: the caption is ''"):
        build(*flags)
    (images / "1.txt").unlink()
    with pytest.raises(SystemExit, match="no 1.txt with the caption beside 1.png"):
        build(*flags)
    (tmp_path / "table.csv").write_text("words,image\nrocket,a.png\n")
    with pytest.raises(SystemExit, match="no column caption or .* among words, image: name it with --caption_column"):
        build("from-images", f"--images={tmp_path / 'table.csv'}", *flags[2:-1], f"--output_dir={tmp_path / 'y'}")


def test_a_call_that_cannot_be_leaves_the_folder_to_the_mended_one(images, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = [f"--model={MODEL}", *GENERATE, f"--output_dir={tmp_path / 'x'}"]
    with pytest.raises(SystemExit, match="--images .*empty: "):
        build("from-images", f"--images={tmp_path / 'empty'}", *flags)
    assert not (tmp_path / "x").exists()
    build("from-images", f"--images={images}", "--max_rows=2", *flags)
    with pytest.raises(SystemExit, match="--output_dir .*: .*0.png is a file; name a folder"):
        build("from-images", f"--images={images}", *flags, f"--output_dir={images / '0.png'}")


def test_other_settings_need_another_folder(images, tmp_path):
    flags = ["from-images", f"--images={images}", f"--model={MODEL}", *GENERATE, f"--output_dir={tmp_path / 'x'}"]
    build(*flags)
    with pytest.raises(SystemExit, match="was begun with seed 0, now 1: name another folder"):
        build(*flags, "--seed=1")


# ---------------------------------------------------------------------------------------------------------------------
# From captions
# ---------------------------------------------------------------------------------------------------------------------


RATINGS = (8, 2, 5, 6, 9, 9, 7, 1, 3, 10, 10, 4, 6, 8, 1, 7, 2, 3)
REFUSALS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0.7 with this model.",
    "logprobs": "You are not allowed to request logprobs from this model.",
    "messages": "These messages are too long.",
}


class ChatServer:
    """An OpenAI-compatible server on loopback.

    Attributes:
        troubles: what the next requests meet before all goes well: a status, "garbage", "silence" or "kill".
        malformed: text in a request -> answers to give before a good one, again and again if one only.
        requests: all requests that were answered well, with their text and whether they had an image.
        bodies: the whole of each request that was answered well.
        refuses: parameters that it answers with 400, as OpenAI's newer models do.
        logprobs: text in a request -> the logprobs of the answer.
        seen: bytes of the images that it was shown, in their order: it rates the first one by RATINGS[0] and so on.
    """

    def __init__(self) -> None:
        self.troubles, self.malformed, self.requests, self.keys, self.victim = [], {}, [], set(), None
        self.bodies, self.refuses, self.logprobs, self.seen = [], [], {}, []
        self.kill_at, self.lock = None, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.keys.add(self.headers.get("Authorization"))
                assert self.path == "/v1/chat/completions" and body["model"] == "tiny"
                with server.lock:
                    trouble = server.troubles.pop(0) if server.troubles else None
                if trouble == "silence":
                    time.sleep(1.5)
                if trouble == "garbage":
                    return self.reply(200, b"<html>busy</html>")
                if trouble == "shape":
                    return self.reply(200, b'{"choices": []}')
                if isinstance(trouble, int):
                    return self.reply(trouble, f'{{"error": "bad key {KEY}"}}'.encode(), {"Retry-After": "0.05"})
                if refused := [name for name in server.refuses if name in body]:
                    return self.reply(400, json.dumps({"error": {"message": REFUSALS[refused[0]]}}).encode())
                with server.lock:
                    server.bodies.append(body)
                    text = server.answer(body["messages"][0]["content"])
                    if server.kill_at is not None and len(server.requests) >= server.kill_at:
                        server.kill_at = None
                        os.kill(server.victim.pid, signal.SIGKILL)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                for mark, logprobs in server.logprobs.items():
                    if mark in str(body["messages"]):
                        choice["logprobs"] = logprobs
                self.reply(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

            def reply(self, status: int, data: bytes, headers: dict[str, str] = {}) -> None:
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(data))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # who asked has gone

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, content) -> str:
        text, images = content, []
        if isinstance(content, list):
            text = next(part["text"] for part in content if part["type"] == "text")
            urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            images = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
        self.requests.append((text, bool(images)))
        for mark, answers in self.malformed.items():
            if mark in text:
                return answers.pop(0) if len(answers) > 1 else answers[0]
        if len(images) == 2:
            first, second = (np.asarray(image).mean() for image in images)
            return f"ANALYSIS: I like it bright.\nCHOICE: {'A' if first > second else 'B'}"
        if images:
            return f"ANALYSIS: I looked at it.\nRATING: {self.rating_of(images[0])}"
        caption = text.rpartition("The prompt: ")[2]
        return f"Sure!\n[[PROMPT]] {CONTEXT.format(caption)} [[PROMPT]]"

    def rating_of(self, image: Image.Image) -> int:
        """By the order in which images were first shown, since their pixels differ between processors."""
        data = image.convert("RGB").tobytes()
        if data not in self.seen:
            self.seen.append(data)
        return RATINGS[self.seen.index(data)]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ChatServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


CAPTIONS = ("red apple", "rocket", "yellow duck", "green tree", "blue car", "white ghost", "brown bear", "pink pig")


def caption_flags(server: ChatServer, tmp_path: Path, *more) -> list[str]:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    flags = ["from-captions", f"--captions={tmp_path / 'captions.txt'}", "--attribute=cartoon style", "--model", MODEL]
    flags += [
        "--llm_model=tiny",
        f"--llm_endpoint={server.url}",
        "--judge_model=tiny",
        f"--judge_endpoint={server.url}",
    ]
    flags += ["--judge_criterion=the image is a cartoon", "--endpoint_timeout=1", "--endpoint_backoff=0.02"]
    return [*flags, *GENERATE, f"--output_dir={tmp_path / 'out'}", *more]


def test_from_captions(server, tmp_path, capsys):
    server.troubles = [429, 500, "garbage", "shape", "silence"]
    server.malformed = {
        "The prompt: red apple": [
            "no tags",
            "[[PROMPT]] too short [[PROMPT]]",
            f"[[PROMPT]]{CONTEXT.format('red apple')}[[PROMPT]]",
        ],
        "The prompt: rocket": [f"[[PROMPT]] A cartoon of {CONTEXT} [[PROMPT]]"],
        "was asked for: A small yellow duck": ["It is a fine image, I would say 9."],
    }
    build(*caption_flags(server, tmp_path, "--endpoint_workers=1"))

    work = tmp_path / "out" / "work"
    contexts = {row["caption"]: row for row in rows_of(work / "contexts.jsonl")}
    assert contexts["red apple"]["rejected"] == ["0 sentences between tags", "2 words"]
    assert contexts["rocket"]["context"] is None and contexts["rocket"]["rejected"] == ["style word cartoon"] * 5
    assert contexts["green tree"] == {
        "row": 3,
        "caption": "green tree",
        "context": CONTEXT.format("green tree"),
        "rejected": [],
    }
    generated = {row["path"]: row for row in rows_of(work / "images.jsonl")}
    assert generated["winners/000003.png"]["prompt"] == "cartoon style, " + CONTEXT.format("green tree")
    assert generated["losers/000003.png"]["prompt"] == CONTEXT.format("green tree") and len(generated) == 14

    judged = {row["path"]: row["score"] for row in rows_of(work / "judgements.jsonl")}
    kept = []
    for i, caption in enumerate(CAPTIONS):
        scores = [judged.get(f"{kind}/{i:06d}.png") for kind in ("winners", "losers")]
        if caption in ("rocket", "yellow duck"):
            assert scores == [None, None]
            continue
        assert scores == [server.rating_of(Image.open(work / kind / f"{i:06d}.png")) for kind in ("winners", "losers")]
        kept += [(CONTEXT.format(caption), *scores)] if scores[0] > 5 else []
    found = []
    for row in read_pairs(tmp_path / "out"):
        winner, loser = (0, 1) if row["label_0"] == 1 else (1, 0)
        found.append((row["caption"], row[f"score_{winner}"], row[f"score_{loser}"]))
    assert found == kept and 0 < len(kept) < 6 and len(server.seen) == 12

    assert server.keys == {f"Bearer {KEY}"}
    everything = "".join(
        p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".jsonl", ".md")
    )
    said = capsys.readouterr()
    assert KEY not in everything + said.out + said.err
    assert "1 of 8 captions got no well-formed context and are left out" in said.err
    assert "1 without a rating" in said.out

    asked = len(server.requests)
    build(*caption_flags(server, tmp_path, "--min_score=0", "--min_margin=0"))  # other filters ask nothing again
    margins = [judged[f"winners/{i:06d}.png"] - judged[f"losers/{i:06d}.png"] for i in (0, 3, 4, 5, 6, 7)]
    assert len(server.requests) == asked and len(read_pairs(tmp_path / "out")) == sum(m > 0 for m in margins)


def test_from_captions_killed_in_each_stage_loses_and_repeats_nothing(server, tmp_path):
    flags = caption_flags(server, tmp_path, "--min_score=0", "--batch_size=1", "--endpoint_workers=1")
    flags[flags.index("--num_inference_steps=2")] = "--num_inference_steps=8"
    work = tmp_path / "out" / "work"

    def run_and_kill(at: int | None) -> None:
        server.kill_at = at
        server.victim = process = start("pairs/build_preference_pairs.py", *flags)
        if at is None:
            log = work / "images.jsonl"
            while not (log.exists() and log.read_text().count("\n") >= 3):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL

    run_and_kill(at=4)  # while the fourth context is written
    assert len(rows_of(work / "contexts.jsonl")) == 3
    run_and_kill(at=None)  # while images are generated
    assert len(rows_of(work / "contexts.jsonl")) == 8
    times = {path: path.stat().st_mtime_ns for path in (work / "winners").glob("0*.png")}
    assert 3 <= len(times) < 8
    run_and_kill(at=len(server.requests) + 5)  # while the fifth image is judged
    assert len(rows_of(work / "judgements.jsonl")) == 4
    assert not (tmp_path / "out" / pairs.PARQUET).exists()
    build(*flags)

    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())
    assert [len(rows_of(work / name)) for name in ("contexts.jsonl", "images.jsonl", "judgements.jsonl")] == [
        8,
        16,
        16,
    ]
    # Only the requests that were under way at a kill were asked twice.
    assert len(server.requests) == 8 + 16 + 2
    assert len(read_pairs(tmp_path / "out")) == 8
    before = (tmp_path / "out" / pairs.PARQUET).read_bytes()
    build(*flags)
    assert (tmp_path / "out" / pairs.PARQUET).read_bytes() == before


def test_safety_has_the_attribute_on_the_losers_and_another_model(server, tmp_path):
    more = ["--winner_template={context}", "--loser_template={attribute} {caption}", "--caption_template={caption}"]
    build(*caption_flags(server, tmp_path, "--no_contexts", "--no_judge", f"--loser_model={MODEL}", *more))

    rows = read_pairs(tmp_path / "out")
    assert not server.requests and len(rows) == 8
    winner, loser = (0, 1) if rows[0]["label_0"] == 1 else (1, 0)
    assert rows[0]["caption"] == rows[0][f"prompt_{winner}"] == "red apple"
    assert rows[0][f"prompt_{loser}"] == "cartoon style red apple" and rows[0]["score_0"] is None


@pytest.mark.parametrize(
    "troubles, message",
    [
        ([503] * 3, "status 503, 3 times: see that the server runs"),
        (["garbage"] * 3, "an answer that is no chat completion, 3 times"),
        (["silence"] * 3, "no answer in 0.2 s, 3 times"),
        ([401], r'status 401: \{"error": "bad key \*\*\*'),
    ],
)
def test_an_endpoint_that_fails_ends_the_run_in_one_line(server, tmp_path, troubles, message):
    server.troubles = troubles
    flags = caption_flags(server, tmp_path, "--endpoint_tries=3", "--endpoint_timeout=0.2", "--endpoint_workers=1")
    with pytest.raises(SystemExit, match=message) as done:
        build(*flags)
    assert KEY not in str(done.value) and "\n" not in str(done.value)


def test_parameters_that_an_endpoint_refuses_are_left_out(server, tmp_path):
    server.refuses = ["max_tokens", "temperature", "logprobs"]
    flags = ["--max_rows=2", "--min_score=0", "--endpoint_workers=1"]
    build(*caption_flags(server, tmp_path, *flags))
    assert len(read_pairs(tmp_path / "out")) == 2 and len(server.bodies) == 2 + 4
    for body in server.bodies:
        assert not {"max_tokens", "temperature", "logprobs"} & body.keys()
    assert {body["max_completion_tokens"] for body in server.bodies} == {160, 512}

    server.refuses = ["messages"]
    with pytest.raises(SystemExit, match="--llm_endpoint http.*: status 400: .*These messages are too long"):
        build(*caption_flags(server, tmp_path, *flags, f"--output_dir={tmp_path / 'other'}"))


def test_contents_in_parts_reasoning_and_more_fields(server, tmp_path):
    context = f"<think>[[PROMPT]] no, not so [[PROMPT]]</think>[[PROMPT]] {CONTEXT.format('red apple')} [[PROMPT]]"
    rating = "<think>RATING: 3? No.</think>ANALYSIS: good\nRATING: 8"
    server.malformed = {"The prompt": [[{"type": "text", "text": context}]], "You rate": [rating]}
    fields = '{"chat_template_kwargs": {"enable_thinking": true}}'
    flags = ["--max_rows=1", "--judge_max_tokens=4000", "--endpoint_workers=1", f"--endpoint_fields={fields}"]
    build(*caption_flags(server, tmp_path, *flags))
    (row,) = read_pairs(tmp_path / "out")
    assert row["caption"] == CONTEXT.format("red apple") and row["score_0"] == row["score_1"] == 8
    assert all(body["chat_template_kwargs"] == {"enable_thinking": True} for body in server.bodies)
    assert [body["max_tokens"] for body in server.bodies] == [160, 4000, 4000]


def logprobs(*tokens) -> dict:
    """As the API words them: each token with its alternatives and their probabilities."""
    return {
        "content": [
            {"token": token, "top_logprobs": [{"token": other, "logprob": math.log(p)} for other, p in likely.items()]}
            for token, likely in tokens
        ]
    }


def grey_images(folder: Path) -> None:
    """As generate.py leaves them; the base's are dark, the other's brighter for the first prompt, alike for the
    second."""
    for model, levels in (("base", (60, 60)), ("tuned", (180, 60))):
        for i, level in enumerate(levels):
            path = Path("images", model, f"{i}.png")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 32), level).save(folder / path)
            row = {"model": model, "prompt_id": i, "seed": 0, "prompt": f"prompt {i}", "path": str(path)}
            with open(folder / "images.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


def score_images(*flags) -> None:
    score.main(score.parse_args([str(flag) for flag in flags]))


def test_ratings_by_an_endpoint_are_means_over_the_likely_ones(server, tmp_path):
    grey_images(tmp_path)
    server.malformed = {"You rate": ["RATING: 8"]}
    server.logprobs = {"prompt 0": logprobs(("RATING: ", {"RATING: ": 1.0}), ("8", {"8": 0.5, "7": 0.25, "9": 0.125}))}
    score_images(tmp_path, "--metrics=judge", f"--judge_endpoint={server.url}", "--weights=judge=tiny")
    scores = {(row["model"], row["prompt_id"]): row["score"] for row in rows_of(tmp_path / "scores.jsonl")}
    assert scores["base", 0] == pytest.approx((4 + 1.75 + 1.125) / 0.875) and scores["base", 1] == 8
    assert all(body["logprobs"] and body["top_logprobs"] == 20 for body in server.bodies)


def test_pairwise_judge_asks_both_orders(server, tmp_path, capsys):
    grey_images(tmp_path)
    flags = ["--metrics=pairwise", f"--judge_endpoint={server.url}", "--weights=judge=tiny"]
    with pytest.raises(SystemExit, match="--metrics pairwise needs --base NAME"):
        score_images(tmp_path, *flags)
    with pytest.raises(SystemExit, match="--base nobody: the images have only base, tuned"):
        score_images(tmp_path, *flags, "--base=nobody")
    score_images(tmp_path, *flags, "--base=base")
    scores = {(row["model"], row["prompt_id"]): row["score"] for row in rows_of(tmp_path / "scores.jsonl")}
    # The brighter one wins from either place; of two alike the judge always takes B, which is no preference.
    assert scores == {("base", 0): 0.5, ("base", 1): 0.5, ("tuned", 0): 1.0, ("tuned", 1): 0.5}
    assert len(server.requests) == 4
    compare.main(compare.parse_args([str(tmp_path), "--base", "base"]))
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["win_rate"] == 0.75 and result["difference"] == 0.25

    server.logprobs = {"prompt": logprobs(("CHOICE: ", {"CHOICE: ": 1.0}), ("A", {"A": 0.6, "B": 0.3}))}
    server.malformed = {"You compare": ["CHOICE: A"]}  # by two to one for the first place
    score_images(tmp_path, *flags, "--base=tuned", f"--output={tmp_path / 's.jsonl'}")
    assert [row["score"] for row in rows_of(tmp_path / "s.jsonl")] == pytest.approx([0.5] * 4)

    server.logprobs, server.malformed = {}, {}
    data = [f"--pairs={REPO / 'demo' / 'pairs'}", "--split=test", "--max_rows=3"]
    score_images(*data, *flags, f"--output={tmp_path / 'p.jsonl'}")
    (said,) = re.findall(r"pairwise: agrees with ([\d.]+)% of 3 labels", capsys.readouterr().out)
    rows = rows_of(tmp_path / "p.jsonl")
    wins = [row["score"] > 0.5 for row in rows if row["model"] == "chosen"]
    assert len(rows) == 6 and float(said) == pytest.approx(100 * np.mean(wins), abs=0.1)


def test_vqa_is_the_probability_of_yes(server, tmp_path):
    grey_images(tmp_path)
    server.logprobs = {"prompt 0": logprobs(("Yes", {"Yes": 0.75, "No": 0.2}))}
    score_images(tmp_path, "--metrics=vqa", f"--judge_endpoint={server.url}", "--weights=judge=tiny")
    scores = {(row["model"], row["prompt_id"]): row["score"] for row in rows_of(tmp_path / "scores.jsonl")}
    assert scores["base", 0] == pytest.approx(0.75) and scores["base", 1] is None
    assert 'Does this figure show "prompt 0"? Please answer yes or no.' in [text for text, _ in server.requests]


def test_scores_on_the_contact_sheet_are_readable_on_any_image():
    for level in (0, 90, 128, 170, 255):
        data = io.BytesIO()
        Image.new("L", (64, 64), level).save(data, "PNG")
        sides = [pairs.side(data.getvalue(), Path("."), score=7.25), pairs.side(data.getvalue(), Path("."))]
        sheet = np.asarray(pairs.make_contact_sheet([("a caption", *sides)]).convert("L")).astype(int)
        number = sheet[40:56, 8:40]
        assert np.abs(number - level).max() > 120 and np.ptp(number) > 200, level


def test_an_endpoint_that_is_down(server, tmp_path):
    flags = caption_flags(server, tmp_path, "--endpoint_tries=2")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(SystemExit, match="no connection, 2 times: .* the same command goes on from here"):
        build(*flags)


def test_a_judge_that_answers_nonsense(server, tmp_path):
    server.malformed = {"You rate an image": ["Lovely!"]}
    with pytest.raises(SystemExit, match="--judge_model tiny: none of its answers had the form RATING: 7"):
        build(*caption_flags(server, tmp_path, "--max_rows=2", "--judge_tries=2"))
    assert sum(with_image for _, with_image in server.requests) == 2 * 2 * 2


@pytest.mark.parametrize(
    "more, message",
    [
        (["--winner_template={style}"], "only {attribute}, {context}, {caption} are known"),
        (["--resolution=60"], "--resolution 60: must be a positive multiple of 8"),
    ],
)
def test_flags_that_cannot_be(server, tmp_path, more, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        build(*caption_flags(server, tmp_path, *more))


def test_a_judge_or_its_absence_is_named(server, tmp_path):
    flags = [flag for flag in caption_flags(server, tmp_path) if not flag.startswith("--judge_model")]
    with pytest.raises(SystemExit, match="--judge_model: name a vision-language model, or keep all pairs"):
        build(*flags)


# ---------------------------------------------------------------------------------------------------------------------
# Models of transformers in the place of endpoints: random ones, which talk nonsense
# ---------------------------------------------------------------------------------------------------------------------


def test_a_local_language_model_writes_and_its_nonsense_is_rejected(server, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(Path(MODEL) / "tokenizer")
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(tmp_path / "llm")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes))
    model.save_pretrained(tmp_path / "llm")

    writer = pairs.LocalWriter(str(tmp_path / "llm"), "cpu")
    inputs = tokenizer("red apple", return_tensors="pt").input_ids
    expected = []
    for _ in range(8):  # greedy, a token at a time
        expected.append(
            model(torch.cat([inputs, torch.tensor([expected], dtype=int)], 1)).logits[0, -1].argmax().item()
        )
    assert writer.ask("red apple", max_tokens=8).text == tokenizer.decode(expected, skip_special_tokens=True)

    flags = [flag for flag in caption_flags(server, tmp_path, "--max_rows=2") if not flag.startswith("--llm")]
    flags += [f"--llm_model={tmp_path / 'llm'}", "--llm_tries=2", "--llm_max_tokens=12"]
    with pytest.raises(SystemExit, match=r"no answer of 2 tries was well-formed \(last: 0 sentences between tags\)"):
        build(*flags)
    rejected = [row["rejected"] for row in rows_of(tmp_path / "out" / "work" / "contexts.jsonl")]
    assert rejected == [["0 sentences between tags"] * 2] * 2


@pytest.mark.parametrize(
    "answer, context, reason",
    [
        (f"[[PROMPT]] {CONTEXT} [[PROMPT]]", CONTEXT, ""),
        (f"Here:\n[[prompt]]\n{CONTEXT}\n[[/PROMPT]] Enjoy!", CONTEXT, ""),
        (f"[[PROMPT]] {CONTEXT}", None, "0 sentences between tags"),
        ("[[PROMPT]][[PROMPT]]", None, "0 words"),
        (f"[[PROMPT]] {'very ' * 300} [[PROMPT]]", None, "300 words"),
        (
            "[[PROMPT]] A cat sits on a mat. A dog sits on the floor beside it. [[PROMPT]]",
            None,
            "more than one sentence",
        ),
        ("[[PROMPT]] An oil painting of a cat that sits on a mat [[PROMPT]]", None, "style word painting"),
        ("[[PROMPT]] A cat that sits on a mat in dotted ink [[PROMPT]]", None, "style word ink"),
    ],
)
def test_context_of_an_answer(answer, context, reason):
    assert pairs.read_context(answer, [*pairs.STYLE_WORDS, "ink"]) == (context, reason)


@pytest.mark.parametrize("use", ["from-images", "from-captions", "from-scores"])
def test_help_explains_itself(use, capsys):
    for argv in (["--help"], [use, "--help"]):
        with pytest.raises(SystemExit) as done:
            pairs.parse_args(argv)
        assert done.value.code == 0 and use in capsys.readouterr().out
