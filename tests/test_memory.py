"""What memory.py counts: against bytes added up by hand, the targets of the design, and what is known of CUDA."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO


sys.path.insert(0, str(REPO / "benchmarks"))


@pytest.fixture(scope="module")
def memory():
    import memory

    return memory


@pytest.fixture(scope="module")
def counted(memory):
    """A LoRA and a full fine-tune of 4 pairs at 1024 px."""
    return memory.count(["LoRA, 4 pairs", "8-bit AdamW, 4 pairs"], 1024)


def test_a_lora_trains_on_16_gb_and_all_weights_on_40(memory, counted):
    """Encoding, training and the images afterwards, with room for what isn't counted."""
    _, rows = counted
    assert rows["LoRA, 4 pairs"]["peak"] + memory.ROOM <= 16
    assert rows["8-bit AdamW, 4 pairs"]["peak"] + memory.ROOM <= 40


def test_encoding_takes_less_than_the_smallest_training(counted):
    encoding, rows = counted
    assert max(encoding.values()) < rows["LoRA, 4 pairs"]["training"]


def test_what_is_kept_between_steps_is_weights_and_states(counted):
    """SDXL's UNet has 2,567,463,684 weights: 4 bytes each, and 2 of 8-bit states with 8 per block of 256 of both; a
    LoRA keeps 2 and, for its own, 12."""
    weights = 2_567_463_684
    _, rows = counted
    assert rows["8-bit AdamW, 4 pairs"]["kept"] == pytest.approx(weights * (4 + 2 + 8 / 256) / 1e9, rel=0.005)
    lora = 46_448_640  # rank 32 on to_q, to_k, to_v, to_out.0
    assert rows["LoRA, 4 pairs"]["kept"] == pytest.approx((2 * weights + 12 * lora) / 1e9, rel=0.005)
    # All gradients are there at the end of the backward pass, in fp32.
    assert rows["8-bit AdamW, 4 pairs"]["training"] > rows["8-bit AdamW, 4 pairs"]["kept"] + 4 * weights / 1e9


def test_the_saved_table_is_that_of_the_script_as_it_is(memory, counted):
    """gpu_acceptance.py holds a GPU's peaks to it: `python benchmarks/memory.py --save` makes it anew."""
    import json

    saved = json.loads(Path(memory.RESULTS).read_text())
    encoding, rows = counted
    assert saved["encoding"] == pytest.approx(encoding, rel=0.02)
    for name, row in rows.items():
        assert saved["rows"][name] == pytest.approx(row, rel=0.02)
    assert saved["rows"].keys() == memory.ROWS.keys()


def test_storages_count_once_and_as_long_as_they_live(memory):
    with memory.Memory() as counter:
        a = torch.empty(1000, device="meta")
        assert counter.held == 4096  # in blocks of 512 bytes
        view = a.view(10, 100)[1:]
        b = a + 1
        del a
        assert counter.held == 8192
        del view, b
        torch.empty(4, device="cpu")
    assert (counter.held, counter.peak) == (0, 8192)


def test_autocast_and_attention_are_as_cuda_has_them(memory):
    """A linear layer under autocast keeps half copies of its input and weight for the backward pass; group norm is
    computed in fp32; attention never holds its matrix of 4096 x 4096."""
    with memory.Memory() as counter, memory.kernels(autocast=True):
        linear, norm = torch.nn.Linear(64, 64, device="meta"), torch.nn.GroupNorm(8, 64, device="meta")
        x = torch.empty(2, 64, device="meta")
        out = linear(x)
        assert out.dtype == torch.bfloat16 and norm(out).dtype == torch.float32
        q = torch.empty(1, 10, 4096, 64, device="meta", requires_grad=True)
        before = counter.held
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert attended.dtype == torch.bfloat16
        assert counter.peak - before < 10 * 4096 * 4096 * 2
        attended.sum().backward()
        assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resolution=1001"], "--resolution 1001: must be a multiple of 8"),
        (["--only=nonsense"], "--only nonsense: no such row; the rows are: LoRA, 1 pair;"),
        (["--save", "--only=LoRA"], "--save is for the whole table at 1024 px"),
    ],
)
def test_a_bad_flag_ends_in_one_line(memory, flags, message, capsys):
    with pytest.raises(SystemExit):
        memory.parse_args(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
