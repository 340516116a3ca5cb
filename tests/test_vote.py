"""pairs/vote.py in a headless Chromium that is driven by key presses and clicks, and its server by hand."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import small_model
from conftest import rows_of, start
from evaluation.common import load_pairs
from pairs import vote
from PIL import Image


pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = str(small_model.MODEL)
EVIL = "a <img src=x onerror=\"document.title='broken'\"> square"
PROMPTS = [EVIL, *(f"square {i}" for i in range(1, 5))]
KEYS = {
    "left": "\ue012",
    "right": "\ue014",
    "down": "\ue015",
    "backspace": "\ue003",
    "escape": "\ue00c",
    "enter": "\ue007",
}


class Browser:
    """Chromium by W3C WebDriver, the protocol that ChromeDriver speaks. Needs chromium and chromium-driver."""

    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=1280,900"
    ).split()

    def __init__(self, profile: Path) -> None:
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(m[1] for line in self.driver.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"args": [*self.flags, f"--user-data-dir={profile}"]}
        session = self.ask("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.url += "/" + session["sessionId"]
        self.pid = session["capabilities"]["goog:processID"]

    def ask(self, path: str, body: dict):
        answer = requests.post(self.url + path, json=body, timeout=300).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self.ask("/url", {"url": url})

    def press(self, *keys: str) -> None:
        """Presses and releases each key; names of KEYS or characters."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, css: str) -> None:
        element = self.ask("/element", {"using": "css selector", "value": css})
        self.ask(f"/element/{next(iter(element.values()))}/click", {})

    def run(self, script: str):
        return self.ask("/execute/sync", {"script": f"return {script}", "args": []})

    def text(self, name: str) -> str:
        return self.run(f"document.getElementById('{name}').textContent")

    def shown(self) -> tuple[int, int]:
        """Positions of the left and the right image."""
        return tuple(self.run("['left','right'].map(id => +document.getElementById(id).src.split('/').pop())"))

    def wait(self, name: str, text: str) -> None:
        """Until the element says so, and the page takes keys again."""
        wait_until(lambda: text in self.text(name) and not self.run("busy"), lambda: f"{name}: {self.text(name)}")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(requests.get(f"{self.url}/screenshot", timeout=300).json()["value"]))

    def quit(self) -> None:
        requests.delete(self.url, timeout=300)
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.driver.kill()
        self.driver.wait()
        self.driver.stdout.close()


def wait_until(condition, what=lambda: "") -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.quit()


def level_of(image: int) -> int:
    """Grey of the squares; of each prompt's three the last one is the brightest."""
    return 20 + 15 * image


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i in range(15):
        Image.new("L", (96, 64), level_of(i)).save(folder / f"{i}.png")
        rows.append({"prompt": PROMPTS[i // 3], "path": f"{i}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Server:
    """pairs/vote.py in a process of its own."""

    def __init__(self, *flags, port: int = 0) -> None:
        self.process = start("pairs/vote.py", *flags, f"--port={port}")
        line = self.process.stdout.readline()
        assert "Vote at http://127.0.0.1:" in line, line + self.process.communicate()[1]
        self.url = re.search(r"http://127.0.0.1:\d+", line)[0]
        self.port = int(self.url.rpartition(":")[2])

    def end(self, how: int = signal.SIGINT) -> str:
        self.process.send_signal(how)
        return self.process.communicate(timeout=300)[0]


@pytest.fixture
def flags(images, tmp_path) -> list[str]:
    return [f"--images={images}", f"--output_dir={tmp_path / 'taste'}", "--repeat=0.2"]


@pytest.fixture
def server(flags):
    server = Server(*flags)
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


def brighter(shown: tuple[int, int]) -> str:
    return "left" if level_of(shown[0]) > level_of(shown[1]) else "right"


def test_a_taste_is_voted_for_by_keys_and_written(server, browser, tmp_path):
    log = tmp_path / "taste" / "votes.jsonl"
    browser.open(server.url)
    browser.click("input[name=voter]")
    browser.press(*"ann", "enter")
    browser.wait("count", "0 of 18")  # 15 pairs, and a fifth of them again
    prompts, sides = [], []
    for step in range(18):
        prompts.append(browser.text("prompt"))
        sides.append(brighter(browser.shown()))
        browser.press(sides[-1])
        browser.wait("count", f"{step + 1} of 18")
        assert len(rows_of(log)) == step + 1
    assert browser.text("prompt") == "That was the last pair. Thank you."
    assert browser.run("document.title") == "Vote" and EVIL in prompts  # shown as text
    assert 3 < sides.count("left") < 15

    rows = rows_of(log)
    first = [row for row in rows if not row["again"]]
    for row in rows:
        name = {"left": int(row["left"][:-4]), "right": int(row["right"][:-4])}
        assert row["voter"] == "ann" and row["choice"] == max(name, key=name.get)
    assert {row["prompt"] for row in first[:5]} == set(PROMPTS)  # each prompt once before one comes again
    for row in rows:
        if row["again"]:
            (before,) = (other for other in first if {other["left"], other["right"]} == {row["left"], row["right"]})
            assert before["left"] == row["right"] and rows.index(row) - rows.index(before) >= 3

    browser.click("#write")
    browser.wait("message", "15 pairs in ")
    message = browser.text("message")
    assert "ann chose alike in 3 of 3 pairs that came twice." in message and "1,250, 2,500 or 5,000" in message
    pairs = load_pairs(str(tmp_path / "taste"), "--pairs")  # as the training scripts read it
    assert len(pairs.captions) == 15
    for i in range(15):
        chosen, rejected = pairs.images(i)
        assert chosen.getpixel((0, 0)) > rejected.getpixel((0, 0))


def test_tie_skip_undo_and_full_size(server, browser, tmp_path):
    log = tmp_path / "taste" / "votes.jsonl"
    browser.open(f"{server.url}/?voter=bo")
    browser.wait("count", "0 of 18")
    assert browser.run("document.getElementById('undo').disabled")
    first = browser.shown()
    browser.press("down")
    browser.wait("count", "1 of 18")
    second = browser.shown()
    browser.press("s")
    browser.wait("count", "2 of 18")
    browser.press("z")
    browser.wait("count", "1 of 18")
    assert browser.shown() == second
    browser.press("backspace")
    browser.wait("count", "0 of 18")
    assert browser.shown() == first
    browser.click("[data-choice=right]")
    browser.wait("count", "1 of 18")
    assert [row["choice"] for row in rows_of(log)] == ["tie", "skip", "undo", "undo", "right"]

    browser.click("#left")
    assert browser.run("document.getElementById('big').open")
    assert browser.run("document.querySelector('#big img').getBoundingClientRect().width") == 96
    browser.press("escape")
    wait_until(lambda: not browser.run("document.getElementById('big').open"))
    browser.click("#right")
    browser.press("left")
    browser.wait("count", "2 of 18")
    assert not browser.run("document.getElementById('big').open") and rows_of(log)[-1]["choice"] == "left"


def test_a_killed_browser_and_a_killed_server_lose_and_repeat_nothing(server, flags, tmp_path):
    log = tmp_path / "taste" / "votes.jsonl"
    browser = Browser(tmp_path / "first")
    browser.open(f"{server.url}/?voter=ann")
    browser.wait("count", "0 of 18")
    for step in range(3):
        browser.press("left")
        browser.wait("count", f"{step + 1} of 18")
    fourth = browser.shown()
    browser.kill()

    browser = Browser(tmp_path / "second")
    try:
        browser.open(f"{server.url}/?voter=ann")
        browser.wait("count", "3 of 18")
        assert browser.shown() == fourth
        server.end(signal.SIGKILL)
        browser.press("right")
        browser.wait("message", "The server does not answer. Start it again with the same command")
        assert len(rows_of(log)) == 3
        with open(log, "a") as file:
            file.write('{"voter": "ann", "le')  # what a kill within a write leaves
        again = Server(*flags, port=server.port)
        browser.press("right")
        browser.wait("count", "4 of 18")
        assert browser.text("message") == ""
        rows = rows_of(log)
        assert [row["choice"] for row in rows] == ["left"] * 3 + ["right"]
        assert (rows[3]["left"], rows[3]["right"]) == tuple(f"{i}.png" for i in fourth)
        assert "the same command with --write writes the pairs" in again.end()
    finally:
        browser.quit()


def test_the_server_answers_its_own_page_only(server):
    ask = {"voter": "ann", "left": 0, "right": 1, "again": False, "choice": "left"}
    assert requests.get(f"{server.url}/state?voter=ann", headers={"Host": "evil.example:80"}).status_code == 403
    assert requests.post(f"{server.url}/vote", data=json.dumps(ask)).status_code == 403  # a form of another site
    for path in ("/image/99", "/image/../votes.jsonl", "/votes.jsonl", "/nothing"):
        assert requests.get(server.url + path).status_code == 404
    assert requests.get(f"{server.url}/state?voter=<b>").status_code == 400
    for wrong in (
        {"left": 0, "right": 3},
        {"left": 0, "right": 99},
        {"choice": "both"},
        {"voter": "<b>"},
        {"more": 1},
    ):
        assert requests.post(f"{server.url}/vote", json=ask | wrong).status_code == 400, wrong
    assert requests.post(f"{server.url}/vote", json=["ann"]).status_code == 400
    assert requests.post(f"{server.url}/undo", json={"voter": "ann"}).json()["done"] == 0
    for _ in range(2):  # sent twice, counted once
        assert requests.post(f"{server.url}/vote", json=ask).json()["done"] == 1


def votes_of(images: Path, out: Path, repeat: float = 0.2) -> vote.Votes:
    args = vote.parse_args([f"--images={images}", f"--output_dir={out}", f"--repeat={repeat}"])
    return vote.Votes(*vote.collect_images(args), args)


def test_voters_see_the_pairs_in_orders_of_their_own(images, tmp_path):
    votes = votes_of(images, tmp_path / "taste")
    ann, bo = votes.schedule("ann"), votes.schedule("bo")
    assert ann == votes_of(images, tmp_path / "taste").schedule("ann") != bo
    pairs = {tuple(sorted(item[:2])) for item in ann if not item[2]}
    assert len(pairs) == 15 and pairs == {tuple(sorted(item[:2])) for item in bo}
    assert any(a[:2] == b[1::-1] for a in ann for b in bo)  # sides differ, too
    assert [item[2] for item in votes_of(images, tmp_path / "other", 0).schedule("ann")] == [False] * 15


def test_agreement_and_majority(images, tmp_path):
    """Ann likes bright, Bo likes bright but for the first prompt, Cy likes dark and skips or ties the rest."""
    votes = votes_of(images, tmp_path / "taste")
    for voter in ("ann", "bo", "cy"):
        for left, right, again in votes.schedule(voter):
            bright = "left" if left > right else "right"
            dark = "right" if bright == "left" else "left"
            first = votes.images[left]["prompt"] == EVIL
            unsure = dark if first else "skip" if again else "tie"
            choice = {"ann": bright, "bo": dark if first else bright, "cy": unsure}[voter]
            votes.vote(voter, left, right, again, choice)
    said = vote.describe_agreement(votes)
    # Ann and Bo agree on 12 of 15 pairs, Bo and Cy on 3 of 3, Ann and Cy on 0 of 3: 15 of 21.
    follow = (1 + (2 * 15 / 21 - 1) ** 0.5) / 2
    assert f"Two voters agree on {15 / 21:.0%} of 21 pairs" in said and f"about {follow:.0%} of single votes" in said
    assert "bo chose alike in 3 of 3 pairs that came twice." in said
    vote.write_votes(votes)
    rows = load_rows(tmp_path / "taste")
    assert len(rows) == 15
    for row in rows:
        winner = 0 if row["label_0"] else 1
        levels = [np.asarray(Image.open(io.BytesIO(row[f"jpg_{i}"]))).mean() for i in (winner, 1 - winner)]
        assert (levels[0] < levels[1]) == (row["caption"] == EVIL)
        counts = (row[f"score_{winner}"], row[f"score_{1 - winner}"])
        assert counts == ((2, 1) if row["caption"] == EVIL else (2, 0))


def load_rows(folder: Path) -> list[dict]:
    import datasets

    return datasets.load_dataset(str(folder), split="train").to_list()


def test_a_model_generates_the_candidates(tmp_path):
    (tmp_path / "prompts.txt").write_text("rocket\nred apple\n")
    flags = [f"--model={MODEL}", f"--prompts={tmp_path / 'prompts.txt'}", "--candidates=2", "--resolution=64"]
    flags += ["--num_inference_steps=2", "--device=cpu", f"--output_dir={tmp_path / 'out'}"]
    args = vote.parse_args(flags)
    votes = vote.Votes(*vote.collect_images(args), args)
    assert sorted(votes.pairs.values()) == [(0, 1), (2, 3)] and votes.images[2]["prompt"] == "red apple"
    with pytest.raises(SystemExit, match=r"no pair is left \(2 pairs without a choice\)"):
        vote.main(vote.parse_args([*flags, "--write"]))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "work" / "images").iterdir()}
    votes.vote("ann", 0, 1, False, "left")
    vote.main(vote.parse_args([*flags, "--write"]))
    (row,) = load_rows(tmp_path / "out")
    assert row["caption"] == "rocket" and len(times) == 4
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(SystemExit, match="was begun with seed 0, now 1"):
        vote.main(vote.parse_args([*flags, "--seed=1", "--write"]))


def test_images_that_browsers_do_not_show_are_sent_as_png(tmp_path):
    for i in (0, 1):
        Image.new("RGB", (8, 8), (200, 100 * i, 0)).save(tmp_path / f"{i}.tif")
        (tmp_path / f"{i}.txt").write_text("a square")
    server = Server(f"--images={tmp_path}", f"--output_dir={tmp_path / 'out'}")
    answer = requests.get(f"{server.url}/image/1")
    server.end(signal.SIGKILL)
    assert answer.headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).getpixel((0, 0)) == (200, 100, 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "name either --images or --model with --prompts"),
        (["--model=a/b"], "--model needs --prompts to generate images of"),
        (["--images=IMAGES", "--repeat=2"], "--repeat a number from 0 to 1"),
        (["--images=IMAGES/0.png"], "--images .*0.png: "),
        (["--images=LONELY"], "no prompt has two images to choose from"),
        (["--images=IMAGES", "--port=PORT"], "--port [0-9]+: Address already in use"),
    ],
)
def test_calls_that_cannot_be(images, tmp_path, flags, message):
    (tmp_path / "lonely").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "lonely" / "0.png")
    (tmp_path / "lonely" / "0.txt").write_text("a square")
    taken = SimpleNamespace(server_port=0)
    if "--port=PORT" in flags:
        taken = vote.ThreadingHTTPServer(("127.0.0.1", 0), vote.Handler)
    places = {"IMAGES": str(images), "LONELY": str(tmp_path / "lonely"), "PORT": str(taken.server_port)}
    for word, place in places.items():
        flags = [flag.replace(word, place) for flag in flags]
    with pytest.raises(SystemExit, match=message):
        vote.main(vote.parse_args([*flags, f"--output_dir={tmp_path / 'out'}"]))
