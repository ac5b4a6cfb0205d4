"""Many jobs on many devices: workers with an engine each, and who trains where."""
