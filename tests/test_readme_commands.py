"""Every command of the Markdown pages runs: tiny models and data in the place of SDXL and the hub's, fewer steps.

Commands are read out of the pages. HOW says of each how it is run; a command without a line there fails, and so does a
line without a command. What runs here runs in the page's order, each page in a folder of its own."""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import FAST, REPO, rows_of, start
from PIL import Image
from small_model import write_model, write_pairs


pytestmark = pytest.mark.usefixtures("one_thread")
PAGES = [
    str(page.relative_to(REPO))
    for page in sorted([*REPO.glob("*.md"), *REPO.glob("[!.]*/*.md")])
    if not page.is_relative_to(REPO / "demo" / "build")
]

RUN = "run here"  # in this process, unless it is the shell's
PARSE = "its flags are read here by the script's own parser"  # what it does takes minutes, or weights from the hub

# page: start of the command -> RUN, PARSE, or the test that runs it
HOW = {
    "README.md": {
        "python3 -m venv": ".ci/run",
        "accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8": (
            "tests/test_train_diffusion_mapo_sdxl.py::test_the_readmes_command_shifts_the_style"
        ),
        "accelerate launch train_diffusion_mapo_sdxl.py --pretrained": RUN,
        "accelerate launch --config_file configs/ddp.yaml": (
            "tests/test_many_processes.py::test_accelerate_reads_the_configs"
        ),
        "python test_mapo_loss.py": "tests/test_readme_commands.py::test_the_losss_table_is_the_readmes",
        "python -m pytest": ".ci/run",
    },
    "CONTRIBUTING.md": {
        "pip install -r requirements.txt": ".ci/run",
        "ruff check": ".ci/run",
        "python -m pytest -m fast": "tests/test_readme_commands.py::test_the_fast_tests_exist",
        "python -m pytest": ".ci/run",
        ".ci/run": "tests/test_readme_commands.py::test_ci_is_what_anyone_can_run",
        "python demo/build_demo.py": PARSE,
    },
    "UPSTREAM.md": {
        "HERE=": "tests/test_upstream.py::test_six_text_files_go_up_and_their_links_lead_somewhere",
        "TO=": "tests/test_upstream.py::test_six_text_files_go_up_and_their_links_lead_somewhere",
        "mkdir ": "tests/test_upstream.py::test_six_text_files_go_up_and_their_links_lead_somewhere",
        "sed ": "tests/test_upstream.py::test_six_text_files_go_up_and_their_links_lead_somewhere",
    },
    "docs/training.md": {
        "train_diffusion_mapo_sdxl.py --help": (
            "tests/test_train_diffusion_mapo_sdxl.py::test_help_says_what_each_flag_does"
        ),
        "accelerate launch --config_file configs/NAME.yaml": (
            "tests/test_many_processes.py::test_accelerate_reads_the_configs"
        ),
        "ACCELERATE_USE_CPU=true torchrun": (
            "tests/test_many_processes.py::test_two_processes_do_what_one_does_with_accumulation_validation_and_caches"
        ),
        "pip install deepspeed": "tests/test_many_processes.py::test_accelerate_reads_the_configs",
    },
    "docs/personalization.md": {
        "accelerate launch train_dreambooth_lora_mapo_sdxl.py --pretrained": RUN,
        "accelerate launch train_dreambooth_lora_mapo_sdxl.py": (
            "tests/test_train_dreambooth_lora_mapo_sdxl.py::test_the_demo_makes_samples_more_like_the_subject_and_says_so"
        ),
        "python inference/reward_guidance.py": RUN,
        "python benchmarks/personalization.py": PARSE,
    },
    "pairs/README.md": {
        "train_diffusion_mapo_sdxl.py --dataset_name FOLDER": (
            "tests/test_readme_commands.py::test_pairs_from_votes_images_and_scores"
        ),
        "python pairs/vote.py --output_dir my-taste": PARSE,  # the next one votes
        "BASE=": RUN,
        "python -": RUN,
        "python pairs/vote.py --model": RUN,
        "until curl": RUN,
        "kill ": RUN,
        "accelerate launch train_diffusion_mapo_sdxl.py": RUN,
        "cat ": RUN,
        "head ": RUN,
        "python evaluation/": RUN,
        "python pairs/build_preference_pairs.py from-images": RUN,
        "python pairs/build_preference_pairs.py from-captions": PARSE,  # test_pairs.py runs it with a server's models
        "python pairs/build_preference_pairs.py from-scores": RUN,
    },
    "evaluation/README.md": {
        "BASE=": RUN,
        "python -": RUN,
        "python evaluation/generate.py": RUN,
        "python evaluation/score.py eval-demo": RUN,
        "python evaluation/score.py --pairs": RUN,
        "python evaluation/score.py --check": (
            "tests/test_evaluation.py::test_check_without_a_network_says_what_to_download"
        ),
        "python evaluation/score.py eval --metrics": PARSE,  # each metric has its test on random weights
        "python evaluation/compare.py eval-demo": RUN,
        "python evaluation/compare.py eval ": PARSE,  # of what the lines before it would score
        "python pairs/build_preference_pairs.py": RUN,
        "accelerate launch train_diffusion_mapo_sdxl.py": RUN,
    },
    "benchmarks/README.md": {
        "python benchmarks/step_cost.py --device cpu --dry_run": (
            "tests/test_step_cost.py::test_the_dry_run_writes_json_table_and_plot"
        ),
        "python benchmarks/step_cost.py --device cpu --profile": (
            "tests/test_step_cost.py::test_the_profile_names_every_phase"
        ),
        "python benchmarks/": PARSE,
        "accelerate launch train_diffusion_mapo_sdxl.py --use_lora": PARSE,
        "pip install resvg-py && python benchmarks/paper_in_miniature.py": PARSE,
        "step_cost.py --budget_s": PARSE,
        "accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8": (
            "tests/test_train_diffusion_mapo_sdxl.py::test_the_readmes_command_shifts_the_style"
        ),
        "mkdir -p .whl": "tests/test_readme_commands.py::test_wheels_are_those_of_requirements_txt",
        "pip download": "tests/test_readme_commands.py::test_wheels_are_those_of_requirements_txt",
        "unzip ": "tests/test_readme_commands.py::test_wheels_are_those_of_requirements_txt",
        "find ": "tests/test_readme_commands.py::test_wheels_are_those_of_requirements_txt",
        "python3 -m pip install": "tests/test_gpu_acceptance.py::test_a_dry_run_goes_on_where_the_last_one_ended",
    },
    "demo/README.md": {
        "pip install resvg-py && python demo/build_demo.py": PARSE,
        "accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8": (
            "tests/test_train_diffusion_mapo_sdxl.py::test_the_readmes_command_shifts_the_style"
        ),
    },
}

# Set wherever the script has such a flag ...
ALWAYS = {
    "train_diffusion_mapo_sdxl": (
        "--resolution=64 --max_train_steps=2 --train_batch_size=2 --validation_num_inference_steps=2 --cache_dir=cache"
    ),
    "train_dreambooth_lora_mapo_sdxl": (
        "--resolution=64 --max_train_steps=2 --num_inference_steps=2 --num_rejected_per_image=1 --cache_dir=cache"
    ),
    "evaluation.generate": "--resolution=64 --num_inference_steps=2 --max_prompts=2 --device=cpu",
    "evaluation.score": "--device=cpu",
    "pairs.build_preference_pairs": "--resolution=64 --num_inference_steps=2 --device=cpu",
    "pairs.vote": "--num_inference_steps=2 --device=cpu",
    "inference.reward_guidance": "--resolution=64 --num_inference_steps=2",
}
NOT_ALWAYS = {"from-scores": ("--resolution", "--num_inference_steps", "--device")}
# ... and where the command has it.
NAMED = {
    "--gradient_accumulation_steps": "2",
    "--num_validation_pairs": "2",
    "--validation_steps": "1",
    "--checkpointing_steps": "1",
    "--lr_warmup_steps": "1",
}


class Command(NamedTuple):
    text: str  # on one line
    body: str  # what `<<'PY'` gives it, or nothing


def block_commands(block: str) -> list[Command]:
    found, lines = [], iter(re.sub(r" *\\\n *", " ", block).splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        body = ""
        if "<<'PY'" in line:
            body = "\n".join(iter(lines.__next__, "PY")) + "\n"
        found.append(Command(re.sub(r" +# .*", "", line).strip(), body))
    return found


def commands_of(page: str) -> list[list[Command]]:
    """Of each block; then, as one more, those within sentences and tables."""
    text = (REPO / page).read_text()
    blocks = [block_commands(block) for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.S | re.M)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    called = r"(python3?|accelerate launch \S+|pip|[A-Z_]+=\S+ torchrun|torchrun|ruff|\.ci/run)( |$)|\S+\.py (-|\w+ -)"
    return [*blocks, [Command(span, "") for span in spans if re.match(called, span)]]


def how_to(page: str, command: Command) -> tuple[str, str]:
    """The longest of the page's lines that the command starts with, and what it says."""
    fitting = [key for key in HOW.get(page, {}) if command.text.startswith(key)]
    assert fitting, f"{page}: nothing runs `{command.text}`: give it a line in HOW"
    key = max(fitting, key=len)
    return key, HOW[page][key]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_something_that_runs_it(page):
    used = {how_to(page, command)[0] for block in commands_of(page) for command in block}
    assert used == set(HOW.get(page, {})), "lines of HOW without a command"
    assert all(how_to(page, command)[1] != RUN for command in commands_of(page)[-1]), "only blocks run"
    for how in {HOW[page][key] for key in used} - {RUN, PARSE}:
        path, _, test = how.partition("::")
        assert (REPO / path).is_file() and f"def {test}(" in (REPO / path).read_text() or not test, how


def argv_of(text: str) -> tuple[str, list[str]]:
    """Module and arguments of `python SCRIPT ...` or `accelerate launch SCRIPT ...`."""
    words = shlex.split(text)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[at] if (REPO / words[at]).is_file() else f"benchmarks/{words[at]}"
    return script.removesuffix(".py").replace("/", "."), words[at + 1 :]


class Parsed(Exception):
    pass


def parse_only(module: str, flags: list[str], monkeypatch) -> None:
    imported = importlib.import_module(module)
    if hasattr(imported, "parse_args"):
        imported.parse_args(flags)
        return
    # Its parser stands in main.
    name = "parse_known_args" if "parse_known_args()" in Path(imported.__file__).read_text() else "parse_args"
    real = getattr(argparse.ArgumentParser, name)

    def parse(self, *args, **kwargs):
        raise Parsed(real(self, *args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, name, parse)
        patch.setattr(sys, "argv", [module, *flags])
        with pytest.raises(Parsed):
            runpy.run_path(imported.__file__, run_name="__main__")


def parsed_commands():
    for page in HOW:
        for block in commands_of(page) if (REPO / page).is_file() else []:
            for command in block:
                fitting = [key for key in HOW[page] if command.text.startswith(key)]
                if fitting and HOW[page][max(fitting, key=len)] == PARSE:
                    yield pytest.param(command.text, id=f"{page}: {command.text[:60]}")


@pytest.mark.parametrize("text", parsed_commands())
def test_flags_of_long_commands_are_their_scripts(text, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("rocket\n")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.jsonl").touch()
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    module, flags = argv_of(text.rpartition("&& ")[2].replace("$OUT", "out"))
    try:
        parse_only(module, flags, monkeypatch)
    except SystemExit:  # the parser had no fault to find
        assert "needs a GPU" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The commands that run here
# ---------------------------------------------------------------------------------------------------------------------


class Walk:
    """Runs a page's commands in their order, once, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.done, self.said = root, {}, {}
        self.model = write_model(root / "model")
        self.pairs = write_pairs(root / "pairs.parquet")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        (root / "prompts.txt").write_text("rocket\nred apple\n")
        # On the hub, or large -> here
        self.stand_ins = {
            "stabilityai/stable-diffusion-xl-base-1.0": str(self.model),
            "madebyollin/sdxl-vae-fp16-fix": str(self.model / "vae"),
            "mapo-t2i/pick-style-cartoon": str(self.pairs),
            "demo/sdxl-tiny-emoji": str(self.model),
            "parti": str(root / "prompts.txt"),
        }

    def __call__(self, page: str, prepare=lambda folder: None, more=lambda run: None) -> Path:
        if page not in self.done:
            folder = self.done[page] = self.root / page.replace("/", "-").removesuffix(".md")
            folder.mkdir()
            for name in ("demo", "pairs", "evaluation", "inference"):
                (folder / name).symlink_to(REPO / name)
            prepare(folder)
            back, variables, server = os.getcwd(), {}, []
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    for block in commands_of(page)[:-1]:
                        for command in block:
                            if how_to(page, command)[1] == RUN:
                                self.run(command, variables, server)
                    more(self.run_script)
                self.said[page] = said.getvalue()
            finally:
                os.chdir(back)
                for process in server:
                    process.kill()
        return self.done[page]

    def run(self, command: Command, variables: dict, server: list) -> None:
        text, body = command.text.replace("7860", self.port), command.body.replace("7860", self.port)
        for size in ("[:48]", "slice(0, 198)", "head -32"):  # rows of the demo
            text, body = (part.replace(size, re.sub(r"\d\d+", "3", size)) for part in (text, body))
        for name, value in variables.items():
            text = text.replace(f"${name}", value)
        if match := re.fullmatch(r"([A-Z]+)=(\S+)", text):
            variables[match[1]] = match[2]
        elif text.startswith("python -"):
            target = Path(text.rpartition("> ")[2]).open("w") if "> " in text else sys.stdout
            with contextlib.redirect_stdout(target):
                exec(body, {"__name__": "__main__"})
        elif text.startswith("kill %1"):
            (process,) = server
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        elif text.startswith("cat >"):
            Path(text.split()[2]).write_text(body)
        elif ".py" not in text:
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, timeout=120)
        elif text.endswith("&"):
            module, flags = self.small(*argv_of(text.removesuffix("&")))
            server.append(start(module.replace(".", "/") + ".py", *flags, f"--port={self.port}"))
        else:
            self.run_script(*argv_of(text))

    def run_script(self, module: str, flags: list[str]) -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        module, flags = self.small(module, flags)
        script = importlib.import_module(module)
        script.main(script.parse_args(flags))

    def small(self, module: str, flags: list[str]) -> tuple[str, list[str]]:
        for name, stand_in in self.stand_ins.items():
            flags = [re.sub(rf"(^|[=,]){re.escape(name)}(?=$|,)", rf"\g<1>{stand_in}", flag) for flag in flags]
        more = [f"{name}={value}" for name, value in NAMED.items() if name in flags]
        left_out = NOT_ALWAYS.get(flags[0], ())
        return module, [*flags, *(f for f in ALWAYS.get(module, "").split() if not f.startswith(left_out)), *more]


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    return Walk(tmp_path_factory.mktemp("pages"))


def sdxl_flags() -> list[str]:
    (command,) = (c for block in commands_of("README.md") for c in block if "--pretrained" in c.text)
    return argv_of(command.text)[1]


def readme(walk: Walk) -> Path:
    """Its command for SDXL, once more as after a crash, and once for each row of the table of cards."""

    def more(run_script) -> None:
        flags, text = sdxl_flags(), (REPO / "README.md").read_text()
        run_script("train_diffusion_mapo_sdxl", flags)
        (lora,) = re.findall(r"\| LoRA \|.*`([^`]+)` \|", text)
        assert "without `--use_8bit_adam`" in text
        plain = [flag for flag in flags if flag != "--use_8bit_adam"]
        shared = [flag for flag in plain if flag not in lora.split()]
        run_script("train_diffusion_mapo_sdxl", [*shared, *lora.split(), "--output_dir=sdxl-cartoon-lora"])
        run_script("train_diffusion_mapo_sdxl", [*plain, "--output_dir=plain", "--skip_final_inference"])

    return walk("README.md", more=more)


def test_the_readmes_command_for_sdxl_and_its_cards(walk):
    out = readme(walk)
    for name in ("sdxl-cartoon", "sdxl-cartoon-lora", "plain"):
        losses = [row["loss"] for row in rows_of(out / name / "metrics.jsonl") if "loss" in row]
        held_out = [row for row in rows_of(out / name / "metrics.jsonl") if "val_accuracy" in row]
        assert len(losses) == 2 and len(held_out) == 3, name
        assert sorted(path.name for path in (out / name).glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (out / "sdxl-cartoon" / "before_after.png").is_file() and not (out / "plain" / "before_after.png").exists()
    assert not (out / "sdxl-cartoon-lora" / "unet").exists()


def test_the_readme_loads_what_its_commands_leave(walk, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    monkeypatch.chdir(readme(walk))
    (code,) = (code for code in python_blocks("README.md") if "from_pretrained" in code)
    pipeline = StableDiffusionXLPipeline.from_pretrained(walk.model)
    before = set(pipeline.get_active_adapters())
    exec(code, {"StableDiffusionXLPipeline": StableDiffusionXLPipeline, "pipeline": pipeline})
    assert set(pipeline.get_active_adapters()) > before


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (REPO / page).read_text(), re.S | re.M)


def test_the_readmes_lines_for_ones_own_trainer(monkeypatch):
    """Its three targets in turn, on a model of one layer."""
    from diffusers import DDPMScheduler

    (code,) = (code for code in python_blocks("README.md") if "get_velocity" in code)
    logged, net = {}, torch.nn.Conv2d(4, 4, 1)
    exec(
        code,
        {
            "torch": torch,
            "unet": lambda latents, _: SimpleNamespace(sample=net(latents)),
            "scheduler": DDPMScheduler(),
            "latents_w": torch.randn(3, 4, 8, 8),
            "latents_l": torch.randn(3, 4, 8, 8),
            "noise": torch.randn(3, 4, 8, 8),
            "timesteps": torch.tensor([1, 500, 900]),
            "sigma": torch.rand(6, 1, 1, 1),
            "log": logged.update,
        },
    )
    assert net.weight.grad.abs().sum() > 0 and set(logged) == {"accuracy", "margin", "mse_w"}


def test_the_losss_table_is_the_readmes(capsys):
    import test_mapo_loss

    test_mapo_loss.main()
    said = capsys.readouterr().out
    errors = [float(row.split("|")[3]) for row in said.splitlines() if re.match(r"\| (phi|its|L_|gradient)", row)]
    text = (REPO / "README.md").read_text()
    assert len(errors) == 5 and max(errors) <= 6e-8 and "exact to 6e-8" in text

    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in said.splitlines() if "|" in line]
    head = next(row for row in rows if row[0].replace("`", "") == "mse_w = mse_l")
    ours = {row[0]: dict(zip(head[1:], map(float, row[1:]))) for row in rows if re.fullmatch(r"[\d.]+", row[0])}
    weights = r"([\d.]+), ([\d.]+) and ([\d.]+) where (?:both errors|they) are (0\.\d+)"
    printed = re.findall(weights, " ".join(text.split()))
    assert [row[3] for row in printed] == ["0.1", "0.01"]
    for *values, error in printed:
        for beta, value in zip((8, 64, 1024), values):
            assert float(value) == pytest.approx(ours[error][f"beta {beta}"], rel=0.05, abs=0.005), (error, beta)


def photos(folder: Path) -> None:
    """Two, with captions as the page shows them."""
    (folder / "photos").mkdir()
    lines = []
    for i, path in enumerate(sorted((REPO / "demo" / "subject").glob("*.png"))[:2]):
        shutil.copy(path, folder / "photos" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a photo of a <dog> on a sofa"}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_personalization_from_photos_to_reward_guidance(walk):
    out = walk("docs/personalization.md", photos)
    assert (out / "sdxl-my-dog" / "learned_embeds.safetensors").is_file()
    losses = [row["loss"] for row in rows_of(out / "sdxl-my-dog" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert Image.open(out / "reward_guidance.png").size == (64, 64)


def test_personalization_loads_what_its_command_leaves(walk, monkeypatch):
    monkeypatch.chdir(walk("docs/personalization.md", photos))
    (code,) = (code for code in python_blocks("docs/personalization.md") if "learned_embeds" in code)
    for there, here in (
        ("stabilityai/stable-diffusion-xl-base-1.0", str(walk.model)),
        ("torch.float16", "torch.float32"),
        ('"cuda"', '"cpu"'),
        (
            'pipeline("a <dog> in the snow")',
            'pipeline("a <dog> in the snow", num_inference_steps=1, height=64, width=64)',
        ),
    ):
        assert code.count(there) == 1, there
        code = code.replace(there, here)
    namespace = {}
    exec(code, namespace)
    assert namespace["image"].size == (64, 64)
    assert "<dog>" in namespace["pipeline"].tokenizer_2.get_vocab()


def evaluation(walk: Walk) -> Path:
    tuned = readme(walk)

    def prepare(folder: Path) -> None:
        (folder / "mapo-demo").symlink_to(tuned / "sdxl-cartoon")  # in the place of the README's first command
        for name in ("sdxl-cartoon", "sdxl-cartoon-lora"):
            (folder / name).symlink_to(tuned / name)

    return walk("evaluation/README.md", prepare)


def test_evaluation_from_images_to_a_report(walk):
    out = evaluation(walk)
    assert len(rows_of(out / "eval-demo" / "scores.jsonl")) == 3 * 2 * 2  # models, prompts, seeds
    said = walk.said["evaluation/README.md"]
    assert "| style | tuned |" in said and "| style | generated |" in said and "of 49 labels" in said
    assert (out / "eval-demo" / "report.html").is_file()
    assert len(pq.read_table(out / "generated-pairs" / "data")) == 3
    assert {row["model"] for row in rows_of(out / "eval" / "images.jsonl")} == {"base", "full", "lora"}


def test_pairs_from_votes_images_and_scores(walk):
    scored = evaluation(walk)

    def prepare(folder: Path) -> None:
        (folder / "photos").symlink_to(scored / "photos")
        (folder / "eval-demo").symlink_to(scored / "eval-demo")

    out = walk("pairs/README.md", prepare)
    assert len((out / "voted.txt").read_text().splitlines()) == 3
    votes = rows_of(out / "warm" / "votes.jsonl")
    pairs = pq.read_table(out / "warm" / "data")
    assert len(votes) > len(pairs) > 0
    assert [row["loss"] for row in rows_of(out / "warmed" / "metrics.jsonl") if "loss" in row]
    assert "| taste:Warmth | tuned |" in walk.said["pairs/README.md"]
    assert len(pq.read_table(out / "my-pairs" / "data")) == 3
    assert len(pq.read_table(out / "best-and-worst" / "data")) > 0


def test_the_fast_tests_exist():
    sources = {path.stem: path.read_text() for path in [*REPO.glob("tests/test_*.py"), REPO / "test_mapo_loss.py"]}
    for name in FAST:
        assert name in sources or any(f"def {name}(" in source for source in sources.values()), name


def test_ci_is_what_anyone_can_run():
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == [".ci/run"]
    assert os.access(REPO / ".ci" / "run", os.X_OK)


def test_wheels_are_those_of_requirements_txt():
    (command,) = (c for block in commands_of("benchmarks/README.md") for c in block if c.text.startswith("pip downl"))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (REPO / "requirements.txt").read_text(), re.M))
    named = dict(re.findall(r"(\S+)==(\S+)", command.text))
    shared = named.keys() & pins.keys()
    assert len(shared) >= 6 and {name: named[name] for name in shared} == {name: pins[name] for name in shared}


# ---------------------------------------------------------------------------------------------------------------------
# Flags and files that the pages name
# ---------------------------------------------------------------------------------------------------------------------


OTHERS = set("--config_file --num_processes --nproc_per_node --dist".split())  # accelerate's, torchrun's, pytest's
OTHERS |= set("--no --only --python --implementation --platform --upgrade --target".split())  # how pip's begin


def test_the_front_page_is_short():
    assert len((REPO / "README.md").read_text().split()) <= 1500


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_file_that_a_page_names_is_there(page):
    text = (REPO / page).read_text()
    sources = "".join(path.read_text() for path in REPO.glob("**/*.py") if ".venv" not in path.parts)
    known = set(re.findall(r'"(--\w+)"', sources))
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", text))
    assert named - known - OTHERS == set()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if not link.startswith("http")]
    assert [link for link in links if not (REPO / page).parent.joinpath(link).exists()] == []
