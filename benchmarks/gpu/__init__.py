"""Proves and measures a card: `python -m benchmarks.gpu`, eight minutes by default.

Every phase is a process of its own, because a GPU error poisons its process. What it measures goes
to the driver item by item, which writes each down at once. `driver` runs the phases, `phase` is the
process of one, `phases/` has what each measures, `page` makes the report."""
