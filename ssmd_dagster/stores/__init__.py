"""Adapters to the servers that hold the system's state: NATS JetStream, Redis, object stores. They decide nothing."""
