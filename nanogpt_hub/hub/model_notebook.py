"""The notebook that goes with a pushed model: the Hub opens it in Google Colab and Kaggle from "Use this model".

    text = model_notebook("out/mine/best", facts, "user/name")     # "" where it could not run there

It loads the model, lets it write, and shows the next token's probabilities and where the heads look. A model of a stock
family needs nothing but Transformers, which is installed on Colab and Kaggle. Another one needs this package from a
public repository; where there is none, or where model.py was edited, there is no notebook.
"""

from collections.abc import Iterator
from pathlib import Path

from nanogpt_hub.families import FAMILIES
from nanogpt_hub.hub.card import OLDEST_TRANSFORMERS, RunFacts, complete_facts, example_messages, has_chat, summary
from nanogpt_hub.hub.notebook import notebook
from nanogpt_hub.hub.private import Scrub
from nanogpt_hub.hub.readme import one_line
from nanogpt_hub.system.installed import public_source

Cells = Iterator[tuple[str, str]]

LOAD = """\
# Installed on Colab and Kaggle; elsewhere: pip install torch "transformers>={oldest}" matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager").eval()  # which tells its attention
context = model.config.max_position_embeddings
print(f"{{model.num_parameters():,}} parameters, a context of {{context}} tokens")


def logits_of(ids):
    with torch.inference_mode():
        return model(ids).logits


def attention_of(ids):
    with torch.inference_mode():
        return torch.cat(model(ids, output_attentions=True).attentions)  # (layers, heads, T, T)"""

LOAD_OURS = """\
import torch
from nanogpt_hub import from_pretrained
from nanogpt_hub.lens import attention_maps

name = {name!r}
model, tokenizer = from_pretrained(name)
context = model.config.block_size
print(f"{{model.num_params():,}} parameters, a context of {{context}} tokens")


def logits_of(ids):
    with torch.inference_mode():
        return model(ids)[0]


def attention_of(ids):
    return attention_maps(model, ids[0].tolist())  # (layers, heads, T, T)"""

ENCODE = """\
def encode(text):
    ids = {ids} or [{end}]  # an empty text begins a document
    return torch.tensor([ids[-context // 2 :]])


"""
WRITE = """\
prompt = {prompt!r}
torch.manual_seed(1)  # another number, another text
ids = encode(prompt)
written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8,
                         max_new_tokens=min(200, context - ids.shape[1]))
print(tokenizer.decode(written[0]))"""

WRITE_OURS = """\
from nanogpt_hub import generate

prompt = {prompt!r}
text = generate(model, tokenizer, prompt, temperature=0.8, max_new_tokens=200, seed=1).text  # another seed, another one
print(text)
written = encode(text)"""

TALK = """\
messages = {messages!r}
torch.manual_seed(1)  # another number, another answer
asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = asked.input_ids
written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8,
                         max_new_tokens=min(200, context - ids.shape[1]))
print(tokenizer.decode(written[0, ids.shape[1] :]))"""

TALK_OURS = """\
from nanogpt_hub import Chat

chat = Chat(model, tokenizer{system})
print(chat.say({question!r}, temperature=0.8))  # and so on: it remembers what was said
written = encode({question!r})"""

NEXT = """\
read = written[:, : max(1, written.shape[1] // 2)]
probabilities, tokens = logits_of(read)[0, -1].float().softmax(-1).topk(10)
print("after", repr(tokenizer.decode(read[0].tolist())[-60:]), "\\n")
for p, token in zip(probabilities.tolist(), tokens.tolist()):
    print(f"{p:7.2%}  {tokenizer.decode([token])!r}")"""

HEADS = """\
import matplotlib.pyplot as plt

layer, head = 0, 0  # choose others
some = written[:, :32]
labels = [repr(tokenizer.decode([token]))[1:-1] for token in some[0].tolist()]
plt.figure(figsize=(7, 7))
plt.imshow(attention_of(some)[layer, head].cpu())
plt.xticks(range(len(labels)), labels, rotation=90)
plt.yticks(range(len(labels)), labels)
plt.title(f"layer {layer + 1}, head {head + 1}: each row is a token, and how much it looks at those before it")
plt.show()"""


def model_notebook(folder: str | Path, facts: RunFacts, repo_id: str) -> str:
    """The notebook's text, for a model folder and the facts of its card; "" where there is none that could run."""
    folder = Path(folder)
    facts = Scrub().value(complete_facts(folder, facts))
    facts["chat"] = has_chat(folder)
    source, stock = public_source(), facts["model"].get("family") in FAMILIES
    if not stock and (not source or facts["model"].get("core")):
        return ""
    return notebook(cells(facts, repo_id, source, stock), marked=True)


def cells(facts: RunFacts, name: str, source: str, stock: bool) -> Cells:
    """(kind, source) of each cell."""
    yield "markdown", introduction(facts, name)
    if not stock:
        yield "code", f'!pip install -q "nanogpt-hub @ {source}"'
    yield "code", loading(facts, name, stock)
    yield "markdown", "## Let it " + ("talk" if facts.get("chat") else "write")
    yield "code", writing(facts, stock)
    yield "markdown", "## What else could have come?\n\nThe ten likeliest tokens at a place in the middle of that text."
    yield "code", NEXT
    yield "markdown", "## Where do the heads look?"
    yield "code", HEADS
    if source and not facts["model"].get("core"):
        yield "markdown", go_on(name, source)


def introduction(facts: RunFacts, name: str) -> str:
    title = one_line(facts.get("title") or name.rpartition("/")[2])
    return (
        f"# {title}\n\n{summary(facts)} Run the cells from top to bottom; no GPU is needed. The model's card is at "
        f"https://huggingface.co/{name}.\n\nIf the model is private, give a token that may read it as the secret "
        "`HF_TOKEN` first: on Colab the key at the left, on Kaggle *Add-ons*."
    )


def loading(facts: RunFacts, name: str, stock: bool) -> str:
    oldest = OLDEST_TRANSFORMERS.get(facts["model"]["family"], "4.45")
    load = LOAD.format(name=name, oldest=oldest) if stock else LOAD_OURS.format(name=name)
    encode = dict(ids="tokenizer(text).input_ids", end="tokenizer.eos_token_id") if stock else dict(
        ids="tokenizer.encode(text)", end="tokenizer.eot_id or 0"
    )  # fmt: skip
    return f"{load}\n\n\n{ENCODE.format(**encode)}".rstrip()


def writing(facts: RunFacts, stock: bool) -> str:
    """Lets the model answer where it was tuned on conversations, else go on from its sample's prompt."""
    if not facts.get("chat"):
        return (WRITE if stock else WRITE_OURS).format(prompt=facts.get("sample", {}).get("prompt") or "")
    messages = example_messages(facts)
    if stock:
        return TALK.format(messages=messages)
    system = f", system={messages[0]['content']!r}" if len(messages) > 1 else ""
    return TALK_OURS.format(system=system, question=messages[-1]["content"])


def go_on(name: str, source: str) -> str:
    """What else can be done with the package of this project."""
    return (
        "## Go on from it\n\nIn cells of your own, to teach it a text of yours and to publish what comes of it:\n\n"
        f'```\n!pip install -q "nanogpt-hub[train] @ {source}"\n'
        f"!nanogpt-hub finetune --from {name} --data.source my.txt --max_steps 200 --out_dir out/mine\n"
        "!nanogpt-hub push out/mine/best YOU/mine\n```"
    )
