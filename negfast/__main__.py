"""``python -m negfast`` is ``negfast``; ranks are started so, and end without the interpreter's teardown."""

import os

from negfast.cli import main

try:
    main()
except SystemExit as end:
    if "RANK" in os.environ:
        from negfast.runtime.distributed import leave

        leave(int(end.code or 0))
    raise
