"""`python -m loraloom`, which `torchrun -m loraloom` runs in each of its processes."""

import sys

from loraloom.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
