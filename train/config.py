"""Every hyper-parameter of a run, and how flags and YAML become one checked `TrainConfig`.

Defaults < YAML < flags. An unknown key, a wrong type or an impossible value ends the command before any work is done.
The comment behind each field is its help text: `python -m train.pretrain --help` prints them.
"""

import ast
import inspect
import io
import math
import re
import sys
import textwrap
import tokenize
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, get_args

from jsonargparse import Namespace

from nanogpt_hub.model import PRESETS, SIZES, GPTConfig

from .typed import Parser, kinds

Class = TypeVar("Class", bound=type)


def comments_as_help(cls: Class, source: type | None = None) -> Class:
    """Class decorator: the comments behind the fields (of `source`, if given) become the docstring's Args section."""
    lines = [f"    {name}: {text}" for name, text in field_comments(source or cls).items()]
    cls.__doc__ = "\n".join([(cls.__doc__ or "") + "\n\nArgs:", *lines])
    return cls


def field_comments(cls: type) -> dict[str, str]:
    """The comment on the lines of each field of a dataclass: what its source says to whoever reads it is its help."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    found = {}
    for node in cast(ast.ClassDef, definition).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


Layer = Literal["c_attn", "c_proj", "c_fc", "c_gate"]  # the linear layers of a block; c_gate is in swiglu models only
if TYPE_CHECKING:  # what follows is made of model.py's tables when it runs, where a type checker cannot look
    Preset = str
    Size = str

    @dataclass(frozen=True)
    class ModelOverrides:
        dropout: float | None = None  # the fields that the trainer itself reads
        vocab_size: int | None = None
else:
    Preset = Literal[tuple(PRESETS)]
    Size = Literal[tuple(SIZES)]
    overrides = [(f.name, f.type | None, None) for f in fields(GPTConfig)]
    ModelOverrides = comments_as_help(make_dataclass("ModelOverrides", overrides, frozen=True), GPTConfig)


DEFAULT_PRESET, DEFAULT_SIZE = "nanochat", "1m"


@comments_as_help
@dataclass(frozen=True)
class ModelConfig(ModelOverrides):
    """The model: a lineage at a size; any field of GPTConfig given here overrides the preset's."""

    preset: Preset | None = None  # the lineage; see PRESETS in model.py (nanochat if not given)
    size: Size | None = None  # layers, heads, width and context; see SIZES in model.py (1m if not given)

    def given(self) -> dict:
        """What was set, presets and fields alike."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The model's shape for a tokenizer of vocab_size ids. Raises ValueError for an impossible one."""
        given = {"vocab_size": vocab_size, **self.given()}
        if given["vocab_size"] < vocab_size:
            raise ValueError(f"model.vocab_size {given['vocab_size']} is below the tokenizer's {vocab_size}; raise it")
        preset, size = given.pop("preset", DEFAULT_PRESET), given.pop("size", DEFAULT_SIZE)
        return GPTConfig.preset(preset, size, **given)


@comments_as_help
@dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut into tokens."""

    source: str = "python"  # a file, a folder, a URL, a Hub dataset id, "python" (its standard library) or "stories"
    text_column: str = "text"  # which column of a table or dataset holds the text
    format: Literal["text", "completion", "messages"] = "text"  # what rows hold; of the last two, answers are learned
    prompt_column: str = "prompt"  # for format completion: what the model is given
    completion_column: str = "completion"  # for format completion: what it shall write
    messages_column: str = "messages"  # for format messages: a list of {role, content}
    config: str = ""  # configuration of a Hub dataset that has several
    split: str = "train"  # split of a Hub dataset
    revision: str = ""  # branch, tag or commit of a Hub dataset
    tokenizer: str = "bpe:1024"  # char, byte, bpe:N (learned from the first 50 MB), gpt2, a folder or user/name
    val_fraction: float = 0.1  # the last part of the token stream is kept for validation, of up to 2**24 tokens
    val_tokens: int = 2**20  # of a longer stream, its first tokens are: so many
    val_source: str = ""  # a source of its own for validation, instead of the last part
    val_split: str = ""  # the split for validation, of val_source or of the same Hub dataset, instead of the last part
    cache_dir: str = ""  # where token shards are kept; default ~/.cache/nanogpt_hub/tokens
    encoding: str = "utf-8"  # of text files, by Python's name for it: utf-16, latin-1, cp1252, ...
    max_bad_rows: int = 100  # rows that cannot be read are left out and counted, up to so many; 0: the first is fatal
    mix: dict[str, float] = field(default_factory=dict)  # further sources to mix in, with weights; data.source has 1
    duplicates: Literal["ignore", "count", "drop_exact", "drop"] = "ignore"  # what to do with repeated documents
    audit: Literal["auto", "always", "never"] = "auto"  # look the text through first; auto: files of up to 2 MB
    workers: int = 1  # processes that tokenise a longer text beside the training

    def __post_init__(self):
        check(0 < self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; it must be between 0 and 1")
        check(self.val_tokens > 1, f"data.val_tokens is {self.val_tokens}; it must be at least 2")
        check(self.max_bad_rows >= 0, f"data.max_bad_rows is {self.max_bad_rows}; it must not be negative")
        check(all(weight > 0 for weight in self.mix.values()), "data.mix has a weight that is not above 0")
        check(self.format == "text" or not self.mix, "data.mix is for data.format text; rows have one source")
        check(self.workers >= 1, f"data.workers is {self.workers}; it must be at least 1")

    def validation(self) -> "DataConfig | None":
        """How the validation text is read, where it is not a part of the training text. Of another source the
        configuration, the split and the revision of the training text do not count."""
        if not (self.val_source or self.val_split):
            return None
        plain = replace(self, mix={}, duplicates="ignore", val_source="", val_split="")
        if self.val_source not in ("", self.source):
            plain = replace(plain, source=self.val_source, config="", split="train", revision="")
        return replace(plain, split=self.val_split or plain.split)


@comments_as_help
@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "muon"  # muon: Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 0.01  # peak rate of AdamW
    embedding_learning_rate: float = 0.0  # peak rate of an embedding that is not the head too; 0 means learning_rate
    muon_learning_rate: float = 0.02  # peak rate of Muon's matrices
    muon_momentum: float = 0.95  # momentum of Muon
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"  # after warm-up; wsd: stable, then a linear decay at the end
    warmup_steps: int = 20  # steps in which the rate rises from 0
    decay_steps: int = 0  # length of the decay of wsd; 0 means all steps after the warm-up
    final_lr_fraction: float = 0.0  # what is left of the peak rate at the end
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # decoupled decay, on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 for none

    def __post_init__(self):
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            check(getattr(self, name) > 0, f"optim.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("embedding_learning_rate", "warmup_steps", "decay_steps", "weight_decay", "grad_clip"):
            check(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("muon_momentum", "beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        check(0 <= self.final_lr_fraction <= 1, "optim.final_lr_fraction must be in [0, 1]")


@comments_as_help
@dataclass(frozen=True)
class LoraConfig:
    """Fine-tuning of small adapters instead of all weights (arXiv:2106.09685). What is saved has them merged."""

    rank: int = 0  # of the adapters' matrices; 0 trains the weights themselves
    alpha: float = 16.0  # what an adapter gives counts alpha / rank
    dropout: float = 0.0  # part of the adapters' inputs dropped in training
    targets: list[Layer] = field(default_factory=lambda: [*get_args(Layer)])  # linear layers of a block that get one

    def __post_init__(self):
        check(self.rank >= 0, f"lora.rank is {self.rank}; it must not be negative")
        check(self.alpha > 0, f"lora.alpha is {self.alpha}; it must be above 0")
        check(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        check(len(self.targets) > 0, "lora.targets is empty; name at least one kind of layer")


@comments_as_help
@dataclass(frozen=True)
class EvalConfig:
    """How the run is looked at while it trains."""

    interval: int = 100  # steps between evaluations; the first is before the first step, the last after the last
    max_windows: int = 400  # windows of block_size tokens, evenly spread, that each evaluation reads
    patience: int = 0  # stop after so many evaluations without a new best; 0 never stops early
    prompt: str = "\n"  # what the sample at each evaluation goes on from
    sample_tokens: int = 200  # length of that sample in tokens; 0 for none
    temperature: float = 0.8  # of that sample
    top_k: int = 200  # of that sample

    def __post_init__(self):
        check(self.interval > 0, f"eval.interval is {self.interval}; it must be at least 1")
        check(self.max_windows > 0, f"eval.max_windows is {self.max_windows}; it must be at least 1")
        check(self.patience >= 0 and self.sample_tokens >= 0, "eval.patience and eval.sample_tokens must be >= 0")


@comments_as_help
@dataclass(frozen=True)
class SaveConfig:
    """When last/ and the training state are written; they always are at the end and on an interrupt."""

    interval: int = 500  # steps between saves; 0 for none
    minutes: float = 10.0  # minutes between saves; 0 for none


@comments_as_help
@dataclass(frozen=True)
class HubConfig:
    """Whether and how the run is shared on the Hugging Face Hub."""

    repo_id: str = ""  # user/name to push to while training; empty for nowhere
    private: bool = False  # a repo that is made now is private
    minutes: float = 10.0  # at least so long between two pushes of the best model; the last one is always pushed
    page: bool = False  # make a static Space of the same name, where a browser runs the model; the card links to it
    notebook: bool = True  # put a notebook.ipynb beside the model, which the Hub opens in Google Colab and Kaggle
    push_steps: bool = False  # keep each evaluated step as a tag step-000500, to walk through the training
    push_state: bool = False  # keep the training state on a branch, so that --resume user/name works anywhere
    license: str = ""  # of the weights, as the Hub spells it: mit, apache-2.0, ...
    language: str = ""  # of the text, as an ISO 639 code: en, de, ...
    patience_minutes: float = 10.0  # how long the end waits for pushes that are still on their way

    def __post_init__(self):
        check(self.minutes >= 0, f"hub.minutes is {self.minutes}; it must not be negative")


@comments_as_help
@dataclass(frozen=True)
class ParallelConfig:
    """Several processes: how the model lies on their devices, and how long one waits for another."""

    shard: bool = False  # cut weights, gradients and optimizer state over the devices (FSDP2), for what one cannot hold
    timeout_minutes: float = 10.0  # a run ends with a sentence when one of its processes does not answer for so long

    def __post_init__(self):
        holds = 0 < self.timeout_minutes < math.inf
        check(holds, f"parallel.timeout_minutes is {self.timeout_minutes}; it must be above 0")


@comments_as_help
@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    out_dir: str = ""  # the run's folder; default out/<name of the config file, or of the data source>
    seed: int = 1337  # fixes the weights, the order of the data and the dropout
    max_steps: int = 500  # optimizer steps
    minutes: float = 0.0  # what training shall take: a few timed steps then fix max_steps; 0: max_steps is as given
    batch_size: int = 16  # sequences per optimizer step, over all processes and micro-batches together
    micro_batch_size: int = 0  # sequences per forward pass; 0: as many as fit, the rest by gradient accumulation
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes the best there is
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto takes bf16 or fp16 only where the hardware has it
    )
    compile: Literal["auto", "always", "never"] = (
        "auto"  # torch.compile; auto: on CUDA, for dense models, where it pays
    )
    fast_cpu: bool = (
        True  # on a CPU: the trainer's own attention and freed memory kept; false: the plain way, a check of these two
    )
    activation_checkpointing: bool = False  # run each block again in the backward pass: less memory, a third slower
    log_interval: int = 10  # steps between log lines
    trackers: list[str] = field(default_factory=list)  # any of tensorboard, wandb, trackio
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "log_interval"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(0 <= self.minutes < math.inf, f"minutes is {self.minutes}; give a number above 0, or 0 to count steps")
        check(self.micro_batch_size >= 0, f"micro_batch_size is {self.micro_batch_size}; it must not be negative")
        known = {"tensorboard", "wandb", "trackio"}
        check(set(self.trackers) <= known, f"trackers {self.trackers}: choose from {', '.join(sorted(known))}")


def as_settings(config: TrainConfig) -> dict:
    """The config as nested plain values, without what was not set."""

    def plain(value):
        return {k: plain(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    return plain(asdict(config))


def check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def make_parser(prog: str, description: str) -> Parser:
    """The command line of a trainer: all of TrainConfig, --config, --resume and --overwrite. prog: as it is typed."""
    usage = f"{prog} [CONFIG] [--option value ...]"
    parser = Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.kinds = kinds(TrainConfig)
    parser.add_argument(
        "--config", action="config",
        help="a YAML file, or one that comes along by its name (quickstart); may be given first, without --config",
    )  # fmt: skip
    parser.add_argument(
        "--resume", nargs="?", const="must", default="auto", type=str,
        help="continue exactly where the run's folder stopped (an interrupted run is continued without it, too), or, "
        "given user/name, where a run stopped that was pushed with --hub.push_state; `previous` takes the save before "
        "the last one",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="start anew even if the run's folder holds a run")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(parser: Parser, argv: list[str] | None = None) -> tuple[TrainConfig, Namespace]:
    """The checked config, its out_dir filled in, and all that was parsed. Exits with a sentence when one is off.

    A flag --max_steps wins over `minutes` of a YAML, as flags do; both as flags are refused.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parsed = parser.parse_args(argv)
    flags = {arg.partition("=")[0] for arg in argv}
    if flags >= {"--max_steps", "--minutes"} and parsed.minutes:
        parser.error("--max_steps and --minutes are two answers to one question; give one of them")
    if "--max_steps" in flags:
        parsed.minutes = 0.0
    for name in {name.partition(".")[0] for name in parser.kinds if "." in name}:
        if not isinstance(parsed[name], Namespace):
            parser.error(f"{name} is {parsed[name]!r}; it is a group of settings: the lines below it, further in")
    try:
        made = parser.instantiate_classes(parsed)
        config = TrainConfig(**{f.name: made[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        parser.error(str(error))
    name = Path(str(parsed.config[0])).stem if parsed.config else re.sub(r"[:=,]+", "-", Path(config.data.source).stem)
    return replace(config, out_dir=config.out_dir or f"out/{name}"), parsed
