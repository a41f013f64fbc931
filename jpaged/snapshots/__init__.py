"""Snapshots: the unfinished requests of an engine outlive its process.

records.py       what a request is as plain data, and back; `LLMEngine.snapshot` and `restore` use it
fingerprint.py   which model a snapshot belongs to
journal.py       a file to which what must survive is appended, and forced onto the disk
store.py         a folder of snapshots (Orbax) and of the journals that go on from them
"""

from jpaged.snapshots.fingerprint import fingerprint
from jpaged.snapshots.records import (
    RequestRecord,
    ResultRecord,
    SequenceRecord,
    Snapshot,
    record_of,
    record_of_result,
    result_of,
)

__all__ = [
    "RequestRecord",
    "ResultRecord",
    "SequenceRecord",
    "Snapshot",
    "fingerprint",
    "record_of",
    "record_of_result",
    "result_of",
]
