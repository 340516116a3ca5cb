"""The acceptance run for a GPU, as far as a CPU can show it: its lines are ones that the scripts take, and it passes
and fails them rightly."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import REPO
from safetensors.torch import save_file


sys.path.insert(0, str(REPO / "benchmarks"))


@pytest.fixture(scope="module")
def acceptance():
    import gpu_acceptance

    return gpu_acceptance


def run(acceptance, folder: Path, *flags: str) -> list[dict]:
    args = acceptance.parse_args(["--dry_run", f"--output_dir={folder / 'out'}", f"--work_dir={folder}", *flags])
    with pytest.raises(SystemExit) as ended, mock.patch("signal.signal"):
        acceptance.main(args)
    lines = json.loads((folder / "out" / "acceptance.json").read_text())["lines"]
    assert bool(ended.value.code) == any(line["status"].startswith("FAIL") for line in lines)
    return lines


def test_every_line_is_one_that_its_script_takes(acceptance, tmp_path):
    import importlib

    import memory

    (tmp_path / "photos").mkdir()
    args = mock.Mock(model="m", work_dir=tmp_path, resolution=1024, seed=0)
    for line in acceptance.list_lines():
        if line["kind"] == "step_cost":
            continue
        assert line.get("memory", "LoRA, 4 pairs") in memory.ROWS
        command = acceptance.make_command(line, tmp_path / "out", args)
        script = next(part for part in command if part.endswith(line["script"]))
        with mock.patch("importlib.util.find_spec", lambda name: name):  # a test needs no xformers
            importlib.import_module(Path(script).stem).parse_args(command[command.index(script) + 1 :])


def test_a_line_with_a_count_is_the_counted_run(acceptance):
    import memory

    for line in acceptance.list_lines():
        if "memory" in line:
            counted = {flag for flag in memory.ROWS[line["memory"]] if flag != memory.DDP}
            assert counted <= set(line["flags"]), line["name"]


def test_the_rows_of_the_step_are_rows_of_step_cost(acceptance):
    import step_cost

    with mock.patch.object(Path, "glob", lambda self, pattern: iter([self])):  # as if there were a GPU
        args = step_cost.parse_args(["--cases=sdxl-1024", "--exactly", *acceptance.STEP_ROWS])
    assert [row["name"] for row in args.rows] == list(acceptance.STEP_ROWS)


def test_a_dry_run_goes_on_where_the_last_one_ended(acceptance, tmp_path):
    first = run(acceptance, tmp_path, "--only", "LoRA, bf16, 4 pairs", "LoRA, fp16")
    assert [line["status"] for line in first] == ["pass", "not run: needs a GPU"]
    assert first[0]["pairs_per_second"] > 0
    second = run(acceptance, tmp_path, "--budget_s=1")
    assert second[0] == first[0]
    assert {line["status"] for line in second[1:]} == {"not run: needs a GPU", "not run: the time was used up"}
    table = (tmp_path / "out" / "acceptance.md").read_text()
    assert "1 pass, 0 FAIL, 16 not run" in table and "| LoRA, bf16, 4 pairs, with images | pass |" in table


def test_a_run_that_fails_fails_its_line_in_the_scripts_own_words(acceptance, tmp_path):
    broken = acceptance.line("broken", "--rank=4")
    with mock.patch.object(acceptance, "list_lines", lambda: [broken]):
        (line,) = run(acceptance, tmp_path)
    assert line["status"].startswith("FAIL: ended with 2: ") and "--rank needs --use_lora too" in line["status"]
    assert "--rank needs" in (tmp_path / "out" / "0-out.log").read_text()


@pytest.mark.parametrize(
    "records, weight, message",
    [
        ([{"step": 1, "loss": 1.0}], 1.0, "1 of 2 steps"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None, "skipped": 0}], 1.0, "isn't finite"),
        ([{"step": 1, "loss": None, "skipped": 1}, {"step": 2, "loss": None, "skipped": 1}], 1.0, "no step"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}], float("nan"), "weights that aren't finite"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0, "peak_memory_gb": 13.0}], 1.0, "13.0 GB, counted 11.0"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0, "peak_memory_gb": 11.5}], 1.0, None),
    ],
)  # fmt: skip
def test_what_a_run_must_leave_behind(acceptance, tmp_path, records, weight, message):
    line = acceptance.line("x", acceptance.LORA, acceptance.NO_IMAGES, steps=2, memory="LoRA, 4 pairs")
    counted = {"encoding": {"images": 3.0}, "rows": {"LoRA, 4 pairs": {"training": 11.0}}}
    args = mock.Mock(device="cuda", counted=counted)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_file({"a": torch.tensor([weight])}, tmp_path / "pytorch_lora_weights.safetensors")
    if message is None:
        assert acceptance.check_run(line, tmp_path, args)["peak_gb"] == 11.5
    else:
        with pytest.raises(acceptance.Failure, match=message):
            acceptance.check_run(line, tmp_path, args)


def test_a_resumed_run_must_end_with_the_same_bits(acceptance, tmp_path):
    """One bit of one weight, changed in the checkpoint between the kill and the resumption, is seen."""
    line = acceptance.line("x", acceptance.LORA, acceptance.ONE, acceptance.NO_IMAGES, kind="resume")
    kill_at = acceptance.Run.kill_at

    def spoil(self, step: int) -> None:
        kill_at(self, step)
        for file in self.out.glob("checkpoint-*/custom_checkpoint_1.pkl"):  # the LoRA; 0 is the schedule
            tensors = torch.load(file)
            tensors["0"].view(torch.int32).flatten()[0] ^= 1
            torch.save(tensors, file)

    with mock.patch.object(acceptance, "list_lines", lambda: [line]):
        assert run(acceptance, tmp_path)[0]["status"] == "pass"
        with mock.patch.object(acceptance.Run, "kill_at", spoil):
            assert "tensors differ" in run(acceptance, tmp_path, "--only=0")[0]["status"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dry_run", "--budget_s=0"], "--budget_s 0: must be positive"),
        (["--dry_run", "--only=nonsense"], "--only nonsense: no such line"),
    ],
)
def test_a_bad_flag_ends_in_one_line(acceptance, flags, message, capsys):
    with pytest.raises(SystemExit):
        acceptance.parse_args(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
