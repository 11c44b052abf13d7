"""Trading-day management for exchange market data: start, record, prove and roll each day.

The public surface for researchers and operators; nothing here imports dagster.
"""

__version__ = "0.1.0"
