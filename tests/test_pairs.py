"""pairs/build_preference_pairs.py on the demo's model, with a local server that speaks OpenAI's chat completions."""

import base64
import io
import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation.common import hash_content
from pairs import build_preference_pairs
from pairs.files import read_captions, read_images
from pairs.judge import Judge
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from train_diffusion_mapo_sdxl import load_image, load_pairs


pytestmark = pytest.mark.usefixtures("one_thread")
DEMO = Path(__file__).resolve().parents[1] / "demo"
MODEL = DEMO / "sdxl-tiny-emoji"
GENERATE = ["--resolution=64", "--num_inference_steps=2", "--guidance_scale=2", "--device=cpu"]
CONTEXT = "A small {} stands on a wooden table beside an open window while the morning sun falls on the floor."


def build(*flags) -> None:
    build_preference_pairs.main(build_preference_pairs.parse_args([str(flag) for flag in flags]))


def read_rows(out: Path) -> list[dict]:
    """Return the rows with the columns of the chosen and the rejected image under those names."""
    rows = []
    for row in pq.read_table(out / build_preference_pairs.PARQUET).to_pylist():
        chosen = 0 if row["label_0"] == 1 else 1
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        renamed = {"caption": row["caption"]}
        for name, side in (("chosen", chosen), ("rejected", 1 - chosen)):
            for column in ("jpg", "score", "model", "seed", "prompt"):
                renamed[f"{name}_{column}"] = row[f"{column}_{side}"]
        rows.append(renamed)
    return rows


def modification_times(folder: Path) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# ---- From images ----------------------------------------------------------------------------------------------------
COMFYUI = {
    "3": {"class_type": "KSampler", "inputs": {"model": ["4", 0], "positive": ["10", 0], "negative": ["10", 1]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "10": {"class_type": "ControlNetApplyAdvanced", "inputs": {"negative": ["7", 0], "positive": ["6", 0]}},
    "12": {"class_type": "PrimitiveString", "inputs": {"value": "yellow duck"}},
}
A1111 = "blue car, <lora:style:0.8>\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 5"


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder as people have it: captions in four places, and files that aren't images with a caption."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    (folder / ".ipynb_checkpoints").mkdir()
    drawings = []
    for row in pq.read_table(DEMO / "pairs" / "train.parquet").slice(0, 4).to_pylist():
        drawings.append(Image.open(io.BytesIO(row["jpg_0"])).convert("RGB"))
    drawings[0].save(folder / "a.png")
    (folder / "a.txt").write_text("red apple\n")
    drawings[1].save(folder / "more" / "b.JPG")
    (folder / "more" / "b.caption").write_text("rocket")
    for name, drawing, key, text in (("c", 2, "parameters", A1111), ("d", 3, "prompt", json.dumps(COMFYUI))):
        info = PngInfo()
        info.add_text(key, text, zip=True)
        drawings[drawing].save(folder / f"{name}.png", pnginfo=info)
    drawings[0].save(folder / ".ipynb_checkpoints" / "a.png")
    drawings[0].save(folder / "lonely.png")
    (folder / "e.heic").write_bytes(b"...")
    return folder


def test_images_are_chosen_over_what_the_model_generates(images, tmp_path, capsys):
    out = tmp_path / "out"
    build("from-images", f"--images={images}", f"--model={MODEL}", *GENERATE, f"--output_dir={out}")

    assert "left out 2 of 8 files, which aren't an image with a caption: e.heic, lonely.png" in capsys.readouterr().out
    rows = read_rows(out)
    assert [row["caption"] for row in rows] == ["red apple", "blue car", "yellow duck", "rocket"]
    files = [images / name for name in ("a.png", "c.png", "d.png", "more/b.JPG")]
    assert [row["chosen_jpg"] for row in rows] == [file.read_bytes() for file in files]
    generated = {file.read_bytes() for file in (out / "work" / "generated").iterdir()}
    assert {row["rejected_jpg"] for row in rows} == generated and len(generated) == 4
    assert all(row["rejected_prompt"] == row["caption"] and row["rejected_model"] == str(MODEL) for row in rows)
    assert "| pairs | 4 |" in (out / "README.md").read_text()

    for row, pair in zip(rows, load_pairs(str(out))):  # as the training script reads them
        assert pair["caption"] == row["caption"]
        assert load_image(pair["image_w"]).tobytes() == load_image(row["chosen_jpg"]).tobytes()
        assert load_image(pair["image_l"]).tobytes() == load_image(row["rejected_jpg"]).tobytes()
    # The contact sheet has the chosen image on the left.
    sheet = Image.open(out / "contact_sheet.png")
    for number, row in enumerate(rows):
        for name, left in (("chosen", 8), ("rejected", 172)):
            shown = sheet.crop((340 * number + left, 40, 340 * number + left + 160, 200))
            image = load_image(row[f"{name}_jpg"]).resize((160, 160), Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(shown, float) - np.asarray(image, float)).mean() < 1


def test_only_what_is_missing_is_generated_and_a_retrained_model_generates_anew(images, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    out = tmp_path / "out"
    flags = ["from-images", f"--images={images}", f"--model={model}", *GENERATE, f"--output_dir={out}"]
    build(*flags)
    folder = out / "work" / "generated"
    before = modification_times(folder)
    rejected = [row["rejected_jpg"] for row in read_rows(out)]

    damaged = sorted(before)[0]
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:100])
    (images / "lonely.txt").write_text("green tree")  # a row in the middle
    build(*flags)
    after = modification_times(folder)
    assert {name for name in before if after[name] != before[name]} == {damaged}
    assert len(after) == 5
    rows = read_rows(out)
    assert len({row["rejected_jpg"] for row in rows} & set(rejected)) >= 3  # a smaller batch may round differently

    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 0.1
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors")
    build(*flags)
    assert all(new["rejected_jpg"] != old["rejected_jpg"] for new, old in zip(read_rows(out), rows))


@pytest.mark.parametrize("caption", ["None", "NA", "0123", "a\u2028b\x85c", "Žluťoučký 李雷"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_captions_stay_what_they_are(tmp_path, caption, suffix):
    path = tmp_path / f"captions{suffix}"
    if suffix == ".txt":
        path.write_text(f"first\n{caption}\n", encoding="utf-16")
    elif suffix == ".csv":
        path.write_text(f"caption,n\r\nfirst,1\r\n{caption},2\r\n", encoding="utf-8-sig")
    elif suffix == ".jsonl":
        rows = [{"caption": "first"}, {"caption": caption}]
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        pq.write_table(build_preference_pairs.pa.table({"caption": ["first", caption]}), path)
    assert read_captions(str(path)) == ["first", caption]


def test_what_cannot_be_read_is_named(images, tmp_path):
    (tmp_path / "cp1252.txt").write_bytes("café".encode("cp1252"))
    with pytest.raises(ValueError, match=r"cp1252.txt: isn't UTF-8 .*; save it as UTF-8"):
        read_captions(str(tmp_path / "cp1252.txt"))
    (tmp_path / "half.jsonl").write_text(r'{"caption": "half a \ud83d character"}')
    with pytest.raises(ValueError, match="half.jsonl: the caption of row 0 has half a character"):
        read_captions(str(tmp_path / "half.jsonl"))
    (tmp_path / "empty.csv").write_text("caption,n\na,1\n,2\n")
    with pytest.raises(ValueError, match="empty.csv: the caption of row 1 is ''"):
        read_captions(str(tmp_path / "empty.csv"))
    (tmp_path / "words.csv").write_text("words,n\na,1\n")
    with pytest.raises(
        ValueError, match="words.csv: has the columns words, n; name one of them with --caption_column"
    ):
        read_captions(str(tmp_path / "words.csv"))
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="a.png: the image can't be read"):
        read_images(str(images), tmp_path / "extracted")


# ---- From captions, with a local server -----------------------------------------------------------------------------
class ChatServer:
    """An OpenAI-compatible server on 127.0.0.1. It rates an image by its brightness and prefers the brighter of two.

    Attributes:
        statuses: Status codes for the next requests; 200 after that.
        requests: The text and the images of every request that was answered.
        answers: Answers by a part of the request's text, instead of the usual ones.
        tokens: (token, {alternative: probability}) for each token of the next answers.
    """

    def __init__(self):
        self.statuses = []
        self.requests = []
        self.bodies = []
        self.answers = {}
        self.tokens = None
        self.finish_reason = "stop"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = server.statuses.pop(0) if server.statuses else 200
                completion = server.complete(body) if status == 200 else {"error": {"message": "busy"}}
                data = json.dumps(completion).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def complete(self, body: dict) -> dict:
        assert body["model"] == "tiny"
        parts = body["messages"][0]["content"]
        text = parts[-1]["text"]
        images = []
        for part in parts[:-1]:
            data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            images.append(np.asarray(Image.open(io.BytesIO(data))).mean())
        self.requests.append((text, images))
        self.bodies.append(body)
        answer = f"Sure!\n[[PROMPT]] {CONTEXT.format(text.rpartition('The prompt: ')[2])} [[PROMPT]]"
        if len(images) == 1:
            answer = f"ANALYSIS: I looked.\nRATING: {1 + images[0] / 30:.2f}"
        if len(images) == 2:
            answer = f"ANALYSIS: I looked.\nCHOICE: {'A' if images[0] > images[1] else 'B'}"
        for mark, other in self.answers.items():
            if mark in text:
                answer = other
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "finish_reason": self.finish_reason, "message": message, "logprobs": None}
        if self.tokens is not None:
            choice["logprobs"] = {"content": []}
            for token, alternatives in self.tokens:
                likely = [{"token": name, "logprob": math.log(p)} for name, p in alternatives.items()]
                choice["logprobs"]["content"].append({"token": token, "logprob": 0.0, "top_logprobs": likely})
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}


@pytest.fixture
def server():
    server = ChatServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


CAPTIONS = ("red apple", "rocket", "yellow duck", "green tree")


@pytest.fixture
def caption_flags(server, tmp_path) -> list:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    flags = ["from-captions", f"--captions={tmp_path / 'captions.txt'}", "--attribute=cartoon style", *GENERATE]
    flags += [f"--model={MODEL}", "--judge_model=tiny", f"--api_base_url={server.url}"]
    return [*flags, f"--output_dir={tmp_path / 'out'}"]


def test_captions_become_pairs_with_and_without_the_attribute(server, caption_flags, tmp_path):
    server.statuses = [503, 429]  # the client asks again
    server.answers = {"green tree": "[[PROMPT]] An oil painting of a green tree that stands on a hill. [[PROMPT]]"}
    build(*caption_flags, "--min_score=0")
    rows = read_rows(tmp_path / "out")
    assert [row["caption"] for row in rows] == [CONTEXT.format(caption) for caption in CAPTIONS[:3]]
    for row in rows:
        assert row["chosen_prompt"] == f"cartoon style, {row['caption']}" and row["rejected_prompt"] == row["caption"]
        for name in ("chosen", "rejected"):
            brightness = np.asarray(load_image(row[f"{name}_jpg"])).mean()
            assert row[f"{name}_score"] == pytest.approx(1 + brightness / 30, abs=0.01)
    assert "| left out | captions without a usable context (1) |" in (tmp_path / "out" / "README.md").read_text()
    written = [text for text, images in server.requests if not images]
    assert len(written) == 3 + build_preference_pairs.CONTEXT_TRIES  # the tree's answers all had a word of style
    assert len(server.requests) == len(written) + 6

    # Other filters ask only for the context that is missing. Another criterion asks the judge again.
    server.requests.clear()
    margins = [row["chosen_score"] - row["rejected_score"] for row in rows]
    build(*caption_flags, "--min_score=0", f"--min_margin={sorted(margins)[1]}")
    assert len(read_rows(tmp_path / "out")) == 1
    assert all("green tree" in text for text, _ in server.requests)
    server.requests.clear()
    build(*caption_flags, "--min_score=0", "--judge_criterion=the image is flat")
    assert sum("the image is flat" in text for text, _ in server.requests) == 6


def test_a_run_that_was_interrupted_asks_only_for_what_is_missing(server, caption_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(build_preference_pairs, "REQUESTS_AT_A_TIME", 1)
    server.statuses = [200] * 6 + [400]  # four contexts, two ratings, and an error that isn't tried again
    with pytest.raises(Exception, match="400"):
        build(*caption_flags, "--min_score=0")
    log = tmp_path / "out" / "work" / "ratings.jsonl"
    assert 2 <= log.read_text().count("\n") < 8
    with open(log, "a") as file:
        file.write('{"key": "01')  # a kill may leave half a row
    before = modification_times(tmp_path / "out" / "work" / "generated")
    build(*caption_flags, "--min_score=0")
    assert len(server.requests) == 4 + 8 and len(read_rows(tmp_path / "out")) == 4
    assert modification_times(tmp_path / "out" / "work" / "generated") == before
    assert all(json.loads(line)["answer"] for line in log.read_text().splitlines())


def test_without_a_context_and_a_judge_nothing_is_asked(server, caption_flags, tmp_path):
    """As the paper's safety task: the attribute is what to avoid, so it goes to the rejected images."""
    templates = ["--chosen_template={context}", "--rejected_template={attribute} {caption}"]
    build(*caption_flags, "--no_contexts", "--no_judge", *templates)
    rows = read_rows(tmp_path / "out")
    assert [row["caption"] for row in rows] == list(CAPTIONS) and not server.requests
    assert rows[1]["chosen_prompt"] == "rocket" and rows[1]["rejected_prompt"] == "cartoon style rocket"


def test_models_that_never_answer_as_asked_are_named(server, caption_flags):
    server.answers = {"The prompt": "I can't help with that."}
    with pytest.raises(ValueError, match="tiny put no usable sentence between .* Try another --llm_model"):
        build(*caption_flags)
    server.answers = {"You rate": "Lovely!"}
    with pytest.raises(ValueError, match="tiny never answered with a line like .* Try another --judge_model"):
        build(*caption_flags, "--no_contexts")


@pytest.mark.parametrize("flag", ["--chosen_template={style}", "--caption_template={0}"])
def test_a_template_with_an_unknown_name_is_refused(caption_flags, flag, capsys):
    with pytest.raises(SystemExit):
        build(*caption_flags, flag)
    assert "only {attribute}, {context} and {caption} are filled in" in capsys.readouterr().err


# ---- The judge ------------------------------------------------------------------------------------------------------
DARK = Image.new("RGB", (16, 16), "black")
BRIGHT = Image.new("RGB", (16, 16), "white")


def test_a_rating_is_the_mean_over_the_likely_ones(server):
    judge = Judge(server.url, "tiny", criterion="the image is bright")
    assert judge.rate(BRIGHT, "a lamp") == pytest.approx(9.5)  # a server without probabilities
    text = server.requests[-1][0]
    assert "a lamp" in text and "the image is bright" in text
    assert server.bodies[-1]["logprobs"] is True and server.bodies[-1]["top_logprobs"] == 20

    server.answers = {"You rate": "<think>RATING: 3? No.</think>ANALYSIS: good\nRATING: 8"}
    start = [("<think>RATING: ", {}), ("3", {"3": 1.0}), ("? No.</think>ANALYSIS: good\n", {}), ("RATING:", {})]
    server.tokens = [*start, (" 8", {" 8": 0.5, "7": 0.25, "9": 0.125, "good": 0.1})]
    assert judge.rate(BRIGHT, "a lamp") == pytest.approx((4 + 1.75 + 1.125) / 0.875)
    server.tokens = [*start, (" ", {" ": 1.0}), ("8", {"8": 0.5, "9": 0.25, "1": 0.25})]  # 10 begins with 1
    assert judge.rate(BRIGHT, "a lamp") == pytest.approx(4 + 2.25 + 2.5)


@pytest.mark.parametrize("answer", ["Lovely!", "RATING: 11", "RATING: -3", "RATING: nine"])
def test_an_answer_without_a_rating_is_nan(server, answer):
    server.answers = {"You rate": answer}
    assert math.isnan(Judge(server.url, "tiny").rate(BRIGHT, "a lamp"))


def test_an_answer_that_was_cut_off_is_nan(server):
    server.finish_reason = "length"
    assert math.isnan(Judge(server.url, "tiny").rate(BRIGHT, "a lamp"))


def test_a_comparison_asks_in_both_orders(server):
    judge = Judge(server.url, "tiny")
    assert judge.compare(BRIGHT, DARK, "a lamp") == 1 and judge.compare(DARK, BRIGHT, "a lamp") == 0
    assert [images for _, images in server.requests] == [[255, 0], [0, 255], [0, 255], [255, 0]]
    server.answers = {"You compare": "CHOICE: A"}
    assert judge.compare(BRIGHT, DARK, "a lamp") == 0.5  # always the first is no preference
    server.tokens = [("CHOICE: ", {}), ("A", {"A": 0.6, "B": 0.2})]
    assert judge.prefer_first(BRIGHT, DARK, "a lamp") == pytest.approx(0.75)
    server.answers = {"You compare": "Both are lovely."}
    assert math.isnan(judge.compare(BRIGHT, DARK, "a lamp"))


def test_vqa_score_is_the_probability_of_yes(server):
    judge = Judge(server.url, "tiny")
    server.tokens = [("Yes", {"Yes": 0.75, "yes": 0.05, "No": 0.2}), (", there is no doubt", {})]
    assert judge.vqa_score(BRIGHT, "a lamp") == pytest.approx(0.8)
    server.tokens = None
    assert math.isnan(judge.vqa_score(BRIGHT, "a lamp"))


def test_fields_reach_the_server_and_null_removes_one(server):
    judge = Judge(server.url, "tiny", fields={"temperature": None, "reasoning_effort": "low"})
    judge.ask("Hello")
    assert "temperature" not in server.bodies[0] and server.bodies[0]["reasoning_effort"] == "low"


# ---- From scores ----------------------------------------------------------------------------------------------------
def test_the_best_is_chosen_over_the_worst_or_all_pairs_beyond_a_margin(tmp_path, capsys):
    scores = {"rocket": (3.0, 1.0, 2.5), "red apple": (0.1, 0.2), "lonely": (1.0,)}
    with open(tmp_path / "scores.jsonl", "w") as file:
        for prompt, values in scores.items():
            for number, score in enumerate(values):
                path = f"{prompt}-{number}.png"
                Image.new("L", (8, 8), int(50 * score)).save(tmp_path / path)
                row = {"prompt": prompt, "path": path, "model": "m", "seed": number, "metric": "style", "score": score}
                row["image"] = hash_content((tmp_path / path).read_bytes())
                file.write(json.dumps(row) + "\n")
    flags = ["from-scores", f"--images={tmp_path}", "--metric=style", f"--output_dir={tmp_path / 'out'}"]
    build(*flags)
    rows = read_rows(tmp_path / "out")
    assert [(row["caption"], row["chosen_score"], row["rejected_score"]) for row in rows] == [
        ("rocket", 3.0, 1.0),
        ("red apple", 0.2, 0.1),
    ]
    assert rows[0]["chosen_jpg"] == (tmp_path / "rocket-0.png").read_bytes() and rows[0]["rejected_seed"] == 1
    assert "prompts without two images that differ enough (1)" in capsys.readouterr().out

    build(*flags, "--mode=all", "--min_margin=0.4")
    margins = [(row["chosen_score"], row["rejected_score"]) for row in read_rows(tmp_path / "out")]
    assert margins == [(3.0, 2.5), (3.0, 1.0), (2.5, 1.0)]
    with pytest.raises(ValueError, match="No pair is left"):
        build(*flags, "--min_margin=5")
    with pytest.raises(ValueError, match="--metric hps: .* has only style"):
        build(*flags, "--metric=hps")
    Image.new("L", (8, 8), 255).save(tmp_path / "rocket-1.png")  # generated again after the scores
    with pytest.raises(ValueError, match="rocket-1.png isn't the image that was scored"):
        build(*flags)
