"""Writes a contact sheet: `python -m fast_goal.data.sources.scenes PATH [SEED]`."""

import sys

from fast_goal.data.sources.scenes.sheet import write_sheet

if not 2 <= len(sys.argv) <= 3:
    sys.exit(__doc__)
write_sheet(sys.argv[1], *map(int, sys.argv[2:]))
