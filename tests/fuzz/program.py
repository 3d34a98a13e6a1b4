"""Runs a case once, over a stock PEFT model or over the same one bound, and gathers all that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from case import Case
from disturb import Seen, add_hook, change, scale, spot_of
from peft import PeftModel
from torch import Tensor

import safe_peft
from build import batch_of, leaf_of, model_of, prefix_of
from safe_kernels import retention
from safe_peft.binding.blocks import PARTS
from safe_peft.loss import own_loss


@dataclass
class Outcome:
    """What a run gave. `bytes` is what the graph of one forward holds at the end; None where that says nothing."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    error: Exception | None = None
    bytes: int | None = None


@dataclass
class Run:
    """One model of a case with the program's forwards."""

    case: Case
    model: PeftModel
    call: Callable[..., Any]
    seen: Seen
    dtype: torch.dtype | None
    bound: bool
    leaves: list[Tensor] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    between: Callable[[], None] = lambda: None

    def forward(self, number: int = 0) -> Tensor:
        """The loss of one batch."""
        case = self.case
        batch, leaf = leaf_of(case, self.model, batch_of(case, number, self.dtype))
        if leaf is not None and leaf.requires_grad:
            self.leaves.append(leaf)
        extra: dict[str, Any] = {"use_cache": True} if case.cache == "on" else {}
        self.seen.in_loss.clear()
        with self.autocast():
            if case.cache == "given":
                first, batch = prefix_of(batch)
                with torch.no_grad():
                    context = self.model(**first, use_cache=True)
                extra = {"past_key_values": context.get("past_key_values", context.get("cache")), "use_cache": True}
            if case.entry == "backbone":
                batch = {name: value for name, value in batch.items() if name != "labels"}
                return self._of_hidden(self.model.get_base_model().base_model(**batch, **extra))
            if case.entry == "chunked":
                loss = safe_peft.chunked_loss if self.bound else own_loss
                return loss(self.model, {**batch, **extra})
            return self._of_all(self.call(**batch, **extra))

    def autocast(self) -> AbstractContextManager[Any]:
        on = self.case.precision == "autocast" and self.dtype is None
        return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()

    def _of_hidden(self, out: Any) -> Tensor:
        hidden = out[0]
        self._write(hidden)
        return self._add(_weighted(hidden), out)

    def _of_all(self, out: Any) -> Tensor:
        loss = out.loss
        if self.case.writes.startswith("result"):
            self._write(out.logits)
            loss = loss + _weighted(out.logits)
        return self._add(loss, out)

    def _write(self, result: Tensor) -> None:
        if self.case.writes == "result":
            result[..., result.shape[-1] // 2 :] = 0
        elif self.case.writes.startswith("result"):
            scale(result, self.case.writes.removeprefix("result "))

    def _add(self, loss: Tensor, out: Any) -> Tensor:
        """What else the case has in its loss."""
        for name in ("hidden_states", "attentions", "router_logits", "encoder_hidden_states", "cross_attentions"):
            asked = out.get(name) if self.case.asks != "nothing" else None
            loss = loss + sum(_weighted(value) for value in asked or () if isinstance(value, Tensor))
        loss = loss + sum(_weighted(value) for value in self.seen.in_loss)
        cached = out.get("past_key_values", out.get("cache"))
        if hasattr(cached, "get_seq_length"):
            self.events.append(f"cache of {cached.get_seq_length()}")
        return loss

    def backward(self, *losses: Tensor, **options: Any) -> None:
        self.losses += [loss.detach().clone() for loss in losses]
        sum(losses).backward(**options)  # type: ignore[union-attr]


def _weighted(value: Tensor) -> Tensor:
    """A number that depends on every element in another way."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.promote_types(value.dtype, torch.float32))
    weights = weights.roll(value.numel() // 3)
    return (value.to(weights.dtype).sin().flatten() * weights).mean()


# ---------------------------------------------------------------- which calls follow each other


def _once(run: Run) -> None:
    run.backward(run.forward())


def _two(run: Run) -> None:
    first = run.forward()
    run.between()
    run.backward(first, run.forward(1))


def _no_grad_first(run: Run) -> None:
    with torch.no_grad():
        run.forward()
    run.between()
    _once(run)


def _inference_first(run: Run) -> None:
    with torch.inference_mode():
        run.forward()
    run.between()
    _once(run)


def _accumulate(run: Run) -> None:
    run.backward(run.forward())
    run.between()
    run.backward(run.forward(1))


def _eval_between(run: Run) -> None:
    loss = run.forward()
    run.model.eval()
    with torch.no_grad():
        run.forward(1)
    run.model.train()
    run.between()
    run.backward(loss)


def _eval(run: Run) -> None:
    run.model.eval()
    run.backward(run.forward())


def _disabled(run: Run) -> None:
    with run.model.disable_adapter():
        without = run.forward(1)
    run.between()
    run.backward(without, run.forward())


def _again(run: Run) -> None:
    loss = run.forward()
    run.backward(loss, retain_graph=True)
    run.backward(loss)


def _autograd_grad(run: Run) -> None:
    loss = run.forward()
    run.losses.append(loss.detach().clone())
    trained = [p for p in run.model.parameters() if p.requires_grad] + run.leaves
    for parameter, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
        parameter.grad = grad


def _step(run: Run) -> None:
    run.backward(run.forward())
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    run.between()
    run.backward(run.forward(1))


CALLS: dict[str, Callable[[Run], None]] = {
    "once": _once,
    "two": _two,
    "no grad first": _no_grad_first,
    "inference first": _inference_first,
    "accumulate": _accumulate,
    "eval between": _eval_between,
    "eval": _eval,
    "disabled": _disabled,
    "again": _again,
    "autograd.grad": _autograd_grad,
    "step": _step,
}


# ---------------------------------------------------------------- one run


def play(case: Case, *, bound: bool, recompute: bool = False, dtype: torch.dtype | None = None) -> Outcome:
    """Run a case.

    Args:
        bound: whether the model is.
        recompute: whether all its frozen blocks run again in backward.
        dtype: of the weights, which keep the values they have in the case's precision, and without autocast.
    """
    outcome = Outcome()
    with ExitStack() as undo:
        undo.callback(torch.compiler.reset) if case.compiled else None
        try:
            run = _prepare(case, bound, recompute, dtype, undo)
            CALLS[case.calls](run)
            outcome.losses, outcome.gradients = run.losses, dict(_gradients(run))
            outcome.events = [*run.events, *run.seen.events]
            if case.when == "between" and case.calls in ("once", "eval", "again", "autograd.grad"):
                run.between()
            if dtype is None and not case.compiled and case.precision != "fp64":  # there stock's norms compute in fp32
                outcome.bytes = retention.measure(run.forward, exclude=run.model).bytes
        except Exception as error:  # which is compared
            outcome.error = error.with_traceback(None)
    return outcome


def _parts(case: Case) -> Collection[str]:
    return PARTS if case.parts == "all" else {case.parts} & set(PARTS)


def _prepare(case: Case, bound: bool, recompute: bool, dtype: torch.dtype | None, undo: ExitStack) -> Run:
    model, seen = model_of(case, dtype), Seen()

    def disturb() -> None:
        if case.hook != "none":
            add_hook(case, model, seen)
        change(case, model, undo)

    if case.when == "before":
        disturb()
    if bound:
        binding = undo.enter_context(safe_peft.bind(model, parts=_parts(case)))
        binding.recompute.update(binding.blocks if recompute else ())
        str(safe_peft.explain(model))
    if case.when == "after":
        disturb()
    if case.writes == "embeddings":
        _, embeddings = spot_of(case, model, "embeddings")
        embeddings.register_forward_hook(lambda m, args, out: out[..., :3].zero_() and None)
    call = torch.compile(model, backend="aot_eager") if case.compiled else model
    run = Run(case, model, call, seen, dtype, bound)
    if case.when == "between":
        run.between = partial(change, case, model, undo)
    torch.manual_seed(1)
    return run


def _gradients(run: Run) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.detach().clone()
    for kind, tensors in (("leaf", run.leaves), ("hooked leaf", run.seen.leaves)):
        for index, leaf in enumerate(tensors):
            if leaf.grad is not None:
                yield f"{kind} {index}", leaf.grad.detach().clone()
    for index, tensor in enumerate(run.seen.tensors):
        yield f"seen by a hook {index}", tensor
