"""Guessing ahead gives the tokens of plain generation, in fewer passes where the guesses are good."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_hub import cli, speculate
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.engine.select import open_engine
from nanogpt_hub.generate import generate, generate_naive, stream_text, stream_tokens
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.speculate import Pace, Reader, Speculator, TextLookup
from nanogpt_hub.tokenizer import build_tokenizer

pytestmark = pytest.mark.usefixtures("every_engine")

BYTE = build_tokenizer("byte", [])
V = BYTE.vocab_size
SAMPLERS = {
    "greedy": dict(temperature=0.0),
    "greedy, no loops": dict(temperature=0.0, repetition_penalty=1.5),
    "sharp": dict(temperature=0.2, top_k=5),
    "all": dict(temperature=1.3, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}
REPEATING = [*range(5)] * 4


def tiny_model(preset: str = "gpt2", seed: int = 0, **overrides) -> GPT:
    """Weights large enough that tokens matter; float64, so that no rounding decides which of two tokens comes."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=V, tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = GPT(GPTConfig.preset(preset, "1m", **{**shape, **overrides})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def bigram_model(logits: torch.Tensor, **overrides) -> GPT:
    """A model whose next token depends on the last one alone, by logits (V, V)."""
    n = len(logits)
    model = tiny_model("llama", n_layer=1, vocab_size=n, n_embd=n, n_head=1, **overrides)
    with torch.no_grad():
        for parameter in model.h.parameters():
            parameter.zero_()
        model.wte.weight.copy_(torch.eye(n))
        model.ln_f.weight.fill_(n**-0.5)  # undoes the norm of a token, which is 1 in one place of n
        model.lm_head.weight.copy_(logits.T)
    return model


def counting_model(**overrides) -> GPT:
    """Goes through 0 1 2 3 4 5 6 7 0 1 ..., surely."""
    return bigram_model(50 * torch.eye(8).roll(1, dims=1), **overrides)


@pytest.fixture
def eager(monkeypatch):
    """As many guesses as possible, whether or not they pay."""
    monkeypatch.setattr(Pace, "choose", lambda self, kind: self.most)


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def ids_of(*args, **kwargs) -> list[int]:
    return [token.id for token in stream_tokens(*args, **kwargs)]


# ---- the same tokens ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guesser", ["text", "itself", "half of itself", "another", "experts", "a shorter context"])
@pytest.mark.usefixtures("eager")
def test_the_tokens_are_those_of_the_oracle_past_block_size(guesser, sampler):
    model = tiny_model()
    small = {
        "text": None,
        "itself": model,
        "half of itself": tiny_model(n_layer=1),
        "another": tiny_model("llama", seed=9, vocab_size=V + 7),
        "experts": tiny_model("mixtral", n_expert=3),
        "a shorter context": tiny_model(block_size=5),
    }[guesser]
    for prompt in ([7], REPEATING, list(range(50, 90))):
        config = SamplingConfig(max_new_tokens=40, seed=3, **SAMPLERS[sampler])
        draft = Speculator(small)
        draft_tokens = list(stream_tokens(model, BYTE, [prompt], config, draft=draft, stop_tokens=()))
        assert [token.id for token in draft_tokens] == generate_naive(model, prompt, config, V)
        assert draft_tokens[-1].finish == "length"
        assert draft.passes + draft.true == 40
        assert draft.guessed >= draft.true


@pytest.mark.usefixtures("eager")
def test_a_mixture_of_experts_reads_ahead():
    model = tiny_model("mixtral", n_expert=4)
    config = SamplingConfig(max_new_tokens=40, seed=3, temperature=0.2, stop_tokens=())
    for draft in (Speculator(), Speculator(model)):
        assert ids_of(model, BYTE, [REPEATING], config, draft=draft) == generate_naive(model, REPEATING, config, V)
        assert draft.guessed > 0
    assert draft.true > 0


def test_the_records_are_those_of_plain_generation(model):
    config = SamplingConfig(max_new_tokens=30, seed=1, temperature=0.3, stop_tokens=())
    plain = list(stream_tokens(model, BYTE, [REPEATING], config, alternatives=3))
    fast = list(stream_tokens(model, BYTE, [REPEATING], config, alternatives=3, draft=Speculator(model)))
    for one, other in zip(plain, fast, strict=True):
        assert (one.row, one.id, one.text, one.finish) == (other.row, other.id, other.text, other.finish)
        assert (one.logprob, one.sampled_prob) == pytest.approx((other.logprob, other.sampled_prob))
        assert [a.id for a in one.alternatives] == [a.id for a in other.alternatives]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 20), st.integers(1, 9), st.integers(0, 99))
def test_any_prompt_any_length(prompt, block_size, most, seed):
    model = tiny_model(block_size=block_size, vocab_size=4, n_layer=1)
    config = SamplingConfig(max_new_tokens=25, seed=seed, temperature=0.4)
    assert ids_of(model, None, [prompt], config, draft=Speculator(None, most)) == generate_naive(model, prompt, config)


def test_text_and_stops(model):
    settings = dict(max_new_tokens=60, seed=2, temperature=0.4)
    plain = generate(model, BYTE, "abcabc", **settings)
    stop = plain.text[20:22]
    for overrides in ({}, dict(stop=stop), dict(stop_tokens=(plain.ids[17],)), dict(max_new_tokens=1)):
        asked = {**settings, **overrides}
        expected = generate(model, BYTE, "abcabc", **asked)
        for draft in (Speculator(), Speculator(model)):
            result = generate(model, BYTE, "abcabc", draft=draft, **asked)
            assert (result.text, result.ids, result.finish) == (expected.text, expected.ids, expected.finish)
            assert "".join(stream_text(model, BYTE, "abcabc", draft=draft, **asked)) == expected.text


def test_time_ends_a_text(model):
    tokens = list(stream_tokens(model, BYTE, [[1]], max_seconds=0.0, max_new_tokens=50, draft=Speculator()))
    assert [token.finish for token in tokens] == ["time"]


def test_a_batch_is_generated_plainly(model):
    draft = Speculator()
    config = SamplingConfig(max_new_tokens=10, seed=0)
    assert ids_of(model, BYTE, [[1], [2]], config, draft=draft) == ids_of(model, BYTE, [[1], [2]], config)
    assert draft.passes == 0


def test_modes_are_given_back(model):
    small = tiny_model(n_layer=1, dropout=0.5).train()
    config = SamplingConfig(max_new_tokens=20, seed=0)
    assert ids_of(model, None, [REPEATING], config, draft=Speculator(small)) == ids_of(model, None, [REPEATING], config)
    assert small.training


# ---- the number of passes ----


def test_a_text_that_repeats_comes_many_tokens_at_a_time():
    draft = Speculator()
    prompt = [*range(8), 0, 1]
    tokens = ids_of(counting_model(), None, [prompt], temperature=0.0, max_new_tokens=100, draft=draft)
    assert tokens == [i % 8 for i in range(2, 102)]
    assert draft.guessed == draft.true
    assert draft.passes < 40  # the window of 16 moves every 8 tokens


@pytest.mark.usefixtures("eager")
def test_a_model_always_guesses_itself(model):
    draft = Speculator(model, most=3)
    ids_of(model, None, [[1]], max_new_tokens=60, temperature=1.0, seed=4, draft=draft)
    assert draft.guessed == draft.true > 40


@pytest.mark.usefixtures("eager")
def test_guesses_come_true_as_often_as_the_two_distributions_agree():
    torch.manual_seed(3)
    logits = torch.randn(6, 6) * 2
    large, small = bigram_model(logits, block_size=512), bigram_model(logits + torch.randn(6, 6), block_size=512)
    draft = Speculator(small, most=1)
    tokens = [0, *ids_of(large, None, [[0]], max_new_tokens=500, temperature=1.0, seed=0, draft=draft)]
    p, q = (model.lm_head.weight.T.softmax(-1).cumsum(-1) for model in (large, small))  # (6, 6): where each ends
    low = torch.zeros(6, 1, dtype=p.dtype)
    starts = torch.maximum(torch.cat((low, p[:, :-1]), 1), torch.cat((low, q[:, :-1]), 1))
    agree = (torch.minimum(p, q) - starts).clamp(min=0).sum(1)  # (6,) one random number gives both the same token
    expected = agree[tokens[:-1]].mean().item()
    assert 0.3 < expected < 0.9
    assert draft.true / draft.guessed == pytest.approx(expected, abs=4 * (0.25 / draft.guessed) ** 0.5)


def test_what_never_comes_true_is_hardly_tried(model, monkeypatch):
    monkeypatch.setattr(speculate, "relative_cost", lambda small, large: 0.1)
    draft = Speculator(tiny_model(seed=5))
    ids_of(model, None, [[1]], max_new_tokens=300, temperature=1.0, seed=0, draft=draft)
    assert draft.true < 30
    assert 3 < draft.guessed < 45


def test_a_pass_reads_only_what_is_new():
    model, read = counting_model(block_size=128), []
    model.wte.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    draft = Speculator()
    ids_of(model, None, [[*range(8), 0]], temperature=0.0, max_new_tokens=100, draft=draft)
    assert sum(read) == 9 + draft.guessed + draft.passes - 1


@pytest.mark.parametrize(
    ("hit", "extra", "k"), [(0.0, 0.1, 0), (0.4, 0.1, 0), (0.5, 0.1, 3), (0.6, 0.2, 3), (1.0, 0.2, 12), (0.9, 0.9, 0)]
)
def test_pace(hit, extra, k):
    pace = Pace(12, extra)
    pace.hit[0] = hit
    assert pace.choose(0) == k


def test_bad_luck_is_no_end():
    pace = Pace(12, 0.2)
    while k := pace.choose(0):
        pace.learn(0, k, 0)
    for _ in range(60):
        pace.learn(0, 0, 0)
    assert pace.choose(0) > 0


# ---- where guesses come from ----


@pytest.mark.parametrize(
    ("tokens", "kind", "guess"),
    [
        ([1], None, None),
        ([1, 2, 3], None, None),
        ([7, 7], 1, [7, 7, 7]),
        ([1, 2, 9, 1, 2], 2, [9, 1, 2]),
        ([5, 1, 2, 3, 8, 1, 2, 4, 5, 1, 2], 3, [3, 8, 1]),  # the longest match
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, [4, 1, 2]),  # of equal ones the latest
    ],
)
def test_lookup(tokens, kind, guess):
    for steps in ([len(tokens)], range(1, len(tokens) + 1)):  # at once, or token by token
        lookup = TextLookup()
        found = [lookup.look(tokens[:n]) for n in steps][-1]
        assert found == kind
        assert found is None or lookup.guess(tokens, torch.zeros(3, 1)) == guess


def test_a_reader_forgets_wrong_guesses(model):
    reader = Reader(model, 16, open_engine())
    text = [5, 6, 7]
    with torch.inference_mode():
        reader.logits(text)
        for guess in ([1, 2, 3], [1, 9], [1, 2], []):
            expected = model(torch.tensor([text + guess]))[0][0, -1 - len(guess) :]
            torch.testing.assert_close(reader.logits(text + guess, 1 + len(guess)), expected)


@pytest.mark.parametrize(
    ("small", "prompt", "message"),
    [(dict(vocab_size=9), [1], "9 tokens where the model has"), (dict(vocab_size=V), [V], f"token id {V}")],
)
def test_errors_come_at_once(small, prompt, message):
    with pytest.raises(ValueError, match=message):
        stream_tokens(tiny_model(vocab_size=V + 1), BYTE, [prompt], draft=Speculator(tiny_model(**small)))


def test_at_least_one_guess():
    with pytest.raises(ValueError, match="most is 0"):
        Speculator(most=0)


# ---- the command line ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a smaller one with its tokenizer, and one with another."""
    root = tmp_path_factory.mktemp("speculate")
    for name, preset, tokenizer in (
        ("model", "gpt2", BYTE), ("small", "llama", BYTE), ("other", "gpt2", build_tokenizer("char", ["ab"])),
    ):  # fmt: skip
        save_model(root / name, tiny_model(preset).float(), tokenizer)
    return root


@pytest.mark.parametrize("flags", ["--speculate ngram", "--speculate SMALL", "--speculate SMALL --quantize int8"])
def test_flags(folders, capsys, flags):
    command = ["generate", str(folders / "model"), "--prompt", "abab", "--seed", "1", "--max-new-tokens", "50"]
    plain = ["--quantize", "int8"] if "int8" in flags else []
    assert cli.main([*command, "--device", "cpu", *plain]) == 0
    expected = capsys.readouterr().out
    assert cli.main([*command, *flags.replace("SMALL", str(folders / "small")).split(), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--speculate OTHER", "its tokenizer is not the same"),
        ("--speculate nowhere/at-all", "there is no nowhere/at-all here"),
        ("--quantize int8 --dtype bfloat16", "int8 needs a float32 model on the CPU"),
    ],
)
def test_flags_that_cannot_be(folders, hub, capsys, flags, message):
    flags = flags.replace("OTHER", str(folders / "other")).split()
    assert cli.main(["generate", str(folders / "model"), "--max-new-tokens", "5", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
