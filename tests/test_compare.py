"""Comparing runs: what differs, losses at equal places, and what is beyond noise."""

import json
from pathlib import Path

import pytest
from helpers import make_model

from nanogpt_hub import cli
from nanogpt_hub.compare import compare, interval, read_experiment, two_sided, welch


def run(folder: Path, losses: list[float], seed: int = 1, activation: str = "gelu", **more) -> str:
    """A run's folder with an evaluation every 100 steps of 1000 tokens and 2 seconds."""
    folder.mkdir()
    tokenizer, factor = more.get("tokenizer", "char"), more.get("factor", 1.5)
    config = f"seed: {seed}\nmax_steps: 200\nmodel:\n  activation: {activation}\ndata:\n  tokenizer: {tokenizer}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    rows = [
        {"step": 100 * i, "tokens": 1000 * i, "seconds": 2.0 * i, "val_loss": loss} for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = {"val_loss": losses[-1], "bits_per_byte": factor * losses[-1]}
    (folder / "run.json").write_text(json.dumps({"evaluation": evaluation}), encoding="utf-8")
    return str(folder)


@pytest.fixture
def six(tmp_path) -> list[str]:
    old = [run(tmp_path / f"gelu-{s}", [4.0, 3.0, 2.0 + s / 100], s) for s in (1, 2, 3)]
    return old + [run(tmp_path / f"relu2-{s}", [4.0, 2.8, 1.8 + s / 100], s, "relu2") for s in (1, 2, 3)]


def test_runs_that_differ_in_the_seed_alone_are_one_group(six):
    comparison = compare([*map(read_experiment, six)])
    assert [(group.name, len(group.members)) for group in comparison.groups] == [("gelu-1", 3), ("relu2-1", 3)]
    assert comparison.differing == {"model.activation": ["gelu", "relu2"]}


def test_a_field_that_a_config_leaves_to_the_preset_is_the_models(tmp_path):
    told, silent = run(tmp_path / "told", [4.0, 3.0]), run(tmp_path / "silent", [4.0, 3.0])
    config = Path(silent) / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("activation: gelu", "activation: null"), encoding="utf-8"
    )
    make_model(Path(silent) / "best", activation="relu2")
    comparison = compare([read_experiment(told), read_experiment(silent)])
    assert comparison.differing == {"model.activation": ["gelu", "relu2"]}


def test_a_large_difference_is_beyond_noise(six):
    (verdict,) = compare([*map(read_experiment, six)]).verdicts
    assert verdict.difference == pytest.approx(-0.2)
    assert verdict.p < 0.001
    assert "beyond noise" in verdict.text


def test_with_one_seed_nothing_is_said_about_noise(six):
    (verdict,) = compare([read_experiment(six[0]), read_experiment(six[3])]).verdicts
    assert verdict.p is None
    assert "one seed" in verdict.text


def test_losses_are_compared_at_the_last_place_that_all_reached(tmp_path):
    long = read_experiment(run(tmp_path / "long", [4.0, 3.0, 2.0, 1.0]))
    short = read_experiment(run(tmp_path / "short", [4.0, 3.5, 3.0], activation="relu2"))
    comparison = compare([long, short])
    assert comparison.ends == {"step": 200, "tokens": 2000, "seconds": 4.0}
    assert comparison.verdicts[0].difference == pytest.approx(1.0)
    assert comparison.groups[0].losses("seconds", 3.0) == [pytest.approx(2.5)]  # on the line between two evaluations


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    char = read_experiment(run(tmp_path / "char", [4.0, 1.5], factor=1.4))
    bpe = read_experiment(run(tmp_path / "bpe", [6.0, 3.0], tokenizer="bpe:512", factor=0.6))
    comparison = compare([char, bpe])
    assert comparison.unit == "bits per byte"
    assert comparison.verdicts[0].difference == pytest.approx(3.0 * 0.6 - 1.5 * 1.4)


@pytest.mark.parametrize(("t", "freedom"), [(12.706, 1), (4.303, 2), (2.776, 4), (2.228, 10), (1.96, 1e6)])
def test_students_t_as_in_the_tables(t, freedom):
    assert two_sided(t, freedom) == pytest.approx(0.05, rel=0.01)


def test_welch_and_the_interval():
    assert welch([1.0, 1.1, 0.9], [1.0, 1.1, 0.9]) == pytest.approx(1.0)
    assert welch([1.0, 1.0], [0.9, 0.9]) == 0.0
    assert welch([1.0], [0.9, 0.8]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=0.001)
    assert interval([1.0]) is None


def test_the_command_prints_tables_and_draws(six, tmp_path, capsys):
    assert cli.main(["compare", *six, "--plot", str(tmp_path / "losses.png")]) == 0
    printed = capsys.readouterr().out
    assert "| model.activation | gelu | relu2 |" in printed
    assert "after 200 steps: relu2-1: -0.2000, beyond noise" in printed
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("runs", [["nowhere", "there"], ["alone"]])
def test_what_cannot_be_compared_is_an_error(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "alone", [2.0, 1.0])
    assert cli.main(["compare", *runs]) == 2
    assert "run" in capsys.readouterr().err
