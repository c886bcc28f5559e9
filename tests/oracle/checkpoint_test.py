"""The generator and the float64 model: against DeepSeek's own numbers, and against themselves."""

import json
import pathlib
import sys
import tempfile
import unittest

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
sys.path.insert(0, str(ROOT / "oracle"))

from make_checkpoint import make_checkpoint  # noqa: E402
from reference_model import ReferenceModel, route  # noqa: E402
from safetensors_file import e4m3_codes, e4m3_decode, load, load_checkpoint  # noqa: E402

# DeepSeek's code ran in float32: its rounding, relative to the largest logit, measured at 3e-6.
GOLDEN_TOLERANCE = 1e-5


class GoldenTest(unittest.TestCase):
    def check(self, name):
        golden = load(GOLDEN / name / "golden.safetensors")
        model = ReferenceModel(GOLDEN / name / "ckpt")
        for prompt in ("p1", "p7"):
            expected = golden[prompt + ".logits"].to_float64()
            tokens = golden[prompt + ".tokens"].numpy()
            worst = np.abs(model.logits(tokens) - expected).max() / np.abs(expected).max()
            self.assertLess(worst, GOLDEN_TOLERANCE, f"{name} {prompt}")
        greedy = golden["p7.greedy"].numpy()[:8]
        self.assertEqual(model.greedy(golden["p7.tokens"].numpy(), 8)[0], greedy.tolist())

    def test_agrees_with_deepseek_on_v3(self):
        self.check("v3_tiny")

    def test_agrees_with_deepseek_without_q_lora(self):
        self.check("v3_tiny_noqlora")

    def test_agrees_with_deepseek_on_fp8(self):
        self.check("v3_tiny_fp8")

    def test_agrees_with_deepseek_on_v2(self):
        self.check("v2_tiny_softmax")

    def test_the_generator_still_writes_the_golden_checkpoints(self):
        for preset, shards in (("v3_tiny", 2), ("v3_tiny_fp8", 1)):
            with tempfile.TemporaryDirectory() as folder:
                made = make_checkpoint(folder, preset, shards=shards)
                files = {path.name for path in pathlib.Path(folder).iterdir()}
            expected = load_checkpoint(GOLDEN / preset / "ckpt")
            self.assertEqual(files, {path.name for path in (GOLDEN / preset / "ckpt").iterdir()})
            self.assertEqual(made.keys(), expected.keys())
            for name, tensor in expected.items():
                self.assertEqual((made[name].dtype, made[name].shape), (tensor.dtype, tensor.shape))
                self.assertEqual(made[name].data, tensor.data, f"{preset} {name}")


class VariantTest(unittest.TestCase):
    """Options that no golden covers: they must load, and change what they ought to change."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = holder.name

    def make(self, preset="v3_tiny", **options):
        options = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0} | options
        self.tensors = make_checkpoint(self.folder, preset, **options)
        return ReferenceModel(self.folder)

    def test_tied_embeddings_have_no_head_of_their_own(self):
        model = self.make(tie_word_embeddings=True)
        self.assertNotIn("lm_head.weight", self.tensors)
        logits = model.logits([5, 9, 2])
        self.assertTrue(np.isfinite(logits).all())
        self.assertGreater(len(set(model.greedy([5, 9, 2], 8)[0])), 1)

    def test_float32_keeps_what_bfloat16_rounds(self):
        self.make(torch_dtype="float32")
        self.assertEqual({tensor.dtype for tensor in self.tensors.values()}, {"F32"})
        exact = self.tensors["lm_head.weight"].to_float64()
        self.make()
        rounded = self.tensors["lm_head.weight"].to_float64()
        worst = np.abs(rounded / exact - 1).max()
        self.assertLessEqual(worst, 2.0**-8)  # half a unit in the last of 8 bits
        self.assertGreater(worst, 2.0**-10)

    def test_greedy_routing_knows_no_groups(self):
        logits = np.array([[3.0, 2.9, -5.0, 2.8]])
        config = dict(scoring_func="softmax", topk_method="greedy", n_group=2, topk_group=1,
                      num_experts_per_tok=3, norm_topk_prob=False, routed_scaling_factor=1.0)
        self.assertEqual(route(logits, None, config)[0].tolist(), [[0, 1, 3]])
        config["topk_method"] = "group_limited_greedy"
        self.assertEqual(route(logits, None, config)[0].tolist()[0][:2], [0, 1])
        self.assertTrue(np.isfinite(self.make("v2_tiny_greedy").logits([5, 9])).all())

    def test_other_sizes_and_an_irregular_layer_pattern(self):
        model = self.make(num_hidden_layers=4, n_routed_experts=12, n_group=3, topk_group=2,
                          n_shared_experts=None, moe_layer_freq=2, num_attention_heads=4)
        self.assertTrue(np.isfinite(model.logits([5, 9])).all())
        self.assertNotIn("model.layers.3.mlp.gate.weight", self.tensors)
        self.assertIn("model.layers.2.mlp.gate.weight", self.tensors)

    def test_fp8_activations_change_little(self):
        self.make("v3_tiny_fp8")
        exact = ReferenceModel(self.folder).logits([5])
        rounded = ReferenceModel(self.folder, fp8_activations=True).logits([5])
        self.assertGreater(np.abs(exact - rounded).max(), 1e-4)
        self.assertLess(np.abs(exact - rounded).mean(), 0.2)

    def test_the_tokenizer_comes_with_its_companions(self):
        self.make(tokenizer=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            with open(pathlib.Path(self.folder) / name, encoding="utf-8") as file:
                json.load(file)
        with self.assertRaisesRegex(ValueError, "512 entries"):
            self.make(tokenizer=True, vocab_size=256)

    def test_logprobs_follow_from_the_logits(self):
        model = self.make()
        logits = model.logits([5, 9, 2])
        expected = logits[0, 9] - np.log(np.exp(logits[0]).sum())
        self.assertAlmostEqual(model.prompt_logprobs([5, 9, 2])[0], expected, places=10)


class NumberFormatTest(unittest.TestCase):
    def test_e4m3_rounds_to_nearest_even_and_saturates(self):
        for value, expected in ((1.0625, 1.0), (1.1875, 1.25), (1e9, 448.0), (-464.0, -448.0),
                                (2.0**-10, 0.0), (3 * 2.0**-10, 2.0**-8)):
            self.assertEqual(float(e4m3_decode(e4m3_codes(value))), expected, value)


if __name__ == "__main__":
    if "--bin" in sys.argv:  # every Python test is told where the programs are; this one needs none
        at = sys.argv.index("--bin")
        del sys.argv[at:at + 2]
    unittest.main()
