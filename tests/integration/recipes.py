"""Ten more checkpoints: every option and odd size that the golden ones leave out."""

from checkpoints import Recipe
from presets import PRESETS

_NO_MTP = dict(num_nextn_predict_layers=0)

RECIPES = (
    Recipe("tied_head", fields=dict(_NO_MTP, tie_word_embeddings=True)),
    Recipe("f32_without_q_lora_or_rope_scaling", fields=dict(
        _NO_MTP, torch_dtype="float32", q_lora_rank=None, rope_scaling=None)),
    Recipe("softmax_greedy_like_v2_lite", "v2_tiny_greedy"),
    Recipe("one_group_of_many_experts", fields=dict(
        _NO_MTP, n_group=1, topk_group=1, n_routed_experts=24, num_experts_per_tok=6,
        rope_theta=50000.0)),
    Recipe("no_shared_experts", fields=dict(_NO_MTP, n_shared_experts=0)),
    Recipe("odd_sizes", fields=dict(
        _NO_MTP, vocab_size=251, hidden_size=111, intermediate_size=177, moe_intermediate_size=37,
        num_attention_heads=5, num_key_value_heads=5, q_lora_rank=29, kv_lora_rank=43,
        qk_nope_head_dim=13, qk_rope_head_dim=6, v_head_dim=19, n_routed_experts=15, n_group=3,
        topk_group=2, num_experts_per_tok=3)),
    Recipe("head_dims_of_v3", fields=dict(
        _NO_MTP, num_hidden_layers=2, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        kv_lora_rank=512, q_lora_rank=200,
        rope_scaling=dict(PRESETS["v3_tiny"]["rope_scaling"], mscale=0.707))),
    Recipe("fp8_ragged_in_many_shards", "v3_tiny_fp8", dict(
        hidden_size=192, intermediate_size=400, moe_intermediate_size=72, q_lora_rank=136,
        kv_lora_rank=80, n_routed_experts=16), shards=5),
    Recipe("dense_only", fields=dict(_NO_MTP, num_hidden_layers=3, first_k_dense_replace=3)),
    Recipe("six_heads_two_dense_layers", fields=dict(
        vocab_size=258, hidden_size=96, intermediate_size=192, moe_intermediate_size=48,
        num_attention_heads=6, num_key_value_heads=6, n_routed_experts=12, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, num_nextn_predict_layers=2)),
)

# Every slice of two ranks is a multiple of 128 wide, as in the real models.
BLOCKS_WITHIN_RANKS = Recipe("blocks_within_ranks", fields=dict(
    _NO_MTP, num_hidden_layers=2, hidden_size=256, intermediate_size=512,
    moe_intermediate_size=256, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=128,
    kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=80))
