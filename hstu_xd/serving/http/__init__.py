"""The HTTP service: one session behind a bounded queue, one log of events that is the truth.

Nothing here is imported but by ``hstu-xd serve``, which needs ``pip install "hstu-xd[serving]"``.
"""
