"""Programs written for Kalshi, unchanged, against the simulated exchange."""
