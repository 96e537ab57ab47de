"""What is typed after `nanogpt-hub train`, and what is said where it is off."""

import pytest

from nanogpt_hub.system.installed import config_names
from train.config import TrainConfig, make_parser, parse
from train.facts import command_line
from train.typed import allowed, kinds


@pytest.fixture(scope="module")
def parser():
    return make_parser("nanogpt-hub train", "")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("hello")
    (tmp_path / "texts").mkdir()


def yaml(text: str) -> str:
    with open("mine.yaml", "w") as file:
        file.write(text)
    return "mine.yaml"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("my.txt", "my.txt is a text, not a config (.yaml): to train on it, type --data.source my.txt"),
        ("texts", "texts is a folder, not a config (.yaml): to train on it, type --data.source texts"),
        ("quickstrat", "no config of that name; did you mean quickstart?. Configs that come along: finetune_gpt2"),
        ("configs/stroies.yaml", "no config of that name; did you mean stories?"),
        ("--optim.learning_rat 1", "there is no setting --optim.learning_rat; did you mean --optim.learning_rate"),
        ("--learning_rate 1", "there is no setting --learning_rate; did you mean --optim.learning_rate?"),
        ("--optim.lr=1", "there is no setting --optim.lr; did you mean --optim.learning_rate?"),
        ("--max_iters 5", "did you mean --max_steps?"),
        ("--n_layer 5", "did you mean --model.n_layer?"),
        ("--qqqqqq 5", "there is no setting --qqqqqq\n"),
        ("--max_steps many", "max_steps is 'many'; it must be a whole number"),
        ("--save.interval 0.5", "save.interval is '0.5'; it must be a whole number"),
        ("--optim.learning_rate fast", "optim.learning_rate is 'fast'; it must be a number"),
        ("--fast_cpu maybe", "fast_cpu is 'maybe'; it must be true or false"),
        ("--model.preset gtp2", "it must be one of nanogpt, gpt2, pythia, llama, mixtral, nanochat; did you mean gpt2"),
        ("--model.dropout much", "model.dropout is 'much'; it must be a number"),
        ("--optim.name sgd", "optim.name is 'sgd'; it must be one of adamw, muon"),
        ("--lora.targets c_attnn", "it must be a list of c_attn, c_proj, c_fc, c_gate, such as a,b"),
        ("--data.mix other.txt", 'it must be names with their weights, such as {"other.txt": 0.5}'),
        ("--max_steps 3 extra", "'extra' stands where no value belongs"),
        ("--max_steps 0", "max_steps is 0; it must be at least 1"),
        ("--trackers excel", "trackers ['excel']: choose from tensorboard, trackio, wandb"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_answered_in_ours(parser, capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        parse(parser, words.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in said
    assert "class" not in said
    assert said.endswith("\nall settings: nanogpt-hub train --help\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "optim: {learning_rte: 3}",
            "the config has 'optim.learning_rte', and there is no such setting; did you mean",
        ),
        ("max_stepps: 3", "the config has 'max_stepps', and there is no such setting; did you mean --max_steps?"),
        ("optim: 3", "optim is 3; it is a group of settings"),
        ("max_steps: many", "max_steps is 'many'; it must be a whole number"),
        ("- a", "the config holds no settings"),
    ],
)
def test_a_wrong_config_is_answered_in_ours(parser, capsys, text, sentence):
    with pytest.raises(SystemExit):
        parse(parser, [yaml(text)])
    assert sentence in capsys.readouterr().err


def test_a_config_is_found_by_its_name_anywhere(parser):
    for words in (["quickstart"], ["configs/quickstart.yaml"], ["quickstart.yaml"]):
        config, _ = parse(parser, words)
        assert (config.out_dir, config.data.source, config.eval.interval) == ("out/quickstart", "python", 100)
    assert parse(parser, ["ladder/1_rotary"])[0].out_dir == "out/1_rotary"
    assert {"quickstart", "shakespeare_char", "ladder/8_muon"} <= {*config_names()}
    assert command_line("nanogpt-hub train", ["ladder/1_rotary"]) == "nanogpt-hub train ladder/1_rotary"


def test_a_config_of_ones_own_wins(parser):
    assert parse(parser, [yaml("max_steps: 3")])[0].max_steps == 3


@pytest.mark.parametrize("words", ["--trackers A,B", "--trackers=A,B", '--trackers ["A","B"]', "--trackers [A,B]"])
def test_lists_are_typed_with_commas(parser, words):
    words = words.replace("A", "tensorboard").replace("B", "wandb").split()
    assert parse(parser, words)[0].trackers == ["tensorboard", "wandb"]


def test_what_could_be_typed_before_still_can(parser):
    words = ["--trackers+", "wandb", "--lora.targets", '["c_attn"]', "--data.mix.other", "0.5", "--eval.prompt", "- a"]
    config, _ = parse(parser, words)
    assert (config.trackers, config.lora.targets) == (["wandb"], ["c_attn"])
    assert (config.data.mix, config.eval.prompt) == ({"other": 0.5}, "- a")


def test_every_setting_can_say_what_it_takes():
    for name, kind in kinds(TrainConfig).items():
        assert "class" not in allowed(kind), name
        assert "typing" not in allowed(kind), name


def test_every_setting_has_its_help(parser):
    help_of = {name: parser._option_string_actions[f"--{name}"].help for name in kinds(TrainConfig)}
    assert [name for name, text in help_of.items() if not text] == []
    assert help_of["precision"].startswith("auto takes bf16 or fp16 only where")
