"""``python -m hstu_xd.plugins.rec``: run.py of HLLM or PerSRec, with this package's model."""

import sys

from hstu_xd.plugins.rec.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
