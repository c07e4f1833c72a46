"""Renders chat templates in a separate process, which `chat_template` starts as a script.

A template comes with the model, from an unknown author. Jinja's sandbox prevents access to Python,
but not a template that fills memory (`'a' | center(2000000000)`) or loops forever, and no list of
forbidden operations is complete. So the operating system enforces limits: on memory for the
process, and on processor time for each job.

Each line on standard input is a job in JSON, `{"template", "context", "prefixes"}`: the template is
rendered for each prefix `[number of messages, add_generation_prompt]` of the context's messages.
Each line on standard output is the result of a job: `{"texts"}`; or `{"limit"}`, the limit that
the job exceeds; or `{"error"}`, with `"line"` if the template has a syntax error. A job that
exceeds its processor time kills the process without a result.
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

CPU_SECONDS = 2  # for one job; a chat of a megabyte takes less than 0.1 s
MEMORY_BYTES = 2**29  # for the process
EXTRA_OUTPUT = 2**20  # characters of output that are allowed beyond four times the input


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks the model's messages. The text is unchanged."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter would escape the special characters of HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(date_format: str) -> str:
        return datetime.now().strftime(date_format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def run_job(line: str) -> dict[str, Any]:
    """Runs a job and returns its result: the texts, or the reason for the failure."""
    job = json.loads(line)
    context, texts = job["context"], list[str]()
    try:
        template = _compile(job["template"])
        for n_messages, add_generation_prompt in job["prefixes"]:
            # A template sees no message after the prefix.
            prefix = {"messages": context["messages"][:n_messages]}
            prefix["add_generation_prompt"] = add_generation_prompt
            texts.append(template.render(context | prefix))
    except jinja2.TemplateSyntaxError as error:
        return {"error": str(error.message)[:1000], "line": error.lineno}
    except MemoryError:
        raise
    except Exception as error:  # a template can raise any exception
        return {"error": str(error)[:1000]}
    longest = max(map(len, texts))
    if longest > 4 * len(line) + EXTRA_OUTPUT:
        return {"limit": f"a text of {longest} characters"}
    return {"texts": texts}


def main() -> None:
    """Runs jobs until the end of standard input."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS doesn't support this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            result = json.dumps(run_job(line))
        except MemoryError:
            result = json.dumps({"limit": f"more than {MEMORY_BYTES >> 20} MiB of memory"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(result, flush=True)


if __name__ == "__main__":
    main()
