"""Latency and memory of `virst live` on a pipe that sends frames at a steady rate.

python -m benchmarks.live --frames 500 --rate 30

One process writes frames of moving shapes into a pipe as Matroska with MJPEG, and `virst live` reads them with the
small model of the package. Printed are the line of figures that the command ends with, and the memory that it holds,
read from /proc once a second (Linux).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDE = 256


def send(frames: int, rate: float) -> None:
    """Writes the frames to the output, each when it is due."""
    import av

    y, x = np.mgrid[:SIDE, :SIDE]
    with av.open("pipe:1", "w", format="matroska", options={"flush_packets": "1"}) as container:
        stream = container.add_stream("mjpeg", rate=round(rate))
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuvj420p"
        due = time.monotonic()
        for number in range(frames):
            image = np.full((SIDE, SIDE, 3), 90, np.uint8)
            angle = number / 20
            image[(x - 128 - 80 * np.cos(angle)) ** 2 + (y - 128 - 80 * np.sin(angle)) ** 2 < 900] = (220, 40, 40)
            image[(abs(x - 128 - 60 * np.sin(number / 31)) < 20) & (abs(y - 60) < 20)] = (40, 70, 220)
            now = time.monotonic()
            time.sleep(max(0.0, due - now))
            due = max(due, now) + 1 / rate  # what waited while the steps were compiled is not made up for
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def memory_of(process: int) -> float:
    """MB that a process holds; nan when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return float("nan")
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(found[0]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--rate", type=float, default=30.0)
    parser.add_argument("--expression", action="append")
    parser.add_argument("--send", action="store_true", help="be the process that writes")
    args, more = parser.parse_known_args()
    if args.send:
        return send(args.frames, args.rate)
    texts = args.expression or ["the red circle"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "virst_jax", "live", "-", *texts, "--out", str(out), *more]
        live = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert live.stdin is not None
        asked = [sys.executable, "-m", "benchmarks.live", "--send", "--frames", str(args.frames)]
        sender = subprocess.Popen([*asked, "--rate", str(args.rate)], stdout=live.stdin)
        live.stdin.close()
        held: list[tuple[int, float]] = []
        while live.poll() is None:
            lines = out / "boxes.ndjson"
            count = lines.read_bytes().count(b"\n") if lines.is_file() else 0
            if count:
                held.append((count, memory_of(live.pid)))
            time.sleep(1)
        sender.wait()
    print("frames  MB")
    for count, megabytes in held:
        print(f"{count:6}  {megabytes:.0f}")
    sys.exit(live.returncode)


if __name__ == "__main__":
    main()
