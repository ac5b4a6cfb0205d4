"""Names of the files that a run writes, and a report reads."""

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
SWEEP_TABLE = "sweep.csv"
