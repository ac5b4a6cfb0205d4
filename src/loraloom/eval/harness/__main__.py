"""lm-eval's own command line, which knows the model `loraloom` here.

python -m loraloom.eval.harness --model loraloom --model_args base_model=M,adapter=PATH ...
"""

from __future__ import annotations

import sys

import loraloom.eval.harness  # noqa: F401  registers the model
from loraloom.errors import LoraloomError


def main() -> int:
    """Run lm-eval; a user's fault of loraloom's is one message on stderr and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LoraloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
