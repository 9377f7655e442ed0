"""Every decoder family of `transformers`: can students be made of it, and are they right?

    python tests/families.py > docs/families.md

The list of families is that of the installed `transformers`. Each gets a random teacher
of four layers, as small as its config allows, which is cut to its first and last.
"""

import copy
import re
import sys
import tempfile
from collections import Counter

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import willows_kd as kd
from willows_kd.losses import forward_kl
from willows_kd.models import layer_stack, quiet_transformers, skipped_layers

DEPTH, KEPT, VOCABULARY, LARGEST = 4, [0, 3], 96, 3e6
RIGHT, REFUSED, UNBUILT = "right", "refused", "cannot be made small"
SMALL = [  # the first pattern that matches a setting's name gives its value
    (r"vocab_size$|^vocab_size_per_layer_input$", VOCABULARY),
    (r"pad_token_id$", 0),
    (r"token_id$|token_index$", 1),
    (r"experts_per_tok|_topk$|^top_?k|moe_k$|num_selected|topk_group|n_group", 1),
    (r"expert.*(size|dim)", 24),
    (r"n_routed|num_.*experts|n_experts|moe_num_experts|num_local", 4),
    (r"shared_experts", 1),
    (r"first_k_dense|period|interval|_step$|every_n", 2),
    (r"offset", 1),
    (r"(key_value|kv).*heads|multi_query_heads|n_kv|n_groups|num_groups|num_ln_in", 2),
    (r"mamba_n_heads|num_heads_mamba", 8),
    (r"head_dim|d_head|qk_.*dim|v_dim|kv_channels|d_kv", 8),
    (r"head", 4),
    (r"rank", 8),
    (r"sliding_window|window_size|attention_window|local_window|chunk", 4),
    (r"position|n_ctx|seq_len|seqlen|max_.*length|context", 64),
    (r"^num_kv_shared_layers$", 0),
    (r"layers?$|n_layer|depth|num_blocks", DEPTH),
    (r"state|d_conv|conv_kernel|expand", 4),
    (r"intermediate|ffn|inner|mlp.*(size|dim)", 48),
    (r"hidden|d_model|n_embd|embed|width|^dim$|lru|emb_dim|d_embed|model_dim", 32),
]


def small(config_class):
    """A config of a family with every size that it has made small, its parts too."""
    defaults = config_class()
    sizes = {}
    for name, value in vars(defaults).items():
        if isinstance(value, transformers.PreTrainedConfig):
            sizes[name] = small(type(value))
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            fits = [size for pattern, size in SMALL if re.search(pattern, name)]
            if fits and (fits[0] < value or fits[0] == DEPTH):
                sizes[name] = fits[0]
    if "attention_types" in vars(defaults):  # of GPT-Neo
        sizes["attention_types"] = [[["global", "local"], DEPTH // 2]]
    if hasattr(defaults, "is_decoder"):
        sizes["is_decoder"] = True
    return config_class(**sizes)


def random_teacher(family: str):
    """A small teacher with noise on every weight, so that no two layers are alike."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        config = small(CONFIG_MAPPING[family])
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f} million parameters")
        teacher = AutoModelForCausalLM.from_config(config).float().eval()
        for weight in teacher.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    return teacher
