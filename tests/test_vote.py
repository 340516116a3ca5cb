"""pairs/vote.py in a headless Chromium that is driven by keys and clicks, and its server by hand."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation.common import hash_content
from pairs import vote
from pairs.build_preference_pairs import PARQUET
from pairs.files import JsonLines, read_images
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from train_diffusion_mapo_sdxl import load_image, load_pairs


pytestmark = pytest.mark.usefixtures("one_thread")
REPO = Path(__file__).resolve().parents[1]
MODEL = REPO / "demo" / "sdxl-tiny-emoji"
EVIL = "a <img src=x onerror=\"document.title='broken'\"> square"
PROMPTS = [EVIL, "square 1", "square 2"]
KEYS = {"left": "\ue012", "right": "\ue014", "down": "\ue015", "escape": "\ue00c", "enter": "\ue007"}


class Browser:
    """Chromium through ChromeDriver's HTTP interface. Needs the packages chromium and chromium-driver."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 800):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            port = re.search(r"successfully on port (\d+)", line)
            if port:
                break
        self.url = f"http://127.0.0.1:{port[1]}/session"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        metrics = {"width": width, "height": height, "pixelRatio": 1.0}
        options = {"args": arguments, "mobileEmulation": {"deviceMetrics": metrics}}
        session = self.ask("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.url += "/" + session["sessionId"]
        self.pid = session["capabilities"]["goog:processID"]

    def ask(self, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=300))["value"]

    def open(self, url: str) -> None:
        self.ask("/url", {"url": url})

    def press(self, *keys: str) -> None:
        actions = []
        for key in keys:
            actions.append({"type": "keyDown", "value": KEYS.get(key, key)})
            actions.append({"type": "keyUp", "value": KEYS.get(key, key)})
        self.ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, css: str) -> None:
        element = self.ask("/element", {"using": "css selector", "value": css})
        self.ask(f"/element/{next(iter(element.values()))}/click", {})

    def run(self, script: str):
        return self.ask("/execute/sync", {"script": f"return {script}", "args": []})

    def text(self, name: str) -> str:
        return self.run(f"document.getElementById('{name}').textContent")

    def box(self, name: str) -> dict:
        return self.run(f"document.getElementById('{name}').getBoundingClientRect()")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true and the page takes keys again."""
        deadline = time.monotonic() + 120
        while not self.run(f"!busy && ({condition})"):
            assert time.monotonic() < deadline, self.run("document.body.innerText")
            time.sleep(0.02)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.driver.kill()
        self.driver.wait()
        self.driver.stdout.close()


@pytest.fixture
def open_browser(tmp_path):
    """`open_browser(width, height)` starts a browser."""
    browsers = []

    def start(*size: int) -> Browser:
        browsers.append(Browser(tmp_path / f"profile{len(browsers)}", *size))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.end()


class Server:
    """The voting page on a free port of this machine, in a thread."""

    def __init__(self, images: Path, output_dir: Path):
        found = read_images(str(images), output_dir / "work")
        votes = vote.Votes(found, JsonLines(output_dir / "votes.jsonl"), repeat=0.2, seed=0)
        self.http = vote.Server("127.0.0.1", 0, votes, output_dir, "sdxl")
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def end(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def get(self, path: str) -> bytes:
        return urllib.request.urlopen(self.url + path, timeout=60).read()

    def send(self, head: str, body: bytes = b"") -> bytes:
        """Send a request as it is and return the whole answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
            return connection.makefile("rb").read()

    def post(self, path: str, body) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(data)}"
        answer = self.send(head, data)
        return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.fixture
def images(tmp_path) -> Path:
    """Three gray squares for each of three prompts, with the prompts in A1111's metadata."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(9):
        info = PngInfo()
        info.add_text("parameters", f"{PROMPTS[i // 3]}\nSteps: 20")
        Image.new("L", (96, 64), 20 + 25 * i).save(folder / f"{i}.png", pnginfo=info)
    return folder


@pytest.fixture
def server(images, tmp_path):
    server = Server(images, tmp_path / "taste")
    yield server
    server.end()


def votes_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]


def brightness(data) -> float:
    return np.asarray(load_image(data)).mean()


# ---- In the browser -------------------------------------------------------------------------------------------------
def test_jose_votes_with_the_keys_and_writes_the_pairs(server, open_browser, tmp_path):
    browser = open_browser()
    browser.open(server.url)
    browser.click("input[name=voter]")
    browser.press(*"José", "enter")
    browser.wait("state.done == 0 && state.total == 11")  # 9 pairs, and every fifth of them again
    prompts = []
    while browser.run("document.getElementById('end').hidden"):
        showing = browser.run("state.show[0]")
        levels = [brightness(server.get("/image/" + showing[side])) for side in ("left", "right")]
        prompts.append(browser.text("prompt"))
        browser.press("left" if levels[0] > levels[1] else "right")
        browser.wait(f"state.done == {len(prompts)}")
        assert len(votes_in(tmp_path / "taste")) == len(prompts)  # each is on disk before the next pair
    assert len(prompts) == 11 and set(prompts[:3]) == set(PROMPTS)  # every prompt once before one comes again
    assert browser.run("document.title") == "Vote"  # prompts are shown as text
    assert "Thank you, José" in browser.text("thanks")

    browser.click("#write")
    browser.wait("!document.getElementById('written').hidden")
    assert "José chose the same image in 2 of 2 pairs shown twice." in browser.text("result")
    assert f"--dataset_name {tmp_path / 'taste'}" in browser.text("command")
    pairs = load_pairs(str(tmp_path / "taste"))
    assert Counter(pairs["caption"]) == dict.fromkeys(PROMPTS, 3)
    for pair in pairs:
        assert brightness(pair["image_w"]) > brightness(pair["image_l"])


def test_on_a_phone_the_images_are_as_wide_as_the_screen(server, open_browser):
    browser = open_browser(390, 844)
    browser.open(f"{server.url}/?voter={quote('李雷')}")
    browser.wait("state.done == 0")
    left, right = browser.box("left"), browser.box("right")
    assert left["width"] > 370 and right["top"] >= left["bottom"] and right["bottom"] < 800
    assert left["width"] / left["height"] == pytest.approx(96 / 64, rel=0.01)
    browser.click("[data-act=right]")
    browser.wait("state.done == 1")
    assert browser.run("document.documentElement.scrollWidth") == 390


def test_tie_skip_undo_full_size_and_finishing_early(server, open_browser, tmp_path):
    browser = open_browser()
    browser.open(f"{server.url}/?voter={quote('Мария')}")
    browser.wait("state.done == 0 && !state.undo")
    first = browser.run("state.show[0]")
    browser.press("down")
    browser.wait("state.done == 1")
    second = browser.run("state.show[0]")
    browser.press("s")
    browser.wait("state.done == 2")
    browser.press("z")
    browser.wait("state.done == 1")
    assert browser.run("state.show[0]") == second
    browser.click("[data-act=undo]")
    browser.wait("state.done == 0")
    assert browser.run("state.show[0]") == first
    browser.click("#left")
    assert browser.run("document.getElementById('big').open")
    assert browser.run("document.querySelector('#big img').width") == 96
    browser.press("escape")
    browser.wait("!document.getElementById('big').open")

    browser.click("#finish")
    assert browser.text("thanks") == "11 pairs to go, Мария"
    browser.press("left")  # no pair is shown that it could choose
    browser.click("#write")
    browser.wait("document.getElementById('message').textContent.includes('No pair is left')")
    browser.click("#back")
    browser.press("left")
    browser.wait("state.done == 1 && document.getElementById('message').textContent == ''")
    assert [row["choice"] for row in votes_in(tmp_path / "taste")] == ["tie", "skip", "undo", "undo", "left"]


def test_a_killed_server_loses_nothing(images, open_browser, tmp_path):
    browser = open_browser()
    server = Server(images, tmp_path / "taste")
    browser.open(f"{server.url}/?voter=ann")
    browser.wait("state.done == 0")
    for step in range(2):
        browser.press("left")
        browser.wait(f"state.done == {step + 1}")
    third = browser.run("state.show[0]")
    server.end()
    browser.press("right")
    browser.wait("document.getElementById('message').textContent.includes('The server does not answer')")
    with open(tmp_path / "taste" / "votes.jsonl", "a") as file:
        file.write('{"voter": "ann", "le')  # what a kill leaves of a row

    command = [sys.executable, str(REPO / "pairs" / "vote.py"), f"--images={images}", "--repeat=0.2"]
    command += [f"--output_dir={tmp_path / 'taste'}", f"--port={server.port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "Vote at" not in process.stdout.readline():
        pass
    assert browser.run("state.show[0]") == third
    browser.press("right")
    browser.wait("state.done == 3 && document.getElementById('message').textContent == ''")
    rows = votes_in(tmp_path / "taste")
    assert [row["choice"] for row in rows] == ["left", "left", "right"] and rows[2]["left"] == third["left"]
    process.send_signal(signal.SIGINT)
    assert "The same command with --write writes the pairs" in process.communicate(timeout=120)[0]


# ---- The server -----------------------------------------------------------------------------------------------------
def test_a_browser_that_is_closed_leaves_no_traceback(server, capfd):
    name = next(iter(server.http.votes.files))
    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
        connection.sendall(f"GET /image/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.close()
    assert server.get("/image/" + name)
    assert "Traceback" not in capfd.readouterr().err


def test_the_server_answers_only_its_own_page(server, capfd):
    showing = json.loads(server.get("/state?voter=ann"))["show"][0]
    ask = {"voter": "ann", "choice": "left", **showing}
    for host in ("localhost", "127.0.0.1", f"127.0.0.1:{server.port}", "[::1]:80"):  # port 80 stands in no address
        assert b" 200 " in server.send(f"GET /state?voter=ann HTTP/1.1\nHost: {host}").partition(b"\r\n")[0]
    assert b" 403 " in server.send("GET /state?voter=ann HTTP/1.1\nHost: evil.example:80")
    form = f"POST /vote HTTP/1.1\nHost: localhost\nContent-Type: text/plain\nContent-Length: {len(json.dumps(ask))}"
    assert b" 403 " in server.send(form, json.dumps(ask).encode())
    for path in ("/image/0", "/image/../votes.jsonl", "/votes.jsonl", "/nothing"):
        assert b" 404 " in server.send(f"GET {path} HTTP/1.1\nHost: localhost")

    refused = [
        {"choice": "both"},
        {"right": showing["left"]},
        {"prompt": "?"},
        {"left": ["a"]},
        {"choice": "left\r\n"},
    ]
    refused += [{"voter": ""}, {"voter": "a\nb"}, {"voter": "x" * 41}, {"voter": 1}, {"voter": "half \ud83d"}]
    for wrong in refused:
        status, answer = server.post("/vote", ask | wrong)
        assert status == 400 and set(answer) == {"error"}, wrong
    for body in (["ann"], b"[" * 90_000, b"\xff", b"{"):
        assert server.post("/vote", body)[0] == 400
    for length in ("-1", "", "1e3", "9" * 5000):
        head = f"POST /vote HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {length}"
        assert b" 400 " in server.send(head)
    for _ in range(2):  # sent twice, counted once
        assert server.post("/vote", ask)[1]["done"] == 1
    for name in ("José", "Jose\u0301", " José "):  # one voter, however the name is typed
        status, state = server.post("/vote", ask | {"voter": name})
        assert status == 200 and state["done"] == 1
    assert "Traceback" not in capfd.readouterr().err


# ---- Votes ----------------------------------------------------------------------------------------------------------
def make_votes(images: list[tuple[str, Path]], folder: Path, repeat: float = 0.2) -> vote.Votes:
    return vote.Votes(images, JsonLines(folder / "votes.jsonl"), repeat, seed=0)


def make_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("L", (16, 16), 20 + 20 * i).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(count)]


def test_a_vote_belongs_to_the_images_content(tmp_path):
    files = make_images(tmp_path / "images", 4)
    votes = make_votes([("rocket", files[0]), ("rocket", files[1])], tmp_path, repeat=0)
    votes.vote("ann", {"choice": "left", **votes.schedule("ann")[0]})
    (chosen,) = [row[row["choice"]] for row in votes.log.rows]

    files[0].rename(tmp_path / "renamed.png")
    moved = [("duck", files[2]), ("duck", files[3]), ("rocket", files[1]), ("rocket", tmp_path / "renamed.png")]
    votes = make_votes(moved, tmp_path, repeat=0)
    assert votes.state("ann")["done"] == 1 and votes.state("ann")["show"][0]["prompt"] == "duck"
    vote.write_votes(votes, tmp_path / "out", "sdxl")
    (pair,) = load_pairs(str(tmp_path / "out"))
    assert pair["caption"] == "rocket" and load_image(pair["image_w"]) == load_image(votes.files[chosen])

    Image.new("L", (16, 16), 250).save(files[1])  # another image in its place
    assert make_votes(moved, tmp_path, repeat=0).state("ann")["done"] == 0


def test_two_prompts_may_have_the_same_two_images(tmp_path):
    files = make_images(tmp_path / "images", 2)
    images = [(prompt, file) for prompt in ("rocket", "a red rocket") for file in (*files, files[0])]
    votes = make_votes(images, tmp_path, repeat=0)
    for showing in votes.schedule("ann"):
        votes.vote("ann", {"choice": "left", **showing})
    assert {row["prompt"] for row in votes.log.rows} == {"rocket", "a red rocket"}
    assert votes.state("ann") | {"output_dir": ""} == {
        "done": 2,
        "total": 2,
        "show": [],
        "undo": True,
        "output_dir": "",
    }


def test_voters_see_the_pairs_in_orders_of_their_own(tmp_path):
    files = make_images(tmp_path / "images", 9)
    images = [(f"prompt {i // 3}", file) for i, file in enumerate(files)]
    votes = make_votes(images, tmp_path)
    ann = [tuple(showing.values()) for showing in votes.schedule("ann")]
    bo = [tuple(showing.values()) for showing in votes.schedule("bo")]
    again = make_votes(images[::-1], tmp_path).schedule("ann")
    assert ann == [tuple(showing.values()) for showing in again]  # also in another order of the files
    assert ann != bo and len(ann) == 11
    first = [showing for showing in ann if not showing[3]]
    assert {(p, frozenset((a, b))) for p, a, b, _ in ann} == {(p, frozenset((a, b))) for p, a, b, _ in bo}
    assert [len({showing[0] for showing in first[i : i + 3]}) for i in (0, 3, 6)] == [3, 3, 3]
    assert 0 < sum((p, b, a, again) in bo for p, a, b, again in ann) < 11  # sides differ, too
    for prompt, left, right, again in ann:
        if again:
            assert ann.index((prompt, left, right, True)) > ann.index((prompt, right, left, False))


def test_the_majority_decides_and_agreement_is_counted(tmp_path):
    """Ann likes bright, Bo likes bright except for the first prompt, Cy likes dark there and is unsure elsewhere."""
    files = make_images(tmp_path / "images", 9)
    votes = make_votes([(f"prompt {i // 3}", file) for i, file in enumerate(files)], tmp_path)
    for voter in ("ann", "bo", "cy"):
        for showing in votes.schedule(voter):
            levels = [brightness(votes.files[showing[side]]) for side in ("left", "right")]
            choice = "left" if levels[0] > levels[1] else "right"
            if showing["prompt"] == "prompt 0" and voter != "ann":
                choice = "right" if choice == "left" else "left"
            elif voter == "cy":
                choice = "tie"
            votes.vote(voter, {"choice": choice, **showing})
    said = vote.write_votes(votes, tmp_path / "out", "sdxl")["message"]
    # Ann and Bo agree on 6 of 9 pairs, Bo and Cy on 3 of 3, Ann and Cy on 0 of 3: 9 of 15.
    ceiling = (1 + (2 * 9 / 15 - 1) ** 0.5) / 2
    assert f"Two voters agree on {9 / 15:.0%} of 15 pairs" in said and f"about {ceiling:.0%} of single votes" in said
    rows = pq.read_table(tmp_path / "out" / PARQUET).to_pylist()
    assert len(rows) == 9
    for row in rows:
        chosen = 0 if row["label_0"] == 1 else 1
        first = row["caption"] == "prompt 0"
        dark_won = brightness(row[f"jpg_{chosen}"]) < brightness(row[f"jpg_{1 - chosen}"])
        assert dark_won == first
        assert (row[f"score_{chosen}"], row[f"score_{1 - chosen}"]) == ((2, 1) if first else (2, 0))


def test_a_model_generates_the_candidates_and_a_retrained_one_generates_new_ones(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (tmp_path / "prompts.txt").write_text("rocket\nred apple\n")
    flags = [f"--model={model}", f"--prompts={tmp_path / 'prompts.txt'}", "--candidates=2", "--resolution=64"]
    flags += ["--num_inference_steps=2", "--device=cpu", f"--output_dir={tmp_path / 'out'}", "--write"]
    generated = tmp_path / "out" / "work" / "generated"
    with pytest.raises(ValueError, match=r"Left out: pairs without a choice \(2\)"):
        vote.main(vote.parse_args(flags))
    times = {path: path.stat().st_mtime_ns for path in generated.iterdir()}
    assert len(times) == 4
    log = JsonLines(tmp_path / "out" / "votes.jsonl")
    for prompt in ("rocket", "red apple"):
        for left, right in itertools.permutations([hash_content(path.read_bytes()) for path in times], 2):
            row = {"voter": "ann", "prompt": prompt, "left": left, "right": right}
            log.add({**row, "choice": "left" if left < right else "right", "again": False})
    vote.main(vote.parse_args(flags))
    assert load_pairs(str(tmp_path / "out"))["caption"][:] == ["rocket", "red apple"]

    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 0.1
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match=r"Left out: pairs without a choice \(2\)"
    ):  # votes on the old model's images don't count
        vote.main(vote.parse_args(flags))
    assert len(list(generated.iterdir())) == 8
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_images_that_browsers_do_not_show_are_sent_as_png(tmp_path):
    for i in range(2):
        Image.new("L", (16, 16), 100 + i).save(tmp_path / f"{i}.tif")
        (tmp_path / f"{i}.txt").write_text("rocket")
    server = Server(tmp_path, tmp_path / "out")
    for name, path in server.http.votes.files.items():
        sent = Image.open(io.BytesIO(server.get("/image/" + name)))
        assert sent.format == "PNG" and sent.convert("RGB").tobytes() == load_image(path).tobytes()
    server.end()


@pytest.mark.parametrize("wrong", [["--candidates=1"], ["--repeat=2"], ["--images=x"]])
def test_flags_that_contradict_are_refused(tmp_path, wrong):
    with pytest.raises(SystemExit):
        vote.parse_args(["--model=m", "--prompts=p", f"--output_dir={tmp_path}", *wrong])
