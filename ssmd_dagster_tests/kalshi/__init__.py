"""Tests of the Kalshi room, against small servers made to fail on demand and against the simulator."""
