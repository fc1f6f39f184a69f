"""Chaos: whatever dies, and whenever, a task's generation runs exactly one job. ``make chaos N=200 SEED=1``."""
