"""Tests of configuration: models, loader, local folders, secrets, and `ssmd env`."""
