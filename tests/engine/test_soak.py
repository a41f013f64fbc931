"""Many requests leave nothing behind."""

import gc

import psutil

from jpaged import SamplingParams


def test_memory_is_flat_over_5000_requests(tiny):
    """Host memory after 5,000 requests is what it was after 1,000, give or take what malloc keeps."""
    engine = tiny()
    process = psutil.Process()

    def serve(first, last):
        sent = done = first
        while done < last:
            while sent < last and engine.num_unfinished_requests < 32:
                params = SamplingParams(max_tokens=1 + sent % 4, stop=["zz"] if sent % 3 else [], logprobs=sent % 2)
                engine.add_request(str(sent), {"prompt_token_ids": [5 + sent % 300, 7, 8 + sent % 11]}, params)
                sent += 1
            done += sum(output.finished for output in engine.step())
            if done % 97 == 0 and engine.num_unfinished_requests:
                engine.abort(next(iter(engine._groups)))
        gc.collect()
        return process.memory_info().rss, len(gc.get_objects())

    rss, objects = serve(0, 1000)
    later_rss, later_objects = serve(1000, 5000)
    engine.abort(list(engine._groups))
    while engine.has_unfinished_requests():
        engine.step()
    engine.blocks.check_invariants()
    assert engine.blocks.num_used == 0
    assert later_objects - objects < 2000
    assert later_rss - rss < 16 << 20
