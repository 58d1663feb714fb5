"""Hashes of the sources that a plug-in was verified with, blind to comments and layout."""

import ast
import hashlib
import io
import textwrap
import tokenize


def source_hashes(source: str) -> dict[str, str]:
    """Hash of every top-level function and class of a module, without comments and white space."""
    lines = source.splitlines(keepends=True)
    hashes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            text = _bare(textwrap.dedent("".join(lines[first : node.end_lineno])))
            hashes[node.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return hashes


def _bare(source: str) -> str:
    """Source without comments and white space; the same for every version of Python."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "\n"
    return "".join("".join(lines).split())
