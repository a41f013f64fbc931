"""jpaged run-batch: with a model of its own, and with a server that runs."""

import json

from tests.server.support import serving

BODY = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 4}
SMALL = ("--max-num-seqs", "4", "--max-num-batched-tokens", "36", "--served-model-name", "tiny")


def lines(*names: str) -> str:
    requests = [{"custom_id": name, "method": "POST", "url": "/v1/completions", "body": BODY} for name in names]
    return "".join(json.dumps(request) + "\n" for request in requests)


def test_here_and_elsewhere(jpaged, tiny, tmp_path, monkeypatch):
    """A model that is loaded for it and a server give the same results; and what is done is not done again."""
    source, here, elsewhere = tmp_path / "in.jsonl", tmp_path / "here.jsonl", tmp_path / "elsewhere.jsonl"
    source.write_text(lines("a", "b"))
    monkeypatch.setenv("JPAGED_API_KEY", "secret")  # of servers: a batch of one's own needs none
    status, out, err = jpaged("run-batch", "-i", str(source), "-o", str(here), *SMALL)
    assert (status, out) == (0, "")
    assert "2 done, 0 of them errors; 0 had a result already" in err
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(tiny(enable_prefix_caching=False), key="secret") as live:
        arguments = ("run-batch", "-i", str(source), "-o", str(elsewhere), "--base-url", live.url)
        assert jpaged(*arguments, tiny=False)[0] == 0
        source.write_text(lines("a", "b", "c"))
        assert "1 done, 0 of them errors; 2 had a result already" in jpaged(*arguments, tiny=False)[2]
    texts = [
        {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in map(json.loads, path.open())}
        for path in (here, elsewhere)
    ]
    assert texts[0] == {"a": texts[0]["a"], "b": texts[0]["a"]}
    assert texts[1] == {**texts[0], "c": texts[0]["a"]}


def test_files_that_are_none(jpaged, tmp_path):
    for source, target in (("none", "out"), (".", "out")):
        arguments = ("-i", str(tmp_path / source), "-o", str(tmp_path / target))
        status, _, err = jpaged("run-batch", *arguments)
        assert (status, str(tmp_path / source) in err) == (2, True)
    (tmp_path / "in").write_text(lines("a"))
    status, _, err = jpaged("run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path))
    assert (status, "Is a directory" in err) == (2, True)
