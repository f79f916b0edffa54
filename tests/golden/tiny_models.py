"""The tiny models that golden files and tests share, as fields of diffusers' `config.json`.

Golden files hold weights and outputs of these sizes: who changes one makes its files anew.
"""

WAN = {  # wan_transformer.npz: the smallest with every kind of layer
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 2,
    "out_channels": 2,
    "text_dim": 6,
    "freq_dim": 8,
    "ffn_dim": 24,
    "num_layers": 2,
}
WAN_ODD = {  # released_wan.npz and conversions: odd channels and hidden sizes
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 35,
    "num_layers": 2,
}
WAN_SAVED = {  # what the parity suite lets diffusers save
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 56,
    "num_layers": 2,
}

COGVIDEOX = {  # released_cogvideox.npz: the smallest with every kind of layer
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 2,
    "out_channels": 2,
    "text_embed_dim": 6,
    "time_embed_dim": 8,
    "num_layers": 2,
    "sample_height": 8,
    "sample_width": 6,
}
_ROTARY = {"use_rotary_positional_embeddings": True}
COGVIDEOX_VARIANTS = {  # what tells the three models apart, whatever their size
    "2b": {},
    "5b": _ROTARY,
    "1_5": _ROTARY | {"patch_size_t": 2, "patch_bias": False},
}
COGVIDEOX_MODELS = {  # cogvideox_transformer.npz
    "2b": COGVIDEOX,
    "5b": COGVIDEOX | COGVIDEOX_VARIANTS["5b"] | {"num_layers": 1},
    "1_5": COGVIDEOX | COGVIDEOX_VARIANTS["1_5"] | {"num_layers": 1},
}

WAN_VAE = {  # wan_vae.npz: the smallest with every kind of layer
    "base_dim": 2,
    "z_dim": 2,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.0, 0.0],
    "latents_std": [1.0, 1.0],
}
COGVIDEOX_VAE = {  # cogvideox_vae.npz: the same
    "block_out_channels": [2, 4, 4],
    "down_block_types": ["CogVideoXDownBlock3D"] * 3,
    "up_block_types": ["CogVideoXUpBlock3D"] * 3,
    "latent_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}

T5 = {  # t5.npz, umt5.npz: 8 buckets up to a distance of 12, so that 16 tokens have both kinds
    "vocab_size": 20,
    "d_model": 12,
    "d_kv": 4,
    "num_heads": 2,
    "d_ff": 16,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
}
