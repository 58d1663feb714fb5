"""Comparing trained runs: reading run folders, tables, figures and one self-contained page."""
