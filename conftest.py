"""Before anything of loraloom is imported: its functions check their types while tests run."""

from tests import checked_types

checked_types.install()
