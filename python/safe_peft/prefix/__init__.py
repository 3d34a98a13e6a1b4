"""Runs the frozen prefix of a stack once per sample: keeps its output and skips its forward."""
