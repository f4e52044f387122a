"""What requests bring and answers hold, as OpenAPI describes it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sentences(Request):
    sentences: list[str] = Field(min_length=1, examples=[["the cyan cross", "the shape that stays still"]])


class Points(Request):
    """Clicks on an object or beside it, a box around it, or both, in pixels of the video."""

    object_id: int | None = Field(None, description="an object that is there; null: a new one")
    frame: int = Field(description="number of the frame, counted from 0")
    points: list[tuple[Number, Number]] = Field([], description="(x, y), counted from 0 at the top left")
    labels: list[Literal[0, 1]] | None = Field(
        None, description="1 for a point on the object, 0 for one beside it; null: all are on it"
    )
    box: tuple[Number, Number, Number, Number] | None = Field(None, description="left, top, right, bottom")
    replace: bool = Field(False, description="forget what was given for this object on this frame before")


class Propagation(Request):
    start: int | None = Field(None, description="the frame to begin at; null: the first prompted one")
    direction: Literal["forward", "backward", "both"] = "both"


class Question(Request):
    question: str = Field(min_length=1)


class Error(BaseModel):
    error: str = Field(description="one line: what is wrong, and how to mend it")


class JobStatus(BaseModel):
    job_id: str
    session_id: str
    kind: str = Field(description="read, segment, sentences, points, mask, clear, remove, propagate, undo or chat")
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int = Field(description="how many jobs are before it in the queue")
    stage: str = Field(description="what is at work")
    done: int
    total: int = Field(description="of the stage; 0: unknown")
    error: str = Field(description="why it has failed or was cancelled")
    objects: list[int] = Field([], description="the objects that it has begun or changed")
    answer: str | None = Field(None, description="of a question")
    version: int = Field(description="of the session's masks")


class Prompt(BaseModel):
    frame: int
    kind: Literal["points", "mask", "sentence"]
    points: list[tuple[float, float]] = []
    labels: list[int] = []
    box: tuple[float, float, float, float] | None = None


class FoundObject(BaseModel):
    object_id: int
    label: str
    color: str = Field(description="as #rrggbb")
    prompts: list[Prompt]
    scores: list[float | None] = Field(description="by frame: a logit, above 0 where it is there; null: not tracked")


class SessionState(BaseModel):
    session_id: str
    name: str
    exclusive: bool = Field(description="masks of different objects do not overlap")
    ready: bool = Field(description="the video is read")
    num_frames: int
    width: int
    height: int
    fps: float = Field(description="0: unknown")
    times: list[float] | None = Field(description="of the frames, in seconds")
    version: int = Field(description="of the masks; it grows with every change")
    num_undo: int = Field(description="changes that can be taken back")
    objects: list[FoundObject]
    history: list[tuple[str, str]] = Field(description="questions and answers")
    jobs: list[str] = Field(description="those that wait or are at work")


class Masks(BaseModel):
    version: int
    width: int
    height: int
    frames: dict[int, dict[int, str]] = Field(
        description="by frame, by object: run lengths as COCO compresses them, down the columns"
    )


class ServerInfo(BaseModel):
    version: str
    model: str
    reads_text: bool
    answers: bool = Field(description="whether it answers questions")
    notes: list[str]
    formats: list[str]
    sample_sentences: list[str]
    max_upload_bytes: int
    max_frames: int
    max_pixels: int
    max_objects: int
    max_sentences: int
    idle_minutes: float
