"""Asynchronous checkpoints of a run: its state, its place in the data, its unlogged metrics."""

import pathlib
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gigatok_jax.errors import UserError


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives back."""

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """Checkpoints under a directory, one a step, each complete or not there.

    Args:
      directory: created if missing.
      keep_last: number of newest checkpoints kept.
      keep_every: checkpoints of multiples of this many steps are kept for good; 0: none.
      read_only: nothing under the directory is touched; another run may be at work there.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        keep = [policies.LatestN(keep_last)]
        if keep_every:
            keep.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
            item_names=("state", "progress"),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Copies `state` to the host and returns; files are written in the background.

        Args:
          step: updates made so far.
          state: pytree of arrays.
          progress: what JSON can hold.
        """
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """A checkpoint, or None where there is none; all processes of a run call this together.

        Args:
          abstract_state: shapes, types and shardings to restore to.
          step: which one; None: the newest.

        Raises:
          UserError: it is damaged, or that of another state.
        """
        step = self.latest if step is None else step
        if step not in self.steps:
            return None
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), progress=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax raises half a dozen types, bare ones too
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self._manager.directory / str(step)}: unreadable checkpoint, or of another "
                f"model ({reason})"
            ) from error
        return Restored(step, restored.state, restored.progress)

    def wait(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees what writing took."""
        self.wait()
        self._manager.close()
