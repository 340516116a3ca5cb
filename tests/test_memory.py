"""What memory.py counts: against bytes added up by hand, against the targets, and against what is known of CUDA."""

import json
import sys

import pytest
import torch
from conftest import REPO


sys.path.insert(0, str(REPO / "benchmarks"))
import memory  # noqa: E402


SAVED = json.loads((REPO / "benchmarks" / "results" / "memory.json").read_text())


@pytest.mark.parametrize(
    "name, kept_bytes",
    [
        # SDXL's UNet in bf16, and a LoRA with AdamW's two states in fp32
        ("LoRA, 1 pair", 2_567_463_684 * 2 + 46_448_640 * 12),
        # the UNet in fp32, with two 8-bit states and their scales, 8 bytes for a block of 256 weights
        ("full, 8-bit AdamW, 4 pairs", 2_567_463_684 * (4 + 2 + 8 / 256)),
    ],
)
def test_a_run_is_counted_as_by_hand_and_as_in_the_saved_table(name, kept_bytes):
    """The table is of the script as it is. If it isn't: benchmarks/README.md says how to count it again."""
    counted = memory.count_run(memory.ROWS[name], 1024)
    assert counted["between steps"] == pytest.approx(kept_bytes / 1e9, rel=0.005)
    assert SAVED[name] == pytest.approx(counted, rel=0.02)
    assert SAVED.keys() == memory.ROWS.keys()


def test_the_targets_hold_for_whole_runs():
    """Encoding, training and previews at 1024 px: a LoRA on 12 and 16 GB, a full fine-tune on 40 GB."""
    assert SAVED["LoRA, 1 pair"]["whole run"] < 10.5
    assert SAVED["LoRA, 4 pairs"]["whole run"] + memory.NOT_COUNTED < 16
    assert SAVED["full, 8-bit AdamW, 4 pairs"]["whole run"] + memory.NOT_COUNTED < 40


def test_storages_count_once_and_as_long_as_they_live():
    with memory.MemoryCounter() as counter:
        a = torch.empty(1000, device="meta")
        assert counter.held == 4096  # in blocks of 512 bytes
        view = a.view(10, 100)[1:]
        b = a + 1
        del a
        assert counter.held == 8192
        del view, b
        torch.empty(4, device="cpu")
    assert (counter.held, counter.peak) == (0, 8192)


def test_mixed_precision_and_attention_are_as_on_cuda():
    """Linear layers give bf16 and normalizations fp32, and attention never holds its matrix of 4096 x 4096."""
    with memory.MemoryCounter() as counter, memory.CudaRules(autocast=True):
        x = torch.empty(2, 64, device="meta")
        assert torch.nn.Linear(64, 64, device="meta")(x).dtype == torch.bfloat16
        assert torch.nn.GroupNorm(8, 64, device="meta")(x.bfloat16()).dtype == torch.float32
        q = torch.empty(1, 10, 4096, 64, device="meta", requires_grad=True)
        before = counter.held
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert attended.dtype == torch.bfloat16
        assert counter.peak - before < 10 * 4096 * 4096 * 2
