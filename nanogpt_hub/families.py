"""Two-way tables between our core and the families that Transformers has: gpt2, gpt_neox, llama, mixtral, nanochat.

Pure functions on dictionaries; files are checkpoint.py's business. What a config says decides what is written:

    family_of(config)                  -> ("gpt2", "")  or  ("nanogpt_hub", "why no stock family fits")
    config_to_hf(config)               -> the content of config.json          config_from_hf(content) -> GPTConfig
    state_to_hf(config, state_dict)    -> tensors as the family names them    state_from_hf(config, tensors) -> ours

These mappings hold for the core that they were verified with (edits/). A model of an edited core is OWN_TYPE,
whatever its config says: `config_to_hf` is then given that core, and the tensors keep our names.

A family may always store a parameter that our config leaves out (GPT-2 has a bias everywhere). It is then written as
zeros (norm weights: ones) and declared absent by a key that Transformers ignores, such as `"mlp_bias": false`.

nanochat is what Transformers calls so (NanoChatForCausalLM): karpathy's nanochat as it was at first. His repository has
gone on: a smear gate, value embeddings and scalars on the residual stream, which neither Transformers nor our core has.
Checkpoints of today's nanochat are none of this family; their tensors are refused by name.

Adding a family: one entry in FAMILIES, a parity test, and where its tensor layout is new, `split_tensor` and
`join_tensors`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanogpt_hub.model import GPT, GPTConfig

OWN_TYPE = "nanogpt_hub"  # model_type of the combinations that no stock family expresses; loads here only
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One stock model type: what it can express, how it spells our fields, what it calls our tensors."""

    architecture: str
    only: dict[str, tuple | range]  # our field -> the values that the family has; fields not named are free
    stored: tuple[str, ...]  # our fields whose parameters the family stores even where we have none
    keys: dict[str, tuple[str, ...]]  # our field -> their keys; all are written, the first one present is read
    rope_keys: dict[str, str]  # our field -> its spelling before Transformers 5
    missing: dict[str, Any]  # our field -> what a config without the key means in Transformers
    activations: dict[str, str]  # their name -> ours; of several, the first is written
    layout: str  # conv1d: matrices are (in, out). Of c_attn's rows, per_head: q, k, v of one head after the other;
    # split: q, k, v are three tensors; turned: and the halves of each q and k head are exchanged (see swap_halves)
    prefix: str  # of all tensors but the head; files made by the bare model lack it
    head: str  # their name of lm_head
    names: dict[str, tuple[str, ...]]  # our module -> theirs, * for the layer, then the expert; several: our rows, one
    # after the other
    keeps_head: bool = False  # a tied head is stored too: converters to other formats look for it


GELUS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh",
         "gelu_fast": "gelu_tanh", "gelu_python": "gelu"}  # fmt: skip
DENSE = dict(n_expert=(0,))
PLAIN = dict(qk_norm=(False,), embd_norm=(False,), logit_softcap=(0.0,))
MOST_EXPERTS = 1024
SHAPE_KEYS = dict(
    vocab_size=("vocab_size",), block_size=("max_position_embeddings",), n_layer=("num_hidden_layers",),
    n_head=("num_attention_heads",), n_embd=("hidden_size",), n_inner=("intermediate_size",),
    activation=("hidden_act",), tie_word_embeddings=("tie_word_embeddings",), attn_bias=("attention_bias",),
)  # fmt: skip
LLAMA_NAMES = {
    "wte": ("embed_tokens",),
    "h.*.attn.c_attn": ("layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"),
    "h.*.attn.c_proj": ("layers.*.self_attn.o_proj",),
    "lm_head": ("lm_head",),
}
LLAMA_NORMS = {
    "h.*.ln_1": ("layers.*.input_layernorm",),
    "h.*.ln_2": ("layers.*.post_attention_layernorm",),
    "ln_f": ("norm",),
}
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        only=dict(position=("learned",), norm=("layer",), activation=("gelu", "gelu_tanh", "relu2"),
                  parallel_residual=(False,), **DENSE, **PLAIN),
        stored=("attn_bias", "mlp_bias", "norm_weight", "norm_bias"),
        keys=dict(
            vocab_size=("vocab_size",), block_size=("n_positions", "n_ctx"), n_layer=("n_layer",), n_head=("n_head",),
            n_embd=("n_embd",), n_inner=("n_inner",), norm_eps=("layer_norm_epsilon",),
            activation=("activation_function",), tie_word_embeddings=("tie_word_embeddings",),
            dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"), attn_bias=("attn_bias",), mlp_bias=("mlp_bias",),
            norm_weight=("norm_weight",), norm_bias=("norm_bias",),
        ),
        rope_keys={},
        missing=dict(vocab_size=50257, activation="gelu_new", dropout=0.1),
        activations=GELUS,
        layout="conv1d",
        prefix="transformer.",
        head="lm_head",
        names={
            name: (name,)
            for name in ("wte", "wpe", "h.*.ln_1", "h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.ln_2", "h.*.mlp.c_fc",
                         "h.*.mlp.c_proj", "ln_f", "lm_head")
        },
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        only=dict(position=("rotary",), norm=("layer",), activation=("gelu", "gelu_tanh", "relu2"), **DENSE,
                  **PLAIN),
        stored=("mlp_bias", "norm_weight", "norm_bias"),
        keys=dict(
            **SHAPE_KEYS, norm_eps=("layer_norm_eps",), parallel_residual=("use_parallel_residual",),
            dropout=("hidden_dropout", "attention_dropout"), mlp_bias=("mlp_bias",), norm_weight=("norm_weight",),
            norm_bias=("norm_bias",),
        ),
        rope_keys=dict(rope_theta="rotary_emb_base", rotary_fraction="rotary_pct"),
        missing=dict(vocab_size=50432, block_size=2048, n_layer=44, n_head=64, n_embd=6144, n_inner=24576,
                     activation="gelu", tie_word_embeddings=False, parallel_residual=True, rotary_fraction=0.25),
        activations=GELUS,
        layout="per_head",
        prefix="gpt_neox.",
        head="embed_out",
        names={
            "wte": ("embed_in",),
            "h.*.ln_1": ("layers.*.input_layernorm",),
            "h.*.attn.c_attn": ("layers.*.attention.query_key_value",),
            "h.*.attn.c_proj": ("layers.*.attention.dense",),
            "h.*.ln_2": ("layers.*.post_attention_layernorm",),
            "h.*.mlp.c_fc": ("layers.*.mlp.dense_h_to_4h",),
            "h.*.mlp.c_proj": ("layers.*.mlp.dense_4h_to_h",),
            "ln_f": ("final_layer_norm",),
            "lm_head": ("embed_out",),
        },
        keeps_head=True,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        only=dict(position=("rotary",), rotary_fraction=(1.0,), norm=("rms",), norm_bias=(False,),
                  activation=("swiglu",), parallel_residual=(False,), **DENSE, **PLAIN),
        stored=("norm_weight",),
        keys=dict(
            **SHAPE_KEYS, n_kv_head=("num_key_value_heads",), norm_eps=("rms_norm_eps",), mlp_bias=("mlp_bias",),
            norm_weight=("norm_weight",), dropout=("attention_dropout",),
        ),
        rope_keys=dict(rope_theta="rope_theta"),
        missing=dict(vocab_size=32000, block_size=2048, n_layer=32, n_head=32, n_embd=4096, n_inner=11008,
                     norm_eps=1e-6, activation="silu", tie_word_embeddings=False, attn_bias=False, mlp_bias=False),
        activations={"silu": "swiglu", "swish": "swiglu"},
        layout="split",
        prefix="model.",
        head="lm_head",
        names={
            **LLAMA_NAMES,
            **LLAMA_NORMS,
            "h.*.mlp.c_fc": ("layers.*.mlp.up_proj",),
            "h.*.mlp.c_gate": ("layers.*.mlp.gate_proj",),
            "h.*.mlp.c_proj": ("layers.*.mlp.down_proj",),
        },
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        only=dict(position=("rotary",), rotary_fraction=(1.0,), norm=("rms",), norm_bias=(False,),
                  activation=("swiglu",), attn_bias=(False,), mlp_bias=(False,), parallel_residual=(False,),
                  n_expert=range(1, MOST_EXPERTS + 1), **PLAIN),
        stored=("norm_weight",),
        keys=dict(
            **{name: keys for name, keys in SHAPE_KEYS.items() if name != "attn_bias"},
            n_kv_head=("num_key_value_heads",), norm_eps=("rms_norm_eps",), norm_weight=("norm_weight",),
            dropout=("attention_dropout",), n_expert=("num_local_experts",), n_expert_per_tok=("num_experts_per_tok",),
            router_aux_loss_coef=("router_aux_loss_coef",),
        ),
        rope_keys=dict(rope_theta="rope_theta"),
        missing=dict(vocab_size=32000, block_size=131072, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                     n_inner=14336, norm_eps=1e-5, activation="silu", tie_word_embeddings=False, rope_theta=1e6,
                     n_expert=8, n_expert_per_tok=2, router_aux_loss_coef=0.001),
        activations={"silu": "swiglu", "swish": "swiglu"},
        layout="split",
        prefix="model.",
        head="lm_head",
        names={
            **LLAMA_NAMES,
            **LLAMA_NORMS,
            "h.*.mlp.router": ("layers.*.block_sparse_moe.gate",),
            "h.*.mlp.experts.*.c_gate": ("layers.*.block_sparse_moe.experts.*.w1",),
            "h.*.mlp.experts.*.c_proj": ("layers.*.block_sparse_moe.experts.*.w2",),
            "h.*.mlp.experts.*.c_fc": ("layers.*.block_sparse_moe.experts.*.w3",),
        },
    ),
    "nanochat": Family(
        architecture="NanoChatForCausalLM",
        only=dict(position=("rotary",), rotary_fraction=(1.0,), norm=("rms",), norm_weight=(False,),
                  norm_bias=(False,), activation=("relu2", "gelu", "gelu_tanh"), mlp_bias=(False,),
                  parallel_residual=(False,), qk_norm=(True,), embd_norm=(True,), **DENSE),
        stored=(),
        keys=dict(
            **SHAPE_KEYS, n_kv_head=("num_key_value_heads",), norm_eps=("rms_norm_eps",),
            logit_softcap=("final_logit_softcapping",), dropout=("attention_dropout",),
        ),
        rope_keys=dict(rope_theta="rope_theta"),
        missing=dict(vocab_size=50304, block_size=2048, n_head=6, n_inner=8192, norm_eps=1e-6, activation="relu2",
                     attn_bias=False, tie_word_embeddings=False, logit_softcap=15.0),
        activations=GELUS,
        layout="turned",
        prefix="model.",
        head="lm_head",
        names={**LLAMA_NAMES, "h.*.mlp.c_fc": ("layers.*.mlp.fc1",), "h.*.mlp.c_proj": ("layers.*.mlp.fc2",)},
    ),
}  # fmt: skip

# Keys of a foreign config that change what is computed, with the values that leave it alone. Anything else is refused:
# a model must never load as something that it is not. (Keys that only matter in training are not listed.)
HARMLESS: dict[str, tuple] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (None, 1.0),
}
# Bounds that no real model of these families reaches: a config from anywhere is checked before anything is built.
LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 10_000_000), "block_size": (1, 16_777_216), "n_layer": (1, 1000), "n_head": (1, 65_536),
    "n_kv_head": (0, 65_536), "n_embd": (1, 65_536), "n_inner": (0, 1_048_576), "rope_theta": (1e-3, 1e12),
    "n_expert": (0, MOST_EXPERTS), "n_expert_per_tok": (1, MOST_EXPERTS), "router_aux_loss_coef": (0.0, 1e6),
    "rotary_fraction": (0.0, 1.0), "norm_eps": (1e-30, 1.0), "logit_softcap": (0.0, 1e6), "dropout": (0.0, 1.0),
}  # fmt: skip
ANY_NUMBER = (-1e12, 1e12)  # of a field that an edited core adds
MAX_PARAMETERS = 10**12
LATER_NANOCHAT = re.compile(r"(^|[._])(smear\w*|value_embeds|ve_gate|resid_lambdas|x0_lambdas|backout_lambda)([._]|$)")
BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


# Configs -------------------------------------------------------------------------------------------------------------


def family_of(config: GPTConfig) -> tuple[str, str]:
    """The model type that expresses `config`, and "", or OWN_TYPE and the fields that rule the nearest family out."""
    obstacles = {name: _obstacles(family, config) for name, family in FAMILIES.items()}
    nearest = min(obstacles, key=lambda name: len(obstacles[name]))
    if not obstacles[nearest]:
        return nearest, ""
    return OWN_TYPE, f"{nearest}, the nearest stock family, has no {' and no '.join(obstacles[nearest])}"


def _obstacles(family: Family, config: GPTConfig) -> list[str]:
    """The fields of `config`, as `name=value`, that the family cannot express."""
    found = [f"{name}={getattr(config, name)}" for name, ok in family.only.items() if getattr(config, name) not in ok]
    if "n_kv_head" not in family.keys and config.kv_heads != config.n_head:
        found.append(f"n_kv_head={config.n_kv_head}")
    return found


def config_to_hf(
    config: GPTConfig,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    dtype: str = "float32",
    core: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What config.json holds: the spellings of Transformers 5 and, beside them, those that older readers look for.

    Token ids are written even when None: a family's default may lie outside a small vocabulary. core: what is recorded
    of an edited model.py, which no stock family is verified with; None for the verified one.
    """
    model_type = family_of(config)[0] if core is None else OWN_TYPE
    common = dict(model_type=model_type, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=None,
                  dtype=dtype, torch_dtype=dtype, use_cache=True)  # fmt: skip
    if model_type == OWN_TYPE:
        own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "init"}
        return common | own | ({} if core is None else {"core": dict(core)})
    family = FAMILIES[model_type]
    result: dict[str, Any] = {"architectures": [family.architecture], **common}
    values = {name: getattr(config, name) for name in family.keys}
    values["n_inner"] = config.ffn_width
    values["activation"] = next(theirs for theirs, ours in family.activations.items() if ours == config.activation)
    if "n_kv_head" in values:
        values["n_kv_head"] = config.kv_heads
    if "logit_softcap" in values:
        values["logit_softcap"] = config.logit_softcap or None
    for name, keys in family.keys.items():
        if not (name in family.stored and values[name]):  # what the family always has needs no key
            result |= dict.fromkeys(keys, values[name])
    if family.rope_keys:
        result["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        if "rotary_fraction" in family.rope_keys:
            result["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
        result |= {key: getattr(config, name) for name, key in family.rope_keys.items()}
    return result


def config_from_hf(content: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a config.json. ValueError names the key that is wrong, or that asks for what we do not have.

    A missing key means what it means in Transformers; keys that change nothing in the computation are ignored, and so
    is `auto_map`: code that a repository brings along is never run. Dropout is read from the residual branches' key
    (llama, nanochat: attention's). `init` is not stored.
    """
    model_type = content.get("model_type")
    if model_type == OWN_TYPE:
        return _own_config(content)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join([*FAMILIES, OWN_TYPE])
        raise ValueError(f"model_type is {show(model_type)}; this project loads {known}")
    family = FAMILIES[model_type]
    _refuse_foreign_features(content)
    values = {name: allowed[0] for name, allowed in family.only.items() if len(allowed) == 1}
    for name, keys in family.keys.items():
        given = [key for key in keys if key in content]
        values[name] = content[given[0]] if given else family.missing.get(name, getattr(GPTConfig, name))
        if values[name] is None and name in ("n_inner", "n_kv_head", "logit_softcap"):
            values[name] = 0  # null is their way to say "the usual width", "as many as heads", "none"
    values |= _rope_values(content, family)
    activation = values["activation"]
    if not isinstance(activation, str) or activation not in family.activations:
        raise ValueError(
            f"{family.keys['activation'][0]} is {show(activation)}; this project knows {', '.join(family.activations)}"
        )
    values["activation"] = family.activations[activation]
    config = _checked_config(values, {name: keys[0] for name, keys in family.keys.items()})
    if asked := _obstacles(family, config):
        raise ValueError(f"config.json asks for {' and '.join(asked)}, which no {model_type} has")
    if content.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"head_dim is {show(content['head_dim'])}; this project has heads of hidden_size / num_attention_heads, "
            f"here {config.head_dim}"
        )
    return config


def _own_config(content: Mapping[str, Any]) -> GPTConfig:
    """Our own model type: the fields of GPTConfig by their names. A field we do not know may change the computation."""
    ours = {f.name for f in fields(GPTConfig)} - {"init"}
    housekeeping = {"model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
                    "torch_dtype", "use_cache", "transformers_version", "_name_or_path", "core"}  # fmt: skip
    unknown = sorted(set(content) - ours - housekeeping)
    if unknown:
        raise ValueError(
            f"config.json has {show(unknown[0])}, which this version of nanogpt_hub does not know; update it"
        )
    return _checked_config({name: content[name] for name in ours & set(content)}, {})


def _refuse_foreign_features(content: Mapping[str, Any]) -> None:
    for key, harmless in HARMLESS.items():
        if key in content and content[key] not in harmless:
            raise ValueError(f"{key} is {show(content[key])}; this project has only {key} = {harmless[0]!r}")
    window, used = content.get("sliding_window"), content.get("use_sliding_window")
    if used or (window is not None and used is not False):
        raise ValueError(
            f"sliding_window is {show(window)}, use_sliding_window {show(used)}; this project attends to all tokens"
        )
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise ValueError(f"layer_types is {show(layer_types)}; this project has only full_attention")


def _rope_values(content: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """rope_theta and rotary_fraction, from the nested spelling or the older flat one. Scaled rotary is refused."""
    nested: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # the first one given counts, as in Transformers
        given = content.get(key) or {}
        plain = isinstance(given, dict) and given.get("rope_type", given.get("type", "default")) == "default"
        if not plain:
            raise ValueError(
                f"{key} is {show(given)}; this project has plain rotary positions only (rope_type default)"
            )
        nested = nested or given
    values = {}
    for name, old_key in family.rope_keys.items():
        key = {"rope_theta": "rope_theta", "rotary_fraction": "partial_rotary_factor"}[name]
        usual = family.missing.get(name, getattr(GPTConfig, name))
        values[name] = nested.get(key, content.get(old_key, usual))
    if "rotary_fraction" not in family.rope_keys and nested.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {show(nested['partial_rotary_factor'])}; this family rotates whole heads"
        )
    return values


def _checked_config(values: dict[str, Any], spelled: dict[str, str]) -> GPTConfig:
    """A GPTConfig of untrusted `values`: types and bounds first, then its own checks, then the size as a whole."""
    hints = get_type_hints(GPTConfig)
    for name, value in values.items():
        _check_value(spelled.get(name, name), value, hints[name], *LIMITS.get(name, ANY_NUMBER))
        if hints[name] is float:
            values[name] = float(value)
    config = GPTConfig(**values)
    wide = max(1, config.n_expert) * config.ffn_width
    size = config.vocab_size * config.n_embd + config.n_layer * config.n_embd * (4 * config.n_embd + wide)
    if size > MAX_PARAMETERS:
        raise ValueError(f"the config asks for {size:.1e} parameters; at most {MAX_PARAMETERS:.0e} are loaded")
    # 0 stands for the usual, so that a config equals itself after a round trip
    if config.n_kv_head == config.n_head:
        config = replace(config, n_kv_head=0)
    usual = replace(config, n_inner=0)
    return usual if usual.ffn_width == config.ffn_width else config


def _check_value(key: str, value: Any, kind: Any, low: float, high: float) -> None:
    """ValueError unless `value` is of the declared kind and, for numbers, within [low, high]."""
    allowed: dict[type, tuple[Any, str]] = {
        bool: (bool, "true or false"), int: (int, "an integer"), float: ((int, float), "a number")
    }  # fmt: skip
    types, wanted = allowed.get(kind, (str, "a string"))
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} is {show(value)}; it must be {wanted}")
    if kind in (int, float) and not low <= value <= high:  # NaN is nowhere
        raise ValueError(f"{key} is {show(value)}; it must be from {low:g} to {high:g}")


def show(value: Any) -> str:
    """A value from a foreign file as an error may show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Tensors -------------------------------------------------------------------------------------------------------------


class _WithoutInit(TorchFunctionMode):
    """Inside, modules are made without drawing their first weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: GPTConfig) -> GPT:
    """A GPT of shapes without memory. (Weights drawn for it would make torch import its compiler, for a second.)"""
    with torch.device("meta"), _WithoutInit():
        return GPT(config)


@lru_cache(maxsize=8)  # building a deep model takes its time, even without memory
def parameter_shapes(config: GPTConfig) -> Mapping[str, Shape]:
    """Our tensors and their shapes, a tied head left out, without allocating any of them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return MappingProxyType(shapes)


def expected_tensors(config: GPTConfig, model_type: str = "") -> dict[str, Shape]:
    """The tensors that a model folder of this config holds, by the names in the file, with their shapes.

    model_type: of the folder, here and below; empty for the family that expresses the config.
    """
    state = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(config).items()}
    return {name: tuple(tensor.shape) for name, tensor in state_to_hf(config, state, model_type).items()}


def state_to_hf(config: GPTConfig, state: Mapping[str, Tensor], model_type: str = "") -> dict[str, Tensor]:
    """Our state dict as the family's tensors. Some share memory with ours; a tied head is left out."""
    state = {name: t for name, t in state.items() if not (config.tie_word_embeddings and name == "lm_head.weight")}
    family = FAMILIES.get(model_type or family_of(config)[0])
    if family is None:
        return state
    like = state["wte.weight"]
    result: dict[str, Tensor] = {}
    for name, shape in _stored_shapes(config, family).items():
        absent = float(name.endswith("weight"))  # a norm without weight is one with weight 1
        tensor = state[name] if name in state else torch.full(shape, absent, dtype=like.dtype, device=like.device)
        module = _module(name)
        result |= zip(_their_names(family, name), split_tensor(config, family, module, tensor), strict=True)
    return result


def head_copy(config: GPTConfig) -> tuple[str, str] | None:
    """(head, embedding) by the family's names, where a file holds a tied head beside the embedding; else None."""
    family = FAMILIES.get(family_of(config)[0])
    if family is None or not (family.keeps_head and config.tie_word_embeddings):
        return None
    return f"{family.head}.weight", _their_names(family, "wte.weight")[0]


def state_from_hf(config: GPTConfig, tensors: Mapping[str, Tensor], model_type: str = "") -> dict[str, Tensor]:
    """The family's tensors as our state dict, strictly: ValueError for any that is missing, unknown or misshapen.

    Also for one that the config declares absent but is not all zero (norm weights: one), and for a tied head that
    differs from the embedding.
    """
    given = match_tensors(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, model_type)
    family = FAMILIES.get(model_type or family_of(config)[0])
    if family is None:
        state = {name: tensors[name] for name in given}
    else:
        state = {}
        for name in _stored_shapes(config, family):
            parts = [tensors[given[theirs]] for theirs in _their_names(family, name)]
            state[name] = join_tensors(config, family, _module(name), parts)
        for name in state.keys() - parameter_shapes(config).keys():
            neutral = float(name.endswith("weight"))
            if not bool((state.pop(name) == neutral).all()):
                raise ValueError(f"the config declares {name} absent, but the file's is not all {neutral:g}")
    if config.tie_word_embeddings:
        head = given.get(f"{family.head if family else 'lm_head'}.weight")
        if head is not None and not torch.equal(tensors[head], state["wte.weight"]):
            raise ValueError(f"{head} differs from the embedding, but the config ties them (tie_word_embeddings)")
        state["lm_head.weight"] = state["wte.weight"]
    return state


def match_tensors(config: GPTConfig, shapes: Mapping[str, Shape], model_type: str = "") -> dict[str, str]:
    """Expected name -> the name under which a file with tensors of these `shapes` has it.

    Files without the family's prefix, with mask buffers, or with a copy of a tied head are fine. ValueError otherwise.
    """
    family = FAMILIES.get(model_type or family_of(config)[0])
    expected = expected_tensors(config, model_type)
    head = f"{family.head if family else 'lm_head'}.weight"
    optional = {head: (config.vocab_size, config.n_embd)} if config.tie_word_embeddings else {}
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        if family and is_buffer(name):
            continue
        full = _full_name(family, name)
        wanted = expected.get(full, optional.get(full))
        if wanted is None or full in found:
            what = "there twice" if wanted else f"not part of the model in config.json{later_nanochat(name)}"
            raise ValueError(f"tensor {show(name)} is {what}")
        if tuple(shape) != wanted:
            raise ValueError(f"tensor {show(name)} has shape {list(shape)}; config.json asks for {list(wanted)}")
        found[full] = name
    lacking = sorted(expected.keys() - found.keys())
    if lacking:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise ValueError(f"tensor {lacking[0]!r}{more} is missing from the weights")
    return found


def later_nanochat(name: str) -> str:
    """What to add where a tensor that is refused is one that karpathy's nanochat has, and Transformers' has not."""
    if not LATER_NANOCHAT.search(name):
        return ""
    return (
        "; it is of karpathy's nanochat as it is today (smear gate, value embeddings, scalars on the residual stream), "
        "which is not what Transformers calls nanochat and is not computed here"
    )


def is_buffer(name: str) -> bool:
    """Whether older files have a mask or a rotary table under this name: no weight, and of any dtype."""
    return BUFFERS.search(name) is not None


def _full_name(family: Family | None, name: str) -> str:
    """A name as the family writes it now: with its prefix, and the head by its usual name."""
    if family is None or name.startswith(family.prefix):
        return name
    if name in (f"{family.head}.weight", "lm_head.weight"):
        return f"{family.head}.weight"
    return family.prefix + name


def _stored_shapes(config: GPTConfig, family: Family) -> Mapping[str, Shape]:
    """Our names and shapes of all that the family stores, what it always stores included."""
    always: dict[str, Any] = dict.fromkeys(family.stored, True)
    return parameter_shapes(replace(config, **always))


def _module(name: str) -> str:
    """h.3.mlp.c_fc.weight -> h.*.mlp.c_fc, h.3.mlp.experts.0.c_fc.weight -> h.*.mlp.experts.*.c_fc"""
    return re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0]


def _their_names(family: Family, name: str) -> list[str]:
    """The family's names of our tensor `name`, in the order in which its rows are split."""
    module, kind = _module(name), name.rpartition(".")[2]
    if module not in family.names:
        raise ValueError(f"{family.architecture} has no such parameter as {name}, which the edited model.py has")
    prefix = "" if module == "lm_head" else family.prefix
    numbers = re.findall(r"\.(\d+)(?=\.)", name)  # of the layer, and of the expert where there is one
    spelled = [theirs.replace("*", "{}").format(*numbers) for theirs in family.names[module]]
    return [f"{prefix}{theirs}.{kind}" for theirs in spelled]


def split_tensor(config: GPTConfig, family: Family, module: str, tensor: Tensor) -> list[Tensor]:
    """Our tensor in the family's layout, in as many parts as the family has names for it."""
    if family.layout == "conv1d":
        return [tensor.T if module.startswith("h.") and tensor.dim() == 2 else tensor]
    if not module.endswith("c_attn"):
        return [tensor]
    heads = tensor.unflatten(0, (-1, config.head_dim))  # (H + 2G, D, ...)
    if family.layout == "per_head":
        return [heads.unflatten(0, (3, -1)).transpose(0, 1).reshape(tensor.shape)]
    q, k, v = heads.split((config.n_head, config.kv_heads, config.kv_heads))
    if family.layout == "turned":
        q, k = swap_halves(q), swap_halves(k)
    return [part.flatten(0, 1) for part in (q, k, v)]


def join_tensors(config: GPTConfig, family: Family, module: str, parts: list[Tensor]) -> Tensor:
    """The inverse of `split_tensor`: the family's parts as our tensor."""
    tensor = parts[0]
    if family.layout == "conv1d":
        return tensor.T if module.startswith("h.") and tensor.dim() == 2 else tensor
    if not module.endswith("c_attn"):
        return tensor
    if family.layout == "per_head":
        return tensor.unflatten(0, (-1, 3, config.head_dim)).transpose(0, 1).reshape(tensor.shape)
    if family.layout == "turned":
        turned = [swap_halves(part.unflatten(0, (-1, config.head_dim))).flatten(0, 1) for part in parts[:2]]
        parts = [*turned, parts[2]]
    return torch.cat(parts)


def swap_halves(heads: Tensor) -> Tensor:
    """Heads (n, D, ...) with the halves of D exchanged. Queries and keys alike, so that their products stay.

    NanoChat turns its pairs the other way round than we do: (x1 cos + x2 sin, x2 cos - x1 sin). That is our rotation of
    (x2, x1).
    """
    return heads.roll(heads.size(1) // 2, dims=1)
