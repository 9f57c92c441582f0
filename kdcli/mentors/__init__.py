"""Frozen networks that teach: the classroom, one call to all of them, and the bank, a cache of their outputs."""
