"""`virst serve` as a process: the lines of its documentation, and its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from helpers.places import ROOT
from helpers.serve_command import virst_serve


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_documentation_runs_as_printed(tmp_path: Path) -> None:
    """All lines of "For other programs", but for the port. Then SIGTERM while the device is at work."""
    section = (ROOT / "docs" / "serve.md").read_text().split("## For other programs")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "home").mkdir()
    with virst_serve(tmp_path / "home") as (process, address):
        script = "set -eu -o pipefail\n" + "\n".join(blocks).replace("http://127.0.0.1:8321", address)
        python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env={**os.environ, **python}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("done\n")
        assert zipfile.ZipFile(tmp_path / "masks.zip").namelist() == ["annotations.json"]
        table = zipfile.ZipFile(tmp_path / "boxes.zip").read("boxes.csv").decode().splitlines()
        assert len(table) == 1 + 32 * 3  # two sentences and a box
        working = script[: script.index("until")] + "sleep 0.5"
        subprocess.run(["bash", "-c", working], cwd=tmp_path, env={**os.environ, **python}, check=True)
        assert list((tmp_path / "home").glob("virst-serve-*/*/frames/*.jpg"))
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - begin < 30
    assert list((tmp_path / "home").iterdir()) == []
