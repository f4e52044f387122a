"""Networks with integer kernels compute what the same networks compute with the kernels that these stand for."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from helpers import compiling
from helpers.network import SMALL, random_params
from helpers.places import PROGRAMS, ROOT
from helpers.quantized import CFG, NONE, run
from virst_jax.config import PARTS, quantized, virst_7b, weights_of
from virst_jax.errors import UserError
from virst_jax.models.quantized import dequantize_params, quantize_params
from virst_jax.models.tree import flatten
from virst_jax.parallel import sharding


@pytest.fixture(scope="module", params=["int8", "int4"])
def case(request):
    cfg = quantized(CFG, request.param, PARTS)
    return cfg, quantize_params(cfg, random_params(CFG))


@pytest.mark.parametrize("part", PARTS)
def test_equal_to_the_network_with_dequantized_kernels(case, part):
    cfg, params = case
    found = run(cfg, part, params)
    expected = run(CFG, part, dequantize_params(cfg, params))
    # int8 scales the sums, not the kernel: all differences are float32's, which a dozen products in a row pass on
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(abs(expected).max()))
    assert abs(run(CFG, part, random_params(CFG)) - expected).max() > 1e-3  # and it was rounded


def test_config_and_parameters(case):
    cfg, params = case
    kind = cfg.llm.weights
    assert weights_of(cfg) == {"llm": kind, "vision": kind, "hiera": "int8"}
    flat = flatten(params)
    assert {str(flat[f"{name}/kernel"].dtype) for name in ("llm/layers/attn/q_proj", "vision/layers/fc1")} == {kind}
    assert str(flat["llm/lm_head/kernel"].dtype) == "int8"
    assert str(flat["projector/fc1/kernel"].dtype) == "float32"
    with pytest.raises(UserError, match="is quantized already"):
        quantized(cfg, "int8", ["llm"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", ["llm"]), "cannot quantize to 'int3': choose int8 or int4"),
        (("int8", ["llm", "head"]), "parts to quantize 'llm, head': choose some of llm,vision,hiera"),
    ],
)
def test_what_cannot_be_quantized(arguments, message):
    with pytest.raises(UserError, match=message):
        quantized(CFG, *arguments)
    with pytest.raises(UserError, match="has adapters of rank 2: merge them first"):
        quantized(SMALL, "int8", ["llm"])


def mesh_of(fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((1, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def specs_of(mesh, kind) -> dict[str, PartitionSpec]:
    cfg = quantized(dataclasses.replace(virst_7b(), llm=dataclasses.replace(virst_7b().llm, lora=NONE)), kind, PARTS)
    return flatten(sharding.parameter_specs(cfg, mesh))


def test_integers_and_scales_are_split_alike():
    """Columns over tensor, input rows, which int4 holds as groups, over fsdp; a scale of one axis is small."""
    gate = "llm/layers/mlp/gate_proj"
    specs = specs_of(mesh_of(4, 2), "int4")
    assert specs[f"{gate}/kernel"] == PartitionSpec(None, "fsdp", None, "tensor")
    assert specs[f"{gate}/kernel_scale"] == PartitionSpec(None, "fsdp", "tensor")
    specs = specs_of(mesh_of(4, 2), "int8")
    assert specs[f"{gate}/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs[f"{gate}/kernel_scale"] == PartitionSpec()


@pytest.mark.heavy
def test_split_over_two_devices():
    environment = {**os.environ, "XLA_FLAGS": compiling.flags(2), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(PROGRAMS / "quantized_mesh.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["int8", "fsdp", "int8", "tensor", "int4", "fsdp", "int4", "tensor"]
