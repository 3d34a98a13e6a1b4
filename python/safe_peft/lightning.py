"""The method inside Lightning's Trainer. Import it by its name: Lightning is no dependency of this package."""

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

    The module may be, or hold, the PEFT model. The length of the training comes from the Trainer. Checkpoints carry the
    method's state, so `fit(ckpt_path=...)` goes on where it stopped. When `fit` ends, by itself or by an exception, the
    PEFT model is what it was.

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
        self._saved: dict[str, Any] = {}  # of a checkpoint that is resumed from, and of the training that ended last
        self._resumes = False
        self._seen = 0

    @property
    def freezer(self) -> AdapterFreezer:
        """The freezer of the training that runs, or ran last.

        Raises:
            BindingError: No training has begun.
        """
        if self._freezer is None:
            raise BindingError("there is no freezer yet: Trainer.fit() makes it when training begins.")
        return self._freezer

    def report(self, **options: Any) -> FreezeReport:
        """Return what happened; see `AdapterFreezer.report`."""
        return self.freezer.report(**options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the freezer, and go on from the checkpoint if there is one."""
        total = self.config.total_steps or trainer.estimated_stepping_batches
        self._seen = trainer.global_step
        freezer = AdapterFreezer(
            trainer.model,  # with DDP's wrapper, by which the processes find each other
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
        """Account for the optimizer step, if the batch ended with one: gradients may accumulate over several."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.freezer.step()
        pl_module.log_dict(self.freezer.metrics())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave an ordinary PEFT model behind."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave an ordinary PEFT model behind, after Ctrl-C too."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint carries."""
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
