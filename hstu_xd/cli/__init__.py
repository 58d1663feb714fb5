"""The ``hstu-xd`` command: one thin module a command, all of the work in the library."""
