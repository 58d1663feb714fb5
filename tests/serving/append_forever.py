"""A process that appends to a store until it is killed; given kind and folder."""

import sys
from itertools import count
from pathlib import Path

from store_cases import open_store
from test_state_stores import MODEL, event

from hstu_xd.serving import EncoderSession

if __name__ == "__main__":
    store = open_store(sys.argv[1], Path(sys.argv[2]))
    session = EncoderSession(MODEL, store=store)
    for number in count():
        item, when = event(number)
        session.append(["ann"], [item], [when])
        print(number + 1, flush=True)
