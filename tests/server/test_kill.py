"""A server in a process of its own, killed under its clients: nobody's text changes."""

import pytest

from benchmarks.soak.kill_and_resume import compare
from tests.engine.support import GOLDENS


@pytest.mark.parametrize("more", [[], ["--speculative-config", '{"num_speculative_tokens": 3}']], ids=["", "guesses"])
def test_texts_survive_kill_and_sigterm(more):
    """Moments are counted in tokens that clients have received; the full-size run is in benchmarks/soak."""
    flags = ["--no-warmup", "--max-num-seqs", "8", "--snapshot-interval", "1", "--shutdown-timeout", "0", *more]
    report = compare(str(GOLDENS / "models" / "llama"), flags, number=9, max_tokens=60, kills=2, seed=1, terms=1)
    assert report["differing"] == []
    assert report["resumed"] > 0
    assert report["attempts"] > report["requests"]
