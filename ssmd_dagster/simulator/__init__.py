"""A Kalshi-protocol exchange in one process, with a log of the truth: what it sent, to whom, when, and what it broke on purpose.

Nothing here knows the recorder: the room speaks Kalshi's public protocol and imports nothing else of the package but
the clock's file format. Nothing of the recorder may import it, tests and the `ssmd sim` command aside.
"""
