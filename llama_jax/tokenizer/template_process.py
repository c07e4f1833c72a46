"""Renders chat templates in a process of its own, which `chat.render` starts as a script.

A template comes with the model, from whoever made that. Jinja's sandbox keeps it from Python, but
not from filling memory (`'a' | center(2000000000)`) or from looping without end, and no list of
what to forbid is complete: so the operating system sets the limits, for each rendering anew.

Each line on standard input is a job in JSON, `{"template", "context"}`. Each line on standard
output is its result: `{"text"}`, or `{"limit"}`, the one that it exceeds, or `{"error"}`, with
`"line"` where the template is no Jinja. A job that exceeds the processor time ends the process
without a result.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of processor time, for one rendering; a chat of a megabyte takes less than a tenth
MEMORY = 2**29  # of the process [bytes]
EXTRA_OUTPUT = 2**20  # what a template may add to four times the text that it is given [characters]


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks what the model said: it changes no text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        # Jinja's own would escape what HTML gives a meaning to.
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def result(line: str) -> dict[str, Any]:
    """Returns the result of a job: its text, or why there is none."""
    job = json.loads(line)
    try:
        text = _compiled(job["template"]).render(job["context"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": str(error.message)[:1000], "line": error.lineno}
    except MemoryError:
        raise
    except Exception as error:  # a template can do whatever Python can fail at
        return {"error": str(error)[:1000]}
    if len(text) > 4 * len(line) + EXTRA_OUTPUT:
        return {"limit": f"a text of {len(text)} characters"}
    return {"text": text}


def main() -> None:
    """Does jobs until standard input ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = json.dumps(result(line))
        except MemoryError:
            answer = json.dumps({"limit": f"more than {MEMORY >> 20} MiB of memory"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
