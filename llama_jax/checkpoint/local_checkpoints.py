"""Checkpoints on each host's own disk or RAM disk, more frequent than the shared ones.

`<path>/<run>/<host>/<step>/` contains all shards of that host's devices, including replicas of
other hosts' shards, and a manifest. Hosts don't wait for each other while they save: at the next
start, they compare which steps they have.
"""

import contextlib
import hashlib
import json
import secrets
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from llama_jax.checkpoint import array_files, fingerprint
from llama_jax.checkpoint.arrays import load_items
from llama_jax.checkpoint.save_thread import SaveThread
from llama_jax.checkpoint.training_checkpoints import Progress
from llama_jax.checkpoint.tree import dict_to_tree, tree_to_dict
from llama_jax.config.run import LocalCheckpointConfig
from llama_jax.errors import Fault
from llama_jax.model.lora import Trained
from llama_jax.parallel.replicas import fill_from_replicas, have_all_shards
from llama_jax.runtime import damage, hosts, manifest
from llama_jax.runtime.console import print_status
from llama_jax.runtime.damage import Damaged, root_cause
from llama_jax.runtime.storage import AnyPath, read_many, remove_tree, write_file, write_many

# When a host saves, all hosts have stored the save before the last one, maybe not the last one. So
# a step that all have is never removed if two are retained until the new one is stored.
_RETAINED = 2


class LocalCheckpoints:
    """The local checkpoints of a run, on the current mesh. All hosts create it at the same point.

    Args:
        run_folder: of the run. A file in it distinguishes the run from one of the same path that
            was removed.
        config: path and frequency.
        newest_shared: step of the newest shared checkpoint, 0 without one.
        steps: number of steps of the complete run.

    Attributes:
        steps: the steps after `newest_shared` and before the end that can be restored, ascending.
    """

    def __init__(
        self, run_folder: AnyPath, config: LocalCheckpointConfig, newest_shared: int, steps: int
    ):
        mark = hosts.broadcast_decision(lambda: _run_mark(run_folder))
        self.folder = Path(config.path).absolute() / mark / str(hosts.number())
        self._mesh = jax.sharding.get_mesh()
        self._layout = {
            "format": 1,
            "hosts": hosts.count(),
            "host": hosts.number(),
            "mesh": {str(axis): size for axis, size in self._mesh.shape.items()},
        }
        self._manifests = self._find()
        # For each host, the content of each step that it has. Only equal contents fit together.
        self._found = hosts.gather({str(s): _digest(m) for s, m in self._manifests.items()})
        between = {int(s) for found in self._found for s in found if newest_shared < int(s) < steps}
        self._newest = max(between, default=None)  # maybe not restorable
        self.steps = sorted(step for step in between if self._sources(step))
        self._stored: list[int] = []  # by this host, of this history of the run
        self._failed = False
        self._saving: tuple[int, SaveThread] | None = None

    def _find(self) -> dict[int, dict[str, Any]]:
        """Returns the manifests of this host's usable checkpoints; removes incomplete ones."""
        found = dict[int, dict[str, Any]]()
        for path in _subfolders(self.folder):
            try:
                content = manifest.read_manifest(path)
            except (Damaged, OSError) as error:  # the next save removes it
                reason = error.reason if isinstance(error, Damaged) else error.strerror
                _print_on_this_host(f"can't use {path}: {reason}")
                continue
            if content is None:
                remove_tree(path)
            elif content | self._layout == content:
                found[content["step"]] = content
        return found

    def _sources(self, step: int) -> list[int]:
        """Returns the hosts from whose parts all hosts can restore `step`; empty if they can't."""
        digests = [found.get(str(step)) for found in self._found]
        present = [host for host, digest in enumerate(digests) if digest]
        consistent = len({digests[host] for host in present}) == 1
        return present if consistent and have_all_shards(self._mesh, present) else []

    def save(self, progress: Progress, trained: Trained, opt_state: optax.OptState) -> None:
        """Copies this host's shards into its memory and stores them in the background.

        The arrays may be donated as soon as this returns. All hosts call this at the same step.
        After a failed save, such as to a full disk, this host stores no more local checkpoints.
        """
        self.wait()
        items = {"model": tree_to_dict(trained), "optimizer": tree_to_dict(opt_state)}
        # All hosts must call this, even one that stores no more checkpoints.
        computed = fingerprint.start_fingerprints(items)
        if self._failed:
            return
        specs = {item: array_files.array_specs(tree) for item, tree in items.items()}
        shards = array_files.copy_shards(items, replicas=True)
        store = partial(self._try_to_store, progress, specs, shards, computed)
        self._saving = progress.step, SaveThread("save-local", store)

    def _try_to_store(self, progress: Progress, *state: Any) -> None:
        try:
            self._store(progress, *state)
        except damage.FAULTS as error:
            self._give_up(progress.step, error)

    def _give_up(self, step: int, error: Exception) -> None:
        self._failed = True
        remove_tree(self.folder / str(step))
        _print_on_this_host(
            f"can't save step {step} in {self.folder} ({root_cause(error)}): the run continues"
            " without local checkpoints of this host"
        )

    def _store(self, progress: Progress, specs: Any, shards: dict[str, Any], computed: Any) -> None:
        """Writes and commits this host's part of a checkpoint; in the background thread."""
        self._remove_superseded()
        folder = self.folder / str(progress.step)
        files = array_files.metadata(specs)
        write_many(folder, files)
        for item, parts in shards.items():
            array_files.write_shards(
                array_files.open_for_writing(folder / item, specs[item]), parts
            )
            parts.clear()  # frees the host's memory
        content = {
            **progress._asdict(),
            **self._layout,
            "files": {name: manifest.hash_bytes(data) for name, data in files.items()},
            "fingerprints": fingerprint.to_text(computed),
        }
        manifest.write_manifest(folder, content)
        self._stored.append(progress.step)

    def _remove_superseded(self) -> None:
        """Removes all but the last two checkpoints, also those that the run can't restore."""
        self._stored = self._stored[-_RETAINED:]
        for path in _subfolders(self.folder):
            if path.name not in map(str, self._stored):
                (path / manifest.NAME).unlink(missing_ok=True)
                remove_tree(path)

    def wait(self) -> None:
        """Waits for the save in the background, if there is one."""
        saving, self._saving = self._saving, None
        if saving:
            try:
                saving[1].result()
            except OSError as error:  # the thread was killed
                self._give_up(saving[0], error)

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def remove(self) -> None:
        """Removes this host's local checkpoints: the run is finished, or rewinds before them."""
        self.wait()
        remove_tree(self.folder)
        self._stored = []
        with contextlib.suppress(OSError):  # another host of this machine has not removed its own
            self.folder.parent.rmdir()

    def restore_newest(
        self, trained: Trained, opt_state: optax.OptState
    ) -> tuple[Progress, Trained, optax.OptState] | None:
        """Restores the newest of `steps` that is not damaged; None if there is none.

        A host without its part, or with a damaged one, gets it from a replica on another host.

        Args:
            trained: abstract, with the shardings of the result.
            opt_state: as `trained`.

        Raises:
            InputError: a checkpoint is of other shapes.
        """
        like = {"model": tree_to_dict(trained), "optimizer": tree_to_dict(opt_state)}
        for step in reversed(self.steps):
            sources, loaded = self._load(step, like)
            if not sources:
                continue
            first = sources[0] == hosts.number()
            contents = hosts.gather(_content(self._manifests[step]) if first else None)
            progress, fingerprints = contents[sources[0]]
            if len(sources) < hosts.count():
                loaded = _fill(loaded, like)
            if fingerprint.fingerprints(loaded) != fingerprints:
                print_status(f"local checkpoints of step {step} have other arrays than were saved")
                continue
            filled = [host for host in range(hosts.count()) if host not in sources]
            from_replicas = (
                f"; replicas filled host {', '.join(map(str, filled))}" if filled else ""
            )
            print_status(
                f"restored the local checkpoints of step {step} in {self.folder.parent}"
                + from_replicas
            )
            self._stored = sorted(s for s in self._manifests if s <= step)
            restored = dict_to_tree(trained, loaded["model"])
            return Progress(*progress), restored, dict_to_tree(opt_state, loaded["optimizer"])
        if self._newest:
            present = [str(self._newest) in found for found in self._found]
            missing = [str(host) for host, has in enumerate(present) if not has]
            reason = "the hosts' parts don't fit together"
            if missing:
                reason = f"host {', '.join(missing)} has none, and not every shard has a replica"
            print_status(f"can't restore the local checkpoints of step {self._newest} ({reason})")
        return None

    def _load(self, step: int, like: dict[str, Any]) -> tuple[list[int], Any]:
        """Loads this host's part of a step.

        Returns:
            The hosts that have loaded theirs, empty if the step can't be restored from them, and
            the arrays with this host's shards, None if it has none.
        """
        loaded, reason = None, None
        if step in self._manifests:
            try:
                where = self.folder / str(step)
                loaded = load_items(where, manifest.verified_manifest(where)["files"], like)
            except (Damaged, Fault) as error:
                reason = error.reason if isinstance(error, Damaged) else str(error)
        for host, text in enumerate(hosts.gather(reason)):
            if text:
                self._found[host].pop(str(step))
                print_status(f"the local checkpoint of step {step} on host {host}: {text}")
        return self._sources(step), loaded


def _run_mark(run_folder: AnyPath) -> str:
    """Returns the name of a run's local folders, from its path and the random id in its folder.

    The id alone would be that of a copied run folder too, the path alone that of a removed one.
    """
    identity = read_many(run_folder, ["run_id"])["run_id"]
    if identity is None:
        identity = secrets.token_hex(16).encode()
        write_file(run_folder / "run_id", identity)
    location = run_folder.absolute() if isinstance(run_folder, Path) else run_folder
    return hashlib.sha256(f"{location}\n".encode() + identity).hexdigest()[:16]


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # missing, or not readable: nothing can be restored from it
        return []


def _content(found: dict[str, Any]) -> tuple[list[Any], dict[str, str]]:
    """Returns the parts of a manifest that are the same on all hosts."""
    return [*Progress.of_manifest(found)], found["fingerprints"]


def _print_on_this_host(text: str) -> None:
    """Prints a line on the standard error of the host that has a problem with its own disk."""
    print(f"host {hosts.number()}: {text}", file=sys.stderr, flush=True)


def _digest(found: dict[str, Any]) -> str:
    return manifest.hash_bytes(json.dumps(_content(found), sort_keys=True).encode())


def _fill(loaded: Any, like: dict[str, Any]) -> Any:
    if loaded is None:
        return jax.tree.map(lambda abstract: fill_from_replicas(None, abstract), like)
    return jax.tree.map(fill_from_replicas, loaded, like)
