"""How models of transformers usually name the modules that adapters change, and what some mean.

Names only suggest what a model computes: a host tries a type that is not in `FAMILIES` on a few
tokens before it takes it.
"""

from loraloom.base.blocks import InputGroups

# Types of models that tests compare with PEFT's layers and with their own blocks.
FAMILIES = tuple(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite stablelm gpt_neox "
    "smollm3 olmo olmo3 ministral ministral3 ernie4_5 exaone4 hunyuan_v1_dense seed_oss helium "
    "hyperclovax glm glm4 starcoder2 nemotron arcee apertus jais2 cohere cohere2 nanochat lfm2 "
    "qwen3_5_text mixtral qwen2_moe qwen3_moe olmoe gpt_oss gemma3 mistral3".split()
)
# Projections by the tensor that they read, up to the output's.
ATTENTION_INPUTS: tuple[InputGroups, ...] = (
    (("q_proj", "k_proj", "v_proj"),),
    (("qkv_proj",),),
    (("query_key_value",),),
    (("query", "key", "value"),),
    (("wq", "wk", "wv"),),
    (("Wqkv",),),
    # of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), with and without q's
    (("q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",)),
    (("q_proj", "kv_a_proj_with_mqa"), ("kv_b_proj",)),
)
ATTENTION_OUTPUTS = ("o_proj", "dense", "out_proj", "wo", "Wo", "c_proj")
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
# Those of types whose FFN block calls a function, as transformers names them.
ACTIVATION_FUNCTIONS = {"lfm2": "silu", "lfm2_moe": "silu"}
# Fields of a configuration that say how many experts compute a token.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts")
# Fields of a configuration that usually say what becomes of the head's logits.
LOGIT_FIELDS = {
    "divisor": "logits_scaling",
    "factor": "logit_scale",
    "softcap": "final_logit_softcapping",
}
# What else they mean in some types; gemma3 ignores its own. What structure can't tell of others.
LOGIT_EXCEPTIONS = {
    "hyperclovax": {"divisor": "", "factor": "logits_scaling"},
    "gemma3": {"softcap": ""},
}

# A projection of FFN blocks that makes gate and up behind one another.
FUSED = "gate_up_proj"
# Projections of FFN blocks.
FFNS: tuple[InputGroups, ...] = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("fc1",), ("fc2",)),
    ((FUSED,), ("down_proj",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
    (("c_fc",), ("c_proj",)),
    (("up_proj",), ("down_proj",)),
    (("w1", "w3"), ("w2",)),
    (("fc_in",), ("fc_out",)),
)
