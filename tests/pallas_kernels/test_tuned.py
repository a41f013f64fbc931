"""Tiles that were measured: kept in a file for each kind of GPU, and taken on that kind alone."""

import dataclasses
import json

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.gpu.tune import search
from pallas_kernels.paged_attention import tuned
from pallas_kernels.paged_attention.tiles import Tiles, decode_tiles, prefill_tiles

START = Tiles(rows=64, tokens=64, num_warps=4, num_stages=3)
CHOICES = {"tokens": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}


def gpu(kind):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def test_a_file_is_taken_on_its_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "file_of", lambda kind, file_of=tuned.file_of: file_of(kind, tmp_path))
    path = tuned.file_of("NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    tuned.write(path, {("decode", 128, 2): START})
    tuned.write(path, {("prefill", 64, 2): START})
    with gpu("NVIDIA H200"):
        assert tuned.tiles_for("decode", 128, 2) == START
        assert tuned.tiles_for("prefill", 64, 2) == START
        assert tuned.tiles_for("prefill", 128, 2) == prefill_tiles(128, 2, 90)
    with gpu("NVIDIA A100-SXM4-80GB"):
        assert tuned.tiles_for("decode", 128, 2) == decode_tiles(128, 2)
    assert tuned.tiles_for("decode", 128, 2) == decode_tiles(128, 2), "interpreted, there is no GPU"


@pytest.mark.parametrize("text", ["{", json.dumps([{"operation": "decode"}]), json.dumps([3])])
def test_a_file_of_another_version_is_told(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not of this version"):
        tuned.read(path)


def test_the_search_finds_the_fastest_and_passes_what_fails():
    best = Tiles(rows=64, tokens=128, num_warps=8, num_stages=2)
    timed = []

    def time(tiles):
        timed.append(tiles)
        if tiles.num_stages == 4:
            raise RuntimeError("too much shared memory")
        fields = ("tokens", "num_warps", "num_stages")
        return 1.0 + sum(getattr(tiles, field) != getattr(best, field) for field in fields)

    assert search(START, CHOICES, time) == best
    assert timed[0] == START
    assert len(timed) <= 1 + sum(map(len, CHOICES.values()))


def test_a_change_within_the_noise_is_not_kept():
    assert search(START, CHOICES, lambda tiles: 1.0 if tiles == START else 0.99) == START


def test_a_start_that_fails_is_an_error():
    def time(tiles):
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        search(dataclasses.replace(START), CHOICES, time)
