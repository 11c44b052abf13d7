"""The verbs of a trading day as plain functions. They know no Dagster and no wire formats.

A verb says what should be true and makes it so; running one twice changes nothing.
"""
