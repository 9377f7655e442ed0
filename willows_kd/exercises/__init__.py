"""Checks for the exercises of the notebooks: each says what is wrong, or that all is well."""
