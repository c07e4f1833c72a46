"""The checkpoints of a run: saved in the background, committed at once, verified when restored.

`checkpoints/<step>/` contains the items `model` (all weights, or the low-rank pairs of a LoRA run)
and `optimizer`, where <step> is the number of completed steps. An object store can't rename a
folder, so `manifest.json` commits a checkpoint: host 0 writes it last, after every host has
reported that its shards are stored. A folder without a manifest is incomplete, and no run resumes
from it.
"""

import contextlib
import secrets
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import optax

from llama_jax.checkpoint import array_files, fingerprint
from llama_jax.checkpoint.arrays import FAULTS, load_items
from llama_jax.checkpoint.commit import commit
from llama_jax.checkpoint.folders import committed_steps
from llama_jax.checkpoint.save_thread import SaveThread
from llama_jax.checkpoint.tree import dict_to_tree, tree_to_dict
from llama_jax.config.run import CheckpointConfig
from llama_jax.errors import Fault, InputError
from llama_jax.model.lora import Trained
from llama_jax.runtime import hosts, manifest
from llama_jax.runtime.console import print_status
from llama_jax.runtime.damage import Damaged, root_cause
from llama_jax.runtime.folder_lock import FolderLock
from llama_jax.runtime.manifest import verified_manifest
from llama_jax.runtime.storage import AnyPath, read_many, remove_tree, write_many


class Progress(NamedTuple):
    """The metadata of a training checkpoint."""

    step: int  # completed steps; also the number of the next step
    data: list[str]  # fingerprint of the data
    base: str | None = None  # of a LoRA run: `model_folders.manifest_hash` of its base
    recent: list[list[float]] | None = None  # step, loss and gradient norm of the last steps

    @classmethod
    def of_manifest(cls, content: Mapping[str, Any]) -> "Progress":
        """Returns the progress in the manifest of a checkpoint."""
        return cls(*(content[name] for name in cls._fields))


class TrainingCheckpoints:
    """The checkpoints of a run.

    With a `config`, superseded checkpoints are removed; without, the checkpoints are only read.

    Args:
        folder: `checkpoints` in the folder of the run.
        config: which checkpoints are retained.
        lock: of the run's folder. Host 0 asks it whether this run still owns the folder, before a
            checkpoint is started and before it is committed.

    Attributes:
        steps: the steps of all committed checkpoints, ascending.
        incomplete: the steps of folders without a manifest, ascending.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: CheckpointConfig | None = None,
        lock: FolderLock | None = None,
    ):
        self.folder, self._config, self._lock = folder, config, lock
        self.steps, self.incomplete = committed_steps(folder)
        self._attempt = ""
        if config:  # on several hosts, which may not see the same folder at the same time
            self._attempt = hosts.broadcast_decision(lambda: secrets.token_hex(8))
            self.steps = hosts.broadcast_decision(lambda: self.steps)
            self._check_versions()
        self._saving: tuple[int, SaveThread] | None = None
        self._closing = threading.Event()

    def _check_versions(self) -> None:
        """Refuses the checkpoints of version 0.1, which would be taken for incomplete ones.

        Raises:
            InputError: the folder contains one.
        """
        names = [f"{step}/commit_success.txt" for step in self.incomplete]  # written by Orbax
        if any(read_many(self.folder, names).values()):
            raise InputError(
                f"the checkpoints in {self.folder} were written by llama_jax 0.1: finish the run"
                " with that version, or choose another training.out"
            )

    def save(self, progress: Progress, trained: Trained, opt_state: optax.OptState) -> None:
        """Copies the state to the host and saves it in the background.

        The arrays may be donated as soon as this returns. All hosts call this at the same step.

        Raises:
            Fault: this save, or the previous one, failed.
        """
        self.wait()
        if progress.step in self.steps:
            return
        with self._explain_failure(progress.step):
            # Before any host writes: a removal would also remove the chunks of a faster host.
            hosts.broadcast_decision(lambda: self._remove_leftover(progress.step))
            items = {"model": tree_to_dict(trained), "optimizer": tree_to_dict(opt_state)}
            computed = fingerprint.start_fingerprints(items)
            specs = {item: array_files.array_specs(tree) for item, tree in items.items()}
            files = array_files.metadata(specs) if hosts.is_host_zero() else {}
            shards = array_files.copy_shards(items)
        store = partial(self._store, progress, specs, files, shards, computed)
        self._saving = progress.step, SaveThread("save", store)

    def _remove_leftover(self, step: int) -> None:
        """Removes an incomplete or damaged checkpoint of a step that this run saves now.

        Raises:
            Fault: another run owns the folder. Its checkpoints stay as they are.
        """
        self._check_owner()
        if (self.folder / str(step)).exists():
            self._remove(step)
        self.incomplete = [s for s in self.incomplete if s != step]

    def _remove(self, step: int) -> None:
        # Without its manifest a partly removed folder is not taken for a checkpoint.
        (self.folder / str(step) / manifest.NAME).unlink(missing_ok=True)
        remove_tree(self.folder / str(step))

    def _store(
        self,
        progress: Progress,
        specs: dict[str, Any],
        files: dict[str, bytes],
        shards: dict[str, Any],
        computed: Any,
    ) -> None:
        """Writes this host's part of a checkpoint and commits it; in the background thread."""
        folder = self.folder / str(progress.step)
        if hosts.is_host_zero():
            write_many(folder, files)
        sums = dict[str, int]()
        for item, parts in shards.items():
            stores = array_files.open_for_writing(folder / item, specs[item])
            array_files.write_shards(stores, parts)
            found = array_files.sum_shards(stores, parts)
            sums |= {f"{item}/{name}": value for name, value in found.items()}
            parts.clear()  # frees the host's memory
        content = {
            "format": 1,
            **progress._asdict(),
            "files": {name: manifest.hash_bytes(data) for name, data in files.items()},
            "fingerprints": fingerprint.to_text(computed),
        }
        commit(folder, content, sums, self._attempt, self._closing, self._check_owner)
        self.steps.append(progress.step)
        if hosts.is_host_zero():
            self._remove_superseded()

    def remove_leftovers(self) -> None:
        """Removes the old and the incomplete checkpoints that a killed run has left.

        All hosts call this.

        Raises:
            Fault: another run owns the folder.
        """

        def remove() -> None:
            self._check_owner()
            self._remove_superseded()

        hosts.broadcast_decision(remove)

    def _remove_superseded(self) -> None:
        """Removes old checkpoints, and incomplete folders that a newer checkpoint makes useless."""
        assert self._config
        keep, keep_every = self._config.keep, self._config.keep_every
        old = [s for s in self.steps[:-keep] if not (keep_every and s % keep_every == 0)]
        for step in old + self.incomplete:
            self._remove(step)
        self.steps = [step for step in self.steps if step not in old]
        self.incomplete = []

    def _check_owner(self) -> None:
        if self._lock:
            self._lock.check()

    def check(self) -> None:
        """Raises the error of the last save if it has failed. Doesn't wait for a save.

        Raises:
            Fault: the save failed, or another run owns the folder; earlier checkpoints are
                unchanged.
        """
        if self._lock:
            self._lock.raise_if_lost()
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background, if there is one.

        Raises:
            Fault: as `check`.
        """
        saving, self._saving = self._saving, None
        if saving:
            with self._explain_failure(saving[0]):
                saving[1].result()

    def close(self) -> None:
        """Waits for the last save.

        Raises:
            Fault: as `check`.
        """
        try:
            self.wait()
        finally:
            self._closing.set()

    @contextlib.contextmanager
    def _explain_failure(self, step: int) -> Iterator[None]:
        """Replaces an error of saving by a Fault that also names the remaining checkpoints."""
        try:
            yield
        except FAULTS as error:
            with contextlib.suppress(OSError):  # frees its space: the disk may be full
                remove_tree(self.folder / str(step))
            remaining = "there is no earlier checkpoint"
            if self.steps:
                numbers = ", ".join(map(str, self.steps))
                remaining = f"the checkpoints of steps {numbers} are unchanged"
            raise Fault(
                f"can't save step {step} in {self.folder} ({root_cause(error)}): {remaining}; fix"
                " the cause and repeat the command, which resumes from the last checkpoint"
            ) from error

    def restore_newest(
        self, trained: Trained, opt_state: optax.OptState
    ) -> tuple[Progress, Trained, optax.OptState]:
        """Restores the newest checkpoint that is not damaged; prints the damaged ones.

        A damaged checkpoint stays where it is until the run saves its step again.

        Raises:
            Damaged: the newest is damaged and `on_damage` is `stop`; or all are damaged.
        """
        assert self._config
        for step in sorted(self.steps, reverse=True):
            try:
                return self.restore(step, trained, opt_state)
            except Damaged as error:
                self._pass_over(step, error)
        raise AssertionError("a run without a checkpoint has nothing to restore")

    def _pass_over(self, step: int, error: Damaged) -> None:
        """Prints that the newest checkpoint is damaged, and removes it from `steps`.

        Raises:
            Damaged: the run may not resume from the one before it, or there is none.
        """
        assert self._config
        if self._config.on_damage == "stop" or step == self.steps[0]:
            raise error
        print_status(
            f"{self.folder / str(step)} is damaged ({error.reason}): it stays where it is, and the"
            " run resumes from the checkpoint before it"
        )
        self.steps.remove(step)

    def is_finished(self, steps: int) -> bool:
        """Returns whether a checkpoint after `steps` steps or more exists, and isn't damaged.

        Of its files the small ones are verified, not the arrays: nothing is restored. All hosts
        call this.

        Raises:
            Damaged: as `restore_newest`.
        """
        self.steps.sort()
        while self.steps and self.steps[-1] >= steps:
            step = self.steps[-1]
            folder = self.folder / str(step)
            reason = hosts.broadcast_decision(partial(manifest.find_damage, folder))
            if reason is None:
                return True
            self._pass_over(step, Damaged(folder, reason))
        return False

    def restore(
        self, step: int, trained: Trained, opt_state: optax.OptState
    ) -> tuple[Progress, Trained, optax.OptState]:
        """Returns the state saved at `step`, with the shardings of the abstract arguments.

        Every byte is verified: files and chunks by their checksums, the restored arrays by their
        fingerprints.

        Raises:
            Damaged: the stored files are not those that were written.
            InputError: the checkpoint is of other shapes.
            Fault: the machine could not read it.
        """
        where = self.folder / str(step)
        wanted = {"model": tree_to_dict(trained), "optimizer": tree_to_dict(opt_state)}
        damage, found, loaded = None, dict[str, Any](), dict[str, Any]()
        try:
            found = verified_manifest(where)
            loaded = load_items(where, found["files"], wanted)
        except Damaged as error:
            damage = error.reason
        # Each host has read its own shards. The fingerprints are computed by all or by none.
        for reason in hosts.gather(damage):
            if reason:
                raise Damaged(where, reason)
        restored = fingerprint.fingerprints(loaded)
        for name, saved in found["fingerprints"].items():
            if restored[name] != saved:
                raise Damaged(where, f"{name} is not the array that was saved")
        return (
            Progress.of_manifest(found),
            dict_to_tree(trained, loaded["model"]),
            dict_to_tree(opt_state, loaded["optimizer"]),
        )
