"""Configured captures: the models of `exchanges/*.yaml`, their loading and validation, local folders and secrets.

What does not belong here: any I/O beyond reading (and, for generated credentials, writing) these files.
"""
