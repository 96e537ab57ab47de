"""A chat template at work in a process of its own, which may be ended: lines of JSON in, lines of JSON out.

    {"template": "{% for m in messages %}..."}                 ->  {"done": true}
    {"messages": [...], "eos_token": "</s>", ...}              ->  {"text": "..."}, or {"error": "..."}

A template is a program in the Jinja language, and mostly somebody else's. It runs in Jinja's sandbox and sees nothing
but the conversation and the names of the special tokens; the sandbox does not limit time and memory, so the system
does: each line of input has SECONDS of the processor, and the whole process MEMORY bytes. This file is run as a script
by renderer.py and imports nothing of the project.
"""

import contextlib
import functools
import json
import signal
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # of the processor, for one conversation; honest templates take a thousandth of one
MEMORY = 2**30  # bytes
MAX_TEXT = 2**24  # characters of one conversation


class Generation(Extension):
    """Reads over `{% generation %}` and its end, which templates may put around answers."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Transformers sets it up, but without a clock: a conversation's ids must be the same tomorrow."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    made.globals["raise_exception"] = refuse
    return made


def refuse(message: str):
    """What templates call when a conversation is not for them."""
    raise jinja2.TemplateError(message)


def limit_memory() -> None:
    """On systems that have such a limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_time(seconds: float) -> None:
    """Has the system end this process after so many seconds of the processor; 0 for never. Not on Windows."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def render(template: jinja2.Template, request: dict) -> str:
    """The conversation as text, a piece at a time so that no endless one fills the memory."""
    parts, length = [], 0
    for part in template.generate(**request):
        parts.append(part)
        length += len(part)
        if length > MAX_TEXT:
            raise ValueError(f"it writes more than {MAX_TEXT:,} characters")
    return "".join(parts)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it comes to all processes of a console
    limit_memory()
    template = None
    for line in sys.stdin.buffer:
        limit_time(SECONDS)
        try:
            request = json.loads(line)
            reply: dict[str, object]
            if "template" in request:
                template = environment().from_string(request["template"])
                reply = {"done": True}
            else:
                assert template, "a template comes first"
                reply = {"text": render(template, request)}
        except Exception as error:  # a program by somebody else can fail in any way
            reply = {"error": f"{error}"[:500] or type(error).__name__}
        limit_time(0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
