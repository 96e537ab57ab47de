"""What the lens shows is what the model computes: recomputed parts against the model's own, fast ways against slow."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import foreign

import nanogpt_hub.lens as lens_module
from nanogpt_hub.generate import generate
from nanogpt_hub.lens import (
    divergence,
    first_difference,
    logit_lens,
    look_at_end,
    look_inside,
    next_tokens,
    parameters_by_part,
    scoring_windows,
    surprise,
    tokens_of,
)
from nanogpt_hub.model import GPT, PRESETS, Context, GPTConfig
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import UnknownCharacterError, build_tokenizer

TEXT = "naïve 🙂 語, so"  # 20 bytes
BYTE = build_tokenizer("byte", [])
BPE = build_tokenizer("bpe:300", [TEXT * 9, "the cat and the hat and the bat " * 9])
CHAR = build_tokenizer("char", [TEXT])
SURPLUS = BYTE.vocab_size + 15  # a model's vocabulary may exceed its tokenizer's
MODELS = {**{name: (name, {}) for name in PRESETS}, "grouped heads": ("llama", dict(n_kv_head=2)),
          "one key head": ("nanochat", dict(n_kv_head=1, vocab_size=SURPLUS))}  # fmt: skip


def tiny_model(preset: str = "gpt2", seed: int = 0, **overrides) -> GPT:
    """Random weights large enough that positions, heads and layers matter."""
    shape = dict(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=BYTE.vocab_size)
    torch.manual_seed(seed)
    model = GPT(GPTConfig.preset(preset, "1m", **{**shape, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> GPT:
    preset, overrides = MODELS[request.param]
    return tiny_model(preset, **overrides)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([BYTE.encode(text)])


@torch.no_grad()
def own_logits(model: GPT, text: str) -> torch.Tensor:
    """Logits (T, 256 + end-of-text) by the model's forward, without the surplus ids."""
    return model(ids_of(text))[0][0, :, : BYTE.vocab_size]


# ---- inside ----


def test_attention_maps_are_causal_and_sum_to_one(model):
    inside = look_inside(model, BYTE, TEXT)
    T = len(TEXT.encode())
    assert inside.attention.shape == (3, 4, T, T)
    assert inside.attention.triu(1).count_nonzero() == 0
    assert inside.attention.sum(-1).sub(1).abs().max() < 1e-5
    assert inside.attention.var(dim=(0, 1)).max() > 1e-3  # layers and heads differ
    assert inside.tokens[:4] == ("n", "a", "\\xc3", "\\xaf")


@torch.no_grad()
def test_values_averaged_by_the_maps_are_what_attention_gives(model):
    cfg, inside = model.config, look_inside(model, BYTE, TEXT)
    T = len(inside.ids)
    context = Context(cfg, T, inside.residual.device, inside.residual.dtype, None)
    for block, x, maps in zip(model.h, inside.residual[:-1], inside.attention, strict=True):
        x = block.ln_1(x[None])
        v = block.attn.c_attn(x)[0, :, -cfg.kv_heads * cfg.head_dim :].view(T, cfg.kv_heads, cfg.head_dim)
        heads = [maps[h] @ v[:, h * cfg.kv_heads // cfg.n_head] for h in range(cfg.n_head)]
        torch.testing.assert_close(block.attn.c_proj(torch.cat(heads, -1)), block.attn(x, context)[0])


@torch.no_grad()
def test_residual_stream_leads_from_the_embeddings_to_the_output(model):
    inside = look_inside(model, BYTE, TEXT)
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out))) for block in model.h]
    logits = model(ids_of(TEXT))[0]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(inside.residual, torch.cat((seen[0], *seen[1::2])), rtol=0, atol=0)
    torch.testing.assert_close(model.head(model.ln_f(inside.residual[-1])), logits[0])


@torch.no_grad()
def test_experts_are_those_that_the_layer_mixes(model):
    inside = look_inside(model, BYTE, TEXT)
    if not model.config.n_expert:
        assert inside.experts is None
        return
    assert inside.experts.shape == (3, len(inside.ids), 8)
    assert inside.experts.count_nonzero(-1).eq(2).all()
    torch.testing.assert_close(inside.experts.sum(-1), torch.ones(3, len(inside.ids)))
    for block, x, shares in zip(model.h, inside.residual[:-1], inside.experts, strict=True):
        x = x + block.attn(block.ln_1(x[None]), Context(model.config, len(x), x.device, x.dtype, None))[0]
        given = torch.stack([expert(block.ln_2(x)) for expert in block.mlp.experts], dim=1)  # (T, E, C)
        torch.testing.assert_close((shares[..., None] * given).sum(1), block.mlp(block.ln_2(x)))


def test_logit_lens_ends_at_the_models_own_output(model):
    lens = logit_lens(model, BYTE, look_inside(model, BYTE, TEXT))
    probs = own_logits(model, TEXT).softmax(-1)
    torch.testing.assert_close(lens.top_probs[-1], probs.amax(-1))
    torch.testing.assert_close(lens.entropy[-1], torch.distributions.Categorical(probs).entropy() / math.log(2))
    assert torch.equal(lens.top_ids[-1], probs.argmax(-1))
    assert torch.equal(lens.answer_probs[-1], lens.top_probs[-1])
    assert lens.answer_ranks[-1].eq(1).all()
    assert lens.top_tokens[0][0] == BYTE.token_str(int(lens.top_ids[0, 0]))


def test_the_last_position_alone_is_that_of_the_whole_text(model):
    inside, end = look_inside(model, BYTE, TEXT), look_at_end(model, BYTE, BYTE.encode(TEXT))
    lens = logit_lens(model, BYTE, inside)
    torch.testing.assert_close(end.attention, inside.attention[:, :, -1])
    torch.testing.assert_close(end.logits[: BYTE.vocab_size].softmax(-1), own_logits(model, TEXT)[-1].softmax(-1))
    torch.testing.assert_close(end.depths.amax(-1), lens.top_probs[:, -1])
    with pytest.raises(ValueError, match="no tokens"):
        look_at_end(model, BYTE, [])


@torch.no_grad()
def test_logit_lens_of_an_early_layer_is_a_model_without_the_later_ones(model):
    lens = logit_lens(model, BYTE, look_inside(model, BYTE, TEXT))
    early = GPT(GPTConfig(**{**vars(model.config), "n_layer": 1})).eval()
    early.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("h.1.", "h.2."))})
    probs = own_logits(early, TEXT).softmax(-1)
    answers = own_logits(model, TEXT).argmax(-1)
    ranks = [
        row.argsort(descending=True).tolist().index(answer) + 1 for row, answer in zip(probs, answers, strict=True)
    ]
    assert torch.equal(lens.top_ids[1], probs.argmax(-1))
    assert lens.answer_ranks[1].tolist() == ranks
    torch.testing.assert_close(lens.answer_probs[1], probs.gather(-1, answers[:, None])[:, 0])


def test_results_are_plain_tensors_for_a_notebook():
    inside = look_inside(tiny_model(), BYTE, TEXT)
    assert not inside.attention.is_inference()
    assert not inside.residual.is_inference()
    inside.attention.mul_(2)


def test_reduced_precision():
    inside = look_inside(tiny_model("nanochat").bfloat16(), BYTE, TEXT)
    assert inside.attention.dtype == torch.float32
    assert inside.attention.sum(-1).sub(1).abs().max() < 1e-5


# ---- surprise ----


def test_surprise_is_the_models_cross_entropy():
    model = tiny_model("nanogpt")
    scored = surprise(model, BYTE, TEXT)
    ids, logits = ids_of(TEXT)[0], own_logits(model, TEXT)
    loss = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    assert [token.bits for token in scored.tokens[1:]] == pytest.approx((loss / math.log(2)).tolist(), rel=1e-4)
    assert scored.bits_per_token == pytest.approx(
        model(ids[None, :-1], ids[None, 1:])[1].item() / math.log(2), rel=1e-4
    )
    assert scored.perplexity == pytest.approx(math.exp(loss.mean()), rel=1e-3)
    for token, row in zip(scored.tokens[1:], logits, strict=False):
        order = row.argsort(descending=True).tolist()
        assert token.rank == order.index(token.piece.id) + 1
        assert (token.best_id, token.best_text) == (order[0], BYTE.token_str(order[0]))
        assert token.best_prob == pytest.approx(row.softmax(-1).max().item(), rel=1e-4)
    assert scored.tokens[0][1:] == (None,) * 5


def test_surprise_counts_each_unit_of_the_scored_text():
    scored = surprise(tiny_model(), BYTE, TEXT)
    assert scored.scored_text == TEXT[1:]
    assert scored.total_bits == pytest.approx(sum(token.bits for token in scored.tokens[1:]))
    assert scored.bits_per_token == scored.bits_per_byte == scored.total_bits / (len(TEXT.encode()) - 1)
    assert scored.bits_per_character == scored.total_bits / (len(TEXT) - 1)
    assert surprise(tiny_model(), BYTE, "🙂a").scored_text == "🙂a"  # the scored bytes complete the character


def test_an_even_model_wavers_among_all_tokens():
    model = GPT(GPTConfig.preset("nanochat", "1m", n_layer=1, n_embd=32, vocab_size=SURPLUS))  # its head starts at zero
    scored = surprise(model, BYTE, TEXT)
    assert scored.perplexity == pytest.approx(BYTE.vocab_size)
    assert model.training


@pytest.mark.parametrize("block_size", [1, 2, 7, 24])
@pytest.mark.parametrize("preset", ["nanogpt", "gpt2"])
def test_long_text_is_scored_as_by_one_pass_for_each_token(preset, block_size, monkeypatch):
    monkeypatch.setattr(lens_module, "HEAD_ROWS", 5)  # logits in pieces, too
    model, text = tiny_model(preset, block_size=block_size), TEXT * 4
    ids = BYTE.encode(text)
    expected = {}
    for start, first, end in scoring_windows(len(ids) - 1, block_size):
        for last in range(first, end):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start : last + 1]]))[0][0, -1]
            expected[last + 1] = F.cross_entropy(logits, torch.tensor(ids[last + 1])).item() / math.log(2)
    scored = surprise(model, BYTE, text)
    assert [token.bits for token in scored.tokens[1:]] == pytest.approx([expected[i] for i in range(1, len(ids))], 1e-3)


@settings(deadline=None)
@given(n=st.integers(1, 300), block_size=st.integers(1, 40))
def test_windows_score_each_output_once_with_half_a_block_before(n, block_size):
    windows = list(scoring_windows(n, block_size))
    assert [i for _, first, end in windows for i in range(first, end)] == list(range(n))
    for start, first, end in windows:
        assert 0 < end - start <= block_size
        assert start == 0 or first - start >= block_size // 2
    assert len(windows) <= 1 + math.ceil(max(0, n - block_size) / max(1, block_size // 2))


# ---- the next token ----


def test_next_tokens_before_and_after_each_sampler(model):
    sampling = SamplingConfig(temperature=0.7, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.5)
    table = next_tokens(model, BYTE, TEXT, sampling, n=BYTE.vocab_size)
    assert table.stages == ("model", "repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    probs = torch.tensor([token.probs for token in table.tokens]).T  # (stages, V)
    torch.testing.assert_close(probs.sum(-1), torch.ones(6))
    torch.testing.assert_close(probs[0], own_logits(model, TEXT)[-1].softmax(-1).sort(descending=True).values)
    assert max(table.rest) < 1e-5
    assert table.kept == (257, 257, 257, 8, *table.kept[4:])
    for place, name in enumerate(table.stages):
        cut = [token for token in table.tokens if token.cut_by == name]
        assert len(cut) == ([257, *table.kept][place] - table.kept[place])
        assert all(not any(token.probs[place:]) and token.probs[place - 1] > 0 for token in cut)
    torch.testing.assert_close(torch.special.entr(probs).sum(-1) / math.log(2), torch.tensor(table.entropy))


@pytest.mark.parametrize("text", ["", "a", TEXT * 3], ids=["empty", "short", "longer than the context"])
def test_next_tokens_are_those_that_generation_draws_from(text):
    model, sampling = tiny_model(vocab_size=SURPLUS), SamplingConfig(max_new_tokens=1, top_k=3, repetition_penalty=1.3)
    table = next_tokens(model, BYTE, text, sampling)
    kept = {token.id: token.probs[-1] for token in table.tokens if token.cut_by is None}
    for seed in range(5):
        drawn = generate(model, BYTE, text, sampling, seed=seed).tokens[0]
        assert drawn.sampled_prob == pytest.approx(kept[drawn.id], rel=1e-4)


def test_next_tokens_without_sampling_and_greedy():
    model = tiny_model()
    table = next_tokens(model, BYTE, TEXT, n=3)
    assert table.stages == ("model",)
    assert len(table.tokens) == 3
    assert table.rest[0] == pytest.approx(1 - sum(token.probs[0] for token in table.tokens), abs=1e-6)
    greedy = next_tokens(model, BYTE, TEXT, SamplingConfig(temperature=0, top_k=None), n=3)
    assert [token.cut_by for token in greedy.tokens] == [None, "temperature", "temperature"]


def test_surplus_ids_are_never_shown():
    model = tiny_model(tie_word_embeddings=False, vocab_size=SURPLUS)
    with torch.no_grad():
        model.lm_head.weight[BYTE.vocab_size :] = 50 * model.lm_head.weight[0]
    assert max(token.id for token in next_tokens(model, BYTE, TEXT, n=1000).tokens) < BYTE.vocab_size
    assert logit_lens(model, BYTE, look_inside(model, BYTE, TEXT)).top_ids.max() < BYTE.vocab_size
    assert max(token.best_id for token in surprise(model, BYTE, TEXT).tokens[1:]) < BYTE.vocab_size


# ---- two models ----


def test_divergence_is_that_of_the_two_distributions():
    a, b = tiny_model("gpt2"), tiny_model("llama", seed=1, vocab_size=SURPLUS)
    p, q = (own_logits(model, TEXT)[-1].double().softmax(-1) for model in (a, b))
    m = (p + q) / 2
    kl = [(x * (x / y).log2()).sum().item() for x, y in ((p, q), (q, p), (p, m), (q, m))]
    apart = divergence(a, b, BYTE, BYTE, TEXT, n=4)
    assert apart[:3] == pytest.approx((kl[0], kl[1], (kl[2] + kl[3]) / 2), rel=1e-4)
    assert [token.id for token in apart.tokens] == m.topk(4).indices.tolist()
    assert apart.tokens[0].prob_b == pytest.approx(q[apart.tokens[0].id].item(), rel=1e-4)
    assert divergence(a, a, BYTE, BYTE, TEXT)[:3] == (0, 0, 0)


def test_models_with_different_tokenizers_are_not_compared():
    with pytest.raises(ValueError, match="the same tokenizer"):
        divergence(tiny_model(), tiny_model(), BYTE, CHAR, "so")


@pytest.mark.parametrize(
    ("a", "b", "place"), [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([1], [], 0)]
)
def test_first_difference(a, b, place):
    assert first_difference(a, b) == first_difference(b, a) == place


# ---- the tokenizer ----


@settings(deadline=None)
@given(text=st.text(max_size=40) | st.text("🙂👩‍👩‍👧語é the cat", max_size=40))
@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_groups_of_pieces_join_to_the_text(tokenizer, text):
    pieces = tokens_of(tokenizer, text)
    assert [piece.id for piece in pieces] == tokenizer.encode(text)
    assert b"".join(piece.data for piece in pieces) == text.encode()
    groups = {}
    for piece in pieces:
        assert piece.data in text[piece.start : piece.end].encode()  # no byte outside of the span
        start, _ = groups.get(piece.group, (piece.start, None))
        groups[piece.group] = (start, piece.end)
    assert list(groups) == list(range(len(groups)))
    assert [text[start:end] for start, end in groups.values()] == [
        b"".join(piece.data for piece in pieces if piece.group == group).decode() for group in groups
    ]
    assert "".join(text[start:end] for start, end in groups.values()) == text


def test_pieces_of_characters():
    assert [piece[2:] for piece in tokens_of(CHAR, "so ï")] == [
        ("s", 0, 1, 0), ("o", 1, 2, 1), (" ", 2, 3, 2), ("ï", 3, 4, 3),
    ]  # fmt: skip
    assert [piece[2:] for piece in tokens_of(BYTE, "aïo")] == [
        ("a", 0, 1, 0), ("\\xc3", 1, 2, 1), ("\\xaf", 1, 2, 1), ("o", 2, 3, 2),
    ]  # fmt: skip


def test_tokenizers_that_change_the_text():
    in_front = tokens_of(foreign("llama"), "hello 🙂")  # gets a space in front
    assert [(piece.text, piece.start, piece.end) for piece in in_front[:2]] == [(" he", 0, 2), ("l", 2, 3)]
    assert in_front[-1][3:5] == (6, 7)
    composed = tokens_of(foreign("nanochat"), "e\u0301e")  # two characters become one
    assert {piece.start for piece in composed} == {None}
    assert [piece.group for piece in composed] == list(range(len(composed)))


# ---- limits, and what is left behind ----


def test_parts_add_up_to_the_model(model):
    parts = {part.name: part for part in parameters_by_part(model)}
    assert sum(part.parameters for part in parts.values()) == model.num_params()
    assert parts["token embedding"].parameters == model.wte.weight.numel()
    assert parts["attention"].parameters == sum(p.numel() for block in model.h for p in block.attn.parameters())
    assert parts["feed-forward"].parameters == sum(p.numel() for block in model.h for p in block.mlp.parameters())
    tied = model.config.tie_word_embeddings
    assert parts["head"].parameters == (0 if tied else model.lm_head.weight.numel())
    assert bool(parts["head"].note) == tied
    assert (parts["position embedding"].parameters > 0) == (model.config.position == "learned")


def test_the_mode_is_given_back_and_dropout_is_off():
    model = tiny_model(dropout=0.5).train()
    inside = look_inside(model, BYTE, TEXT)
    assert torch.equal(inside.attention, look_inside(model, BYTE, TEXT).attention)
    assert next_tokens(model, BYTE, TEXT) == next_tokens(model, BYTE, TEXT)
    logit_lens(model, BYTE, inside)
    with pytest.raises(ValueError, match="at most"):
        look_inside(model, BYTE, TEXT * 9)
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: look_inside(m, BYTE, "x" * 25), "25 tokens; at most 24"),
        (lambda m: look_inside(m, BYTE, "x" * 9, max_tokens=8), "9 tokens; at most 8"),
        (lambda m: look_inside(m, BYTE, ""), "0 tokens"),
        (lambda m: surprise(m, BYTE, "x"), "at least 2"),
        (lambda m: surprise(m, BYTE, "x" * 1025), "1,025 tokens; at most 1,024"),
        (lambda m: tokens_of(BYTE, "x" * 3, max_tokens=2), "at most 2"),
        (lambda m: next_tokens(m, BYTE, "x", n=0), "at least 1"),
        (lambda m: next_tokens(m, None, "x"), "no tokenizer"),
        (lambda m: look_inside(m, None, "x"), "no tokenizer"),
        (lambda m: divergence(m, m, BYTE, None, "x"), "the same tokenizer"),
        (lambda m: look_inside(m, BPE, "the the"), "do not belong together"),
    ],
)
def test_limits_are_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model())


@pytest.mark.parametrize("call", [next_tokens, look_inside, surprise, lambda _, *rest: tokens_of(*rest)])
def test_unknown_characters_are_named(call):
    with pytest.raises(UnknownCharacterError, match="'z'"):
        call(tiny_model(), CHAR, "so z")


@pytest.mark.parametrize("call", [next_tokens, surprise, lambda m, *rest: logit_lens(m, BYTE, look_inside(m, *rest))])
def test_damaged_weights_are_named(call):
    model = tiny_model()
    with torch.no_grad():
        model.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        call(model, BYTE, "so")
