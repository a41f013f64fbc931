"""Makes the goldens of beam search with Hugging Face's own: llama_beams.json and smollm2_beams.json. No test runs this.

    pip install torch transformers==5.23.0
    python tests/goldens/make_beams.py grid tests/goldens/models/llama
    python tests/goldens/make_beams.py chats FOLDER      # SmolLM2-135M-Instruct, float32 safetensors

Beams whose scores lie closer than rounding would make a golden that nobody can meet. So every search is made in
float64 too and must give the same tokens; and `margin` says how close the closest choice of a search was.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent

# The grid: of 7 prompt tokens of the tiny Llama. These end-of-sequence tokens end beams at many different lengths.
WIDTHS = (1, 2, 3, 4, 6)
EOS_TOKEN_IDS = ((), (247,), (195, 247), (183, 195))
MAX_TOKENS = (1, 2, 20)
LENGTH_PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
EARLY_STOPPING = (False, True, "never")

# Of smollm2_chats.json: (chat, [(early_stopping, length_penalty)]). 40, 55, 127, 256 and 300 prompt tokens; in the
# first two, the plain searches end with four beams that stopped by themselves.
PLAIN = (False, 1.0)
CHATS = (
    (3, [PLAIN, (True, 0.5), ("never", 2.0)]),
    (5, [PLAIN, (True, 0.5), ("never", 2.0)]),
    (10, [PLAIN]),
    (14, [PLAIN]),
    (15, [PLAIN]),
)


class Search:
    """One prompt's beams by `generate`, and the candidates of each step on the way."""

    def __init__(self, model, prompt, *, width, max_tokens, eos_token_ids, length_penalty, early_stopping):
        self.width, self.eos_token_ids, self.length_penalty = width, eos_token_ids, length_penalty
        self.candidates = []  # per step: (scores f32 [K], parents int [K], tokens int [K])
        original = type(model)._get_top_k_continuations

        def recorded(**kwargs):
            scores, sequences, beams = original(model, **kwargs)
            at = kwargs["cur_len"]
            step = (scores[0], beams[0, :, at - kwargs["decoder_prompt_len"]], sequences[0, :, at])
            self.candidates.append([x.clone().numpy() for x in step])
            return scores, sequences, beams

        model._get_top_k_continuations = recorded
        model.generation_config.eos_token_id = None  # else None below would not mean none
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=max_tokens,
            eos_token_id=list(eos_token_ids) or None,
            pad_token_id=0,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            custom_generate=_beam_search if width == 1 else None,  # generate would search greedily
        )
        lengths = (output.beam_indices >= 0).sum(-1).tolist()
        self.tokens = [row[len(prompt) :][:n].tolist() for row, n in zip(output.sequences, lengths, strict=True)]
        self.scores = output.sequences_scores.numpy()

    @property
    def margin(self) -> float:
        """The smallest difference that decided which beams go on, which finish, or how they rank: sums of log-probs."""
        divisors = np.array([len(tokens) for tokens in self.tokens]) ** self.length_penalty
        margins = [1.0, *-np.diff(self.scores.astype(float)) * np.minimum(divisors[1:], divisors[:-1])]
        for scores, _, tokens in self.candidates:
            stops = np.isin(tokens, self.eos_token_ids)
            going_on = scores[~stops]
            margins += [float(x) for x in going_on[self.width - 1 : self.width] - going_on[self.width : self.width + 1]]
            if stops[self.width - 1 : self.width + 1].any():
                margins.append(float(scores[self.width - 1] - scores[self.width]))
        return min(margins)


def _beam_search(model, input_ids, **kwargs):
    return model._beam_search(input_ids, **kwargs)


def load(folder):
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=t).eval() for t in (torch.float32, torch.float64)]


def search(models, prompt, **options) -> Search:
    single, double = (Search(model, prompt, **options) for model in models)
    same = single.tokens == double.tokens and len(single.candidates) == len(double.candidates)
    print(options, f"lengths {[len(tokens) for tokens in single.tokens]}, {len(single.candidates)} steps", end=", ")
    print(f"margin {single.margin:.1e}, {np.abs(single.scores - double.scores).max():.1e} from float64", flush=True)
    if not same:
        raise SystemExit("choose another prompt or other end-of-sequence tokens: rounding decides here")
    return single


def numbers(values) -> list[float]:
    """The shortest decimals that give the same float32."""
    return [float(str(np.float32(x))) for x in values]


def grid(folder):
    """Candidates do not depend on how finished beams are ranked: one trace serves all cases of a width and its eos."""
    models = load(folder)
    prompt = np.load(Path(folder) / "reference.npz")["p0_input_ids"].tolist()
    traces, sequences = [], {}
    for width, eos in itertools.product(WIDTHS, EOS_TOKEN_IDS):
        longest, cases = [], []
        for max_tokens, penalty, early in itertools.product(MAX_TOKENS, LENGTH_PENALTIES, EARLY_STOPPING):
            options = {"max_tokens": max_tokens, "length_penalty": penalty, "early_stopping": early}
            found = search(models, prompt, width=width, eos_token_ids=eos, **options)
            beams = [sequences.setdefault(tuple(tokens), len(sequences)) for tokens in found.tokens]
            cases.append([*options.values(), len(found.candidates), beams, numbers(found.scores)])
            longest = max(longest, found.candidates, key=len)
            for one, other in zip(longest, found.candidates, strict=False):
                assert all((a == b).all() for a, b in zip(one, other, strict=True))
        steps = [[numbers(scores), parents.tolist(), tokens.tolist()] for scores, parents, tokens in longest]
        traces.append({"width": width, "eos_token_ids": eos, "candidates": steps, "cases": cases})
    write("llama_beams.json", {"prompt_token_ids": prompt, "sequences": list(sequences), "searches": traces})


def chats(folder):
    models = load(folder)
    prompts = [chat["prompt_token_ids"] for chat in json.loads((HERE / "smollm2_chats.json").read_text())]
    made = []
    for chat, runs in CHATS:
        for early, penalty in runs:
            options = {"early_stopping": early, "length_penalty": penalty}
            found = search(models, prompts[chat], width=4, max_tokens=64, eos_token_ids=(2,), **options)
            result = {"output_token_ids": found.tokens, "scores": numbers(found.scores), "steps": len(found.candidates)}
            made.append({"chat": chat, "prompt_token_ids": prompts[chat], **options, **result, "margin": found.margin})
    write("smollm2_beams.json", made)


def write(name, content):
    (HERE / name).write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grid", "chats"])
    parser.add_argument("folder", help="the model, as Hugging Face safetensors")
    arguments = parser.parse_args()
    {"grid": grid, "chats": chats}[arguments.what](arguments.folder)
