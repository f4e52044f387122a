"""A store of gs:// on this machine: gcs_server.py PORT

gcp-storage-emulator, and what TensorStore needs beside it: generations that differ, which reads tell and conditions of
requests name (https://cloud.google.com/storage/docs/request-preconditions). Uploads in several parts are taken apart
here: the emulator reads them as mail, and takes a last byte 13 of the data for the beginning of a line's end.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.storage import Storage

LOCK = threading.RLock()
create_file = Storage.create_file


def create_new_generation(self: Storage, bucket: str, name: str, content: bytes, file: Any, *rest: Any) -> Any:
    file["generation"] = str(time.time_ns())
    return create_file(self, bucket, name, content, file, *rest)


def conditional(handler: Callable[..., None], reads: bool) -> Callable[..., None]:
    """A handler that heeds conditions."""

    def handle(request: Any, response: Any, storage: Storage, *rest: Any, **options: Any) -> None:
        with LOCK:
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            try:
                generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                generation = "0"
            if request.query.get("ifGenerationMatch", [generation])[0] != generation:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif request.query.get("ifGenerationNotMatch", [""])[0] == generation:
                response.status = HTTPStatus.NOT_MODIFIED if reads else HTTPStatus.PRECONDITION_FAILED
            else:
                handler(request, response, storage, *rest, **options)
                if reads:
                    response["x-goog-generation"] = generation

    return handle


def parts_of(data: bytes, boundary: bytes) -> dict[str, Any]:
    """What is told of an object, and its content: the two parts of an upload."""
    end = b"\r\n" if data.partition(b"\n")[0].endswith(b"\r") else b"\n"
    first, second = data.partition(b"--" + boundary + end)[2].split(end + b"--" + boundary + end, 1)
    header, _, content = second.partition(end + end)
    kinds = [line.partition(b":")[2] for line in header.split(end) if line.lower().startswith(b"content-type")]
    return {
        "meta": json.loads(first.partition(end + end)[2]),
        "content": content[: content.rindex(end + b"--" + boundary)],
        "content-type": (kinds or [b"application/octet-stream"])[0].strip().decode(),
    }


def main() -> None:
    Storage.create_file = create_new_generation
    for name, reads in (("get", True), ("download", True), ("insert", False), ("delete", False)):
        setattr(objects, name, conditional(getattr(objects, name), reads))
    from gcp_storage_emulator import server  # takes the handlers as they are now

    read_data = server._read_data

    def read(handler: Any, query: Any) -> Any:
        kind = handler.headers.get("Content-Type") or ""
        if not kind.startswith("multipart/related"):
            return read_data(handler, query)
        raw = server._decode_raw_data(server._read_raw_data(handler), handler)
        return parts_of(raw, kind.partition("boundary=")[2].partition(";")[0].strip("\"' ").encode())

    server._read_data = read
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True).run()


if __name__ == "__main__":
    main()
