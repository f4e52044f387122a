"""Sources by name, as recipes give them."""

from typing import Any

from virst_jax.data.samples import Source
from virst_jax.errors import UserError


def make_source(name: str, batch_kind: str, **arguments: Any) -> Source:
    """A source of samples for a kind of batch (see batches.KINDS).

    Args:
      name: "synthetic", or a data set's name in datasets.registry.
      arguments: of SyntheticVideos or SyntheticQuestions; or `root` and `split` (train) of the data set, as its authors
        lay it out or built.

    Raises:
      UserError: an unknown name or argument, or data that cannot be read.
    """
    try:
        if name == "synthetic":
            from virst_jax.data.synthetic.videos import SyntheticQuestions, SyntheticVideos

            kind = SyntheticQuestions if batch_kind.endswith("_text") else SyntheticVideos
            return kind(is_image=batch_kind.startswith("image"), **arguments)
        from virst_jax.data.builders.builder import open_source

        return open_source(name, **{"split": "train", **arguments})
    except TypeError as error:
        raise UserError(f"source {name!r}: {error}; see its arguments in the documentation of the data") from error
