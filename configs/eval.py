"""Evaluation of a model on a benchmark.

Command:   python eval.py --config=configs/eval.py --config.model=MODEL --config.dataset=NAME --config.data_root=DIR
           --workdir=DIR
Hardware:  whatever the model runs on; several processes may share one workdir, see docs/evaluation.md
Cost:      the model's; scores of a 480p frame take about a millisecond of one CPU core
Score:     of the released 7B checkpoint by the paper, J&F: ReVOS 68.4, MeViS valid 62.9, Ref-YouTube-VOS 74.2,
           Ref-DAVIS17 79.5
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "tiny"  # a model folder, or the name of an embedded model
    config.dataset = ""  # a name of virst_jax.data.datasets.registry
    config.data_root = ""  # the data set's folder, or the one above it
    config.split = ""  # empty: the one that is scored by default

    # what the masks depend on
    config.seed = 0  # with the video's name: which frames are sampled, which words surround the expression
    config.exact = False  # segmentation frames encoded twice, as the release does
    config.dtype = ""  # float32 or bfloat16; empty: the model's choice
    config.predictor = "model"  # or "truth" or "empty", which need no model and show what a perfect or no answer scores
    config.limit = 0  # only so many videos, the first by name; 0: all

    # what they do not depend on
    config.process_index = 0  # this process's number ...
    config.process_count = 1  # ... among those that share the work and the workdir
    config.distributed = False  # take both numbers from jax.distributed
    config.workers = 0  # processes that score while the model works
    config.png = False  # write the masks as PNGs as well
    config.worst = 20  # cases on the page of the worst
    config.overwrite = False  # replace results of other settings
    config.progress = True
    return config
