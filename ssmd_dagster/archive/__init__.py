"""The data formats: records, batches, segments and where they lie. No sockets, no servers."""
