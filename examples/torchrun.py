"""Fine-tune MiniLM on film reviews with DDP. Each process trains on its share of every batch; all freeze together.

    $ torchrun --nproc-per-node 2 examples/torchrun.py --steps 160 --output runs/torchrun

Process 0 writes an ordinary PEFT checkpoint and the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.finetune import models
from safe_peft.finetune.assets.texts import load_film_reviews
from safe_peft.finetune.batches import tokenize


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
    dist.init_process_group()  # torchrun sets the rank and the world size in the environment
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same adapters in every process
    source = models.locate("minilm")
    tokenizer = models.load_tokenizer(source)
    base = models.load_model(source, "seq-cls", ["negative", "positive"], tokenizer.pad_token_id)
    model = models.add_lora(base, "seq-cls", {"r": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}).to(device())
    torch.manual_seed(1 + rank)  # different dropout in every process

    train, _ = load_film_reviews()
    rows = tokenize(tokenizer, [row.text for row in train], [row.label for row in train], max_length=64)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(target_fraction=0.75), total_steps=args.steps)

    model.train()
    batches = rows.shuffled(args.rows * world, seed=0)
    for step in range(1, args.steps + 1):
        batch = {name: column[rank::world].to(device()) for name, column in next(batches).items()}
        loss = ddp(**batch).loss
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
