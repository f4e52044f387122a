"""What a replaced or badly set up host gets wrong, found before the first step rather than by a hang.

Processes that run different versions, or compile with different flags, may compile different programs, and then wait
for each other for ever.
"""

import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from virst_jax.errors import UserError

PACKAGES = ("virst-jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # environment variables
MUST_AGREE = ("Python", *PACKAGES, *FLAGS, "accelerator", "devices")
CLOCKS = 60.0  # seconds that two hosts' clocks may differ without a note
# set by launchers of several TPU slices; a host that served in such a run before may still have some of them
MULTI_SLICE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Looks at the variables of a run over several TPU slices, with which this process would wait for the others.

    Raises:
      UserError: some of them are set and others are not, or they contradict each other.
    """
    there = [name for name in MULTI_SLICE if environment.get(name)]
    if not there:
        return
    if missing := [name for name in MULTI_SLICE if name not in there]:
        raise UserError(
            f"{', '.join(there)} of a run over several TPU slices is set and {', '.join(missing)} is not; unset what an"
            " earlier run has left, or set all of them"
        )
    count, index = (environment[name] for name in MULTI_SLICE[1:])
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"{MULTI_SLICE[2]}={index} is none of {MULTI_SLICE[1]}={count} slices; correct the launcher")


def facts(accelerator: str, devices: int) -> str:
    """What this process tells the main one, as JSON.

    Args:
      accelerator: kind of its devices.
      devices: how many of them it has.
    """
    known = {"host": socket.gethostname(), "time": time.time(), "arguments": " ".join(sys.argv[1:])}
    known |= {"accelerator": accelerator, "devices": devices, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = "none"
    for name in FLAGS:
        known[name] = " ".join(sorted(os.environ.get(name, "").split()))
    return json.dumps(known)


def compare(told: Sequence[str]) -> tuple[str, list[str]]:
    """What is wrong with a group of processes, by what `facts` says of each.

    Returns:
      The error, or "" if they fit together; and notes on what may be meant so.
    """
    processes = [json.loads(text) for text in told]
    for name in MUST_AGREE:
        (usual, _), *others = Counter(str(process[name]) for process in processes).most_common()
        if others:
            index = next(i for i, process in enumerate(processes) if str(process[name]) != usual)
            odd = processes[index]
            return (
                f"process {index} on {odd['host']} has {name} {str(odd[name]) or 'unset'}, others have "
                f"{usual or 'it unset'}; make all hosts alike"
            ), []
    notes = []
    (usual, _), *others = Counter(process["arguments"] for process in processes).most_common()
    if others:
        index = next(i for i, process in enumerate(processes) if process["arguments"] != usual)
        notes.append(f"process {index} on {processes[index]['host']} was started with other arguments than others")
    times = [process["time"] for process in processes]
    if max(times) - min(times) > CLOCKS:
        late = times.index(min(times))
        notes.append(
            f"the clock of {processes[late]['host']} is {max(times) - min(times):.0f} s behind that of another host; "
            "times in logs do not compare"
        )
    return "", notes
