"""The tuner that puts bottleneck adapters into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from .config import NAME, BottleneckConfig
from .layer import NO_MERGE, BottleneckLayer
from .positions import sublayers


class BottleneckModel(BaseTuner):
    """PEFT's tuner for bottleneck adapters; `peft.get_peft_model` makes it from a `BottleneckConfig`."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the positions need the model: `_prepare_model`

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find the positions of the adapters, and for adapters in parallel the layers whose input they read."""
        self._first: dict[str, str] = {}
        if peft_config.target_modules is None:
            found = [s for s in sublayers(model) if peft_config.placement == "houlsby" or not s.is_attention]
            peft_config.target_modules = {sublayer.last for sublayer in found}
        if peft_config.placement == "parallel":
            with suppress(ValueError):  # otherwise each adapter reads the input of its layer in target_modules
                self._first = {s.last: s.first for s in sublayers(model) if not s.is_attention}

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        path = self._first.get(current_key)
        first = None if path is None else self.model.get_submodule(path)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, first)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config, first)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse batches of several adapters, which PEFT would ignore silently."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: bottleneck adapters do not support batches of several adapters.")
        yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = [module for module in self.model.modules() if isinstance(module, BottleneckLayer)]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.close()
        return model


register_peft_method(name=NAME.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel)
