"""Plug-ins into other codebases; importing one changes that codebase's names."""
