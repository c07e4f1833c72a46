"""Computes random steps of a killed and moved run again, and compares them bit for bit.

    python benchmarks/replays.py [--replays 10] [--kills 3] [--steps 200] [--seed 0]

SIGKILL ends the run of a tiny model at random moments after its step is compiled, and the same
command resumes it. Then its folder is renamed, and `llama-jax train --replay STEP` computes random
steps, each in a new process, from the nearest checkpoint before each. The exit code is 1 if a loss
or a gradient norm differs from that of metrics.jsonl, or if the losses or the last checkpoint of
the run have changed.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kill_runs import make_config, make_environment, write_tokens
from kills import Run, contents

from llama_jax.config import yaml_file
from llama_jax.config.run import CheckpointConfig


def train_with_kills(
    path: Path, kills: int, environment: dict[str, str], rng: random.Random
) -> int:
    """Runs a configuration to its end; returns the number of kills."""
    done = 0
    while True:
        run = Run(path, 1, environment)
        run.wait_until(lambda: "compiled in" in run.errors)  # noqa: B023 (called at once)
        time.sleep(rng.uniform(0.2, 1.0))
        if done >= kills or not run.is_running():
            run.wait()
            return done
        run.kill([0])
        done += 1


def main() -> int:
    """Prints each replay; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of the run (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, different = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = make_environment(folder)
        write_tokens(folder / "texts.jsonl", folder / "tokens")
        config = make_config(folder / "tokens", folder / "run", 1, args.steps, None)
        config = replace(config, checkpoint=CheckpointConfig(every=10, keep=args.steps))
        path = folder / "run.yaml"
        path.write_text(yaml_file.dump(config))
        kills = train_with_kills(path, args.kills, environment, rng)
        moved = (folder / "run").rename(folder / "moved")
        before = contents(moved, args.steps)
        print(f"a run of {args.steps} steps, killed {kills} times, then moved", flush=True)
        for step in rng.sample(range(1, args.steps + 1), args.replays):
            command = [sys.executable, "-m", "llama_jax", "train", str(path)]
            command += [f"training.out={moved}", "--replay", str(step), "--json"]
            done = subprocess.run(command, env=environment, capture_output=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr.decode())
            found = json.loads(done.stdout)
            equal = found["equal"] is True
            different += not equal
            verdict = "equal" if equal else f"recorded {found['recorded']}"
            start, loss, norm = (found[name] for name in ("start", "loss", "grad_norm"))
            numbers = f"loss {loss!r}, gradient norm {norm!r}"
            print(f"step {step} from checkpoint {start}: {numbers}: {verdict}", flush=True)
        changed = contents(moved, args.steps) != before
    print(f"{args.replays - different} of {args.replays} equal bit for bit")
    print("the losses or the last checkpoint have changed" if changed else "the run is unchanged")
    return int(different > 0 or changed)


if __name__ == "__main__":
    sys.exit(main())
