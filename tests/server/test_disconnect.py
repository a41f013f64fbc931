"""Clients that leave, that read slowly, and that are many."""

import asyncio
import random

import pytest

from tests.server.support import raw_post, serving

LONG = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def alone(tiny):
    """A server whose blocks are all free when the test has ended."""
    with serving(tiny(), enable_admin_endpoints=True) as live:
        yield live


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(alone, stream):
    connection = raw_post(alone, "/v1/completions", **LONG, stream=stream)
    while not alone.llm.num_unfinished_requests:
        pass
    if stream:
        connection.recv(1)
    connection.close()
    alone.idle()
    assert alone.http.get("/load").json() == {"server_load": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_nothing_is_computed(alone, stream):
    """Nothing is written that could fail: only the connection says that it is closed."""
    alone.post("/pause")
    connection = raw_post(alone, "/v1/completions", **LONG, stream=stream)
    while not alone.llm.num_unfinished_requests:
        pass
    connection.close()
    while alone.llm.num_unfinished_requests:
        pass
    alone.post("/resume")


def test_a_client_that_reads_nothing_holds_nobody_up(alone):
    connection = raw_post(alone, "/v1/completions", **LONG, n=4, logprobs=20, stream=True)
    for _ in range(5):
        got = alone.openai.completions.create(model="tiny", prompt="b", max_tokens=8, extra_body={"ignore_eos": True})
        assert got.usage.completion_tokens == 8
    alone.idle()
    connection.close()


def test_sixty_streams_with_random_cancels(alone):
    want = alone.openai.completions.create(model="tiny", prompt="x", max_tokens=40, temperature=0).choices[0].text
    dice = random.Random(0)
    leave_after = [dice.choice([None, None, 0, 1, 5, 20]) for _ in range(60)]

    async def main():
        async with alone.async_openai() as client:

            async def one(leave):
                stream = await client.completions.create(
                    model="tiny", prompt="x", max_tokens=40, temperature=0, stream=True
                )
                text, count = "", 0
                async for chunk in stream:
                    text, count = text + chunk.choices[0].text, count + 1
                    if leave is not None and count > leave:
                        await stream.close()
                        assert want.startswith(text)
                        return
                assert text == want

            await asyncio.gather(*map(one, leave_after))

    asyncio.run(main())
