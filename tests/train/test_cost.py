"""What a run will cost: the numbers of runs that are known, and the trainer's own estimate of memory."""

from types import SimpleNamespace

import pytest
from helpers import ROOT

from nanogpt_hub.model import GPT
from train import cost, plan
from train.config import make_parser, parse
from train.plan import step_bytes


def config_of(*flags):
    return parse(make_parser("test", ""), list(flags))[0]


GPT2 = str(ROOT / "configs" / "gpt2_124m_openwebtext.yaml")


def test_nanogpts_run():
    """nanoGPT reports about four days on eight A100 for 600,000 steps of 480 x 1024 tokens."""
    found = cost.cost_of(config_of(GPT2), 8, "A100", mfu=0.4)
    assert found.n_params == pytest.approx(124e6, rel=0.01)
    assert found.tokens == 600_000 * 480 * 1024
    assert found.flops == pytest.approx(6 * 124e6 * found.tokens, rel=0.2)
    assert 2 < found.seconds / 86400 < 4


def test_parameters_are_those_of_the_model():
    config = config_of("--model.preset=llama", "--model.size=1m", "--data.tokenizer=byte")
    model = GPT(config.model.gpt_config(257))
    assert cost.cost_of(config, 1, "T4").n_params == model.num_params()
    assert cost.count_parameters(model.config, embeddings=False) == model.num_params(embeddings=False)


def test_memory_is_the_trainers_own_estimate(monkeypatch):
    config = config_of("--model.size=1m", "--data.tokenizer=byte", "--batch_size=8", "--precision=bf16")
    found = cost.cost_of(config, 1, "H100")
    shape = config.model.gpt_config(257)
    assert found.needed == step_bytes(config, shape, found.n_params, 8, "bf16", "cuda")
    monkeypatch.setattr(plan, "PartialState", lambda: SimpleNamespace(num_processes=8))
    found = cost.cost_of(config, 8, "H100")
    assert found.needed == step_bytes(config, shape, found.n_params, 1, "bf16", "cuda")
    assert found.parts["gradient buckets"] == 4 * found.n_params
    small = cost.cost_of(config_of(GPT2, "--micro_batch_size=0"), 8, "T4")
    assert small.needed < 0.9 * 16e9, "the largest micro-batch that fits"


def test_a_sharded_model_takes_its_part_of_each_device():
    flags = ["--model.size=1m", "--data.tokenizer=byte", "--batch_size=8", "--micro_batch_size=1", "--precision=bf16"]
    whole, cut = (cost.cost_of(config_of(*flags, f"--parallel.shard={s}"), 8, "H100") for s in ("false", "true"))
    assert whole.parts["optimizer"] == 8 * whole.n_params
    assert [8 * cut.parts[name] for name in ("weights", "gradients", "optimizer")] == pytest.approx(
        [whole.parts[name] for name in ("weights", "gradients", "optimizer")], rel=1e-4
    )
    assert list(whole.parts.values())[-1] == list(cut.parts.values())[-1], "activations are what they were"
    tables = 257 * 128  # the embedding and the head, in fp32 with their gradients; a layer's weights twice in bf16
    assert cut.parts["gathered weights"] == pytest.approx(16 * tables + 6 * (cut.n_params - 2 * tables) / 4, rel=1e-4)


def test_a_model_of_7b_fits_eight_gpus_only_where_it_is_cut_over_them(capsys):
    flags = (
        "--model.preset llama --model.n_layer 32 --model.n_head 32 --model.n_embd 4096 --model.n_inner 11008 "
        "--model.block_size 4096 --data.tokenizer gpt2 --batch_size 8 --micro_batch_size 1 "
        "--activation_checkpointing true --devices 8xH100"
    ).split()
    assert cost.main(flags) == 0
    assert "--parallel.shard true cuts weights and optimizer over the devices" in capsys.readouterr().out
    assert cost.main([*flags, "--parallel.shard", "true"]) == 0
    said = capsys.readouterr().out
    assert "gathered weights" in said
    assert "does not fit" not in said


def test_the_largest_config_is_planned(capsys):
    assert cost.main([str(ROOT / "configs" / "gpt2_1558m_openwebtext.yaml"), "--devices", "8xH100"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" not in said
    assert "(1 of the" in said  # compute-optimal


def test_what_is_printed(capsys):
    assert cost.main([GPT2, "--devices", "8xH100", "--price", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "tokens", "compute-optimal", "optimizer", "8 x H100", "price"):
        assert word in out
    assert (
        cost.main([GPT2, "--devices", "2xT4", "--model.size", "1558m", "--batch_size", "2", "--micro_batch_size", "1"])
        == 0
    )
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "8xABC"], "as in 8xH100"),
        (["--devices", "0xH100"], "as in 8xH100"),
        (["--devices", "7xH100"], "cannot be divided among 7 devices"),
        (["--devices", "8xH100", "--mfu", "2"], "mfu must be in"),
    ],
)
def test_bad_input(flags, message, capsys):
    assert cost.main([GPT2, *flags]) == 2
    assert message in capsys.readouterr().err
