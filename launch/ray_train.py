"""Training on TPU hosts of a Ray cluster (KubeRay on GKE), one worker a host.

    python launch/ray_train.py --topology 4x4 --accelerator TPU-V5E --workers 4 -- \\
      --config=stage3 --workdir=/shared/runs/a

What stands behind `--` are the arguments of `virst train`. Ray places the workers on the hosts of one slice and joins
their JAX processes, so `--config.distributed` stays off. All hosts must see /shared. A failed run is started again, and
goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence

MAX_FAILURES = 100  # preemptions included


def work(config: dict[str, Sequence[str]]) -> None:
    """What every worker runs; Ray has joined the processes already.

    Raises:
      RuntimeError: the training stopped before its end; Ray starts it again.
    """
    from virst_jax.cli import main

    status = main(["train", *config["arguments"]])
    if status != 0:
        raise RuntimeError(f"virst train ended with status {status}")


def options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="of the slice, such as 4x4")
    parser.add_argument("--accelerator", required=True, help="as Ray names it, such as TPU-V5E")
    parser.add_argument("--workers", type=int, required=True, help="hosts of the slice")
    parser.add_argument("arguments", nargs="+", help="of virst train, behind --")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    chosen = options(given)
    JaxTrainer(
        train_loop_per_worker=work,
        train_loop_config={"arguments": chosen.arguments},
        scaling_config=ScalingConfig(
            use_tpu=True,
            num_workers=chosen.workers,
            topology=chosen.topology,
            accelerator_type=chosen.accelerator,
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=MAX_FAILURES)),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
