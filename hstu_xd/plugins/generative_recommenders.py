"""Plug hstu-xd into generative-recommenders by being imported, once in every process.

The first line of a gin file does it: ``import hstu_xd.plugins.generative_recommenders``. It rebinds
a few names in upstream's trainer; ``HANDLE.revert()`` puts the originals back. From then on
``train_fn.main_module = "HSTU_XD"`` and ``train_fn.dataset_name = "xd:<prepared folder>"`` work,
``xd_encoder.*`` and ``xd_upstream.*`` are known to gin, and upstream's own gin files run as before.
"""

from hstu_xd.plugins.gr.research import HOST
from hstu_xd.plugins.host import activate

HANDLE = activate(HOST)
