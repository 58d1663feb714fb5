"""Stand-in for generative-recommenders where that is not installed: its names, our few lines.

Only what the plug-in and its tests import, with upstream's signatures; test_standin.py compares
them with the real ones. What it computes is HSTU's formulas in plain PyTorch, not upstream's code.
"""
