"""Calls the blocks of one stack: those below the cut only for the samples whose output is not known."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..binding.blocks.moment import Moment
from ..binding.blocks.stack import Block, replace_hidden
from ..binding.blocks.trains import modules_in, trains
from ..binding.class_swap import is_hooked, saves_by_hooks
from ..binding.code import watched
from ..binding.forward_hooks import Call
from .forward import KEEPS, OFF, Plan, generators
from .samples import Samples

if TYPE_CHECKING:
    from .cache import PrefixCache

logger = logging.getLogger(__name__)

DROPOUT = "dropout is on below the cut{where}; set prefix_dropout=False to switch it off there"


class Prefix:
    """The cache of one stack.

    Args:
        cache: the model's cache.
        number: the number of the stack.
        stack: the blocks by their paths, lowest first.
    """

    def __init__(self, cache: PrefixCache, number: int, stack: Mapping[str, nn.Module]) -> None:
        self._cache, self._number = cache, number
        self._names, self._blocks = list(stack), list(stack.values())
        self._places = {id(block): index for index, block in enumerate(self._blocks)}
        self._moments: list[Moment] = []
        self._tuples: dict[int, int] = {}  # by block, the length of the tuple that it returns; 0 means a tensor

    def run(
        self,
        state: Block,
        block: nn.Module,
        call: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a block: for all samples, for some, or for none.

        Args:
            state: the block's state.
            block: the block.
            call: calls it with arguments.
            args: of the call.
            kwargs: of the call.
        """
        running = self._cache.current
        index = self._places[id(block)]
        if running is not None and index == 0:
            running.notes[str(id(self))] = self._plan(running, args, kwargs)
        plan = running.notes.get(str(id(self))) if running is not None else None
        if plan is None or index > plan.cut:
            return call(args, kwargs)
        if not plan.keys:
            with self._quiet(block) if index < plan.cut else nullcontext():
                return call(args, kwargs)
        hidden = hidden_of(args, kwargs)
        if len(plan.outputs) != index or (plan.outputs and plan.outputs[-1]() is not hidden):
            plan.reason = "the blocks do not run one after the other, each on the output of the one before"
        if index == plan.cut:
            args, kwargs = replace_hidden(args, kwargs, lambda hidden: self._arrive(plan, hidden))
            return call(args, kwargs)
        usage, skipped = self._cache.usage, len(plan.keys) - len(plan.active)
        usage.skipped[state.name] = usage.skipped.get(state.name, 0) + skipped * hidden.shape[1]
        with self._quiet(block):
            output = self._run(plan, index, call, args, kwargs)
        first = _first(output)
        if isinstance(first, Tensor) and (full := plan.enter(index + 1, first)) is not first:
            first, output = full, self._like(index, full)
        plan.outputs.append(weakref.ref(first))
        return output

    def _run(
        self, plan: Plan, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block below the cut for the samples that need it."""
        hidden = hidden_of(args, kwargs)
        if not plan.active:
            return self._like(index, hidden.detach())
        samples = Samples(args, kwargs, hidden)
        if len(plan.active) == len(plan.keys) or samples.reason:
            output = call(args, kwargs)
            self._note_form(plan, index, output, hidden.shape)
            return output
        rows = torch.tensor(plan.active, device=hidden.device)
        output = call(*samples.some(rows))
        self._note_form(plan, index, output, torch.Size((len(rows), *hidden.shape[1:])))
        plan.require_exact()
        part = _first(output)
        full = part.new_zeros(hidden.shape)
        full[rows] = part
        return self._like(index, full)

    def _note_form(self, plan: Plan, index: int, output: Any, shape: torch.Size) -> None:
        first = _first(output)
        rest = output[1:] if isinstance(output, tuple) else ()
        if not isinstance(first, Tensor) or first.shape != shape or any(one is not None for one in rest):
            plan.reason = "a block returns more than hidden states of the same shape"
        elif first.requires_grad:
            plan.reason = "something below the cut trains"
        self._tuples[index] = len(output) if isinstance(output, tuple) else 0

    def _like(self, index: int, hidden: Tensor) -> Any:
        length = self._tuples[index]
        return (hidden, *[None] * (length - 1)) if length else hidden

    # ---------------------------------------------------------------- the beginning and the end of the prefix

    def _plan(self, running: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        cut = next((index for index, block in enumerate(self._blocks[:-1]) if trains(block)), len(self._blocks) - 1)
        hidden, notes = hidden_of(args, kwargs), running.notes
        if cut == 0 or hidden is None or hidden.requires_grad:
            return None
        plan = Plan(cut, self._names[cut])
        if not notes["usable"]:
            return plan
        samples = Samples(args, kwargs, hidden)
        if reason := next(iter(notes["asked"]), "") or samples.reason or self._compare(cut):
            self._cache.refuse(reason)
            return plan
        kept, padding = self._without_padding(notes["masks"], hidden)
        keys = [f"{self._number}.{key}" for key in samples.keys(kept)]
        self._cache.store.refresh()
        found = {row: self._cache.store.get(key) for row, key in enumerate(keys)}
        if not all(index in self._tuples for index in range(cut)):
            found = {}  # what a block returns is known once it has run here
        known = {row: (one.depth, one.value) for row, one in found.items() if one is not None and one.depth <= cut}
        self._cache.count(len(keys), len(known))
        at_cut = (row for row, (depth, _) in known.items() if depth == cut)
        checked = next(at_cut, None) if self._cache.checks else None
        if checked is not None:
            del known[checked]
        probes = (
            padding is not None and not saves_by_hooks() and (self._cache.padding_matters is None or self._cache.checks)
        )
        random = generators() if self._number else notes["random"]
        return replace(
            plan, keys=keys, kept=kept, padding=padding, known=known, random=random, probes=probes, checked=checked
        )

    def _compare(self, cut: int) -> str:
        """Forget what a changed block has computed; return why the blocks below the cut cannot be skipped."""
        for index, moment in enumerate(self._moments):
            if not moment.holds():
                del self._moments[index:]
                self._cache.store.drop(above=index)
                break
        if watched():
            return "there are hooks on all modules"
        for block in self._blocks[len(self._moments) : cut]:
            modules = list(modules_in(block))
            hooked = next((module for module in modules if is_hooked(module)), None)
            if hooked is not None:
                return f"there are hooks on a {type(hooked).__name__} below the cut"
            self._moments.append(Moment(modules))
        return ""

    def _without_padding(self, masks: Sequence[Tensor], hidden: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the tokens of each sample without padding that has no effect, and where padding is."""
        every: list[Tensor | None] = [None] * len(hidden)
        fitting = [mask for mask in masks if mask.shape == hidden.shape[:2]]
        if not fitting:
            return every, None
        real = torch.stack([mask != 0 for mask in fitting]).all(0).cpu()
        if real.all():
            return every, None
        if self._cache.padding_matters is not False:
            return every, ~real
        return [None if row.all() else row.nonzero().flatten() for row in real], ~real

    def _arrive(self, plan: Plan, hidden: Tensor) -> Tensor:
        """Keep what was computed, and return the input of the cut."""
        computed = [row for row in range(len(plan.keys)) if row not in plan.known or plan.known[row][0] < plan.cut]
        plan.reason = plan.reason or self._inexact(plan, hidden)
        plan.require_exact()
        if plan.reason:
            self._cache.refuse(plan.reason)
            return hidden
        values = hidden.detach()
        for row in computed:
            places = plan.kept[row]
            value = values[row] if places is None else values[row, places.to(values.device)]
            if row == plan.checked and not self._agrees(plan.keys[row], value):
                logger.warning("prefix_cache: something below the cut has changed; what was kept is dropped.")
                self._cache.store.drop()
            self._cache.store.put(plan.keys[row], plan.cut, value)
        return self._probe(plan, hidden) if plan.probes else hidden

    def _inexact(self, plan: Plan, hidden: Tensor) -> str:
        """Return why what was computed may be different in the next epoch, or is needed now; "" if neither."""
        if hidden.requires_grad:
            return "something below the cut trains"
        if any(one() is not None and one() is not hidden for one in plan.outputs[:-1]):
            return KEEPS
        if any(moment.buffers_changed() for moment in self._moments[: plan.cut]):
            return "a block below the cut changes its own buffers, as a batch norm does"
        if any(not torch.equal(*pair) for pair in zip(plan.random, generators(), strict=False)):
            return self._random()
        return ""

    def _agrees(self, key: str, value: Tensor) -> bool:
        one = self._cache.store.get(key)
        if one is None or one.value.shape != value.shape:
            return True
        error = 3 * torch.finfo(value.dtype).eps ** 0.5 * float(value.abs().max())
        return bool(torch.allclose(one.value, value.cpu(), rtol=0.0, atol=error))

    def _probe(self, plan: Plan, hidden: Tensor) -> Tensor:
        """Let backward show whether the loss depends on the hidden states of padding."""
        padding, filled, cache = plan.padding, plan.filled, self._cache

        def judge(gradient: Tensor) -> None:
            assert padding is not None
            at_padding = gradient[padding.to(gradient.device)]
            if not bool(gradient.isfinite().all()):
                return
            cache.padding_matters = matters = bool((at_padding != 0).any())
            if matters:
                cache.store.drop()
            if matters and filled:
                raise RuntimeError(
                    "prefix_cache: the loss depends on padding now, and did not before; give padding the label -100 "
                    f"and the attention mask 0, or {OFF}."
                )

        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(judge)
        return leaf

    def _random(self) -> str:
        names = [
            f" ({type(module).__name__}, p={module.p:g}, and perhaps others)"
            for block in self._blocks
            for module in modules_in(block)
            if isinstance(module, nn.Dropout) and module.p > 0 and module.training
        ]
        return DROPOUT.format(where=names[0] if names else "")

    @contextmanager
    def _quiet(self, block: nn.Module) -> Iterator[None]:
        """Switch off dropout in a block below the cut, if the options say so."""
        loud = [] if self._cache.dropout else [module for module in modules_in(block) if module.training]
        for module in loud:
            module.training = False
        try:
            yield
        finally:
            for module in loud:
                module.training = True


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states among a block's arguments; None if there are none."""
    found: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    replace_hidden(args, kwargs, note)
    return found[0] if found else None
