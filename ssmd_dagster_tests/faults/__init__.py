"""Faults put into real processes, and judged by the exchange's own log of the truth."""
