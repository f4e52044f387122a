"""Loads a model after JAX has compiled something, compiles more, and prints where compiled programs are kept.

compilation_cache.py MODEL (True|False|FOLDER)
"""

import sys

import jax

import virst_jax

folder, given = sys.argv[1:]
jax.jit(lambda x: x + 1)(1.0)  # JAX has looked at its settings
virst_jax.load(folder, compilation_cache={"True": True, "False": False}.get(given, given))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3)(1.0)
print(jax.config.values["jax_compilation_cache_dir"])
