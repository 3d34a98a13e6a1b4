"""The method inside a transformers Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .binding.bind import bind
from .distributed.fsdp import fsdp_modules, is_initialized
from .distributed.wrappers import unwrap
from .errors import BindingError, StateError
from .files.checkpoints import PROCESSES, STATE_FILE, checkpoint_files
from .freezing.config import SafeConfig
from .freezing.forgotten import take_over
from .freezing.freezer import AdapterFreezer
from .freezing.optimizer_state import Optimizers
from .report.report import FreezeReport

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

NO_WAY_BACK = (
    "under FSDP2 a Trainer cannot resume from a checkpoint with frozen adapters: it loads the optimizer's state "
    "through torch.distributed.checkpoint before a callback can remove the frozen adapters from it. Use a custom "
    "training loop (docs/resume.md) or a Trainer under DDP."
)


class SafeCallback(TrainerCallback, ExportableState):
    """Freezes adapters while a Trainer trains, and adds `safe/*` to the Trainer's log history; see also `attach`.

    The length of the training comes from the Trainer. Checkpoints contain the method's state, so
    `resume_from_checkpoint` works. A copy is in the checkpoint's `safe_state.json`, for `AdapterFreezer.load`.

    Args:
        config: the options.
        detach: make the model an ordinary PEFT model again when training ends. Otherwise adapters stay frozen, on the
            fast path, until `freezer.detach()`.

    Example:
        >>> callback = SafeCallback(SafeConfig(target_fraction=0.5))  # doctest: +SKIP
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
        >>> callback.report().save_html("report.html")  # doctest: +SKIP
    """

    def __init__(self, config: SafeConfig | Mapping[str, Any] | None = None, *, detach: bool = True) -> None:
        self.config = SafeConfig.of(config)
        self._detach = detach
        self._freezer: AdapterFreezer | None = None

    def attach(self, trainer: Trainer) -> Self:
        """Put this callback before the Trainer's other callbacks, so that TensorBoard, W&B and others log `safe/*` too.

        All callbacks receive the same dict in order, and a Trainer calls its loggers before the user's callbacks.

        Args:
            trainer: a Trainer that does not train yet. It may or may not contain this callback.

        Returns:
            The callback itself.

        Raises:
            BindingError: `trainer` is not a Trainer of transformers.

        Example:
            >>> trainer = Trainer(model=model, args=args, train_dataset=data)  # doctest: +SKIP
            >>> callback = SafeCallback(SafeConfig(target_fraction=0.5)).attach(trainer)  # doctest: +SKIP
        """
        handler = getattr(trainer, "callback_handler", None)
        if handler is None:
            raise BindingError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}.")
        callbacks = handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        else:
            take_over(unwrap(trainer.model))
        callbacks.insert(0, self)
        return self

    @property
    def freezer(self) -> AdapterFreezer:
        """The freezer of the current or latest training.

        Raises:
            BindingError: No training has begun.
        """
        if self._freezer is None:
            raise BindingError("there is no freezer yet; call Trainer.train(), which makes it when training begins.")
        return self._freezer

    def report(self, **options: Any) -> FreezeReport:
        """Return the report; see `AdapterFreezer.report`."""
        return self.freezer.report(**options)

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer saves in `trainer_state.json` and returns on resuming."""
        saved = {} if self._freezer is None else self._freezer.state_dict()
        attributes = {"saved": saved, PROCESSES: torch.distributed.get_world_size() if is_initialized() else 1}
        return {"args": {"config": self.config.to_dict(), "detach": self._detach}, "attributes": attributes}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the model after an interrupted training, before the Trainer makes its optimizer."""
        if kwargs.get("model") is not None:
            take_over(unwrap(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the freezer, and load the checkpoint's state if there is one."""
        trains_again = take_over(unwrap(kwargs["model"]))
        if self._freezer is not None:
            self._freezer.detach()
        if trains_again:
            with bind(kwargs["model"]) as binding:
                Optimizers(kwargs["optimizer"]).admit(binding.live_adapters())
        saved = self._saved_state(state) if state.global_step else {}
        freezer = AdapterFreezer(
            kwargs["model"],
            kwargs["optimizer"],
            self.config,
            total_steps=self.config.total_steps or state.max_steps,
            first_step=state.global_step,
        )
        freezer.standing.by_trainer = True
        if saved:
            try:
                freezer.load_state_dict(saved)
            except StateError:
                freezer.detach()
                raise
        elif state.global_step:
            logger.warning("the checkpoint at step %d has no SAFE state; scoring starts again", state.global_step)
        self._freezer = freezer
        if args.save_strategy != "no" and any(True for _ in fsdp_modules(kwargs["model"])):
            logger.warning(NO_WAY_BACK)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the Trainer needs an existing key

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finish the optimizer step, and log each freeze event."""
        if self.freezer.step() and args.logging_strategy != "no":
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `safe/*` to a training log, for the history and for the callbacks after this one."""
        if self._freezer is None or not logs or "loss" not in logs:
            return
        metrics = self._freezer.metrics()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state into the checkpoint's folder, after all other files and with their checksums."""
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()  # waits until every process has written its part
        if args.should_save and folder.is_dir():
            self.freezer.save(folder / STATE_FILE, files=checkpoint_files(folder))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the model an ordinary PEFT model again, if `detach`."""
        self.freezer.standing.finished = True
        if self._detach:
            self.freezer.detach()

    def _saved_state(self, state: TrainerState) -> Any:
        """Return the output of `state` in the checkpoint that the Trainer resumes from."""
        entry = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(entry, list):
            entry = next(iter(entry), None)
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        return attributes.get("saved") if isinstance(attributes, dict) else None
