"""Checkpoints to serve, and what DeepSeek's mathematics says they must answer.

Golden ones come from tests/golden (numbers of DeepSeek's own code). Others are made with oracle/:
`make_checkpoint` writes random weights, `ReferenceModel` computes the answers in float64. Both
agree to 3e-6.
"""

import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "oracle"))

import make_checkpoint as oracle  # noqa: E402
import reference_model  # noqa: E402
import safetensors_file  # noqa: E402
from reference_model import log_softmax  # noqa: E402

GOLDEN_NAMES = ("v3_tiny", "v3_tiny_noqlora", "v2_tiny_softmax", "v3_tiny_fp8")

# A prompt is used when every choice the model makes on it stands clear of the runner-up by far more
# than float32 rounding (about 1e-5 here): the experts' choice survives noise of this size on the
# gate's logits, the best logit beats the second by this much.
ROUTER_NOISE = 2e-4
MIN_GREEDY_GAP = 1e-2


@dataclass(frozen=True)
class Case:
    """One prompt and what must come back for it."""

    tokens: list
    greedy: list
    logprobs: np.ndarray  # of the prompt's tokens from the second on, then of the greedy ones
    gaps: list            # of each greedy token: best minus second logit

    @property
    def smallest_gap(self):
        """How clear the least clear greedy token is."""
        return min(self.gaps)

    def num_clear(self, gap):
        """How many greedy tokens come before the first whose gap is below this."""
        return next((i for i, own in enumerate(self.gaps) if own < gap), len(self.gaps))


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made: a preset of the oracle and the fields of config.json to replace."""

    name: str
    preset: str = "v3_tiny"
    fields: dict = field(default_factory=dict)
    shards: int = 1


class Reference(reference_model.ReferenceModel):
    """The float64 model; `near_tie` says whether a choice of experts since then was close."""

    near_tie = False

    def mixture_of_experts(self, x, prefix):
        """As is, and looks whether noise would change who is chosen."""
        logits = x @ self.weights[prefix + "gate.weight"].T
        bias = self.weights.get(prefix + "gate.e_score_correction_bias")
        chosen = self._chosen(logits, bias)
        for seed in range(3):
            noise = np.random.default_rng(seed).choice((-ROUTER_NOISE, ROUTER_NOISE), logits.shape)
            self.near_tie |= not np.array_equal(chosen, self._chosen(logits + noise, bias))
        return super().mixture_of_experts(x, prefix)

    def _chosen(self, logits, bias):
        return np.sort(reference_model.route(logits, bias, self.config)[0], -1)

    def quantise_weights(self):
        """Rounds projections to FP8 in 128x128 blocks, as --quantization fp8 does on load.

        Not kv_b_proj: attention in the latent space keeps it in the activations' type.
        """
        for name, weight in self.weights.items():
            if "_proj" in name and "kv_b_proj" not in name:
                self.weights[name] = fp8_round(weight)

    def case(self, tokens, num_greedy):
        """The answers for one prompt."""
        greedy, _, gaps = self.greedy(tokens, num_greedy)
        return Case(tokens, greedy, self.prompt_logprobs(tokens + greedy), gaps)

    def clear_case(self, length, num_greedy, rng):
        """A random prompt on which no choice is a near tie."""
        for _ in range(100):
            self.near_tie = False
            case = self.case(rng.integers(2, self.config["vocab_size"], length).tolist(),
                             num_greedy)
            if case.smallest_gap > MIN_GREEDY_GAP and not self.near_tie:
                return case
        raise AssertionError("100 random prompts and each has a near tie: change the recipe")


class Checkpoint:
    """A model folder and its cases, computed when first asked for."""

    def __init__(self, name, folder, make_cases):
        self.name = name
        self.folder = Path(folder)
        self._make_cases = make_cases

    @cached_property
    def reference(self):
        """The float64 model."""
        return Reference(self.folder)

    @cached_property
    def cases(self):
        """Prompts and answers."""
        return self._make_cases(self.reference)


def golden_checkpoint(name):
    """A golden checkpoint: the prompt's numbers are DeepSeek's, the continuation's the oracle's."""
    golden = safetensors_file.load(str(GOLDEN / name / "golden.safetensors"))
    return Checkpoint(name, GOLDEN / name / "ckpt", lambda reference: [
        _golden_case(golden, f"p{length}", reference) for length in (1, 7, 64, 300)])


def _golden_case(golden, prompt, reference):
    tokens = golden[f"{prompt}.tokens"].numpy().tolist()
    greedy = golden[f"{prompt}.greedy"].numpy().tolist()
    logits = golden[f"{prompt}.logits"].numpy().astype(np.float64)
    known = (tokens + greedy)[1:len(tokens) + 1]  # the last row says the first greedy token
    logprobs = reference.prompt_logprobs(tokens + greedy)
    golden_logprobs = log_softmax(logits)[np.arange(len(known)), known]
    assert np.abs(logprobs[:len(known)] - golden_logprobs).max() < 1e-4, "the oracle disagrees"
    logprobs[:len(known)] = golden_logprobs
    return Case(tokens, greedy, logprobs, golden[f"{prompt}.greedy_gap"].numpy().tolist())


def make_checkpoint(recipe, folder, lengths=(1, 9, 40), num_greedy=12):
    """Writes the checkpoint of a recipe and finds clear prompts for it."""
    oracle.make_checkpoint(str(folder), recipe.preset, shards=recipe.shards, **recipe.fields)
    seed = sum(recipe.name.encode())  # Python's own hash of a string changes from run to run
    rng = np.random.default_rng(seed)
    return Checkpoint(recipe.name, folder, lambda reference: [
        reference.clear_case(length, num_greedy, rng) for length in lengths])


def serving_folder(folder):
    """v3_tiny with a tokenizer (vocabulary 512): the model of every test that is not numeric."""
    oracle.make_checkpoint(str(folder), "v3_tiny", tokenizer=True)
    return folder


def fp8_round(weight):
    """Each 128x128 block scaled to E4M3's range, rounded, and scaled back.

    The quotient is float32, as in DeepSeek's kernel: one weight in a thousand then is an exact tie.
    """
    rounded = np.empty_like(weight)
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            block = weight[row:row + 128, column:column + 128].astype(np.float32)
            scale = np.abs(block).max() / np.float32(safetensors_file.E4M3_MAX)
            codes = safetensors_file.e4m3_codes(block / scale)
            rounded[row:row + 128, column:column + 128] = (
                safetensors_file.e4m3_decode(codes) * np.float64(scale))
    return rounded
