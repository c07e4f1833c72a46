"""The web page at / in Chromium, controlled through its DevTools protocol."""

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fake_engine import serving

from llama_jax.tokenizer.tokenizer import load_tokenizer

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-pipe", "--window-size=1000,800"),
]


class Browser:
    """Chromium with one page.

    It reads commands from file descriptor 3 and writes results to 4; a zero byte ends each message.
    """

    def __init__(self, program: str, profile: Path):
        pipes = [end for _ in range(2) for end in os.pipe()]
        # Numbers from 10: the redirections to 3 and 4 must not overwrite any of them.
        child_in, parent_out, parent_in, child_out = (
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes
        )
        for end in pipes:
            os.close(end)
        command = f'exec "$@" 3<&{child_in} 4>&{child_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(child_in, child_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(child_in)
        os.close(child_out)
        self._out, self._in = os.fdopen(parent_out, "wb", 0), os.fdopen(parent_in, "rb", 0)
        self._message_ids = itertools.count(1)
        self._received = b""
        target = self.call("Target.createTarget", session=None, url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)
        self.session = attached["sessionId"]

    session: str | None = None

    def call(self, method, session="", **params):
        message_id = next(self._message_ids)
        message = {"id": message_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self.session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                data = self._in.read(2**16)
                assert data, "Chromium has exited"
                self._received += data
            reply, _, self._received = self._received.partition(b"\0")
            reply = json.loads(reply)
            if reply.get("id") == message_id:
                assert "error" not in reply, reply
                return reply["result"]

    def evaluate(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, expression):
        deadline = time.monotonic() + 20
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, self.evaluate("document.body.innerText")
            time.sleep(0.02)
        return value

    def click(self, selector):
        box = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                clickCount=1,
            )  # fmt: skip

    def type_text(self, selector, text):
        self.click(selector)
        self.call("Input.insertText", text=text)

    def close(self):
        self.call("Browser.close", session=None)
        self._process.wait(10)
        self._out.close()
        self._in.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium")
    if program is None and "CI" not in os.environ:
        pytest.skip("needs Chromium, which is not installed")
    assert program, "CI installs Chromium"
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def served(shared_data):
    with serving(load_tokenizer(shared_data / "stories260K" / "hf")) as served:
        yield served


@pytest.fixture
def page(browser, served):
    served[0].wait_until_idle()
    browser.call("Page.navigate", url=f"{served[1]}/")
    browser.wait_for("document.title === 'stories' && !!document.getElementById('send')")
    return browser


ANSWER = "(document.querySelector('.answer') || {}).textContent"


def test_the_page_shows_the_answer_while_it_is_generated(page, served):
    served[0].seconds = 0.02
    page.type_text("#prompt", "hello")
    page.click("#send")
    page.wait_for(f"{ANSWER}.length > 3")
    assert page.evaluate("!document.getElementById('stop').hidden")
    page.wait_for("document.getElementById('stop').hidden")
    served[0].seconds = 0.001
    assert page.evaluate(ANSWER).endswith("\nThat is all.")
    assert page.evaluate("document.querySelector('.user').textContent") == "hello"
    assert page.evaluate("document.getElementById('prompt').value") == ""
    n = len(served[0].tokenizer.encode(" " + page.evaluate(ANSWER))) + 1
    assert page.evaluate("document.getElementById('speed').textContent").startswith(f"{n} tokens, ")


def test_a_chat_sends_its_earlier_messages(page, served):
    served[0].script = lambda request: "yes"
    for number in (1, 2):
        page.type_text("#prompt", f"question {number}")
        page.click("#send")
        page.wait_for(f"document.querySelectorAll('.answer').length === {number}")
        page.wait_for("document.getElementById('stop').hidden")
    del served[0].script
    messages = [{"role": "user", "content": "question 1"}]
    messages += [{"role": "assistant", "content": "yes"}]
    messages += [{"role": "user", "content": "question 2"}]
    tokenizer = served[0].tokenizer
    assert served[0].requests[-1].prompt == tuple(tokenizer.encode_chat(messages))


def test_a_message_can_be_edited_and_the_chat_exported(page, served):
    served[0].script = lambda request: "<b>yes</b>"
    for number in (1, 2):
        page.type_text("#prompt", f"question {number}")
        page.click("#send")
        page.wait_for(f"document.querySelectorAll('.tools').length === {number}")
    page.click(".edit")
    assert page.evaluate("document.getElementById('prompt').value") == "question 1"
    assert page.evaluate("document.querySelectorAll('#texts .text, .tools, .edit').length") == 0
    assert page.evaluate("!document.getElementById('empty').hidden")
    page.type_text("#prompt", " again")
    page.click("#send")
    page.wait_for("document.querySelectorAll('.tools').length === 1")
    del served[0].script
    question = {"role": "user", "content": "question 1 again"}
    tokenizer = served[0].tokenizer
    assert served[0].requests[-1].prompt == tuple(tokenizer.encode_chat([question]))
    page.evaluate(
        "URL.createObjectURL = blob => { blob.text().then(t => saved = t); return '#' }, 1"
    )
    page.evaluate("HTMLAnchorElement.prototype.click = () => {}, window.saved = null, 1")
    page.click("#export-json")
    answer = {"role": "assistant", "content": "<b>yes</b>"}
    exported = json.loads(page.wait_for("window.saved"))
    assert exported == {"model": "stories", "messages": [question, answer]}
    page.evaluate("window.saved = null, 1")
    page.click("#export-markdown")
    markdown = "## user\n\nquestion 1 again\n\n## assistant\n\n<b>yes</b>\n"
    assert page.wait_for("window.saved") == markdown


def test_a_chat_cleared_during_an_answer_starts_anew(page, served):
    engine = served[0]
    engine.seconds = 0.02
    page.type_text("#prompt", "question 1")
    page.click("#send")
    page.wait_for(f"{ANSWER}.length > 3")
    page.click("#clear")
    page.wait_for("document.getElementById('stop').hidden")
    engine.seconds = 0.001
    assert page.evaluate("document.getElementById('texts').innerText") == "Write a prompt below."
    assert page.evaluate("document.getElementById('export').hidden")
    assert page.evaluate("document.getElementById('speed').textContent") == ""
    page.type_text("#prompt", "question 2")
    page.click("#send")
    page.wait_for("document.querySelectorAll('.tools').length === 1")
    question = {"role": "user", "content": "question 2"}
    assert engine.requests[-1].prompt == tuple(engine.tokenizer.encode_chat([question]))


MARKDOWN = """\
# Two <b>ways</b>

It is **bold**, *italic*, `a < b` and 2 * 3 * 4, snake_case_name.

1. One
   ```python
   if a < b:
       print("*")
   ```
2. Two
   - [docs](https://example.org/a_b) or https://example.org/c.
   - [no](javascript:alert(1)) <img src=x onerror=alert(1)>

<script>alert(1)</script>"""


def test_markdown_is_rendered_and_html_is_not(page):
    source = json.dumps(MARKDOWN)
    element = "appendText(document.getElementById('texts'), 'md', '')"
    page.evaluate(f"renderMarkdown({element}, {source})")

    def texts(selector):
        return page.evaluate(
            f"[...document.querySelectorAll('.md {selector}')].map(e => e.textContent)"
        )

    assert texts("h3") == ["Two <b>ways</b>"]
    assert (texts("strong"), texts("em")) == (["bold"], ["italic"])
    assert texts("code") == ["a < b", 'if a < b:\n    print("*")']
    assert len(texts("ol > li")) == len(texts("ol > li > ul > li")) == 2
    assert texts("a") == ["docs", "https://example.org/c"]
    links = "[...document.querySelectorAll('.md a')].map(a => [a.href, a.rel, a.target])"
    assert page.evaluate(links) == [
        [f"https://example.org/{path}", "noopener noreferrer", "_blank"] for path in ("a_b", "c")
    ]
    assert texts("script, img, b") == []
    assert texts("p")[0] == "It is bold, italic, a < b and 2 * 3 * 4, snake_case_name."
    assert texts("p")[-1] == "<script>alert(1)</script>"
    # Deep nesting does not overflow the stack.
    for part in ("> ", "1. ", "**_"):
        page.evaluate(f"renderMarkdown(document.body, {part!r}.repeat(20000))")
        assert page.evaluate("document.body.textContent.length") > 40


def test_buttons_copy_an_answer_and_its_code(page, served):
    served[0].script = lambda request: "It is `so`:\n```\na < b\n```"
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }, 1")
    page.type_text("#prompt", "hello")
    page.click("#send")
    page.wait_for("!!document.querySelector('.tools')")
    del served[0].script
    for button, copied in (
        (".code .copy", "a < b"),
        (".tools .copy", "It is `so`:\n```\na < b\n```"),
    ):
        page.click(button)
        assert page.wait_for("window.copied") == copied
        page.evaluate("window.copied = null")


def test_the_content_security_policy_allows_the_icon(page):
    page.evaluate(
        "addEventListener('securitypolicyviolation', e => { window.iconResult = e.blockedURI })"
    )
    page.evaluate(
        "window.icon = new Image(), icon.onload = () => { window.iconResult = 'shown' }, 1"
    )
    page.evaluate("icon.src = document.querySelector('link[rel=icon]').href")
    assert page.wait_for("window.iconResult") == "shown"


def test_a_completion_uses_the_settings_of_the_page_and_can_be_stopped(page, served):
    engine = served[0]
    engine.seconds = 0.05
    page.evaluate("document.getElementById('mode').value = 'text'")
    page.evaluate("document.getElementById('temperature').value = '0.3'")
    page.evaluate("document.getElementById('tokens').value = '77'")
    page.type_text("#prompt", "once <b>upon</b>")
    page.click("#send")
    page.wait_for(f"{ANSWER}.length > 3")
    page.click("#stop")
    page.wait_for("document.getElementById('stop').hidden")
    engine.seconds = 0.001
    engine.wait_until_idle()
    assert engine.reasons[-1] == "cancelled"
    request = engine.requests[-1]
    assert (request.max_new_tokens, request.sampling.temperature) == (77, 0.3)
    assert engine.tokenizer.decode(request.prompt) == "once <b>upon</b>"
    assert page.evaluate("document.querySelector('.completion').textContent").startswith("once <b>")


def test_the_page_shows_an_error(page, served):
    served[0].failing = True
    page.type_text("#prompt", "hello")
    page.click("#send")
    message = page.wait_for("(document.querySelector('.error') || {}).textContent")
    served[0].failing = False
    assert message == "the engine has failed: out of memory"


def test_the_page_asks_for_the_api_key(browser, shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260K" / "hf")
    with serving(tokenizer, api_key="open sesame") as (_, url):
        browser.call("Page.navigate", url=f"{url}/")
        info = "(document.getElementById('model-info') || {}).textContent"
        assert "the API key is missing" in browser.wait_for(info)
        browser.type_text("#key", "open sesame")
        browser.click("#prompt")
        browser.wait_for("document.title === 'stories'")
        browser.type_text("#prompt", "hello")
        browser.click("#send")
        browser.wait_for(f"{ANSWER}.includes('That is all.')")
