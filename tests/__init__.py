"""The tests, in folders as the source: a package, so that they import what they share by its name.

`tests.helpers` has what several of them use. pytest puts the checkout's root on `sys.path`, and the
ranks and commands that the tests start inherit it.
"""
