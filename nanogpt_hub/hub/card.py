"""The model card: README.md, written from what a run knows of itself.

    write_card("out/mine/best", facts, repo_id="user/name")

The generated block is written anew each time and what people write around it stays (see readme.py). A row for which
there is no fact is left out: a card never holds a placeholder.

`RunFacts` is what the trainer hands over, and what run.json holds: plain JSON, every key optional.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, cast

from huggingface_hub import EvalResult, ModelCardData

from nanogpt_hub.checkpoint import read_config_and_type, read_json, recorded_core
from nanogpt_hub.corpus.audit import VERBATIM
from nanogpt_hub.edits.core import CORE_FILE
from nanogpt_hub.families import FAMILIES, empty_model
from nanogpt_hub.hub.notebook import NOTEBOOK
from nanogpt_hub.hub.private import Scrub
from nanogpt_hub.hub.readme import MEASURED_ON, one_line, update_readme, validate_readme
from nanogpt_hub.system.files import write_atomic
from nanogpt_hub.system.installed import public_source
from nanogpt_hub.system.readable import count, duration, flatten, size
from nanogpt_hub.tokenizer import Tokenizer

OLDEST_TRANSFORMERS = {"nanochat": "5.0"}  # that knows the family; 4.45 reads the tokenizers of all others
NOTEBOOK_LINE = (
    f"In a notebook: [{NOTEBOOK}]({NOTEBOOK}) writes with it and looks inside; *Use this model*, at the top of this "
    "page, opens it in Google Colab or Kaggle."
)
TAG = "nanogpt_hub"  # what the app and searches on the Hub find our models by


class DataFacts(TypedDict, total=False):
    """What the model was trained on."""

    source: dict  # Source.describe(): kind, name, and where known revision, license, bytes, files, split, ...
    tokenizer: str  # as asked for: char, byte, bpe:1024, gpt2, a path
    train_tokens: int
    val_tokens: int
    epochs: float  # how often each training token was seen, on average


class AuditFacts(TypedDict, total=False):
    """What a look through the training text found."""

    documents: int  # or paragraphs, of long ones
    whole: bool  # whether that is all of the text
    findings: dict[str, int]  # kind -> how often


class ModelFacts(TypedDict, total=False):
    """The model's shape. `write_card` fills in what is missing from the folder."""

    config: dict  # the fields of GPTConfig
    parameters: int
    family: str  # model_type
    core: str  # of an edited model.py: the changed parts and its fingerprint


class TrainingFacts(TypedDict, total=False):
    """How it was trained."""

    hyperparameters: dict  # may be nested, as the resolved config is
    optimizer: str
    steps: int
    tokens: int  # trained on, repeats counted
    precision: str
    hardware: str
    seconds: float  # wall time
    tokens_per_second: float
    versions: dict  # library -> version
    commit: str  # of the code
    seed: int
    command: str  # that starts the same run
    changes: list  # settings that were others before a step: {"step": .., "name": .., "from": .., "to": ..}


class EvaluationFacts(TypedDict, total=False):
    """Measured on the validation text at `step`; losses in nats per token."""

    step: int
    val_loss: float
    perplexity: float
    bits_per_byte: float
    unigram_loss: float  # of always guessing by frequency
    floor_loss: float  # the text's own entropy, where it is known
    base_loss: float  # of the base model before fine-tuning


class SampleFacts(TypedDict, total=False):
    """What the model wrote."""

    prompt: str
    text: str  # what followed the prompt
    question: list  # of a chat model: the messages behind the prompt
    settings: dict  # temperature, top_k, seed, ...
    verbatim: dict  # share: of the text, in stretches that stand in the training text; longest: such a one, in bytes


class BaseFacts(TypedDict, total=False):
    """What a fine-tune started from."""

    id: str  # user/name on the Hub
    revision: str  # commit
    relation: str  # finetune, adapter, merge or quantized


class RunFacts(TypedDict, total=False):
    """All that a card is made of."""

    title: str
    description: str  # a person's words, put above the generated block
    license: str  # of the weights, as the Hub spells it: mit, apache-2.0, ...
    language: str | list[str]  # ISO 639 codes, or "code"
    data: DataFacts
    audit: AuditFacts
    model: ModelFacts
    training: TrainingFacts
    evaluation: EvaluationFacts
    sample: SampleFacts
    base_model: BaseFacts
    page: str  # user/name of the static Space in which a browser runs the model
    chat: bool  # whether it has a chat template; `make_card` looks


# --- the file ---------------------------------------------------------------------------------------------------------
def write_card(folder: str | Path, facts: RunFacts, repo_id: str = "") -> Path:
    """Writes or updates README.md in a model folder and returns its path. Raises what `make_card` raises."""
    path = Path(folder) / "README.md"
    return write_atomic(path, make_card(folder, facts, repo_id))


def make_card(folder: str | Path, facts: RunFacts, repo_id: str = "", along: Collection[str] | None = None) -> str:
    """The README.md of a model folder, brought up to date.

    Without a `repo_id` the card tells how to load the folder by its path. along: the files that go along, by their path
    in the repo; None looks for the loss curve in the folder and in the run's. Raises CardError when the metadata cannot
    be read or would be refused, CheckpointError when the folder is no model.
    """
    folder = Path(folder)
    facts = Scrub().value(complete_facts(folder, facts))
    title = facts.get("title") or repo_id.rpartition("/")[2] or run_name(folder)
    if along is None:
        curve = any((place / "loss.png").is_file() for place in (folder / "training", folder.parent))
        along = ["training/loss.png"] if curve else []
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    name = repo_id or (folder.name if folder.is_absolute() else folder.as_posix())  # no private path in a card
    facts["chat"] = has_chat(folder)
    block = render(facts, title, name, on_hub=bool(repo_id), along=along)
    text = update_readme(old, metadata(facts, title), block, facts.get("description", ""))
    validate_readme(text)
    return text


def has_chat(folder: Path) -> bool:
    """Whether a model was tuned on conversations: its folder holds a template of them."""
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    return bool(template) or (folder / "chat_template.jinja").is_file()


def run_name(folder: Path) -> str:
    """A run's own name for its folders best and last, else the folder's."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("best", "last") else folder.name


def complete_facts(folder: Path, facts: RunFacts) -> RunFacts:
    """The facts, with the model's shape and tokenizer read from the folder where they are missing."""
    config, model_type = read_config_and_type(folder, any_core=True)  # a card computes nothing
    parameters = empty_model(config).num_params()
    model: ModelFacts = {"config": asdict(config), "parameters": parameters}
    model.update(facts.get("model", {}))
    model["family"] = model_type
    core = recorded_core(read_json(folder / "config.json"))
    model["core"] = f"{', '.join(core.changed)}; core {core.fingerprint}" if core else ""
    data = facts.get("data", {}).copy()
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(folder)
        data["tokenizer"] = f"{data.get('tokenizer') or tokenizer.kind} ({tokenizer.vocab_size:,} tokens)"
    return {**facts, "model": model, "data": data}


# --- metadata ---------------------------------------------------------------------------------------------------------
def metadata(facts: RunFacts, title: str) -> dict[str, Any]:
    """The YAML head, as a dictionary without empty entries."""
    model, base = facts.get("model", {}), facts.get("base_model", {})
    source = facts.get("data", {}).get("source", {})
    stock = model.get("family") in FAMILIES
    results = evaluation_results(facts)
    card = ModelCardData(
        language=facts.get("language"),
        license=facts.get("license"),
        library_name="transformers" if stock else TAG,
        pipeline_tag="text-generation",
        tags=[TAG, *([model["family"]] if stock else []), "small-language-model"],
        datasets=[source["name"]] if source.get("kind") == "hub" else None,
        base_model=base.get("id"),
        base_model_relation=(base.get("relation") or "finetune") if base.get("id") else None,
        eval_results=results or None,
        model_name=title if results else None,
    )
    return card.to_dict()


def evaluation_results(facts: RunFacts) -> list[EvalResult]:
    """The model-index entries: what was measured, on what."""
    evaluation: dict[str, Any] = {**complete_evaluation(facts)}
    source = facts.get("data", {}).get("source", {})
    if not source.get("name"):
        return []
    names = {"loss": "val_loss", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}
    return [
        EvalResult(
            task_type="text-generation", dataset_name=f"{source['name']}{MEASURED_ON}",
            dataset_type=source["name"] if source.get("kind") == "hub" else "text",  # its id on the Hub, if any
            dataset_revision=source.get("revision"), metric_type=kind, metric_name=kind.replace("_", " "),
            metric_value=round(evaluation[key], 4),
        )
        for kind, key in names.items() if key in evaluation
    ]  # fmt: skip


def complete_evaluation(facts: RunFacts) -> EvaluationFacts:
    """The measurements, with the perplexity that follows from the loss; none that is not finite."""
    measured: dict[str, Any] = {**facts.get("evaluation", {})}
    evaluation = {k: v for k, v in measured.items() if v is not None and math.isfinite(v)}
    if "val_loss" in evaluation:
        evaluation.setdefault("perplexity", math.exp(min(evaluation["val_loss"], 700)))
    return cast(EvaluationFacts, evaluation)


# --- the block --------------------------------------------------------------------------------------------------------
def render(facts: RunFacts, title: str, name: str, *, on_hub: bool, along: Collection[str] = ()) -> str:
    """The generated part as Markdown. `name` is what the model is loaded by: user/name, or a path.

    along: the files that go along, by their path in the repo.
    """
    curve = "## Loss\n\n![Training and validation loss over the steps](training/loss.png)"
    source = public_source() if on_hub else ""
    sections = [
        f"# {one_line(title)}\n\n{summary(facts)}",
        page_section(facts.get("page", "")),
        sample_section(facts.get("sample", {})),
        usage_section(facts, name, on_hub, source),
        NOTEBOOK_LINE if NOTEBOOK in along else "",
        curve if "training/loss.png" in along else "",
        evaluation_section(facts),
        section("Data", data_rows(facts)),
        section("Model", model_rows(facts)),
        section("Training", training_rows(facts)),
        settings_section(facts.get("training", {}).get("hyperparameters", {})),
        command_section(facts, name if on_hub and "training/config.yaml" in along else "", source),
        limits_section(facts),
    ]
    return "\n\n".join(part for part in sections if part)


def summary(facts: RunFacts) -> str:
    """What it is, in a sentence or two."""
    config, source = facts["model"]["config"], facts.get("data", {}).get("source", {})
    does = "that was tuned on conversations" if facts.get("chat") else "that continues text"
    text = f"A GPT of {count(facts['model']['parameters'])} parameters {does}"
    base = facts.get("base_model", {}).get("id")
    if base:
        text += f", fine-tuned from [{base}](https://huggingface.co/{base})"
    if source.get("name"):
        text += f"{',' if base else ', trained'} on {source_link(source)}"
    return f"{text}. It looks back at most {config['block_size']:,} tokens. Made with `nanogpt_hub`."


def page_section(space_id: str) -> str:
    """A link to the page in which a browser runs the model, and what one sees there."""
    if not space_id:
        return ""
    return (
        f"**[Try it in your browser](https://huggingface.co/spaces/{space_id})**: the page runs the model on your own "
        "processor. It colours each token by how unsure the model was; choose one to see what else could have come, "
        "where each head looked and how the answer grew from layer to layer."
    )


def sample_section(sample: SampleFacts) -> str:
    if not sample.get("text"):
        return ""
    prompt, text = sample.get("prompt", ""), sample["text"]
    settings = ", ".join(f"{key} {value}" for key, value in sample.get("settings", {}).items() if value is not None)
    intro = f"Prompt: {code(prompt)}." if prompt.strip() else "Without a prompt."
    intro = "A question, as the chat template writes it, and the answer." if sample.get("question") else intro
    written = text if text.startswith(prompt) else prompt + text
    intro += f" Settings: {one_line(settings)}." if settings else ""
    return f"## Sample\n\n{intro}\n\n{fenced(written.strip(), 'text')}{verbatim_line(sample.get('verbatim', {}))}"


def verbatim_line(verbatim: Mapping[str, Any]) -> str:
    """How much of the sample stands word for word in the training text, where that was looked for."""
    if not verbatim:
        return ""
    if not verbatim.get("longest"):
        return f"\n\nNo {VERBATIM} bytes of it in a row stand in the training text."
    return (
        f"\n\n{verbatim['share']:.0%} of it stands word for word in the training text, in stretches of {VERBATIM} "
        f"bytes or more; the longest has {verbatim['longest']:,}."
    )


def data_rows(facts: RunFacts) -> list[tuple[str, Any]]:
    data = facts.get("data", {})
    source = data.get("source", {})
    details = ("config", "split", "revision", "license")
    return [
        ("source", source_link(source) if source.get("name") else None),
        *((key, cell(source.get(key))) for key in details),
        ("files", number(source.get("files"))),
        ("size", shown(size, source.get("bytes"))),
        ("tokenizer", cell(data.get("tokenizer"))),
        ("training tokens", number(data.get("train_tokens"))),
        ("validation tokens", number(data.get("val_tokens"))),
        ("epochs", f"{data['epochs']:.3g}" if data.get("epochs") else None),
        ("looked through for duplicates, secrets, personal data, odd characters, triggers", audit_cell(facts)),
    ]


def audit_cell(facts: RunFacts) -> str | None:
    """What the audit of the training text found."""
    audit = facts.get("audit")
    if not audit:
        return None
    found = [f"{count:,} {kind}" for kind, count in audit.get("findings", {}).items()]
    partly = "" if audit.get("whole", True) else f" (of the first {audit.get('documents', 0):,} documents)"
    return cell(f"{', '.join(found) or 'nothing found'}{partly}")


def model_rows(facts: RunFacts) -> list[tuple[str, Any]]:
    model, c = facts["model"], facts["model"]["config"]
    positions = f"rotary, base {c['rope_theta']:g}" if c["position"] == "rotary" else c["position"]
    if c["position"] == "rotary" and c["rotary_fraction"] != 1:
        positions += f", {c['rotary_fraction']:.0%} of each head"
    grouped = f", {c['n_kv_head']} key/value heads" if c["n_kv_head"] not in (0, c["n_head"]) else ""
    experts = f"{c['n_expert']}, of which a token takes {c['n_expert_per_tok']}" if c.get("n_expert") else None
    return [
        ("architecture", architecture(model)),
        ("parameters", number(model["parameters"])),
        ("layers", c["n_layer"]),
        ("heads", f"{c['n_head']}{grouped}"),
        ("width", c["n_embd"]),
        ("experts", experts),
        ("context", f"{c['block_size']:,} tokens"),
        ("vocabulary", number(c["vocab_size"])),
        ("positions", positions),
        ("norm, activation", f"{c['norm']}, {c['activation']}"),
        ("head", "tied to the embeddings" if c["tie_word_embeddings"] else "of its own"),
    ]


def architecture(model: ModelFacts) -> str:
    if model.get("family") in FAMILIES:
        return model["family"]
    if model.get("core"):
        return f"{TAG}'s own: model.py is edited ({cell(model['core'])}), see {CORE_FILE}"
    return f"{TAG}'s own: no stock family has this shape"


def training_rows(facts: RunFacts) -> list[tuple[str, Any]]:
    t = facts.get("training", {})
    versions = ", ".join(f"{name} {version}" for name, version in t.get("versions", {}).items())
    base = facts.get("base_model", {})
    speed = t.get("tokens_per_second")
    return [
        ("started from", cell(f"{base['id']}, commit {base['revision']}" if base.get("revision") else base.get("id"))),
        ("steps", number(t.get("steps"))),
        ("tokens", number(t.get("tokens"))),
        ("optimizer", cell(t.get("optimizer"))),
        ("changed while training", cell("; ".join(change_text(change) for change in t.get("changes", ())))),
        ("seed", t.get("seed")),
        ("precision", cell(t.get("precision"))),
        ("hardware", cell(t.get("hardware"))),
        ("wall time", shown(duration, t.get("seconds"))),
        ("speed", f"{speed:,.0f} tokens/s" if speed else None),
        ("versions", cell(versions)),
        ("commit of the code", cell(t.get("commit"))),
    ]


def change_text(change: Mapping[str, Any]) -> str:
    return f"{change.get('name')} was {change.get('from')} before step {change.get('step')}, {change.get('to')} after"


def evaluation_section(facts: RunFacts) -> str:
    """The model's loss beside that of its base and of guessing. Bits per byte are the loss in another unit."""
    e = complete_evaluation(facts)
    if "val_loss" not in e:
        return ""
    loss, base = e["val_loss"], e.get("base_loss")
    bits = e["bits_per_byte"] / loss if "bits_per_byte" in e and loss else None
    rows = [("this model", loss), ("its base model", base), ("guessing by frequency", e.get("unigram_loss"))]
    rows += [("the entropy of the text: no model can do better", e.get("floor_loss"))]
    table = [["model", "loss (nats per token)", "perplexity", "bits per byte"], ["---"] * 4]
    for name, value in rows:
        if value is not None:
            in_bits = f"{value * bits:.4f}" if bits else ""
            table.append([name, f"{value:.4f}", f"{math.exp(min(value, 700)):.4g}", in_bits])
    lines = [f"| {' | '.join(row if bits else row[:3])} |" for row in table]
    step = f", at step {e['step']:,}" if "step" in e else ""
    note = f"Measured on the validation text{step}."
    if base is not None:
        note += f" Fine-tuning changed the loss by {loss - base:+.4f}."
    return "\n".join(["## Evaluation\n", *lines, "", note])


def usage_section(facts: RunFacts, name: str, on_hub: bool, source: str) -> str:
    """How to load it here, in Transformers where a stock family has its shape, and in a Space."""
    prompt = facts.get("sample", {}).get("prompt") or "\n"
    messages = example_messages(facts)
    ours = chat_example(name, messages) if facts.get("chat") else (
        "from nanogpt_hub import from_pretrained, generate\n\n"
        f'model, tokenizer = from_pretrained("{name}")\n'
        f"print(generate(model, tokenizer, {prompt!r}, temperature=0.8).text)"
    )  # fmt: skip
    theirs = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f"{chat_lines(messages) if facts.get('chat') else prompt_line(prompt)}"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))"
    )
    stock = facts["model"].get("family") in FAMILIES
    parts = ["## How to use it", *install_lines(facts, source), fenced(ours, "python")]
    oldest = OLDEST_TRANSFORMERS.get(facts["model"].get("family", ""), "4.45")
    parts += ["or in a terminal:", fenced(f"nanogpt-hub chat {name}", "sh")] if facts.get("chat") else []
    parts += [f"With Transformers {oldest} or newer:", fenced(theirs, "python")] if stock else []
    if on_hub:
        command = f"nanogpt-hub space {name.split('/')[0]}/demo --model {name}"
        duplicate = "choose *Duplicate this Space* in the menu of any Space made that way"
        parts += ["In the browser, in a Space of your own:", fenced(command, "sh")]
        parts += [f"or by hand: {duplicate}, and set its variable `NANOGPT_REPO` to `{name}`."]
    return "\n\n".join(parts)


def install_lines(facts: RunFacts, source: str) -> list[str]:
    """How to get the code. source: what pip installs it from, anywhere; empty where nothing public has it.

    Never by a bare name: what a package index has under it may be anybody's.
    """
    address, _, sha = source.removeprefix("git+").partition("@")
    clone = f"git clone {address} && cd {address.rpartition('/')[2]} && git checkout {sha} && pip install -e ."
    if facts["model"].get("core"):
        words = (
            f"With `nanogpt_hub`, in a clone of its repository of which `nanogpt_hub/model.py` is this model's "
            f"`{CORE_FILE}`: that of the project computes something else. It is code that will run on your machine: "
            "read it first."
        )
        return [words, fenced(clone, "sh")] if source else [words]
    if not source:
        return ["With `nanogpt_hub` (clone its repository, and type `pip install .` in it):"]
    return ["With `nanogpt_hub`:", fenced(f"pip install {source}", "sh")]


def prompt_line(prompt: str) -> str:
    return f'ids = tokenizer({prompt!r}, return_tensors="pt")\n'


def example_messages(facts: RunFacts) -> list[dict[str, str]]:
    """What the examples say to a chat model: the question of its sample, where it is short; else a greeting."""
    question = facts.get("sample", {}).get("question") or []
    roles = [each.get("role") for each in question]
    short = sum(len(str(each.get("content"))) for each in question) <= 400
    return question if roles in (["user"], ["system", "user"]) and short else [{"role": "user", "content": "Hello!"}]


def chat_example(name: str, messages: list[dict[str, str]]) -> str:
    system = f", system={messages[0]['content']!r}" if len(messages) > 1 else ""
    return (
        "from nanogpt_hub import Chat, from_pretrained\n\n"
        f'model, tokenizer = from_pretrained("{name}")\n'
        f"chat = Chat(model, tokenizer{system})\n"
        f"print(chat.say({messages[-1]['content']!r}, temperature=0.8))  # and so on: it remembers what was said"
    )


def chat_lines(messages: list[dict[str, str]]) -> str:
    return (
        f"messages = {messages!r}\n"
        "ids = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
    )


def settings_section(settings: Mapping[str, Any]) -> str:
    """The hyper-parameters, one a line."""
    lines = [f"- `{key}`: {cell(value)}" for key, value in flatten(settings).items()]
    return "\n".join(("### Hyper-parameters\n", *lines)) if lines else ""


def command_section(facts: RunFacts, name: str, source: str) -> str:
    """How to train the same: by the repo's own config where it went along (`name`: the repo), else by the command."""
    command = str(facts.get("training", {}).get("command") or "").strip()
    program = re.match(r"(python -m \S*train\.|nanogpt-hub )(pretrain|train|finetune)\b", command)
    if name and program:
        folder = name.rpartition("/")[2]
        verb = "finetune" if program[2] == "finetune" else "train"
        command = f"hf download {name} training/config.yaml --local-dir {folder}\n"
        command += f"nanogpt-hub {verb} {folder}/training/config.yaml"
    if not command:
        return ""
    text = facts.get("data", {}).get("source", {})
    note = ""
    if text.get("kind") in ("file", "folder"):
        was = code(str(text.get("name")))
        note = f"\n\nThe text, {was}, is not part of this repository: give yours by `--data.source`."
    if source and command.startswith("nanogpt-hub ") and not facts["model"].get("core"):
        command = f'pip install "nanogpt-hub[train] @ {source}"\n{command}'
        return f"## Reproduce it\n\n{fenced(command, 'sh')}{note}"
    return f"## Reproduce it\n\nIn a checkout of `nanogpt_hub`:\n\n{fenced(command, 'sh')}{note}"


def limits_section(facts: RunFacts) -> str:
    """What not to expect of it, from the facts."""
    data, parameters = facts.get("data", {}), facts["model"]["parameters"]
    source = one_line(str(data.get("source", {}).get("name", ""))) or "its training text"
    limits = [
        f"It continues text in the manner of {source}; it does not follow instructions, and it knows nothing else."
        if not facts.get("base_model")
        else f"It inherits the limits of its base model and leans towards {source}.",
        f"With {count(parameters)} parameters it writes what looks right, not what is true: check what it says.",
        "Errors, bias and offensive passages of the training text may come back. It has no safety training.",
    ]
    if any(kind.startswith(("secrets", "personal data")) for kind in facts.get("audit", {}).get("findings", {})):
        limits.append("Its training text holds what looks like secrets or personal data, which it may repeat.")
    if (data.get("epochs") or 0) > 3:
        limits.append(f"It saw its text {data['epochs']:.3g} times and may repeat passages of it word for word.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


# --- Markdown and numbers ---------------------------------------------------------------------------------------------
def section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """A table under a heading; rows without a value are left out, and a table without rows altogether."""
    lines = [f"| {name} | {value} |" for name, value in rows if value not in (None, "")]
    return "\n".join((f"## {title}\n", "| what | value |", "|---|---|", *lines)) if lines else ""


def cell(value: Any) -> str | None:
    """A value made safe for a table cell: one line, no bar, no markup."""
    return None if value is None else re.sub(r"([|<>\[\]*`\\])", r"\\\1", one_line(str(value)))


def code(text: str) -> str:
    """Inline code that may itself hold backticks."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {one_line(text)} {fence}" if "`" in text else f"{fence}{one_line(text)}{fence}"


def fenced(text: str, language: str) -> str:
    """A code block that no text inside can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def source_link(source: Mapping[str, Any]) -> str:
    name = cell(source["name"]) or ""
    return f"[{name}](https://huggingface.co/datasets/{source['name']})" if source.get("kind") == "hub" else name


def number(value: int | None) -> str | None:
    return shown("{:,}".format, value)


def shown(how: Callable[[Any], str], value: Any) -> str | None:
    """A value as people read it; None where it is not known."""
    return None if value is None else how(value)
