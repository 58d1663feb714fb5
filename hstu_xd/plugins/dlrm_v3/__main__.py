"""``python -m hstu_xd.plugins.dlrm_v3``: upstream's trainer with any gin file."""

import sys

from hstu_xd.plugins.dlrm_v3.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
