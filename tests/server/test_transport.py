"""Streams to clients, at the level of ASGI."""

import asyncio
import dataclasses

from jpaged.outputs import CompletionOutput, changed
from jpaged.server import transport


def test_a_client_that_takes_nothing_for_long_is_dropped(monkeypatch):
    monkeypatch.setattr(transport, "WRITE_TIMEOUT", 0.2)
    given, closed = [], []

    async def events():
        try:
            for i in range(100):
                yield transport.event({"i": i, "text": "é"})
        finally:
            closed.append(True)

    async def send(message):
        given.append(message)
        if len(given) == 4:
            await asyncio.Event().wait()

    async def receive():
        await asyncio.Event().wait()

    async def run():
        stream = transport.EventStream(events())
        await asyncio.wait_for(stream({"type": "http", "asgi": {}}, receive, send), 60)

    asyncio.run(run())
    assert closed == [True]
    assert [message["body"] for message in given[1:]] == [
        f'data: {{"i":{i},"text":"é"}}\n\n'.encode() for i in range(3)
    ]


def test_a_changed_output_is_a_replaced_one():
    one = CompletionOutput(index=0, text="ab", token_ids=[1, 2], cumulative_logprob=None, logprobs=None)
    assert changed(one, text="b") == dataclasses.replace(one, text="b")
    assert one.text == "ab"
    assert one.after(1, 1) == dataclasses.replace(one, text="b", token_ids=[2])
