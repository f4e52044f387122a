"""Writes the small model that comes with the package to a folder, as training does at its end: export.py FOLDER [DIE]

With DIE that process kills itself once the parameters are written.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from virst_jax.api import EMBEDDED
from virst_jax.io import buckets, model_folder
from virst_jax.parallel import processes, sharding

processes.start()
with processes.together():
    start, folder = EMBEDDED["tiny"], buckets.place(sys.argv[1])
    mesh = sharding.make_mesh(fsdp=-1, data=1)
    cfg = model_folder.read_config(start)
    _, params = model_folder.load_model(start, shardings=sharding.parameter_shardings(cfg, mesh, replicate_below=0))
    assert not params["llm"]["embed_tokens"]["embedding"].is_fully_addressable
    if sys.argv[2:] == [str(jax.process_index())]:
        model_folder.copy_tokenizer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write = model_folder.write_parameters
        if jax.process_index():

            def write_and_die(path: Path, params: Mapping[str, Any], **options: Any) -> None:
                write(path, params, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            model_folder.write_parameters = write_and_die
    model_folder.save_model(folder, cfg, params, start / model_folder.TOKENIZER)
    assert model_folder.read_config(folder) == cfg
    print("exported", flush=True)
    processes.barrier("end")
