"""What the tests stand on: a fake origin, the real proxy, and clients that see the wire."""
