"""Flags of XLA that recipes carry."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from helpers.places import ROOT
from virst_jax.commands import config_file
from virst_jax.errors import UserError
from virst_jax.parallel import compiler_flags
from virst_jax.parallel.compiler_flags import apply
from virst_jax.training import recipe

FLAGS = {"tpu": {"xla_a": True, "xla_b": 3, "xla_c": None}, "gpu": {"xla_gpu_d": "x"}}


@pytest.fixture
def fresh(monkeypatch):
    """A process in which JAX has no devices yet, with the plugins that a test names."""
    monkeypatch.setattr(compiler_flags.xla_bridge, "backends_are_initialized", lambda: False)

    def with_plugins(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in names or None)

    return with_plugins


def test_flags_of_what_is_installed_are_added(fresh):
    fresh("libtpu")
    environment = {"LIBTPU_INIT_ARGS": "--xla_b=7 --other"}
    assert apply(FLAGS, environment) == ["LIBTPU_INIT_ARGS: --xla_a=true"]
    assert environment == {"LIBTPU_INIT_ARGS": "--xla_b=7 --other --xla_a=true"}  # the environment's stays
    fresh("libtpu", "jax_cuda12_plugin")
    environment = {}
    assert apply(FLAGS, environment) == ["LIBTPU_INIT_ARGS: --xla_a=true --xla_b=3", "XLA_FLAGS: --xla_gpu_d=x"]
    environment = {"JAX_PLATFORMS": "cuda"}
    assert apply(FLAGS, environment) == ["XLA_FLAGS: --xla_gpu_d=x"]
    fresh()
    assert apply(FLAGS, {}) == []


def test_flags_come_too_late_or_for_nothing(fresh, monkeypatch):
    fresh("libtpu")
    with pytest.raises(UserError, match="unknown platform 'npu'; give tpu or gpu"):
        apply({"npu": {}}, {})
    jax.devices()
    monkeypatch.setattr(compiler_flags.xla_bridge, "backends_are_initialized", lambda: True)
    assert apply(FLAGS, {}) == []


def test_recipes_carry_flags_that_xla_knows():
    """XLA ends a process that names a flag it does not know; those of GPUs are known to every build."""
    config = config_file.load("stage2", ["--config.xla_flags.gpu.xla_gpu_enable_pipelined_all_gather=False"])
    flags = compiler_flags.as_text(config.xla_flags.gpu)
    assert flags["xla_gpu_enable_pipelined_all_gather"] == "false"
    assert flags["xla_gpu_enable_latency_hiding_scheduler"] == "true"
    options = compiler_flags.as_options(recipe.plain(config.xla_flags.gpu), compiler_flags.GPU)
    assert jax.jit(lambda x: x + 1).lower(1).compile(compiler_options=options)(1) == 2
    environment = {**os.environ, "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items())}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_flag_that_recipes_leave_to_the_compiler_can_be_given():
    name = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
    assert name not in compiler_flags.as_text(recipe.plain(config_file.load("stage1", []).xla_flags)["tpu"])
    given = config_file.load("stage1", [f"--config.xla_flags.tpu.{name}=1000000"])
    assert compiler_flags.as_text(recipe.plain(given.xla_flags)["tpu"])[name] == "1000000"


@pytest.mark.parametrize(
    ("kind", "version", "warned"),
    [
        ("TPU v6 lite", "0.0.42.1", True),
        ("TPU v6e", "0.0.45", False),
        ("TPU v6 lite", "0.0.52", False),
        ("TPU v5 lite", "0.0.42", False),
        ("cpu", "0.0.42", False),
    ],
)
def test_a_compiler_that_crashes_is_named_before_it_does(kind, version, warned):
    line = compiler_flags.known_fault(kind, version)
    assert bool(line) == warned
    assert not warned or line.endswith("run pip install 'libtpu>=0.0.45'")
