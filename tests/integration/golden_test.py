"""The numbers are DeepSeek's: prompt logprobs and greedy continuations through /v1/completions."""

from itertools import product

import numpy as np
import pytest

from checkpoints import GOLDEN_NAMES, Reference, golden_checkpoint, make_checkpoint
from fathom_server import FathomServer
from recipes import BLOCKS_WITHIN_RANKS, RECIPES

# The golden numbers are of weights in FP8 and activations that are not, which a GPU would round.
PLAIN_ACTIVATIONS = ("--activation-quantization", "none")

# What the project promises for float32. Measured differences are about 1e-5: sums in another order.
MAX_LOGPROB_DIFFERENCE = 1e-3

TP_SIZES = (1, 2, 4, 8)

# Without --long: every checkpoint, every world size and both ways to split experts, not all pairs.
COVERING = {
    "v3_tiny": ((1, "tp"), (2, "ep"), (4, "tp"), (8, "tp"), (8, "ep")),
    "v3_tiny_noqlora": ((1, "ep"), (2, "tp"), (4, "ep"), (8, "tp")),
    "v2_tiny_softmax": ((1, "tp"), (2, "tp"), (4, "tp"), (8, "ep")),
    "v3_tiny_fp8": ((1, "tp"), (2, "tp"), (4, "ep"), (8, "tp"), (8, "ep")),
    "tied_head": ((4, "tp"),),
    "f32_without_q_lora_or_rope_scaling": ((2, "ep"),),
    "softmax_greedy_like_v2_lite": ((1, "tp"), (4, "ep")),
    "one_group_of_many_experts": ((8, "ep"),),
    "no_shared_experts": ((2, "tp"),),
    "odd_sizes": ((1, "tp"),),
    "head_dims_of_v3": ((4, "tp"),),
    "fp8_ragged_in_many_shards": ((1, "tp"), (8, "tp")),
    "dense_only": ((8, "tp"),),
    "six_heads_two_dense_layers": ((3, "ep"), (6, "tp")),
}
# World sizes that divide heads, vocabulary and experts where 1, 2, 4, 8 do not.
SIZES_OF = {"odd_sizes": (1,), "six_heads_two_dense_layers": (1, 2, 3, 6)}


def pytest_generate_tests(metafunc):
    """One test per (checkpoint, world size, way to split experts)."""
    if "way" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--long"):
        ways = {name: product(SIZES_OF.get(name, TP_SIZES), ("tp", "ep")) for name in COVERING}
    else:
        ways = COVERING
    metafunc.parametrize("name,way", [(name, way) for name in ways for way in ways[name]],
                         ids=lambda value: value if isinstance(value, str)
                         else f"{value[1]}{value[0]}")


@pytest.fixture(scope="module")
def checkpoint_named(tmp_path_factory):
    """Checkpoints by name, each made or read once."""
    made = {}

    def find(name):
        if name not in made:
            if name in GOLDEN_NAMES:
                made[name] = golden_checkpoint(name)
            else:
                recipe = next(recipe for recipe in (*RECIPES, BLOCKS_WITHIN_RANKS)
                              if recipe.name == name)
                made[name] = make_checkpoint(recipe, tmp_path_factory.mktemp(name))
        return made[name]

    return find


def ask(client, cases):
    """Every prompt in one request; gives [(generated ids, logprobs of prompt and output)]."""
    answer = client.complete(
        prompt=[case.tokens for case in cases], max_tokens=len(cases[0].greedy), temperature=0,
        echo=True, logprobs=1, ignore_eos=True, return_token_ids=True)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(cases)
    answers = []
    for choice, case in zip(choices, cases):
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs[0] is None, "the first token has no logprob"
        assert len(logprobs) == len(case.tokens) + len(choice["token_ids"])
        assert choice["prompt_token_ids"] == case.tokens
        answers.append((choice["token_ids"], np.array(logprobs[1:], dtype=np.float64)))
    return answers


def test_logprobs_and_greedy_tokens_are_the_golden_ones(checkpoint_named, name, way, report):
    """Tokens identical, logprobs within 1e-3, for each prompt of the checkpoint."""
    checkpoint = checkpoint_named(name)
    world_size, split = way
    flags = ["--dtype", "float32", *PLAIN_ACTIVATIONS]
    flags += ["--enable-expert-parallel"] * (split == "ep")
    with FathomServer(checkpoint.folder, *flags, tensor_parallel_size=world_size) as server:
        answers = ask(server.client, checkpoint.cases)
    worst = 0.0
    for (token_ids, logprobs), case in zip(answers, checkpoint.cases):
        assert token_ids == case.greedy, f"smallest gap of this prompt: {case.smallest_gap:.3f}"
        worst = max(worst, np.abs(logprobs - case.logprobs).max())
    gap = min(case.smallest_gap for case in checkpoint.cases)
    lengths = [len(case.tokens) for case in checkpoint.cases]
    report(f"{name} {split}{world_size}: prompts {lengths}, smallest greedy gap {gap:.3f}, "
           f"worst logprob difference {worst:.1e}")
    assert worst <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_bfloat16_is_as_close_as_bfloat16_can_be(checkpoint_named, name, report):
    """DeepSeek's own code in BF16 has an rms of up to 0.04 on these logits; 0.06 is the promise.

    A logprob is the difference of a logit and the logarithm of a sum of all, which errs less: the
    same bound. Greedy tokens are equal up to the first that is decided by less than 0.25.
    """
    checkpoint = checkpoint_named(name)
    with FathomServer(checkpoint.folder, "--dtype", "bfloat16", *PLAIN_ACTIVATIONS,
                      tensor_parallel_size=2) as server:
        answers = ask(server.client, checkpoint.cases)
    differences = []
    for (token_ids, logprobs), case in zip(answers, checkpoint.cases):
        num_clear = case.num_clear(gap=0.25)
        assert token_ids[:num_clear] == case.greedy[:num_clear]
        differences.append((logprobs - case.logprobs)[:len(case.tokens) - 1])
    rms = np.sqrt(np.square(np.concatenate(differences)).mean())
    report(f"{name} tp2 in bfloat16: rms of the logprob difference {rms:.4f}")
    assert rms < 0.06


@pytest.mark.parametrize("name,world_size", [
    ("v3_tiny", 1), ("v3_tiny_noqlora", 1), ("v2_tiny_softmax", 1), ("blocks_within_ranks", 2)])
def test_on_the_fly_fp8_is_what_rounding_the_weights_to_fp8_gives(
        checkpoint_named, name, world_size, report):
    """--quantization fp8 equals the float64 model with weights rounded to 128x128 FP8 blocks.

    The distance to the golden numbers is the rounding's own, not the engine's: a random tiny model
    pays 0.1 to 0.4 per token for it, however well it is computed. So the promise of 2e-2 is tested
    against the model that the flag asks for, the other distance is printed, and must be the ideal
    one. Each rank rounds in blocks of its own slice; here slices end where blocks do.
    """
    checkpoint = checkpoint_named(name)
    ideal = Reference(checkpoint.folder)
    ideal.quantise_weights()
    flags = ["--dtype", "float32", "--quantization", "fp8", *PLAIN_ACTIVATIONS]
    with FathomServer(checkpoint.folder, *flags, tensor_parallel_size=world_size) as server:
        answers = ask(server.client, checkpoint.cases)
    to_ideal, to_golden, of_ideal = [], [], []
    for (token_ids, logprobs), case in zip(answers, checkpoint.cases):
        wanted = ideal.prompt_logprobs(case.tokens + token_ids)
        num_prompt = len(case.tokens) - 1
        to_ideal.append(np.abs(logprobs - wanted))
        to_golden.append(np.abs(logprobs - case.logprobs)[:num_prompt])
        of_ideal.append(np.abs(wanted - case.logprobs)[:num_prompt])
    mean = [np.concatenate(parts).mean() for parts in (to_ideal, to_golden, of_ideal)]
    report(f"{name} tp{world_size}, fp8 on the fly: mean |Δlogprob| {mean[0]:.1e} to the rounded "
           f"model, {mean[1]:.4f} to the unrounded one (ideal rounding: {mean[2]:.4f})")
    assert mean[0] <= 2e-2
    assert abs(mean[1] - mean[2]) <= MAX_LOGPROB_DIFFERENCE


def test_fp8_activations_round_as_the_float64_model_rounds(checkpoint_named, report):
    """--activation-quantization fp8 is DeepSeek's arithmetic: FP8 times FP8.

    A rounding that falls the other way, because a sum in another order ended beside a tie, moves
    the rest of its prompt by about 0.1. That happens to one token in some twenty, so of prompts of
    three tokens six in seven must have none of it and agree to 1e-3: fewer than half of 40 is out
    of the question, unless something is wrong.
    """
    checkpoint = checkpoint_named("v3_tiny_fp8")
    exact, rounded = Reference(checkpoint.folder), Reference(checkpoint.folder, True)
    prompts = np.random.default_rng(20250101).integers(2, 250, (40, 3)).tolist()
    with FathomServer(checkpoint.folder, "--dtype", "float32", "--activation-quantization",
                      "fp8") as server:
        answer = server.client.complete(prompt=prompts, max_tokens=1, temperature=0, echo=True,
                                        logprobs=1, ignore_eos=True, return_token_ids=True)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    to_rounded, to_exact = [], []
    for prompt, choice in zip(prompts, choices, strict=True):
        found = np.array(choice["logprobs"]["token_logprobs"][1:])
        tokens = prompt + choice["token_ids"]
        to_rounded.append(np.abs(found - rounded.prompt_logprobs(tokens)).max())
        to_exact.append(np.abs(found - exact.prompt_logprobs(tokens)).max())
    num_equal = int((np.array(to_rounded) <= MAX_LOGPROB_DIFFERENCE).sum())
    report(f"v3_tiny_fp8 with FP8 activations: {num_equal} of 40 prompts equal the rounded model, "
           f"median |Δlogprob| {np.median(to_rounded):.1e}, {np.median(to_exact):.2f} to the exact")
    assert num_equal >= 20
    assert np.median(to_exact) > 10 * MAX_LOGPROB_DIFFERENCE, "nothing was rounded"


def test_dummy_weights_serve_a_model_that_is_only_a_configuration(tmp_path):
    """Two workers make up the same random model twice."""
    (tmp_path / "config.json").write_bytes(
        (golden_checkpoint("v3_tiny_fp8").folder / "config.json").read_bytes())
    answers = []
    for _ in range(2):
        with FathomServer(tmp_path, "--load-format", "dummy", "--kv-cache-dtype", "fp8",
                          tensor_parallel_size=2) as server:
            answer = server.client.complete(prompt=[5, 6, 7], max_tokens=8, temperature=0,
                                            ignore_eos=True, return_token_ids=True)
        answers.append(answer["choices"][0]["token_ids"])
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
