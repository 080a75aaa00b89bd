"""Writes a contact sheet: `python -m fast_goal.data.sources.scenes PATH [SEED [SOURCE]]`."""

import sys

from fast_goal.data.sources.scenes.sheet import write_sheet

if not 2 <= len(sys.argv) <= 4:
    sys.exit(__doc__)
write_sheet(sys.argv[1], *map(int, sys.argv[2:3]), **({"source": sys.argv[3]} if len(sys.argv) > 3 else {}))
