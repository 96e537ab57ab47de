"""Generation: the fast way gives what the uncached oracle gives, samplers equal Transformers', text is cut cleanly."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanogpt_hub.generate import (
    Row,
    StopText,
    encode_prompt,
    generate,
    generate_naive,
    stream_text,
    stream_tokens,
    window_start,
)
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sampling import (
    Drawn,
    SamplingConfig,
    draw,
    filter_logits,
    only_top_k,
    pick,
    sampler_stages,
    seen_tokens,
    usable_logits,
)
from nanogpt_hub.tokenizer import build_tokenizer

pytestmark = pytest.mark.usefixtures("every_engine")

BYTE = build_tokenizer("byte", [])
V = BYTE.vocab_size
FAMILIES = {"nanogpt": {}, "gpt2": {}, "pythia": {}, "llama": dict(n_kv_head=1), "nanochat": dict(logit_softcap=50.0)}
PROMPTS = [
    [7],
    [1, 2, 3, 4, 5],
    list(range(16)),
    list(range(50, 90)),
]  # one token, some, a full context, more than that
SAMPLERS = {
    "greedy": dict(temperature=0.0),
    "greedy, no loops": dict(temperature=0.0, repetition_penalty=1.5),
    "plain": dict(temperature=1.0, top_k=None),
    "all": dict(temperature=1.3, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}


def tiny_model(preset: str = "gpt2", **overrides) -> GPT:
    """Weights large enough that tokens matter; float64, so that no rounding decides which of two tokens comes.

    The head is not tied, since a tied one with random weights mostly repeats the last token.
    """
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=V, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, "1m", **{**shape, **FAMILIES[preset], **overrides})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def rows_of(tokens, n: int) -> list[list[int]]:
    rows = [[] for _ in range(n)]
    for token in tokens:
        rows[token.row].append(token.id)
    return rows


# ---- the fast way and the oracle ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("preset", FAMILIES)
def test_ragged_batch_equals_the_oracle_past_block_size(preset, sampler):
    model = tiny_model(preset)
    config = SamplingConfig(max_new_tokens=40, seed=3, stop_tokens=(), **SAMPLERS[sampler])
    rows = rows_of(stream_tokens(model, BYTE, PROMPTS, config), len(PROMPTS))
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        alone = SamplingConfig(max_new_tokens=40, seed=3 + i, **SAMPLERS[sampler])
        assert row == generate_naive(model, prompt, alone, BYTE.vocab_size)
        assert row == rows_of(stream_tokens(model, BYTE, [prompt], alone, stop_tokens=()), 1)[0]
    assert sampler == "greedy" or len(set(rows[1])) > 9  # not one token again and again, so equality says something


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_smallest_contexts(block_size):
    model = tiny_model(block_size=block_size)
    config = SamplingConfig(max_new_tokens=12, seed=0)
    tokens = stream_tokens(model, None, PROMPTS[:2], config)
    assert rows_of(tokens, 2)[0] == generate_naive(model, PROMPTS[0], config)


def test_a_row_that_stops_leaves_the_others_alone(model):
    config = SamplingConfig(max_new_tokens=30, seed=5, temperature=1.0)
    whole = [
        generate_naive(model, p, SamplingConfig(max_new_tokens=30, seed=5 + i, temperature=1.0), V)
        for i, p in enumerate(PROMPTS)
    ]
    stops = (whole[0][4], whole[2][9])
    rows = rows_of(stream_tokens(model, BYTE, PROMPTS, config, stop_tokens=stops), 4)
    ends = [next((n + 1 for n, id in enumerate(row) if id in stops), len(row)) for row in whole]
    assert rows == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert len(set(ends)) > 1


@given(st.integers(1, 300), st.integers(1, 40))
def test_window_keeps_between_half_and_all_of_the_context(n, block_size):
    start, kept = window_start(n, block_size), n - window_start(n, block_size)
    assert min(n, block_size // 2 + 1) <= kept <= block_size
    assert start == 0 or n > block_size
    assert window_start(n + 1, block_size) >= start


def test_cost_past_block_size_is_amortised():
    model, seen = tiny_model(), []
    model.wte.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    list(stream_tokens(model, None, [[1]], SamplingConfig(max_new_tokens=160, seed=0)))
    assert sum(seen) < 2.2 * 160


# ---- samplers ----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (20, 0.8, 0.05), (10**6, 0.01, 1.0)],
)
@pytest.mark.parametrize("penalty", [1.0, 1.5, 0.7])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p, min_p, penalty):
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)) * 3
    ids = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(2))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    ours = filter_logits(logits, config, seen_tokens(ids.tolist(), 60)).softmax(-1)
    torch.testing.assert_close(ours, theirs(ids, logits).softmax(-1))


def test_stages_name_each_sampler_that_is_on():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -5.0]])
    config = SamplingConfig(temperature=1.0, top_k=4, top_p=0.9, min_p=0.5)
    kept = {name: (stage > -math.inf).sum().item() for name, stage in sampler_stages(logits, config)}
    assert kept == {"model": 5, "top_k": 4, "top_p": 3, "min_p": 1}


@given(
    logits=st.lists(
        st.sampled_from([-math.inf, -3e38, -1.0, 0.0, 1e-30, 1.0, 1.5, 88.0, 3e38, math.inf]), min_size=3, max_size=9
    ),
    temperature=st.sampled_from([0.0, 1e-300, 1e-5, 1e-3, 1.0, 100.0, 1e6]),
    top_k=st.sampled_from([None, 0, 1, 2, 10**9]),
    top_p=st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
    penalty=st.sampled_from([1e-6, 0.1, 1.0, 10.0, 1e6]),
    uniform=st.sampled_from([0.0, 1e-12, 0.5, 1 - 2**-24]),
)
@settings(max_examples=400, deadline=None)
def test_every_extreme_gives_a_valid_token(logits, temperature, top_k, top_p, min_p, penalty, uniform):
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    clean = usable_logits(torch.tensor([logits]), len(logits) - 1)
    probs = filter_logits(clean, config, seen_tokens([[0, 1]], len(logits))).softmax(-1)
    token = pick(probs, torch.tensor([[uniform]])).item()
    assert 0 <= token < len(logits) - 1  # the last one is surplus
    assert probs[0, token] > 0
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)


def test_pick_gives_each_token_its_share():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    uniform = torch.arange(1000)[:, None] / 1000
    shares = pick(probs.expand(1000, 6), uniform).bincount(minlength=6) / 1000
    torch.testing.assert_close(shares[None], probs, atol=0.002, rtol=0)


@pytest.mark.parametrize("settings", [dict(top_k=5), dict(top_k=40, temperature=1.3, top_p=0.9, min_p=0.05)])
def test_a_large_vocabulary_is_narrowed_to_the_top_k_first(settings, monkeypatch):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logits[7, :9] = 50.0  # more than five tie
    uniform, config = torch.rand(64, 1, generator=torch.Generator().manual_seed(1)), SamplingConfig(**settings)
    assert only_top_k(logits[:7], config) is not None
    assert only_top_k(logits[:8], SamplingConfig(top_k=5)) is None
    for rows in (logits[:7], logits):
        quick = draw(rows, 1000, config, [[0]] * len(rows), uniform[: len(rows)], alternatives=8)
        with monkeypatch.context() as patch:
            patch.setitem(draw.__globals__, "only_top_k", lambda logits, config: None)
            plain = draw(rows, 1000, config, [[0]] * len(rows), uniform[: len(rows)], alternatives=8)
        assert [d.id for d in quick] == [d.id for d in plain]
        for a, b in zip(quick, plain, strict=True):
            assert a[1:3] == pytest.approx(b[1:3])
            assert [x.id for x in a.alternatives] == [x.id for x in b.alternatives]
            assert [x.sampled_prob for x in a.alternatives] == pytest.approx([x.sampled_prob for x in b.alternatives])


# ---- records ----


def test_records_hold_the_models_own_probabilities(model):
    prompt, config = [1, 2, 3], SamplingConfig(max_new_tokens=8, seed=0, temperature=1.5, top_k=4)
    tokens = list(stream_tokens(model, BYTE, [prompt], config, alternatives=6, stop_tokens=()))
    ids = prompt + [token.id for token in tokens]
    logits = usable_logits(model(torch.tensor([ids]))[0][0], V)
    for place, token in enumerate(tokens, len(prompt) - 1):
        probs = logits[place].softmax(-1)
        assert token.prob == pytest.approx(probs[token.id].item(), rel=1e-4)
        assert [a.id for a in token.alternatives] == probs.topk(6).indices.tolist()
        assert [a.prob for a in token.alternatives] == pytest.approx(probs.topk(6).values.tolist(), rel=1e-4)
        assert [a.sampled_prob > 0 for a in token.alternatives] == [True] * 4 + [False] * 2
        assert token.sampled_prob == next(a.sampled_prob for a in token.alternatives if a.id == token.id)
    assert [token.finish for token in tokens] == [None] * 7 + ["length"]


def test_surplus_vocabulary_is_never_drawn():
    config = SamplingConfig(max_new_tokens=200, temperature=5.0, top_k=0, seed=0, stop_tokens=())
    ids = [token.id for token in stream_tokens(tiny_model(vocab_size=2 * V), BYTE, [[1]], config)]
    assert len(ids) == 200
    assert max(ids) < V


def test_seeds_are_told_and_reproduce(model):
    first = generate(model, BYTE, ["a", "b"], max_new_tokens=20, temperature=2.0)
    assert first[1].seed == first[0].seed + 1
    again = generate(model, BYTE, "b", max_new_tokens=20, temperature=2.0, seed=first[1].seed)
    assert (again.text, again.ids) == (first[1].text, first[1].ids)
    assert again.text != generate(model, BYTE, "b", max_new_tokens=20, temperature=2.0, seed=first[0].seed).text


# ---- text ----


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_join_to_the_whole(model, seed):
    config = SamplingConfig(max_new_tokens=60, seed=seed, temperature=3.0, top_k=0, stop_tokens=())
    result = generate(model, BYTE, "ab", config)
    assert result.text == BYTE.decode(result.ids)
    assert "".join(stream_text(model, BYTE, "ab", config)) == result.text


def test_stop_string_ends_the_text_before_it(model):
    config = SamplingConfig(max_new_tokens=60, seed=0, temperature=3.0, top_k=0, stop_tokens=())
    whole = generate(model, BYTE, "ab", config).text
    stop = whole[5:8]
    result = generate(model, BYTE, "ab", config, stop=(stop, "never there"))
    assert (result.text, result.finish) == (whole[: whole.index(stop)], "stop")
    assert len(result.ids) < 60
    assert "".join(stream_text(model, BYTE, "ab", config, stop=stop)) == result.text


@given(text=st.text("abc", max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_shown(text, stops):
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if complete:
        expected = text[: complete[0] - max(len(stop) for stop in stops if text[: complete[0]].endswith(stop))]
    stopper, shown = StopText(tuple(stops)), ""
    for letter in text:
        shown += stopper.push(letter)
        assert expected.startswith(shown)
        if stopper.found:
            break
    assert stopper.found == bool(complete)
    assert shown + ("" if stopper.found else stopper.flush()) == expected


def test_end_of_text_ends_a_row_and_is_not_shown(model):
    ids = generate_naive(model, [1], SamplingConfig(max_new_tokens=9, seed=0))
    tokens = list(stream_tokens(model, BYTE, [[1]], seed=0, stop_tokens=ids[4:5]))
    assert [token.id for token in tokens] == ids[: ids.index(ids[4]) + 1]
    assert tokens[-1].finish == "eot"
    row = Row(0, [1], BYTE, SamplingConfig(seed=0))
    assert row.push(Drawn(BYTE.eot_id, -1.0, 1.0), late=False).text == ""
    assert row.finish == "eot"


def test_a_character_begun_in_the_prompt_is_completed():
    first, second = "é".encode()
    row = Row(0, [BYTE.eot_id, first], BYTE, SamplingConfig(seed=0))
    assert row.push(Drawn(second, -1.0, 1.0), late=False).text == "é"


# ---- manners ----


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_modes_are_left_as_they_were(training):
    model = tiny_model(dropout=0.5).train(training)
    config = SamplingConfig(max_new_tokens=6, seed=0)
    ids = []
    for token in stream_tokens(model, BYTE, [[1, 2]], config):
        assert not torch.is_inference_mode_enabled()
        assert model.training == training
        model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1].backward()  # a training step in between still works
        ids.append(token.id)
    assert ids == generate_naive(model.eval(), [1, 2], config, V)


def test_closing_ends_the_work(model):
    calls = []
    handle = model.wte.register_forward_hook(lambda *_: calls.append(1))
    stream = stream_text(model, BYTE, "ab", seed=0, max_new_tokens=100, stop_tokens=())
    assert not calls
    next(stream)
    before = len(calls)
    stream.close()
    handle.remove()
    assert len(calls) == before < 20
    assert list(stream) == []


def test_time_is_up_after_the_first_step(model):
    results = generate(model, BYTE, ["a", "bc"], max_seconds=0, seed=0)
    assert [(len(result.ids), result.finish) for result in results] == [(1, "time")] * 2


def test_empty_prompt_starts_a_document():
    assert encode_prompt(BYTE, "") == [BYTE.eot_id]
    no_eot = build_tokenizer("byte", [])
    no_eot.eot_id = None
    assert encode_prompt(no_eot, "") == no_eot.encode("\n")
    no_newline = build_tokenizer("char", ["abc"])
    no_newline.eot_id = None
    with pytest.raises(ValueError, match="at least one character"):
        encode_prompt(no_newline, "")


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([1, V], f"token id {V}"), ([-1], "token id -1")])
def test_prompts_that_the_model_cannot_read(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, BYTE, [prompt])


def test_no_tokenizer_and_no_numbers(model):
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(model, None, "a")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        stream_tokens(model, None, [[1]], stop="a")
    broken = tiny_model()
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(broken, BYTE, "a")


@pytest.mark.parametrize(
    "field",
    [
        dict(temperature=-1), dict(temperature=math.nan), dict(temperature="hot"), dict(temperature=None),
        dict(temperature=10**400),
        dict(top_k=-1), dict(top_k=1.5), dict(top_p=1.1), dict(top_p=-0.1), dict(min_p=2), dict(repetition_penalty=0),
        dict(repetition_penalty=math.inf), dict(max_new_tokens=0), dict(max_new_tokens=True), dict(seed=-1),
        dict(seed=2**60), dict(stop=("",)), dict(stop=(1,)), dict(stop_tokens=("a",)), dict(max_seconds=-1),
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        SamplingConfig(**field)


def test_a_lone_stop_is_not_taken_for_its_letters():
    assert SamplingConfig(stop="ab", stop_tokens=3) == SamplingConfig(stop=("ab",), stop_tokens=(3,))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, {}),
        ({"temperature": 0.5, "top_k": 7, "eos_token_id": 3, "top_p": None}, dict(temperature=0.5, top_k=7)),
        ({"do_sample": False, "temperature": 0.9}, dict(temperature=0.0)),
    ],
)
def test_defaults_of_a_folder(tmp_path, found, expected):
    if found is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(found), encoding="utf-8")
    assert SamplingConfig.from_folder(tmp_path, seed=1) == SamplingConfig(**expected, seed=1)


@pytest.mark.parametrize("text", ["[]", "{", '{"top_p": 7}', '{"temperature": "x"}'])
def test_broken_defaults_name_their_file(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="generation_config"):
        SamplingConfig.from_folder(tmp_path)
