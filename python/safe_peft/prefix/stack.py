"""Calls the blocks of one stack: those below the cut only for the samples whose output is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..binding.blocks.arguments import leaves
from ..binding.blocks.recompute import Moment
from ..binding.blocks.stack import Block, hidden_of, replace_hidden
from ..binding.blocks.trains import modules_in, trains
from ..binding.class_swap import is_hooked, saves_by_hooks
from ..binding.code import watched
from ..binding.forward_hooks import Call
from .forward import OFF, Batch, Plan, generators, unknown
from .samples import Samples
from .store import Known

if TYPE_CHECKING:
    from .cache import PrefixCache

ORDER = "the blocks do not run one after the other, each on the output of the one before"
TRAINS = "something below the cut trains"
FORM = "a block returns more than hidden states of the same shape"
ARGUMENTS = "a block below the cut gets other tensors than the first block"
BUFFERS = "a block below the cut changes its own buffers, as a batch norm does"
KEEPS = "the model keeps what its blocks return"
DEPENDS = "a sample's output depends on the other samples of its batch, or on something that PyTorch does not count"
DRAWN = "random numbers are drawn below the cut"


_ELSEWHERE = Batch(None, None)  # kept by another process


class Prefix:
    """The cache of one stack: its blocks by their paths, lowest first."""

    def __init__(self, cache: PrefixCache, number: int, stack: Mapping[str, nn.Module]) -> None:
        self._cache, self._number = cache, number
        self._names, self._blocks = list(stack), list(stack.values())
        self._places = {id(block): index for index, block in enumerate(self._blocks)}
        self._moments: list[Moment] = []
        self._tuples: dict[int, int] = {}  # by block, the length of the tuple that it returns; 0 means a tensor
        self._never = ""  # why this stack's blocks always run
        self._padding_matters: bool | None = None  # None until a backward has shown it
        self._batches: set[int | None] = set()  # hashes of the batches that were kept
        self._independent = False  # samples were computed in two batches, with the same result
        self._any_length = False  # and with more or less padding
        self._kept_in: dict[str, Batch] = {}  # by key, the batch in which a sample was kept
        self._checked_up_to = 0  # the highest block whose input was compared
        self._parts_up_to = 0  # below this block, a part of a batch was compared with the whole

    def run(
        self,
        state: Block,
        block: nn.Module,
        call: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a block: for all samples, for some, or for none."""
        running = self._cache.current
        index = self._places[id(block)]
        if running is not None and index == 0:
            running.notes[str(id(self))] = self._plan(running, args, kwargs)
        plan = running.notes.get(str(id(self))) if running is not None else None
        if plan is None or index > plan.cut:
            with self.quiet(block):
                return call(args, kwargs)
        hidden = hidden_of(args, kwargs)
        plan.reason = plan.reason or self._unlike(plan, index, hidden, args, kwargs)
        if index == plan.cut:
            args, kwargs = replace_hidden(args, kwargs, lambda hidden: self._arrive(plan, hidden))
            return call(args, kwargs)
        self._check(plan, index, hidden)
        plan.require_exact()
        usage, skipped = self._cache.usage, len(plan.keys) - len(plan.active)
        usage.skipped[state.name] = usage.skipped.get(state.name, 0) + skipped * hidden.shape[1]
        with self.quiet(block):
            output = self._run(plan, index, call, args, kwargs)
        first = _first(output)
        if isinstance(first, Tensor):
            if (full := plan.enter(index + 1, first)) is not first:
                first, output = full, self._like(index, full)
            plan.returned(first)
        return output

    def _unlike(self, plan: Plan, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return why a block's call has another order or other arguments than the prefix needs; "" if it fits."""
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf is not hidden]
        if index == 0:
            plan.given = given
            return ""
        if len(plan.outputs) != index or plan.last is not hidden:
            return ORDER
        same = all(any(leaf is one for one in plan.given) and not leaf.requires_grad for leaf in given)
        return "" if same or index == plan.cut else ARGUMENTS

    def _run(
        self, plan: Plan, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block below the cut for the samples that need it."""
        hidden = hidden_of(args, kwargs)
        if not plan.active:
            return self._like(index, unknown(hidden))
        samples = Samples(args, kwargs, hidden)
        if len(plan.active) == len(plan.keys) or samples.reason:
            output = self._of_form(plan, index, call(args, kwargs), hidden.shape)
            if plan.tried and not plan.reason and not self._equals_part(plan, samples, call, _first(output)):
                plan.reason = DEPENDS
            return output
        rows = torch.tensor(plan.active, device=hidden.device)
        output = call(*samples.some(rows))
        part = _first(self._of_form(plan, index, output, torch.Size((len(rows), *hidden.shape[1:]))))
        plan.require_exact()
        full = unknown(hidden, part.dtype)
        full[rows] = part
        return self._like(index, full)

    def _equals_part(self, plan: Plan, samples: Samples, call: Callable[..., Any], output: Tensor) -> bool:
        """Whether a block gives the same result for a part of a batch as for the whole batch.

        Shapes do not always show which arguments have a value per sample: there may be as many heads as samples.
        """
        rows, again = torch.tensor(plan.tried, device=output.device), output.clone()
        try:
            again[rows] = _first(call(*samples.some(rows)))
        except (RuntimeError, ValueError, TypeError, IndexError):  # arguments, or outputs, do not fit together
            return False
        return all(_is_close(_value(plan, again, row), _value(plan, output, row)) for row in plan.tried)

    def _of_form(self, plan: Plan, index: int, output: Any, shape: torch.Size) -> Any:
        """Return a block's output; record a reason if such an output cannot be kept and restored."""
        first, length = _first(output), len(output) if isinstance(output, tuple) else 0
        rest = output[1:] if length else ()
        fits = isinstance(first, Tensor) and first.shape == shape and all(one is None for one in rest)
        if not fits or self._tuples.setdefault(index, length) != length:
            plan.reason = FORM
        elif first.requires_grad:
            plan.reason = TRAINS
        return output

    def _like(self, index: int, hidden: Tensor) -> Any:
        length = self._tuples[index]
        return (hidden, *[None] * (length - 1)) if length else hidden

    # ---------------------------------------------------------------- the beginning and the end of the prefix

    def _plan(self, running: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        cut = next((index for index, block in enumerate(self._blocks[:-1]) if trains(block)), len(self._blocks) - 1)
        hidden, notes = hidden_of(args, kwargs), running.notes
        if cut < len(self._moments):
            self._forget(cut)  # trainable tensors may change in a way that PyTorch does not count
        if cut == 0 or hidden is None or hidden.requires_grad or not notes["usable"]:
            return None
        samples = Samples(args, kwargs, hidden)
        if reason := next(iter(notes["asked"]), "") or self._never or samples.reason or self._compare(cut):
            self._cache.refuse(reason)
            return None
        drawn = generators() if self._number else notes["random"]
        kept, padding = self._without_padding(notes["masks"], hidden)
        keys = [f"{self._number}.{key}" for key in samples.keys(kept)]
        known, batch = self._known(keys, cut), Batch(hidden.shape[1], hash(tuple(keys)))
        checked = self._to_check(keys, known, batch)
        known = {row: one for row, one in known.items() if row not in checked}
        depths = [known[row].depth if row in known else 0 for row in range(len(keys))]
        tried = [row for row, depth in enumerate(depths) if depth < max(depths)] if self._parts_up_to < cut else []
        if tried:  # the first batch of which only a part would run
            known, checked = {}, {**checked, **known}
        self._cache.count(len(keys), len(known))
        plan = Plan(cut, self._names[cut], keys, batch, kept, padding, known, checked, tried, drawn)
        # Padding that was filled is always checked: then backward finds a loss that depends on it.
        plan.probes = padding is not None and (self._padding_matters is None or plan.filled)
        return plan

    def _known(self, keys: Sequence[str], cut: int) -> dict[int, Known]:
        store = self._cache.store
        store.refresh()
        found = {row: store.get(key) for row, key in enumerate(keys)}
        if not all(index in self._tuples for index in range(cut)):
            return {}  # the form of a block's output is known after its first call here
        return {row: one for row, one in found.items() if one is not None and one.depth <= cut}

    def _to_check(self, keys: Sequence[str], known: Mapping[int, Known], batch: Batch) -> dict[int, Known]:
        """Return known samples to compute again as a check: all, until samples are known to be independent."""
        # The same samples in the same order: none has to run without the others.
        is_whole = len(known) == len(keys) and len({one.depth for one in known.values()}) == 1
        is_same = is_whole and batch.samples in self._batches
        if not self._independent and not is_same:
            return dict(known)
        padded = {
            row: one for row, one in known.items() if self._kept_in.get(keys[row], _ELSEWHERE).tokens != batch.tokens
        }
        checked = {} if self._any_length else padded
        deepest = max(known, key=lambda row: known[row].depth, default=None)
        if deepest is None or not self._independent:
            return checked
        is_new = self._checked_up_to < known[deepest].depth and not is_same
        return {**checked, deepest: known[deepest]} if self._cache.checks or is_new else checked

    def _compare(self, cut: int) -> str:
        """Drop the kept outputs of a changed block; return why the blocks below the cut cannot be skipped."""
        for index, moment in enumerate(self._moments):
            if not moment.holds():
                self._forget(index)
                break
        if watched():
            return "there are hooks on all modules"
        for block in self._blocks[len(self._moments) : cut]:
            modules = list(modules_in(block))
            hooked = next((module for module in modules if is_hooked(module)), None)
            if hooked is not None:
                return f"there are hooks on a {type(hooked).__name__} below the cut"
            self._moments.append(Moment(modules))
            self._batches.clear()
        return ""

    def _forget(self, index: int) -> None:
        """Drop the kept outputs of a block and of those above it."""
        del self._moments[index:]
        self._cache.store.drop(above=index)
        self._independent, self._any_length, self._checked_up_to, self._parts_up_to = False, False, 0, 0
        self._batches.clear()

    def _without_padding(self, masks: Sequence[Tensor], hidden: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the tokens of each sample without padding that has no effect, and where padding is."""
        every: list[Tensor | None] = [None] * len(hidden)
        if len(masks) != 1 or masks[0].shape != hidden.shape[:2]:
            return every, None  # with two masks, such as an encoder's and a decoder's, one may belong to another stack
        real = (masks[0] != 0).cpu()
        real |= ~real.any(1, keepdim=True)  # a sample that is only padding is kept whole
        if real.all():
            return every, None
        if self._padding_matters is not False:
            return every, ~real
        return [None if row.all() else row.nonzero().flatten() for row in real], ~real

    def _arrive(self, plan: Plan, hidden: Tensor) -> Tensor:
        """Keep the computed outputs, and return the input of the cut."""
        plan.reason = plan.reason or self._inexact(plan, hidden)
        drew = "" if plan.drawn == generators() else self._random()
        self._check(plan, plan.cut, hidden)
        if plan.reason:
            self._never = plan.reason
            self._cache.store.drop()
        plan.require_exact()
        if plan.reason or drew:
            self._cache.refuse(plan.reason or drew)
            return hidden
        values = hidden.detach()
        for row in range(len(plan.keys)):
            is_new = row not in plan.known or plan.known[row].depth < plan.cut
            if is_new and self._cache.store.put(plan.keys[row], plan.cut, _value(plan, values, row)):
                self._kept_in[plan.keys[row]] = plan.batch
        self._batches.add(plan.batch.samples)
        self._parts_up_to = plan.cut if plan.tried else self._parts_up_to
        return self._probe(plan, hidden) if plan.probes and not saves_by_hooks() else hidden

    def _inexact(self, plan: Plan, hidden: Tensor) -> str:
        """Return why an output may differ in the next epoch, or is needed now; "" if neither."""
        if hidden.requires_grad:
            return TRAINS
        if any(one() is not None and one() is not hidden for one in plan.outputs[:-1]):
            return KEEPS
        if any(moment.buffers_changed() for moment in self._moments[: plan.cut]):
            return BUFFERS
        return ""

    def _check(self, plan: Plan, index: int, hidden: Tensor) -> None:
        """Compare the samples that were computed although the input of this block is known."""
        for row, (depth, kept) in plan.checked.items():
            if depth != index:
                continue
            value = _value(plan, hidden.detach(), row).cpu()
            if value.shape != kept.shape or value.dtype != kept.dtype:
                continue
            before = self._kept_in.get(plan.keys[row], _ELSEWHERE)
            if before.samples != plan.batch.samples:  # the same samples show nothing about other batches
                self._independent, self._checked_up_to = True, max(self._checked_up_to, index)
            self._any_length |= before.tokens != plan.batch.tokens
            if not _is_close(kept, value):
                plan.reason, self._independent, self._any_length = DEPENDS, False, False
                return

    def _probe(self, plan: Plan, hidden: Tensor) -> Tensor:
        """Let backward show whether the loss depends on the hidden states of padding."""
        padding, filled = plan.padding, plan.filled

        def judge(gradient: Tensor) -> None:
            assert padding is not None
            if not bool(gradient.isfinite().all()):
                return
            matters = bool((gradient[padding.to(gradient.device)] != 0).any())
            if matters and filled:
                raise RuntimeError(
                    "prefix_cache: the loss depends on padding now, and did not before; give padding the label -100 "
                    f"and the attention mask 0, or {OFF}."
                )
            self._padding_matters = matters or bool(self._padding_matters)

        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(judge)
        return leaf

    def _random(self) -> str:
        for module in (module for block in self._blocks for module in modules_in(block)):
            if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
                by = f" (by a {type(module).__name__}, p={module.p:g}, and perhaps others)"
                return f"{DRAWN}{by}; set prefix_dropout=False to switch dropout off there"
        return DRAWN

    @contextmanager
    def quiet(self, block: nn.Module) -> Iterator[None]:
        """Switch off dropout in a block below the cut, if the options require it."""
        below = self._blocks[: self._places[id(block)] + 1]
        off = not self._cache.dropout and not self._cache.before_trains() and not any(map(trains, below))
        loud = [module for module in modules_in(block) if module.training] if off else []
        for module in loud:
            module.training = False
        try:
            yield
        finally:
            for module in loud:
                module.training = True


def _value(plan: Plan, values: Tensor, row: int) -> Tensor:
    """Return a sample's hidden states, without padding that has no effect."""
    places = plan.kept[row]
    return values[row] if places is None else values[row, places.to(values.device)]


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ only by the rounding of products in batches of other sizes."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    eps = torch.finfo(one.dtype).eps
    error = min(3 * eps**0.5, 512 * eps) * float(other.abs().nan_to_num().max())
    return torch.allclose(one, other, rtol=0.0, atol=error, equal_nan=True)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output
