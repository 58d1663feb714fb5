"""Make this package's models known to REC by being imported: what ``patches/`` add to run.py."""

import sys
from pathlib import Path

from hstu_xd.plugins.host import activate, stand_in_for_absent
from hstu_xd.plugins.rec import HOST
from hstu_xd.plugins.rec.launch import one_line_errors, show_logs_of

show_logs_of(Path(sys.argv[0]))
stand_in_for_absent(HOST)
HANDLE = activate(HOST)
sys.excepthook = one_line_errors(sys.excepthook)
