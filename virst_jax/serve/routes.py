"""The HTTP interface: a request each for what a session can do, and jobs to wait for."""

import asyncio
import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from virst_jax.errors import UserError
from virst_jax.inference.prompts import check_clicks, check_mask
from virst_jax.io import images, small_model
from virst_jax.io.mask_images import read_binary
from virst_jax.serve import schema
from virst_jax.serve.arrival import receive_form, receive_mask
from virst_jax.serve.jobs import Job
from virst_jax.serve.limits import Refusal
from virst_jax.serve.results import ALL, FORMATS, color_of, write_zip
from virst_jax.serve.served_session import ServedSession, prompts_of
from virst_jax.serve.service import Service
from virst_jax.serve.video_upload import Upload, file_name

MAX_WAIT = 30.0  # seconds that an answer may be held back
POLL_SECONDS = 0.02
MASK_FRAMES = 64  # of one answer
EXPORTS = 2  # that are written at the same time
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT, description="seconds to wait for the job to end")]
Format = Annotated[str, Query(description=f"one of {', '.join((*FORMATS, ALL))}")]

_FILE = {"type": "string", "format": "binary", "description": "a video file or an image"}
_VIDEO_FIELDS: dict[str, Any] = {
    "video": _FILE,
    "every": {"type": "integer", "default": 1, "description": "take every k-th frame"},
    "allow_damaged": {"type": "boolean", "default": False, "description": "go on with a damaged video"},
    "exclusive": {"type": "boolean", "default": False, "description": "masks of different objects do not overlap"},
}
_SENTENCES = {"type": "array", "items": {"type": "string"}, "description": "what to segment, in words; one or several"}


_MASK_FIELDS: dict[str, Any] = {
    "mask": {
        "type": "string",
        "format": "binary",
        "description": "an image of the video's size, such as a PNG file: 0 and 255, or 0 and 1; an empty one says "
        "that the object is not on this frame",
    },
    "frame": {"type": "integer", "description": "number of the frame, counted from 0"},
    "object_id": {"type": "integer", "description": "an object that is there; left out: a new one"},
}


def _form(required: list[str], **fields: Any) -> dict[str, Any]:
    return _form_of({**_VIDEO_FIELDS, **fields}, required)


def _form_of(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    content = {"type": "object", "properties": fields, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": content}}}}


def make_router(service: Service) -> APIRouter:
    """All routes of a service."""
    errors: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": schema.Error, "description": "bad input, or something that is not there"},
        "5XX": {"model": schema.Error, "description": "the server is full, or it failed"},
    }
    router = APIRouter(responses=errors)
    _add_server(router, service)
    _add_jobs(router, service)
    _add_sessions(router, service)
    _add_changes(router, service)
    return router


def _add_server(router: APIRouter, service: Service) -> None:
    @router.get("/server", tags=["server"])
    async def server() -> schema.ServerInfo:
        """What the model can do, and what the server takes."""
        limits = service.limits
        sample = small_model.EXPRESSIONS if service.reads_text else ()
        return schema.ServerInfo(
            version=importlib.metadata.version("virst-jax"),
            model=Path(service.model.name).name or service.model.name,
            reads_text=service.reads_text,
            answers=service.answers,
            notes=list(service.notes),
            formats=[*FORMATS, ALL],
            sample_sentences=list(sample),
            max_upload_bytes=limits.upload_bytes,
            max_frames=limits.frames,
            max_pixels=limits.pixels,
            max_objects=limits.objects,
            max_sentences=limits.sentences,
            idle_minutes=limits.idle_seconds / 60,
        )


def _add_jobs(router: APIRouter, service: Service) -> None:
    jobs = service.registry.jobs

    @router.post(
        "/segment", status_code=202, tags=["segment"], openapi_extra=_form(["video", "sentence"], sentence=_SENTENCES)
    )
    async def segment(request: Request) -> schema.JobStatus:
        """Uploads a video and segments what sentences describe. Ask for its job until that is done, then for masks."""
        return _status(service, await _receive(request, service, with_sentences=True))

    @router.get("/jobs/{job_id}", tags=["segment"])
    async def job_status(job_id: str, wait: Wait = 0.0) -> schema.JobStatus:
        """How far a job is."""
        job = jobs.get(job_id)
        await _wait(job, wait)
        _touch(service, job)
        return _status(service, job)

    @router.delete("/jobs/{job_id}", tags=["segment"])
    async def cancel(job_id: str, wait: Wait = 0.0) -> schema.JobStatus:
        """Cancels a job. Frames that were tracked are kept."""
        job = jobs.get(job_id)
        if job.finished:
            raise Refusal(f"the job is {job.state} already", 409)
        service.cancel(job)
        await _wait(job, wait)
        return _status(service, job)

    @router.get("/jobs/{job_id}/result", tags=["segment"], response_class=FileResponse)
    async def result(job_id: str, format: Format = "coco") -> FileResponse:
        """The masks of a job's session as a zip."""
        job = jobs.get(job_id)
        if job.state != "done":
            why = f": {job.error}" if job.error else ""
            raise Refusal(f"the job is {job.state}{why}; there is no result", 409)
        return await exported(job.session_id, format)

    @router.get("/sessions/{session_id}/export", tags=["sessions"], response_class=FileResponse)
    async def export(session_id: str, format: Format = "coco") -> FileResponse:
        """The masks as a zip."""
        return await exported(session_id, format)

    limiter = anyio.CapacityLimiter(EXPORTS)

    async def exported(session_id: str, kind: str) -> FileResponse:
        session = service.registry.get(session_id)
        file = await anyio.to_thread.run_sync(write_zip, session, session.view, kind, limiter=limiter)
        session.touch()
        return FileResponse(
            file,
            media_type="application/zip",
            filename=f"{session.upload.stem}-{kind}.zip",
            background=BackgroundTask(shutil.rmtree, file.parent, ignore_errors=True),
        )


def _add_sessions(router: APIRouter, service: Service) -> None:
    get = service.registry.get
    sample = {"type": "boolean", "default": False, "description": "take the sample clip, without a video"}

    @router.post("/sessions", status_code=202, tags=["sessions"], openapi_extra=_form([], sample=sample))
    async def open_session(request: Request) -> schema.JobStatus:
        """Uploads a video, or takes the sample clip. The session can be used when its job is done."""
        return _status(service, await _receive(request, service, with_sentences=False))

    @router.get("/sessions/{session_id}", tags=["sessions"])
    async def state(session_id: str) -> schema.SessionState:
        """The video, its objects with their prompts and scores, and the conversation."""
        return _state(service, get(session_id))

    @router.delete("/sessions/{session_id}", status_code=204, tags=["sessions"])
    async def delete(session_id: str) -> Response:
        """Ends a session and deletes its files."""
        get(session_id)
        await anyio.to_thread.run_sync(service.registry.delete, session_id)
        return Response(status_code=204)

    @router.get("/sessions/{session_id}/frames/{frame}", tags=["sessions"], response_class=FileResponse)
    async def frame_image(session_id: str, frame: int) -> FileResponse:
        """A frame as JPEG, made smaller if it is large."""
        session = get(session_id)
        path = session.upload.frame_path(session.check_frame(frame))
        return FileResponse(path, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    @router.get("/sessions/{session_id}/masks", tags=["sessions"])
    async def masks(
        session_id: str,
        first: int = 0,
        count: Annotated[int, Query(ge=1, le=MASK_FRAMES)] = MASK_FRAMES,
    ) -> schema.Masks:
        """Masks of consecutive frames."""
        session = get(session_id)
        view, (height, width) = session.view, session.ready.size
        numbers = range(session.check_frame(first), min(first + count, session.num_frames))
        frames = {n: {k: x.counts for k, x in view.frames[n].items()} for n in numbers if n in view.frames}
        return schema.Masks(version=view.version, width=width, height=height, frames=frames)


def _add_changes(router: APIRouter, service: Service) -> None:
    get, model = service.registry.get, service.model

    async def run(
        session: ServedSession, kind: str, wait: float, response: Response, work: Callable[[Job], dict[str, Any]]
    ) -> schema.JobStatus:
        """Submits work; if it ends while the answer waits, its error is that of the answer."""
        job = service.submit(session, kind, work)
        if not await _wait(job, wait):
            response.status_code = 202
        elif job.state == "failed":
            raise Refusal(job.error, job.status)
        return _status(service, job)

    @router.post("/sessions/{session_id}/sentences", tags=["objects"])
    async def sentences(
        session_id: str, body: schema.Sentences, response: Response, wait: Wait = 0.0
    ) -> schema.JobStatus:
        """Begins an object by each sentence, and tracks all objects through the video."""
        session, texts = get(session_id), service.check_sentences(body.sentences)
        return await run(session, "sentences", wait, response, lambda job: session.add_text(model, texts, job))

    @router.post("/sessions/{session_id}/points", tags=["objects"])
    async def points(session_id: str, body: schema.Points, response: Response, wait: Wait = 0.0) -> schema.JobStatus:
        """Begins an object by clicks or a box on any frame, or corrects one. Propagate behind it."""
        session = get(session_id)
        frame = session.check_frame(body.frame)
        if len(body.points) > service.limits.clicks:
            raise Refusal(f"{len(body.points)} clicks; {service.limits.clicks} can be given at a time", 400)
        labels = [1] * len(body.points) if body.labels is None else list(body.labels)
        check_clicks(session.ready.size, body.points, labels, body.box)
        number = session.new_object() if body.object_id is None else session.check_object(body.object_id)

        def work(job: Job) -> dict[str, Any]:
            return session.add_points(model, number, frame, body.points, labels, body.box, body.replace, job)

        status = await run(session, "points", wait, response, work)
        return status.model_copy(update={"objects": [number]})

    @router.post(
        "/sessions/{session_id}/masks", tags=["objects"], openapi_extra=_form_of(_MASK_FIELDS, ["mask", "frame"])
    )
    async def mask(session_id: str, request: Request, response: Response, wait: Wait = 0.0) -> schema.JobStatus:
        """Begins an object by its mask on any frame, or corrects one. Propagate behind it."""
        session = get(session_id)
        size = session.ready.size
        form = await receive_mask(request)
        frame = session.check_frame(form.frame)
        given = await anyio.to_thread.run_sync(_read_mask, form.content, size)
        number = session.new_object() if form.object_id is None else session.check_object(form.object_id)

        def work(job: Job) -> dict[str, Any]:
            return session.add_mask(model, number, frame, given, job)

        status = await run(session, "mask", wait, response, work)
        return status.model_copy(update={"objects": [number]})

    @router.delete("/sessions/{session_id}/objects/{object_id}/prompts/{frame}", tags=["objects"])
    async def clear(
        session_id: str, object_id: int, frame: int, response: Response, wait: Wait = 0.0
    ) -> schema.JobStatus:
        """Forgets what was given for an object on a frame."""
        session = get(session_id)
        session.check_object(object_id)
        session.check_frame(frame)
        return await run(session, "clear", wait, response, lambda job: session.clear(model, object_id, frame, job))

    @router.delete("/sessions/{session_id}/objects/{object_id}", tags=["objects"])
    async def remove(session_id: str, object_id: int, response: Response, wait: Wait = 0.0) -> schema.JobStatus:
        """Removes an object."""
        session = get(session_id)
        session.check_object(object_id)
        return await run(session, "remove", wait, response, lambda job: session.remove(model, object_id, job))

    @router.post("/sessions/{session_id}/propagate", tags=["objects"])
    async def propagate(
        session_id: str, body: schema.Propagation, response: Response, wait: Wait = 0.0
    ) -> schema.JobStatus:
        """Tracks all objects through the video from their prompts."""
        session = get(session_id)
        if body.start is not None:
            session.check_frame(body.start)
        start, way = body.start, body.direction
        return await run(session, "propagate", wait, response, lambda job: session.propagate(model, start, way, job))

    @router.post("/sessions/{session_id}/undo", tags=["objects"])
    async def undo(session_id: str, response: Response, wait: Wait = 0.0) -> schema.JobStatus:
        """Takes back the last change: sentences, clicks, a removal or a propagation."""
        session = get(session_id)
        return await run(session, "undo", wait, response, session.undo)

    @router.post("/sessions/{session_id}/chat", tags=["chat"])
    async def chat(session_id: str, body: schema.Question, response: Response, wait: Wait = 0.0) -> schema.JobStatus:
        """Asks a question about the video; earlier questions and answers are remembered."""
        session = get(session_id)
        if len(body.question) > service.limits.question_length:
            raise Refusal(f"the question has more than {service.limits.question_length} characters", 400)
        return await run(session, "chat", wait, response, lambda job: session.chat(model, body.question, job))


async def _receive(request: Request, service: Service, *, with_sentences: bool) -> Job:
    """Stores an upload and begins to read it."""
    with service.registry.room() as folder:
        form = await receive_form(request, folder, file_name, service.limits)
        if with_sentences:
            sentences = service.check_sentences(form.sentences)
            if not sentences:
                raise UserError("no sentence was given; add one as the form's field 'sentence'")
        else:
            sentences = []
        if form.path is None and form.sample and not with_sentences:
            path, name = folder / small_model.CLIP.name, small_model.CLIP.name
            shutil.copyfile(small_model.CLIP, path)
        elif form.path is None:
            raise UserError("no video was given; send it as the form's field 'video'")
        else:
            path, name = form.path, form.name
        upload = Upload(folder, path, name, form.every, form.allow_damaged)
        session = service.registry.add(ServedSession(upload, service.limits, exclusive=form.exclusive))
        try:
            return service.read(session, sentences)
        except BaseException:
            service.registry.delete(session.id)
            raise


def _read_mask(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """The mask bool[H, W] of an image; one of another size is not even decoded.

    Raises:
      UserError: no image, one that shows no mask, or one of another size than the video.
    """
    name, remedy = "the mask", "send an image, such as a PNG file"
    check_mask(size, np.broadcast_to(False, images.read_size(content, name=name, upright=False, remedy=remedy)))
    return read_binary(content, name=name, remedy=remedy)


async def _wait(job: Job, seconds: float) -> bool:
    """Waits until a job is finished, at most so long, and gives whether it is."""
    end = asyncio.get_running_loop().time() + seconds
    while not job.finished and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(POLL_SECONDS)
    return job.finished


def _touch(service: Service, job: Job) -> None:
    """Whoever asks for a job uses its session."""
    service.registry.get(job.session_id)


def _status(service: Service, job: Job) -> schema.JobStatus:
    session = service.registry.get(job.session_id)
    return schema.JobStatus(
        job_id=job.id,
        session_id=job.session_id,
        kind=job.kind,
        state=job.state,
        position=service.position(job),
        stage=job.stage,
        done=job.done,
        total=job.total,
        error=job.error,
        objects=job.result.get("objects", []),
        answer=job.result.get("answer"),
        version=session.view.version,
    )


def _state(service: Service, session: ServedSession) -> schema.SessionState:
    view, reader = session.view, session.reader
    count = 0 if reader is None else reader.num_frames
    objects = [
        schema.FoundObject(
            object_id=x.object_id,
            label=x.label,
            color="#{:02x}{:02x}{:02x}".format(*color_of(x.object_id)),
            prompts=[schema.Prompt(**prompt) for prompt in prompts_of(x)],
            scores=view.scores(x.object_id, count),
        )
        for x in view.objects
    ]
    height, width = (0, 0) if reader is None else reader.size
    return schema.SessionState(
        session_id=session.id,
        name=session.upload.name,
        exclusive=session.exclusive,
        ready=reader is not None,
        num_frames=count,
        width=width,
        height=height,
        fps=0.0 if reader is None else reader.fps,
        times=session.times,
        version=view.version,
        num_undo=view.num_undo,
        objects=objects,
        history=session.history,
        jobs=service.registry.jobs.unfinished(session.id),
    )
