"""What a server takes from those who use it, and the error that says so."""

from dataclasses import dataclass

from virst_jax.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds on what one user can ask for, and on all users together."""

    upload_bytes: int = 512 << 20
    body_bytes: int = 64 << 10  # of everything that is no upload
    mask_bytes: int = 8 << 20  # of an image of a mask
    frames: int = 600  # of a video, those that are passed over left out
    pixels: int = 3840 * 2160  # of a frame
    every: int = 60  # the largest step from frame to frame
    objects: int = 16  # of a session
    sentences: int = 8  # of a request
    sentence_length: int = 500
    question_length: int = 2000
    clicks: int = 64  # of a request, and on a frame
    sessions: int = 8
    uploads: int = 4  # that arrive at the same time
    waiting: int = 32  # jobs in a queue
    waiting_each: int = 8  # of a session
    idle_seconds: float = 1800.0  # before a session is deleted
    spare_seconds: float = 300.0  # before one is deleted because another is to begin and there is no room
    outcome_bytes: int = 3 << 30  # of a session's tracked frames, in the host's memory
    undo_bytes: int = 1 << 30  # that only undo needs
    feature_bytes: int = 2 << 30  # of all sessions' frames, in the device's memory


class Refusal(UserError):
    """What was asked for is not there, not allowed, or not now.

    Attributes:
      status: of HTTP.
    """

    def __init__(self, message: object, status: int):
        super().__init__(message)
        self.status = status


def status_of(error: UserError) -> int:
    """The HTTP status of bad input."""
    return error.status if isinstance(error, Refusal) else 400
