"""Training steps of Llama shapes with random weights: time and peak memory beside PEFT, Liger and torch.compile."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from machine import arguments, describe, device_of, median_ms, write
from torch import nn

SHAPES = {  # Llama 3.2 1B and Llama 3.1 8B, of their public configurations
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYOUTS: dict[str, Callable[[int, int], bool]] = {
    "nothing": lambda layer, layers: False,
    "lower half": lambda layer, layers: layer < layers // 2,
    "every other": lambda layer, layers: layer % 2 == 0,
    "lower three quarters": lambda layer, layers: layer < 3 * layers // 4,
}


def make_model(shape: dict[str, int], device: torch.device, liger: bool, vocabulary: int) -> nn.Module:
    """Random weights, bf16, LoRA r 16 with dropout 0.1 on every linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(shape["num_attention_heads"] // 4, 1)
    config = LlamaConfig(**shape, num_key_value_heads=heads, vocab_size=vocabulary, use_cache=False)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=TARGETS, bias="none")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def freeze(model: nn.Module, layers: int, is_frozen: Callable[[int, int], bool]) -> None:
    """Freezes whole blocks' adapters, as the schedule does, their dropout off."""
    for index, block in enumerate(model.base_model.model.model.layers):
        if not is_frozen(index, layers):
            continue
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class Step:
    """Forward, backward, optimizer."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor) -> None:
        self.model, self.tokens = model, tokens
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cpu":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measure(provider: str, shape: dict[str, int], layout: str, tokens: torch.Tensor, vocabulary: int) -> dict[str, Any]:
    """One provider at one state of freezing; a provider that cannot run says why."""
    device = tokens.device
    try:
        model = make_model(shape, device, provider == "liger", vocabulary)
        freeze(model, shape["num_hidden_layers"], LAYOUTS[layout])
        if provider == "safe":
            import safe_peft

            safe_peft.bind(model)
        if provider == "compile":
            model = torch.compile(model, backend="aot_eager" if device.type == "cpu" else "inductor")
        step = Step(model, tokens)
        step()
        peak = peak_bytes(step, device)
        return {"ms": median_ms(step, device, budget_ms=1500), "peak_bytes": peak}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch._dynamo.reset()


def runs(dry: bool) -> list[tuple[str, str, str]]:
    """(size, provider, layout): every competitor with nothing frozen, PEFT and ours at every state of freezing."""
    sizes = ["tiny"] if dry else list(SHAPES)
    found = [(size, provider, layout) for size in sizes for layout in LAYOUTS for provider in ("peft", "safe")]
    # Compiling 8B twice over would take the minutes that are left.
    return found + [(sizes[0], provider, "nothing") for provider in ("liger", "compile")]


def main() -> None:
    options = arguments(__doc__ or "")
    device = device_of(options)
    vocabulary, rows, length = (128, 2, 16) if options.dry_run else (32000, 4, 2048)
    tokens = torch.randint(vocabulary, (rows, length), device=device)
    results = []
    try:
        import peft as _peft  # noqa: F401
        import transformers as _transformers  # noqa: F401
    except ImportError as error:
        write(options, {"machine": describe(device), "steps": [], "skipped": str(error)})
        print(f"no training steps: {error}")
        sys.exit(0)
    for size, provider, layout in runs(options.dry_run):
        shape = TINY if options.dry_run else SHAPES[size]
        found = measure(provider, shape, layout, tokens, vocabulary)
        results.append({"size": size, "provider": provider, "frozen": layout, **found})
        print(results[-1], flush=True)
    write(options, {"machine": describe(device), "tokens": [rows, length], "steps": results})


if __name__ == "__main__":
    main()
