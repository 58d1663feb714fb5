"""``python -m hstu_xd`` is the ``hstu-xd`` command."""

from hstu_xd.cli.app import main

if __name__ == "__main__":
    main()
