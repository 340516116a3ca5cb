"""Run train_diffusion_mapo_sdxl.py with the given flags. At the end, each process prints how many DDP models are left."""

import gc
import sys
from pathlib import Path

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel


end_training = Accelerator.end_training


def count_and_end_training(accelerator: Accelerator) -> None:
    gc.collect()
    count = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
    print(f"DDP: {count}", flush=True)
    end_training(accelerator)


Accelerator.end_training = count_and_end_training
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_diffusion_mapo_sdxl as script  # noqa: E402


script.main(script.parse_args())
