"""Smaller in other ways: which layers, fewer units, fewer bits, other runtimes, drafts."""
