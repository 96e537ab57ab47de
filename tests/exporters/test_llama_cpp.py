"""llama.cpp itself runs the files that we write: the same prompt ids and the same greedy text."""

import pytest
import torch
from test_gguf import SHAPES, model_folder

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.exporters.gguf import export_gguf

xllamacpp = pytest.importorskip("xllamacpp")

PROMPTS = ["To be, or not", "naïve 日本 😀\n", " the end,  the"]


@pytest.fixture
def llama_cpp(tmp_path):
    """Asks llama.cpp for a model folder's answer: text or ids to (number of prompt tokens, greedy token ids)."""

    def start(folder, kind="f32", banned=()):
        params = xllamacpp.CommonParams()
        params.model.path = str(export_gguf(folder, tmp_path / f"{kind}.gguf", kind))
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params, params.verbosity = 256, 1, False, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as ours; it would take f16
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(params)

        def answer(prompt, n=40):
            request = {"prompt": prompt, "n_predict": n, "temperature": 0, "n_probs": 1, "cache_prompt": False}
            done = server.handle_completions({**request, "logit_bias": [[id, False] for id in banned]})
            return done["usage"]["prompt_tokens"], [t["id"] for t in done["choices"][0]["logprobs"]["content"]]

        return answer

    return start


def without_letters(tokenizer, n_ids: int) -> list[int]:
    """Ids that are not whole ASCII characters: llama.cpp's server does not name those that make no character alone."""
    known = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    letters = {id for id, piece in enumerate(known) if piece.isascii() and id != tokenizer.eot_id}
    return [id for id in range(n_ids) if id not in letters]


def are_greedy(model, ids: list[int], tokens: list[int], banned: list[int]) -> bool:
    """Whether each token is the likeliest of those allowed, or as likely as rounding lets one tell."""
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens[:-1]]))[0][0, len(ids) - 1 :]  # (len(tokens), V)
    logits[:, banned] = -torch.inf
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((chosen >= logits.amax(-1) - 1e-3).all())


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
@pytest.mark.parametrize(("preset", "changes"), SHAPES)
def test_llama_cpp_writes_the_same_text(tmp_path, llama_cpp, preset, changes, tokenizer):
    folder = model_folder(tmp_path / "model", preset, tokenizer, **{**changes, "block_size": 96})
    model, ours = load_model(folder)
    banned = without_letters(ours, model.config.vocab_size)
    answer = llama_cpp(folder, banned=banned)
    for prompt in PROMPTS:
        ids = ours.encode(prompt)
        n_prompt, tokens = answer(prompt)
        assert n_prompt == len(ids)
        assert answer(ids)[1] == tokens, "the prompt's ids are ours"
        assert len(tokens) == 40
        assert are_greedy(model, ids, tokens, banned)


def test_eight_bits(tmp_path, llama_cpp):
    """Matrices in q8_0 are rounded: the first token is checked, whose lead is clear here."""
    folder = model_folder(tmp_path / "model", "llama", block_size=96)
    model, ours = load_model(folder)
    ids = ours.encode(PROMPTS[0])
    banned = without_letters(ours, model.config.vocab_size)
    assert are_greedy(model, ids, llama_cpp(folder, "q8_0", banned)(PROMPTS[0], n=1)[1], banned)
