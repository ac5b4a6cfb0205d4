"""lm-evaluation-harness on a host: its tasks, asked of several adapters in one pass.

    lm_eval.simple_evaluate(model=HostLM(host, tokenizer, "math"), tasks=["arc_easy"])
    evaluate_adapters(host, tokenizer, load_tasks(["arc_easy"]), [None, "math", "law"])

Importing this registers the model `loraloom` with lm-eval, whose own command line then knows it:
`python -m loraloom.eval.harness --model loraloom --model_args base_model=M,adapter=PATH ...`.
"""

from loraloom.eval.harness.installed import check_installed

check_installed()

from loraloom.eval.harness.evaluation import evaluate_adapters  # noqa: E402
from loraloom.eval.harness.lm import HostLM, shared_lms  # noqa: E402
from loraloom.eval.harness.tasks import load_tasks  # noqa: E402

__all__ = ["HostLM", "evaluate_adapters", "load_tasks", "shared_lms"]
