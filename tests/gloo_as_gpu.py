"""gloo_as_gpu.py SCRIPT FLAGS: runs SCRIPT on CPUs as on GPUs. accelerate shards a model (FSDP, DeepSpeed) where it
finds GPUs only; told that gloo's processes are such, its own code and torch's do the rest on a CPU."""

import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState


def set_device(state: PartialState) -> None:
    if state.device is None:
        state.device = torch.device("cpu")


PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = set_device
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
