"""``python -m negfast`` is ``negfast``."""

from negfast.cli import main

main()
