"""``python -m structops``: the same as ``structops``."""

from structops.cli import main

main()
