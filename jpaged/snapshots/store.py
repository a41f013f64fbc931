"""Store: a folder that a server goes on from.

    snapshot-7/         an Orbax checkpoint: all that there was when it was begun
    journal-7.jsonl     what has happened since then
    lock                held by the process that uses the folder

A snapshot is begun by switching to a new journal, and only then is the state taken that it holds. So a journal may
tell what its snapshot knows already; telling it twice changes nothing. When a snapshot is complete (Orbax renames it),
what came before it is deleted. A crash at any moment leaves a complete snapshot and all journals since.
"""

import concurrent.futures
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.orbax import first_line, quiet
from jpaged.errors import SnapshotError
from jpaged.snapshots.journal import Journal, Line, read, sync_folder

Tree = dict[str, Any]
_NAME = re.compile(r"(snapshot-(\d{1,12})|journal-(\d{1,12})\.jsonl)")


class Store:
    """Snapshots and journals in a folder. One process may use it at a time.

    Args:
      folder: is made, for its user alone, if it is not there.

    Raises:
      SnapshotError: it can't be used, or another process uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SnapshotError(f"{folder} is in use by another server.") from error
        except OSError as error:
            raise SnapshotError(f"{folder}: {error.strerror or error}.") from error
        snapshots, journals = self._numbers()
        self._latest = max(snapshots, default=None)
        self._next = max([*snapshots, *journals], default=0) + 1
        self._journal: Journal | None = None
        self._switched: concurrent.futures.Future[None] | None = None

    def load(self) -> tuple[bytes, list[Line], Tree] | None:
        """(the state of the latest snapshot, what the journals tell since then, its pool); None: there is no snapshot.

        Raises:
          SnapshotError: they are damaged.
        """
        if self._latest is None:
            return None
        lines = [line for n in self._numbers()[1] if n >= self._latest for line in read(self._journal_path(n))]
        tree = self._load_tree()
        return tree["state"].tobytes(), lines, tree.get("pool", {})

    def _load_tree(self) -> dict[str, Any]:
        from orbax.checkpoint import v1

        path = self.folder / f"snapshot-{self._latest}"
        try:
            with quiet():
                return v1.load(path)
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise SnapshotError(f"{path}: Orbax can't read it: {first_line(error)}") from error

    def append(self, line: Line) -> "concurrent.futures.Future[None]":
        """See `Journal.append`; a snapshot must have been begun."""
        return self._journal.append(line)  # type: ignore[union-attr]

    @property
    def journal_size(self) -> int:
        return 0 if self._journal is None else self._journal.size

    def begin(self) -> int:
        """Begins a snapshot: what is appended from now on belongs to the journal after it. Returns its number."""
        number, self._next = self._next, self._next + 1
        path = self._journal_path(number)
        if self._journal is None:
            self._journal = Journal(path)
        else:
            self._switched = self._journal.switch(path)
        return number

    def save(self, number: int, state: bytes, pool: Tree | None = None) -> None:
        """Writes the snapshot that was begun, and deletes what it makes superfluous.

        Args:
          pool: a nested dict of arrays; see `jpaged.snapshots.pool`.

        Raises:
          SnapshotError: it can't be written. What there was is there still.
        """
        from orbax.checkpoint import v1

        if self._switched is not None:
            self._switched.result()  # else its journal would be lost with the snapshot before it
        tree = {"state": np.frombuffer(state, np.uint8), **({"pool": pool} if pool else {})}
        try:
            with quiet():
                v1.save(self.folder / f"snapshot-{number}", tree)
            sync_folder(self.folder)
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise SnapshotError(f"{self.folder}: the snapshot can't be written: {first_line(error)}") from error
        self._latest = number
        for path in self.folder.iterdir():
            found = _NAME.match(path.name)  # also of what a process that was killed has left half written
            if found is not None and int(found[2] or found[3]) < number:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def close(self) -> None:
        """Waits until all is on the disk; another process may have the folder."""
        if self._journal is not None:
            self._journal.close()
        os.close(self._lock)

    def _journal_path(self, number: int) -> Path:
        return self.folder / f"journal-{number}.jsonl"

    def _numbers(self) -> tuple[list[int], list[int]]:
        """Of the snapshots that are complete, and of the journals."""
        found = [match for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted(int(m[2]) for m in found if m[2]), sorted(int(m[3]) for m in found if m[3])
