"""The training behind the command `safe-peft finetune`."""
