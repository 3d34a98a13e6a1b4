"""Where the gradient enters a model for nothing: `enable_input_require_grads` makes the embeddings' output a leaf.

Checkpointing set-ups switch that on so that some input requires grad. With a frozen prefix it builds the whole graph
below the lowest live adapter, which nobody's gradient needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapters import peft_kind
from ..swap import STATE, Swapped, is_bound


class SafeEmbedding(Swapped):
    """Input embeddings that remember their latest output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, hooks included."""
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        output = super().__call__(*args, **kwargs)
        self.__dict__[STATE].remember(output)
        return output


@dataclass
class Entry:
    """The latest output of a model's input embeddings."""

    _outputs: list[weakref.ref[Tensor]] = field(default_factory=list)

    def remember(self, output: Any) -> None:
        """Note an output; the tensor itself is not kept alive."""
        if isinstance(output, Tensor):
            self._outputs = [ref for ref in self._outputs if ref() is not None]
            self._outputs.append(weakref.ref(output))

    def is_artificial(self, hidden: Tensor) -> bool:
        """Whether all that a tensor's gradient would reach are embeddings' outputs that were made leaves.

        A trainable embedding, a prompt, or a tensor of the user's that requires grad is something else, and is reached.
        """
        if not hidden.requires_grad:
            return False
        outputs = [output for ref in self._outputs if (output := ref()) is not None]
        return all(any(leaf is output for output in outputs) for leaf in _leaves(hidden))


def _leaves(tensor: Tensor) -> Iterator[Any]:
    """The leaves that a tensor's gradient reaches; None for one that is not to be told."""
    if tensor.grad_fn is None:
        yield tensor
        return
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            yield getattr(node, "variable", None)
        stack += [following for following, _ in node.next_functions if following is not None]


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules whose outputs `enable_input_require_grads` makes leaves; those with an adapter train, and are not."""
    found = []
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embeddings, nn.Module) and peft_kind(embeddings) is None:
            found.append(embeddings)
    return list(dict.fromkeys(found))
