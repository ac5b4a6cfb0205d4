"""lm-eval's own command line, which knows the model `loraloom` here.

python -m loraloom.eval.harness --model loraloom --model_args base_model=M,adapter=PATH ...
"""

import sys

import loraloom.eval.harness  # noqa: F401  registers the model
from loraloom.errors import LoraloomError

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        sys.exit(cli_evaluate())
    except LoraloomError as error:  # a user's fault
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
