"""The core: causal, the same with and without a cache, each field does something, initialised as it says."""

import ast
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import nanogpt_hub.model
from nanogpt_hub import initialisation as first_weights
from nanogpt_hub.model import GPT, IGNORE_INDEX, PRESETS, SIZES, GPTConfig, KVCache

TINY = dict(vocab_size=61, block_size=16, n_layer=3, n_head=4, n_embd=32)
CONFIGS = {name: GPTConfig.preset(name, "1m", **TINY) for name in PRESETS} | {
    "fewer kv heads": GPTConfig.preset("llama", "1m", **TINY, n_kv_head=2),
    "experts of our own": GPTConfig(**TINY, n_expert=5, n_expert_per_tok=3, parallel_residual=True),
    "a mixture of our own": GPTConfig(
        **TINY, position="learned", norm="rms", norm_bias=False, activation="swiglu", parallel_residual=True,
        qk_norm=True, embd_norm=True, logit_softcap=5.0, n_kv_head=1,
    ),
}  # fmt: skip


def make(config: GPTConfig) -> GPT:
    """A model in eval mode with every parameter drawn at random, so that none hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model


def tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=CONFIGS)
def model(request) -> GPT:
    return make(CONFIGS[request.param])


@torch.no_grad()
def test_the_future_does_not_reach_the_past(model):
    idx = tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % TINY["vocab_size"]
    a, b = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert (a[:, 9:] != b[:, 9:]).any(-1).all()


@torch.no_grad()
def test_the_past_reaches_the_future(model):
    idx = tokens()
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % TINY["vocab_size"]
    assert (model(idx)[0] != model(changed)[0]).any(-1).all()


@torch.no_grad()
def test_order_matters(model):
    """Without positions, attention is blind to the order of what came before."""
    idx = tokens()
    swapped = idx[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model(idx)[0][:, -1], model(swapped)[0][:, -1], atol=1e-4)


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [7, 1, 1, 7], [1, 15]], ids=str)
@torch.no_grad()
def test_a_cache_in_pieces_gives_the_whole_pass(model, pieces):
    idx = tokens()
    cache = KVCache(model.config, 2)
    logits = [model(piece, kv_cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0])
    assert cache.lengths == [16, 16]


@torch.no_grad()
def test_rows_of_different_length_share_a_cache(model):
    """Ragged prompts are padded on the right, run once, and each goes on from its own end."""
    idx, lengths = tokens(3), [3, 8, 5]
    cache = KVCache(model.config, 3)
    padded = idx[:, :8].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0
    prefill = model(padded, kv_cache=cache)[0]
    cache.lengths = list(lengths)
    following = torch.stack([idx[row, n : n + 4] for row, n in enumerate(lengths)])
    steps = [model(following[:, :3], kv_cache=cache)[0], model(following[:, 3:], kv_cache=cache)[0]]
    for row, n in enumerate(lengths):
        alone = model(idx[row : row + 1, : n + 4])[0][0]
        torch.testing.assert_close(prefill[row, :n], alone[:n])
        torch.testing.assert_close(torch.cat(steps, dim=1)[row], alone[n:])
    assert cache.lengths == [n + 4 for n in lengths]


def test_too_many_tokens_are_refused(model):
    with pytest.raises(ValueError, match="17 tokens do not fit block_size 16"):
        model(tokens(1, 17))
    cache = KVCache(model.config, 1)
    model(tokens(1, 16), kv_cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model(tokens(1, 1), kv_cache=cache)


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_targets_that_count(model):
    idx, targets = tokens(), tokens().roll(-1, 1)
    targets[0, :10] = IGNORE_INDEX
    logits, loss = model(idx, targets)
    logprobs = logits.log_softmax(-1)
    kept = [logprobs[b, t, targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] != IGNORE_INDEX]
    torch.testing.assert_close(loss, -torch.stack(kept).mean())


FIELDS = {
    "position": "learned", "rope_theta": 100.0, "rotary_fraction": 0.5, "norm": "rms", "norm_eps": 0.5,
    "activation": "relu2", "parallel_residual": True, "qk_norm": True, "embd_norm": True, "logit_softcap": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@torch.no_grad()
def test_each_field_changes_the_function_of_the_same_weights(field):
    base = GPTConfig(**TINY, norm_bias=False)
    model, other = make(base), make(GPTConfig(**TINY, norm_bias=False, **{field: FIELDS[field]}))
    other.load_state_dict(model.state_dict(), strict=False)
    assert (model(tokens())[0] - other(tokens())[0]).abs().max() > 1e-3


def test_each_activation_is_its_own_function():
    base = GPTConfig(**TINY)
    outputs = []
    for activation in ("gelu", "gelu_tanh", "relu2", "swiglu"):
        model = make(GPTConfig(**TINY, activation=activation, n_inner=128))
        model.load_state_dict(make(base).state_dict(), strict=False)
        outputs.append(model(tokens())[0])
    gaps = [(a - b).abs().max() for i, a in enumerate(outputs) for b in outputs[:i]]
    assert min(gaps) > 1e-5


@pytest.mark.parametrize(
    ("fields", "absent"),
    [
        (dict(attn_bias=False), {"attn.c_attn.bias", "attn.c_proj.bias"}),
        (dict(mlp_bias=False), {"mlp.c_fc.bias", "mlp.c_proj.bias"}),
        (dict(norm_bias=False), {"ln_1.bias", "ln_2.bias"}),
        (dict(norm_weight=False, norm_bias=False), {"ln_1.weight", "ln_2.weight", "ln_1.bias", "ln_2.bias"}),
    ],
)
def test_what_is_switched_off_has_no_parameters(fields, absent):
    names = [
        {n.removeprefix("h.0.") for n in GPT(GPTConfig(**TINY, **f)).state_dict() if "h.0." in n} for f in ({}, fields)
    ]
    assert names[0] - names[1] == absent


@pytest.mark.parametrize("k", [1, 2, 4])
@torch.no_grad()
def test_a_mixture_is_what_a_loop_over_tokens_gives(k):
    model = make(GPTConfig.preset("mixtral", "1m", **TINY, n_expert=4, n_expert_per_tok=k))
    moe, x = model.h[0].mlp, torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros_like(x)
    for b, t in itertools.product(range(2), range(7)):
        probs = moe.router(x[b, t]).softmax(-1)
        best = probs.argsort(descending=True)[:k]
        expected[b, t] = sum(probs[e] / probs[best].sum() * moe.experts[e](x[b, t]) for e in best.tolist())
    torch.testing.assert_close(moe(x), expected)


def test_in_training_every_expert_has_a_gradient_and_only_those_that_were_used_a_large_one():
    """Processes that share the gradients must agree which there are."""
    model = make(GPTConfig.preset("mixtral", "1m", **TINY, n_expert=8, n_expert_per_tok=1)).train()
    model(tokens(1, 1), tokens(1, 1))[1].backward()
    grads = [expert.c_fc.weight.grad.abs().max().item() for expert in model.h[0].mlp.experts]
    assert sum(grad > 0 for grad in grads) == 1


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(**TINY, dropout=0.5))
    assert not torch.equal(model(tokens())[0], model(tokens())[0])
    model.eval()
    assert torch.equal(model(tokens())[0], model(tokens())[0])


# Initialisation


def std_of(model: GPT, name: str) -> float:
    weights = [p for n, p in model.named_parameters() if n.endswith(name + ".weight")]
    assert weights
    return torch.cat([w.flatten() for w in weights]).std().item()


@pytest.mark.parametrize(
    ("init", "stds"),
    [
        ("gpt2", {"wte": 0.02, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / math.sqrt(8)}),
        ("neox", {"wte": (2 / 5 / 128) ** 0.5, "c_attn": (2 / 5 / 128) ** 0.5, "c_proj": 2 / 4 / 128**0.5}),
        ("nanochat", {"wte": 1.0, "c_attn": 128**-0.5, "c_fc": 128**-0.5, "c_proj": 0.0, "lm_head": 0.0}),
    ],
)
def test_fresh_weights_spread_as_their_lineage_has_it(init, stds):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, n_layer=4, n_head=4, n_embd=128, init=init, tie_word_embeddings=False))
    for name, std in stds.items():
        assert std_of(model, name) == pytest.approx(std, rel=0.02), name
    ones = [p for n, p in model.named_parameters() if ".ln" in n and n.endswith("weight")]
    assert all((p == 1).all() for p in ones)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_untrained_model_knows_nothing(preset):
    torch.manual_seed(0)
    config = GPTConfig.preset(preset, "1m", vocab_size=61)
    loss = GPT(config)(tokens(8), tokens(8).roll(1, 0))[1].item()
    assert loss == pytest.approx(math.log(61), abs=1e-5 if preset == "nanochat" else 0.2)


# Shapes and sizes


@pytest.mark.parametrize(
    ("preset", "size", "overrides", "n_params"),
    [
        ("gpt2", "124m", dict(vocab_size=50257), 124_439_808),
        ("gpt2", "350m", dict(vocab_size=50257), 354_823_168),
        ("gpt2", "774m", dict(vocab_size=50257), 774_030_080),
        ("gpt2", "1558m", dict(vocab_size=50257), 1_557_611_200),
        ("pythia", "124m", dict(vocab_size=50304, block_size=2048), 162_322_944),
        ("llama", "1m", dict(vocab_size=32000, n_kv_head=2, n_inner=384), 8_979_584),
        (  # Mixtral 8x7B
            "mixtral",
            "1m",
            dict(vocab_size=32000, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336),
            46_702_792_704,
        ),
    ],
)
def test_presets_have_the_parameters_of_their_originals(preset, size, overrides, n_params):
    with torch.device("meta"):
        assert GPT(GPTConfig.preset(preset, size, **overrides)).num_params() == n_params


def test_parameters_in_matrix_products_leave_the_tables_out():
    config = GPTConfig.preset("gpt2", "1m", vocab_size=100)
    tables = {True: config.block_size * 128, False: config.block_size * 128 + 100 * 128}
    for tied, size in tables.items():
        model = GPT(GPTConfig.preset("gpt2", "1m", vocab_size=100, tie_word_embeddings=tied))
        assert model.num_params() - model.num_params(embeddings=False) == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_at_every_size(preset, size):
    with torch.device("meta"):
        GPT(GPTConfig.preset(preset, size, n_layer=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n_embd=30), "n_embd 30 is not a multiple of n_head 4"),
        (dict(n_kv_head=3), "n_head 4 is not a multiple of n_kv_head 3"),
        (dict(n_layer=0), "n_layer is 0; it must be at least 1"),
        (dict(n_kv_head=-1), "n_kv_head is -1; it must be at least 0"),
        (dict(position="absolute"), "position is 'absolute'; it must be one of rotary, learned"),
        (dict(activation="relu"), "it must be one of gelu, gelu_tanh, relu2, swiglu"),
        (dict(rotary_fraction=0.0), r"rotary_fraction is 0.0; it must be in \(0, 1\]"),
        (dict(n_embd=12), "rotary positions turn pairs: head size 3"),
        (dict(norm="rms"), "norm_bias needs norm=layer"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(norm_eps=0.0), "must be above 0"),
        (dict(logit_softcap=-1.0), "logit_softcap is -1.0"),
        (dict(n_expert=-1), "n_expert is -1; it must be at least 0"),
        (dict(n_expert=2, n_expert_per_tok=3), r"n_expert_per_tok > n_expert \(2\)"),
        (dict(n_expert_per_tok=0), "n_expert_per_tok is 0; it must be at least 1"),
        (dict(router_aux_loss_coef=-0.1), "router_aux_loss_coef is -0.1; it must be at least 0"),
    ],
)
def test_a_config_that_makes_no_model_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **fields})


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gtp2", "1m", "unknown preset 'gtp2'; choose one of nanogpt"),
        ("gpt2", "1b", "unknown size '1b'; choose one of 1m"),
    ],
)
def test_an_unknown_preset_or_size_lists_the_known(name, size, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.preset(name, size)


def test_the_core_stays_short_and_needs_torch_only():
    model, initialisation = (Path(m.__file__).read_text(encoding="utf-8") for m in (nanogpt_hub.model, first_weights))
    assert len(model.splitlines()) <= 350
    assert imported(model) <= {"torch", "nanogpt_hub.initialisation"}  # first weights, which no loaded model has
    assert imported(initialisation) <= {"torch"}


def imported(source: str) -> set[str]:
    """What a source imports, beside Python's own library; of torch the package alone."""
    nodes = [*ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    plain = {"torch" if name.split(".")[0] == "torch" else name for name in names}
    return {name for name in plain if name.split(".")[0] not in sys.stdlib_module_names}
