"""Starts several processes that find each other on this machine, as a launcher does."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers import compiling
from helpers.places import ROOT


class Group:
    """Processes of one program; their output goes to files, which nobody has to read for them to go on."""

    def __init__(self, folder: Path, count: int, arguments: Sequence[object], devices: int = 1, **environment: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process_{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            given = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": compiling.flags(devices),
                **environment,
            }
            if count > 1:
                given |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                }
            with log.open("wb") as output:
                command = [sys.executable, *map(str, arguments)]
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=given, stdout=output, stderr=subprocess.STDOUT)
                )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, index: int = 0) -> str:
        return self.logs[index].read_text(errors="replace")

    def outputs(self) -> str:
        """The ends of what all processes have printed."""
        return "\n".join(f"process {i}:\n{self.output(i)[-2000:]}" for i in range(len(self.logs)))

    def until(self, pattern: str | Callable[[], bool], index: int = 0, seconds: float = 300) -> None:
        """Waits until a process has printed something, or something holds."""
        deadline = time.monotonic() + seconds
        while not (pattern() if callable(pattern) else re.search(pattern, self.output(index))):
            assert time.monotonic() < deadline, f"not seen: {pattern}\n{self.output(index)[-3000:]}"
            assert self.processes[index].poll() is None, self.output(index)[-3000:]
            time.sleep(0.02)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit statuses once all have ended."""
        deadline = time.monotonic() + seconds
        statuses = []
        for i, process in enumerate(self.processes):
            try:
                statuses.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {i} still runs after {seconds} s:\n{self.output(i)[-3000:]}") from None
        return statuses
