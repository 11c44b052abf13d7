"""The pure rules of a trading day: states, events and their fold, calendar, ledger, condition and seal.

What does not belong here: I/O, clocks and randomness. Ids and times come in through parameters.
"""
