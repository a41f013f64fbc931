"""The folder that a server goes on from: whole snapshots, journals that end anywhere, one user at a time."""

import os
import resource
import stat

import pytest

from jpaged.errors import SnapshotError
from jpaged.snapshots.journal import read
from jpaged.snapshots.store import Store


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_a_snapshot_and_what_came_after(tmp_path):
    folder = tmp_path / "new" / "state"
    store = Store(folder)
    assert store.load() is None
    store.save(store.begin(), b"one")
    for i in range(3):
        store.append({"i": i}).result()
    store.close()
    assert names(folder) == ["journal-1.jsonl", "snapshot-1"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "journal-1.jsonl").stat().st_mode) == 0o600

    store = Store(folder)
    assert store.load() == (b"one", [{"i": 0}, {"i": 1}, {"i": 2}], {})
    number = store.begin()
    store.append({"i": 3})
    store.close()  # the process ends before the snapshot is written

    store = Store(folder)
    assert store.load() == (b"one", [{"i": 0}, {"i": 1}, {"i": 2}, {"i": 3}], {})
    number = store.begin()
    store.append({"i": 4})
    assert store.journal_size == 0 or store.journal_size == len(b'{"i":4}\n')
    store.save(number, b"two")
    store.close()
    assert names(folder) == ["journal-3.jsonl", "snapshot-3"]
    store = Store(folder)
    assert store.load() == (b"two", [{"i": 4}], {})
    store.close()


def test_one_process_at_a_time(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(SnapshotError, match="in use by another server"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="file"):
        Store(tmp_path / "file")


def journal_of(tmp_path, lines):
    store = Store(tmp_path)
    store.save(store.begin(), b"one")
    for line in lines:
        store.append(line)
    store.close()
    return tmp_path / "journal-1.jsonl"


def test_a_journal_may_end_anywhere(tmp_path):
    lines = [{"text": "é\n" * 5}, {"b": [1.5, None]}]
    path = journal_of(tmp_path, lines)
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        assert list(read(path)) == lines[: (end >= first) + (end == len(data))]
    path.write_bytes(data[:-4] + b"\0\0\0\n")  # the length was kept, the content was not
    assert list(read(path)) == lines[:1]


def test_damage_is_told(tmp_path):
    path = journal_of(tmp_path, [{"a": 1}, {"b": 2}])
    path.write_bytes(path.read_bytes().replace(b'{"a"', b'{"a'))
    with pytest.raises(SnapshotError, match="line 1 is damaged"):
        Store(tmp_path).load()


def test_a_damaged_snapshot_is_told(tmp_path):
    journal_of(tmp_path, [])
    for path in (tmp_path / "snapshot-1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(SnapshotError, match="Orbax can't read"):
        Store(tmp_path).load()


def test_what_an_interrupted_save_left_is_no_snapshot_and_goes_away(tmp_path):
    journal_of(tmp_path, [])
    (tmp_path / "snapshot-2.orbax-checkpoint-tmp-17").mkdir()
    store = Store(tmp_path)
    assert store.load() == (b"one", [], {})
    store.save(store.begin(), b"two")
    store.save(store.begin(), b"three")
    store.close()
    assert names(tmp_path) == ["journal-3.jsonl", "snapshot-3"]


def test_a_full_disk_is_told_and_tears_no_line(tmp_path):
    path = journal_of(tmp_path, [])
    store = Store(tmp_path)
    store.begin()
    store.append({"fits": 1}).result()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(SnapshotError, match="can't be written"):
            store.append({"text": "x" * 1000}).result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.append({"fits": 2}).result()
    store.close()
    path = tmp_path / "journal-2.jsonl"
    assert list(read(path)) == [{"fits": 1}, {"fits": 2}]
    assert os.path.getsize(path) == store.journal_size


def test_a_journal_that_cannot_be_made_loses_no_line(tmp_path):
    store = Store(tmp_path)
    store.save(store.begin(), b"one")
    (tmp_path / "journal-2.jsonl").mkdir()
    number = store.begin()
    store.append({"i": 1}).result()
    with pytest.raises(SnapshotError, match=r"journal-2\.jsonl can't be made"):
        store.save(number, b"two")
    store.close()
    (tmp_path / "journal-2.jsonl").rmdir()
    store = Store(tmp_path)
    assert store.load() == (b"one", [{"i": 1}], {})
    store.close()
