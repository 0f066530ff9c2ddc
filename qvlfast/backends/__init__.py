"""Tables of ops other than the reference; :mod:`qvlfast.dispatch` chooses one."""
