"""The chunked loss and recomputed blocks against the plain ones, and the memory that they are there to save."""

import math
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_hub.model import GPT, IGNORE_INDEX, GPTConfig
from train import loss
from train.attention import use_short_attention
from train.hardware import bytes_kept_by_block, seed_dropout, training_bytes
from train.trainer import LossOnly

V, T = 97, 16
CONFIG = GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32)
VARIANTS = [
    replace(CONFIG, tie_word_embeddings=tied, logit_softcap=cap) for tied in (True, False) for cap in (0.0, 2.0)
]


@pytest.fixture
def chunked(monkeypatch):
    """Seven tokens at a time, which do not divide a batch of 3 x 16."""
    monkeypatch.setattr(loss, "CHUNK", 4 * V * 7)
    assert loss.count_chunks(3 * T, V) == 7


def model(config: GPTConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    gpt = GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)  # logits large enough for the cap to bend
    return gpt


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    idx, targets = torch.randint(V, (2, 3, T))
    targets[0, :10] = IGNORE_INDEX
    return idx, targets


def gradients(gpt: GPT, value: Tensor) -> dict[str, Tensor]:
    gpt.zero_grad()
    value.backward()
    return {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= relative * grad.norm(), name


def mean_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    return loss.summed_loss(gpt, idx, targets) / loss.count_targets(targets)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"tied={c.tie_word_embeddings} cap={c.logit_softcap}")
def test_chunked_loss_and_gradients_are_the_plain_ones(config, chunked):
    gpt, (idx, targets) = model(config), batch()
    plain = gpt(idx, targets)[1]
    expected = gradients(gpt, plain)
    got = mean_loss(gpt, idx, targets)
    assert got.item() == pytest.approx(plain.item(), rel=1e-6)
    assert_close(gradients(gpt, got), expected, 2e-6)


def test_exact_in_double_precision(chunked):
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (20,))
    (loss.chunked_cross_entropy(x, weight, targets, 3.0, 6) / 7).backward()
    got = x.grad, weight.grad
    x.grad = weight.grad = None
    logits = 3 * torch.tanh(x @ weight.T / 3)
    (torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 7).backward()
    for mine, plain in zip(got, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)  # the logits are taken in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_the_plain_loss(dtype, chunked):
    gpt, (idx, targets) = model(CONFIG), batch()
    truth = gradients(gpt, gpt(idx, targets)[1])
    with torch.autocast("cpu", dtype=dtype):
        x = gpt.hidden(idx)
        plain = gpt(idx, targets)[1]
        got = mean_loss(gpt, idx, targets)
    assert x.dtype == got.dtype == torch.float32
    far = {name: (grad - truth[name]).norm() for name, grad in gradients(gpt, plain).items()}
    for name, grad in gradients(gpt, got).items():
        assert grad.dtype == torch.float32
        assert (grad - truth[name]).norm() <= 1.5 * far[name] + 1e-6, name


def test_a_loss_scaler_changes_nothing_and_finds_what_is_not_finite(chunked):
    gpt, (idx, targets) = model(CONFIG), batch()
    expected = gradients(gpt, mean_loss(gpt, idx, targets))
    expected = {name: grad.clone() for name, grad in expected.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.0)
    with torch.autocast("cpu", enabled=False):
        scaled = gradients(gpt, scaler.scale(mean_loss(gpt, idx, targets)))
    scaler.unscale_(optimizer)
    assert_close(scaled, expected, 1e-6)
    gradients(gpt, scaler.scale(mean_loss(gpt, idx, targets)) * torch.inf)
    scaler.update()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**16


@pytest.mark.parametrize("size", [4 * V * 7, 2**30], ids=["chunked", "plain"])
def test_a_batch_without_targets_counts_for_nothing(monkeypatch, size):
    monkeypatch.setattr(loss, "CHUNK", size)
    gpt, (idx, targets) = model(CONFIG), batch()
    value = loss.summed_loss(gpt, idx, torch.full_like(targets, IGNORE_INDEX))
    assert value.item() == 0
    assert all(float(grad.abs().max()) == 0 for grad in gradients(gpt, value).values())


def test_accumulated_parts_are_the_whole(chunked):
    gpt, (idx, targets) = model(CONFIG), batch()
    expected = {name: g.clone() for name, g in gradients(gpt, gpt(idx, targets)[1]).items()}
    gpt.zero_grad()
    for row, aims in zip(idx.split(1), targets.split(1), strict=True):
        (loss.summed_loss(gpt, row, aims) / loss.count_targets(targets)).backward()
    assert_close({name: p.grad for name, p in gpt.named_parameters()}, expected, 2e-6)


def test_a_frozen_head_and_no_gradients_at_all(chunked):
    gpt, (idx, targets) = model(replace(CONFIG, tie_word_embeddings=False)), batch()
    expected = gradients(gpt, gpt(idx, targets)[1])
    del expected["lm_head.weight"]
    gpt.lm_head.weight.requires_grad_(False)
    gpt.lm_head.weight.grad = None
    assert_close(gradients(gpt, mean_loss(gpt, idx, targets)), expected, 2e-6)
    with torch.no_grad():
        assert not mean_loss(gpt, idx, targets).requires_grad


def test_a_second_backward_pass_is_refused(chunked):
    gpt, (idx, targets) = model(CONFIG), batch()
    value = mean_loss(gpt, idx, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_target_beyond_the_vocabulary_is_an_error(chunked):
    gpt, (idx, targets) = model(CONFIG), batch()
    targets[2, 3] = V
    with pytest.raises((IndexError, RuntimeError)):
        mean_loss(gpt, idx, targets)


def test_compiles_as_one_graph(chunked):
    gpt, (idx, targets) = model(VARIANTS[-1]), batch()
    value = loss.summed_loss(gpt, idx, targets)
    expected = {name: g.clone() for name, g in gradients(gpt, value).items()}
    compiled = LossOnly(gpt)
    compiled.compile(backend="aot_eager", fullgraph=True)
    got = compiled(idx, targets)
    assert got.item() == pytest.approx(value.item(), rel=1e-6)
    assert_close(gradients(gpt, got), expected, 2e-6)


def test_small_logits_take_the_plain_path():
    assert loss.count_chunks(12 * 64, 65) == 1
    assert loss.count_chunks(12 * 1024, 50304) > 10
    assert loss.count_chunks(0, V) == 1


def test_a_compiled_step_makes_more_logits_at_once():
    counted = torch.compile(lambda: loss.count_chunks(12 * 1024, 50304), backend="eager", fullgraph=True)
    assert counted() == math.ceil(loss.count_chunks(12 * 1024, 50304) / loss.COMPILED)


class MostLogits(TorchDispatchMode):
    """Notes the most rows of a tensor with V columns that any operation makes."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if torch.is_tensor(t) and t.ndim > 1 and t.size(-1) == V]
        self.rows = max([self.rows, *(t.numel() // V for t in made)])
        return out


def test_the_logits_never_exist_all_at_once(chunked):
    gpt, (idx, targets) = model(replace(CONFIG, n_embd=8)), batch()
    with MostLogits() as plain:
        gpt(idx, targets)[1].backward()
    assert plain.rows == 3 * T
    with MostLogits() as mine:
        mean_loss(gpt, idx, targets).backward()
    assert mine.rows == 8  # the transposed head, (n_embd, V); the chunks have 7


# ---- recomputed blocks -----------------------------------------------------------------------------------------------


def step(gpt: GPT, compiled: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    loss_of = LossOnly(gpt)
    if compiled:
        loss_of.compile(backend="aot_eager")
    torch.manual_seed(5)
    value = loss_of(*batch())
    return value.detach(), gradients(gpt, value)


@pytest.mark.parametrize("config", [CONFIG, GPTConfig.preset("nanochat", "1m", vocab_size=V, n_layer=2)], ids=str)
def test_recomputed_blocks_give_the_same_bits(config):
    config = replace(config, dropout=0.2)
    plain, recomputed = model(config), model(config)
    names = list(recomputed.state_dict())
    loss.recompute_blocks(recomputed)
    assert list(recomputed.state_dict()) == names
    (value, grads), (value_too, grads_too) = step(plain), step(recomputed)
    assert torch.equal(value, value_too)
    assert grads.keys() == grads_too.keys()
    assert all(torch.equal(grads[name], grads_too[name]) for name in grads)


def test_recomputed_blocks_run_twice_in_training_and_once_elsewhere():
    gpt, (idx, targets) = model(CONFIG), batch()
    calls = []
    gpt.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    loss.recompute_blocks(gpt)
    mean_loss(gpt, idx, targets).backward()
    assert len(calls) == 2
    with torch.no_grad():
        gpt(idx)
    assert len(calls) == 3


def test_recomputed_blocks_compile():
    plain, recomputed = model(CONFIG), model(CONFIG)
    loss.recompute_blocks(recomputed)
    assert_close(step(recomputed, compiled=True)[1], step(plain)[1], 2e-6)


# ---- what the plan says ----------------------------------------------------------------------------------------------


def kept_bytes(config: GPTConfig, short_attention: bool) -> int:
    """Bytes of all distinct tensors, parameters apart, that a forward pass keeps for the backward pass."""
    kept = {}
    gpt = model(config)
    if short_attention:
        use_short_attention(gpt)
    mine = {p.untyped_storage().data_ptr() for p in gpt.parameters()}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        gpt.hidden(torch.randint(V, (2, config.block_size)))
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in mine)


@pytest.mark.parametrize("short_attention", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "pythia", "llama", "mixtral", "nanochat"])
def test_the_estimate_of_what_a_block_keeps(name, short_attention):
    one, three = (
        GPTConfig.preset(name, "1m", vocab_size=V, n_layer=n, n_embd=256, tie_word_embeddings=False) for n in (1, 3)
    )
    more = kept_bytes(three, short_attention) - kept_bytes(one, short_attention)
    measured = more / 2 / (2 * one.block_size)
    assert bytes_kept_by_block(one, "fp32", short_attention) == pytest.approx(measured, rel=0.1)


def test_recomputing_and_half_precision_take_less():
    config = GPTConfig.preset("gpt2", "124m")
    plain = training_bytes(config, 124_000_000, 12, "fp32")
    assert training_bytes(config, 124_000_000, 12, "bf16") < plain
    assert training_bytes(config, 124_000_000, 12, "fp32", recompute=True) < plain / 2


# ---- what a step leaves to the system --------------------------------------------------------------------------------

FAULTS = """
import resource, torch
from train.hardware import keep_freed_memory
assert keep_freed_memory(2**28)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc only")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000


def test_dropout_is_seeded_as_torch_does():
    numbers = []
    for seed in (torch.manual_seed, lambda n: seed_dropout("cpu", n)):
        seed(1337 * 1_000_003 * 65_537)
        numbers.append(torch.rand(5))
    assert torch.equal(*numbers)
