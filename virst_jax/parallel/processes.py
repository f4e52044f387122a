"""Several processes that run one program: who is the main one, barriers, stopping together, noticing the dead.

A run of one process pays nothing for this: every function returns at once.
"""

import atexit
import contextlib
import itertools
import json
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from virst_jax.errors import UserError
from virst_jax.parallel import hosts

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as dead
# JAX's own limit ends a process with a stack trace; it is there for what ours cannot see. JAX gives a sign of life in
# half of that time, so it may find a process dead after half of it: later than we do, with the time for our line
JAX_SILENCE = 100
STALL = 1800.0  # seconds that a step, with its compilation, may take
LOST = 4  # exit status of a process that ends because another one did


class Stopped(KeyboardInterrupt):
    """All processes have agreed to stop, and stop at the same step."""


def start() -> None:
    """Joins the other processes, and begins to watch them.

    The launcher says who they are: environments that jax.distributed.initialize knows (TPU VMs, GKE, Slurm, Open MPI)
    need nothing more; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      UserError: they are not to be found, or their hosts do not fit together.
    """
    hosts.check_environment()
    # its handler of SIGTERM would swallow the signal until ours is installed
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {}
    try:
        if COUNT in os.environ or INDEX in os.environ:
            given = {
                "coordinator_address": os.environ[COORDINATOR],
                "num_processes": int(os.environ[COUNT]),
                "process_id": int(os.environ[INDEX]),
            }
        jax.distributed.initialize(heartbeat_timeout_seconds=JAX_SILENCE, shutdown_timeout_seconds=60, **given)
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set; processes need {COORDINATOR}, {COUNT} and {INDEX}") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes do not find each other ({_one_line(error)}); start them by a launcher that "
            f"jax.distributed.initialize knows, or set {COORDINATOR}, {COUNT} and {INDEX}"
        ) from error
    if jax.process_count() > 1:
        _check_hosts()
        _watch.start()


def _check_hosts() -> None:
    """Compares what the processes run; raises UserError in all of them if they do not fit together."""
    client = _client()
    devices = jax.local_devices()
    client.key_value_set(f"virst/host/{jax.process_index()}", hosts.facts(devices[0].device_kind, len(devices)))
    verdict = None
    if is_main():
        told = [client.blocking_key_value_get(f"virst/host/{i}", 600_000) for i in range(jax.process_count())]
        verdict = json.dumps(hosts.compare(told))
    error, notes = json.loads(from_main("hosts", verdict))
    if error:
        raise UserError(error)
    for note in notes if is_main() else ():
        _say(f"note: {note}")


def is_main() -> bool:
    """Whether this process writes what one process writes for all: logs, settings, markers."""
    return jax.process_index() == 0


_uses: Counter[str] = Counter()


def barrier(name: str, seconds: float = 600.0) -> None:
    """Waits until every process has come here. All processes pass the same barriers in the same order.

    Raises:
      jax.errors.JaxRuntimeError: a process has ended, or did not come in time.
    """
    if jax.process_count() > 1:
        _uses[name] += 1
        _client().wait_at_barrier(f"virst/{name}/{_uses[name]}", round(1000 * seconds))


def from_main(name: str, value: str | None = None) -> str:
    """What the main process says, in all of them.

    Args:
      name: tells uses apart, as of `barrier`.
      value: what the main process says; the others need not know.
    """
    _uses[name] += 1
    key = f"virst/said/{name}/{_uses[name]}"
    if jax.process_count() == 1 or is_main():
        assert value is not None
        if jax.process_count() > 1:
            _client().key_value_set(key, value)
        return value
    return str(_client().blocking_key_value_get(key, 600_000))


class Stop:
    """Stopping as the user or the system asks, by SIGINT, SIGTERM or SIGHUP: all processes at the same step.

    A context manager. One process stops at the step in which the signal comes. Several reduce a flag along with every
    step, and read it one step later, so that nothing waits for it: whichever process the signal reaches, and however
    far the host of each has run ahead, all see the same flag at the same step.

    A second Ctrl-C ends the process at once. Launchers repeat SIGTERM, so it may come again.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self._flag: jax.Array | None = None

    def __enter__(self) -> "Stop":
        self.many = jax.process_count() > 1
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # a launcher's own thread (Ray's) gets no signals
            self.before = {
                number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            }
        if self.before.get(signal.SIGHUP) is signal.SIG_IGN:  # set so by nohup
            del self.before[signal.SIGHUP]
        for number in self.before:
            signal.signal(number, self._catch)
        if self.many:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._split = NamedSharding(mesh, PartitionSpec("devices"))
            self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
            self.now()  # compiles it; and whoever comes here late is waited for here, not in a step
        return self

    def __exit__(self, *_: object) -> None:
        _watch.expect_steps(False)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def at_step(self) -> bool:
        """Whether to stop after this step. Every process asks once a step."""
        if not self.many:
            return self.asked
        earlier, self._flag = self._flag, self._reduce()
        if earlier is not None:
            self._read(earlier)
        _watch.expect_steps(True)
        return self.agreed

    def now(self) -> bool:
        """As `at_step`, without the delay of a step, and waiting for the others: between videos of an evaluation."""
        if not self.many:
            return self.asked
        self._read(self._reduce())
        _watch.expect_steps(True)
        return self.agreed

    def check(self) -> None:
        """Raises Stopped if all agree to stop now."""
        if self.now():
            raise Stopped

    def _reduce(self) -> jax.Array:
        flag = np.full(len(self._split.addressable_devices), self.asked)
        return self._largest(jax.make_array_from_process_local_data(self._split, flag))

    def _read(self, flag: jax.Array) -> None:
        self.agreed = self.agreed or bool(np.asarray(flag))

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            if self.many:
                leave(130, "Ctrl-C a second time")
            raise KeyboardInterrupt
        if not self.asked:
            _say("stopping after this step; the checkpoint is written first")
        self.asked = True


def leave(status: int, reason: str) -> None:
    """Ends this process at once and lets the others know. An orderly end would wait for them, and they for us.

    Returns where there are no others.
    """
    if _watch.running:
        _watch.leave(status, reason)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What the processes do together: an error in one of them ends it at once, with a line, and the others soon.

    All clean-up that waits for other processes belongs around it, not in it.
    """
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt:  # before the first step, or after the last: the others do not know of it
        leave(130, "interrupted; what is finished is kept, the same command goes on")
        raise
    except UserError as error:
        leave(2, str(error))
        raise
    except Exception as error:
        if _watch.running:
            if _says_that_a_peer_is_gone(error):
                leave(LOST, f"another process is gone ({_one_line(error)}); {_GO_ON}")
            traceback.print_exc()
            leave(1, f"{type(error).__name__}: {_one_line(error)}")
        raise


_GO_ON = "run the same command on all hosts to go on from the last checkpoint"


def _says_that_a_peer_is_gone(error: Exception) -> bool:
    words = ("gloo", "connection closed", "connection reset", "coordination", "barrier", "unavailable", "nccl")
    return isinstance(error, (ValueError, RuntimeError)) and any(word in str(error).lower() for word in words)


class _Watch:
    """A thread that gives signs of life, and ends the process when another one has ended or no step comes to an end.

    Every process counts up a number of its own in the coordinator's store. The main process reads them all; the others
    only whether somebody is lost. JAX's own heartbeats end a process too, but later and with a stack trace.
    """

    def __init__(self) -> None:
        self.running = False
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.step_seen: float | None = None

    def start(self) -> None:
        self.running = True
        self.index, self.count = jax.process_index(), jax.process_count()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        atexit.register(self._finish)

    def expect_steps(self, on: bool) -> None:
        self.step_seen = time.monotonic() if on else None

    def leave(self, status: int, reason: str, wait: bool = True) -> None:
        with self.lock:  # one line, whoever notices first
            _say(f"process {self.index} ends: {reason}")
            self._tell(f"process {self.index} ended ({reason})")
            if wait and self.index == 0:
                time.sleep(2 * BEAT)  # the store ends with us: let the others read it
            os._exit(status)

    def _finish(self) -> None:
        self.done.set()
        self.running = False
        try:
            _client().key_value_set(f"virst/alive/{self.index}", "done", allow_overwrite=True)
        except Exception:  # the coordinator may be gone by now
            return

    def _tell(self, reason: str) -> None:
        try:
            _client().key_value_set("virst/lost", reason)
        except Exception:  # it stands there already, or there is nobody left to tell
            return

    def _run(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        for beat in itertools.count():
            try:
                self._beat(beat, seen)
            except Exception as error:
                if not self.done.is_set() and not _is_missing(error):
                    self.leave(LOST, f"the process that coordinates is gone ({_one_line(error)})")
            if self.done.wait(BEAT):
                return

    def _beat(self, beat: int, seen: dict[str, tuple[str, float]]) -> None:
        client, now = _client(), time.monotonic()
        client.key_value_set(f"virst/alive/{self.index}", str(beat), allow_overwrite=True)
        if self.step_seen is not None and now - self.step_seen > STALL:
            self.leave(LOST, f"no step came to an end in {STALL:.0f} s")
        if self.index == 0:
            for key, value in client.key_value_dir_get("virst/alive/"):
                if seen.get(key, ("", 0.0))[0] != value:
                    seen[key] = (value, now)
                elif value != "done" and now - seen[key][1] > SILENCE:
                    number = key.rsplit("/", 1)[-1]
                    self._tell(f"process {number} has not answered for {SILENCE:.0f} s")
        try:
            reason = client.key_value_try_get("virst/lost")
        except Exception as error:
            if _is_missing(error):
                return
            raise
        if not self.done.is_set():
            self.leave(LOST, f"{reason}; {_GO_ON}")


_watch = _Watch()


def _client() -> Any:
    return jax._src.distributed.global_state.client  # as Orbax does; there is no public way to the barriers


def _is_missing(error: Exception) -> bool:
    return "NOT_FOUND" in str(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _say(line: str) -> None:
    os.write(2, f"\n{line}\n".encode())  # the thread that hangs, or was interrupted, may hold the lock of sys.stderr
