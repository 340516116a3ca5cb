"""Runs train_diffusion_mapo_sdxl.py once per line of standard input, each time in a fork of this process, which has
imported everything: a run has its own process to be killed, and costs no start of Python.

A line is {"flags": [...], "log": PATH, "file_limit": BYTES or null}; the answer is the pid, then the exit code."""

import json
import os
import resource
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import train_diffusion_mapo_sdxl as script  # noqa: E402
from transformers import CLIPTextModelWithProjection  # noqa: E402, F401

from diffusers import StableDiffusionXLPipeline, optimization, training_utils  # noqa: E402, F401


def run(job: dict) -> None:
    log = os.open(job["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if job["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    script.main(script.parse_args(job["flags"]))


# One core and so one thread: on so small a model, threads that wait for one another cost more than they bring.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run(json.loads(line))
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
