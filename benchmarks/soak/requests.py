"""What the clients of a soak ask for, and what they must get: the same requests through the offline engine."""

from typing import Any

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "A page table is",
    "To bake bread, you need",
    "The three laws of motion say that",
    "Dear Sir or Madam,",
    "In 1969, the first human",
    "def quicksort(items):",
)
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.8, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.7, "n": 2},
    {"temperature": 0.8, "top_k": 40, "min_tokens": 8},
    {"temperature": 1.0, "logprobs": 1, "presence_penalty": 0.3},
)


def bodies(max_tokens: int) -> list[dict[str, Any]]:
    """Completion requests: every prompt in every way."""
    return [
        {"prompt": prompt, "seed": 7 * i + j, "max_tokens": max_tokens * (8 - j % 5) // 8, "stream": True, **kind}
        for i, prompt in enumerate(PROMPTS)
        for j, kind in enumerate(_KINDS)
    ]


def expected(model: str, max_num_seqs: int, max_tokens: int) -> list[list[str]]:
    """The texts of each body's samples. Meant for a process of its own: a model is loaded."""
    import jpaged

    llm = jpaged.LLM(model=model, max_num_seqs=max_num_seqs)
    asked = bodies(max_tokens)
    params = [
        jpaged.SamplingParams(**{name: value for name, value in body.items() if name not in ("prompt", "stream")})
        for body in asked
    ]
    outputs = llm.generate([body["prompt"] for body in asked], params)
    return [[completion.text for completion in output.outputs] for output in outputs]
