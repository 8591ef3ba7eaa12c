"""The same federation on real clients over gRPC: one server process, one persistent process a client."""
