"""torchrun for ranks.sh: ends with the status of the rank that failed first, and in one line.

The rank has said what is wrong; torchrun itself would add a traceback of its own, a table, and end
with status 1.
"""

from __future__ import annotations

import sys
from datetime import datetime

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A signal's number is negative there.
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        when = datetime.fromtimestamp(failure.timestamp)
        print(f"rank {rank} was the first to end, at {when:%F %T} with status {status}")
        sys.exit(status)
