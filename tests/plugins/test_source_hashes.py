"""What counts as the same source."""

from hstu_xd.plugins.host import source_hashes


def test_verified_means_the_same_source_whatever_the_comments() -> None:
    source = "@decorated\ndef f(x):\n    return x + 1\n"
    noted = "@decorated  # why\ndef f(x):\n\n    # note\n    return (x\n        + 1)\n"
    plain = source_hashes(source)["f"]
    assert source_hashes(noted.replace("(x\n        + 1)", "x + 1"))["f"] == plain
    assert source_hashes(source.replace("+ 1", "+ 2"))["f"] != plain
