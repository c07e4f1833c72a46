"""The page at /, as a person uses it: in Chromium, driven over its DevTools protocol."""

import base64
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
    """Chromium with one page. Commands go through file descriptors 3 and 4, ended by zero bytes."""

    def __init__(self, program: str, profile: Path):
        pipes = [end for _ in range(2) for end in os.pipe()]
        # Above 10, so that none of them stands where another is to go.
        theirs_in, mine_out, mine_in, theirs_out = (
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes
        )
        for end in pipes:
            os.close(end)
        moved = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(mine_out, "wb", 0), os.fdopen(mine_in, "rb", 0)
        self._numbers = itertools.count(1)
        self._received = b""
        target = self.do("Target.createTarget", session=None, url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", session=None, targetId=target, flatten=True)
        self.session = attached["sessionId"]

    session: str | None = None

    def do(self, method, session="", **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self.session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                data = self._in.read(2**16)
                assert data, "the browser has ended"
                self._received += data
            answer, _, self._received = self._received.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        done = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, expression):
        until = time.monotonic() + 20
        while not (value := self.value(expression)):
            assert time.monotonic() < until, self.value("document.body.innerText")
            time.sleep(0.02)
        return value

    def click(self, selector):
        box = self.value(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.do(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                clickCount=1,
            )  # fmt: skip

    def write(self, selector, text):
        self.click(selector)
        self.do("Input.insertText", text=text)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))

    def close(self):
        self.do("Browser.close", session=None)
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
    browser.do("Page.navigate", url=f"{served[1]}/")
    browser.wait_for("document.title === 'stories' && !!document.getElementById('send')")
    return browser


ANSWER = "(document.querySelector('.answer') || {}).textContent"


def test_a_prompt_is_answered_as_it_is_made(page, served):
    served[0].seconds = 0.02
    page.write("#prompt", "hello")
    page.click("#send")
    page.wait_for(f"{ANSWER}.length > 3")
    assert page.value("!document.getElementById('stop').hidden")
    page.wait_for("document.getElementById('stop').hidden")
    served[0].seconds = 0.001
    assert page.value(ANSWER).endswith("\nThat is all.")
    assert page.value("document.querySelector('.user').textContent") == "hello"
    assert page.value("document.getElementById('prompt').value") == ""
    n = len(served[0].tokenizer.encode(" " + page.value(ANSWER))) + 1
    assert page.value("document.getElementById('speed').textContent").startswith(f"{n} tokens, ")


def test_a_chat_goes_on(page, served):
    served[0].script = lambda request: "yes"
    for number in (1, 2):
        page.write("#prompt", f"question {number}")
        page.click("#send")
        page.wait_for(f"document.querySelectorAll('.answer').length === {number}")
        page.wait_for("document.getElementById('stop').hidden")
    del served[0].script
    messages = [{"role": "user", "content": "question 1"}]
    messages += [{"role": "assistant", "content": "yes"}]
    messages += [{"role": "user", "content": "question 2"}]
    tokenizer = served[0].tokenizer
    assert served[0].requests[-1].prompt == tuple(tokenizer.encode_chat(messages))


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


def test_markdown_is_never_html(page):
    page.value(
        f"markdown(show(document.getElementById('texts'), 'md', ''), {json.dumps(MARKDOWN)})"
    )

    def texts(selector):
        return page.value(
            f"[...document.querySelectorAll('.md {selector}')].map(e => e.textContent)"
        )

    assert texts("h3") == ["Two <b>ways</b>"]
    assert (texts("strong"), texts("em")) == (["bold"], ["italic"])
    assert texts("code") == ["a < b", 'if a < b:\n    print("*")']
    assert len(texts("ol > li")) == len(texts("ol > li > ul > li")) == 2
    assert texts("a") == ["docs", "https://example.org/c"]
    links = "[...document.querySelectorAll('.md a')].map(a => [a.href, a.rel, a.target])"
    assert page.value(links) == [
        [f"https://example.org/{path}", "noopener noreferrer", "_blank"] for path in ("a_b", "c")
    ]
    assert texts("script, img, b") == []
    assert texts("p")[0] == "It is bold, italic, a < b and 2 * 3 * 4, snake_case_name."
    assert texts("p")[-1] == "<script>alert(1)</script>"
    # What a model repeats exhausts no stack.
    for part in ("> ", "1. ", "**_"):
        deep = f"markdown(document.body, {part!r}.repeat(20000)), document.body.textContent.length"
        assert page.value(deep) > 40


def test_an_answer_and_its_code_can_be_copied(page, served):
    served[0].script = lambda request: "It is `so`:\n```\na < b\n```"
    page.value("navigator.clipboard.writeText = async text => { window.copied = text; }, 1")
    page.write("#prompt", "hello")
    page.click("#send")
    page.wait_for("!!document.querySelector('.tools')")
    del served[0].script
    for button, copied in (
        (".code .copy", "a < b"),
        (".tools .copy", "It is `so`:\n```\na < b\n```"),
    ):
        page.click(button)
        assert page.wait_for("window.copied") == copied
        page.value("window.copied = null")


def test_the_page_may_show_its_icon(page):
    page.value("addEventListener('securitypolicyviolation', e => { window.told = e.blockedURI })")
    page.value("window.icon = new Image(), icon.onload = () => { window.told = 'shown' }, 1")
    page.value("icon.src = document.querySelector('link[rel=icon]').href")
    assert page.wait_for("window.told") == "shown"


def test_a_text_is_continued_with_the_settings_and_stopped(page, served):
    engine = served[0]
    engine.seconds = 0.05
    page.value("document.getElementById('mode').value = 'text'")
    page.value("document.getElementById('temperature').value = '0.3'")
    page.value("document.getElementById('tokens').value = '77'")
    page.write("#prompt", "once <b>upon</b>")
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
    assert page.value("document.querySelector('.continued').textContent").startswith("once <b>")


def test_a_failure_is_told(page, served):
    served[0].failing = True
    page.write("#prompt", "hello")
    page.click("#send")
    told = page.wait_for("(document.querySelector('.error') || {}).textContent")
    served[0].failing = False
    assert told == "the engine has failed: out of memory"


def test_a_key_can_be_given(browser, shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260K" / "hf")
    with serving(tokenizer, api_key="open sesame") as (_, url):
        browser.do("Page.navigate", url=f"{url}/")
        about = "(document.getElementById('about') || {}).textContent"
        assert "the API key is missing" in browser.wait_for(about)
        browser.write("#key", "open sesame")
        browser.click("#prompt")
        browser.wait_for("document.title === 'stories'")
        browser.write("#prompt", "hello")
        browser.click("#send")
        browser.wait_for(f"{ANSWER}.includes('That is all.')")
