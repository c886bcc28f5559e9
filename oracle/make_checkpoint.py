#!/usr/bin/python3
"""Writes a small random checkpoint of the DeepSeek-V3 family, as Hugging Face lays it out.

  oracle/make_checkpoint.py DIR [--preset v3_tiny] [--shards 2] [--tokenizer] [FIELD=JSON ...]

FIELD=JSON replaces a field of config.json, for example `num_hidden_layers=6 q_lora_rank=null`, or
adds one. The weights are random, so a model's text is noise; its numbers are what tests compare.
The same arguments give the same bytes.
"""

import argparse
import copy
import json
import os
import pathlib
import shutil
import sys
import zlib

import numpy as np

from presets import PRESETS
from safetensors_file import E4M3_MAX, Stored, e4m3_codes, save

FP8_BLOCK = 128
TOKENIZER_FOLDER = pathlib.Path(__file__).resolve().parent / "tokenizer_tiny"
TOKENIZER_ENTRIES = 512

# How strongly the head pulls from each token towards one fixed successor: the best logit then
# usually stands clear of the second, and greedy output survives the rounding of bfloat16.
HEAD_PULL = 1.25


class Weights:
    """Draws the tensors of one checkpoint, {name: Stored} in `tensors`."""

    def __init__(self, config, seed):
        self.config = config
        self.seed = seed
        self.tensors = {}
        self.fp8 = "quantization_config" in config

    def random(self, name):
        """One stream per name, so that adding a tensor leaves the others as they were."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def put(self, name, values):
        if self.config["torch_dtype"] == "float32":
            self.tensors[name] = Stored.of(np.asarray(values, np.float32))
        else:
            self.tensors[name] = Stored.bfloat16(values)

    def linear(self, name, rows, columns, gain=1.0, quantized=True):
        values = self.random(name).standard_normal((rows, columns)) * (gain / np.sqrt(columns))
        if self.fp8 and quantized:
            self.put_fp8(name, values)
        else:
            self.put(name, values)

    def put_fp8(self, name, values):
        rows, columns = values.shape
        grid = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        # Blocks of uneven magnitude, so that a wrong scale index shows.
        magnitudes = np.exp(self.random(name + "#m").normal(0, 0.4, grid))
        values = values * spread_blocks(magnitudes, values.shape)
        codes = np.empty(values.shape, np.uint8)
        scales = np.empty(grid, np.float32)
        for i in range(grid[0]):
            for j in range(grid[1]):
                block = (slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK),
                         slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK))
                scales[i, j] = np.float32(np.abs(values[block]).max() / E4M3_MAX)
                codes[block] = e4m3_codes(values[block] / np.float64(scales[i, j]))
        self.tensors[name] = Stored.e4m3(codes)
        self.tensors[name.replace(".weight", ".weight_scale_inv")] = Stored.of(scales)

    def norm(self, name, width):
        self.put(name, 1.0 + 0.15 * self.random(name).standard_normal(width))

    def mlp(self, prefix, intermediate_size):
        hidden_size = self.config["hidden_size"]
        self.linear(prefix + "gate_proj.weight", intermediate_size, hidden_size, 1.4)
        self.linear(prefix + "up_proj.weight", intermediate_size, hidden_size, 1.4)
        self.linear(prefix + "down_proj.weight", hidden_size, intermediate_size)

    def attention(self, prefix):
        c = self.config
        hidden_size, heads = c["hidden_size"], c["num_attention_heads"]
        query_rows = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        if c["q_lora_rank"]:
            self.linear(prefix + "q_a_proj.weight", c["q_lora_rank"], hidden_size)
            self.norm(prefix + "q_a_layernorm.weight", c["q_lora_rank"])
            self.linear(prefix + "q_b_proj.weight", query_rows, c["q_lora_rank"], 1.1)
        else:
            self.linear(prefix + "q_proj.weight", query_rows, hidden_size, 1.1)
        self.linear(prefix + "kv_a_proj_with_mqa.weight",
                    c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden_size, 1.1)
        self.norm(prefix + "kv_a_layernorm.weight", c["kv_lora_rank"])
        self.linear(prefix + "kv_b_proj.weight",
                    heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"], 1.1)
        self.linear(prefix + "o_proj.weight", hidden_size, heads * c["v_head_dim"], 1.3)

    def experts(self, prefix):
        c = self.config
        self.linear(prefix + "gate.weight", c["n_routed_experts"], c["hidden_size"], 1.3,
                    quantized=False)
        if c["topk_method"] == "noaux_tc":
            bias = self.random(prefix + "bias").normal(0, 0.12, c["n_routed_experts"])
            self.tensors[prefix + "gate.e_score_correction_bias"] = Stored.of(
                bias.astype(np.float32))
        for expert in range(c["n_routed_experts"]):
            self.mlp(f"{prefix}experts.{expert}.", c["moe_intermediate_size"])
        if c["n_shared_experts"]:
            self.mlp(prefix + "shared_experts.",
                     c["moe_intermediate_size"] * c["n_shared_experts"])

    def layer(self, index, has_experts):
        prefix = f"model.layers.{index}."
        self.attention(prefix + "self_attn.")
        self.norm(prefix + "input_layernorm.weight", self.config["hidden_size"])
        self.norm(prefix + "post_attention_layernorm.weight", self.config["hidden_size"])
        if has_experts:
            self.experts(prefix + "mlp.")
        else:
            self.mlp(prefix + "mlp.", self.config["intermediate_size"])

    def embedding_and_head(self):
        c = self.config
        shape = (c["vocab_size"], c["hidden_size"])
        embedding = self.random("embed").standard_normal(shape)
        if c["tie_word_embeddings"]:
            # As small as a head's rows: else a token's own logit would drown all others.
            return embedding / np.sqrt(c["hidden_size"]), None
        random = self.random("head")
        head = random.standard_normal(shape)
        order = random.permutation(c["vocab_size"])
        head[np.roll(order, -1)] += HEAD_PULL * embedding[order]
        return embedding, head / np.sqrt(c["hidden_size"])

    def prediction_layer(self, index, embedding, head):
        """A multi-token-prediction layer: one more layer between two projections."""
        prefix = f"model.layers.{index}."
        hidden_size = self.config["hidden_size"]
        self.put(prefix + "embed_tokens.weight", embedding)
        self.norm(prefix + "enorm.weight", hidden_size)
        self.norm(prefix + "hnorm.weight", hidden_size)
        self.linear(prefix + "eh_proj.weight", hidden_size, 2 * hidden_size, quantized=False)
        self.layer(index, has_experts=True)
        self.norm(prefix + "shared_head.norm.weight", hidden_size)
        self.put(prefix + "shared_head.head.weight", embedding if head is None else head)

    def draw(self):
        c = self.config
        num_layers = c["num_hidden_layers"]
        embedding, head = self.embedding_and_head()
        self.put("model.embed_tokens.weight", embedding)
        for index in range(num_layers):
            self.layer(index, has_experts=(index >= c["first_k_dense_replace"]
                                           and index % c["moe_layer_freq"] == 0))
        self.norm("model.norm.weight", c["hidden_size"])
        if head is not None:
            self.put("lm_head.weight", head)
        for index in range(c.get("num_nextn_predict_layers") or 0):
            self.prediction_layer(num_layers + index, embedding, head)
        return self.tensors


def spread_blocks(per_block, shape):
    """One value per 128x128 block -> one per element."""
    spread = np.repeat(np.repeat(per_block, FP8_BLOCK, 0), FP8_BLOCK, 1)
    return spread[:shape[0], :shape[1]]


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def write_shards(folder, tensors, num_shards):
    """Files of about equal size, and the index that says which tensor is where."""
    if num_shards == 1:
        save(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})
        return
    total = sum(len(tensor.data) for tensor in tensors.values())
    shards, done = [{} for _ in range(num_shards)], 0
    for name, tensor in tensors.items():
        shards[min(num_shards - 1, done * num_shards // total)][name] = tensor
        done += len(tensor.data)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{num_shards:06d}.safetensors"
        save(os.path.join(folder, file), shard, {"format": "pt"})
        weight_map.update({name: file for name in shard})
    write_json(os.path.join(folder, "model.safetensors.index.json"),
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_tokenizer(folder, config):
    if config["vocab_size"] < TOKENIZER_ENTRIES:
        raise ValueError(f"the tiny tokenizer has {TOKENIZER_ENTRIES} entries, vocab_size is "
                         f"{config['vocab_size']}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER_FOLDER / name, os.path.join(folder, name))
    write_json(os.path.join(folder, "generation_config.json"),
               {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]})


def make_checkpoint(folder, preset="v3_tiny", seed=20250101, shards=1, tokenizer=False, **fields):
    """Writes a checkpoint of the preset with `fields` replaced; returns its {name: Stored}."""
    config = copy.deepcopy(PRESETS[preset])
    config.update(fields)
    os.makedirs(folder, exist_ok=True)
    tensors = Weights(config, seed).draw()
    write_json(os.path.join(folder, "config.json"), config)
    write_shards(folder, tensors, shards)
    if tokenizer:
        write_tokenizer(folder, config)
    return tensors


def parse_field(text):
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"'{text}' is not FIELD=JSON")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"'{value}' is not JSON: {error}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--preset", choices=PRESETS, default="v3_tiny")
    parser.add_argument("--seed", type=int, default=20250101)
    parser.add_argument("--shards", type=int, default=1, help="files to cut the checkpoint into")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="how the weights are stored")
    parser.add_argument("--tokenizer", action="store_true",
                        help="add a 512-entry tokenizer and generation_config.json")
    parser.add_argument("fields", metavar="FIELD=JSON", nargs="*", type=parse_field,
                        help="replaces a field of config.json")
    parser.add_argument("--overwrite", action="store_true", help="what DIR holds already")
    options = parser.parse_intermixed_args()
    if os.path.exists(os.path.join(options.folder, "config.json")) and not options.overwrite:
        sys.exit(f"make_checkpoint: {options.folder} holds a model: choose another folder, or add "
                 "--overwrite")
    try:
        tensors = make_checkpoint(
            options.folder, options.preset, options.seed, options.shards, options.tokenizer,
            **{"torch_dtype": options.dtype, **dict(options.fields)})
    except ValueError as error:
        sys.exit(f"make_checkpoint: {error}")
    num_bytes = sum(len(tensor.data) for tensor in tensors.values())
    print(f"{options.folder}: {options.preset}, {len(tensors)} tensors, {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
