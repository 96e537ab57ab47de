"""Addresses and code that repeat a generation exactly: model at its commit, prompt, settings and seed.

address = link(models, continuation, "https://user-demo.hf.space/")
asked, problems = read_link({"repo": "user/name", "temperature": "0.7"})     # what such an address asks for
"""

import base64
import shlex
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlencode

from nanogpt_hub.engine import ENGINES
from nanogpt_hub.playground.chat import Talk
from nanogpt_hub.playground.continuation import Continuation
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig

FIELDS = ("max_new_tokens", *SAMPLERS, "seed", "stop")  # of SamplingConfig, in the order of the page's controls


def link(models: ModelStore, continuation: Continuation, base: str = "") -> str:
    """An address of the page that generates the same text again.

    It names every sampler: what is left out would follow the model's own defaults.
    """
    settings, place = continuation.settings, continuation.place
    query: dict[str, Any] = {"repo": models.name_of(place), "rev": place.sha, "prompt": continuation.prompt}
    query |= {"seed": settings.seed, "max_new_tokens": settings.max_new_tokens}
    query |= {each.name: each.neutral if value is None else value for each, value in values_of(settings)}
    query |= {"stop": "\n".join(settings.stop)} if settings.stop else {}
    query |= {"given": pack(given_ids(continuation))} if continuation.given else {}
    query |= {"engine": continuation.engine} if continuation.engine else {}
    query |= {"int8": 1} if continuation.int8 else {}
    return f"{base}?{urlencode({name: value for name, value in query.items() if value not in ('', None)})}"


def values_of(settings: SamplingConfig) -> list[tuple[Any, float | None]]:
    """Each sampler with its value in `settings`."""
    return [(each, getattr(settings, each.name)) for each in SAMPLERS.values()]


def read_link(query: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The fields that an address asks for, and a sentence about each value that is not usable. Others still count."""
    asked: dict[str, Any] = {name: query[name] for name in ("prompt", "stop") if name in query}
    problems = []
    if query.get("engine") in ENGINES:
        asked["engine"] = query["engine"]
    if "given" in query:
        try:
            asked["given"] = unpack(query["given"])
        except ValueError as error:
            problems.append(f"the branch that the link names was left out: {error}")
    for name in ("max_new_tokens", *SAMPLERS, "seed", "int8"):
        if name not in query:
            continue
        try:
            value = number(query[name])
            if name != "int8":
                checked: dict[str, Any] = {name: value}
                SamplingConfig(**checked)
            asked[name] = value
        except ValueError as error:
            problems.append(f"the link's {name} is {query[name][:40]!r} and was left out: {error}")
    return asked, problems


def number(text: str) -> float:
    """A number, whole where it is. ValueError for what is none."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("it must be a number") from None
    return int(value) if value.is_integer() else value


def given_ids(continuation: Continuation) -> list[int]:
    """Ids of the tokens after the prompt that were kept or chosen."""
    return [token.id for token in continuation.tokens[: continuation.given]]


def pack(ids: Iterable[int]) -> str:
    """Token ids for an address: 7 bits a byte, smallest first (LEB128), as base64."""
    data = bytearray()
    for id in ids:
        while id >= 128:
            data.append(id & 127 | 128)
            id >>= 7
        data.append(id)
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unpack(text: str) -> list[int]:
    """The ids that `pack` packed. ValueError for what is no such text."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise ValueError("it is damaged") from None
    ids, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            ids.append(value)
            value = shift = 0
    if shift or max(ids, default=0) >= 2**31:
        raise ValueError("it is damaged")
    return ids


def snippet(continuation: Continuation) -> str:
    """The same text again, in Python."""
    place = continuation.place
    where = f"{place.repo_id}@{place.sha}" if place.repo_id else place.folder.as_posix()
    also = "from nanogpt_hub.engine.int8 import quantize_int8\n" if continuation.int8 else ""
    model = "quantize_int8(model)" if continuation.int8 else "model"
    engine = f", engine={continuation.engine!r}" if continuation.engine else ""
    if continuation.given:
        ids = list(continuation.prompt_ids) + given_ids(continuation)
        return (
            "from nanogpt_hub import from_pretrained\nfrom nanogpt_hub.generate import stream_tokens\n"
            f"{also}\nmodel, tokenizer = from_pretrained({where!r})\n"
            f"ids = {ids!r}\n"
            f"tokens = stream_tokens({model}, tokenizer, [ids], {arguments(continuation.settings)}{engine})\n"
            "text = tokenizer.decode(ids) + ''.join(token.text for token in tokens)\n"
            "print(text)\n"
        )
    return (
        f"from nanogpt_hub import from_pretrained, generate\n{also}\n"
        f"model, tokenizer = from_pretrained({where!r})\n"
        f"result = generate({model}, tokenizer, {continuation.prompt!r}, {arguments(continuation.settings)}{engine})\n"
        "print(result.text)\n"
    )


def client_snippet(models: ModelStore, continuation: Continuation, base: str) -> str:
    """The same text again, from this page's API."""
    place = continuation.place
    revision = f", revision={place.sha!r}" if place.sha else ""
    also = f", given={given_ids(continuation)}" if continuation.given else ""
    also += f", engine={continuation.engine!r}" if continuation.engine else ""
    also += ", int8=True" if continuation.int8 else ""
    return (
        "from gradio_client import Client\n\n"
        f"client = Client({base!r})\n"
        f"result = client.predict(\n    prompt={continuation.prompt!r},\n"
        f"    model={models.name_of(place)!r}{revision},\n"
        f"    {arguments(continuation.settings)}{also},\n"
        '    api_name="/generate",\n)\n'
        'print(result["text"])\n'
    )


def chat_snippet(talk: Talk) -> str:
    """The last answer of a conversation again, in Python."""
    made, place = talk.made, talk.place
    assert made is not None
    assert place is not None
    if made.given:
        return "# An answer that was continued has two seeds: no single call repeats it.\n"
    where = f"{place.repo_id}@{place.sha}" if place.repo_id else place.folder.as_posix()
    also = "from nanogpt_hub.engine.int8 import quantize_int8\n" if made.int8 else ""
    model = "quantize_int8(model)" if made.int8 else "model"
    system = f", system={talk.system!r}" if talk.system else ""
    before = talk.messages[:-2]
    engine = f", engine={made.engine!r}" if made.engine else ""
    return (
        f"from nanogpt_hub import Chat, from_pretrained\n{also}\n"
        f"model, tokenizer = from_pretrained({where!r})\n"
        f"chat = Chat({model}, tokenizer{system})\n"
        + (f"chat.messages = {before!r}\n" if before else "")
        + f"print(chat.say({talk.said[-1]['content']!r}{engine}, {arguments(made.settings)}))\n"
    )


def chat_command(models: ModelStore, talk: Talk) -> str:
    """The command that talks with the same model in the same way."""
    place, made = talk.place, talk.made
    assert place is not None
    assert made is not None
    settings = made.settings
    name = models.name_of(place)
    words = ["nanogpt-hub", "chat", f"{name}@{place.sha}" if place.sha else name]
    words += ["--system", talk.system] if talk.system else []
    shown: list[tuple[str, Any]] = [("max_new_tokens", settings.max_new_tokens)]
    shown += [(each.name, value) for each, value in values_of(settings) if value is not None and value != each.default]
    for name, value in shown:
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words) + "\n"


def arguments(settings: SamplingConfig) -> str:
    """Settings as keyword arguments; samplers that are off here and by default are left out."""
    shown: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    for each, value in values_of(settings):
        if each.is_on(value) or each.is_on(each.default):
            shown[each.name] = each.neutral if value is None else value
    shown |= {"stop": list(settings.stop)} if settings.stop else {}
    return ", ".join(f"{name}={value!r}" for name, value in {**shown, "seed": settings.seed}.items())


def load_snippet(models: ModelStore, place: Any) -> str:
    """How to load a model elsewhere."""
    name, at = place.repo_id or place.folder.as_posix(), f", revision={place.sha!r}" if place.sha else ""
    ours = f"{name}@{place.sha}" if place.sha else name
    return (
        "from nanogpt_hub import from_pretrained\n\n"
        f"model, tokenizer = from_pretrained({ours!r})\n\n"
        "# or, where its shape is one that Transformers knows\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r}{at})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r}{at})\n"
    )
