"""Asynchronous checkpoints of a run: its state, position in the data, and unlogged metrics."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gigatok_jax import files, sharding
from gigatok_jax.errors import RunStopped, UserError, first_line

DONE = "commit_success.txt"  # which Orbax writes last
Commit = Literal["rename", "file"]


class Restored(NamedTuple):
    """A restored checkpoint; `progress` is JSON data."""

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """Checkpoints in a directory, one per step, each complete or absent.

    Args:
      directory: created if it is missing.
      keep_last: number of newest checkpoints to keep.
      keep_every: also keep checkpoints at multiples of this many steps; 0: none.
      read_only: leave the directory untouched, because another run may be using it.
      commit: "rename" writes a checkpoint aside and renames it; "file" writes it in place, and last
        a file that says that it is complete, as is always done in buckets. Ignored if the directory
        has a checkpoint that was cut off in place.
    """

    def __init__(
        self,
        directory: files.Path,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
        commit: Commit = "rename",
    ):
        mode = ocp.options.AtomicityMode.AUTO
        cut_off = set(_numbered(directory)).difference(saved_steps(directory))
        if not files.in_bucket(directory) and (commit == "file" or cut_off):
            mode = ocp.options.AtomicityMode.COMMIT_FILE
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep_last,
            keep_period=keep_every or None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            atomicity_options=ocp.options.AtomicityOptions(mode),
        )
        self._directory, self._failed = files.real_path(directory), False
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Copies `state` to the host and returns; files are written in the background."""
        # A run that stops right after a regular checkpoint asks for the same step again.
        if step == self.latest:
            return
        # Orbax detects files that are missing or cut, but not a changed byte.
        progress = {"digests": _digests(state, progress)} | progress
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
        )
        with self._one_line():
            self._manager.save(step, args=items, force=True)

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        check: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> Restored | None:
        """Restores a checkpoint; every process of the run calls this.

        Args:
          abstract_state: shapes, types and shardings to restore to; shardings may differ from the
            saved ones.
          step: which checkpoint; None: the newest.
          check: called with the step and `progress` before the state is read; raises UserError if
            the run cannot go on from there.

        Returns:
          The checkpoint, or None if it does not exist.

        Raises:
          UserError: the checkpoint is damaged or belongs to another model.
        """
        step = self.latest if step is None else step
        if step not in self.steps:
            return None
        progress = dict(self._read(step, "progress", ocp.args.JsonRestore()))
        digests = progress.pop("digests", None)
        digests = digests if isinstance(digests, dict) else {}
        self._compare(step, digests.get("progress"), _progress_digest(progress))
        if check:
            check(step, progress)
        state = self._read(step, "state", ocp.args.StandardRestore(abstract_state))
        self._compare(step, digests, _digests(state, progress))
        return Restored(step, state, progress)

    def _read(self, step: int, name: str, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{name: how}))[name]
        except Exception as error:  # Orbax raises half a dozen types, bare ones too
            raise UserError(
                f"{self._manager.directory / str(step)}: checkpoint is damaged or belongs to "
                f"another model ({first_line(error)})"
            ) from error

    def _compare(self, step: int, saved: Any, found: Any) -> None:
        if saved != found:
            raise UserError(
                f"{self._manager.directory / str(step)}: checkpoint is damaged or of an older "
                "version (the digest is not that of its content); without it, the run goes on from "
                "the checkpoint before, or starts anew"
            )

    def check(self) -> None:
        """Raises RunStopped if writing in the background has failed."""
        with self._one_line():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until all checkpoints are written; raises RunStopped if one cannot be."""
        with self._one_line():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the writer threads."""
        try:
            if not self._failed:  # otherwise the error has been raised
                self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turns what Orbax raises when it cannot write into RunStopped; the rest passes."""
        try:
            yield
        except Exception as error:
            self._failed = True
            if not isinstance(error, OSError) and not any(t in str(error) for t in files.FULL):
                raise  # the loss of another process, for example
            where = f"{self._directory}: a checkpoint cannot be written ({files.reason(error)})"
            raise RunStopped(f"{where}; {last_good(self._directory)}") from error


def _digests(state: Any, progress: dict[str, Any]) -> dict[str, str]:
    """Digests of what a checkpoint holds; they do not depend on how the state is sharded."""
    return {"state": f"{int(_checksum(state)):08x}", "progress": _progress_digest(progress)}


def _progress_digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _checksum(state: Any) -> jax.Array:
    """All bits of a state in 32: sums with odd weights, so that no single change is missed."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        weights = 2 * sharding.places(leaf.shape) + 1
        total = total * jnp.uint32(16777619) + jnp.sum(bits.astype(jnp.uint32) * weights)
    return total


def saved_steps(directory: files.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    found = sorted(int(path.parent.name) for path in directory.glob(f"*/{DONE}"))
    # Checkpoints of older versions of Orbax are complete without it, except in buckets.
    return found if found or files.in_bucket(directory) else _numbered(directory)


def _numbered(directory: files.Path) -> list[int]:
    """Steps of the complete checkpoints, and of those that were cut off while written in place."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def last_good(directory: files.Path) -> str:
    """Which checkpoint a run that stopped goes on from, for messages."""
    steps = saved_steps(directory)
    last = f"step {max(steps)}" if steps else "none yet"
    return f"last good checkpoint: {last}. Once that is mended, the same command resumes the run"
