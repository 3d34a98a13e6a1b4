"""Tokenised rows, and the batches they make: the same ones for the same seed, whatever is trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from ..loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, and how to batch them.

    Args:
        ids: token ids, one list a row.
        labels: a class index a row, or None for language modelling, where the tokens are the targets.
        pad_id: the token that fills rows up to the longest of a batch.
    """

    ids: list[list[int]]
    labels: list[int] | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Collate rows, padded on the right to the longest of them.

        Args:
            rows: indices of rows.

        Returns:
            `input_ids` and `attention_mask` [rows, longest], and `labels` [rows], or [rows, longest] with -100 on
            padding for language modelling.

        Example:
            >>> Examples([[5], [6, 7]], None, 0).batch([0, 1])["labels"].tolist()
            [[5, -100], [6, 7]]
        """
        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(self.ids[row])] = torch.tensor(self.ids[row])
            mask[i, : len(self.ids[row])] = 1
        labels = ids.masked_fill(mask == 0, IGNORED) if self.labels is None else self._classes(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _classes(self, rows: Sequence[int]) -> Tensor:
        assert self.labels is not None
        return torch.tensor([self.labels[row] for row in rows])

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yield all rows in batches, in order.

        Args:
            batch_size: rows per batch.

        Example:
            >>> len(list(Examples([[1]] * 5, None, 0).in_order(2)))
            3
        """
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def shuffled(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield training batches without end, every epoch in a new order that the seed alone decides.

        Args:
            batch_size: rows per batch; the last batch of an epoch may be smaller.
            seed: of the order. Torch's own generator is neither read nor moved, so whatever a method draws from it
                (dropout) leaves the batches as they are.

        Example:
            >>> next(Examples([[1], [1]], None, 0).shuffled(2, seed=0))["input_ids"].tolist()
            [[1], [1]]
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator).tolist()
            for start in range(0, len(self), batch_size):
                yield self.batch(order[start : start + batch_size])


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], labels: list[int] | None, max_length: int
) -> Examples:
    """Tokenise texts.

    Args:
        tokenizer: with a padding token.
        texts: one per row.
        labels: a class index a row, or None for language modelling; then rows of a single token, which hold nothing to
            predict, are left out.
        max_length: tokens after which a text is cut.

    Raises:
        ConfigError: No row is left.

    Example:
        >>> tokenize(tokenizer, ["a fine film"], [1], max_length=64)  # doctest: +SKIP
    """
    ids = list(tokenizer(texts, truncation=True, max_length=max_length)["input_ids"])
    if labels is None:
        ids = [row for row in ids if len(row) > 1]
    if not ids:
        raise ConfigError("no row has two tokens or more, so there is nothing to predict; check --text-column.")
    return Examples(ids, labels, int(tokenizer.pad_token_id))
