"""Small members of the DeepSeek-V3 family: config.json as a dictionary, one per kind."""

_COMMON = dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=0, eos_token_id=1, ep_size=1,
    hidden_act="silu", initializer_range=0.02, moe_layer_freq=1, rms_norm_eps=1e-6,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.33.1",
    use_cache=True)

_YARN = dict(
    beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
    original_max_position_embeddings=128, type="yarn")

_FP8 = dict(
    activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])

_V3 = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True)

_V2 = dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", scoring_func="softmax",
    norm_topk_prob=False)

_V2_YARN = dict(
    _YARN, factor=4, mscale=0.707, mscale_all_dim=0.707, original_max_position_embeddings=1024)

# Odd widths on purpose: 320 and 96 are no multiples of 128.
_SHAPE = dict(
    hidden_size=128, intermediate_size=320, moe_intermediate_size=64, first_k_dense_replace=1,
    num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32)

PRESETS = {
    # DeepSeek-V3: q_lora, groups, YaRN, one dense layer, one multi-token-prediction layer.
    "v3_tiny": dict(
        _COMMON, **_V3, **_SHAPE, vocab_size=512, num_hidden_layers=4, q_lora_rank=96,
        n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=5120,
        rope_theta=10000, rope_scaling=_YARN),
    # Moonlight: no q_lora, one group, two shared experts, plain rotary embedding.
    "v3_tiny_noqlora": dict(
        _COMMON, **_V3, **_SHAPE, vocab_size=256, num_hidden_layers=3, q_lora_rank=None,
        n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=1, topk_group=1,
        routed_scaling_factor=2.446, num_nextn_predict_layers=0, max_position_embeddings=4096,
        rope_theta=50000.0, rope_scaling=None),
    # FP8 as DeepSeek ships it, with blocks that do not fill the matrices.
    "v3_tiny_fp8": dict(
        _COMMON, **_V3, **dict(
            _SHAPE, hidden_size=256, intermediate_size=384, moe_intermediate_size=128,
            kv_lora_rank=128),
        vocab_size=256, num_hidden_layers=2, q_lora_rank=128, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, num_nextn_predict_layers=0, max_position_embeddings=5120,
        rope_theta=10000, rope_scaling=_YARN, quantization_config=_FP8),
    # DeepSeek-V2: softmax scores, group-limited routing, mscale 0.707.
    "v2_tiny_softmax": dict(
        _COMMON, **_V2, **_SHAPE, vocab_size=256, num_hidden_layers=3, q_lora_rank=48,
        n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=4.0,
        max_position_embeddings=4096, rope_theta=10000, rope_scaling=_V2_YARN),
    # DeepSeek-V2-Lite: no q_lora, softmax scores, greedy routing without groups.
    "v2_tiny_greedy": dict(
        _COMMON, **_V2, **_SHAPE, vocab_size=256, num_hidden_layers=3, q_lora_rank=None,
        n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=1, topk_group=1,
        topk_method="greedy", routed_scaling_factor=1.0, max_position_embeddings=4096,
        rope_theta=10000, rope_scaling=_V2_YARN),
}
