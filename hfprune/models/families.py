"""The supported families, each one short declaration (see `layout.py`), and the layout of a model.

To add a family, write its line in `FAMILIES`: its `model_type` in transformers, models that people know it by, and its
layout or a function from the config to it. tests/test_families.py then tests it, and `hfprune families` shows it. A
model of another family is supported too where its modules match a layout here, and its numbers agree (`matching.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hfprune.models.layout import QUERIES, Block, Layout, Mixture, Rows

if TYPE_CHECKING:  # a workflow reads layouts without paying for torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        models: names that people know it by.
        layout: the layout, or a function to it from a config: one of transformers, or the keys of a config.json.
        variants: names of models whose layout differs, and the keys of their config that make the difference.
    """

    models: str
    layout: Layout | Callable[[Any], Layout]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


def setting(config: Any, key: str, otherwise: Any = None) -> Any:
    """A value of a config, which is one of transformers or the keys of a config.json."""
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return otherwise if value is None else value


def _with(
    layout: Layout, attention: Mapping[str, Any] | None = None, mlp: Mapping[str, Any] | None = None, **others: Any
) -> Layout:
    """The layout with other values of its blocks, and of its own."""
    blocks = {"attention": replace(layout.attention, **attention or {}), "mlp": replace(layout.mlp, **mlp or {})}
    return replace(layout, **blocks, **others)


LLAMA = Layout(
    attention=Block(
        rows=(Rows("self_attn.q_proj"), Rows("self_attn.k_proj"), Rows("self_attn.v_proj")),
        output="self_attn.o_proj",
        module="self_attn",
        norm="input_layernorm",
        size="heads",
    ),
    mlp=Block(
        rows=(Rows("mlp.gate_proj"), Rows("mlp.up_proj")),
        output="mlp.down_proj",
        module="mlp",
        norm="post_attention_layernorm",
        size="intermediate_size",
    ),
)
BY_KIND = replace(LLAMA, masks_by_kind=True)  # full and sliding attention take masks of their own
POST_NORM = _with(
    BY_KIND,
    attention={"norm": None, "after": "post_attention_layernorm"},
    mlp={"norm": None, "after": "post_feedforward_layernorm"},
)
GEMMA_2 = _with(
    LLAMA,
    attention={"after": "post_attention_layernorm"},
    mlp={"norm": "pre_feedforward_layernorm", "after": "post_feedforward_layernorm"},
    masks_by_kind=True,
    logit_cap="final_logit_softcapping",
)
COHERE = _with(
    LLAMA,
    attention={"per_head": ("self_attn.q_norm", "self_attn.k_norm")},
    mlp={"norm": "input_layernorm"},
    parallel=True,
    logit_scale="logit_scale",
)
NORM_OVER_ALL_HEADS = (
    "it norms the queries and keys of all heads together, so that fewer heads would change those that stay. Cut mlp."
)
NORM_OVER_ALL_HEADS_OF_EXPERTS = NORM_OVER_ALL_HEADS.replace("Cut mlp.", "Cut experts or mlp.")
OLMO_2 = _with(POST_NORM, attention={"refused": NORM_OVER_ALL_HEADS}, masks_by_kind=False)
GATE_UP = {"rows": (Rows("mlp.gate_up_proj", (1, 1)),)}
GLM = _with(LLAMA, mlp=GATE_UP)
NO_GATE = _with(LLAMA, mlp={"rows": (Rows("mlp.up_proj"),)})


def _stablelm(config: Any) -> Layout:
    parallel = bool(setting(config, "use_parallel_residual"))
    normed = "its class holds a norm of its own for every head (qk_layernorm) and cannot have fewer. Cut mlp."
    return _with(
        LLAMA,
        attention={"size": None, "refused": normed if setting(config, "qk_layernorm") else None},
        mlp={"norm": "input_layernorm" if parallel else "post_attention_layernorm"},
        parallel=parallel,
    )


def _gpt_neox(config: Any) -> Layout:
    return Layout(
        # Each head's rows stand together: [q, k, v] of one head, then of the next.
        attention=Block((Rows("attention.query_key_value"),), "attention.dense", "attention", "input_layernorm"),
        mlp=Block(
            (Rows("mlp.dense_h_to_4h"),),
            "mlp.dense_4h_to_h",
            "mlp",
            "post_attention_layernorm",
            size="intermediate_size",
        ),
        final_norm="final_layer_norm",
        parallel=setting(config, "use_parallel_residual", True),
    )


def _falcon(config: Any) -> Layout:
    new, one_group = setting(config, "new_decoder_architecture", False), setting(config, "multi_query", True)
    parallel = new or setting(config, "parallel_attn", True)
    two_norms = new and setting(config, "num_ln_in_parallel_attn", 2) == 2
    heads, queries, refused = heads_of(config), 1, None
    if new:
        queries = heads // setting(config, "num_kv_heads", heads)
    elif one_group:
        queries = heads
    if one_group and not new:
        refused = "all its query heads share one key-value head, which has to stay. Cut mlp."
    return Layout(
        attention=Block(
            # A group's rows stand together, but for `multi_query`, where the one group has all.
            (Rows("self_attention.query_key_value"),),
            "self_attention.dense",
            "self_attention",
            "ln_attn" if two_norms else "input_layernorm",
            refused=refused,
        ),
        mlp=Block(
            (Rows("mlp.dense_h_to_4h"),),
            "mlp.dense_4h_to_h",
            "mlp",
            "ln_mlp" if two_norms else "input_layernorm" if parallel else "post_attention_layernorm",
            size="ffn_hidden_size",
        ),
        layers="h",
        final_norm="ln_f",
        parallel=parallel,
        layers_return_tuples=True,
        keeps_documents_apart=False,
        queries=queries,
    )


OPT = Layout(
    attention=Block(LLAMA.attention.rows, "self_attn.out_proj", "self_attn", "self_attn_layer_norm"),
    mlp=Block((Rows("fc1"),), "fc2", None, "final_layer_norm", activation="activation_fn", size="ffn_dim"),
    layers="decoder.layers",
    keeps_documents_apart=False,
    final_norm="decoder.final_layer_norm",
)
GPT_2 = Layout(
    attention=Block((Rows("attn.c_attn", (1, 1, 1)),), "attn.c_proj", "attn", "ln_1"),
    mlp=Block((Rows("mlp.c_fc"),), "mlp.c_proj", "mlp", "ln_2", size="n_inner"),
    layers="h",
    final_norm="ln_f",
)

NO_GROUPED_HEADS = (
    "its heads share one compressed state (MLA), from which each has keys and values of its own. Cut experts."
)
ONE_WIDTH = (
    "its config holds one width for routed and shared experts, so that neither can be narrower alone. Cut experts."
)
SINKS = "each of its query heads has a learned sink. Cut experts or mlp."
MIXTRAL = replace(
    LLAMA,
    mixture=Mixture(stored="block_sparse_moe.gate.weight", size="intermediate_size"),
)
QWEN_MOE = replace(LLAMA, mixture=Mixture(normalised="norm_topk_prob"))
GRANITE_MOE = replace(
    LLAMA,
    mixture=Mixture(
        "block_sparse_moe",
        "block_sparse_moe.router",
        "block_sparse_moe.experts",
        "block_sparse_moe.router.layer.weight",
        "intermediate_size",
    ),
    multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
)
GLM_MOE = replace(
    LLAMA,
    mixture=Mixture(
        scores="sigmoid",
        correction="mlp.gate.e_score_correction_bias",
        normalised="norm_topk_prob",
        scale="routed_scaling_factor",
        groups=2,
        refused=ONE_WIDTH,
    ),
)
LATENT = Block((), "self_attn.o_proj", "self_attn", "input_layernorm", refused=NO_GROUPED_HEADS)
DEEPSEEK_3 = replace(GLM_MOE, attention=LATENT)


def _deepseek_v2(config: Any) -> Layout:
    grouped = setting(config, "topk_method") == "group_limited_greedy"
    mixture = Mixture(normalised=False, scale="routed_scaling_factor", groups=int(grouped), refused=ONE_WIDTH)
    return replace(DEEPSEEK_3, mixture=mixture)


def _ernie_moe(config: Any) -> Layout:
    refused = ONE_WIDTH if setting(config, "moe_num_shared_experts", 2) else None
    correction = "mlp.gate.moe_statics.e_score_correction_bias"
    every = setting(config, "moe_layer_interval", 1)
    numbered = f"moe_layer_interval = {every}: its config says by the number of a layer whether it has experts."
    return replace(
        LLAMA,
        mixture=Mixture(correction=correction, counts=True, refused=refused),
        numbered=numbered if every > 1 else None,
    )


SLOPES = (
    "its positions (ALiBi) give every head a slope that depends on the number of heads: fewer heads would change those "
    "that stay. Cut mlp."
)
MPT = Layout(
    attention=Block((Rows("attn.Wqkv", (1, 1, 1)),), "attn.out_proj", "attn", "norm_1", refused=SLOPES),
    mlp=Block((Rows("ffn.up_proj"),), "ffn.down_proj", None, "norm_2", activation="ffn.act", size=4),
    layers="blocks",
    final_norm="norm_f",
    layers_return_tuples=True,
    branches=False,
    keeps_documents_apart=False,
)
BLOOM = Layout(
    # Each head's rows stand together: [q, k, v] of one head, then of the next.
    attention=Block(
        (Rows("self_attention.query_key_value"),), "self_attention.dense", "self_attention", "input_layernorm",
        refused=SLOPES,
    ),
    mlp=Block(
        (Rows("mlp.dense_h_to_4h"),), "mlp.dense_4h_to_h", None, "post_attention_layernorm", activation="mlp.gelu_impl",
        size=4,
    ),
    layers="h",
    final_norm="ln_f",
    layers_return_tuples=True,
    branches=False,
    keeps_documents_apart=False,
    repeated="alibi",
)  # fmt: skip

# Hybrids. States that pass from token to token mix the documents of a row.
HYBRID = {"branches": False, "keeps_documents_apart": False}
GATED = "its heads are gated, and most layers have linear attention instead, whose heads share one state. Cut {}."
QWEN_3_5 = _with(
    LLAMA, attention={"rows": (), "others": ("linear_attn.out_proj",), "refused": GATED.format("mlp")}, **HYBRID
)
QWEN_3_NEXT = _with(
    QWEN_3_5,
    attention={"refused": GATED.format("experts or mlp")},
    mixture=Mixture(normalised="norm_topk_prob"),
)
MINIMAX = _with(
    MIXTRAL,
    attention={
        "rows": (), "others": ("self_attn.out_proj",),
        "refused": "most layers have linear attention instead, which norms all heads together. Cut experts or mlp.",
    },
    multiplier="mlp_beta_factor",
    carried="mlp_alpha_factor",
    numbered="how fast its linear attention forgets follows from the number of the layer.",
    **HYBRID,
)  # fmt: skip
CONVOLVED = "most layers have a short convolution instead, which has no heads. Cut {}."
LFM_2 = Layout(
    attention=Block(
        (), "self_attn.out_proj", "self_attn", "operator_norm", others=("conv.out_proj",),
        refused=CONVOLVED.format("mlp"),
    ),
    mlp=Block(
        (Rows("feed_forward.w1"), Rows("feed_forward.w3")), "feed_forward.w2", "feed_forward", "ffn_norm",
        size="intermediate_size", settings=(("block_auto_adjust_ff_dim", False),),
    ),
    final_norm="embedding_norm",
    **HYBRID,
)  # fmt: skip


def _lfm2_moe(config: Any) -> Layout:
    return _with(
        LFM_2,
        attention={"refused": CONVOLVED.format("experts or mlp")},
        mixture=Mixture(
            "feed_forward",
            "feed_forward.gate",
            "feed_forward.experts",
            "feed_forward.gate.weight",
            scores="sigmoid",
            correction="feed_forward.expert_bias" if setting(config, "use_expert_bias", True) else None,
            normalised="norm_topk_prob",
            scale="routed_scaling_factor",
        ),
    )


FAMILIES = {
    "llama": Family("Llama, SmolLM2, and Mistral as GGUF", LLAMA),
    "mistral": Family("Mistral", LLAMA),
    "qwen2": Family("Qwen2, Qwen2.5", BY_KIND),
    "qwen3": Family("Qwen3", BY_KIND),
    "smollm3": Family("SmolLM3", BY_KIND),
    "granite": Family("Granite", replace(LLAMA, multiplier="residual_multiplier", logit_divisor="logits_scaling")),
    "ministral": Family("Ministral", BY_KIND),
    "seed_oss": Family("Seed-OSS", LLAMA),
    "hunyuan_v1_dense": Family("Hunyuan dense", LLAMA),
    "ernie4_5": Family("ERNIE 4.5 dense", LLAMA),
    "exaone4": Family("EXAONE 4", POST_NORM),
    "olmo": Family("OLMo", LLAMA),
    "gemma": Family("Gemma", LLAMA),
    "gemma2": Family("Gemma 2", GEMMA_2),
    "gemma3_text": Family("Gemma 3, text alone", GEMMA_2),
    "cohere": Family("Command R", COHERE),
    "cohere2": Family("Command R7B, Command A", replace(COHERE, masks_by_kind=True)),
    "olmo2": Family("OLMo 2", OLMO_2),
    "olmo3": Family("OLMo 3", replace(OLMO_2, masks_by_kind=True)),
    "helium": Family("Helium", _with(LLAMA, attention={"size": None})),
    "stablelm": Family("StableLM 2 1.6B, StableLM Zephyr 3B", _stablelm, {"StableLM 2 12B": {"qk_layernorm": True}}),
    "phi3": Family("Phi-3, Phi-4", _with(GLM, attention={"rows": (Rows("self_attn.qkv_proj", (QUERIES, 1, 1)),)})),
    "glm": Family("GLM-4 9B", GLM),
    "glm4": Family(
        "GLM-4-0414",
        _with(GLM, attention={"after": "post_self_attn_layernorm"}, mlp={"after": "post_mlp_layernorm"}),
    ),
    "nemotron": Family("Nemotron, Minitron", NO_GATE),
    "arcee": Family("AFM", NO_GATE),
    "apertus": Family(
        "Apertus", _with(NO_GATE, attention={"norm": "attention_layernorm"}, mlp={"norm": "feedforward_layernorm"})
    ),
    "starcoder2": Family("StarCoder2", _with(LLAMA, mlp={"rows": (Rows("mlp.c_fc"),), "output": "mlp.c_proj"})),
    "phi": Family(
        "Phi-1.5, Phi-2",
        _with(
            LLAMA,
            attention={"output": "self_attn.dense"},
            mlp={"rows": (Rows("mlp.fc1"),), "output": "mlp.fc2", "norm": "input_layernorm"},
            parallel=True,
            final_norm="final_layernorm",
        ),
    ),
    "gpt_neox": Family("Pythia, GPT-NeoX", _gpt_neox),
    "falcon": Family(
        "Falcon 7B",
        _falcon,
        {"Falcon 11B, 40B, 180B": {"new_decoder_architecture": True}},
    ),
    "opt": Family("OPT", OPT),
    "gpt2": Family("GPT-2", GPT_2),
    "mpt": Family("MPT", MPT),
    "bloom": Family("BLOOM, BLOOMZ", BLOOM),
    "qwen3_5_text": Family("Qwen3.5, text alone", QWEN_3_5),
    "lfm2": Family("LFM2", LFM_2),
    "mixtral": Family("Mixtral", MIXTRAL),
    "qwen2_moe": Family("Qwen1.5-MoE, Qwen2-57B-A14B", replace(QWEN_MOE, masks_by_kind=True)),
    "qwen3_moe": Family("Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder", QWEN_MOE),
    "olmoe": Family(
        "OLMoE",
        _with(
            LLAMA,
            attention={"refused": NORM_OVER_ALL_HEADS_OF_EXPERTS},
            mixture=Mixture(normalised="norm_topk_prob", size="intermediate_size"),
        ),
    ),
    "granitemoe": Family("Granite 3 MoE", GRANITE_MOE),
    "deepseek_v2": Family("DeepSeek-V2", _deepseek_v2),
    "deepseek_v3": Family("DeepSeek-V3, R1, Moonlight", DEEPSEEK_3),
    "glm4_moe": Family("GLM-4.5, GLM-4.6", GLM_MOE),
    "glm4_moe_lite": Family("GLM-4.7-Flash", DEEPSEEK_3),
    "dots1": Family("dots.llm1", replace(GLM_MOE, masks_by_kind=True)),
    "solar_open": Family("Solar Open", GLM_MOE),
    "exaone_moe": Family("K-EXAONE", replace(GLM_MOE, masks_by_kind=True)),
    "gpt_oss": Family(
        "gpt-oss, its weights in bfloat16",
        _with(
            BY_KIND,
            attention={"refused": SINKS},
            keeps_documents_apart=False,
            mixture=Mixture(router="mlp.router", stored="mlp.router.weight", size="intermediate_size", biased=True),
        ),
    ),
    "minimax": Family("MiniMax-Text-01, MiniMax-M1", MINIMAX),
    "minimax_m2": Family(
        "MiniMax-M2",
        _with(
            LLAMA,
            attention={"refused": NORM_OVER_ALL_HEADS_OF_EXPERTS},
            mixture=replace(MIXTRAL.mixture, scores="sigmoid", correction="mlp.e_score_correction_bias"),
        ),
    ),
    "ernie4_5_moe": Family("ERNIE 4.5 21B-A3B, 300B-A47B", _ernie_moe),
    "qwen3_next": Family("Qwen3-Next, Qwen3-Coder-Next", QWEN_3_NEXT),
    "qwen3_5_moe_text": Family("Qwen3.5 MoE, text alone", replace(QWEN_3_NEXT, mixture=Mixture())),
    "lfm2_moe": Family("LFM2-8B-A1B", _lfm2_moe),
}

# Families whose units cannot be removed: why, and what can be done instead.
SHARED = (
    "its last layers use the keys and values of others, each layer mixes several streams of hidden states (AltUp), "
    "and its first MLPs let only neurons write that stand out among all of them (activation_sparsity_pattern), so that "
    "fewer would change those that stay. Gemma 3 (gemma3_text) can be pruned."
)
LLAMA_4 = (
    "its experts take all tokens, weighted before they read them, and one key of the config holds the width of routed "
    "and shared experts. Qwen3 MoE (qwen3_moe) can be pruned."
)
REFUSED = {
    "gemma3n_text": SHARED,
    "gemma3n": SHARED,
    "gemma4_text": (
        "its layers add an embedding of their own (per-layer inputs) and are scaled as a whole (layer_scalar), its "
        "last ones use the keys and values of others, and attention differs by kind of layer. Gemma 3 (gemma3_text) "
        "can be pruned."
    ),
    "llama4_text": LLAMA_4,
    "llama4": LLAMA_4,
}


def refusal(config: Any) -> str | None:
    """Why units of a model cannot be removed, and what can be done instead; None if nothing is known against it.

    Args:
        config: one of transformers.
    """
    kind = setting(config, "model_type")
    if kind in REFUSED:
        return REFUSED[kind]
    if setting(config, "kv_lora_rank") and kind not in FAMILIES:
        return (
            "its attention is latent (MLA, kv_lora_rank): all heads share one compressed state, which has no units "
            "that can go. Take a model with ordinary attention, of one of the families of `hfprune families`."
        )
    if kind == "opt" and not config.do_layer_norm_before:
        return (
            "do_layer_norm_before = false: its norms stand behind the sum of hidden states and block (OPT 350M alone). "
            "The other OPT models can be pruned."
        )
    for key in ("apply_residual_connection_post_layernorm", "slow_but_exact"):
        if kind == "bloom" and setting(config, key):
            return f"{key} = true, with which its layers compute something else. Other BLOOM models can be pruned."
    if kind == "falcon" and config.alibi:
        return (
            "its positions are linear biases of attention (alibi), which rows of several texts do not allow. Falcon 7B "
            "and larger can be pruned."
        )
    if kind in FAMILIES and setting(config, "final_logit_softcapping") and not layout_for(config).logit_cap:
        return f"final_logit_softcapping = {config.final_logit_softcapping}, which models of this family do not have."
    return None


def layout_for(config: Any) -> Layout:
    """The layout of a model of a known family.

    Args:
        config: one of transformers, or the keys of a config.json.

    Raises:
        KeyError: the family is not known.
    """
    layout = FAMILIES[setting(config, "model_type")].layout
    return layout if isinstance(layout, Layout) else layout(config)


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model.

    Raises:
        UserError: it is of no known family, and its modules match no layout.
    """
    if model.config.model_type in FAMILIES:
        return layout_for(model.config)
    from hfprune.models.matching import matched

    return matched(model)


def heads_of(config: Any) -> int:
    """The number of query heads that a config states."""
    return next(filter(None, (setting(config, key) for key in ("num_attention_heads", "n_head", "n_heads"))))


def queries_of(config: Any, layout: Layout) -> int:
    """Query heads to a key-value head. It stays the same when heads are cut."""
    heads = heads_of(config)
    return layout.queries or heads // setting(config, "num_key_value_heads", heads)


def head_size(config: Any) -> int:
    """Columns of one head."""
    return setting(config, "head_dim") or hidden_size(config) // heads_of(config)


def hidden_size(config: Any) -> int:
    """The size of the hidden states."""
    return next(filter(None, (setting(config, key) for key in ("hidden_size", "n_embd", "d_model"))))


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # keys, of which a config has one
CHOSEN = ("num_experts_per_tok", "moe_k")


def _first_of(config: Any, keys: tuple[str, ...]) -> str:
    """The first of these keys that a config has.

    Raises:
        KeyError: it has none; transformers has a default.
    """
    for key in keys:
        if setting(config, key) is not None:
            return key
    raise KeyError(keys[0])


def experts_key(config: Any) -> str:
    """The key of a mixture's config with the number of experts."""
    return _first_of(config, EXPERTS)


def experts_of(config: Any) -> int:
    """The number of experts of a layer."""
    return setting(config, experts_key(config))


def chosen_of(config: Any) -> int:
    """To how many experts the router sends a token."""
    return setting(config, _first_of(config, CHOSEN))


def groups_of(config: Any, mixture: Mixture) -> int:
    """Into how many groups the experts of a layer fall; 1 without groups."""
    return setting(config, "n_group", 1) if mixture.groups else 1


def is_normalised(config: Any, mixture: Mixture) -> bool:
    """Whether the weights of the chosen experts are divided by their sum."""
    how = mixture.normalised
    return bool(setting(config, how, False)) if isinstance(how, str) else how


def fewest_experts(config: Any, mixture: Mixture) -> int:
    """The fewest experts that every group has to keep, for the router to choose among."""
    if groups_of(config, mixture) == 1:
        return max(mixture.groups, chosen_of(config))
    return max(mixture.groups, -(-chosen_of(config) // setting(config, "topk_group", 1)))


def neuron_parameters(config: Any, mixture: Mixture) -> int:
    """Parameters of one neuron of one expert: its rows of gate and up, and its column of down."""
    return 3 * hidden_size(config) + 2 * mixture.biased


def expert_parameters(config: Any, mixture: Mixture) -> int:
    """Parameters of one expert: its neurons, its bias, and its row of the router."""
    hidden, width = hidden_size(config), setting(config, mixture.size)
    biases = mixture.biased * (hidden + 1) + mixture.counts
    return width * neuron_parameters(config, mixture) + hidden + biases
