"""What the GPU did in a report of nsys, as a table: ranges of negfast, top kernels, share of time it was busy.

nsys export --type=sqlite run.nsys-rep && python tools/nsys_table.py run.sqlite
"""

import sys
from pathlib import Path

from negfast.errors import InputError
from negfast.train.profile import table_of_report


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tools/nsys_table.py REPORT.sqlite", file=sys.stderr)
        return 2
    try:
        print("\n".join(table_of_report(Path(arguments[0]))))
    except InputError as error:
        print(f"nsys_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
