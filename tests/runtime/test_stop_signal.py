"""SIGTERM ends a run that has nothing to save with exit code 0, at any point of its start."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from llama_jax.runtime import stop_signal

# The command line, which prints 'waits' when it reaches a point, and waits there for the signal.
PROGRAM = """
import ctypes, sys, time
from llama_jax.cli import main
point = sys.argv.pop(1)

def wait(*_, **__):
    try:
        print("waits", flush=True)
        time.sleep(60)
    finally:
        print("cleans up", flush=True)

def wait_outside_of_python(*_, **__):
    print("waits", flush=True)
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second call waits forever, and no signal interrupts it
        ctypes.CDLL(None).pthread_mutex_lock(lock)

class Import:
    def find_spec(self, name, *_):
        if name == "jax":
            wait()

if point == "import":
    sys.meta_path.insert(0, Import())
else:
    from llama_jax.training import loop, start
    if point == "preparation":
        start.prepare_data = wait
    elif point == "restore":
        loop.TrainingCheckpoints.restore = wait
        start.initial_state = wait
    else:
        loop.compile_step = wait_outside_of_python
sys.exit(main.main(sys.argv[1:]))
"""


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "point", ["import", slow("preparation"), slow("restore"), slow("compilation")]
)
def test_sigterm_before_the_first_step_ends_with_0(point, token_folder, tmp_path):
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(CONFIG.format(data=token_folder, out=out))
    command = [sys.executable, "-c", PROGRAM, point, "train", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=os.environ)
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert stdout == ("cleans up\n" if point == "preparation" else "")
    assert process.returncode == 0, stderr
    assert stderr.splitlines()[-1] == (
        f"stopped on SIGTERM: there was nothing to save; start again with: llama-jax train {path}"
    )
    assert "Traceback" not in stderr
    assert not [p for p in tmp_path.rglob("*") if p.name.isdecimal() or "partial" in p.name]


CONFIG = """
model: {{dim: 32, n_layers: 1, n_heads: 4, n_kv_heads: 4, head_dim: 8, hidden_dim: 64,
         vocab_size: 320, context: 64, dtype: float32, remat: none}}
data: {{mixture: {{{data}: 1}}, batch_size: 8, seq_len: 16}}
training: {{out: {out}, steps: 4}}
"""


def test_a_watcher_that_looks_after_the_cleanup_does_not_end_the_process(monkeypatch, capsys):
    """Its thread may get the CPU only when the exception has left the block."""
    read, ended = os.read, []

    def read_late(*args):
        number = read(*args)
        time.sleep(0.3)
        return number

    monkeypatch.setattr(stop_signal.os, "read", read_late)
    monkeypatch.setattr(stop_signal, "exit_run", ended.append)
    with stop_signal.exit_at_sigterm("stopped"):
        try:
            with stop_signal.raise_at_sigterm():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
        finally:
            time.sleep(1)  # such as the release of a lock
    assert ended == []
    assert capsys.readouterr().err == "stopped\n"


def test_a_signal_just_before_a_system_call_interrupts_it(capsys):
    """Such a signal, or one that the kernel gives to another thread, wakes no system call."""
    with stop_signal.exit_at_sigterm("stopped"), stop_signal.raise_at_sigterm():
        (watcher,) = (t for t in threading.enumerate() if t.name == "stop-signal")
        threading.Timer(0.2, signal.pthread_kill, (watcher.ident, signal.SIGTERM)).start()
        time.sleep(60)
        pytest.fail("the system call was not interrupted")
    assert capsys.readouterr().err == "stopped\n"


def test_a_second_signal_does_not_interrupt_the_cleanup(capsys):
    cleaned_up = False
    with stop_signal.exit_at_sigterm("stopped"), stop_signal.raise_at_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            cleaned_up = True
    assert cleaned_up
    assert capsys.readouterr().err == "stopped\n"
