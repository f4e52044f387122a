"""train.py on several processes: the curve of one, stopping at any moment, going on with another number of them.

All runs have two devices in all, so the mesh is the same.
"""

import json
import random
import signal
import time

import jax
import numpy as np
import pytest

from helpers.process_cases import Group
from helpers.train_cases import SMALL, command, losses
from virst_jax.api import EMBEDDED
from virst_jax.config import override, tiny
from virst_jax.io import model_folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder to start from: quicker than to compile the drawing of random parameters."""
    cfg = override(tiny(), SMALL, "overrides")
    rng = np.random.default_rng(0)
    shapes = model_folder.parameter_shapes(cfg)
    params = jax.tree.map(lambda x: np.asarray(0.05 * rng.standard_normal(x.shape), np.float32), shapes)
    folder = tmp_path_factory.mktemp("start") / "model"
    model_folder.save_model(folder, cfg, params, EMBEDDED["tiny"] / model_folder.TOKENIZER)
    return folder


def training(workdir, start, count, *flags, kind="image_text", steps=6):
    """`count` processes with two devices together."""
    flags = (*flags, f"--config.model.init={start}", f"--config.stage.steps={steps}")
    flags += ("--config.distributed=True",) if count > 1 else ()
    arguments = command(workdir, *flags, config=f"tests/helpers/train_cases.py:{kind}")[1:]
    logs = workdir.with_name(f"{workdir.name}_logs_{time.monotonic_ns()}")
    cache = str(start.parent / f"compiled_{count}")
    return Group(logs, count, arguments, devices=2 // count, JAX_COMPILATION_CACHE_DIR=cache)


def complete(workdir, start, count, *flags, **kwargs):
    with training(workdir, start, count, *flags, **kwargs) as group:
        assert group.wait(900) == [0] * count, "\n".join(map(group.output, range(count)))
    assert model_folder.is_whole(workdir / "stage" / "model")


@pytest.fixture(scope="module")
def one(tmp_path_factory, start):
    workdir = tmp_path_factory.mktemp("one") / "run"
    complete(workdir, start, 1, steps=40)
    return losses(workdir)


def same_curve(found, expected):
    assert list(found) == list(expected)
    for step, loss in expected.items():
        assert float(found[step]) == pytest.approx(float(loss), rel=2e-4), step


def checkpoints(workdir):
    folder = workdir / "stage" / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


@pytest.mark.heavy
def test_two_processes_have_the_curve_of_one_through_stops(one, start, tmp_path):
    """SIGTERM to one, then to both; each time with another number of processes."""
    workdir, stops = tmp_path / "run", []
    for count, targets in ((2, [1]), (1, [0]), (2, [0, 1])):
        with training(workdir, start, count, steps=40) as group:
            begin = (checkpoints(workdir) or [0])[-1]
            group.until(lambda begin=begin: (checkpoints(workdir) or [0])[-1] > begin, seconds=600)
            for index in targets:
                group.processes[index].send_signal(signal.SIGTERM)
                time.sleep(random.random() / 10)
            assert group.wait(300) == [130] * count, "\n".join(map(group.output, range(count)))
            stops.append(checkpoints(workdir)[-1])
            assert all("interrupted; run the same command" in group.output(i) for i in range(count))
    assert stops == sorted(set(stops))
    complete(workdir, start, 2, steps=40)
    same_curve(losses(workdir), one)


@pytest.mark.heavy
def test_a_stop_during_an_evaluation(start, tmp_path):
    """There is a checkpoint already; the next run, of one process, does the evaluation again and ends the stage."""
    flags = ("--config.eval.videos=2", "--config.eval.source.num_videos=2")
    workdir = tmp_path / "run"
    with training(workdir, start, 2, *flags, kind="image", steps=2) as group:
        group.until(lambda: checkpoints(workdir) == [2], seconds=900)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.wait(300) == [130, 130], "\n".join(map(group.output, range(2)))
    assert not (workdir / "stage" / "checkpoints" / "2" / "metrics").exists()
    complete(workdir, start, 1, *flags, kind="image", steps=2)
    assert (workdir / "stage" / "checkpoints" / "2" / "metrics").is_dir()
    assert "eval/j_and_f" in (workdir / "stage" / "metrics.csv").read_text()


@pytest.mark.heavy
def test_two_processes_evaluate(start, tmp_path):
    """With parameters that are spread over both, and the score of one process."""
    flags = ("--config.eval.videos=1", "--config.mesh.data=1", "--config.mesh.fsdp=2")
    scores = []
    for count in (1, 2):
        workdir = tmp_path / f"run_{count}"
        complete(workdir, start, count, *flags, kind="image", steps=1)
        text = (workdir / "stage" / "checkpoints" / "1" / "metrics" / "metrics").read_text()
        scores.append(json.loads(text)["j_and_f"])
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
