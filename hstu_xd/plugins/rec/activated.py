"""Make this package's models known to REC by being imported: what ``patches/`` add to run.py."""

import sys
from pathlib import Path

from hstu_xd.plugins.rec.activate import activate, warn_if_unverified
from hstu_xd.plugins.rec.launch import one_line_errors, show_logs_of
from hstu_xd.plugins.rec.stub_packages import stand_in_for_absent

show_logs_of(Path(sys.argv[0]))
stand_in_for_absent()
warn_if_unverified()
HANDLES = activate()
sys.excepthook = one_line_errors(sys.excepthook)
