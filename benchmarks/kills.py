"""Kills runs that train into a faulty object store, and compares them with an undisturbed run.

    python benchmarks/kills.py [--kills 50] [--processes 4] [--scheme gs] [--local]
    python benchmarks/kills.py --fine-tune lora    # or dpo: chats, or preferences, with LoRA

It needs moto, or the emulator of Google's store. The store adds 20 ms to each request,
refuses 5% of them with 429 or 503, drops 2% of the connections in the middle of a response, and
sends 2% of the bodies slowly. SIGKILL ends a run at a random moment after its step is compiled: in
a step, in a save, or while old checkpoints are removed. The same command then resumes it. Each run
that ends is compared with the undisturbed one: the loss of every step, every byte of its last
checkpoint, and the names of all its objects. With --local the hosts also save on their own disks,
and each kill loses the disk of one host: the run must resume from the newest step of which the
others have every shard. With --fine-tune the run trains low-rank pairs of a base on packed chats,
or on preferences by DPO. The exit code is 1 if anything differs.
"""

import argparse
import glob
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from chat_shards import (  # pyright: ignore[reportMissingImports] (of the tests)
    write_packed_shards,
)
from kill_runs import fine_tune, make_config, make_environment, write_base, write_tokens
from object_store import (  # pyright: ignore[reportMissingImports] (of the tests)
    free_port,
    store_of_this_process,
)

from llama_jax.checkpoint.folders import committed_steps
from llama_jax.config import yaml_file
from llama_jax.config.run import Config
from llama_jax.runtime.storage import AnyPath, list_files, parse_path, read_many

FAULTS = {"latency": 0.02, "refused": 0.05, "dropped": 0.02, "slow": 0.02}
# The next run takes over from a killed one after 2 s without a heartbeat, rather than 20 s.
COMMAND_LINE = """
import sys
from llama_jax.cli.main import main
from llama_jax.runtime import folder_lock
folder_lock.BEAT_SECONDS, folder_lock.WATCH_SECONDS = 0.5, 2.0
sys.exit(main(sys.argv[1:]))
"""
START_SECONDS = 300.0  # until the step is compiled, or saved locally, on a busy machine


class Run:
    """The processes of one run, from a start to its end or to a kill.

    Attributes:
        processes: one a host.
    """

    def __init__(self, path: Path, processes: int, environment: dict[str, str]):
        port = free_port()
        self._outputs = [path.with_suffix(f".err{i}") for i in range(processes)]
        self.processes = []
        for i, errors in enumerate(self._outputs):
            command = [sys.executable, "-c", COMMAND_LINE, "train", str(path)]
            if processes > 1:
                command += ["--coordinator", f"127.0.0.1:{port}"]
                command += ["--processes", str(processes), "--process", str(i)]
            with errors.open("w") as err:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=err, stderr=err)
                )

    @property
    def errors(self) -> str:
        """Standard error of host 0 so far."""
        return self.errors_of(0)

    def errors_of(self, host: int) -> str:
        """Returns the standard error of a host so far."""
        return self._outputs[host].read_text()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Waits until `reached` returns True, or the run has ended."""
        deadline = time.monotonic() + START_SECONDS
        while not reached() and self.is_running():
            if time.monotonic() > deadline:
                self.kill(range(len(self.processes)))
                raise SystemExit(f"the run didn't get that far: {self.errors}")
            time.sleep(0.05)

    def is_running(self) -> bool:
        """Returns whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, hosts: range | list[int]) -> None:
        """Kills hosts with SIGKILL and waits for all: the others end when they notice."""
        for host in hosts:
            self.processes[host].send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(120)

    def wait(self) -> None:
        """Waits for the end of the run, which must succeed."""
        for process in self.processes:
            if process.wait(600):
                raise SystemExit(f"the run failed: {self.errors}")


def contents(folder: AnyPath, step: int) -> dict[str, bytes | None]:
    """Returns the losses of a run, and each object of its last checkpoint."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    last = folder / "checkpoints" / str(step)
    found = read_many(last, [_name(path, last) for path in list_files(last)])
    return found | {f"loss {n}": str(loss).encode() for n, loss in losses}


def names(folder: AnyPath) -> set[str]:
    """Returns the names of all objects of a run."""
    return {_name(path, folder) for path in list_files(folder)}


def _name(path: AnyPath, folder: AnyPath) -> str:
    return str(path).removeprefix(f"{folder}/")


def newest_local_step(config: Config) -> int:
    """Returns the newest step of which the disks have each shard; 0 without local checkpoints."""
    if not config.checkpoint.local:
        return 0
    present = defaultdict[int, set[int]](set)  # shards by step; host h has shard h % fsdp
    # glob.glob, unlike Path.glob, ignores a folder that is removed meanwhile.
    for path in glob.glob(f"{config.checkpoint.local.path}/*/*/*/manifest.json"):
        host, step = map(int, Path(path).parts[-3:-1])
        present[step].add(host % config.mesh.fsdp)
    every = set(range(config.mesh.fsdp))
    return max((step for step, shards in present.items() if shards == every), default=0)


def lose_disk(config: Config, host: int) -> str:
    """Removes the local checkpoints of a host, as if another machine replaced it."""
    assert config.checkpoint.local
    for folder in Path(config.checkpoint.local.path).glob(f"*/{host}"):
        shutil.rmtree(folder)
    return f", host {host} lost, newest local step {newest_local_step(config)}"


def kill_one_run(
    path: Path,
    config: Config,
    environment: dict[str, str],
    kills: int,
    longest: float,
    rng: random.Random,
) -> tuple[int, list[str]]:
    """Runs to the end, with kills; returns their number, and wrong resumptions.

    Args:
        path: for the file of the configuration.
        config: of the run.
        environment: of its processes.
        kills: the most kills.
        longest: the most seconds between compiling and a kill.
        rng: draws the moments and the hosts.
    """
    processes, done, wrong = config.mesh.data * config.mesh.fsdp, 0, list[str]()
    checkpoints = parse_path(config.training.out) / "checkpoints"
    path.write_text(yaml_file.dump(config))
    while True:
        complete, incomplete = committed_steps(checkpoints)
        local = newest_local_step(config)
        newest = max([local, *complete])
        run = Run(path, processes, environment)
        run.wait_until(lambda: "compiled in" in run.errors)  # noqa: B023 (called at once)
        if "Gloo context initialization failed" in run.errors:
            print("the hosts were too slow to connect: started again", flush=True)
            run.kill(range(processes))
            continue
        if done < kills and run.is_running():
            if config.checkpoint.local:  # each kill finds local checkpoints of this start
                run.wait_until(lambda: newest_local_step(config) > newest)  # noqa: B023 (same)
            time.sleep(rng.uniform(0, longest))
        resumed = f"resumes after step {newest} of" if newest else "has no checkpoint yet"
        finished = config.training.steps in complete
        if not finished and resumed not in run.errors and (newest or done):
            wrong.append(f"with {complete}, {local}, without {incomplete}: {run.errors}")
        if "is damaged" in run.errors:
            wrong.append(run.errors)
        if done >= kills or not run.is_running():
            run.wait()
            return done, wrong
        hosts = range(processes) if rng.random() < 0.5 else [rng.randrange(processes)]
        run.kill(hosts)
        done += 1
        lost = lose_disk(config, rng.choice(hosts)) if config.checkpoint.local else ""
        print(f"kill {done}: complete {complete}, incomplete {incomplete}{lost}", flush=True)


def main() -> int:
    """Prints the figures; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2, 4])
    parser.add_argument("--scheme", default="s3", choices=["s3", "gs"])
    parser.add_argument("--steps", type=int, default=200, help="of each run (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--local", action="store_true", help="local checkpoints; each kill also loses a host's disk"
    )
    parser.add_argument("--fine-tune", choices=["lora", "dpo"])
    args = parser.parse_args()
    if args.local and args.processes == 1:
        parser.error("--local needs --processes 2 or 4: a host's replica is on another one")
    rng, killed, runs, wrong = random.Random(args.seed), 0, 0, list[str]()
    with tempfile.TemporaryDirectory() as temporary, store_of_this_process(args.scheme) as store:
        env = make_environment(Path(temporary))  # with the address of the store
        tokens = parse_path(store.url("tokens"))
        write_tokens(Path(temporary, "texts.jsonl"), tokens)
        chats, base = Path(temporary, "chats"), parse_path(store.url("base"))

        def config_of(number: int) -> Config:
            disk = Path(temporary, f"disk-{number}") if args.local else None
            folder = parse_path(store.url(str(number)))
            config = make_config(tokens, folder, args.processes, args.steps, disk)
            return fine_tune(config, args.fine_tune, chats, base) if args.fine_tune else config

        if args.fine_tune:
            texts = Path(temporary, "texts")
            write_tokens(Path(temporary, "texts.jsonl"), texts)
            kind = {"lora": "chats", "dpo": "preferences"}[args.fine_tune]
            write_packed_shards(chats, texts, kind)
            write_base(base, config_of(0).model, texts)
        undisturbed = config_of(0)
        path = Path(temporary, "0.yaml")
        path.write_text(yaml_file.dump(undisturbed))
        # A kill may come at any moment between compiling and the end, however fast this machine is.
        # The start, which compiles the step, is longest here, so it doesn't count.
        run = Run(path, args.processes, env)
        run.wait_until(lambda: "compiled in" in run.errors)
        start = time.monotonic()
        run.wait()
        longest = time.monotonic() - start
        print(f"an undisturbed run: {longest:.1f} s after its step is compiled", flush=True)
        start = time.monotonic()
        while killed < args.kills:
            runs += 1
            config = config_of(runs)
            path = Path(temporary, f"{runs}.yaml")
            vars(store.faults).update(FAULTS)
            n, found = kill_one_run(path, config, env, args.kills - killed, longest, rng)
            vars(store.faults).update(dict.fromkeys(FAULTS, 0.0))
            killed += n
            wrong += found
            folders = [parse_path(c.training.out) for c in (undisturbed, config)]
            ours, theirs = (contents(folder, args.steps) for folder in folders)
            different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
            left = names(folders[0]) ^ names(folders[1])
            wrong += [f"run {runs}: {name} differs" for name in different]
            wrong += [f"run {runs}: {name} is left behind or missing" for name in left]
            print(f"run {runs}: {n} kills; {len(different)} differ, {len(left)} left", flush=True)
        seconds = time.monotonic() - start
    print(
        f"{killed} kills of {args.processes} process(es), {runs} runs of {args.steps} steps on"
        f" {args.scheme}, {seconds:.0f} s: {len(wrong)} wrong"
    )
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
