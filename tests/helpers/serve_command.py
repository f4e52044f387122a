"""`virst serve` as a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from helpers.places import ROOT


@contextlib.contextmanager
def virst_serve(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address that it has printed. Uploads lie in `home`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    command = [sys.executable, "-m", "virst_jax", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"open (http://\S+)/", line)
            assert found, line
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield process, found[1]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
