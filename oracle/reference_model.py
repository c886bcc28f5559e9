#!/usr/bin/python3
"""What a checkpoint of the DeepSeek-V3 family computes, in float64, straight from its files.

  oracle/reference_model.py DIR --prompt 5,9,2 [--greedy 8]

prints the logprobs of the prompt and a greedy continuation as JSON. Slow and plain on purpose: keys
and values of every head are materialised, nothing is cached, the whole sequence is computed at
once. It agrees with DeepSeek's own inference code to about 3e-6 and shares no code with the server.
"""

import argparse
import json
import math
import os

import numpy as np

from make_checkpoint import spread_blocks
from safetensors_file import E4M3_MAX, e4m3_codes, e4m3_decode, load_checkpoint


def rms_norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def silu(x):
    return x / (1.0 + np.exp(-x))


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rotary_frequencies(config):
    """Radians per position of each pair; YaRN slows the low ones down. [qk_rope_head_dim / 2]"""
    dim, theta = config["qk_rope_head_dim"], float(config["rope_theta"])
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.get("rope_scaling")
    if not yarn:
        return frequencies

    def pair_that_turns(times):
        """The (fractional) pair that turns so many times within the trained window."""
        window = yarn["original_max_position_embeddings"]
        return dim * math.log(window / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return frequencies * (1 - stretched) + frequencies / yarn["factor"] * stretched


def yarn_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotate_pairs(x, angles):
    """x [..., tokens, dim], pairs (2i, 2i + 1); angles [tokens, dim / 2]."""
    cosine, sine = np.cos(angles), np.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = np.empty_like(x)
    rotated[..., 0::2] = even * cosine - odd * sine
    rotated[..., 1::2] = even * sine + odd * cosine
    return rotated


def fp8_round_trip(x, block=128):
    """Activations as an FP8 matrix product sees them: per token and 128 channels, E4M3."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-4)
    scale = (largest.astype(np.float32) / np.float32(E4M3_MAX)).astype(np.float64)
    return (e4m3_decode(e4m3_codes(blocks / scale)) * scale).reshape(x.shape)


def route(logits, bias, config):
    """The experts of each token, best first, and their weights: two [tokens, num_experts_per_tok].

    `bias` steers the choice only. None: softmax routing, which has no bias.
    """
    tokens, num_experts = logits.shape
    sigmoid = config["scoring_func"] == "sigmoid"
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
    choice = scores if bias is None else scores + bias
    num_groups = 1 if config["topk_method"] == "greedy" else config.get("n_group") or 1
    if num_groups > 1:
        grouped = choice.reshape(tokens, num_groups, -1)
        if bias is None:
            group_scores = grouped.max(-1)
        else:
            group_scores = np.sort(grouped, -1)[..., -2:].sum(-1)
        best = np.argsort(-group_scores, -1, kind="stable")[:, :config["topk_group"]]
        kept = np.zeros((tokens, num_groups), bool)
        np.put_along_axis(kept, best, True, -1)
        choice = np.where(np.repeat(kept, num_experts // num_groups, -1), choice, -np.inf)
    experts = np.argsort(-choice, -1, kind="stable")[:, :config["num_experts_per_tok"]]
    weights = np.take_along_axis(scores, experts, -1)
    if config["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdims=True)
    return experts, weights * config["routed_scaling_factor"]


class ReferenceModel:
    """A checkpoint as a function from token ids to logits.

    fp8_activations: round the input of every FP8 matrix as DeepSeek's kernels do, but for
    kv_b_proj, which attention in the latent space decodes. Off, FP8 weights are decoded and
    everything else is exact, which is what the golden logits of FP8 are.
    """

    def __init__(self, folder, fp8_activations=False):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        self.weights, self.fp8_names = {}, set()
        stored = load_checkpoint(folder)
        for name, tensor in stored.items():
            if name.endswith("weight_scale_inv"):
                continue
            values = tensor.to_float64()
            if tensor.dtype == "F8_E4M3":
                scales = stored[name.replace(".weight", ".weight_scale_inv")].to_float64()
                values = values * spread_blocks(scales, values.shape)
                if fp8_activations and "kv_b_proj" not in name:
                    self.fp8_names.add(name)
            self.weights[name] = values
        self.frequencies = rotary_frequencies(self.config)
        self.softmax_scale = (self.config["qk_nope_head_dim"]
                              + self.config["qk_rope_head_dim"]) ** -0.5
        self.rotary_amplitude = 1.0
        yarn = self.config.get("rope_scaling")
        if yarn:
            all_dim = yarn_mscale(yarn["factor"], yarn.get("mscale_all_dim", 0))
            self.softmax_scale *= all_dim**2
            self.rotary_amplitude = yarn_mscale(yarn["factor"], yarn.get("mscale", 1)) / all_dim

    def norm(self, x, name):
        return rms_norm(x, self.weights[name], self.config["rms_norm_eps"])

    def linear(self, x, name):
        if name in self.fp8_names:
            x = fp8_round_trip(x)
        return x @ self.weights[name].T

    def mlp(self, x, prefix):
        gate = silu(self.linear(x, prefix + "gate_proj.weight"))
        return self.linear(gate * self.linear(x, prefix + "up_proj.weight"),
                           prefix + "down_proj.weight")

    def mixture_of_experts(self, x, prefix):
        logits = x @ self.weights[prefix + "gate.weight"].T
        bias = self.weights.get(prefix + "gate.e_score_correction_bias")
        experts, weights = route(logits, bias, self.config)
        y = np.zeros_like(x)
        for expert in range(self.config["n_routed_experts"]):
            token, rank = np.nonzero(experts == expert)
            if len(token):
                part = self.mlp(x[token], f"{prefix}experts.{expert}.")
                y[token] += part * weights[token, rank][:, None]
        if self.config["n_shared_experts"]:
            y += self.mlp(x, prefix + "shared_experts.")
        return y

    def queries(self, x, prefix):
        if not self.config["q_lora_rank"]:
            return self.linear(x, prefix + "q_proj.weight")
        compressed = self.norm(self.linear(x, prefix + "q_a_proj.weight"),
                               prefix + "q_a_layernorm.weight")
        return self.linear(compressed, prefix + "q_b_proj.weight")

    def attention(self, x, prefix, angles):
        c, tokens = self.config, len(x)
        heads, nope, value = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
        latent_rank = c["kv_lora_rank"]

        def per_head(y):
            return y.reshape(tokens, heads, -1).transpose(1, 0, 2)

        def rotate(y):
            return rotate_pairs(y, angles) * self.rotary_amplitude

        query = per_head(self.queries(x, prefix))
        query = np.concatenate([query[..., :nope], rotate(query[..., nope:])], -1)
        compressed = self.linear(x, prefix + "kv_a_proj_with_mqa.weight")
        latent = self.norm(compressed[:, :latent_rank], prefix + "kv_a_layernorm.weight")
        key_value = per_head(self.linear(latent, prefix + "kv_b_proj.weight"))
        rotary_key = np.broadcast_to(rotate(compressed[:, latent_rank:]),
                                     (heads, tokens, c["qk_rope_head_dim"]))
        key = np.concatenate([key_value[..., :nope], rotary_key], -1)

        scores = query @ key.transpose(0, 2, 1) * self.softmax_scale
        causal = np.tril(np.ones((tokens, tokens), bool))
        mixed = softmax(np.where(causal, scores, -np.inf)) @ key_value[..., nope:]
        return self.linear(mixed.transpose(1, 0, 2).reshape(tokens, heads * value),
                           prefix + "o_proj.weight")

    def layer(self, hidden, index, angles):
        prefix = f"model.layers.{index}."
        hidden = hidden + self.attention(self.norm(hidden, prefix + "input_layernorm.weight"),
                                         prefix + "self_attn.", angles)
        x = self.norm(hidden, prefix + "post_attention_layernorm.weight")
        if prefix + "mlp.gate.weight" in self.weights:
            return hidden + self.mixture_of_experts(x, prefix + "mlp.")
        return hidden + self.mlp(x, prefix + "mlp.")

    def logits(self, token_ids):
        """[len(token_ids), vocab_size]: row i says what comes after token i."""
        embedding = self.weights["model.embed_tokens.weight"]
        head = embedding if self.config["tie_word_embeddings"] else self.weights["lm_head.weight"]
        angles = np.outer(np.arange(len(token_ids), dtype=np.float64), self.frequencies)
        hidden = embedding[np.asarray(token_ids)]
        for index in range(self.config["num_hidden_layers"]):
            hidden = self.layer(hidden, index, angles)
        return self.norm(hidden, "model.norm.weight") @ head.T

    def prompt_logprobs(self, token_ids):
        """The logprob of every token but the first, given those before it."""
        logprobs = log_softmax(self.logits(token_ids)[:-1])
        return logprobs[np.arange(len(token_ids) - 1), token_ids[1:]]

    def greedy(self, token_ids, num_tokens):
        """The best continuation, its logprobs, and by how much each token beat the second best."""
        tokens, logprobs, gaps = list(token_ids), [], []
        for _ in range(num_tokens):
            last = log_softmax(self.logits(tokens)[-1])
            second, best = np.sort(last)[-2:]
            tokens.append(int(last.argmax()))
            logprobs.append(float(best))
            gaps.append(float(best - second))
        return tokens[len(token_ids):], logprobs, gaps


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--prompt", required=True, help="token ids, separated by commas")
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="tokens to continue by")
    options = parser.parse_args()
    prompt = [int(token) for token in options.prompt.split(",")]
    model = ReferenceModel(options.folder)
    tokens, logprobs, gaps = model.greedy(prompt, options.greedy)
    print(json.dumps({
        "prompt_logprobs": [None, *model.prompt_logprobs(prompt).tolist()],
        "token_ids": tokens, "token_logprobs": logprobs, "gaps": gaps}, indent=1))


if __name__ == "__main__":
    main()
