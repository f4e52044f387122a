"""Checkpoints that processes send to a bucket. Argument: the address of a folder.

The first process looks late at whatever sign of Orbax it waits for.
"""

import sys
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.futures import signaling_client
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from virst_jax.io import buckets
from virst_jax.parallel import processes, sharding
from virst_jax.training.uploads import STATE, UploadedCheckpoints

LATE = 1.5  # seconds, in which the other process has written its shards


def main() -> None:
    processes.start()
    if processes.is_main():
        look = signaling_client.JaxDistributedSignalingClient.blocking_key_value_get

        def later(*args: Any, **kwargs: Any) -> str:
            time.sleep(LATE)
            return look(*args, **kwargs)

        signaling_client.JaxDistributedSignalingClient.blocking_key_value_get = later
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows = np.arange(4 * jax.device_count(), dtype=np.float32)
    state = {"rows": sharding.put_global(rows, split)}
    checkpoints = UploadedCheckpoints(buckets.place(sys.argv[1]), policies.LatestN(n=2))
    for step in (1, 2, 3):
        checkpoints.save(step, ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)}))
    checkpoints.wait_until_finished()
    assert checkpoints.all_steps() == [2, 3], checkpoints.all_steps()
    shape = {"rows": jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=split)}
    restored = checkpoints.restore(3, ocp.args.Composite(**{STATE: ocp.args.StandardRestore(shape)}))[STATE]["rows"]
    for shard in restored.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    checkpoints.close()
    print("whole")


if __name__ == "__main__":
    main()
