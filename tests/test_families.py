"""Our models and Transformers' are the same functions: parity both ways, bit for bit there and back; refusals."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanogpt_hub.checkpoint import CheckpointError, load_model, save_model
from nanogpt_hub.families import (
    FAMILIES,
    OWN_TYPE,
    config_from_hf,
    config_to_hf,
    family_of,
    head_copy,
    state_from_hf,
    state_to_hf,
)
from nanogpt_hub.model import GPT, PRESETS, SIZES, GPTConfig
from nanogpt_hub.tokenizer import build_tokenizer

TINY = dict(vocab_size=67, block_size=24, n_layer=2, n_head=4, n_embd=32)
BARE = dict(attn_bias=False, mlp_bias=False, norm_bias=False)
CONFIGS = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied, exact gelu": ("gpt2", dict(tie_word_embeddings=False, activation="gelu", n_inner=40)),
    "gpt2 without biases": ("gpt2", BARE),
    "gpt2 without norm weights": ("gpt2", dict(norm_weight=False, norm_bias=False, activation="relu2")),
    "nanogpt": ("nanogpt", {}),
    "nanogpt without biases": ("nanogpt", dict(**BARE, rope_theta=500.0, norm_eps=1e-3)),
    "pythia": ("pythia", {}),
    "pythia tied, attention without biases": ("pythia", dict(tie_word_embeddings=True, attn_bias=False)),
    "pythia, half a head rotated": ("pythia", dict(rotary_fraction=0.5, n_head=2, norm_weight=False, norm_bias=False)),
    "llama": ("llama", {}),
    "llama, fewer kv heads, tied": ("llama", dict(n_kv_head=2, tie_word_embeddings=True, rope_theta=5e5)),
    "llama, one kv head, biases": ("llama", dict(n_kv_head=1, attn_bias=True, mlp_bias=True, n_inner=48)),
    "llama without norm weights": ("llama", dict(norm_weight=False)),
    "mixtral": ("mixtral", {}),
    "mixtral, fewer kv heads, tied": ("mixtral", dict(n_kv_head=2, tie_word_embeddings=True, rope_theta=5e5)),
    "mixtral, one of three experts": ("mixtral", dict(n_expert=3, n_expert_per_tok=1, n_inner=48, norm_weight=False)),
    "nanochat": ("nanochat", {}),
    "nanochat, fewer kv heads, tied": ("nanochat", dict(n_kv_head=2, tie_word_embeddings=True)),
    "nanochat, biases, gelu, no cap": ("nanochat", dict(attn_bias=True, activation="gelu", logit_softcap=0.0)),
}
TYPE_OF = {"nanogpt": "gpt_neox", "gpt2": "gpt2", "pythia": "gpt_neox", "llama": "llama", "mixtral": "mixtral",
           "nanochat": "nanochat"}  # fmt: skip
HF_SHAPE = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=24, bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
HF_GPT2 = dict(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=24, bos_token_id=None, eos_token_id=None)
FOREIGN = {
    "gpt2": transformers.GPT2Config(**HF_GPT2),
    "gpt2 untied": transformers.GPT2Config(
        **HF_GPT2, n_inner=40, tie_word_embeddings=False, activation_function="gelu", reorder_and_upcast_attn=True
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**HF_SHAPE, rotary_pct=0.5, rotary_emb_base=500),
    "gpt_neox sequential": transformers.GPTNeoXConfig(
        **HF_SHAPE, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new"
    ),
    "llama": transformers.LlamaConfig(**HF_SHAPE, num_key_value_heads=2, rope_theta=5e5),
    "llama tied": transformers.LlamaConfig(
        **HF_SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3
    ),
    "mixtral": transformers.MixtralConfig(**HF_SHAPE, num_key_value_heads=2, num_local_experts=4),
    "mixtral tied": transformers.MixtralConfig(
        **HF_SHAPE,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        num_local_experts=5,
        num_experts_per_tok=3,
        router_aux_loss_coef=0.02,
        rms_norm_eps=1e-3,
    ),
    "nanochat": transformers.NanoChatConfig(**HF_SHAPE, num_key_value_heads=1),
    "nanochat tied": transformers.NanoChatConfig(
        **HF_SHAPE, tie_word_embeddings=True, attention_bias=True, final_logit_softcapping=None
    ),
}


def make(name: str) -> GPTConfig:
    preset, overrides = CONFIGS[name]
    return GPTConfig.preset(preset, "1m", **{**TINY, **overrides})


def their_model(name: str) -> torch.nn.Module:
    return randomise(transformers.AutoModelForCausalLM.from_config(copy.deepcopy(FOREIGN[name])))


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """No parameter keeps a value that hides a mistake: norms and biases too are random."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if p.dim() == 1 else 0.0))
    return model.eval()


def assert_same_function(ours: GPT, theirs: torch.nn.Module) -> None:
    """To 1e-4 of the largest logit, mixtures of experts to 1e-5."""
    generator = torch.Generator().manual_seed(6)
    idx = torch.randint(ours.config.vocab_size, (2, ours.config.block_size), generator=generator)
    with torch.no_grad():
        a, b = ours(idx)[0], theirs(idx).logits
    assert (a - b).abs().max() <= (1e-5 if ours.config.n_expert else 1e-4) * b.abs().max()
    assert b.std() > 0.1


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_is_the_same_model_in_transformers_and_here(name, tmp_path):
    config = make(name)
    assert family_of(config) == (TYPE_OF[CONFIGS[name][0]], "")
    model = randomise(GPT(config))
    save_model(tmp_path, model)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_function(model, theirs)
    again, _ = load_model(tmp_path)
    assert again.config == config
    assert_same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", FOREIGN)
def test_what_transformers_saves_is_the_same_model_here_and_back(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = load_model(tmp_path / "theirs")
    assert tokenizer is None
    assert_same_function(ours, theirs)
    save_model(tmp_path / "ours", ours)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    if copy := head_copy(ours.config):  # a tied head is written too, for programs that look for it
        torch.testing.assert_close(written.pop(copy[0]), written[copy[1]])
    assert_same_tensors(written, load_file(tmp_path / "theirs" / "model.safetensors"))
    a, b = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "theirs"))
    either_way = {"_name_or_path", "n_ctx", "n_inner", "transformers_version", "reorder_and_upcast_attn",
                  "classifier_dropout"}  # fmt: skip
    assert {k: a[k] for k in b.keys() - either_way} == {k: b[k] for k in b.keys() - either_way}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "mixtral", "nanochat"])
def test_half_precision_shards_load_as_the_float32_of_their_values(name, dtype, tmp_path):
    their_model(name).to(dtype).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, _ = load_model(tmp_path)
    assert ours.wte.weight.dtype == torch.float32
    assert_same_function(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert load_model(tmp_path, dtype=dtype)[0].wte.weight.dtype == dtype


def test_the_hubs_gpt2_has_no_prefix_and_keeps_its_masks(tmp_path):
    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    tensors |= {"h.0.attn.masked_bias": torch.tensor(-torch.inf), "h.1.attn.bias": torch.ones(24, 24).bool()}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_function(load_model(tmp_path)[0], theirs)

    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        load_model(tmp_path)


def test_older_spellings_mean_the_same():
    neox = dict(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=500, rope_scaling=None)
    config = config_from_hf(neox | dict(hidden_size=64, num_attention_heads=4))
    assert (config.rotary_fraction, config.rope_theta) == (0.5, 500.0)
    config = config_from_hf(dict(model_type="llama", rope_theta=5e5, rope_scaling=None, pretraining_tp=2))
    assert config.rope_theta == 5e5
    gpt2 = config_from_hf(dict(model_type="gpt2", n_ctx=99, n_inner=None))
    assert (gpt2.block_size, gpt2.ffn_width) == (99, 3072)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_mean_what_they_mean_in_transformers(family):
    shape = {} if family == "gpt2" else dict(hidden_size=64, num_attention_heads=8)
    full = transformers.AutoConfig.for_model(family, **shape).to_dict()
    assert config_from_hf(dict(model_type=family, **shape)) == config_from_hf(full)


@pytest.mark.parametrize(
    ("family", "key", "older", "value"),
    [("gpt2", "n_positions", "n_ctx", 256), ("pythia", "rope_parameters", "rotary_pct", 0.25),
     ("pythia", "rope_parameters", "rotary_emb_base", 10000.0), ("llama", "rope_parameters", "rope_theta", 10000.0),
     ("nanochat", "rope_parameters", "rope_theta", 10000.0), ("llama", "dtype", "torch_dtype", "float32")],
)  # fmt: skip
def test_configs_carry_the_older_spellings_too(family, key, older, value):
    content = config_to_hf(GPTConfig.preset(family, "10m"))
    assert key in content
    assert content[older] == value


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_its_config_file(preset, size):
    fields = dict(n_head=8, n_embd=512) if size == "1558m" and preset == "pythia" else {}  # 1600 / 25 / 4 is even
    config = GPTConfig.preset(preset, size, **fields, dropout=0.1)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_the_usual_width_and_heads_have_one_spelling():
    config = GPTConfig.preset("llama", "1m", n_kv_head=4, n_inner=384)
    assert config_from_hf(config_to_hf(config)) == replace(config, n_kv_head=0, n_inner=0)


field_sets = st.fixed_dictionaries(
    dict(
        position=st.sampled_from(["rotary", "learned"]),
        norm=st.sampled_from(["layer", "rms"]),
        norm_weight=st.booleans(),
        activation=st.sampled_from(["gelu", "gelu_tanh", "relu2", "swiglu"]),
        attn_bias=st.booleans(),
        mlp_bias=st.booleans(),
        parallel_residual=st.booleans(),
        qk_norm=st.booleans(),
        embd_norm=st.booleans(),
        tie_word_embeddings=st.booleans(),
        n_kv_head=st.sampled_from([0, 1, 2]),
        n_inner=st.sampled_from([0, 24]),
        n_expert=st.sampled_from([0, 3]),
        n_expert_per_tok=st.sampled_from([1, 2]),
        rotary_fraction=st.sampled_from([0.5, 1.0]),
        logit_softcap=st.sampled_from([0.0, 3.0]),
    )
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(field_sets)
def test_any_combination_of_fields_comes_back_bit_for_bit(values):
    config = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=4, n_embd=16, norm_bias=False, **values)
    model = randomise(GPT(config))
    content = config_to_hf(config)
    model_type, why = family_of(config)
    assert (content["model_type"], why == "") == (model_type, model_type != OWN_TYPE)
    back = config_from_hf(json.loads(json.dumps(content)))
    if config.position == "learned":  # the rotary fields mean nothing then
        back, config = (replace(c, rotary_fraction=1.0) for c in (back, config))
    if not config.n_expert:
        back, config = (replace(c, n_expert_per_tok=2) for c in (back, config))
    assert back == config
    assert_same_tensors(state_from_hf(config, state_to_hf(config, model.state_dict())), model.state_dict())


@pytest.mark.parametrize(
    ("fields", "named"),
    [(dict(position="learned", norm="rms", norm_bias=False), "norm=rms"), (dict(n_kv_head=3), "n_kv_head=3"),
     (dict(activation="swiglu"), "activation=swiglu"), (dict(qk_norm=True), "qk_norm=True"),
     (dict(position="learned", parallel_residual=True), "parallel_residual=True"),
     (dict(logit_softcap=30.0), "logit_softcap=30.0"), (dict(n_expert=4), "n_expert=4")],
)  # fmt: skip
def test_a_combination_of_our_own_says_which_field_made_it_so(fields, named):
    model_type, why = family_of(GPTConfig(**fields))
    assert model_type == OWN_TYPE
    assert named in why
    assert "stock family" in why


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ("gpt_neox", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("gpt_neox", "rope_parameters", "default"),
        ("llama", "rope_parameters", {"rope_theta": float("nan")}),
        ("llama", "sliding_window", 4096),
        ("llama", "use_sliding_window", True),
        ("llama", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "head_dim", 64),
        ("llama", "hidden_act", "gelu"),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "quantization_config", {"bits": 4}),
        ("mixtral", "sliding_window", 4096),
        ("mixtral", "num_experts_per_tok", 0),
        ("mixtral", "num_local_experts", "8"),
        ("mixtral", "num_local_experts", 10**6),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "activation_function", "quick_gelu"),
        ("gpt2", "activation_function", ["gelu"]),
        ("gpt2", "n_layer", 10**30),
        ("gpt2", "n_layer", True),
        ("gpt2", "n_layer", 2.0),
        ("gpt2", "n_layer", None),
        ("gpt2", "n_embd", -8),
        ("gpt2", "vocab_size", "50257"),
        ("gpt2", "vocab_size", [[[1]]]),
        ("gpt2", "resid_pdrop", 10**400),
        ("gpt2", "layer_norm_epsilon", float("inf")),
        ("gpt2", "tie_word_embeddings", "yes"),
        ("nanochat", "final_logit_softcapping", -1.0),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(family, key, value):
    shape = {} if family == "gpt2" else dict(hidden_size=256, num_attention_heads=8)
    with pytest.raises(ValueError, match=key if "rope" not in key else "rope|rotary"):
        config_from_hf({"model_type": family, **shape, key: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(model_type="mistral"), "model_type is 'mistral'; this project loads gpt2"),
        (dict(), "model_type is None"),
        (dict(model_type=["gpt2"]), "model_type is"),
        (dict(model_type="gpt2", n_head=5), "not a multiple of n_head"),
        (dict(model_type="gpt2", n_embd=65536, n_head=1, n_layer=1000), "parameters; at most"),
        (dict(model_type="mixtral", num_local_experts=0), "asks for n_expert=0, which no mixtral has"),
        (dict(model_type="mixtral", num_local_experts=1), r"n_expert_per_tok > n_expert \(1\)"),
        (dict(model_type="mixtral", num_local_experts=1024), "parameters; at most"),
        (dict(model_type="nanogpt_hub", hovercraft=1), "'hovercraft', which this version"),
        (dict(model_type="nanogpt_hub", n_layer="many"), "n_layer is 'many'; it must be an integer"),
        (dict(model_type="nanogpt_hub", norm="batch"), "norm is 'batch'"),
    ],
)
def test_other_refusals(content, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(content)


@pytest.mark.parametrize(
    "name", ["model.smear_gate.weight", "resid_lambdas", "model.value_embeds.1.weight", "h.0.attn.ve_gate.weight"]
)
def test_a_tensor_of_todays_nanochat_says_what_it_is(name):
    config = GPTConfig.preset("nanochat", "1m", **TINY)
    tensors = {**state_to_hf(config, GPT(config).state_dict()), name: torch.zeros(2)}
    with pytest.raises(ValueError, match=f"{name}.* is not part .* it is of karpathy's nanochat as it is today"):
        state_from_hf(config, tensors)


def test_code_that_a_config_brings_along_is_ignored():
    plain = dict(model_type="gpt2", n_layer=3)
    assert config_from_hf({**plain, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}) == config_from_hf(plain)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_parameter_declared_absent_must_be_neutral(kind):
    config = GPTConfig.preset("gpt2", **TINY, norm_weight=False, norm_bias=False)
    tensors = state_to_hf(config, GPT(config).state_dict())
    tensors[f"transformer.ln_f.{kind}"][3] += 0.5
    with pytest.raises(ValueError, match=rf"declares ln_f\.{kind} absent"):
        state_from_hf(config, tensors)


def test_autotokenizer_gives_our_ids(tmp_path):
    text = "First\n\n  second line\tnaïve — 日本語 🙂👩‍👩‍👧\r\n"
    for spec in ("char", "byte", "bpe:300"):
        tokenizer = build_tokenizer(spec, [text * 20])
        config = GPTConfig.preset("gpt2", **{**TINY, "vocab_size": tokenizer.vocab_size})
        save_model(tmp_path / spec.replace(":", "-"), GPT(config), tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / spec.replace(":", "-"))
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
        ours = load_model(tmp_path / spec.replace(":", "-"))[1]
        assert ours.hash == tokenizer.hash
