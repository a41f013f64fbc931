"""Structured output: text that a JSON schema, a regular expression, a list of choices or a grammar allows.

    params.py      StructuredOutputsParams: what a request asks for, checked at the edge
    grammars.py    Grammars: has it compiled, and keeps what was compiled
    compiling.py   compiles it (llguidance), within limits; also the program that grammars are tried in
    trials.py      Trials: the processes that run it, and are killed when a grammar takes too long
    matching.py    Matcher: how far one sequence is in its grammar; the masks of a step

Host only: no JAX. The sampler gets bit masks (`runtime.sampler.constrain`).
"""

from jpaged.structured.grammars import Grammars
from jpaged.structured.matching import Masks, Matcher, masks_of
from jpaged.structured.params import StructuredOutputsParams

__all__ = ["Grammars", "Masks", "Matcher", "StructuredOutputsParams", "masks_of"]
