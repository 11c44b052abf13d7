"""Tests of the pure rules of a trading day."""
