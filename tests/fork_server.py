"""Run train_diffusion_mapo_sdxl.py in forks of a process that has imported everything.

A run has processes of its own, which can be killed, but it costs no start of Python. The server reads jobs from its
standard input and answers each with the ids of the run's processes and, when they have ended, with their exit codes.
"""

import importlib
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path


REPO = Path(__file__).resolve().parents[1]


class ForkServer:
    """The tests' side: `with ForkServer(flags) as server: printed = server.run(out, "--use_ema")`."""

    def __init__(self, flags: list[str]) -> None:
        self.flags = flags

    def __enter__(self) -> "ForkServer":
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, out: Path, *flags: str, codes: list[int] = (0,), **job) -> str:
        """Run the script with the output folder `out`, in a process for each of the exit `codes` that it must have.

        The code is negative after a signal. `signal_at`, such as `["shutil.rmtree", 2, 15]`, has a process, the first
        one or `signal_to`, get signal 15 just before its second and every later call of the function. `file_limit` is
        the size in bytes of the largest file that a process can write. `env` is added to the environment.

        Returns:
            What the processes print.
        """
        log = out.with_suffix(".log")
        job |= {"flags": [*self.flags, f"--output_dir={out}", *flags], "log": str(log), "processes": len(codes)}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        pids = json.loads(self.process.stdout.readline())
        if not select.select([self.process.stdout], [], [], 300)[0]:
            for pid in pids:
                os.kill(pid, signal.SIGABRT)  # each prints where it hangs
        ended_with = json.loads(self.process.stdout.readline())
        printed = log.read_text(errors="replace")
        assert ended_with == list(codes), f"{ended_with}\n{printed}"
        return printed


def send_signal_at(function: str, call: int, number: int) -> None:
    """Have this process get a signal just before a certain call of a function and every later one."""
    module_name, name = function.rsplit(".", 1)
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) >= call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(module, name, counted)


def run(job: dict, process: int, num_processes: int, port: int) -> None:
    """Run the script in this process, as torchrun starts it where there are several."""
    faulthandler.enable()
    os.environ.update(job.get("env", {}))
    if num_processes > 1:
        os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=str(num_processes))
    if "file_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if "signal_at" in job and process == job.get("signal_to", 0):
        send_signal_at(*job["signal_at"])
    script.main(script.parse_args(job["flags"]))


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        num_processes = job["processes"]
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        log = os.open(job["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        pids = []
        for process in range(num_processes):
            pid = os.fork()
            if pid == 0:
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout = os.fdopen(1, "w")
                sys.stderr = os.fdopen(2, "w", buffering=1)
                run(job, process, num_processes, port)
                return
            pids.append(pid)
        os.close(log)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    import faulthandler
    import gc

    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # noqa: F401
    import train_diffusion_mapo_sdxl as script
    from transformers import CLIPTextModelWithProjection  # noqa: F401

    # One core and so one thread: on so small a model, threads that wait for one another cost more than they bring.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    script.PAIRS_PER_CACHE_FILE = 3  # a few pairs fill several files
    gc.collect()
    gc.freeze()  # else each fork copies the memory of this process when it collects garbage
    serve()
