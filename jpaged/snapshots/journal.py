"""Journal: a file of JSON lines that grows, and survives its process.

Whoever must not go on before a line is safe waits for it: then it has been written and forced onto the disk, together
with all that came in meanwhile. A process that is killed leaves a torn last line at worst; nobody was waiting for it
any more.
"""

import concurrent.futures
import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import to_json

from jpaged.errors import SnapshotError

log = logging.getLogger("jpaged")

Line = dict[str, Any]
_Waiting = tuple[Line, "concurrent.futures.Future[None]"]
_Item = _Waiting | tuple[Path, "concurrent.futures.Future[None]"] | None  # a line, another file, or the end


class Journal:
    """Appends on a thread of its own.

    Args:
      path: a file that does not exist yet.

    Attributes:
      size: bytes in the file.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._file = _create(path)
        self._thread = threading.Thread(target=self._run, name="jpaged-journal", daemon=True)
        self._thread.start()

    def append(self, line: Line) -> "concurrent.futures.Future[None]":
        """Adds a line: plain data, dataclasses included. The result is there when the line is on the disk.

        The future's error is a SnapshotError: it can't be written.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._queue.put((line, done))
        return done

    def switch(self, path: Path) -> "concurrent.futures.Future[None]":
        """Lines that come from now on go into a new file; into the old one if it can't be made (SnapshotError)."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._queue.put((path, done))
        return done

    def close(self) -> None:
        """Waits for all lines."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        going = True
        while going:
            items = [self._queue.get(), *(self._queue.get() for _ in range(self._queue.qsize()))]
            batch: list[_Waiting] = []
            for item in items:
                match item:
                    case None:
                        going = False
                    case (Path() as path, done):
                        self._write(batch)
                        batch = []
                        self._open(path, done)
                    case (dict() as line, done):
                        batch.append((line, done))
            self._write(batch)

    def _open(self, path: Path, done: "concurrent.futures.Future[None]") -> None:
        try:
            file = _create(path)
        except OSError as error:
            done.set_exception(SnapshotError(f"{path} can't be made: {error.strerror or error}."))
        else:
            self._file.close()
            self._file, self.size = file, 0
            done.set_result(None)

    def _write(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        try:
            data = b"".join(to_json(line, inf_nan_mode="constants") + b"\n" for line, _ in batch)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except (OSError, ValueError) as error:  # the disk, or no JSON
            log.error("the journal can't be written: %s", error)
            self._file.truncate(self.size)  # no torn line in the middle
            for _, done in batch:
                done.set_exception(SnapshotError(f"the journal can't be written: {error}"))
            return
        self.size += len(data)
        for _, done in batch:
            done.set_result(None)


def _create(path: Path) -> BinaryIO:
    file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "wb", buffering=0)  # noqa: SIM115
    sync_folder(path.parent)
    return file


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[Line]:
    """The lines of a journal; a torn last one is left out.

    Raises:
      SnapshotError: a line before the last is damaged.
    """
    *lines, last = path.read_bytes().split(b"\n")  # what is whole ends with a line break
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines) and not last:
                break  # the disk may have kept its length and not its content
            raise SnapshotError(f"{path}: line {number} is damaged: {error}") from error
