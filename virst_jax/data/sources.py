"""Sources by name, as recipes give them."""

from typing import Any

from virst_jax.data.samples import Source
from virst_jax.errors import UserError


def make_source(name: str, *, is_image: bool = False, questions: bool = False, **arguments: Any) -> Source:
    """A source of samples.

    Args:
      name: "synthetic", or a data set's name in datasets.registry.
      is_image, questions: whether synthetic samples are still images, and Questions; other data sets decide that
        themselves.
      arguments: of SyntheticVideos or SyntheticQuestions; or `root` and `split` (train) of the data set, as its authors
        lay it out or built.

    Raises:
      UserError: an unknown name or argument, or data that cannot be read.
    """
    try:
        if name == "synthetic":
            from virst_jax.data.synthetic.videos import SyntheticQuestions, SyntheticVideos

            kind = SyntheticQuestions if questions else SyntheticVideos
            return kind(is_image=is_image, **arguments)
        from virst_jax.data.builders.builder import open_source

        return open_source(name, **{"split": "train", **arguments})
    except TypeError as error:
        raise UserError(f"source {name!r}: {error}; see its arguments in the documentation of the data") from error
