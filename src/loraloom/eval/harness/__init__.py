"""lm-evaluation-harness on a host: its tasks, asked of several adapters in one pass.

lm_eval.simple_evaluate(model=HostLM(host, tokenizer, "math"), tasks=["arc_easy"])
evaluate_adapters(host, tokenizer, load_tasks(["arc_easy"]), [None, "math", "law"])
"""

from loraloom.errors import ConfigError

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise ConfigError(
        "tasks of lm-evaluation-harness need a package that is not installed; "
        "run: pip install 'loraloom[eval]'"
    ) from error

from loraloom.eval.harness.lm import HostLM, evaluate_adapters
from loraloom.eval.harness.tasks import load_tasks

__all__ = ["HostLM", "evaluate_adapters", "load_tasks"]
