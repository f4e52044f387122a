"""Steps that all processes take together, until they are asked to stop: steps.py SECONDS_PER_STEP [SECONDS ...]

The processes' hosts take different times for a step. Prints "begin", every step, and "stopped N".
"""

import os
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from virst_jax.errors import UserError
from virst_jax.parallel import processes

processes.start()
seconds = [float(x) for x in sys.argv[1:]][jax.process_index()]
mesh = Mesh(np.array(jax.devices()), ("x",))
split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
add = jax.jit(lambda x, total: total + x.sum(), out_shardings=whole)
total = jax.device_put(np.float32(0), whole)
with processes.together(), processes.Stop() as stop:
    print("begin", flush=True)
    for step in range(10_000):
        time.sleep(seconds)
        if (os.environ.get("FAULT"), step) == (str(jax.process_index()), 5):
            raise KeyboardInterrupt if os.environ.get("KIND") == "interrupt" else UserError("a fault of this process")
        total = add(jax.make_array_from_process_local_data(split, np.ones(jax.local_device_count(), np.float32)), total)
        print("step", step, flush=True)
        if stop.at_step():
            print(f"stopped {step} {float(total):.0f}", flush=True)
            processes.barrier("end")
            sys.exit(0)
