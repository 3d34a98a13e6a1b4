"""The method inside Lightning's Trainer. Import this module explicitly: Lightning is not a dependency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import BindingError
from .freezing.config import SafeConfig
from .freezing.freezer import AdapterFreezer
from .report.report import FreezeReport

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError(
            "safe_peft.lightning needs Lightning, which is not installed: pip install pytorch-lightning (or lightning)."
        ) from error


class SafeLightningCallback(Callback):
    """Freezes adapters while a LightningModule trains, and logs `safe/*`.

    The module is or contains the PEFT model. The length of the training comes from the Trainer. Checkpoints contain the
    method's state, so `fit(ckpt_path=...)` resumes. When `fit` ends, also with an exception, the model is an ordinary
    PEFT model again.

    Args:
        config: the options.

    Example:
        >>> callback = SafeLightningCallback(SafeConfig(target_fraction=0.5))  # doctest: +SKIP
        >>> lightning.Trainer(max_epochs=1, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
        >>> callback.freezer.report().save_html("report.html")  # doctest: +SKIP
    """

    def __init__(self, config: SafeConfig | Mapping[str, Any] | None = None) -> None:
        self.config = SafeConfig.of(config)
        self._freezer: AdapterFreezer | None = None
        self._saved: dict[str, Any] = {}  # state of the checkpoint to resume from, or of the latest training
        self._resumes = False
        self._seen = 0

    @property
    def freezer(self) -> AdapterFreezer:
        """The freezer of the current or latest training.

        Raises:
            BindingError: No training has begun.
        """
        if self._freezer is None:
            raise BindingError("there is no freezer yet; call Trainer.fit(), which makes it when training begins.")
        return self._freezer

    def report(self, **options: Any) -> FreezeReport:
        """Return the report; see `AdapterFreezer.report`."""
        return self.freezer.report(**options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the freezer, and load the checkpoint's state if there is one."""
        total = self.config.total_steps or trainer.estimated_stepping_batches
        self._seen = trainer.global_step
        freezer = AdapterFreezer(
            trainer.model,  # with DDP's wrapper, which holds the process group
            trainer.optimizers,
            self.config,
            total_steps=int(total) if 0 < total < math.inf else None,
            first_step=self._seen,
        )
        if self._resumes:
            try:
                freezer.load_state_dict(self._saved)
            except BaseException:
                freezer.detach()
                raise
        self._freezer, self._saved, self._resumes = freezer, {}, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Finish the optimizer step, if this batch had one: gradients may accumulate over several batches."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.freezer.step()
        pl_module.log_dict(self.freezer.metrics())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the model an ordinary PEFT model again."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Make the model an ordinary PEFT model again, also after Ctrl-C."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self._saved or ({} if self._freezer is None else self._freezer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training begins."""
        self._saved, self._resumes = state_dict, bool(state_dict)

    def _end(self) -> None:
        if self._freezer is not None and not self._saved:
            try:
                self._saved = self._freezer.state_dict()  # a checkpoint may be written after this
            finally:
                self._freezer.detach()
