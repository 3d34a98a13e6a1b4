"""Fine-tune MiniLM on film reviews with DDP. Each process trains on its share of every batch; all freeze together.

    $ torchrun --nproc-per-node 2 examples/torchrun.py --steps 160 --output runs/torchrun

Process 0 writes an ordinary PEFT checkpoint and the report.
"""

from __future__ import annotations

import argparse
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from assets import fetch, load_film_reviews
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from safe_peft import AdapterFreezer, SafeConfig


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=16, help="sentences per process and step")
    parser.add_argument("--output", type=Path, default=Path("runs/torchrun"))
    return parser.parse_args()


def device() -> torch.device:
    """Return the accelerator of this process, or the CPU if there is no accelerator."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if kind is None else torch.device(kind.type, dist.get_node_local_rank())


def main() -> None:
    args = options()
    dist.init_process_group()  # torchrun says in the environment who we are
    rank = dist.get_rank()

    torch.manual_seed(0)  # the same adapters everywhere
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    base = AutoModelForSequenceClassification.from_pretrained(fetch("minilm"), num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(base, lora).to(device())
    torch.manual_seed(1 + rank)  # other dropout everywhere

    train, _ = load_film_reviews()
    rows = [{**tokenizer(row.text, truncation=True, max_length=64), "labels": row.label} for row in train]
    batches = DataLoader(
        rows, args.rows, sampler=DistributedSampler(rows), collate_fn=DataCollatorWithPadding(tokenizer)
    )
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(target_fraction=0.75), total_steps=args.steps)

    model.train()
    for step, batch in zip(range(1, args.steps + 1), chain.from_iterable(repeat(batches)), strict=False):
        loss = ddp(**batch.to(device())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen = freezer.step()
        if rank == 0 and (frozen or step % 20 == 0):
            print(f"step {step}: loss {loss.item():.3f}, {len(freezer.frozen)} of {len(freezer.adapters)} frozen")

    freezer.detach(keep_frozen=True)
    if rank == 0:
        model.save_pretrained(args.output)
        freezer.report().save_html(args.output / "report.html")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
