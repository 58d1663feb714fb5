"""The plug-in for HLLM and PerSRec (package ``REC``), without side effects at import.

``python -m hstu_xd.plugins.rec`` runs their run.py with ``model: HSTU_XD`` and ``HLLM_XD`` known.
"""
