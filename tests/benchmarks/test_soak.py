"""The crowd of benchmarks.soak, in small: what it calls right is right, and a wrong text is seen."""

import asyncio

import pytest

from benchmarks.soak.clients import Crowd
from benchmarks.soak.requests import bodies
from jpaged import SamplingParams
from tests.engine.support import llm_of
from tests.server.support import serving


def test_a_small_crowd(tiny):
    asked = bodies(max_tokens=12)[::9]
    params = [
        SamplingParams(**{name: value for name, value in body.items() if name not in ("prompt", "stream")})
        for body in asked
    ]
    outputs = llm_of(tiny(enable_prefix_caching=False)).generate([body["prompt"] for body in asked], params)
    want = [[completion.text for completion in output.outputs] for output in outputs]
    with serving(tiny(enable_prefix_caching=False)) as live:
        crowd = Crowd(live.url, asked, want)

        async def everyone():
            for kind in (crowd._good, crowd._cancelling):
                await asyncio.gather(*(kind(which) for which in range(len(asked))))

        asyncio.run(everyone())
        assert crowd.wrong == []
        assert crowd.counts == {"good": len(asked), "cancelled": len(asked)}
        misled = Crowd(live.url, asked, [["something else"], *want[1:]])
        asyncio.run(misled._good(0))
        assert len(misled.wrong) == 1
        refused = Crowd(live.url, [{**asked[0], "n": 0}], want)
        with pytest.raises(ValueError, match="400"):
            asyncio.run(refused._good(0))
