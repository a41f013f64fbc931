"""A picture of the memory: the pool, block by block and step by step, in the terminal and as a page that replays.

    with jpaged.memory_view.record(llm) as recording:
        llm.generate(prompts)
    recording.save("memory.html")

It watches from outside; the engine does not know it. See `recorder.record`.
"""

from jpaged.memory_view.recorder import Recorder, Recording, record
from jpaged.memory_view.snapshot import Measures, Snapshot, measure, snapshot

__all__ = ["Measures", "Recorder", "Recording", "Snapshot", "measure", "record", "snapshot"]
