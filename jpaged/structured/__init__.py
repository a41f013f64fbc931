"""Structured output: text that a JSON schema, a regular expression, a list of choices or a grammar allows.

    params.py      StructuredOutputsParams: what a request asks for, checked at the edge
    grammars.py    Grammars: compiles it (llguidance), within a time limit; keeps what was compiled
    matching.py    Matcher: how far one sequence is in its grammar; the masks of a step

Host only: no JAX. The sampler gets bit masks (`runtime.sampler.constrain`).
"""

from jpaged.structured.grammars import Grammars
from jpaged.structured.matching import Masks, Matcher, masks_of
from jpaged.structured.params import StructuredOutputsParams

__all__ = ["Grammars", "Masks", "Matcher", "StructuredOutputsParams", "masks_of"]
