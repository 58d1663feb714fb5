"""Plug hstu-xd into upstream's production trainer by being imported, once in every process.

The first line of a gin file does it: ``import hstu_xd.plugins.dlrm_v3.activated``. From then on
``xd_dlrm.*`` and ``xd_encoder.*`` are known to gin, and recipes of this package can be included.
"""

import gin
from hstu_xd.files import gin_folder
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.host import activate

gin.add_config_file_search_path(str(gin_folder().parent))
HANDLE = activate(HOST)
