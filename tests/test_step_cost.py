"""The benchmark of a step: what it counts, what it writes, and that its options train alike. No timing is asserted."""

import json
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import REPO
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(REPO / "benchmarks"))


@pytest.fixture(scope="module")
def variant():
    import step_variant

    return step_variant


@pytest.fixture
def fresh():
    """Lets a test choose accelerate's precision anew."""
    from accelerate.state import AcceleratorState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield reset
    reset()


# ---------------------------------------------------------------------------------------------------------------------
# FLOP
# ---------------------------------------------------------------------------------------------------------------------


def test_a_step_of_the_demo_as_it_runs_takes_no_more_flop_than_the_floor(variant, fresh):
    with variant.start(variant.Variant("", "demo", batch=2), "cpu") as training:
        training.step()  # so that nothing is counted that only a first step does
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            training.step()

    floor = variant.count_floor("demo")
    assert 0.99 * floor < counter.get_total_flops() / 2 <= 1.01 * floor
    assert counter.get_total_flops() / 2 == pytest.approx(variant.count_flop(variant.Variant("", "demo")), rel=1e-3)


def test_a_step_of_sdxl_takes_no_more_flop_than_the_floor(variant):
    """Against section 1 of the facts: per pair at 512 px 2 x 4.71 TFLOP, a VAE of 2 x 1.12."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(variant.load_config(REPO / "benchmarks" / "sdxl" / "unet"))
    assert unet.num_parameters() == 2_567_463_684
    floor = variant.count_floor("sdxl-512")
    assert floor == pytest.approx(2 * 4.71e12, rel=0.01)
    mapo = variant.count_flop(variant.Variant("", "sdxl-512"))
    assert mapo <= 1.01 * floor


def test_other_ways_take_the_flop_that_they_must(variant):
    """Of the floor: a reference model a third more, SFT half, encoding the VAE's share."""
    floor = variant.count_floor("demo")

    def count(*flags, **options) -> float:
        return variant.count_flop(variant.Variant("", "demo", flags=flags, **options)) / floor

    assert count() == pytest.approx(1, abs=0.001)
    assert count(method="sft") == pytest.approx(0.5, abs=0.001)
    assert count(method="dpo") == pytest.approx(4 / 3, abs=0.01)
    assert count("--use_lora", method="dpo") == pytest.approx(count("--use_lora") + 1 / 3, abs=0.01)
    assert count("--gradient_checkpointing") > 1.15
    images, all_of_it = count(encode_images=True), count(encode_images=True, encode_captions=True)
    assert 1.05 < images < all_of_it
    assert count(keys_once=True) < 1


# ---------------------------------------------------------------------------------------------------------------------
# Options train alike
# ---------------------------------------------------------------------------------------------------------------------


def follow(variant, fresh, *flags: str, **options) -> torch.Tensor:
    """Losses of four steps at a rate that moves them. Shape: (4,)"""
    fresh()
    row = variant.Variant("", "demo", flags=("--learning_rate=1e-4", *flags), batch=4, **options)
    with variant.start(row, "cpu") as training:
        return torch.stack([training.step() for _ in range(4)])


def test_options_that_only_save_time_or_memory_give_the_same_losses(variant, fresh):
    """To 1e-4 of the loss over four steps, in fp32: the order of summation differs, nothing else."""
    plain = follow(variant, fresh)
    assert (plain - plain[0]).abs().max() > 0.01  # the weights do move
    ways = {
        "checkpointing": follow(variant, fresh, "--gradient_checkpointing"),
        "channels last": follow(variant, fresh, channels_last=True),
        "text keys once per pair": follow(variant, fresh, keys_once=True),
        "no check": follow(variant, fresh, finite_check=False),
        "plain attention": follow(variant, fresh, attention="math"),
    }
    for name, losses in ways.items():
        torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_diffusion_dpo_starts_at_log_2_and_sft_at_the_winners_error(variant, fresh):
    torch.testing.assert_close(follow(variant, fresh, method="dpo")[0].item(), 0.6931, rtol=0, atol=1e-3)
    torch.testing.assert_close(follow(variant, fresh, "--use_lora", method="dpo")[0].item(), 0.6931, rtol=0, atol=1e-3)
    sft = follow(variant, fresh, method="sft")
    fresh()
    with variant.start(variant.Variant("", "demo", batch=4), "cpu") as training:
        training.step()
        mse_w = torch.tensor(training.log.history[-1]["mse_w"])
    torch.testing.assert_close(sft[0], mse_w, rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 100, 255])
def test_the_largest_batch_is_found_to_an_eighth(variant, most):
    for guess in (1, 5, 80, 1000):
        tried = []

        def fits(batch: int) -> bool:
            tried.append(batch)
            return batch <= most

        found, exact = variant.largest_batch(fits, 1, guess, time.time() + 60)
        assert exact and found <= most <= found + max(1, found // 8)
        assert len(tried) < 20
    assert variant.largest_batch(fits, 1, 1, time.time() - 1) == (1, False)


def test_out_of_memory_is_an_answer_and_leaves_the_training_usable(variant, fresh):
    fresh()
    with variant.start(variant.Variant("", "demo", batch=1), "cpu") as training:
        with mock.patch.object(training, "step", side_effect=torch.OutOfMemoryError("no room")):
            assert not variant.fits(training, 2)
        assert variant.fits(training, 2)


def test_the_dry_run_writes_json_table_and_plot(tmp_path):
    """A good row, one that fails and one for which no time is left."""
    import step_cost
    import step_report

    flags = ["--device=cpu", "--dry_run", f"--output_dir={tmp_path}", "--only=0"]
    args = step_cost.parse_args(flags)
    args.rows.append(args.rows[0] | {"name": "broken", "flags": ["--rank=0"]})
    args.rows.append(args.rows[0] | {"name": "late"})
    clock, late = step_cost.Child.measure, []

    def measure(self, deadline):
        late.append(0)
        if len(late) == 3:  # peak, the good row, the broken one
            args.least_s = 1e9
        return clock(self, deadline)

    with mock.patch.object(step_cost.Child, "measure", measure), mock.patch("signal.signal"):
        step_cost.main(args)

    saved = json.loads((tmp_path / "step_cost.json").read_text())
    good, broken, never = saved["rows"]
    assert good["status"] == "ok" and set(good["phases"]) == {"data", "encode", "forward", "backward", "optimizer"}
    assert {"pairs_per_second", "flop_per_pair", "peak_gb", "peak_without_model_gb", "first_step_after_s"} < set(good)
    assert broken["status"] == "SystemExit: 2" and never["status"].startswith("not run")
    assert saved["peak"]["fp32"] > 0 and "torch" in saved["versions"]
    table = (tmp_path / "step_cost.md").read_text()
    assert all(column in table for column in step_report.COLUMNS.values())
    assert "| broken | SystemExit: 2 |" in table and "| 1.00 |" in table
    assert (tmp_path / "step_cost.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("tmp-*"))


def test_every_row_is_one_that_the_training_script_takes(variant, tmp_path):
    import step_cost

    packages = mock.patch("importlib.util.find_spec", lambda name: name)  # a test needs no xformers
    for device, cases in (("cpu", ["demo"]), ("cuda", ["sdxl-1024", "sdxl-512"])):
        for row in step_cost.list_rows(cases, device):
            with packages:
                variant.make_args(variant.Variant(**row | {"flags": tuple(row["flags"])}), device, str(tmp_path))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budget_s=0"], "--budget_s 0.0: must be positive"),
        (["--only=nonsense"], "--only nonsense: no such row; the rows are: MaPO;"),
        (["--cases=sdxl-64"], "invalid choice: 'sdxl-64'"),
        (["--memory_gb=80"], "--memory_gb 80 needs a GPU"),
        (["--script=nowhere.py"], "--script nowhere.py: no such file"),
        (["--output_dir=setup.txt"], "--output_dir setup.txt: is a file; name a folder"),
    ],
)
def test_a_bad_flag_ends_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    import step_cost

    monkeypatch.chdir(tmp_path)
    Path("setup.txt").touch()
    with pytest.raises(SystemExit):
        step_cost.parse_args(["--device=cpu", *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_profile_names_every_phase():
    import whole_process

    run = {"phases": {"launcher": 1.0, "forward": 2.0}, "first_step_s": 3.0, "total_s": 4.0, "pairs_per_second": 5.0}
    table = whole_process.make_table({"first run": run})
    assert all(f"| {phase} |" in table for phase in whole_process.PHASES)
    import train_diffusion_mapo_sdxl as script

    known = [name for names in whole_process.PHASES.values() for name in names if "." not in name]
    assert [name for name in known if not hasattr(script, name)] == []
