"""Names for types that many modules state."""

from collections.abc import Mapping
from typing import Any, TypeAlias

PyTree: TypeAlias = Any  # nested containers of arrays, of their shapes or of their shardings; not checked further
Params: TypeAlias = Mapping[str, PyTree]  # parameters of a Flax module, nested by module names
