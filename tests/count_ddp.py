"""count_ddp.py FLAGS: runs train_diffusion_mapo_sdxl.py; at its end, each process says what is left of DDP."""

import gc
import sys
from pathlib import Path

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel


end_training = Accelerator.end_training


def count(accelerator: Accelerator) -> None:
    gc.collect()
    print("DDP:", sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects()), flush=True)
    end_training(accelerator)


Accelerator.end_training = count
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_diffusion_mapo_sdxl as script  # noqa: E402


script.main(script.parse_args())
